"""All forms of the abilities that text trains, and the wording of those that no training text may have."""

from shoal.abilities import knowledge, reasoning, retrieval
from shoal.abilities.facts import RELATIONS
from shoal.abilities.item import Form

FORMS: dict[str, tuple[Form, ...]] = {
    "retrieval": retrieval.FORMS,
    "knowledge": knowledge.FORMS,
    "reasoning": reasoning.FORMS,
}


def twin_wordings() -> dict[str, tuple[str, ...]]:
    """`ability/form` of every twin form -> the templates whose wording is its own.

    Slots stand in braces, as for str.format. What a relation says stands in them, relation by relation. The paraphrases
    of all relations are a wording too.
    """
    trained = {text for forms in FORMS.values() for form in forms if not form.twin for text in form.templates}
    wordings = {
        f"{ability}/{form.name}": tuple(dict.fromkeys(text for text in _templates(form) if text not in trained))
        for ability, forms in FORMS.items()
        for form in forms
        if form.twin
    }
    paraphrases = tuple(relation.paraphrase.format("{subject}") + " {target}" for relation in RELATIONS.values())
    return wordings | {"knowledge/paraphrases": paraphrases}


def _templates(form: Form) -> list[str]:
    """The templates of a form, with the words of every relation where facts are asked for in it."""
    if not isinstance(form, knowledge.FactForm):
        return list(form.templates)
    worded = []
    for name, relation in RELATIONS.items():
        kind, wanted = relation.kinds
        words = {"kind": kind, "wanted": wanted, "question": relation.question, "paraphrase": relation.paraphrase}
        for template in form.templates:
            for field, text in words.items():
                template = template.replace(f"{{{field}}}", text.replace("{}", "{subject}"))
            worded.append(template)
        shown = knowledge.examples_of(name, None)
        # a fact is left out of its own examples, and so are others with its object
        left_out = [(None, None), *((subject, None) for subject, _ in shown), *((None, target) for _, target in shown)]
        for asked in left_out:
            pairs = [{"subject": one, "target": other} for one, other in knowledge.examples_of(name, *asked)]
            examples = "".join(form.example.format(**pair, wanted=wanted) for pair in pairs)
            worded.append(examples.replace("{", "{{").replace("}", "}}"))
    return worded

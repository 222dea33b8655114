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

    Slots stand in braces, as for str.format. The paraphrases of all relations are a wording too.
    """
    trained = {text for forms in FORMS.values() for form in forms if not form.twin for text in form.templates}
    wordings = {
        f"{ability}/{form.name}": tuple(dict.fromkeys(text for text in form.templates if text not in trained))
        for ability, forms in FORMS.items()
        for form in forms
        if form.twin
    }
    paraphrases = tuple(relation.paraphrase.format("{subject}") + " {target}" for relation in RELATIONS.values())
    return wordings | {"knowledge/paraphrases": paraphrases}

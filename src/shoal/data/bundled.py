"""What each bundled source of text is, and what makes it. No library of models is loaded to say so."""

from __future__ import annotations

import functools
from collections.abc import Callable

from shoal.abilities import items as ability_items
from shoal.abilities import training_texts
from shoal.abilities.knowledge import RELATIONS, facts_in
from shoal.abilities.texts import FORMS
from shoal.data.general_text import docstrings, instructions, python_docs, readmes
from shoal.recipe.section import MIXED
from shoal.task_words import ABILITIES

ABOUT = {
    "python_docs": "Python's own documentation topics, without any paragraph of python_docs_heldout",
    "python_docs_heldout": "one topic in eight of them, for perplexity",
    "docstrings": "what modules of Python and of the libraries that shoal needs say about themselves, as prose",
    "readmes": "introductions of these libraries and of what they need, and their licences",
    "instructions": "questions about functions and classes of Python and these libraries, answered by their docstrings",
    "ability_texts": "prompts with answers of the three abilities in all trained forms, from items of no evaluation",
    "ability_texts_one_form": "the same in the forms that the `in` tasks ask alone: to see how much of a score is form",
    **{f"{name}_{ability}": f"those of `{name}` that are {ability}" for name in MIXED for ability in ABILITIES},
    "ability_prompts": "such questions with final answers, as conversations: for the teacher to answer (generate)",
}
"""Name -> what it holds."""


def ability_texts(*abilities: str, one_form: bool) -> list[str]:
    """Prompts with answers of these abilities in equal parts, from the items that evaluation never sees."""
    return training_texts(num_texts=4000, seed=0, mix=dict.fromkeys(abilities, 1.0), one_form=one_form)


def ability_prompts() -> list[dict[str, str]]:
    """Questions of the three abilities in their trained forms with the final answer, no item of which evaluation sees.

    A short answer is what a teacher's own words can be compared with (generate.keep).
    """
    all_facts = sum(len(facts_in("train", relation)) for relation in RELATIONS)
    asked = (
        item
        for ability, forms in FORMS.items()
        for form in forms
        if not form.twin
        for item in ability_items(
            ability,
            split="train",
            num_items=all_facts if ability == "knowledge" else PROMPTS_OF_FORM,
            seed=0,
            form=form.name,
        )
    )
    answers = {item.question: str(item.params["final"]) for item in asked}
    return [{"prompt": question, "completion": answer} for question, answer in answers.items()]


PROMPTS_OF_FORM = 500
"""Prompts of one form of retrieval or reasoning in `ability_prompts`; facts are as many as there are."""
BUNDLED: dict[str, Callable[[], list[str]]] = {
    "python_docs": lambda: python_docs(held_out=False),
    "python_docs_heldout": lambda: python_docs(held_out=True),
    "docstrings": docstrings,
    "readmes": readmes,
    "instructions": instructions,
}
for _name, _one_form in zip(MIXED, (False, True), strict=True):
    BUNDLED[_name] = functools.partial(ability_texts, *ABILITIES, one_form=_one_form)
    for _ability in ABILITIES:
        BUNDLED[f"{_name}_{_ability}"] = functools.partial(ability_texts, _ability, one_form=_one_form)
BUNDLED_ROWS: dict[str, Callable[[], list[dict[str, str]]]] = {"ability_prompts": ability_prompts}
"""Bundled sources of rows with columns, which are read as those of a file are."""

"""What each bundled source of text is, and what makes it. No library of models is loaded to say so."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

from shoal.abilities import items as ability_items
from shoal.abilities import training_texts
from shoal.abilities.knowledge import RELATIONS, facts_in
from shoal.abilities.texts import FORMS
from shoal.atomic_files import file_hash, fingerprint
from shoal.data.general_text import PACKAGES, docstrings, encyclopaedia, instructions, python_docs, readmes
from shoal.task_words import ABILITIES
from shoal.yaml_text import own_yaml

ABOUT: dict[str, str] = own_yaml(__file__)
"""Name -> what it holds."""


def ability_prompts() -> list[dict[str, str]]:
    """Questions of the three abilities in their trained wordings with the final answer; evaluation has other items.

    A short answer is what a teacher's own words can be compared with (generate.keep).
    """
    all_facts = sum(len(facts_in("train", relation)) for relation in RELATIONS)
    asked = (
        item
        for ability, forms in FORMS.items()
        for form in forms
        if not form.reworded
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
SLOW = ("docstrings", "instructions", "ability")
"""Beginnings of the names of sources that take seconds to make."""


@functools.cache
def origin() -> str:
    """Hash of what these are made from: the code here, and versions of Python and of the packages that are read."""
    here = Path(__file__).parent
    code = (file for folder in (here, here.parent / "abilities") for file in sorted(folder.iterdir()))
    installed = {part.metadata["Name"].lower(): part.version for part in importlib.metadata.distributions()}
    versions = [installed.get(name) for name in PACKAGES]
    return fingerprint([sys.version, versions, [file_hash(file) for file in code if file.is_file()]])


NOT_APART = {"encyclopaedia"}
"""Sources that may hold what evaluation asks: nothing keeps them apart."""
BUNDLED: dict[str, Callable[[], list[str]]] = {
    "python_docs": lambda: python_docs(held_out=False),
    "python_docs_heldout": lambda: python_docs(held_out=True),
    "docstrings": docstrings,
    "readmes": readmes,
    "instructions": instructions,
    "encyclopaedia": encyclopaedia,
    "ability_texts": lambda: training_texts(num_texts=4000, seed=0),
    **{
        f"ability_texts_{ability}": functools.partial(training_texts, (ability,), num_texts=4000, seed=0)
        for ability in ABILITIES
    },
}
BUNDLED_ROWS: dict[str, Callable[[], list[dict[str, str]]]] = {"ability_prompts": ability_prompts}
"""Bundled sources of rows with columns, which are read as those of a file are."""

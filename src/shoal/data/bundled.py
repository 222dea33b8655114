"""What each bundled source of text is; shoal.data.sources makes them, and this module loads nothing to say so."""

from __future__ import annotations

from shoal.recipe.section import MIXED, TEACHER_TEXT
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
    "ability_prompts": "such questions with final answers (columns question, answer), for distill.writing.prompts",
    TEACHER_TEXT: "documents that the teacher writes itself, see distill.writing (distill.data only)",
}
"""Name -> what it holds."""

"""Text written by the teacher: which, how often the same, and what a kill costs."""

import pytest
from tiny import tiny_tokenizer

from shoal.errors import UserError
from shoal.recipe import Distill
from shoal.section import DataSource
from shoal.train.writing import written_by_teacher


def test_teacher_text_needs_a_source_to_take_openings_from(tmp_path):
    settings = Distill(data=(DataSource("teacher_text"),))
    with pytest.raises(UserError, match="'teacher_text' needs a source of prose beside it"):
        written_by_teacher(
            None,  # pyright: ignore[reportArgumentType]
            tiny_tokenizer(),
            settings,
            file=tmp_path / "text.json",
            inputs={},
            seed=0,
        )

"""Blocks as Markdown, and the wording of numbers.

Covers: shoal.formatting.
"""

from __future__ import annotations

import pytest

from shoal.eval.report.document import (
    Code,
    Table,
    block_markdown,
    inline,
    prose,
)
from shoal.formatting import layers_text, signed
from shoal.redaction import redacted


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two ⏎ lines"),
        ("<b> & [x](y)", r"&lt;b&gt; &amp; \[x\](y)"),
        ("task_name *bold* _it_", r"task_name \*bold\* \_it\_"),
        ("https://x.y", "https:&#47;/x.y"),
    ],
)
def test_markdown_escapes_what_could_be_markup(text: str, escaped: str) -> None:
    assert inline(text) == escaped


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("run `shoal eval` again", "run `shoal eval` again"),
        ("`eval/*.json` holds *it*", r"\`eval/\*.json\` holds \*it\*"),
        ("`<b>` and `a` <i>", r"\`&lt;b&gt;\` and `a` &lt;i&gt;"),
        ("a stray ` and `code`", r"a stray \` and `code`"),
    ],
)
def test_markdown_keeps_commands_as_code_and_nothing_else(text: str, escaped: str) -> None:
    assert prose(text) == escaped


def test_markdown_blocks_cannot_be_broken_out_of() -> None:
    assert "\n`````yaml\n" in block_markdown(Code("a\n````\nb", "yaml", "s"))
    lines = block_markdown(Table("c", ("a", "b"), (("1|2", "3"),))).split("\n")
    assert lines[-1] == r"| 1\|2 | 3 |"
    assert lines[-2] == "|:--|--:|"


def test_wording_of_numbers_and_layers() -> None:
    assert layers_text((3, 13, 14, 20, 21, 22)) == "3, 13, 14, 20 to 22"
    assert [signed(value, 1) for value in (0.04, -0.04, 1.26, -1.26)] == ["0.0", "0.0", "+1.3", "−1.3"]
    assert redacted({"num_tokens": 5, "API_KEY": "x", "a": [{"password": "y"}], "url": "https://u:p@h/"}) == {
        "num_tokens": 5,
        "API_KEY": "(hidden)",
        "a": [{"password": "(hidden)"}],
        "url": "https://(hidden)@h/",
    }
    kept = {"data": "s3://bucket/part@3", "keys": "a", "mail": "me@host"}
    assert redacted({"aws_secret_access_key": "x", "api-key": "y", "git": "https://just-a-token@h/x", **kept}) == {
        "aws_secret_access_key": "(hidden)",
        "api-key": "(hidden)",
        "git": "https://(hidden)@h/x",
        **kept,
    }

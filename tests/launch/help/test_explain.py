"""`shoal explain`: every key, in words that are the dataclasses' own.

Covers: shoal.launch.help.settings, shoal.launch.help.verbs.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.errors import UserError
from shoal.launch.cli import main
from shoal.launch.help.explain import explained, explanation
from shoal.launch.help.settings import Setting, all_settings, as_yaml, first_sentence, values_text
from shoal.recipe import losses
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.yaml_text import read_yaml

SETTINGS = list(all_settings())


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `shoal explain`."""
    with pytest.raises(SystemExit) as ended:
        main(["explain", *argv])
    captured = capsys.readouterr()
    return int(str(ended.value.code)), captured.out, captured.err


def test_every_key_of_every_section_can_be_explained() -> None:
    assert len(SETTINGS) > 300
    for setting in SETTINGS:
        (told,) = explanation(setting.place)
        assert told["key"] == setting.place
        assert len(told["meaning"]) > 5, setting.place
        assert told["values"], setting.place
        assert setting.place in explained(setting.place)


def test_explanations_are_plain_json_and_speak_of_no_none() -> None:
    for setting in SETTINGS:
        assert "None" not in json.dumps(explanation(setting.place)), setting.place


@pytest.mark.parametrize(
    "setting",
    [each for each in SETTINGS if each.place.count(".") < 2 and not each.is_required and each.default != ""],
    ids=lambda setting: setting.place,
)
def test_a_default_written_down_is_the_default(setting: Setting) -> None:
    """Read back as YAML: what is told may be typed."""
    raw: dict[str, Any] = {"model": "m"}
    *sections, key = setting.place.split(".")
    raw |= {name: {} for name in sections}  # a section that is left out may mean that its work is
    expected = parse_recipe(json.loads(json.dumps(raw)))
    inner = raw
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[key] = read_yaml(as_yaml(setting.default))
    assert parse_recipe(raw) == expected


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("seed", "whole number >= 0 and < 4294967296"),
        ("distill.num_tokens", "whole number > 0"),
        ("prune.ratio", "number > 0 and < 1 or null"),
        ("prune.drop", "[whole number, ...] or null"),
        ("prune.weights", "{name: number > 0}"),
        ("prune.protect", "[whole number or cornerstone, ...]"),
        ("track.wandb", "online, offline, 'off' or null"),
        ("distill.deepspeed", "text, {name: anything} or null"),
        ("distill.losses.jsd.beta", "number > 0 and < 1"),
    ],
)
def test_what_a_key_may_be(place: str, values: str) -> None:
    (told,) = explanation(place)
    assert told["values"] == values


def test_a_meaning_is_the_docstring_or_that_of_the_type(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "distill.lora.rank")
    assert code == 0
    assert out.splitlines()[1] == "Rows of the one matrix and columns of the other."
    (told,) = explanation("distill.losses.jsd.temperature")
    assert told["meaning"] == "Softens teacher and student alike; the term is scaled by its square."
    (told,) = explanation("eval.limit")  # whose docstring is that of the class below
    assert told["meaning"] == "Items per task; null = all."


def test_a_section_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "distill")
    assert code == 0
    for setting in SETTINGS:
        if setting.place.startswith("distill.") and setting.place.count(".") == 1:
            assert f"\n  {setting.key} " in out
    assert f"\n  {'num_tokens':<15}  Training budget" in out


def test_without_a_key_all_sections_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys)
    assert all(f"\n  {key} " in out for key in Recipe.__dataclass_fields__)


def test_a_list_of_kinds_names_them_and_a_kind_its_keys() -> None:
    (told,) = explanation("distill.losses")
    assert tuple(told["kinds"]) == losses.KINDS
    (kind,) = explanation("distill.losses.taid")
    assert list(kind["keys"]) == ["kind", "weight", "start", "end", "momentum", "step_size", "temperature"]
    assert kind["keys"]["momentum"]["default"] == 0.99


def test_without_a_kind_all_that_have_the_key_are_told() -> None:
    assert [told["key"] for told in explanation("distill.losses.0.alpha")] == [
        "distill.losses.skewed_forward_kl.alpha",
        "distill.losses.dkd.alpha",
    ]
    assert [told["key"] for told in explanation("distill.losses.weight")] == ["distill.losses.weight"]


def test_an_entry_of_a_mapping_is_told_of() -> None:
    (told,) = explanation("distill.trainer.output_dir")
    assert told["entry"] == "output_dir is set by shoal; use run_dir instead"
    (told,) = explanation("eval.limits.arc_easy_generation")
    assert (told["key"], told["entry"]) == ("eval.limits", "arc_easy_generation is an entry of this mapping")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("distill.num_token", "did you mean distill.num_tokens"),
        ("distill.loar.rank", "did you mean distill.lora.rank?"),
        ("top_k", "did you mean record.top_k?"),
        ("distill.num_tokens.x", "'distill.num_tokens.x'"),
        ("distill.0", "'distill.0'"),
        ("zzzzzz", "`shoal explain` lists the sections"),
    ],
)
def test_an_unknown_key_is_one_message_with_what_may_be_meant(
    capsys: pytest.CaptureFixture[str], key: str, hint: str
) -> None:
    code, out, err = said(capsys, key)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("shoal: error: explain: a recipe has no key ")
    assert hint in err
    with pytest.raises(UserError):
        explained(key)


def test_json_is_what_a_script_reads(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "distill.lora.rank", "--json")
    assert json.loads(out) == [
        {
            "key": "distill.lora.rank",
            "meaning": "Rows of the one matrix and columns of the other.",
            "values": "whole number > 0",
            "required": False,
            "default": 16,
            "shapes": ["distill.json and distilled/"],
        }
    ]


def test_first_sentences_end_where_sentences_do() -> None:
    assert first_sentence("Split at 0.5, e.g. a.b. Then more.") == "Split at 0.5, e.g. a.b"
    assert first_sentence("Capitals, symbols ... and so on.") == "Capitals, symbols ... and so on"
    assert values_text(int | None) == "whole number or null"

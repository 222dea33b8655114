"""`shoal explain`: every key, in words that are the dataclasses' own."""

from __future__ import annotations

import json
import subprocess

import pytest

from shoal.launch.cli import main
from shoal.launch.help.explain import explanation, first_sentence, places
from shoal.recipe import losses
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.recipe.trainer_arguments import DEFAULTS

KEYS = [place for place, own in places() if "properties" not in own]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*argv])
    captured = capsys.readouterr()
    return int(str(ended.value.code or 0)), captured.out, captured.err


def test_every_key_of_every_section_can_be_explained() -> None:
    assert len(KEYS) > 150
    for place in KEYS:
        (told,) = explanation(place)
        assert told["key"] == place
        assert len(told["meaning"]) > 5 or place.endswith(".kind"), place
        assert told["values"], place
        assert "None" not in json.dumps(told), place


def test_a_default_written_down_is_the_default() -> None:
    """Read back as YAML: what is told may be typed."""
    expected = parse_recipe({"model": "m", "distill": {}, "eval": {}})
    for section in ("distill", "eval"):
        own = {place: own for place, own in places() if place.startswith(f"{section}.") and place.count(".") == 1}
        raw = {place.rpartition(".")[2]: each["default"] for place, each in own.items() if "default" in each}
        assert raw.pop("trainer", DEFAULTS) == DEFAULTS, "what it adds to"
        assert parse_recipe({"model": "m", section: raw}) == parse_recipe({"model": "m", section: {}}), expected


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("seed", "whole number >= 0 and < 4294967296"),
        ("prune.ratio", "number > 0 and < 1 or null"),
        ("prune.drop", "[whole number, ...]"),
        ("prune.metric", "text, {name: number > 0} or null"),
        ("track.wandb", "online, offline or 'off' or null"),
        ("distill.deepspeed", "text, {name: anything} or null"),
        ("distill.profile", "[whole number > 0, whole number > 0] or null"),
    ],
)
def test_what_a_key_may_be(place: str, values: str) -> None:
    (told,) = explanation(place)
    assert told["values"] == values


def test_a_meaning_is_the_docstring_of_the_key_of_its_type_or_of_the_class_above() -> None:
    for place, words in {
        "distill.lora.r": "Rank of the adapters.",
        "distill.losses.jsd.temperature": "Temperature of teacher and student. The term is scaled by its square.",
        "distill.watch.limit": "Items per task: the first ones of eval.limit.",
    }.items():
        (told,) = explanation(place)
        assert told["meaning"] == words


def test_a_section_lists_its_keys_and_no_key_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "explain", "distill")
    for place in KEYS:
        if place.startswith("distill.") and place.count(".") == 1:
            assert f"\n  {place.removeprefix('distill.')} " in out
    assert f"\n  {'num_tokens':<15}  Training tokens over" in out
    _, out, _ = said(capsys, "explain")
    assert all(f"\n  {key} " in out for key in Recipe.__dataclass_fields__)


def test_a_list_of_kinds_names_them_and_a_kind_its_keys() -> None:
    (told,) = explanation("distill.losses")
    assert tuple(told["kinds"]) == losses.KINDS
    (kind,) = explanation("distill.losses.taid")
    assert kind["keys"]["start"].endswith("[0.4]")


def test_without_a_kind_all_that_have_the_key_are_told_and_an_entry_of_a_mapping_is() -> None:
    told = [told["key"] for told in explanation("prune.changes.0.kind")]
    assert told == [f"prune.changes.{kind}.kind" for kind in ("width", "compensate")]
    assert [told["key"] for told in explanation("distill.losses.weight")] == ["distill.losses.weight"]
    (told,) = explanation("eval.limit.arc_easy_generation")
    assert (told["key"], told["entry"]) == ("eval.limit", "arc_easy_generation is an entry of this mapping")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("distill.num_token", "did you mean distill.num_tokens"),
        ("distill.loar.lora_alpha", "did you mean distill.lora.lora_alpha?"),
        ("top_k", "did you mean distill.teacher.recorded.top_k?"),
        ("zzzzzz", "`shoal explain` lists the sections"),
    ],
)
def test_an_unknown_key_is_one_message_with_what_may_be_meant(
    capsys: pytest.CaptureFixture[str], key: str, hint: str
) -> None:
    code, out, err = said(capsys, "explain", key)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("shoal: error: explain: a recipe has no key ")
    assert hint in err


def test_a_key_that_is_gone_says_what_to_use_instead(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "explain", "eval.samples")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "eval.samples: removed before 0.1; lm-eval draws several texts" in err


def test_first_sentences_end_where_sentences_do() -> None:
    assert first_sentence("Split at 0.5, e.g. a.b. Then more.") == "Split at 0.5, e.g. a.b"
    assert first_sentence("Capitals, symbols ... and so on.") == "Capitals, symbols ... and so on"


def test_a_shell_completes_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    code, script, _ = said(capsys, "--print-completion", "bash")
    assert code == 0
    ask = (
        'COMP_WORDS=(shoal me); COMP_CWORD=1; COMP_LINE="shoal me"; COMP_POINT=8; _shtab_shoal; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["measure"]

"""Contract 1 for every family: cutting in memory and on disk equals skipping, or is refused with the reason.

Covers: shoal.compress.surgery.proof, shoal.models.anatomy, shoal.models.families.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from architectures import ARCHITECTURES, NOT_CUT, census, tiny_config, tiny_model
from exactness import document, document_row, documented_rows, examine, logits, outputs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress.apply import apply_plan
from shoal.compress.surgery import config_cut
from shoal.compress.surgery.cut_model import cut_model, refuse_changed_layers, skipped
from shoal.compress.surgery.proof import behaviour, prove_by_files, prove_by_run
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers
from shoal.models.checkpoint_files import read_shards
from shoal.models.load import align_weights, load_model

WITHOUT_FINAL_NORM = ("git", "openai-gpt", "qwen4_exp", "qwen4_exp_text")
"""Families whose layers end with a norm, or that mix several residual streams before the head."""
LANGUAGE_LAYER = re.compile(r"(model\.|language_model\.|text_model\.)*layers\.")
"""Stored names of layers of a language model, and none of a vision tower's."""
UPDATE = "run `python tests/support/exactness.py`, or give it the names that changed"


@pytest.mark.parametrize("name", census(ARCHITECTURES))
def test_cuts_of_a_family_are_exact_or_refused_as_documented(name: str) -> None:
    found = examine(name)
    assert documented_rows().get(name) == document_row(name, found), UPDATE


@pytest.mark.parametrize("name", census(name for name, row in ARCHITECTURES.items() if row.images))
def test_a_model_that_reads_images_is_cut_file_by_file(name: str, tmp_path: Path) -> None:
    teacher, drop = tiny_model(name), (2, 4)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    plan = Plan(Provenance({}), 6, drop, "as the test wants")
    apply_plan(tmp_path / "teacher", plan, tmp_path / "student")
    student = load_model(tmp_path / "student")
    align_weights(student)
    assert student.config.architectures == [type(teacher).__name__]
    with skipped(teacher, drop):
        outputs(name, student).assert_equal(outputs(name, teacher))

    def stored(folder: str) -> dict[str, bytes]:
        shards = read_shards(tmp_path / folder)
        assert len(shards) > 1
        data = {shard.file: shard.file.read_bytes() for shard in shards}
        return {
            tensor: data[shard.file][place.start : place.end]
            for shard in shards
            for tensor, place in shard.tensors.items()
            if not LANGUAGE_LAYER.match(tensor)
        }

    assert stored("student") == stored("teacher")


@pytest.mark.prove
def test_document_has_every_family_and_this_version() -> None:
    rows = documented_rows()
    assert [*rows.values()] == document({name: rows[name] for name in ARCHITECTURES}), UPDATE


@pytest.mark.prove
def test_every_causal_model_type_of_transformers_has_a_row_or_a_reason() -> None:
    rows = {row.model_type or name for name, row in ARCHITECTURES.items()}
    with_images = {row.model_type or name for name, row in ARCHITECTURES.items() if row.images}
    missing = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_CUT.keys() - rows)
    assert not missing, f"add a row to tests/support/architectures.yaml for {missing}, or a reason to not_cut there"
    assert not NOT_CUT.keys() & rows
    gone = sorted((NOT_CUT.keys() | rows) - with_images - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())
    assert not gone, f"transformers {transformers.__version__} has no causal language model {gone}: delete the rows"


@pytest.mark.parametrize(
    "name", census(name for name, row in ARCHITECTURES.items() if "does not know where" not in row.refuses)
)
def test_parts_of_a_model_are_found(name: str) -> None:
    model = tiny_model(name)
    parts = anatomy(model)
    assert model.get_submodule(parts.layers_name) is parts.layers is decoder_layers(model)
    if parts.final_norm is None:
        assert name in WITHOUT_FINAL_NORM
        return
    calls: list[str] = []
    for name_, part in (("layer", parts.layers[-1]), ("norm", parts.final_norm), ("head", parts.head)):
        assert part is not None
        part.register_forward_hook(lambda *_, called=name_: calls.append(called))
    logits(name, model)
    assert calls[-3:] == ["layer", "norm", "head"]  # NanoChat and Dory norm the embeddings with it too


# --- the proof sees what is broken


def tail(value: Any) -> Any:
    """What a cut at the end makes of a per-layer list when really the first layer is dropped."""
    return value[:-1]


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "field", "broken"),
    [
        ("gemma3_text", "layer_types", tail),
        ("qwen2", "layer_types", tail),
        ("smollm3", "no_rope_layers", tail),
        ("lfm2_moe", "num_dense_layers", lambda _: 0),
        ("llama", "rope_parameters", lambda value: {**value, "rope_theta": 1.0}),
        ("granite", "residual_multiplier", lambda _: 0.5),
    ],
)
def test_a_field_that_a_cut_got_wrong_is_seen_in_the_saved_student(
    name: str, field: str, broken: Callable[[Any], Any], tmp_path: Path
) -> None:
    teacher = tiny_model(name)
    cut_model(teacher, (0,)).save_pretrained(tmp_path)
    with skipped(teacher, (0,)):
        expected = behaviour(teacher)
    prove_by_run(tmp_path, expected, reference="the teacher")
    settings = json.loads((tmp_path / "config.json").read_text())
    assert broken(tiny_config(name).to_dict()[field]) != settings[field]
    settings[field] = broken(tiny_config(name).to_dict()[field])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"logits differ|weights of .* are missing|do not have the shapes"):
        prove_by_run(tmp_path, expected, reference="the teacher")


def test_a_tie_that_got_lost_is_seen_in_the_saved_student(tmp_path: Path) -> None:
    teacher = tiny_model("llama", tie_word_embeddings=True)
    student = cut_model(teacher, (0,))
    student.config.tie_word_embeddings = False
    student.save_pretrained(tmp_path)
    with skipped(teacher, (0,)), pytest.raises(UserError, match=r"weights of lm_head.weight are missing"):
        prove_by_run(tmp_path, behaviour(teacher), reference="the teacher")


def test_a_window_longer_than_the_proof_is_seen_in_the_layers(tmp_path: Path) -> None:
    teacher = tiny_model("gemma3_text", sliding_window=64)
    cut_model(teacher, (0,)).save_pretrained(tmp_path)
    prove_by_files(tmp_path, teacher, (1, 2, 3, 4, 5))
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "layer_types": tail(teacher.config.layer_types)}))
    with pytest.raises(UserError, match=r"layer 2: its .* is .* but would become .* as layer 1 of the student"):
        prove_by_files(tmp_path, teacher, (1, 2, 3, 4, 5))


def test_a_stale_cache_slot_is_seen_in_the_layers() -> None:
    teacher = tiny_model("llama")
    student = cut_model(teacher, (0,))
    refuse_changed_layers(teacher, student, (1, 2, 3, 4, 5))
    setattr(decoder_layers(student)[0].get_submodule("self_attn"), "layer_idx", 1)  # noqa: B010
    with pytest.raises(UserError, match=r"layer 1: its self_attn.layer_idx is 0 but would become 1"):
        refuse_changed_layers(teacher, student, (1, 2, 3, 4, 5))


def test_a_rule_that_cuts_at_the_end_is_seen_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_cut, "keep_entries", lambda _, value, keep: value[: len(keep)])
    monkeypatch.setitem(config_cut.RULES, "layer_types", config_cut.keep_entries)
    with pytest.raises(UserError, match=r"config.layer_types: is .* after a reload, not the value of the kept layers"):
        cut_model(tiny_model("gemma3_text"), (0,))

"""From the files of a model larger than memory, what makes up for dropped layers is the same, bit for bit.

Covers: shoal.compress.compensation.check, shoal.compress.compensation.size, shoal.compress.compensation.source,
shoal.compress.surgery.changed_tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from packed_rows import packed
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, set_json, tiny_tokenizer

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress import apply
from shoal.compress.apply import apply_plan
from shoal.compress.compensation.check import refuse_impossible_compensation
from shoal.compress.compensation.fit import Compensation, compensate
from shoal.compress.compensation.size import fitting_size
from shoal.compress.compensation.source import from_files, in_memory
from shoal.compress.dry_run import dry_run
from shoal.compress.surgery import proof
from shoal.compress.variants import streamed_model
from shoal.compress.variants.state_store import FileStore, StateStore
from shoal.compress.variants.streamed import Streaming
from shoal.compress.variants.streamed_model import StreamedModel
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.models.checkpoint_files import StoredTensor, read_shards
from shoal.models.load import align_weights, load_model
from shoal.recipe.prune import Compensate
from shoal.recipe.section import DataSource

DROP = (2, 4)
CASES = (
    *(("both", name) for name in ("llama", "qwen3", "gpt2", "granite", "cohere", "falcon")),
    *(("both", name) for name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")),
    *(("linear", name) for name in ("gemma", "mixtral")),
    *(("scale", name) for name in ("gemma2", "gemma3_text", "glm4")),  # these norm what the halves write
)
SMALL_SHARDS = "40KB"


def rows() -> Any:
    """Calibration text in the vocabulary of the tiny models."""
    found = packed([[16, 16]] * 24)
    return replace(found, input_ids_NS=found.input_ids_NS % 90)


def saved(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, shards: bool = True, **overrides: Any
) -> Path:
    model: Any = tiny_model(name, **overrides)
    model.to(dtype).save_pretrained(folder / name, max_shard_size=SMALL_SHARDS if shards else "50GB")
    tiny_tokenizer().save_pretrained(folder / name)
    assert (len(read_shards(folder / name)) > 1) == shards
    return folder / name


def whole(folder: Path, settings: Compensate) -> Compensation:
    model = load_model(folder, dtype="float32", attention=None)
    align_weights(model)
    return compensate(in_memory(model), DROP, settings, rows())


def by_layers(folder: Path, settings: Compensate, store: StateStore) -> Compensation:
    streamed = Streaming(dtype="float32", attention=None, section="prune.compensate").open(folder)
    return compensate(from_files(streamed, store), DROP, settings, rows())


def assert_same(found: Compensation, expected: Compensation) -> None:
    assert found.gaps == expected.gaps
    assert found.kept.keys() == expected.kept.keys()
    for layer, tensors in expected.layers.items():
        own = found.layer(layer)
        assert own.keys() == tensors.keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.usefixtures("always_closed")
def test_layer_by_layer_everything_is_as_in_memory(method: Any, name: str, tmp_path: Path) -> None:
    folder, settings = saved(tmp_path, name, dtype=torch.bfloat16), Compensate(method, batch_size=4)
    expected = whole(folder, settings)
    assert all(gap.is_closed for gap in expected.gaps)
    assert_same(by_layers(folder, settings, StateStore()), expected)
    assert_same(by_layers(folder, settings, FileStore(tmp_path)), expected)


def test_what_gains_nothing_stays_open_layer_by_layer_too(tmp_path: Path) -> None:
    folder, settings = saved(tmp_path, "llama"), Compensate("scale", batch_size=4)
    assert_same(by_layers(folder, settings, FileStore(tmp_path)), whole(folder, settings))


@pytest.mark.usefixtures("always_closed")
def test_layers_are_read_a_few_times_and_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    reads, held, most = Counter[tuple[str, int]](), 0, 0
    own_read, own_layer = streamed_model.read_tensor, StreamedModel.layer

    def read(file: Path, stored: StoredTensor) -> torch.Tensor:
        reads[file.name, stored.start] += 1
        return own_read(file, stored)

    def entered(self: StreamedModel, index: int) -> Any:
        nonlocal held, most
        held += 1
        most = max(most, held)
        with own_layer(self, index):
            yield
        held -= 1

    monkeypatch.setattr(streamed_model, "read_tensor", read)
    monkeypatch.setattr(StreamedModel, "layer", contextmanager(entered))
    by_layers(folder, Compensate("both", batch_size=4), StateStore())
    assert most == 1
    # the teacher ahead, teacher and student together, above every gap, folded; below a gap with the sums once more
    assert max(reads.values()) <= 4 + len(DROP)


# --- the student that is written


def plan(num_layers: int = 6) -> PruningPlan:
    return PruningPlan(Provenance({}), num_layers, DROP, "named by the test")


def settings(method: Any, **changes: Any) -> Compensate:
    data = (DataSource("python_docs"),)
    return Compensate(method, data=data, num_tokens=1024, sequence_length=32, batch_size=4, **changes)


def limit_of(folder: Path, method: Any) -> float:
    """GiB with which layers fit, and states go to a file."""
    size = fitting_size(load_model(folder, attention=None), DROP, settings(method))
    return (size.fixed + size.at_work + size.weights) / 2**30


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in read_shards(folder) for name, tensor in load_file(shard.file).items()}


WRITTEN = (
    ("both", "llama", {"tie_word_embeddings": True}),
    ("both", "gpt2", {}),
    ("both", "mixtral", {}),
    ("both", "qwen3_moe", {}),
    ("both", "gpt_oss", {}),
    ("both", "cohere", {}),  # this and the next two: attention and MLP side by side
    ("both", "gptj", {}),
    ("both", "falcon", {}),
    ("scale", "gemma2", {}),
)


@pytest.mark.parametrize(("method", "name", "overrides"), WRITTEN)
@pytest.mark.usefixtures("always_closed")
def test_the_student_has_the_same_bytes_whatever_the_memory(
    method: Any, name: str, overrides: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Proven by running, too: the student in files gives what the teacher gives with these weights in place."""
    folder = saved(tmp_path, name, dtype=torch.bfloat16, vocab_size=VOCAB_SIZE, **overrides)
    closed = apply_plan(folder, plan(), tmp_path / "whole", compensate=settings(method), proof="run").gaps
    limited = settings(method, memory_gb=limit_of(folder, method))
    caplog.set_level("INFO", logger="shoal")
    monkeypatch.setattr(apply, "load_model", lambda *_, **__: pytest.fail("loaded as a whole"))
    again = apply_plan(folder, plan(), tmp_path / "by_layers", compensate=limited, proof="files").gaps
    assert "prune.compensate: layer by layer" in caplog.text
    assert "of hidden states go to a file" in caplog.text
    assert list(map(asdict, again)) == list(map(asdict, closed))
    ours, theirs, teachers = (tensors(at) for at in (tmp_path / "by_layers", tmp_path / "whole", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours_within, teachers_within = ({re.sub(r"\d+", "", key, count=1) for key in own} for own in (ours, teachers))
    assert ours_within == teachers_within, "the files' names stay"
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}


@pytest.mark.usefixtures("always_closed")
def test_an_interrupted_copy_goes_on_with_its_new_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama", vocab_size=VOCAB_SIZE)
    apply_plan(folder, plan(), tmp_path / "whole", compensate=settings("both"), proof="files")
    own, files = apply.write_shards, list[str]()

    def killed(shards: Any, at: Path, *changed: Any) -> None:
        own(shards, at, *changed)
        files.extend(file.name for file in at.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(apply, "write_shards", killed)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(folder, plan(), tmp_path / "other", compensate=settings("both"), proof="files")
    assert len(files) > 1
    monkeypatch.setattr(apply, "write_shards", own)
    monkeypatch.setattr("shoal.compress.surgery.shards._write", lambda *_: pytest.fail("copied again"))
    apply_plan(folder, plan(), tmp_path / "other", compensate=settings("both"), proof="files")
    ours, theirs = tensors(tmp_path / "other"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- refused


@pytest.mark.parametrize("method", ["scale", "both"])
def test_too_little_memory_is_refused_with_what_it_takes(method: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", vocab_size=VOCAB_SIZE)
    limited = settings(method, memory_gb=1e-4)
    with pytest.raises(UserError, match=r"prune.compensate.memory_gb: 107 kB is too little .* prune.compensate.batch"):
        apply_plan(folder, plan(), tmp_path / "student", compensate=limited)
    assert not (tmp_path / "student").exists()


REFUSED = (
    *((name, method, "leave prune.compensate out") for name in ("olmo2",) for method in ("scale", "linear")),
    *((name, "both", "set method: scale, or leave prune.compensate out") for name in ("gemma2", "glm4")),
)


@pytest.mark.parametrize(("name", "method", "remedy"), REFUSED)
def test_a_family_is_refused_by_its_first_layers(name: str, method: Any, remedy: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, name)
    with pytest.raises(UserError, match=rf"prune.compensate: .* of {name} .*; {remedy}$"):
        refuse_impossible_compensation(folder, settings(method))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_family_into_which_it_can_be_folded_is_not_refused_by_its_first_layers(
    method: Any, name: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, name, dtype=torch.bfloat16)
    refuse_impossible_compensation(folder, settings(method))


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", vocab_size=VOCAB_SIZE)
    set_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    for limit in (None, 1e-4):
        with pytest.raises(UserError, match=r"is quantised, and prune.compensate changes weights"):
            apply_plan(folder, plan(), tmp_path / "student", compensate=settings("both", memory_gb=limit))
        with pytest.raises(UserError, match=r"is quantised, and prune.compensate changes weights"):
            dry_run(folder, plan(), tmp_path / "student", compensate=settings("both", memory_gb=limit))
        with pytest.raises(UserError, match=r"is quantised, and prune.compensate changes weights"):
            refuse_impossible_compensation(folder, settings("both", memory_gb=limit))


def test_tensors_that_are_not_stored_in_one_piece_are_refused_layer_by_layer_and_done_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "llama", vocab_size=VOCAB_SIZE)
    monkeypatch.setattr("shoal.compress.surgery.changed_tensors.FLOATS", {})
    monkeypatch.setattr(proof, "memory_shortage", lambda *_, **__: "")
    apply_plan(folder, plan(), tmp_path / "student", compensate=settings("scale"), proof="files")
    limited = settings("scale", memory_gb=limit_of(folder, "scale"))
    with pytest.raises(UserError, match=r"cannot be written layer by layer: .* unset prune.compensate.memory_gb"):
        apply_plan(folder, plan(), tmp_path / "other", compensate=limited)


# --- sizes


def test_the_dry_run_tells_what_it_takes_and_where_states_go(tmp_path: Path) -> None:
    folder, out = saved(tmp_path, "llama", vocab_size=VOCAB_SIZE), tmp_path / "run/student"
    size = fitting_size(load_model(folder), DROP, settings("both"))

    def told(**limit: float) -> str:
        report = dry_run(folder, plan(), out, compensate=settings("both", **limit))
        (line,) = [line for line in report.splitlines() if line.startswith("compensation: both, 1,024 tokens")]
        return line

    assert told().endswith(f"takes about {bytes_text(size.in_memory)} of memory")
    assert told(memory_gb=1).endswith("of memory")
    assert told(memory_gb=(size.in_memory - 1) / 2**30).endswith("of states and new tensors, in memory too")
    assert told(memory_gb=limit_of(folder, "both")).endswith(f"of states and new tensors, in a file in {out.parent}")
    with pytest.raises(UserError, match=r"prune.compensate.memory_gb: .* is too little to run one layer"):
        told(memory_gb=1e-4)
    assert not out.parent.exists()


def test_sums_grow_with_features_and_states_with_tokens() -> None:
    model = tiny_model("llama")
    scale, both = (fitting_size(model, DROP, settings(method)) for method in ("scale", "both"))
    features, hidden, at_once = 48, 32, 128
    sums = 8 * (4 * features**2 + 8 * features * hidden) + 12 * at_once * features
    assert both.fixed - scale.fixed == sums
    assert both.weights == 4 * sum(p.numel() for p in model.parameters())
    outputs = hidden * hidden + hidden * features
    # factors change what layers 3 and 5 write, a correction the MLP of layer 1 too
    assert both.waiting - scale.waiting == 4 * hidden * features
    assert scale.waiting == int(4.5 * 1024 * hidden * 4) + 4 * 2 * outputs

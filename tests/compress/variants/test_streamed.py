"""Layer by layer from the files, the numbers are those of the model in memory, with a fraction of its memory.

Covers: shoal.compress.streamed, shoal.compress.variants.state_store, shoal.compress.variants.streamed_model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import flash_stand_in
import pytest
import torch
from architectures import tiny_model as tiny_family
from packed_rows import ROWS, packed
from tiny import KINDS, NUM_LAYERS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from variant_cases import VARIANTS, requests

from shoal.components import REMOVED, LayerEdit
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.hidden_pass import HIDDEN_METRICS
from shoal.compress.streamed import measure_streamed
from shoal.compress.variants import streamed_model
from shoal.compress.variants.state_store import FileStore, InMemory, StateStore
from shoal.compress.variants.streamed import Streaming, score_variants_streamed
from shoal.compress.variants.streamed_model import StreamedLayerwise, StreamedModel
from shoal.compress.variants.variants import INTACT, Edited, score_variants, variant
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import StoredTensor, read_shards
from shoal.models.load import align_weights, load_model

DONOR = LayerEdit("donor")
METRICS = tuple(HIDDEN_METRICS)
MERGED = ("mixtral", "qwen3_moe")
"""Families whose experts are stored one by one and merged by loading."""
WITH_IMAGES = ("llava", "qwen3_vl")
"""Models that read images, which are given text alone."""
SMALL_SHARDS = "40KB"


def saved(folder: Path, kind: str, *, shards: bool = False, **overrides: Any) -> Path:
    model = tiny_model(kind, **overrides) if kind in KINDS else tiny_family(kind)
    model.save_pretrained(folder / kind, max_shard_size=SMALL_SHARDS if shards else "50GB")
    assert (len(read_shards(folder / kind)) > 2) == shards
    return folder / kind


def whole(folder: Path, *, dtype: str = "stored") -> PreTrainedModel:
    model = load_model(folder, dtype=dtype)
    align_weights(model)
    return model


def few_ids(kind: str) -> Any:
    """Calibration rows and requests in the family's vocabulary."""
    size = 256 if kind in KINDS else 90
    rows = packed([[20], [7, 13], [1, 9, 10], [20], [19, 1]])
    rows.input_ids_NS.remainder_(size)
    asked = [(tuple(t % size for t in context), tuple(t % size for t in tail)) for context, tail in requests()]
    return rows, asked


class _AlwaysFile(Streaming):
    def store(self, models: Any, **_: Any) -> StateStore:
        assert self.spill_folder is not None
        return FileStore(self.spill_folder)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["llama_tied", "qwen3", "gemma3", *WITH_IMAGES, *MERGED])
def test_scores_are_those_of_the_model_in_memory(kind: str, shards: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, shards=shards)
    rows, _ = few_ids(kind)
    expected = measure_importance(whole(folder), rows, metrics=METRICS, batch_size=2)
    for streaming in (Streaming(), _AlwaysFile(spill_folder=tmp_path)):
        assert measure_streamed(folder, rows, metrics=METRICS, batch_size=2, streaming=streaming) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_variants_score_what_they_score_in_memory(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, shards=True)
    _, asked = few_ids(kind)
    model = whole(folder)
    expected = score_variants(Edited(model), Decoder(model), asked, VARIANTS, batch_size=3)
    for streaming in (Streaming(), _AlwaysFile(spill_folder=tmp_path)):
        assert score_variants_streamed(folder, asked, VARIANTS, batch_size=3, streaming=streaming) == expected


@pytest.mark.slow
def test_dtype_is_what_loading_makes_of_it(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", dtype=torch.bfloat16)
    for dtype in ("stored", "float32"):
        expected = measure_importance(whole(folder, dtype=dtype), ROWS, metrics=METRICS, batch_size=2)
        found = measure_streamed(folder, ROWS, metrics=METRICS, batch_size=2, streaming=Streaming(dtype=dtype))
        assert found == expected


@pytest.mark.slow
def test_padding_counts_nowhere(tmp_path: Path) -> None:
    folder, mask_NS = saved(tmp_path, "llama"), torch.ones_like(ROWS.input_ids_NS)
    mask_NS[1, 15:] = mask_NS[3, :4] = 0
    arguments: dict[str, Any] = {"metrics": METRICS, "batch_size": 2, "attention_mask_NS": mask_NS}
    expected = measure_importance(whole(folder), ROWS, **arguments)
    assert measure_streamed(folder, ROWS, streaming=Streaming(), **arguments) == expected


@pytest.mark.slow
def test_a_donors_layers_come_from_its_own_files(tmp_path: Path) -> None:
    folder, donor = saved(tmp_path, "qwen3"), saved(tmp_path / "donor", "qwen3", seed=1, shards=True)
    variants = [
        variant("one", [(2, DONOR)]),
        variant("two", [(1, DONOR), (5, REMOVED)]),
        INTACT,
    ]
    model = whole(folder)
    expected = score_variants(Edited(model, whole(donor)), Decoder(model), requests(), variants, batch_size=3)
    found = score_variants_streamed(folder, requests(), variants, batch_size=3, streaming=Streaming(), donor=donor)
    assert found == expected
    assert found[0] != found[2]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True], ids=["measure", "variants"])
def test_every_tensor_is_read_once_and_its_layer_let_go(
    sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "qwen3", shards=True)
    reads: Counter[tuple[str, int]] = Counter()
    loaded: list[list[int]] = []
    own_read, own_run = streamed_model.read_tensor, StreamedLayerwise.run

    def read(file: Path, stored: StoredTensor) -> torch.Tensor:
        reads[file.name, stored.start] += 1
        return own_read(file, stored)

    def run(self: StreamedLayerwise, layer: int, *arguments: Any, **changed: Any) -> torch.Tensor:
        layers = decoder_layers(self.model)
        loaded.append([index for index in range(NUM_LAYERS) if not any(p.is_meta for p in layers[index].parameters())])
        assert loaded[-1] == [layer]
        return own_run(self, layer, *arguments, **changed)

    monkeypatch.setattr(streamed_model, "read_tensor", read)
    monkeypatch.setattr(StreamedLayerwise, "run", run)
    if sweep:
        score_variants_streamed(folder, requests(), VARIANTS, batch_size=3, streaming=Streaming())
    else:
        measure_streamed(folder, ROWS, metrics=METRICS, batch_size=2, streaming=Streaming())
    stored = {(shard.file.name, one.start) for shard in read_shards(folder) for one in shard.tensors.values()}
    assert reads == Counter(dict.fromkeys(stored, 1))
    assert {layer for layers in loaded for layer in layers} == set(range(NUM_LAYERS))


def test_states_go_to_a_file_when_they_do_not_fit(tmp_path: Path) -> None:
    model = StreamedModel(saved(tmp_path, "llama"))
    least = model.layer_bytes + model.rest_bytes

    def store(memory_bytes: int | None, states: int) -> StateStore:
        streaming = Streaming(memory_bytes=memory_bytes, spill_folder=tmp_path)
        return streaming.store([model], tokens_at_once=0, fixed=1000, states=states)

    assert type(store(None, 10**9)) is type(store(least + 1500, 500)) is StateStore
    assert type(store(least + 1500, 501)) is FileStore
    with pytest.raises(
        UserError, match=r"measure.memory_gb: .* is too little to run one layer of .*llama, which takes"
    ):
        store(least + 999, 0)
    with pytest.raises(UserError, match=r"hidden states do not fit into .* are free there; point TMPDIR"):
        store(least + 1500, 10**18)


def test_sizes_are_those_of_what_is_loaded(tmp_path: Path) -> None:
    for kind in ("llama", "llama_tied"):
        model = StreamedModel(saved(tmp_path, kind))
        full = tiny_model(kind)
        layers = {id(p) for layer in decoder_layers(full) for p in layer.parameters()}
        assert model.rest_bytes == sum(p.nbytes for p in full.parameters() if id(p) not in layers)
        assert model.layer_bytes == sum(p.nbytes for p in decoder_layers(full)[0].parameters())


def test_a_file_of_states_gives_back_what_was_put_in(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(6).view(2, 3).mT, torch.zeros(0, 4)]
    kept = [store.keep(tensor) for tensor in tensors]
    assert not any(isinstance(one, InMemory) for one in kept)
    for found, tensor in zip([one.load() for one in kept], tensors, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    size = store.num_bytes
    kept.clear()
    again = [store.keep(tensor + 1) for tensor in tensors]
    assert store.num_bytes == size  # the same places
    assert torch.equal(again[0].load(), tensors[0] + 1)
    assert list(tmp_path.iterdir()) == []  # nothing to be left behind


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match=r"the disk is full after 60 bytes of hidden states"):
        FileStore(tmp_path).keep(torch.zeros(3, 5))


def test_metrics_that_need_the_whole_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"measure.metrics: taylor needs gradients, for which the whole model has to be"
    ):
        measure_streamed(tmp_path, ROWS, metrics=["angular", "taylor"], batch_size=2, streaming=Streaming())


@pytest.mark.slow
def test_unknown_metrics_and_states_that_overflow_are_refused_as_in_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    with pytest.raises(UserError, match=r"'angulr' is no metric"):
        measure_streamed(folder, ROWS, metrics=["angulr"], batch_size=2, streaming=Streaming())
    model = tiny_model("llama")
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data[:, 0] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"the output of layer 3 is not finite .* in batch 0 \(row 0"):
        measure_streamed(folder, ROWS, metrics=METRICS, batch_size=2, streaming=Streaming())


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"llama: is quantised; only plain weights are taken layer by layer"):
        StreamedModel(folder)


def test_a_missing_tensor_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", num_hidden_layers=5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with pytest.raises(UserError, match=r"the weights of model.layers.5.* are missing"):
        StreamedModel(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3n_text", r"gemma3n_text: its layers cannot be run one by one .* unset measure.memory_gb"),
        ("gemma4_text", r"gemma4_text: its layers cannot be run one by one \(a layer does not get what the one before"),
        ("glm_moe_dsa", r"glm_moe_dsa: its layers return more than the hidden state"),
    ],
)
def test_layers_that_share_more_than_their_state_are_refused(family: str, message: str, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path / family)
    rows = packed([[20], [7, 13]])
    rows.input_ids_NS.remainder_(90)
    with pytest.raises(UserError, match=message):
        measure_streamed(
            tmp_path / family, rows, metrics=["angular"], batch_size=2, streaming=Streaming(attention=None)
        )


@pytest.mark.parametrize("maskless", ["flash", "flex"])
def test_layers_one_by_one_get_the_borders_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maskless: str
) -> None:
    flash_stand_in.install(monkeypatch)
    folder, rows = saved(tmp_path, "gemma3"), packed([[8, 12], [8, 12]])
    masked, borders = (
        measure_streamed(folder, rows, metrics=["angular"], batch_size=2, streaming=Streaming(attention=kernels))
        for kernels in ("sdpa", maskless)
    )
    for row, other in zip(borders.runs["angular"], masked.runs["angular"], strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


LIMITED = """
import json, re, resource, sys
from pathlib import Path
import torch
from shoal.compress.streamed import measure_streamed
from shoal.compress.variants.streamed import Streaming
from shoal.data.sources import PackedRows
from shoal.models.load import load_model

def held(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
ids = torch.arange(128).view(2, 64)
rows = PackedRows(ids, torch.arange(64).repeat(2, 1))
room = held("VmData") + limit + 50 * 2**20  # for the stacks of threads, which count with all that they may become
resource.setrlimit(resource.RLIMIT_DATA, (room, room))
try:
    load_model(folder)
    refused = ""
except RuntimeError as error:
    refused = str(error)
before = held("VmHWM")
streaming = Streaming(memory_bytes=limit)
scores = measure_streamed(folder, rows, metrics=["block_influence", "angular"], batch_size=1, streaming=streaming)
print(json.dumps([refused, held("VmHWM") - before, scores.layers, scores.runs]))
"""
"""The kernel refuses what is far beyond argv[2] bytes of private memory."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account of memory")
def test_a_model_larger_than_memory_is_measured(tmp_path: Path) -> None:
    config = tiny_config(
        "llama_tied", hidden_size=256, intermediate_size=1024, num_hidden_layers=42, num_attention_heads=4, head_dim=64
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    size, limit = sum(p.nbytes for p in model.parameters()), 50 * 2**20
    assert size > 3 * limit  # and twice what the kernel allows
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    refused, grown, layers, runs = json.loads(done.stdout.splitlines()[-1])
    assert "Cannot allocate memory" in refused  # the whole model
    assert grown < limit
    ids = torch.arange(128).view(2, 64)
    rows = type(ROWS)(ids, torch.arange(64).repeat(2, 1))
    expected = measure_importance(model.eval(), rows, metrics=["block_influence", "angular"], batch_size=1)
    assert tuple(layers["block_influence"]) == pytest.approx(expected.layers["block_influence"], abs=1e-5)
    assert runs["angular"][0] == pytest.approx(list(expected.runs["angular"][0]), abs=1e-5)

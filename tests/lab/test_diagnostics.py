"""Depth diagnostics against float64 references written from the formulae, and what they must not depend on.

Covers: shoal.lab.depth.interventions, shoal.lab.depth.residual_flow, shoal.lab.depth.runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from packed_rows import documents, packed
from tiny import NUM_LAYERS, tiny_model
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.data.packing import PackedRows
from shoal.lab import diagnostics
from shoal.lab.depth import runs
from shoal.lab.depth.interventions import cut_positions
from shoal.lab.depth.runs import Prompt
from shoal.lab.diagnostics import Diagnostics, diagnose, effective_depths
from shoal.models.anatomy import decoder_layers, given_state, state_of, with_state

ROWS = packed([[40], [17, 23], [4, 36]])
KINDS = ("llama", "qwen2", "qwen3", "gemma3")
PARALLEL = ("gpt_neox", "cohere")
"""Families whose MLP reads what the attention reads."""
AFTER_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
HALVES = {"gemma3": AFTER_NORMS, "olmo2": AFTER_NORMS, "gpt_neox": ("attention", "mlp")}
NUM_POSITIONS = 2
PROMPTS = [
    tuple((7 * token + 3) % 250 for token in range(start, start + length))
    for start, length in ((0, 13), (40, 20), (90, 11))
]
States = list[Tensor]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("NUM_PROMPTS", 3), ("NUM_POSITIONS", NUM_POSITIONS), ("PROMPT_TOKENS", 28)):
        monkeypatch.setattr(diagnostics, name, number)


def rows_of(prompts: Sequence[Prompt]) -> PackedRows:
    """One row, a document for each of ``prompts``."""
    ids = [token for prompt in prompts for token in prompt]
    positions = [place for prompt in prompts for place in range(len(prompt))]
    return PackedRows(torch.tensor([ids]), torch.tensor([positions]))


def run(model: PreTrainedModel, rows: PackedRows = ROWS, *, batch_size: int = 2, **arguments: Any) -> Diagnostics:
    return diagnose(model, rows, provenance=Provenance({}), batch_size=batch_size, **arguments)


def double(kind: str, **overrides: Any) -> PreTrainedModel:
    return tiny_model(kind, dtype=torch.float64, **overrides)


def changed(module: torch.nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> RemovableHandle:
    """The module's output becomes ``change(input, output)`` until the handle is left."""

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return with_state(output, change(given_state(args, kwargs), state_of(output)))

    return module.register_forward_hook(hook, with_kwargs=True)


def run_whole(model: PreTrainedModel, ids: Tensor) -> tuple[States, Tensor]:
    """(S, D) states before every layer and behind the last, and (S, V) probabilities, of one text alone."""
    states: States = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0].clone()))
        for layer in decoder_layers(model)
    ]
    handles.append(decoder_layers(model)[-1].register_forward_hook(lambda _, __, out: states.append(state_of(out)[0])))
    try:
        logits = model(ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return states, logits.softmax(-1)


def branches(model: PreTrainedModel, kind: str, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(S, D) what attention and MLP of every layer add, by the modules' names."""
    names = HALVES.get(kind, ("self_attn", "mlp"))
    found: list[list[Tensor]] = []
    handles = []
    for layer in decoder_layers(model):
        found.append([])
        for name in names:
            keep: Any = lambda _, __, out, into=found[-1]: into.append(state_of(out)[0])  # noqa: E731
            handles.append(layer.get_submodule(name).register_forward_hook(keep))
    model(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [(attention, mlp) for attention, mlp in found]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


@torch.no_grad()
def residual_reference(model: PreTrainedModel, kind: str, rows: PackedRows) -> dict[tuple[str, str], list[float]]:
    tokens: dict[tuple[str, str, int], list[float]] = {}
    for document in documents(rows):
        states, _ = run_whole(model, document[0])
        for layer, (attention, mlp) in enumerate(branches(model, kind, document[0])):
            before = states[layer]
            terms = {
                "attention": (before, attention),
                "mlp": (before if kind in PARALLEL else before + attention, mlp),
                "layer": (before, attention + mlp),
            }
            for name, (reads, written) in terms.items():
                for one, other in zip(reads, written, strict=True):
                    tokens.setdefault((name, "cosine", layer), []).append(cosine(one, other))
                    tokens.setdefault((name, "size", layer), []).append(float(other.norm() / one.norm()))
    means: dict[tuple[str, str], list[float]] = {}
    for (name, what, _), values in tokens.items():
        means.setdefault((name, what), []).append(sum(values) / len(values))
    return means


@pytest.mark.prove
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [*KINDS, *PARALLEL, "olmo2"])
def test_residual_curves_equal_the_reference(kind: str, dtype: torch.dtype) -> None:
    rows = ROWS if kind in KINDS else PackedRows(ROWS.input_ids_NS % 80, ROWS.position_ids_NS)
    model = tiny_model(kind) if kind in KINDS else architectures.tiny_model(kind)
    found = run(model.double() if dtype == torch.float64 else model, rows)
    wanted = residual_reference(model.double(), kind, rows)
    assert found.parallel == (kind in PARALLEL,) * NUM_LAYERS
    assert found.num_tokens == ROWS.input_ids_NS.numel()
    for name in ("layer", "attention", "mlp"):
        assert found.cosines[name] == pytest.approx(wanted[name, "cosine"], abs=2e-6)
        assert found.sizes[name] == pytest.approx(wanted[name, "size"], rel=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lens_equals_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_LOGITS", 272 * 7)  # a few tokens at a time
    model = double(kind)
    found = run(model)
    divergence, overlap = torch.zeros(NUM_LAYERS, dtype=torch.float64), torch.zeros(NUM_LAYERS, dtype=torch.float64)
    for document in documents(ROWS):
        with torch.no_grad():
            states, final = run_whole(model, document[0])
            for layer, before in enumerate(states[:-1]):
                early = model.get_submodule("lm_head")(model.get_submodule("model.norm")(before)).softmax(-1)
                divergence[layer] += (early * (early / final).log()).sum()
                for one, other in zip(early.topk(5).indices.tolist(), final.topk(5).indices.tolist(), strict=True):
                    overlap[layer] += len(set(one) & set(other)) / 5
    assert found.lens_tokens == found.num_tokens
    assert found.lens_kl == pytest.approx((divergence / found.num_tokens).tolist(), rel=1e-4)
    assert found.lens_overlap == pytest.approx((overlap / found.num_tokens).tolist(), abs=1e-9)


def largest_effects(
    model: PreTrainedModel, prompts: Sequence[Prompt], seed: int
) -> tuple[Tensor, list[float], list[float]]:
    """Skip effects, their output effects and erasures, one prompt and cut at a time with hooks on whole runs."""
    layers = decoder_layers(model)
    relative = torch.zeros(NUM_LAYERS, NUM_LAYERS, dtype=torch.float64)
    output, erased = [0.0] * NUM_LAYERS, [0.0] * NUM_LAYERS
    everything = [run_whole(model, torch.tensor(prompt))[0] for prompt in PROMPTS]
    means = [torch.cat([states[layer] for states in everything]).mean(0) for layer in range(NUM_LAYERS)]
    for prompt, cut in cut_positions(prompts, NUM_POSITIONS, seed=seed):
        ids = torch.tensor(prompt)
        states, probabilities = run_whole(model, ids)
        for skip in range(NUM_LAYERS):

            def pass_on(given: Tensor, out: Tensor, cut: int = cut) -> Tensor:
                return torch.cat([out[:, :1], given[:, 1:cut], out[:, cut:]], dim=1)

            with changed(layers[skip], pass_on):
                other, other_probabilities = run_whole(model, ids)
            for later in range(skip + 1, NUM_LAYERS):
                update, other_update = (one[later + 1] - one[later] for one in (states, other))
                ratio = (update - other_update).norm(dim=-1) / update.norm(dim=-1)
                relative[skip, later] = max(float(relative[skip, later]), float(ratio[cut:].max()))
            change = (probabilities - other_probabilities).norm(dim=-1)
            output[skip] = max(output[skip], float(change[cut:].max()))

            def erase(_: Any, args: Any, skip: int = skip, cut: int = cut) -> Any:
                given = args[0].clone()
                given[:, cut] = means[skip]
                return (given, *args[1:])

            with layers[skip].register_forward_pre_hook(erase):
                change = (probabilities - run_whole(model, ids)[1]).norm(dim=-1)
            erased[skip] = max(erased[skip], float(change[cut + 1 :].max()))
    return relative, output, erased


@pytest.mark.prove
@pytest.mark.parametrize("kind", KINDS)
def test_effects_on_later_layers_equal_whole_runs_with_hooks(kind: str) -> None:
    model = double(kind)
    found = run(model, rows_of(PROMPTS), seed=3)
    with torch.no_grad():
        relative, output, erased = largest_effects(model, PROMPTS, 3)
    assert found.num_cuts == len(cut_positions(PROMPTS, 2, seed=3)) == 4
    for row, wanted in zip(found.skip_effect, relative.tolist(), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    assert found.skip_output == pytest.approx(output, rel=1e-4)
    assert found.skip_output[-1] == 0
    assert min(found.skip_output[:-1]) > 1e-6
    assert found.erasure_output == pytest.approx(erased, rel=1e-4, abs=1e-9)


@pytest.mark.prove
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_does_nothing_has_no_direction_and_no_effect(dtype: torch.dtype) -> None:
    model, idle = tiny_model("llama", dtype=dtype), 2
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        decoder_layers(model)[idle].get_parameter(name).data.zero_()
    found = run(model)
    assert [found.cosines[name][idle] for name in ("layer", "attention", "mlp")] == [0.0] * 3
    assert [found.sizes[name][idle] for name in ("layer", "attention", "mlp")] == [0.0] * 3
    assert found.skip_effect[idle] == (0.0,) * NUM_LAYERS
    assert found.skip_output[idle] == 0.0
    assert found.lens_kl[idle] == found.lens_kl[idle + 1]
    assert min(found.sizes["layer"][idle + 1], found.skip_output[idle - 1], found.skip_output[idle + 1]) > 0


def test_effective_depth_by_each_rule() -> None:
    cosines = {
        "layer": (-0.3, -0.3, 0.1, -0.2, 0.3, 0.3),
        "attention": (-0.3, 0.0, 0.2, -0.2, 0.3, 0.2),
        "mlp": (0.3, 0.0, 0.3, -0.2, -0.1, 0.1),
    }  # means: -0.1 -0.1 0.2 -0.2 0.17 0.2
    found = effective_depths(cosines, (8.0, 10.0, 5.0, 4.9, 6.0, 1.0), (0.0, 0.3, 0.29, 0.31, 0.2, 0.9))
    assert {rule: (depth.layer, depth.ratio) for rule, depth in found.items()} == {
        "cosine": (3, 4 / 6),
        "kl": (3, 4 / 6),
        "overlap": (3, 4 / 6),
    }


@pytest.mark.prove
def test_the_artifact_survives_the_disk_and_speaks(tmp_path: Path) -> None:
    found = run(tiny_model("llama"))
    found.save(tmp_path / Diagnostics.FILE)
    assert Diagnostics.load(tmp_path / "diagnostics.json") == found
    text = found.in_words()
    assert "depth of 6 layers over 120 tokens" in text
    for rule in ("cosine", "kl", "overlap"):
        assert f"effective depth by {rule}: " in text
    assert "nothing about" not in text

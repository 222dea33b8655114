"""Narrowed layers: what stays is what writes most, and the student is the cut teacher without the rest.

Covers: shoal.compress.changes.narrowing, shoal.compress.surgery.narrow_config,
shoal.artifacts.plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from calibrations import text_of
from cases import cases
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import KeptWidth, Plan, indices_of, mask_of
from shoal.compress.apply import apply_plan
from shoal.compress.changes import width as width_module
from shoal.compress.changes.change import Change
from shoal.compress.changes.compensation import Compensation
from shoal.compress.changes.width import Narrowing
from shoal.compress.estimate import cut_estimate
from shoal.compress.surgery.narrow_config import kept_width
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, state_of, text_config
from shoal.models.checkpoint_files import checkpoint_bytes, read_shards
from shoal.models.load import load_config, load_model
from shoal.recipe.measure import Measure
from shoal.recipe.prune import Compensate, Width
from shoal.recipe.section import TextSource

CASES = cases(__file__)

DROP = (2,)
SIZE, GROUPS = 48, 2
"""Channels and key-value heads of the tiny models."""
BOTH = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi3", "smollm3", "granite", "glm4")
CHANNELS_ONLY = ("olmo2", "gpt_neox", "falcon", "opt")
FIELDS = {"falcon": "ffn_hidden_size", "opt": "ffn_dim"}
OUTPUTS = {"gpt_neox": ("dense_4h_to_h", ""), "falcon": ("dense_4h_to_h", ""), "opt": ("fc2", "")}


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    """Text of many bytes, in documents of unequal length."""
    generator = torch.Generator().manual_seed(0)
    lines = [bytes(torch.randint(33, 127, (40 + 7 * i,), generator=generator).tolist()).decode() for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines))
    return TextSource(str(tmp_path / "text.jsonl"))


def on(text: TextSource) -> Measure:
    return Measure(data=(text,), num_tokens=512, sequence_length=32)


def settings(**changes: Any) -> Width:
    return Width(**{"intermediate_size": 32, **changes})


def saved(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Of row ``name`` with as many heads per key-value head as any, in several files."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": GROUPS} if name in BOTH else {}
    sizes = {FIELDS[name]: SIZE} if name in FIELDS else {}
    model: Any = tiny_model(name, **{"vocab_size": VOCAB_SIZE, **heads, **sizes, **overrides})
    model.to(dtype).save_pretrained(folder / name, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder / name)
    assert len(read_shards(folder / name)) > 1
    return folder / name


def narrowed(
    folder: Path, text: TextSource, width: Width, drop: tuple[int, ...] = DROP, further: Sequence[Change] = ()
) -> tuple[Plan, KeptWidth, Path]:
    """The plan as it was carried out, what it says of width, and its student."""
    plan = Plan(Provenance({}), 6, drop, "named by the test", width=kept_width(load_config(folder), width))
    out = folder.parent / "student"
    done = apply_plan(folder, plan, out, changes=(Narrowing(width), *further), text=text_of(on(text)))
    assert done.width is not None
    return done, done.width, out


def outputs(name: str, layer: Any) -> tuple[Any, Any]:
    """The maps by which MLP and attention of a layer write, by the family's own names."""
    mlp, attention = OUTPUTS.get(name, ("mlp.down_proj", "self_attn.o_proj"))
    mlp = f"mlp.{mlp}" if name in ("gpt_neox", "falcon") else mlp
    return layer.get_submodule(mlp), layer.get_submodule(attention) if attention else None


def cut(model: Any, drop: tuple[int, ...], stack: ExitStack) -> None:
    """Let dropped layers return what they get."""
    for layer in drop:

        def back(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return (given, *output[1:]) if isinstance(output, tuple) else given

        stack.enter_context(decoder_layers(model)[layer].register_forward_hook(back, with_kwargs=True))


def zeroed(module: Any, columns: Tensor, stack: ExitStack) -> None:
    """Let ``module`` read zeros in ``columns``."""
    stack.enter_context(
        module.register_forward_pre_hook(lambda _, args: (args[0].index_fill(-1, columns, 0), *args[1:]))
    )


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(torch.randint(0, 250, (2, 20), generator=generator), use_cache=False).logits


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "opt", *(pytest.param(name, marks=pytest.mark.prove) for name in (*BOTH, *CHANNELS_ONLY))]
)
def test_the_student_is_the_cut_teacher_with_zeros_in_the_places_of_what_goes(
    name: str, tmp_path: Path, text: TextSource
) -> None:
    folder = saved(tmp_path, name, dtype=torch.bfloat16)
    plan, width, out = narrowed(folder, text, settings(num_key_value_heads=1 if name in BOTH else None))
    teacher = load_model(folder, dtype="float32", attention="eager").double()
    student: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").double()
    config = text_config(student.config)
    assert getattr(config, FIELDS.get(name, "intermediate_size")) == 32
    with ExitStack() as stack:
        cut(teacher, DROP, stack)
        for place, layer in enumerate(plan.keep):
            mlp, attention = outputs(name, decoder_layers(teacher)[layer])
            gone = sorted({*range(SIZE)} - {*indices_of(width.channels[place])})
            assert len(gone) == SIZE - 32
            zeroed(mlp, torch.tensor(gone), stack)
            if width.groups:
                kept = set(indices_of(width.groups[place]))
                size = 4 // GROUPS * config.head_dim
                columns = [size * group + k for group in {*range(GROUPS)} - kept for k in range(size)]
                zeroed(attention, torch.tensor(columns), stack)
        expected = logits(teacher)
    assert torch.allclose(logits(student), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    if name in BOTH:
        assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
        assert config.head_dim == 8
    assert len(set(width.channels)) > 1, "all layers keep the same channels: the test shows little"


@pytest.mark.parametrize("name", ["llama", pytest.param("phi3", marks=pytest.mark.prove)])
def test_what_stays_writes_most_by_the_definition(name: str, tmp_path: Path, text: TextSource) -> None:
    """In float64, token by token and unit by unit, from what the maps read inside the cut model."""
    folder, asked = saved(tmp_path, name), settings(num_key_value_heads=1)
    plan, width, _ = narrowed(folder, text, asked)
    model = load_model(folder, dtype="float32").double()
    rows = text_of(on(text)).rows
    read: dict[Any, list[Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        cut(model, DROP, stack)
        for layer in plan.keep:
            for module in outputs(name, decoder_layers(model)[layer]):
                keep = lambda own, args: read.setdefault(own, []).append(args[0])  # noqa: E731
                stack.enter_context(module.register_forward_pre_hook(keep))
        model(rows.input_ids_NS.long(), position_ids=rows.position_ids_NS.long(), use_cache=False)
    for place, layer in enumerate(plan.keep):
        for module, units, masks in zip(
            outputs(name, decoder_layers(model)[layer]), (SIZE, GROUPS), (width.channels, width.groups), strict=True
        ):
            states = torch.cat(read[module]).flatten(0, -2)
            size = states.shape[-1] // units
            written = [
                (states[:, u * size : (u + 1) * size] @ module.weight[:, u * size : (u + 1) * size].T).square().sum()
                for u in range(units)
            ]
            order = sorted(range(units), key=lambda unit: float(written[unit].detach()), reverse=True)
            assert sorted(order[: len(indices_of(masks[place]))]) == list(indices_of(masks[place]))


def test_keeping_everything_is_the_input_bit_for_bit(tmp_path: Path, text: TextSource) -> None:
    folder = saved(tmp_path, "qwen2")
    _, width, out = narrowed(folder, text, settings(intermediate_size=SIZE, num_key_value_heads=GROUPS), ())
    ours, theirs = (
        {name: tensor for shard in read_shards(own) for name, tensor in load_file(shard.file).items()}
        for own in (out, folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(load_model(out)), logits(load_model(folder)))
    assert {*width.channels} == {mask_of(range(SIZE))}
    before, after = (json.loads((own / "config.json").read_text()) for own in (folder, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"shoal_kept_layers", "head_dim"}, "qwen2 has no head_dim unless it is set"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compensation_after_width_is_fitted_to_the_narrow_student(
    dtype: torch.dtype, tmp_path: Path, text: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved student's state at its gap is as far from the teacher's as the fit says."""
    monkeypatch.setattr("shoal.compress.changes.fit._Fitting._divergences", lambda *_: [1.0, 2.0])
    folder = saved(tmp_path, "llama", dtype=dtype)
    compensation = Compensation(Compensate(method="linear"))
    plan, width, out = narrowed(folder, text, settings(num_key_value_heads=1), further=[compensation])
    (gap,) = plan.gaps
    assert [change.kind for change in plan.changes] == ["width", "compensate"]
    assert [len(indices_of(mask)) for mask in width.channels] == [32] * 5
    assert gap.is_corrected
    rows = text_of(on(text)).rows
    held_out = slice(len(rows) - len(rows) // 8, None)

    def state(folder: Path, layer: int) -> Tensor:
        caught: list[Tensor] = []
        model = load_model(folder, dtype="float32", attention="eager")
        decoder_layers(model)[layer].register_forward_hook(lambda _, __, output: caught.append(state_of(output)))
        ids, positions = rows.input_ids_NS[held_out].long(), rows.position_ids_NS[held_out].long()
        with torch.no_grad():
            model(ids, position_ids=positions, use_cache=False)
        return caught[0]

    ours, theirs = state(out, DROP[0] - 1), state(folder, DROP[0])
    error = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
    assert float(error) == pytest.approx(gap.error_after, rel=1e-3 if dtype == torch.float32 else 2e-2)


def test_channels_and_groups_that_write_nothing_are_found_and_missed_by_nobody(
    tmp_path: Path, text: TextSource
) -> None:
    model: Any = tiny_model("llama", vocab_size=VOCAB_SIZE, num_attention_heads=4, num_key_value_heads=GROUPS)
    silent = {layer: torch.randperm(SIZE, generator=torch.Generator().manual_seed(layer))[:16] for layer in range(6)}
    with torch.no_grad():
        for layer, channels in silent.items():
            mlp, attention = outputs("llama", decoder_layers(model)[layer])
            mlp.weight[:, channels] = 0
            group = layer % GROUPS
            attention.weight[:, 16 * group : 16 * (group + 1)] = 0
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    _, width, out = narrowed(folder, text, settings(num_key_value_heads=1), ())
    for layer, channels in silent.items():
        assert {*indices_of(width.channels[layer])} == {*range(SIZE)} - {*channels.tolist()}
        assert indices_of(width.groups[layer]) == (1 - layer % GROUPS,)
    whole, narrow = (logits(load_model(own).double()) for own in (folder, out))
    assert torch.allclose(narrow, whole, rtol=0, atol=1e-12)


def test_a_dry_run_tells_the_size_of_the_files(tmp_path: Path, text: TextSource) -> None:
    folder, asked = saved(tmp_path, "llama", dtype=torch.bfloat16), settings(num_key_value_heads=1)
    plan, _, out = narrowed(folder, text, asked)
    before = replace(plan, width=kept_width(load_config(folder), asked))
    told, num_bytes = cut_estimate(folder, before, out, changes=(Narrowing(asked),), text=on(text))
    stored = sum(t.end - t.start for shard in read_shards(out) for t in shard.tensors.values())
    assert num_bytes == stored
    assert checkpoint_bytes(out) < checkpoint_bytes(folder)
    assert "changes: keeping 32 MLP channels and 1 key-value group of every layer" in told
    assert re.search(r"width: chosen on 512 tokens, takes about [\d.]+ [kM]B of memory.*, and about \d+ s", told)
    parameters = sum(parameter.numel() for parameter in load_model(out).parameters())
    assert f"{parameters:,}" in told


def test_a_student_that_lost_other_channels_is_not_let_through(
    tmp_path: Path, text: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = width_module.as_kept

    def shifted(width: Any, units: Any) -> Any:
        moved = {
            layer: {half: sorted((u + 1) % SIZE for u in chosen) for half, chosen in of.items()}
            for layer, of in units.items()
        }
        return real(width, moved)

    monkeypatch.setattr(width_module, "as_kept", shifted)
    folder = saved(tmp_path, "llama")
    with pytest.raises(UserError, match=r"logits differ from .* cannot cut or narrow the llama family"):
        narrowed(folder, text, settings())
    assert not (tmp_path / "student").exists()


def test_maps_in_another_order_than_supposed_are_refused_without_running_the_student(
    tmp_path: Path, text: TextSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if phi3's gate and up lay interleaved, which the layer's own run shows."""
    monkeypatch.setattr("shoal.compress.changes.narrowing.GATE_UP", "none")
    monkeypatch.setattr(
        "shoal.compress.changes.narrowing._sizes", lambda _, half, name: [(2,)] if "gate_up" in name else [(1,)]
    )
    with pytest.raises(UserError, match=r"layer 0 of phi3, narrowed, gives another state than the layer"):
        narrowed(saved(tmp_path, "phi3"), text, settings())


@pytest.mark.parametrize(("name", "changes", "message"), CASES)
def test_what_cannot_be_narrowed_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path, text: TextSource
) -> None:
    with pytest.raises(UserError, match=message):
        narrowed(saved(tmp_path, name), text, settings(**changes))
    assert not (tmp_path / "student").exists()

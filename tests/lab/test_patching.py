"""Patching: on a model whose heads are known, and against runs of whole models with hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from induction import COPYING, induction_model, pair_of
from tiny import tiny_tokenizer
from torch import Tensor

from shoal.artifacts.artifact import Provenance
from shoal.compress.edits.layer_edits import with_heads
from shoal.lab import patching as part
from shoal.lab.attention.prompts import Counterparts, look_up_pairs
from shoal.lab.patching import GROUPS, Patcher, patch_effects
from shoal.models.anatomy import decoder_layers, given_state, state_of, with_state

TOKENIZER: Any = tiny_tokenizer()


@pytest.mark.prove
def test_counterparts_differ_where_their_kind_says_and_ask_for_what_the_data_holds() -> None:
    by_kind = look_up_pairs(6, TOKENIZER, seed=0)
    assert list(by_kind) == ["value", "key", "question"]
    assert len(by_kind["value"]) == 6
    for kind, pair in ((kind, pair) for kind, pairs in by_kind.items() for pair in pairs):
        both = (pair.clean_ids, pair.corrupted_ids)
        different = [at for at, (clean, corrupted) in enumerate(zip(*both, strict=True)) if clean != corrupted]
        assert different
        assert set(different) <= set(pair.groups["question" if kind == "question" else "needle"])
        assert pair.groups["last"] == (len(pair.clean_ids) - 1,)
        assert pair.groups["question"][-1] + 1 == pair.groups["last"][0]
        assert pair.groups["all"] == tuple(range(different[0], len(pair.clean_ids)))
        assert set(pair.groups) == set(GROUPS) - ({"needle"} if kind == "question" else set())
        held = []
        for ids, answer in zip(both, (pair.right, pair.wrong), strict=True):
            text = TOKENIZER.decode(list(ids))
            pairs = json.loads(text[text.index("{") : text.index("}") + 1])
            asked = text.rpartition("\n")[2].split('"')[1]
            assert pairs[asked].startswith(TOKENIZER.decode([answer]))
            held.append((asked, pairs))
        assert pair.right != pair.wrong
        (asked, pairs), (other_asked, other_pairs) = held
        changed = [key for key in pairs if pairs[key] != other_pairs[key]]
        assert (asked == other_asked) == (kind != "question")
        assert len(changed) == {"value": 1, "key": 2, "question": 0}[kind]
        if kind == "key":
            needle = TOKENIZER.decode([pair.clean_ids[at] for at in pair.groups["needle"]])
            assert needle == "".join(f'"{key}": "{pairs[key]}"' for key in pairs if key in changed)


def test_patching_finds_the_way_of_the_answer_in_the_model_that_copies() -> None:
    used, patched = patch_effects(induction_model(), {"value": [pair_of(at) for at in (1, 3, 5, 8)]})
    assert used == {"value": 4}
    effect = {(one.site, one.group): one.effects for one in patched}
    assert {site for site, _ in effect} == {"residual", "attention", "mlp", "head"}
    layer, head = COPYING
    near = pytest.approx
    # the embedding of the needle is all that differs; what enters the second layer at the last token knows nothing yet
    assert effect["residual", "all"][0] == near((1.0,), abs=1e-5)
    assert effect["residual", "needle"][0] == near((1.0,), abs=1e-5)
    assert effect["residual", "needle"][layer] == near((1.0,), abs=1e-5)
    assert effect["residual", "last"][layer] == near((0.0,), abs=1e-5)
    assert effect["head", "last"][layer][head] == near(1.0, abs=1e-5)
    assert effect["attention", "last"][layer] == near((1.0,), abs=1e-5)
    assert [value for row in effect["head", "question"] for value in row] == near([0.0] * 4, abs=1e-5)
    assert [row[0] for row in effect["mlp", "all"]] == near([0.0, 0.0], abs=1e-5)


def random_counterparts(length: int = 12) -> Counterparts:
    clean, corrupted = torch.randint(6, 90, (2, length), generator=torch.Generator().manual_seed(1)).tolist()
    corrupted = [*clean[:4], *corrupted[4:6], *clean[6:]]
    groups = {"needle": (4, 5), "question": (8, 9, 10), "last": (11,), "all": tuple(range(4, 12))}
    return Counterparts(tuple(clean), tuple(corrupted), 7, 8, groups)


def by_hooks(model: Any, pair: Counterparts, layer: int, site: str, head: int, places: list[int]) -> float:
    """LD of the corrupted prompt with one part of the clean run in it: two forwards of the whole model."""
    halves, module, kept = with_heads(model, layer), decoder_layers(model)[layer], []
    names = {"attention": halves.attention, "mlp": halves.mlp, "head": (halves.projection,), "residual": ("",)}[site]
    (name,) = names

    def put(state: Tensor) -> Tensor:
        state = state.clone()
        view = state.unflatten(-1, (halves.num_heads, -1))[:, :, head] if site == "head" else state
        if len(kept) == 0:
            kept.append(view.clone())
        else:
            view[:, places] = kept[0][:, places]
        return state

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        state = put(given_state(args, kwargs))
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    target = module.get_submodule(name)
    if site in ("residual", "head"):
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(lambda _, __, output: with_state(output, put(state_of(output))))
    with torch.no_grad(), handle:
        model(input_ids=torch.tensor([pair.clean_ids]), use_cache=False)
        logits = model(input_ids=torch.tensor([pair.corrupted_ids]), use_cache=False).logits[0, -1]
    return float(logits[pair.right] - logits[pair.wrong])


@pytest.mark.prove
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "deepseek_v3", "gpt_neox"])
def test_patched_runs_are_those_of_the_whole_model_with_hooks(family: str) -> None:
    """Only what lies above the layer is run; windows, groups, parallel halves."""
    narrow: dict[str, Any] = {"sliding_window": 3} if family in ("gemma3_text", "mixtral") else {}
    model, pair = architectures.tiny_model(family, **narrow).double(), random_counterparts()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    patching = Patcher(model)
    runs = patching.intact(pair)
    clean, corrupted = runs.differences
    for layer in (0, 2, 5):
        parts = patching.parts(layer)
        assert len(parts) == 3 + with_heads(model, layer).num_heads
        for group in GROUPS:
            places = pair.groups[group]
            found = patching.differences(runs, pair, layer, parts, places)
            expected = [by_hooks(model, pair, layer, site, head, list(places)) for site, head in parts]
            # logits are float32 by the time they are compared
            assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)
    everything = patching.differences(runs, pair, 0, [("residual", 0)], pair.groups["all"])
    assert everything == pytest.approx([clean], abs=2e-6)
    every = patching.parts(3)
    assert patching.differences(runs, pair, 3, every, ()) == pytest.approx([corrupted] * len(every), abs=2e-6)


@pytest.mark.prove
def test_what_patching_finds_is_written(tmp_path: Path) -> None:
    found = part.Patching(Provenance({}), 2, *patch_effects(induction_model(), {"value": [pair_of(3)]}))
    found.save(tmp_path / part.Patching.FILE)
    assert part.Patching.load(tmp_path / part.Patching.FILE) == found
    assert f"head {COPYING[0]}.{COPYING[1]} brings back the most (1.00)" in found.in_words()

"""Retrieval heads and patching: on a model whose heads are known, and against runs of whole models with hooks.

Covers: shoal.compress.heads.prompts, shoal.compress.heads.scores, shoal.compress.heads.patching,
shoal.artifacts.heads, shoal.figures.heads.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from induction import COPYING, PREVIOUS, copy_prompt, induction_model, twins
from tiny import tiny_tokenizer, tokens_fed
from torch import Tensor

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.heads import GROUPS, Heads, Patched, TaskHeads
from shoal.compress.edits.masks import with_heads
from shoal.compress.heads.patching import Patching, patch_effects
from shoal.compress.heads.prompts import SIZES, Twins, copy_prompts, copy_twins
from shoal.compress.heads.scores import score_heads
from shoal.errors import UserError
from shoal.figures.heads import heads_figure
from shoal.figures.style import save_figure
from shoal.models.anatomy import decoder_layers, given_state, state_of, with_state

TOKENIZER: Any = tiny_tokenizer()


def test_the_head_that_copies_scores_1_and_all_others_0() -> None:
    found = score_heads(induction_model(), [copy_prompt(at) for at in (1, 3, 5, 8)], batch_size=3)
    assert found.num_right == 4
    scores = {(layer, head): score for layer, row in enumerate(found.scores) for head, score in enumerate(row)}
    assert scores.pop(COPYING) == 1
    assert PREVIOUS in scores
    assert set(scores.values()) == {0}


def test_a_head_scores_the_share_of_the_needle_that_it_copies_in_order() -> None:
    """Of a needle whose places are told one too far, the head looks at none at its place."""
    prompt = copy_prompt(3)
    shifted = type(prompt)(prompt.input_ids, tuple(place + 1 for place in prompt.needle), prompt.question)
    partly = type(prompt)(prompt.input_ids, (prompt.needle[0], *shifted.needle[1:]), prompt.question)
    model = induction_model()
    assert score_heads(model, [shifted], batch_size=1).scores[COPYING[0]][COPYING[1]] == 0
    share = score_heads(model, [partly], batch_size=1).scores[COPYING[0]][COPYING[1]]
    assert share == pytest.approx(1 / len(prompt.needle))
    assert score_heads(model, [prompt, shifted], batch_size=2).scores[COPYING[0]][COPYING[1]] == 0.5


def test_prompts_that_are_answered_wrong_do_not_count() -> None:
    prompt = copy_prompt(3)
    wrong = type(prompt)((*prompt.input_ids[:-1], prompt.input_ids[0]), prompt.needle, prompt.question)
    model = induction_model()
    found = score_heads(model, [prompt, wrong], batch_size=2)
    assert found.num_right == 1
    assert found.scores[COPYING[0]][COPYING[1]] == 1
    with pytest.raises(UserError, match="answers none of 1 prompts right"):
        score_heads(model, [wrong], batch_size=2)


def test_scores_take_one_forward_over_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = induction_model(), [copy_prompt(at) for at in (1, 3, 5, 8)]
    fed = tokens_fed(monkeypatch)
    score_heads(model, prompts, batch_size=2)
    # eight tokens prove the head once; the last token of an answer is never read
    assert fed == [8, 2 * (len(prompts[0].input_ids) - 1), 2 * (len(prompts[0].input_ids) - 1)]


def test_heads_of_a_family_without_softmax_attention_are_refused() -> None:
    prompt = copy_prompt(3)
    for family in ("mamba", "rwkv", "bloom"):
        with pytest.raises(UserError, match=f"without softmax attention, or with one of its own: {family} hands no"):
            score_heads(architectures.tiny_model(family), [prompt], batch_size=1)


def test_layers_without_softmax_attention_have_no_heads() -> None:
    model = architectures.tiny_model("qwen3_next")
    ids = copy_prompt(3).input_ids[:6]
    with torch.no_grad():
        written = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    prompt = type(copy_prompt(3))((*ids, written), (2,), 4)
    kinds = [bool(row) for row in score_heads(model, [prompt], batch_size=1).scores]
    assert kinds == [kind == "full_attention" for kind in model.config.layer_types]


@pytest.mark.parametrize("task", ["retrieval", "needle"])
def test_prompts_name_the_places_of_what_is_copied(task: Any) -> None:
    prompts = copy_prompts((task,), 1, TOKENIZER, seed=0)[task]
    assert len(prompts) == 15
    depths = set()
    for prompt in prompts:
        ids = prompt.input_ids
        assert tuple(ids[place] for place in prompt.needle) == prompt.answer
        text, value = TOKENIZER.decode(list(ids)), TOKENIZER.decode(list(prompt.answer))
        assert value.isdigit()
        assert len(value) == 4
        assert text.endswith(value)
        assert text.count(value) == 2
        question = TOKENIZER.decode(list(ids[prompt.question :]))
        assert question.lstrip().startswith("Answer:" if task == "retrieval" else "Question:")
        depths.add(round(4 * prompt.needle[0] / prompt.question))
    assert depths == {0, 1, 2, 3, 4}
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert max(lengths[:5]) < min(lengths[5:10]) < max(lengths[5:10]) < min(lengths[10:])
    assert len(SIZES[task][1]) == 3
    assert prompts == copy_prompts((task,), 1, TOKENIZER, seed=0)[task] != copy_prompts((task,), 1, TOKENIZER, seed=1)


def test_twins_differ_where_their_kind_says_and_ask_for_what_the_data_holds() -> None:
    by_kind = copy_twins(6, TOKENIZER, seed=0)
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


def test_a_tokenizer_that_does_not_tell_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    with pytest.raises(UserError, match="does not tell where in a text its tokens stand"):
        copy_prompts(("needle",), 1, TOKENIZER, seed=0)


def test_patching_finds_the_way_of_the_answer_in_the_model_that_copies() -> None:
    used, patched = patch_effects(induction_model(), {"value": [twins(at) for at in (1, 3, 5, 8)]})
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


def test_twins_that_are_answered_wrong_are_not_used() -> None:
    model, pair = induction_model(), twins(3)
    wrong = Twins(pair.clean_ids, pair.corrupted_ids, pair.wrong, pair.right, pair.groups)
    assert patch_effects(model, {"key": [pair, wrong], "value": [wrong]})[0] == {"key": 1, "value": 0}
    with pytest.raises(UserError, match="none of 2 pairs right both ways"):
        patch_effects(model, {"key": [wrong], "value": [wrong]})


def random_twins(length: int = 12) -> Twins:
    clean, corrupted = torch.randint(6, 90, (2, length), generator=torch.Generator().manual_seed(1)).tolist()
    corrupted = [*clean[:4], *corrupted[4:6], *clean[6:]]
    groups = {"needle": (4, 5), "question": (8, 9, 10), "last": (11,), "all": tuple(range(4, 12))}
    return Twins(tuple(clean), tuple(corrupted), 7, 8, groups)


def by_hooks(model: Any, pair: Twins, layer: int, site: str, head: int, places: list[int]) -> float:
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "deepseek_v3", "gpt_neox"])
def test_patched_runs_are_those_of_the_whole_model_with_hooks(family: str) -> None:
    """Only what lies above the layer and behind the first patched token is run; windows, groups, parallel halves."""
    narrow: dict[str, Any] = {"sliding_window": 3} if family in ("gemma3_text", "mixtral") else {}
    model, pair = architectures.tiny_model(family, **narrow).double(), random_twins()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    patching = Patching(model)
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


def measured(scores: list[list[float]], **settings: Any) -> Heads:
    rows = tuple(map(tuple, scores))
    return Heads(Provenance({}), len(rows), (TaskHeads("retrieval", 15, 9, rows),), **settings)


SCORES = [[0.0, 0.09], [0.5, 0.2], [0.0, 0.0], [0.9, 0.05], [0.1, 0.0], []]


def test_the_fewest_layers_hold_a_share_of_the_score() -> None:
    heads = measured(SCORES)
    assert heads.layer_scores == pytest.approx((0, 0.7, 0, 0.9, 0.1, 0))
    assert heads.layers_holding(0.5) == (3,)
    assert heads.layers_holding(0.9) == (1, 3)
    assert heads.layers_holding(1.0) == (1, 3, 4)
    assert heads.retrieval_heads == ((3, 0), (1, 0), (1, 1), (4, 0))
    with pytest.raises(UserError, match=r"protect_heads: no head of heads.json has a retrieval score of 0.1"):
        measured([[0.05], [0.0]]).layers_holding(0.9)


def test_tasks_count_the_same() -> None:
    two = Heads(
        Provenance({}), 1, (TaskHeads("retrieval", 15, 9, ((1.0, 0.0),)), TaskHeads("needle", 15, 1, ((0.0, 0.5),)))
    )
    assert two.scores == ((0.5, 0.25),)


def test_heads_are_read_as_they_were_written_and_contradictions_refused(tmp_path: Path) -> None:
    heads = measured(SCORES, num_twins={"key": 2}, patched=(Patched("key", "residual", "all", ((1.0,),) * 6),))
    heads.write(tmp_path / Heads.FILE)
    assert Heads.read(tmp_path / Heads.FILE) == heads
    assert "4 of 10 heads copy 10% or more of what is asked for (9 of 15 retrieval right)" in heads.in_words()
    short = measured(SCORES, patched=(Patched("key", "residual", "all", ((1.0,),) * 5),))
    short.write(tmp_path / Heads.FILE)
    with pytest.raises(UserError, match="has 5 rows for 6 layers"):
        Heads.read(tmp_path / Heads.FILE)


@pytest.mark.slow
def test_the_figure_shows_scores_and_what_patching_brings_back(tmp_path: Path) -> None:
    by_head = tuple(tuple(score / 2 for score in row) for row in SCORES)
    curves = tuple(
        Patched("key", site, group, tuple((math.sin(layer),) for layer in range(6)))
        for site in ("residual", "attention", "mlp")
        for group in GROUPS
    )
    heads = measured(SCORES, num_twins={"key": 3}, patched=(*curves, Patched("key", "head", "all", by_head)))
    svg = save_figure(heads_figure(heads), tmp_path / "heads.svg").decode()
    for text in (
        "Retrieval score",
        "Another key (n = 3): the MLP's output",
        "Another key: contexts of single heads",
    ):
        assert text in svg
    assert save_figure(heads_figure(heads), tmp_path / "again.svg").decode() == svg
    assert "Another" not in save_figure(heads_figure(measured(SCORES)), tmp_path / "scores.svg").decode()

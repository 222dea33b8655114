"""The whole training, through the distill verb: what its parts must still do when they are put together.

Covers: shoal.train.trainer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_wandb import read_tracked
from packed_rows import labels_of
from safetensors.torch import load_file, save_file
from training_runs import (
    BATCH,
    KEEPING,
    LENGTH,
    STEPS,
    Trial,
    all_of,
    ask_of_all_rows,
    checkpointed_weights,
    fake_streams,
    finished,
    mask_labels_of_rows,
    recipe,
    run,
    script_scores,
    share_nothing,
    spoil_gradient,
    spoil_loss,
    take_chunks,
    terminate,
    unfinished,
    write_recipe,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.data.packing import IGNORED, read_rows
from shoal.recipe.distill import Distill, OnPolicy
from shoal.recipe.losses import TAID
from shoal.train.engine.checkpoint import MANIFEST
from shoal.train.objective.divergences import TaidState
from shoal.train.on_policy import Sampler

pytestmark = pytest.mark.slow

LOGIT_LOSSES: list[dict[str, Any]] = [
    {"kind": "forward_kl", "weight": 1.0},
    {"kind": "reverse_kl", "weight": 0.5, "temperature": 2.0},
    {"kind": "jsd", "weight": 0.3, "beta": 0.3},
    {"kind": "skewed_forward_kl", "weight": 0.2},
    {"kind": "skewed_reverse_kl", "weight": 0.2},
    {"kind": "cross_entropy", "weight": 0.1},
]
ALL_LOSSES = [
    *LOGIT_LOSSES,
    {"kind": "taid", "weight": 0.5},
    {"kind": "hidden_states", "weight": 0.5},
    {"kind": "hidden_states", "weight": 0.3, "map": "own", "distance": "cosine"},
]
NAMES = [term["kind"] for term in ALL_LOSSES if term["kind"] != "hidden_states"] + [
    "hidden_states_1",
    "hidden_states_2",
]
SCORES = {0: 5.0, 2: 4.0, 4: 1.0, 6: 3.0, 8: 2.0}
"""By step; the best is neither the first nor the last."""
EMPTY = (1, 2)
"""Rows of every batch without a supervised token: as micro-batches of one row they teach nothing."""

WATCHED: dict[str, Any] = {
    "track": "offline",
    "losses": ALL_LOSSES,
    "watch": {
        "eval_steps": 2,
        "perplexity_tokens": 128,
        "tasks": ["knowledge_continuation"],
        "limit": 4,
        "metric_for_best_model": "perplexity",
    },
    "trainer": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 4},
}


def same(one: Trial, other: Trial, names: list[str], *, within: float = 1e-5) -> None:
    for name in ["loss", *names]:
        assert one.curve(name) == pytest.approx(other.curve(name), abs=within, rel=within), name


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    """One rank, all losses, watched, never interrupted."""
    path = recipe(tmp_path_factory.mktemp("everything"), teacher, cut, **WATCHED)
    return finished(run(path, before=partial(script_scores, list(SCORES.values()), *EMPTY)))


def test_every_term_has_a_curve_and_the_loss_is_their_weighted_sum(everything):
    curves = {name: everything.curve(name) for name in NAMES}
    for step, loss in enumerate(everything.curve()):
        numbered = iter(("hidden_states_1", "hidden_states_2"))
        total = sum(
            term["weight"] * curves[next(numbered) if term["kind"] == "hidden_states" else term["kind"]][step]
            for term in ALL_LOSSES
        )
        assert loss == pytest.approx(total, rel=1e-5)
    assert everything.curve()[-1] < everything.curve()[0]


def test_scores_stand_beside_the_losses_and_the_best_state_is_what_is_left(everything):
    watched = {row["step"]: row for row in everything.training.history if "watch/perplexity" in row}
    assert {int(step): row["watch/perplexity"] for step, row in watched.items()} == SCORES
    assert all(0 <= row["watch/knowledge_continuation"] <= 1 for row in watched.values())
    assert everything.training.settings["best"] == {"step": 4, "metric": "perplexity", "score": 1.0}
    best = checkpointed_weights(everything, 4)
    assert all(torch.equal(weight, best[name]) for name, weight in everything.weights().items())
    assert not (everything.dir / "checkpoints" / "best").exists()
    assert everything.training.data["overlap"].keys() == {"knowledge_continuation"}


@pytest.mark.prove
def test_two_ranks_zero_3_and_accumulation_give_the_same_curves_also_where_a_micro_batch_teaches_nothing(
    everything, teacher, cut, tmp_path
):
    path = recipe(
        tmp_path, teacher, cut, losses=ALL_LOSSES, deepspeed="zero3", trainer={"per_device_train_batch_size": 1}
    )
    sharded = finished(run(path, ranks=2, before=partial(mask_labels_of_rows, *EMPTY)))
    same(sharded, everything, [*NAMES, "taid_t"])


@pytest.mark.prove
def test_ranks_under_zero_3_whose_heads_need_different_numbers_of_chunks_give_the_curve_of_one(teacher, cut, tmp_path):
    """Conversations hold unequal numbers of learnt tokens; a weight that a chunk gathers would wait for other ranks."""
    chats, chunk = tmp_path / "chats.jsonl", 4
    lengths = [1, 90, 2, 35, 60, 3, 20, 1] * 12
    chats.write_text(
        "".join(json.dumps({"prompt": "?" * (n % 7), "completion": chr(97 + n % 26) * n}) + "\n" for n in lengths)
    )
    data = {"path": str(chats)}
    trials = []
    for zero, ranks in [("zero0", 1), ("zero3", 2)]:
        path = recipe(tmp_path / zero, teacher, cut, data=data, deepspeed=zero)
        trials.append(
            finished(run(path, "distill.trainer.ddp_timeout=60", ranks=ranks, before=partial(take_chunks, chunk)))
        )
    whole, sharded = trials
    (folder,) = (sharded.dir / "text").glob("rows-*")
    rows = read_rows(folder)
    learnt = torch.stack([(rows[row]["labels"][1:] != IGNORED).sum() for row in range(BATCH * STEPS)])
    chunks = (learnt.view(STEPS, 2, -1).sum(-1) / chunk).ceil()
    assert (chunks[:, 0] != chunks[:, 1]).any(), "what this is about"
    same(sharded, whole, ["forward_kl"])


@pytest.mark.prove
def test_a_stopped_run_keeps_its_best_state_and_the_share_of_taid_and_draws_on(everything, teacher, cut, tmp_path):
    path = recipe(tmp_path, teacher, cut, **WATCHED)
    scores = list(SCORES.values())
    stopped = run(path, before=partial(all_of, partial(script_scores, scores, *EMPTY), partial(terminate, 7)))
    assert stopped.result is not None
    assert stopped.result.returncode == 143, stopped.log[-3000:]
    resumed = finished(run(path, before=partial(script_scores, scores[-1:], *EMPTY)))
    assert "checkpoint-7" in resumed.log
    for name in ("loss", "taid_t", *NAMES):
        assert resumed.curve(name) == everything.curve(name)
    ours, theirs = resumed.weights(), everything.weights()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert resumed.training.settings["best"]["step"] == 4
    rows = read_tracked(resumed.dir).history
    for name in ("loss", "taid_t", "watch/perplexity"):
        drawn = {row["train/global_step"]: row[f"train/{name}"] for row in rows if f"train/{name}" in row}
        assert drawn == {row["step"]: row[name] for row in resumed.training.history if name in row}, name


@pytest.mark.parametrize(
    ("stage", "hook", "problem"),
    [
        (0, partial(spoil_loss, 3, float("nan"), rank=1), "loss is nan"),
        pytest.param(0, partial(spoil_gradient, 3), "the norm of the gradient is nan", marks=pytest.mark.prove),
        (2, partial(spoil_gradient, 3), "the norm of the gradient is nan"),
    ],
)
def test_a_step_that_is_no_number_ends_the_run_before_it_is_saved(teacher, cut, tmp_path, stage, hook, problem):
    trainer = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    path = recipe(tmp_path, teacher, cut, deepspeed=f"zero{stage}", trainer=trainer)
    refused = run(path, ranks=2, before=hook)
    assert refused.result is not None
    assert refused.result.returncode == 2, refused.log[-3000:]
    assert f"step 3: {problem}. The batch is saved in {refused.dir}/refused/step-3" in refused.log
    assert "Traceback" not in refused.log
    assert kept_batches(refused, 3) == dealt_rows(refused, 3)
    complete = (file.parent.name for file in refused.dir.glob(f"checkpoints/*/{MANIFEST}"))
    assert sorted(complete) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("layer", "told", "stage", "ranks"),
    [
        (5, "the pruned model: model.layers.3", 0, 1),
        (2, "teacher: model.layers.2", 0, 1),
        pytest.param(2, "teacher: model.layers.2", 3, 2, marks=pytest.mark.prove),
    ],
)
def test_weights_that_are_no_numbers_are_refused_on_whichever_rank_they_lie(
    teacher, tmp_path, layer, told, stage, ranks
):
    """Also where they lie in a layer that is cut away."""
    broken = shutil.copytree(teacher, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused = run(write_recipe(tmp_path, broken, deepspeed=f"zero{stage}"), ranks=ranks)
    assert refused.result is not None
    assert refused.result.returncode == 2, refused.log[-3000:]
    assert f"error: {told}.mlp.down_proj.weight holds NaN or infinite numbers" in refused.log
    assert "Traceback" not in refused.log


def never_written(step: int) -> None:
    """The checkpoint of ``step`` takes for ever to write, and the process dies in the middle of the step after the
    next."""
    from shoal.train.engine.background import BackgroundWriter
    from shoal.train.trainer import DistillTrainer

    write, compute = BackgroundWriter._write, DistillTrainer.compute_loss

    def stuck(writer: BackgroundWriter, state: Any, path: str) -> None:
        if f"checkpoint-{step}/" in path:
            Path(path).write_bytes(b"a beginning")
            writer._is_ended.wait()
        write(writer, state, path)

    def ended(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step + 1:
            os._exit(9)
        return compute(trainer, *args, **kwargs)

    BackgroundWriter._write = stuck  # pyright: ignore[reportAttributeAccessIssue]
    DistillTrainer.compute_loss = ended  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 2)])
def test_a_training_goes_on_while_a_checkpoint_is_written_which_does_not_count_before_it_is(
    teacher, cut, tmp_path, stage, ranks
):
    path = recipe(tmp_path / "one", teacher, cut, deepspeed=f"zero{stage}", **KEEPING)
    killed = run(path, ranks=ranks, before=partial(never_written, 4))
    kept = {file.name: (file / MANIFEST).is_file() for file in (killed.dir / "checkpoints").iterdir()}
    assert kept == {"checkpoint-2": True, "checkpoint-4": False}
    went_on = finished(run(path, ranks=ranks))
    assert "checkpoint-4: was not finished; resuming from the checkpoint before it" in went_on.log
    whole = finished(run(recipe(tmp_path / "whole", teacher, cut, deepspeed=f"zero{stage}", **KEEPING), ranks=ranks))
    assert went_on.curve() == whole.curve()
    assert all(torch.equal(weight, whole.weights()[name]) for name, weight in went_on.weights().items())
    assert (went_on.dir / "checkpoints" / f"checkpoint-{STEPS}" / MANIFEST).is_file()


def kept_batches(trial: Trial, step: int) -> list[list[int]]:
    files = (trial.dir / "refused" / f"step-{step}").glob("rank-*.safetensors")
    planes = (plane for file in files for name, plane in load_file(file).items() if name.endswith(".input_ids"))
    return sorted(row for plane in planes for row in plane.tolist())


def dealt_rows(trial: Trial, step: int) -> list[list[int]]:
    (folder,) = (trial.dir / "text").glob("rows-*")
    return sorted(read_rows(folder).input_ids_NS[(step - 1) * BATCH : step * BATCH].tolist())


@pytest.mark.prove
@pytest.mark.parametrize("trainable", ["all", "from_first_cut"])
def test_rows_that_ask_no_teacher_change_nothing_by_not_being_read(teacher, cut, tmp_path, trainable):
    settings = {"losses": "forward_kl", "trainable": trainable, "deepspeed": "zero1"}
    own, trials = {"a": None, "b": "cross_entropy"}, []
    data = [{"path": alternating(tmp_path, letter), "losses": names} for letter, names in own.items()]
    for hook in (None, ask_of_all_rows):
        path = recipe(tmp_path / f"{hook is None}", teacher, cut, **settings, data=data)
        trials.append(finished(run(path, ranks=2, before=hook)))
    ours, whole = trials
    for name in ("loss", "forward_kl", "cross_entropy"):
        assert ours.curve(name) == pytest.approx(whole.curve(name), rel=1e-5)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(ours.weights()[name], weight, rtol=1e-4, atol=1e-5)


def test_a_spike_ends_the_run_and_a_resume_knows_what_is_usual(teacher, cut, tmp_path):
    steps = 18
    trainer = {"save_strategy": "steps", "save_steps": 17, "learning_rate": 1e-5}
    path = recipe(tmp_path, teacher, cut, num_tokens=steps * BATCH * LENGTH, trainer=trainer)
    for lives in range(2):  # the second goes on from the checkpoint before the spike
        refused = run(path, before=partial(spoil_loss, steps, 20.0, rank=0))
        assert refused.result is not None
        assert refused.result.returncode == 2, refused.log[-3000:]
        assert re.search(
            r"step 18: the loss is .*, more than distill\.stop_on_spike \(10\) times .* the 17 steps before",
            refused.log,
        )
        assert ("resuming from" in refused.log) == (lives == 1)
        assert kept_batches(refused, steps) == dealt_rows(refused, steps)


def alternating(folder: Path, letter: str) -> str:
    """A source of documents of about 300 tokens, more than a step reads, so that some steps read one source alone."""
    path = folder / f"{letter}.jsonl"
    words = [f"{letter * (1 + n % 7)}{n}" for n in range(60)]
    path.write_text("".join(json.dumps({"text": " ".join(words[n:] + words[:n])[:300]}) + "\n" for n in range(40)))
    return str(path)


BY_SOURCE: dict[str, float] = {"forward_kl": 1.0, "cross_entropy": 0.3, "hidden_states": 0.5, "taid": 0.5}
OWN = {"a": ["forward_kl", "hidden_states"], "b": ["cross_entropy", "taid"]}


def of_two_sources(folder: Path) -> dict[str, Any]:
    own = {name: {"kind": name, "weight": weight} for name, weight in BY_SOURCE.items()}
    return {
        "data": [
            {"path": alternating(folder, letter), "losses": [own[name] for name in names]}
            for letter, names in OWN.items()
        ],
        "trainer": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 4},
    }


def curves(trial: Trial) -> list[dict[str, float]]:
    """What every step logged of its loss and terms."""
    kept = ("loss", "taid_t", *BY_SOURCE)
    return [{name: row[name] for name in kept if name in row} for row in trial.training.history if "loss" in row]


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    """Two terms learn from one source and two from another, on one rank."""
    folder = tmp_path_factory.mktemp("two_sources")
    return finished(run(recipe(folder, teacher, cut, **of_two_sources(folder.parent))))


def test_a_curve_is_the_mean_over_the_tokens_that_its_term_learns_from(two_sources):
    (folder,) = (two_sources.dir / "text").glob("rows-*")
    rows = read_rows(folder)
    assert rows.sources_NS is not None
    alone, target = 0, TaidState(TAID())
    for step, values in enumerate(curves(two_sources)):
        of_step = slice(step * BATCH, (step + 1) * BATCH)
        learnt = labels_of(rows)[of_step] != IGNORED
        tokens = [int((learnt & (rows.sources_NS[of_step] == number)).sum()) for number in range(len(OWN))]
        shares = {name: tokens[number] / sum(tokens) for number, names in enumerate(OWN.values()) for name in names}
        assert values.keys() == {"loss", "taid_t", *(name for name, share in shares.items() if share)}
        total = sum(weight * values.get(name, 0.0) * shares[name] for name, weight in BY_SOURCE.items())
        assert values["loss"] == pytest.approx(total, rel=1e-5)
        target.update(values.get("taid"), step + 1, STEPS)
        assert values["taid_t"] == pytest.approx(target.t, rel=1e-9), "TAID looks at what its curve shows"
        alone += 0 in tokens
    assert 0 < alone < STEPS, "what this is about"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    """A run of losses that recorded signals serve as well, in which the layers below the cut are frozen and shared."""
    return finished(run(recipe(tmp_path_factory.mktemp("live"), teacher, cut, **SERVED)))


SERVED: dict[str, Any] = {
    "trainable": "from_first_cut",
    "losses": [
        *[{**term, "temperature": 2.0} for term in LOGIT_LOSSES if term["kind"] != "cross_entropy"],
        {"kind": "cross_entropy", "weight": 0.1},
        {"kind": "hidden_states", "weight": 0.5},
        {"kind": "hidden_states", "weight": 0.3, "map": "own", "distance": "cosine"},
    ],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (3, 2)])
def test_recorded_signals_give_the_curves_of_the_live_teacher(live, teacher, cut, tmp_path, zero, ranks):
    path = recipe(
        tmp_path,
        teacher,
        cut,
        **SERVED,
        deepspeed=f"zero{zero}",
        teacher={"kind": "recorded", "top_k": 271, "prefix": True},  # all words but one
    )
    recorded = finished(run(path, ranks=ranks))
    assert re.search(r"record: \d+ rows in", recorded.log)
    names = [name for name in NAMES if name != "taid"]
    assert recorded.training.settings["shared_layers"] == live.training.settings["shared_layers"] == 2
    for name in names:
        # 0.0008 (KL + sqrt(2 KL)) of 16 bits, here at temperature 2, and bfloat16 states
        assert recorded.curve(name) == pytest.approx(live.curve(name), rel=4e-3, abs=4e-3), name
        assert recorded.curve(name) != live.curve(name) or name == "cross_entropy"


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.prove)])
def test_a_recorded_prefix_gives_the_curve_of_running_it_also_after_a_stop(teacher, cut, tmp_path, stopped):
    settings: dict[str, Any] = {"trainable": "from_first_cut", "trainer": {"save_strategy": "steps", "save_steps": 4}}
    kept = {"kind": "recorded", "path": str(tmp_path / "signals")}
    path = recipe(tmp_path / "prefix", teacher, cut, **settings, teacher={**kept, "prefix": True})
    finished(run(path, "allow=write", verb="record"))
    prefix = finished(run(path))
    assert prefix.training.settings["shared_layers"] == 2
    if stopped:
        went_on = finished(run(unfinished(prefix, tmp_path / "on", step=4)))
        assert "resuming from" in went_on.log
        assert went_on.curve() == prefix.curve()
        assert all(torch.equal(weight, prefix.weights()[name]) for name, weight in went_on.weights().items())
        return
    # what holds the prefix serves runs without it
    alone = finished(run(recipe(tmp_path / "alone", teacher, cut, **settings, teacher=kept), "allow=write"))
    assert not any("rows in" in trial.log for trial in (prefix, alone)), "nothing is recorded twice"
    assert prefix.training.settings["shared_layers"] == 2
    assert alone.training.settings["shared_layers"] == 0
    same(prefix, alone, ["forward_kl"], within=1e-6)


def test_an_offloaded_teacher_gives_the_curve_of_one_on_the_device(live, teacher, cut, tmp_path):
    path = recipe(tmp_path, teacher, cut, **SERVED, teacher={"kind": "live", "offload": True})
    assert finished(run(path)).curve() == pytest.approx(live.curve(), abs=1e-6)


ADAPTED: dict[str, Any] = {
    "trainable": "near_gaps",
    "lora": {"r": 2, "target_modules": ["q_proj", "mlp.down_proj"]},
    "losses": [{"kind": "forward_kl"}, {"kind": "hidden_states"}],
}


def test_adapters_above_a_shared_prefix_give_the_curve_without_sharing_and_a_plain_checkpoint(teacher, cut, tmp_path):
    shared = finished(run(recipe(tmp_path / "shared", teacher, cut, **ADAPTED)))
    alone = finished(run(recipe(tmp_path / "alone", teacher, cut, **ADAPTED), before=share_nothing))
    assert shared.training.settings["shared_layers"] == 1
    assert re.search(r"teacher and student share \d+ MB of frozen weights", shared.log)
    assert alone.training.settings["shared_layers"] == 0
    same(shared, alone, ["forward_kl", "hidden_states"], within=1e-6)
    assert shared.curve()[-1] < shared.curve()[0]
    before, after = shared.weights("student"), shared.weights()
    assert after.keys() == before.keys()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    ends = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    assert moved == {f"model.layers.{layer}.{end}" for layer in (1, 2) for end in ends}
    for name, weight in alone.weights().items():
        torch.testing.assert_close(weight, after[name], rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(shared.dir / "distilled")
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, after["model.layers.1.self_attn.q_proj.weight"])


@pytest.fixture(scope="module")
def on_policy(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    path = recipe(tmp_path_factory.mktemp("on_policy"), teacher, cut, **WRITING)
    return finished(run(path))


WRITING: dict[str, Any] = {
    "trainable": "from_first_cut",
    "losses": [{"kind": "jsd"}, {"kind": "hidden_states", "weight": 0.1}],
    "on_policy": {"share": 0.6, "start": 0.0, "prompt_tokens": 8, "max_new_tokens": 40, "temperature": 0.2},
    "trainer": {"save_strategy": "steps", "save_steps": 4, "gradient_checkpointing": True},
}


def test_no_section_is_no_sampling_and_a_share_of_0_6_mixes_both_kinds_of_steps(teacher, on_policy):
    drawn = [Sampler(OnPolicy(share=0.6, start=0), 0, LENGTH, (), 0).replaces(step, STEPS) for step in range(STEPS)]
    assert set(drawn[:4]) == set(drawn[4:]) == {True, False}
    student, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    assert Sampler.of(Distill(), student, tokenizer, seed=0) is None
    assert Sampler.of(Distill(on_policy=OnPolicy(share=0.1)), student, tokenizer, seed=0) is not None
    assert on_policy.curve("jsd")[-1] < on_policy.curve("jsd")[0]


SAMPLES = ["on_policy/loop_rate", "on_policy/end_rate", "on_policy/kept_tokens"]


def samples_of(trial: Trial) -> list[dict[str, float]]:
    """What every step logged of what the student writes."""
    return [{name: row[name] for name in SAMPLES if name in row} for row in trial.training.history if "loss" in row]


def test_on_policy_steps_go_on_after_a_stop_with_the_same_curve(on_policy, tmp_path):
    path = unfinished(on_policy, tmp_path / "copy", step=4)
    resumed = finished(run(path))
    assert "checkpoint-4" in resumed.log
    assert resumed.curve() == on_policy.curve()
    assert samples_of(resumed) == samples_of(on_policy)
    assert all(torch.equal(weight, on_policy.weights()[name]) for name, weight in resumed.weights().items())


@pytest.mark.prove
def test_two_ranks_under_zero_3_sample_the_same_text_as_one(on_policy, teacher, cut, tmp_path):
    settings = {**WRITING, "deepspeed": "zero3"}
    settings["trainer"] = {**WRITING["trainer"], "per_device_train_batch_size": 1}
    sharded = finished(run(recipe(tmp_path, teacher, cut, **settings), ranks=2))
    same(sharded, on_policy, ["jsd", "hidden_states"])
    assert samples_of(sharded) == samples_of(on_policy)


def test_no_gradient_is_let_go_while_another_stream_adds_it_up(teacher, cut, tmp_path):
    zero = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1_500}}
    path = recipe(tmp_path, teacher, cut, deepspeed=zero, batch_size=6, num_tokens=768)
    finished(run(path, ranks=3, before=fake_streams))
    assert sorted(file.name for file in tmp_path.glob("seen-*")) == ["seen-0", "seen-1", "seen-2"]

"""Cut, heal, cut: rounds in one run directory, each on the healed student of the one before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import environment, run_ranks
from safetensors.torch import load_file
from torch import Tensor
from training_runs import BATCH, LENGTH, small_training
from transformers import AutoConfig

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.training import Training
from shoal.errors import UserError
from shoal.launch import cli
from shoal.launch.verbs import launch
from shoal.launch.verbs.run import open_run
from shoal.launch.workflows import preflight
from shoal.models.checkpoint_files import model_fingerprint
from shoal.recipe.edits import KEPT_LAYERS
from shoal.recipe.recipe import load_recipe, parse_recipe

pytestmark = pytest.mark.slow
STEPS = 4
TOKENS = STEPS * BATCH * LENGTH


def settings(teacher: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe of a few seconds that takes three of six layers in two rounds; ``sections`` are added to its own."""
    recipe: dict[str, Any] = {
        "model": str(teacher),
        "run_dir": str(folder / "run"),
        "dtype": "float32",
        "measure": {"num_tokens": 256, "sequence_length": 64, "batch_size": 2},
        "prune": {"num_drop": 3, "rounds": 2},
        "distill": small_training(
            steps=STEPS,
            trainable="from_first_cut",
            losses=[{"kind": "forward_kl"}, {"kind": "cross_entropy"}],
            trainer={"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": STEPS},
        ),
        "eval": {"tasks": ["knowledge_continuation"], "limit": 2, "perplexity_tokens": 100, "sequence_length": 64},
        "track": {"wandb": "off"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    recipe["eval"]["speed"] = False
    return recipe


def written(teacher: Path, folder: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings(teacher, folder, **sections)))
    return folder / "recipe.yaml"


class Launcher:
    """Takes the place of the DeepSpeed launcher: runs one rank, and is killed when it is to start another."""

    def __init__(self, most: int = 9) -> None:
        self.left, self.log, self.arguments = most, "", list[Sequence[str]]()

    def __call__(self, command: list[str], *_: object, **__: object) -> tuple[int, int | None]:
        arguments = command[command.index("distill") :]
        if not self.left:
            return -9, None
        self.left -= 1
        self.arguments.append(arguments)
        ended = run_ranks(arguments, ranks=1, env=environment(), cwd=Path(arguments[2]).parent)
        self.log += ended.stderr
        return ended.returncode, None


@pytest.fixture(scope="module")
def patched() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_RANK", raising=False)
        yield patch


def call(patched: pytest.MonkeyPatch, verb: str, recipe: Path, *words: str, launcher: Launcher | None = None) -> int:
    patched.setattr(launch, "run_launcher", launcher or Launcher())
    return cli._main([verb, "--config", str(recipe), *words])


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Path:
    """`shoal run` in two rounds with a control, never interrupted."""
    recipe = written(teacher, tmp_path_factory.mktemp("whole"), eval={"control": True})
    assert call(patched, "run", recipe) == 0
    return recipe.parent / "run"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def layer(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_every_round_measures_cuts_and_heals_the_student_of_the_one_before(whole: Path, teacher: Path) -> None:
    first, last = whole / "rounds" / "1", whole
    plans = [PruningPlan.read(folder / "plan.json") for folder in (first, last)]
    assert [len(plan.drop) for plan in plans] == [2, 3]
    assert set(plans[0].drop) < set(plans[1].drop)
    assert [plan.num_layers for plan in plans] == [6, 6], "plans lead from the teacher"
    healed = model_fingerprint(first / "distilled")
    importance = Importance.read(last / "importance.json")
    for made in (plans[1], importance):
        assert made.provenance.inputs["model healed before"] == healed
        assert made.provenance.inputs["model"] == model_fingerprint(teacher)
    assert importance.kept == plans[0].keep
    scores = dict(zip(importance.kept, importance.layers["block_influence"], strict=True))
    (gone,) = set(plans[1].drop) - set(plans[0].drop)
    assert gone == min((own for own in importance.kept if own not in (0, 5)), key=scores.__getitem__)
    # what is cut is the healed student, layer by layer
    before, after = weights(first / "distilled"), weights(last / "student")
    for new, original in enumerate(plans[1].keep):
        old = plans[0].keep.index(original)
        assert all(torch.equal(tensor, layer(before, old)[name]) for name, tensor in layer(after, new).items())
    assert not all(torch.equal(tensor, layer(weights(teacher), 5)[name]) for name, tensor in layer(after, 2).items()), (
        "the last layer was healed"
    )


def test_layers_are_named_as_in_the_first_teacher(whole: Path) -> None:
    for folder in (whole / "rounds" / "1", whole):
        keep = PruningPlan.read(folder / "plan.json").keep
        for student in ("student", "distilled"):
            assert getattr(AutoConfig.from_pretrained(folder / student), KEPT_LAYERS) == list(keep)


def test_the_teacher_of_every_training_is_the_first_and_layers_untouched_so_far_run_once(
    whole: Path, teacher: Path
) -> None:
    for folder in (whole / "rounds" / "1", whole):
        plan, training = PruningPlan.read(folder / "plan.json"), Training.read(folder / "distill.json")
        assert training.provenance.inputs["model"] == model_fingerprint(teacher)
        assert training.settings["shared_layers"] == plan.first_change
        for below in range(plan.first_change):
            mine, theirs = layer(weights(folder / "distilled"), below), layer(weights(teacher), below)
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_control_learns_from_the_rows_in_every_round(whole: Path) -> None:
    first, last = (Training.read(folder / "control" / "distill.json") for folder in (whole / "rounds" / "1", whole))
    before = model_fingerprint(whole / "rounds" / "1" / "control" / "distilled")
    assert last.provenance.inputs["control.healed before"] == before
    assert "control.healed before" not in first.provenance.inputs
    assert AutoConfig.from_pretrained(whole / "control" / "distilled").num_hidden_layers == 6
    rows = [Training.read(folder / "distill.json").settings["rows"] for folder in (whole / "rounds" / "1", whole)]
    assert rows == [first.settings["rows"], last.settings["rows"]]
    assert len(set(rows)) == 1
    begins = [own.history[0]["cross_entropy"] for own in (first, last)]
    assert begins[1] < begins[0], "it goes on from the control of the first round"
    one, two = (weights(folder / "control" / "distilled") for folder in (whole / "rounds" / "1", whole))
    changed = {name.split(".")[2] for name in one if not torch.equal(one[name], two[name]) and "layers" in name}
    assert changed == {str(own) for own in range(PruningPlan.read(whole / "plan.json").first_change, 6)}


def test_the_report_tells_of_every_round_and_of_all_tokens(whole: Path) -> None:
    report = (whole / "report.md").read_text()
    assert f"{2 * TOKENS:,}** tokens of distillation in 2 rounds" in report
    rows = [line for line in report.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    plans = [PruningPlan.read(folder / "plan.json") for folder in (whole / "rounds" / "1", whole)]
    (gone,) = set(plans[1].drop) - set(plans[0].drop)
    assert f"| 2 | {gone} | 3 | {TOKENS:,} |" in rows[1]
    assert f"| 4 | {TOKENS:,} |" in rows[0]
    assert "in round 2 of 2, the 1 of 4 layers with the lowest block_influence" in rows[1]
    assert "layers 0, 5 protected" in rows[1], "by the teacher's numbers"
    assert "| Distilling, round 1 |" in report
    assert set(json.loads((whole / "run.json").read_text())["stages"]) >= {"rounds/1/distill.json", "distill.json"}


def test_a_run_that_was_killed_after_the_first_round_goes_on_to_the_same_bits(
    whole: Path, teacher: Path, tmp_path: Path, patched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(teacher, tmp_path, eval={"control": True})
    assert call(patched, "run", recipe, launcher=Launcher(1)) == 137
    run = tmp_path / "run"
    assert (run / "rounds" / "1" / "distilled").is_dir()
    assert not (run / "distilled").exists()
    again = Launcher()
    assert call(patched, "run", recipe, launcher=again) == 0
    assert "distill: done already" in capsys.readouterr().err
    assert [words[3:] for words in again.arguments] == [[]], "the first round is not trained again"
    for folder in ("rounds/1/distilled", "student", "distilled", "control/distilled"):
        assert same_weights(run / folder, whole / folder), folder
    assert PruningPlan.read(run / "plan.json").drop == PruningPlan.read(whole / "plan.json").drop


@pytest.fixture(scope="module")
def stepwise(teacher: Path, tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Path:
    """`shoal distill` in two rounds with a checkpoint after every step, never interrupted."""
    folder = tmp_path_factory.mktemp("stepwise")
    often = {"trainer": {"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": STEPS}}
    distill = settings(teacher, folder)["distill"]
    recipe = written(teacher, folder, distill={**distill, **often})
    assert call(patched, "distill", recipe) == 0
    return recipe.parent


@pytest.mark.parametrize("killed", [1, 2])
def test_a_round_that_was_killed_in_its_training_goes_on_to_the_same_bits(
    stepwise: Path, tmp_path: Path, patched: pytest.MonkeyPatch, killed: int
) -> None:
    """As if the process had died after the second step of round ``killed``."""
    copy = tmp_path / "copy"
    shutil.copytree(stepwise, copy)
    run = copy / "run"
    if killed == 1:
        for path in [own for own in run.iterdir() if own.name not in ("rounds", "text")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = run / "rounds" / "1" if killed == 1 else run
    shutil.rmtree(folder / "distilled")
    (folder / "distill.json").unlink()
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    launcher = Launcher()
    assert call(patched, "distill", copy / "recipe.yaml", f"run_dir={run}", launcher=launcher) == 0, launcher.log
    assert len(launcher.arguments) == (2 if killed == 1 else 1)
    assert "going on from" in launcher.log, "it began anew"
    for name in ("rounds/1/distilled", "student", "distilled"):
        assert same_weights(run / name, stepwise / "run" / name), name
    rows = Training.read(folder / "distill.json").rows()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero3")])
def test_ranks_without_our_launcher_do_every_round_themselves(
    whole: Path, teacher: Path, tmp_path: Path, ranks: int, zero: str
) -> None:
    recipe = written(teacher, tmp_path)
    arguments = ["distill", "--config", str(recipe), f"distill.deepspeed=deepspeed/{zero}.json"]
    ended = run_ranks(arguments, ranks=ranks, env=environment(), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for folder in ("rounds/1/distilled", "distilled"):
        assert ranks > 1 or same_weights(tmp_path / "run" / folder, whole / folder)
        expected = weights(whole / folder)
        for name, found in weights(tmp_path / "run" / folder).items():
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4, msg=name)


def test_a_single_verb_finishes_the_rounds_before_and_says_so(
    teacher: Path, tmp_path: Path, patched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rounds of a layer each, near the gaps and after a local stage."""
    recipe = written(
        teacher,
        tmp_path,
        prune={"num_drop": 3, "rounds": 3},
        distill={
            **settings(teacher, tmp_path)["distill"],
            "trainable": "near_gaps",
            "local": {"num_tokens": 4 * LENGTH, "batch_size": 2},
        },
    )
    assert call(patched, "distill", recipe, "--dry-run", "--round", "1") == 2
    assert "run `shoal measure --round 1` first" in capsys.readouterr().err
    assert call(patched, "measure", recipe, "--round", "1") == 0
    assert call(patched, "distill", recipe, "--dry-run") == 0
    told = f"this is round 1 of 3; each trains on {TOKENS:,} tokens, {3 * TOKENS:,} in"
    assert told in capsys.readouterr().out
    launcher = Launcher()
    assert call(patched, "prune", recipe, launcher=launcher) == 0
    assert [words[3:] for words in launcher.arguments] == [["--round", "1"], ["--round", "2"]]
    told = capsys.readouterr().err
    assert "round 1 of 3 comes first" in told
    assert "round 2 of 3 comes first" in told
    run = tmp_path / "run"
    plans = [PruningPlan.read(run / folder / "plan.json") for folder in ("rounds/1", "rounds/2", ".")]
    assert [len(plan.drop) for plan in plans] == [1, 2, 3]
    assert getattr(AutoConfig.from_pretrained(run / "student"), KEPT_LAYERS) == list(plans[2].keep)
    assert not (run / "distilled").exists()
    assert call(patched, "distill", recipe) == 0
    lowest = Training.read(run / "distill.json").settings["shared_layers"]
    for below in range(lowest):
        mine, theirs = layer(weights(run / "distilled"), below), layer(weights(teacher), below)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert call(patched, "eval", recipe, "--round", "1") == 0
    assert (run / "rounds" / "1" / "eval" / "distilled.json").is_file()
    assert call(patched, "report", recipe, "--round", "2") == 0
    assert "tokens of distillation in 2 rounds" in (run / "rounds" / "2" / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune.rounds=3", "run/rounds/1: holds checkpoints trained on another cut (prune.rounds is 3 in this recipe"),
        ("prune.rounds=1", "run: holds checkpoints trained on another cut"),
        ("distill.trainer.learning_rate=1", "rounds/1/checkpoints"),
        ("prune.metric=angular", "run/rounds/1: holds checkpoints trained on another cut"),
    ],
)
def test_settings_that_would_change_a_trained_round_are_refused(
    whole: Path, tmp_path: Path, patched: pytest.MonkeyPatch, capsys: Any, change: str, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole.parent, folder)
    launcher = Launcher(0)
    words = (change, f"run_dir={folder / 'run'}")
    assert call(patched, "run", folder / "recipe.yaml", *words, launcher=launcher) == 2
    assert message in capsys.readouterr().err


def test_a_round_that_is_gone_is_not_made_again_under_a_later_training(
    whole: Path, tmp_path: Path, patched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole.parent, folder)
    shutil.rmtree(folder / "run" / "rounds" / "1" / "distilled")
    for verb in ("run", "distill", "eval", "report"):
        assert call(patched, verb, folder / "recipe.yaml", f"run_dir={folder / 'run'}", launcher=Launcher(0)) == 2
        assert "holds checkpoints of a training that came after another round 1 of 2" in capsys.readouterr().err
    arguments = ["distill", "--config", str(folder / "recipe.yaml"), f"run_dir={folder / 'run'}"]
    ended = run_ranks(arguments, ranks=1, env=environment(), cwd=folder)
    assert ended.returncode == 2
    assert "holds checkpoints of a training that came after another round 1 of 2" in ended.stderr


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"prune": {"num_drop": 2, "rounds": 3}},
            "prune.rounds: 3 rounds are more than the layers to drop; set at most 2",
        ),
        (
            {"prune": {"num_drop": None, "drop": [1, 2], "rounds": 2}},
            "prune.rounds: chooses layers anew on every healed",
        ),
        ({"prune": {"edits": [{"kind": "skip_mlp", "layers": [1]}]}}, "prune.rounds: several rounds only drop layers"),
        ({"prune": {"compensate": "scale"}}, "leave prune.compensate out, or set prune.rounds: 1"),
        ({"measure": {"diagnostics": True}}, "measure.diagnostics: numbers layers as the model of one round does"),
        (
            {"measure": {"sweep": {"tasks": ["knowledge"], "operators": ["layer", "mlp"]}}},
            "measure.sweep.operators: any but layer: numbers layers",
        ),
        (
            {"distill": {"teacher": {"recorded": "signals", "prefix": True}}},
            "distill.teacher.prefix: records the state at the first layer of one cut",
        ),
    ],
)
def test_what_does_not_go_in_rounds_is_refused_with_the_recipe(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(written(teacher, tmp_path, **sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prune": {"num_drop": None, "ratio": 0.34, "rounds": 3}}, "3 rounds are more than the 2 of 6 layers to drop"),
        ({"prune": {"protect": [0, 1, 2, -1]}}, "2 rounds are to drop 3 layers, but only 2 of 6 are not protected"),
        (
            {"measure": {"num_drop": 3, "metrics": ["block_influence", "sleb"]}},
            "measure.num_drop: 3 removals .* last round allows, which has 4",
        ),
    ],
)
def test_what_the_last_round_could_not_do_is_refused_before_the_first(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    run = open_run(parse_recipe(settings(teacher, tmp_path, **sections)))
    with pytest.raises(UserError, match=message):
        preflight.preflight(run)


def test_a_round_that_there_is_not_is_refused(
    teacher: Path, tmp_path: Path, patched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(patched, "distill", written(teacher, tmp_path), "--round", "3") == 2
    assert "--round 3: the recipe has prune.rounds: 2; name one of 1 to 2" in capsys.readouterr().err


def test_a_round_before_the_last_is_a_run_of_its_own_in_wandb(teacher: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(settings(teacher, tmp_path))
    names = [open_run(recipe, rounds_after=after).track.name for after in (1, 0)]
    assert names == [f"{Path(recipe.run_dir).name}-round-1", None]

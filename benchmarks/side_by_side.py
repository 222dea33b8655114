"""What the benchmarks share: turns beside one another, processes of their own, recipes and models of random numbers."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from shoal.formatting import aligned
from shoal.machine import now, peak_memory
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.runtime import device, environment

BENCHMARK_RECIPE = "benchmark.yaml"
T = TypeVar("T")
B = TypeVar("B", bound="Bench")


class Bench:
    """The model in the hands of both sides, and the options of the command line."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.folder = resolve_model(arguments.model)
        self.model: PreTrainedModel = load_model(self.folder, dtype=arguments.dtype, device=device())
        self.tokenizer: Any = load_tokenizer(self.folder)

    def pairs(
        self, ours: Callable[[], Any], theirs: Callable[[], Any], *, warm_up: bool = False
    ) -> tuple[dict[str, Any], Any, Any]:
        """Both in turns, the first of every other pair being the other one: seconds and ratios, and the last results.

        A ratio is the median over pairs, which ran next to each other.
        """
        pairs = []
        for repeat in range(self.arguments.repeats + warm_up):
            first, second = rotated((ours, theirs), repeat)
            times = {run: timed(run) for run in (first, second)}
            pairs.append((times[ours], times[theirs]))
        figures: dict[str, Any] = {}
        for index, kind in enumerate(("wall", "processor")):
            seconds = [(own[index], other[index]) for own, other in pairs[warm_up:]]
            figures[f"{kind}_s"] = [[round(own, 2), round(other, 2)] for own, other in seconds]
            figures[f"ratio_by_{kind}"] = round(statistics.median(own / other for own, other in seconds), 3)
            figures[f"times_faster_by_{kind}"] = round(statistics.median(other / own for own, other in seconds), 2)
        return figures, pairs[-1][0][2], pairs[-1][1][2]


def print_parts(
    bench: type[B], parts: Mapping[str, Callable[[B], dict[str, Any]]], parser: ArgumentParser, *, questions: int
) -> None:
    """Print the figures of each of ``parts`` that the command line names, then its options and the machine."""
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="all of them if none is named")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="values and texts are compared, so not bfloat16")
    parser.add_argument("--questions", type=int, default=questions)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    loaded = bench(arguments)
    for name in arguments.parts or parts:
        print(json.dumps({name: parts[name](loaded)}, indent=1), flush=True)
    print(json.dumps({key: str(value) for key, value in vars(arguments).items()} | environment(), indent=1))


def print_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """``columns``, by name and format, of each of ``rows``; a dash for what a row has not."""
    cells = [
        ["-" if row.get(name) is None else format(row[name], spec) for name, spec in columns.items()] for row in rows
    ]
    print("\n".join(aligned([list(columns), *cells])))


def timed(run: Callable[[], T]) -> tuple[float, float, T]:
    """Seconds of the clock and of the processor, and the result."""
    wall, processor = now(device()), time.process_time()
    result = run()
    return now(device()) - wall, time.process_time() - processor, result


class Clock(TrainerCallback):
    """Wall and processor seconds at the end of every step, and the peak until the last one.

    With ``seconds`` training stops once the steps but the first have taken as long, and at least ``least`` were done.
    """

    def __init__(self, *, seconds: float = math.inf, least: int = 3) -> None:
        self._seconds, self._least = seconds, least
        self.wall: list[float] = []
        self.busy: list[float] = []
        self.peak = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wall.append(now(device()))
        self.busy.append(time.process_time())
        self.peak = peak_memory()
        if len(self.wall) >= self._least and self.wall[-1] - self.wall[0] > self._seconds:
            control.should_training_stop = True

    def figures(self, tokens: int) -> dict[str, Any]:
        """Of the steps but the first, each of so many tokens."""
        wall, busy = ([b - a for a, b in itertools.pairwise(times)] for times in (self.wall, self.busy))
        return step_figures(wall, busy, tokens) | {"peak": self.peak}


def step_figures(wall: list[float], busy: list[float], tokens: int) -> dict[str, Any]:
    """Medians over steps of so many tokens."""
    return {
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(busy),
        "tokens_per_s": tokens / statistics.median(wall),
        "steps": [round(value, 4) for value in wall],
        "cpu_steps": [round(value, 4) for value in busy],
    }


def rotated(ways: Sequence[T], turn: int) -> list[T]:
    """``ways`` in the order of a turn: each comes first as often, since who comes after whom matters."""
    first = turn % len(ways)
    return [*ways[first:], *ways[:first]]


def largest_difference(ours: Iterable[Any], theirs: Iterable[Any]) -> float:
    """Of two lists of (log-likelihood, ...), in nats."""
    return max(abs(own[0] - other[0]) for own, other in zip(ours, theirs, strict=True))


def in_a_process(*options: object) -> dict[str, Any]:
    """The figures that this script prints with ``options``, by a process of its own: none can lower its peak."""
    # idle threads that spin would slow whoever shares the machine, and so this process too
    variables = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, sys.argv[0], *map(str, options)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_recipe(settings: dict[str, Any]) -> Path:
    """The file of a recipe, in its run directory, beside the recipe.yaml that shoal keeps there."""
    file = Path(settings["run_dir"]) / BENCHMARK_RECIPE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**settings, "track": {"wandb": "off"}}, sort_keys=False))
    return file


def run_shoal(verb: str, recipe: Path, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "shoal.launch.cli", verb, "--config", str(recipe), *overrides], check=True)


def write_byte_tokenizer(folder: Path) -> None:
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    words.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    words.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)

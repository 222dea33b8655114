"""What is kept against tokens, or against the depth of the cut, from finished arms of benchmarks/recovery.py.

    python benchmarks/recovery_curves.py OUT [--against tokens | layers] [--cut 12-13-14-21-25-26 | --tokens 81920]
        [--arms mixed general_kl ...] [--figure FILE.svg]

Reads every `OUT/without-CUT-TOKENS-tokens/ARM-SEED` that holds a finished evaluation. `--against tokens` takes one cut
and all its budgets, `--against layers` one budget and all its cuts; a compensated cut is an arm of its own. For every
column (twin, out, public, in) a table has the mean share kept of the teacher's distance to chance with its 95 %
interval, means over the seeds that are there, and the figure the same as curves.

Against tokens a straight line over the logarithm of tokens is laid through what up to 100 thousand tokens kept, and
what it says of larger budgets stands beside what they kept: how far short runs tell what long ones bring. That takes
two budgets below, and one above.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from recovery import ARMS, DROP, column_weights, pooled

from shoal.artifacts.evaluation import Interval
from shoal.eval.compare.means import summed_change
from shoal.figures.style import INK, SERIES_COLOURS, SERIES_STYLE, figure_style, panels, save_figure

FOLDER = re.compile(r"without-(?P<cut>\d+(?:-\d+)*)(?:-(?P<closed>scale|linear|both))?-(?P<tokens>\d+)-tokens")
FITTED_TOKENS = 100_000
"""Budgets up to this one are fitted, larger ones predicted."""


@dataclass(frozen=True)
class Point:
    """Mean share kept by column of one arm at one budget and cut, and its change over the cut model."""

    num_seeds: int
    kept: Mapping[str, Interval]
    gained: Mapping[str, Interval]


COMMON_CUT = {arm for arm, own in ARMS.items() if "choose" not in own}
"""Arms that heal the cut which --drop names."""
Curves = Mapping[str, Mapping[int, Point]]
"""Arm -> tokens or dropped layers -> what was kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", choices=("tokens", "layers"), default="tokens")
    parser.add_argument("--cut", default="-".join(map(str, DROP)), help="the cut of all budgets")
    parser.add_argument("--tokens", type=int, default=81_920, help="the budget of all cuts")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--figure", type=Path, help="an .svg or .png to write")
    arguments = parser.parse_args()
    drawn = curves(arguments)
    if not drawn:
        sys.exit(f"{arguments.out}: no finished arm of benchmarks/recovery.py with --tokens for this choice")
    print(table(drawn, arguments.against))
    if arguments.against == "tokens":
        print(f"\n{predictions(drawn)}")
    if arguments.figure:
        save_curves(drawn, arguments)


def curves(arguments: argparse.Namespace) -> Curves:
    """All finished arms of the chosen cut or budget; 0 tokens is the cut model, which every arm starts from."""
    runs: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for done in sorted(arguments.out.glob("*/*/eval/distilled.json")):
        run = done.parents[1]
        arm = run.name.rpartition("-")[0]
        if not (folder := FOLDER.fullmatch(run.parent.name)) or (arguments.arms and arm not in arguments.arms):
            continue
        cut, tokens = folder["cut"], int(folder["tokens"])
        if (cut != arguments.cut) if arguments.against == "tokens" else (tokens != arguments.tokens):
            continue
        arm = f"{arm}, {folder['closed']}" if folder["closed"] else arm
        runs[arm, tokens if arguments.against == "tokens" else cut.count("-") + 1].append(run)
    drawn: dict[str, dict[int, Point]] = defaultdict(dict)
    for (arm, place), own in sorted(runs.items()):
        drawn[arm][place] = point(own, "distilled")
    if arguments.against == "layers":
        for place in sorted({place for _, place in runs}):
            plain = [run for (arm, at), own in runs.items() if at == place and arm in COMMON_CUT for run in own]
            if plain:
                drawn["cut, not healed"][place] = point(plain[:1], "pruned")
    else:
        for arm, points in drawn.items():
            points[0] = point(runs[arm, min(points)][:1], "pruned")
    return {arm: dict(sorted(points.items())) for arm, points in drawn.items()}


def point(runs: Sequence[Path], role: str) -> Point:
    teacher, pruned, own = (pooled(runs, of) for of in ("teacher", "pruned", role))
    kept, gained = {}, {}
    for column, weight in column_weights(teacher).items():
        scales = {name: share / (teacher[name].score - teacher[name].chance) for name, share in weight.items()}
        lost = summed_change(scales, teacher, own)
        kept[column] = Interval(1 + lost.value, 1 + lost.ci_low, 1 + lost.ci_high)
        gained[column] = summed_change(scales, pruned, own)
    return Point(len(runs), kept, gained)


def table(drawn: Curves, against: str) -> str:
    columns = list(next(iter(next(iter(drawn.values())).values())).kept)
    lines = [f"| arm | {against} | seeds | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 3)}"]
    for arm, points in drawn.items():
        for place, own in points.items():
            cells = [shown(own.kept[column]) for column in columns]
            lines.append(f"| {arm} | {place:,} | {own.num_seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.ci_low:.2f}, {interval.ci_high:.2f}]"


def predictions(drawn: Curves) -> str:
    """By arm and column: where it rises first, the line through small budgets, and what it says of large ones."""
    lines = [
        "| arm | column | first budget clear of the cut model | by the line per tenfold | predicted, and kept |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, points in drawn.items():
        budgets = [tokens for tokens in points if tokens]
        for column in points[budgets[0]].kept:
            first = next((f"{tokens:,}" for tokens in budgets if points[tokens].gained[column].ci_low > 0), "none")
            fitted = [tokens for tokens in budgets if tokens <= FITTED_TOKENS]
            slope, said = "", []
            if len(fitted) > 1:
                kept = [points[tokens].kept[column].value for tokens in fitted]
                line = np.polynomial.Polynomial.fit(np.log10(fitted), kept, 1)
                slope = f"{line.deriv()(0.0):+.2f}"
                said = [
                    f"{tokens:,}: {line(np.log10(tokens)):.2f}, kept {shown(points[tokens].kept[column])}"
                    for tokens in budgets
                    if tokens > FITTED_TOKENS
                ]
            lines.append(f"| {arm} | {column} | {first} | {slope} | {'; '.join(said)} |")
    return "\n".join(lines)


def save_curves(drawn: Curves, arguments: argparse.Namespace) -> None:
    """One panel per column: share kept of the teacher's distance to chance, with its interval, by arm."""
    columns = list(next(iter(next(iter(drawn.values())).values())).kept)
    places = sorted({place for points in drawn.values() for place in points if place})
    tokens = arguments.against == "tokens"
    figure, axes = panels([1.9] * len(columns))
    with figure_style():
        for ax, column in zip(axes, columns, strict=True):
            for index, (arm, points) in enumerate(drawn.items()):
                aside = index - (len(drawn) - 1) / 2  # intervals of arms at one place stand beside one another
                own = {place: point.kept[column] for place, point in points.items() if place}
                colour, (stroke, marker) = SERIES_COLOURS[index % 5], SERIES_STYLE[index % 5]
                line = {"color": colour, "ls": stroke, "marker": marker, "ms": 5, "lw": 1.6, "elinewidth": 1.2}
                ax.errorbar(
                    [place * 1.03**aside if tokens else place + 0.06 * aside for place in own],
                    [kept.value for kept in own.values()],
                    yerr=np.array([(kept.value - kept.ci_low, kept.ci_high - kept.value) for kept in own.values()]).T,
                    label=arm,
                    **line,
                )
            if tokens:
                ax.set_xscale("log")
                cut = min(points[0].kept[column].value for points in drawn.values())  # compensated cuts start higher
                ax.axhline(cut, color=INK, lw=1, ls=(0, (3, 2)), label="cut, not healed")
            ax.axhline(1, color=INK, lw=1, label="teacher")
            ax.set_xticks(places, [f"{place / 1000:.0f}k" if tokens else str(place) for place in places])
            ax.minorticks_off()
            ax.set_title(column)
            ax.set_ylabel("share kept")
            ax.grid(axis="y")
        axes[-1].set_xlabel("tokens trained on" if tokens else "layers dropped")
        lines = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=3, columnspacing=1.2)
    save_figure(figure, arguments.figure)


if __name__ == "__main__":
    main()

"""Whether prune.target.ms_per_token predicts the time per written token of a cut model.

    python benchmarks/decode_time.py [--model demo:smollm2-135m] [--batch 1 4] [--cut 3 6 9 12] [--repeats 9]

The teacher, half of its layers and every cut take turns in one process, all in the teacher's storage. Predicted once by
the two depths that `shoal eval` measures, once by the teacher's time alone, which takes it all to be reading. Printed
as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.speed import Speed
from shoal.compress.goals import TeacherTime, goals_of
from shoal.compress.layer_sizes import LayerSizes, layer_sizes
from shoal.compress.surgery.cut_model import cut_model
from shoal.eval.speed import measure_speed
from shoal.models.load import load_model, resolve_model
from shoal.recipe.prune import PlanTarget, TimeTarget


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--cut", type=int, nargs="+", default=[3, 6, 9, 12], help="layers that go, evenly spread")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    folder = resolve_model(arguments.model)
    sizes, model = layer_sizes(folder), load_model(folder)
    cuts = {count: even(count, sizes.num_layers) for count in (*arguments.cut, sizes.num_layers // 2)}
    students = {str(count): cut_model(model, drop, share=True) for count, drop in cuts.items()}
    speed = measure_speed(
        {"teacher": model, **students},
        provenance=Provenance({}),
        batch_sizes=arguments.batch,
        repeats=arguments.repeats,
    )
    print("| batch | layers out | measured, ms | by two depths | by the teacher alone |\n|" + " --- |" * 5)
    for batch in arguments.batch:
        for row in rows(speed, sizes, cuts, batch):
            print(row)


def even(count: int, num_layers: int) -> tuple[int, ...]:
    """``count`` layers, evenly spread."""
    return tuple((2 * index + 1) * num_layers // (2 * count) for index in range(count))


def rows(speed: Speed, sizes: LayerSizes, cuts: dict[int, tuple[int, ...]], batch: int) -> Iterator[str]:
    times = {
        role: next(timing.step_ms for timing in score.batches if timing.batch_size == batch)
        for role, score in speed.roles.items()
    }
    num_tokens, half = speed.prompt_tokens + speed.new_tokens // 2, sizes.num_layers // 2
    target = PlanTarget(ms_per_token=TimeTarget(batch=batch, length=num_tokens, limit=times["teacher"] * 0.999))
    alone = TeacherTime(times["teacher"], batch, num_tokens, "this run")
    both = TeacherTime(times["teacher"], batch, num_tokens, "this run", (sizes.num_layers - half, times[str(half)]))
    lines = [goals_of(target, sizes, teacher_time=known).goals[0] for known in (both, alone)]
    yield f"| {batch} | 0 | {times['teacher']:.2f} | | |"
    for count, drop in cuts.items():
        measured = times[str(count)]
        cells = [
            f"{line.value(line.amount(drop)):.2f} ({line.value(line.amount(drop)) / measured - 1:+.1%})"
            for line in lines
        ]
        yield f"| {batch} | {count} | {measured:.2f} | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":
    main()

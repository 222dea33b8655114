"""What `make gpu` found, as tables for a reader, and beside the figures to reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PEAK_TFLOPS = (
    ("B200", 2250),
    ("B100", 1750),
    ("GH200", 989),
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H800", 989),
    ("A100", 312),
    ("A800", 312),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("A10", 125),
    ("A6000", 155),
    ("A40", 150),
    ("6000 Ada", 364),
    ("RTX 5090", 210),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)
"""Dense bf16 products with fp32 sums at boost clock, in 1e12 operations per second, from NVIDIA's data sheets, by what
torch's name of the card holds; the first that does counts."""
GOAL_SHARE, GOAL_SPEED, GOAL_MEMORY, GOAL_ESTIMATE, GOAL_SWEEP = 0.40, 1.2, 0.7, 0.15, 3.0
GOAL_LOSS = {"losses, float32": 1e-4, "losses, bf16 autocast": 2e-2}
"""Largest relative difference of a step's loss to that on the CPU in float32."""
GROUPS = {
    "speed": "Steps of training, beside TRL",
    "attention": "Attention, by `attention`",
    "kernels": "Weights, fused kernels, compiled layers",
    "memory": "Peak memory beside the estimate of `--dry-run`",
    "losses": "Losses beside those of the CPU in float32",
    "sweep": "Greedy text without each layer",
    "tests": "Tests",
}
REASONS = {
    "not_here": "not here",
    "out_of_memory": "out of memory",
    "not_measured": "not measured",
    "left_out": "left out",
    "failed": "FAILED",
}
"""Keys under which a case without figures says why, and what they are called."""

LONGEST = 160
"""Characters of a reason that tables show; gpu.json has all of it."""

Row = Mapping[str, Any]


def markdown(result: Row) -> str:
    """All of ``result`` as sections of a page."""
    rows: Sequence[Row] = result["results"]
    parts = [_about(result)]
    measured = [row for row in rows if reason(row) is None]
    peak, _ = peak_flops(result)
    for group, title in GROUPS.items():
        if any(row["group"] == group for row in rows):
            group_rows = [row for row in measured if row["group"] == group]
            parts.append(
                f"**{title}**"
                + (f"\n\n{_table(group, group_rows, rows, peak)}" if group_rows else ": none was measured.")
            )
    missing = [f"- {row['size']} {row['name']}: {reason(row)}" for row in rows if reason(row) is not None]
    if missing:
        parts.append("**Without figures**\n\n" + "\n".join(missing))
    if result.get("goals"):
        cells = [[goal["what"], goal["goal"], goal["found"], goal["met"]] for goal in result["goals"]]
        parts.append("**Figures to reach**\n\n" + _cells(["what", "goal", "found", ""], cells))
    return "\n\n".join(parts)


def outcome(row: Row) -> str:
    """What a case has come to, in a line."""
    if (why := reason(row)) is not None:
        return why
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak'] / 1e9:.2f} GB"
    if "times_faster" in row:
        return f"{row['times_faster']:.2f} times as fast as the loop"
    return str(row.get("summary") or row.get("card"))


def reason(row: Row) -> str | None:
    """Why a case has no figures; None where it has."""
    return next((f"{called}: {_short(row[key])}" for key, called in REASONS.items() if key in row), None)


def _short(reason: str) -> str:
    line = reason.partition("\n")[0]
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def peak_flops(result: Row) -> tuple[float | None, str]:
    """Operations per second that shares are told of, and where that is from; None before the card is known."""
    card = next((row for row in result["results"] if row["kind"] == "card" and reason(row) is None), None)
    if card is None:
        return None, "the card is not known"
    for name, tera in PEAK_TFLOPS:
        if name in card["card"]:
            return tera * 1e12, f"{tera} TFLOP/s of the data sheet of {name}, dense bf16"
    measured = card["product_flops_per_s"]
    return measured, f"{measured / 1e12:.3g} TFLOP/s of a matrix product measured here, as the card is in no table"


def _about(result: Row) -> str:
    card = next((row for row in result["results"] if row["kind"] == "card" and reason(row) is None), {})
    versions = ", ".join(
        f"{name} {card[name]}"
        for name in (
            "torch",
            "transformers",
            "deepspeed",
            "trl",
            "triton",
            "flash_attn",
            "liger_kernel",
            "bitsandbytes",
        )
        if card.get(name)
    )
    memory, measured = card.get("memory", 0) / 1e9, card.get("product_flops_per_s", 0) / 1e12
    lines = [
        f"{card.get('card', 'unknown device')}, {memory:.0f} GB, driver {card.get('driver')}, CUDA {card.get('cuda')}; "
        f"{versions}; commit {result['commit']}; {result.get('seconds', 0):.0f} s in all.",
        f"Shares are of {peak_flops(result)[1]}; a matrix product reaches {measured:.3g} here.",
    ]
    if result["tiny"]:
        lines.insert(0, "TINY MODELS: the command was tried, and no figure says anything.")
    return "\n".join(lines)


def _table(group: str, group_rows: Sequence[Row], rows: Sequence[Row], peak: float | None) -> str:
    if group == "sweep":
        cells = [
            [
                r["size"],
                *(f"{r[name]:.2f}" for name in ("loop_seconds", "seconds", "times_faster")),
                r["equal_texts"],
            ]
            for r in group_rows
        ]
        columns = ["loop over cut models, s", "together, s", "times as fast"]
        return _cells(["size", *columns, "equal texts"], cells)
    if group == "tests":
        return "\n".join(f"{row['summary']} (exit code {row['exit_code']})" for row in group_rows)
    if group == "losses":
        cells = [
            [r["name"], _number(loss_difference(r, rows), ".1e"), ", ".join(f"{x:.5f}" for x in r["losses"])]
            for r in group_rows
        ]
        return _cells(["", "largest relative difference", "losses"], cells)
    cells = []
    for row in group_rows:
        share, again = shares(row, rows, peak)
        off = None if "estimate" not in row else row["estimate"] / row["peak"] - 1
        cells.append(
            [
                f"{row['size']} {row['name']}",
                f"{row['tokens_per_s']:,.0f}",
                _number(share, ".1%"),
                _number(again, ".1%"),
                f"{row['peak'] / 1e9:.2f}",
                _number(row.get("estimate", 0) / 1e9 or None, ".2f"),
                _number(off, "+.0%"),
                str(row.get("attention", "")),
                f"{row['losses'][0]:.4f}",
            ]
        )
    head = [
        "",
        "tokens/s",
        "share of peak",
        "with what is computed again",
        "peak, GB",
        "estimate, GB",
        "off by",
        "attention",
        "first loss",
    ]
    return _cells(head, cells)


def shares(row: Row, rows: Sequence[Row], peak: float | None) -> tuple[float | None, float | None]:
    """Operations per second over the card's: those that the loss needs, and with what checkpointing computes again.
    TRL's steps have the operations of shoal's on the same rows."""
    counted = (
        row
        if "flops_per_token" in row
        else next(
            (
                r
                for r in rows
                if r["size"] == row["size"] and r["name"] == "one document a row" and "flops_per_token" in r
            ),
            None,
        )
    )
    if counted is None or peak is None:
        return None, None
    of_one, again = (row["tokens_per_s"] * counted[key] / peak for key in ("flops_per_token", "flops_per_token_again"))
    return of_one, again


def loss_difference(row: Row, rows: Iterable[Row]) -> float | None:
    """Largest relative difference of a step's loss to that of the CPU; None without that one."""
    reference = next((r for r in rows if r["name"] == "losses, CPU, float32" and "losses" in r), None)
    if reference is None or "losses" not in row:
        return None
    return max(abs(own / other - 1) for own, other in zip(row["losses"], reference["losses"], strict=True))


def goals(result: Row) -> list[dict[str, str]]:
    """The figures to reach and what was found of each; those that nothing was found of are not met and not missed."""
    rows: Sequence[Row] = [row for row in result["results"] if reason(row) is None]
    peak, _ = peak_flops(result)
    large = [again for row in rows if row["size"] == "8B" and (again := shares(row, rows, peak)[1]) is not None]
    judged: list[tuple[str, str, str | None, bool]] = []
    best = max(large, default=None)
    judged.append(
        (
            "8B cut by 8 layers, checkpointing: share of peak",
            f">= {GOAL_SHARE:.0%}",
            _text(best, ".1%"),
            (best or 0) >= GOAL_SHARE,
        )
    )
    own = next((row for row in rows if row["kind"] == "shoal" and row["name"] == "one document a row"), None)
    others = [row for row in rows if row["kind"] in ("gkd", "distillation")]
    speed = memory = None
    if own is not None and others:
        fastest = max(others, key=lambda row: row["tokens_per_s"])
        speed, memory = own["tokens_per_s"] / fastest["tokens_per_s"], own["peak"] / fastest["peak"]
    judged.append(
        ("tokens/s, beside the fastest of TRL", f">= {GOAL_SPEED}", _text(speed, ".2f"), (speed or 0) >= GOAL_SPEED)
    )
    judged.append(
        ("peak memory, beside the same", f"<= {GOAL_MEMORY}", _text(memory, ".2f"), (memory or 9) <= GOAL_MEMORY)
    )
    offs = [abs(row["estimate"] / row["peak"] - 1) for row in rows if "estimate" in row]
    worst = max(offs, default=None)
    judged.append(
        (
            "estimates of memory, the worst",
            f"within {GOAL_ESTIMATE:.0%}",
            _text(worst, ".0%"),
            (9 if worst is None else worst) <= GOAL_ESTIMATE,
        )
    )
    sweep = next((row["times_faster"] for row in rows if "times_faster" in row), None)
    judged.append(
        (
            "generation sweep, beside the loop over cut models",
            f">= {GOAL_SWEEP:.0f} x",
            _text(sweep, ".2f"),
            (sweep or 0) >= GOAL_SWEEP,
        )
    )
    for name, most in GOAL_LOSS.items():
        off = next((loss_difference(row, rows) for row in rows if row["name"] == name), None)
        judged.append(
            (
                f"{name}, beside the CPU in float32",
                f"<= {most:g}",
                _text(off, ".1e"),
                (9 if off is None else off) <= most,
            )
        )
    tests = next((row for row in rows if row["kind"] == "tests"), None)
    text = None if tests is None else f"exit code {tests['exit_code']}"
    judged.append(("tests marked gpu", "exit code 0", text, text == "exit code 0"))
    return [
        {
            "what": figure,
            "goal": goal,
            "found": text or "not measured",
            "met": "" if text is None else "met" if met else "MISSED",
        }
        for figure, goal, text, met in judged
    ]


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cells(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

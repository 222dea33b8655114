"""What `make gpu` found, as tables for a reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bf16 products with fp32 sums at boost clock, in 1e12 operations per second, from NVIDIA's data sheets, by what
torch's name of the card holds; the first that does counts."""
GROUPS = {
    "speed": "Steps of training, beside TRL",
    "attention": "Attention, by `attention`",
    "kernels": "Weights, fused kernels, compiled layers",
    "memory": "Peak memory beside the estimate of `--dry-run`",
    "losses": "Losses beside those of the CPU in float32",
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
    return "\n\n".join(parts)


def outcome(row: Row) -> str:
    """What a case has come to, in a line."""
    if (why := reason(row)) is not None:
        return why
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak'] / 1e9:.2f} GB"
    return str(row.get("card"))


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
    for name, tera in PEAK_TFLOPS.items():
        if name in card["card"]:
            return tera * 1e12, f"{tera} TFLOP/s of the data sheet of {name}, dense bf16"
    measured = card["product_flops_per_s"]
    return measured, f"{measured / 1e12:.3g} TFLOP/s of a matrix product measured here, as the card is in no table"


def _about(result: Row) -> str:
    card = next((row for row in result["results"] if row["kind"] == "card" and reason(row) is None), {})
    packages = ("torch", "transformers", "deepspeed", "trl", "triton", "flash_attn", "liger_kernel", "bitsandbytes")
    versions = ", ".join(f"{name} {card[name]}" for name in packages if card.get(name))
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
    head = ["", "tokens/s", "share of peak", "with what is computed again", "peak, GB", "estimate, GB", "off by"]
    head += ["attention", "first loss"]
    return _cells(head, cells)


def shares(row: Row, rows: Sequence[Row], peak: float | None) -> tuple[float | None, float | None]:
    """Operations per second over the card's: those that the loss needs, and with what checkpointing computes again.
    TRL's steps have the operations of shoal's on the same rows."""
    same = (r for r in rows if r["size"] == row["size"] and r["name"] == "one document a row")
    counted = next((r for r in (row, *same) if "flops_per_token" in r), None)
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


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cells(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

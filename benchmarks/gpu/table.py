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
    "RTX 4090": 165,
}
"""Dense bf16 products with fp32 sums at boost clock, in 1e12 operations per second, from NVIDIA's data sheets, by what
torch's name of the card holds; the first that does counts."""
GROUPS = {
    "speed": "Steps of training, beside TRL",
    "attention": "Attention, by `attention`",
    "kernels": "Weights, fused kernels, compiled layers",
    "memory": "Peak memory beside the estimate of `--dry-run`",
    "losses": "Losses beside those of the CPU in float32",
    "cpu": "Steps of training on a CPU, beside TRL",
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
COLUMNS = ("", "tokens/s", "share of peak", "with what is computed again", "peak, GB", "estimate, GB", "off by")
COLUMNS += ("attention", "first loss", "losses off by")

Row = Mapping[str, Any]


def markdown(result: Row) -> str:
    """All of ``result`` as sections of a page."""
    rows: Sequence[Row] = result["results"]
    peak, _ = peak_flops(result)
    parts = [_about(result)]
    for group, title in GROUPS.items():
        if own := [row for row in rows if row["group"] == group]:
            cells = [_cells(row, rows, peak) for row in own if reason(row) is None]
            parts.append(f"**{title}**" + (f"\n\n{_table(cells)}" if cells else ": none was measured."))
    if missing := [f"- {row['size']} {row['name']}: {reason(row)}" for row in rows if reason(row) is not None]:
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
    told = next(((called, row[key].partition("\n")[0]) for key, called in REASONS.items() if key in row), None)
    return told and f"{told[0]}: {told[1][:LONGEST]}"


def peak_flops(result: Row) -> tuple[float | None, str]:
    """Operations per second that shares are told of, and where that is from; None before the card is known."""
    card = _card(result)
    if not card:
        return None, "the card is not known"
    for name, tera in PEAK_TFLOPS.items():
        if name in card["card"]:
            return tera * 1e12, f"{tera} TFLOP/s of the data sheet of {name}, dense bf16"
    measured = card["product_flops_per_s"]
    return measured, f"{measured / 1e12:.3g} TFLOP/s of a matrix product measured here, as the card is in no table"


def _card(result: Row) -> Row:
    return next((row for row in result["results"] if row["kind"] == "card" and reason(row) is None), {})


def _about(result: Row) -> str:
    card = _card(result)
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


def _cells(row: Row, rows: Sequence[Row], peak: float | None) -> list[str]:
    """A line of a table, by COLUMNS."""
    share, again = shares(row, rows, peak)
    return [
        f"{row['size']} {row['name']}",
        f"{row['tokens_per_s']:,.0f}",
        _number(share, ".1%"),
        _number(again, ".1%"),
        f"{row['peak'] / 1e9:.2f}",
        _number(row.get("estimate", 0) / 1e9 or None, ".2f"),
        _number(row["estimate"] / row["peak"] - 1 if "estimate" in row else None, "+.0%"),
        str(row["attention"]),
        f"{row['losses'][0]:.5f}",
        _number(loss_difference(row, rows) if row["group"] == "losses" else None, ".1e"),
    ]


def shares(row: Row, rows: Sequence[Row], peak: float | None) -> tuple[float | None, float | None]:
    """Operations per second over the card's: those that the loss needs, and with what checkpointing computes again.
    TRL's steps have the operations of shoal's on the same rows."""
    same = (r for r in rows if r["size"] == row["size"] and r["name"].endswith("one document a row"))
    counted = next((r for r in (row, *same) if "flops_per_token" in r), None)
    if counted is None or peak is None:
        return None, None
    of_one, again = (row["tokens_per_s"] * counted[key] / peak for key in ("flops_per_token", "flops_per_token_again"))
    return of_one, again


def loss_difference(row: Row, rows: Iterable[Row]) -> float | None:
    """Largest relative difference of a step's loss to that of the CPU; None without that one."""
    reference = next((r for r in rows if r["name"] == "losses, CPU, float32" and "losses" in r), None)
    if reference is None:
        return None
    return max(abs(own / other - 1) for own, other in zip(row["losses"], reference["losses"], strict=True))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *cells))

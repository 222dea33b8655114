"""`python docs/figures/draw.py`: the figure of README, from the table of a quickstart with a control in lab/results."""

import csv
from pathlib import Path

from shoal.artifacts.evaluation import ROLES
from shoal.figures.style import INK, ROLE_STYLE, figure_style, legend_above, panels, save_figure
from shoal.stats.intervals import wilson

FILE = Path(__file__).with_name("five-tasks.svg")
TABLE = Path(__file__).parents[2] / "lab/results/quickstart_01_scores.csv"
ROWS = {
    "retrieval_generation": "look-ups,\ntrained wording",
    "retrieval_reworded_generation": "look-ups,\nreworded",
    "knowledge_reworded_generation": "facts,\nreworded",
    "brackets_depth3_continuation": "brackets,\nnever trained",
    "lambada_openai": "LAMBADA,\npublic",
}
"""Task -> its words."""
DARK = f"""@media (prefers-color-scheme: dark) {{
  [style*="{INK}"] {{fill: #e6edf3 !important}} [style*="#ffffff"] {{fill: #161b22 !important}}
}}</style>"""

if __name__ == "__main__":
    table = {row["task"]: row for row in csv.DictReader(TABLE.open(encoding="utf-8"))}
    figure, (ax,) = panels([3.4], width=7.2)
    with figure_style():
        for role in ("teacher", "pruned", "distilled", "control"):
            color, marker = ROLE_STYLE[role]
            for row, task in enumerate(ROWS):
                score, n = float(table[task][role]), int(table[task]["n"])
                ends = [[100 * abs(end - score)] for end in wilson(score * n, n)]
                height, label = row + 0.18 * (ROLES.index(role) - 1.5), "" if row else role
                ax.errorbar(100 * score, height, xerr=ends, fmt=marker, color=color, label=label)
        ax.set_yticks(range(len(ROWS)), labels=[*ROWS.values()])
        ax.invert_yaxis()
        ax.set(xlim=(-2, 102), xlabel="right answers, %, with 95 % intervals")
        ax.grid(axis="x")
        legend_above(figure, [ax])
    FILE.write_text(save_figure(figure, FILE).decode().replace("</style>", DARK, 1), encoding="utf-8")

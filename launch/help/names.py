"""`shoal list`: what a recipe can name. Nothing heavy is loaded but for metrics, whose classes say what they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from shoal.data.bundled import ABOUT
from shoal.recipe.losses import LOGIT_TERMS, HiddenStates
from shoal.recipe.suites import CONFIGS_DIR, SuiteName, read_suite
from shoal.yaml_text import read_yaml

from .explain import table
from .settings import as_paragraph, settings_of

Entry = dict[str, Any]
"""`name` and `about`, and what else a script may want to know."""


def recipes() -> list[Entry]:
    """The shipped recipes, which `--config NAME` finds from any folder."""
    rows = []
    for file in sorted(CONFIGS_DIR.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        about = text.partition("\n")[0].lstrip("# ").rstrip(":.")
        rows.append({"name": file.stem, "about": about, "model": read_yaml(text)["model"], "file": str(file)})
    return rows


def tasks() -> list[Entry]:
    """Shoal's own tasks. Every task that lm-eval ships can be named too."""
    from shoal.eval.tasks.names import HUB_TASKS_DIR, described_tasks, task_folders, tasks_in_files

    described, tags = described_tasks(task_folders(None))
    rows = [
        {
            "name": name,
            "about": part.data.about,
            "data_set": part.data.dataset,
            "part": part.name,
            "protocol": protocol,
            "ability": part.data.ability,
            "column": part.column,
            "bundled": part.data.bundled is not None,
            "groups": [tag for tag, members in tags.items() if name in members],
        }
        for name, (part, protocol) in described.items()
    ]
    return [*rows, *({"name": name, "about": "a task file of its own"} for name in tasks_in_files(HUB_TASKS_DIR))]


def metrics() -> list[Entry]:
    """What measure.metrics can name and, measured, prune.metric."""
    from shoal.compress.metrics.registry import METRICS

    return [
        {"name": name, "about": _first_paragraph(metric), "needs": metric.needs, "yields": metric.yields}
        for name, metric in METRICS.items()
    ]


def losses() -> list[Entry]:
    """The kinds of distill.losses, with their keys and defaults."""
    return [
        {
            "name": term().kind,
            "about": _first_paragraph(term),
            "keys": {setting.key: setting.default for setting in settings_of(term) if setting.key != "kind"},
        }
        for term in (*LOGIT_TERMS, HiddenStates)
    ]


def data() -> list[Entry]:
    """Bundled sources of text."""
    return [{"name": name, "about": about} for name, about in ABOUT.items()]


def suites() -> list[Entry]:
    """What eval.suite can name."""
    rows = []
    for name in get_args(SuiteName):
        suite = read_suite(name)
        rows.append({"name": name, **asdict(suite)})
    return rows


def cluster() -> list[Entry]:
    """Example files that start ranks on several nodes."""
    rows = []
    for file in sorted((CONFIGS_DIR / "cluster").iterdir()):
        about = next(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
        rows.append({"name": file.name, "about": about.removeprefix("# ").rstrip(":."), "file": str(file)})
    return rows


LISTS: dict[str, Callable[[], list[Entry]]] = {
    function.__name__: function for function in (recipes, tasks, metrics, losses, data, suites, cluster)
}
"""Word after `shoal list` -> what gives the list."""


def listing(kind: str) -> str:
    """One of LISTS for a reader; tasks by data set, since there are hundreds."""
    entries = LISTS[kind]()
    if kind == "tasks":
        return "\n".join([*table(_by_data_set(entries)), "", "every task that lm-eval ships can be named too"])
    return "\n".join(table((entry["name"], _with_details(kind, entry)) for entry in entries))


def _with_details(kind: str, entry: Entry) -> str:
    match kind:
        case "recipes":
            return f"{entry['about']} [{entry['model']}]"
        case "metrics":
            yields = {"layers": "a score per layer", "runs": "a score per run", "order": "an order of removals"}
            return f"{entry['about']} [{yields[entry['yields']]}; needs {entry['needs']}]"
        case "losses":
            return f"{entry['about']} [{', '.join(entry['keys'])}]"
        case "suites":
            cost: Mapping[str, int] = entry["cost"]
            size = f"{cost['items']:,} items, {cost['tokens']:,} tokens a model"
            return f"{entry['about']}. Needs {entry['needs']} [{size}]"
        case "cluster":
            return f"{entry['about']} [{entry['file']}]"
        case _:
            return entry["about"]


def _by_data_set(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Rows of data sets, or of single tasks where there is none: what is asked, and the names of its tasks."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.get("data_set", entry["name"]), []).append(entry)
    told = []
    for name, own in rows.items():
        about = own[0]["about"]
        if "part" in own[0]:
            parts = _braced([entry["part"] for entry in own], name)
            about += f": {parts}_{_braced([entry['protocol'] for entry in own])}"
            about += f" [{own[0]['column'] or 'no column'}{'' if own[0]['bundled'] else '; eval.data_dir or Hub'}]"
        told.append((name, about))
    return told


def _braced(names: Sequence[str], prefix: str = "") -> str:
    """`retrieval_{20,50}pairs` as a shell writes it: the names once each, what they begin with alike outside."""
    unique = list(dict.fromkeys(names))
    before = f"{prefix}_" if prefix and all(name.startswith(f"{prefix}_") for name in unique) else ""
    inside = ",".join(name.removeprefix(before) for name in unique)
    return f"{before}{{{inside}}}" if len(unique) > 1 else f"{before}{inside}"


def _first_paragraph(of: type) -> str:
    return as_paragraph((inspect.getdoc(of) or "").partition("\n\n")[0])

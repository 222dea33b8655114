"""Every metric by its name, and which pass measures those of one need."""

from __future__ import annotations

from .hidden_pass import HIDDEN_METRICS, hidden_scores
from .metric import Metric, Need, Pass

METRICS: dict[str, type[Metric]] = {**HIDDEN_METRICS}
"""Name in recipes and in importance.json -> what it needs, what it yields, its formula and source."""

PASSES: dict[Need, Pass] = {"hidden": hidden_scores}
"""What is needed -> the pass that measures all asked metrics which need it."""

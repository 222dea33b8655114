"""Every metric by its name, and which pass measures those of one need."""

from __future__ import annotations

from .greedy import TASK_ORDER, TaskGreedy
from .hidden_metrics import HIDDEN_METRICS
from .hidden_pass import hidden_scores
from .loss_metrics import LOSS_METRICS, loss_scores
from .metric import Metric, Need, Pass
from .weight_metrics import Magnitude, Taylor, gradient_scores, weight_scores

METRICS: dict[str, type[Metric]] = {
    **HIDDEN_METRICS,
    "magnitude": Magnitude,
    "taylor": Taylor,
    **LOSS_METRICS,
    TASK_ORDER: TaskGreedy,
}
"""Name in recipes and in importance.json -> what it needs, what it yields, its formula and source."""

PASSES: dict[Need, Pass] = {
    "hidden": hidden_scores,
    "gradients": gradient_scores,
    "weights": weight_scores,
    "loss": loss_scores,
}
"""What is needed -> the pass that measures all asked metrics which need it; tasks are scored by a sweep."""

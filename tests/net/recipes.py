"""What the net runs: small recipes over verbs, metrics, changes, losses and ways to train, by name.

A case starts from a copy of the run directory of the case ``after``, so that its verbs find what that one has made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHORT = ["retrieval_loglikelihood", "retrieval_continuation", "knowledge_loglikelihood", "knowledge_continuation"]
WRITTEN = ["retrieval_generation", "knowledge_generation"]
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "measure": {"data": "python_docs", "num_tokens": 1024, "sequence_length": 64, "batch_size": 4},
    "prune": {"drop": [2, 3]},
    "distill": {
        "data": "python_docs",
        "num_tokens": 6 * 4 * 64,
        "sequence_length": 64,
        "precision": "float32",
        "deepspeed": "zero0",
        "batch_size": 4,
        "watch": None,
        "trainer": {"learning_rate": 1e-3, "save_strategy": "no"},
    },
    "eval": {"tasks": SHORT, "limit": 12, "speed": False, "perplexity_tokens": 512},
    "track": {"wandb": "off"},
}
"""Every recipe; the settings of a case replace those of the same name, section by section."""
GENERAL_METRICS = [
    *("block_influence", "angular", "update_norm", "magnitude"),
    *("taylor", "single_drop_perplexity", "sleb", "blockpruner"),
]
PAPER_METRICS = ["present_absent", "local_shapley"]
DIVERGENCES = [*("reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"), *("taid", "cross_entropy")]
SAVING = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
CHAT = {"path": "chat.jsonl", "weight": 0.5}
SAMPLES = {"share": 1.0, "start": 0.0, "prompt_tokens": 8, "max_new_tokens": 12}
FORWARD_KL = {"kind": "forward_kl"}
CROSS_ENTROPY = {"kind": "cross_entropy"}
WATCH = {
    "eval_steps": 2,
    "perplexity_tokens": 512,
    "tasks": ["retrieval_continuation"],
    "limit": 8,
    "metric_for_best_model": "perplexity",
}


@dataclass(frozen=True)
class Case:
    """Verbs that are run one after the other with one recipe."""

    verbs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    ranks: int = 1
    model: str = "llama"
    killed: bool = False
    """Whether the first verb is stopped in its fourth step and begun again."""
    sampled: bool = False
    """Whether tokens are drawn, which the last bit of a sum decides: its numbers hold on this processor alone."""


def distilled(
    *, after: str = "cut", ranks: int = 1, killed: bool = False, sampled: bool = False, **distill: Any
) -> Case:
    return Case(("distill",), {"distill": distill}, after, ranks, killed=killed, sampled=sampled)


def cut(*, after: str | None = None, **prune: Any) -> Case:
    return Case(("prune",), {"prune": {"drop": None, **prune} if after else prune}, after)


def changed(*changes: Any, drop: list[int]) -> Case:
    settings = {"measure": {"num_tokens": 8192}, "prune": {"drop": drop, "changes": changes}}
    return Case(("prune",), settings)


CASES: dict[str, Case] = {
    # importance
    "metrics": Case(("measure",), {"measure": {"metrics": GENERAL_METRICS}}),
    "metrics_of_papers": Case(("measure",), {"measure": {"metrics": PAPER_METRICS}}),
    "sweep": Case(
        ("measure",),
        {"measure": {"sweep": {"tasks": [*SHORT, *WRITTEN], "limit": 10, "operators": ["layer", "attention", "mlp"]}}},
    ),
    "sweep_in_turn": Case(
        ("measure",),
        {
            "measure": {"metrics": ["task_greedy"], "sweep": {"tasks": SHORT, "limit": 10}},
            "prune": {"drop": None, "metric": "task_greedy", "num_drop": 2},
        },
    ),
    # plans and changes
    "cut": cut(drop=[2, 3]),
    "cut_by_metric": cut(after="metrics", metric="sleb", num_drop=1),
    "cut_by_ratio": cut(after="metrics", ratio=0.4, protect=[0, 1]),
    "cut_of_run": cut(after="metrics", contiguous=True, num_drop=2),
    "cut_by_mix": cut(after="metrics", metric={"taylor": 1.0, "block_influence": 2.0}, num_drop=2),
    "cut_by_task": cut(after="sweep", metric="retrieval/continuation", num_drop=2),
    "cut_by_order_of_tasks": cut(after="sweep_in_turn", metric="task_greedy", num_drop=2),
    "cut_to_params": cut(after="metrics", target={"params": 50_000}),
    "compensated_by_scale": changed({"kind": "compensate", "method": "scale"}, drop=[2, 3]),
    "compensated_by_map": changed({"kind": "compensate", "method": "linear"}, drop=[2, 3]),
    "compensated": changed("compensate", drop=[2, 4]),
    "narrow": changed({"kind": "width", "intermediate_size": 0.5, "num_key_value_heads": 1}, drop=[]),
    "cut_and_narrow": changed({"kind": "width", "intermediate_size": 0.75}, drop=[2]),
    # losses
    "forward_kl": distilled(losses=[FORWARD_KL | {"temperature": 2.0}]),
    "divergences": distilled(losses=[{"kind": kind} for kind in DIVERGENCES]),
    "states": distilled(
        losses=[
            {"kind": "hidden_states"},
            {"kind": "hidden_states", "map": "own", "distance": "cosine", "layers": [1, 3], "weight": 0.5},
        ]
    ),
    "by_source": distilled(data=[{"path": "python_docs"}, {**CHAT, "losses": "cross_entropy"}], packing="bfd"),
    # what is trained, and how
    "from_first_cut": distilled(trainable="from_first_cut"),
    "layers": distilled(trainable="layers"),
    "near_gaps": distilled(trainable="near_gaps"),
    "norm_and_head": distilled(trainable="norm_and_head"),
    "adapters": distilled(lora={"r": 4, "lora_alpha": 8.0}, trainable="from_first_cut"),
    "accumulated": distilled(
        trainer={
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": True,
        }
    ),
    "watched": distilled(watch=WATCH, trainer=SAVING),
    "offloaded_teacher": distilled(teacher={"kind": "live", "offload": True}),
    "two_bytes": distilled(precision="bf16-true", deepspeed="zero2"),
    "on_policy": distilled(sampled=True, on_policy=SAMPLES),
    "teacher_text": distilled(
        sampled=True,
        data=["python_docs", {"path": "python_docs", "generate": {"prompt_tokens": 8, "max_new_tokens": 24}}],
    ),
    "killed": distilled(trainer=SAVING, killed=True),
    "zero0_two_ranks": distilled(ranks=2),
    "zero2_two_ranks": distilled(ranks=2, deepspeed="zero2", trainable="from_first_cut"),
    "zero3_two_ranks": distilled(ranks=2, deepspeed="zero3"),
    # a recorded teacher
    "recorded": Case(("record", "distill"), {"distill": {"teacher": {"kind": "recorded", "top_k": 8}}}, "cut"),
    "recorded_prefix": Case(
        ("record", "distill"),
        {"distill": {"teacher": {"kind": "recorded", "prefix": True}, "trainable": "from_first_cut"}},
        "cut",
    ),
    # changed models are trained and scored like others
    "compensated_healed": distilled(after="compensated", trainable="near_gaps"),
    "narrow_healed": distilled(after="cut_and_narrow"),
    "gemma3": Case(
        ("measure", "prune", "distill", "eval", "report"),
        {"prune": {"drop": None, "num_drop": 2, "contiguous": True}, "eval": {"tasks": SHORT[:2], "limit": 8}},
        model="gemma3",
    ),
    # scores, control and report
    "scored": Case(
        ("distill", "eval", "report"),
        {
            "distill": {
                "data": [{"path": "python_docs"}, {"path": "ability_texts"}],
                "losses": [FORWARD_KL, CROSS_ENTROPY],
            },
            "eval": {"tasks": [*SHORT, *WRITTEN, "knowledge_reworded_continuation"], "control": True},
        },
        "cut",
    ),
}

"""What the section `distill` must not say: settings that contradict each other or would be ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shoal.recipe import losses as terms
from shoal.recipe.distill import Distill, Writing
from shoal.recipe.section import TEACHER_TEXT

_REASONS: dict[str, str] = {
    "output_dir run_name": "is set by shoal; use run_dir instead",
    "deepspeed": "is set by shoal; use distill.deepspeed instead",
    "seed": "is set by shoal; use seed instead",
    "resume_from_checkpoint": "is set by shoal; use the same command again instead",
    "report_to": "is set by shoal; use track.wandb instead",
    "use_cpu remove_unused_columns label_names": "is set by shoal; leave it out",
    "bf16 fp16": "is set by distill.precision or the DeepSpeed configuration; use those",
    "average_tokens_across_devices": "the loss is always averaged over the tokens of all ranks; leave it out",
    "neftune_noise_alpha label_smoothing_factor": "would have no effect on the loss here; leave it out",
    "ignore_data_skip": "would train the same text again after a resume; leave it out",
    "auto_find_batch_size": "would change the batch, and with it the curve, in the middle of a run; leave it out",
    "save_only_model": "would make checkpoints that cannot be resumed; leave it out",
    "load_best_model_at_end": "is done by distill.watch.metric_for_best_model; use that",
    "eval_strategy do_eval eval_on_start": "is done by distill.watch; use that",
    "train_sampling_strategy data_seed": "would have no effect, packing has drawn the order; use seed",
    "push_to_hub": "is done by export.hub_repo; use that",
    "hub_token": "secrets do not belong in a recipe; run `hf auth login`",
    "use_liger_kernel": "would replace the forward that holds the distillation loss; use distill.fused",
    "torch_compile torch_compile_backend torch_compile_mode": "would compile more than the layers; use distill.compile",
}
REFUSED_ARGUMENTS = {name: reason for names, reason in _REASONS.items() for name in names.split()}
"""Training arguments that would be wrong, ignored or leaked here."""
REFUSED_VALUES: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("lr_scheduler_type", ("reduce_lr_on_plateau", "greedy"), "needs an eval set; choose another, such as cosine"),
    (
        "save_strategy",
        ("best",),
        "needs an eval set; choose steps, and distill.watch.metric_for_best_model keeps the best state",
    ),
    (
        "accelerator_config.split_batches",
        (True,),
        "would share one rank's rows out to all; set distill.batch_size, which counts the rows of all ranks",
    ),
    *(
        (f"{name}_checkpointing_kwargs.{key}", (True,), reason)
        for name in ("gradient", "activation")
        for key, reason in (
            ("use_reentrant", "loses gradients above frozen layers; set it to false"),
            ("selective", "is gone, layers are computed again whole; leave it out"),
        )
    ),
)
"""Values of training arguments, or of a key of one, that a training here cannot have."""


def contradictions(distill: Distill) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    yield from terms.contradictions(distill.losses)
    for number, source in enumerate(distill.data):
        yield from [] if source.losses is None else terms.contradictions(source.losses, f"distill.data.{number}.losses")
    yield from _of_images(distill)
    watch = distill.watch
    yield from _of_written_text(distill)
    if watch is not None and watch.metric_for_best_model not in (None, *watch.scores):
        names = ", ".join(watch.scores) or "nothing"
        yield (
            f"distill.watch.metric_for_best_model: {watch.metric_for_best_model!r} is not scored, but {names}; choose "
            "one of these"
        )
    yield from _of_arguments(distill.trainer)


def _of_arguments(trainer: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"distill.trainer.{name}: {reason}" for name, reason in REFUSED_ARGUMENTS.items() if name in trainer)
    for place, values, reason in REFUSED_VALUES:
        name, _, inner = place.partition(".")
        value = trainer.get(name)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value in values:
            yield f"distill.trainer.{place}: {value} {reason}"


def _of_images(distill: Distill) -> Iterator[str]:
    if not distill.has_images:
        return
    images = "and a source of distill.data has images; leave one of them out"
    if distill.on_policy is not None and distill.on_policy.share > 0:
        yield f"distill.on_policy: the student writes from text alone, {images}"


def _of_written_text(distill: Distill) -> Iterator[str]:
    on_policy, writing = distill.on_policy, distill.writing
    if on_policy is not None and on_policy.share > 0:
        if on_policy.prompt_tokens + on_policy.new_tokens > distill.sequence_length:
            yield (
                f"distill.on_policy: prompt_tokens {on_policy.prompt_tokens} + new_tokens {on_policy.new_tokens} do "
                f"not fit into a row; lower them, or raise distill.sequence_length (now {distill.sequence_length})"
            )
        if not any(map(terms.reads_distributions, distill.losses)):
            yield (
                "distill.on_policy: without a teacher's judgement a student only repeats itself; "
                "add a loss term that has one"
            )
    wants_text = any(source.path == TEACHER_TEXT for source in distill.data)
    if writing != Writing() and not wants_text:
        yield (
            f"distill.writing: has no effect, distill.data does not name {TEACHER_TEXT}; add it, or leave this out "
            "(on the command line: distill.writing={})"
        )

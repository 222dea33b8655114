"""What a training may be told, against what transformers takes."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from shoal.errors import UserError
from shoal.installed import names, source
from shoal.recipe.distill import Distill
from shoal.recipe.trainer_arguments import _REFUSED, CHOICES, refuse_training


def test_choices_are_those_of_transformers() -> None:
    kinds = {"lr_scheduler_type": SchedulerType, "save_strategy": SaveStrategy, "optim": OptimizerNames}
    assert kinds.keys() == CHOICES.keys()
    for name, kind in kinds.items():
        assert names("transformers", *CHOICES[name]) == tuple(choice.value for choice in kind)


@pytest.mark.every_case
@pytest.mark.parametrize("optim", [choice.value for choice in OptimizerNames])
def test_an_optimizer_without_its_package_is_refused_as_by_transformers(optim: str) -> None:
    defaults = {name: own.default for name, own in inspect.signature(TrainingArguments.__init__).parameters.items()}
    arguments: Any = SimpleNamespace(**{**defaults, "optim": optim})
    lacks = False
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        lacks = isinstance(error, ImportError) or "install" in str(error) or "failed to import" in str(error)
    if lacks:
        with pytest.raises(UserError, match=f"optim: {optim} needs a package that is not installed"):
            refuse_training(Distill(trainer={"optim": optim}), ranks=1)
    else:
        refuse_training(Distill(trainer={"optim": optim}), ranks=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": {"lr_scheduler_type": "cosinus"}}, "lr_scheduler_type: must be 'linear', .* or .* .got 'cosinus'"),
        ({"trainer": {"lr_scheduler_kwargs": {"nonsense": 1}}}, "do not fit lr_scheduler_type cosine .*'nonsense'"),
        ({"deepspeed": {"train_batch_size": 7}}, "distill.deepspeed: train_batch_size is 7, but .* 2 ranks make it 8"),
        (
            {"num_tokens": 49_152, "trainer": {"warmup_steps": 12}},
            "warmup_steps: 12 of 12 steps, so the learning rate is never reached; lower it",
        ),
        ({"batch_size": 7}, "batch_size: 7 rows cannot be divided over 2 ranks"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_training(Distill(**settings), ranks=2)


def test_what_transformers_may_take_passes() -> None:
    for settings in ({"train_batch_size": 8}, {"optimizer": {"type": "NAdam"}}):
        refuse_training(Distill(deepspeed=settings), ranks=2)
    refuse_training(Distill(deepspeed={"train_batch_size": 7}), ranks=None)
    refuse_training(Distill(trainer={"lr_scheduler_kwargs": {"num_cycles": 1}}), ranks=2)
    for trainer in (
        {"warmup_steps": 11},
        {"warmup_steps": 0.99},
        {"warmup_steps": 12, "lr_scheduler_type": "constant"},
    ):
        refuse_training(Distill(num_tokens=49_152, trainer=trainer), ranks=2)


def test_what_schedules_need_is_what_they_cannot_be_made_without() -> None:
    needs = {kind: words.split() for kinds, words in _REFUSED["schedule_needs"].items() for kind in kinds.split()}
    for kind in {*names("transformers", *CHOICES["lr_scheduler_type"])} - {"reduce_lr_on_plateau", "greedy"}:
        for given in ({}, *({word: 0.5} for word in needs.get(kind, ()))):
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            arguments = {"num_warmup_steps": 1, "num_training_steps": 10, "scheduler_specific_kwargs": given}
            with pytest.raises((TypeError, ValueError)) if kind in needs and not given else nullcontext():
                get_scheduler(kind, optimizer, **arguments)


def test_a_library_that_is_not_there_names_nothing(tmp_path: Path) -> None:
    assert source("no_such_package_at_all", "x.py") == ""
    assert names("transformers", "trainer_utils.py", "class NoSuchClass(") == ()

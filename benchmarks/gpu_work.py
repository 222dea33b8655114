"""How a case of `make gpu` is measured, in a process of its own: shoal's trainer as `shoal distill` puts it together,
and TRL's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
import re
import shutil
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.initialization import no_init_weights
from transformers.trainer_callback import PrinterCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from benchmarks.gpu_cases import LISTED, Case, Size, recipe_of
from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.compress.surgery.narrow_config import student_config
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.launch.verbs.run import open_run
from shoal.machine import available_memory, device_name, flops_per_second, now, peak_memory
from shoal.models.load import Checkpoint, LoadSettings, load_tokenizer, named_dtype, without_data
from shoal.recipe.recipe import parse_recipe
from shoal.runtime import device as here
from shoal.runtime import environment, leave_distributed, set_up_distributed, turn_down_libraries
from shoal.train.distill import check_distillable, make_trainer, recorded
from shoal.train.engine.arguments import training_arguments
from shoal.train.engine.sharding import join_deepspeed, leave_deepspeed
from shoal.train.engine.stop import StopRequest
from shoal.train.preflight.fit import Free
from shoal.train.preflight.memory import job
from shoal.train.preflight.throughput import flops_per_token
from shoal.train.student.sizes import built
from shoal.train.student.spec import Ranks, TrainSpec, train_spec

DOCUMENT = 512
"""Mean length of a document in rows that hold several, in tokens."""
OPTIONAL = ("triton", "flash_attn", "flash_attn_3", "kernels", "liger_kernel", "bitsandbytes", "vllm")
"""Packages that make something faster or possible."""


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A model of random weights, made on the device. The student's layers are the teacher's of the numbers ``keep``."""

    keep: tuple[int, ...] = ()
    on_host: bool = False
    """Draw the weights on the host, so that all devices have the same."""

    def model(self, *, dtype: str | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model in eval mode, on the accelerator if there is one, whatever ``device`` says."""
        width = named_dtype(dtype or self.load.dtype) or torch.bfloat16
        with no_init_weights(), here():
            model = built(self.config, dtype=width, attention=self.load.attention)
        self._fill(model)
        return model.eval()

    @torch.no_grad()
    def _fill(self, model: PreTrainedModel) -> None:
        """Every weight is drawn in bfloat16 from a seed that is its name in the teacher."""
        import deepspeed

        for name, module in model.named_modules():
            # in full where ZeRO 3 has sharded them
            with deepspeed.zero.GatheredParameters(module.parameters(recurse=False), modifier_rank=0):
                for leaf, weight in module.named_parameters(recurse=False):
                    if weight.ndim == 1:
                        weight.fill_(1)
                        continue
                    in_teacher = re.sub(
                        r"(?<=layers\.)\d+", lambda layer: str(self.keep[int(layer[0])]), f"{name}.{leaf}"
                    )
                    where = torch.device("cpu") if self.on_host else weight.device
                    generator = torch.Generator(where).manual_seed(zlib.crc32(in_teacher.encode()))
                    drawn = torch.randn(weight.shape, generator=generator, device=where, dtype=torch.bfloat16)
                    weight.copy_(drawn.mul_(0.02))


def write_config(config: PreTrainedConfig, folder: Path) -> Path:
    """A folder with configuration and tokenizer, and a file that names the weights and holds none of them."""
    config.save_pretrained(folder)
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    of_bytes = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    of_bytes.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="</s>").save_pretrained(folder)
    names = without_data(config).state_dict()
    save_file({name: torch.empty(0) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Clock(TrainerCallback):
    """Wall and processor seconds at the end of every step. Training stops once the steps but the first have taken
    ``seconds``, and at least three were done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((now(here()), time.process_time()))
        if len(self.ends) >= 3 and self.ends[-1][0] - self.ends[0][0] > self._seconds:
            control.should_training_stop = True

    def figures(self, trainer: Trainer, tokens: int) -> dict[str, Any]:
        """Of the steps but the first, each of so many tokens: medians, and seconds of all. Losses and peak of all."""
        steps, busy = ([b - a for a, b in itertools.pairwise(ends)] for ends in zip(*self.ends, strict=True))
        return {
            "tokens_per_s": tokens / statistics.median(steps),
            "cpu_seconds": statistics.median(busy),
            "steps": [round(seconds, 4) for seconds in steps],
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "peak": peak(),
        }


def spec_of(case: Case, size: Size, folder: Path) -> TrainSpec:
    """The training of ``case``, as the stage of a run tells it from the recipe.

    Raises:
        UserError: settings that are not there, that contradict each other or that lack a package.
    """
    config = size.config
    run = open_run(parse_recipe(recipe_of(case, size, write_config(config, folder / "teacher"))))
    load = LoadSettings(**run.load_args())
    plan = Plan(Provenance({}), config.num_hidden_layers, tuple(size.drop), "the benchmark's")
    student = student_config(config, plan.keep)
    own = {"on_host": size.same_everywhere}
    spec = train_spec(
        RandomCheckpoint(folder / "teacher", config, load, tuple(range(plan.num_layers)), **own),
        RandomCheckpoint(write_config(student, folder / "student"), student, load, tuple(plan.keep), **own),
        plan,
        run.recipe.distill,
        Ranks.here(),
    )
    check_distillable(spec)
    return spec


def rows_of(case: Case, size: Size) -> PackedRows:
    """Random tokens; the same for every case of a size. Documents are of 64 to 960 tokens, or a row each."""
    generator = torch.Generator().manual_seed(0)
    count = case.steps * size.rows * size.accumulation
    ids_NS = torch.randint(257, size.config.vocab_size, (count, size.length), generator=generator, dtype=torch.int32)
    positions_NS = torch.arange(size.length, dtype=torch.int32).repeat(count, 1)
    if not case.whole_rows:
        mean = min(DOCUMENT, size.length // 2)
        for row in positions_NS:
            start = 0
            while start < size.length:
                length = int(torch.randint(mean // 8, 2 * mean - mean // 8, (1,), generator=generator))
                end = min(size.length, start + length)
                row[start:end] = torch.arange(end - start, dtype=torch.int32)
                start = end
    return PackedRows(ids_NS, positions_NS)


def shoal_step(case: Case, size: Size, folder: Path) -> dict[str, Any]:
    """Steps of the training of ``case``."""
    set_up_distributed(timeout_s=600)
    spec, clock, rows = spec_of(case, size, folder), Clock(case.steps_s), rows_of(case, size)
    told = job(spec)
    if problems := Free.here(here()).shortages(told):
        return {"without": f"not measured: does not fit by the estimate: {problems[0]}"}
    inputs = {"model": "random", "distill.data": []}
    teacher = recorded(spec, rows, folder, inputs, verify=False)
    join_deepspeed()
    arguments = training_arguments(spec.settings, spec.deepspeed, output_dir=folder / "checkpoints", seed=0)
    trainer = make_trainer(spec, rows, arguments, {}, teacher, stop=StopRequest(), callbacks=[clock])
    trainer.objective.install()
    trainer.train()
    student: Any = trainer.objective.student
    figures = {
        **clock.figures(trainer, spec.tokens_per_step),
        "estimate": told.memory.peak,
        "attention": student.config._attn_implementation,
        "flops_per_token": flops_per_token(told),
    }
    leave_deepspeed(trainer)
    leave_distributed()
    return figures


class OnRows(DistillationTrainer):
    """TRL's DistillationTrainer with beta 0, forward KL. It learns from what the student writes; here it is handed the
    rows as if the student had written all but their first token, so that no writing is in its time."""

    def _generate(self, prompts: list[list[int]]) -> Any:
        return [row[:1] for row in prompts], [row[1:] for row in prompts], None, None, []


def trl_step(case: Case, size: Size, folder: Path) -> dict[str, Any]:
    """Steps of TRL's trainer on the same rows, models and optimizer, without DeepSpeed."""
    if case.trl.get("liger") and importlib.util.find_spec("liger_kernel") is None:
        return {"without": "not here: liger-kernel is not installed"}
    spec, clock = spec_of(case, size, folder), Clock(case.steps_s)
    settings = {
        **spec.settings.trainer,
        **LISTED["trl"],
        "output_dir": str(folder / "trainer"),
        "max_steps": case.steps,
        "bf16": spec.settings.precision == "bf16-mixed",
        "use_cpu": here().type == "cpu",
    }
    if case.trl.get("liger"):
        settings |= {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    trainer = OnRows(
        spec.student.model(dtype=case.trl.get("weights", "float32")),
        spec.teacher.model().requires_grad_(False),
        DistillationConfig(**settings, beta=0.0, temperature=1.0, shuffle_dataset=False),
        train_dataset=Dataset.from_dict({"prompt": rows_of(case, size).input_ids_NS.tolist()}),
        processing_class=load_tokenizer(folder / "teacher"),
    )
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {**clock.figures(trainer, spec.tokens_per_step), "attention": spec.teacher.load.attention}


def peak() -> int:
    """Bytes at the peak of this process: tensors, and on a GPU what the driver and libraries hold beside them."""
    where = here()
    if where.type != "cuda":
        return peak_memory()
    free, total = torch.cuda.mem_get_info(where)
    return torch.cuda.max_memory_allocated(where) + total - free - torch.cuda.memory_reserved(where)


def card(_case: Case, _size: Size, _folder: Path) -> dict[str, Any]:
    """What is measured on."""
    where = here()
    there = [package for package in OPTIONAL if importlib.util.find_spec(package) is not None]
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    has_driver = shutil.which(driver[0]) is not None
    return {
        **environment(),
        **{package: importlib.metadata.version(package.replace("_", "-")) for package in there},
        "card": device_name(where),
        "cuda": torch.version.cuda,
        "driver": subprocess.run(driver, capture_output=True, text=True).stdout.split("\n")[0] if has_driver else None,
        "system": platform.platform(),
        "memory": torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else available_memory(),
        "product_flops_per_s": flops_per_second(where, torch.bfloat16),
    }


KINDS: dict[str, Callable[[Case, Size, Path], dict[str, Any]]] = {"card": card, "shoal": shoal_step, "trl": trl_step}


def measured(case: Case, size: Size) -> dict[str, Any]:
    """The figures of ``case``; where there are none, why, as `without`."""
    turn_down_libraries()
    with TemporaryDirectory() as folder:
        try:
            return KINDS[case.kind](case, size, Path(folder))
        except UserError as error:
            return {"without": f"not here: {error}"}
        except torch.OutOfMemoryError as error:
            return {"without": f"out of memory: {str(error).partition('. ')[0]}"}

"""What a distillation step costs: shoal beside TRL's GKD trainer and a plain Trainer.

    python benchmarks/distill.py OUT [--repeats 3] [--sequence 1024] [--batch 4] [--checkpointing] [--variants ...]
    python benchmarks/distill.py OUT head       # peak memory of the loss at the head, by vocabulary and by tokens

Every turn is a process of its own, since a process cannot lower its peak, and the variants take turns, so that a busy
machine slows all. What is measured is added to OUT/*.json; a further call adds turns. Ratios are medians over turns.

shoal          `shoal distill` on one rank: Trainer, DeepSpeed (ZeRO 2), optimizer; forward KL, everything trained
prefix         the same with trainable: from_first_cut, so that the layers below are run once for teacher and student
recorded       the same as shoal from recorded signals
trl            trl.experimental.gkd with lmbda 0 and beta 0, which is forward KL on the data as it is
plain          a Trainer whose loss is F.kl_div on the logits of all tokens

All take the same rows, batch, optimizer and --precision (autocast over fp32 weights, and the teacher). TRL's trainer
hands no position_ids on and so knows no borders within a row; therefore every row is one document here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from datasets import Dataset
from side_by_side import (
    BENCHMARK_RECIPE,
    Clock,
    in_a_process,
    print_table,
    rotated,
    run_shoal,
    timed,
    write_recipe,
)
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainingArguments, trainer
from transformers.trainer_callback import PrinterCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from shoal.artifacts.training import Training
from shoal.atomic_files import write_json
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.packing import PackedRows
from shoal.data.sources import load_texts, pack
from shoal.launch.cli import run_verb
from shoal.machine import peak_memory
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.numerics import fast_dtype
from shoal.recipe.distill import Distill
from shoal.recipe.losses import ForwardKL
from shoal.recipe.section import DataSource
from shoal.runtime import device

DROP = (12, 13, 14, 18, 21, 22, 25, 26)
VARIANTS = ("shoal", "prefix", "recorded", "trl", "plain")
IN_SHOAL: dict[str, dict[str, Any]] = {"shoal": {}, "prefix": {"trainable": "from_first_cut"}, "recorded": {}}
TRAINER: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "save_strategy": "no",
}
HEAD_SIZE = 64
HEAD_POINTS = [(vocab, 2048) for vocab in (32_768, 65_536, 131_072, 262_144)]
HEAD_POINTS += [(49_152, tokens) for tokens in (1024, 2048, 4096, 8192)]
"""Vocabulary and tokens of the loss at the head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for results and what is made to measure with")
    parser.add_argument("measurement", nargs="?", choices=("steps", "head"), default="steps")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--drop", type=int, nargs="+", default=DROP)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of a turn; the first one is not counted")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in every variant")
    fast = fast_dtype(device()).dtype
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default=fast, help=f"here {fast}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.turn:
        print(json.dumps(take_turn(arguments.turn, arguments)))
    else:
        {"steps": measure_steps, "head": measure_head}[arguments.measurement](arguments)


def measured(turn: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of ``turn``, taken in a process of its own."""
    return in_a_process(*(word for word in sys.argv[1:] if word != arguments.measurement), "--turn", turn)


def take_turn(turn: str, arguments: argparse.Namespace) -> dict[str, Any]:
    kind, *numbers = turn.split(":")
    match kind:
        case "head":
            return head_turn(*map(int, numbers))
        case "trl":
            return trl_turn(arguments)
        case "plain":
            return plain_turn(arguments)
    return shoal_turn(arguments.out / kind, tokens=arguments.sequence * arguments.batch)


# --- a step, side by side -----------------------------------------------------------------------------------------


def measure_steps(arguments: argparse.Namespace) -> None:
    prepare(arguments)
    settings = {name: getattr(arguments, name) for name in ("model", "sequence", "batch", "checkpointing")}
    settings |= {"drop": list(arguments.drop), "precision": arguments.precision, "threads": torch.get_num_threads()}
    name = f"steps-{arguments.sequence}x{arguments.batch}-{arguments.precision}"
    path = arguments.out / f"{name}{'-checkpointing' * arguments.checkpointing}.json"
    size = bytes_per_token(arguments) if "recorded" in arguments.variants else None
    turns: list[dict[str, Any]] = json.loads(path.read_text())["turns"] if path.is_file() else []
    for _ in range(arguments.repeats):
        order = rotated(arguments.variants, len(turns))
        turns.append({})
        for variant in order:
            load = round(os.getloadavg()[0], 2)
            turns[-1][variant] = measured(variant, arguments) | {"load_before": load}
            print(f"{variant:9} {turns[-1][variant]}", file=sys.stderr, flush=True)
            result = {"what": settings, "turns": turns, "bytes_per_token": size, "figures": figures(turns)}
            write_json(path, result)
    print(", ".join(f"{key} {value}" for key, value in settings.items()) + f", {len(turns)} turns")
    summary = figures(turns)
    print_table([{"variant": name, **values} for name, values in summary["variants"].items()], COLUMNS)
    ratios = [{"ratio": name, **values} for name, values in summary["ratios"].items() if values["measured"] is not None]
    print_table(ratios, {"ratio": "", "measured": ".2f", "by_cpu_time": ".2f", "goal": ""})
    if size is not None:
        print(f"recording: {size:.0f} bytes a token, goal <= 150")


def prepare(arguments: argparse.Namespace) -> None:
    """Text, recipes, students and the recording, each made once."""
    text = arguments.out / "text.txt"
    if not text.is_file():
        text.write_text("\n\n".join(load_texts(DataSource("python_docs"))), encoding="utf-8")
    for variant in IN_SHOAL:
        if variant in arguments.variants:
            file = write_recipe(recipe_of(arguments, variant))
            run_shoal("prune", file)
            if variant == "recorded":
                run_shoal("record", file)


def recipe_of(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    signals = str(signals_folder(arguments))
    distill: dict[str, Any] = {
        "data": str(arguments.out / "text.txt"),
        "num_tokens": arguments.steps * arguments.batch * arguments.sequence,
        "sequence_length": arguments.sequence,
        "precision": arguments.precision,
        "watch": None,
        **IN_SHOAL[variant],
        "trainer": trainer_settings(arguments),
    }
    if variant == "recorded":
        distill["teacher"] = {"recorded": signals}
    return {
        "model": arguments.model,
        "run_dir": str(arguments.out / variant),
        "dtype": arguments.precision,
        "prune": {"drop": list(arguments.drop)},
        "record": {"folder": signals},
        "distill": distill,
    }


def signals_folder(arguments: argparse.Namespace) -> Path:
    """A recording belongs to its rows."""
    return arguments.out / f"signals-{arguments.sequence}"


def bytes_per_token(arguments: argparse.Namespace) -> float:
    """Bytes of the recording per token, headers included."""
    folder = signals_folder(arguments)
    shards = json.loads((folder / "recording.json").read_text())["shards"]
    num_tokens = arguments.sequence * sum(shard["rows"] for shard in shards)
    return sum(file.stat().st_size for file in folder.iterdir()) / num_tokens


def shoal_turn(folder: Path, *, tokens: int) -> dict[str, Any]:
    """`shoal distill` in this process, as the launcher runs it on one rank."""
    for old in ("distilled", "checkpoints"):
        shutil.rmtree(folder / old, ignore_errors=True)
    (folder / Training.FILE).unlink(missing_ok=True)
    os.environ["LOCAL_RANK"] = "0"
    clock = Clock()
    with patch.object(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, clock]):
        if code := run_verb("distill", str(folder / BENCHMARK_RECIPE), []):
            raise SystemExit(code)
    history = [row for row in Training.read(folder / Training.FILE).history if "loss" in row]
    return clock.figures(tokens) | {"loss": history[0]["loss"]}


def rows_of(arguments: argparse.Namespace) -> PackedRows:
    """The rows that `shoal distill` makes of the same recipe."""
    return pack(
        [(DataSource(str(arguments.out / "text.txt")), None)],
        load_tokenizer(resolve_model(arguments.model)),
        sequence_length=arguments.sequence,
        num_tokens=arguments.steps * arguments.batch * arguments.sequence,
        seed=0,
    )


def models_of(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher and the student, the latter in fp32 and training."""
    folder = resolve_model(arguments.model)
    teacher = load_model(folder, dtype=arguments.precision).requires_grad_(False)
    student = cut_model(load_model(folder, dtype="float32"), tuple(arguments.drop))
    student.train()
    if arguments.checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    return teacher, student


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "position_ids", "labels")}


def trainer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every variant's Trainer is told."""
    return {
        **TRAINER,
        "per_device_train_batch_size": arguments.batch,
        "activation_checkpointing": arguments.checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if arguments.checkpointing else None,
    }


def other_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a Trainer is told that shoal does not set up."""
    return {
        **trainer_settings(arguments),
        "output_dir": str(arguments.out / "trainer"),
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": arguments.precision == "bfloat16",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def train(own: Trainer, arguments: argparse.Namespace) -> dict[str, Any]:
    clock = Clock()
    own.add_callback(clock)
    own.remove_callback(PrinterCallback)
    own.train()
    history = [row for row in own.state.log_history if "loss" in row]
    return clock.figures(arguments.batch * arguments.sequence) | {"loss": history[0]["loss"]}


def plain_turn(arguments: argparse.Namespace) -> dict[str, Any]:
    class Plain(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            asked = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
            with torch.no_grad():
                teacher_logits = teacher(**asked).logits
            kept = inputs["labels"][:, 1:] >= 0
            log_q = functional.log_softmax(model(**asked).logits[:, :-1][kept].float(), -1)
            log_p = functional.log_softmax(teacher_logits[:, :-1][kept].float(), -1)
            loss = functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / kept.sum()
            return (loss, {}) if return_outputs else loss

    teacher, student = models_of(arguments)
    plain = Plain(
        student,
        TrainingArguments(**other_settings(arguments)),
        data_collator=collate,
        train_dataset=rows_of(arguments),  # pyright: ignore[reportArgumentType]
    )
    return train(plain, arguments)


def trl_turn(arguments: argparse.Namespace) -> dict[str, Any]:
    def with_mask(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        planes = {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}
        return {**planes, "attention_mask": torch.ones_like(planes["input_ids"])}

    teacher, student = models_of(arguments)
    rows, settings = rows_of(arguments), other_settings(arguments)
    trainer = GKDTrainer(
        student,
        teacher,
        GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0, max_length=rows.input_ids_NS.shape[1]),
        data_collator=with_mask,
        train_dataset=Dataset.from_dict({"input_ids": rows.input_ids_NS.numpy(), "labels": rows.labels_NS.numpy()}),
        processing_class=load_tokenizer(resolve_model(arguments.model)),
    )
    return train(trainer, arguments)


GOALS: dict[str, tuple[str, str, str, str, float]] = {
    "tokens/s against trl": ("shoal", "trl", "tokens_per_s", ">=", 1.2),
    "tokens/s against plain": ("shoal", "plain", "tokens_per_s", ">=", 1.2),
    "peak against trl": ("shoal", "trl", "peak", "<=", 0.5),
    "peak against plain": ("shoal", "plain", "peak", "<=", 0.5),
    "shared prefix, tokens/s against everything trained": ("prefix", "shoal", "tokens_per_s", ">=", 2.0),
    "recorded, tokens/s against live": ("recorded", "shoal", "tokens_per_s", ">=", 1.4),
}


COLUMNS = {
    "variant": "",
    "seconds": ".2f",
    "cpu_seconds": ".2f",
    "tokens_per_s": ".0f",
    "peak": ",.0f",
    "loss": ".5f",
}
"""Figures of a variant, and how they are written; the peak in bytes."""


def figures(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over turns of each variant, and of the ratios within a turn."""
    variants = {
        variant: {key: median(turn[variant].get(key) for turn in turns if variant in turn) for key in list(COLUMNS)[1:]}
        for variant in VARIANTS
        if any(variant in turn for turn in turns)
    }
    ratios = {}
    for name, (own, other, key, sign, goal) in GOALS.items():
        pairs = [(turn[own], turn[other]) for turn in turns if own in turn and other in turn]
        # what the machine's other work does to the clock it does not do to the time of the processor
        busy = median(first["cpu_seconds"] / second["cpu_seconds"] for first, second in pairs if key != "peak")
        ratios[name] = {
            "measured": median(first[key] / second[key] for first, second in pairs),
            "by_cpu_time": 1 / busy if busy and key == "tokens_per_s" else busy,
            "goal": f"{sign} {goal}",
        }
    return {"variants": variants, "ratios": ratios}


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# --- the loss at the head -----------------------------------------------------------------------------------------


def measure_head(arguments: argparse.Namespace) -> None:
    points = [measured(f"head:{vocab}:{tokens}", arguments) for vocab, tokens in HEAD_POINTS]
    write_json(arguments.out / "head.json", {"hidden_size": HEAD_SIZE, "points": points})
    print_table(points, {"vocabulary": ",", "tokens": ",", "extra": ",", "whole": ",", "cpu_us_per_token": ".0f"})


def head_turn(vocab: int, tokens: int) -> dict[str, Any]:
    """Bytes of the loss beyond hidden states, head and their gradients; `whole` is one fp32 copy of all logits."""
    from shoal.train.objective.chunked_loss import Dense, chunked_head_loss

    torch.manual_seed(0)
    hidden, teacher_hidden = (torch.randn(tokens, HEAD_SIZE) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab, HEAD_SIZE) for _ in range(2))
    labels = torch.randint(vocab, (tokens,))
    hidden.requires_grad_()
    weight.requires_grad_()

    def run(num_tokens: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            targets = Dense(teacher_hidden[:num_tokens], lambda h: functional.linear(h, teacher_weight))
            result = chunked_head_loss(
                hidden[:num_tokens],
                labels[:num_tokens],
                targets,
                student_head=functional.linear,
                student_parameters=(weight,),
                terms=(ForwardKL(),),
                chunk=Distill().head_chunk,
            )
        result.loss.backward()
        hidden.grad = weight.grad = None

    run(8)  # libraries and threads take their memory
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    _, seconds, _ = timed(lambda: run(tokens))
    growth = peak_memory() - before
    return {
        "vocabulary": vocab,
        "tokens": tokens,
        "peak_growth": growth,
        "extra": growth - 4 * (hidden.numel() + weight.numel()),  # without their gradients
        "whole": 4 * vocab * tokens,
        "cpu_seconds": seconds,
        "cpu_us_per_token": 1e6 * seconds / tokens,
    }


if __name__ == "__main__":
    main()

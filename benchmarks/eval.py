"""What evaluating costs beside lm-eval's own transformers class, in turns, in one process, over the same requests.

    python benchmarks/eval.py [endings examples letters texts quick] [--model demo:smollm2-135m] [--data FOLDER]

endings     HellaSwag's form: a context and four endings of some words each
examples    the same behind five contexts with their right endings
letters     MMLU's form with five examples: a prompt of hundreds of tokens and four letters
texts       GSM8K's form with five worked examples: greedy text up to a stop string
quick       `suite: quick` for three roles: the model, and two cut ones of the same size

With --data the items are the real ones, from folders hellaswag, mmlu and gsm8k of JSON lines in the Hub's own fields;
else they are made of the bundled text and abilities. Log-likelihoods and texts of both are compared. Where other
processes share the cores, processor time is the ratio to read, not wall time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from side_by_side import Bench, largest_difference, print_parts, timed, write_recipe

from shoal.abilities import Item, items
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.sources import load_texts
from shoal.eval.evaluate import evaluate
from shoal.eval.harness.engine import CausalLM
from shoal.models.load import load_model
from shoal.recipe.recipe import load_recipe
from shoal.recipe.section import DataSource
from shoal.runtime import device

Pair = tuple[str, str]

NUM_EXAMPLES = 5
DROP = (12, 13, 14, 21, 25, 26)
GOALS = {"endings": 2.5, "examples": 2.5, "letters": 2.5, "texts": 1.5}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def endings(data: Path | None, count: int, num_examples: int = 0) -> list[Pair]:
    """A context with each of its four endings, behind ``num_examples`` contexts with their right ones."""
    if data is not None:
        examples = rows(data / "hellaswag/validation.jsonl")
        examples = examples[:: max(1, len(examples) // (count + num_examples))]  # the file begins with the short ones
        questions = [
            (f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}".strip(), r["endings"], int(r["label"]))
            for r in examples
        ]
    else:
        text = " ".join(load_texts(DataSource("python_docs_heldout"), max_characters=4000 * (count + num_examples)))
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.:])\s+", text) if 40 < len(part) < 240]
        questions = [
            (" ".join(sentences[start : start + 2]), sentences[start + 2 : start + 6], 0)
            for start in range(0, 6 * (count + num_examples), 6)
        ]
    head = "".join(f"{context} {options[gold]}\n\n" for context, options, gold in questions[:num_examples])
    asked = questions[num_examples : num_examples + count]
    return [(head + context, f" {ending}") for context, options, _ in asked for ending in options]


def letters(data: Path | None, count: int) -> list[Pair]:
    """Lettered questions behind five answered ones; of the real data, of two subjects."""
    if data is not None:
        examples, tests = rows(data / "mmlu/dev.jsonl"), rows(data / "mmlu/test.jsonl")
        prompts = []
        for subject in list(dict.fromkeys(row["subject"] for row in examples))[10:12]:
            shots = [row for row in examples if row["subject"] == subject][:NUM_EXAMPLES]
            head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            head += "".join(f"{_lettered(r['question'], r['choices'])} {'ABCD'[r['answer']]}\n\n" for r in shots)
            asked = [row for row in tests if row["subject"] == subject][: count // 2]
            prompts += [head + _lettered(row["question"], row["choices"]) for row in asked]
    else:
        generated = items("knowledge", split="eval", num_items=NUM_EXAMPLES + count, seed=0)
        texts = [_lettered(item.question, [option.strip() for option in item.options]) for item in generated]
        head = "".join(
            f"{text} {'ABCD'[item.answer]}\n\n" for text, item in zip(texts[:NUM_EXAMPLES], generated, strict=False)
        )
        prompts = [head + text for text in texts[NUM_EXAMPLES:]]
    return [(prompt, f" {letter}") for prompt in prompts for letter in "ABCD"]


def _lettered(question: str, options: Sequence[str]) -> str:
    return "\n".join([question.strip(), *map("{}. {}".format, "ABCD", options), "Answer:"])


def texts(data: Path | None, count: int) -> list[str]:
    """Questions behind five worked ones."""
    if data is not None:
        shots = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in rows(data / "gsm8k/train.jsonl")]
        asked = [f"Question: {row['question']}\nAnswer:" for row in rows(data / "gsm8k/test.jsonl")]
    else:
        generated: list[Item] = items("reasoning", split="eval", num_items=NUM_EXAMPLES + count, seed=0)
        shots = [item.context + item.gold for item in generated]
        asked = [item.context for item in generated[NUM_EXAMPLES:]]
    head = "\n\n".join(shots[:NUM_EXAMPLES])
    return [f"{head}\n\n{question}" for question in asked[:count]]


class BesideHarness(Bench):
    """The model in both hands, and the items."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.data, self.questions = arguments.data, arguments.questions
        make: Any = HFLM  # its decorator hides its type
        self.theirs: Any = make(
            pretrained=self.model, tokenizer=self.tokenizer, batch_size=arguments.batch_size, dtype=arguments.dtype
        )

    def ours(self) -> CausalLM:
        """New every time: what it has answered it would not compute again."""
        return CausalLM(self.model, self.tokenizer, self.arguments.batch_size)

    def mean_tokens(self, texts: Iterable[str]) -> float:
        return round(statistics.mean(len(self.tokenizer(text)["input_ids"]) for text in texts), 1)

    def likelihoods(self, part: str, pairs: list[Pair]) -> dict[str, Any]:
        asked = requests("loglikelihood", pairs)
        figures, ours, theirs = self.pairs(
            lambda: self.ours().loglikelihood(asked),
            lambda: self.theirs.loglikelihood(asked, disable_tqdm=True),
        )
        return {
            "requests": len(pairs),
            "mean_tokens": self.mean_tokens(context + answer for context, answer in pairs),
            "goal": GOALS[part],
            **figures,
            "largest_difference": largest_difference(ours, theirs),
            "same_first_choices": sum(own[1] == other[1] for own, other in zip(ours, theirs, strict=True)),
        }


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def measure_texts(bench: BesideHarness) -> dict[str, Any]:
    settings = {"until": ["Question:", "\n\n"], "max_gen_toks": bench.arguments.new_tokens, "do_sample": False}
    prompts = texts(bench.data, bench.arguments.prompts)
    asked = requests("generate_until", [(prompt, settings) for prompt in prompts])
    figures, ours, theirs = bench.pairs(
        lambda: bench.ours().generate_until(asked),
        lambda: bench.theirs.generate_until(asked, disable_tqdm=True),
    )
    return {
        "prompts": len(prompts),
        "mean_prompt_tokens": bench.mean_tokens(prompts),
        "mean_new_tokens": bench.mean_tokens(ours),
        "goal": GOALS["texts"],
        **figures,
        "equal_texts": sum(own == other for own, other in zip(ours, theirs, strict=True)),
    }


def measure_quick(bench: BesideHarness) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"model": bench.arguments.model, "run_dir": folder, "eval": {"suite": "quick"}}
        settings = load_recipe(write_recipe(recipe)).eval
    model = load_model(bench.folder, device=device())  # in the precision it is stored in, as shoal runs it
    cut = partial(cut_model, model, list(DROP), share=True)
    figures: dict[str, Any] = {"goal_s": 360}
    for role, make in (("teacher", lambda: model), ("pruned", cut), ("distilled", cut)):
        wall, processor, _ = timed(partial(evaluate, make(), bench.tokenizer, settings, seed=0))
        figures[role] = {"wall_s": round(wall, 1), "processor_s": round(processor, 1)}
    return figures


PARTS: dict[str, Callable[[BesideHarness], dict[str, Any]]] = {
    "endings": lambda bench: bench.likelihoods("endings", endings(bench.data, bench.questions)),
    "examples": lambda bench: bench.likelihoods("examples", endings(bench.data, bench.questions, NUM_EXAMPLES)),
    "letters": lambda bench: bench.likelihoods("letters", letters(bench.data, bench.questions)),
    "texts": measure_texts,
    "quick": measure_quick,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What evaluating costs beside lm-eval's transformers class")
    parser.add_argument("--data", type=Path, help="folder with hellaswag, mmlu and gsm8k; default: bundled items")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    print_parts(BesideHarness, PARTS, parser, questions=32)


if __name__ == "__main__":
    main()

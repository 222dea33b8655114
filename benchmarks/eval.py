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
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from shoal.abilities import Item, items
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.sources import load_texts
from shoal.eval.evaluate import evaluate
from shoal.eval.harness.engine import CausalLM
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.recipe.recipe import load_recipe
from shoal.recipe.section import DataSource
from shoal.runtime import device, environment

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
            (
                f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}".strip(),
                row["endings"],
                int(row["label"]),
            )
            for row in examples
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


class Bench:
    """The model in both hands."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder = resolve_model(arguments.model)
        self.model: PreTrainedModel = load_model(self.folder, dtype=arguments.dtype, device=device())
        self.tokenizer: Any = load_tokenizer(self.folder)
        self.arguments = arguments
        self.data, self.questions = arguments.data, arguments.questions
        make: Any = HFLM  # its decorator hides its type
        self.theirs: Any = make(
            pretrained=self.model, tokenizer=self.tokenizer, batch_size=arguments.batch_size, dtype=arguments.dtype
        )

    def ours(self) -> CausalLM:
        """New every time: what it has answered it would not compute again."""
        return CausalLM(self.model, self.tokenizer, self.arguments.batch_size)

    def turns(
        self, ours: Callable[[], Any], theirs: Callable[[], Any], *, goal: float
    ) -> tuple[dict[str, Any], Any, Any]:
        """Both in turns, the first of every other pair being the other one; times, ratios and the last results."""
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        results: dict[str, Any] = {}
        for repeat in range(self.arguments.repeats):
            both = [("ours", ours), ("theirs", theirs)]
            for name, run in both if repeat % 2 == 0 else both[::-1]:
                wall, processor = time.perf_counter(), time.process_time()
                results[name] = run()
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
        figures: dict[str, Any] = {"goal": goal}
        for index, kind in enumerate(("wall", "processor")):
            pairs = [(own[index], other[index]) for own, other in zip(times["ours"], times["theirs"], strict=True)]
            figures[f"{kind}_s"] = [[round(own, 1), round(other, 1)] for own, other in pairs]
            figures[f"times_faster_by_{kind}"] = round(statistics.median(other / own for own, other in pairs), 2)
        return figures, results["ours"], results["theirs"]

    def likelihoods(self, part: str, pairs: list[Pair]) -> dict[str, Any]:
        asked = requests("loglikelihood", pairs)
        figures, ours, theirs = self.turns(
            lambda: self.ours().loglikelihood(asked),
            lambda: self.theirs.loglikelihood(asked, disable_tqdm=True),
            goal=GOALS[part],
        )
        return {
            "requests": len(pairs),
            "mean_tokens": round(statistics.mean(len(self.tokenizer(a + b)["input_ids"]) for a, b in pairs), 1),
            **figures,
            "largest_difference": max(abs(own[0] - other[0]) for own, other in zip(ours, theirs, strict=True)),
            "same_first_choices": sum(own[1] == other[1] for own, other in zip(ours, theirs, strict=True)),
        }


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def measure_texts(bench: Bench) -> dict[str, Any]:
    settings = {"until": ["Question:", "\n\n"], "max_gen_toks": bench.arguments.new_tokens, "do_sample": False}
    prompts = texts(bench.data, bench.arguments.prompts)
    asked = requests("generate_until", [(prompt, settings) for prompt in prompts])
    figures, ours, theirs = bench.turns(
        lambda: bench.ours().generate_until(asked),
        lambda: bench.theirs.generate_until(asked, disable_tqdm=True),
        goal=GOALS["texts"],
    )
    return {
        "prompts": len(prompts),
        "mean_prompt_tokens": round(statistics.mean(len(bench.tokenizer(text)["input_ids"]) for text in prompts), 1),
        "mean_new_tokens": round(statistics.mean(len(bench.tokenizer(text)["input_ids"]) for text in ours), 1),
        **figures,
        "equal_texts": sum(own == other for own, other in zip(ours, theirs, strict=True)),
    }


def measure_quick(bench: Bench) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(f"model: {bench.arguments.model}\nrun_dir: {folder}\neval: {{suite: quick}}\n")
        settings = load_recipe(recipe).eval
    model = load_model(bench.folder, device=device())  # in the precision it is stored in, as shoal runs it
    cut = partial(cut_model, model, list(DROP), share=True)
    figures: dict[str, Any] = {"goal_s": 360}
    for role, make in (("teacher", lambda: model), ("pruned", cut), ("distilled", cut)):
        wall, processor = time.perf_counter(), time.process_time()
        evaluate(make(), bench.tokenizer, settings, seed=0)
        figures[role] = {
            "wall_s": round(time.perf_counter() - wall, 1),
            "processor_s": round(time.process_time() - processor, 1),
        }
    return figures


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "endings": lambda bench: bench.likelihoods("endings", endings(bench.data, bench.questions)),
    "examples": lambda bench: bench.likelihoods("examples", endings(bench.data, bench.questions, NUM_EXAMPLES)),
    "letters": lambda bench: bench.likelihoods("letters", letters(bench.data, bench.questions)),
    "texts": measure_texts,
    "quick": measure_quick,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What evaluating costs beside lm-eval's transformers class")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="values and texts are compared, so not bfloat16")
    parser.add_argument("--data", type=Path, help="folder with hellaswag, mmlu and gsm8k; default: bundled items")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for name in arguments.parts or PARTS:
        print(json.dumps({name: PARTS[name](bench)}, indent=1), flush=True)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(json.dumps({**settings, "threads": torch.get_num_threads(), **environment()}, indent=1))


if __name__ == "__main__":
    main()

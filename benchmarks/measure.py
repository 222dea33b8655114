"""What measuring costs beside doing it one cut model at a time, interleaved in one process.

    python benchmarks/measure.py [text choices generation sleb] [--model demo:smollm2-135m] [--repeats 3]

text        log-likelihoods of running text without each layer, beside a loop over the cut models, same batches
choices     questions with options without each layer, beside lm-eval's own model over each cut model
generation  greedy text without each layer, beside transformers' generate with each cut model
sleb        greedy removal of k layers, beside the loop over all cut models of every round

Ratios are medians over repeats of pairs that ran next to each other; values are compared too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from shoal.compress.measure import measure_importance
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.variant_losses import own_documents
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.sweeps.sweep import VariantsLM
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import Edited, layerwise_or_none, score_variants, without
from shoal.data.packing import PackedRows
from shoal.data.streams import pack
from shoal.eval.tasks.load import tasks_of
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import score
from shoal.machine import now
from shoal.models.anatomy import decoder_layers
from shoal.models.load import load_model, load_tokenizer
from shoal.models.resolve import resolve_model
from shoal.recipe.evaluate import Tasks
from shoal.recipe.section import DataSource
from shoal.runtime import device, environment


class Bench:
    """The model whole, and without layers, in the hands of both sides, and the options of the command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, folder = arguments, resolve_model(arguments.model)
        self.model: PreTrainedModel = load_model(folder, dtype=arguments.dtype, device=device())
        self.tokenizer: Any = load_tokenizer(folder)
        self.edited, self.decoder = Edited(self.model), Decoder(self.model)
        self.layers = range(len(decoder_layers(self.model)))
        self.without_each = [without([layer]) for layer in self.layers]
        layerwise_or_none(self.model)  # proven once, before anything is timed

    def pairs(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[dict[str, Any], Any, Any]:
        """Both in turns, the first of every other pair being the other one: seconds and ratios, and the last results.

        A ratio is the median over pairs, which ran next to each other.
        """
        pairs = []
        for repeat in range(self.arguments.repeats):
            turns = (ours, theirs) if repeat % 2 == 0 else (theirs, ours)  # who comes after whom matters
            times = {run: _timed(run) for run in turns}
            pairs.append((times[ours], times[theirs]))
        figures: dict[str, Any] = {}
        for index, kind in enumerate(("wall", "processor")):
            seconds = [(own[index], other[index]) for own, other in pairs]
            figures[f"{kind}_s"] = [[round(own, 2), round(other, 2)] for own, other in seconds]
            figures[f"ratio_by_{kind}"] = round(statistics.median(own / other for own, other in seconds), 3)
            figures[f"times_faster_by_{kind}"] = round(statistics.median(other / own for own, other in seconds), 2)
        return figures, pairs[-1][0][2], pairs[-1][1][2]

    def rows(self, num_tokens: int) -> PackedRows:
        sources = [(DataSource("python_docs"), None)]
        return pack(sources, self.tokenizer, sequence_length=512, num_tokens=num_tokens, seed=0)

    def cut(self, *drop: int) -> PreTrainedModel:
        """Cutting shares the weights, so that making the model is no part of the price."""
        return cut_model(self.model, drop, share=True)


def text(bench: Bench) -> dict[str, Any]:
    rows = bench.rows(1024)
    start = bench.tokenizer.bos_token_id or 0
    requests = [((start,), tuple(row)) for row in rows.input_ids_NS.tolist()]
    figures, ours, loop = bench.pairs(
        lambda: score_variants(bench.edited, bench.decoder, requests, bench.without_each, batch_size=4),
        lambda: [score(Decoder(bench.cut(layer)), requests, batch_size=4) for layer in bench.layers],
    )
    return {**figures, "largest_difference": difference(ours, loop), "target": 0.5}


def choices(bench: Bench) -> dict[str, Any]:
    tasks = ("knowledge_continuation", "retrieval_continuation")
    return {name: choices_of(bench, name) for name in tasks}


def choices_of(bench: Bench, task: str) -> dict[str, Any]:
    requests = instances(task, bench.arguments.questions)
    make: Any = HFLM  # its decorator hides its type

    def ours() -> Any:
        lm = VariantsLM(bench.edited, bench.tokenizer, bench.without_each, 8)
        pairs = (lm._encode_pair(*request.args) for request in requests)
        encoded = [(tuple(context), tuple(option)) for context, option in pairs]
        return score_variants(bench.edited, lm._decoder, encoded, bench.without_each, batch_size=8)

    def loop() -> Any:
        models = (make(pretrained=bench.cut(layer), tokenizer=bench.tokenizer, batch_size=8) for layer in bench.layers)
        return [lm.loglikelihood(requests, disable_tqdm=True) for lm in models]

    figures, own, theirs = bench.pairs(ours, loop)
    sizes = {"questions": bench.arguments.questions}
    return {**sizes, **figures, "largest_difference": difference(own, theirs), "target": 0.3}


def generation(bench: Bench) -> dict[str, Any]:
    return {
        f"{task}, {count} prompts, {new_tokens} new tokens": generation_of(bench, task, count, new_tokens)
        for task, new_tokens in (("retrieval_generation", 16), ("reasoning_generation", 48))
        for count in bench.arguments.prompts
    }


def generation_of(bench: Bench, task: str, count: int, new_tokens: int) -> dict[str, Any]:
    prompts = [bench.tokenizer(request.args[0])["input_ids"] for request in instances(task, count)]
    limits = Limits(new_tokens, lambda tokens: tokens[-1] == bench.tokenizer.eos_token_id)

    def ours() -> Any:
        variants, size = bench.without_each, len(prompts)
        return generate_variants(bench.edited, bench.decoder, prompts, variants, limits, batch_size=size)

    def loop() -> Any:
        return [written(bench.cut(layer), bench.tokenizer, prompts, new_tokens) for layer in bench.layers]

    figures, texts, theirs = bench.pairs(ours, loop)
    equal = [a == b for pair in zip(texts, theirs, strict=True) for a, b in zip(*pair, strict=True)]
    return {**figures, "equal_texts": f"{sum(equal)} of {len(equal)}", "target": "3 times"}


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**padded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = output[:, padded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


def sleb(bench: Bench) -> dict[str, Any]:
    rows, count = bench.rows(512), bench.arguments.drops
    documents = [document.tokens for document in own_documents(Calibration(rows, 4))]
    requests = [(tuple(ids[:1]), tuple(ids[1:])) for ids in documents if len(ids) > 1]

    def loop() -> list[int]:
        gone: list[int] = []
        for _ in range(count):
            totals = {
                layer: sum(nats for nats, _ in score(Decoder(bench.cut(*gone, layer)), requests, batch_size=4))
                for layer in bench.layers[1:-1]
                if layer not in gone
            }
            gone.append(max(totals, key=totals.__getitem__))
        return gone

    def ours() -> list[int]:
        scores = measure_importance(bench.model, rows, metrics=["sleb"], batch_size=4, num_drop=count)
        return [removal.unit.layers[0] for removal in scores.orders["sleb"]]

    figures, own, theirs = bench.pairs(ours, loop)
    return {"drops": count, **figures, "ours": own, "loop": theirs, "target": 0.6}


def instances(task_name: str, count: int) -> list[Any]:
    task = tasks_of(Tasks((task_name,)))[task_name]
    task.build_all_requests(limit=count)
    return task.instances


def difference(ours: Iterable[Iterable[Any]], loop: Iterable[Iterable[Any]]) -> float:
    """In nats, over all requests and layers; both give (log-likelihood, ...) of each."""
    pairs = ((own, other) for layer in zip(ours, loop, strict=True) for own, other in zip(*layer, strict=True))
    return max(abs(own[0] - other[0]) for own, other in pairs)


def _timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the clock and of the processor, and the result."""
    wall, processor = now(device()), time.process_time()
    result = run()
    return now(device()) - wall, time.process_time() - processor, result


PARTS = {"text": text, "choices": choices, "generation": generation, "sleb": sleb}


def main() -> None:
    """Print the figures of the parts that the command line names, then its options and the machine."""
    parser = argparse.ArgumentParser(description="What measuring costs beside one cut model at a time")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="values and texts are compared, so not bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--drops", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for name in arguments.parts or PARTS:
        print(json.dumps({name: PARTS[name](bench)}, indent=1), flush=True)
    print(json.dumps({key: str(value) for key, value in vars(arguments).items()} | environment(), indent=1))


if __name__ == "__main__":
    main()

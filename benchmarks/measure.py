"""What measuring costs beside doing it one cut model at a time, interleaved in one process.

    python benchmarks/measure.py [hidden text choices generation sleb] [--model demo:smollm2-135m] [--repeats 3]

hidden      all hidden-state metrics together beside one plain forward of the decoder over the same tokens
text        log-likelihoods of running text without each layer, beside a loop over the cut models, same batches
choices     questions with options without each layer, beside lm-eval's own model over each cut model
generation  greedy text without each layer, beside transformers' generate with each cut model
sleb        greedy removal of k layers, beside the loop over all cut models of every round

Ratios are medians over repeats of pairs that ran next to each other; values are compared too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from shoal.compress.measure import measure_importance
from shoal.compress.metrics.hidden_pass import HIDDEN_METRICS
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.variant_losses import own_documents
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.sweeps.sweep import VariantsLM
from shoal.compress.variants import variant_generation
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import INTACT, Edited, layerwise_or_none, score_variants, without
from shoal.data.packing import PackedRows
from shoal.data.sources import load_texts, pack
from shoal.eval.tasks.load import load_tasks
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import score
from shoal.models.anatomy import decoder_layers
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.recipe.section import DataSource
from shoal.runtime import device, environment

Timed = tuple[float, Any]


class Bench:
    """The model and what all parts share."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.model: PreTrainedModel = load_model(folder, dtype=arguments.dtype, device=device())
        self.tokenizer: Any = load_tokenizer(folder)
        self.arguments = arguments
        self.num_layers = len(decoder_layers(self.model))
        self.edited, self.decoder = Edited(self.model), Decoder(self.model)
        layerwise_or_none(self.model)  # proven once, before anything is timed

    def rows(self, num_tokens: int, sequence_length: int = 512) -> PackedRows:
        source = DataSource("python_docs")
        return pack(
            [(source, load_texts(source))],
            self.tokenizer,
            sequence_length=sequence_length,
            num_tokens=num_tokens,
            seed=0,
        )

    def cut(self, drop: Sequence[int]) -> PreTrainedModel:
        """Cutting shares the weights, so that making the model is no part of the price."""
        return cut_model(self.model, drop, share=True)

    def pairs(self, ours: Callable[[], Any], theirs: Callable[[], Any], *, warm_up: bool = False) -> dict[str, Any]:
        """Both in turns; the ratio of their times and both results."""
        times: list[tuple[float, float]] = []
        results: tuple[Any, Any] = (None, None)
        for repeat in range(self.arguments.repeats + warm_up):
            (first, own), (second, other) = timed(ours), timed(theirs)
            results = own, other
            if repeat or not warm_up:
                times.append((first, second))
        return {
            "ours_s": [round(own, 2) for own, _ in times],
            "loop_s": [round(other, 2) for _, other in times],
            "ratio": round(statistics.median(own / other for own, other in times), 3),
            "results": results,
        }


def timed(run: Callable[[], Any]) -> Timed:
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def hidden(bench: Bench) -> dict[str, Any]:
    rows, size = bench.rows(bench.arguments.tokens), 4

    @torch.inference_mode()
    def plain() -> None:
        for start in range(0, len(rows), size):
            batch = slice(start, start + size)
            ids, positions = rows.input_ids_NS[batch], rows.position_ids_NS[batch]
            bench.model.get_decoder()(
                input_ids=ids.to(bench.model.device), position_ids=positions.to(bench.model.device), use_cache=False
            )

    names = list(HIDDEN_METRICS)
    figures = bench.pairs(
        lambda: measure_importance(bench.model, rows, metrics=names, batch_size=size), plain, warm_up=True
    )
    figures.pop("results")
    return {"metrics": names, "tokens": rows.input_ids_NS.numel(), **figures, "target": 1.25}


def text(bench: Bench) -> dict[str, Any]:
    rows = bench.rows(1024)
    start = bench.tokenizer.bos_token_id or 0
    requests = [((start,), tuple(row)) for row in rows.input_ids_NS.tolist()]
    drops = [[layer] for layer in range(bench.num_layers)]
    figures = bench.pairs(
        lambda: score_variants(bench.edited, bench.decoder, requests, [without(drop) for drop in drops], batch_size=4),
        lambda: [score(Decoder(bench.cut(drop)), requests, batch_size=4) for drop in drops],
    )
    ours, loop = figures.pop("results")
    return {**figures, "largest_difference": difference(ours, loop), "target": 0.5}


def choices(bench: Bench) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in ("knowledge_continuation", "retrieval_continuation"):
        requests = instances(name, bench.arguments.questions)
        pairs = [request.args for request in requests]

        def ours(pairs: Any = pairs) -> Any:
            variants = [without([layer]) for layer in range(bench.num_layers)]
            lm = VariantsLM(bench.edited, bench.tokenizer, variants, 8)
            encoded = [(tuple(lm._encode_pair(*pair)[0]), tuple(lm._encode_pair(*pair)[1])) for pair in pairs]
            return score_variants(bench.edited, lm._decoder, encoded, variants, batch_size=8)

        def loop(requests: Any = requests) -> Any:
            answers = []
            for layer in range(bench.num_layers):
                make: Any = HFLM
                lm = make(pretrained=bench.cut([layer]), tokenizer=bench.tokenizer, batch_size=8)
                answers.append(lm.loglikelihood(requests, disable_tqdm=True))
            return answers

        measured = bench.pairs(ours, loop)
        own, theirs = measured.pop("results")
        figures[name] = {
            "questions": bench.arguments.questions,
            **measured,
            "largest_difference": difference(own, theirs),
            "target": 0.3,
        }
    return figures


def generation(bench: Bench) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    end = bench.tokenizer.eos_token_id
    for name, new_tokens in (("retrieval_generation", 16), ("reasoning_generation", 48)):
        for count in bench.arguments.prompts:
            prompts = [bench.tokenizer(request.args[0])["input_ids"] for request in instances(name, count)]
            limits = Limits(new_tokens, lambda tokens: tokens[-1] == end)
            variants = [without([layer]) for layer in range(bench.num_layers)]

            def ours(prompts: Any = prompts, limits: Limits = limits, variants: Any = variants) -> Any:
                return generate_variants(
                    bench.edited, bench.decoder, prompts, variants, limits, batch_size=len(prompts)
                )

            def loop(prompts: Any = prompts, new_tokens: int = new_tokens) -> Any:
                return [
                    written(bench.cut([layer]), bench.tokenizer, prompts, new_tokens)
                    for layer in range(bench.num_layers)
                ]

            measured = bench.pairs(ours, loop)
            texts, theirs = measured.pop("results")
            drafting, _ = timed(partial(with_drafts, ours))
            intact = generate_variants(bench.edited, bench.decoder, prompts, [INTACT], limits, batch_size=len(prompts))[
                0
            ]
            equal = [a == b for pair in zip(texts, theirs, strict=True) for a, b in zip(*pair, strict=True)]
            figures[f"{name}, {count} prompts, {new_tokens} new tokens"] = {
                **measured,
                "times_faster": round(1 / measured["ratio"], 2),
                "equal_texts": f"{sum(equal)} of {len(equal)}",
                "tokens_from_the_draft": round(drafted(intact, texts), 3),
                "with_whole_drafts_s": round(drafting, 2),
                "target": "3 times",
            }
    return figures


def with_drafts(run: Callable[[], Any]) -> Any:
    """``run`` with the intact model's whole text as a draft, whatever the device."""
    by_default = variant_generation.DRAFT_TOKENS
    variant_generation.DRAFT_TOKENS = {}
    try:
        return run()
    finally:
        variant_generation.DRAFT_TOKENS = by_default


def drafted(intact: Sequence[list[int]], texts: Sequence[Sequence[list[int]]]) -> float:
    """Share of all variants' tokens that were read in the intact model's text and not written one by one."""
    pairs = [(text, draft) for variant in texts for text, draft in zip(variant, intact, strict=True)]
    same = [sum(itertools.takewhile(bool, map(int.__eq__, text, draft))) for text, draft in pairs]
    # the first token that differs comes out of the reading too
    read = sum(min(count + 1, len(text)) for count, (text, _) in zip(same, pairs, strict=True))
    return read / sum(len(text) for text, _ in pairs)


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = output[:, longest:].tolist()
    end = tokenizer.eos_token_id
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


def sleb(bench: Bench) -> dict[str, Any]:
    rows, count = bench.rows(512), bench.arguments.drops
    documents = [document.tokens for document in own_documents(Calibration(rows, 4))]
    requests = [(tuple(ids[:1]), tuple(ids[1:])) for ids in documents if len(ids) > 1]

    def loop() -> list[int]:
        gone: list[int] = []
        for _ in range(count):
            left = [layer for layer in range(1, bench.num_layers - 1) if layer not in gone]
            totals = [
                sum(value for value, _ in score(Decoder(bench.cut([*gone, layer])), requests, batch_size=4))
                for layer in left
            ]
            gone.append(left[max(range(len(left)), key=totals.__getitem__)])
        return gone

    def ours() -> list[int]:
        scores = measure_importance(bench.model, rows, metrics=["sleb"], batch_size=4, num_drop=count)
        return [removal.unit.layers[0] for removal in scores.orders["sleb"]]

    figures = bench.pairs(ours, loop)
    own, theirs = figures.pop("results")
    return {"drops": count, **figures, "ours": own, "loop": theirs, "target": 0.6}


def instances(task_name: str, count: int) -> list[Any]:
    task = load_tasks([task_name])[task_name]
    task.build_all_requests(limit=count)
    return task.instances


def difference(ours: Sequence[Sequence[Any]], loop: Sequence[Sequence[Any]]) -> float:
    """In nats, over all requests and layers."""
    return max(
        abs(own[0] - other[0])
        for of_layer, theirs in zip(ours, loop, strict=True)
        for own, other in zip(of_layer, theirs, strict=True)
    )


PARTS = {"hidden": hidden, "text": text, "choices": choices, "generation": generation, "sleb": sleb}


def main() -> None:
    parser = argparse.ArgumentParser(description="What measuring costs beside one cut model at a time")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="texts and likelihoods are compared, so not bfloat16")
    parser.add_argument("--tokens", type=int, default=8192, help="of the hidden part")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--drops", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(resolve_model(arguments.model), arguments)
    for name in arguments.parts or PARTS:
        print(json.dumps({name: PARTS[name](bench)}, indent=1), flush=True)
    print(json.dumps({"model": arguments.model, "dtype": arguments.dtype, **environment()}, indent=1))


if __name__ == "__main__":
    main()

"""What measuring costs beside doing it one cut model at a time, interleaved in one process.

    python benchmarks/measure.py [text sleb] [--model demo:smollm2-135m] [--repeats 3]

text  log-likelihoods of running text without each layer, beside a loop over the cut models, same batches
sleb  greedy removal of k layers, beside the loop over all cut models of every round

Ratios are medians over repeats of pairs that ran next to each other; values are compared too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel

from shoal.compress.measure import measure_importance
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.variant_losses import own_documents
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.variants.variants import Edited, layerwise_or_none, score_variants, without
from shoal.data.packing import PackedRows
from shoal.data.streams import pack
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import score
from shoal.machine import now
from shoal.models.anatomy import decoder_layers
from shoal.models.load import load_model, load_tokenizer
from shoal.models.resolve import resolve_model
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


def difference(ours: Iterable[Iterable[Any]], loop: Iterable[Iterable[Any]]) -> float:
    """In nats, over all requests and layers; both give (log-likelihood, ...) of each."""
    pairs = ((own, other) for layer in zip(ours, loop, strict=True) for own, other in zip(*layer, strict=True))
    return max(abs(own[0] - other[0]) for own, other in pairs)


def _timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the clock and of the processor, and the result."""
    wall, processor = now(device()), time.process_time()
    result = run()
    return now(device()) - wall, time.process_time() - processor, result


PARTS = {"text": text, "sleb": sleb}


def main() -> None:
    """Print the figures of the parts that the command line names, then its options and the machine."""
    parser = argparse.ArgumentParser(description="What measuring costs beside one cut model at a time")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="values are compared, so not bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drops", type=int, default=3)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for name in arguments.parts or PARTS:
        print(json.dumps({name: PARTS[name](bench)}, indent=1), flush=True)
    print(json.dumps({key: str(value) for key, value in vars(arguments).items()} | environment(), indent=1))


if __name__ == "__main__":
    main()

"""What measuring costs beside doing it one cut model at a time, interleaved in one process.

    python benchmarks/measure.py [hidden text choices generation parts sleb] [--model demo:smollm2-135m]
        [--repeats 3]

hidden      all hidden-state metrics together beside one plain forward of the decoder over the same tokens
text        log-likelihoods of running text without each layer, beside a loop over the cut models, same batches
choices     questions with options without each layer, beside lm-eval's own model over each cut model
generation  greedy text without each layer, beside transformers' generate with each cut model
parts       choices and text where each layer writes nothing at some positions, beside the same without each layer
sleb        greedy removal of k layers, beside the loop over all cut models of every round

Ratios are medians over repeats of pairs that ran next to each other; values are compared too.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.models.huggingface import HFLM
from side_by_side import Bench, largest_difference, print_parts, timed
from transformers import PreTrainedModel

from shoal.components import ComponentPart, LayerEdit
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.hidden_pass import HIDDEN_METRICS
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.variant_losses import own_documents
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.sweeps.sweep import VariantsLM
from shoal.compress.variants import variant_generation
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import (
    INTACT,
    Edited,
    Variant,
    layerwise_or_none,
    score_variants,
    variant,
    without,
)
from shoal.data.packing import PackedRows
from shoal.data.sources import pack
from shoal.eval.tasks.load import load_tasks
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import score
from shoal.models.anatomy import decoder_layers
from shoal.recipe.section import DataSource


class BesideLoop(Bench):
    """The model whole, and without layers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.edited, self.decoder = Edited(self.model), Decoder(self.model)
        self.layers = range(len(decoder_layers(self.model)))
        self.without_each = [without([layer]) for layer in self.layers]
        layerwise_or_none(self.model)  # proven once, before anything is timed

    def rows(self, num_tokens: int) -> PackedRows:
        sources = [(DataSource("python_docs"), None)]
        return pack(sources, self.tokenizer, sequence_length=512, num_tokens=num_tokens, seed=0)

    def cut(self, *drop: int) -> PreTrainedModel:
        """Cutting shares the weights, so that making the model is no part of the price."""
        return cut_model(self.model, drop, share=True)


def hidden(bench: BesideLoop) -> dict[str, Any]:
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
    figures, _, _ = bench.pairs(
        lambda: measure_importance(bench.model, rows, metrics=names, batch_size=size), plain, warm_up=True
    )
    return {"metrics": names, "tokens": rows.input_ids_NS.numel(), **figures, "target": 1.25}


def text(bench: BesideLoop) -> dict[str, Any]:
    rows = bench.rows(1024)
    start = bench.tokenizer.bos_token_id or 0
    requests = [((start,), tuple(row)) for row in rows.input_ids_NS.tolist()]
    figures, ours, loop = bench.pairs(
        lambda: score_variants(bench.edited, bench.decoder, requests, bench.without_each, batch_size=4),
        lambda: [score(Decoder(bench.cut(layer)), requests, batch_size=4) for layer in bench.layers],
    )
    return {**figures, "largest_difference": difference(ours, loop), "target": 0.5}


def choices(bench: BesideLoop) -> dict[str, Any]:
    tasks = ("knowledge_continuation", "retrieval_continuation")
    return {name: choices_of(bench, name) for name in tasks}


def choices_of(bench: BesideLoop, task: str) -> dict[str, Any]:
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


def generation(bench: BesideLoop) -> dict[str, Any]:
    return {
        f"{task}, {count} prompts, {new_tokens} new tokens": generation_of(bench, task, count, new_tokens)
        for task, new_tokens in (("retrieval_generation", 16), ("reasoning_generation", 48))
        for count in bench.arguments.prompts
    }


def generation_of(bench: BesideLoop, task: str, count: int, new_tokens: int) -> dict[str, Any]:
    prompts = [bench.tokenizer(request.args[0])["input_ids"] for request in instances(task, count)]
    limits = Limits(new_tokens, lambda tokens: tokens[-1] == bench.tokenizer.eos_token_id)

    def ours(variants: Any = bench.without_each) -> Any:
        return generate_variants(bench.edited, bench.decoder, prompts, variants, limits, batch_size=len(prompts))

    def loop() -> Any:
        return [written(bench.cut(layer), bench.tokenizer, prompts, new_tokens) for layer in bench.layers]

    figures, texts, theirs = bench.pairs(ours, loop)
    (intact,) = ours([INTACT])
    equal = [a == b for pair in zip(texts, theirs, strict=True) for a, b in zip(*pair, strict=True)]
    with patch.object(variant_generation, "DRAFT_TOKENS", {}):  # the intact model's whole text, whatever the device
        drafting_s, _, _ = timed(ours)
    return {
        **figures,
        "equal_texts": f"{sum(equal)} of {len(equal)}",
        "tokens_from_the_draft": round(drafted(intact, texts), 3),
        "with_whole_drafts_s": round(drafting_s, 2),
        "target": "3 times",
    }


def parts(bench: BesideLoop) -> dict[str, Any]:
    parts: tuple[ComponentPart, ...] = ("skip_prompt", "skip_written")
    return {part: {task: parts_of(bench, part, task) for task in ("continuation", "generation")} for part in parts}


def parts_of(bench: BesideLoop, part: ComponentPart, protocol: str) -> dict[str, Any]:
    asked = instances(f"knowledge_{protocol}", bench.arguments.questions)
    lm = VariantsLM(bench.edited, bench.tokenizer, bench.without_each, 8)
    limits = Limits(8, lambda tokens: tokens[-1] == bench.tokenizer.eos_token_id)

    def swept(variants: Sequence[Variant]) -> Any:
        if protocol == "generation":
            prompts = [bench.tokenizer(request.args[0])["input_ids"] for request in asked]
            return generate_variants(bench.edited, bench.decoder, prompts, variants, limits, batch_size=8)
        pairs = [lm._encode_pair(*request.args) for request in asked]
        encoded = [(tuple(context), tuple(option)) for context, option in pairs]
        return score_variants(bench.edited, bench.decoder, encoded, variants, batch_size=8)

    skips = [variant(f"{part} {layer}", [(layer, LayerEdit(part))]) for layer in bench.layers]
    figures, _, _ = bench.pairs(lambda: swept([INTACT, *skips]), lambda: swept([INTACT, *bench.without_each]))
    return {"questions": bench.arguments.questions, **figures, "target": 1.0}


def drafted(intact: Sequence[list[int]], texts: Sequence[Sequence[list[int]]]) -> float:
    """Share of all variants' tokens that were read in the intact model's text and not written one by one."""
    pairs = [(text, draft) for variant in texts for text, draft in zip(variant, intact, strict=True)]
    same = [sum(itertools.takewhile(bool, map(int.__eq__, text, draft))) for text, draft in pairs]
    # the first token that differs comes out of the reading too
    read = sum(min(count + 1, len(text)) for count, (text, _) in zip(same, pairs, strict=True))
    return read / sum(len(text) for text, _ in pairs)


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**padded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = output[:, padded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


def sleb(bench: BesideLoop) -> dict[str, Any]:
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
    task = load_tasks([task_name])[task_name]
    task.build_all_requests(limit=count)
    return task.instances


def difference(ours: Sequence[Sequence[Any]], loop: Sequence[Sequence[Any]]) -> float:
    """In nats, over all requests and layers."""
    return max(map(largest_difference, ours, loop))


PARTS = {
    "hidden": hidden,
    "text": text,
    "choices": choices,
    "generation": generation,
    "parts": parts,
    "sleb": sleb,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What measuring costs beside one cut model at a time")
    parser.add_argument("--tokens", type=int, default=8192, help="of the hidden part")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--drops", type=int, default=3)
    print_parts(BesideLoop, PARTS, parser, questions=6)


if __name__ == "__main__":
    main()

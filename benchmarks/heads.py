"""What masking the heads that copy costs, against as many others, and how much of a layer's loss its heads explain.

    python benchmarks/heads.py runs/heads [--model demo:smollm2-135m] [--share 0.02] [--draws 10] [--layer 16]

The run directory holds heads.json (recipe: measure.heads). Answers are those of look-ups that the scores were not made
on: the share that the model still answers right, and the log-likelihood of the right answer, in nats. "Random" masks
as many other heads, drawn anew each time. Printed as Markdown.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from shoal.artifacts.heads import Heads
from shoal.compress.edits.layer_edits import layer_edits
from shoal.compress.heads.prompts import copy_prompts
from shoal.compress.variants.variants import INTACT, Edited, Variant, score_variants, variant_of
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import Score
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.recipe.edits import Component

OTHER_SEED = 1000
"""Added to the run's seed: other items than those that the scores were made on."""


def masked(name: str, heads: Iterable[tuple[int, int]], model: PreTrainedModel) -> Variant:
    components = [Component((layer,), "head", head) for layer, head in heads]
    return Variant(name, layer_edits(components, model))


def variants_of(heads: Heads, model: PreTrainedModel, arguments: argparse.Namespace) -> Iterator[Variant]:
    ranked, scores = list(heads.ranked), heads.scores
    count = max(1, round(arguments.share * len(ranked)))
    top, others, rng = ranked[:count], ranked[count:], random.Random(0)
    yield INTACT
    yield masked(f"top {count} heads", top, model)
    for draw in range(arguments.draws):
        yield masked(f"random {draw}", rng.sample(others, count), model)
    for layer in arguments.layer:
        yield variant_of(Component((layer,)), model)
        yield variant_of(Component((layer,), "attention"), model)
        yield variant_of(Component((layer,), "mlp"), model)
        order = sorted(range(len(scores[layer])), key=lambda head: -scores[layer][head])
        for head in order:
            yield masked(f"head {layer}.{head}, score {scores[layer][head]:.2f}", [(layer, head)], model)


def row(name: str, answers: Sequence[Sequence[Score]]) -> str:
    """Means over the answers of one variant, or over those of several."""
    right = [statistics.mean(is_first for _, is_first in own) for own in answers]
    nats = [statistics.mean(log_prob for log_prob, _ in own) for own in answers]
    spread = f" ({min(right):.2f} to {max(right):.2f})" if len(answers) > 1 else ""
    return f"| {name} | {statistics.mean(right):.2f}{spread} | {statistics.mean(nats):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--layer", type=int, nargs="*", default=[])
    parser.add_argument("--num-each", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    heads, folder = Heads.read(arguments.run / Heads.FILE), resolve_model(arguments.model)
    inputs = heads.provenance.inputs
    assert inputs["model"] == model_fingerprint(folder), "heads.json is another model's"
    model, tokenizer = load_model(folder, dtype=inputs["dtype"]), load_tokenizer(folder)
    prompts = copy_prompts(("retrieval",), arguments.num_each, tokenizer, seed=inputs["seed"] + OTHER_SEED)["retrieval"]
    requests = [(one.input_ids[: -len(one.needle)], one.answer) for one in prompts]
    variants = list(variants_of(heads, model, arguments))
    answers = score_variants(Edited(model), Decoder(model), requests, variants, batch_size=arguments.batch_size)
    answers_of = {variant.name: own for variant, own in zip(variants, answers, strict=True)}
    drawn = [own for name, own in answers_of.items() if name.startswith("random ")]
    print(f"{len(requests)} look-ups of 8 to 32 pairs\n\n| masked | right | log-likelihood |\n| --- | --- | --- |")
    for name, own in answers_of.items():
        if not name.startswith("random "):
            print(row("nothing" if name == INTACT.name else name, [own]))
        elif name == "random 0":
            print(row(f"as many others, {len(drawn)} draws", drawn))
    order = sorted(range(heads.num_layers), key=lambda layer: -heads.layer_scores[layer])
    listed = ", ".join(f"{layer} ({heads.layer_scores[layer]:.2f})" for layer in order if heads.layer_scores[layer])
    print(f"\nlayers by retrieval score: {listed}\n90 % of it: {heads.layers_holding(0.9)}")
    for patched in heads.patched:
        best = sorted(
            ((effect, layer, head) for layer, own in enumerate(patched.effects) for head, effect in enumerate(own)),
            reverse=True,
        )[:6]
        place = "{1}.{2}" if patched.site == "head" else "{1}"
        told = ", ".join(f"{place.format(*one)} ({one[0]:.2f})" for one in best)
        if patched.site != "residual":
            print(f"another {patched.twin}, patched {patched.site}, {patched.group}: {told}")
        else:
            by_layer = " ".join(f"{own[0]:.2f}" for own in patched.effects)
            print(f"another {patched.twin}, patched residual, {patched.group}: {by_layer}")


if __name__ == "__main__":
    main()

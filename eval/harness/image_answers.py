"""Nats per token of answers about images, row by row, so that two models can be paired on the same rows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.data.image_rows import Asked, ImageReader, image_rows_fingerprint, load_image_rows, on_device
from shoal.models.load import load_processor
from shoal.progress import each
from shoal.recipe.section import ImageRows
from shoal.runtime import together

from .engine import CausalLM
from .samples import likelihood_score


def image_answers(lm: CausalLM, model: PreTrainedModel, settings: ImageRows) -> TaskScore:
    """Mean negative log-likelihood per token of the answers of rows of images, and of what ends them.

    The processor beside the model's weights makes its inputs. Items are rows, weighted by their tokens; every one takes
    a forward of its own, tower included. Ranks share the rows, and answers in ``lm.items`` are not asked again.

    Raises:
        UserError: as load_image_rows, load_processor and ImageReader.asked do.
    """
    rows = load_image_rows(settings, "eval.images")
    reader = ImageReader(load_processor(Path(str(model.name_or_path))), model.config, {})
    ids = [f"{number}-{image_rows_fingerprint([row])}" for number, row in enumerate(rows)]
    own = range(lm.rank, len(rows), lm.world_size)
    keys = {number: f"image {ids[number].partition('-')[2]}" for number in own}
    unknown = lm.items.missing([keys[number] for number in own])
    for number in each([own[index] for index in unknown], "eval: images", unit="rows"):
        lm.items.add([keys[number]], [_nats(model, reader.asked(rows[number]))])
    answers = {number: lm.items[key] for number, key in keys.items()}
    totals = {number: answer for part in together(lambda: answers) for number, answer in part.items()}
    ordered = [totals[number] for number in range(len(rows))]
    items = tuple(ItemScore(ids[number], nats / tokens, weight=tokens) for number, (nats, tokens) in enumerate(ordered))
    return likelihood_score(
        items,
        task="images",
        ability="images",
        protocol="worked",
        version="1.0",
        prompts=image_rows_fingerprint(rows),
    )


@torch.no_grad()
def _nats(model: PreTrainedModel, item: Asked) -> list[float]:
    """Nats of the whole answer, and its number of tokens."""
    inputs = on_device(item.inputs, model.device, model.dtype)
    logits_NV = model(**inputs, use_cache=False).logits[0, -item.num_answer - 1 : -1]
    targets_N = inputs["input_ids"][0, -item.num_answer :]
    return [cross_entropy(logits_NV.double(), targets_N, reduction="sum").item(), float(item.num_answer)]

"""Contract 1 on one tiny model: what a cut gives in memory and on disk is what the teacher gives with layers skipped.

test_architectures.py calls `examine` for every row of architectures.py; `python tests/support/exactness.py` writes what
it says, every cut saved and reloaded, to docs/reference/families.csv.
"""

from __future__ import annotations

import csv
import random
import re
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, NOT_CUT, SLIDING_WINDOW, tiny_model
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from shoal.compress.surgery.cut_model import cut_model, kept_layers, skipped
from shoal.compress.surgery.proof import prove_by_files
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers, text_config
from shoal.models.checkpoint_files import KEPT_LAYERS
from shoal.models.load import align_weights, load_model

LENGTH = 3 * SLIDING_WINDOW
PROMPT = SLIDING_WINDOW + 3
NEW_TOKENS = 3
NUM_MULTI_DROPS = 4
NUM_MULTI_DROPS_WITH_IMAGES = 10
PLAIN, LEFT, RIGHT = range(3)
"""Rows of every batch: without padding, padded on the left, padded on the right."""


DOCUMENT = Path(__file__).parents[2] / "docs/reference/families.csv"
HEAD = ("family", f"cuts (transformers {transformers.__version__})", "layers", "heads", "changed settings", "remarks")


@dataclass(frozen=True)
class Finding:
    """What `examine` found, as docs/reference/families.csv reports it."""

    num_exact: int
    num_refused: int
    refusal: str
    """The first refusal's message; empty if there was none."""
    fields: tuple[str, ...]
    """Configuration fields that the cuts changed, besides the number of layers."""
    heads: tuple[str, ...]
    """Heads that were examined: apart from the embeddings, tied to them."""
    kinds: tuple[str, ...]
    """Kinds of layers in the tiny model."""


def batch(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random token ids (3, length) and the attention mask of a plain, a left-padded and a right-padded row."""
    input_ids = torch.randint(0, 90, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(input_ids)
    mask[LEFT, :5] = 0
    mask[RIGHT, -4:] = 0
    return input_ids, mask


def batch_with_image(name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Text of row ``name`` around one random image, as its processor would hand it to ``model``."""
    generator = torch.Generator().manual_seed(3)
    row, ids = ARCHITECTURES[name], torch.randint(0, 90, (1, PROMPT), generator=generator)
    found = {
        key: torch.rand(given["random"], generator=generator) if isinstance(given, dict) else torch.tensor(given)
        for key, given in row.images.items()
    }
    if "aspect_ratio_ids" in found:  # the image stands beside the text, seen from the third token on
        seen = torch.zeros(1, PROMPT, 1, 4, dtype=torch.long)
        seen[:, 2:, :, :2] = 1
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **found, "cross_attention_mask": seen}
    with torch.inference_mode():
        features: Any = model.get_image_features(**found)  # pyright: ignore[reportCallIssue]
    count = sum(part.flatten(0, -2).shape[0] for part in features.pooler_output)
    image = torch.full((1, count), model.config.image_token_id)
    ids = torch.cat([ids[:, :2], image, ids[:, 2:]], dim=1)
    kinds = (ids == model.config.image_token_id).long()
    if "image_grid_thw" in found:
        found["mm_token_type_ids"] = kinds
    elif model.config.model_type in ("gemma3", "paligemma"):  # of PaliGemma what is not 0 is the answer
        found["token_type_ids"] = kinds if model.config.model_type == "gemma3" else torch.zeros_like(kinds)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **found}


def inputs(name: str, model: PreTrainedModel, length: int, seed: int) -> list[dict[str, Tensor]]:
    """What a model of row ``name`` is asked: the rows of `batch`, and text around an image where it reads images."""
    input_ids, mask = batch(length, seed)
    text = {"input_ids": input_ids, "attention_mask": mask}
    return [text, batch_with_image(name, model)] if ARCHITECTURES[name].images else [text]


@torch.inference_mode()
def logits(name: str, model: PreTrainedModel) -> Tensor:
    """Logits of all tokens that are no padding."""
    asked = inputs(name, model, LENGTH, seed=1)
    return torch.cat([model(**one, use_cache=False).logits[one["attention_mask"].bool()] for one in asked])


def greedy_text(name: str, model: PreTrainedModel, *, use_cache: bool) -> list[list[int]]:
    def text(one: dict[str, Tensor]) -> list[list[int]]:
        written: Any = model.generate(  # pyright: ignore[reportCallIssue]
            **one,
            use_cache=use_cache,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=-1,
            no_repeat_ngram_size=1,  # random weights like to repeat one token; equal dull texts mean little
        )
        return written[:, one["input_ids"].shape[1] :].tolist()

    return [row for one in inputs(name, model, PROMPT, seed=2) for row in text(one)]


@dataclass(frozen=True)
class Outputs:
    """What one model says; equal for two models exactly when contract 1 holds between them."""

    logits: Tensor
    cached: list[list[int]]
    """Greedy text with a KV cache, one list per row of the batch, that around an image last."""

    def assert_equal(self, other: Outputs) -> None:
        assert torch.equal(self.logits, other.logits), (self.logits - other.logits).abs().max()
        assert self.cached == other.cached


def outputs(name: str, model: PreTrainedModel) -> Outputs:
    return Outputs(logits(name, model), greedy_text(name, model, use_cache=True))


def drops(name: str, num_layers: int) -> list[tuple[int, ...]]:
    """Every single layer, a few random sets of layers, and those the row asks for."""
    generator, row = random.Random(name), ARCHITECTURES[name]
    multi = [
        tuple(sorted(generator.sample(range(num_layers), generator.randint(2, num_layers - 2))))
        for _ in range(NUM_MULTI_DROPS)
    ]
    if row.images:
        several = [drop for size in range(2, num_layers - 1) for drop in combinations(range(num_layers), size)]
        multi = generator.sample(several, NUM_MULTI_DROPS_WITH_IMAGES)
    return list(dict.fromkeys([*((layer,) for layer in range(num_layers)), *multi, *map(tuple, row.drops)]))


def examine(name: str, *, save_all: bool = False) -> Finding:
    """Cut the tiny model of row ``name`` in many ways and assert contract 1 for each.

    Without a cache all compute logits, and the first writes text. The first and those of several layers, of many some,
    are saved and reloaded; of the others the configuration is. With ``save_all`` every cut is treated as the first.

    Raises:
        AssertionError: a cut that is not exact, or is refused though the row does not say so, or the other way round.
    """
    row = ARCHITECTURES[name]
    teacher = tiny_model(name)
    before, config = {key: value.clone() for key, value in teacher.state_dict().items()}, teacher.config.to_dict()
    exact: dict[tuple[int, ...], Outputs] = {}
    refusals: list[str] = []
    num_saved = 0
    fields: set[str] = set()
    for drop in drops(name, text_config(teacher.config).num_hidden_layers):
        try:
            student = cut_model(teacher, drop)
        except UserError as error:
            refusals.append(f"{drop}: {error}")
            continue
        with skipped(teacher, drop):
            expected = outputs(name, teacher)
        outputs(name, student).assert_equal(expected)
        if save_all or not exact:
            uncached = expected.cached
            if row.padding or row.cache:
                with skipped(teacher, drop):
                    uncached = greedy_text(name, teacher, use_cache=False)
            assert greedy_text(name, student, use_cache=False) == uncached
        if save_all or not exact or (len(drop) > 1 and num_saved <= NUM_MULTI_DROPS + len(row.drops)):
            num_saved += 1
            _assert_survives_disk(name, teacher, drop, student, expected)
        else:
            _assert_config_survives_disk(student)
        exact[drop] = expected
        fields |= _changed(teacher, student)
    assert bool(refusals) == bool(row.refuses), refusals
    assert all(re.search(row.refuses, refusal) for refusal in refusals), refusals
    _assert_different(list(exact.values()))
    heads = _examine_heads(name, teacher, next(iter(exact))) if exact else ()
    assert teacher.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    return Finding(
        num_exact=len(exact),
        num_refused=len(refusals),
        refusal=next(iter(refusals), "").partition(": ")[2],
        kinds=_kinds(teacher) if exact else (),
        fields=tuple(sorted(fields)),
        heads=heads,
    )


def _assert_different(found: list[Outputs]) -> None:
    """Outputs that no cut changes would prove nothing by being equal."""
    assert len({one.logits.double().sum().item() for one in found}) == len(found)
    assert 2 * len({str(one.cached) for one in found}) >= len(found)


def _assert_survives_disk(
    name: str, teacher: PreTrainedModel, drop: tuple[int, ...], student: PreTrainedModel, expected: Outputs
) -> None:
    with TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        prove_by_files(Path(folder), teacher, kept_layers(len(decoder_layers(teacher)), drop))
        reloaded = load_model(Path(folder), attention=None)
        align_weights(reloaded)
        outputs(name, reloaded).assert_equal(expected)
        saved = Path(folder, "config.json").read_text()
        reloaded.config.save_pretrained(folder)
        assert Path(folder, "config.json").read_text() == saved
    assert is_tied(reloaded) == is_tied(student)


def _assert_config_survives_disk(student: PreTrainedModel) -> None:
    with TemporaryDirectory() as folder:
        student.config.save_pretrained(folder)
        saved = Path(folder, "config.json").read_text()
        AutoConfig.from_pretrained(folder).save_pretrained(folder)
        assert Path(folder, "config.json").read_text() == saved


def _examine_heads(name: str, teacher: PreTrainedModel, drop: tuple[int, ...]) -> tuple[str, ...]:
    """Cut the family's other kind of model too, with or without a head of its own, where there is one."""
    names = {True: "tied", False: "apart"}
    try:
        other = tiny_model(name, tie_word_embeddings=not is_tied(teacher))
    except (StrictDataclassError, ValueError):  # DBRX forbids it, and of Zamba transformers cannot build it
        return (names[is_tied(teacher)],)
    if is_tied(other) == is_tied(teacher):
        return (names[is_tied(teacher)],)
    student = cut_model(other, drop)
    with skipped(other, drop):
        expected = outputs(name, other)
    assert is_tied(student) == is_tied(other)
    outputs(name, student).assert_equal(expected)
    _assert_survives_disk(name, other, drop, student, expected)
    return tuple(sorted(names.values()))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head are one parameter."""
    parts = anatomy(model)
    weights = [getattr(part, "weight", None) for part in (parts.embeddings, parts.head)]
    return weights[0] is not None and weights[0] is weights[1]


def _changed(teacher: PreTrainedModel, student: PreTrainedModel) -> set[str]:
    """Names of the settings in which the two differ, as they are saved."""
    old, new = (text_config(model.config).to_dict() for model in (teacher, student))
    fields = (old.keys() | new.keys()) - teacher.config.sub_configs.keys()
    changed = {field for field in fields if old.get(field) != new.get(field)}
    num_layers = text_config(teacher.config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return changed - {KEPT_LAYERS, "architectures", "dtype", num_layers}


def _kinds(model: PreTrainedModel) -> tuple[str, ...]:
    """What the layers of ``model`` are, one phrase per kind, in order of appearance."""
    config, layers = text_config(model.config), decoder_layers(model)
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    phrases = []
    for layer, kind in zip(layers, types, strict=True):
        sparse = any("expert" in name for name, _ in layer.named_modules())
        phrases.append(kind.replace("_", " ") + (", experts" if sparse else ""))
    return tuple(dict.fromkeys(phrases))


def document_row(name: str, found: Finding) -> list[str]:
    """The row of families.csv for ``name``."""
    num_cuts = found.num_exact + found.num_refused
    status = "exact" if not found.num_refused else f"{found.num_exact} of {num_cuts} exact" if found.num_exact else "no"
    row = ARCHITECTURES[name]
    remarks = [
        "with and without an image" if row.images else "",
        f"error, for example: {found.refusal}" if found.refusal else "",
        f"padded rows are not compared with and without cache: {row.padding}" if row.padding else "",
        f"text is not compared with and without cache: {row.cache}" if row.cache else "",
    ]
    told = ". ".join(filter(None, remarks))
    return [name, status, "; ".join(found.kinds), ", ".join(found.heads), ", ".join(found.fields), told]


def document(rows: dict[str, list[str]]) -> list[list[str]]:
    """All rows of families.csv; ``rows`` are those of the families that can be cut."""
    others = {name: [name, "not cut", "", "", "", reason] for name, reason in NOT_CUT.items()}
    return [[*HEAD], *(own for _, own in sorted({**rows, **others}.items()))]


def documented_rows() -> dict[str, list[str]]:
    """The rows of families.csv by family."""
    with DOCUMENT.open(encoding="utf-8", newline="") as file:
        return {row[0]: row for row in csv.reader(file)}


if __name__ == "__main__":
    examined = {name: document_row(name, examine(name, save_all=True)) for name in sys.argv[1:] or ARCHITECTURES}
    known = {name: row for name, row in documented_rows().items() if name in ARCHITECTURES}
    with DOCUMENT.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(document(known | examined))

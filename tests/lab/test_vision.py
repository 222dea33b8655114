"""What images say of layers and states, against the definitions.

Covers: shoal.data.image_rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CLIP, SIGLIP, tiny_model
from exactness import batch_with_image
from image_models import image_rows, llava_checkpoint

from shoal.compress.surgery.cut_model import cut_model
from shoal.data.image_rows import Asked, load_image_rows
from shoal.errors import UserError
from shoal.lab import vision
from shoal.lab.command import lab
from shoal.lab.vision import Vision, layer_scores, state_scores
from shoal.models.anatomy import decoder_layers, watched
from shoal.models.load import load_model
from shoal.recipe.section import DataSource

BLOCKS = 3


def family(name: str, entries: Any, tower: dict[str, Any] = CLIP, **text: Any) -> Any:
    return tiny_model(name, vision_feature_layer=entries, vision_config={**tower, "num_hidden_layers": BLOCKS}, **text)


def items_for(name: str, model: Any) -> list[Asked]:
    """Two rows: text around an image, and the same around its mirror image; the last three tokens are the answer."""
    given = batch_with_image(name, model)
    mirrored = {**given, "pixel_values": given["pixel_values"].flip(-1)}
    return [Asked(given, 3), Asked(mirrored, 3)]


@torch.inference_mode()
def loss_of(model: Any, item: Asked) -> float:
    chances = model(**item.inputs).logits[0].double().log_softmax(-1)
    tokens = item.inputs["input_ids"][0]
    return -sum(chances[place - 1, tokens[place]].item() for place in range(len(tokens) - 3, len(tokens))) / 3


def test_layers_are_worth_what_cut_models_lose() -> None:
    model = family("llava", -2)
    items = items_for("llava", model)
    influence, losses = layer_scores(model, items)
    cosines: list[list[torch.Tensor]] = [[] for _ in decoder_layers(model)]

    def after(layer: int, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        cosines[layer].append(torch.cosine_similarity(before[0].double(), output[0].double(), dim=-1))

    with watched(decoder_layers(model), after=after):
        expected = [[loss_of(model, item)] for item in items]
    for layer in range(len(cosines)):
        cut = cut_model(model, [layer])
        for own, item in zip(expected, items, strict=True):
            own.append(loss_of(cut, item))
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    similar = torch.stack([1 - torch.cat(cosine).mean() for cosine in cosines])
    torch.testing.assert_close(torch.tensor(influence).double(), similar, atol=1e-6, rtol=0)


READERS = [
    ("llava", -2, CLIP, lambda state: [state]),
    ("llava", [-2, 0], SIGLIP, lambda state: [state, 0]),
    ("llava_onevision", -1, {**SIGLIP, "vision_use_head": False}, lambda state: [state]),
    ("vipllava", [-3, -2, 0], CLIP, lambda state: [1, state, 0]),
]


@pytest.mark.prove
@pytest.mark.parametrize(("name", "entries", "tower", "other"), READERS)
def test_losses_are_those_of_models_that_read_another_state(
    name: str, entries: Any, tower: dict[str, Any], other: Any, tmp_path: Path
) -> None:
    model = family(name, entries, tower)
    items = items_for(name, model)
    _, losses = state_scores(model, items)
    assert model.config.vision_feature_layer == entries
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    expected = []
    for state in range(BLOCKS + 1):
        (tmp_path / "config.json").write_text(json.dumps({**settings, "vision_feature_layer": other(state)}))
        expected.append([loss_of(load_model(tmp_path), item) for item in items])
    torch.testing.assert_close(losses.T, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert len({round(value, 9) for value in losses[0].tolist()}) == BLOCKS + 1


@pytest.mark.prove
def test_similarity_is_the_mean_cosine_at_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "PLACES_AT_ONCE", 2)
    model = family("llava_next", -2)
    items = items_for("llava_next", model)
    cosines = []
    for item in items:
        pixels = item.inputs["pixel_values"].flatten(0, -4)  # tiles
        with torch.inference_mode():
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        flat = [state.flatten(0, 1).double() for state in states]
        cosines.append([[torch.cosine_similarity(one, two, dim=-1) for two in flat] for one in flat])
    states = range(BLOCKS + 1)
    expected = [[torch.cat([own[a][b] for own in cosines]).mean().item() for b in states] for a in states]
    similarity, _ = state_scores(model, items)
    assert torch.tensor(similarity).numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-6)


@pytest.mark.prove
def test_numbers_that_are_not_finite_are_refused() -> None:
    model = family("llava", -2)
    model.get_parameter("model.language_model.layers.2.mlp.down_proj.weight").data.fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        layer_scores(model, items_for("llava", model))


@pytest.mark.prove
def test_the_part_tells_of_layers_and_states(tmp_path: Path, teacher: Path) -> None:
    model, rows = llava_checkpoint(tmp_path / "llava"), image_rows(tmp_path / "rows")
    recipe = {"model": str(model), "run_dir": str(tmp_path / "run")}
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    said = lab(["vision", str(tmp_path / "my.yaml"), f"path={rows}"])
    found = Vision.load(tmp_path / "run/lab/vision.json")
    assert (found.num_rows, found.states_read, len(found.state_losses)) == (3, (1,), 3)
    assert f"answers: {found.answers.value:.3f} nats per token" in said
    assert lab(["vision", str(tmp_path / "my.yaml"), f"path={rows}"]) == said
    (tmp_path / "text.yaml").write_text(json.dumps({**recipe, "model": str(teacher), "run_dir": str(tmp_path / "t")}))
    with pytest.raises(UserError, match="reads no images"):
        lab(["vision", str(tmp_path / "text.yaml"), f"path={rows}"])


def test_rows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    rows = image_rows(tmp_path / "rows")
    good = {**json.loads(rows.read_text().splitlines()[0]), "image": str(rows.parent / "pictures/0.png")}
    torn = tmp_path / "torn.png"
    torn.write_bytes((rows.parent / "pictures/0.png").read_bytes()[:60])
    for changes, message in (
        ({"image": str(torn)}, r"row 1 of .*: .*torn.png cannot be read as an image"),
        ({"image": "no.png"}, r"row 1 of .*: .*no.png cannot be read as an image \(.*No such file"),
        ({"image": None}, r"row 1 of .*: names no image in column 'image'"),
        ({"answer": " "}, r"row 1 of .*: .* or no answer in 'answer'; every row needs all three"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, **changes}) + "\n")
        with pytest.raises(UserError, match=message):
            load_image_rows("x", DataSource(str(tmp_path / "bad.jsonl")), ("image", "prompt", "answer"), 9)
    with pytest.raises(UserError, match="has no column 'photo'; it has image, prompt, answer"):
        load_image_rows("x", DataSource(str(rows)), ("photo", "prompt", "answer"), 9)

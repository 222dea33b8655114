"""States of vision towers against the definition: as transformers gives them, and models that read others.

Covers: shoal.artifacts.vision_states, shoal.figures.vision_states.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CLIP, SIGLIP, tiny_model
from exactness import batch_with_image
from image_models import image_rows, llava_checkpoint
from ranks import call_on_ranks, in_group

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.vision_states import VisionStates
from shoal.compress.metrics import vision_states
from shoal.compress.metrics.images import image_scores
from shoal.compress.metrics.vision_states import score_vision_states
from shoal.compress.surgery.vision_tower import tower_blocks
from shoal.data.image_rows import Asked
from shoal.errors import UserError
from shoal.figures.style import save_figure
from shoal.figures.vision_states import vision_states_figure
from shoal.launch.verbs.measure import measure, measured
from shoal.launch.verbs.measure_checks import check_measure
from shoal.launch.verbs.run import Run, open_run, write_story
from shoal.models.load import load_model
from shoal.recipe.recipe import parse_recipe

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


READERS = [
    ("llava", -2, CLIP, lambda state: [state]),
    ("llava", [-2, 0], SIGLIP, lambda state: [state, 0]),
    ("llava_next", 1, CLIP, lambda state: [state]),
    ("llava_onevision", -1, {**SIGLIP, "vision_use_head": False}, lambda state: [state]),
    ("vipllava", [-3, -2, 0], CLIP, lambda state: [1, state, 0]),
]


@pytest.mark.parametrize(("name", "entries", "tower", "other"), READERS)
def test_losses_are_those_of_models_that_read_another_state(
    name: str, entries: Any, tower: dict[str, Any], other: Any, tmp_path: Path
) -> None:
    model = family(name, entries, tower)
    items = items_for(name, model)
    scores = score_vision_states(model, items, len(items))
    assert model.config.vision_feature_layer == entries
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    losses = []
    for state in range(BLOCKS + 1):
        (tmp_path / "config.json").write_text(json.dumps({**settings, "vision_feature_layer": other(state)}))
        reader = load_model(tmp_path)
        assert reader.config.vision_feature_layer == other(state)
        losses.append([loss_of(reader, item) for item in items])
    read = max(positive(entries))
    rises = torch.tensor(losses, dtype=torch.float64).T
    rises = rises - rises[:, read : read + 1]
    torch.testing.assert_close(torch.tensor(scores.losses.values).double(), rises.mean(0), atol=1e-6, rtol=0)
    errors = rises.std(0) / 2**0.5
    torch.testing.assert_close(torch.tensor(scores.losses.standard_errors).double(), errors, atol=1e-6, rtol=0)
    assert scores.losses.values[read] == 0
    assert len({round(value, 9) for value in scores.losses.values}) == BLOCKS + 1


def positive(entries: Any) -> list[int]:
    return [entry % (BLOCKS + 1) for entry in (entries if isinstance(entries, list) else [entries])]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_similarity_is_the_mean_cosine_at_one_place(name: str) -> None:
    model = family(name, -2, {**SIGLIP, "vision_use_head": False} if name == "llava_onevision" else CLIP)
    items = items_for(name, model)
    similarity = torch.tensor(score_vision_states(model, items, len(items)).similarity, dtype=torch.float64)
    cosines = []
    for item in items:
        pixels = item.inputs["pixel_values"].flatten(0, -4)  # tiles, where the family has them
        with torch.inference_mode():
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        flat = [state.flatten(0, 1).double() for state in states]
        cosines.append([[torch.cosine_similarity(one, two, dim=-1) for two in flat] for one in flat])
    expected = torch.tensor(
        [[torch.cat([own[a][b] for own in cosines]).mean() for b in range(BLOCKS + 1)] for a in range(BLOCKS + 1)]
    ).double()
    torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(BLOCKS + 1).double(), atol=1e-6, rtol=0)
    assert similarity.min() < 0.99
    assert len(tower_blocks(model)) == BLOCKS


def _score_on_rank(rank: int, ranks: int, folder: str) -> None:
    with in_group(rank, ranks, folder):
        model = family("llava", -2)
        items = items_for("llava", model)
        torch.save(vars(score_vision_states(model, items[rank::ranks], len(items))), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    call_on_ranks(_score_on_rank, str(tmp_path), ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second
    model = family("llava", -2)
    alone = score_vision_states(model, items_for("llava", model), 2)
    assert first["losses"].values == pytest.approx(alone.losses.values, abs=1e-6)
    assert torch.tensor(first["similarity"]).numpy() == pytest.approx(torch.tensor(alone.similarity).numpy(), abs=1e-6)


def _refuse_on_rank(rank: int, ranks: int, folder: str) -> None:
    with in_group(rank, ranks, folder):
        model = family("llava", -2)
        items = items_for("llava", model)

        def own() -> Iterator[Asked]:
            if rank == 1:
                raise UserError("row 1: cannot be read")
            yield items[0]

        for score in (score_vision_states, image_scores):
            with pytest.raises(UserError, match="row 1: cannot be read"):
                score(model, own(), len(items))


@pytest.mark.slow
def test_a_row_that_one_rank_refuses_is_refused_by_all(tmp_path: Path) -> None:
    call_on_ranks(_refuse_on_rank, str(tmp_path), ranks=2)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = family("llava", -2)
    items = items_for("llava", model)
    last: Any = tower_blocks(model)[-1]  # behind what is read
    with torch.no_grad():
        last.mlp.fc2.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"measure.vision_states: the loss of row 0 is not finite where state 3 of the"):
        score_vision_states(model, items, len(items))


def test_a_state_that_is_not_finite_where_nothing_reads_it_is_refused() -> None:
    model = family("llava", -2)
    last: Any = tower_blocks(model)[-1]

    def overflow(_: Any, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        state[:, 0] = float("inf")  # the class token, which the projector is not given
        return output

    last.register_forward_hook(overflow)
    with pytest.raises(UserError, match=r"measure.vision_states: state 3 of the vision tower is not finite; set dtype"):
        score_vision_states(model, items_for("llava", model), 2)


def test_places_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llava_next", -2)
    whole = score_vision_states(model, items_for("llava_next", model), 2).similarity
    monkeypatch.setattr(vision_states, "PLACES_AT_ONCE", 2)
    parts = score_vision_states(model, items_for("llava_next", model), 2).similarity
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), atol=1e-9, rtol=0)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_checkpoint(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_rows(tmp_path_factory.mktemp("rows"))


def run_of(model: Path, folder: Path, **settings: Any) -> Run:
    text = {"data": [{"path": "readmes"}], "num_tokens": 256, "sequence_length": 64, "metrics": ["block_influence"]}
    return open_run(parse_recipe({"model": str(model), "run_dir": str(folder), "measure": {**text, **settings}}))


def test_the_stage_writes_what_was_found_once(
    llava: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(llava, tmp_path / "run", vision_states={"path": str(rows), "num_rows": 2})
    with caplog.at_level(logging.INFO, logger="shoal"):
        measure(run)
    states = VisionStates.read(run.dir / VisionStates.FILE)
    assert (states.num_rows, states.states_read, len(states.losses)) == (2, (1,), 3)
    assert [row["state"] for row in states.rows()] == [0, 1, 2]
    assert states.rows()[1] == {"state": 1, "similarity_to_read": pytest.approx(1), "loss": 0.0, "loss_error": 0.0}
    assert (
        "states of the vision tower over 2 rows: 1 of 2 is read; in place of 1 an answer loses by state" in caplog.text
    )
    assert "a projector is trained for it, which shoal does not do" in caplog.text
    assert (run.dir / "figures/vision_states.svg").is_file()
    written = (run.dir / VisionStates.FILE).read_bytes()
    measure(run)
    assert (run.dir / VisionStates.FILE).read_bytes() == written
    write_story(run)
    assert VisionStates.FILE in json.loads((run.dir / "run.json").read_text())["stages"]
    one = run_of(llava, tmp_path / "run", vision_states={"path": str(rows), "num_rows": 1})
    assert measured(one)["vision states"][1] != measured(run)["vision states"][1]
    assert measured(one)["measure"][1] == measured(run)["measure"][1]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="shoal"):
        measure(one)
    assert "block_influence over" not in caplog.text  # no text is read again
    alone = VisionStates.read(run.dir / VisionStates.FILE)
    assert (alone.num_rows, alone.errors) == (1, (None, None, None))
    assert "+/-" not in alone.in_words()


def test_what_has_no_known_states_is_refused_at_once(llava: Path, rows: Path, teacher: Path, tmp_path: Path) -> None:
    def refused(match: str, model: Path, **settings: Any) -> None:
        given = {"vision_states": {"path": str(rows)}, **settings}
        with pytest.raises(UserError, match=match):
            check_measure(run_of(model, tmp_path / "run", **given))

    check_measure(run_of(llava, tmp_path / "run", vision_states={"path": str(rows)}))
    refused(r"measure.vision_states: .* reads no images; leave it out", teacher)
    refused(r"measure.vision_states: takes the whole model in memory", llava, memory_gb=1e-5)
    refused(r"data 'none.jsonl': no such file", llava, vision_states={"path": "none.jsonl"})
    other = tmp_path / "other"
    other.mkdir()
    for file in llava.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llava / "config.json").read_text())
    settings["vision_config"]["model_type"] = "pixtral"
    (other / "config.json").write_text(json.dumps(settings))
    refused(
        r"does not know which states of its vision tower .*other \(llava\) reads; leave it out \(known: llava,", other
    )


def states(**changes: Any) -> VisionStates:
    similarity = ((1.0, 0.5, 0.25), (0.5, 1.0, 0.75), (0.25, 0.75, 1.0))
    given: dict[str, Any] = {"losses": (1.5, 0.0, -0.25), "errors": (0.5, 0.0, 0.125), "similarity": similarity}
    return VisionStates(Provenance({}), **{"states_read": (1, 0), "num_rows": 4, **given, **changes})


def test_the_figure_shows_every_state_and_is_the_same_every_time(tmp_path: Path) -> None:
    svg = save_figure(vision_states_figure(states()), tmp_path / "states.svg").decode()
    assert "the state read in place of 1" in svg
    assert save_figure(vision_states_figure(states()), tmp_path / "again.svg").decode() == svg
    other = save_figure(vision_states_figure(states(losses=(1.0, 0.0, 0.5))), tmp_path / "other.svg").decode()
    assert other != svg


def test_words_name_the_cheapest_first() -> None:
    assert (
        states()
        .in_words()
        .startswith(
            "states of the vision tower over 4 rows: 1, 0 of 2 are read; in place of 1 an answer loses by state "
            "2 -0.250 +/- 0.245, 0 +1.500 +/- 0.980 nats. The projector was trained"
        )
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"states_read": (3,)}, "states_read"),
        ({"states_read": ()}, "states_read"),
        ({"errors": (None,)}, "errors"),
        ({"similarity": ((1.0,),)}, "similarity"),
        ({"losses": (0.0,)}, "losses"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    states(**changes).write(tmp_path / "states.json")
    with pytest.raises(UserError, match=rf"states.json: {problem}: .*; delete it"):
        VisionStates.read(tmp_path / "states.json")

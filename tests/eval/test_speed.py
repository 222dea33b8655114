"""Speed and size: who takes a turn when, memory that is really held, and what the layer count lets expect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint, tiny_model

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Speed
from shoal.eval import speed
from shoal.eval.speed import measure_speed, peak_growth
from shoal.inference.decoder import Decoder
from shoal.launch.verbs import evaluate
from shoal.launch.verbs.run import open_run
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.recipe import parse_recipe


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    """Turns of a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "PROMPT_TOKENS", 16)
        patch.setattr(speed, "NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Speed:
    """A teacher of six layers and a cut model of four."""
    folder = tmp_path_factory.mktemp("speed")
    whole = tiny_checkpoint(folder / "whole", "llama")
    cut = tiny_checkpoint(folder / "cut", "llama", num_hidden_layers=4)
    checkpoints = {role: Checkpoint.read(at, LoadSettings()) for role, at in (("teacher", whole), ("pruned", cut))}
    return measure_speed(checkpoints, provenance=Provenance({}), batch_sizes=(3, 1))


@pytest.mark.slow
def test_every_role_is_measured_at_every_batch_size(measured: Speed, tmp_path: Path) -> None:
    assert measured.batch_size == 1
    for score in measured.roles.values():
        assert [batch.batch_size for batch in score.batches] == [1, 3]
        assert score.decode_tokens_per_s == score.batches[0].decode_tokens_per_s
        for batch in score.batches:
            rounds = speed.REPEATS if batch.batch_size == 1 else speed.FEWER_REPEATS
            assert {kind: len(values) for kind, values in batch.samples.items()} == dict.fromkeys(speed.KINDS, rounds)
            assert min(batch.samples["prefill"]) <= batch.prefill_tokens_per_s <= max(batch.samples["prefill"])
            times = [16 * batch.batch_size / rate for rate in batch.samples["prefill"]]
            assert batch.samples["first_token"] == pytest.approx(times)
    measured.save(tmp_path / "speed.json")
    assert Speed.load(tmp_path / "speed.json") == measured


@pytest.mark.slow
def test_sizes_are_those_of_the_formulas(measured: Speed) -> None:
    for role, layers in (("teacher", 6), ("pruned", 4)):
        score = measured.roles[role]
        assert score.num_layers == layers
        assert score.kv_bytes_per_token == layers * 2 * 2 * 8 * 4  # keys and values, 2 heads of width 8, fp32
        assert score.num_parameters == sum(
            p.numel() for p in tiny_model("llama", num_hidden_layers=layers).parameters()
        )


@pytest.mark.slow
def test_memory_is_weights_cache_and_what_is_under_way(measured: Speed) -> None:
    for role, layers in (("teacher", 6), ("pruned", 4)):
        weights = 4 * (measured.roles[role].num_parameters or 0)
        for batch in measured.roles[role].batches:
            cache = batch.batch_size * (16 + 4) * layers * 2 * 2 * 8 * 4
            assert batch.peak_memory_bytes is not None
            assert weights + cache < batch.peak_memory_bytes < weights + cache + 300_000 * batch.batch_size


def test_peak_growth_is_what_tensors_hold_at_the_fullest_moment() -> None:
    kept = torch.zeros(1000)

    def work() -> None:
        first = torch.zeros(250_000)
        second = first + 1
        del first
        kept.copy_((second[:1000] + torch.zeros(1000)).clone())

    assert peak_growth(torch.device("cpu"), work) == pytest.approx(2_000_000, abs=2000)


@pytest.mark.slow
def test_roles_take_turns_and_none_is_always_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns: list[str] = []
    original = speed._one_turn

    def noting(decoder: Any, *sizes: int) -> tuple[float, float]:
        turns.append(type(decoder.model).__name__[0])
        return original(decoder, *sizes)

    monkeypatch.setattr(speed, "_one_turn", noting)
    kinds = {"teacher": "llama", "pruned": "gemma3"}
    checkpoints = {
        role: Checkpoint.read(tiny_checkpoint(tmp_path, kind), LoadSettings()) for role, kind in kinds.items()
    }
    measure_speed(checkpoints, provenance=Provenance({}), batch_sizes=(1,))
    assert "".join(turns) == "LG" + "LGGLLGGLLG"


def test_a_run_goes_on_where_its_speed_cannot_be_measured(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After hours of healing and scoring a recurrent model without a cache still gets its report."""
    run = open_run(parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run")}))
    made = Decoder.__init__

    def without_cache(self: Decoder, *args: Any) -> None:
        made(self, *args)
        self.can_branch = False

    monkeypatch.setattr(Decoder, "__init__", without_cache)
    evaluate._speed(run, {"teacher": Checkpoint.read(teacher, LoadSettings())})
    assert "the speed is not measured. speed: teacher keeps no cache of keys and values" in caplog.text
    assert not (run.dir / Speed.FILE).exists()

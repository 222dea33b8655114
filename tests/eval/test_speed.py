"""Speed and size: who takes a turn when, memory that is really held, and what the layer count lets expect."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_LAYERS, tiny_checkpoint, tiny_config, tiny_model

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.speed import Speed
from shoal.compress.surgery.cut_model import cut_model
from shoal.errors import UserError
from shoal.eval import speed
from shoal.eval.speed import expectation, measure_speed, peak_growth
from shoal.inference.decoder import Decoder
from shoal.launch.verbs import evaluate
from shoal.launch.verbs.run import open_run
from shoal.models.cost import model_cost
from shoal.models.load import Checkpoint, LoadSettings, without_data
from shoal.recipe.recipe import parse_recipe

SHORT: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 4}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Speed:
    """A teacher of six layers and a cut model of four."""
    folder = tmp_path_factory.mktemp("speed")
    whole = tiny_checkpoint(folder / "whole", "llama")
    cut = tiny_checkpoint(folder / "cut", "llama", num_hidden_layers=4)
    checkpoints = {role: Checkpoint.read(at, LoadSettings()) for role, at in (("teacher", whole), ("pruned", cut))}
    return measure_speed(checkpoints, provenance=Provenance({}), batch_sizes=(3, 1), repeats=2, **SHORT)


@pytest.mark.slow
def test_every_role_is_measured_at_every_batch_size(measured: Speed, tmp_path: Path) -> None:
    assert measured.batch_size == 1
    for score in measured.roles.values():
        assert [batch.batch_size for batch in score.batches] == [1, 3]
        assert score.decode_tokens_per_s == score.batches[0].decode_tokens_per_s
        for batch in score.batches:
            assert {kind: len(values) for kind, values in batch.samples.items()} == dict.fromkeys(speed.KINDS, 2)
            assert min(batch.samples["prefill"]) <= batch.prefill_tokens_per_s <= max(batch.samples["prefill"])
            times = [16 * batch.batch_size / rate for rate in batch.samples["prefill"]]
            assert batch.samples["first_token"] == pytest.approx(times)
    measured.write(tmp_path / "speed.json")
    assert Speed.read(tmp_path / "speed.json") == measured


@pytest.mark.slow
def test_sizes_are_those_of_the_formulas_and_the_cut_models_are_expected(measured: Speed) -> None:
    for role, layers in (("teacher", 6), ("pruned", 4)):
        score = measured.roles[role]
        assert score.num_layers == layers
        assert score.kv_bytes_per_token == layers * 2 * 2 * 8 * 4  # keys and values, 2 heads of width 8, fp32
        assert score.num_parameters == sum(
            p.numel() for p in tiny_model("llama", num_hidden_layers=layers).parameters()
        )
    teacher, pruned = measured.roles["teacher"], measured.roles["pruned"]
    assert teacher.expected == {}
    assert pruned.expected["num_parameters"] == pruned.num_parameters
    assert pruned.expected["kv_bytes_per_token"] == pruned.kv_bytes_per_token
    assert pruned.expected["num_bytes"] == pytest.approx(pruned.num_bytes, rel=0.02)  # names in the file take room, too


@pytest.mark.slow
def test_memory_is_weights_cache_and_what_is_under_way(measured: Speed) -> None:
    for role, layers in (("teacher", 6), ("pruned", 4)):
        weights = 4 * (measured.roles[role].num_parameters or 0)
        for batch in measured.roles[role].batches:
            cache = batch.batch_size * (16 + 4) * layers * 2 * 2 * 8 * 4
            assert batch.peak_memory_bytes is not None
            assert weights + cache < batch.peak_memory_bytes < weights + cache + 300_000 * batch.batch_size
    for whole, cut in zip(measured.roles["teacher"].batches, measured.roles["pruned"].batches, strict=True):
        assert cut.expected["peak_memory_bytes"] == pytest.approx(cut.peak_memory_bytes, rel=0.03)
        assert whole.expected == {}


def test_peak_growth_is_what_tensors_hold_at_the_fullest_moment() -> None:
    kept = torch.zeros(1000)

    def work() -> None:
        first = torch.zeros(250_000)
        second = first + 1
        del first
        kept.copy_((second[:1000] + torch.zeros(1000)).clone())

    assert peak_growth(torch.device("cpu"), work) == pytest.approx(2_000_000, abs=2000)


def test_the_expectation_counts_multiplications_and_bytes() -> None:
    cost = model_cost(without_data(tiny_config("llama"), dtype=torch.float32))
    head, hidden, mlp, heads, kv, width = 272 * 32, 32, 48, 4, 2, 8
    weights = hidden * heads * width * 2 + hidden * kv * width * 2 + 3 * hidden * mlp
    norms = 2 * hidden

    def flops(layers: int) -> float:
        pairs = 16 * 17 / 2 * 2 * heads * 2 * width
        return 2 * 16 * (layers * (weights + norms) + hidden) + 2 * head + layers * pairs

    def read(layers: int, batch: int) -> float:
        return 4 * (layers * (weights + norms) + hidden + head) + batch * 18 * layers * 2 * kv * width * 4

    for layers in (1, 4, NUM_LAYERS):
        for batch in (1, 8):
            found = expectation(cost, layers, batch_size=batch, prompt_tokens=16, new_tokens=4, bytes_per_parameter=4)
            assert found == pytest.approx((flops(6) / flops(layers), read(6, batch) / read(layers, batch)))


def test_expected_speeds_are_the_teachers_scaled(measured: Speed) -> None:
    cost = model_cost(without_data(tiny_config("llama"), dtype=torch.float32))
    teacher, pruned = measured.roles["teacher"], measured.roles["pruned"]
    for whole, cut in zip(teacher.batches, pruned.batches, strict=True):
        width: dict[str, Any] = {"bytes_per_parameter": 4.0, "batch_size": cut.batch_size}
        prefill, decode = expectation(cost, 4, prompt_tokens=16, new_tokens=4, **width)
        assert 1.0 < prefill < 1.5
        assert 1.0 < decode < 1.5
        assert cut.expected["prefill_tokens_per_s"] == pytest.approx(whole.prefill_tokens_per_s * prefill)
        assert cut.expected["decode_tokens_per_s"] == pytest.approx(whole.decode_tokens_per_s * decode)
        assert cut.expected["first_token_s"] == pytest.approx(whole.first_token_s / prefill)


@pytest.mark.slow
def test_roles_take_turns_and_none_is_always_first(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    original = speed._one_turn

    def noting(decoder: Any, *sizes: int) -> tuple[float, float]:
        turns.append(type(decoder.model).__name__[0])
        return original(decoder, *sizes)

    monkeypatch.setattr(speed, "_one_turn", noting)
    models = {"teacher": tiny_model("llama"), "pruned": tiny_model("gemma3")}
    found = measure_speed(models, provenance=Provenance({}), batch_sizes=(1,), repeats=3, **SHORT)
    assert "".join(turns) == "LG" + "LGGLLG"
    assert found.roles["pruned"].num_bytes is None  # a model in memory has no files


def cut_half(model: Any) -> Any:
    return cut_model(model, range(1, NUM_LAYERS, 2), share=True)


@pytest.mark.slow
def test_a_teacher_alone_is_measured_at_half_its_depth_too() -> None:
    teacher = tiny_model("llama")
    found = measure_speed({"teacher": teacher}, provenance=Provenance({}), repeats=1, cut_half=cut_half, **SHORT)
    assert list(found.roles) == ["teacher"]
    assert found.half_depth is not None
    assert found.half_depth.num_layers == NUM_LAYERS // 2
    assert [batch.batch_size for batch in found.half_depth.batches] == [1, 4]


@pytest.mark.slow
def test_half_the_depth_is_not_measured_beside_a_cut_or_where_it_cannot_be_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = {"teacher": tiny_model("llama"), "pruned": tiny_model("llama", num_hidden_layers=4)}
    beside = measure_speed(models, provenance=Provenance({}), batch_sizes=(1,), repeats=1, cut_half=cut_half, **SHORT)
    assert beside.half_depth is None
    refused: Any = lambda model: (_ for _ in ()).throw(UserError("cannot be cut"))  # noqa: E731
    del models["pruned"]
    with caplog.at_level(logging.INFO):
        found = measure_speed(models, provenance=Provenance({}), batch_sizes=(1,), repeats=1, cut_half=refused, **SHORT)
    assert found.half_depth is None
    assert "nothing is measured at half the teacher's depth: cannot be cut" in caplog.text


@pytest.mark.slow
def test_a_batch_size_without_the_memory_for_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(speed, "device_memory", lambda _: 2_000_000)
    models = {"teacher": tiny_model("llama")}
    with caplog.at_level(logging.WARNING):
        found = measure_speed(models, provenance=Provenance({}), batch_sizes=(1, 2, 10_000), repeats=1, **SHORT)
    assert [batch.batch_size for batch in found.roles["teacher"].batches] == [1, 2]
    assert len(found.left_out) == 1
    assert found.left_out[0].startswith("batch size 10000 is left out: teacher would need ")
    assert found.left_out[0] in caplog.text


def test_models_that_do_not_fit_together_are_refused_by_name(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {role: Checkpoint.read(teacher, LoadSettings()) for role in ("teacher", "pruned")}
    free = iter([1_000_000, 200_000])
    monkeypatch.setattr(speed, "device_memory", lambda _: next(free))
    with pytest.raises(UserError, match=r"speed: pruned takes 0.0 GB beside the models before it, and 0.0 GB are free"):
        measure_speed(models, provenance=Provenance({}))


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


def test_speed_refuses_a_prompt_longer_than_the_model() -> None:
    with pytest.raises(UserError, match="make 288, but teacher has 64 positions"):
        measure_speed({"teacher": tiny_model("llama", max_position_embeddings=64)}, provenance=Provenance({}))

"""What `auto` means: by device, remembered, kept by a run directory, and told.

Covers: shoal.machine.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import machine, numerics
from shoal.errors import UserError
from shoal.launch.verbs import run as runs
from shoal.launch.verbs.run import Run, open_run
from shoal.models.attention import Chosen
from shoal.numerics import Choice, choose, fast_dtype, slowness
from shoal.recipe.recipe import parse_recipe

CPU = torch.device("cpu")
MEASURE = numerics.product_rates  # before a test's environment puts one in its place


def rates(float32: float, bfloat16: float, float16: float | None = None) -> dict[str, float]:
    found = {"float32": float32 * 1e9, "bfloat16": bfloat16 * 1e9}
    return found if float16 is None else {**found, "float16": float16 * 1e9}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(rates(76, 9), "float32", id="AVX2"),
        pytest.param(rates(180, 395), "bfloat16", id="AVX512-BF16"),
        pytest.param(rates(232, 1024), "bfloat16", id="AMX"),
        pytest.param(rates(60, 27), "float32", id="AVX512 without BF16"),
        pytest.param(rates(100, 110), "float32", id="no gain to speak of"),
        pytest.param(rates(19_000, 300_000, 300_000), "bfloat16", id="Ampere and later"),
        pytest.param(rates(7_000, 3_000, 45_000), "float16", id="Turing"),
        pytest.param(rates(13_000, 13_000, 95_000), "float16", id="Volta"),
        pytest.param(rates(9_000, 9_000, 150), "float32", id="Pascal"),
    ],
)
def test_the_precision_is_the_one_that_the_device_multiplies_fast_in(found: dict[str, float], expected: str) -> None:
    assert choose(found, "a device").dtype == expected


def test_the_reason_names_device_ratio_and_rates() -> None:
    assert choose(rates(76, 9.5), "Ryzen") == Choice(
        "float32", "Ryzen multiplies 8 times as slow in bfloat16 (9.5 GFLOP/s in bfloat16, 76 in float32)"
    )
    assert choose(rates(200, 1000), "Xeon").reason == (
        "Xeon multiplies 5 times as fast in bfloat16 as in float32 (1,000 GFLOP/s in bfloat16, 200 in float32)"
    )
    assert "only 1.1 times as fast in bfloat16" in choose(rates(100, 110), "Xeon").reason


def test_float16_is_not_chosen_on_a_cpu_however_fast_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "product_rates", lambda device: rates(100, 90, 1000))
    assert fast_dtype(CPU).dtype == "float32"
    assert slowness("bfloat16", CPU) == pytest.approx(100 / 90)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """Sizes of the products that were timed, with a memory of this test's own."""
    sizes: list[int] = []

    def products(device: Any, dtypes: Any, *, size: int, seconds: float) -> dict[torch.dtype, float]:
        sizes.append(size)
        return {dtype: 1e9 * (1 + index) for index, dtype in enumerate(dtypes)}

    monkeypatch.setattr(numerics, "fastest_products", products)
    monkeypatch.setattr(numerics, "product_rates", MEASURE)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    numerics._product_rates.cache_clear()
    yield sizes
    numerics._product_rates.cache_clear()


def forget_process() -> None:
    numerics._product_rates.cache_clear()


def test_a_machine_is_measured_once(counted: list[int], tmp_path: Path) -> None:
    first = numerics.product_rates(CPU)
    forget_process()
    assert numerics.product_rates(CPU) == first == {"float32": 1e9, "bfloat16": 2e9, "float16": 3e9}
    assert counted == [512]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["product_rates.json"]


def test_another_machine_and_other_instructions_are_measured_again(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    numerics.product_rates(CPU)
    forget_process()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    numerics.product_rates(CPU)
    monkeypatch.setattr(numerics, "device_name", lambda device: "another processor")
    numerics.product_rates(CPU)
    assert len(counted) == 3


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 1}', "{KEY: {}}", '{KEY: {"float32": 1.0, "bfloat16": 0.0}}'])
def test_a_damaged_memory_is_measured_again(counted: list[int], tmp_path: Path, content: str) -> None:
    numerics.product_rates(CPU)
    file = tmp_path / "cache/product_rates.json"
    (key,) = json.loads(file.read_text())
    file.write_text(content.replace("KEY", json.dumps(key)))
    forget_process()
    assert numerics.product_rates(CPU)["bfloat16"] == 2e9
    assert len(counted) == 2


def test_nothing_but_time_is_lost_where_the_memory_cannot_be_written(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file"))
    assert numerics.product_rates(CPU)["bfloat16"] == 2e9


def test_products_are_timed_for_every_dtype_and_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.fastest_products(CPU, (torch.float32, torch.bfloat16), size=32)
    assert set(found) == {torch.float32, torch.bfloat16}
    assert all(0 < rate < float("inf") for rate in found.values())
    clock = iter(range(1000))
    monkeypatch.setattr(machine, "now", lambda device: float(next(clock)))
    # a turn takes five looks at this clock: two for each product and one at its end
    assert machine.fastest_products(CPU, (torch.float32, torch.bfloat16), size=10, seconds=4.0)[torch.float32] == 2000
    assert next(clock) == 6


@pytest.mark.slow
def test_measuring_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    assert set(numerics._measured(CPU)) == set(numerics.DTYPES)
    assert torch.get_num_threads() == before


# --- what a run computes in ---------------------------------------------------------------------------------------


def recipe(tmp_path: Path, **settings: Any) -> Any:
    return parse_recipe({"model": "demo:smollm2-135m", "run_dir": str(tmp_path / "run"), **settings})


@pytest.fixture
def fast_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "product_rates", lambda device: rates(100, 400, 100))


@pytest.mark.parametrize(("stage", "expected"), [(0, "float16"), (2, "float32")])
def test_auto_is_no_float16_where_sharding_would_clip_scaled_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, expected: str
) -> None:
    monkeypatch.setattr(runs, "fast_dtype", lambda _: Choice("float16", "Volta multiplies fast in it"))
    run = open_run(recipe(tmp_path, distill={"deepspeed": f"deepspeed/zero{stage}.json"}))
    assert (run.recipe.dtype, run.recipe.distill.precision) == ("float16", expected)
    assert run.numerics is not None
    assert ("float16 trains rightly under ZeRO 0 alone" in run.numerics.reason) == (stage == 2)


@pytest.mark.usefixtures("fast_half")
def test_every_auto_is_settled_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = open_run(recipe(tmp_path, distill={"teacher": {"dtype": "auto"}}))
    settled = run.recipe
    assert (settled.dtype, settled.distill.precision, settled.distill.teacher.dtype) == ("bfloat16",) * 3
    assert run.numerics is not None
    assert "4 times as fast in bfloat16" in run.numerics.reason
    assert f"precision: bfloat16, training in bfloat16 ({run.numerics.reason})" in caplog.text


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize(
    ("made_with", "said", "chosen"),
    [
        (None, {}, ("sdpa", "flash needs a CUDA GPU, and this device is cpu")),
        ("eager", {}, ("eager", "importance.json of this run directory was made with eager")),
        ("eager", {"attention": "sdpa"}, ("sdpa", "the recipe names it")),
    ],
)
def test_attention_is_what_the_run_was_begun_with_or_what_the_device_can(
    made_with: str | None,
    said: dict[str, Any],
    chosen: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    if made_with is not None:
        made(tmp_path, "importance.json", {"attention": made_with})
    run = open_run(recipe(tmp_path, **said))
    assert run.numerics is not None
    assert (run.recipe.attention, run.numerics.attention_reason) == chosen
    assert run.load_args()["attention"] == chosen[0]
    assert (f"attention: {chosen[0]} ({chosen[1]})" in caplog.text) == (not said)


@pytest.mark.usefixtures("fast_half")
def test_flash_is_asked_for_in_the_precision_of_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    chosen = Chosen("flash", "it is there")
    monkeypatch.setattr(runs, "choose_attention", lambda wanted, *given: seen.append((wanted, given[-1])) or chosen)
    teacher = {"teacher": {"dtype": "stored"}}
    assert open_run(recipe(tmp_path, distill=teacher)).recipe.attention == "flash"
    file = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    open_run(recipe(tmp_path, attention="flash", dtype="float16", distill={"deepspeed": file}))
    assert seen == [
        (
            "auto",
            {"dtype": "bfloat16", "distill.precision": "bfloat16", "distill.teacher.dtype": "float32"},
        ),
        (
            "flash",
            {"dtype": "float16", "distill.precision": "bfloat16", "distill.teacher.dtype": "float16"},
        ),
    ]


def test_a_run_begun_with_flash_is_refused_on_a_cpu(tmp_path: Path) -> None:
    made(tmp_path, "importance.json", {"attention": "flash"})
    with pytest.raises(UserError, match="attention: flash needs a CUDA GPU, and this device is cpu; set"):
        open_run(recipe(tmp_path))


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize("said", ["auto", "flash"])
def test_results_made_with_flash_are_read_on_a_cpu(tmp_path: Path, said: str) -> None:
    made(tmp_path, "importance.json", {"attention": "flash"})
    assert open_run(recipe(tmp_path, attention=said), computes=False).recipe.attention == "flash"


@pytest.mark.usefixtures("fast_half")
def test_what_the_recipe_names_is_kept(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path, dtype="stored", distill={"precision": "float32"}))
    assert (run.recipe.dtype, run.recipe.distill.precision) == ("stored", "float32")
    assert run.numerics is not None
    assert run.numerics.reason == "the recipe names it"


@pytest.mark.usefixtures("fast_half")
def test_a_deepspeed_file_that_names_a_precision_settles_training(tmp_path: Path) -> None:
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert open_run(recipe(tmp_path, distill={"deepspeed": config})).recipe.distill.precision == "auto"


def test_an_empty_precision_is_auto(tmp_path: Path) -> None:
    assert recipe(tmp_path, distill={"precision": None}).distill.precision == "auto"


def made(tmp_path: Path, name: str, inputs: dict[str, Any], *, bare: bool = False) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"inputs": inputs} if bare else {"provenance": {"inputs": inputs}}))


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize("name", ["importance.json", "distill.json", "eval/teacher.json"])
def test_a_run_directory_goes_on_in_what_it_was_begun_in(tmp_path: Path, name: str) -> None:
    made(tmp_path, name, {"dtype": "float32"})
    run = open_run(recipe(tmp_path))
    assert run.recipe.dtype == "float32"
    assert run.recipe.distill.precision == "bfloat16", "of training that file says nothing"
    assert run.numerics is not None
    assert f"{name} of this run directory was made in float32" in run.numerics.reason


@pytest.mark.usefixtures("fast_half")
def test_a_training_goes_on_in_what_its_checkpoint_was_made_in(tmp_path: Path) -> None:
    inputs = {"dtype": "float32", "distill.precision": "float32"}
    made(tmp_path, "checkpoints/checkpoint-3/manifest.json", inputs, bare=True)
    run = open_run(recipe(tmp_path))
    assert (run.recipe.dtype, run.recipe.distill.precision) == ("float32", "float32")


@pytest.mark.usefixtures("fast_half")
@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"provenance": 1}', '{"provenance": {"inputs": {"dtype": "auto"}}}']
)
def test_a_result_that_does_not_say_it_does_not_count(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/importance.json").write_text(content)
    assert open_run(recipe(tmp_path)).recipe.dtype == "bfloat16"


def test_a_precision_that_is_slow_here_is_warned_of_once_with_what_to_type(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "product_rates", lambda device: rates(76, 9.5, 9))
    monkeypatch.setattr("shoal.launch.verbs.run.device_name", lambda device: "Ryzen")
    run = open_run(recipe(tmp_path, dtype="bfloat16", distill={"precision": "bfloat16"}))
    assert run.recipe.dtype == "bfloat16"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        "dtype: bfloat16, distill.precision: bfloat16: products are 8 times slower in it than in float32 on Ryzen; add "
        "dtype=float32 distill.precision=float32 to the command, or leave it out of the recipe"
    )


def test_a_precision_that_is_not_much_slower_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "product_rates", lambda device: rates(100, 200, 100))
    open_run(recipe(tmp_path, dtype="float32"))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_bad_deepspeed_file_is_refused_as_ever(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.deepspeed: no file 'nowhere\.json'"):
        open_run(recipe(tmp_path, distill={"deepspeed": "nowhere.json"}))


# --- sizes that follow the machine's speed -------------------------------------------------------------------------

SIZES = {
    "full_size_gflops": 400,
    "measure": {"num_tokens": 8192},
    "distill": {
        "data": ["python_docs", "teacher_text"],
        "num_tokens": 81_920,
        "writing": {"num_tokens": 4001},
        "watch": {"perplexity_tokens": 4096},
        "local": {"num_tokens": 1000},
    },
    "eval": {"limit": 100, "limits": {"reasoning_continuation": 7}, "perplexity_tokens": 8192},
}


def sizes(run: Run) -> list[int | None]:
    distill, scores = run.recipe.distill, run.recipe.eval
    assert distill.watch is not None
    assert distill.local is not None
    trained = [run.recipe.measure.num_tokens, distill.num_tokens, distill.writing.num_tokens]
    return [
        *(*trained, distill.watch.perplexity_tokens, distill.local.num_tokens),
        *(scores.limit, *scores.limits.values(), scores.perplexity_tokens),
    ]


@pytest.mark.parametrize(
    ("rate", "share", "expected"),
    [
        (200, 1.0, [8192, 81_920, 4001, 4096, 1000, 100, 7, 8192, 50_000, 10]),
        (75, 0.38, [3113, 31_130, 1521, 1557, 380, 38, 3, 3113, 19_000, 4]),
        (10, 0.2, [1639, 16_384, 801, 820, 200, 20, 2, 1639, 10_000, 2]),
    ],
)
def test_sizes_follow_the_speed_of_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, share: float, expected: list[int]
) -> None:
    monkeypatch.setattr(numerics, "product_rates", lambda device: rates(rate, 1, 1))
    monkeypatch.setattr("shoal.launch.verbs.run.product_rates", lambda device: rates(rate, 1, 1))
    monkeypatch.setattr("shoal.launch.verbs.run.num_cores", lambda: 2)
    run = open_run(recipe(tmp_path, **SIZES))
    assert sizes(run) == expected
    assert run.recipe.full_size_gflops is None, "settled sizes are not settled again"
    assert run.numerics is not None
    assert run.numerics.size == share
    assert (f"multiplies at {2 * rate} in float32" in run.numerics.size_reason) == (share < 1)


@pytest.mark.parametrize(("first", "then"), [(10, 1000), (1000, 10)])
def test_a_run_directory_keeps_its_sizes_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, then: float
) -> None:
    monkeypatch.setattr("shoal.launch.verbs.run.num_cores", lambda: 2)
    monkeypatch.setattr("shoal.launch.verbs.run.product_rates", lambda device: rates(first, 1, 1))
    begun = open_run(recipe(tmp_path, **SIZES))
    begun.dir.mkdir()
    (begun.dir / "run.json").write_text(json.dumps({"numerics": asdict(begun.numerics)}))  # pyright: ignore
    monkeypatch.setattr("shoal.launch.verbs.run.product_rates", lambda device: rates(then, 1, 1))
    assert open_run(recipe(tmp_path, **SIZES)).recipe == begun.recipe
    other = {**SIZES, "full_size_gflops": 500 if then > first else 300}
    assert sizes(open_run(recipe(tmp_path, **other))) != sizes(begun), "is another recipe"


def test_sizes_are_what_they_say_without_a_speed_to_follow(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path, **{**SIZES, "full_size_gflops": None}))
    assert sizes(run) == [8192, 81_920, 4001, 4096, 1000, 100, 7, 8192, 50_000, 10]


def test_unlimited_items_and_no_watch_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.launch.verbs.run.product_rates", lambda device: rates(10, 1, 1))
    run = open_run(recipe(tmp_path, full_size_gflops=400, distill={"watch": None}, eval={"limit": None}))
    assert run.recipe.distill.watch is None
    assert run.recipe.eval.limit is None


def test_a_settled_recipe_is_settled_again_to_the_same(tmp_path: Path) -> None:
    run = open_run(recipe(tmp_path))
    assert open_run(run.recipe).recipe == run.recipe
    assert replace(run, numerics=None) == Run(run.recipe)

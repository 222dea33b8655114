"""How recipes are read, and how every wrong one is refused.

Covers: shoal.recipe.distill, shoal.recipe.evaluate, shoal.recipe.measure,
shoal.recipe.messages, shoal.recipe.prune, shoal.yaml_text.
"""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.atomic_files import cache_dir
from shoal.errors import UserError
from shoal.recipe.distill import SAMPLES, Distill, Live, Recorded, TrainingSource
from shoal.recipe.evaluate import CONFIGS_DIR
from shoal.recipe.losses import CrossEntropy, ForwardKL, term_names
from shoal.recipe.messages import MOST_TOLD
from shoal.recipe.prune import CutThese
from shoal.recipe.recipe import Recipe, load_recipe, parse_recipe, read_settings
from shoal.recipe.section import TextSource, as_dict
from shoal.recipe.trainer_arguments import read_deepspeed
from shoal.yaml_text import own_yaml, read_yaml

SHIPPED = sorted(CONFIGS_DIR.glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    """The recipe of model `m` and run_dir `r` with further lines of YAML and overrides."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\nrun_dir: r\n{text}", encoding="utf-8")
    return load_recipe(file, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the refusal, without the name of the file."""
    with pytest.raises(UserError) as refused:
        load(tmp_path, text, *overrides)
    return str(refused.value).replace(f"{tmp_path}/recipe.yaml: ", "").split("\n")


@pytest.mark.parametrize(("text", "message"), read_yaml(Path(__file__).with_name("wrong_settings.yaml").read_text()))
def test_wrong_setting_is_refused_with_its_path_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == [message]


@pytest.mark.parametrize(
    ("model", "run_dir"),
    [
        ("Qwen/Qwen3-8B", "runs/Qwen3-8B"),
        ("demo:smollm2-135m", "runs/smollm2-135m"),
        ("../models/my model/", "runs/my-model"),
        ("..", "runs/model"),
    ],
)
def test_the_smallest_recipe_is_a_model(model: str, run_dir: str) -> None:
    recipe = parse_recipe({"model": model})
    assert recipe.run_dir == run_dir
    assert parse_recipe(as_dict(recipe)) == recipe
    assert parse_recipe({"model": model, "run_dir": "r"}).run_dir == "r"


def test_every_problem_is_reported_at_once_with_the_file(tmp_path: Path) -> None:
    text = "sed: 1\nmeasure: {num_tokens: -5}\ndistill: {losses: [{kind: kl}, {kind: jsd, wieght: 1}], num_tokens: x}\n"
    with pytest.raises(UserError) as refused:
        load(tmp_path, text)
    lines = str(refused.value).split("\n")
    assert len(lines) == 5
    assert all(line.startswith(f"{tmp_path}/recipe.yaml: ") for line in lines)
    losses = {"distill.losses.0.kind", "distill.losses.1.wieght"}
    assert {line.split(": ")[1] for line in lines} == {"sed", "measure.num_tokens", *losses, "distill.num_tokens"}


@pytest.mark.parametrize(
    ("text", "message", "lines"),
    [
        ("\n".join(f"key{n}: 1" for n in range(9000)), "and 8,990 more problems", MOST_TOLD + 1),
        ("\n".join(f"key{n}: 1" for n in range(60_000)), "characters are more than the limit of 100,000", 1),
        (
            "distill: {trainer: {" + ", ".join(f"key{n}: 1" for n in range(4000)) + "}}",
            "no such training arg",
            MOST_TOLD,
        ),
        (f"measure: {{metrics: [{', '.join('x' for _ in range(9000))}]}}", "and 8,990 more problems", MOST_TOLD + 1),
        (
            "\n".join(
                [f"b0: &b0 {['x'] * 9}", *(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 9))]
            ),
            "aliases expand to 490,329,057 values; write the values themselves",
            1,
        ),
    ],
    ids=["keys", "long", "arguments", "entries", "aliases"],
)
@pytest.mark.every_case
def test_however_much_is_wrong_it_is_told_in_a_few_lines_and_soon(
    tmp_path: Path, text: str, message: str, lines: int
) -> None:
    started = time.process_time()
    with pytest.raises(UserError, match=message) as refused:
        load(tmp_path, text)
    assert len(str(refused.value).splitlines()) <= lines
    assert time.process_time() - started < 3


def test_aliases_of_what_is_said_twice_are_read() -> None:
    text = "measure: &read {num_tokens: 64}\ndistill: {<<: *read, batch_size: 4}"
    assert read_yaml(text)["distill"] == {"num_tokens": 64, "batch_size": 4}


def test_files_of_ours_say_the_same_to_libyaml() -> None:
    root = Path(__file__).parents[3]
    files = [*root.glob("src/shoal/**/*.yaml"), *root.glob("launch/*.yaml"), *root.glob("configs/suites/*.yaml")]
    assert len(files) > 15
    assert [own_yaml(file) for file in files] == [read_yaml(file.read_text(encoding="utf-8")) for file in files]


def test_overrides_reach_every_depth_and_win_over_the_file(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "seed: 3\nmeasure:\ndistill: {losses: [{kind: forward_kl}, {kind: cross_entropy}]}",
        "seed=4",
        "prune.drop=[1,3]",
        "measure.data.path=docs.txt",
        "distill.losses.1.weight=0.5",
        "distill.trainer.learning_rate=2e-5",
        "track.wandb=off",
        "distill.num_tokens=200_000",
        "track.tags=[a, b]",
        "eval.limit=null",
    )
    assert recipe.seed == 4
    assert recipe.prune == CutThese(drop=(1, 3))
    assert recipe.measure.data == (TextSource("docs.txt"),)
    assert recipe.distill.losses == (ForwardKL(), CrossEntropy(weight=0.5))
    assert recipe.distill.trainer == {"learning_rate": 2e-5}
    assert recipe.track.wandb == "off"
    assert recipe.distill.num_tokens == 200_000
    assert recipe.track.tags == ("a", "b")
    assert recipe.eval.limit is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("1.5", 1.5),
        ("-.5e-1", -0.05),
        (".inf", float("inf")),
        ("1_000", 1000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("2024-13-45", "2024-13-45"),
        ("off", "off"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'2e-5'", "2e-5"),
        ("1e", "1e"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    assert load(tmp_path, f"distill: {{trainer: {{optim_args: {text}}}}}").distill.trainer == {"optim_args": value}
    assert load(tmp_path, "", f"distill.trainer.optim_args={text}").distill.trainer == {"optim_args": value}


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("python_docs", (TextSource("python_docs"),)),
        ("{path: a.jsonl, column: story}", (TextSource("a.jsonl", column="story"),)),
        ("[python_docs, {path: b, weight: 2}]", (TextSource("python_docs"), TextSource("b", weight=2.0))),
    ],
)
def test_data_may_be_a_name_a_mapping_or_a_list(tmp_path: Path, value: str, sources: tuple[TextSource, ...]) -> None:
    recipe = load(
        tmp_path, f"measure: {{data: {value}}}\ndistill: {{data: {value}}}\neval: {{perplexity_data: {value}}}"
    )
    assert recipe.measure.data == recipe.eval.perplexity_data == sources
    assert recipe.distill.data == tuple(TrainingSource(**source.text_settings) for source in sources)


def by_source(*losses: Any, **distill: Any) -> Distill:
    """A section whose sources have these losses each."""
    data = [{"path": f"{number}.jsonl", "losses": own} for number, own in enumerate(losses)]
    return parse_recipe({"model": "m", "run_dir": "r", "distill": {"data": data, **distill}}).distill


def test_terms_are_those_of_distill_and_of_sources_each_once_with_whom_it_is_for() -> None:
    kl, ce, soft = ForwardKL(), CrossEntropy(), ForwardKL(temperature=2.0)
    assert by_source(None, None).terms == {kl: None}
    assert by_source("cross_entropy", None, ["forward_kl", "cross_entropy"]).terms == {kl: {1, 2}, ce: {0, 2}}
    assert by_source("forward_kl", "forward_kl", losses="jsd").terms == {kl: None}, "nobody learns jsd"
    softer = by_source({"kind": "forward_kl", "temperature": 2}, None)
    assert (list(softer.terms), term_names([*softer.terms])) == ([kl, soft], ["forward_kl_1", "forward_kl_2"])
    sampled = by_source("cross_entropy", "cross_entropy", on_policy={})
    assert sampled.terms == {kl: {SAMPLES}, ce: {0, 1}}


def test_what_a_recorded_teacher_tells_follows_from_the_losses(tmp_path: Path) -> None:
    alike = "losses: [{kind: jsd, temperature: 2}, {kind: cross_entropy}, {kind: hidden_states}]"
    distill = load(tmp_path, f"distill: {{teacher: recorded, {alike}}}").distill
    assert distill.teacher == Recorded()
    eight = load(tmp_path, "distill: {teacher: recorded}", "distill.teacher.top_k=8").distill
    assert eight.teacher == Recorded(top_k=8)
    assert distill.recorded_temperature == 2.0
    assert load(tmp_path, "distill: {losses: [{kind: taid}]}").distill.teacher == Live()


@pytest.mark.parametrize(
    ("said", "precision"),
    [
        ("trainer: {bf16: true}", "bf16-mixed"),
        ("precision: fp16-mixed, trainer: {fp16: true, bf16: false}", "fp16-mixed"),
        ("trainer: {bf16: false}", "float32"),
    ],
)
def test_precision_may_be_said_in_the_words_of_transformers(tmp_path: Path, said: str, precision: str) -> None:
    distill = load(tmp_path, f"distill: {{{said}}}").distill
    assert (distill.precision, distill.trainer) == (precision, {})


def test_a_watch_that_scores_nothing_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, "distill: {watch: {perplexity_tokens: 0}}").distill.watch is None


def test_a_source_that_the_teacher_writes_has_its_share_of_the_tokens() -> None:
    distill = by_source(None, None, num_tokens=1000)
    weighed = replace(distill, data=(replace(distill.data[0], weight=3.0), distill.data[1]))
    assert [weighed.num_tokens_of(source) for source in weighed.data] == [750, 250]


def test_shipped_recipe_is_found_by_its_name_and_a_local_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "small.yaml").write_text("model: shipped\nrun_dir: r\n")
    monkeypatch.setattr("shoal.recipe.recipe.CONFIGS_DIR", shipped)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("small.yaml").model == load_recipe("configs/small.yaml").model == "shipped"
    with pytest.raises(
        UserError, match=r"elsewhere/small.yaml: no recipe file with this name; shipped recipes are small.yaml"
    ):
        load_recipe("elsewhere/small.yaml")
    (tmp_path / "small.yaml").write_text("model: local\nrun_dir: r\n")
    assert load_recipe("small.yaml").model == "local"


def test_paths_may_begin_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a shell writes out, and neither Python, a YAML file nor a container's environment does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHOAL_CACHE", "~/cache")
    (tmp_path / "mine.json").write_text('{"steps_per_print": 7}')
    (tmp_path / "mine.yaml").write_text("model: m\nrun_dir: ~/r\ndistill: {deepspeed: ~/mine.json}\n")
    assert read_deepspeed(load_recipe("~/mine.yaml").distill.deepspeed) == {"steps_per_print": 7}
    assert cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_recipe_loads_and_commands_in_it_can_be_given(file: Path) -> None:
    recipe = load_recipe(file)
    assert parse_recipe(as_dict(recipe)) == recipe
    commented = "\n".join(line[1:] for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    commands = re.findall(r"^ +((?:deepspeed|shoal) .*)$", commented.replace("\\\n", " "), flags=re.MULTILINE)
    assert commands or "make quickstart" in commented, "says nowhere how it is run"
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[1] == "lab":
            continue
        assert {f"configs/{file.name}", file.stem} & set(words)
        load_recipe(file, [word for word in words if "=" in word])


@pytest.mark.parametrize(
    ("prune", "metrics"),
    [
        ({"metric": "taylor"}, ("block_influence", "angular", "taylor")),
        ({"metric": {"sleb": 1, "taylor": 2}}, ("block_influence", "angular", "sleb", "taylor")),
        ({"metric": "angular"}, ("block_influence", "angular")),
        ({"metric": "retrieval"}, ("block_influence", "angular")),  # an ablation's column
        ({"drop": [1]}, ("block_influence", "angular")),
    ],
)
def test_the_metric_that_chooses_layers_is_measured(prune: dict[str, Any], metrics: tuple[str, ...]) -> None:
    assert parse_recipe({"model": "a/b", "prune": prune}).measure.metrics == metrics


def test_the_default_metric_is_measured_beside_those_that_are_named() -> None:
    recipe = parse_recipe({"model": "a/b", "measure": {"metrics": ["taylor"]}, "prune": {"contiguous": True}})
    assert recipe.measure.metrics == ("taylor", "angular")


@pytest.mark.parametrize(
    ("override", "kept", "told"),
    [
        ("prune.ratio=0.25", {"ratio": 0.25, "metric": "taylor"}, "prune.ratio replaces prune.num_drop: 4 of"),
        (
            "prune.target.params=9",
            {"target": {"params": 9}, "metric": "taylor"},
            "prune.target replaces prune.num_drop",
        ),
        ("prune.drop=[1]", {"drop": [1]}, "prune.drop replaces prune.metric: taylor of"),
        ("prune.num_drop=3", {"num_drop": 3, "metric": "taylor"}, ""),
        ("seed=1", {"num_drop": 4, "metric": "taylor"}, ""),
    ],
)
def test_an_option_replaces_what_the_file_says_in_another_way(
    override: str, kept: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shoal")
    file = tmp_path / "a.yaml"
    file.write_text("model: a/b\nprune: {num_drop: 4, metric: taylor}\n")
    said, _ = read_settings(file, [override])
    assert said["prune"] == kept
    assert told in caplog.text
    assert bool(told) == ("replaces" in caplog.text)


def test_two_options_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: a/b\n")
    with pytest.raises(UserError, match="num_drop and ratio exclude each other"):
        load_recipe(tmp_path / "a.yaml", ["prune.ratio=0.5", "prune.num_drop=3"])

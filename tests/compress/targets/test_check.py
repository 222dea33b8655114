"""Where a student loads: rules of other runtimes on real configurations, cut, and what is refused for them.

Covers: shoal.compress.targets.vllm.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import architectures
import pytest
import transformers
from tiny import tiny_checkpoint, tiny_config
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.compress.surgery.cut_model import kept_layers
from shoal.compress.targets import vllm as vllm_rules
from shoal.compress.targets.check import TARGETS, check_targets, refuse_for_targets, student_config
from shoal.compress.targets.vllm import vllm_loads
from shoal.errors import UserError
from shoal.launch.cli import run_verb
from shoal.launch.verbs import prune
from shoal.recipe.prune import Target
from shoal.recipe.recipe import parse_recipe


def cut(config: PreTrainedConfig, drop: Sequence[int]) -> PreTrainedConfig:
    return student_config(config, kept_layers(config.get_text_config(decoder=True).num_hidden_layers, drop))


def changed(config: PreTrainedConfig, **fields: Any) -> PreTrainedConfig:
    return type(config).from_dict({**config.to_dict(), **fields})


def vllm(config: PreTrainedConfig) -> str:
    loads, reason = vllm_loads(config)
    return f"{loads}: {reason}"


# --- the tables ---------------------------------------------------------------------------------------------------


def test_names_in_the_tables_are_names_of_transformers() -> None:
    for name in vllm_rules.NATIVE | vllm_rules.LISTED | vllm_rules.HYBRID:
        assert hasattr(transformers, name), name
    types = {*vllm_rules.OWN_CONFIGURATION, *vllm_rules.TOO_NEW, *vllm_rules.RULES}
    assert types <= set(CONFIG_MAPPING)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) >= vllm_rules.NATIVE
    assert not vllm_rules.NATIVE & vllm_rules.LISTED
    assert vllm_rules.HYBRID <= vllm_rules.NATIVE


def test_targets_are_those_of_the_recipe() -> None:
    assert get_args(Target) == TARGETS == ("transformers", "vllm", "llama_cpp")


# --- vLLM: kinds by a layer's number ------------------------------------------------------------------------------


def test_gpt_oss_alternates_in_vllm() -> None:
    teacher = architectures.tiny_config("gpt_oss")
    kinds = [kind == "sliding_attention" for kind in teacher.layer_types]
    assert kinds == [True, False] * 3
    assert vllm(teacher).startswith("yes")
    assert vllm(cut(teacher, (2, 3))).startswith("yes")  # still alternates from layer 0
    assert vllm(cut(teacher, (2,))).endswith("wrong for layers 2, 3, 4 of the student")
    assert vllm(cut(teacher, (0,))).endswith("wrong for layers 0, 1, 2, 3, 4 of the student")
    assert vllm(cut(teacher, (1, 3, 5))).startswith("yes")  # only sliding layers: the model's own window holds for all
    assert vllm(cut(teacher, (0, 2, 4))).startswith("no")  # only full ones: every second would get a window


def test_llama4_counts_its_mixtures_in_vllm() -> None:
    teacher = changed(architectures.tiny_config("llama4_text"), moe_layers=None, interleave_moe_layer_step=2)
    assert teacher.moe_layers == [1, 3, 5]
    assert vllm(teacher).startswith("yes")
    student = cut(teacher, (0,))
    assert student.moe_layers == [0, 2, 4]
    assert "moe_layers" in vllm(student)
    assert vllm(student).startswith("no")
    assert vllm(cut(teacher, (0, 1))).startswith("yes")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_mixture_of_windows_is_refused_by_vllm_for_qwen(kind: str) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    teacher = tiny_config(kind, **window)
    assert teacher.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert vllm(teacher).startswith("no: it refuses models")
    assert vllm(cut(teacher, (1, 4))).startswith("no: it refuses models")
    assert vllm(cut(teacher, (3, 4, 5))).startswith("yes")
    assert vllm(cut(teacher, (0, 1, 2))).startswith("yes")
    assert vllm(tiny_config(kind, use_sliding_window=False)).startswith("yes")


def test_qwen2_moe_slides_in_all_layers_or_none_in_vllm() -> None:
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 4
    teacher = changed(architectures.tiny_config("qwen2_moe"), layer_types=kinds)
    assert vllm(cut(teacher, (3,))).endswith("wrong for layers 2, 3, 4 of the student")
    assert vllm(cut(teacher, (0, 1))).startswith("yes")
    assert vllm(cut(teacher, (2, 3, 4, 5))).startswith("yes")


@pytest.mark.parametrize("name", ["exaone4", "exaone_moe"])
def test_full_attention_without_rope_needs_a_sliding_layer_in_vllm(name: str) -> None:
    teacher = architectures.tiny_config(name)
    sliding = [layer for layer, kind in enumerate(teacher.layer_types) if kind == "sliding_attention"]
    assert teacher.sliding_window
    assert 0 < len(sliding) < teacher.num_hidden_layers
    assert vllm(cut(teacher, sliding[1:])).startswith("yes")
    assert "RoPE" in vllm(cut(teacher, sliding))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_dense_layers_first_stay_first(name: str) -> None:
    teacher = architectures.tiny_config(name)
    for drop in ((0,), (1,), (5,), (0, 1), (2, 4)):
        assert vllm(cut(teacher, drop)).startswith("yes"), drop
    wrong = changed(cut(teacher, (5,)), moe_layer_freq=2)  # a field that transformers does not read
    assert vllm(wrong).startswith("no: it goes by first_k_dense_replace")


def test_a_threshold_that_the_list_contradicts_is_refused() -> None:
    teacher = changed(architectures.tiny_config("deepseek_v32"), mlp_layer_types=["dense", *["sparse"] * 5])
    assert vllm(changed(teacher, first_k_dense_replace=1)).startswith("yes")
    assert vllm(changed(teacher, first_k_dense_replace=3)).endswith("wrong for layers 1, 2 of the student")
    lite = changed(architectures.tiny_config("glm4_moe_lite"), first_k_dense_replace=1)
    assert vllm(changed(lite, mlp_layer_types=["dense", *["sparse"] * 5])).startswith("yes")
    assert vllm(changed(lite, mlp_layer_types=["dense", "dense", *["sparse"] * 4])).startswith("no")


def test_a_shared_indexer_is_found_by_number_in_vllm() -> None:
    kinds = ["full", "full", "shared", "shared", "full", "shared"]
    teacher = changed(
        architectures.tiny_config("glm_moe_dsa"),
        indexer_types=kinds,
        index_topk_pattern="FFSSFS",
        first_k_dense_replace=3,
    )
    assert vllm(changed(teacher, mlp_layer_types=["dense"] * 3 + ["sparse"] * 3)).startswith("yes")
    stale = changed(teacher, mlp_layer_types=["dense"] * 3 + ["sparse"] * 3, index_topk_pattern="FFSFSF")
    assert vllm(stale).endswith("wrong for layers 3, 4, 5 of the student")


def test_kimi_numbers_its_layers_from_one_in_a_field_that_only_vllm_reads() -> None:
    teacher = architectures.tiny_config("kimi_linear")
    recurrent = [layer for layer, kind in enumerate(teacher.layer_types) if kind == "linear_attention"]
    dense = teacher.mlp_layer_types.count("dense")
    fields = {"kda_layers": [layer + 1 for layer in recurrent], "full_attn_layers": [], "head_dim": 8, "num_heads": 4}
    fields["short_conv_kernel_size"] = 4
    assert vllm(teacher).startswith("no: it needs linear_attn_config")
    told = changed(teacher, linear_attn_config=fields, first_k_dense_replace=dense)
    assert vllm(told).startswith("yes")
    assert vllm(changed(told, linear_attn_config={**fields, "kda_layers": recurrent})).startswith(
        "no: it goes by linear"
    )


def test_mimo_is_described_by_other_fields_in_vllm() -> None:
    teacher = architectures.tiny_config("mimo_v2_flash")
    assert vllm(teacher).startswith("no: it needs the list moe_layer_freq")
    assert vllm(changed(teacher, hybrid_layer_pattern=None)).startswith("no: it needs the list hybrid_layer_pattern")
    told = {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in teacher.layer_types],
        "moe_layer_freq": [int(kind == "sparse") for kind in teacher.mlp_layer_types],
    }
    assert vllm(changed(teacher, **told)).startswith("yes")
    short = {**told, "moe_layer_freq": told["moe_layer_freq"][:-1]}
    assert "for 5 layers, and the student has 6" in vllm(changed(teacher, **short))


# --- vLLM: which families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "lfm2", "llama", "mixtral", "qwen3_next", "smollm3"])
def test_families_that_vllm_reads_layer_by_layer_may_be_cut_anywhere(name: str) -> None:
    teacher = architectures.tiny_config(name)
    for drop in ((0,), (4,), (1, 3)):
        assert vllm(cut(teacher, drop)).startswith("yes"), drop


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("smollm3", "yes: it runs transformers' code"),
        ("nanochat", "unknown: it has no code for NanoChatForCausalLM"),
        ("zamba", "no: it has no code for ZambaForCausalLM, and its Transformers backend none for hybrid and linear"),
        ("xglm", "no: it has no code for XGLMForCausalLM and cannot run"),
        ("lfm3", "no: it works with transformers up to"),
        ("dory", "unknown: it reads dory by field names of its own"),
    ],
)
def test_families_without_code_in_vllm(name: str, start: str) -> None:
    assert vllm(architectures.tiny_config(name)).startswith(start)


def test_a_hybrid_without_recurrent_layers_is_not_known() -> None:
    teacher = architectures.tiny_config("nemotron_h")
    left = [kind for kind in teacher.layers_block_type if kind != "linear_attention"]
    assert set(left) - {"full_attention"}
    assert vllm(changed(teacher, layers_block_type=left)).startswith("unknown: it expects recurrent layers")


# --- verdicts and refusals ----------------------------------------------------------------------------------------


def test_a_plain_family_loads_everywhere() -> None:
    verdicts = check_targets(tiny_config("llama"))
    assert [(verdict.target, verdict.loads) for verdict in verdicts] == [(target, "yes") for target in TARGETS]
    assert all(len(verdict.in_words().splitlines()) == 1 for verdict in verdicts)


def test_every_target_that_says_no_is_named_with_its_reason() -> None:
    student = cut(architectures.tiny_config("gpt_oss"), (0,))
    with pytest.raises(UserError) as refusal:
        refuse_for_targets(student, ("vllm", "llama_cpp"))
    one, other = str(refusal.value).splitlines()
    assert one.startswith("prune.targets: vLLM")
    assert "whatever layer_types says" in one
    assert "take vllm out of prune.targets" in one
    assert other.startswith("prune.targets: llama.cpp")
    refuse_for_targets(student, ("transformers",))


def test_an_unknown_verdict_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        refuse_for_targets(architectures.tiny_config("nanochat"), ("vllm",))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "unknown" in caplog.text


def test_an_unknown_target_is_answered_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"prune\.targets\.0: must be 'transformers', 'vllm' or 'llama_cpp'"):
        parse_recipe({"model": "m", "run_dir": "r", "prune": {"targets": ["ollama"]}})


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three full and three sliding layers, which vLLM refuses to mix."""
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen2")


def recipe(teacher: Path, folder: Path, drop: str, targets: str) -> tuple[str, list[str]]:
    file = folder / "recipe.yaml"
    file.write_text(f"model: {teacher}\nrun_dir: {folder}/run\ntrack: {{wandb: off}}\n")
    return str(file), [f"prune.drop={drop}", f"prune.targets={targets}"]


def test_nothing_is_written_for_a_target_that_would_refuse_it(
    qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, overrides = recipe(qwen2, tmp_path, "[1]", "[vllm]")
    assert run_verb("prune", config, overrides) == 2
    assert "error: prune.targets: vLLM" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_targets_are_asked_of_a_finished_student_too_and_do_not_make_it_another(
    qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, overrides = recipe(qwen2, tmp_path, "[1]", "[]")
    assert run_verb("prune", config, overrides) == 0
    assert "prune: vLLM" in capsys.readouterr().err  # without the setting it is said, and nothing is refused
    written = (tmp_path / "run" / "plan.json").stat().st_mtime_ns
    assert run_verb("prune", config, [overrides[0], "prune.targets=[transformers, llama_cpp]"]) == 0
    assert "done already" in capsys.readouterr().err
    assert run_verb("prune", config, [overrides[0], "prune.targets=[vllm]"]) == 2
    assert (tmp_path / "run" / "plan.json").stat().st_mtime_ns == written


def test_run_refuses_before_it_measures(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "measure", lambda run: pytest.fail("measured"))
    config, overrides = recipe(qwen2, tmp_path, "[1]", "[vllm]")
    assert run_verb("run", config, overrides) == 2

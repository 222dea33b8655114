"""What a cut does to a model and its configuration; test_architectures.py proves that it is exact, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases
from model_outputs import logits
from tiny import KINDS, NUM_LAYERS, tiny_config, tiny_model
from torch import nn
from transformers import Cohere2Config, LlamaConfig

from shoal.compress.surgery.config_cut import cut_config
from shoal.compress.surgery.cut_model import cut_model, skipped
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import KEPT_LAYERS

CASES = cases(__file__)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_nothing_changes_no_bit(kind: str) -> None:
    teacher = tiny_model(kind)
    student = cut_model(teacher, ())
    assert torch.equal(logits(teacher), logits(student))
    assert student.config.num_hidden_layers == NUM_LAYERS


def test_every_kept_layer_keeps_its_attention_kind() -> None:
    config = cut_config(tiny_model("gemma3").config, (1, 2, 4))
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert "sliding_window_pattern" not in config.to_dict()
    config = cut_config(tiny_model("qwen2").config, (0, 3, 5))
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.max_window_layers == 1
    rules: dict[str, Any] = {"sliding_window_pattern": 4, "layer_switch": 4}
    config = cut_config(Cohere2Config(num_hidden_layers=4, **rules), (1, 2, 3))
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert not rules.keys() & config.to_dict().keys()


def test_config_names_the_layers_of_the_first_teacher_after_two_cuts() -> None:
    once = cut_config(tiny_config("llama"), (0, 2, 3, 5))
    assert getattr(cut_config(once, (1, 3)), KEPT_LAYERS) == [2, 5]


@pytest.mark.parametrize(
    ("field", "value", "keep", "expected"),
    [
        ("first_k_dense_replace", 2, (0, 2, 3), 1),
        ("mlp_only_layers", [0, 2, 5], (0, 1, 5), [0, 2]),
        ("moe_layer_freq", [0, 1, 1, 0, 1, 1], (0, 3, 4), [0, 0, 1]),
        ("moe_layer_freq", 2, (0, 1, 4, 5), 2),
        ("hybrid_override_pattern", "MEM*ME", (0, 3, 5), "M*E"),
        ("decoder_sparse_step", 2, (2, 3, 4, 5), 2),
        ("num_nextn_predict_layers", 1, (0, 1), 0),
        ("num_mtp_layers", 2, (0, 1), 0),
        ("num_mtp_modules", 3, (0, 1), 0),
        ("mtp_num_hidden_layers", 1, (0, 1), 0),
        ("attn_type_list", [0, 0, 1, 0, 0, 1], (0, 2, 3), [0, 1, 0]),
        ("moe_topk", [1, 2, 3, 4, 5, 6], (0, 2, 3), [1, 3, 4]),
        ("moe_topk", 2, (0, 2, 3), 2),
        ("num_kv_shared_layers", 0, (0, 1), 0),
        ("num_dense_layers", 3, (1, 3, 4), 1),
        ("num_blocks", 6, (0, 3), 2),
        ("ple_layer_ids", [1, 4, 6], (3, 4, 5), [1, 3]),
        ("attention_types", [[["global", "local"], 3]], (0, 2, 3), [[["global", "global", "local"], 1]]),
        ("cross_attention_layers", [2, 4], (0, 4, 5), [1]),
        (
            "linear_attn_config",
            {"kda_layers": [1, 2, 4, 5], "full_attn_layers": [3, 6], "num_heads": 2},
            (1, 2, 5),
            {"kda_layers": [1], "full_attn_layers": [2, 3], "num_heads": 2},
        ),
    ],
)
def test_rule_of_a_field(field: str, value: Any, keep: tuple[int, ...], expected: Any) -> None:
    assert getattr(cut_config(tiny_config("llama", **{field: value}), keep), field) == expected


@pytest.mark.parametrize(("field", "value", "message"), CASES)
def test_config_that_a_cut_cannot_express_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut_config(tiny_config("llama", **{field: value}), (0, 2, 3, 4, 5))


def test_settings_of_single_layers_are_renumbered() -> None:
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(num_hidden_layers=6, hidden_size_per_layer_input=0)
    assert set(config.to_dict()["per_layer_config"]) == {"5"}
    assert set(cut_config(config, (0, 2, 5)).to_dict()["per_layer_config"]) == {"2"}


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        ((1, 2, 3), r"drop: gemma3 adds features of the image after the layers 0 to 1"),
        ((0, 0, 1, 2), r"after the layers 0 to 1 .* keep these 2 layers"),
    ],
)
def test_layers_behind_which_the_image_is_added_stay_where_they_are(keep: tuple[int, ...], problem: str) -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config=tiny_config("gemma3").to_dict())
    assert cut_config(config, keep).get_text_config().num_hidden_layers == len(keep)
    setattr(config.vision_config, "deepstack_visual_indexes", [1, 2])  # noqa: B010
    assert cut_config(config, (0, 1, 4)).get_text_config().num_hidden_layers == 3
    with pytest.raises(UserError, match=problem):
        cut_config(config, keep)


class AlternatingConfig(LlamaConfig):
    """Attention kinds computed from the index: no cut can carry them over."""

    model_type = "alternating"

    @property
    def layer_types(self) -> list[str]:
        kinds = ("full_attention", "sliding_attention")
        return [kinds[layer % 2] for layer in range(self.num_hidden_layers)]


class StubbornConfig(LlamaConfig):
    model_type = "stubborn"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_hidden_layers = 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AlternatingConfig(num_hidden_layers=6), r"config.layer_types: is .* after a reload"),
        (StubbornConfig(num_hidden_layers=6), r"num_hidden_layers: is 6 after a reload"),
    ],
)
def test_config_that_does_not_survive_a_reload_is_refused(config: LlamaConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut_config(config, (0, 2, 3, 4, 5))


@pytest.mark.parametrize("function", [cut_model, lambda model, drop: skipped(model, drop).__enter__()])
@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ((6,), r"layer 6 does not exist; the model has the layers 0 to 5"),
        (range(6), r"all 6 layers are named; keep at least one"),
    ],
)
def test_drops_outside_the_model_are_refused(function: Any, drop: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        function(tiny_model("llama"), drop)


def test_tensor_that_would_be_lost_is_refused() -> None:
    teacher = tiny_model("llama")
    decoder_layers(teacher)[2].register_parameter("gate", nn.Parameter(torch.ones(1)))
    cut_model(teacher, (2,))
    with pytest.raises(UserError, match=r"layers.2.gate: .* a tensor that would be lost in the cut"):
        cut_model(teacher, (1,))


def test_layer_that_would_change_its_kind_is_refused() -> None:
    teacher = tiny_model("gemma3")
    setattr(decoder_layers(teacher)[2].get_submodule("self_attn"), "sliding_window", 4)  # noqa: B010
    with pytest.raises(UserError, match=r"layer 2: its self_attn.sliding_window is 4 but would become None as layer 1"):
        cut_model(teacher, (0,))


def test_a_model_that_has_trained_with_checkpointing_is_cut_too() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    assert len(decoder_layers(cut_model(model, [1]))) == NUM_LAYERS - 1

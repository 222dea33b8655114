"""Settings of a quantised checkpoint name the student's layers, or the cut is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_config

from shoal.compress.surgery.quantised import LayerNames, cut_stored_config, renumbered
from shoal.errors import UserError

KEEP = (0, 2, 3)
NAMES = LayerNames(
    prefixes=("model.layers.", "model.text.layers."),
    others=frozenset({"vision.layers."}),
    modules=("self_attn.q_proj", "mlp.gate"),
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["lm_head", "model.layers.1.mlp.gate", "model.layers.3.mlp.gate"], ["lm_head", "model.layers.2.mlp.gate"]),
        ({"model.layers.2": {"bits": 8}, "model.layers.1": {"bits": 4}}, {"model.layers.1": {"bits": 8}}),
        (["text.layers.3.*", "vision.layers.1.mlp", "mtp.layers.0.mlp"], ["text.layers.2.*", "vision.layers.1.mlp"]),
        (["re:.*mlp\\.gate$", "*.self_attn.*", None, 3], ["re:.*mlp\\.gate$", "*.self_attn.*", None, 3]),
    ],
)
def test_names_are_those_of_the_student(value: Any, expected: Any) -> None:
    assert renumbered(value, KEEP, NAMES, where="ignore") == expected


@pytest.mark.parametrize("text", [r"re:.*layers\.(0|1)\..*", r"-:model\.layers\.[2-5]\.mlp.*", "layers.3.mlp.gate"])
def test_what_would_mean_other_layers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"ignore: .* names layers by number and treats model"):
        renumbered([text], KEEP, NAMES, where="ignore")


def test_the_students_configuration_keeps_its_quantisation() -> None:
    config = tiny_config(
        "llama", quantization_config={"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3"]}
    )
    student = cut_stored_config(config, KEEP, NAMES)
    assert student.num_hidden_layers == len(KEEP)
    assert getattr(student, "quantization_config")["modules_to_not_convert"] == ["model.layers.2"]  # noqa: B009

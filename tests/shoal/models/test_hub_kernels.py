"""No kernel of the Hub is used, and none asked for, unless the user asks; then every model gets it and it is told.

The kernel here is a real one of the package `kernels`, in a folder in place of a repository: an RMS norm that doubles.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from training_runs import finished, run, write_recipe
from transformers import AutoModelForCausalLM

from shoal.errors import UserError
from shoal.models.hub_kernels import from_pretrained
from shoal.models.in_memory import as_model
from shoal.models.load import load_model
from shoal.runtime import environment

kernels: Any = pytest.importorskip("kernels", reason="transformers before 5.25 needs no `kernels`")

IDS = torch.arange(5)[None]
TOLD = {"doubling": "local, doubling_1"}
METADATA = {
    "id": "doubling_1",
    "name": "doubling",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cpu"},
}
LAYER = """
import torch


class Doubled(torch.nn.Module):
    def forward(self, hidden_states):
        return 2 * self.weight * hidden_states
"""
ROOMS = ("src/shoal", "compress", "train", "eval", "launch", "lab", "benchmarks")
PLAIN = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "GenerationConfig")
"""Classes whose from_pretrained loads no model."""


def register() -> None:
    """Let transformers have the kernel for RMS norms on a CPU."""
    repository = kernels.LayerRepository(repo_id="test/doubling", layer_name="Doubled", version=1)
    kernels.register_kernel_mapping({"RMSNorm": {"cpu": repository}})


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel that transformers would take for a CPU, as it takes others for a GPU."""
    build = tmp_path / "kernel" / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps(METADATA))
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(LAYER)
    monkeypatch.setenv("LOCAL_KERNELS", f"test/doubling={tmp_path / 'kernel'}")
    with kernels.use_kernel_mapping({}):
        register()
        yield


def has_kernels(model: Any) -> bool:
    return bool(kernels.get_kernelized_layers(model).layers)


def test_a_kernel_that_is_there_is_used_only_where_it_is_asked_for(teacher: Path, kernel: None) -> None:
    model = load_model(teacher)
    assert not model.use_kernels
    assert not has_kernels(model)
    assert "hub_kernels" not in environment()
    other = load_model(teacher, hub_kernels=True)
    assert has_kernels(other)
    assert not torch.equal(model(IDS).logits, other(IDS).logits)
    assert environment()["hub_kernels"] == TOLD


def test_a_model_that_is_named_in_python_has_none(teacher: Path, kernel: None) -> None:
    assert not has_kernels(as_model(str(teacher)))
    assert has_kernels(as_model(str(teacher), use_kernels=True))


def test_a_model_that_the_user_loaded_with_kernels_is_told_of_and_left(
    teacher: Path, kernel: None, caplog: pytest.LogCaptureFixture
) -> None:
    as_model(AutoModelForCausalLM.from_pretrained(teacher, use_kernels=False), "teacher")
    assert not caplog.text
    model = AutoModelForCausalLM.from_pretrained(teacher, use_kernels=True)
    as_model(model, "teacher")
    assert "teacher: was loaded with kernels of the Hub" in caplog.text
    assert has_kernels(model)
    model.use_kernels = False  # what the warning says
    assert not has_kernels(model)
    assert torch.equal(model(IDS).logits, load_model(teacher)(IDS).logits)


@pytest.mark.slow
def test_every_stage_has_the_kernels_of_the_recipe_and_tells_them(teacher: Path, kernel: None, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "run", teacher, steps=2)
    assert run(path, verb="measure", before=register).result.returncode == 0  # pyright: ignore
    plain = json.loads((tmp_path / "run" / "run" / "importance.json").read_text())
    finished(run(path, "hub_kernels=true", verb="measure", before=register))
    told = json.loads((tmp_path / "run" / "run" / "importance.json").read_text())
    assert told["internal"]["environment"]["hub_kernels"] == TOLD
    assert told["internal"]["inputs"]["hub_kernels"] is True
    assert told["layers"] != plain["layers"]
    assert "hub_kernels" not in plain["internal"]["inputs"]


def test_weights_that_only_kernels_multiply_are_turned_into_others(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    asked: dict[str, Any] = {}

    class Kind:
        @staticmethod
        def from_pretrained(source: str, **settings: Any) -> str:
            asked.update(settings)
            return source

    from_pretrained(Kind, "there", stored=model.config)
    assert asked["config"].quantization_config["dequantize"] is True
    assert asked["use_kernels"] is False
    assert model.config.quantization_config == {"quant_method": "fp8"}
    asked.clear()
    from_pretrained(Kind, "there", stored=model.config, hub_kernels=True)
    assert asked == {"use_kernels": True}
    model.config.quantization_config = {"quant_method": "eetq"}
    with pytest.raises(UserError, match="there: weights stored as eetq need kernels from the Hub; set hub_kernels"):
        from_pretrained(Kind, "there", stored=model.config)


def test_models_are_loaded_through_one_door() -> None:
    """A call of its own would take kernels from transformers 5.25 on."""
    found = []
    root = Path(__file__).parents[3]
    for file in (file for room in ROOMS for file in sorted((root / room).rglob("*.py"))):
        if any(parent.is_symlink() for parent in file.parents):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                owner = ast.unparse(node.value)
                if owner not in PLAIN:
                    found.append((str(file.relative_to(root)), owner))
    assert found == [("src/shoal/models/hub_kernels.py", "kind")]


SCRIPT = """
import sys
if sys.argv[2] == "without":
    sys.modules["kernels"] = None  # as if it were not installed
import hashlib
from pathlib import Path
import torch
import shoal
from shoal.models.load import load_model
from transformers.utils import is_kernels_available
digest = hashlib.sha256()
model = load_model(Path(sys.argv[1]))
digest.update(model(torch.arange(64)[None]).logits.detach().numpy().tobytes())
student = shoal.cut_model(model, [2, 3])
texts = ["one two three four five six seven eight nine ten"] * 40
sizes = {"num_tokens": 512, "sequence_length": 64, "batch_size": 2}
shoal.distill(student, model, texts, **sizes)
for parameter in student.parameters():
    digest.update(parameter.detach().numpy().tobytes())
scores = shoal.evaluate(student, tasks="knowledge_continuation", limit=4)
digest.update(repr(scores.tasks).encode())
print(is_kernels_available(), digest.hexdigest())
"""


@pytest.mark.slow
def test_logits_losses_and_scores_are_the_same_with_and_without_the_package(teacher: Path, tmp_path: Path) -> None:
    told = {}
    for how in ("with", "without"):
        command = [sys.executable, "-c", SCRIPT, str(teacher), how]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr[-2000:]
        told[how] = done.stdout.split()[-2:]
    assert told["with"][0] == "True"
    assert told["without"][0] == "False"
    assert told["with"][1] == told["without"][1]

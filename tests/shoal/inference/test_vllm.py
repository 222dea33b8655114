"""vLLM where it can run, in the precision that its answers and texts are known by; a stand-in takes its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint
from vllm_stand_in import LLM, install

from shoal.errors import UserError
from shoal.inference.vllm import check_vllm
from shoal.launch.early import refuse_early
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Distill, Generate, TrainingSource
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import Shapes, shaping
from shoal.train.dataset import teacher_texts

WRITTEN = TrainingSource("python_docs", generate=Generate(prompt_tokens=6, max_new_tokens=4, backend="vllm"))
SETTINGS = Distill(data=(TrainingSource("python_docs"), WRITTEN), num_tokens=80, sequence_length=64)


def written(folder: Path, stored: torch.dtype, dtype: str) -> str:
    """The precision that text is known by which vLLM has written with a model stored as ``stored``."""
    model = tiny_checkpoint(folder / "model", "llama", dtype=stored)
    recipe = parse_recipe(
        {"model": str(model), "run_dir": str(folder / "run"), "dtype": dtype, "attn_implementation": "sdpa"}
    )
    teacher = Checkpoint.read(model, LoadSettings(dtype))
    inputs = {"model": "abc", **shaping(recipe, Shapes.TEXT)}
    assert teacher_texts(teacher, teacher.tokenizer(), SETTINGS, folder / "text", inputs=inputs)
    (file,) = folder.glob("text/written-*/inputs.json")
    return json.loads(file.read_text())["dtype"]


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
def test_text_is_written_in_the_precision_that_it_is_known_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, dtype: str
) -> None:
    install(monkeypatch)
    known_by = written(tmp_path, stored, dtype)
    (engine,) = LLM.made
    assert not engine.is_open, "training needs its memory"
    assert engine.dtype == (stored if dtype == "stored" else torch.bfloat16)
    # "stored" names the text of a bfloat16 checkpoint as ever; of a float32 one it named what float16 had written
    assert known_by == ("float32" if (stored, dtype) == (torch.float32, "stored") else dtype)


@pytest.mark.slow
def test_text_that_is_there_is_read_without_the_engine_and_on_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        install(there)
        written(tmp_path, torch.float32, "bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shoal.inference.vllm.world_size", lambda: 2)
    written(tmp_path, torch.float32, "bfloat16")
    distill = {"data": ["python_docs", {"path": "python_docs", "generate": {"backend": "vllm"}}]}
    settings = {"model": str(tmp_path / "model" / "llama"), "distill": distill}
    refuse_early("distill", parse_recipe({**settings, "run_dir": str(tmp_path)}))
    with pytest.raises(UserError, match=r"^distill\.data\.1\.generate\.backend: vllm is not installed"):
        refuse_early("distill", parse_recipe({**settings, "run_dir": str(tmp_path / "run")}))


@pytest.mark.parametrize(
    ("found", "ranks", "message"),
    [
        (None, 1, r"^eval\.backend: vllm is not installed; install it, or set backend: transformers"),
        (object(), 2, r"^eval\.backend: vllm manages its own processes and cannot run under 2 ranks; run "),
    ],
)
def test_an_engine_that_cannot_run_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: object, ranks: int, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr("shoal.inference.vllm.world_size", lambda: ranks)
    with pytest.raises(UserError, match=message):
        check_vllm("eval.backend")

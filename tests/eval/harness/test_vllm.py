"""lm-eval's model over vLLM asks what transformers is asked, and a stand-in scores the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_checkpoint
from vllm_stand_in import LLM, install

from shoal.artifacts.evaluation import Scores
from shoal.errors import UserError
from shoal.eval.evaluate import Questions, role_evaluation
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.evaluate import Eval
from shoal.stats.paired import paired

SETTINGS = Eval(tasks=("knowledge_continuation", "retrieval_generation"), limit=4, perplexity_tokens=300)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_an_evaluation_is_the_same_and_names_its_engine(
    chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    settings = replace(SETTINGS, apply_chat_template=chat)
    folder = tiny_checkpoint(tmp_path, "llama", max_position_embeddings=4096)
    checkpoint = Checkpoint.read(folder, LoadSettings("stored"))

    def evaluation(settings: Eval) -> Scores:
        return role_evaluation("teacher", checkpoint, Questions(settings, 0), inputs={"model": "c"})

    ours, theirs = evaluation(settings), evaluation(replace(settings, backend="vllm"))
    assert {score.engine for score in ours.tasks} == {"transformers"}
    assert {score.engine for score in theirs.tasks} == {"vllm"}
    assert [engine.is_open for engine in LLM.made] == [False], "its memory is given back"
    assert theirs.provenance.environment["vllm"] == "0.33.0"
    for own, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert [item.score for item in other.items] == pytest.approx([item.score for item in own.items], abs=1e-4)
        assert other.prompts == own.prompts
    for name in ("num_parameters", "num_layers", "num_bytes"):
        assert getattr(theirs, name) == getattr(ours, name)
    with pytest.raises(UserError, match="engine is 'transformers' in one evaluation and 'vllm' in the other"):
        paired(ours.tasks[0], theirs.tasks[0])

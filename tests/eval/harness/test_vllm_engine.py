"""The engine over vLLM asks what transformers is asked: a stand-in that answers by transformers gives its scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny import tiny_checkpoint
from vllm_stand_in import LLM, install

from shoal.artifacts.evaluation import Evaluation
from shoal.errors import UserError
from shoal.eval.evaluate import role_evaluation
from shoal.eval.harness import vllm_engine
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.vllm_engine import VllmLM, vllm_model
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.evaluate import Eval, Samples
from shoal.recipe.section import Shapes, shaping
from shoal.stats.paired import paired

pytestmark = pytest.mark.slow
POSITIONS = 256


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    return install(monkeypatch)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("vllm"), request.param, max_position_embeddings=POSITIONS)
    return Checkpoint.read(folder, LoadSettings("stored"))


@contextmanager
def running(checkpoint: Checkpoint) -> Iterator[VllmLM]:
    with vllm_model(checkpoint, seed=0) as model:
        yield VllmLM(model, checkpoint.tokenizer(), 4)  # pyright: ignore[reportArgumentType]


def both(checkpoint: Checkpoint) -> tuple[CausalLM, AbstractContextManager[VllmLM]]:
    """Our own engine, and that over vLLM."""
    return CausalLM(checkpoint.model(), checkpoint.tokenizer(), 4), running(checkpoint)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


def test_likelihoods_are_those_of_the_other_engine(checkpoint: Checkpoint) -> None:
    contexts = ["Question: which of these is a fruit?\nAnswer:", "x", "", "<s>Already with its start token:", "a" * 400]
    pairs = [(context, option) for context in contexts for option in (" apple", " a stone", "!")]
    own, theirs = both(checkpoint)
    expected = own.loglikelihood(instances("loglikelihood", pairs))
    with theirs as lm:
        found = lm.loglikelihood(instances("loglikelihood", pairs))
    short = slice(0, 12)  # of the longest text vLLM leaves two positions free
    assert [value for value, _ in found[short]] == pytest.approx([value for value, _ in expected[short]], abs=1e-4)
    assert [greedy for _, greedy in found[short]] == [greedy for _, greedy in expected[short]]
    assert all(value < 0 for value, _ in found[12:])


def test_the_likeliest_continuation_is_called_so(checkpoint: Checkpoint) -> None:
    own, theirs = both(checkpoint)
    context = own.tok_encode("The capital of France is")
    with torch.no_grad():
        likeliest = int(checkpoint.model()(torch.tensor([context])).logits[0, -1].argmax())
    asked = [(context, [likeliest]), (context, [(likeliest + 1) % 256])]
    with theirs as lm:
        assert [greedy for _, greedy in lm.log_likelihoods(asked)] == [True, False]
    assert [greedy for _, greedy in own.log_likelihoods(asked)] == [True, False]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.7}], ids=["greedy", "penalised"])
def test_texts_and_their_ends_are_those_of_the_other_engine(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    own, theirs = both(checkpoint)
    prompts = ["Question:", "x", "<s>Two\n\nparagraphs", "z" * 300]
    (some,) = own.generate_until(instances("generate_until", [("x", {"until": ["\0"], "max_gen_toks": 12})]))
    # no half of a character: what is shown for one may become another
    for stop in ("\n", next((character for character in some[2:] if character.isascii()), "e")):
        wanted = {"until": [stop], "max_gen_toks": 12, **settings}
        requests = instances("generate_until", [(prompt, wanted) for prompt in prompts[:3]])
        expected, ends = own.generate_until(requests), dict(own.endings)
        with theirs as lm:
            assert lm.generate_until(requests) == expected
            assert lm.endings == {key: ends[key] for key in lm.endings}
        own, theirs = both(checkpoint)
    with theirs as lm:
        (long,) = lm.generate_until(instances("generate_until", [(prompts[3], {"until": ["\n"], "max_gen_toks": 8})]))
    assert long is not None
    assert len(LLM.asked[-1][0]) == POSITIONS - vllm_engine.SPARE_POSITIONS - 8


def test_drawn_texts_follow_seed_prompt_and_number(checkpoint: Checkpoint) -> None:
    samples, requests = Samples(n=3, k=(1,)), instances("generate_until", [("x", {"max_gen_toks": 9})] * 2)
    requests[1].arguments = ("y", {"max_gen_toks": 9})

    def drawn(seed: int) -> list[list[str]]:
        with running(checkpoint) as lm:
            return lm.sample_until(requests, samples, seed=seed)

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    params = [params for _, params in LLM.asked]
    assert {(own.temperature, own.top_p) for own in params} == {(samples.temperature, samples.top_p)}
    assert len({own.seed for own in params[:6]}) == 6


def test_what_vllm_does_otherwise_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    beams = instances("generate_until", [("x", {"max_gen_toks": 4, "num_beams": 3})])
    with running(checkpoint) as lm:
        with pytest.raises(UserError, match=r"eval\.backend: vllm does not write with num_beams: 3"):
            lm.generate_until(beams)
        plain = instances("generate_until", [("x", {"max_gen_toks": 4, "num_beams": 1, "temperature": 0.0})])
        assert lm.generate_until(plain)


SETTINGS = Eval(
    tasks=("knowledge_continuation", "retrieval_generation"), limit=6, perplexity_tokens=300, sequence_length=64
)


def evaluation(checkpoint: Checkpoint, settings: Eval, **more: Any) -> Evaluation:
    return role_evaluation("teacher", checkpoint, settings, inputs={"model": "c"}, seed=0, **more)


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("long"), "llama", max_position_embeddings=4096)
    return Checkpoint.read(folder, LoadSettings("stored"))


def test_an_evaluation_is_the_same_and_names_its_engine(long_checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours = evaluation(long_checkpoint, SETTINGS)
    theirs = evaluation(long_checkpoint, replace(SETTINGS, backend="vllm"), items=tmp_path)
    assert {score.engine for score in ours.tasks} == {"transformers"}
    assert {score.engine for score in theirs.tasks} == {"vllm"}
    assert not any(engine.is_open for engine in LLM.made)
    assert theirs.provenance.environment["vllm"] == "0.33.0"
    assert "vllm" not in ours.provenance.environment
    assert [score.task for score in theirs.tasks] == [*SETTINGS.tasks, "perplexity"]
    for own, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert [item.score for item in other.items] == pytest.approx([item.score for item in own.items], abs=1e-4)
        assert replace(other, items=(), engine="", score=0, ci_low=0, ci_high=0) == replace(
            own, items=(), engine="", score=0, ci_low=0, ci_high=0
        )
    for name in ("num_parameters", "num_layers", "num_bytes", "num_requests"):
        assert getattr(theirs, name) == getattr(ours, name)
    count = len(LLM.asked)
    again = evaluation(long_checkpoint, replace(SETTINGS, backend="vllm"), items=tmp_path)
    assert len(LLM.asked) == count, "answers are kept"
    assert again.tasks == theirs.tasks


def test_scores_are_paired_within_an_engine_only(long_checkpoint: Checkpoint) -> None:
    few = replace(SETTINGS, tasks=("knowledge_continuation",), limit=3)
    (score, _), (other, _) = (
        evaluation(long_checkpoint, replace(few, backend=name)).tasks for name in ("transformers", "vllm")
    )
    assert paired(other, other).difference == 0
    with pytest.raises(UserError, match="engine is 'transformers' in one evaluation and 'vllm' in the other"):
        paired(score, other)


def test_results_of_before_there_was_another_engine_stand() -> None:
    assert "eval.backend" not in shaping(Eval(), Shapes.SCORES, "eval.")
    assert shaping(Eval(backend="vllm"), Shapes.SCORES, "eval.")["eval.backend"] == "vllm"


def test_two_positions_are_left_for_what_vllm_writes_and_its_memory_is_given_back(checkpoint: Checkpoint) -> None:
    with running(checkpoint) as lm:
        assert lm.max_length == POSITIONS - vllm_engine.SPARE_POSITIONS
        assert [engine.is_open for engine in LLM.made] == [True]
    assert [engine.is_open for engine in LLM.made] == [False]

"""A GGUF file is asked what a model of transformers is asked, token by token, and answers are read from its logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tiny import tiny_model, tiny_tokenizer

from shoal.errors import UserError
from shoal.eval.evaluate import evaluate
from shoal.eval.harness import llama_cpp
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.llama_cpp import GgufModel, LlamaCppLM
from shoal.recipe.evaluate import Eval, Samples

CONTEXTS = ["Question: which of these is a fruit?\nAnswer:", "Question: which of", "x", ""]
OPTIONS = [" apple", " a stone", " apple pie", "!"]


class StandIn:
    """The binding's `Llama`, as far as shoal calls it, with a model of transformers behind it: keys and values of the
    first `n_tokens` are kept, and logits of what is evaluated after them are put behind those that are there."""

    evaluated = 0

    def __init__(self, model_path: str, *, n_ctx: int, logits_all: bool, **others: Any) -> None:
        assert logits_all
        assert Path(model_path).name == "model.gguf"
        self.model, self.n_tokens = tiny_model("llama"), 0
        self.tokens: list[int] = []
        self.scores = np.full((n_ctx, 272), np.nan, dtype=np.single)

    def eval(self, tokens: Sequence[int]) -> None:
        assert tokens
        type(self).evaluated += len(tokens)
        self.tokens = [*self.tokens[: self.n_tokens], *tokens]
        assert len(self.tokens) <= len(self.scores)
        with torch.no_grad():
            logits_SV = self.model(torch.tensor([self.tokens])).logits[0]
        self.scores[self.n_tokens : len(self.tokens)] = logits_SV[self.n_tokens :].numpy()
        self.n_tokens = len(self.tokens)


class Recurrent(StandIn):
    """The same with a state in place of keys and values, which goes on or is emptied."""

    def eval(self, tokens: Sequence[int]) -> None:
        if self.n_tokens != len(self.tokens):
            raise RuntimeError("llama_decode returned -1")
        super().eval(tokens)

    def reset(self) -> None:
        self.n_tokens, self.tokens = 0, []


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GgufModel:
    binding: Any = SimpleNamespace(
        Llama=StandIn, llama_model_is_recurrent=lambda _: False, llama_model_is_hybrid=lambda _: False
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", binding)
    monkeypatch.setattr(llama_cpp, "version", lambda _: "1.0")
    monkeypatch.setattr(StandIn, "evaluated", 0)
    reference = tiny_model("llama")
    reference.generation_config.save_pretrained(tmp_path)  # pyright: ignore[reportOptionalMemberAccess]
    return GgufModel(tmp_path / "model.gguf", reference.config)


def lm_of(model: Any) -> LlamaCppLM:
    return LlamaCppLM(model, tiny_tokenizer(), 4)


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_likelihoods_are_those_of_the_same_weights_in_transformers(model: GgufModel) -> None:
    asked = instances("loglikelihood", [(context, option) for context in CONTEXTS for option in OPTIONS])
    found = lm_of(model).loglikelihood(asked)
    expected = CausalLM(tiny_model("llama"), tiny_tokenizer(), 4).loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close([value for value, _ in found], [value for value, _ in expected], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_a_state_that_cannot_be_taken_back_is_made_anew(
    model: GgufModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked = instances("loglikelihood", [(context, option) for context in CONTEXTS for option in OPTIONS])
    written = instances("generate_until", [(context, {"max_gen_toks": 12}) for context in CONTEXTS[:3]])
    expected, texts = lm_of(model).loglikelihood(asked), lm_of(model).generate_until(written)
    monkeypatch.setattr(sys.modules["llama_cpp"], "Llama", Recurrent)
    monkeypatch.setattr(sys.modules["llama_cpp"], f"llama_model_is_{kind}", lambda _: True)
    torch.testing.assert_close(lm_of(model).loglikelihood(asked), expected, atol=1e-4, rtol=1e-5)
    assert lm_of(model).generate_until(written) == texts


def test_what_requests_begin_with_is_read_once(model: GgufModel) -> None:
    lm_of(model).loglikelihood(instances("loglikelihood", [(CONTEXTS[0], option) for option in OPTIONS]))
    # byte by byte, each option without its last: " a ston", of " appl" and " apple pi" what is new, of "!" nothing
    assert StandIn.evaluated == len(CONTEXTS[0]) + 7 + 3 + 4


def test_text_is_that_of_the_same_weights_in_transformers(model: GgufModel) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 12}
    asked = instances("generate_until", [(context, settings) for context in CONTEXTS[:3]])
    lm, reference = lm_of(model), CausalLM(tiny_model("llama"), tiny_tokenizer(), 4)
    assert lm.generate_until(asked) == reference.generate_until(asked)
    assert lm.endings == reference.endings
    drawn = Samples(n=3, temperature=1.0, top_p=1.0, k=(1,))
    assert lm.sample_until(asked, drawn, seed=1) == reference.sample_until(asked, drawn, seed=1)


def test_a_longer_request_gets_a_longer_context(model: GgufModel) -> None:
    lm = lm_of(model)
    (short,) = lm.log_likelihoods([([1, 2], [3])])
    lm.log_likelihoods([(list(range(100)), [5, 6])])
    lm.items._known.clear()
    assert lm.log_likelihoods([([1, 2], [3])]) == [short]


def test_every_score_names_the_engine(model: GgufModel) -> None:
    settings = Eval(tasks=("knowledge_continuation",), limit=2, perplexity_tokens=100, sequence_length=32)
    scores = evaluate(model, tiny_tokenizer(), settings, seed=0)
    assert {(score.task, score.engine) for score in scores} == {
        *(("knowledge_continuation", "llama.cpp"), ("perplexity", "llama.cpp"))
    }


def test_sampling_that_transformers_would_do_is_refused(model: GgufModel) -> None:
    with pytest.raises(UserError, match=r"a task asks for sampling or penalties of its own.*another format than GGUF"):
        lm_of(model).generate_until(instances("generate_until", [("a", {"do_sample": True, "max_gen_toks": 3})]))


def test_a_file_that_llama_cpp_cannot_load_is_refused(model: GgufModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("Failed to load model from file: x")

    monkeypatch.setattr(sys.modules["llama_cpp"], "Llama", broken)
    with pytest.raises(
        UserError, match=r"model.gguf: llama.cpp cannot load it \(Failed.*make it again with `shoal qua"
    ):
        lm_of(model).log_likelihoods([([1], [2])])

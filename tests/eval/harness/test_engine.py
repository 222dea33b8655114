"""The engine gives the values of lm-eval's own transformers class, whatever way it takes to them.

Covers: shoal.inference.scoring.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
import torch
from kept_answers import instances
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import tiny_model, tiny_tokenizer, tokens_fed

from shoal.data.chat import Chat, tokenised
from shoal.errors import UserError
from shoal.eval import evaluate as evaluating
from shoal.eval.harness.engine import CausalLM
from shoal.eval.tasks.load import tasks_of
from shoal.inference.decoder import Decoder
from shoal.recipe.evaluate import Eval

KINDS = ("llama", "qwen2", "qwen3", "gemma3")
CONTEXTS = [
    "Question: which of these is a fruit?\nAnswer:",
    "The capital of France is",
    "A context that ends with spaces  ",
    "x",
    "",
    "<s>Already with its start token:",
]
ROUNDINGS = 100
"""Of float32 that may add up on the way to a logit: some ten in each of six layers, and those of the head."""
OPTIONS = [" apple", " a stone", " b", " Übergröße", "!"]


def choices() -> list[Instance]:
    pairs = [(context, option) for context in CONTEXTS for option in OPTIONS]
    return instances("loglikelihood", [*pairs, *pairs[:3], ("single continuation", " only once")])


def hflm(model: Any, batch_size: int = 3) -> Any:
    """lm-eval's own class over a model in memory; its decorator hides its type."""
    make: Any = HFLM
    return make(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=batch_size)


def reference(kind: str, **overrides: Any) -> Any:
    return hflm(tiny_model(kind, **overrides))


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        [value for value, _ in found], [value for value, _ in expected], atol=1e-4, rtol=ROUNDINGS * 2**-24
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_loglikelihood_equals_lm_evals_own(kind: str, batch_size: int) -> None:
    found = CausalLM(tiny_model(kind), tiny_tokenizer(), batch_size).loglikelihood(choices())
    assert_same(found, reference(kind).loglikelihood(choices(), disable_tqdm=True))


CHAT = Eval(("knowledge_continuation", "knowledge_loglikelihood", "retrieval_generation"), 3, apply_chat_template=True)
TURNS = """\
task: turns
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS, train: ROWS}}
test_split: test
training_split: train
fewshot_split: train
num_fewshot: 2
description: Count.
output_type: multiple_choice
doc_to_text: q
doc_to_choice: ["0", "1", "2", "3"]
doc_to_target: a
metadata: {version: 1}
"""


def test_items_are_asked_in_the_chat_template_as_lm_eval_asks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"q": f"Say {n}", "a": n}) for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "turns.yaml").write_text(TURNS.replace("ROWS", str(tmp_path / "rows.jsonl")))
    settings = replace(CHAT, tasks=(*CHAT.tasks, "turns"), include_path=str(tmp_path))
    found: dict[str, Any] = {}
    monkeypatch.setattr(evaluating, "task_score", lambda name, _, samples, **__: found.update({name: samples}))
    model = tiny_model("llama", max_position_embeddings=4096)
    evaluating.scores_of(CausalLM(model, tiny_tokenizer(), 2), tasks_of(settings), settings, seed=0)
    theirs: Any = lm_eval.evaluator.evaluate(
        lm=hflm(model),
        task_dict={"tasks": tasks_of(settings)},
        samples={name: [0, 1, 2] for name in settings.tasks},
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    assert found.keys() == {*settings.tasks}
    for name, samples in found.items():
        assert len(samples) == 3
        for own, other in zip(samples, theirs["samples"][name], strict=True):
            assert own["arguments"] == other["arguments"]
            assert own["arguments"][0][0].endswith("\nassistant: ")
            if name == "retrieval_generation":
                assert own["filtered_resps"] == other["filtered_resps"]
            else:
                assert_same(own["filtered_resps"], other["filtered_resps"])
    prompt = found["turns"][0]["arguments"][0][0]
    assert [line.partition(": ")[0] for line in prompt.splitlines()] == [
        *("system", "user", "assistant", "user", "assistant", "user", "assistant")
    ]


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"eval.apply_chat_template: the tokenizer has no chat template; remove it"):
        evaluating.scores_of(CausalLM(tiny_model("llama"), tokenizer, 2), tasks_of(CHAT), CHAT, seed=0)


def test_a_template_that_tells_the_day_asks_the_same_on_every_day() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    rendered = CausalLM(tiny_model("llama"), tokenizer, 2).apply_chat_template([{"role": "user", "content": "Hi"}])
    assert rendered == "26 Jul 2024: Hi"
    ids, _ = tokenised(Chat([{"role": "user", "content": "Hi"}], "row 0"), tokenizer, assistant_only=False)
    assert tokenizer.decode(ids) == rendered


def test_a_tokenizer_without_start_and_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no start and no end token; set eos_token"):
        CausalLM(tiny_model("llama"), tokenizer, 2).loglikelihood(choices())


def test_greedy_continuation_is_recognised() -> None:
    lm = CausalLM(tiny_model("llama"), tiny_tokenizer(), 2)
    (text,) = lm.generate_until(instances("generate_until", [("abcdefgh", {"until": [], "max_gen_toks": 1})]))
    text = text or "a"
    options = instances("loglikelihood", [("abcdefgh", option) for option in (text, "q", "zz")])
    found = lm.loglikelihood(options)
    assert [greedy for _, greedy in found].count(True) <= 1
    assert_same(found, reference("llama").loglikelihood(options, disable_tqdm=True))


def test_contexts_are_read_once_for_all_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = CausalLM(tiny_model("llama"), tiny_tokenizer(), 8)
    assert lm._decoder  # made when first used, with a few tokens of its own
    fed = tokens_fed(monkeypatch)
    lm.loglikelihood(instances("loglikelihood", [("c" * 100, " " + letter) for letter in "abcd"]))
    assert sum(fed) <= 100 + 4 * 2


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_rolling_equals_lm_evals_own_over_several_windows(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    texts = [("A text longer than the model's positions. " * 4,), ("short",), ("Größe und Maß",)]
    lm = CausalLM(tiny_model(kind, max_position_embeddings=32), tiny_tokenizer(), 4)
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    hf = reference(kind, max_position_embeddings=32)
    expected = hf.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "longer than the model's" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_equals_lm_evals_own(kind: str) -> None:
    prompts = ["Once upon a time", "x", "A much longer prompt than the others, of many words", "1 2 3 4"]
    settings = [{"until": ["e", "\n\n"], "max_gen_toks": 24}, {"until": ["\n"], "max_gen_toks": 9}]
    requests = instances("generate_until", [(prompt, chosen) for chosen in settings for prompt in prompts])
    lm = CausalLM(tiny_model(kind), tiny_tokenizer(), 4)
    assert lm._is_plain({"do_sample": False})
    found = lm.generate_until(requests)
    assert found == reference(kind).generate_until(requests, disable_tqdm=True)
    assert any(found)


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = CausalLM(tiny_model("llama"), tiny_tokenizer(), 8)
    prompts = ["Once upon", "abc", "hello there", "1 2 3"]
    free = lm.generate_until(instances("generate_until", [(p, {"until": [], "max_gen_toks": 12}) for p in prompts]))
    stop = next(text[2] for text in free if len(text) > 3)
    sizes = tokens_fed(monkeypatch, len)
    stopped = lm.generate_until(
        instances("generate_until", [(p, {"until": [stop], "max_gen_toks": 12}) for p in prompts])
    )
    assert sizes[0] == 4
    assert sizes[-1] < 4
    assert stopped == [text.split(stop)[0] for text in free]


def test_long_contexts_are_cut_from_the_left_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [("c" * length, option) for length in (10, 60, 80) for option in (" yes", " maybe")]
    lm = CausalLM(tiny_model("llama", max_position_embeddings=32), tiny_tokenizer(), 4)
    found = lm.loglikelihood(instances("loglikelihood", pairs))
    hf = reference("llama", max_position_embeddings=32)
    assert_same(found, hf.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True))
    assert "4 of 6 requests are longer than the model's 32 positions" in caplog.text


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda lm: lm.loglikelihood(instances("loglikelihood", [("c", "o" * 40)])), "an answer option has 40 tokens"),
        (lambda lm: lm.loglikelihood(instances("loglikelihood", [("c", "")])), "empty continuation"),
        (
            lambda lm: lm.generate_until(instances("generate_until", [("c", {"until": [], "max_gen_toks": 32})])),
            "asks for 32 new tokens",
        ),
    ],
)
def test_what_the_model_cannot_hold_is_refused(run: Any, message: str) -> None:
    lm = CausalLM(tiny_model("llama", max_position_embeddings=32), tiny_tokenizer(), 4)
    with pytest.raises(UserError, match=message):
        run(lm)


def test_recurrent_models_get_full_forwards() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=272, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=256, eos_token_id=257
    )
    model = MambaForCausalLM(config).eval()
    lm = CausalLM(model, tiny_tokenizer(), 4)
    assert not lm._decoder.can_branch
    hf = hflm(model, batch_size=1)
    requests = choices()[:6]
    assert_same(lm.loglikelihood(requests), hf.loglikelihood(requests, disable_tqdm=True))


def test_a_model_that_gives_no_numbers_is_refused_by_name() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(UserError, match=r"the logits are not finite in torch\.float32; check the weights"):
        Decoder(model)

"""Drawn texts: the same however they are batched, judged as their task says, and demoted told from gone.

Covers: shoal.eval.harness.writing.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import JUNK, SUBJECTS, TABLE, TAME, WORDS, planted_model, planted_tasks, planted_tokenizer
from ranks import call_on_ranks
from tiny import tiny_model, tiny_tokenizer, tokens_fed
from transformers import PreTrainedModel

from shoal.artifacts.evaluation import TaskScore
from shoal.eval.evaluate import evaluate
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.item_cache import ItemCache
from shoal.recipe.evaluate import Eval, Samples
from shoal.stats.pass_at import lost_answers

PROMPTS = ["Once upon a time", "x", "1 2 3 4", "Once upon a table there was a much longer prompt than the others"]
SETTINGS = {"until": ["\n"], "max_gen_toks": 12}
SAMPLES = Samples(n=3, k=(1, 3))


class Request:
    """What the engine reads of an lm-eval instance."""

    def __init__(self, prompt: str, settings: dict[str, Any] = SETTINGS) -> None:
        self.args = (prompt, settings)


def texts_of(
    prompts: list[str], *, kind: str = "llama", batch_size: int = 4, samples: Samples = SAMPLES, **lm: Any
) -> list[list[str]]:
    drawing = CausalLM(tiny_model(kind, max_position_embeddings=512), tiny_tokenizer(), batch_size, **lm)
    return drawing.sample_until([Request(prompt) for prompt in prompts], samples, seed=5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_texts_do_not_depend_on_batches_order_or_on_how_many_are_drawn(kind: str) -> None:
    expected = texts_of(PROMPTS, kind=kind)
    assert len({text for own in expected for text in own}) == len(PROMPTS) * SAMPLES.n
    assert all(len(own) == SAMPLES.n for own in expected)
    for batch_size in (1, 2, 64):
        assert texts_of(PROMPTS, kind=kind, batch_size=batch_size) == expected
    assert texts_of(PROMPTS[::-1], kind=kind) == expected[::-1]
    assert texts_of(PROMPTS[1:2], kind=kind) == expected[1:2]
    more = texts_of(PROMPTS, kind=kind, samples=Samples(n=5, k=(1,)))
    assert [own[:3] for own in more] == expected


@pytest.mark.slow
def test_transformers_own_loop_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes for recurrent models, and where the model's generation configuration has penalties."""
    expected = texts_of(PROMPTS)
    monkeypatch.setattr(CausalLM, "_writes_itself", lambda *_: False)
    assert texts_of(PROMPTS) == expected
    assert texts_of(PROMPTS, batch_size=1) == expected


def test_how_tokens_are_chosen_is_the_samples_to_say_and_not_the_tasks() -> None:
    lm = CausalLM(tiny_model("llama"), tiny_tokenizer(), 4)
    asked = [SETTINGS | further for further in ({}, {"do_sample": True, "temperature": 3.0}, {"num_beams": 4})]
    first, *others = lm.sample_until([Request("x", settings) for settings in asked], SAMPLES, seed=5)
    assert others == [first, first]
    assert lm.sample_until([Request("x")], SAMPLES, seed=6) != [first]
    cold = dataclasses.replace(SAMPLES, temperature=1e-6)
    assert set(lm.sample_until([Request("x")], cold, seed=5)[0]) == set(lm.generate_until([Request("x")]))


def test_a_prompt_is_read_once_for_all_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = CausalLM(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), 8)
    assert lm._decoder  # made when first used, with a few tokens of its own
    prompts, fed = ["a" * 100, "b" * 80], tokens_fed(monkeypatch)
    lm.sample_until([Request(prompt, {"max_gen_toks": 1}) for prompt in prompts], Samples(), seed=0)
    # besides the prompts, the last token of one for every text
    assert sum(fed) <= 2 * (100 + 1) + 2 * Samples().n


def test_drawn_texts_are_kept_and_more_of_them_ask_only_for_the_rest(tmp_path: Path) -> None:
    kept = texts_of(PROMPTS, items=ItemCache(tmp_path, "a"))
    again = ItemCache(tmp_path, "a")
    assert texts_of(PROMPTS, items=again, samples=Samples(n=3, k=(2,))) == kept
    assert again.num_kept == again.num_asked == len(PROMPTS) * 3
    more = ItemCache(tmp_path, "a")
    texts_of(PROMPTS, items=more, samples=Samples(n=4, k=(1,)))
    assert (more.num_kept, more.num_asked) == (len(PROMPTS) * 3, len(PROMPTS) * 4)


@torch.no_grad()
def sure_model() -> Any:
    """The planted model with steeper logits, so that what it draws is what it knows."""
    model: Any = planted_model()
    model.lm_head.weight *= 300
    return model


@torch.no_grad()
def weakened(*, gone: bool) -> PreTrainedModel:
    """The model whose likeliest word is the one that it should keep back.

    The fact of a subject is 1 nat behind, at temperature .8 that is 22 % of the texts; or the layer with the facts is
    empty.
    """
    model = sure_model()
    model.model.layers[TAME].mlp.down_proj.weight.zero_()
    ids = torch.tensor([[WORDS.index(word) for word in ("<s>", "say", SUBJECTS[0])]])
    state_D = model.model(ids).last_hidden_state[0, -1]
    head_VD = model.lm_head.weight
    head_VD[WORDS.index(JUNK)] *= ((head_VD @ state_D)[-6:].max() + 1) / (head_VD[WORDS.index(JUNK)] @ state_D)
    if gone:
        model.model.layers[TABLE].mlp.down_proj.weight.zero_()
    return model.eval()


def planted_score(model: PreTrainedModel, folder: Path, **changes: Any) -> TaskScore:
    settings = Eval(
        **{
            "tasks": ("planted_knowledge_generation",),
            "include_path": str(folder),
            "limit": 40,
            "batch_size": 7,
            "perplexity_tokens": 10,
            "samples": Samples(),
            **changes,
        }
    )
    score, _ = evaluate(model, planted_tokenizer(), settings, seed=0)
    return score


def test_answers_behind_a_likelier_word_are_demoted_and_those_that_no_layer_holds_are_gone(tmp_path: Path) -> None:
    folder = planted_tasks(tmp_path)
    teacher = planted_score(sure_model(), folder)
    assert [passed.score for passed in teacher.pass_at] == [1, 1, 1]
    demoted = planted_score(weakened(gone=False), folder)
    assert demoted.score == 0
    share = 1 / (1 + torch.exp(torch.tensor(1 / 0.8)).item())
    subjects = len({item.question for item in demoted.items})
    # items with the same prompt have the same texts; five standard errors of a share
    assert abs(demoted.pass_at[0].score - share) < 5 * (share * (1 - share) / (8 * subjects)) ** 0.5
    found = lost_answers(teacher, demoted)
    assert found.count == 40
    assert found.demoted == sum(item.num_right > 0 for item in demoted.items if item.num_right is not None)
    assert found.demoted > found.gone
    lost = lost_answers(teacher, planted_score(weakened(gone=True), folder))
    assert (lost.demoted, lost.gone) == (0, 40)


def test_without_the_setting_nothing_is_drawn_and_greedy_scores_are_the_same(tmp_path: Path) -> None:
    folder = planted_tasks(tmp_path)
    drawn = planted_score(weakened(gone=False), folder)
    plain = planted_score(weakened(gone=False), folder, samples=None)
    items = tuple(dataclasses.replace(item, num_right=None) for item in drawn.items)
    assert plain == dataclasses.replace(drawn, items=items, samples=None, pass_at=())


def test_texts_are_judged_by_the_filters_and_the_metric_of_their_task(tmp_path: Path) -> None:
    """A filter that reads the second letter of the text: every text is then right or wrong by that letter alone."""
    rows = [{"q": f"say s{subject}", "a": "4"} for subject in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 1}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        'filter_list: [{name: digit, filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]}]\n'
    )
    score = planted_score(sure_model(), tmp_path, tasks=("own",))
    assert score.metric == "exact_match (digit)"
    assert 0 < score.score < 1  # the table sends some subjects to f4
    assert [item.num_right for item in score.items] == [8 * item.score for item in score.items]


def test_a_task_that_is_not_generated_has_no_pass_at_k_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = planted_tasks(tmp_path)
    score = planted_score(sure_model(), folder, tasks=("planted_knowledge_continuation",))
    assert (score.samples, score.pass_at) == (None, ())
    assert "eval.samples: nothing is drawn, no task is generated and right or wrong" in caplog.text


def drawn_on_rank(rank: int, ranks: int, folder: Path, port: int) -> None:
    import os

    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    score = planted_score(weakened(gone=False), folder, limit=9)
    (folder / f"{rank}.txt").write_text(str([item.num_right for item in score.items]))


@pytest.mark.slow
def test_two_ranks_count_what_one_counts(tmp_path: Path) -> None:
    from shoal.runtime import free_port

    folder = planted_tasks(tmp_path)
    call_on_ranks(drawn_on_rank, folder, free_port(), ranks=2)
    expected = str([item.num_right for item in planted_score(weakened(gone=False), folder, limit=9).items])
    assert [(folder / f"{rank}.txt").read_text() for rank in range(2)] == [expected] * 2

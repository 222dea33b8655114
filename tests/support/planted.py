"""A model built by hand whose layers are known: one copies from the context, one holds a table, one keeps a word back.

Six layers. COPY attends from a question `?k` to the pair `k=v` before it and writes v. TABLE maps a subject to its
fact. TAME takes away a word that the embeddings would have every text say; it is no answer to any question, so that
choosing among options does not need this layer, and writing does. All other layers add nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from shoal.components import Component
from shoal.compress.sweeps.sweep import sweep
from shoal.compress.variants.variants import Edited, variant_of
from shoal.recipe.evaluate import Eval

NUM_LAYERS = 6
COPY, TAME, TABLE = 2, 3, 4
NUM_KEYS = NUM_VALUES = NUM_FACTS = 6
NUM_SUBJECTS = 12

SPECIAL = ["<pad>", "<s>", "</s>", "say"]
JUNK = "hum"
PAIRS = [f"k{key}=v{value}" for key in range(NUM_KEYS) for value in range(NUM_VALUES)]
QUESTIONS = [f"?k{key}" for key in range(NUM_KEYS)]
VALUES = [f"v{value}" for value in range(NUM_VALUES)]
SUBJECTS = [f"s{subject}" for subject in range(NUM_SUBJECTS)]
FACTS = [f"f{fact}" for fact in range(NUM_FACTS)]
WORDS = [*SPECIAL, JUNK, *PAIRS, *QUESTIONS, *VALUES, *SUBJECTS, *FACTS]

# coordinates of the residual stream
PAIR_KEY, ASKED_KEY, PAIR_VALUE, FOUND_VALUE = 0, 6, 12, 18
SUBJECT, FOUND_FACT = 24, 36
HUM, ALWAYS = 42, 43
WIDTH = 64
SLOW = 20
"""First coordinate of a head that its position hardly turns."""


def fact_of(subject: int) -> int:
    """The table."""
    return (5 * subject + 2) % NUM_FACTS


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def planted_model() -> PreTrainedModel:
    """The model that the module describes."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    _embed(model.model.embed_tokens.weight)
    _read_out(model.lm_head.weight)
    copy, table, tame = (model.model.layers[layer] for layer in (COPY, TABLE, TAME))
    for key in range(NUM_KEYS):
        copy.self_attn.q_proj.weight[SLOW + key, ASKED_KEY + key] = 8.0
        copy.self_attn.k_proj.weight[SLOW + key, PAIR_KEY + key] = 8.0
    for value in range(NUM_VALUES):
        copy.self_attn.v_proj.weight[value, PAIR_VALUE + value] = 1.0
        copy.self_attn.o_proj.weight[FOUND_VALUE + value, value] = 1.0
    for subject in range(NUM_SUBJECTS):
        _neuron(table.mlp, subject, reads=SUBJECT + subject, writes=FOUND_FACT + fact_of(subject), gain=1.0)
    _neuron(tame.mlp, 0, reads=ALWAYS, writes=HUM, gain=-2.0)
    return model.eval()


def _embed(weight: nn.Parameter) -> None:
    at = WORDS.index
    weight[:, ALWAYS] = 1.0
    weight[:, HUM] = 2.0
    for key in range(NUM_KEYS):
        weight[at(f"?k{key}"), ASKED_KEY + key] = 1.0
        for value in range(NUM_VALUES):
            weight[at(f"k{key}=v{value}"), PAIR_KEY + key] = 1.0
            weight[at(f"k{key}=v{value}"), PAIR_VALUE + value] = 1.0
    for subject in range(NUM_SUBJECTS):
        weight[at(f"s{subject}"), SUBJECT + subject] = 1.0


def _read_out(weight: nn.Parameter) -> None:
    at = WORDS.index
    weight[at(JUNK), HUM] = 16.0
    for value in range(NUM_VALUES):
        weight[at(f"v{value}"), FOUND_VALUE + value] = 2.0
    for fact in range(NUM_FACTS):
        weight[at(f"f{fact}"), FOUND_FACT + fact] = 2.0


def _neuron(mlp: Any, index: int, *, reads: int, writes: int, gain: float) -> None:
    """One hidden unit that is quiet unless its coordinate is there."""
    mlp.gate_proj.weight[index, reads] = 1.0
    mlp.up_proj.weight[index, reads] = 1.0
    mlp.down_proj.weight[writes, index] = gain


def planted_tasks(folder: Path, *, num_items: int = 40, seed: int = 0) -> Path:
    """Task files of both abilities, by options and as text, with their data."""
    rng = random.Random(seed)
    makers = {"retrieval": _retrieval_item, "knowledge": _knowledge_item}
    for ability, make in makers.items():
        data = folder / f"{ability}.jsonl"
        rows = [{"id": f"{ability}-{index}", **make(rng)} for index in range(num_items)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "context",
            "target_delimiter": " ",
        }
        options = {
            "output_type": "multiple_choice",
            "doc_to_choice": "options",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        text = {
            "output_type": "generate_until",
            "doc_to_target": "gold",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        for protocol, how in (("continuation", options), ("generation", text)):
            described = {"version": "1.0", "ability": ability, "protocol": protocol}
            task = {"task": f"planted_{ability}_{protocol}", **common, **how, "metadata": described}
            (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def _retrieval_item(rng: random.Random) -> dict[str, Any]:
    keys = rng.sample(range(NUM_KEYS), 4)
    values = rng.sample(range(NUM_VALUES), 4)
    asked = rng.randrange(4)
    pairs = " ".join(f"k{key}=v{value}" for key, value in zip(keys, values, strict=True))
    gold = f"v{values[asked]}"
    options = [f"v{value}" for value in rng.sample(values, 4)]
    return {"context": f"{pairs} ?k{keys[asked]}", "options": options, "answer": options.index(gold), "gold": gold}


def _knowledge_item(rng: random.Random) -> dict[str, Any]:
    subject = rng.randrange(NUM_SUBJECTS)
    gold = fact_of(subject)
    others = rng.sample([fact for fact in range(NUM_FACTS) if fact != gold], 3)
    options = [f"f{fact}" for fact in rng.sample([gold, *others], 4)]
    return {"context": f"say s{subject}", "options": options, "answer": options.index(f"f{gold}"), "gold": f"f{gold}"}


def planted_scores(folder: Path, model: PreTrainedModel, units: Sequence[Component]) -> Any:
    """What the intact model scores in all tasks, and without each of ``units``; ``folder`` gets the task files."""
    tasks = (f"planted_{ability}_{p}" for ability in ("retrieval", "knowledge") for p in ("continuation", "generation"))
    settings = Eval(tasks=tuple(tasks), limit=100, include_path=str(planted_tasks(folder)))
    variants = [variant_of(unit, model) for unit in units]
    return sweep(Edited(model), planted_tokenizer(), variants, settings, seed=0)

"""Text that the teacher writes itself: what it says after a prompt is where its targets are most exact.

Texts are written in batches, every batch a file of its own that is whole or absent, dealt to the ranks in turn; at the
end those worth training on are brought into one file. Chance is drawn per text, so that any number of ranks writes the
same, a kill or not.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from shoal.abilities.knowledge import stated_facts
from shoal.abilities.matching import AMOUNT, MATCHING, amounts, number, plain
from shoal.atomic_files import fingerprint, read_json, write_json, write_text
from shoal.data.chat import Chat, check_template, template_of_one_day
from shoal.data.repetition import ends_in_loop
from shoal.data.sources import NO_OPENING, documents, load_texts, to_write
from shoal.data.streams import Written
from shoal.errors import UserError
from shoal.inference.generation import end_tokens, sample
from shoal.models.load import Checkpoint
from shoal.progress import each
from shoal.ranks import is_main, rank, world_size
from shoal.recipe.distill import Distill, Generate, TrainingSource
from shoal.recipe.section import as_dict
from shoal.runtime import barrier, everyone_sees

log = logging.getLogger(__name__)

Writer = Callable[[Sequence[list[int]], Sequence[int]], list[list[int]]]
"""Prompts and the texts' numbers in, the tokens written after each prompt out."""
BATCH_SIZE = 16
"""Texts per rank and forward, written and kept together: what a kill costs at most."""
TEXTS = "texts.jsonl"
COUNTS = "counts.json"
BATCHES = "batches"
OUTCOMES = ("written", "empty", "looping", "repeated", "evaluation fact", "wrong", "kept")
MARKED = re.compile(r"####(.*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
NEGATED = re.compile(r"(?:\bnot|n t)(?: \w+)? $")


@dataclass(frozen=True)
class Prompt:
    """What the teacher goes on from."""

    ids: list[int]
    messages: list[dict[str, Any]] | None = None
    """The conversation so far, where it is one."""
    answer: str | None = None
    """Answer that the data has to it."""


def write_texts(
    settings: Distill,
    number: int,
    tokenizer: Any,
    *,
    folder: Path,
    inputs: dict[str, Any],
    seed: int,
    load_writer: Callable[[], Writer],
) -> list[Written]:
    """What the teacher has written in place of the source ``number`` and what is kept of it; every rank calls this.

    ``inputs`` names the writer (model, precision, kernels). With prompts, settings and seed it makes the name of the
    folder within ``folder``: whoever asks for the same finds it there, and ``load_writer`` is not called.

    Raises:
        UserError: no prompts, or nothing that was written can be kept.
    """
    source = to_write(settings.data[number], sequence_length=settings.sequence_length)
    how = source.generate
    assert how is not None
    chosen = _chosen(settings, source, tokenizer, seed=seed)
    identity = _identity(how, chosen, inputs=inputs, seed=seed)
    place = folder / f"written-{fingerprint(identity)}"
    if not everyone_sees(place / TEXTS):
        _write_batches(how, tokenizer, chosen, folder=place / BATCHES, load_writer=load_writer)
    barrier()
    if is_main():
        if not (place / TEXTS).exists():
            records = each(_batches(place / BATCHES), "teacher text: choosing which texts to keep", unit="texts")
            kept, counts = sifted(records, keep=how.keep)
            write_json(place / "inputs.json", identity)
            write_json(place / COUNTS, counts)
            write_text(place / TEXTS, _lines(kept))  # last: once it is there, nothing else is needed
        shutil.rmtree(place / BATCHES, ignore_errors=True)
    everyone_sees(place / TEXTS)
    return _kept(place, assistant_only=source.assistant_only)


def _identity(how: Generate, chosen: Sequence[Prompt], *, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Everything that texts follow from."""
    return {
        **inputs,
        **{f"generate.{key}": value for key, value in as_dict(how).items()},
        "prompts": fingerprint([asdict(prompt) for prompt in chosen]),
        "seed": seed,
        **({"matching": MATCHING} if how.keep == "correct" else {}),
        **({"start_token": "as rendered"} if any(prompt.messages for prompt in chosen) else {}),
    }


def _kept(place: Path, *, assistant_only: bool) -> list[Written]:
    records = _read(place / TEXTS)
    counts = read_json(place / COUNTS)
    log.info("teacher text: %s; in %s", ", ".join(f"{count:,} {reason}" for reason, count in counts.items()), place)
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        raise UserError(
            f"distill.data: none of the teacher's texts can be kept ({reasons}); change prompts or temperature"
        )
    texts = [Written(record["text"]) for record in records]
    for text, record in zip(texts, records, strict=True):
        text.cut_off = record.get("cut_off", False)
        text.num_asked = record["num_asked"] if assistant_only else 0
    return texts


def _lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _read(file: Path) -> list[dict[str, Any]]:
    # not splitlines(), which also cuts at characters that JSON leaves as they are
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _write_batches(
    settings: Generate, tokenizer: Any, prompts: Sequence[Prompt], *, folder: Path, load_writer: Callable[[], Writer]
) -> None:
    """Write this rank's batches that are not there yet; prompts of like length go together, to pad little."""
    by_length = sorted(range(len(prompts)), key=lambda number: (len(prompts[number].ids), number))
    batches = [by_length[start : start + BATCH_SIZE] for start in range(0, len(prompts), BATCH_SIZE)]
    files = {folder / f"{index:08d}.jsonl": batches[index] for index in range(rank(), len(batches), world_size())}
    missing = {file: batch for file, batch in files.items() if not file.exists()}
    if not missing:
        return
    log.info("the teacher writes %d texts of up to %d new tokens", len(prompts), settings.max_new_tokens)
    writer = load_writer()
    for file, numbers in each([*missing.items()], "teacher text", unit="batches"):
        written = writer([prompts[number].ids for number in numbers], numbers)
        records = [
            _record(number, prompts[number], ids, tokenizer, most=settings.max_new_tokens)
            for number, ids in zip(numbers, written, strict=True)
        ]
        write_text(file, _lines(records))


def _record(number: int, prompt: Prompt, ids: list[int], tokenizer: Any, *, most: int) -> dict[str, Any]:
    """What is kept of one text, which may have ``most`` new tokens; ``cut_off`` where it had more to say."""
    cut_off = {"cut_off": True} if len(ids) >= most and ids[-1] != tokenizer.eos_token_id else {}
    written = tokenizer.decode(ids, skip_special_tokens=True)
    if prompt.messages is None:
        text = tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)
        return {"number": number, "text": text, "written": written, **cut_off}
    return {  # turns and their borders are special tokens
        "number": number,
        "text": tokenizer.decode([*prompt.ids, *_without_end(ids, tokenizer)]),
        "written": written,
        "num_asked": len(tokenizer.decode(prompt.ids)),
        **cut_off,
        "messages": [*prompt.messages, {"role": "assistant", "content": written.strip()}],
        "answer": prompt.answer,
    }


def _batches(folder: Path) -> Iterator[dict[str, Any]]:
    records = [record for file in folder.glob("*.jsonl") for record in _read(file)]
    yield from sorted(records, key=lambda record: record["number"])


def transformers_writer(teacher: PreTrainedModel, tokenizer: Any, settings: Generate, *, seed: int) -> Writer:
    """Writes with ``teacher`` as it stands in memory."""
    ends = end_tokens(teacher.generation_config, tokenizer.eos_token_id)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0]

    def write(prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[list[int]]:
        uniforms = [np.random.default_rng([seed, number]).random(settings.max_new_tokens) for number in numbers]
        return sample(
            teacher,
            prompts,
            torch.from_numpy(np.stack(uniforms)),
            temperature=settings.temperature,
            top_p=settings.top_p,
            end_ids=ends,
            pad_id=int(pad_id),
        )

    return write


def vllm_writer(engine: Any, teacher: Checkpoint, tokenizer: Any, settings: Generate, *, seed: int) -> Writer:
    """Writes with vLLM. Its texts are its own: other numbers are drawn than by transformers."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    configured = (teacher.folder / "generation_config.json").is_file()
    own = GenerationConfig.from_pretrained(teacher.folder) if configured else None
    stops = end_tokens(own, tokenizer.eos_token_id)

    def write(prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[list[int]]:
        how = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=list(stops),
                seed=int(np.random.default_rng([seed, number]).integers(2**31)),
            )
            for number in numbers
        ]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return write


def _prompts(source: TrainingSource, how: Generate, tokenizer: Any, *, num_tokens: int, seed: int) -> Iterator[Prompt]:
    if source.is_chat:
        yield from _asked(source, how, tokenizer, num_tokens=num_tokens)
        return
    openings = _openings(source, tokenizer, length=how.prompt_tokens)
    random.Random(seed).shuffle(openings)
    yield from map(Prompt, openings)


def _asked(source: TrainingSource, how: Generate, tokenizer: Any, *, num_tokens: int) -> Iterator[Prompt]:
    """Conversations up to their last assistant's turn, as the chat template asks for it."""
    check_template(tokenizer.chat_template, source.path, is_fast=tokenizer.is_fast)
    characters = 0
    for chat in documents(source):
        if not isinstance(chat, Chat):
            continue
        turns = chat.messages
        said = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        before = turns[: said[-1]] if said else turns
        answer = turns[said[-1]].get("content") if said else None
        if how.keep == "correct" and not (answer and isinstance(answer, str)):
            raise UserError(
                f"data {chat.where}: the last assistant turn is not a text to compare with (got {answer!r}); write "
                "its content as one string, or set generate.keep: all"
            )
        settings = {"chat_template": template_of_one_day(tokenizer, chat.tools), "tools": chat.tools}
        ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True, **settings)
        yield Prompt(list(ids["input_ids"]), before, answer)  # pyright: ignore[reportCallIssue, reportArgumentType]
        characters += chat.num_characters
        if characters > 16 * num_tokens + 1_000_000:
            return


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _openings(source: TrainingSource, tokenizer: Any, *, length: int) -> list[list[int]]:
    starts = [text[: max(1000, 16 * length)] for text in load_texts(source, max_characters=1_000_000)]
    bare = [_without_end(ids, tokenizer) for ids in tokenizer(starts)["input_ids"]]
    openings = [ids[:length] for ids in bare if len(ids) >= length]
    if not openings:
        raise UserError(f"data {source.path!r}: {NO_OPENING.format(length)}")
    return openings


def _chosen(settings: Distill, source: TrainingSource, tokenizer: Any, *, seed: int) -> list[Prompt]:
    """As many prompts as make about the source's share of the tokens, every one before any comes a second time."""
    how = source.generate
    assert how is not None
    num_tokens = settings.num_tokens_of(source)
    prompts = list(_prompts(source, how, tokenizer, num_tokens=num_tokens, seed=seed))
    room = settings.sequence_length - how.max_new_tokens
    fitting = [prompt for prompt in prompts if prompt.messages is None or 0 < len(prompt.ids) <= room]
    if not fitting:
        raise UserError(
            f"data {source.path!r}: none of {len(prompts)} conversations leaves room for max_new_tokens "
            f"{how.max_new_tokens} in a row; lower that, or raise distill.sequence_length (now "
            f"{settings.sequence_length})"
        )
    if len(fitting) < len(prompts):
        log.info("teacher text: skipped %d prompts that are empty or too long", len(prompts) - len(fitting))
    prompts = fitting
    mean_tokens = sum(len(prompt.ids) for prompt in prompts) / len(prompts) + how.max_new_tokens
    num_texts = math.ceil(num_tokens / mean_tokens)
    chosen: list[Prompt] = []
    while len(chosen) < num_texts:
        order = list(prompts)
        random.Random(f"writing/{seed}/{len(chosen)}").shuffle(order)
        chosen += order[: num_texts - len(chosen)]
    return chosen


def sifted(records: Iterable[dict[str, Any]], *, keep: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The records worth training on, and how many were left out for which reason, each for the first that applies."""
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    seen: set[str] = set()
    kept = []
    for record in records:
        counts["written"] += 1
        reason = _reason_against(record, seen, keep=keep)
        counts[reason or "kept"] += 1
        if reason is None:
            seen.add(record["text"])
            kept.append(record)
    return kept, dict(counts)


def _reason_against(record: dict[str, Any], seen: set[str], *, keep: str) -> str | None:
    written = record["written"]
    if not written.strip():
        return "empty"
    if ends_in_loop(written):
        return "looping"
    if record["text"] in seen:
        return "repeated"
    if not without_evaluation_facts([record["text"]]):
        return "evaluation fact"
    if keep == "correct" and not answers_alike(written, record["answer"]):
        return "wrong"
    return None


def answers_alike(written: str, answer: str) -> bool:
    """Whether both come to the same final answer: what is marked by `####` or \\boxed, else the last number where the
    data's answer has one, else the last line, which may end in the answer.

    Numbers are read as evaluation reads them (see shoal.abilities.matching): a fraction has its value, a power or a
    time of day has none. What is marked in the data and is more than a number is compared as text.
    """
    wanted, stated = _marked(answer), _marked(written)
    numbers = amounts(answer if wanted is None else wanted)[-1:]
    if numbers and (wanted is None or AMOUNT.fullmatch(wanted)):
        return number(stated or written, numbers)
    last, said = (plain(own or text.strip().rpartition("\n")[2]) for own, text in ((wanted, answer), (stated, written)))
    before, found, rest = f" {said}".rpartition(f" {last}")
    return bool(last and found) and not rest and NEGATED.search(f"{before} ") is None


def _marked(text: str) -> str | None:
    matches = MARKED.findall(text.replace("{,}", ","))
    return "".join(matches[-1]).strip(" $%") if matches else None


def without_evaluation_facts(texts: Sequence[str]) -> list[str]:
    """The documents in which the teacher did not happen to write an answer that shoal's knowledge tasks ask for."""
    stated = stated_facts("eval")
    return [text for text in texts if not any(sentence in text for sentence in stated)]

"""The report's sections on speed and size, on quantised copies and on drafts: what was measured, and beside it what is
to be expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.artifacts.draft import MOST_DRAFTED, Acceptance, DraftText
from shoal.artifacts.evaluation import CONTROL, QUANTIZED, ROLES
from shoal.artifacts.speed import BatchSpeed, Speed, SpeedScore
from shoal.formatting import bytes_text, count_text, duration_text, interval_text, listed
from shoal.stats.drafting import best_length, tokens_per_round

from .document import Block, Bullets, Paragraph, Section, Table
from .findings import Comparison, Row, Run
from .sections import difference_table, score_table
from .wording import DASH, named_or_counted

SIZES = ("Model", "Layers", "Parameters", "Of the teacher", "Weights on disk", "Cache per token", "Evaluated in")
AGAINST = "Against the teacher"
SPEEDS = ("Model", "At once", "Reading", AGAINST, "First token", "Writing", AGAINST, "Peak memory")
RIVALS = ("teacher_quantized", "quantized")
EQUAL_BYTES = 0.1
"""Share by which bytes may differ that are called about equal."""
DRAFTS = ("Draft", "Text", "Decoding", "Accepted", "A step", "Drafted", "Tokens a round", "By formula", "Speed-up")
TEXTS = {"held_out": "held-out text", "written": "the teacher's own text"}
DRAFT_LEGEND = (
    "In speculative decoding a draft writes g tokens and the teacher reads them in one step: the first ones that it "
    "accepts stand, and one token of its own, so the text is the teacher's. “Accepted” is the share a of positions at "
    "which the draft's token would stand, 1 − the total variation between both distributions where text is sampled at "
    "temperature 1, agreement of first choices where it is greedy. “A step” is the time c of one token of the draft. "
    "“Tokens a round” are counted along the texts; the formula, (1 − a^(g+1)) / (1 − a), takes every token to be "
    "accepted alike. Speed-up: the tokens of a round over its g c + 1 steps of the teacher, at the g that is best; it "
    "takes the teacher to read g + 1 tokens as fast as one. It cannot pay where no g makes more of them than steps: "
    "by the formula, where a is not above c."
)
Kind = Literal["prefill", "decode"]
Words = Callable[[float], str]


@dataclass(frozen=True)
class SpeedRatio:
    """Speed over the teacher's; above 1 = faster."""

    value: float
    """Ratio of the two medians."""
    limits: tuple[float, float] | None
    """Smallest and largest ratio of one round, in which both took a turn; None where no rounds were kept."""

    def in_words(self) -> str:
        """`1.24 × [1.20, 1.31]`."""
        return f"{self.value:.2f} ×" + (f" [{self.limits[0]:.2f}, {self.limits[1]:.2f}]" if self.limits else "")


def speed_ratio(own: BatchSpeed | SpeedScore, teacher: BatchSpeed | SpeedScore, kind: Kind) -> SpeedRatio:
    """Round by round: what disturbs the machine for a while slows both, and little of it is left in their ratio."""
    field = f"{kind}_tokens_per_s"
    rounds = own.samples.get(kind, ()), teacher.samples.get(kind, ())
    ratios = [after / before for after, before in zip(*rounds, strict=True)] if len({*map(len, rounds)}) == 1 else []
    limits = (min(ratios), max(ratios)) if ratios else None
    return SpeedRatio(getattr(own, field) / getattr(teacher, field), limits)


def speed_section(run: Run) -> Section:
    """Parameters, bytes, cache, memory and speeds of every role."""
    blocks: list[Block] = []
    scores = run.speed.roles if run.speed else {}
    if rows := [_size_row(run, role, scores.get(role)) for role in ROLES if role in run.evaluations or role in scores]:
        blocks.append(Table("Size", SIZES, tuple(rows)))
    if run.speed is None:
        blocks.append(Paragraph("Speed was not measured in this run (`eval.speed` in the recipe)."))
        return Section("Speed and size", tuple(blocks))
    blocks += [_speed_table(run.speed), *_explanations(run.speed)]
    if run.speed.left_out:
        blocks.append(Bullets(tuple(f"{reason[0].upper()}{reason[1:]}." for reason in run.speed.left_out)))
    return Section("Speed and size", tuple(blocks))


def quantized_section(run: Run, comparison: Comparison) -> Section | None:
    """What quantising cost, and student against teacher at their bytes; None where nothing is quantised."""
    roles = [role for role in QUANTIZED if role in run.evaluations]
    if not roles:
        return None
    body = [_quantized_row(run, role) for role in ROLES if role in run.evaluations and role != CONTROL]
    columns = ("Model", "Made of", "Format", "Weights on disk", "Of the teacher", "Made by", "Scored by")
    blocks: list[Block] = [Table("Bytes", columns, tuple(body))]
    elsewhere = [role for role in roles if role in {role for row in comparison.elsewhere for role in row.scores}]
    rows = comparison.elsewhere if "quantized" in elsewhere else comparison.rows
    silent = {row.key for row in comparison.rows if not row.has_signal}
    pairs: dict[tuple[str, str], str] = {
        (_source(run), "quantized"): f"What quantising cost the student: quantized minus {_source(run)}",
        ("teacher", "teacher_quantized"): "What quantising cost the teacher: teacher_quantized minus teacher",
        RIVALS: "The quantised student against the quantised teacher: quantized minus teacher_quantized",
    }
    blocks += [Paragraph(sentence) for sentence in _at_their_bytes(run, [row for row in rows if row.key not in silent])]
    if elsewhere:
        engine, rest = run.evaluations[elsewhere[0]].engine, next(iter(run.evaluations.values())).engine
        told = f"{listed(elsewhere)} {'was' if len(elsewhere) == 1 else 'were'} scored by {engine}, all else by {rest}"
        blocks += [
            Paragraph(f"{told}. Scores of two engines are not paired: kernels differ, and not only bits."),
            score_table(run, comparison.elsewhere),
        ]
    blocks += [
        difference_table(rows, *pair, caption)
        for pair, caption in pairs.items()
        if any(pair in r.differences for r in rows)
    ]
    return Section("Quantised", tuple(blocks))


def _source(run: Run) -> str:
    """The role that the quantised student was made of."""
    return run.quantized["quantized"].source if "quantized" in run.quantized else "distilled"


def _quantized_row(run: Run, role: str) -> tuple[str, ...]:
    evaluation, record, teacher = run.evaluations[role], run.quantized.get(role), run.evaluations.get("teacher")
    told = (record.source, record.format) if record else (DASH, DASH)
    share = f"{100 * evaluation.num_bytes / teacher.num_bytes:.1f} %" if teacher else DASH
    return (role, *told, bytes_text(evaluation.num_bytes), share, record.library if record else DASH, evaluation.engine)


def _at_their_bytes(run: Run, rows: Sequence[Row]) -> Iterator[str]:
    """Whether the quantised teacher is better than the quantised student, and at which bytes."""
    if not all(role in run.evaluations for role in QUANTIZED):
        return
    student, teacher = (run.evaluations[role].num_bytes for role in QUANTIZED)
    ratio = student / teacher
    formats = {role: f" ({run.quantized[role].format})" if role in run.quantized else "" for role in QUANTIZED}
    by_verdict = {
        verdict: [row for row in rows if row.verdict(*RIVALS) == verdict] for verdict in ("better", "worse", "unclear")
    }
    words = {"better": "better on ", "worse": "worse on ", "unclear": "not clearly different on "}
    told = "; ".join(words[verdict] + named_or_counted(own) for verdict, own in by_verdict.items() if own)
    told = told or "compared on no task that has a signal"
    is_even = abs(ratio - 1) <= EQUAL_BYTES
    at = "At about equal bytes" if is_even else f"At {ratio:.2f} times the bytes"
    yield (
        f"{at} ({bytes_text(student)} and {bytes_text(teacher)}), the quantised student{formats['quantized']} is, "
        f"against the quantised teacher{formats['teacher_quantized']}, {told}."
    )
    if not is_even:
        yield "These are not equal bytes; quantize.teacher_format chooses a format that brings them nearer together."


def draft_section(run: Run) -> Section | None:
    """What the teacher accepts of the cut models' tokens, and whether writing with them as drafts pays."""
    if run.drafts is None:
        return None
    rows = [(role, text) for role, texts in run.drafts.roles.items() for text in texts]
    lengths = [
        (f"{role}, {TEXTS[text.text]}, {way}", *map(_tokens_text, _tokens(acceptance)))
        for role, text in rows
        for way, acceptance in _ways(text)
    ]
    caption = "Tokens of a round by how many are drafted, counted along the texts"
    blocks = [
        draft_table([(role, text, draft_cost(run.speed, role)) for role, text in rows]),
        Paragraph(DRAFT_LEGEND),
        Table(caption, ("Draft", *map(str, range(1, MOST_DRAFTED + 1))), tuple(lengths), folded=True),
    ]
    return Section("As a draft for the teacher", tuple(blocks))


def draft_table(rows: Sequence[tuple[str, DraftText, float | None]]) -> Table:
    """Name, acceptance and cost of every draft: what is accepted, and the speed-up of the best number of tokens."""
    cells = [
        (name, TEXTS[text.text], way, *_draft_cells(acceptance, cost))
        for name, text, cost in rows
        for way, acceptance in _ways(text)
    ]
    sizes = {text.text: f"{text.num_positions:,} positions of {text.num_texts:,} texts" for _, text, _ in rows}
    caption = f"Speculative decoding: {'; '.join(f'{TEXTS[kind]}, {size}' for kind, size in sizes.items())}"
    return Table(caption, DRAFTS, tuple(cells), frozenset({0, 1, 2}))


def draft_cost(speed: Speed | None, role: str) -> float | None:
    """Time of a step of ``role`` over one of the teacher's, one sequence at a time; None = not measured."""
    if speed is None or not {"teacher", role} <= speed.roles.keys():
        return None
    single = [
        batch.decode_tokens_per_s
        for own in ("teacher", role)
        for batch in _batches(speed, speed.roles[own])
        if batch.batch_size == 1
    ]
    return single[0] / single[1] if len(single) == 2 else None


def _ways(text: DraftText) -> tuple[tuple[str, Acceptance], ...]:
    return (("sampled", text.sampled), ("greedy", text.greedy))


def _tokens(acceptance: Acceptance) -> list[float | None]:
    return [None if accepted is None else 1 + accepted for accepted in acceptance.accepted]


def _draft_cells(acceptance: Acceptance, cost: float | None) -> tuple[str, ...]:
    share, tokens = acceptance.share, _tokens(acceptance)
    accepted = interval_text((share.value, share.ci_low, share.ci_high), ".1f", " %", scale=100)
    if cost is None:
        return (accepted, DASH, DASH, DASH, DASH, "not measured with one sequence at once")
    step = f"{cost:.2f} of the teacher's"
    if not any(tokens):
        return (accepted, step, DASH, DASH, DASH, "no text is long enough")
    if best_length(tokens, cost)[1] <= 1:
        return (accepted, step, DASH, DASH, DASH, "cannot pay")
    length, factor = best_length(tokens, cost)
    formula = tokens_per_round(share.value, length)
    return (accepted, step, str(length), _tokens_text(tokens[length - 1]), _tokens_text(formula), f"{factor:.2f} ×")


def _tokens_text(tokens: float | None) -> str:
    return DASH if tokens is None else f"{tokens:.2f}"


def _size_row(run: Run, role: str, score: SpeedScore | None) -> tuple[str, ...]:
    evaluation, teacher = run.evaluations.get(role), run.evaluations.get("teacher")

    def known(field: str, source: Any) -> float | None:
        return next((value for holder in (source, score) if (value := getattr(holder, field, None)) is not None), None)

    parameters, stored = known("num_parameters", evaluation), known("num_bytes", evaluation)
    timed = run.speed.roles.get("teacher") if run.speed else None
    whole = teacher.num_parameters if teacher else timed.num_parameters if timed else None
    expected = score.expected if score else {}
    cached = score.kv_bytes_per_token if score else None
    return (
        role,
        str(known("num_layers", evaluation) or DASH),
        _beside(parameters, expected.get("num_parameters"), count_text),
        DASH if parameters is None or not whole else f"{100 * parameters / whole:.1f} %",
        _beside(stored, expected.get("num_bytes"), bytes_text),
        _beside(cached, expected.get("kv_bytes_per_token"), bytes_text),
        duration_text(evaluation.seconds) if evaluation else DASH,
    )


def _speed_table(speed: Speed) -> Table:
    rows = []
    kinds: tuple[Kind, ...] = ("prefill", "decode")
    for role, score in speed.roles.items():
        for batch in _batches(speed, score):
            teacher = _teacher_at(speed, batch.batch_size)
            cells = [role, f"{batch.batch_size:,}"]
            for kind in kinds:
                cells.append(_with_range(getattr(batch, f"{kind}_tokens_per_s"), batch.samples.get(kind, ())))
                cells.append(DASH if teacher is None or role == "teacher" else _against(teacher, batch, kind))
            cells.insert(4, _beside(batch.first_token_s, batch.expected.get("first_token_s"), _seconds_text))
            cells.append(_beside(batch.peak_memory_bytes, batch.expected.get("peak_memory_bytes"), bytes_text))
            rows.append(tuple(cells))
    caption = (
        f"Speed with prompts of {speed.prompt_tokens:,} tokens and {speed.new_tokens:,} new ones, {speed.dtype}; "
        "tokens per second over all sequences, slowest and fastest repeat in brackets; against the teacher the "
        "smallest and largest ratio of one round, in which every model takes a turn"
    )
    return Table(caption, SPEEDS, tuple(rows))


def _explanations(speed: Speed) -> list[Block]:
    machine = speed.provenance.environment
    where = ", ".join(f"{key.replace('_', ' ')} {machine[key]}" for key in ("device", "cpu_threads") if key in machine)
    blocks: list[Block] = [
        Paragraph(
            "The models were timed in turns in one process, so that a busy moment of the machine hits all of them. "
            f"Machine: {where or 'not recorded'}."
        )
    ]
    if any(batch.peak_memory_bytes is not None for score in speed.roles.values() for batch in score.batches):
        blocks.append(
            Paragraph(
                "Peak memory is what one model's weights, cache and intermediate tensors take at the fullest moment, "
                "as torch's allocator counts it: without Python, libraries and what they set aside for themselves."
            )
        )
    if any(score.expected or any(batch.expected for batch in score.batches) for score in speed.roles.values()):
        blocks.append(
            Paragraph(
                "“Expected” is the teacher's value with as many layers as this model has, all like the average one. It "
                "takes reading to be all multiplications, and writing to be all reading of weights and cache from "
                "memory; what remains outside the layers, such as the map to the vocabulary, is not made smaller by a "
                "cut. Measured far below that, something else takes the time."
            )
        )
    return blocks


def _batches(speed: Speed, score: SpeedScore) -> Sequence[BatchSpeed]:
    """Speeds by batch size; results from before there were several have one."""
    if score.batches:
        return score.batches
    first = speed.batch_size * speed.prompt_tokens / score.prefill_tokens_per_s
    return (
        BatchSpeed(speed.batch_size, score.prefill_tokens_per_s, score.decode_tokens_per_s, first, None, score.samples),
    )


def _teacher_at(speed: Speed, batch_size: int) -> BatchSpeed | None:
    teacher = speed.roles.get("teacher")
    batches = _batches(speed, teacher) if teacher else ()
    return next((batch for batch in batches if batch.batch_size == batch_size), None)


def _beside(value: float | None, expected: float | None, words: Words) -> str:
    """The value with what was expected; that is left out where the two read the same."""
    if value is None:
        return DASH
    text = words(value)
    if expected is None:
        return text
    return f"{text} (as expected)" if words(expected) == text else f"{text} (expected {words(expected)})"


def _with_range(value: float, samples: Sequence[float]) -> str:
    return f"{value:,.1f}" + (f" [{min(samples):,.1f}, {max(samples):,.1f}]" if samples else "")


def _against(teacher: BatchSpeed, batch: BatchSpeed, kind: Kind) -> str:
    """The ratio with its range over the rounds, and what was expected of it."""
    field = f"{kind}_tokens_per_s"
    ratio, expected = speed_ratio(batch, teacher, kind), batch.expected.get(field)
    if expected is None:
        return ratio.in_words()
    wanted = SpeedRatio(expected / getattr(teacher, field), None).in_words()
    same = wanted == SpeedRatio(ratio.value, None).in_words()
    return f"{ratio.in_words()} ({'as expected' if same else f'expected {wanted}'})"


def _seconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

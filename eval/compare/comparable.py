"""Runs that may stand in one table: everything that shapes a score has to agree, and what does not is named.

A run is read from its directory alone: which recipe made it may be gone, its artifacts say what counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.artifacts.evaluation import MODEL, NATS_PER_TOKEN, PERPLEXITY, Scores, TaskScore
from shoal.errors import UserError
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.stats.paired import paired, require_same_measurement
from shoal.task_words import COLUMNS

from ..report.run import Run, read_run

CUT_ROLES = ("pruned", "distilled")
MOST_PROBLEMS = 8
"""Problems that one refusal lists."""
PROBE = "The naïve café cost 1,234.50 € in 2024; def f(x):\n\treturn  x**2  # 東京 🙂 \u200bend\n\n  A. B) C"
"""Something of everything that rules of splitting and normalising treat apart."""
SAME_TEACHER_P = 0.001
"""Below it one teacher's two scores are two measurements, whatever the settings say."""


@dataclass(frozen=True)
class Contender:
    """One of the runs that are compared, or a checkpoint beside them."""

    letter: str
    """Letter of the run: A, B, ... in the order given."""
    name: str
    """Last parts of the path, as many as tell the runs apart; of a checkpoint the name it was given by."""
    run: Run

    @property
    def is_model(self) -> bool:
        """Whether it is a checkpoint that no run has made."""
        return MODEL in self.run.evaluations

    @property
    def teacher(self) -> str | None:
        """Fingerprint of the teacher's content; None = the run does not record it, or it is a checkpoint."""
        if "teacher" in self.run.evaluations:
            return self.run.evaluations["teacher"].provenance.inputs.get("model")
        return self.run.plan.provenance.inputs.get("model") if self.run.plan else None

    def file(self, role: str) -> Path:
        """Path of the scores of ``role``."""
        return self.run.folder / "eval" / f"{role}.json"


@dataclass(frozen=True)
class Common:
    """What can be compared."""

    tasks: tuple[str, ...]
    """Names of the tasks, by column and then by ability in the order of the first run."""
    left_out: tuple[str, ...]
    """Sentences that say why a task is not among them."""
    precision: str = ""
    """Sentence on runs that were scored in different precisions; empty = all in one."""


def read_contenders(folders: Sequence[Path]) -> tuple[Contender, ...]:
    """The runs, and folders with the scores of a checkpoint, in the order given.

    Raises:
        UserError: fewer than two, one of them twice, no run, a folder that is no run's or holds no score of a cut
            model, or files of one run that do not belong together.
    """
    if len(folders) < 2:
        instead = f"got only {folders[0]}" if folders else "got none"
        raise UserError(f"compare: needs at least two run directories, {instead}; for one run use `shoal report`")
    resolved = [folder.expanduser().resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"compare: {folders[index]} is given twice; give every run once")
    runs = zip(map(read_scored, folders), distinct_names(resolved), strict=True)
    contenders = tuple(
        Contender(_letter(index), run.model if MODEL in run.evaluations else name, run)
        for index, (run, name) in enumerate(runs)
    )
    if all(contender.is_model for contender in contenders):
        raise UserError(
            "compare: pass at least one run directory; its evaluation settings are used for the other models"
        )
    return contenders


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of every path, which are all different, as many as are needed for the names to be so too."""
    parts = [folder.parts for folder in folders]
    depths = range(1, max(map(len, parts)) + 1)
    depth = next(depth for depth in depths if len({part[-depth:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def find_common(contenders: Sequence[Contender], *, across_teachers: bool = False) -> Common:
    """The tasks that every run was scored on, with equal settings.

    A task that some run lacks is left out. One that all of them have, but not measured alike, is no reason to leave it
    out: whoever reads the table would take the rest for the whole.

    Raises:
        UserError: another teacher (without ``across_teachers``), no common task, or settings that differ: the file, the
            field and both values.
    """
    problems = [] if across_teachers else list(_teacher_problems(contenders))
    tasks, left_out = _shared_tasks(contenders)
    if across_teachers or any(contender.is_model for contender in contenders):
        tasks, other_tokens = _without_token_counts(contenders, tasks)
        left_out += other_tokens
    problems += _differences(contenders, tasks)
    precision = _precision(contenders)
    if not problems and not across_teachers:
        why = "the precision moves it" if precision else "something that is not recorded differs"
        problems += _unexplained(contenders, tasks, why)
    if problems:
        more = f"\nand {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise UserError(
            "compare: these runs cannot stand in one table\n" + "\n".join(problems[:MOST_PROBLEMS]) + more + "\n"
            "Run `shoal eval` with the same settings in all of them (what they share is not scored again), or compare "
            "fewer runs"
        )
    return Common(tuple(tasks), tuple(left_out), precision)


def score_of(evaluation: Scores, task: str) -> TaskScore:
    """The score of ``task``, which it has."""
    return next(score for score in evaluation.tasks if score.task == task)


def read_scored(folder: Path) -> Run:
    """The run at ``folder``, which has scores that can be compared.

    Raises:
        UserError: it has none, or cannot be read.
    """
    try:
        run = read_run(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); make it readable") from error
    if not any(role in run.evaluations for role in (*CUT_ROLES, MODEL)):
        only = "only the teacher was evaluated" if run.evaluations else "has no evaluation"
        is_cut = any((folder / name).is_dir() for name in ("student", "distilled"))
        remedy = "run `shoal eval` with its recipe first" if is_cut else "run `shoal prune`, then `shoal eval` first"
        raise UserError(f"{folder}: {only}, so eval/ has no score of a pruned model to compare; {remedy}")
    return run


def _letter(index: int) -> str:
    """A to Z, then AA, AB, ..."""
    head, tail = divmod(index, 26)
    return (_letter(head - 1) if head else "") + chr(ord("A") + tail)


def _teacher_problems(contenders: Sequence[Contender]) -> Iterator[str]:
    contenders = [contender for contender in contenders if not contender.is_model]
    first = contenders[0]
    for contender in contenders:
        if contender.teacher is None:
            yield (
                f"{contender.run.folder}: its teacher is unknown, because eval/teacher.json and plan.json are missing; "
                "evaluate it, or add --across-teachers"
            )
        elif first.teacher is not None and contender.teacher != first.teacher:
            files = [
                side.file("teacher") if "teacher" in side.run.evaluations else side.run.folder / "plan.json"
                for side in (contender, first)
            ]
            names = [f" ({side.run.model})" if side.run.recipe else "" for side in (contender, first)]
            yield (
                f"{files[0]}: model is {contender.teacher!r}{names[0]}, but {first.teacher!r}{names[1]} in {files[1]}: "
                "another teacher; add --across-teachers to compare anyway"
            )


def _shared_tasks(contenders: Sequence[Contender]) -> tuple[list[str], list[str]]:
    """Tasks that every evaluation of every run has, and why others are left out."""
    names = {
        str(contender.file(role)): [task.task for task in evaluation.tasks]
        for contender in contenders
        for role, evaluation in contender.run.evaluations.items()
    }
    tasks = {task.task: task for contender in contenders for task in _tasks_of(contender)}
    shared, left_out = [], []
    for task in tasks:
        lacking = [file for file, known in names.items() if task not in known]
        if lacking:
            rest = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            left_out.append(f"{task} is not compared: it is not in {lacking[0]}{rest}.")
        else:
            shared.append(task)
    if not shared:
        sets = [f"{c.run.folder}: {', '.join({task.task: 0 for task in _tasks_of(c)}) or 'none'}" for c in contenders]
        raise UserError("compare: no task was evaluated in all of these runs\n" + "\n".join(sets))
    abilities = list(dict.fromkeys(tasks[task].ability for task in shared))
    columns = (*COLUMNS, "")
    order = {task: (columns.index(tasks[task].column), abilities.index(tasks[task].ability)) for task in shared}
    return sorted(shared, key=order.__getitem__), left_out


def _tasks_of(contender: Contender) -> Iterator[TaskScore]:
    return (task for evaluation in contender.run.evaluations.values() for task in evaluation.tasks)


def _without_token_counts(contenders: Sequence[Contender], tasks: list[str]) -> tuple[list[str], list[str]]:
    """Between tokenizers a token is not the same unit: scores per token stay out unless the text has equal tokens."""
    evaluations = [evaluation for c in contenders for evaluation in c.run.evaluations.values()]
    if PERPLEXITY in tasks:
        texts = [score_of(evaluation, PERPLEXITY) for evaluation in evaluations]
        windows = [{item.id for item in score.items} for score in texts]
        in_tokens = all(score.metric == NATS_PER_TOKEN for score in texts)
        if in_tokens and all(window == windows[0] for window in windows):  # which are named after the tokens in them
            return tasks, []
    per_token = [task for task in tasks if any("per_token" in score_of(own, task).metric for own in evaluations)]
    unknown = "whether the models' tokenizers differ shows only in scores of perplexity, which are missing"
    why = "the models' tokenizers differ" if PERPLEXITY in tasks else unknown
    reasons = [f"{task} is not compared: it is a mean per token, and {why}." for task in per_token]
    return [task for task in tasks if task not in per_token], reasons


def _differences(contenders: Sequence[Contender], tasks: Sequence[str]) -> Iterator[str]:
    """Every task that was not measured as in the first run: by the same role, else by its first one."""
    first, known = contenders[0], contenders[0].run.evaluations
    for contender in contenders:
        for role, evaluation in contender.run.evaluations.items():
            reference = role if contender is not first and role in known else next(iter(known))
            for task in tasks:
                try:
                    require_same_measurement(score_of(known[reference], task), score_of(evaluation, task))
                except UserError as error:
                    yield f"{contender.file(role)} and {first.file(reference)}: {error}"


def _unexplained(contenders: Sequence[Contender], tasks: Sequence[str], why: str) -> Iterator[str]:
    """One teacher, equal settings and other scores: then something that nobody wrote down is not the same."""
    judged = [contender for contender in contenders if "teacher" in contender.run.evaluations]
    for contender in judged[1:]:
        for task in tasks:
            before, after = (score_of(side.run.evaluations["teacher"], task) for side in (judged[0], contender))
            difference = paired(before, after)
            if difference.test == "mcnemar-exact" and difference.p_value < SAME_TEACHER_P:
                yield (
                    f"{contender.file('teacher')}: task {task!r}: score is {after.score:.3f}, but {before.score:.3f} "
                    f"in {judged[0].file('teacher')}, for the same teacher on the same items (p < {SAME_TEACHER_P}): "
                    f"{why}"
                )


def dtype_of(contender: Contender, role: str) -> str:
    """The precision a role was scored in."""
    return str(contender.run.evaluations[role].provenance.inputs.get("dtype", "absent"))


def _precision(contenders: Sequence[Contender]) -> str:
    """What has to be said of scores in several precisions: the machine chooses one where the recipe says `auto`."""
    dtypes = {c.letter: tuple({dtype_of(c, role): None for role in c.run.evaluations}) for c in contenders}
    if len(set(dtypes.values())) == 1:
        return ""
    told = ", ".join(f"{letter} in {' and '.join(types)}" for letter, types in dtypes.items())
    return (
        f"The runs were scored in different precisions: {told}. Part of a difference may come from that; set the same "
        "`dtype` in all of them to exclude it."
    )


def require_same_tokenizer(folders: Mapping[str, Path], *, trust_remote_code: bool = False) -> None:
    """Refuse roles whose tokenizers differ in anything that shapes tokens; files may say the same in other words."""
    (first, reference), *others = folders.items()
    for role, folder in others:
        if difference := tokenizer_difference(folder, reference, trust_remote_code=trust_remote_code):
            raise UserError(
                f"{folder}: the tokenizer of {role} has {difference} than that of {first} ({reference}), so "
                f"prompts would differ. Copy the tokenizer files of {first} there, or repeat `shoal run`"
            )


def tokenizer_difference(folder: Path, reference: Path, *, trust_remote_code: bool = False) -> str:
    """What is another in one tokenizer than in that of ``reference``; empty where text becomes equal tokens."""
    if tokenizer_fingerprint(folder) == tokenizer_fingerprint(reference):
        return ""
    from shoal.models.load import load_tokenizer

    own, other = (_tokens(load_tokenizer(path, trust_remote_code=trust_remote_code)) for path in (folder, reference))
    return next((f"another {what}" for what, value in own.items() if value != other[what]), "")


def _tokens(tokenizer: Any) -> dict[str, Any]:
    special = ("bos_token", "eos_token", "unk_token")  # padding is masked, so its token may differ
    named = {name: getattr(tokenizer, name) for name in special}
    return {"vocabulary": tokenizer.get_vocab(), **named, "way of splitting text": tokenizer.encode(PROBE)}

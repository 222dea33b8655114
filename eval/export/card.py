"""The model card of an exported checkpoint: metadata the Hub understands, and what a user of the model has to know."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from shoal.artifacts.evaluation import TaskScore
from shoal.errors import UserError
from shoal.formatting import bytes_text, duration_text, layers_text, listed
from shoal.models.checkpoint_files import DEMO_PREFIX, json_or_empty, mtp_names, read_shards
from shoal.recipe.section import TEACHER_TEXT
from shoal.redaction import redacted

from ..report.cautions import cautions_section
from ..report.document import block_markdown, inline, prose
from ..report.findings import Comparison, Row, Run, compare, is_share, read_run
from ..report.headline import board, headline
from ..report.report import FIGURES_DIR
from ..report.sections import DIFFERENCES, difference_table, form_section, no_signal_section, score_table
from ..report.speed import speed_section
from ..report.wording import by_column, column_words
from .license import License, base_license, license_file

DEMO_BASES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub id of the model that a bundled demo model was made from."""
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")
PICTURES = {
    "before_after": "Scores before and after, with 95 % intervals",
    "levels": "Scores by level of difficulty",
    "depth": "The stack of layers, what was taken out of it, and what each layer was worth",
    "training": "Training loss and learning rate by step",
}
"""Figures that a card shows, as far as the run has drawn them."""
SHOWN_DIFFERENCES = (("pruned", "distilled"), ("teacher", "control"), ("control", "distilled"))
"""(before, after) that a card has a table for; every score stands above them."""
TRAINED_FORM = "in the form of training text"


def model_card(run_dir: Path, *, base_folder: Path | None = None) -> str:
    """README.md for the distilled checkpoint of a run: YAML metadata with model-index, then Markdown.

    ``base_folder`` is the teacher's checkpoint, whose card or license file names the license; None = from the recipe's
    model: a local folder, or what the Hub's cache holds of it.

    Raises:
        UserError: the run has no plan, so there is nothing a card could describe.
    """
    run = read_run(run_dir)
    if run.plan is None:
        raise UserError(
            f"{run_dir / 'plan.json'}: no such file; a model card describes a cut model, run `shoal prune` first"
        )
    base = base_model(run)
    revision = (run.recipe or {}).get("revision")
    terms = base_license(run.model, hub_id=base, revision=revision, folder=base_folder)
    datasets, paths = _training_data(run), sorted(_paths(run.recipe), key=len, reverse=True)
    run = replace(run, recipe=_public(redacted(run.recipe)))
    comparison = compare(run)
    metadata = _metadata(run, comparison, base, terms, datasets)
    body = "\n\n".join(_body(run, comparison, terms, base, base_folder))
    card = f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"
    for path in paths:  # sources and tasks are called by their paths in results too
        alone = rf"(?<![\w./-]){re.escape(path)}(?![\w-])"  # /data is no part of org/data-8b, nor of .../data
        card = re.sub(alone, lambda found: _public(found[0]), card)
    return str(ModelCard(card))


def base_model(run: Run) -> str | None:
    """The base model's Hub id; None where the run started from a local folder, whose path is nobody else's business."""
    name = run.model
    if name.startswith(DEMO_PREFIX):
        return DEMO_BASES.get(name.removeprefix(DEMO_PREFIX))
    is_hub_id = run.recipe is not None and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id and not Path(name).exists() else None


def _metadata(run: Run, comparison: Comparison, base: str | None, terms: License, datasets: list[str]) -> ModelCardData:
    fields: dict[str, Any] = {"base_model_relation": "finetune"} if base and run.training else {}
    role = _role(run, "pruned")
    columns = by_column(row for row in comparison.rows if role in row.scores)
    scored = [row for rows in columns.values() for row in rows]
    return ModelCardData(
        base_model=base,
        datasets=datasets or None,
        library_name="transformers",
        license=terms.identifier or "other",
        license_name=terms.name if terms.identifier else "see-base-model",
        license_link=_license_link(run, terms, base),
        pipeline_tag="image-text-to-text" if _reads_images(run) else "text-generation",
        tags=_tags(run),
        model_name=_name(run, base),
        eval_results=[_eval_result(row.scores[role], row, role) for row in scored] or None,
        **fields,
    )


def _tags(run: Run) -> list[str]:
    made_by = {"layer-pruning": _is_smaller(run), "knowledge-distillation": bool(run.training) and _asked_teacher(run)}
    return ["shoal", *(tag for tag, holds in made_by.items() if holds), "arxiv:2510.02091"]


def _is_smaller(run: Run) -> bool:
    """Whether fewer or narrower layers are left than the base model has; what grew or was zeroed is no smaller."""
    return run.plan is not None and (len(run.plan.keep) < run.plan.num_layers or run.plan.width is not None)


def _asked_teacher(run: Run) -> bool:
    """Whether anything was learnt of the teacher: by a loss term, by layers healed before, or by text it wrote."""
    distill = (run.recipe or {}).get("distill") or {}
    kinds = {loss["kind"] for loss in distill.get("losses") or ()}
    sources = (run.training.data.get("sources") or {}) if run.training else {}
    return kinds != {"cross_entropy"} or bool(distill.get("local")) or TEACHER_TEXT in sources


def _license_link(run: Run, terms: License, base: str | None) -> str | None:
    """An address, or a file of the export; a base card's own file counts only where it came along."""
    link = terms.link
    if link and "://" not in link and not (run.folder / _role(run, "student") / link).is_file():
        return f"https://huggingface.co/{base}/blob/main/{link}" if base else None
    if terms.identifier or link:
        return link
    return f"https://huggingface.co/{base}" if base else None


def _role(run: Run, otherwise: str) -> str:
    return "distilled" if "distilled" in run.evaluations or run.training else otherwise


def _eval_result(score: TaskScore, row: Row, role: str) -> EvalResult:
    """One entry of the model-index. The Hub merges what shares a data set, so metrics carry their intervals.

    Sites show a metric's name beside its value and little else, so it says where a score is no benchmark's.
    """
    about: dict[str, Any] = {"num_items": score.n, "higher_is_better": score.higher_is_better}
    about |= {"column": score.column} if score.column else {}
    where = f", {column_words(score.column)}" if score.column else ""
    about |= {"chance": score.chance} if score.higher_is_better else {}
    about |= {"ci_low": round(score.ci_low, 6), "ci_high": round(score.ci_high, 6), "confidence": 0.95}
    if teacher := row.scores.get("teacher"):
        about["base_model_value"] = round(teacher.score, 6)
    kept = row.retained.get(role)
    if kept is not None and kept.value is not None and kept.ci_low is not None and kept.ci_high is not None:
        about["retention"] = round(kept.value, 6)
        about |= {"retention_low": round(kept.ci_low, 6), "retention_high": round(kept.ci_high, 6)}
    return EvalResult(
        task_type="text-generation",
        task_name=f"{score.ability} ({score.protocol}{where})",
        dataset_type=score.task,
        dataset_name=score.task,
        dataset_config=score.protocol,
        dataset_args={"protocol": score.protocol, "num_few_shot": score.num_fewshot, "task_version": score.version},
        metric_type="accuracy" if is_share(score) and score.metric == "acc" else score.metric,
        metric_name=f"{score.metric} {TRAINED_FORM}" if score.column == "in" else score.metric,
        metric_value=round(score.score, 6),
        metric_args=about,
    )


def _body(run: Run, comparison: Comparison, terms: License, base: str | None, base_folder: Path | None) -> list[str]:
    assert run.plan is not None
    parts: list[str] = [f"# {inline(_name(run, base))}"]
    first, *others = (prose(sentence) for sentence in headline(run, comparison))
    lines = board(run, comparison)
    parts += [first, *([block_markdown(lines.table)] if lines else []), *others]
    if comparison.rows:
        parts += ["## Before and after", *_results(run, comparison)]
        parts += ["## Read with care", *map(block_markdown, cautions_section(run, comparison).blocks)]
    changed = "cut" if _is_smaller(run) else "changed"
    parts += [f"## What was {changed}", *_cut_lines(run, base, base_folder), *_picture(run, "depth")]
    if run.training:
        parts += ["## How it was trained", _training_lines(run), *_picture(run, "training")]
    if run.speed:
        parts += ["## Speed and size", *map(block_markdown, speed_section(run).blocks)]
    automatic = "AutoModelForImageTextToText" if _reads_images(run) else "AutoModelForCausalLM"
    usage = _USAGE.format(path=_repo(run) or ".", automatic=automatic)
    parts += ["## How to use it", f"```python\n{usage.rstrip()}\n```"]
    parts += ["## Intended use", prose(_intended(run)), "## Limits", _limits(run, comparison)]
    parts += ["## License", prose(_license_sentence(run, terms, base))]
    if run.recipe:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
        parts += ["## Recipe", prose("Made with shoal; this recipe makes it again."), f"```yaml\n{text.rstrip()}\n```"]
    return parts


def _cut_lines(run: Run, base: str | None, base_folder: Path | None) -> list[str]:
    assert run.plan is not None
    lines = [f"Base model: {base or 'a local checkpoint'}, {run.plan.num_layers} decoder layers"]
    if run.plan.drop:
        lines.append(f"Dropped layers (of the base model, counted from 0): {layers_text(run.plan.drop)}")
        lines.append(f"Kept: {layers_text(run.plan.keep)}")
    lines += [f"Changed ({change.kind}): {change.words}" for change in run.plan.changes]
    names = [name for shard in read_shards(base_folder) for name in shard.tensors] if base_folder else []
    if mtp_names(names, run.plan.num_layers):
        lines.append("Left out: the base model's modules of multi-token prediction, which guess further tokens")
    lines.append(f"How they were chosen: {run.plan.reason}")
    return [block_markdown(tuple(lines))]


def _training_lines(run: Run) -> str:
    assert run.training is not None
    training, distill = run.training, (run.recipe or {}).get("distill") or {}
    how = "Distilled from the base model on" if _asked_teacher(run) else "Trained without a teacher on"
    lines = [f"{how} {training.num_tokens:,} tokens in {training.num_steps:,} steps"]
    if kinds := [str(loss["kind"]).replace("_", " ") for loss in distill.get("losses") or ()]:
        lines.append(f"Objective: {listed(kinds)}")
    if sources := training.data.get("sources"):
        lines.append(f"Text: {listed(map(str, sources))}")
    environment = training.provenance.environment
    took = f"{duration_text(training.seconds)}, {bytes_text(training.peak_memory_bytes)} in the largest process"
    lines.append(f"Took {took}; on {environment.get('world_size', 1)} x {environment.get('device', 'not recorded')}")
    versions = [f"{name} {environment[name]}" for name in ("shoal", "torch", "transformers") if name in environment]
    if versions:
        lines.append(f"Versions: {listed(versions)}")
    return block_markdown(tuple(lines))


def _results(run: Run, comparison: Comparison) -> list[str]:
    inside = [row for row in comparison.rows if row.column == "in"]
    outside = [row for row in comparison.rows if row.column != "in"]
    parts: list[str] = [*_picture(run, "before_after")]
    parts += [block_markdown(score_table(run, outside))] if outside else []
    if inside:
        parts += [f"### {TRAINED_FORM.capitalize()}", prose(_TRAINED_FORM), block_markdown(score_table(run, inside))]
    for pair in SHOWN_DIFFERENCES:
        if any(pair in row.differences for row in comparison.rows):
            parts.append(block_markdown(difference_table([*outside, *inside], *pair, DIFFERENCES[pair])))
    if form := form_section(comparison):
        parts += [f"### {form.title}", *map(block_markdown, form.blocks)]
    parts += _picture(run, "levels")
    silent = no_signal_section(comparison)
    if silent:
        parts += ["### No signal here", *map(block_markdown, silent.blocks)]
    return parts


def _reads_images(run: Run) -> bool:
    """Whether another class of transformers loads the student than that of plain language models."""
    names = json_or_empty(run.folder / "student/config.json").get("architectures") or [""]
    return str(names[0]).endswith("ForConditionalGeneration")


def _picture(run: Run, name: str) -> list[str]:
    file = f"{FIGURES_DIR}/{name}.png"
    return [f"![{PICTURES[name]}]({file})"] if (run.folder / file).is_file() else []


def _intended(run: Run) -> str:
    stand_in = ", and as a smaller, faster stand-in for its base model where the scores above are good enough"
    return (
        f"Research on which layers a language model needs{stand_in if _is_smaller(run) else ''}. It is a plain Hugging "
        "Face checkpoint: no remote code, safetensors only."
    )


def _limits(run: Run, comparison: Comparison) -> str:
    lines = [
        "It has the biases and gaps of its base model, and those that its changes add.",
        "Only the abilities in the table were measured. What is not in it, longer texts, other languages, safety "
        "behaviour, may have suffered more.",
        "Scores by likelihood can hide damage that shows when the model writes freely; look at the generation rows "
        "first.",
    ]
    if not comparison.rows:
        lines.append("Nothing was evaluated before this card was written.")
    if run.training is None:
        lines.append("It was not trained after the cut.")
    return block_markdown(tuple(lines))


def _license_sentence(run: Run, terms: License, base: str | None) -> str:
    if terms.identifier:
        text = license_file(run.folder / _role(run, "student"))
        where = f"; its text is in {text.name}" if text else ""
        return f"{terms.name or terms.identifier}, taken over from {terms.source}{where}."
    return (
        f"The base model ({base or 'a local checkpoint'}) carried no license statement when this card was made, so the "
        "metadata says “other”. This model may be used as the base model's license allows; check it before you share."
    )


def _training_data(run: Run) -> list[str]:
    """Hub ids of the data sets it was trained on; bundled texts and local files have none."""
    sources = ((run.recipe or {}).get("distill") or {}).get("data") or []
    paths = dict.fromkeys(str(source["path"]) for source in sources) if run.training else {}
    return [path for path in paths if _is_hub_id(path)]


def _is_hub_id(path: str) -> bool:
    is_local = path.startswith((".", "/", "~")) or path.endswith(TEXT_SUFFIXES) or Path(path).exists()
    return path.count("/") == 1 and not is_local


def _repo(run: Run) -> str | None:
    repo = ((run.recipe or {}).get("export") or {}).get("hub_repo")
    return repo if isinstance(repo, str) else None


def _name(run: Run, base: str | None) -> str:
    if repo := _repo(run):
        return repo.split("/")[-1]
    assert run.plan is not None
    return f"{(base or 'model').split('/')[-1]}-{len(run.plan.keep)}-layers"


def _public(recipe: Any) -> Any:
    """The recipe without absolute paths: a card is read by strangers, and their disks look different."""
    if isinstance(recipe, dict):
        return {key: _public(value) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [_public(value) for value in recipe]
    is_path = isinstance(recipe, str) and recipe.startswith(("/", "~"))
    return f".../{Path(recipe).name}" if is_path else recipe


def _paths(recipe: Any) -> set[str]:
    """Every absolute path in the recipe."""
    if isinstance(recipe, dict | list):
        return {path for value in (recipe.values() if isinstance(recipe, dict) else recipe) for path in _paths(value)}
    return {recipe} if isinstance(recipe, str) and recipe != _public(recipe) and len(recipe) > 1 else set()


_TRAINED_FORM = (
    "These tasks ask other items, but as texts like those of the training do. What was trained in a form comes back in "
    "that form first, so they say less about the ability than scores outside it, and “more than the teacher” here is "
    "more of the form."
)
_USAGE = """from transformers import {automatic}, AutoTokenizer

path = "{path}"  # a Hub id or a local folder
tokenizer = AutoTokenizer.from_pretrained(path)
model = {automatic}.from_pretrained(path)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""

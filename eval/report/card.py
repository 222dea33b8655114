"""The model card of an exported checkpoint: metadata the Hub understands, and what a user of the model has to know.

The license is that of the base model, as far as it is stated there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from shoal.artifacts.evaluation import TaskScore
from shoal.errors import UserError
from shoal.model_names import DEMO_PREFIX
from shoal.models.checkpoint_files import json_or_empty, mtp_names, read_shards
from shoal.redaction import redacted

from .cautions import cautions
from .costs import size_table, speed_table
from .findings import SIGNAL_SIGMAS, Comparison, Row, compare, is_share
from .headline import board, headline
from .page import render
from .report import FIGURES_DIR
from .run import Run, read_run
from .tables import difference_tables, form_table, score_table, silent_table
from .wording import by_column, column_words

DEMO_BASES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub id of the model that a bundled demo model was made from."""
DEMO_LICENSES = {"smollm2-135m": "apache-2.0"}
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")
PICTURES = {
    "before_after": "Scores before and after, with 95 % intervals",
    "levels": "Scores by level of difficulty",
    "importance": "Importance of each layer; dropped layers are hatched",
    "training": "Training loss and learning rate by step",
}
"""Figures that a card shows, as far as the run has drawn them."""
SHOWN_DIFFERENCES = (("pruned", "distilled"), ("teacher", "control"), ("control", "distilled"))
"""(before, after) that a card has a table for; every score stands above them."""
TRAINED_WORDING = "in the trained wording"


@dataclass(frozen=True)
class License:
    """What is known of a license; identifier None = nothing is stated."""

    identifier: str | None = None
    """Name on the Hub; `other` for a license that the Hub has no name for."""
    name: str | None = None
    link: str | None = None
    source: str = ""
    """Place where the license is stated, for a reader."""


def model_card(run_dir: Path, *, base_folder: Path | None = None) -> str:
    """README.md for the distilled checkpoint of a run: YAML metadata with model-index, then Markdown.

    ``base_folder`` is the teacher's checkpoint, whose card or license file names the license; None = from the recipe's
    model: a local folder, or what the Hub's cache holds of it.

    Raises:
        UserError: the run has no plan, so there is nothing a card could describe.
    """
    run = read_run(run_dir)
    if run.plan is None:
        raise UserError(f"{run_dir / 'plan.json'}: no such file, and the card needs it; run `shoal prune` first")
    base = base_model(run)
    revision = (run.recipe or {}).get("revision")
    terms = base_license(run.model, hub_id=base, revision=revision, folder=base_folder)
    datasets, paths = _training_data(run), sorted(_paths(run.recipe), key=len, reverse=True)
    run = replace(run, recipe=_public(redacted(run.recipe)))
    comparison = compare(run)
    metadata = _metadata(run, comparison, base, terms, datasets)
    body = render("card", "md", **_contents(run, comparison, terms, base, base_folder))
    card = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    for path in paths:  # sources and tasks are called by their paths in results too
        alone = rf"(?<![\w./-]){re.escape(path)}(?![\w-])"  # /data is no part of org/data-8b, nor of .../data
        card = re.sub(alone, lambda found: _public(found[0]), card)
    return str(ModelCard(card))


def _contents(
    run: Run, comparison: Comparison, terms: License, base: str | None, base_folder: Path | None
) -> dict[str, Any]:
    """What the template of the card tells."""
    assert run.plan is not None
    inside = [row for row in comparison.rows if row.column == "in"]
    outside = [row for row in comparison.rows if row.column != "in"]
    names = [name for shard in read_shards(base_folder) for name in shard.tensors] if base_folder else []
    text = license_file(run.folder / _role(run, "student"))
    drawn = (name for name in PICTURES if (run.folder / FIGURES_DIR / f"{name}.png").is_file())
    return {
        "run": run,
        "name": _name(run, base),
        "base": base,
        "headline": headline(run, comparison),
        "board": board(run, comparison),
        "pictures": {name: PICTURES[name] for name in drawn},
        "outside": score_table(run, outside),
        "inside": score_table(run, inside),
        "differences": difference_tables([*outside, *inside], SHOWN_DIFFERENCES),
        "forms": form_table(comparison),
        "silent": silent_table(comparison),
        "sigmas": f"{SIGNAL_SIGMAS:.0f}",
        "cautions": cautions(run, comparison),
        "smaller": _is_smaller(run),
        "guesses_ahead": bool(mtp_names(names, run.plan.num_layers)),
        "taught": _asked_teacher(run),
        "distill": (run.recipe or {}).get("distill") or {},
        "losses": _losses(run),
        "size": size_table(run),
        "speed": run.speed and speed_table(run.speed),
        "automatic": "AutoModelForImageTextToText" if _reads_images(run) else "AutoModelForCausalLM",
        "repo": _repo(run) or ".",
        "terms": terms,
        "license_text": text and text.name,
    }


def base_model(run: Run) -> str | None:
    """The base model's Hub id; None where the run started from a local folder, whose path is nobody else's business."""
    name = (run.recipe or {}).get("model") or "./"
    if name.startswith(DEMO_PREFIX):
        return DEMO_BASES.get(name.removeprefix(DEMO_PREFIX))
    return name if name.count("/") <= 1 and not _is_local(name) else None


def _metadata(run: Run, comparison: Comparison, base: str | None, terms: License, datasets: list[str]) -> ModelCardData:
    fields: dict[str, Any] = {"base_model_relation": "finetune"} if base and run.training else {}
    role = _role(run, "pruned")
    columns = by_column(row for row in comparison.rows if role in row.scores)
    scored = [row for rows in columns.values() for row in rows]
    made_by = {"layer-pruning": _is_smaller(run), "knowledge-distillation": bool(run.training) and _asked_teacher(run)}
    return ModelCardData(
        base_model=base,
        datasets=datasets or None,
        library_name="transformers",
        license=terms.identifier or "other",
        license_name=terms.name if terms.identifier else "see-base-model",
        license_link=_license_link(run, terms, base),
        pipeline_tag="image-text-to-text" if _reads_images(run) else "text-generation",
        tags=["shoal", *(tag for tag, holds in made_by.items() if holds), "arxiv:2510.02091"],
        model_name=_name(run, base),
        eval_results=[_eval_result(row.scores[role], row, role) for row in scored] or None,
        **fields,
    )


def _is_smaller(run: Run) -> bool:
    """Whether fewer or narrower layers are left than the base model has; what grew or was zeroed is no smaller."""
    return run.plan is not None and (len(run.plan.keep) < run.plan.num_layers or run.plan.width is not None)


def _asked_teacher(run: Run) -> bool:
    """Whether anything was learnt from the teacher: by a loss term, or by text it wrote."""
    sources = ((run.recipe or {}).get("distill") or {}).get("data") or ()
    return _losses(run) != ["cross_entropy"] or any(source.get("generate") for source in sources)


def _losses(run: Run) -> list[str]:
    """The kinds of loss terms that some text was learnt by."""
    distill = (run.recipe or {}).get("distill") or {}
    of_all = distill.get("losses") or ()
    own = [source.get("losses") or of_all for source in distill.get("data") or [{}]]
    return list(dict.fromkeys(loss["kind"] for losses in [of_all if of_all in own else (), *own] for loss in losses))


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
        about["share_kept"] = round(kept.value, 6)
        about |= {"share_kept_low": round(kept.ci_low, 6), "share_kept_high": round(kept.ci_high, 6)}
    return EvalResult(
        task_type="text-generation",
        task_name=f"{score.ability} ({score.protocol}{where})",
        dataset_type=score.task,
        dataset_name=score.task,
        dataset_config=score.protocol,
        dataset_args={"protocol": score.protocol, "num_few_shot": score.num_fewshot, "task_version": score.version},
        metric_type="accuracy" if is_share(score) and score.metric == "acc" else score.metric,
        metric_name=f"{score.metric} {TRAINED_WORDING}" if score.column == "in" else score.metric,
        metric_value=round(score.score, 6),
        metric_args=about,
    )


def _reads_images(run: Run) -> bool:
    """Whether another class of transformers loads the student than that of plain language models."""
    names = json_or_empty(run.folder / "student/config.json").get("architectures") or [""]
    return str(names[0]).endswith("ForConditionalGeneration")


def _training_data(run: Run) -> list[str]:
    """Hub ids of the data sets it was trained on; bundled texts and local files have none."""
    sources = ((run.recipe or {}).get("distill") or {}).get("data") or []
    paths = dict.fromkeys(str(source["path"]) for source in sources) if run.training else {}
    return [path for path in paths if path.count("/") == 1 and not _is_local(path)]


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith(TEXT_SUFFIXES) or Path(path).exists()


def _repo(run: Run) -> str | None:
    return ((run.recipe or {}).get("export") or {}).get("hub_repo")


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


def base_license(model: str, *, hub_id: str | None, revision: str | None, folder: Path | None) -> License:
    """The license of ``model`` that the card in ``folder`` states; else `other`, with the license file there.

    ``folder`` None = the model itself where it is a local folder, else what the Hub's cache holds of ``hub_id``.
    """
    if model.startswith(DEMO_PREFIX):
        return License(DEMO_LICENSES.get(model.removeprefix(DEMO_PREFIX)), source="the base model's card")
    folder = folder or Path(model).expanduser()
    if not folder.is_dir() and hub_id is not None:
        cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    stated = _from_card(folder / "README.md")
    file = license_file(folder)
    if stated.identifier or file is None:
        return stated
    return License(
        "other", "license-of-the-base-model", file.name, f"the file {file.name} that came with the base model"
    )


def license_file(folder: Path) -> Path | None:
    """The file that holds the license's text in a checkpoint's folder."""
    return next(filter(Path.is_file, sorted(folder.glob("LICENSE*"))), None)


def _from_card(readme: Path) -> License:
    if not readme.is_file():
        return License()
    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # a card nobody can parse states nothing
        return License()
    identifier, name, link = (_single_text(data.get(field)) for field in ("license", "license_name", "license_link"))
    return License(identifier, name, link, "the base model's card")


def _single_text(value: Any) -> str | None:
    """A field's text; cards also write a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value else None

"""The model card of an exported checkpoint: metadata the Hub understands, and what a user of the model has to know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from shoal.edits import in_words
from shoal.errors import UserError
from shoal.models import DEMO_PREFIX
from shoal.redaction import redacted

from .document import Block, Bullets, Code, Paragraph, block_markdown, inline
from .findings import Comparison, Run, compare, is_share, read_run
from .headline import headline
from .report import FIGURES_DIR
from .sections import difference_table, no_signal_section, score_table
from .wording import layers_text

DEMO_BASES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub id of the model that a bundled demo model was made from."""
DEMO_LICENSES = {"smollm2-135m": "apache-2.0"}


@dataclass(frozen=True)
class License:
    """What the base model's own card says of its license; identifier None = it is not known here."""

    identifier: str | None = None
    name: str | None = None
    link: str | None = None


def model_card(run_dir: Path, *, base_folder: Path | None = None) -> str:
    """README.md for the distilled checkpoint of a run: YAML metadata with model-index, then Markdown.

    ``base_folder`` is the teacher's checkpoint, whose README.md names the license; None = from the recipe's model: a
    local folder, or what the Hub's cache holds of it.

    Raises:
        UserError: the run has no plan, so there is nothing a card could describe.
    """
    run = read_run(run_dir)
    if run.plan is None:
        raise UserError(
            f"{run_dir / 'plan.json'}: no such file; a model card describes a cut model, run `shoal prune` first"
        )
    base, found = base_model(run), _license(run, base_folder)
    run = replace(run, recipe=_public(redacted(run.recipe)))
    comparison = compare(run)
    metadata = _metadata(run, comparison, base, found)
    body = "\n\n".join(
        block if isinstance(block, str) else block_markdown(block) for block in _body(run, comparison, base, found)
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"))


def _metadata(run: Run, comparison: Comparison, base: str | None, found: License) -> ModelCardData:
    results = _eval_results(run, comparison)
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        license=found.identifier or "other",
        license_name=found.name if found.identifier else "see-base-model",
        license_link=found.link or (f"https://huggingface.co/{base}" if base and not found.identifier else None),
        pipeline_tag="text-generation",
        tags=["shoal", "layer-pruning", "knowledge-distillation", "arxiv:2510.02091"],
        model_name=_name(run, base),
        eval_results=results or None,
    )


def base_model(run: Run) -> str | None:
    """The base model's Hub id; None where the run started from a local folder, whose path is nobody else's business."""
    name = run.model
    if name.startswith(DEMO_PREFIX):
        return DEMO_BASES.get(name.removeprefix(DEMO_PREFIX))
    is_hub_id = run.recipe is not None and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id and not Path(name).exists() else None


def _eval_results(run: Run, comparison: Comparison) -> list[EvalResult]:
    role = "distilled" if "distilled" in run.evaluations else "pruned"
    results = []
    for row in comparison.rows:
        score = row.scores.get(role)
        if score is None:
            continue
        arguments = {"protocol": score.protocol, "num_items": score.n, "num_few_shot": score.num_fewshot}
        arguments |= {"task_version": score.version, "chance": score.chance}
        arguments |= {"ci_low": round(score.ci_low, 6), "ci_high": round(score.ci_high, 6)}
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name=f"{score.ability} ({score.protocol})",
                dataset_type=score.task,
                dataset_name=score.task,
                dataset_config=score.protocol,
                dataset_args=arguments,
                metric_type="accuracy" if is_share(score) else score.metric,
                metric_name=score.metric,
                metric_value=round(score.score, 6),
            )
        )
    return results


def _body(run: Run, comparison: Comparison, base: str | None, found: License) -> list[Block | str]:
    assert run.plan is not None
    parts: list[Block | str] = [f"# {inline(_name(run, base))}"]
    parts += [Paragraph(sentence) for sentence in headline(run, comparison)]
    parts += ["## What was cut", *_cut_lines(run, base)]
    if (run.folder / FIGURES_DIR / "importance.png").is_file():
        parts.append(f"![Importance of the layers, the cut ones marked]({FIGURES_DIR}/importance.png)")
    if comparison.rows:
        parts += ["## Before and after", *_results(run, comparison)]
    parts += ["## How to use it", Code(_USAGE, "python")]
    parts += ["## Intended use", Paragraph(_INTENDED), "## Limits", _limits(run, comparison)]
    parts += ["## License", Paragraph(_license_sentence(found, base))]
    if run.recipe:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
        parts += ["## Recipe", Paragraph("Made with shoal; this recipe makes it again."), Code(text, "yaml")]
    return parts


def _cut_lines(run: Run, base: str | None) -> list[Block]:
    assert run.plan is not None
    lines = [f"Base model: {base or 'a local checkpoint'}, {run.plan.num_layers} decoder layers"]
    if run.plan.drop:
        lines.append(f"Dropped layers (of the base model, counted from 0): {layers_text(run.plan.drop)}")
        lines.append(f"Kept: {layers_text(run.plan.keep)}")
    lines += [f"Edited: {in_words(edit)}" for edit in run.plan.edits]
    lines.append(f"How they were chosen: {run.plan.reason}")
    if run.training:
        lines.append(f"Distilled from the base model on {run.training.num_tokens:,} tokens")
    return [Bullets(tuple(lines))]


def _results(run: Run, comparison: Comparison) -> list[Block | str]:
    parts: list[Block | str] = []
    if (run.folder / FIGURES_DIR / "before_after.png").is_file():
        parts.append(f"![Scores before and after with 95 % intervals]({FIGURES_DIR}/before_after.png)")
    parts.append(score_table(run, comparison.rows))
    if any(("pruned", "distilled") in row.differences for row in comparison.rows):
        caption = "Distilled minus pruned, paired over the same items"
        parts.append(difference_table(comparison.rows, "pruned", "distilled", caption))
    silent = no_signal_section(comparison)
    if silent:
        parts += ["### No signal here", *silent.blocks]
    return parts


def _limits(run: Run, comparison: Comparison) -> Bullets:
    lines = [
        "It has the biases and gaps of its base model, and those that a cut adds.",
        "Only the abilities in the table were measured. What is not in it, longer texts, other languages, safety "
        "behaviour, may have suffered more.",
        "Scores by likelihood can hide damage that shows when the model writes freely; look at the generation rows "
        "first.",
    ]
    if not comparison.rows:
        lines.append("Nothing was evaluated before this card was written.")
    if run.training is None:
        lines.append("It was not trained after the cut.")
    return Bullets(tuple(lines))


def _license_sentence(found: License, base: str | None) -> str:
    if found.identifier:
        return f"{found.name or found.identifier}, taken over from the base model's card."
    return (
        f"The base model ({base or 'a local checkpoint'}) carried no license statement when this card was made, so the "
        "metadata says “other”. This model may be used as the base model's license allows; check it before you share."
    )


def _license_in(readme: Path) -> License:
    """From the YAML of the base checkpoint's README.md, as downloaded or copied with it."""
    if not readme.is_file():
        return License()
    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # a card nobody can parse states nothing
        return License()
    fields = [data.get(name) for name in ("license", "license_name", "license_link")]
    return License(*(field if isinstance(field, str) else None for field in fields))


def _license(run: Run, base_folder: Path | None) -> License:
    """From ``base_folder``, else from wherever the recipe's model keeps its card on this machine."""
    name = run.model
    if name.startswith(DEMO_PREFIX):
        return License(DEMO_LICENSES.get(name.removeprefix(DEMO_PREFIX)))
    folder = base_folder or Path(name).expanduser()
    if not folder.is_dir() and (base := base_model(run)):
        revision = (run.recipe or {}).get("revision")
        cached = try_to_load_from_cache(base, "README.md", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return _license_in(folder / "README.md")


def _name(run: Run, base: str | None) -> str:
    repo = ((run.recipe or {}).get("export") or {}).get("hub_repo")
    if isinstance(repo, str):
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


_USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this repository's id or a local folder
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
_INTENDED = (
    "Research on which layers a language model needs, and as a smaller, faster stand-in for its base model where the "
    "scores above are good enough. It is a plain Hugging Face checkpoint: no remote code, safetensors only."
)

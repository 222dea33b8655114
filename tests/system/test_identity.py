"""What identifies every result: each key of a recipe says what it shapes, and shapes that.

Covers: shoal.recipe.section, shoal.train.identity.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from cases import cases
from tiny import tiny_tokenizer

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.data.sources import to_write
from shoal.launch.verbs import distill as distilling
from shoal.launch.verbs import evaluate, measure, prune
from shoal.launch.verbs import run as run_module
from shoal.launch.verbs.prune import plan_inputs
from shoal.launch.verbs.run import Run
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import OnPolicy, Recorded
from shoal.recipe.evaluate import Eval
from shoal.recipe.losses import JSD
from shoal.recipe.prune import CutByScore
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.recipe.section import Positive, Section, Shapes, as_dict, shaped, shaping, shaping_keys
from shoal.train import distill as distill_module
from shoal.train.identity import checkpoint_inputs
from shoal.train.teacher.recording import Wanted, rows_from
from shoal.train.writing import _chosen, _identity

RECIPES: dict[str, dict[str, Any]] = cases(__file__)
IDENTITIES: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("identities.json").read_text(encoding="utf-8")
)
"""By recipe and result what run directories that exist hold. Where these differ, such a directory is made again or
refused. What depends on the content of files is `...`."""
OF_CONTENT = ("model", "data", "tokenizer", "tasks", "importance", "prompts")


def identities(run: Run) -> dict[str, dict[str, Any]]:
    """What identifies every result of a run that drops layers 1 and 2."""
    recipe, plan = run.recipe, Plan(Provenance({}), num_layers=run.num_layers, drop=(1, 2), reason="")
    training = distilling.training_inputs(run, plan)
    return {
        "importance": measure.measure_inputs(run),
        "plan": plan_inputs(run),
        "training": training,
        "control": distilling.control_inputs(run, plan),
        "rows": rows_from(training),
        "scores": evaluate.eval_inputs(run, run.teacher),
        "signals": Wanted(
            Checkpoint.read(run.teacher, LoadSettings(**run.load_args())),
            run.teacher_fingerprint,
            64,
            teacher if isinstance(teacher := recipe.distill.teacher, Recorded) else Recorded(),
            recipe.distill.recorded_temperature,
            states=(1, 2),
            prefix=3,
        ).inputs,
        "speed": evaluate.speed_inputs(run, {}),
    }


@pytest.fixture
def folder(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with what the recipes name."""
    shutil.copytree(teacher, tmp_path / "teacher")
    for name, text in {
        "data/set/a.jsonl": '{"a": 1}\n',
        "mine/a.yaml": "task: a\n",
        "prompts.jsonl": json.dumps({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WHOLE = (Shapes.NOTHING, Shapes.BY_CONTENT)
"""What a section may shape so that its own keys need not say anything."""


def is_of_content(key: str) -> bool:
    return key in OF_CONTENT or key.endswith(("(files)", "(content)"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", RECIPES)
def test_identities_are_those_that_run_directories_hold(name: str) -> None:
    run = Run(parse_recipe(RECIPES[name]))
    distill, results = run.recipe.distill, identities(run)
    results["checkpoints"] = checkpoint_inputs(distill, results["training"])
    for source in (to_write(source, sequence_length=distill.sequence_length) for source in distill.data):
        if source.generate is not None:
            chosen = _chosen(distill, source, tiny_tokenizer(), seed=run.recipe.seed)
            results["written"] = _identity(source.generate, chosen, inputs={"model": "m"}, seed=run.recipe.seed)
    for result, inputs in json.loads(json.dumps(results)).items():
        values = {key: "..." if is_of_content(key) else value for key, value in inputs.items()}
        assert values == IDENTITIES[name].get(result, {}), result


def sections_in(hint: Any) -> list[Any]:
    """The sections that a value of this type may be, not those that a list of it holds."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return [hint]
    return [] if get_origin(hint) is tuple else [section for part in get_args(hint) for section in sections_in(part)]


def silent_keys(section: Any) -> Iterator[str]:
    """The keys in a class of sections that do not say what they shape."""
    hints = get_type_hints(section, include_extras=True)
    for key, results in shaped(section).items():
        inner = [] if results in WHOLE else sections_in(hints[key])
        if results is None and not inner:
            yield f"{section.__name__}.{key}"
        for part in inner:
            yield from silent_keys(part)


def test_every_key_of_a_recipe_says_what_it_shapes() -> None:
    assert not list(silent_keys(Recipe))


@dataclass(frozen=True)
class Inner(Section):
    says: Annotated[int, Shapes.TRAINING] = 0
    forgotten: Positive = 1


@dataclass(frozen=True)
class Outer(Section):
    inner: Annotated[Inner | None, Shapes.TRAINING] = None
    neutral: Annotated[Inner, Shapes.NOTHING] = Inner()
    values: tuple[Inner, ...] = ()


def test_a_key_that_does_not_say_what_it_shapes_is_noticed() -> None:
    assert list(silent_keys(Outer)) == ["Inner.forgotten", "Outer.values"]


def test_a_section_within_a_section_is_a_mapping_of_those_settings_that_shape_the_result() -> None:
    assert shaping(Outer(inner=Inner(says=3)), Shapes.TRAINING, "outer.") == {"outer.inner": {"says": 3}}
    assert shaping(Outer(), Shapes.TRAINING) == {"inner": None}
    assert shaping(Outer(), Shapes.SCORES) == {}


def literals(hint: Any) -> list[Any]:
    """The values that a type names."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in literals(part)]


def another(value: Any, hint: Any) -> Any:
    """Not ``value``, but something that is read in its place."""
    if others := [choice for choice in literals(hint) if choice != value]:
        return others[0]
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case dict():
            return {**value, "other": 1}
        case tuple():
            return (*value, *value[:1]) or ("other",)
    return f"{value or ''}other"


def variants(section: Any, place: str = "") -> Iterator[tuple[str, Shapes, Any]]:
    """Every key of ``section`` and of those within it: its place, what it shapes, and the section with it changed."""
    hints = get_type_hints(type(section), include_extras=True)
    for key, results in shaped(type(section)).items():
        value = getattr(section, key)
        if isinstance(value, Section) and results not in WHOLE:
            for inner, shapes, changed in variants(value, f"{place}{key}."):
                yield inner, shapes, dataclasses.replace(section, **{key: changed})
        else:
            assert results is not None
            group = ("num_drop", "ratio", "target") if isinstance(section, CutByScore) else ()
            excluded: dict[str, Any] = dict.fromkeys(group) if key in group else {}
            changed = dataclasses.replace(section, **excluded | {key: another(value, hints[key])})
            yield f"{place}{key}", results, changed


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.usefixtures("folder")
def test_a_key_shapes_what_it_says_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (measure, evaluate, prune, distilling, distill_module, run_module)
    contents = ("sources", "model", "task_files", "local_data")
    for module, name in itertools.product(modules, [f"{content}_fingerprint" for content in contents]):
        monkeypatch.setattr(module, name, lambda *_: "...", raising=False)
    monkeypatch.setattr("shoal.launch.verbs.run.resolved", lambda *_: Path("teacher"))
    recipe = parse_recipe(RECIPES["full"])
    recipe = dataclasses.replace(
        recipe, distill=dataclasses.replace(recipe.distill, on_policy=OnPolicy(max_new_tokens=8))
    )
    before = with_perplexity(identities(Run(recipe)))
    for place, shapes, changed in variants(recipe):
        if shapes == Shapes.BY_CONTENT:
            continue
        said = {result.name.lower() for result in shapes if result.name is not None}
        if place.startswith("measure.sweep."):
            said = {"importance"} if Shapes.SCORES in shapes else set()
        if "training" in said:
            said.add("control")
        after = with_perplexity(identities(Run(changed)))
        differing = {result for result, inputs in after.items() if inputs != before[result]}
        # a plan is chosen by importance; text has its identity from more than settings
        assert differing - {"plan"} == said - {"plan", "text"}, place
        assert "plan" in differing or "plan" not in said, place


def test_written_text_is_identified_as_run_directories_hold_it() -> None:
    assert shaping_keys(Recipe, Shapes.TEXT) == ["seed", "dtype", "attention", "hub_kernels"]


def with_perplexity(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results, with that part of the scores' identity which the score of running text depends on."""
    scores = results["scores"]
    return {
        **results,
        "perplexity": {key: scores[key] for key in ("data", *shaping_keys(Eval, Shapes.PERPLEXITY, "eval."))},
    }


@pytest.mark.usefixtures("folder")
def test_losses_of_a_source_shape_the_training_and_neither_rows_nor_recordings() -> None:
    raw = RECIPES["full"]
    sources = [{"path": "python_docs", "losses": {"kind": "jsd", "temperature": 2.0}}, raw["distill"]["data"][1]]
    by_source = {**raw, "distill": {**raw["distill"], "data": sources}}
    before, after = (identities(Run(parse_recipe(each))) for each in (raw, by_source))
    assert {result for result in after if after[result] != before[result]} == {"training", "control"}
    differing = {key for key, value in after["training"].items() if value != before["training"][key]}
    assert differing == {"distill.data"}
    assert after["training"]["distill.data"][0] == {
        **before["training"]["distill.data"][0],
        "losses": [as_dict(JSD(temperature=2.0))],
    }


def test_a_key_that_is_called_anew_keeps_its_name_in_identities() -> None:
    @dataclasses.dataclass(frozen=True)
    class Renamed(Section):
        attn_implementation: Annotated[str, Shapes.TRAINING] = "sdpa"

    assert shaping(Renamed(), Shapes.TRAINING, "own.") == {"own.attention": "sdpa"}
    assert shaping_keys(Renamed, Shapes.TRAINING, "own.") == ["own.attention"]

"""What the documentation says can be done: recipes load, settings and commands exist, links lead somewhere."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from shoal.cli import _parse
from shoal.recipe.distill import Trainable
from shoal.recipe.losses import LOGIT_TERMS
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.recipe.yaml import read_yaml
from shoal.train.engine.arguments import check_names, deepspeed_config

pytestmark = pytest.mark.every_case
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = ROOT / "docs/training.md"
NO_KEYS = ("json", "md", "py", "yaml")
"""`distill.json` is a file."""


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def blocks(file: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [block for of, block in fences if of == language]


def alternatives(block: str) -> list[str]:
    """The recipes of a block; one that shows a section twice shows two ways to say something."""
    found: list[list[str]] = [[]]
    for line in block.splitlines():
        key = re.match(r"\w+:", line)
        if key and any(seen.startswith(key.group()) for seen in found[-1]):
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines) for lines in found]


RECIPES = [
    pytest.param(recipe, id=f"{file.stem}-{number}")
    for file in DOCUMENTS
    for number, recipe in enumerate(one for block in blocks(file, "yaml") for one in alternatives(block))
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_in_the_documentation_loads(recipe: str) -> None:
    distill = parse_recipe({"model": "demo:smollm2-135m", "run_dir": "runs/x"} | read_yaml(recipe)).distill
    check_names(distill)
    assert deepspeed_config(distill)


def sections_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [section for argument in get_args(hint) for section in sections_in(argument)]


SECTIONS = [name for name, hint in get_type_hints(Recipe, include_extras=True).items() if sections_in(hint)]


def is_setting(path: list[str]) -> bool:
    """Whether the recipe has this key; of plain mappings those of the Trainer are known, all others may be anything."""
    hint: Any = Recipe
    for place, name in enumerate(path):
        if hint is dict:
            return path[:2] != ["distill", "trainer"] or name in {f.name for f in dataclasses.fields(TrainingArguments)}
        if name.isdecimal() and place:
            continue
        fields = [get_type_hints(section, include_extras=True) for section in sections_in(hint)]
        found = [field[name] for field in fields if name in field]
        if not found:
            return False
        hint = dict if name in ("trainer", "deepspeed", "limits", "weights", "greedy_weights") else found[0]
    return True


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_every_setting_that_is_named_exists(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(SECTIONS)})(?:\.\w+)+)", text)
    assert not [name for name in named if name.split(".")[1] not in NO_KEYS and not is_setting(name.split("."))]


def test_a_setting_that_does_not_exist_is_noticed() -> None:
    assert is_setting(["distill", "watch", "best"])
    assert is_setting(["distill", "losses", "0", "temperature"])
    assert is_setting(["distill", "trainer", "save_steps"])
    assert not is_setting(["distill", "trainer", "save_step"])
    assert not is_setting(["distill", "watch", "worst"])
    assert not is_setting(["distill", "recorded"])


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_every_command_can_be_given(file: Path) -> None:
    for block in blocks(file, ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["shoal"]:
                _parse(words[1:])
            scripts = [word for word in words[1:] if word.startswith("launch/")]
            assert all((ROOT / script).is_file() for script in scripts), line


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of docs/training.md, without its head."""
    text = TRAINING.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert rows
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in rows.group().splitlines()]
    return [[cell.strip() for cell in cells] for cells in lines[2:]]


def test_the_table_of_losses_has_every_kind_with_its_keys_and_defaults() -> None:
    told = {}
    for kind, _, keys, *_ in table("## Losses"):
        told[kind.strip("`")] = {name: float(value) for name, value in re.findall(r"(\w+) \(([\d.e-]+)\)", keys)}
    settings = [(term().kind, dataclasses.asdict(term())) for term in LOGIT_TERMS]
    assert told == {
        kind: {key: value for key, value in values.items() if key not in ("kind", "weight")}
        for kind, values in settings
    }


def test_the_table_of_trainable_parts_has_every_choice() -> None:
    assert [cells[0].strip("`") for cells in table("## What is trained")] == list(get_args(Trainable))

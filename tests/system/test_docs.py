"""What the documentation says can be done: recipes load, settings and commands exist, links lead somewhere."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from shoal.compress.metrics.registry import METRICS
from shoal.errors import UserError
from shoal.eval.tasks.data_sets import read_data_sets
from shoal.eval.tasks.names import TASKS_DIR
from shoal.launch.arguments import parse
from shoal.launch.help.explain import found
from shoal.recipe.distill import Trainable
from shoal.recipe.losses import LOGIT_TERMS
from shoal.recipe.messages import sections_in
from shoal.recipe.recipe import Recipe, parse_recipe
from shoal.train.engine.arguments import check_names, deepspeed_config
from shoal.yaml_text import read_yaml

pytestmark = pytest.mark.every_case
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRAINING = ROOT / "docs/training"
NO_KEYS = ("json", "md", "py", "yaml", "yml")
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
    pytest.param(recipe, id=f"{name_of(file)}-{number}")
    for file in DOCUMENTS
    for number, recipe in enumerate(one for block in blocks(file, "yaml") for one in alternatives(block))
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_in_the_documentation_loads(recipe: str) -> None:
    distill = parse_recipe({"model": "demo:smollm2-135m", "run_dir": "runs/x"} | read_yaml(recipe)).distill
    check_names(distill)
    assert deepspeed_config(distill)


SECTIONS = [name for name, hint in get_type_hints(Recipe, include_extras=True).items() if sections_in(hint)]


def is_setting(path: list[str]) -> bool:
    """Whether the recipe has this key; of plain mappings those of the Trainer are known, all others may be anything."""
    try:
        settings, entry = found(".".join(path))
    except UserError:
        return False
    trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    return not ("distill.trainer" in settings and entry) or entry in trainer


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_every_setting_that_is_named_exists(file: Path) -> None:
    text, _ = re.subn(r"^```diff.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(SECTIONS)})(?:\.\w+)+)", text)
    assert not [name for name in named if name.split(".")[1] not in NO_KEYS and not is_setting(name.split("."))]


def test_a_setting_that_does_not_exist_is_noticed() -> None:
    assert is_setting(["distill", "watch", "eval_steps"])
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
                parse(words[1:])
            if "shoal.launch.cli" in words:
                parse(words[words.index("shoal.launch.cli") + 1 :])
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


def test_the_first_page_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def table(file: Path) -> list[list[str]]:
    """The cells of a document's first table, without its head."""
    rows = re.search(r"(?:^\|.*\n)+", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in rows.group().splitlines()]
    return [[cell.strip() for cell in cells] for cells in lines[2:]]


def test_the_table_of_losses_has_every_kind_with_its_keys_and_defaults() -> None:
    told = {}
    for kind, _, keys, *_ in table(TRAINING / "losses.md"):
        told[kind.strip("`")] = {name: float(value) for name, value in re.findall(r"(\w+) \(([\d.e-]+)\)", keys)}
    settings = [(term().kind, dataclasses.asdict(term())) for term in LOGIT_TERMS]
    assert told == {
        kind: {key: value for key, value in values.items() if key not in ("kind", "weight")}
        for kind, values in settings
    }


def test_the_table_of_trainable_parts_has_every_choice() -> None:
    assert [cells[0].strip("`") for cells in table(TRAINING / "trainable.md")] == list(get_args(Trainable))


def patterns_of(file: Path) -> list[str]:
    """What the first cells of a document's tables name, as regular expressions: {20,50}pairs stands for two names."""
    cells = re.findall(r"^\| (`.*?`) \|", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(.*?)`", cell)]
    alternatives = [re.sub(r"\{(.*?)\}", lambda of: f"({of[1].replace(',', '|')})", name) for name in names]
    return [re.sub(r"<\w+>|\*", ".*", name) for name in alternatives]


def test_every_metric_has_a_row() -> None:
    assert not set(METRICS) - set(patterns_of(ROOT / "docs/measuring.md"))


def test_every_task_has_a_row() -> None:
    patterns = patterns_of(ROOT / "docs/evaluating.md")
    parts = {name for name, data in read_data_sets(TASKS_DIR).items() if data.protocols}
    assert not [name for name in parts if not any(re.fullmatch(pattern, name) for pattern in patterns)]


CONTRIBUTING = ROOT / "docs/contributing.md"
MODULES = [
    file
    for folder in ("src", "compress", "train", "eval", "launch", "lab", "tests")
    for file in (ROOT / folder).rglob("*.py")
]


def is_defined(stem: str, name: str) -> bool:
    definition = re.compile(rf"^(?:def |class )?{name}\b", flags=re.MULTILINE)
    return any(definition.search(file.read_text(encoding="utf-8")) for file in MODULES if file.stem == stem)


def test_what_the_page_for_contributors_names_is_there() -> None:
    text, _ = re.subn(r"^```.*?^```", "", CONTRIBUTING.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(r"`([\w./-]+/[\w./-]*)`", text)
    names = re.findall(r"`(\w+)\.(\w+)`", text)
    assert len(paths) > 40
    assert len(names) > 40
    assert not [path for path in paths if not any(ROOT.glob(path.replace("NAME", "*")))]
    names = [(stem, name) for stem, name in names if stem not in SECTIONS and name not in (*NO_KEYS, "toml")]
    assert not [f"{stem}.{name}" for stem, name in names if not is_defined(stem, name)]


def test_diffs_for_contributors_begin_at_lines_that_are_there() -> None:
    hunks = 0
    for block in blocks(CONTRIBUTING, "diff"):
        for part in re.split(r"^\+\+\+ b/", block, flags=re.MULTILINE)[1:]:
            name, _, lines = part.partition("\n")
            file = ROOT / name
            for hunk in re.split(r"^@@.*\n", lines, flags=re.MULTILINE):
                before = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
                hunks += 1
                assert file.parent.is_dir(), name
                assert not before or "\n".join(before) in file.read_text(encoding="utf-8"), hunk
    assert hunks > 15


PAPERS = ROOT / "docs/papers.md"
ARXIV = re.compile(r"(?<![\d.])(?:1[5-9]|2\d)(?:0[1-9]|1[0-2])\.\d{5}(?!\d)")
"""Year, month and number as arXiv has given them since 2015; months keep most decimals out."""


def test_every_paper_with_a_number_has_its_place_on_the_page_of_papers_and_no_other_has() -> None:
    folders = ("src", "compress", "train", "eval", "launch", "lab", "benchmarks", "configs", "docs")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    read = [file for file in files if file.suffix in (".py", ".md", ".yaml", ".yml", ".cff") and file != PAPERS]
    named = {number for file in read for number in ARXIV.findall(file.read_text(encoding="utf-8"))}
    links = re.findall(r"\[([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", PAPERS.read_text(encoding="utf-8"))
    assert len(named) > 30
    assert sorted(shown for shown, _ in links) == sorted(named)
    assert all(shown == target for shown, target in links)
    assert set(ARXIV.findall(PAPERS.read_text(encoding="utf-8"))) == named

"""What the documentation says can be done: recipes load, settings and commands exist, links lead somewhere."""

import csv
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from transformers import TrainingArguments

import shoal
from shoal.compress.metrics.registry import METRICS
from shoal.data.bundled import ABOUT
from shoal.errors import UserError
from shoal.eval.tasks.data_sets import DataSet, read_data_sets
from shoal.eval.tasks.names import TASKS_DIR
from shoal.launch.arguments import VERBS, parse
from shoal.launch.help.explain import found, places
from shoal.recipe.losses import KINDS
from shoal.recipe.messages import checked, sections_in
from shoal.recipe.recipe import Recipe, parse_recipe, read_settings
from shoal.train.engine.arguments import check_names, deepspeed_config
from shoal.yaml_text import read_yaml

pytestmark = pytest.mark.every_case
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    *DOCUMENTS,
    *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "configs/tasks/README.md", "lab/results/README.md")),
]


def support(name: str) -> Any:
    return read_yaml((ROOT / "tests/support" / name).read_text(encoding="utf-8"))


LIMITS = support("pages.yaml")
MODEL = "demo:smollm2-135m"
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


def test_every_table_of_results_has_a_row_with_its_command() -> None:
    folder = ROOT / "lab/results"
    with (folder / "index.csv").open(encoding="utf-8", newline="") as index:
        told = {row["file"] for row in csv.DictReader(index) if row["command"]}
    assert told == {file.name for file in folder.glob("*.csv")} - {"index.csv"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_and_data_set_in_the_documentation_loads(recipe: str) -> None:
    said = read_yaml(recipe)
    if "dataset" in said:
        checked(DataSet, said, source="page")
        return
    distill = parse_recipe({"model": MODEL, "run_dir": "runs/x"} | said).distill
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


@pytest.mark.parametrize("file", PAGES, ids=name_of)
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


def check(words: list[str]) -> None:
    """That the parser takes the words, and that they are settings of a shipped recipe or of one with defaults."""
    known = parse(words)
    if VERBS[known.verb].reads_recipe:
        shipped = (ROOT / "configs" / known.config).with_suffix(".yaml").is_file()
        said, _ = read_settings(known.config if shipped else MODEL, known.words)
        parse_recipe({"model": MODEL, "run_dir": "runs/x"} | said)


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_command_can_be_given(file: Path) -> None:
    shells = "".join(block for language in ("", "bash", "sh", "console") for block in blocks(file, language))
    for line in shells.replace("\\\n", " ").replace("&&", "\n").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["shoal"] or "shoal.launch.cli" in words:
            check(words[words.index("shoal" if words[0] == "shoal" else "shoal.launch.cli") + 1 :])
        scripts = [word for word in words[1:] if word.startswith("launch/")]
        assert all((ROOT / script).is_file() for script in scripts), line
    assert set(re.findall(r"`shoal ([a-z]\w*)", file.read_text(encoding="utf-8"))) <= VERBS.keys()


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_link_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_keeps_to_its_words() -> None:
    words = {name_of(file): len(file.read_text(encoding="utf-8").split()) for file in PAGES}
    assert words.keys() == LIMITS.keys()
    assert not {page: count for page, count in words.items() if count > LIMITS[page]}


def prose(markdown: str) -> str:
    """The words of a page: no code, no targets of links, no comments."""
    text = re.sub(r"^```.*?^```|`[^`]*`|<!--.*?-->|\]\([^)]*\)", " ", markdown, flags=re.MULTILINE | re.DOTALL)
    return " ".join(text.split())


PRIVATE = {re.compile(word, re.IGNORECASE): plain for word, plain in support("private_words.yaml").items()}


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_no_page_has_a_private_word(file: Path) -> None:
    text = prose(file.read_text(encoding="utf-8"))
    found = [
        (text[max(0, hit.start() - 30) : hit.end() + 10], plain)
        for w, plain in PRIVATE.items()
        for hit in w.finditer(text)
    ]
    assert not found


def test_a_private_word_is_noticed() -> None:
    assert [word for word in PRIVATE if word.search(prose("The log `says` so.\n\n```\ntold\n```\n\nThe log says so."))]
    assert not [word for word in PRIVATE if word.search(prose("The log [shows](told.md) `what is told`."))]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("cli", [*(f"## shoal {command}\n" for command in VERBS), "--dry-run", "--across-teachers", "--num-drop"]),
        ("recipe", [f"| `{place.rpartition('.')[2]}` |" for place, own in places() if "properties" not in own]),
        ("metrics_losses", [f"| `{name}` |" for name in (*METRICS, *KINDS)]),
        ("tasks", [*(name for name, data in read_data_sets(TASKS_DIR).items() if data.protocols), *ABOUT]),
        ("python", [f"## shoal.{name}\n" for name in shoal.__all__]),
        ("families", ["| `llama` | exact |", "| `bert` | not cut |"]),
    ],
)
def test_a_page_made_from_the_code_has_all_of_its_names(page: str, names: list[str]) -> None:
    generated = pytest.importorskip("pages.generated", reason="needs the extra docs")
    text = "\n".join(getattr(generated, page)())
    assert not [name for name in names if name not in text]


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
    assert hunks > 1

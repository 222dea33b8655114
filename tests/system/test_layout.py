"""What the layout promises: who imports whom, what is packaged, what is explained."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import shoal

ROOT = Path(__file__).parents[2]
TOP = ("compress", "train", "eval", "launch", "lab")
ROOMS = TOP[:3]
LEVELS = (
    ("shoal",),
    ("shoal.abilities",),
    ("shoal.models", "shoal.recipe"),
    ("shoal.artifacts", "shoal.data", "shoal.inference"),
    ("shoal.figures", "shoal.stats", "shoal.tracking", "compress.surgery", "train.engine"),
    ("compress.edits", "train.objective", "eval.tasks"),
    ("compress.variants", "train.student", "eval.harness"),
    ("compress.metrics", "train.teacher", "eval.report"),
    ("compress.changes", "train.preflight", "eval.compare", "eval"),
    ("compress.sweeps", "train"),
    ("compress",),
    ("launch.early", "launch.help"),
    ("launch.verbs",),
    ("launch.api",),
    ("launch",),
    ("lab.attention", "lab.depth"),
    ("lab",),
)
"""Folders from the lowest to the highest: a module imports its own folder and folders of lower levels, no others."""
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
ANOTHER = {"compress.sweeps": "eval"}
"""Folder -> other stage it may import: importance by task is an evaluation."""
MOST_MODULES = 15
SHARED = sorted(
    file
    for file in (ROOT / "src/shoal").rglob("*.py")
    if file.relative_to(ROOT / "src/shoal").parts[0] not in (*TOP, "configs")
)
STAGE_FILES = sorted(file for stage in TOP for file in (ROOT / stage).rglob("*.py"))
SCRIPTS = [ROOT / "launch" / f"{name}.py" for name in ("distill", "eval", "measure", "record")]
"""Run by the launcher as files, so what they import has no relative name."""
ALL_FILES = [*SHARED, *STAGE_FILES]
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_of(file: Path) -> str:
    """`shoal.eval.tasks.load` for eval/tasks/load.py; a package is named after its folder."""
    inside = file.relative_to(ROOT / "src" if file in SHARED else ROOT).with_suffix("")
    parts = inside.parts if file in SHARED else ("shoal", *inside.parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in ALL_FILES}
PACKAGES = {module for module, file in MODULES.items() if file.name == "__init__.py"}


def statements(node: Any) -> Iterator[ast.stmt]:
    """All statements inside ``node``: what a walk over expressions too would take ten times as long to find."""
    for part in ("body", "orelse", "handlers", "finalbody", "cases"):
        for inner in getattr(node, part, ()):
            yield inner
            yield from statements(inner)


@cache
def imports(file: Path) -> tuple[tuple[str, str], ...]:
    """Every imported module of ``file``: as it is written, and its whole name."""
    return tuple(
        (written, f"{base}.{name}" if f"{base}.{name}" in MODULES else base)
        for written, base, name in all_imports(file)
    )


@cache
def all_imports(file: Path) -> tuple[tuple[str, str, str], ...]:
    return tuple(_all_imports(file))


def _all_imports(file: Path) -> Iterator[tuple[str, str, str]]:
    """Every import of ``file``: the module as it is written, its whole name, and what is taken of it."""
    module = module_of(file) if file in ALL_FILES else ""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            yield from (("." * node.level + (node.module or ""), base, alias.name) for alias in node.names)


def folder_of(module: str) -> str:
    """`eval.tasks` for shoal.eval.tasks.load, `shoal.models` for shoal.models.load."""
    folder = module if module in PACKAGES else module.rpartition(".")[0]
    return folder.removeprefix("shoal.") if stage_of(folder) else folder


def stage_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in TOP else None


def test_every_folder_has_one_level() -> None:
    assert sorted(LEVEL) == sorted({folder_of(module) for module in MODULES})
    assert len(LEVEL) == sum(map(len, LEVELS))


def test_modules_import_lower_folders_only() -> None:
    for file in set(ALL_FILES) - {
        MODULES["shoal"]
    }:  # which names for type checkers what it loads where it is asked for
        own = folder_of(module_of(file))
        for _, module in imports(file):
            if module in MODULES and (folder := folder_of(module)) != own:
                assert LEVEL[folder] < LEVEL[own], f"{name_of(file)} imports {module}, which is not below it"


def test_stages_know_one_another_only_where_they_must() -> None:
    for file in STAGE_FILES:
        own = module_of(file)
        for _, module in imports(file):
            if stage_of(own) in ROOMS and (stage := stage_of(module)) and stage != stage_of(own):
                assert stage == ANOTHER.get(folder_of(own)), f"{name_of(file)} imports {module}"


def test_the_lab_may_go_without_a_trace() -> None:
    importing = [name_of(file) for file in ALL_FILES for _, module in imports(file) if stage_of(module) == "lab"]
    assert {Path(name).parts[0] for name in importing} <= {"lab"}


def test_stages_import_themselves_relatively_and_the_rest_absolutely() -> None:
    """Only this way editable installs, wheels, pytest, pyright and the launcher see one identity per class."""
    for file in ALL_FILES:
        own = stage_of(module_of(file))
        for written, module in imports(file):
            if own and stage_of(module) == own and file not in SCRIPTS:
                assert written.startswith("."), f"{name_of(file)}: import {module} relatively"
            elif "abilities" not in file.parts and not stage_of(module):
                assert not written.startswith("."), f"{name_of(file)}: write {module} for {written}"
            assert module.split(".")[0] not in TOP, f"{name_of(file)}: {module} is no top-level module"


def defined_in(module: str) -> set[str]:
    """The names that ``module`` makes at its top level, besides those it imports."""
    tree = tree_of(MODULES[module])
    parts = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    made = {node.name for node in parts if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = (node for part in parts if not isinstance(part, ast.FunctionDef | ast.ClassDef) for node in ast.walk(part))
    return made | {node.id for node in stored if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_a_name_is_imported_from_the_module_that_makes_it() -> None:
    """One name has one path, so that it is found and moved by that path. `abilities` lists what it offers."""
    made = {module: defined_in(module) for module in MODULES if not module.startswith("shoal.abilities")}
    wrong = [
        f"{name_of(file)}: {module}.{name}"
        for file in (*ALL_FILES, *TEST_FILES, *ROOT.glob("benchmarks/**/*.py"))
        for _, module, name in all_imports(file)
        if module in made and name and f"{module}.{name}" not in MODULES and name not in made[module]
    ]
    assert not wrong


def test_no_folder_is_full() -> None:
    files = [*ALL_FILES, *ROOT.glob("benchmarks/**/*.py")]
    folders = Counter(file.parent for file in files if file.name != "__init__.py")
    full = {name_of(folder): count for folder, count in folders.items() if count > MOST_MODULES}
    assert not full


def test_scripts_and_tests_import_absolutely() -> None:
    for file in [*TEST_FILES, *SCRIPTS, *(ROOT / "benchmarks").rglob("*.py")]:
        for written, _ in imports(file):
            assert not written.startswith("."), f"{name_of(file)}: write {written} absolutely"
            assert not written.startswith("test_"), f"{name_of(file)}: share what {written} has in tests/support"
            assert written.split(".")[0] not in TOP, f"{name_of(file)}: {written} is no top-level module"


def own_test(module: str) -> Path:
    """Where tests of ``module`` are looked for: tests/ mirrors the tree."""
    *folders, stem = module.split(".")[1:]
    return Path(*([] if stage_of(module) else ["shoal"]), *folders, f"test_{stem}.py")


def covered_by(test: Path) -> list[str]:
    """The modules that the docstring of ``test`` says it covers besides the one of its name."""
    described = ast.get_docstring(tree_of(test)) or ""
    _, _, named = described.partition("Covers: ")
    return re.findall(r"shoal(?:\.\w+)+", named.partition("\n\n")[0])


def reached_from(file: Path) -> set[str]:
    """Modules of shoal that ``file`` imports, itself or through helpers and other modules."""
    helpers = {helper.stem: helper for helper in (ROOT / "tests/support").glob("*.py")}
    reached, waiting = set(), [file]
    while waiting:
        direct = {module for _, module in imports(waiting.pop())}
        offered = {*shoal.PLACES.values()} if "shoal" in direct else set()
        for module in (direct | offered) - reached:
            reached.add(module)
            waiting += filter(None, [MODULES.get(module) or helpers.get(module)])
    return reached & MODULES.keys()


def test_every_module_has_a_test_of_its_name_or_one_that_names_it() -> None:
    tests = {file.relative_to(ROOT / "tests"): covered_by(file) for file in TEST_FILES if file.name[:5] == "test_"}
    gone = {str(test): sorted(set(named) - MODULES.keys()) for test, named in tests.items()}
    assert not {test: modules for test, modules in gone.items() if modules}, "they cover modules that do not exist"
    named = {module for modules in tests.values() for module in modules}
    found_by_name = {module for module in MODULES.keys() - PACKAGES if own_test(module) in tests}
    assert not named & found_by_name, "these have a test of their own name"
    missing = sorted(MODULES.keys() - PACKAGES - named - found_by_name - {*map(module_of, SCRIPTS)})
    assert not missing, "add tests, or a line `Covers: MODULE, ...` to the docstring of those that there are"


def test_what_a_test_says_it_covers_is_within_its_reach() -> None:
    for file in TEST_FILES:
        if covered := covered_by(file):
            beyond = set(covered) - reached_from(file)
            assert not beyond, name_of(file)


def test_every_module_can_be_imported() -> None:
    for module in MODULES:
        importlib.import_module(module)


@pytest.mark.slow
def test_launch_scripts_shadow_no_installed_module() -> None:
    """The launcher puts launch/ first on sys.path."""
    for script in (ROOT / "launch").glob("[!_]*"):
        command = [sys.executable, "-Ic", f"import importlib.util as u; print(u.find_spec({script.stem!r}))"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "None\n", script


def test_declared_packages_are_those_of_the_tree() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {package: ROOT / folder for package, folder in tools["package-dir"].items()}
    assert set(tools["packages"]) == set(places)
    declared = {folder.resolve() for folder in places.values()}
    roots = [ROOT / "src/shoal", *(ROOT / stage for stage in TOP), ROOT / "configs"]
    found = {init.parent.resolve() for root in roots for init in root.rglob("__init__.py")}
    assert declared == found
    linked = {path.name: path.readlink() for path in (ROOT / "src/shoal").iterdir() if path.is_symlink()}
    assert linked == {name: Path("../..") / name for name in (*TOP, "configs")}


def test_a_folders_docstring_names_its_modules_and_folders_once() -> None:
    for package in PACKAGES - {"shoal.abilities"}:
        described = ast.get_docstring(tree_of(MODULES[package])) or ""
        named = re.findall(r"^ *(\w+) {2,}\S", described, flags=re.MULTILINE)
        inside = [module for module in MODULES if module.rpartition(".")[0] == package]
        assert sorted(named) == sorted(module.rpartition(".")[2] for module in inside), package


def test_every_public_function_and_class_says_what_it_gives() -> None:
    for file in ALL_FILES:
        tree = tree_of(file)
        assert not tree.body or ast.get_docstring(tree), f"{name_of(file)}: the module says nothing"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name_of(file)}: no docstring on {node.name}"


def test_nothing_prints() -> None:
    """Modules log; only the command line talks to the terminal by itself."""
    for file in ALL_FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and file.name != "cli.py":
                assert node.func.id != "print", f"{name_of(file)}:{node.lineno}"


def test_no_file_names_a_folder_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout to know which files are tracked")
    pattern = re.compile(rb"/(work|root|home)/[A-Za-z0-9_.]")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            found += [f"{name}:{n}" for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if pattern.search(line)]
    assert not found


@pytest.mark.parametrize("extra", ["gguf", "gpu"])
def test_extras_are_pinned(extra: str) -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert {re.split(r"[<>=]", each)[0].replace("_", "-") for each in wanted} <= pinned

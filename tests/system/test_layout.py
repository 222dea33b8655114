"""The house keeps its order: who imports whom, what is packaged, what is explained."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("compress", "train", "eval")
MAY_IMPORT = {"compress": {"eval"}, "train": {"compress.plan"}, "eval": set()}
"""Room -> what it may take from other rooms."""
STAIRS = ("pipeline.py", "measuring.py", "pruning.py", "distilling.py", "searching.py", "cli.py")
"""The only floor files that lead into the rooms, and only where a verb needs them."""
FLOOR = sorted((ROOT / "src/shoal").glob("*.py")) + sorted((ROOT / "src/shoal/abilities").glob("*.py"))
ROOM_FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
ALL_FILES = [*FLOOR, *ROOM_FILES]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Every imported module of ``file`` as it is written: `shoal.x`, or `..x.y` where it is relative."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            if module in ("shoal", "..") or node.module is None:  # `from shoal import eval`, `from .. import eval`
                yield from (f"{module}{'' if module.endswith('.') else '.'}{alias.name}" for alias in node.names)


def room_parts(module: str) -> str | None:
    """`eval.x` for `shoal.eval.x` and `..eval.x`; None where it is in no room."""
    inside = re.sub(r"^(shoal\.|\.\.)", "", module)
    return inside if inside != module and inside.split(".")[0] in ROOMS else None


@pytest.mark.parametrize("file", FLOOR, ids=name_of)
def test_floor_imports_no_room(file: Path) -> None:
    only_top = file.name in STAIRS
    found = [module for module in imports(file, top_level_only=only_top) if room_parts(module)]
    assert not found, f"{name_of(file)} imports {found}"


@pytest.mark.parametrize("file", FLOOR, ids=name_of)
def test_floor_imports_itself_absolutely(file: Path) -> None:
    relative = [module for module in imports(file) if module.startswith(".")]
    assert not relative or file.parent.name == "abilities", f"write shoal.x for {relative}"


@pytest.mark.parametrize("file", ROOM_FILES, ids=name_of)
def test_room_imports_only_what_it_may(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    for module in imports(file):
        parts = room_parts(module)
        if parts is not None and parts.split(".")[0] != room:
            allowed = any(parts == one or parts.startswith(f"{one}.") for one in MAY_IMPORT[room])
            assert allowed, f"{name_of(file)} imports {module}"


@pytest.mark.parametrize("file", ROOM_FILES, ids=name_of)
def test_room_imports_neighbours_relatively_and_the_floor_absolutely(file: Path) -> None:
    """Only this way editable installs, wheels, pytest, pyright and the launcher see one identity per class."""
    for module in imports(file):
        parts = room_parts(module)
        assert not (module.startswith("shoal.") and parts), f"{name_of(file)}: write ..{parts} for {module}"
        assert not (module.startswith("..") and module != ".." and parts is None), f"{name_of(file)}: {module} is floor"
        assert not module.startswith("..."), f"{name_of(file)}: {module} leaves the package"
        assert module.split(".")[0] not in ROOMS, f"{name_of(file)}: {module} is no top-level module"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests").glob("*.py")) + sorted((ROOT / "launch").glob("*.py")), ids=name_of
)
def test_scripts_and_tests_import_absolutely(file: Path) -> None:
    found = [module for module in imports(file) if module.startswith(".") or module.split(".")[0] in ROOMS]
    assert not found


def test_launch_scripts_shadow_no_installed_module() -> None:
    """The launcher puts launch/ first on sys.path."""
    for script in (ROOT / "launch").glob("*.py"):
        command = [sys.executable, "-Ic", f"import importlib.util as u; print(u.find_spec({script.stem!r}))"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "None\n", script


def test_declared_packages_are_those_of_the_tree() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {package: ROOT / folder for package, folder in tools["package-dir"].items()}
    assert set(tools["packages"]) == set(places)
    declared = {folder.resolve() for folder in places.values()}
    roots = [ROOT / "src/shoal", *(ROOT / room for room in ROOMS), ROOT / "configs"]
    found = {init.parent.resolve() for root in roots for init in root.rglob("__init__.py")}
    assert declared == found
    linked = {path.name: path.readlink() for path in (ROOT / "src/shoal").iterdir() if path.is_symlink()}
    assert linked == {name: Path("../..") / name for name in (*ROOMS, "configs")}


@pytest.mark.parametrize("place", ["src/shoal", *ROOMS])
def test_a_map_names_every_module_once(place: str) -> None:
    described = ast.get_docstring(ast.parse((ROOT / place / "__init__.py").read_text())) or ""
    named = re.findall(r"^    (\w+) ", described, flags=re.MULTILINE)
    inside = [file.stem for file in (ROOT / place).glob("*.py") if file.stem != "__init__"]
    assert sorted(named) == sorted([*inside, *(("abilities", *ROOMS) if place == "src/shoal" else ())])


@pytest.mark.slow
def test_wheel_holds_code_templates_recipes_and_tasks(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("src", *ROOMS, "configs"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run([*command, "-w", tmp_path, source], capture_output=True, text=True, check=False)
    if "No module named 'setuptools'" in built.stderr or "Cannot import 'setuptools" in built.stderr:
        pytest.skip("needs setuptools in this environment to build without network")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("shoal-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"shoal/{file.relative_to(ROOT / 'src/shoal')}" for file in FLOOR} | {"shoal/py.typed"}
    for folder in (*ROOMS, "configs"):
        wanted |= {f"shoal/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*.py")}
    for pattern in (
        "configs/*.yaml",
        "configs/tasks/*",
        "configs/tasks/datasets/*",
        "configs/hub_tasks/*",
        "configs/suites/*",
        "configs/deepspeed/*.json",
        "eval/report/templates/*",
    ):
        found = {f"shoal/{file.relative_to(ROOT)}" for file in ROOT.glob(pattern) if file.is_file()}
        assert found, f"nothing matches {pattern}"
        wanted |= found
    assert not wanted - held
    assert not {name for name in held if not name.startswith(("shoal/", "shoal-"))}


@pytest.mark.parametrize("file", ALL_FILES, ids=name_of)
def test_every_public_function_and_class_says_what_it_gives(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), "the module says nothing"
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    assert not silent, f"{name_of(file)}: no docstring on {', '.join(silent)}"


@pytest.mark.parametrize("file", [file for file in ALL_FILES if file.name != "cli.py"], ids=name_of)
def test_nothing_prints(file: Path) -> None:
    """Rooms log; only the command line talks to the terminal by itself."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


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

"""The wheel: what it holds, and a run of an installed one where no clone is near."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny import tiny_checkpoint

from shoal.launch.help.names import LISTS

ROOT = Path(__file__).parents[2]
VERSION = "0.1.0+wheel"
"""Of the wheel that is tested: every result says it, so none came from the clone."""
SOURCE = "https://example.org/shoal"
pytestmark = pytest.mark.prove


def run(*command: str | Path, **how: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, made of a copy: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in ("src", "compress", "train", "eval", "launch", "lab", "configs"):
        without = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=without)
    for name in ("README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, source)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = settings.replace('version = "0.1.0"', f'version = "{VERSION}"', 1)
    assert named != settings
    named = named.replace("[project.scripts]", f'[project.urls]\nSource = "{SOURCE}"\n\n[project.scripts]', 1)
    (source / "pyproject.toml").write_text(named, encoding="utf-8")
    said = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
    assert "WARNING" not in said, said
    return folder / "dist"


def test_packages_can_be_published(built: Path) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert said.count("PASSED") == 2


def test_the_first_page_has_no_relative_link_on_an_index(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    page = zipfile.ZipFile(wheel).read(f"shoal-{VERSION}.dist-info/METADATA").decode()
    targets = re.findall(r"""(?:\]\(|<img[^>]* src=")([^)\s"]+)""", page)
    assert f"{SOURCE}/blob/v{VERSION}/CHANGELOG.md" in targets
    assert [target for target in targets if target.startswith(f"{SOURCE}/raw/") and target.endswith(".svg")]
    assert not [target for target in targets if not target.startswith(("https://", "http://", "#"))]


def test_the_sdist_is_small_and_has_no_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if name.count("/") > 1}
    assert folders == {"src", "compress", "train", "eval", "launch", "lab", "configs", "shoal.egg-info"}
    assert sdist.stat().st_size < 2_000_000


def test_wheel_holds_all_that_is_tracked_beside_tests_documents_and_scripts(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    packages = {
        "src/shoal": "shoal",
        **{name: f"shoal/{name}" for name in ("compress", "train", "eval", "launch", "lab", "configs")},
    }
    wanted = {
        f"{package}/{file.relative_to(ROOT / folder)}"
        for folder, package in packages.items()
        for file in (ROOT / folder).rglob("*")  # does not follow the links in src/shoal
        if file.is_file() and "__pycache__" not in file.parts
        if not file.is_relative_to(ROOT / "lab/results") or file.suffix == ".py"  # its tables stay in the repository
    }
    assert len(wanted) > 200
    assert {name for name in held if ".dist-info/" not in name} == wanted


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment that holds the wheel, and finds all else where this one does.

    A line of a .pth file adds a folder and reads no .pth file in it, so an editable install there stays unknown.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return python


@pytest.fixture
def alone() -> dict[str, str]:
    """The environment of somebody who has installed shoal: no variable leads to the clone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "DS_ACCELERATOR": "cpu"}


FIND = """
import json, shoal, shoal.compress, sys
from shoal.launch.help.names import LISTS
from shoal.recipe.trainer_arguments import read_deepspeed
from shoal.recipe.recipe import load_recipe
from shoal.recipe.evaluate import CONFIGS_DIR
names = {kind: [*LISTS[kind]()] for kind in ("recipes", "tasks", "suites", "cluster")}
for name in names["recipes"]:
    read_deepspeed(load_recipe(name).distill.deepspeed)
places = [shoal.__file__, shoal.compress.__file__, str(CONFIGS_DIR), *sys.path]
print(json.dumps([names, places]))
"""


def test_what_is_shipped_is_found_from_an_empty_folder(python: Path, alone: dict[str, str], tmp_path: Path) -> None:
    """Recipes load by their names, with the DeepSpeed files, suites and tasks that they name."""
    found, (code, stage, configs, *path) = json.loads(
        run(python, "-Pc", FIND, cwd=tmp_path, env=alone).splitlines()[-1]
    )
    assert found == {kind: [*LISTS[kind]()] for kind in found}
    assert all(Path(place).is_relative_to(python.parents[1]) for place in (code, stage, configs))
    assert str(ROOT / "src") not in path
    assert "node-a" in (Path(configs) / "cluster/hostfile").read_text(encoding="utf-8")


def test_the_installed_wheel_measures_cuts_heals_scores_and_reports(
    python: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    """In a folder whose psutil.py must not be taken for the package."""
    tiny_checkpoint(tmp_path, "llama")
    (tmp_path / "psutil.py").write_text("raise ImportError('the wrong psutil')\n")
    settings = {
        "model": "llama",
        "run_dir": "run",
        "dtype": "float32",
        "num_processes": 1,
        "measure": {"metrics": ["block_influence"], "num_tokens": 512, "sequence_length": 64},
        "prune": {"num_drop": 2},
        "distill": {
            "num_tokens": 512,
            "sequence_length": 64,
            "batch_size": 4,
            "precision": "float32",
            "deepspeed": "zero1",
            "watch": None,
        },
        "eval": {"tasks": ["retrieval_continuation"], "limit": 4, "perplexity_tokens": 256},
        "track": {"wandb": "off"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    run(python.with_name("shoal"), "run", "--config", "mine.yaml", cwd=tmp_path, env=alone)
    results = [
        "importance.json",
        "plan.json",
        "distill.json",
        "eval/teacher.json",
        "eval/pruned.json",
        "eval/distilled.json",
    ]
    stamps = [json.loads((tmp_path / "run" / name).read_text())["made"]["shoal"] for name in results]
    assert stamps == [VERSION] * len(results)
    assert "</html>" in (tmp_path / "run/report.html").read_text(encoding="utf-8")

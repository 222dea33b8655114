"""One case of tests/system/hostile.yaml in this process: what is made, what is said, and what it takes."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from tiny import set_json, tiny_model
from tokenizers import Tokenizer
from transformers import PreTrainedModel

import shoal
from shoal.artifacts.training import Training
from shoal.launch import cli

DEEP = "[" * 20_000 + "]" * 20_000
BOMB = "\n".join(
    ["a: &a [x, x]", *(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(20))]
)
CODE = "from pathlib import Path\nPath('PWNED').touch()\nclass C: ..."
FORBIDDEN = (
    "transformers.AutoModelForCausalLM.from_pretrained",
    "shoal.models.load.load_model",
    "shoal.launch.verbs.launch.run_launcher",
)
"""What loads weights and starts ranks."""
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24


def cut(size: int) -> Callable[[Path], object]:
    """The first ``size`` bytes of what is there."""
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def header(text: str, size: int | None = None) -> bytes:
    """A safetensors file without tensors."""
    return struct.pack("<Q", len(text) if size is None else size) + text.encode()


def added_tokens(count: int) -> Callable[[Path], object]:
    """A tokenizer with so many tokens more."""

    def add(path: Path) -> None:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.add_tokens([f"<z{number}>" for number in range(count)])
        tokenizer.save(str(path))

    return add


def inside(prefix: str) -> Callable[[Path], object]:
    """Weights whose names begin with ``prefix``."""

    def rename(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        names = {prefix * (name != "__metadata__") + name: own for name, own in json.loads(content[8:end]).items()}
        path.write_bytes(header(json.dumps(names)) + content[end:])

    return rename


def checkpoint(path: Path) -> None:
    """The manifest of a checkpoint of the training whose distill.json lies in the run directory."""
    inputs = Training.load(path.parents[2] / Training.FILE).provenance.inputs
    path.write_text(json.dumps({"inputs": inputs, "files": {}}))


DAMAGE: dict[str, Any] = {
    "DEEP": DEEP,
    "BOMB": BOMB,
    "CODE": CODE,
    "header": header,
    "cut": cut,
    "added_tokens": added_tokens,
    "inside": inside,
    "checkpoint": checkpoint,
    "LONG": "a" * 300,
    "copied": lambda name: lambda path: shutil.copytree(path.parent / name, path),
    "copied_file": lambda name: lambda path: shutil.copy(path.parent / name, path),
    "moved": lambda name: lambda path: path.rename(path.with_name(name)),
    "link": lambda to: lambda path: path.symlink_to(to),
    "hard_link": lambda to: lambda path: path.hardlink_to(path.parent / to),
    "mode": lambda bits: lambda path: path.chmod(bits),
    "fifo": lambda path: os.mkfifo(path),
    "gone": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
}


class _Loader(yaml.SafeLoader):
    """`!do` is an expression."""


_Loader.add_constructor("!do", lambda loader, node: eval(str(node.value), DAMAGE))


def read_cases(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of all groups by name; what a group says holds for every row of it that says nothing else."""
    cases: dict[str, dict[str, Any]] = {}
    for group in yaml.load(file.read_text(), _Loader):
        for row in group.pop("cases"):
            case = {**group, **row, "files": {**group.get("files", {}), **row.get("files", {})}}
            name = f"{group['group']}: {row['name']}"
            assert name not in cases, name
            cases[name] = case
    return cases


def make(folder: Path, files: Mapping[str, Any]) -> None:
    """The files of a case: text or bytes, null = a folder, a mapping = settings of a JSON file, or what is done."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case None:
                path.mkdir()
            case str() | bytes():
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            case dict():
                set_json(path, **content)
            case _:
                content(path)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Nobody may read what its mode forbids, root neither."""
    libc, head = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    had = (ctypes.c_uint32 * 6)()
    libc.capget(head, had)
    less = (ctypes.c_uint32 * 6)(*had)
    less[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    libc.capset(head, less)
    try:
        yield
    finally:
        libc.capset(head, had)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("weights were loaded, or ranks were started")


FROM_PRETRAINED: Any = getattr(PreTrainedModel.from_pretrained, "__func__")  # noqa: B009


def _without_data(cls: Any, *arguments: Any, **settings: Any) -> Any:
    """Shapes may be asked for, but no weights."""
    return FROM_PRETRAINED(cls, *arguments, **settings) if settings.get("device_map") == "meta" else _refuse()


def outcome(case: Mapping[str, Any], folder: Path) -> tuple[int, str]:
    """Exit code, and all that was written."""
    environment = {name: value.replace("HERE", str(folder)) for name, value in case.get("env", {}).items()}
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(_without_data)))
        for name in FORBIDDEN:
            stack.enter_context(patch(name, _refuse))
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(without_rights())
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(_stdout(case.get("stdout"), said)))
        code = _python(case["python"]) if "python" in case else _command(case["shoal"], folder)
        return code, said.getvalue()


LOADED = "torch was loaded"
FRESH = f"""
import atexit, sys
atexit.register(lambda: "torch" in sys.modules and print({LOADED!r}, file=sys.__stderr__))
from shoal.launch.cli import main
main()
"""


def fresh(case: Mapping[str, Any], folder: Path) -> tuple[int, str, bool]:
    """The same of a command in a process that has loaded nothing, and whether it ends with torch, which takes
    seconds."""

    def limited() -> None:
        for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right)

    words = shlex.split(case["shoal"]) if isinstance(case["shoal"], str) else case["shoal"]
    argv = [os.fsencode(word.replace("HERE", str(folder))) for word in words]
    environment = os.environ | {name: value.replace("HERE", str(folder)) for name, value in case.get("env", {}).items()}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *argv],
        cwd=folder,
        env=environment,
        preexec_fn=limited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, told, _ = done.stdout.decode(errors="replace").partition(f"{LOADED}\n")
    return done.returncode, said, bool(told)


def _stdout(kind: str | None, said: io.StringIO) -> Any:
    """Where results are printed: beside what is said, to a file, or nowhere."""
    return said if kind is None else None if kind == "closed" else open(kind, "w")


def _command(words: str | list[str], folder: Path) -> int:
    argv = shlex.split(words) if isinstance(words, str) else words
    try:
        cli.main([word.replace("HERE", str(folder)) for word in argv])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    raise AssertionError("a command exits")


def _python(words: str) -> int:
    try:
        eval(words, {"shoal": shoal, "Path": Path, "torch": torch, "tiny": lambda: tiny_model("llama")})
    except shoal.UserError as error:
        print(f"shoal: error: {error}")
        return 2
    return 0


def apart(case: Mapping[str, Any], folder: Path) -> None:
    """The same in a process of its own, whose output is what was written."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    print(json.dumps(outcome(case, folder)), file=sys.stderr, flush=True)

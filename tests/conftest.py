"""The environment of the tests, set before torch loads: offline, and one thread per process.

Two idle thread pools that spin on the same cores make tests ten times slower.
"""

import fcntl
import gc
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import setuptools  # noqa: F401  first of all: torch's inductor needs it, and it loads no more once some tests are collected

for name, value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    # not the user's own, whose keys and measured speeds are no test's to write; it stays, since it holds the demo model
    "SHOAL_CACHE": str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "shoal"),
}.items():
    os.environ.setdefault(name, value)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it


SLOWEST = Path(__file__).with_name("slowest.txt")
"""Seconds of files whose tests take more than five, as `pytest --durations=0` adds up."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="of every test that is not slow the first case alone")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slowest files, so that no processor waits in the end, and mark what a sample leaves out as prove.

    With --fast, leave out what is marked slow or prove, and all but the first case where not marked every_case.
    """
    seconds = {file: float(time) for time, file in map(str.split, SLOWEST.read_text().splitlines())}
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0.0))
    cases: Counter[str] = Counter()
    for item in items:
        if sample := item.get_closest_marker("sample"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % sample.args[0]:
                item.add_marker("prove")
            cases[test] += 1
    if not config.getoption("--fast"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        every_case = item.get_closest_marker("every_case") is not None
        first.setdefault(item.nodeid if every_case else item.nodeid.partition("[")[0], item)
    kept = [item for item in first.values() if not {"slow", "prove"} & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish() -> None:
    """Let collections of garbage pass over the libraries, a million objects that stay."""
    gc.collect()
    gc.freeze()


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder that the first process which asks for its name makes, and that all then read: nobody writes to it."""
    in_parallel = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp().parent if in_parallel else tmp_path_factory.getbasetemp()

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        made = root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                make(root / name)
                made.touch()
        return root / name

    return folder


@pytest.fixture(scope="session")
def teacher(once: Once) -> Path:
    """A tiny llama checkpoint of six layers, which knows nothing. Read only."""
    from tiny import tiny_checkpoint  # loads torch

    return once("teacher", lambda folder: tiny_checkpoint(folder, "llama")) / "llama"


@pytest.fixture(scope="session")
def tied_teacher(once: Once) -> Path:
    """The same with one matrix for embeddings and head. Read only."""
    from tiny import tiny_checkpoint

    return once("tied_teacher", lambda folder: tiny_checkpoint(folder, "llama_tied")) / "llama_tied"


@pytest.fixture(scope="session")
def pruned(once: Once, tied_teacher: Path) -> Callable[..., Path]:
    """A recipe in a folder, whose student is made already and whose training keeps checkpoints."""
    from training_runs import KEEPING, prepare, recipe

    cut = once("tied_cut", lambda folder: prepare(folder, tied_teacher)) / "run"
    return lambda folder, **distill: recipe(folder, tied_teacher, cut, **{**KEEPING, **distill})


# W&B's background thread outlives the test that used it, and complains into the captured log of a later one (pytest
# captures W&B's loggers though they do not propagate)
logging.getLogger("wandb.sdk.lib.asyncio_manager").disabled = True


@pytest.fixture(autouse=True)
def _fast_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is float32 in this process, so that a test computes the same numbers on every machine."""
    monkeypatch.setattr("shoal.machine.bfloat16_instructions", lambda device: "")


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """A command called in this process sets up logging to a stream that closes with its test: take that back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _no_hub_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test in which anything asks for a kernel of the Hub fails, also where a library passes over the error."""
    try:
        from kernels import FuncRepository, LayerRepository
    except ImportError:  # transformers before 5.25 does without
        yield
        return
    from transformers.integrations import hub_kernels

    asked: list[str] = []

    def refuse(repository: object, *_: object, **__: object) -> object:
        asked.append(str(repository))
        raise FileNotFoundError(f"{repository}: tests use no kernels of the Hub")

    def load(own: Callable[..., object], repository: object) -> object:
        return own(repository) if "`test/" in str(repository) else refuse(repository)  # a folder of the test's

    for kind in (FuncRepository, LayerRepository):
        own = kind.load
        monkeypatch.setattr(kind, "load", lambda repository, own=own: load(own, repository))
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", refuse)
    yield
    assert not asked, "a kernel of the Hub was asked for"

"""Ranks that decide together. What the command makes of them is in test_cli.

Covers: shoal.ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cases
from ranks import call_on_ranks

from shoal import runtime
from shoal.errors import UserError
from shoal.ranks import LAUNCHED, local_rank, rank, refuse_variables, world_size
from shoal.runtime import agreed, barrier, check_device, everyone_sees, together

PATIENCE_S = 1.0


def _decide_on_rank(rank: int, world_size: int, folder: str) -> None:
    patience = timedelta(seconds=PATIENCE_S)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size, timeout=patience)
    runtime.is_main = lambda: rank == 0
    dist.barrier()

    from shoal.eval.harness.engine import CausalLM  # loads lm-eval

    def late() -> str:
        assert rank == 0
        time.sleep(2.5 * PATIENCE_S)
        return "late"

    def never() -> str:
        raise UserError("nothing to decide")

    assert agreed(late) == "late"
    with pytest.raises(UserError, match="nothing to decide"):
        agreed(never)
    assert together(lambda: rank) == [0, 1]
    if rank == 0:
        time.sleep(2.5 * PATIENCE_S)
    barrier()
    lm = object.__new__(CausalLM)
    lm._rank, lm._world_size = rank, 2
    if rank == 0:
        time.sleep(2.5 * PATIENCE_S)
    assert lm.gather_object(rank) == ([0, 1] if rank == 0 else None)
    late_file = Path(folder) / "made" / "late"
    if rank == 0:
        late_file.parent.mkdir()
        late_file.touch()
    else:  # a shared disk that shows a new file late
        seen, sees_from = os.listdir, time.monotonic() + PATIENCE_S
        runtime.os.listdir = lambda path: seen(path) if time.monotonic() > sees_from else []
    assert everyone_sees(late_file)
    assert not everyone_sees(late_file.with_name("none"))
    runtime.SEEN_S, runtime.os.listdir = 0, lambda path: []
    if rank == 1:
        with pytest.raises(UserError, match="does not see it after 0 s; choose a run_dir on a disk"):
            everyone_sees(late_file)
    else:
        agreed(late_file.exists)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_wait_for_the_first_ones_decision_however_long_it_takes(tmp_path: Path) -> None:
    """A collective that waits for it ends with the group's timeout, and the work of hours with it."""
    call_on_ranks(_decide_on_rank, str(tmp_path), ranks=2)


@pytest.mark.parametrize(("said", "unset"), cases(__file__))
def test_what_no_launcher_says_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], unset: str
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert (rank(), local_rank(), world_size()) == (0, 0, 1)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    told = " ".join(f"{name}={value}" for name, value in said.items())
    for ask in (rank, local_rank, world_size):
        with pytest.raises(UserError, match=rf"^{told}: set in the environment, .*`unset {unset}`"):
            ask()


@pytest.mark.parametrize(("said", "own"), [({}, 0), ({"SLURM_LOCALID": "1"}, 1)])
def test_a_rank_without_its_number_on_the_node_is_the_first_there_unless_slurm_says_more(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], own: int
) -> None:
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "")  # which is put back after the test
    monkeypatch.delenv("LOCAL_RANK")
    told = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234", **said}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (rank(), local_rank(), world_size()) == (3, own, 4)


@pytest.mark.parametrize(("seen", "own"), [(1, 0), (4, 3)])
def test_a_rank_that_sees_its_device_alone_is_the_first_there(
    monkeypatch: pytest.MonkeyPatch, seen: int, own: int
) -> None:
    for name, value in {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # which are put back after the test
        monkeypatch.setattr(runtime.distributed_c10d, name, None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: seen)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    runtime.set_up_distributed(77)
    assert local_rank() == own


def _make_a_group(rank: int, world_size: int) -> None:
    runtime.set_up_distributed(77)
    group: Any = dist.new_group([rank])
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("CUDA_VISIBLE_DEVICES", value)
            for value in ("GPU-1a-2b,GPU-1a-3c", "MIG-1-2,MIG-1-3", "0, 1", "NoDevFiles")
        ),
        ("SHOAL_PORT", "tcp://10.0.0.1:80"),  # of a service of Kubernetes that is called shoal
        ("TORCH_DISTRIBUTED_DEBUG", "detail"),
    ],
)
def test_what_clusters_set_passes(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    refuse_variables()


def test_groups_that_libraries_make_have_the_timeout_of_training() -> None:
    """Under NCCL torch's own is 10 minutes, and DeepSpeed's reductions are in such a group."""
    call_on_ranks(_make_a_group, ranks=1)


OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
UNSEEN = (
    "driver 470.57.02, but torch .* is built for CUDA 13.0; update the driver, or install a torch for an older CUDA"
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for /dev and /proc: an NVIDIA GPU with an old driver, which torch does not see."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text(OLD)
    monkeypatch.setattr(runtime, "GPU", tmp_path / "nvidia0")
    monkeypatch.setattr(runtime, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_that_torch_does_not_see_is_told_with_its_driver(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_device("cpu")
    assert not caplog.text
    check_device("auto")
    assert re.search(
        f"device: everything runs on the CPU, although this machine has a GPU: {UNSEEN}; set device: cpu", caplog.text
    )
    with pytest.raises(UserError, match=f"^device: is cuda, but torch finds no such GPU: {UNSEEN}; fix that"):
        check_device("cuda")
    (machine / "version").unlink()
    with pytest.raises(UserError, match="a driver of unknown version"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="is built without CUDA"):
        check_device("cuda")


def test_ranks_of_a_launcher_do_not_train_on_the_cpu_beside_gpus_that_torch_does_not_see(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=f"^device: this machine has a GPU, but torch does not see it: {UNSEEN}; or set"
    ):
        check_device("auto")
    check_device("cpu")
    (machine / "nvidia0").unlink()
    check_device("auto")


def test_without_a_gpu_nothing_is_said_unless_the_recipe_insists(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_device("auto")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES hides all"):
        check_device("cuda")
    (machine / "nvidia0").unlink()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    check_device("auto")
    assert not caplog.text
    with pytest.raises(UserError, match="this machine has no NVIDIA GPU"):
        check_device("cuda")


@pytest.mark.parametrize(("kind", "refused"), [("cuda", ("cpu",)), ("mps", ("cpu", "cuda"))])
def test_a_device_is_what_the_recipe_says_or_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch, kind: str, refused: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    for wanted in ("auto", "cpu", "cuda"):
        with pytest.raises(UserError, match=r"^device: ") if wanted in refused else contextlib.nullcontext():
            check_device(wanted)

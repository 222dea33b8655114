"""Two nodes rehearsed on one machine, and the examples for clusters."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from ranks import environment, run_ranks, wait_for
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from torch.distributed.run import get_args_parser
from training_runs import KEEPING, MANY_STEPS, write_recipe

from shoal.artifacts.training import Training
from shoal.launch.arguments import parse

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "cluster"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
NODES = ("node-a", "node-b")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by one cable; nothing but it connects them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (Debian package iproute2)")
    names = (f"shoal-{os.getpid()}-a", f"shoal-{os.getpid()}-b")
    tried = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"cannot make network namespaces here (needs root): {tried.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable-a", "netns", names[0], "type", "veth", "peer", "name", "cable-b", "netns", names[1])
        for name, end, address in zip(names, ("cable-a", "cable-b"), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            hosts = Path("/etc/netns") / name / "hosts"  # which `ip netns exec` puts in the place of /etc/hosts
            hosts.parent.mkdir(parents=True)
            lines = (f"{address} {node}\n" for address, node in zip(ADDRESSES, NODES, strict=True))
            hosts.write_text("".join(("127.0.0.1 localhost\n", *lines)))
        yield names
    finally:
        for name in names:
            # what a failed test has left there would wait for its peer until torch's timeout
            alive = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in map(int, alive.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


@pytest.fixture
def recipes(tmp_path) -> list[Path]:
    """Of two trainings with many checkpoints, in folders of their own."""
    teacher, places = tiny_checkpoint(tmp_path, "llama_tied"), (tmp_path / "alone", tmp_path / "together")
    return [write_recipe(place, teacher, steps=MANY_STEPS, deepspeed="zero2", **KEEPING) for place in places]


@pytest.mark.prove
def test_two_nodes_train_the_weights_of_one_bit_for_bit(nodes, recipes, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launched = []
    for number, name in enumerate(nodes):
        command = ["ip", "netns", "exec", name, deepspeed, "--hostfile", str(hostfile), "--no_ssh"]
        command += ["--node_rank", str(number), "--master_addr", ADDRESSES[0], "--master_port", "29513"]
        command += ["--module", "shoal.launch.cli", "distill", "--config", str(recipes[1])]
        env = environment(GLOO_SOCKET_IFNAME=f"cable-{'ab'[number]}")
        launched.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
    for process in launched:
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log[-3000:]
    equal_to_one_node(*recipes)


def equal_to_one_node(alone: Path, together: Path) -> None:
    """The training of the recipe ``together`` has the bits of two ranks on this machine, which are trained now."""
    one = run_ranks(["distill", "--config", str(alone)], ranks=2, env=environment(), cwd=alone.parent)
    assert one.returncode == 0, one.stderr[-3000:]
    histories = [Training.load(path.parent / "run" / Training.FILE).history for path in (alone, together)]
    assert [row["loss"] for row in histories[0]] == [row["loss"] for row in histories[1]]
    first, second = (load_file(p.parent / "run" / "distilled" / "model.safetensors") for p in (alone, together))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


SLURM = {
    "srun": """# one task a node, in the node's network and under its name, with what SLURM tells it
while [ "${1#--}" != "$1" ]; do shift; done
node=0
for host in $SLURM_JOB_NODELIST; do
    env SLURM_STEP_ID=0 SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NPROCS=2 \\
        SLURMD_NODENAME=$host SLURM_STEP_NODELIST="$SLURM_JOB_NODELIST" SLURM_TASKS_PER_NODE='1(x2)' \\
        ip netns exec $NETWORKS-${host#node-} unshare --uts bash -c 'hostname $SLURMD_NODENAME; exec "$@"' - "$@" &
    tasks="$tasks $!" node=$((node + 1))
done
echo $tasks > tasks
for task in $tasks; do wait $task || code=$?; done
exit ${code:-0}""",
    "scancel": "kill -TERM $(cat tasks)",
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" $3; else echo "$*" >> requeued; fi',
}
"""What the job script calls of SLURM."""


def saved(path: Path) -> Iterator[Path]:
    return path.parent.glob("run/checkpoints/*/manifest.json")


@pytest.mark.prove
def test_a_slurm_job_on_two_nodes_goes_on_when_it_is_requeued_and_ends_with_the_weights_of_one(
    nodes, recipes, tmp_path
):
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(NETWORKS=nodes[0].removesuffix("-a"), SLURM_JOB_NODELIST=" ".join(NODES), SLURM_JOB_ID="7")
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    env["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(CLUSTER / "slurm.sbatch")]
    assert subprocess.run(
        [*command, "nowhere.yaml"], env=env, cwd=tmp_path, capture_output=True, check=False
    ).returncode
    assert not (tmp_path / "requeued").exists(), "what fails would fail again"
    command.append(str(recipes[1]))
    job = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: job.poll() is not None or any(saved(recipes[1])), "a first checkpoint", 300)
    job.send_signal(signal.SIGUSR1)  # as SLURM does before the time limit; SIGTERM is that of scancel
    _, log = job.communicate(timeout=300)
    assert job.returncode == 128 + signal.SIGUSR1, log[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert not (recipes[1].parent / "run/distilled").exists()
    again = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming from" in again.stderr
    equal_to_one_node(*recipes)


@pytest.mark.prove
def test_torchrun_on_two_nodes_begins_again_from_the_last_checkpoint_when_a_rank_is_killed(nodes, recipes, tmp_path):
    env = environment(FIRST_NODE=NODES[0], GPUS="1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    launched = []
    for number, network in enumerate(nodes):
        command = ["ip", "netns", "exec", network, "unshare", "--uts", "bash", "-c", 'hostname $0; exec bash "$@"']
        command += [NODES[number], str(CLUSTER / "torchrun.sh"), str(recipes[1])]
        launched.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
    wait_for(lambda: launched[1].poll() is not None or any(saved(recipes[1])), "a first checkpoint", 300)
    rank = next(p for p in psutil.Process(launched[1].pid).children(recursive=True) if "RANK" in p.environ())
    rank.kill()
    logs = [process.communicate(timeout=300)[1] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    assert "resuming from" in logs[0]
    equal_to_one_node(*recipes)


def test_a_signal_to_the_script_of_torchrun_is_one_to_torchrun_itself(tmp_path):
    (tmp_path / "torchrun").write_text("#!/bin/bash\necho $$")
    (tmp_path / "torchrun").chmod(0o755)
    env = environment(FIRST_NODE=NODES[0], PATH=f"{tmp_path}:{os.environ['PATH']}")
    script = subprocess.Popen(
        ["bash", str(CLUSTER / "torchrun.sh"), "a.yaml"], env=env, stdout=subprocess.PIPE, text=True
    )
    assert script.communicate(timeout=30)[0] == f"{script.pid}\n"


def test_the_hostfile_example_is_one_that_the_launcher_reads():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(CLUSTER / "hostfile")) == {"node-a": 8, "node-b": 8}


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_the_scripts_for_clusters_are_valid_and_use_flags_that_exist(name):
    script = CLUSTER / name
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = re.sub(r"(?m)^\s*#.*$", "", script.read_text()).replace("\\\n", " ")
    command = re.search(r"torchrun ([^&\n]*)", text)
    assert command is not None
    words = re.sub(r'"?\$\{?\w+(:-\w+)?\}?"?', "2", command.group(1)).split()
    options = get_args_parser().parse_args(words)
    assert (options.module, options.training_script) == (True, "shoal.launch.cli")
    assert parse(options.training_script_args).verb == "distill"
    assert options.nnodes == "2"
    assert options.nproc_per_node == "2"


PDSH = """#!/bin/bash
# as pdsh does it over ssh: every host runs the command in an environment of its own
while [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && hosts=$2; [ "$1" = -S ] && shift || shift 2; done
node=0
for host in ${hosts//,/ }; do
    env -i PATH="$PATH" HOME="$HOME" DS_ACCELERATOR=cpu bash -c "${*//%n/$node}" || exit 1
    node=$((node + 1))
done
"""
ARRIVED = """import json, os
json.dump(dict(os.environ), open("rank" + os.environ["RANK"], "w"))
"""


@pytest.mark.prove
def test_a_hostfiles_ranks_have_what_the_example_keeps_for_them_and_no_secrets(tmp_path: Path) -> None:
    (tmp_path / "pdsh").write_text(PDSH)
    (tmp_path / "pdsh").chmod(0o755)
    (tmp_path / "arrived.py").write_text(ARRIVED)
    told = (CLUSTER / "hostfile").read_text()
    (tmp_path / "hostfile").write_text(told.replace("slots=8", "slots=1"))
    kept = {"HF_HOME": "/big/hf", "SHOAL_CACHE": "/big/shoal", "GLOO_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "4"}
    env = {
        **environment(),
        **kept,
        "HF_TOKEN": "hf_x",
        "WANDB_API_KEY": "y",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    save = next(line.lstrip("# ") for line in told.splitlines() if "grep" in line)
    subprocess.run(["bash", "-c", save], env=env, cwd=tmp_path, check=True)
    command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "hostfile", "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", "--no_local_rank", "arrived.py"]
    subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for rank in range(2):
        arrived = json.loads((tmp_path / f"rank{rank}").read_text())
        assert kept.items() <= arrived.items()
        assert not {"HF_TOKEN", "WANDB_API_KEY"} & arrived.keys()

"""Two nodes: two network namespaces of one machine, joined by a cable, and the Slurm script as is.

`srun` and `scontrol` are stand-ins of a few lines that start one process in each namespace.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, lines, trace
from test_runs import SMALL, evaluations, learned

from report import load_rollouts

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for n in 0 1; do
    ip netns exec "$CABLE-$n" env SLURM_NODEID=$n PET_LOCAL_ADDR=10.77.0.$((n + 1)) "$@" &
    pids="${pids:-} $!"
done
trap 'kill -TERM $pids' TERM
code=0
while jobs %% >/dev/null 2>&1; do
    wait -n && continue # a signal ends a wait, too
    code=$?
    kill -TERM $pids # --kill-on-bad-exit
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "requeued $2" >&2; else echo 10.77.0.1; fi
"""


def ip(*words) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def cable():
    """Two namespaces whose eth0 are the ends of a cable, the only way from one to the other."""
    name = f"nf{os.getpid()}"
    ends = [f"{name}-{n}" for n in range(2)]
    if not shutil.which("ip") or not all(ip("netns", "add", end) for end in ends):
        pytest.skip("network namespaces need root and iproute2")
    try:
        assert ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for n, end in enumerate(ends):
            assert ip("link", "set", end, "netns", end, "name", "eth0")
            assert ip("-n", end, "addr", "add", f"10.77.0.{n + 1}/24", "dev", "eth0")
            assert ip("-n", end, "link", "set", "eth0", "up") and ip(
                "-n", end, "link", "set", "lo", "up"
            )
        yield name
    finally:
        for end in ends:
            ip("netns", "del", end)


def batch(cable, folder, *args, **env) -> subprocess.Popen:
    """The Slurm script, as sbatch would start it on two nodes of two ranks."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    nodes = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    nodes |= {"CABLE": cable, "RANKS_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "eth0"}
    nodes |= {"PYTHON": sys.executable, "PATH": f"{bin}:{os.environ['PATH']}", **env}
    return subprocess.Popen(
        ["bash", "configs/slurm/grpo.sbatch", *args],
        cwd=ROOT,
        env={**os.environ, **nodes},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_two_nodes_train_one_model(cable, tmp_path):
    """Each node generates and trains; FSDP shards inside a node, HSDP copies between them."""
    args = [*SMALL, "--num_generators=0", "--trainer_replicas=2", "--steps=3"]
    job = batch(cable, tmp_path, *args, f"--run_dir={tmp_path}/r")
    assert job.wait(timeout=300) == 0, job.stderr.read()[-3000:]
    assert len(learned(tmp_path / "r")) == 3
    for step in range(3):
        table = load_rollouts(tmp_path / f"r/rollouts/{step}")
        assert table.index.tolist() == [step * 2**32 + s for s in range(6) for _ in range(4)]
        assert (table.version[table.mask] == step).all()
    assert [x["name"] for x in trace(tmp_path / "r")].count("check") == 4 * 4  # bit-equal
    assert [x["eval_rows"] for x in evaluations(tmp_path / "r")] == [12, 12]


@pytest.mark.long
def test_slurm_says_that_time_is_up(cable, tmp_path):
    """SIGTERM to the batch script: the run saves, is queued again, and goes on from there."""
    args = [*SMALL, "--eval_size=0", f"--run_dir={tmp_path}/r", "--check_weights=false"]
    job = batch(cable, tmp_path, *args, "--steps=500")
    metrics, deadline = tmp_path / "r/metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and len(lines(tmp_path / "r")) > 1):
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    stopped = int(re.search(r"stopped before step (\d+)", said)[1])
    assert "requeued 7" in said
    again = batch(cable, tmp_path, *args, f"--steps={stopped + 2}")
    assert again.wait(timeout=300) == 0, again.stderr.read()[-3000:]
    assert [x["step"] for x in lines(tmp_path / "r")] == list(range(stopped + 2))

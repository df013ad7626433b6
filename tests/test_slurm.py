"""tools/slurm.sh under a real Slurm: two nodes on this machine (tests/slurm_cluster.sh), on CPUs."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.checkpoint import checkpoints, read_checkpoint
from tests.conftest import ROOT, assert_same_bits, metrics_of, tiny_arguments, tiny_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("slurmctld") or os.geteuid() != 0, reason="needs root and: apt install slurm-wlm munge"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which Slurm's commands find the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ROOT / "tests/slurm_cluster.sh"
    try:
        subprocess.run([script, "start", folder], check=True, timeout=120)
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    finally:
        subprocess.run([script, "stop", folder], check=True)


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits tools/slurm.sh, its #SBATCH lines edited for CPUs and a short time, from a copy of the project: (job, log)."""
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", ".*", "results", "*.bin"))
    script = (project / "tools/slurm.sh").read_text()
    script = script.replace("--gpus-per-node=8 --cpus-per-task=64 --exclusive", "--cpus-per-task=1")
    (project / "tools/slurm.sh").write_text(script.replace("--time=24:00:00 --signal=B:TERM@300", "--time=2 --signal=B:TERM@60"))

    def run(arguments, *options) -> tuple[str, Path]:
        words = ["sbatch", "--nodes=2", *options, "tools/slurm.sh", *arguments]
        done = subprocess.run(words, cwd=project, env=cluster, capture_output=True, text=True, check=True)
        job = done.stdout.split()[-1]
        return job, project / f"slurm-{job}.log"

    return run


def state_of(job: str, environment) -> str:
    done = subprocess.run(["scontrol", "show", "job", job], env=environment, capture_output=True, text=True)
    return re.search(r"JobState=(\w+)", done.stdout)[1] if done.returncode == 0 else "GONE"


def wait_until(condition, log: Path, seconds: float = 1500):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come within {seconds} s: {log.read_text()[-2000:] if log.exists() else 'no log'}"
        time.sleep(0.5)


def test_a_job_that_is_told_of_its_time_limit_saves_is_requeued_and_ends_as_the_undisturbed_one(cluster, submit, tmp_path):
    """A run without an end, until Slurm has stopped it; then it is given one, 20 steps away. Its learning rate is constant."""
    data, settings = tiny_folder(tmp_path / "tiny"), tmp_path / "steps.py"
    arguments = lambda out: [*tiny_arguments(data, out, eval_interval=0, log_interval=100, min_learning_rate=0.01), str(settings)]
    settings.write_text("max_steps = 10**6\n")
    job, log = submit(arguments(tmp_path / "out"))
    wait_until(lambda: checkpoints(tmp_path / "out") and state_of(job, cluster) == "PENDING", log)
    steps = read_checkpoint(checkpoints(tmp_path / "out")[-1])["step"] + 20
    settings.write_text(f"max_steps = {steps}\n")
    wait_until(lambda: f"done at step {steps}" in log.read_text() and state_of(job, cluster) != "RUNNING", log)
    assert "stopped at step" in log.read_text() and f"resuming from {tmp_path / 'out'}" in log.read_text()
    job, log = submit(arguments(tmp_path / "whole"), "--time=60")
    wait_until(lambda: state_of(job, cluster) in ("COMPLETED", "FAILED", "GONE"), log)
    states = [read_checkpoint(tmp_path / out / f"ckpt_{steps:07d}.pt") for out in ("out", "whole")]
    for state in states:
        del state["config"]["out_dir"]
    assert_same_bits(*states)


def test_scancel_saves(cluster, submit, tmp_path):
    data, out = tiny_folder(tmp_path / "tiny"), tmp_path / "out"
    job, log = submit(tiny_arguments(data, out, max_steps=10**6, eval_interval=0, log_interval=1))
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(metrics_of(out)) > 5, log)
    subprocess.run(["scancel", job], env=cluster, check=True)
    wait_until(lambda: checkpoints(out), log, 60)
    assert read_checkpoint(checkpoints(out)[-1])["step"] >= 5

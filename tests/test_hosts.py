"""Several machines: the command of docs/several_machines.md on two hosts, each a network namespace of this machine; and tools/slurm.sh."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.distributed.run import get_args_parser

from tests.conftest import PATIENCE, ROOT, metrics_of, run_command, tiny_arguments, tiny_folder
from runtime.checkpoint import read_checkpoint
from train import load_config

ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}


def torchrun_words(text: str, arguments=(), **environment) -> list[str]:
    """What follows `torchrun` in the first command of a text, as bash reads it, with "$@" for `arguments`."""
    command = re.search(r"^ *torchrun ((?:.*\\\n)*[^&\n]*)", text, re.MULTILINE)[1]
    printed = ["bash", "-uc", f'printf "%s\\n" {command}', "bash", *arguments]
    done = subprocess.run(printed, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def words_of_docs() -> list[str]:
    return torchrun_words((ROOT / "docs/several_machines.md").read_text())


def words_of_slurm() -> list[str]:
    text = (ROOT / "tools/slurm.sh").read_text()
    arguments = re.search(r"sbatch .*tools/slurm\.sh (.*)", text)[1].split()
    return torchrun_words(text, arguments, SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8", head_node="HOST", SLURM_JOB_ID="1")


@pytest.mark.parametrize("words_of", (words_of_docs, words_of_slurm))
def test_the_commands_are_what_torchrun_and_train_take(words_of, monkeypatch):
    options = get_args_parser().parse_args(words_of())
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "8", "c10d")
    assert (options.rdzv_endpoint, options.rdzv_id, options.training_script) == ("HOST:29500", "1", "train.py")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert load_config(options.training_script_args).oec == "mu_centering"


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", ROOT / "tools/slurm.sh"], check=True)


# --- two hosts


@pytest.fixture(scope="module")
def namespaces():
    """One for each host, joined by a cable."""
    names = {host: f"oec-{os.getpid()}-{host}" for host in ADDRESSES}
    a, b = names.values()
    commands = [f"ip netns add {name}" for name in names.values()]
    commands += [f"ip link add eth0 netns {a} type veth peer name eth0 netns {b}"]
    for host, name in names.items():
        commands += [f"ip -n {name} addr add {ADDRESSES[host]}/24 dev eth0"]
        commands += [f"ip -n {name} link set {interface} up" for interface in ("lo", "eth0")]
    commands += [f"ip netns exec {a} unshare --uts --mount hostname host-a"]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", "") or error
                pytest.skip(f"needs Linux, root and iproute2 to make two hosts of this machine: {command}: {reason}")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def run_on_both(namespaces, arguments, tmp_path, known_names: bool = True, own_disk: str = "") -> list[tuple[int, str]]:
    """The command of docs/several_machines.md with one process on each host: both exit statuses and outputs.

    Without known names, each host's leads to itself alone, and what docs/several_machines.md says of that is added. `own_disk` is a
    folder that is another one, empty, on the second host.
    """
    words = words_of_docs()
    words = [word.replace("--nproc_per_node=8", "--nproc_per_node=1") for word in words[: words.index("train.py")]]
    names_file = tmp_path / "hosts"
    known = [f"{address} {host}" for host, address in ADDRESSES.items()] if known_names else ["127.0.0.1 host-a host-b"]
    names_file.write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
    runs = []
    for host, name in namespaces.items():
        prepare = f"hostname {host}; mount --bind {names_file} /etc/hosts; "
        if own_disk and host == "host-b":
            prepare += f"mount -t tmpfs none {own_disk}; "
        settings, endpoint, extra = {}, "host-a", []
        if not known_names:
            settings, endpoint = {"GLOO_SOCKET_IFNAME": "eth0"}, ADDRESSES["host-a"]
            extra = [f"--local_addr={ADDRESSES[host]}", f"--rdzv_conf=is_host={int(host == 'host-a')}"]
        launch = [word.replace("HOST", endpoint) for word in words] + extra
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-ec", prepare + 'exec "$@"', "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", *launch, "train.py", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, **pipes))
    try:
        outputs = [run.communicate(timeout=PATIENCE)[0] for run in runs]
    finally:
        for run in runs:
            run.terminate()  # torchrun ends its workers
            run.wait(timeout=PATIENCE)
    return [(run.returncode, output) for run, output in zip(runs, outputs)]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory):
    """The data, and the run on one host with one process and with two."""
    folder = tmp_path_factory.mktemp("one_host")
    data = tiny_folder(folder / "tiny")
    for processes in (1, 2):
        done = run_command(tiny_arguments(data, folder / str(processes)), processes)
        assert done.returncode == 0, done.stderr
    return data, [folder / "1", folder / "2"]


@pytest.mark.slow
@pytest.mark.parametrize("known_names", (True, False))
def test_two_hosts_train_what_one_does(namespaces, on_one_host, tmp_path, known_names):
    data, others = on_one_host
    for status, output in run_on_both(namespaces, tiny_arguments(data, tmp_path / "out"), tmp_path, known_names):
        assert status == 0, output
    ours, weights = metrics_of(tmp_path / "out"), read_checkpoint(tmp_path / "out/ckpt_0000012.pt")["model"]
    for other in others:
        expected = metrics_of(other)
        assert [(x["split"], x["step"]) for x in ours] == [(x["split"], x["step"]) for x in expected]
        assert [x["loss"] for x in ours] == pytest.approx([x["loss"] for x in expected], rel=0, abs=1e-5)
        torch.testing.assert_close(weights, read_checkpoint(other / "ckpt_0000012.pt")["model"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_without_a_shared_disk_a_run_is_whole_and_resuming_it_says_what_is_missing(namespaces, on_one_host, tmp_path):
    """Process 0 chooses the checkpoint; a host that does not have it ends the run, and none trains from another state."""
    data, (expected, _) = on_one_host
    out = tmp_path / "out"
    out.mkdir()
    arguments = tiny_arguments(data, out)
    results = run_on_both(namespaces, arguments, tmp_path, own_disk=out)
    assert [status for status, _ in results] == [0, 0], results
    assert [x["loss"] for x in metrics_of(out)] == pytest.approx([x["loss"] for x in metrics_of(expected)], abs=1e-5)
    (out / "ckpt_0000012.pt").unlink()
    before = (out / "ckpt_0000008.pt").read_bytes()
    (status_a, _), (status_b, output) = run_on_both(namespaces, arguments, tmp_path, own_disk=out)
    assert status_a != 0 and status_b != 0
    assert re.search(r"nanoOEC: .*ckpt_0000008\.pt cannot be gone on from: .*No such file", output), output
    assert (out / "ckpt_0000008.pt").read_bytes() == before and not (out / "ckpt_0000012.pt").exists()

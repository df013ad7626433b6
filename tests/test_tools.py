"""tools/: from the command line, on a run that the test has trained."""

import subprocess
import sys

import pytest
import torch

from data.prepare import prepare
from tests.conftest import ROOT, tiny_arguments


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from tests.conftest import run_command

    folder = tmp_path_factory.mktemp("run")
    documents = [f"the number {i} comes before the number {i + 1}.\n" * 5 for i in range(400)]
    prepare(documents, folder / "data", str(ROOT / "data/stdlib/vocabulary.tiktoken"), source="test", val_fraction=0.1)
    done = run_command(tiny_arguments(folder / "data", folder / "out", vocab_size=4096, max_steps=8))
    assert done.returncode == 0, done.stderr
    return folder / "out"


def tool(name, *arguments):
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_sample_continues_a_prompt(run_folder):
    options = ["--prompt", "the number 12", "--tokens", 20]
    first, again, other = (tool("sample", run_folder, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the number 12") and len(first.stdout) > len("the number 12\n")
    assert first.stdout == again.stdout != other.stdout
    checkpoint = sorted(run_folder.glob("ckpt_*.pt"))[-1]
    assert tool("sample", checkpoint, *options, "--seed", 1).stdout == first.stdout


def test_sample_refuses_what_is_no_model(run_folder, tmp_path):
    damaged = tmp_path / "ckpt_0000008.pt"
    damaged.write_bytes((run_folder / "ckpt_0000008.pt").read_bytes()[:-100])
    alien = tmp_path / "alien.pt"
    torch.save({"weights": torch.zeros(3)}, alien)
    for arguments in ([tmp_path / "none"], [damaged], [alien], [run_folder, "--tokens", "-1"], [run_folder.parent]):
        done = tool("sample", *arguments)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("nanoOEC: ")


@pytest.mark.parametrize("name", ("sample",))
def test_help(name):
    done = tool(name, "--help")
    assert done.returncode == 0 and "--" in done.stdout

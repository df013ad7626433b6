"""What a stranger would change first: each hack is a patch of a few lines, applied to a copy of the project and trained."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, VOCAB, fails_in_one_line, metrics_of, run_command, tiny_arguments
from train import load_config

HACKS = ROOT / "tests/hacks"


@pytest.fixture
def hacked(tmp_path):
    """A function of (patch, most added lines) that gives a patched copy of the code."""
    if not shutil.which("patch"):
        pytest.skip("applying the hacks needs the program patch")

    def apply(name: str, most: int):
        copy = tmp_path / "project"
        left_out = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", ".*", "results", "tests", "*.bin")
        shutil.copytree(ROOT, copy, ignore=left_out)
        patch = (HACKS / f"{name}.patch").read_text()
        assert len(re.findall(r"^\+(?!\+\+ )", patch, re.MULTILINE)) <= most
        done = subprocess.run(["patch", "-p1", "--fuzz=0"], input=patch, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, f"the code has moved away from {name}.patch: {done.stdout}{done.stderr}"
        return copy

    return apply


def hack_arguments(data, out, **changes) -> list[str]:
    return tiny_arguments(data, out, **{"oec": "none", "max_steps": 6, "eval_interval": 3} | changes)


def train(project, data, out, *words, **changes):
    return run_command([*hack_arguments(data, out, **changes), *words], script=project / "train.py", cwd=project)


def losses(out) -> list[float]:
    return [x["cross_entropy"] for x in metrics_of(out)]


@pytest.mark.slow
def test_another_optimizer(hacked, data, tmp_path, train_here):
    """It trains, and a run that was stopped is the run that was not."""
    project = hacked("another_optimizer", most=3)
    done = train(project, data, tmp_path / "whole", schedule="wsd")
    assert done.returncode == 0, done.stderr
    train_here(hack_arguments(data, tmp_path / "adamw", schedule="wsd"))
    assert losses(tmp_path / "whole") != losses(tmp_path / "adamw") and losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    (tmp_path / "whole" / "ckpt_0000006.pt").unlink()
    before = losses(tmp_path / "whole")
    assert train(project, data, tmp_path / "whole", schedule="wsd").returncode == 0
    assert losses(tmp_path / "whole") == before


def test_a_new_schedule(hacked, data, tmp_path, capsys):
    project = hacked("a_new_schedule", most=6)
    done = train(project, data, tmp_path / "out", schedule="inverse_sqrt", min_learning_rate=0.0, learning_rate=0.01)
    assert done.returncode == 0, done.stderr
    rates = [x["lr"] for x in metrics_of(tmp_path / "out") if x["split"] == "train"]
    assert rates == pytest.approx([0.005, 0.01, *(0.01 * (2 / (s + 1)) ** 0.5 for s in range(2, 6))])
    assert "inverse_sqrt" in fails_in_one_line(capsys, load_config, ["--schedule=inverse_sqrt"])  # unknown without the hack


def test_a_remedy_made_of_a_statistic(hacked, data, tmp_path, train_here):
    """With the plain loss it trains otherwise than the baseline; with the lean one, which has no gradient for it, it raises."""
    project = hacked("mean_logit_loss", most=8)
    options = {"fused_unembedding": False, "learning_rate": 0.03}
    plain, lean = tmp_path / "plain", tmp_path / "lean"
    done = train(project, data, plain, "config/mean_logit.py", **options)
    assert done.returncode == 0, done.stderr
    train_here(hack_arguments(data, tmp_path / "baseline", **options))
    for a, b in zip(metrics_of(plain)[-1:], metrics_of(tmp_path / "baseline")[-1:]):
        assert a["logit_mean"] != b["logit_mean"] and a["cross_entropy"] != b["cross_entropy"]
    refused = train(project, data, lean, "config/mean_logit.py")
    assert refused.returncode != 0 and "--fused_unembedding=False" in refused.stderr


@pytest.mark.slow
def test_grouped_query_attention(hacked, data, tmp_path, train_here):
    """Fewer parameters train; the memory model counts them, and the export, which cannot express them, refuses."""
    project = hacked("grouped_query_attention", most=12)
    done = train(project, data, tmp_path / "out", n_head=4)
    assert done.returncode == 0, done.stderr
    usual = train_here(hack_arguments(data, tmp_path / "usual", n_head=4)).model.num_parameters()
    parameters = int(re.search(r"([\d,]+) parameters", done.stdout).group(1).replace(",", ""))
    assert usual - parameters == 2 * (2 * 32 * 32 - 2 * 32 * 2 * 8)
    counts = "from tools.memory import parameter_counts as count; print(*count(vocab_size=300, n_layer=2, n_head=4, n_embd=32, tie_weights=False))"
    counted = subprocess.run([sys.executable, "-c", counts], cwd=project, capture_output=True, text=True)
    assert counted.stdout.split()[0] == str(parameters), counted.stderr
    exported = subprocess.run(
        [sys.executable, "-m", "tools.export_hf", str(tmp_path / "out"), str(tmp_path / "exported")],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert exported.returncode == 2 and len(exported.stderr.strip().splitlines()) == 1
    assert "n_kv_head" in exported.stderr or "pip install" in exported.stderr  # without the packages, that comes first


def test_the_longest_embeddings_at_each_evaluation(hacked, data, tmp_path):
    project = hacked("longest_embeddings", most=12)
    done = train(project, data, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"longest embeddings: \[(.*)\]", done.stdout)
    assert len(printed) == 2 and all(len(line.split(", ")) == 10 for line in printed)
    assert all(int(token) < VOCAB for token in ", ".join(printed).split(", "))

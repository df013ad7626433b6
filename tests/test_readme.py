"""Every command of the README and docs/, read from there and run on small real things in a copy of the project."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT, VOCAB, metrics_of, run_command, tiny_folder
from train import TrainConfig

README = (ROOT / "README.md").read_text()
DOCS = {path: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
# Said after the README's own words, where the last one wins: a run of seconds.
TINY = "--block_size=32 --batch_size=4 --micro_batch_size=2 --max_steps=2 --warmup_steps=0 --eval_sequences=4"
TINY = shlex.split(TINY + " --eval_interval=0 --device=cpu --dtype=float32 --compile=False")
TORCHRUN = ("nproc_per_node", "local_addr", "rdzv_conf", "max")  # and --max-restarts
OF_TOOLS = ("help", "source", "max_tokens", "tokenizer", "val_fraction", "text", "center", "encoding", "undecodable", "text_key", "processes")
DOCUMENTS = [{"text": f"the number {i} comes before the number {i + 1}.\n" * 9} for i in range(900)]
# Optional packages that a command needs; it is left out, and said so, where one is missing.
NEEDS = {"tools.plot": "matplotlib", "export_hf": "transformers", "import_hf": "transformers", "weights.pt": "transformers"}
NEEDS |= {"lm_eval": "lm_eval", "openwebtext/prepare": "datasets", "fineweb/prepare": "datasets"}


def commands() -> list[str]:
    """All of them, but for the README's section Commands, which gives their forms."""
    text = "\n".join([re.sub(r"\n## Commands\n.*?\n## ", "\n## ", README, flags=re.DOTALL), *DOCS.values()])
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [re.sub(r"\s+#.*", "", line) for line in lines]
    tables = "\n".join(line for line in text.splitlines() if line[:1] == "|")
    in_table = re.findall(r"`((?:pip|python|torchrun) [^`]*(?:\.py|-m )[^`]*)`", tables)
    return [part.strip() for line in words + in_table for part in line.split("&&") if part.strip()]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project without what it has made, with small datasets in the places that the README names."""
    folder = tmp_path_factory.mktemp("project")
    made = shutil.ignore_patterns("out", ".git", ".venv", "*.bin", "meta.json", "__pycache__", ".pytest_cache", "results")
    shutil.copytree(ROOT, folder, ignore=made, dirs_exist_ok=True)
    tiny_folder(folder / "tiny")
    (folder / "documents").mkdir()
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    (folder / "documents/part.jsonl").write_text(lines)
    return folder


def small(words: list[str], project: Path) -> list[str]:
    """A command of the README made small: its own words, then others that overrule sizes and places."""
    on_tiny = [*TINY, f"--data_dir={project / 'tiny'}", f"--vocab_size={VOCAB}", "--n_layer=1", "--n_head=2", "--n_embd=32"]
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = [re.sub(r"--nproc_per_node=\d+", "--nproc_per_node=2", word) for word in programs[words[0]] + words[1:]]
    if "train.py" in words:
        return words + (TINY if {"config/quick.py", "config/chars.py"} & set(words) else on_tiny)
    if "tools.sweep" in words:
        return words + ["--methods=baseline", "--learning_rates=1e-3", *on_tiny]
    if "tools.sample" in words:
        return words + ["--tokens=5"]
    if "pytest" in words:
        return words + ["--collect-only"]
    if "data/text/prepare.py" in words:
        words[words.index("FILES")] = "documents"
        return words + ["--val_fraction=0.2"] + ([] if "--tokenizer=bytes" in words else ["--tokenizer=data/stdlib/vocabulary.tiktoken"])
    if words[1].startswith("data/"):
        if "--from_shards" in words:
            words[words.index("DIR")] = "tiny"
            return words + ["--out=linked"]
        tokenizer = "--tokenizer=data/stdlib/vocabulary.tiktoken"
        return words + ["--source=documents", "--val_fraction=0.2", tokenizer, f"--out=made_{len(list(project.iterdir()))}"]
    return words


def installs(words: list[str]):
    """What a `pip install` names is in the requirements."""
    lines = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-extra.txt").read_text()
    known = {re.split(r"[=\[ ]", line)[0] for line in lines.splitlines()}
    for name in words[2:]:
        if name == "-r":
            assert (ROOT / words[words.index("-r") + 1]).exists()
            break
        if not name.startswith("-") and "://" not in name:
            assert re.split(r"[=\[]", name)[0] in known, f"{name} is in no requirements file"


def run_of_newest(words: list[str], project: Path) -> list[str]:
    """out/RUN, the README's word for any run, is the first one made."""
    runs = sorted((project / "out").glob("*/config.json"), key=os.path.getmtime)
    return [re.sub(r"out/RUN\b", str(runs[0].parent.relative_to(project)), word) if runs else word for word in words]


@pytest.mark.slow  # two dozen processes
def test_every_command_runs(project, tmp_path):
    failed, left_out = [], []
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
    for command in commands():
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            installs(words)
            continue
        if words[0] == "." or words[1:3] == ["-m", "venv"]:
            continue  # the environment that runs this
        missing = [package for part, package in NEEDS.items() if part in command and not importlib.util.find_spec(package)]
        elsewhere = "HOST" in command or words[0] in ("lm_eval", "sbatch")  # tests/test_hosts.py and test_export_hf.py run these
        if missing or elsewhere or "mean_logit_loss" in command:  # the last: below
            left_out.append(command)
            continue
        words = small(run_of_newest(words, project), project)
        done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            failed.append(f"{shlex.join(words)}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    print(f"left out: {left_out}")
    assert not failed, "\n\n".join(failed)


def test_the_example_of_a_remedy_of_ones_own_works(project):
    """The lines of the section on hacking, put where it says, and its command."""
    section = README.split("\n## Change it\n")[1].split("\n## ")[0]
    formula, call = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    oec, model = (project / "oec.py").read_text(), (project / "model.py").read_text()
    (project / "oec.py").write_text(f"{oec}\n\n{formula}")
    hacked = model.replace('oec: Literal["none",', 'oec: Literal["none", "mean_logit_loss",')
    hacked = hacked.replace('        metrics["loss"] = loss\n', f'{call}        metrics["loss"] = loss\n')
    (project / "model.py").write_text(hacked)
    words = [*TINY, f"--data_dir={project / 'tiny'}", f"--vocab_size={VOCAB}", f"--out_dir={project / 'own'}"]
    try:
        done = run_command([*shlex.split(command)[2:], *words], cwd=project, script=project / "train.py")
    finally:
        (project / "oec.py").write_text(oec)
        (project / "model.py").write_text(model)
    assert done.returncode == 0, done.stderr
    last = metrics_of(project / "own")[-1]
    assert last["loss"] == pytest.approx(last["cross_entropy"] + 0.1 * last["logit_mean"] ** 2, abs=0.1)


@pytest.mark.parametrize("path", (ROOT / "README.md", *DOCS), ids=lambda path: path.name)
def test_what_is_named_is_there(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert (path.parent / link).exists(), f"{path.name} links to {link}, which does not exist"
    for name in re.findall(r"\btools\.(\w+)", text):
        assert (ROOT / f"tools/{name}.py").exists(), f"{path.name} names tools.{name}, which does not exist"
    for name in re.findall(r"`(config/\w+\.py|tools/\w+\.\w+|data/[\w/]+\.py|tests/\w+\.py)`", text):
        assert name == "data/NAME/prepare.py" or (ROOT / name).exists(), f"{path.name} names {name}, which does not exist"
    for name in re.findall(r"`--(\w+)", text):
        known = {"setting", *TrainConfig.__dataclass_fields__, *TORCHRUN, *OF_TOOLS}
        assert name in known, f"{path.name} names --{name}, which train.py and the tools do not take"

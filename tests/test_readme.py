"""Every command of the README, read from it and run on small real things in a copy of the project."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model import GPTConfig
from tests.conftest import ROOT, VOCAB, metrics_of, run_command, tiny_folder
from train import TrainConfig

README = (ROOT / "README.md").read_text()
# Said after the README's own words, where the last one wins: a run of seconds.
TINY = "--block_size=32 --batch_size=4 --micro_batch_size=2 --max_steps=2 --warmup_steps=0 --eval_sequences=4"
TINY = shlex.split(TINY + " --eval_interval=0 --device=cpu --dtype=float32 --compile=False")
DOCUMENTS = [{"text": f"the number {i} comes before the number {i + 1}.\n" * 9} for i in range(900)]
# Optional packages that a command needs; it is left out, and said so, where one is missing.
NEEDS = {"tools.plot": "matplotlib", "export_hf": "transformers", "import_hf": "transformers", "weights.pt": "transformers"}
NEEDS |= {"lm_eval": "lm_eval", "openwebtext/prepare": "datasets", "fineweb/prepare": "datasets"}


def commands() -> list[str]:
    """All of them, but for the section Commands, which gives their forms."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [re.sub(r"\s+#.*", "", line) for line in lines]
    tables = "\n".join(line for line in re.sub(r"\n## Commands\n.*?\n## ", "", README, flags=re.DOTALL).splitlines() if line[:1] == "|")
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
        return words + (TINY if "config/quick.py" in words else on_tiny)
    if "tools.sweep" in words:
        return words + ["--methods=baseline", "--learning_rates=1e-3", *on_tiny]
    if "tools.sample" in words:
        return words + ["--tokens=5"]
    if "pytest" in words:
        return words + ["--collect-only"]
    if "data/text/prepare.py" in words:
        words[words.index("FILES")] = "documents"
        return words + ["--val_fraction=0.2", "--tokenizer=data/stdlib/vocabulary.tiktoken"]
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
        if missing or "HOST" in command or words[0] == "lm_eval":  # tests/test_hosts.py and test_export_hf.py run these
            left_out.append(command)
            continue
        words = small(run_of_newest(words, project), project)
        done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            failed.append(f"{shlex.join(words)}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    print(f"left out: {left_out}")
    assert not failed, "\n\n".join(failed)


def settings_table() -> str:
    """The README's table of settings, from the comments beside them in the code."""
    rows = []
    for line in (inspect.getsource(GPTConfig) + inspect.getsource(TrainConfig)).splitlines():
        if setting := re.fullmatch(r"    (\w+): (\w+) = (.*?)  # (.*)", line):
            name, kind, default, says = setting.groups()
            default = default if kind == "str" else default.replace("_", "")
            says = says.replace("*", "\\*").replace("<", "\\<")
            rows.append(f"| `{name}` | `{default}` | {says} |")
        elif title := re.fullmatch(r"    # (.*?)(;.*)?", line):
            rows.append(f"| **{title[1]}** | | |")
    return "\n".join(rows)


def test_the_table_of_settings_is_the_code_s():
    assert settings_table() in README, f"README's table of settings is to be:\n{settings_table()}"


def test_the_example_of_a_remedy_of_ones_own_works(project):
    """The lines of the section Hacking, put where it says."""
    formula, call = re.findall(r"```python\n(.*?)```", README.split("\n## Hacking\n")[1].split("\n## ")[0], re.DOTALL)
    oec, model = (project / "oec.py").read_text(), (project / "model.py").read_text()
    (project / "oec.py").write_text(f"{oec}\n\n{formula}")
    model = model.replace('METHODS = ("none",', 'METHODS = ("norm_loss", "none",')
    (project / "model.py").write_text(model.replace("        return loss, metrics |", f"{call}        return loss, metrics |"))
    words = [*TINY, f"--data_dir={project / 'tiny'}", f"--vocab_size={VOCAB}", "--oec=norm_loss", f"--out_dir={project / 'own'}"]
    try:
        done = run_command(["config/quick.py", *words], cwd=project, script=project / "train.py")
    finally:
        (project / "oec.py").write_text(oec)
        (project / "model.py").write_text(model.replace('("norm_loss", ', "("))
    assert done.returncode == 0, done.stderr
    assert metrics_of(project / "own")[-1]["norm_loss"] > 0


def test_the_readme_names_what_is_there():
    for title in re.findall(r"\]\(#([\w-]+)\)", README):
        assert re.search(rf"^## {title.replace('-', ' ')}$", README, re.MULTILINE | re.IGNORECASE), f"README has no section {title}"
    for path in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / path).exists(), f"README links to {path}, which does not exist"
    for name in re.findall(r"\btools\.(\w+)", README):
        assert (ROOT / f"tools/{name}.py").exists(), f"README names tools.{name}, which does not exist"
    for name in re.findall(r"`(config/\w+\.py|tools/\w+\.\w+|data/[\w/]+\.py|tests/\w+\.py)`", README):
        assert (ROOT / name).exists(), f"README names {name}, which does not exist"

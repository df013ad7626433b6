"""The paper's experiment: one run of train.py for each method, learning rate and seed, and what they add up to.

    python -m tools.sweep config/paper_16m.py --learning_rates 3e-4,1e-3,3e-3,1e-2,3e-2,1e-1,3e-1 --seeds 1 --out out/sweep
    python -m tools.sweep config/paper_16m.py --methods z_loss --z_loss_weights 1e-7,1e-4,1e-1,1e2 --out out/lambda

Config files and --key=value settings are train.py's. The same command resumes a sweep that was stopped. A command with
other methods, weights, rates or seeds, and the same settings otherwise, adds its runs. OUT/sweep.csv has one row per run, OUT/summary.md the
learning-rate sensitivities.
"""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch

from model import METHODS, WEIGHTS
from runtime.checkpoint import write_whole
from runtime.errors import fail, say
from runtime.folder import lock, read_metrics
from runtime.machine import available_cores
from train import TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "method lambda learning_rate seed status test_loss mu_norm mean_embedding_norm logit_mean logit_std logit_absmax "
    "mean_log_z_squared seconds_per_step seconds initial_loss"
).split()
# The option of this tool for each setting that a cell sets.
OPTIONS = {"learning_rate": "learning_rates", "seed": "seeds", "out_dir": "out", "oec": "methods"}
OPTIONS |= {name: f"{name.removeprefix('logit_')}s" for name in WEIGHTS.values()}
# Settings that may differ within one sweep: those that a cell sets, and those that do not change results.
OF_THE_CELL = {*OPTIONS, "resume", "tensorboard", "wandb_project"}


def words_of(method: str) -> list[str]:
    """The settings of a method, as train.py takes them."""
    return [f"--{name}={value}" for name, value in METHODS[method].items()]


def lr_sensitivity(losses, initial_loss: float) -> float:
    """Σ_η (min(ℓ(η), ℓ₀) − ℓ*) / (n − 1) over the n learning rates η of one method, ℓ* the least loss (Wortsman et al.,
    arXiv 2309.14322, as in the paper). A loss that is not finite counts as ℓ₀. ValueError for fewer than two losses."""
    losses = [min(loss, initial_loss) if math.isfinite(loss) else initial_loss for loss in losses]
    if len(losses) < 2:
        raise ValueError("the learning-rate sensitivity needs the losses of at least two learning rates")
    return sum(loss - min(losses) for loss in losses) / (len(losses) - 1)


class Cell:
    """One run of the sweep."""

    def __init__(self, words: list[str], method: str, weight: str, learning_rate: str, seed: str, out: Path):
        self.name = f"{method}{weight}-lr{learning_rate}-seed{seed}"
        self.folder, self.log = out / "runs" / self.name, out / "runs" / f"{self.name}.log"
        words = [*words, *words_of(method), f"--learning_rate={learning_rate}", f"--seed={seed}", f"--out_dir={self.folder}"]
        self.words = words + ([f"--{WEIGHTS[method]}={weight}"] if weight else [])
        self.config = load_config(self.words)
        stated = getattr(self.config, WEIGHTS[method]) if method in WEIGHTS else ""
        self.key = (method, str(stated), str(self.config.learning_rate), str(self.config.seed))

    def start(self, slot: int, jobs: int):
        """On its share of the cores and, if there are GPUs, on one of them."""
        cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
        share = cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] or cores
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *self.words], stdout=log, stderr=log, env=environment,
                cwd=Path.cwd(), preexec_fn=lambda: (os.sched_setaffinity(0, share), os.setpgrp()),
            )  # fmt: skip

    def row(self) -> dict:
        """The cell's line of sweep.csv, once its process has ended."""
        lines = read_metrics(self.folder)
        last = next((x for x in reversed(lines) if x["split"] == "val" and x["step"] == self.config.max_steps), None)
        if self.process.returncode == 0 and last is None:
            fail(f"{self.name} was stopped; run the same command again to resume")
        initial_loss = math.log(self.config.vocab_size)
        status = "done" if self.process.returncode == 0 and last and last["cross_entropy"] is not None else "diverged"
        last = last if status == "done" else lines[-1]
        rates = [x["tokens_per_second"] for x in lines if x["split"] == "train" and x["tokens_per_second"]]
        tokens = self.config.batch_size * self.config.block_size
        values = dict(zip(COLUMNS, self.key)) | {
            "status": status, "test_loss": last["cross_entropy"] if status == "done" else initial_loss,
            "mu_norm": last["mu_norm"], "mean_embedding_norm": last["mean_norm"], "logit_mean": last["logit_mean"],
            "logit_std": last["logit_std"], "logit_absmax": last["logit_absmax"], "mean_log_z_squared": last["z_loss"],
            "seconds_per_step": tokens / statistics.median(rates) if rates else None,
            "seconds": round(time.monotonic() - self.began, 1), "initial_loss": initial_loss,
        }  # fmt: skip
        return {name: "" if values[name] is None else str(values[name]) for name in COLUMNS}


# --- the folder of a sweep -----------------------------------------------------------------------


def open_sweep(out: Path, config: TrainConfig) -> list[dict]:
    """The rows that are there; ends the program where the folder is of another sweep."""
    settings = {name: value for name, value in asdict(config).items() if name not in OF_THE_CELL}
    try:
        path = out / "sweep.json"
        names = {file.name for file in out.iterdir()} if out.exists() else set()
        if names and not names & {".lock", path.name}:  # with a lock, a sweep may have just begun there
            fail(f"{out} is not empty and holds no sweep: choose another --out")
        lock(out, "running a sweep in", "out")
        if not path.exists():
            if {file.name for file in out.iterdir()} - {".lock", f"{path.name}.tmp"}:
                fail(f"{out} is not empty and holds no sweep: choose another --out")
            write_whole(path, json.dumps(settings, indent=1).encode() + b"\n")
        earlier = asdict(TrainConfig()) | json.loads(path.read_text())  # defaults for newer settings
        if changed := [f"{k} was {earlier.get(k)!r}, is {v!r}" for k, v in settings.items() if earlier.get(k) != v]:
            fail(f"{out} holds another sweep: {'; '.join(changed)}; set it back, or choose another --out")
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}; choose another --out")
    except (ValueError, TypeError):
        fail(f"{out}/sweep.json is damaged: restore it, or choose another --out")
    return read_sweep(out / "sweep.csv") if (out / "sweep.csv").exists() else []


def read_sweep(path: Path) -> list[dict]:
    """Rows of a sweep.csv as strings, checked; ends the program on cells that are missing or no numbers."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path} cannot be read: {error}")
    for number, row in enumerate(rows, 2):
        for name in ("method", "learning_rate", "test_loss"):
            if not row.get(name):
                fail(f"{path}, line {number}: {name} is missing")
        for name, value in row.items():
            if name not in ("method", "status", "size", "lambda") and value:
                try:
                    float(value)
                except (ValueError, TypeError):
                    fail(f"{path}, line {number}: {name}={value!r} is not a number")
    return rows


def write_sweep(out: Path, rows: list[dict]):
    rows.sort(key=lambda row: (list(METHODS).index(row["method"]), float(row["lambda"] or 0), float(row["learning_rate"]), float(row["seed"])))
    lines = [",".join(COLUMNS), *(",".join(row[name] for name in COLUMNS) for row in rows)]
    write_whole(out / "sweep.csv", "\n".join(lines).encode() + b"\n")
    write_whole(out / "summary.md", summary(rows).encode())


def sensitivities(rows: list[dict]) -> list[float]:
    """The learning-rate sensitivity of one method's rows, a value for each seed. Where a seed was not run at a learning rate, the
    mean over the other seeds takes its place. Empty for a single learning rate."""
    losses = {}  # learning rate → seed → loss
    for row in rows:
        losses.setdefault(float(row["learning_rate"]), {})[row.get("seed")] = float(row["test_loss"])
    if len(losses) < 2:
        return []
    initial_loss = float(rows[0].get("initial_loss") or math.log(50257))
    mean = {rate: statistics.mean(by_seed.values()) for rate, by_seed in losses.items()}
    seeds = dict.fromkeys(row.get("seed") for row in rows)
    return [lr_sensitivity([by_seed.get(seed, mean[rate]) for rate, by_seed in losses.items()], initial_loss) for seed in seeds]


def summary(rows: list[dict]) -> str:
    """One row per method and λ: best loss, learning-rate sensitivity (median and range over seeds), time per step over baseline."""
    lines = ["| method | λ | learning rates | best loss | at | learning-rate sensitivity | over seeds | diverged | time per step / baseline |", "| --- " * 9 + "|"]
    pace = {}
    for method, weight in dict.fromkeys((row["method"], row["lambda"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["lambda"]) == (method, weight)]
        seconds = [float(row["seconds_per_step"]) for row in mine if row["seconds_per_step"]]
        pace[method] = pace.get(method) or (statistics.median(seconds) if seconds else math.nan)
        losses = {}
        for row in mine:
            losses.setdefault(float(row["learning_rate"]), []).append(float(row["test_loss"]))
        mean = {rate: statistics.mean(values) for rate, values in losses.items()}
        best, lrs = min(mean, key=mean.get), sensitivities(mine)
        spread = f"{min(lrs):.3f}–{max(lrs):.3f}" if len(lrs) > 1 else "—"
        lrs = f"{statistics.median(lrs):.3f}" if lrs else "—"
        n_diverged = sum(row["status"] == "diverged" for row in mine)
        relative = pace[method] / pace.get("baseline", math.nan)
        lines.append(
            f"| {method} | {weight or '—'} | {len(mean)} | {mean[best]:.3f} | {best:g} | {lrs} | {spread} | "
            f"{n_diverged} of {len(mine)} | {f'{relative:.3f}' if math.isfinite(relative) else '—'} |"
        )
    return "\n".join(lines) + "\n"


# --- running -------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    n_gpus = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    return names.split(",")[:n_gpus]


def check_words(words: list[str], config: TrainConfig):
    """Ends the program for a setting of train.py that the sweep sets for each run."""
    default = TrainConfig()
    for name, option in OPTIONS.items():
        is_remedy = name in ("oec", *WEIGHTS.values())
        if any(word.startswith(f"--{name}=") for word in words) or is_remedy and getattr(config, name) != getattr(default, name):
            fail(f"a sweep sets {name} itself: remove {name}={getattr(config, name)} from the settings or config files, and use --{option}")


def run_cells(cells: list[Cell], rows: list[dict], out: Path, jobs: int):
    is_stopped = threading.Event()  # a KeyboardInterrupt can get lost in what Python does while it starts a process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: is_stopped.set())
    waiting, running, began, n_done = list(cells), {}, time.monotonic(), 0
    try:
        while waiting or running:
            for slot in set(range(jobs)) - running.keys():
                if waiting:
                    waiting[0].start(slot, jobs)
                    running[slot] = waiting.pop(0)
            if is_stopped.wait(0.2):
                fail("stopped; run the same command again to resume")
            for slot, cell in list(running.items()):
                if cell.process.poll() is None:
                    continue
                del running[slot]
                if cell.process.returncode not in (0, 3):
                    words = cell.log.read_text().strip().splitlines() or ["no word"]
                    fail(f"{cell.name} ended with {cell.process.returncode}: {words[-1].removeprefix('nanoOEC: ')} ({cell.log})")
                rows.append(cell.row())
                write_sweep(out, rows)
                n_done += 1
                left = (time.monotonic() - began) / n_done * (len(cells) - n_done)
                say(f"{n_done}/{len(cells)} {cell.name}: {rows_word(rows, cell)}, {timedelta(seconds=round(left))} left")
    finally:
        for cell in running.values():  # they save and leave; the same command resumes them
            cell.process.send_signal(signal.SIGTERM)
        for cell in running.values():
            cell.process.wait()


def rows_word(rows: list[dict], cell: Cell) -> str:
    row = next(row for row in rows if tuple(row[name] for name in COLUMNS[:4]) == cell.key)
    counts_as = "counted as " if row["status"] == "diverged" else ""
    return f"{row['status']}, test loss {counts_as}{float(row['test_loss']):.4f}"


def numbers(text: str) -> list[str]:
    words = text.split(",")
    for word in words:
        try:
            good = 0 < float(word) < math.inf
        except ValueError:
            good = False
        if not good:
            fail(f"{word!r} in {text!r} is not a positive number")
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--methods", default="baseline,z_loss,softcap,mu_loss,mu_centering", help=f"of {', '.join(METHODS)} (default: %(default)s)")
    parser.add_argument("--learning_rates", default="3e-4,1e-3,3e-3,1e-2,3e-2,1e-1,3e-1", help="peaks (default: %(default)s)")
    parser.add_argument("--seeds", default="1", help="(default: %(default)s)")
    for method, key in WEIGHTS.items():
        parser.add_argument(f"--{OPTIONS[key]}", dest=key, default="", help=f"weights of {method}, one run each (default: that of its file in config/)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (default: one for each GPU; without a GPU, one)")
    options, words = parser.parse_known_args()
    methods = options.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        fail(f"there is no method {unknown[0]!r} among {', '.join(METHODS)}")
    jobs = options.jobs or max(1, torch.cuda.device_count())
    if not 0 < jobs <= max(available_cores(), torch.cuda.device_count()):
        fail(f"--jobs={jobs} must be between 1 and the number of GPUs or cores")
    if not all(seed.isdecimal() for seed in options.seeds.split(",")):
        fail(f"--seeds={options.seeds} must be whole numbers, like 1,2,3")
    config = load_config(words)
    check_words(words, config)
    weights = {method: numbers(text) if (text := getattr(options, key)) else [""] for method, key in WEIGHTS.items()}
    cells = [
        Cell(words, method, weight, rate, seed, options.out)
        for seed, rate, method in product(options.seeds.split(","), numbers(options.learning_rates), methods)
        for weight in weights.get(method, [""])
    ]
    rows = open_sweep(options.out, config)
    finished = {tuple(row[name] for name in COLUMNS[:4]) for row in rows}
    missing = [cell for cell in {cell.key: cell for cell in cells}.values() if cell.key not in finished]
    say(f"{len(cells) - len(missing)} of {len(cells)} cells are there, {len(missing)} to run, {jobs} at a time")
    run_cells(missing, rows, options.out, jobs)
    say(f"\n{summary(rows)}\n{options.out / 'sweep.csv'}")


if __name__ == "__main__":
    main()

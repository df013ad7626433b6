"""The folder of a run: its lock, whole writes, metrics.jsonl, and the trackers that show the same elsewhere."""

import atexit
import fcntl
import json
import math
import os
import re
import secrets
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import count
from pathlib import Path

from runtime.checkpoint import checkpoint_path, checkpoints, save_checkpoint, write_whole
from runtime.errors import fail, one_line


def run_name(config, methods: dict[str, dict], weights: dict[str, str]) -> str:
    """A run's name: data, size, remedies with weights (METHODS, WEIGHTS), other unusual settings, learning rate, seed."""
    names = []
    for method, settings in methods.items():
        weight = weights.get(method)
        is_on = method != "baseline" and all(getattr(config, name) == value for name, value in settings.items() if name != weight)
        if is_on and (weight is None or getattr(config, weight)):
            names.append(method + (f"{getattr(config, weight):g}" if weight else ""))
    if config.oec != "none" and config.oec not in methods:  # a remedy of your own
        names.append(config.oec)
    others = {"tied": config.tie_weights, "float32_logits": config.logits_dtype == "float32", "gain1": not config.final_norm_gain}
    others |= {config.optimizer: config.optimizer != "adamw", config.schedule: config.schedule != "cosine"}
    method = "+".join(names + [name for name, is_on in others.items() if is_on]) or "baseline"
    data = Path(config.data_dir).resolve().name if config.data_dir else config.dataset
    return f"{data}-{config.n_layer}x{config.n_embd}-{method}-lr{config.learning_rate:g}-seed{config.seed}"


def open_out_dir(out_dir: Path, resume: str) -> str:
    """Makes the run's folder, locks it, removes what a killed process left half-written.

    Returns what to resume from: auto, never or a path. Ends the program rather than touch another's files.
    """
    refuse_others(out_dir)
    lock(out_dir, "training into", "out_dir")
    earlier, is_ours, has_run = refuse_others(out_dir)  # again, since another process may have had the folder until now
    has_checkpoint = bool(checkpoints(out_dir))
    if has_run and is_ours and not has_checkpoint and resume == "auto":
        print(f"{out_dir} has no checkpoint yet: starting from the first step", flush=True)
    if has_checkpoint and not is_ours:
        print(f"{out_dir}/config.json is missing or damaged: writing it again", flush=True)

    # A restart by torchrun, or the same --resume=PATH again, resumes from the run's own newest checkpoint.
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts or resume not in ("auto", "never") and is_ours and earlier.get("resume") == resume:
        resume = "auto" if has_checkpoint or resume == "never" else resume
    if resume == "never" and (has_checkpoint or has_run):
        fail(f"{out_dir} already holds a run: choose another --out_dir for --resume=never, or continue the run with --resume=auto")
    if resume not in ("auto", "never") and (has_checkpoint or has_run and earlier.get("resume") != resume):
        fail(f"{out_dir} holds a run of its own: give --resume={resume} another --out_dir")
    for path in out_dir.glob("*.tmp"):
        if re.fullmatch(r"(ckpt_\d+\.pt|config\.json|metrics\.jsonl|wandb_id)\.tmp", path.name):
            path.unlink()
    return resume


def refuse_others(out_dir: Path) -> tuple[dict | None, bool, bool]:
    """What config.json holds ({} without one, None for one that is not JSON), whether it is a run's, and whether the folder
    holds a run. Ends the program if its config.json or metrics.jsonl is not a run's."""
    try:
        earlier = json.loads((out_dir / "config.json").read_bytes()) if (out_dir / "config.json").exists() else {}
    except OSError as error:
        fail(f"out_dir={out_dir} cannot be read: {error.strerror}; choose another --out_dir")
    except (ValueError, RecursionError):
        earlier = None
    is_ours = isinstance(earlier, dict) and "n_embd" in earlier
    has_run = earlier != {} or (out_dir / "metrics.jsonl").exists()
    if has_run and not is_ours and not checkpoints(out_dir):
        fail(f"{out_dir} holds a config.json or metrics.jsonl that is not a run's: choose another --out_dir")
    return earlier, is_ours, has_run


held_locks = []  # open files: each lock lasts as long as this process


def lock(folder: Path, doing: str, setting: str):
    """Creates `folder` and locks it for this process: two processes would damage each other's files. `setting` is its
    name in messages. Ends the program if another process keeps the lock for 15 seconds; a killed one may take seconds to end. If
    nothing is written into a new folder, it is removed at exit."""
    is_new = not folder.exists()
    for attempt in range(30):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held_locks.append(open(folder / ".lock", "a"))
        except OSError as error:
            fail(f"{setting}={folder} cannot be written: {error.strerror}; choose another --{setting}")
        try:
            fcntl.lockf(held_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(folder / ".lock"), os.fstat(held_locks[-1].fileno())):  # not removed by its last owner
                if is_new:
                    atexit.register(remove_unused, folder)
                return
        except (BlockingIOError, PermissionError, FileNotFoundError):
            time.sleep(0.5)
        except OSError:
            return  # this file system has no locks
    fail(f"another process is {doing} {folder}: wait for it, stop it, or choose another --{setting}")


def remove_unused(folder: Path):
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


class RunFolder:
    """What process 0 writes while it trains. An error of the disk is reported, and training continues, unless the write is a
    `must` or the setting `stop_on_write_error` is on: then the program ends."""

    def __init__(self, path: Path, config, step: int, evaluated_step: int, damaged: dict[Path, str]):
        """The run resumes from `step`, last evaluated at `evaluated_step`; `damaged` are newer checkpoints that cannot be read."""
        self.path, self.config = path, config
        try:
            for checkpoint, problem in damaged.items():
                aside = next(p for n in count() if not (p := Path(f"{checkpoint}.damaged{n or ''}")).exists())
                print(f"{problem}; renamed to {aside.name}", flush=True)
                checkpoint.rename(aside)
            write_whole(path / "config.json", json.dumps(asdict(config), indent=1).encode() + b"\n")
            self.metrics = Metrics(path / "metrics.jsonl", step, evaluated_step)
            self.trackers = open_trackers(config, path, step)
        except OSError as error:
            self.say_problem(error, must=True)

    def write_metrics(self, split: str, step: int, values: dict):
        """One line of metrics.jsonl, and the same to the trackers."""
        try:
            self.metrics.write(split=split, step=step, **values)
            for track in self.trackers:
                track({f"{split}/{name}": value for name, value in values.items()}, step)
        except OSError as error:
            self.say_problem(error, must=False)

    def save(self, state: dict, must: bool) -> bool:
        """Whether a checkpoint of the run's state could be written; `must`: the program ends where it could not."""
        try:
            save_checkpoint(self.path, state)
        except OSError as error:
            self.say_problem(error, must)
            return False
        return True

    def say_problem(self, error: OSError, must: bool):
        problem = f"{self.path} cannot be written ({error.strerror or error}); the checkpoints written before are whole"
        if must or self.config.stop_on_write_error:
            fail(f"{problem}; make room and start again")
        print(f"nanoOEC: {problem}; training continues", file=sys.stderr, flush=True)


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without a line that is incomplete. OSError if there is no such file."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def first_line(trainer) -> str:
    """What a run is, when it starts."""
    config, machine = trainer.config, trainer.machine
    return (
        f"{trainer.model.num_parameters():,} parameters, {len(trainer.train_data) * config.block_size:,} tokens of data, "
        f"{config.batch_size * config.block_size:,} in a step; {machine.world_size} × {machine.device.type}, "
        f"{str(machine.dtype).removeprefix('torch.')}; {trainer.out_dir}" + ("; compiling" if config.compile else "")
    )


def log_line(values: dict, advice: str, seconds_left: float) -> str:
    """A step's metrics for people; `advice` is on what the rounding costs."""
    parts = [f"loss {values['loss']:.4f}"]
    if values["tokens_per_second"]:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if math.isfinite(values["mfu"]):
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"‖μ‖ {values['mu_norm']:.3g} | mean logit {values['logit_mean']:.3g}")
    if values["rounding_nats"] > 0.001:
        parts.append(f"rounding costs {values['rounding_nats']:.3f} nats{advice}")
    if values["bad_steps"]:
        parts.append(f"bad steps: {values['bad_steps']}")
    if values["tokens_per_second"]:
        parts.append(f"{timedelta(seconds=round(seconds_left))} left")
    return " | ".join(parts)


def diverged(trainer, mu_norm: float) -> str:
    """The last line of a diverged run: the metrics of the first step in the row of skipped steps that ended it."""
    first = trainer.first_bad
    values = ", ".join(f"{name} {first[name]:.4g}" for name in ("loss", "grad_norm", "logit_mean", "logit_absmax"))
    return (
        f"diverged: {trainer.bad_in_row} steps in a row had a loss or a gradient that is not finite, and were skipped. The first was step "
        f"{first['step']}: {values}, stored ‖μ‖ {mu_norm:.4g}. {way_back(trainer)}"
    )


def way_back(trainer) -> str:
    """What to do about a run that has diverged."""
    best = checkpoint_path(trainer.out_dir, trainer.best_step)
    begin = f"Continue with --resume={best} --out_dir=ANOTHER" if trainer.best_step else "Start in another --out_dir"
    return f"{begin}, with a lower --learning_rate or a longer --warmup_steps; docs/when_something_fails.md helps to find the cause"


class Metrics:
    """`metrics.jsonl`: one JSON object a line, in the order of steps, without duplicates after a kill."""

    def __init__(self, path: Path, step: int, evaluated_step: int):
        """Keeps the lines up to `step`, and evaluations up to `evaluated_step`: later ones were written after the checkpoint
        that the run resumes from, and will be written again."""
        kept = []
        before = path.read_bytes() if path.exists() else None
        for line in before.splitlines() if before else []:
            try:
                values = json.loads(line)
                kept += [line + b"\n"] if values["step"] <= (evaluated_step if values["split"] == "val" else step) else []
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # cut off by a kill
        if b"".join(kept) != before:
            write_whole(path, b"".join(kept))
        self.file = open(path, "ab", buffering=0)
        self.size, self.pending = self.file.tell(), b""

    def write(self, **values):
        """Raises OSError if the disk refuses. Then the file has no part of the line, and the next call writes it."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.pending += json.dumps(finite).encode() + b"\n"
        try:
            if self.file.write(self.pending) < len(self.pending):
                raise OSError("the disk is full")
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(self.size)
            raise
        self.size, self.pending = self.size + len(self.pending), b""


def open_trackers(config, out_dir: Path, step: int) -> list:
    """One function (values, step) per tracker, which shows the values there. A resumed run continues its own curves."""
    trackers = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out_dir, purge_step=step + 1)  # what it showed beyond the checkpoint is shown again

        def show(values: dict, step: int):
            nonlocal writer
            writer, working = None, writer or SummaryWriter(out_dir)  # a writer that has failed cannot be used again
            for name, value in values.items():
                working.add_scalar(name, value, step)
            working.flush()  # so that a kill does not lose buffered values
            writer = working

        trackers.append(show)
    if config.wandb_project:
        import wandb

        if not (out_dir / "wandb_id").exists():
            write_whole(out_dir / "wandb_id", secrets.token_hex(4).encode())
        settings = {"name": out_dir.resolve().name, "id": (out_dir / "wandb_id").read_text(), "dir": out_dir, "config": asdict(config)}
        try:
            trackers.append(wandb.init(project=config.wandb_project, resume="allow", **settings).log)
        except (wandb.Error, ValueError) as error:
            fail(f"wandb_project={config.wandb_project} cannot be opened: {one_line(error)}; try WANDB_MODE=offline")
    return trackers

"""Train a GPT with Output Embedding Centering, its baselines, or nothing.

    torchrun train.py config/oec.py                                 the main job, one process
    torchrun --nproc_per_node=8 train.py config/oec.py              the same run on eight GPUs
    torchrun train.py config/paper_16m.py config/mu_loss.py --learning_rate=0.03

From top to bottom: configuration, the machine, the run's folder, checkpoints, the parts of a step, the loop.
"""

import difflib
import fcntl
import inspect
import json
import math
import os
import re
import runpy
import secrets
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import oec
from data.shards import Loader, TokenWindows, available_cores, fail, open_dataset, permute, samples_of_process
from model import GPT, GPTConfig, check_model_config

ROOT = Path(__file__).resolve().parent

# --- configuration -------------------------------------------------------------------------------


@dataclass
class TrainConfig(GPTConfig):
    """Every knob. The defaults are the main job: a 124M-class GPT on OpenWebText, batch and schedule as GPT-2's."""

    # data and output
    dataset: str = "openwebtext"  # a folder of data/ that holds *train*.bin and *val*.bin
    data_dir: str = ""  # another folder of shards, anywhere; empty: data/<dataset>
    out_dir: str = ""  # where the run goes; empty: out/<a name made of the settings>
    resume: str = "auto"  # auto: from the newest checkpoint of out_dir; never; or the path of a checkpoint
    init_from: str = ""  # a checkpoint whose weights alone to begin with, where there is nothing to resume; empty: random

    # batch and schedule; a step is one update of the weights
    batch_size: int = 480  # sequences in a step, over all processes
    micro_batch_size: int = 12  # sequences in one forward and backward pass of one process
    max_steps: int = 600_000  # steps of the whole run
    learning_rate: float = 6e-4  # peak
    min_learning_rate: float = 6e-5  # at the end of the cosine
    warmup_steps: int = 2_000  # steps of linear warm-up

    # AdamW
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # of matrices and embeddings; the norms' weights have none
    grad_clip: float = 1.0  # largest gradient norm; 0 is off

    # what is reported and kept
    log_interval: int = 10  # steps between log lines
    eval_interval: int = 1_000  # steps between evaluations; 0: only at the end
    eval_sequences: int = 480  # validation windows of an evaluation, always the same ones
    checkpoint_interval: int = 0  # steps between checkpoints; 0: at every evaluation
    tensorboard: bool = False  # what metrics.jsonl is given, to TensorBoard too: tensorboard --logdir out
    wandb_project: str = ""  # and to this project of Weights & Biases; empty: none

    # the machine
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16 or float16
    compile: bool = True  # torch.compile the model
    deterministic: bool = False  # the same bits on every run on a GPU, somewhat slower; a CPU gives them anyway
    seed: int = 1337  # of the initial weights and of the order of samples

    # faults
    max_bad_steps: int = 20  # steps in a row with a non-finite loss or gradient before the run stops
    stop_on_write_error: bool = False  # stop when a checkpoint or metrics line cannot be written; else go on


# What makes a run that run: with another value it would be another one, so no resuming.
IDENTITY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "tie_weights", "batch_size", "seed")


def load_config(argv: list[str]) -> TrainConfig:
    """`[FILE.py ...] [--key=value ...]`, left to right, the last word wins. A mistake ends the program (exit 2)."""
    if "--help" in argv or "-h" in argv:
        print(__doc__, *map(inspect.getsource, (GPTConfig, TrainConfig)), "Set any of them with --name=value.", sep="\n")
        raise SystemExit(0)
    settings = {}
    for word in argv:
        key, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--") and equals:
            settings[key] = parse(key, text)
        elif word.endswith(".py"):
            settings |= read_config_file(word)
        else:
            fail(f"{word!r:.80} is neither a config file (.py) nor --key=value")
    config = TrainConfig(**settings)
    check_config(config)
    return config


def read_config_file(path: str) -> dict:
    """The assignments of a config file: Python code, and it is run. Modules and _names are its own business."""
    if not os.path.isfile(path):
        fail(f"there is no config file {path}")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        fail(f"config file {path} fails: {one_line(error)}")
    settings = {k: v for k, v in assigned.items() if not str(k).startswith("_") and not isinstance(v, ModuleType)}
    for key, value in settings.items():
        wanted = field_type(key, f" in {path}")
        if type(value) is int and abs(value) >= 2**63:
            fail(f"{key} in {path} is too large a number")
        if wanted is float and type(value) is int:
            settings[key] = float(value)
        elif type(value) is not wanted:
            fail(f"{key} in {path} must be {wanted.__name__}, not {type(value).__name__}")
    return settings


def parse(key: str, text: str):
    wanted = field_type(key)
    try:
        return {"True": True, "False": False}[text] if wanted is bool else wanted(text)
    except (KeyError, ValueError):
        fail(f"--{key}={text!r:.80} must be {'True or False' if wanted is bool else wanted.__name__}")


def field_type(key: str, where: str = "") -> type:
    known = {field.name: field.type for field in fields(TrainConfig)}
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
        fail(f"unknown setting {key!r:.80}{where}: did you mean {nearest}? (--help lists all)")
    return known[key]


def check_config(config: TrainConfig):
    """Ends the program (exit 2) with one line for settings that no run can have."""
    for field in fields(config):
        value = getattr(config, field.name)
        positive = ("batch_size", "micro_batch_size", "max_steps", "log_interval", "eval_sequences", "max_bad_steps")
        least, limit = (1 if field.name in positive else 0), (2**31 if field.type is int else math.inf)
        if field.type in (int, float) and not least <= value < limit:
            fail(f"{field.name}={value} must be a finite number of at least {least}")
        if field.type is str and not value.isprintable():
            fail(f"{field.name}={value!r:.80} holds a character that cannot be printed")
    try:
        check_model_config(config)
    except ValueError as error:
        fail(str(error))
    if config.device not in ("auto", "cpu", "cuda"):
        fail(f"device={config.device!r} is none of auto, cpu, cuda")
    if config.dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"dtype={config.dtype!r} is none of auto, float32, bfloat16, float16")
    if not re.fullmatch(r"\w[\w.-]*", config.dataset):
        fail(f"dataset={config.dataset!r} must be the plain name of a folder of data/; elsewhere: --data_dir=PATH")
    if config.beta1 >= 1 or config.beta2 >= 1 or config.learning_rate == 0 or config.adam_epsilon == 0:
        fail("beta1 and beta2 must be below 1, learning_rate and adam_epsilon above 0")
    if config.min_learning_rate > config.learning_rate:
        fail(f"min_learning_rate={config.min_learning_rate} is above learning_rate={config.learning_rate}")
    if config.warmup_steps >= config.max_steps:
        fail(f"warmup_steps={config.warmup_steps} must be below max_steps={config.max_steps}")
    if config.eval_interval and config.checkpoint_interval % config.eval_interval:
        fail(f"checkpoint_interval={config.checkpoint_interval} must be a multiple of eval_interval={config.eval_interval}")
    for package, is_wanted in {"tensorboard": config.tensorboard, "wandb": config.wandb_project}.items():
        if is_wanted and getattr(find_spec(package), "origin", None) is None:  # a mere folder of that name has none
            fail(f"{package} is not installed: pip install {package}, or leave its setting out")
    together = config.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % together:
        fail(
            f"batch_size={config.batch_size} must be divisible by {together}, micro_batch_size={config.micro_batch_size} "
            f"on each of {together // config.micro_batch_size} processes: change one of the three"
        )


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


# --- the machine ---------------------------------------------------------------------------------

# Dense bfloat16 peak, FLOP/s, from the makers' data sheets; the first name found in the GPU's decides.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


@dataclass
class Machine:
    """This process among its peers, and what it computes with."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    peak_flops: float = math.nan  # FLOP/s of this process's device; nan: unknown

    def say(self, message: str):
        """To standard output; where that is a closed pipe or a full disk, training goes on without it."""
        if self.rank == 0:
            try:
                print(message, flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def from_main(self, make):
        """What `make()` returns on process 0, for all; where it fails there, all end with its exit status."""
        result = status = error = None
        if self.rank == 0:
            try:
                result = make()
            except BaseException as raised:
                error, status = raised, getattr(raised, "code", 1)
        if self.world_size > 1:
            box = [result, status]
            dist.broadcast_object_list(box, src=0)
            result, status = box
        if status is not None:
            raise error or SystemExit(status)
        return result


def start_machine(config: TrainConfig) -> Machine:
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # torchrun sets these
    rank, local_rank, world_size, local_world_size = (int(os.environ.get(*item)) for item in environment.items())
    device, backend, peak_flops = torch.device("cpu"), "gloo", math.nan
    if config.device == "cuda" or config.device == "auto" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            fail(f"PyTorch finds {torch.cuda.device_count()} GPUs here for {local_world_size} processes: use --device=cpu, or fewer")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        peak_flops = next((flops for part, flops in PEAK_FLOPS.items() if part in name), math.nan)
        backend = "cpu:gloo,cuda:nccl"  # gloo, for agreeing on when to stop, does not wait for the GPU
        best_dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    else:
        torch.set_num_threads(max(1, available_cores() // local_world_size))  # torchrun leaves each only one
        if config.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            fail("compile=True needs a C++ compiler: install g++, or use --compile=False")
        if config.compile and not Path(sysconfig.get_path("include"), "Python.h").exists():
            fail("compile=True needs Python's headers: install python3-dev, or use --compile=False")
        # Else PyTorch compiles a program first, to see whether the compiler knows the CPU's vector units: 7 seconds.
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        best_dtype = torch.bfloat16 if has_bfloat16 else torch.float32
        if config.dtype == "bfloat16" and not has_bfloat16:
            multiply_bfloat16_in_float32()
    if config.deterministic or device.type == "cpu":  # compiled code adds up embedding gradients in any order otherwise
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging, and slow
    if world_size > 1:  # the timeout is long since some wait for others' compiling and saving
        store = store_of_this_start(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    dtype = best_dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return Machine(rank, world_size, device, dtype, peak_flops)


@cache  # which keeps the library: PyTorch takes an operator back when it is gone
def multiply_bfloat16_in_float32() -> torch.library.Library:
    """bfloat16 matrix products for a CPU without units for them, on which PyTorch's own take ten times float32's time.

    What the units compute: exact products of bfloat16 numbers, added up in float32, rounded to bfloat16 once.
    """
    library = torch.library.Library("aten", "IMPL")

    def product(a, b):  # addmm, since mm is what is being replaced
        wide = torch.float32 if a.dtype == torch.bfloat16 else a.dtype
        return torch.addmm(a.new_zeros((), dtype=wide), a.to(wide), b.to(wide), beta=0)

    with warnings.catch_warnings(action="ignore"):  # that an operator is replaced
        library.impl("mm", lambda a, b: product(a, b).to(a.dtype), "CPU")
        library.impl("mm.out", lambda a, b, out: out.copy_(product(a, b)), "CPU")
    return library


def store_of_this_start(rank: int, world_size: int) -> dist.Store:
    """Where the processes that torchrun has just started tell each other their addresses.

    torchrun restarts workers on the store they had (pytorch/pytorch#135712): one that reads an address of the start
    before waits for the dead. So each writes a new word, and all wait until all have seen the same words.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    store.set(f"word {rank}", secrets.token_hex(4))
    while True:
        words = b" ".join(store.multi_get([f"word {peer}" for peer in range(world_size)]))
        store.set(f"seen {rank}", words)
        if all(seen == words for seen in store.multi_get([f"seen {peer}" for peer in range(world_size)])):
            return dist.PrefixStore(words.decode(), store)
        time.sleep(0.05)


class StopRequest:
    """SIGTERM or Ctrl-C: finish the step, save, leave with 0. A second Ctrl-C leaves at once.

    A thread watches for them, since Python's own handlers wait while the main thread is inside a long operation.
    """

    def __init__(self, machine: Machine):
        self.machine, self.is_received = machine, False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def _watch(self, signals: int):
        while os.read(signals, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        self.is_received, received_at = True, time.monotonic()
        self.machine.say("\nstopping after this step (Ctrl-C again: at once)")
        # torchrun passes on the Ctrl-C that the terminal has sent already: within half a second it is the same one.
        while os.read(signals, 1)[0] != signal.SIGINT or time.monotonic() - received_at < 0.5:
            pass
        with suppress(OSError):
            os.write(2, b"\nstopped at once; the checkpoints written before are whole\n")
        os._exit(130)

    def agreed(self) -> bool:
        """True on all processes as soon as one has been told to stop, or has lost the torchrun that started it."""
        is_orphan = self.launcher not in (None, os.getppid())
        return bool(self.machine.all_reduce(torch.tensor(int(self.is_received or is_orphan)), dist.ReduceOp.MAX))


# --- the run's folder ----------------------------------------------------------------------------


def run_name(config: TrainConfig) -> str:
    """What tells one run from another: data, size, method with its weights, learning rate, seed."""
    methods = {
        f"mu_loss{config.mu_loss_weight:g}" if config.oec == "mu_loss" else config.oec: config.oec != "none",
        f"z_loss{config.z_loss_weight:g}": config.z_loss_weight,
        f"softcap{config.logit_softcap:g}": config.logit_softcap,
        "tied": config.tie_weights,
    }
    method = "+".join(name for name, is_on in methods.items() if is_on) or "baseline"
    data = Path(config.data_dir).resolve().name if config.data_dir else config.dataset
    return f"{data}-{config.n_layer}x{config.n_embd}-{method}-lr{config.learning_rate:g}-seed{config.seed}"


def open_out_dir(config: TrainConfig) -> tuple[Path, str]:
    """Makes the run's folder, locks it, removes what a killed process left half-written.

    Returns the folder and what to go on from: auto, never or a path. Ends the program rather than touch another's files.
    """
    out_dir = Path(config.out_dir or f"out/{run_name(config)}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock(out_dir)
        earlier = json.loads((out_dir / "config.json").read_bytes()) if (out_dir / "config.json").exists() else {}
    except OSError as error:
        fail(f"out_dir={out_dir} cannot be written: {error.strerror}; choose another --out_dir")
    except (ValueError, RecursionError):
        earlier = None
    is_ours = isinstance(earlier, dict) and "n_embd" in earlier
    has_checkpoint, has_run = bool(checkpoints(out_dir)), earlier != {} or (out_dir / "metrics.jsonl").exists()
    if has_run and not is_ours and not has_checkpoint:
        fail(f"{out_dir} holds a config.json or metrics.jsonl that is no run's: choose another --out_dir")
    if has_checkpoint and not is_ours:
        print(f"{out_dir}/config.json is missing or damaged: it is written anew", flush=True)

    # The same command started again goes on with what it had reached.
    resume, restarts = config.resume, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts or resume not in ("auto", "never") and is_ours and earlier.get("resume") == resume:
        resume = "auto" if has_checkpoint or resume == "never" else resume
    if resume == "never" and (has_checkpoint or has_run):
        fail(f"{out_dir} holds a run and resume=never: choose another --out_dir, or go on with --resume=auto")
    if resume not in ("auto", "never") and has_checkpoint:
        fail(f"{out_dir} holds checkpoints of its own: give --resume={resume} another --out_dir")
    for path in out_dir.glob("*.tmp"):
        if re.fullmatch(r"(ckpt_\d+\.pt|config\.json|metrics\.jsonl|wandb_id)\.tmp", path.name):
            path.unlink()
    return out_dir, resume


held_locks = []  # open files: each lock lasts as long as this process


def lock(out_dir: Path):
    """Two processes writing one run would lose both; a killed one's may take some seconds to be gone."""
    held_locks.append(open(out_dir / ".lock", "w"))
    for attempt in range(30):
        try:
            return fcntl.lockf(held_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.5)
        except OSError:
            return  # this file system has no locks
    fail(f"another process is training into {out_dir}: stop it, or choose another --out_dir")


def write_whole(path: Path, content):
    """Writes a file completely or not at all: `content` is bytes, or a function that writes into an open file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides the disk's word behind one of its own
            raise error.__context__ from None
        raise


class Metrics:
    """`metrics.jsonl`: one JSON object a line, in the order of steps, none twice whatever was killed when."""

    def __init__(self, path: Path, step: int):
        """Keeps the lines up to `step`: later ones were written after the checkpoint that the run goes on from."""
        kept = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                kept += [line + b"\n"] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # cut off by a kill
        write_whole(path, b"".join(kept))
        self.file = open(path, "ab", buffering=0)
        self.size, self.pending = self.file.tell(), b""

    def write(self, **values):
        """Raises OSError where the disk refuses; the line then waits for the next call, and no part of it stays."""
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


def open_trackers(config: TrainConfig, out_dir: Path, step: int) -> list:
    """Functions of (values, step) that show them elsewhere, on the curves of the process that the run goes on from."""
    trackers = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out_dir, purge_step=step + 1)  # what it showed beyond the checkpoint is shown again

        def show(values: dict, step: int):
            nonlocal writer
            writer, working = None, writer or SummaryWriter(out_dir)  # one that the disk refused takes nothing more
            for name, value in values.items():
                working.add_scalar(name, value, step)
            working.flush()  # or a kill would take what waits
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
            fail(f"wandb_project={config.wandb_project} cannot be opened: {one_line(error)} (or WANDB_MODE=offline)")
    return trackers


# --- checkpoints ---------------------------------------------------------------------------------

CHECKPOINT_PARTS = {
    "model": dict, "optimizer": dict, "scaler": dict, "config": dict, "data": dict, "random_state": torch.Tensor,
    "bad_steps": int, "step": int, "best_loss": float, "best_step": int,
}  # fmt: skip


def checkpoint_path(out_dir: Path, step: int) -> Path:
    return out_dir / f"ckpt_{step:07d}.pt"


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Other names are the user's own files."""
    return sorted((p for p in out_dir.glob("ckpt_*.pt") if p.stem[5:].isdecimal()), key=lambda p: int(p.stem[5:]))


def save_checkpoint(out_dir: Path, state: dict):
    """Writes `ckpt_NNNNNNN.pt`, then removes all but the last two and the best."""
    write_whole(checkpoint_path(out_dir, state["step"]), lambda file: torch.save(state, file))
    for path in checkpoints(out_dir)[:-2]:
        if path != checkpoint_path(out_dir, state["best_step"]):
            path.unlink()


def read_checkpoint(path: Path) -> dict:
    """A whole checkpoint, on the CPU; ValueError, one line, for anything else. Nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if wrong := [name for name, kind in CHECKPOINT_PARTS.items() if not isinstance(state.get(name), kind)]:
            raise ValueError(f"it lacks a proper {', '.join(wrong)}")
        if state["step"] < 0 or path in checkpoints(path.parent) and int(path.stem[5:]) != state["step"]:
            raise ValueError(f"it holds step {state['step']}")
        return state
    except Exception as error:  # whatever a damaged file can cause
        raise ValueError(f"{path} is no whole checkpoint: {one_line(error)}") from None


def find_checkpoint(out_dir: Path, resume: str) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint to go on from, None to begin; and what is wrong with the newer ones."""
    damaged = {}
    for path in {"auto": checkpoints(out_dir)[::-1], "never": []}.get(resume, [Path(resume)]):
        try:
            read_checkpoint(path)
            return path, damaged
        except ValueError as error:
            damaged[path] = str(error)
    if damaged:
        fail(f"nothing to go on from: {'; '.join(damaged.values())}; restore one, or begin in another --out_dir")
    return None, {}


def check_same_run(path: Path, state: dict, config: TrainConfig, data: dict, machine: Machine):
    """Ends the program where the checkpoint is of another run; says which lesser settings have changed."""
    now, then = asdict(config), state["config"]
    changed = {key: f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]}
    other = [changed[key] for key in IDENTITY if key in changed]
    other += [f"the {split} data has changed" for split in data if state["data"].get(split) != data[split]]
    if other:
        fail(f"{path} is of another run: {'; '.join(other)}; set it back, or choose another --out_dir")
    if lesser := [text for key, text in changed.items() if key not in ("resume", "out_dir", "data_dir")]:
        machine.say(f"changed since {path.name}: {'; '.join(lesser)}")


# --- the parts of a step -------------------------------------------------------------------------


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW in two groups: matrices and embeddings decay, the norms' weights do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.adam_epsilon, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update after `step` others: linear warm-up to the peak, cosine down to the minimum at the last."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)


def average(passes: list[tuple[float, dict]], machine: Machine) -> dict[str, torch.Tensor]:
    """(weight, metrics) of many forward passes on many processes, to what one pass over all tokens would give:
    means, but the largest `logit_absmax`, and `logit_std` from the second moments. Stays on the device."""
    rows = []
    for weight, metrics in passes:
        values = {name: value.double() for name, value in metrics.items()}
        values["logit_std"] = values["logit_std"] ** 2 + values["logit_mean"] ** 2
        rows.append(weight * torch.stack([*values.values(), torch.ones_like(values["loss"])]))
    total = machine.all_reduce(torch.stack(rows).sum(dim=0))
    mean = dict(zip(values, (total[:-1] / total[-1]).unbind()))
    mean["logit_std"] = (mean["logit_std"] - mean["logit_mean"] ** 2).clamp(min=0).sqrt()
    largest = torch.stack([metrics["logit_absmax"] for _, metrics in passes]).max()
    return mean | {"logit_absmax": machine.all_reduce(largest, dist.ReduceOp.MAX)}


def evaluate(model, val: TokenWindows, config: TrainConfig, machine: Machine) -> dict[str, float]:
    """Means over the same windows each time; the processes share out the batches.

    Compiled, gradients stay enabled: without them it is another graph, and compiling that takes longer than idle gradients.
    """
    windows = permute(np.arange(min(config.eval_sequences, len(val))), len(val), key=0)
    batches = [windows[at : at + config.micro_batch_size] for at in range(0, len(windows), config.micro_batch_size)]
    mine = [(len(batch), batch) for batch in batches[machine.rank :: machine.world_size]]
    passes = []
    for weight, batch in mine or [(0, batches[0])]:
        tokens = torch.from_numpy(val.read(np.resize(batch, config.micro_batch_size))).to(machine.device)
        targets = tokens.clone()[:, 1:]  # strides as in training, or it would be compiled anew
        targets[len(batch) :] = -1  # a short last batch keeps its shape, so nothing is compiled for it
        with torch.set_grad_enabled(config.compile), machine.autocast():
            passes.append((weight, model(tokens[:, :-1], targets)[1]))
    return {name: value.item() for name, value in average(passes, machine).items()}


@torch.no_grad()
def mu_metrics(model: GPT) -> dict[str, float]:
    """Of the embeddings that the logits come from ‖μ‖, its ratio to mean ‖e_i‖, and that mean; and ‖μ‖ as stored."""
    V, W = model.config.vocab_size, model.output_embedding()
    mu_norm = oec.mean_embedding(W, V).norm()
    mean_norm = W[:V].norm(dim=1).mean()
    values = mu_norm, mu_norm / mean_norm, mean_norm, oec.mean_embedding(model.unembedding.weight, V).norm()
    return dict(zip(("mu_norm", "mu_ratio", "mean_norm", "stored_mu_norm"), torch.stack(values).tolist()))


# --- the loop ------------------------------------------------------------------------------------


class Trainer:
    """The state of a run: `Trainer(config, machine).run()` is all of it, `update` is one step."""

    def __init__(self, config: TrainConfig, machine: Machine):
        self.config, self.machine, self.stop = config, machine, StopRequest(machine)
        if config.dataset == "stdlib" and not config.data_dir:
            machine.from_main(prepare_stdlib)
        folder = Path(config.data_dir) if config.data_dir else ROOT / "data" / config.dataset
        self.train_data, self.val_data = open_dataset(folder, config.block_size, config.vocab_size)
        self.fingerprint = {"train": self.train_data.fingerprint(), "val": self.val_data.fingerprint()}
        self.out_dir, resume = machine.from_main(lambda: open_out_dir(config))

        torch.manual_seed(config.seed)
        self.model = GPT(config).to(machine.device)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        # Steps with a non-finite loss or gradient, counted on the device: all of them, and those in a row up to now.
        self.bad_total, self.bad_in_row = torch.zeros(2, dtype=torch.int64, device=machine.device)
        self.bad_longest = self.bad_in_row
        self.first_bad = {}  # the metrics of the first of the latest row
        path, damaged = machine.from_main(lambda: find_checkpoint(self.out_dir, resume))
        if path:
            self.restore(path)
        elif config.init_from:
            self.load_weights(Path(config.init_from))
        self.on_disk(lambda: self.open_files(damaged), must=True)
        self.compiled = torch.compile(self.model) if config.compile else self.model
        self.parallel = self.compiled
        if machine.world_size > 1:
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # PyTorch 2.11 has no other name for it
            self.parallel = DistributedDataParallel(self.compiled, broadcast_buffers=False)

    def open_files(self, damaged: dict[Path, str]):
        for path, problem in damaged.items():
            aside = next(p for n in count() if not (p := Path(f"{path}.damaged{n or ''}")).exists())
            self.machine.say(f"{problem}; renamed to {aside.name}")
            path.rename(aside)
        write_whole(self.out_dir / "config.json", json.dumps(asdict(self.config), indent=1).encode() + b"\n")
        self.metrics = Metrics(self.out_dir / "metrics.jsonl", self.step)
        self.trackers = open_trackers(self.config, self.out_dir, self.step)

    def load_weights(self, path: Path):
        try:
            state, names = read_checkpoint(path), ("vocab_size", "n_layer", "n_head", "n_embd", "tie_weights")
            pairs = [(name, state["config"].get(name), getattr(self.config, name)) for name in names]
            if other := [f"{name}={its}, here {ours}" for name, its, ours in pairs if its != ours]:
                raise ValueError(f"it has {'; '.join(other)}")
            self.model.load_state_dict(state["model"])
        except Exception as error:  # whatever a damaged or foreign file can cause
            fail(f"init_from={path} cannot be begun with: {one_line(error)}")
        self.machine.say(f"beginning with the weights of {path}")

    def restore(self, path: Path):
        try:
            state = read_checkpoint(path)
            check_same_run(path, state, self.config, self.fingerprint, self.machine)
            self.model.load_state_dict(state["model"])
            # The moments come from the checkpoint, the settings from the config.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
            for parameter in self.model.parameters():
                moments = self.optimizer.state[parameter]
                if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape:
                    raise ValueError("the optimizer's moments have not the parameters' shapes")
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.bad_total.fill_(state["bad_steps"])
            torch.set_rng_state(state["random_state"])
        except Exception as error:  # whatever a damaged or foreign file can cause
            fail(f"{path} cannot be gone on from: {one_line(error)}")
        self.step, self.best_loss, self.best_step = state["step"], state["best_loss"], state["best_step"]
        self.machine.say(f"going on from {path} at step {self.step}")

    def save(self, must: bool = False):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.config),
            "data": self.fingerprint,
            "random_state": torch.get_rng_state(),
            "bad_steps": self.bad_total.item(),
            "step": self.step,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
        }
        self.on_disk(lambda: save_checkpoint(self.out_dir, state), must)

    def on_disk(self, write, must: bool = False):
        """`write()` on process 0. A full disk, a folder gone read-only: say so, then go on, or stop where it must be
        or the setting says so."""

        def guarded():
            try:
                write()
            except OSError as error:
                problem = f"{self.out_dir} cannot be written ({error.strerror or error}); the checkpoints written before are whole"
                if must or self.config.stop_on_write_error:
                    fail(f"{problem}; make room and start again")
                print(f"nanoOEC: {problem}; going on", file=sys.stderr, flush=True)

        self.machine.from_main(guarded)

    def update(self, batches) -> dict[str, torch.Tensor]:
        """One step: this process's share of the batch forward and backward, then AdamW. Nothing here waits for the
        device: a loss or gradient that is not finite is noticed there, and the update left out there."""
        config, machine = self.config, self.machine
        rate = learning_rate(config, self.step)
        n_passes = config.batch_size // (config.micro_batch_size * machine.world_size)
        passes = []
        for i in range(n_passes):
            tokens, targets = next(batches)
            # Gradients are averaged over the processes once a step, during the last backward pass.
            accumulates = machine.world_size > 1 and i < n_passes - 1
            with self.parallel.no_sync() if accumulates else nullcontext():
                with machine.autocast():
                    loss, metrics = self.parallel(tokens, targets)
                self.scaler.scale(loss / n_passes).backward()
            passes.append((1, metrics))
        metrics = average(passes, machine)

        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        is_bad = ~(metrics["loss"].isfinite() & grad_norm.isfinite())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = is_bad.float()  # fused AdamW leaves everything as it was where this is 1
        self.optimizer.step()
        self.scaler.update()
        self.model.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        metrics["grad_norm"] = grad_norm.double()
        self.count_bad(is_bad, metrics)
        return metrics

    def count_bad(self, is_bad: torch.Tensor, metrics: dict[str, torch.Tensor]):
        first = is_bad & (self.bad_in_row == 0)
        seen = metrics | {"step": torch.full_like(metrics["loss"], self.step)}
        self.first_bad = {k: torch.where(first, v, self.first_bad.get(k, v)) for k, v in seen.items()}
        self.bad_total = self.bad_total + is_bad
        self.bad_in_row = torch.where(is_bad, self.bad_in_row + 1, 0)
        self.bad_longest = torch.maximum(self.bad_longest, self.bad_in_row)

    def log(self, metrics: dict[str, torch.Tensor], tokens_per_second: float, seconds_left: float):
        """A line for people and one for metrics.jsonl, of this step alone; then the check for divergence."""
        config, machine = self.config, self.machine
        values = {name: value.item() for name, value in metrics.items()} | mu_metrics(self.model)
        values["lr"] = learning_rate(config, self.step - 1)
        values["bad_steps"] = self.bad_total.item()
        values["tokens_per_second"] = tokens_per_second
        values["mfu"] = tokens_per_second * self.model.flops_per_token() / (machine.peak_flops * machine.world_size)
        self.write_metrics("train", values)
        machine.say(
            f"step {self.step}/{config.max_steps} | loss {values['loss']:.4f}"
            + (f" | {tokens_per_second:,.0f} tokens/s" if tokens_per_second else "")
            + (f" | MFU {values['mfu']:.1%}" if math.isfinite(values["mfu"]) else "")
            + f" | ‖μ‖ {values['mu_norm']:.3g} | mean logit {values['logit_mean']:.3g}"
            + (f" | {values['bad_steps']} bad steps" if values["bad_steps"] else "")
            + (f" | {timedelta(seconds=round(seconds_left))} left" if tokens_per_second else "")
        )
        if self.bad_longest.item() >= config.max_bad_steps:
            first = {name: value.item() for name, value in self.first_bad.items()}
            bad = next((name for name in ("logit_absmax", "loss") if not math.isfinite(first[name])), "grad_norm")
            state = ", ".join(f"{name} {first[name]:.4g}" for name in ("loss", "grad_norm", "logit_mean", "logit_absmax"))
            rate = learning_rate(config, int(first["step"]) - 1)
            machine.say(
                f"diverged: {config.max_bad_steps} steps in a row had no finite loss and gradient and were left out. "
                f"{bad} went bad first, at step {first['step']:.0f}: {state}, lr {rate:.4g}, ‖μ‖ {values['stored_mu_norm']:.4g}. "
                f"Go on from the last checkpoint with a lower learning rate, or use config/oec.py"
            )
            raise SystemExit(3)

    def write_metrics(self, split: str, values: dict):
        tokens = self.step * self.config.batch_size * self.config.block_size
        values = {"tokens": tokens, **values}

        def write():
            self.metrics.write(split=split, step=self.step, **values)
            for track in self.trackers:
                track({f"{split}/{name}": value for name, value in values.items()}, self.step)

        self.on_disk(write)

    def evaluate(self, may_be_best: bool):
        values = evaluate(self.compiled, self.val_data, self.config, self.machine) | mu_metrics(self.model)
        if may_be_best and values["cross_entropy"] < self.best_loss:
            self.best_loss, self.best_step = values["cross_entropy"], self.step
        self.write_metrics("val", values)
        self.machine.say(f"step {self.step}/{self.config.max_steps} | validation loss {values['cross_entropy']:.4f}")

    def run(self):
        config, machine = self.config, self.machine
        if self.step >= config.max_steps:
            return machine.say(f"{self.out_dir} has its {config.max_steps} steps already: nothing to do")
        machine.say(
            f"{self.model.num_parameters():,} parameters, {len(self.train_data) * config.block_size:,} tokens of data, "
            f"{config.batch_size * config.block_size:,} in a step; {machine.world_size} × {machine.device.type}, "
            f"{str(machine.dtype).removeprefix('torch.')}; {self.out_dir}" + ("; compiling" if config.compile else "")
        )
        samples = samples_of_process(self.step, config.max_steps, config.batch_size, config.micro_batch_size, machine.rank, machine.world_size)
        loader = Loader(self.train_data, samples, config.seed, machine.device)
        batches = iter(loader)
        first_step, is_stopping = self.step, False
        while self.step < config.max_steps and not is_stopping:
            metrics = self.update(batches)
            is_stopping = self.stop.agreed()
            is_last = self.step == config.max_steps
            is_eval = is_last or config.eval_interval and self.step % config.eval_interval == 0
            save_interval = config.checkpoint_interval or config.eval_interval
            is_save = is_last or save_interval and self.step % save_interval == 0
            if self.step == first_step + 1:  # compiles, and tells nothing of the speed
                metrics["loss"].item()
                began = logged_at = time.monotonic()
                logged_step = self.step
            if is_last or self.step % config.log_interval == 0 or self.step == 1:
                metrics["loss"].item()  # waits for the device, so that the clock is right
                now = time.monotonic()
                tokens = (self.step - logged_step) * config.batch_size * config.block_size
                pace = (now - began) / max(1, self.step - first_step - 1)
                self.log(metrics, tokens / (now - logged_at), (config.max_steps - self.step) * pace)
                logged_step, logged_at = self.step, time.monotonic()
            if is_eval or is_save or is_stopping:
                metrics["loss"].item()
                paused_at = time.monotonic()
                if is_eval:
                    self.evaluate(may_be_best=is_save)
                if is_save or is_stopping:
                    self.save(must=is_last or is_stopping)
                logged_at += time.monotonic() - paused_at  # not the speed of training
        loader.close()
        machine.say(f"{'stopped' if is_stopping and not is_last else 'done'} at step {self.step}: {self.out_dir}")


def prepare_stdlib():
    if not (ROOT / "data/stdlib/meta.json").exists():
        from data.stdlib.prepare import main as prepare

        print("preparing the built-in dataset", flush=True)
        prepare()


def remove_unfinished(problem: str) -> bool:
    """Deletes what a machine that died while compiling left in PyTorch's cache, where it would stop every later run."""
    named = re.search(r"(/\S+)/\w\w/\w+(\.main)?\.(so: file too short|so: invalid ELF header|so: file truncated|cpp)", problem)
    libraries = Path(named[1]).rglob("*.so") if named else []
    unfinished = [path for path in libraries if path.stat().st_size == 0 or f"{path}: " in problem]
    for path in unfinished:
        path.unlink(missing_ok=True)
    return bool(unfinished)


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # μ, on a terminal that has none
    config = load_config(sys.argv[1:])
    machine = start_machine(config)
    try:
        Trainer(config, machine).run()
    except (RuntimeError, MemoryError) as error:
        if remove_unfinished(str(error)):
            fail("PyTorch's compile cache held files that a kill had left unfinished; they are deleted: start again")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        fail(f"the memory is full: lower --micro_batch_size or the model's size. {one_line(error)}")
    if machine.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Train a GPT with Output Embedding Centering, its baselines, or nothing.

    torchrun train.py config/oec.py                                   one process
    torchrun --nproc_per_node=8 train.py config/oec.py                eight GPUs, the same run
    torchrun train.py config/paper_16m.py config/mu_loss.py --learning_rate=0.03
    python train.py --help                                            every knob

From top to bottom: configuration, the machine, the run's folder, checkpoints, the parts of a step, the loop.
"""

import difflib
import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import sysconfig
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import oec
from data.shards import Loader, TokenWindows, fail, permute, read_meta
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

    # the machine
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16 or float16
    compile: bool = True  # torch.compile the model
    deterministic: bool = False  # the same bits on every run on a GPU, somewhat slower; a CPU gives them anyway
    seed: int = 1337  # of the initial weights and of the order of samples

    # faults
    max_bad_steps: int = 20  # steps in a row with a non-finite loss or gradient before the run stops
    stop_on_write_error: bool = False  # stop when a checkpoint or metrics line cannot be written; else go on


# What a run is: resuming with another value would be another run.
IDENTITY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "tie_weights", "batch_size", "seed")


def load_config(argv: list[str]) -> TrainConfig:
    """`[FILE.py ...] [--key=value ...]`, left to right, the last word wins. A mistake ends the program (exit 2)."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    settings = {}
    for word in argv:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if not equals:
                fail(f"{word}: write --key=value")
            settings[key] = parse(key, text)
        elif word.endswith(".py"):
            settings |= read_config_file(word)
        else:
            fail(f"{word!r} is neither a config file (.py) nor --key=value")
    config = TrainConfig(**settings)
    check_config(config)
    return config


def read_config_file(path: str) -> dict:
    """The assignments of a config file: Python code that is run. Modules and _names are its own business."""
    if not Path(path).is_file():
        fail(f"there is no config file {path}")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        fail(f"{path} fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
    settings = {k: v for k, v in assigned.items() if not k.startswith("_") and not isinstance(v, ModuleType)}
    for key, value in settings.items():
        wanted = field_type(key, where=f" in {path}")
        if wanted is float and type(value) is int:
            settings[key] = value = float(value) if abs(value) < 2**63 else math.inf
        if type(value) is not wanted:
            fail(f"{key} in {path} must be {wanted.__name__}, not {type(value).__name__} {value!r:.80}")
    return settings


def field_type(key: str, where: str = "") -> type:
    known = {field.name: field.type for field in fields(TrainConfig)}
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
        fail(f"unknown setting {key!r:.80}{where}: did you mean {nearest[0]!r}? (--help lists all)")
    return known[key]


def parse(key: str, text: str):
    wanted = field_type(key)
    try:
        return {"True": True, "False": False}[text] if wanted is bool else wanted(text)
    except (KeyError, ValueError):
        fail(f"--{key}={text:.80} must be {'True or False' if wanted is bool else wanted.__name__}")


def check_config(config: TrainConfig):
    """Ends the program (exit 2) with one line for settings that no run can have."""
    try:
        check_model_config(config)
    except ValueError as error:
        fail(str(error))
    least = dict.fromkeys(("batch_size", "micro_batch_size", "max_steps", "log_interval", "eval_sequences", "max_bad_steps"), 1)
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if field.type in (int, float) and not least.get(field.name, 0) <= value < 2**63:
            fail(f"{field.name}={value} must be a finite number of at least {least.get(field.name, 0)}")
        if field.type is str and "\0" in value:
            fail(f"{field.name} holds a zero byte")
    for name, choices in {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16", "float16")}.items():
        if getattr(config, name) not in choices:
            fail(f"{name}={getattr(config, name)!r} is none of {', '.join(choices)}")
    if not re.fullmatch(r"\w[\w.-]*", config.dataset):
        fail(f"dataset={config.dataset!r} must be the plain name of a folder of data/; for one elsewhere use --data_dir=PATH")
    if config.beta1 >= 1 or config.beta2 >= 1 or config.learning_rate == 0 or config.adam_epsilon == 0:
        fail("beta1 and beta2 must be below 1, learning_rate and adam_epsilon above 0")
    if config.min_learning_rate > config.learning_rate:
        fail(f"min_learning_rate={config.min_learning_rate} is above learning_rate={config.learning_rate}")
    if config.warmup_steps >= config.max_steps:
        fail(f"warmup_steps={config.warmup_steps} must be below max_steps={config.max_steps}")
    if config.eval_interval and config.checkpoint_interval % config.eval_interval:
        fail(f"checkpoint_interval={config.checkpoint_interval} must be a multiple of eval_interval={config.eval_interval}")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (config.micro_batch_size * world_size):
        fail(
            f"batch_size={config.batch_size} must be divisible by micro_batch_size={config.micro_batch_size} "
            f"times {world_size} process{'es' if world_size > 1 else ''}: change one of them"
        )


def help_text() -> str:
    lines = [__doc__.rsplit("\n\n", 1)[0], "", "settings, --key=value, with their defaults:"]
    for cls in (GPTConfig, TrainConfig):
        for line in inspect.getsource(cls).splitlines():
            if knob := re.match(r"    (\w+): \w+ = (.*?)  # (.*)", line):
                lines.append(f"  --{knob[1]}={knob[2]}".ljust(36) + knob[3])
            elif heading := re.match(r"    # (.*)", line):
                lines.append(f"\n {heading[1]}")
    return "\n".join(lines)


# --- the machine ---------------------------------------------------------------------------------

# Dense bfloat16 peak, FLOP/s, from the makers' data sheets; the first name found in the device's decides.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass
class Machine:
    """This process among its peers, and what it computes with."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    peak_flops: float  # of this process's device; nan where unknown

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, message: str):
        if self.is_main:
            print(message, flush=True)

    def autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if enabled else nullcontext()

    def all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def from_main(self, make):
        """What `make()` returns on the main process, for all; where it ends the program there, all end."""
        if self.world_size == 1:
            return make()
        box = [make()] if self.is_main else [None]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def start_machine(config: TrainConfig) -> Machine:
    rank, local_rank, world_size, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    has_gpu = torch.cuda.is_available()
    device_type = ("cuda" if has_gpu else "cpu") if config.device == "auto" else config.device
    if device_type == "cuda" and not has_gpu:
        fail("device=cuda, but PyTorch finds no GPU here: use --device=cpu, or install a CUDA build of PyTorch")
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        fail(f"{local_world_size} processes but {torch.cuda.device_count()} GPUs on this machine: lower --nproc_per_node")
    if device_type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))  # torchrun would leave each process one
        if config.compile:
            check_compiler()
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = "CPU"
    if device_type == "cuda":
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    if world_size > 1:
        # The processes agree on stopping over gloo, which does not wait for the GPU.
        dist.init_process_group("gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl")
    peak_flops = next((flops for part, flops in PEAK_FLOPS.items() if part in name), math.nan)
    return Machine(rank, world_size, device, choose_dtype(config.dtype, device_type), peak_flops)


def choose_dtype(name: str, device_type: str) -> torch.dtype:
    """auto: bfloat16 where the machine multiplies it natively; else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return getattr(torch, name)
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def check_compiler():
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        fail("compile=True needs a C++ compiler and there is none: install g++, or use --compile=False")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail("compile=True needs Python's headers: install python3-dev, or use --compile=False")


class StopRequest:
    """SIGTERM or Ctrl-C: finish the step, save, leave with 0. A second Ctrl-C leaves at once."""

    def __init__(self, machine: Machine):
        self.machine, self.first = machine, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, _):
        # torchrun passes Ctrl-C on to processes that the terminal has told already: within a second it is the same one.
        if number == signal.SIGINT and self.first is not None and time.monotonic() - self.first > 1:
            os.write(2, b"\nnanoOEC: stopped at once; the newest checkpoint is whole\n")
            os._exit(130)
        if self.first is None:
            self.first = time.monotonic()
            self.machine.say("\nstopping after this step (Ctrl-C again: at once)")

    def agreed(self) -> bool:
        """True on all processes as soon as one has been told to stop."""
        return bool(self.machine.all_reduce(torch.tensor(int(self.first is not None)), dist.ReduceOp.MAX))


# --- the run's folder: config.json, metrics.jsonl ------------------------------------------------


def default_out_dir(config: TrainConfig) -> str:
    parts = {config.oec: config.oec != "none", "z_loss": config.z_loss_weight, "softcap": config.logit_softcap, "tied": config.tie_weights}
    method = "+".join(part for part, is_on in parts.items() if is_on) or "baseline"
    size = f"{config.n_layer}x{config.n_embd}"
    return f"out/{config.dataset}-{size}-{method}-lr{config.learning_rate:g}-seed{config.seed}"


def open_out_dir(config: TrainConfig) -> Path:
    """Makes `out_dir`, shows that it can be written, and removes what a killed process left half-written."""
    out_dir = Path(config.out_dir or default_out_dir(config))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path in out_dir.glob("*.tmp"):
            path.unlink()
        write_whole(out_dir / "probe", b"")
        (out_dir / "probe").unlink()
    except OSError as error:
        fail(f"out_dir={out_dir} cannot be written: {error.strerror or error}")
    has_run = list(out_dir.glob("ckpt_*.pt")) or (out_dir / "metrics.jsonl").exists()
    if config.resume == "never" and has_run:
        fail(f"{out_dir} holds a run already and resume=never: choose another --out_dir, or --resume=auto to go on with it")
    if config.resume not in ("auto", "never") and list(out_dir.glob("ckpt_*.pt")):
        fail(f"{out_dir} holds checkpoints already: give --resume={config.resume} an --out_dir of its own")
    return out_dir


def write_whole(path: Path, content):
    """Writes a file completely or not at all: bytes, or a function that writes into an open file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Metrics:
    """`metrics.jsonl`: one JSON object a line, in the order of steps, none twice whatever was killed when."""

    def __init__(self, path: Path, step: int):
        """Keeps the lines up to `step`; what follows was written after the checkpoint the run goes on from."""
        kept = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                pass  # cut off by a kill
        write_whole(path, b"".join(kept))
        self.file = open(path, "ab", buffering=0)
        self.whole_bytes = self.file.tell()
        self.pending = b""  # lines that could not be written yet

    def write(self, **values):
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.pending += json.dumps(finite).encode() + b"\n"
        self.sync()

    def sync(self):
        """To the disk. Raises OSError, and then no part of a line stays behind."""
        try:
            if self.pending and self.file.write(self.pending) < len(self.pending):
                raise OSError("the disk is full")
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(self.whole_bytes)
            raise
        self.whole_bytes += len(self.pending)
        self.pending = b""


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint_path(out_dir: Path, step: int) -> Path:
    return out_dir / f"ckpt_{step:07d}.pt"


def save_checkpoint(out_dir: Path, state: dict):
    """Writes `ckpt_NNNNNNN.pt`, then removes all but the last two and the best."""
    write_whole(checkpoint_path(out_dir, state["step"]), lambda file: torch.save(state, file))
    paths = sorted(out_dir.glob("ckpt_*.pt"))
    for path in set(paths[:-2]) - {checkpoint_path(out_dir, state["best_step"])}:
        path.unlink()


def read_checkpoint(path: Path) -> dict:
    """A whole checkpoint, on the CPU; ValueError, in one line, for anything else. Nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        parts = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "data": dict, "step": int, "best_loss": float, "best_step": int}
        for name, kind in parts.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if re.fullmatch(r"ckpt_\d+\.pt", path.name) and path != checkpoint_path(path.parent, state["step"]):
            raise ValueError(f"it holds step {state['step']}")
        return state
    except Exception as error:  # whatever a damaged file can cause
        raise ValueError(f"{path} is no whole checkpoint: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


def find_checkpoint(config: TrainConfig, out_dir: Path) -> Path | None:
    """The newest whole checkpoint to go on from; None to begin. Damaged newer ones are reported and set aside."""
    if config.resume == "never":
        return None
    paths = sorted(out_dir.glob("ckpt_*.pt"), reverse=True) if config.resume == "auto" else [Path(config.resume)]
    problems = []
    for path in paths:
        try:
            read_checkpoint(path)
        except ValueError as error:
            problems.append((path, str(error)))
            continue
        for damaged, problem in problems:
            print(f"{problem}; set aside as {damaged.name}.damaged, going on from {path.name}", flush=True)
            damaged.rename(f"{damaged}.damaged")
        return path
    if problems:
        names = ", ".join(path.name for path, _ in problems)
        fail(f"no whole checkpoint among {names}: {problems[0][1]}; restore one, or start anew with another --out_dir")
    return None


def check_same_run(path: Path, state: dict, config: TrainConfig, data: dict, machine: Machine):
    """Ends the program where the checkpoint is of another run; says which lesser settings have changed."""
    now, then = asdict(config), state["config"]
    changed = {key: f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]}
    other = [changed[key] for key in IDENTITY if key in changed]
    other += [f"the {split} data has changed" for split in data if state["data"].get(split) != data[split]]
    if other:
        fail(f"{path} is of another run: {'; '.join(other)}; set it back, or choose another --out_dir")
    lesser = [text for key, text in changed.items() if key not in ("resume", "out_dir", "data_dir")]
    if lesser:
        machine.say(f"changed since {path.name}: {'; '.join(lesser)}")


# --- the parts of a step -------------------------------------------------------------------------


def open_data(config: TrainConfig, machine: Machine) -> tuple[TokenWindows, TokenWindows]:
    folder = Path(config.data_dir) if config.data_dir else ROOT / "data" / config.dataset
    if config.dataset == "stdlib" and not config.data_dir:
        machine.from_main(prepare_stdlib)
    if not folder.is_dir():
        fail(f"there is no dataset folder {folder}: prepare it first, as README.md says under Data")
    meta = read_meta(folder)
    if meta and meta["vocab_size"] != config.vocab_size:
        fail(f"{folder} has a vocabulary of {meta['vocab_size']}, the model of {config.vocab_size}: use --vocab_size={meta['vocab_size']}")
    return tuple(TokenWindows(folder, split, config.block_size, config.vocab_size) for split in ("train", "val"))


def prepare_stdlib():
    if not (ROOT / "data" / "stdlib" / "meta.json").exists():
        from data.stdlib import prepare

        print("preparing the built-in dataset", flush=True)
        prepare.main()


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW in two groups: matrices and embeddings decay, the norms' weights do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.adam_epsilon, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step that follows `step` done ones: linear warm-up to the peak, cosine down to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def samples_of_rank(config: TrainConfig, machine: Machine, first_step: int):
    """Sample numbers of every forward pass of this process. Step s takes samples s·B … s·B + B − 1 on any number of processes."""
    together = config.micro_batch_size * machine.world_size
    for first in range(first_step * config.batch_size, config.max_steps * config.batch_size, together):
        yield first + machine.rank * config.micro_batch_size + np.arange(config.micro_batch_size)


class Averages:
    """Metrics of many forward passes on many processes, kept on the device until they are asked for.

    Weighted means, but `logit_absmax` is the largest, and `logit_std` the root of the mean variance plus the
    variance of the means: what one pass over all tokens would have given.
    """

    def __init__(self):
        self.names, self.total, self.largest, self.weight = None, 0.0, 0.0, 0.0

    def add(self, metrics: dict[str, torch.Tensor], weight: float = 1.0):
        metrics = {name: value.double() for name, value in metrics.items()}
        metrics["square"] = metrics["logit_std"] ** 2 + metrics["logit_mean"] ** 2
        largest = metrics.pop("logit_absmax")
        self.names = list(metrics)
        self.total = self.total + weight * torch.stack(list(metrics.values()))
        self.largest = torch.maximum(largest, torch.as_tensor(self.largest, device=largest.device))
        self.weight += weight

    def over_processes(self, machine: Machine) -> dict[str, torch.Tensor]:
        weights = machine.all_reduce(torch.cat((self.total, self.total.new_tensor([self.weight]))))
        metrics = dict(zip(self.names, (weights[:-1] / weights[-1]).unbind()))
        metrics["logit_std"] = (metrics.pop("square") - metrics["logit_mean"] ** 2).clamp(min=0).sqrt()
        return metrics | {"logit_absmax": machine.all_reduce(self.largest, dist.ReduceOp.MAX)}


@torch.no_grad()
def evaluate(model, val: TokenWindows, config: TrainConfig, machine: Machine) -> dict[str, float]:
    """Means over the same windows each time, whatever the number of processes; they share out the batches."""
    n_windows = min(config.eval_sequences, len(val))
    windows = permute(np.arange(n_windows), len(val), key=0)
    averages = Averages()
    starts = range(0, n_windows, config.micro_batch_size)
    for turn in range(0, len(starts), machine.world_size):
        mine = min(turn + machine.rank, len(starts) - 1)
        chosen = windows[starts[mine] : starts[mine] + config.micro_batch_size]
        is_spare = turn + machine.rank >= len(starts)  # more processes than batches left: computed, not counted
        tokens = torch.from_numpy(val.read(np.resize(chosen, config.micro_batch_size))).to(machine.device)
        targets = tokens[:, 1:].clone()
        targets[len(chosen) :] = -1  # a short last batch keeps its shape, so nothing is compiled again
        with machine.autocast():
            _, metrics = model(tokens[:, :-1], targets)
        averages.add(metrics, weight=0.0 if is_spare else len(chosen))
    return {name: value.item() for name, value in averages.over_processes(machine).items()}


@torch.no_grad()
def mu_metrics(model: GPT) -> dict[str, float]:
    """‖μ‖ of the embeddings that the logits come from, its ratio to the mean norm, and ‖μ‖ of the stored matrix."""
    V = model.config.vocab_size
    W = model.output_embedding()
    mu_norm = oec.mean_embedding(W, V).norm()
    mu_ratio = mu_norm / W[:V].norm(dim=1).mean()
    stored = oec.mean_embedding(model.unembedding.weight, V).norm()
    return dict(zip(("mu_norm", "mu_ratio", "stored_mu_norm"), torch.stack((mu_norm, mu_ratio, stored)).tolist()))


class BadSteps:
    """Counts, on the device, steps whose loss or gradient was not finite; asked only at log lines."""

    def __init__(self, device: torch.device):
        self.total, self.in_row, self.longest = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        self.first = None  # metrics of the first bad step of the latest row

    def add(self, is_bad: torch.Tensor, step: int, metrics: dict[str, torch.Tensor]):
        is_first = is_bad & (self.in_row == 0)
        state = torch.stack([value.double() for value in metrics.values()] + [torch.full_like(metrics["loss"], step)])
        self.first = state if self.first is None else torch.where(is_first, state, self.first)
        self.names = [*metrics, "step"]
        self.total = self.total + is_bad
        self.in_row = torch.where(is_bad, self.in_row + 1, 0)
        self.longest = torch.maximum(self.longest, self.in_row)

    def verdict(self) -> str:
        first = dict(zip(self.names, self.first.tolist()))
        if not math.isfinite(first["logit_absmax"]):
            culprit = "the logits"
        else:
            culprit = "the gradient" if math.isfinite(first["loss"]) else "the loss"
        state = ", ".join(f"{name} {first[name]:.4g}" for name in ("loss", "grad_norm", "logit_mean", "logit_std", "logit_absmax", "log_z"))
        return f"{culprit} went bad first, at step {first['step']:.0f}: {state}"


# --- the loop ------------------------------------------------------------------------------------


class Trainer:
    """The state of a run. `Trainer(config, machine).run()` is the whole of it; `update` is one step."""

    def __init__(self, config: TrainConfig, machine: Machine):
        self.config, self.machine = config, machine
        self.stop = StopRequest(machine)
        self.out_dir = machine.from_main(lambda: open_out_dir(config))
        self.train_data, self.val_data = open_data(config, machine)
        self.fingerprint = {"train": self.train_data.fingerprint(), "val": self.val_data.fingerprint()}
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(machine.device)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        if path := machine.from_main(lambda: find_checkpoint(config, self.out_dir)):
            self.restore(path)
        if machine.is_main:
            self.metrics = self.guard_writes(lambda: Metrics(self.out_dir / "metrics.jsonl", self.step), must=True)
            text = json.dumps(asdict(config), indent=1) + "\n"
            self.guard_writes(lambda: write_whole(self.out_dir / "config.json", text.encode()), must=True)
        self.compiled = torch.compile(self.model) if config.compile else self.model
        self.parallel = DistributedDataParallel(self.compiled) if machine.world_size > 1 else self.compiled
        self.bad_steps = BadSteps(machine.device)

    def restore(self, path: Path):
        try:
            state = read_checkpoint(path)
        except ValueError as error:
            fail(f"{error}; every process must see the folder of the checkpoints")
        check_same_run(path, state, self.config, self.fingerprint, self.machine)
        try:
            self.model.load_state_dict(state["model"])
            # The moments come from the checkpoint, the settings from the config.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
            self.scaler.load_state_dict(state["scaler"]) if state["scaler"] and self.scaler.is_enabled() else None
            torch.set_rng_state(state["random_state"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            fail(f"{path} does not fit this model: {str(error).splitlines()[0]}")
        self.step, self.best_loss, self.best_step = state["step"], state["best_loss"], state["best_step"]
        self.machine.say(f"going on from {path} at step {self.step}")

    def checkpoint(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "config": asdict(self.config),
            "random_state": torch.get_rng_state(),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "data": self.fingerprint,
        }
        self.guard_writes(self.metrics.sync)  # a checkpoint never knows of a step that metrics.jsonl does not
        self.guard_writes(lambda: save_checkpoint(self.out_dir, state))

    def guard_writes(self, write, must: bool = False):
        """A full disk or a folder gone read-only: say so, then go on or stop as the setting says."""
        try:
            return write()
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            reason = f"{self.out_dir} cannot be written ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})"
            if must or self.config.stop_on_write_error:
                fail(f"{reason}; the checkpoints there are whole; make room and start again")
            print(f"nanoOEC: {reason}; the checkpoints there are whole; going on", file=sys.stderr, flush=True)

    def update(self, batches) -> tuple[dict[str, torch.Tensor], float]:
        """One step: forward and backward passes over this process's share of the batch, then AdamW. No host–device
        synchronisation: a non-finite loss or gradient is noticed, and the update left out, on the device."""
        config, machine = self.config, self.machine
        n_passes = config.batch_size // (config.micro_batch_size * machine.world_size)
        averages = Averages()
        for i in range(n_passes):
            tokens, targets = next(batches)
            is_last = i == n_passes - 1
            # Gradients are averaged over the processes once a step, during the last backward pass.
            with nullcontext() if is_last or machine.world_size == 1 else self.parallel.no_sync():
                with machine.autocast():
                    loss, metrics = self.parallel(tokens, targets)
                self.scaler.scale(loss / n_passes).backward()
            averages.add(metrics)

        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        metrics = averages.over_processes(machine)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        metrics["grad_norm"] = grad_norm
        is_bad = ~(torch.isfinite(metrics["loss"]) & torch.isfinite(grad_norm))
        self.optimizer.found_inf = is_bad.float()  # fused AdamW leaves everything as it was where this is 1
        self.optimizer.step()
        self.scaler.update()
        self.model.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.bad_steps.add(is_bad, self.step, metrics)
        return metrics, rate

    def log(self, metrics: dict[str, torch.Tensor], rate: float, tokens_per_second: float, seconds_left: float):
        """A line for people and one for metrics.jsonl, of this step alone; then the check for divergence."""
        config, machine = self.config, self.machine
        values = {name: value.item() for name, value in metrics.items()} | mu_metrics(self.model)
        mfu = tokens_per_second * self.model.flops_per_token() / (machine.peak_flops * machine.world_size)
        if machine.is_main:
            tokens = self.step * config.batch_size * config.block_size
            timings = {"tokens_per_second": tokens_per_second, "mfu": mfu}
            line = {"split": "train", "step": self.step, "tokens": tokens, "lr": rate, **values, **timings}
            bad = self.bad_steps.total.item()
            self.guard_writes(lambda: self.metrics.write(**line, bad_steps=bad))
            machine.say(
                f"step {self.step}/{config.max_steps} | loss {values['loss']:.4f} | {tokens_per_second:,.0f} tokens/s"
                + (f" | MFU {mfu:.1%}" if math.isfinite(mfu) else "")
                + f" | ‖μ‖ {values['mu_norm']:.3g} | mean logit {values['logit_mean']:.3g} | grad norm {values['grad_norm']:.3g}"
                + (f" | {bad} bad steps" if bad else "")
                + f" | {clock(seconds_left)} left"
            )
        if self.bad_steps.longest.item() >= config.max_bad_steps:
            machine.say(
                f"diverged: {config.max_bad_steps} steps in a row without a finite loss and gradient; {self.bad_steps.verdict()}; "
                f"‖μ‖ {values['stored_mu_norm']:.4g}. The weights are those before; lower the learning rate, or use --oec=mu_centering"
            )
            raise SystemExit(3)

    def evaluate(self):
        values = evaluate(self.compiled, self.val_data, self.config, self.machine) | mu_metrics(self.model)
        if values["cross_entropy"] < self.best_loss and self.is_checkpoint_step():
            self.best_loss, self.best_step = values["cross_entropy"], self.step
        tokens = self.step * self.config.batch_size * self.config.block_size
        if self.machine.is_main:
            self.guard_writes(lambda: self.metrics.write(split="val", step=self.step, tokens=tokens, **values))
        self.machine.say(f"step {self.step} | validation loss {values['cross_entropy']:.4f}")

    def is_checkpoint_step(self) -> bool:
        interval = self.config.checkpoint_interval or self.config.eval_interval
        return self.step == self.config.max_steps or (interval > 0 and self.step % interval == 0)

    def run(self):
        config, machine = self.config, self.machine
        if self.step >= config.max_steps:
            return machine.say(f"{self.out_dir} has its {config.max_steps} steps already: nothing to do")
        self.introduce()
        loader = Loader(self.train_data, samples_of_rank(config, machine, self.step), config.seed, machine.device)
        batches = iter(loader)
        first_step, logged_step = self.step, self.step
        training_seconds, total_start = 0.0, time.monotonic()
        tick = time.monotonic()
        is_stopping = False
        while self.step < config.max_steps and not is_stopping:
            metrics, rate = self.update(batches)
            is_stopping = self.stop.agreed()
            is_last = self.step == config.max_steps
            if self.step % config.log_interval == 0 or is_last or self.step == first_step + 1:
                metrics["loss"].item()  # waits for the device
                tokens = (self.step - logged_step) * config.batch_size * config.block_size
                now = time.monotonic()
                left = (config.max_steps - self.step) * (now - total_start) / (self.step - first_step)
                self.log(metrics, rate, tokens / (now - tick), left)
                logged_step, tick = self.step, time.monotonic()
            if is_last or (config.eval_interval and self.step % config.eval_interval == 0):
                self.evaluate()
            if (self.is_checkpoint_step() or is_stopping) and machine.is_main:
                self.checkpoint()
            tick = tick if False else tick
        loader.close()
        machine.say(f"{'stopped' if is_stopping else 'done'} at step {self.step}: {self.out_dir}")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def main():
    config = load_config(sys.argv[1:])
    machine = start_machine(config)
    Trainer(config, machine).run()
    if machine.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

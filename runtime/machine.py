"""How a run meets its machine: processes, device, dtype, signals, and the workarounds that they need."""

import math
import os
import re
import secrets
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.errors import fail, one_line, say

# Dense bfloat16 peak (V100: float16), FLOP/s, from the makers' data sheets. The first entry whose words are all in
# the GPU's name decides.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "H20": 148e12, "B200": 2250e12, "GB200": 2500e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
    "V100": 125e12,
}  # fmt: skip


def peak_flops(gpu: str) -> float:
    """Peak FLOP/s of a GPU, by PyTorch's name for it; nan for a GPU that is not in the table, and for a part of one (MIG)."""
    words = set(re.split(r"[ -]", gpu))
    if words & {"MIG", "Laptop", "D"}:  # slower than their namesakes
        return math.nan
    return next((flops for name, flops in PEAK_FLOPS.items() if set(name.split()) <= words), math.nan)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Machine:
    """This process among its peers, and what it computes with."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    peak_flops: float = math.nan  # FLOP/s of this process's device; nan: unknown

    def say(self, message: str):
        """Prints on process 0; training continues where nobody can read it."""
        if self.rank == 0:
            say(message)

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def all_reduce(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on all processes when it is true on one."""
        return bool(self.all_reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX))

    def broadcast(self, value):
        """Process 0's value, on all processes."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def together(self):
        """A block in which an error on one process ends all of them, with its exit status."""
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised
        code = getattr(error, "code", 1)
        status = 0 if error is None else code if isinstance(code, int) and 0 < code < 256 else 1
        status = self.all_reduce(torch.tensor(status), dist.ReduceOp.MAX).item()
        if error:
            raise error
        if status:
            raise SystemExit(status)


def start_machine(config) -> Machine:
    """The device, dtype and process group that the settings device, dtype, compile, deterministic and optimizer ask for."""
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # torchrun sets these
    rank, local_rank, world_size, local_world_size = (int(os.environ.get(*item)) for item in environment.items())
    if config.device == "cuda" or config.device == "auto" and torch.cuda.is_available():
        device, best_dtype, peak = start_gpu(local_rank, local_world_size)
        check_compiler(config.compile, "a C compiler", "gcc", (os.environ.get("CC", "gcc"), "clang", "cc"))  # for Triton
        backend = "cpu:gloo,cuda:nccl"  # gloo, for agreeing on when to stop, does not wait for the GPU
    else:
        device, backend, peak = torch.device("cpu"), "gloo", math.nan
        check_compiler(config.compile, "a C++ compiler", "g++", (os.environ.get("CXX", "g++"), "clang++"))
        best_dtype = start_cpu(config, local_world_size)
    if config.deterministic or device.type == "cpu":  # otherwise compiled code adds up embedding gradients in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it helps to debug, and it is slow
    if world_size > 1:  # the timeout is long because some processes wait while others compile and save
        store = store_of_this_start(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # PyTorch 2.11 has no other name for it
    dtype = best_dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return Machine(rank, world_size, device, dtype, peak)


def start_gpu(local_rank: int, local_world_size: int) -> tuple[torch.device, torch.dtype, float]:
    if local_rank >= torch.cuda.device_count():
        fail(f"PyTorch finds {torch.cuda.device_count()} GPUs here for {local_world_size} processes: start fewer processes, or use --device=cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, torch.bfloat16 if has_bfloat16 else torch.float16, peak_flops(torch.cuda.get_device_name(device))


def start_cpu(config, local_world_size: int) -> torch.dtype:
    torch.set_num_threads(max(1, available_cores() // local_world_size))  # torchrun leaves only one to each
    # Without this PyTorch first compiles a program, to see whether the compiler knows the CPU's vector units: 7 seconds.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    # Large tensors in pages of 2 MiB, if Linux allows it: a step allocates tensors of W's size, and 4 KiB pages make that slow.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not has_bfloat16 and (config.dtype == "bfloat16" or config.optimizer == "muon"):  # Muon orthogonalises in bfloat16
        multiply_bfloat16_in_float32()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def check_compiler(is_wanted: bool, kind: str, package: str, names: tuple[str, ...]):
    """torch.compile needs a compiler and Python's headers, on a CPU and, for Triton, on a GPU."""
    if is_wanted and not any(map(shutil.which, names)):
        fail(f"compile=True needs {kind}: install {package}, or use --compile=False")
    if is_wanted and not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail("compile=True needs Python's headers: install python3-dev, or use --compile=False")


@cache  # keeps the library alive: PyTorch removes its operators when it is freed
def multiply_bfloat16_in_float32() -> torch.library.Library:
    """bfloat16 matrix products for a CPU without units for them, on which PyTorch's own take ten times float32's time.

    What the units compute: exact products of bfloat16 numbers, added up in float32, rounded to bfloat16 once.
    """
    library = torch.library.Library("aten", "IMPL")

    def replace(name: str):
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

        def product(keyset, *inputs, **options):
            if all(x.dtype != torch.bfloat16 for x in inputs):
                return kernel.call_boxed(keyset, *inputs, **options)
            return kernel.call_boxed(keyset, *(x.float() for x in inputs), **options).to(inputs[0].dtype)

        return product

    mm, mm_out = replace("mm"), torch.library.get_kernel("aten::mm.out", "CPU")

    def product_into(keyset, a, b, *, out):
        return mm_out.call_boxed(keyset, a, b, out=out) if a.dtype != torch.bfloat16 else out.copy_(mm(keyset, a, b))

    with warnings.catch_warnings(action="ignore"):  # about the replaced operators
        addmm = replace("addmm")
        library.impl("mm", mm, "CPU", with_keyset=True)
        library.impl("mm.out", product_into, "CPU", with_keyset=True)
        library.impl("addmm", addmm, "CPU", with_keyset=True)
    return library


def store_of_this_start(rank: int, world_size: int) -> dist.Store:
    """Where the processes that torchrun has just started tell each other their addresses.

    torchrun restarts workers on the store they had (pytorch/pytorch#135712): a worker that reads an address of the
    previous start waits for a process that is gone. So each writes a new word, and all wait until all have seen the same words.
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
        return self.machine.any(self.is_received or is_orphan)


def average(passes: list[tuple[float, dict]], how: dict[str, str], machine: Machine) -> dict[str, torch.Tensor]:
    """(weight, metrics) of forward passes on all processes, combined as `how` says of each metric: "mean", "max", or "std about
    NAME", where NAME is the metric of the mean. The result is that of one pass over all tokens, in float64, without waiting
    for the device."""
    if unknown := passes[0][1].keys() - how.keys():
        fail(f"GPT.forward returns the metric {sorted(unknown)[0]!r}: say in METRICS of model.py how it is combined")
    if missing := {"loss", "cross_entropy", "logit_mean", "logit_std", "logit_absmax", "rounding_nats"} - passes[0][1].keys():  # train.py reports them
        fail(f"GPT.forward does not return the metric {sorted(missing)[0]!r}: return loss.new_tensor(torch.nan) for it if you have none")
    mean_of = {name: word.removeprefix("std about ") for name, word in how.items() if word.startswith("std about ")}
    rows = []
    for weight, metrics in passes:
        values = {name: value.double() for name, value in metrics.items()}
        for name in mean_of.keys() & values.keys():  # second moments can be averaged
            values[name] = values[name] ** 2 + values[mean_of[name]] ** 2
        rows.append(weight * torch.stack([*values.values(), torch.ones_like(values["loss"])]))
    total = machine.all_reduce(torch.stack(rows).sum(dim=0))
    combined = dict(zip(values, (total[:-1] / total[-1]).unbind()))
    for name in combined:
        if name in mean_of:
            combined[name] = (combined[name] - combined[mean_of[name]] ** 2).clamp(min=0).sqrt()
        elif how[name] == "max":
            largest = torch.stack([metrics[name] for _, metrics in passes]).max()
            combined[name] = machine.all_reduce(largest, dist.ReduceOp.MAX)
    return combined


@contextmanager
def errors_for_people(is_sharded: bool):
    """Reports errors of the machine in one line: a full memory or disk, a compile cache that a kill left unfinished."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if remove_unfinished(str(error)):
            fail("PyTorch's compile cache held files that a kill had left unfinished; they are deleted: start again")
        if "No space left on device" in str(error):
            folder = tempfile.gettempdir()
            fail(f"the disk of TMPDIR, {folder}, is full ({one_line(error)}): make room, or set TMPDIR to a folder on another disk")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        needs = " (a checkpoint takes 12 bytes of host memory per parameter: in process 0 to write it, in every process to resume)" * is_sharded
        fail(f"the memory is full: lower --micro_batch_size or the model's size{needs}. {one_line(error)}")


def remove_unfinished(problem: str) -> bool:
    """Deletes unfinished files that a crash while compiling left in PyTorch's cache: they would stop every later run."""
    named = re.search(r"(/\S+)/\w\w/\w+(\.main)?\.(so: file too short|so: invalid ELF header|so: file truncated|cpp)", problem)
    libraries = Path(named[1]).rglob("*.so") if named else []
    unfinished = [path for path in libraries if path.stat().st_size == 0 or f"{path}: " in problem]
    for path in unfinished:
        path.unlink(missing_ok=True)
    return bool(unfinished)

"""Speed and memory side by side: our methods, other people's trainers, and variants, in turn (A B A B ...) in one call.

    python -m tools.bench                                                    4 layers × 256, GPT-2's vocabulary
    python -m tools.bench config/gpt2_124m.py --micro_batch_size=16 --batch_size=16 --peer nanogpt=../nanoGPT
    python -m tools.bench --parts step --methods baseline --variant big="--micro_batch_size=32 --batch_size=32"
    python -m tools.bench --parts scaling

Everything else on the command line goes to train.py's settings. Each contender is a process of its own that builds
its model, compiles and then waits for its turns, so memory is its own and nothing else runs while it is timed.
The data are random tokens, V·u⁴ of a uniform u, the same for all.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import oec
from data.shards import Loader, open_dataset, samples_of_process, shard_header
from model import METHODS
from runtime.checkpoint import state_of, write_whole
from runtime.errors import fail, say
from runtime.folder import read_metrics
from runtime.machine import available_cores, start_machine
from runtime.unembedding import unembedding_loss
from tools.sweep import words_of
from train import Trainer, load_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--batch_size=8", "--micro_batch_size=8"]
PARTS = ("step", "head", "loader", "checkpoint", "start", "scaling")


# --- contenders: each builds what it needs and gives back a function that does one step --------------------------


def ours_step(config, data: Path):
    """The trainer's own update, with its loader, and its log line every `log_interval` steps."""
    machine = start_machine(config)
    trainer = Trainer(config, machine)
    samples = samples_of_process(0, config.max_steps, config.batch_size, config.micro_batch_size, 0, 1)
    batches, waited = iter(Loader(trainer.train_data, samples, config.seed, machine.device)), [0.0]

    def timed_batches():
        while True:
            began = time.perf_counter()
            batch = next(batches)
            waited[0] += time.perf_counter() - began
            yield batch

    timed = timed_batches()

    def step():
        metrics = trainer.update(timed)
        if trainer.step % config.log_interval == 0:
            trainer.log(metrics, 1.0, 0.0)

    return step, trainer, waited


def peer_step(config, data: Path, folder: Path, kind: str, is_mended: bool):
    """One iteration of a peer's own training loop around its own model.py, with its own defaults, on our shape.

    Mended: the machine's best dtype and fused AdamW where its defaults leave them out, a log line as rare as ours, and on a
    CPU large pages (`start_cpu`).
    """
    machine = start_machine(config)
    device, is_cuda = machine.device.type, machine.device.type == "cuda"
    dtype = machine.dtype if is_cuda or is_mended else torch.float32  # peers use float32 on a CPU
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(False)
    model_file = load_module(folder / "model.py")
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    if kind == "oec":
        shape |= {"qk_layernorm": True}
    torch.manual_seed(config.seed)
    model = model_file.GPT(model_file.GPTConfig(vocab_size=config.padded_vocab_size, dropout=0.0, bias=False, **shape)).to(device)
    if is_mended:
        optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    else:
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    compiled = torch.compile(model)
    T, B = config.block_size, config.micro_batch_size

    def get_batch():  # as nanoGPT and the paper's code do: random windows of a memory map that is opened again each time
        tokens = np.memmap(data / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - T, (B,))
        x, y = (torch.stack([torch.from_numpy(tokens[i + o : i + o + T].astype(np.int64)) for i in starts]) for o in (0, 1))
        return (z.pin_memory().to(device, non_blocking=True) if is_cuda else z for z in (x, y))

    count, (x, y) = 0, get_batch()
    log_interval = 1 if kind == "oec" and not is_mended else 10

    def step():
        nonlocal count, x, y
        with autocast:
            outputs = compiled(x, y)
        loss = outputs[-1]
        x, y = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count += 1
        if count % log_interval == 0:
            loss.item()

    return step


def load_module(path: Path):
    if not path.is_file():
        fail(f"{path} does not exist: --peer takes NAME=FOLDER, the folder of a peer's model.py")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_model"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        fail(f"{path} needs a package that is missing here: pip install {error.name.replace('_', '-')}")
    return module


def head_step(config, what: str):
    """The unembedding alone, forward and backward, on fixed hidden states: ours by method, or one to compare it with."""
    machine = start_machine(config)
    device, N, V = machine.device, config.micro_batch_size * config.block_size, config.padded_vocab_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, config.n_embd, generator=generator).to(device, machine.dtype).requires_grad_()
    W = (torch.randn(V, config.n_embd, generator=generator) * 0.02).to(device).requires_grad_()
    targets = torch.randint(config.vocab_size, (N,), generator=generator).to(device)

    if what == "three products":
        W_low, grad_logits = W.detach().to(machine.dtype), torch.randn(N, V, device=device, dtype=machine.dtype)
        low = hidden.detach()
        out = [torch.empty(shape, device=device, dtype=machine.dtype) for shape in ((N, V), low.shape, W.shape)]

        def step():
            torch.mm(low, W_low.T, out=out[0])
            torch.mm(grad_logits, W_low, out=out[1])
            torch.mm(grad_logits.T, low, out=out[2])

        return step

    def ours(hidden, W, targets):
        detach_mean = not (config.z_loss_weight or config.logit_softcap)  # as in GPT.output_embedding
        embedding = oec.center(W, config.vocab_size, detach_mean) if config.oec == "mu_centering" else W
        options = {"z_loss_weight": config.z_loss_weight, "soft_cap": config.logit_softcap}
        options["logits_dtype"] = torch.float32 if config.logits_dtype == "float32" else None
        loss = unembedding_loss(hidden, embedding, targets, vocab_size=config.vocab_size, **options).loss
        return loss + (config.mu_loss_weight * oec.mu_loss(W, config.vocab_size) if config.oec == "mu_loss" else 0)

    def plain(hidden, W, targets):
        return F.cross_entropy((hidden @ W.T).float(), targets)

    def linear_cross_entropy(hidden, W, targets):  # PyTorch's own, in chunks, not compiled
        return F.linear_cross_entropy(hidden, W.to(hidden.dtype), targets, options=torch.nn.LinearCrossEntropyOptions())

    function = {"linear_cross_entropy": linear_cross_entropy, "plain": torch.compile(plain)}.get(what) or torch.compile(ours)

    def step():
        with machine.autocast():
            loss = function(hidden, W, targets)
        loss.backward()
        hidden.grad = W.grad = None

    return step


# --- a contender's process -----------------------------------------------------------------------


def resident() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "VmHWM:")}


def work(spec: dict):
    """Builds one contender, then answers each line of standard input with one line of JSON."""
    if not spec.get("mended", True):
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # a peer as shipped: without the large pages of `start_cpu`
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print goes to standard error
    config, data = load_config(spec["words"]), Path(spec["data"])
    is_cuda = start_machine(config).device.type == "cuda"
    before, waited, trainer = resident()["VmRSS:"], [0.0], None
    began = time.perf_counter()
    if spec["kind"] == "ours":
        step, trainer, waited = ours_step(config, data)
    elif spec["kind"] == "head":
        step = head_step(config, spec["name"])
    else:
        step = peer_step(config, data, Path(spec["peer"]), spec["kind"], spec["mended"])
    wait_for_device = torch.cuda.synchronize if is_cuda else lambda: None

    def timed(n_steps: int) -> float:
        wait_for_device()
        start = time.perf_counter()
        for _ in range(n_steps):
            step()
        wait_for_device()
        return (time.perf_counter() - start) / n_steps

    timed(1)
    first_step = time.perf_counter() - began
    timed(2)
    n_steps = max(1, min(200, round(spec["seconds"] / timed(2))))
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak resident memory starts again from here
    facts = {"first_step": first_step, "tokens": config.micro_batch_size * config.block_size}
    if trainer:
        machine = trainer.machine
        facts |= {"flops_per_token": trainer.model.flops_per_token(), "peak_flops": machine.peak_flops}
        facts |= {"device": torch.cuda.get_device_name() if is_cuda else "cpu", "dtype": str(machine.dtype)[6:]}
    print(json.dumps(facts), file=answers, flush=True)
    for request in sys.stdin:
        answer = {}
        if request == "round\n":
            step()  # warms up again after the others' turns
            waited[0] = 0.0
            answer["seconds"] = timed(n_steps)
            answer["loader_share"] = waited[0] / n_steps / answer["seconds"]
            torch.cuda.empty_cache()  # frees the card's memory for the next contender
        elif request == "memory\n":
            answer["bytes"] = torch.cuda.max_memory_allocated() if is_cuda else resident()["VmHWM:"] - before
        elif request == "save\n":
            start = time.perf_counter()
            trainer.folder.save(state_of(trainer), must=True)
            answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), file=answers, flush=True)


class Contender:
    def __init__(self, name: str, words: list[str], folder: Path, seconds: float, kind: str = "ours", **spec):
        self.name, self.times = name, []
        out_dir = tempfile.mkdtemp(dir=folder)
        words = [*words, f"--data_dir={folder}", f"--out_dir={out_dir}", "--max_steps=1000000", "--warmup_steps=0"]
        spec |= {"name": name, "words": words, "data": str(folder), "seconds": seconds, "kind": kind}
        self.errors = tempfile.TemporaryFile("w+", dir=folder)
        command = [sys.executable, "-m", "tools.bench", "--work", json.dumps(spec)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, cwd=ROOT)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            words = [line for line in self.errors.read().strip().splitlines() if line.strip()] or ["no word"]
            fail(f"the contender {self.name!r} ended: {words[-1].removeprefix('nanoOEC: ')}")
        return json.loads(line)

    def ask(self, request: str) -> dict:
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compare(title: str, makers: list, rounds: int) -> list[dict]:
    """The first contender and the others have their turns: a row each, ratios to the first, round by round.
    Each round begins with another one, since the first turn after a pause can be slow.
    On a GPU two are there at a time: the first, and in turn each of the others."""
    first = start(title, makers[:1])[0]
    at_once = 1 if torch.cuda.is_available() else len(makers)
    rows = []
    for at in range(1, max(2, len(makers)), at_once):
        others = start(title, makers[at : at + at_once])
        began = time.perf_counter()
        group = [first, *others]
        for turn in range(rounds):
            begins = turn % len(group)
            for contender in group[begins:] + group[:begins]:
                contender.times.append(contender.ask("round"))
            left = (time.perf_counter() - began) / (turn + 1) * (rounds - turn - 1)
            progress(f"{title}: round {turn + 1} of {rounds}, {left:.0f} s left")
        rows += [row(contender, first.times[-rounds:]) for contender in others]
    rows = [row(first, first.times), *rows]
    progress("")
    return rows


def start(title: str, makers: list) -> list:
    """Contenders that have compiled and wait for their turns; half as many start at once as there are cores."""
    contenders, at_once = [], max(1, available_cores() // 2)
    for at in range(0, len(makers), at_once):
        started = [make() for make in makers[at : at + at_once]]
        for contender in started:
            contender.facts = contender.answer()
            progress(f"{title}: {contender.name} is ready after {contender.facts['first_step']:.0f} s")
        contenders += started
    return contenders


def row(contender, times_of_first: list[dict]) -> dict:
    """Ends a contender after its turns, and returns its row."""
    seconds = [turn["seconds"] for turn in contender.times]
    ratios = [a / b["seconds"] for a, b in zip(seconds, times_of_first)]
    facts, median = contender.facts, statistics.median(seconds)
    peak = contender.ask("memory")["bytes"]
    contender.end()
    return {
        "name": contender.name, "seconds": seconds, "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "tokens_per_second": facts["tokens"] / median, "bytes": peak, "first_step": facts["first_step"],
        "loader_share": statistics.median(turn["loader_share"] for turn in contender.times),
        "mfu": facts.get("flops_per_token", 0) * facts["tokens"] / median / facts.get("peak_flops", float("nan")), **facts,
    }  # fmt: skip


def progress(text: str):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# --- the parts -----------------------------------------------------------------------------------


def step_part(options, words, folder) -> list[dict]:
    make = lambda *args, **kw: lambda: Contender(*args, folder, options.seconds, **kw)
    makers = [make(name, [*words, *words_of(name)]) for name in options.methods]
    makers += [make(name, [*words, *shlex.split(text)]) for name, text in options.variant]
    for name, path in options.peer:
        kind = "oec" if name.startswith("oec") else "nanogpt"
        for is_mended in (False, True):
            label = f"{name}, mended" if is_mended else f"{name}, as shipped"
            makers.append(make(label, words, kind=kind, peer=str(path), mended=is_mended))
    return compare("whole step", makers, options.rounds)


def head_part(options, words, folder) -> list[dict]:
    beside = ["plain", *(["linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") and options.slow_peers else [])]
    named = {"three products": [], **{name: words_of(name) for name in options.methods}, **{name: [] for name in beside}}
    makers = [
        lambda n=name, w=own: Contender(n, [*words, *w], folder, options.seconds, kind="head") for name, own in named.items()
    ]
    return compare("head alone", makers, options.rounds)


def loader_part(options, words, folder) -> list[dict]:
    config = load_config([*words, f"--data_dir={folder}"])
    train_data, _ = open_dataset(folder, config.block_size, config.vocab_size)
    times = []
    for turn in range(options.rounds):
        samples = samples_of_process(0, 200, config.micro_batch_size, config.micro_batch_size, 0, 1)
        began = time.perf_counter()
        for _ in Loader(train_data, samples, turn, torch.device("cpu")):
            pass
        times.append((time.perf_counter() - began) / 200)
    return [{"name": "loader", "seconds": times, "tokens_per_second": config.micro_batch_size * config.block_size / statistics.median(times)}]


def checkpoint_part(options, words, folder) -> list[dict]:
    contender = Contender("checkpoint", words, folder, 0.01)
    contender.answer()
    times = [contender.ask("save")["seconds"] for _ in range(options.rounds)]
    contender.end()
    return [{"name": "checkpoint", "seconds": times}]


def start_part(options, words, folder) -> list[dict]:
    """From the start of `train.py config/quick.py config/oec.py` to the end of its first step, with an empty compile cache or a full one."""
    rows = {"cold compile cache": [], "warm compile cache": []}
    for turn in range(min(3, options.rounds)):
        cache = tempfile.mkdtemp(dir=folder)
        for name, times in rows.items():
            out_dir = tempfile.mkdtemp(dir=folder)
            command = [sys.executable, "train.py", "config/quick.py", "config/oec.py", f"--out_dir={out_dir}"]
            began = time.perf_counter()
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
            for line in process.stdout:
                if line.startswith("step 1/"):
                    times.append(time.perf_counter() - began)
                    break
            process.kill()
            if process.wait() and not times:
                fail("train.py config/quick.py config/oec.py did not reach its first step: run it by hand")
            progress(f"start, {name}: {times[-1]:.1f} s")
    progress("")
    return [{"name": name, "seconds": times} for name, times in rows.items()]


def scaling_part(options, words, folder) -> list[dict]:
    """Tokens per second and memory of the training step against one size at a time; and on one process and on two."""
    tokens = 2048
    sweeps = {
        "vocab_size": [[f"--vocab_size={v}", "--block_size=256"] for v in (4096, 16384, 50257, 131072, 262144)],
        "block_size": [[f"--block_size={t}"] for t in (256, 512, 1024, 2048, 4096, 8192)],
        "micro_batch_size": [["--block_size=256", f"--micro_batch_size={b}", f"--batch_size={b}"] for b in (1, 2, 4, 8, 16, 32)],
    }
    rows = []
    for name, points in sweeps.items():
        for point in points:
            size = int(next(word for word in point if word.startswith(f"--{name}=")).partition("=")[2])
            T = int(next((w for w in point if w.startswith("--block_size=")), "--block_size=256").partition("=")[2])
            batch = [] if name == "micro_batch_size" else [f"--micro_batch_size={max(1, tokens // T)}", f"--batch_size={max(1, tokens // T)}"]
            data = folder / f"{name}{size}"
            write_data(data, load_config([*words, *point, *batch]))
            row = compare(f"{name} {size}", [lambda: Contender("baseline", [*words, *point, *batch], data, options.seconds)], 3)[0]
            rows.append(row | {"name": f"{name}={size}", "sweep": name, "size": size})
    return rows + processes_rows(options, [*words, "--micro_batch_size=4", "--batch_size=8"], folder)


def processes_rows(options, words, folder) -> list[dict]:
    """The same run under torchrun on one process and on two, in turn; its own log lines tell the speed."""
    rows = [{"name": f"processes={n}", "sweep": "processes", "size": n, "seconds": []} for n in (1, 2)]
    tokens = 8 * load_config(words).block_size
    for turn in range(3):
        for row in rows:
            out_dir = Path(tempfile.mkdtemp(dir=folder))
            settings = ["--max_steps=14", "--warmup_steps=0", "--log_interval=4", "--eval_interval=0", "--eval_sequences=1"]
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row['size']}", "train.py"]
            command = [sys.executable, *launch, *words, *settings, f"--data_dir={folder}", f"--out_dir={out_dir}"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                fail(f"torchrun on {row['size']} processes ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
            row["seconds"] += [tokens / x["tokens_per_second"] for x in read_metrics(out_dir) if x["split"] == "train" and x["step"] in (8, 12)]
            progress(f"scaling: {row['name']}, turn {turn + 1} of 3")
    return [row | {"tokens_per_second": tokens / statistics.median(row["seconds"])} for row in rows]


# --- output --------------------------------------------------------------------------------------


def table(part: str, rows: list[dict]) -> str:
    header, lines = ["", "seconds", "range"], []
    compares = "ratio" in rows[0] and part != "scaling"
    header += ["× first", "range"] if compares else []
    header += ["tokens/s"] if "tokens_per_second" in rows[0] else []
    header += ["peak MiB"] if "bytes" in rows[0] else []
    has_mfu = "mfu" in rows[0] and rows[0]["mfu"] == rows[0]["mfu"] and part == "step"
    header += ["MFU"] if has_mfu else []
    header += ["waiting for data"] if part == "step" else []
    for row in rows:
        cells = [row["name"], f"{statistics.median(row['seconds']):.4g}", f"{min(row['seconds']):.4g}–{max(row['seconds']):.4g}"]
        cells += [f"{row['ratio']:.3f}", f"{row['ratio_range'][0]:.3f}–{row['ratio_range'][1]:.3f}"] if compares else []
        cells += [f"{row['tokens_per_second']:,.0f}"] if "tokens_per_second" in row else []
        cells += [f"{row['bytes'] / 2**20:,.0f}" if "bytes" in row else "—"] if "bytes" in rows[0] else []
        cells += [f"{row['mfu']:.1%}" if row["mfu"] else "—"] if has_mfu else []
        cells += [f"{row['loader_share']:.2%}" if row["loader_share"] else "—"] if part == "step" else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"**{part}**", "", "| " + " | ".join(header) + " |", "| --- " * len(header) + "|", *lines, ""])


def write_data(folder: Path, config):
    """train.bin and val.bin without a header (the one form all peers read) where tokens fit 16 bits, else our own."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for split, size in {"train": max(2_000_000, 64 * config.block_size), "val": 64 * config.block_size + 1}.items():
        tokens = (config.vocab_size * generator.random(size) ** 4).astype(np.uint32)
        if config.vocab_size <= 2**16:
            (folder / f"{split}.bin").write_bytes(tokens.astype("<u2").tobytes())
        else:
            (folder / f"{split}.bin").write_bytes(shard_header(size, config.vocab_size)[0].tobytes() + tokens.tobytes())


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def write_json(path: Path, results: dict):
    try:
        write_whole(path, json.dumps(results, indent=1).encode() + b"\n")
    except OSError as error:
        fail(f"--json={path} cannot be written: {error.strerror or error}")


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--work":
        return work(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parts", default="step,head,loader,checkpoint,start", help=f"of {', '.join(PARTS)} (default: all but scaling)")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas; whole steps are compared with the first one's (default: all)")
    parser.add_argument("--peer", type=pair, action="append", default=[], help="nanogpt=FOLDER of nanoGPT, or oec=FOLDER of the paper's code")
    parser.add_argument("--variant", type=pair, action="append", default=[], help='NAME="settings of train.py", to be compared too')
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn (default: %(default)s)")
    parser.add_argument("--slow_peers", action="store_true", help="linear_cross_entropy too, which takes long on a CPU")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options, words = parser.parse_known_args()
    options.parts, options.methods = options.parts.split(","), options.methods.split(",")
    for given, known in ((options.parts, PARTS), (options.methods, METHODS)):
        if unknown := [name for name in given if name not in known]:
            fail(f"there is no {unknown[0]!r} among {', '.join(known)}")
    if options.rounds < 1 or not 0 < options.seconds < 1000:
        fail("--rounds must be at least 1, and --seconds above 0 and below 1000")
    if options.json and options.json.exists():
        fail(f"{options.json} exists: name another file for --json, or move it away")
    if options.json and not os.access(options.json.absolute().parent, os.W_OK):
        fail(f"--json={options.json} cannot be written: there is no such folder, or it is read-only")
    words = words or SMALL
    config = load_config(words)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": available_cores(), "words": words}
    results, folder = {"machine": machine}, Path(tempfile.mkdtemp(prefix="nanooec-bench-"))
    try:
        write_data(folder, config)
        for part in options.parts:
            results[part] = globals()[f"{part}_part"](options, words, folder)
            say(table(part, results[part]))
            if options.json:
                write_json(options.json, results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

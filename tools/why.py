"""The experiments of results/why.md that train.py alone cannot make: runs with one thing changed, or one more thing recorded.

    python -m tools.why rescue out/RUN --mean_logits 588 --learning_rates 2e-3 --seeds 1 --out out/rescue
    python -m tools.why natural config/drift.py --seeds 1,2,3 --out out/natural
    python -m tools.why float32_head config/quick.py --dtype=bfloat16 --learning_rate=0.3
    python -m tools.why row_sums config/quick.py --dtype=float32 --learning_rate=0.3
    python -m tools.why sgd_row_sums config/quick.py --dtype=float32 --learning_rate=1

rescue         a drift (tools.drift) is added to a trained model, which is trained on with each remedy: OUT/rescue.csv
natural        logits drift by themselves, with each remedy and in float32: runs of train.py, and OUT/natural.csv of them
float32_head   the unembedding and its loss in float32, whatever the dtype of all else
row_sums       metrics.jsonl has gradient_row_sum and update_row_sum of the unembedding as well
sgd_row_sums   the same, with plain SGD in AdamW's place
All but rescue take train.py's config files and --key=value settings after the word.
"""

import argparse
import contextlib
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import timedelta
from itertools import chain, product
from pathlib import Path

import torch

import runtime.unembedding
import train
from model import METHODS, WEIGHTS
from runtime.checkpoint import save_weights, write_whole
from runtime.errors import fail
from runtime.folder import lock, read_metrics
from runtime.machine import start_machine
from tools.drift import check_can_drift, hidden_of_run, transplant, write_csv
from tools.sample import load_model
from tools.sweep import numbers

# --- one thing changed ------------------------------------------------------------------------------


@contextlib.contextmanager
def unembedding_in_float32():
    """The unembedding and its loss in float32, whatever autocast does elsewhere."""
    unembedding_loss = runtime.unembedding.unembedding_loss

    def in_float32(hidden, W, targets, **options):
        with torch.autocast(hidden.device.type, enabled=False):
            return unembedding_loss(hidden.float(), W.float(), targets, **options)

    runtime.unembedding.unembedding_loss = in_float32
    try:
        yield
    finally:
        runtime.unembedding.unembedding_loss = unembedding_loss


def row_sum(X: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """‖Σ_i x_i‖ / Σ_i ‖x_i‖ over the real rows of X: 0 where they cancel, 1 where they all point the same way."""
    rows = X[:vocab_size].double()
    return rows.sum(dim=0).norm() / rows.norm(dim=1).sum()


class RowSumTrainer(train.Trainer):
    """Records how far the rows of the unembedding's gradient cancel, and those of its update."""

    def update(self, batches):
        W, V = self.model.unembedding.weight, self.config.vocab_size
        before, metrics = W.detach().clone(), {}
        hook = self.optimizers[0].register_step_pre_hook(lambda *_: metrics.update(gradient_row_sum=row_sum(W.grad, V)))
        metrics |= super().update(batches)
        hook.remove()
        return metrics | {"update_row_sum": row_sum(W.detach() - before, V)}


def make_sgd(model, config) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), config.learning_rate)]


# --- rescue -----------------------------------------------------------------------------------------

COLUMNS = "mean_logit arm weight learning_rate seed step loss logit_mean logit_std rounding_nats".split()
ARMS = {method: METHODS[method] for method in ("baseline", "mu_loss", "mu_centering", "z_loss", "softcap")}
ARMS |= {"float32_logits": {"logits_dtype": "float32"}, "float32_head": {}, "mu_centering_step": METHODS["mu_centering_step"]}


def rescue(options):
    """Runs the combinations that OUT/rescue.csv lacks, in this process, so that an arm is compiled once."""
    if unknown := [arm for arm in options.arms.split(",") if arm not in ARMS]:
        fail(f"there is no arm {unknown[0]!r} among {', '.join(ARMS)}")
    weights = numbers(options.weights) if options.weights else [""]
    if options.weights and not set(options.arms.split(",")) <= WEIGHTS.keys():
        fail(f"--weights belong to the arms {', '.join(WEIGHTS)}")
    drifts = [text if text == "0" else numbers(text)[0] for text in options.mean_logits.split(",")]
    model, config = load_model(options.checkpoint)
    check_can_drift(model, options.checkpoint)
    hidden, _ = hidden_of_run(model, config)
    table = options.out / "rescue.csv"
    lock(options.out, "writing", "out")
    check_same_rescue(options.out, model, options.steps)
    try:
        rows = list(csv.DictReader(io.StringIO(table.read_text()))) if table.exists() else []
    except OSError as error:
        fail(f"{table} cannot be read: {error.strerror}; choose another --out")
    there = {tuple(row[name] for name in COLUMNS[:5]) for row in rows}
    cells = product(options.arms.split(","), weights, options.learning_rates.split(","), drifts, options.seeds.split(","))
    cells = [(drift, arm, weight, rate, seed) for arm, weight, rate, drift, seed in cells]
    missing = [cell for cell in cells if cell not in there]
    print(f"{len(cells) - len(missing)} of {len(cells)} runs are there, {len(missing)} to run", flush=True)
    began, V, W = time.monotonic(), model.config.vocab_size, model.unembedding.weight.detach().clone()
    for number, (drift, arm, weight, rate, seed) in enumerate(missing, 1):
        try:
            model.unembedding.weight.data = transplant(W, hidden, float(drift), V) if drift != "0" else W
        except ValueError as error:
            fail(f"{options.checkpoint}: {error}")
        settings = ARMS[arm] | ({WEIGHTS[arm]: float(weight)} if weight else {})
        lines = continue_training(model, config, settings, arm == "float32_head", float(rate), int(seed), options)
        for line in lines:
            values = (drift, arm, weight, rate, seed, line["step"], line["cross_entropy"], line["logit_mean"], line["logit_std"], line["rounding_nats"])
            rows.append(dict(zip(COLUMNS, map(str, values))))
        write_csv(table, rows)
        left = (time.monotonic() - began) / number * (len(missing) - number)
        name = f"mean logit {drift}, {arm}{weight}, lr {rate}, seed {seed}"
        print(f"{number}/{len(missing)} {name}: loss {lines[-1]['cross_entropy']:.4f}, {timedelta(seconds=round(left))} left", flush=True)


def check_same_rescue(out: Path, model, steps: int):
    """Ends the program where the runs of OUT/rescue.csv started from other weights, or had another number of steps."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    now, path = json.dumps({"checksum of the weights": checksum, "steps": steps}) + "\n", out / "rescue.json"
    try:
        if not path.exists() and not (out / "rescue.csv").exists():
            write_whole(path, now.encode())
        if not path.exists() or path.read_bytes() != now.encode():
            fail(f"{out} holds runs of another checkpoint or another number of steps: choose another --out")
    except OSError as error:
        fail(f"{out} cannot be read or written: {error.strerror}; choose another --out")


def continue_training(model, config: dict, settings: dict, head: bool, rate: float, seed: int, options) -> list[dict]:
    """The validation lines of a run that starts with the model's weights; bfloat16, constant rate after 20 steps."""
    steps, every = options.steps, max(1, options.steps // 6)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder, "weights.pt"), model, config)
        names = "dataset data_dir vocab_size block_size n_layer n_head n_embd final_norm_gain batch_size beta1 beta2 adam_epsilon weight_decay grad_clip"
        settings = {name: config[name] for name in names.split() if name in config} | settings | {
            "micro_batch_size": config["batch_size"], "init_from": f"{folder}/weights.pt", "out_dir": f"{folder}/run",
            "dtype": "bfloat16", "learning_rate": rate, "min_learning_rate": rate, "warmup_steps": min(20, steps - 1),
            "max_steps": steps, "seed": seed, "eval_interval": every, "checkpoint_interval": every * steps,
            "eval_sequences": 128, "log_interval": steps, "compile": options.compile,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in settings.items()]
        with contextlib.redirect_stdout(io.StringIO()), unembedding_in_float32() if head else contextlib.nullcontext():
            run_config = train.load_config(words)
            try:
                train.Trainer(run_config, start_machine(run_config)).run()
            except SystemExit as end:
                if end.code == 3:
                    fail(f"the run with {' '.join(words)} diverged: leave its arm or its rate out")
                raise
        lines = read_metrics(Path(folder, "run"))
        lines = [line for line in lines if line["split"] == "val"]
        if not lines or lines[-1]["step"] < steps:
            fail("stopped; run the same command again to resume")
        for line in lines if head else ():
            line["rounding_nats"] -= line["cast_nats"]  # here W is not cast
        return lines


def read_rescue(words: list[str]):
    parser = argparse.ArgumentParser(prog="python -m tools.why rescue", description=rescue.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a ckpt_*.pt file, or a run's folder for its newest one")
    parser.add_argument("--mean_logits", default="588", help="drifts, 0 for none (default: %(default)s)")
    parser.add_argument("--arms", default="baseline,mu_loss,mu_centering,z_loss,softcap,float32_logits,float32_head", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--weights", default="", help="λ or cap of the arms (default: the method's)")
    parser.add_argument("--learning_rates", default="2e-3", help="(default: %(default)s)")
    parser.add_argument("--seeds", default="1", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--compile", choices=("True", "False"), default="True", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of rescue.csv")
    options = parser.parse_args(words)
    numbers(options.learning_rates)
    if options.steps < 2 or not all(seed.isdecimal() for seed in options.seeds.split(",")):
        fail("--steps must be at least 2, and --seeds whole numbers, like 1,2,3")
    torch._dynamo.config.cache_size_limit = 64  # each arm and weight has a graph of its own
    rescue(options)


# --- natural drift ----------------------------------------------------------------------------------

NATURAL_ARMS = ARMS | {"float32": {"dtype": "float32"}}
del NATURAL_ARMS["float32_head"]


def natural(words: list[str]):
    """One run of train.py after the other. The same command continues where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m tools.why natural", description=natural.__doc__, allow_abbrev=False)
    parser.add_argument("--arms", default="baseline,mu_centering,float32,float32_logits,mu_loss,z_loss,softcap", help=f"of {', '.join(NATURAL_ARMS)}")
    parser.add_argument("--seeds", default="1", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of natural.csv")
    options, settings = parser.parse_known_args(words)
    if unknown := [arm for arm in options.arms.split(",") if arm not in NATURAL_ARMS]:
        fail(f"there is no arm {unknown[0]!r} among {', '.join(NATURAL_ARMS)}")
    lock(options.out, "writing", "out")
    for arm, seed in product(options.arms.split(","), options.seeds.split(",")):
        folder = options.out / f"{arm}-seed{seed}"
        own = [f"--{name}={value}" for name, value in NATURAL_ARMS[arm].items()]
        command = [sys.executable, str(Path(train.__file__)), *settings, *own, f"--seed={seed}", f"--out_dir={folder}"]
        if status := subprocess.run(command).returncode:
            fail(f"{folder} ended with {status}: the same command tries it again")
        lines = [line["step"] for line in read_metrics(folder) if line["split"] == "val"]
        if not lines or lines[-1] < json.loads((folder / "config.json").read_text())["max_steps"]:
            fail(f"{folder} was stopped: the same command continues from here")
        runs = sorted(path.parent for path in options.out.glob("*-seed*/metrics.jsonl"))  # those of earlier commands too
        rows = [natural_rows(run, *run.name.split("-seed")) for run in runs]
        write_csv(options.out / "natural.csv", list(chain.from_iterable(rows)))
    print(options.out / "natural.csv")


def natural_rows(folder: Path, arm: str, seed: str) -> list[dict]:
    """The validation lines of a run, as rows of natural.csv: rescue.csv's columns."""
    lines = read_metrics(folder)
    peak = max((line["lr"] for line in lines if line["split"] == "train"), default=0)
    values = ("step", "cross_entropy", "logit_mean", "logit_std", "rounding_nats")
    validation = [line for line in lines if line["split"] == "val"]
    return [dict(zip(COLUMNS, ("natural", arm, "", peak, seed, *(line[name] for name in values)))) for line in validation]


VARIANTS = ("rescue", "natural", "float32_head", "row_sums", "sgd_row_sums")


def main():
    if "rescue" in sys.argv[1:2]:
        return read_rescue(sys.argv[2:])
    if "natural" in sys.argv[1:2]:
        return natural(sys.argv[2:])
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        raise SystemExit(0)
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        fail(f"the first word must be one of {', '.join(VARIANTS)}; settings follow")
    variant = sys.argv.pop(1)
    if "row_sums" in variant:
        train.Trainer = RowSumTrainer
    if variant == "sgd_row_sums":
        train.make_optimizers = make_sgd
    with unembedding_in_float32() if variant == "float32_head" else contextlib.nullcontext():
        train.main()


if __name__ == "__main__":
    main()

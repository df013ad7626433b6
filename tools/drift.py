"""How far a model's logits have drifted, what their rounding costs, and a drift of any size for a run of ours.

    python -m tools.drift out/RUN                                           drift and cost, on the run's validation data
    python -m tools.drift out/RUN --mean_logit 588 --out drifted.pt         the same function, its logits around 588
    python -m tools.drift out/RUN --curve --out curve                       loss against mean logit, by precision: csv and figure
    python -m tools.drift --published lr_sweep_16m_29m.csv                  the paper's runs: excess loss, rule and simulation
    python -m tools.drift FOLDER --text notes.txt                           a Hugging Face model's drift, on a text of yours
    python -m tools.drift FOLDER --text notes.txt --center OUT              and the same model without μ in its output embedding

Adding one vector to every row of W shifts all logits of a token alike, which the softmax does not see. With h̄ the mean
hidden state, W + c·h̄ᵀ/‖h̄‖² moves the mean logit by c and no probability, in exact arithmetic. What it does change
in low precision is the subject of results/why.md. OUT of --mean_logit is a checkpoint for train.py's --init_from.
"""

import argparse
import csv
import io
import math
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

import oec
from data.shards import dataset_folder, open_dataset
from runtime.checkpoint import checkpoints, save_weights, write_whole
from runtime.errors import fail, one_line
from runtime.unembedding import unembedding_loss
from tools.sample import load_model
from tools.sweep import read_sweep

MEAN_LOGITS = (0, 30, 92, 200, 300, 588, 850, 1152, 2000, 3000)
# What the curve compares: how the products are computed and the logits stored. (label, dtype, options of unembedding_loss)
ARMS = {
    "logits in bfloat16": (torch.bfloat16, {}),
    "logits in float16": (torch.float16, {}),
    "bfloat16 products, float32 logits": (torch.bfloat16, {"logits_dtype": torch.float32}),
    "float32": (torch.float32, {}),
    "centred, logits in bfloat16": (torch.bfloat16, {}),
    "soft-cap 30, float32": (torch.float32, {"soft_cap": 30.0}),
}


# --- a model's hidden states on real text -----------------------------------------------------------


def is_run(path: Path) -> bool:
    return path.suffix == ".pt" or path.is_dir() and bool(checkpoints(path))


@torch.no_grad()
def hidden_of_run(model, config: dict, tokens: int = 16_384) -> tuple[Tensor, Tensor]:
    """Final hidden states (N, d) and targets (N,) of a model of ours on the first validation windows of its run's data."""
    folder = dataset_folder(config["dataset"], config["data_dir"])
    if not folder.is_dir():
        fail(f"the run's data, {folder}, is not there: call this where the run was started")
    _, val = open_dataset(folder, config["block_size"], config["vocab_size"])
    windows = torch.from_numpy(val.read(np.arange(min(len(val), max(1, tokens // config["block_size"])))))
    hidden = []
    hook = model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    for batch in windows.split(16):
        model(batch[:, :-1])
    hook.remove()
    return torch.cat(hidden).flatten(0, 1), windows[:, 1:].flatten()


def load_hugging_face(folder: Path):
    """A causal language model and its tokenizer; ends the program for a folder that holds none."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        fail("Hugging Face folders need: pip install transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gguf = sorted(folder.glob("*.gguf"))
    options = {"gguf_file": gguf[0].name} if gguf and not (folder / "config.json").exists() else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a damaged or foreign folder can cause
        fail(f"{folder} is neither a run of ours nor a Hugging Face model with its tokenizer: {one_line(error)}")
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        fail(f"{folder} holds a {type(model).__name__}, which has no output embedding")
    if getattr(model.get_output_embeddings(), "bias", None) is not None or getattr(model.config, "logit_scale", None):
        fail(f"the logits of {folder} have a bias or a scale of their own, which this tool does not know")
    return model.eval(), tokenizer


def cap_of(model) -> float:
    """The soft-cap of a Hugging Face model's logits; 0 is off."""
    return getattr(model.config, "final_logit_softcapping", None) or 0.0


@torch.no_grad()
def hidden_of_hugging_face(model, tokenizer, text: Path, window: int = 512, tokens: int = 8_192) -> tuple[Tensor, Tensor]:
    """Final hidden states (N, d), as the output embedding gets them, and targets (N,) on a text."""
    try:
        words = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0][: tokens + 1]
    except Exception as error:  # a file that is not there or is not text, or that the tokenizer cannot take
        fail(f"{text} cannot be read as text by the model's tokenizer: {one_line(error)}")
    if len(words) < 2:
        fail(f"{text} holds fewer than two tokens: give a longer text")
    hidden, head = [], model.get_output_embeddings()
    window = min(window, getattr(model.config, "max_position_embeddings", None) or window)
    hook = head.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0][0]))
    for batch in words[:-1].split(window):
        logits = model(batch[None]).logits[0, -1]
    hook.remove()
    expected = oec.soft_cap(hidden[-1][-1] @ head.weight.T, cap_of(model))
    if not torch.allclose(logits, expected, rtol=0.0, atol=1e-3 * expected.abs().max().item()):
        fail(f"the logits of this {type(model).__name__} are not its hidden states times its output embedding: they have a scale or a bias, which this tool does not know")
    return torch.cat(hidden).float(), words[1:]


# --- what rounding costs ----------------------------------------------------------------------------


@torch.no_grad()
def loss_of(arm: str, hidden: Tensor, W: Tensor, targets: Tensor, vocab_size: int) -> float:
    dtype, options = ARMS[arm]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        embedding = oec.center(W, vocab_size) if arm.startswith("centred") else W
        return unembedding_loss(hidden, embedding, targets, vocab_size=vocab_size, **options).loss.item()


def print_diagnosis(name: str, hidden: Tensor, W: Tensor, targets: Tensor, vocab_size: int, soft_cap: float = 0.0):
    values = oec.diagnose(hidden, W, vocab_size)
    print(f"{name}: {len(targets):,} tokens, {vocab_size:,} × {W.shape[1]} output embeddings")
    for key, value in values.items():
        print(f"  {key:24s} {value:12.5g}")
    if soft_cap:
        return print(f"  its logits are soft-capped at {soft_cap:g}: the figures are those before the cap")
    exact = loss_of("float32", hidden, W, targets, vocab_size)
    print(f"  {'loss in float32':24s} {exact:12.5g}")
    for arm in ("logits in bfloat16", "centred, logits in bfloat16"):
        print(f"  {arm + ', excess':36s} {loss_of(arm, hidden, W, targets, vocab_size) - exact:.5f} nats")


# --- a drift, transplanted --------------------------------------------------------------------------


@torch.no_grad()
def transplant(W: Tensor, hidden: Tensor, mean_logit: float, vocab_size: int) -> Tensor:
    """W with one vector added to its real rows, so that the mean logit over `hidden` (N, d) is `mean_logit`.

    ValueError where the hidden states have no mean direction, as an untrained model's, or where W would overflow.
    """
    mean_hidden = hidden.double().mean(dim=0)  # h̄
    square = mean_hidden @ mean_hidden
    spread = (hidden.double() @ mean_hidden).std(correction=0) / square
    if not spread <= 1:
        raise ValueError(
            f"its hidden states share no direction (over tokens, a drift would have a standard deviation of {spread:.1f} times its mean): "
            "is the model trained?"
        )
    now = oec.mean_embedding(W, vocab_size).double() @ mean_hidden
    drifted = W.double().clone()
    drifted[:vocab_size] += (mean_logit - now) * mean_hidden / square
    if abs(mean_logit) > torch.finfo(W.dtype).max or not drifted.to(W.dtype).isfinite().all():
        raise ValueError(f"a mean logit of {mean_logit:g} overflows {W.dtype}")
    return drifted.to(W.dtype)


def check_can_drift(model, checkpoint: Path):
    if model.config.tie_weights:
        fail(f"{checkpoint} has tied weights: a drift of its output embedding would change its input embedding too")
    if model.config.logit_softcap:
        fail(f"{checkpoint} caps its logits (logit_softcap={model.config.logit_softcap:g}): a drift would change its function")


def drift(checkpoint: Path, mean_logit: float, out: Path):
    """Writes a checkpoint for --init_from: the same function under cross-entropy, its mean logit moved."""
    model, config = load_model(checkpoint)
    check_can_drift(model, checkpoint)
    if out.exists() or re.fullmatch(r"ckpt_\d+\.pt", out.name):
        fail(f"{out} is there already, or has the name of a run's checkpoint: choose another name")
    hidden, targets = hidden_of_run(model, config)
    V, W = model.config.vocab_size, model.unembedding.weight
    before = loss_of("float32", hidden, W, targets, V)
    try:
        W.data = transplant(W, hidden, mean_logit, V)
        save_weights(out, model, config)
    except ValueError as error:
        fail(f"{checkpoint}: {error}")
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror or error}")
    values = oec.diagnose(hidden, W, V)
    print(f"{out}: mean logit {values['logit_mean']:.1f} ± {values['token_mean_std']:.1f} over tokens, ‖μ‖ {values['mu_norm']:.3g}")
    for arm in ("float32", "logits in bfloat16"):
        print(f"loss with {arm}: {loss_of(arm, hidden, W, targets, V):.4f} (before the drift, in float32: {before:.4f})")
    print(f"start a run with it: python train.py --init_from={out} ...")


# --- the curve and the published runs ----------------------------------------------------------------


def curve(checkpoint: Path) -> list[dict]:
    """A row for each mean logit and arm: the loss minus that of the undrifted model in float32."""
    model, config = load_model(checkpoint)
    check_can_drift(model, checkpoint)
    hidden, targets = hidden_of_run(model, config)
    V, W = model.config.vocab_size, model.unembedding.weight.detach()
    exact, rows = loss_of("float32", hidden, W, targets, V), []
    for number, mean_logit in enumerate(MEAN_LOGITS, 1):
        try:
            drifted = transplant(W, hidden, mean_logit, V)
        except ValueError as error:
            fail(f"{checkpoint}: {error}")
        values = oec.diagnose(hidden, drifted, V)
        for arm in ARMS:
            excess = loss_of(arm, hidden, drifted, targets, V) - exact
            spread, rule = values["token_mean_std"], values["rounding_nats_bfloat16"]
            rows.append({"mean_logit": mean_logit, "token_mean_std": spread, "arm": arm, "excess": excess, "rounding_nats": rule})
        if sys.stderr.isatty():
            print(f"\r{number} of {len(MEAN_LOGITS)} mean logits", end="", file=sys.stderr, flush=True)
    return rows


def simulated_excess(mean_logit: float, token_mean_std: float, loss: float, vocab_size: int = 50257, tokens: int = 256) -> float:
    """What storing logits in bfloat16 costs, in nats, by simulation: no model, three published numbers.

    The logits of a token are drawn from a normal distribution whose width makes a calibrated model lose `loss` nats
    (ln V − width²/2), moved by a shift drawn around `mean_logit`, and rounded. Calibrated: targets follow the softmax.
    """
    generator, costs = torch.Generator().manual_seed(0), []
    width = math.sqrt(2 * max(0.0, math.log(vocab_size) - loss))
    for _ in range(-(-tokens // 32)):
        logits = width * torch.randn(32, vocab_size, generator=generator)
        shift = mean_logit + token_mean_std * torch.randn(32, 1, generator=generator)
        exact = torch.log_softmax(logits, dim=1)
        rounded = torch.log_softmax((logits + shift).bfloat16().float(), dim=1)
        costs.append((exact.exp() * (exact - rounded)).sum(dim=1))
    return torch.cat(costs).mean().item()


def ruled_excess(mean_logit: float, token_mean_std: float, logit_std: float) -> float:
    """`oec.rounding_nats`, averaged over tokens whose mean logits spread normally; `logit_std` is the spread within a token."""
    shift = mean_logit + token_mean_std * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    return oec.rounding_nats((shift.square() + logit_std**2).sqrt()).mean().item()


def published_rows(path: Path) -> list[dict]:
    """The paper's baselines with a mean logit above 10, beside μ-centering at the same size and learning rate."""
    rows = read_sweep(path)
    wanted = ("size", "logit_mean", "logit_std", "token_mean_std")
    if missing := [name for name in wanted if rows and name not in rows[0]]:
        fail(f"{path} has no column {missing[0]}: it is not a table of the paper's runs")
    centred = {(row["size"], row["learning_rate"]): row for row in rows if row["method"] in ("mucentering", "mu_centering")}
    found = []
    for row in rows:
        other = centred.get((row["size"], row["learning_rate"]))
        if row["method"] != "baseline" or not other or not row["token_mean_std"] or not float(row["logit_mean"]) > 10:
            continue
        mean, spread, within = (float(row[name]) for name in wanted[1:2] + wanted[3:] + wanted[2:3])
        loss = float(other["test_loss"])
        found.append({
            "size": row["size"], "learning_rate": row["learning_rate"], "mean_logit": mean, "token_mean_std": spread,
            "published_excess": float(row["test_loss"]) - loss, "rule": ruled_excess(mean, spread, within),
            "simulated": simulated_excess(mean, spread, loss),
        })  # fmt: skip
    if not found:
        fail(f"{path} holds no baseline with a mean logit above 10 beside a mu_centering run")
    return found


def print_published(rows: list[dict]):
    print("| size | learning rate | mean logit ± over tokens | published excess | rule | simulated |\n" + "| --- " * 6 + "|")
    for row in rows:
        drift = f"{row['mean_logit']:.0f} ± {row['token_mean_std']:.0f}"
        excess = " | ".join(f"{row[name]:.3f}" for name in ("published_excess", "rule", "simulated"))
        print(f"| {row['size']} | {row['learning_rate']} | {drift} | {excess} |")


def draw_curve(axis, rows: list[dict], published: list[dict]):
    """Excess loss against mean logit: one line per arm, the first-order rule, the paper's runs as points."""
    styles = {
        "logits in bfloat16": ("#222222", "o", "-"), "logits in float16": ("#0072b2", "^", "-."),
        "bfloat16 products, float32 logits": ("#d55e00", "s", "--"), "float32": ("#999999", None, "-"),
        "centred, logits in bfloat16": ("#009e73", "v", "-"), "soft-cap 30, float32": ("#cc79a7", "D", ":"),
    }  # fmt: skip
    for arm, (colour, marker, dashes) in styles.items():
        points = [(row["mean_logit"], max(row["excess"], 3e-5)) for row in rows if row["arm"] == arm and row["mean_logit"]]
        axis.plot(*zip(*points), color=colour, marker=marker, ls=dashes, ms=4, lw=1.3, label=arm)
    sizes = torch.logspace(1.3, 3.5, 400)
    axis.plot(sizes, oec.rounding_nats(sizes), color="#222222", lw=0.7, alpha=0.6, label="spacing² / 24 (bfloat16)")
    if published:
        points = [(row["mean_logit"], max(row["published_excess"], 3e-5)) for row in published]
        axis.plot(*zip(*points), "*", color="#e69f00", ms=11, mec="#222222", mew=0.5, label="the paper's baselines, published")
    axis.set(xscale="log", yscale="log", xlim=(25, 3500), ylim=(2e-5, 20), xlabel="mean logit", ylabel="loss − exact loss (nats)")
    axis.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3)


def write_csv(path: Path, rows: list[dict]):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror or error}")


def draw_and_write(rows: list[dict], published: list[dict], out: Path):
    from tools.plot import pyplot, save

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 4))
    draw_curve(axis, rows, published)
    save(figure, out)
    write_csv(out.with_suffix(".csv"), rows)


# --- Hugging Face -----------------------------------------------------------------------------------


def center_folder(model, tokenizer, folder: Path, out: Path):
    """Writes the model with μ subtracted from its output embedding: the same probabilities. Whole or not at all."""
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is inputs.weight:
        fail(f"{folder} has tied weights: centring the output embedding would change the input embedding too")
    if cap_of(model):
        fail(f"{folder} caps its logits: centring would change its function")
    if out.exists():
        fail(f"{out} is there already: choose another folder")
    oec.center_(head.weight)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            model.save_pretrained(Path(temporary, "whole"))
            tokenizer.save_pretrained(Path(temporary, "whole"))
            Path(temporary, "whole").rename(out)
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror or error}")
    print(f"{out}: the same probabilities, μ = 0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a ckpt_*.pt file, a run's folder for its newest one, or a Hugging Face folder")
    parser.add_argument("--mean_logit", type=float, help="add a drift, so that the mean logit of the stored W becomes this; needs --out")
    parser.add_argument("--curve", action="store_true", help="loss against mean logit; writes OUT.csv, OUT.png and OUT.svg")
    parser.add_argument("--published", type=Path, metavar="CSV", help="the paper's runs: printed as a table, or with --curve drawn as points")
    parser.add_argument("--text", type=Path, help="a text file, for a Hugging Face folder")
    parser.add_argument("--center", type=Path, metavar="OUT", help="write a Hugging Face folder with its output embedding centred")
    parser.add_argument("--out", type=Path, help="the file to write; with --curve without ending")
    options = parser.parse_args()
    if options.model is None:
        if not options.published:
            fail("name a checkpoint, a run's folder or a Hugging Face folder; or --published CSV")
        return print_published(published_rows(options.published))
    if not options.model.exists():
        fail(f"{options.model} does not exist: name a checkpoint, a run's folder or a Hugging Face folder")
    if (options.mean_logit is not None or options.curve) and not options.out:
        fail("say where to write: --out")
    if options.center and is_run(options.model):
        fail("--center is for Hugging Face folders; a run of ours is centred with --oec=mu_centering")
    if options.mean_logit is not None and not math.isfinite(options.mean_logit):
        fail(f"--mean_logit={options.mean_logit} must be a finite number")
    if not is_run(options.model):
        if options.mean_logit is not None or options.curve:
            fail(f"{options.model} is not a run of ours: --mean_logit and --curve need one")
        if not options.text:
            fail("a Hugging Face folder needs a text to read: --text FILE")
        model, tokenizer = load_hugging_face(options.model)
        hidden, targets = hidden_of_hugging_face(model, tokenizer, options.text)
        W = model.get_output_embeddings().weight
        print_diagnosis(str(options.model), hidden, W.detach(), targets, len(W), cap_of(model))
        if options.center:
            center_folder(model, tokenizer, options.model, options.center)
    elif options.mean_logit is not None:
        drift(options.model, options.mean_logit, options.out)
    elif options.curve:
        from tools.plot import pyplot

        pyplot()  # fails at once without matplotlib
        draw_and_write(curve(options.model), published_rows(options.published) if options.published else [], options.out)
    else:
        model, config = load_model(options.model)
        hidden, targets = hidden_of_run(model, config)
        W = model.output_embedding().detach()
        print_diagnosis(str(options.model), hidden, W, targets, model.config.vocab_size, model.config.logit_softcap)


if __name__ == "__main__":
    main()

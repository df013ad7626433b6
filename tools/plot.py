"""Figures: the paper's panels from a sweep.csv, curves over steps from runs, the geometry of checkpoints.

    python -m tools.plot out/sweep/sweep.csv --published published.csv --out results/sweep
    python -m tools.plot out/RUN_A out/RUN_B --out curves
    python -m tools.plot out/RUN_A out/RUN_B --curves mu_norm,stored_mu_norm --out curves
    python -m tools.plot scaling.json --out results/scaling
    python -m tools.plot --why curve.csv natural.csv --published published.csv --out results/why
    python -m tools.plot --geometry out/RUN/ckpt_0001000.pt model.safetensors --out geometry

Writes OUT.png and OUT.svg. Needs matplotlib; for .safetensors files and Hugging Face folders, safetensors.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

import oec
from data.shards import dataset_folder, open_dataset
from runtime.checkpoint import checkpoints, read_checkpoint
from runtime.errors import fail, one_line
from runtime.folder import read_metrics
from tools.drift import draw_curve, is_run, published_rows
from tools.sample import load_model
from tools.sweep import read_sweep, sensitivities

ROOT = Path(__file__).resolve().parents[1]
# (colour, marker, dashes) of each line: marker and dashes tell lines apart in print without colours.
STYLES = {
    "baseline": ("#222222", "o", "-"), "z_loss": ("#d55e00", "s", "--"), "softcap": ("#999999", "D", ":"),
    "mu_loss": ("#0072b2", "^", "-."), "mu_centering": ("#009e73", "v", "-"), "mu_centering_step": ("#cc79a7", "P", "--"),
}  # fmt: skip
PUBLISHED_NAMES = {"baseline": "baseline", "zloss": "z_loss", "muloss": "mu_loss", "mucentering": "mu_centering"}
PANELS = {
    "test_loss": "test loss (nats)", "lrs": "learning-rate sensitivity", "logit_mean": "logit mean", "logit_std": "logit standard deviation",
    "logit_absmax": "largest |logit|", "mu_norm": "‖μ‖",
}  # fmt: skip
CURVES = {
    "cross_entropy": "cross-entropy (nats)", "mu_norm": "‖μ‖", "logit_mean": "logit mean", "logit_std": "logit standard deviation",
    "logit_absmax": "largest |logit|", "grad_norm": "gradient norm", "stored_mu_norm": "‖μ‖ of the stored embeddings",
    "gradient_row_sum": "‖Σ of the gradient’s rows‖ / Σ ‖row‖", "update_row_sum": "‖Σ of the update’s rows‖ / Σ ‖row‖",
}  # fmt: skip
# Names of the output embedding in other people's files; the first one found is taken.
OUTPUT_EMBEDDINGS = (
    "unembedding.weight", "lm_head.weight", "embed_out.weight", "output.weight", "lm_head.embedding.weight",
    "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight",
)  # fmt: skip


def pyplot():
    try:
        import matplotlib
    except ImportError:
        fail("figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "svg.hashsalt": "nanoOEC"})
    return plt


def save(figure, out: Path):
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            figure.savefig(f"{out}.{kind}", dpi=160, bbox_inches="tight")
    except OSError as error:
        fail(f"{out}.png cannot be written: {error.strerror}")
    print(f"{out}.png and .svg")


def sweep_rows(path: Path, size: str) -> list[dict]:
    """Rows of a sweep of ours or of the published figures (of one size), methods under our names."""
    rows = [row for row in read_sweep(path) if row.get("size", size) == size]
    if not rows:
        fail(f"{path} holds no row to draw")
    return [row | {"method": PUBLISHED_NAMES.get(row["method"], row["method"])} for row in rows]


def lines_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by method; a method with several λ has one line per λ."""
    several = {m for m in {row["method"] for row in rows} if len({row.get("lambda") for row in rows if row["method"] == m}) > 1}
    lines = {}
    for row in rows:
        name = row["method"] + (f" {float(row['lambda']):g}" if row["method"] in several and row.get("lambda") else "")
        lines.setdefault(name, []).append(row)
    return lines


def by_rate(rows: list[dict], column: str) -> dict[float, list[float]]:
    """learning rate → the values of all seeds, cells without a value left out."""
    values = {}
    for row in rows:
        if row.get(column):
            values.setdefault(float(row["learning_rate"]), []).append(float(row[column]))
    return dict(sorted(values.items()))


def draw_sweep(rows: list[dict], published: list[dict], out: Path):
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2))
    for (column, label), axis in zip(PANELS.items(), axes.flat):
        axis.set_title(label, loc="left", fontsize=9)
        for source, is_ours in ((rows, True), (published, False)):
            for place, (name, mine) in enumerate(lines_of(source).items()):
                colour, marker, dashes = STYLES.get(name.split()[0], ("#555555", "x", "-"))
                if " " in name:  # one of several λ
                    marker = "os^vDPX<>"[place % 9]
                if not is_ours:
                    colour, marker, dashes = colour, None, (0, (1, 2))
                if column == "lrs":
                    if values := sensitivities(mine):
                        value = statistics.median(values)
                        axis.barh(name + ("" if is_ours else "\n(published)"), value, color=colour, alpha=1 if is_ours else 0.35)
                        axis.text(value, name + ("" if is_ours else "\n(published)"), f" {value:.3f}", va="center", fontsize=7)
                    continue
                if not (values := by_rate(mine, column)):
                    continue
                middle = [statistics.median(v) for v in values.values()]
                axis.plot(list(values), middle, color=colour, marker=marker, ls=dashes, ms=4, lw=1.3, label=name if is_ours else f"{name}, published")
                if is_ours:
                    axis.fill_between(list(values), [min(v) for v in values.values()], [max(v) for v in values.values()], color=colour, alpha=0.15, lw=0)
        if column == "lrs":
            axis.invert_yaxis()
            axis.tick_params(axis="y", labelsize=7)
            continue
        if not axis.lines:  # no row has this column
            axis.set_axis_off()
            continue
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        if column in ("mu_norm", "logit_absmax"):
            axis.set_yscale("log")
        if column == "logit_mean":
            axis.set_yscale("symlog", linthresh=1)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    save(figure, out)


def draw_curves(folders: list[Path], names: list[str], out: Path):
    """The columns `names` of metrics.jsonl over tokens. An axis is logarithmic if all its values are positive; the loss's never is."""
    plt = pyplot()
    n_columns = min(3, len(names))
    n_rows = -(-len(names) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(3.7 * n_columns, 3.1 * n_rows), squeeze=False)
    smallest = dict.fromkeys(names, math.inf)
    for place, folder in enumerate(folders):
        try:
            lines = read_metrics(folder)
        except OSError as error:
            fail(f"{folder} holds no run that can be read: {error}")
        colour, marker, dashes = list(STYLES.values())[place % len(STYLES)]
        for name, axis in zip(names, axes.flat):
            for split in ("train", "val"):
                points = [(x["tokens"], x[name]) for x in lines if x["split"] == split and x.get(name) is not None]
                if points:
                    smallest[name] = min(smallest[name], *(value for _, value in points))
                    style = {"ls": dashes, "lw": 0.8} if split == "train" else {"ls": "none", "marker": marker, "ms": 4}
                    axis.plot(*zip(*points), color=colour, label=f"{folder.name}" if split == "train" else None, **style)
            axis.set_title(CURVES.get(name, name), loc="left", fontsize=9)
            axis.set_xlabel("tokens")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes.flat):
        if smallest[name] == math.inf:
            fail(f"no run has {name!r} in its metrics.jsonl")
        if smallest[name] > 0 and name != "cross_entropy":
            axis.set_yscale("log")
    axes[0][0].legend(fontsize=7, title="lines: train, marks: validation", title_fontsize=7)
    figure.tight_layout()
    save(figure, out)


def draw_why(curve: Path, runs: Path, published: Path | None, out: Path):
    """results/why.md's figures. Left: the cost of a drift, by precision (tools.drift --curve). Right: loss over steps, by arm.
    natural.csv of tools.why gives one line per seed; rescue.csv the median and range over seeds. Only runs with the most frequent
    drift and learning rate are drawn."""
    rows, points = read_table(curve, ("mean_logit", "excess")), published_rows(published) if published else []
    lines = [row for row in read_table(runs, ("step", "loss")) if not row["weight"] and row["mean_logit"] != "0"]
    undrifted = [float(row["loss"]) for row in read_table(runs, ("step", "loss")) if row["mean_logit"] == "0"]
    if not lines:
        fail(f"{runs} holds no run with a drift")
    drift, rate = (statistics.mode(row[name] for row in lines) for name in ("mean_logit", "learning_rate"))
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4))
    left.set_title("what a drift costs, by precision (transplanted into a trained model)", loc="left", fontsize=9)
    draw_curve(left, [row | {"mean_logit": float(row["mean_logit"]), "excess": float(row["excess"])} for row in rows], points)
    extra = {"float32_logits": ("#d55e00", "X", "-."), "float32_head": ("#222222", "*", ":"), "float32": ("#888888", "*", "-")}
    labels = {"float32_logits": "baseline, float32 logits", "float32_head": "baseline, float32 head", "float32": "baseline, float32"}
    for arm, (colour, marker, dashes) in (STYLES | extra).items():
        values = {}  # step → seed → loss
        for row in lines:
            if (row["mean_logit"], row["learning_rate"], row["arm"]) == (drift, rate, arm):
                values.setdefault(int(row["step"]), {})[row["seed"]] = float(row["loss"])
        if not values:
            continue
        style = {"color": colour, "ls": dashes, "lw": 1.1}
        if drift == "natural":
            for number, seed in enumerate(next(iter(values.values()))):
                right.plot(list(values), [v[seed] for v in values.values()], label=labels.get(arm, arm) if number == 0 else None, **style)
        else:
            right.plot(list(values), [statistics.median(v.values()) for v in values.values()], marker=marker, ms=4, label=labels.get(arm, arm), **style)
            right.fill_between(list(values), *([f(v.values()) for v in values.values()] for f in (min, max)), color=colour, alpha=0.15, lw=0)
    if undrifted:
        right.axhline(undrifted[-1], color="#888888", lw=0.8, ls="--", label="baseline, never drifted, at the end")
        right.set_ylim(top=1.2 * max(float(row["loss"]) for row in lines if row["step"] == lines[-1]["step"] and row["mean_logit"] == drift))
    what = "logits drift by themselves (bfloat16 unless named)" if drift == "natural" else f"trained further in bfloat16 from a mean logit of {drift}"
    right.set_title(what, loc="left", fontsize=9)
    right.set(xlabel="step", ylabel="validation loss (nats)")
    right.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=4)
    figure.tight_layout()
    save(figure, out)


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a csv file; ends the program where one of the columns is missing or no number."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        for row in rows:
            for name in columns:
                float(row[name])
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError, csv.Error) as error:
        fail(f"{path} is not a table with the columns {', '.join(columns)}: {one_line(error)}")
    return rows


def draw_scaling(path: Path, out: Path):
    """Speed and memory of a step against each size that `tools.bench --parts scaling --json` went through, log–log."""
    try:
        rows = json.loads(path.read_text())["scaling"]
        sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
        points = {sweep: [row for row in rows if row["sweep"] == sweep] for sweep in sweeps}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} holds no figures of tools.bench --parts scaling: {one_line(error)}")
    plt = pyplot()
    figure, axes = plt.subplots(2, len(sweeps), figsize=(2.8 * len(sweeps), 5), sharey="row", squeeze=False)
    for column, (sweep, mine) in enumerate(points.items()):
        sizes = [row["size"] for row in mine]
        speeds = [[row["tokens_per_second"] * statistics.median(row["seconds"]) / s for s in row["seconds"]] for row in mine]
        axes[0][column].plot(sizes, [row["tokens_per_second"] for row in mine], "o-", color="#222222", ms=4)
        axes[0][column].fill_between(sizes, [min(s) for s in speeds], [max(s) for s in speeds], color="#222222", alpha=0.15, lw=0)
        if all("bytes" in row for row in mine):
            axes[1][column].plot(sizes, [row["bytes"] / 2**20 for row in mine], "s--", color="#222222", ms=4)
        for axis, label in ((axes[0][column], "tokens per second"), (axes[1][column], "peak memory of a step (MiB)")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7, rotation=45)
            axis.set_xlabel(sweep)
            if column == 0:
                axis.set_ylabel(label)
        if not all("bytes" in row for row in mine):
            axes[1][column].set_visible(False)
    figure.tight_layout()
    save(figure, out)


def output_embedding(path: Path) -> tuple[torch.Tensor, int]:
    """The output embedding of a checkpoint of ours, a .safetensors file or a Hugging Face folder; and its real rows."""
    if path.is_dir() and checkpoints(path):
        path = checkpoints(path)[-1]
    if path.suffix == ".pt":
        try:
            state = read_checkpoint(path)
        except ValueError as error:
            fail(str(error))
        return state["model"]["unembedding.weight"], state["config"]["vocab_size"]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" or not file.is_file() for file in files):
        fail(f"{path} is neither a checkpoint of nanoOEC nor a .safetensors file nor a folder that holds one")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        fail("reading .safetensors files needs: pip install safetensors")
    try:
        for name in OUTPUT_EMBEDDINGS:
            for file in files:
                with safe_open(file, "pt") as tensors:
                    if name in tensors.keys():
                        W = tensors.get_tensor(name).float()
                        return W, W.shape[0]
    except (SafetensorError, OSError) as error:
        fail(f"{path} cannot be read: {error}")
    fail(f"{path} holds no output embedding under any of the names {', '.join(OUTPUT_EMBEDDINGS)}")


def run_outputs(path: Path):
    """Final hidden states of our model on its first validation windows, unembedding, targets, and the loss's options."""
    model, config = load_model(path)
    folder = dataset_folder(config["dataset"], config["data_dir"])
    if not folder.is_dir():
        return print(f"{path}: no statistics of logits, because the run's data, {folder}, is not there")
    _, val = open_dataset(folder, config["block_size"], config["vocab_size"])
    tokens = torch.from_numpy(val.read(np.arange(min(16, len(val)))))
    hidden = []
    model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model(tokens[:, :-1])
    options = {"vocab_size": model.config.vocab_size, "soft_cap": model.config.logit_softcap}
    return hidden[0].flatten(0, 1), model.unembedding.weight, tokens[:, 1:].flatten(), options


def hugging_face_outputs(path: Path):
    """The same of a folder with a causal language model and its tokenizer, on this project's README."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        words = AutoTokenizer.from_pretrained(path)((ROOT / "README.md").read_text())["input_ids"]
    except ImportError:
        return print(f"{path}: no statistics of logits without: pip install transformers")
    except (OSError, ValueError, KeyError) as error:
        return print(f"{path}: no statistics of logits, which need a whole model with its tokenizer: {one_line(error)}")
    tokens = torch.tensor(words[: min(1024, getattr(model.config, "max_position_embeddings", 1024))])
    hidden = model(tokens[None, :-1], output_hidden_states=True).hidden_states[-1][0]  # after the last norm
    options = {"soft_cap": getattr(model.config, "final_logit_softcapping", None) or 0.0}
    return hidden, model.get_output_embeddings().weight, tokens[1:], options


@torch.no_grad()
def logit_statistics(path: Path) -> list[dict[str, float]]:
    """Mean, deviation and largest magnitude of a model's logits on real text, as stored and centred; nothing for a bare
    file of weights, and where the text or a package is missing."""
    outputs = run_outputs(path) if is_run(path) else hugging_face_outputs(path) if path.is_dir() else None
    if outputs is None:
        return [{}, {}]
    hidden, W, targets, options = outputs
    both = [oec.unembedding_loss(hidden, w, targets, **options)._asdict() for w in (W, oec.center(W, options.get("vocab_size")))]
    return [{name: parts[name].item() for name in ("logit_mean", "logit_std", "logit_absmax")} for parts in both]


def draw_geometry(paths: list[Path], out: Path):
    plt = pyplot()
    table = {}
    for path in paths:
        W, V = output_embedding(path)
        stored, centred = (oec.geometry(w, V) | logits for w, logits in zip((W, oec.center(W.double(), V)), logit_statistics(path)))
        table[path] = stored, centred
        print(f"{path}: {V:,} × {W.shape[1]}")
        for name in stored:
            print(f"  {name:12s} {stored[name]:12.5g}   centred {centred[name]:12.5g}")
    names = list(dict.fromkeys(name for stored, _ in table.values() for name in stored))
    figure, axes = plt.subplots(1, len(names), figsize=(2.2 * len(names), 0.5 + 0.6 * len(table)), sharey=True)
    for name, axis in zip(names, axes):
        for place, (before, after) in enumerate(table.values()):
            axis.barh(place - 0.2, before.get(name, 0), 0.36, color="#222222", label="as stored" if place == 0 else None)
            axis.barh(place + 0.2, after.get(name, 0), 0.36, color="white", edgecolor="#222222", hatch="///", label="centred" if place == 0 else None)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_yticks(range(len(table)), [f"{path.parent.name}/{path.name}" for path in table], fontsize=7)
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    save(figure, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="a sweep.csv, or folders of runs, or a bench's scaling .json, or with --geometry checkpoints")
    parser.add_argument("--geometry", action="store_true", help="print and draw the geometry of output embeddings, as stored and centred")
    parser.add_argument("--why", action="store_true", help="the figure of results/why.md, from the csv files of tools.drift and tools.why")
    parser.add_argument("--curves", default=",".join(list(CURVES)[:6]), help="columns of metrics.jsonl to draw (default: %(default)s)")
    parser.add_argument("--published", type=Path, help="a csv of published figures to draw beside a sweep's")
    parser.add_argument("--size", default="16M", help="which size of the published ones (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("figure"), help="files to write, without ending (default: %(default)s)")
    options = parser.parse_args()
    if missing := [path for path in options.inputs if not path.exists()]:
        fail(f"there is no {missing[0]}")
    if options.why:
        if len(options.inputs) != 2:
            fail("--why takes two files: the csv of tools.drift --curve and the rescue.csv or natural.csv of tools.why")
        draw_why(*options.inputs, options.published, options.out)
    elif options.geometry:
        draw_geometry(options.inputs, options.out)
    elif options.inputs[0].suffix == ".csv":
        rows = sweep_rows(options.inputs[0], options.size)
        beside = sweep_rows(options.published, options.size) if options.published else []
        draw_sweep(rows, [row for row in beside if (row.get("lambda") or "") in ("", "1e-04")], options.out)
    elif options.inputs[0].suffix == ".json":
        draw_scaling(options.inputs[0], options.out)
    else:
        draw_curves(options.inputs, options.curves.split(","), options.out)


if __name__ == "__main__":
    main()

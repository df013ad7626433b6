"""Train a GPT with Output Embedding Centering, with another remedy against drifting logits, or with none.

    torchrun train.py config/oec.py                                 the main job, one process
    torchrun --nproc_per_node=8 train.py config/oec.py              the same run on eight GPUs
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import oec
from data.shards import Loader, TokenWindows, dataset_folder, open_dataset, permute, prepare_built_in, samples_of_process
from model import ARCHITECTURE, GPT, METHODS, METRICS, WEIGHTS, GPTConfig, check_model_config
from runtime.checkpoint import find_checkpoint, load_weights, restore, state_of
from runtime.errors import end_cleanly, fail
from runtime.folder import RunFolder, diverged, first_line, log_line, open_out_dir, run_name, way_back
from runtime.machine import Machine, StopRequest, average, errors_for_people, start_machine
from runtime.settings import check_settings, print_help, read_settings
from runtime.sharding import shard, whole

# --- settings ------------------------------------------------------------------------------------


@dataclass
class TrainConfig(GPTConfig):
    """Every setting. The defaults are the main job: GPT-2's smallest size on OpenWebText, with nanoGPT's batch and schedule."""

    # data and output
    dataset: str = "openwebtext"  # a folder of data/ with train and val shards
    data_dir: str = ""  # another folder of shards, anywhere; empty: data/<dataset>
    out_dir: str = ""  # where the run goes; empty: out/<a name made of the settings>
    resume: str = "auto"  # auto: from the newest checkpoint of out_dir; never; or the path of a checkpoint
    init_from: str = ""  # a checkpoint that gives a new run its weights, and nothing else; empty: random weights

    # batch and schedule; a step is one update of the weights
    batch_size: int = 480  # sequences in a step, over all processes
    micro_batch_size: int = 12  # sequences in one forward and backward pass of one process
    max_steps: int = 600_000  # steps of the whole run
    learning_rate: float = 6e-4  # peak
    min_learning_rate: float = 6e-5  # at the last step
    warmup_steps: int = 2_000  # steps of linear warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: a cosine, or constant and then linear (wsd)
    decay_fraction: float = 0.2  # the share of max_steps in which wsd decays

    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the blocks' matrices, and AdamW on the rest
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.95  # decay of AdamW's second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # of matrices and embeddings; the norms' weights have none
    grad_clip: float = 1.0  # largest gradient norm; 0 is off

    # what is reported and kept
    log_interval: int = 10  # steps between log lines
    eval_interval: int = 1_000  # steps between evaluations; 0: only at the end
    eval_sequences: int = 480  # validation windows of an evaluation, always the same ones
    checkpoint_interval: int = 0  # steps between checkpoints, a multiple of eval_interval; 0: at every evaluation
    tensorboard: bool = False  # show metrics.jsonl in TensorBoard too: tensorboard --logdir out
    wandb_project: str = ""  # show it in this project of Weights & Biases too; empty: off

    # the machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: bool = True  # torch.compile the model
    deterministic: bool = False  # the same bits on every run on a GPU, somewhat slower; a CPU gives them anyway
    seed: int = 1337  # of the initial weights and of the order of samples
    shard: bool = False  # share out weights, gradients and moments over the processes (FSDP2), for a model that one GPU cannot hold
    shard_size: int = 0  # how many processes hold one copy of the model; 0: all

    # faults
    max_bad_steps: int = 20  # steps in a row with a non-finite loss or gradient before the run stops
    stop_on_write_error: bool = False  # stop when a checkpoint or metrics line cannot be written; False: continue


# A checkpoint can be resumed only with the same values of these.
IDENTITY = (*ARCHITECTURE, "block_size", "final_norm_gain", "batch_size", "seed")


def load_config(argv: list[str]) -> TrainConfig:
    """`[FILE.py ...] [--key=value ...]`, left to right, the last word wins. A mistake ends the program (exit 2)."""
    if "--help" in argv or "-h" in argv:
        print_help(__doc__, GPTConfig, TrainConfig)
    config = TrainConfig(**read_settings(TrainConfig, argv))
    check_settings(config)
    try:
        check_model_config(config)
    except ValueError as error:
        fail(str(error))
    return config


# --- optimizers and the schedule -----------------------------------------------------------------


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW: matrices and embeddings decay, the norms' weights do not. With `muon`, Muon updates the blocks' matrices.

    You can return any optimizers, fused or not. Give each group its peak rate as `lr`: the schedule is one factor for all.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers = []
    if config.optimizer == "muon":
        # Query, key and value are one matrix (3d, d), and it is orthogonalised as one. "match_rms_adamw" gives an update
        # the size of AdamW's, so that one learning rate serves both (Liu et al., arXiv 2502.16982).
        in_blocks = [p for p in model.blocks.parameters() if p.ndim == 2]
        optimizers += [torch.optim.Muon(in_blocks, config.learning_rate, config.weight_decay, adjust_lr_fn="match_rms_adamw")]
        matrices = [p for p in matrices if all(p is not q for q in in_blocks)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = config.beta1, config.beta2
    return [*optimizers, torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_epsilon, fused=True)]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step `step`, counted from 0: a linear warm-up to the peak, then down to the minimum at the last."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    progress = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd":  # warm-up, stable, decay (Hu et al., arXiv 2404.06395)
        height = min(1.0, max(0.0, (last - step) / (config.decay_fraction * config.max_steps)))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)


# --- evaluation ----------------------------------------------------------------------------------


def evaluate(model, val: TokenWindows, config: TrainConfig, machine: Machine, stop: StopRequest) -> dict[str, float]:
    """Averages over the same validation windows each time; {} if a request to stop cuts it short. A compiled model that
    is not sharded keeps gradients enabled: without them it would be compiled again, which takes longer."""
    windows = permute(np.arange(min(config.eval_sequences, len(val))), len(val), key=0)
    batches = [windows[at : at + config.micro_batch_size] for at in range(0, len(windows), config.micro_batch_size)]
    mine = [(len(batch), batch) for batch in batches[machine.rank :: machine.world_size]]
    mine += [(0, batches[0])] * (math.ceil(len(batches) / machine.world_size) - len(mine))
    model.eval()  # matters for layers like dropout; `evaluate_and_save` sets it back
    passes = []
    for weight, batch in mine:
        if stop.agreed():
            return {}
        tokens = torch.from_numpy(val.read(np.resize(batch, config.micro_batch_size))).to(machine.device)
        targets = tokens.clone()[:, 1:]  # strides as in training, or it would be compiled again
        targets[len(batch) :] = -1  # a short last batch keeps its shape, so nothing is compiled for it
        with torch.set_grad_enabled(config.compile and not config.shard), machine.autocast():
            passes.append((weight, model(tokens[:, :-1], targets)[1]))
    return {name: value.item() for name, value in average(passes, METRICS, machine).items()}


@torch.no_grad()
def mu_metrics(model: GPT, dtype: torch.dtype) -> dict[str, float]:
    """mu_norm: ‖μ‖ of the embeddings that the logits are computed with; mean_norm: mean ‖e_i‖; mu_ratio: their quotient;
    stored_mu_norm: ‖μ‖ of the stored weight; cast_nats: the cost of casting W, Σ_k g_k² mean_i spacing(e_ik)² / 24 (the last norm's gain g_k in place of h_k)."""
    V, W, gain = model.config.vocab_size, whole(model.output_embedding()), whole(model.final_norm.weight)
    if model.config.logits_dtype == "float32" and not model.config.fused_unembedding:
        dtype = torch.float32  # the plain loss computes the whole product in it
    mu_norm = oec.mean_embedding(W, V).norm()
    mean_norm = W[:V].norm(dim=1).mean()
    cast_nats = (gain.square() * oec.rounding_nats(W[:V], dtype).mean(dim=0)).sum()
    values = mu_norm, mu_norm / mean_norm, mean_norm, oec.mean_embedding(model.unembedding.weight, V).norm(), cast_nats
    return dict(zip(("mu_norm", "mu_ratio", "mean_norm", "stored_mu_norm", "cast_nats"), torch.stack(values).tolist()))


# --- the run -------------------------------------------------------------------------------------


class Trainer:
    """The state of a run. `Trainer(config, machine).run()` trains; `update` is one step."""

    def __init__(self, config: TrainConfig, machine: Machine):
        self.config, self.machine = config, machine
        self.out_dir, path, damaged = Path(config.out_dir or f"out/{run_name(config, METHODS, WEIGHTS)}"), None, {}
        folder = dataset_folder(config.dataset, config.data_dir)
        with machine.together():
            if machine.rank == 0:
                prepare_built_in(folder)
        self.train_data, self.val_data = open_dataset(folder, config.block_size, config.vocab_size)
        self.fingerprint = {"train": self.train_data.fingerprint(), "val": self.val_data.fingerprint()}
        with machine.together():
            if machine.rank == 0:
                path, damaged = find_checkpoint(self.out_dir, open_out_dir(self.out_dir, config.resume))
        path = machine.broadcast(path)
        self.stop = StopRequest(machine)  # until here, a signal ends the program at once

        torch.manual_seed(config.seed)
        self.model = GPT(config)  # without wrappers: for saving and counting
        self.model = shard(self.model, config, machine) if config.shard else self.model.to(machine.device)
        self.optimizers = make_optimizers(self.model, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # its peak
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.step, self.evaluated_step, self.best_loss, self.best_step = 0, 0, math.inf, 0
        self.bad_steps, self.bad_in_row, self.first_bad = 0, 0, {}  # skipped steps: how many, how many in a row now, metrics of the row's first
        if path:
            restore(self, path, IDENTITY)
        elif config.init_from:
            load_weights(self.model, Path(config.init_from), asdict(config), ARCHITECTURE)
            machine.say(f"starting with the weights of {config.init_from}")
        with machine.together():
            if machine.rank == 0 and not self.is_done():
                self.folder = RunFolder(self.out_dir, config, self.step, self.evaluated_step, damaged)
        # Two wrappers around the same parameters: one is compiled, the other averages gradients over the processes.
        self.compiled = torch.compile(self.model) if config.compile else self.model
        is_copied = machine.world_size > 1 and not config.shard
        self.parallel = DistributedDataParallel(self.compiled, broadcast_buffers=False) if is_copied else self.compiled

    def update(self, batches) -> dict[str, Tensor]:
        """One step: this process's share of the batch forward and backward, then the optimizers. Returns the averaged metrics."""
        config, machine = self.config, self.machine
        n_passes = config.batch_size // (config.micro_batch_size * machine.world_size)
        passes = []
        for i in range(n_passes):
            tokens, targets = next(batches)  # (micro_batch_size, block_size) each
            # Gradients are averaged over the processes once a step, during the last backward pass.
            accumulates = machine.world_size > 1 and i < n_passes - 1
            if config.shard:
                self.model.set_requires_gradient_sync(not accumulates)
            with self.parallel.no_sync() if accumulates and not config.shard else nullcontext():
                with machine.autocast():
                    loss, metrics = self.parallel(tokens, targets)
                self.scaler.scale(loss / n_passes).backward()
            passes.append((1, metrics))
        metrics = average(passes, METRICS, machine)

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf))
        metrics["grad_norm"] = grad_norm.double()
        # bool() waits for the device: once a step. If one process has a NaN, all skip the step.
        is_bad = machine.any(not bool(metrics["loss"].isfinite() & grad_norm.isfinite()))
        if is_bad:
            self.bad_steps, self.bad_in_row = self.bad_steps + 1, self.bad_in_row + 1
            if self.bad_in_row == 1:
                self.first_bad = {"step": self.step + 1} | {name: value.item() for name, value in metrics.items()}
        else:
            self.bad_in_row = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, self.step) * (group["initial_lr"] / config.learning_rate)
                optimizer.step()
            self.model.after_step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return metrics

    def log(self, metrics: dict[str, Tensor], tokens_per_second: float, seconds_left: float):
        """A line for people and one for metrics.jsonl, of this step alone."""
        config, machine = self.config, self.machine
        values = {name: value.item() for name, value in metrics.items()} | mu_metrics(self.model, machine.dtype)
        values |= {"lr": learning_rate(config, self.step - 1), "bad_steps": self.bad_steps, "tokens_per_second": tokens_per_second}
        values["mfu"] = tokens_per_second * self.model.flops_per_token() / (machine.peak_flops * machine.world_size)
        self.write_metrics("train", values)
        has_drifted = values["rounding_nats"] >= 0.01 and abs(values["logit_mean"]) > values["logit_std"]  # a common shift, which centring removes
        is_advised = has_drifted and values["cross_entropy"] < math.log(config.vocab_size) and "centering" not in config.oec
        advice = f": resume with --oec=mu_centering --out_dir={self.out_dir}" if is_advised and not config.z_loss_weight else ""  # centring would change the z-loss
        machine.say(f"step {self.step}/{config.max_steps} | {log_line(values, advice, seconds_left)}")

    def write_metrics(self, split: str, values: dict):
        tokens = self.step * self.config.batch_size * self.config.block_size
        values["rounding_nats"] += values["cast_nats"]  # the rounding of the logits and that of W
        with self.machine.together():
            if self.machine.rank == 0:
                self.folder.write_metrics(split, self.step, {"tokens": tokens, **values})

    def is_evaluation_due(self) -> bool:
        interval = self.config.eval_interval
        is_due = self.step == self.config.max_steps or self.step > 0 and interval and self.step % interval == 0
        return is_due and self.evaluated_step < self.step

    def is_done(self) -> bool:
        return self.step >= self.config.max_steps and not self.is_evaluation_due()

    def evaluate_and_save(self) -> bool:
        """What is due after this step; True on a request to stop. The resumed run makes up for an evaluation that is cut short."""
        config, machine = self.config, self.machine
        is_last, save_interval = self.step == config.max_steps, config.checkpoint_interval or config.eval_interval
        # While steps are skipped, no periodic checkpoint replaces an earlier, healthy one.
        is_save = is_last or save_interval and self.step % save_interval == 0 and not self.bad_in_row
        best_before = self.best_loss, self.best_step
        if self.is_evaluation_due() and (values := evaluate(self.compiled, self.val_data, config, machine, self.stop)):
            self.compiled.train()
            values |= mu_metrics(self.model, machine.dtype)
            if is_save and values["cross_entropy"] < self.best_loss:
                self.best_loss, self.best_step = values["cross_entropy"], self.step
            self.write_metrics("val", values)
            machine.say(f"step {self.step}/{config.max_steps} | validation loss {values['cross_entropy']:.4f}")
            self.evaluated_step = self.step
            if is_last and not math.isfinite(values["cross_entropy"]):
                machine.say(f"diverged: the last validation loss is not finite. {way_back(self)}")
                raise SystemExit(3)
        is_stopping = self.stop.agreed()
        if is_save or is_stopping:
            state = state_of(self)  # on all processes, since each holds a part of a sharded model
            with machine.together():
                if machine.rank == 0 and not self.folder.save(state, must=is_last or is_stopping):
                    self.best_loss, self.best_step = best_before
        return is_stopping

    def run(self):
        config, machine = self.config, self.machine
        if self.is_done():
            return machine.say(f"{self.out_dir} has its {config.max_steps} steps already: nothing to do")
        machine.say(first_line(self))
        samples = samples_of_process(self.step, config.max_steps, config.batch_size, config.micro_batch_size, machine.rank, machine.world_size)
        loader = Loader(self.train_data, samples, config.seed, machine.device)
        batches = iter(loader)
        first_step = self.step
        is_stopping = self.is_evaluation_due() and self.evaluate_and_save()
        while self.step < config.max_steps and not is_stopping:
            metrics = self.update(batches)
            is_last = self.step == config.max_steps
            if self.step == first_step + 1:  # the first step compiles, so the clock starts after it
                began = logged_at = time.monotonic()
                logged_step = self.step

            # once in a while: a log line
            if is_last or self.step % config.log_interval == 0 or self.step == 1 or self.bad_in_row == config.max_bad_steps:
                now = time.monotonic()
                tokens = (self.step - logged_step) * config.batch_size * config.block_size
                pace = (now - began) / max(1, self.step - first_step - 1)
                self.log(metrics, tokens / max(now - logged_at, 1e-9), (config.max_steps - self.step) * pace)
                logged_step, logged_at = self.step, time.monotonic()
            if self.bad_in_row == config.max_bad_steps:
                machine.say(diverged(self, mu_metrics(self.model, machine.dtype)["stored_mu_norm"]))
                raise SystemExit(3)

            # once in a while: evaluate and save
            paused_at = time.monotonic()
            is_stopping = self.evaluate_and_save()
            logged_at += time.monotonic() - paused_at  # the pause does not count as training
        loader.close()
        machine.say(f"{'done' if self.is_done() else 'stopped'} at step {self.step}: {self.out_dir}")


def main():
    end_cleanly()
    config = load_config(sys.argv[1:])
    machine = start_machine(config)
    with errors_for_people(config.shard):
        Trainer(config, machine).run()
    if machine.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

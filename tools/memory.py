"""How much memory a training step needs, from the settings alone, and how large a micro-batch fits where.

    python -m tools.memory config/gpt2_124m.py config/paper_221m.py
    python -m tools.memory config/gpt2_124m.py --n_layer=48 --activation_checkpointing=True

Each config file gets a row as it is, and one with activation checkpointing. Settings apply to all files. The table counts
tensors: 16 bytes per parameter, the activations that the backward pass needs, the unembedding. It does not count the CUDA
context and the gaps between tensors (the table leaves 10% free for them), DDP's buckets (4 bytes more per parameter on
several GPUs), and what compiling leaves in the process. tests/test_memory.py compares the prediction with measured steps on
a CPU. On an H100 it was 0.3% too low.
"""

import argparse
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from model import ARCHITECTURE, GPT, GPTConfig
from runtime.errors import fail
from runtime.unembedding import choose_chunk_rows
from train import TrainConfig, load_config

CARDS = (24, 40, 80, 141)  # GB, 10⁹ bytes


@cache
def parameter_counts(**architecture) -> tuple[int, int]:
    """Parameters of the model, and of one block."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**architecture))
    return model.num_parameters(), sum(p.numel() for p in model.blocks[0].parameters())


def activation_bytes(config: TrainConfig, low: int) -> int:
    """Kept for the backward pass, per token and block; `low` is the bytes of a number in a matrix product.

    kept (d wide, but h in the SwiGLU)                       eager                     compiled
    -------------------------------------------------------  ------------------------  ---------------------------------
    both norms' inputs, the residual stream                  2 d, float32              2 d, float32
    queries, keys and values; normed, rotated queries, keys  3 d + 2 d                 3 d + 2 d (float32 run: 2 d more)
    attention's output, the products' normed inputs          3 d (autocast: 4 d)       3 d
    gate, its silu, up, their product                        4 h                       3 h: the silu is computed again
    means and deviations of the norms, log Z of each head    4 + 5 per head, float32   the same
    """
    d, h, statistics = config.n_embd, config.mlp_hidden_size, 4 * (4 + 5 * config.n_head)
    if config.compile:
        return 8 * d + low * ((8 if low == 2 else 10) * d + 3 * h) + statistics
    return 8 * d + low * ((9 if low == 2 else 8) * d + 4 * h) + statistics


def step_bytes(config: TrainConfig, device: str, low: int, processes: int = 1) -> int:
    """The peak of a training step of one process, in bytes: the largest of four moments."""
    parameters, block = parameter_counts(**{name: getattr(config, name) for name in ARCHITECTURE})
    d, rows, tokens = config.n_embd, config.padded_vocab_size, config.micro_batch_size * config.block_size
    matrix = 4 * rows * d  # the unembedding's, in float32
    accumulates = config.batch_size > config.micro_batch_size * processes
    # Weights and AdamW's two moments; gradients that earlier passes have left; low-precision copies of the blocks' weights.
    share = (config.shard_size or processes) if config.shard else 1
    always = 12 * parameters / share + (4 * parameters if accumulates else 0)
    copies = low * config.n_layer * block if low < 4 else 0
    if share > 1:  # what lies outside the blocks is gathered, and two blocks at a time
        copies = 2 * low * block + 4 * (parameters - config.n_layer * block)

    one_block = activation_bytes(config, low) * tokens
    kept = 4 * d * tokens if config.activation_checkpointing else one_block
    hidden = (4 + low) * d * tokens + 40 * tokens  # the last norm's input and output; tokens, targets, statistics
    activations = config.n_layer * kept + hidden
    again = one_block if config.activation_checkpointing else 0

    # The logits of one chunk and, eager, the float32 intermediate results of its softmax.
    stored = 4 + low if config.logits_dtype == "float32" and low < 4 else low  # float32 logits, and their gradient beside them
    chunk = choose_chunk_rows(tokens, rows, device) * rows * (stored if config.compile else stored + 17 + (4 if low < 4 else 0))
    centred = matrix if config.oec == "mu_centering" else 0
    low_matrices = 2 * low * rows * d if low < 4 else 0  # the weight, and a chunk's part of its gradient
    in_block = tokens * (3 * low * config.mlp_hidden_size + 8 * d)  # gradients on their way through one block
    moments = (
        always + copies + activations + low * d * tokens + matrix + centred + low_matrices + chunk,  # the loss is computed
        always + copies + activations + low * d * tokens + 2 * matrix + 2 * centred,  # its gradient is scaled
        always + copies + activations + matrix + again + in_block,  # the last block's backward pass
        16 * parameters / share + (copies if share > 1 else 0) + kept + again + in_block,  # the first block's: all gradients are there
    )
    return max(moments)


def largest_micro_batch(config: TrainConfig, capacity: float, device: str, low: int, processes: int = 1) -> int:
    """The most sequences that fit; 0 where not even one does. We assume that the step accumulates gradients."""
    fits = lambda n: step_bytes(replace(config, micro_batch_size=n, batch_size=2 * n * processes), device, low, processes) <= capacity
    most = 1
    while fits(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, metavar="CONFIG.py", help="each gets a row as it is, and one with activation checkpointing")
    parser.add_argument("--processes", type=int, default=1, help="over which --shard=True shares a model out (default: %(default)s)")
    options, settings = parser.parse_known_args()
    if not options.files:
        fail("name at least one config file, like config/gpt2_124m.py")
    if options.processes < 1:
        fail(f"--processes={options.processes} must be at least 1")
    os.environ["WORLD_SIZE"] = str(options.processes)  # as torchrun says it
    batch = ["--micro_batch_size=1", f"--batch_size={options.processes}"]  # the table finds the micro-batch
    configs = [(file.stem, load_config([str(file), *settings, *batch])) for file in options.files]
    if any(not config.fused_unembedding for _, config in configs):
        fail("fused_unembedding=False holds all logits, several times over, which this table does not count: leave it out")
    header = ["", "activation checkpointing", "MB a sequence", *(f"sequences in {card} GB" for card in CARDS)]
    print("| " + " | ".join(header) + " |\n" + "| --- " * len(header) + "|")
    for name, config in configs:
        low = 4 if config.dtype == "float32" else 2
        for is_on in sorted({config.activation_checkpointing, True}):
            config = replace(config, activation_checkpointing=is_on)
            n_all = 2 * options.processes
            few, many = (step_bytes(replace(config, micro_batch_size=n, batch_size=n_all * n), "cuda", low, options.processes) for n in (32, 64))
            sizes = [largest_micro_batch(config, 0.9e9 * card, "cuda", low, options.processes) for card in CARDS]
            cells = [name, "on" if is_on else "off", f"{(many - few) / 32e6:,.0f}", *map(str, sizes)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

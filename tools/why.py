"""What the paper leaves open, measured for results/why.md: train.py with one thing changed or one more thing recorded.

    python -m tools.why float32_head config/quick.py --dtype=bfloat16 --learning_rate=0.3
    python -m tools.why row_sums config/quick.py --dtype=float32 --learning_rate=0.3
    python -m tools.why sgd_row_sums config/quick.py --dtype=float32 --learning_rate=1

float32_head   the unembedding and its loss in float32, whatever the dtype of all else
row_sums       metrics.jsonl has gradient_row_sum and update_row_sum of the unembedding as well
sgd_row_sums   the same, with plain SGD in AdamW's place
Config files and --key=value settings are train.py's.
"""

import sys

import torch

import oec
import train
from data.shards import fail


def unembed_in_float32():
    unembedding_loss = oec.unembedding_loss

    def in_float32(hidden, W, targets, **options):
        with torch.autocast(hidden.device.type, enabled=False):
            return unembedding_loss(hidden.float(), W.float(), targets, **options)

    oec.unembedding_loss = in_float32


def row_sum(X: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """‖Σ_i x_i‖ / Σ_i ‖x_i‖ over the real rows of X: 0 where they cancel, 1 where they all point the same way."""
    rows = X[:vocab_size].double()
    return rows.sum(dim=0).norm() / rows.norm(dim=1).sum()


class RowSumTrainer(train.Trainer):
    """Records how far the rows of the unembedding's gradient, and of what the optimizer makes of it, cancel."""

    def update(self, batches):
        W, V = self.model.unembedding.weight, self.config.vocab_size
        before, metrics = W.detach().clone(), {}
        hook = self.optimizer.register_step_pre_hook(lambda *_: metrics.update(gradient_row_sum=row_sum(W.grad, V)))
        metrics |= super().update(batches)
        hook.remove()
        return metrics | {"update_row_sum": row_sum(W.detach() - before, V)}


def make_sgd(model, config) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), config.learning_rate, fused=True)


VARIANTS = ("float32_head", "row_sums", "sgd_row_sums")


def main():
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        raise SystemExit(0)
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        fail(f"the first word must be one of {', '.join(VARIANTS)}, then train.py's")
    variant = sys.argv.pop(1)
    if variant == "float32_head":
        unembed_in_float32()
    else:
        train.Trainer = RowSumTrainer
    if variant == "sgd_row_sums":
        train.make_optimizer = make_sgd
    train.main()


if __name__ == "__main__":
    main()

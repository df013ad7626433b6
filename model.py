"""The GPT of the Output Embedding Centering paper (arXiv 2601.02031, §5) in one flat file.

Decoder-only, pre-norm LayerNorm without bias, SwiGLU, rotary embedding on half of each head's dimensions,
LayerNorm on queries and keys, no biases, no dropout. The unembedding is at the end of `GPT.forward`: that
is where the method comes in, through `oec.py`.

Shapes: B sequences, T tokens in each, d = n_embd, H = n_head, D = d / H.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oec
import runtime.unembedding

# The remedies against drifting logits, and the settings that switch each of them on. tools.sweep and `run_name` read this
# table. The files of config/ repeat it.
METHODS = {
    "baseline": {"oec": "none", "z_loss_weight": 0.0, "logit_softcap": 0.0},
    "mu_loss": {"oec": "mu_loss", "mu_loss_weight": 1e-4},
    "mu_centering": {"oec": "mu_centering"},
    "mu_centering_step": {"oec": "mu_centering_step"},
    "z_loss": {"z_loss_weight": 1e-4},
    "softcap": {"logit_softcap": 30.0},
}
WEIGHTS = {"mu_loss": "mu_loss_weight", "z_loss": "z_loss_weight", "softcap": "logit_softcap"}  # the setting that holds a method's strength

# How each metric of GPT.forward is combined over micro-batches and processes. One that is not here is refused.
METRICS = {
    "loss": "mean", "cross_entropy": "mean", "z_loss": "mean", "mu_loss": "mean", "log_z": "mean", "logit_mean": "mean",
    "logit_std": "std about logit_mean", "logit_absmax": "max", "rounding_nats": "mean",
}  # fmt: skip

# The settings that decide which parameters a model has, and of which shapes.
ARCHITECTURE = ("vocab_size", "n_layer", "n_head", "n_embd", "tie_weights")
ROPE_BASE = 10_000.0


@dataclass
class GPTConfig:
    # the model
    vocab_size: int = 50257  # tokens in the vocabulary; must be the dataset's
    block_size: int = 1024  # tokens of context
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width of the residual stream
    tie_weights: bool = False  # one matrix for input embedding and unembedding
    final_norm_gain: bool = True  # train the gain of the last norm; False: it stays 1, and the logits can drift faster
    activation_checkpointing: bool = False  # keep only each block's input, compute the rest again in backward: less memory

    # the method (oec.py)
    oec: Literal["none", "mu_loss", "mu_centering", "mu_centering_step"] = "none"  # centering: in the forward pass, or after each step
    mu_loss_weight: float = 1e-4  # λ of μᵀμ, used when oec is mu_loss
    z_loss_weight: float = 0.0  # λ of mean (log Z)²; 0 is off
    logit_softcap: float = 0.0  # c of c·tanh(logit/c); 0 is off
    fused_unembedding: bool = True  # the loss in little memory; False: oec.py's plain loss, whose statistics (logit_mean, ...) have gradients too
    logits_dtype: Literal["auto", "float32"] = "auto"  # auto: stored in the dtype of the matrix products; float32: in float32

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the unembedding: the next multiple of 128, for the sake of the matrix units."""
        return -(-self.vocab_size // 128) * 128

    @property
    def mlp_hidden_size(self) -> int:
        """SwiGLU's hidden width: two thirds of 4d, rounded up to a multiple of 256."""
        return 256 * math.ceil(2 / 3 * 4 * self.n_embd / 256)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        head_size = config.n_embd // config.n_head
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.query_norm = nn.LayerNorm(head_size, bias=False)
        self.key_norm = nn.LayerNorm(head_size, bias=False)
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, T, d = x.shape
        query, key, value = self.query_key_value(x).view(B, T, 3, self.n_head, -1).unbind(2)  # each (B, T, H, D)
        query = rotate(self.query_norm(query), *rotation).to(value.dtype)
        key = rotate(self.key_norm(key), *rotation).to(value.dtype)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )  # (B, H, T, D)
        return self.projection(mixed.transpose(1, 2).reshape(B, T, d))


class SwiGLU(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.mlp_hidden_size, bias=False)
        self.up = nn.Linear(config.n_embd, config.mlp_hidden_size, bias=False)
        self.down = nn.Linear(config.mlp_hidden_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


def rotary_angles(block_size: int, head_size: int) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`, each (T, 1, D). The first half of a head consists of D/4 pairs, whose members are D/4 apart and turn by
    position × frequency. The second half stays as it is: its cos is 1 and its sin 0."""
    frequency = ROPE_BASE ** (-torch.arange(head_size // 4, dtype=torch.float64) / (head_size // 4))
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)[:, None]  # (T, 1, D/4)
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    cos, sin = (angle.cos(), angle.cos(), one, one), (-angle.sin(), angle.sin(), zero, zero)
    return torch.cat(cos, dim=-1).float(), torch.cat(sin, dim=-1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half convention; x (B, T, H, D). It takes no slices of x, so that torch.compile can fuse it with the norm."""
    partner = x.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)  # the other member of each pair
    return x * cos.to(x.dtype) + partner * sin.to(x.dtype)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        """Raises ValueError for a config that no model can have."""
        super().__init__()
        check_model_config(config)
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.final_norm.weight.requires_grad_(config.final_norm_gain)
        self.unembedding = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.unembedding.weight = self.embedding.weight
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(config.block_size, 1, config.n_embd // config.n_head), persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """All initialisation, as in the paper's recipe. Call it after `to_empty` on a model made on the meta device.

        weight                          distribution
        ------------------------------  ------------------------------------------------
        every Linear weight             N(0, √(2 / (fan_in + fan_out)))   (Xavier normal)
        attention's output projection   N(0, 0.02 / √(2 n_layer))
        embedding (also when tied)      N(0, 1 / √d)
        LayerNorm weights               1
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        for block in self.blocks:
            nn.init.normal_(block.attention.projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(self.config.n_embd))
        cos, sin = rotary_angles(self.config.block_size, self.config.n_embd // self.config.n_head)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def forward(self, tokens: Tensor, targets: Tensor | None = None):
        """tokens, targets (B, T) int64, T ≤ block_size; a target of -1 does not count.

        With targets: (loss, metrics), the training objective and its detached parts. Without: the logits of the
        last position over the real vocabulary, (B, vocab_size), float32.
        """
        config = self.config
        T = tokens.shape[1]
        if T > config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={config.block_size}")
        rotation = self.cos[:T], self.sin[:T]
        x = self.embedding(tokens)  # (B, T, d)
        is_checkpointed = config.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, rotation, use_reentrant=False) if is_checkpointed else block(x, rotation)
        hidden = self.final_norm(x)  # (B, T, d)

        W = self.output_embedding()  # (padded_vocab_size, d)
        if targets is None:
            logits = (hidden[:, -1] @ W[: config.vocab_size].to(hidden.dtype).T).float()
            return oec.soft_cap(logits, config.logit_softcap)

        options = {"vocab_size": config.vocab_size, "z_loss_weight": config.z_loss_weight, "soft_cap": config.logit_softcap}
        hidden, targets = hidden.flatten(0, 1), targets.flatten()  # (N, d), (N,)
        in_float32 = config.logits_dtype == "float32"
        if config.fused_unembedding:
            options["logits_dtype"] = torch.float32 if in_float32 else None
            parts = runtime.unembedding.unembedding_loss(hidden, W, targets, **options)
        else:
            with torch.autocast(hidden.device.type, enabled=False) if in_float32 else nullcontext():
                parts = oec.unembedding_loss(hidden, W, targets, **options)
        loss, metrics = parts.loss, parts._asdict()
        if config.oec == "mu_loss":
            metrics["mu_loss"] = oec.mu_loss(self.unembedding.weight, config.vocab_size)
            loss = loss + config.mu_loss_weight * metrics["mu_loss"]
        metrics["loss"] = loss
        # Detached inside the compiled graph. Outside, the compiled backward pass would send gradients into the statistics.
        return loss, {name: value.detach() for name, value in metrics.items()}

    def output_embedding(self) -> Tensor:
        """The matrix that the logits are computed with: the stored one, or e_i − μ of it under `mu_centering`."""
        W, config = self.unembedding.weight, self.config
        if config.oec != "mu_centering":
            return W
        loss_sees_shift = config.z_loss_weight > 0 or config.logit_softcap > 0
        return oec.center(W, config.vocab_size, detach_mean=not loss_sees_shift)

    @torch.no_grad()
    def after_step(self):
        """The paper's procedure, under `mu_centering_step`: subtract μ from the stored matrix after each optimizer step."""
        if self.config.oec == "mu_centering_step":
            oec.center_(self.unembedding.weight, self.config.vocab_size)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0) -> Tensor:
        """Continue tokens (B, T) by n_tokens: (B, T + n_tokens). Temperature 0 takes the likeliest; top_k 0 is off."""
        if tokens.numel() == 0 or temperature < 0 or top_k < 0:
            raise ValueError("generate needs at least one token, and temperature and top_k of 0 or more")
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for _ in range(n_tokens):
            logits = self(tokens[:, -self.config.block_size :])
            if temperature == 0:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                probabilities = torch.softmax(logits / temperature, dim=-1)
                following = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, following), dim=1)
        return tokens

    def num_parameters(self) -> int:
        """Numbers stored as parameters, a tied matrix once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward: 6 per weight of a matrix product and 12·n_layer·d·T for
        attention (PaLM, arXiv 2204.02311, appendix B: no discount for the causal mask, padding rows not counted)."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        unembedding = self.config.vocab_size * self.config.n_embd
        attention = self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * (weights + unembedding) + 12 * attention


def check_model_config(config: GPTConfig):
    """ValueError, in one line that says what to change, for a config that no model can have."""
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} must be divisible by n_head={config.n_head}")
    if config.n_embd // config.n_head % 4:
        raise ValueError(f"a head has n_embd / n_head = {config.n_embd // config.n_head} dimensions; rotary needs a multiple of 4")
    parameters = config.n_embd * (2 * config.vocab_size + 12 * config.n_embd * config.n_layer)
    if parameters > 1e13:
        raise ValueError(f"n_layer={config.n_layer}, n_embd={config.n_embd}, vocab_size={config.vocab_size}: some {parameters:.0e} parameters, too many")
    for name in ("oec", "logits_dtype"):
        words = get_args(GPTConfig.__dataclass_fields__[name].type)
        if getattr(config, name) not in words:
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of: {', '.join(words)}")
    for name in ("mu_loss_weight", "z_loss_weight", "logit_softcap"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be 0 or more, and finite")

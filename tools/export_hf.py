"""A model for Hugging Face: a folder that transformers loads, weights and tokenizer, with no code of ours.

    python -m tools.export_hf out/RUN OUT

model.py's architecture is StableLM's: LayerNorm, SwiGLU, rotary embedding on half of each head, and norms on queries and
keys. There each head has norms of its own; here all heads of a block share them. Centring is folded into the weights.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch
from torch import Tensor

from data.prepare import END_OF_TEXT
from data.shards import dataset_folder, read_meta
from model import GPT, GPTConfig, ROPE_BASE
from runtime.checkpoint import write_whole
from runtime.errors import fail
from tools.sample import load_model, tokenizer_of

# The settings of a model that this export can express, or that do not change its function. A model with any other one is
# refused: teach `stablelm_config` and `stablelm_weights` the change first.
KNOWN_SETTINGS = {
    "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "tie_weights", "final_norm_gain", "activation_checkpointing",
    "oec", "mu_loss_weight", "z_loss_weight", "logit_softcap", "fused_unembedding", "logits_dtype",
}  # fmt: skip


def export(checkpoint: str | Path, out_dir: str | Path, tokenizer: str = ""):
    """The model of a checkpoint, or of the newest one of a run's folder, as the new folder `out_dir`: whole or not at all.
    `tokenizer` is a tiktoken encoding, "bytes", or a .tiktoken file; empty: that of the run's data.

    Ends the program (exit 2) for a bad checkpoint, a folder that is there already, a model with soft-capping.
    """
    try:
        import safetensors.torch
        import tokenizers  # noqa: F401
    except ImportError:
        fail("this needs the packages safetensors and tokenizers: pip install transformers")
    out = Path(out_dir).resolve()
    try:
        if out.is_file() or out.exists() and any(out.iterdir()):
            fail(f"{out_dir} is there already: choose another folder")
        if unknown := GPTConfig.__dataclass_fields__.keys() - KNOWN_SETTINGS:
            fail(f"model.py has the setting {min(unknown)}, which tools/export_hf.py does not know: no export (see KNOWN_SETTINGS there)")
        model, run = load_model(Path(checkpoint))
        if model.config.logit_softcap:
            fail(f"{checkpoint} caps its logits (logit_softcap={model.config.logit_softcap:g}), which StableLM cannot: no export")
        encoding = known_tokenizer(run, tokenizer)
        config = stablelm_config(model.config, encoding and encoding.eot_token)
        weights = stablelm_weights(model)
        biases = {re.sub("weight$", "bias", name): torch.zeros(len(weights[name])) for name in weights if has_bias(name)}
        tensors = {name: tensor.detach().clone() for name, tensor in (weights | biases).items()}
        files = {"model.safetensors": safetensors.torch.save(tensors, {"format": "pt"}), "config.json": as_json(config)}
        if encoding:
            files |= tokenizer_files(encoding, model.config.block_size)
        write_folder(out, files)
    except OSError as error:
        fail(f"{out_dir} cannot be written: {error.strerror or error}")
    with_tokenizer = f"tokenizer {encoding.name}" if encoding else "no tokenizer, since the run's data names none (see --tokenizer)"
    print(f"{out_dir}: {len(tensors)} tensors, {with_tokenizer}")


def write_folder(out: Path, files: dict[str, bytes]):
    """Whole or not at all: written beside `out` and renamed, which fails where something stands there by then."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        for name, content in files.items():
            write_whole(whole / name, content)
        whole.rename(out)


def as_json(value: dict) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


# --- the model -----------------------------------------------------------------------------------


def is_tied(config: GPTConfig) -> bool:
    """Whether the export has one matrix. A tied model with μ-centering has two: μ is subtracted from the output embedding only."""
    return config.tie_weights and config.oec != "mu_centering"


def stablelm_config(config: GPTConfig, end_of_text: int | None) -> dict:
    rotary = {"rope_theta": ROPE_BASE, "partial_rotary_factor": 0.5}
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_hidden_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "layer_norm_eps": 1e-5,  # torch's default, and so model.py's
        "qk_layernorm": True,
        "use_qkv_bias": False,
        "use_parallel_residual": False,
        "tie_word_embeddings": is_tied(config),
        **rotary,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", **rotary},  # and 5
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def stablelm_weights(model: GPT) -> dict[str, Tensor]:
    """The weights by StableLM's names, without padding rows: views of the model's own, but for a centred unembedding."""
    V = model.config.vocab_size
    weights = {"model.embed_tokens.weight": model.embedding.weight[:V], "model.norm.weight": model.final_norm.weight}
    if not is_tied(model.config):
        weights["lm_head.weight"] = model.output_embedding()[:V]
    for number, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        query, key, value = attention.query_key_value.weight.chunk(3)
        of_block = {
            "input_layernorm": block.attention_norm.weight,
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": attention.projection.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": mlp.gate.weight,
            "mlp.up_proj": mlp.up.weight,
            "mlp.down_proj": mlp.down.weight,
        }
        for head in range(model.config.n_head):
            of_block[f"self_attn.q_layernorm.norms.{head}"] = attention.query_norm.weight
            of_block[f"self_attn.k_layernorm.norms.{head}"] = attention.key_norm.weight
        weights |= {f"model.layers.{number}.{name}.weight": weight for name, weight in of_block.items()}
    return weights


def has_bias(name: str) -> bool:
    """Whether StableLM has a bias beside this weight: only for norms on the residual stream. The export's biases are zero."""
    return name.endswith("norm.weight")


# --- the tokenizer -------------------------------------------------------------------------------


def known_tokenizer(run: dict, name: str) -> tiktoken.Encoding | None:
    """The tokenizer called `name`, or of the run's data; None where nothing names it and the vocabulary is not of GPT-2's size."""
    folder = dataset_folder(run["dataset"], run["data_dir"])
    if not name and folder.is_dir() and not read_meta(folder) and run["vocab_size"] != GPTConfig.vocab_size:
        return None
    return tokenizer_of(run, name)


def tokenizer_files(encoding: tiktoken.Encoding, block_size: int) -> dict[str, bytes]:
    """tokenizer.json and its settings; ends the program where they would give other ids than `encoding`."""
    tokenizer = convert_tokenizer(encoding)
    # All tokens in a mixed order: every word of the vocabulary, and runs of numbers, spaces and marks of many kinds.
    ids = [*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()]
    random.Random(0).shuffle(ids)
    text = encoding.decode_bytes(ids).decode(errors="replace")
    if tokenizer.encode(text).ids != encoding.encode(text, allowed_special="all"):
        fail(f"the tokenizer {encoding.name} cannot be exported: tokenizers reads its pattern differently: {encoding._pat_str}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": as_json(settings)}


def convert_tokenizer(encoding: tiktoken.Encoding):
    """The `tokenizers.Tokenizer` with the ids of `encoding`.

    tiktoken merges the neighbours whose union has the lowest rank; a tokenizer.json lists the merges themselves, and its
    tokens as characters: printable bytes as they are, the others from U+0100 on.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
    ranks = encoding._mergeable_ranks
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = parts_before_last_merge(token, ranks)
        if len(parts) == 2:
            merges.append(tuple(written[part] for part in parts))
    vocabulary = {written[token]: rank for token, rank in ranks.items()} | encoding._special_tokens
    # A word that is a token is not merged at all, as in tiktoken.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")  # tiktoken's + makes {1,3} possessive; tokenizers would repeat it
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(encoding._special_tokens))
    return tokenizer


def parts_before_last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a token after all merges of lower rank than its own: two, or one byte; more if merging never makes the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, math.inf), at) for at, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            break  # never reached by merging: such a token comes only as a whole word
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a ckpt_*.pt file, or a run's folder for its newest one")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--tokenizer", default="", help="tiktoken encoding, bytes, or a .tiktoken file (default: that of the run's data)")
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.out, arguments.tokenizer)


if __name__ == "__main__":
    main()

"""Text from a trained model.

    python -m tools.sample out/RUN --prompt "def main():"
"""

import argparse
from pathlib import Path

import tiktoken
import torch

from data.prepare import load_tokenizer
from data.shards import dataset_folder, read_meta
from model import GPT, GPTConfig
from runtime.checkpoint import checkpoints, read_checkpoint
from runtime.errors import fail


def load_model(path: Path) -> tuple[GPT, dict]:
    """The model of a checkpoint, or of the newest one in a run's folder, and its config. Ends the program on bad files."""
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            fail(f"there is no ckpt_*.pt in {path}: train first, or name another run's folder")
        path = found[-1]
    try:
        state = read_checkpoint(path)
        config = {name: state["config"][name] for name in GPTConfig.__dataclass_fields__ if name in state["config"]}
        model = GPT(GPTConfig(**config))
        model.load_state_dict(state["model"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        fail(f"{path} cannot be loaded: {str(error).splitlines()[0]}")
    return model.eval(), state["config"]


def tokenizer_of(config: dict, name: str = "") -> tiktoken.Encoding:
    """The tokenizer called `name`; without one, that of the data a run was trained on. Where the data names
    none, it is GPT-2's if the vocabulary has GPT-2's size; otherwise this ends the program."""
    folder = dataset_folder(config["dataset"], config["data_dir"])
    if name:
        encoding, owner = load_tokenizer(name), f"tokenizer {name}"
    elif not folder.is_dir():
        fail(f"the run's data, {folder}, is not there, and its tokenizer with it: give --tokenizer, or call this where the run was started")
    elif named := read_meta(folder).get("tokenizer"):
        encoding, owner = load_tokenizer(named, folder), f"tokenizer of {folder}"
    elif config["vocab_size"] == GPTConfig.vocab_size:
        encoding, owner = load_tokenizer("gpt2"), f"tokenizer of {folder}"
    else:
        fail(f"the run's data, {folder}, does not name its tokenizer (it has no meta.json): give --tokenizer")
    if encoding.n_vocab != config["vocab_size"]:
        fail(f"the {owner} has {encoding.n_vocab} tokens, the model {config['vocab_size']}: they do not belong together")
    return encoding


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a ckpt_*.pt file, or a run's folder for its newest one")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--tokenizer", default="", help="tiktoken encoding, bytes, or a .tiktoken file (default: that of the run's data)")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0 is off (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.tokens < 0 or arguments.top_k < 0 or not 0 <= arguments.seed < 2**63:
        fail("--tokens, --top_k and --seed must be 0 or more, and --seed below 2**63")
    if arguments.temperature != 0 and not 0.01 <= arguments.temperature < float("inf"):
        fail("--temperature must be 0, or finite and at least 0.01")
    model, config = load_model(arguments.checkpoint)
    encoding = tokenizer_of(config, arguments.tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = arguments.prompt.encode("utf-8", errors="replace").decode()
    tokens = torch.tensor([[encoding.eot_token, *encoding.encode(prompt, disallowed_special=())]], device=model.embedding.weight.device)
    if not model(tokens[:, -model.config.block_size :]).isfinite().all():
        fail(f"the logits of {arguments.checkpoint} are not finite: the run has diverged; name one of its earlier checkpoints")
    tokens = model.generate(tokens, arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed)
    print(encoding.decode(tokens[0, 1:].tolist()).replace("<|endoftext|>", "\n---\n"))


if __name__ == "__main__":
    main()

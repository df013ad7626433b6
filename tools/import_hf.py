"""A model from Hugging Face: the weights of a StableLM folder as a checkpoint to begin a run with.

    python -m tools.import_hf FOLDER weights.pt
    python train.py --init_from=weights.pt ...

What tools/export_hf.py writes comes back bit for bit. Other StableLM models must have an architecture that model.py has too.
"""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from runtime.checkpoint import save_weights
from runtime.errors import fail, one_line
from tools.export_hf import has_bias, stablelm_config, stablelm_weights
from train import TrainConfig

# Of config.json, what does not change the function.
OF_NO_MATTER = ("architectures", "torch_dtype", "bos_token_id", "eos_token_id")
SIZES = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size")


def read_config(folder: Path) -> GPTConfig:
    """The size of the model in `folder`; ends the program for one that is not of model.py's architecture."""
    from transformers import StableLmConfig

    path = folder / "config.json"
    try:
        kind = json.loads(path.read_bytes())["model_type"]
        theirs = StableLmConfig.from_pretrained(folder).to_dict() if kind == "stablelm" else {}
        if wrong := [name for name in SIZES if name in theirs and type(theirs[name]) is not int]:
            raise ValueError(f"{wrong[0]} must be a whole number")
    except Exception as error:  # whatever a damaged or foreign file can cause
        fail(f"{path} cannot be read: {one_line(error)}")
    if kind != "stablelm":
        fail(f"{path} is of a model of type {kind}; only stablelm can be imported")
    config = GPTConfig(
        vocab_size=theirs["vocab_size"],
        block_size=theirs["max_position_embeddings"],
        n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"],
        n_embd=theirs["hidden_size"],
        tie_weights=theirs["tie_word_embeddings"],
    )
    ours = {name: value for name, value in stablelm_config(config, None).items() if name not in OF_NO_MATTER}
    ours = {name: value for name, value in StableLmConfig(**ours).to_dict().items() if name in ours}
    if other := [f"{name}={theirs.get(name)} (here always {value})" for name, value in ours.items() if theirs.get(name) != value]:
        fail(f"{path} has what model.py cannot express: {', '.join(other)}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            weights |= load_file(path)
        except Exception as error:  # whatever a damaged file can cause
            fail(f"{path} cannot be read: {one_line(error)}")
    if not weights:
        fail(f"there is no model*.safetensors in {folder}: save the model with save_pretrained")
    return {name: tensor.float() for name, tensor in weights.items()}


@torch.no_grad()
def fill(model: GPT, weights: dict[str, Tensor], folder: Path):
    """Copies the weights of `folder` into the model, padding rows zero; ends the program for any it cannot hold."""
    views = stablelm_weights(model)
    if wrong := [name for name in views if name not in weights or weights[name].shape != views[name].shape]:
        fail(f"{folder} has no {wrong[0]} of shape {tuple(views[wrong[0]].shape)}")
    for parameter in model.parameters():
        parameter.zero_()
    for name, view in views.items():
        view.copy_(weights[name])
    for name, tensor in weights.items():
        held = views.get(name)
        if held is None and name == "lm_head.weight":  # of a tied model, whose file may hold it twice
            held = views["model.embed_tokens.weight"]
        if held is None and re.sub("bias$", "weight", name) in filter(has_bias, views):
            held = torch.zeros_like(tensor)
        if held is None or not torch.equal(held, tensor):
            fail(f"{name} of {folder} has no place in model.py: there are no biases, and the heads of a block share their norms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what save_pretrained or tools.export_hf has written")
    parser.add_argument("checkpoint", type=Path, help="the file to write, anything.pt")
    parser.add_argument("--data_dir", default="", help="a folder of shards made with the model's tokenizer; tools.sample learns from it which one that is")
    arguments = parser.parse_args()
    folder, checkpoint = arguments.folder, arguments.checkpoint
    try:
        import safetensors, transformers  # noqa: E401, F401
    except ImportError:
        fail("this needs a package: pip install transformers")
    if checkpoint.exists():
        fail(f"{checkpoint} is there already: choose another name")
    if re.fullmatch(r"ckpt_\d+\.pt", checkpoint.name):
        fail(f"{checkpoint} would be taken for a run's own checkpoint: choose another name")
    try:
        model = GPT(read_config(folder))
    except ValueError as error:
        fail(f"{folder}: {error}")
    fill(model, read_weights(folder), folder)
    try:
        save_weights(checkpoint, model, asdict(TrainConfig(**asdict(model.config), data_dir=arguments.data_dir)))
    except OSError as error:
        fail(f"{checkpoint} cannot be written: {error.strerror or error}")
    print(f"{checkpoint}: {model.num_parameters():,} parameters; begin with them: train.py --init_from={checkpoint}")


if __name__ == "__main__":
    main()

"""Settings: `[FILE.py ...] [--key=value ...]` into a dataclass, and what can be wrong with them."""

import difflib
import inspect
import math
import os
import re
import runpy
from dataclasses import fields
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args, get_origin

from runtime.errors import fail, one_line

# Settings that other trainers have, most of them nanoGPT's, and what to use instead.
NANOGPT_NAMES = {
    "gradient_accumulation_steps": "batch_size (sequences in a step, over all processes) and micro_batch_size: a step "
    "accumulates batch_size / (micro_batch_size × processes) passes",
    "max_iters": "max_steps", "warmup_iters": "warmup_steps", "lr_decay_iters": "max_steps, where the schedule ends",
    "min_lr": "min_learning_rate", "decay_lr": "schedule", "eval_iters": "eval_sequences",
    "always_save_checkpoint": "checkpoint_interval", "wandb_log": "wandb_project", "wandb_run_name": "out_dir",
    "dropout": "nothing, the model has no dropout", "bias": "nothing, the model has no biases",
    "backend": "nothing, it is NCCL on GPUs and gloo on CPUs", "eval_only": "python -m tools.drift RUN", "lr": "learning_rate",
}  # fmt: skip


def read_settings(kind: type, argv: list[str]) -> dict:
    """The settings that `argv` gives, for the dataclass `kind`: left to right, the last word wins."""
    settings = {}
    for word in argv:
        key, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--") and equals:
            settings[key] = parse(kind, key, text)
        elif word.endswith(".py"):
            settings |= read_config_file(kind, word)
        else:
            fail(f"{word!r:.80} is neither a config file (.py) nor --key=value")
    return settings


def read_config_file(kind: type, path: str) -> dict:
    """The assignments of a config file, which is executed. Modules, functions, classes and names that start with _ are left out."""
    if not os.path.isfile(path):
        fail(f"there is no config file {path}")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        fail(f"config file {path} fails: {one_line(error)}")
    settings = {}
    for key, value in assigned.items():
        is_own = isinstance(value, ModuleType) or callable(value)  # a module, a function or a class
        if str(key).startswith("_") or is_own and key not in {field.name for field in fields(kind)}:
            continue
        wanted = value_type(kind, key, f" in {path}")
        if type(value) is int and abs(value) >= 2**63:
            fail(f"{key} in {path} is too large a number")
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            fail(f"{key} in {path} must be {wanted.__name__}, not {type(value).__name__}")
        settings[key] = value
    return settings


def parse(kind: type, key: str, text: str):
    wanted = value_type(kind, key)
    try:
        return {"True": True, "False": False}[text] if wanted is bool else wanted(text)
    except (KeyError, ValueError):
        fail(f"--{key}={text!r:.80} must be {'True or False' if wanted is bool else wanted.__name__}")


def value_type(kind: type, key: str, where: str = "") -> type:
    """bool, int, float or str; str also for a choice among words, `Literal[...]`."""
    known = {field.name: field.type for field in fields(kind)}
    if key in known:
        return str if get_origin(known[key]) is Literal else known[key]
    if key in NANOGPT_NAMES:
        fail(f"there is no setting {key}{where}. In its place: {NANOGPT_NAMES[key]}")
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f": did you mean {nearest[0]}?" if nearest else ""
    fail(f"unknown setting {key!r:.80}{where}{hint} (--help lists all)")


AT_LEAST_ONE = ("batch_size", "micro_batch_size", "max_steps", "log_interval", "eval_sequences", "max_bad_steps")


def check_settings(config):
    """Ends the program for a value outside its type's range, and for settings of a run that do not fit together."""
    for field in fields(config):
        value = getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            fail(f"{field.name}={value!r:.80} is not one of: {', '.join(get_args(field.type))}")
        least, limit = (1 if field.name in AT_LEAST_ONE else 0), (2**31 if field.type is int else math.inf)
        if field.type in (int, float) and not least <= value < limit:
            fail(f"{field.name}={value} must be at least {least} and {f'below {limit}' if field.type is int else 'finite'}")
        if field.type is str and not value.isprintable():
            fail(f"{field.name}={value!r:.80} holds a character that cannot be printed")
    if not re.fullmatch(r"\w[\w.-]*", config.dataset):
        fail(f"dataset={config.dataset!r} must be the plain name of a folder of data/; for another folder: --data_dir=PATH")
    if config.beta1 >= 1 or config.beta2 >= 1 or config.learning_rate == 0 or config.adam_epsilon == 0:
        fail("beta1 and beta2 must be below 1, learning_rate and adam_epsilon above 0")
    if config.min_learning_rate > config.learning_rate:
        fail(f"min_learning_rate={config.min_learning_rate} is above learning_rate={config.learning_rate}")
    if config.warmup_steps >= config.max_steps:
        fail(f"warmup_steps={config.warmup_steps} must be below max_steps={config.max_steps}: lower --warmup_steps")
    if not 0 < config.decay_fraction <= 1:
        fail(f"decay_fraction={config.decay_fraction} must be above 0 and at most 1")
    if config.schedule == "wsd" and config.warmup_steps > (1 - config.decay_fraction) * config.max_steps:
        fail(f"warmup_steps={config.warmup_steps} and decay_fraction={config.decay_fraction} overlap in max_steps={config.max_steps}: lower one of them")
    if config.init_from and config.resume not in ("auto", "never"):
        fail(f"resume={config.resume} and init_from={config.init_from} both give the weights: remove one of them")
    if config.eval_interval and config.checkpoint_interval % config.eval_interval:
        fail(f"checkpoint_interval={config.checkpoint_interval} must be a multiple of eval_interval={config.eval_interval}: lower --eval_interval")
    for package, is_wanted in {"tensorboard": config.tensorboard, "wandb": config.wandb_project}.items():
        if is_wanted and getattr(find_spec(package), "origin", None) is None:  # a mere folder of that name has none
            fail(f"{package} is not installed: pip install {package}, or leave its setting out")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.shard and (world_size == 1 or config.shard_size == 1 or world_size % (config.shard_size or 1)):
        fail(
            f"shard=True cannot share a model out with processes={world_size}, shard_size={config.shard_size}. "
            "Start several with torchrun, and set shard_size to 0, or to a number above 1 that divides the number of processes"
        )
    if config.shard and config.optimizer == "muon":
        fail("optimizer=muon orthogonalises whole matrices, and shard=True has parts of them: use optimizer=adamw, or shard=False")
    if config.shard_size and not config.shard:
        fail(f"shard_size={config.shard_size} needs shard=True")
    together = config.micro_batch_size * world_size
    if config.batch_size % together:
        fits = math.gcd(config.batch_size // world_size, config.micro_batch_size)
        example = f", for example --micro_batch_size={fits}" if config.batch_size % world_size == 0 else ""
        fail(
            f"batch_size={config.batch_size} must be divisible by {together}, micro_batch_size={config.micro_batch_size} "
            f"on each of {world_size} processes: change one of the three{example}"
        )


def print_help(doc: str, *kinds: type):
    """The program's docstring and the source of its settings, which has their types, defaults and comments."""
    print(doc, *map(inspect.getsource, kinds), "Set any of them with --name=value.", sep="\n")
    raise SystemExit(0)

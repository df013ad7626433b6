"""Checkpoints: whole or not at all on the disk, checked when they are read, the same for any optimizer."""

import math
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from runtime.errors import fail, one_line
from runtime.sharding import gathered, shared_out_like

PARTS = {
    "model": dict, "optimizers": list, "scaler": dict, "config": dict, "data": dict, "random_state": torch.Tensor,
    "bad_steps": int, "step": int, "evaluated_step": int, "best_loss": float, "best_step": int,
}  # fmt: skip


def write_whole(path: Path, content):
    """Writes a file completely or not at all: `content` is bytes, or a function that writes into an open file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides the disk's error behind its own
            raise error.__context__ from None
        raise


def checkpoint_path(out_dir: Path, step: int) -> Path:
    return out_dir / f"ckpt_{step:07d}.pt"


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Other names are the user's own files."""
    return sorted((p for p in out_dir.glob("ckpt_*.pt") if p.stem[5:].isdecimal()), key=lambda p: int(p.stem[5:]))


def save_checkpoint(out_dir: Path, state: dict):
    """Writes `ckpt_NNNNNNN.pt`, then removes all but the last two and the best."""
    write_whole(checkpoint_path(out_dir, state["step"]), lambda file: torch.save(state, file))
    for path in checkpoints(out_dir)[:-2]:
        if path != checkpoint_path(out_dir, state["best_step"]):
            path.unlink()


def save_weights(path: Path, model: torch.nn.Module, config: dict):
    """A checkpoint from before the first step, with weights and settings and nothing else in it: for --init_from."""
    state = {
        "model": model.state_dict(), "config": config, "step": 0, "evaluated_step": 0, "best_step": 0, "best_loss": math.inf, "bad_steps": 0,
        "optimizers": [], "scaler": {}, "data": {}, "random_state": torch.get_rng_state(),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path) -> dict:
    """A whole checkpoint, on the CPU; ValueError, one line, for anything else. Nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state.get("optimizer"), dict):  # a checkpoint of version 1 holds one AdamW
            old = state.pop("optimizer")
            state["optimizers"] = [{"kind": "AdamW", **old}] if old else []
        state.setdefault("evaluated_step", state.get("step"))  # version 1 saves after evaluating
        if wrong := [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]:
            raise ValueError(f"it lacks a proper {', '.join(wrong)}")
        if state["step"] < 0 or path in checkpoints(path.parent) and int(path.stem[5:]) != state["step"]:
            raise ValueError(f"the step in it, {state['step']}, is negative or not that of its name")
        return state
    except Exception as error:  # whatever a damaged file can cause
        raise ValueError(f"{path} is not a whole checkpoint: {one_line(error)}") from None


def find_checkpoint(out_dir: Path, resume: str) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint to resume from, or None; and what is wrong with the newer ones."""
    damaged = {}
    for path in {"auto": checkpoints(out_dir)[::-1], "never": []}.get(resume, [Path(resume)]):
        try:
            read_checkpoint(path)
            return path, damaged
        except ValueError as error:
            damaged[path] = str(error)
    if damaged:
        fail(f"no checkpoint to resume from: {'; '.join(damaged.values())}; restore one, or start in another --out_dir")
    return None, {}


def check_same_run(state: dict, now: dict, identity: tuple[str, ...], data: dict) -> list[str]:
    """The settings that differ between a checkpoint and `now`, for people. ValueError if the data or a setting in `identity`
    differs: the checkpoint is of another run."""
    then = state["config"]
    changed = {name: f"{name} was {then[name]!r}, is {now[name]!r}" for name in then.keys() & now.keys() if then[name] != now[name]}
    other = [changed[name] for name in identity if name in changed]
    other += [f"the {split} data has changed" for split in data if state["data"].get(split) != data[split]]
    if other:
        raise ValueError(f"it is of another run: {'; '.join(other)}; undo this, or start a new run in another --out_dir")
    return [changed[name] for name in sorted(changed) if name not in ("resume", "out_dir", "data_dir")]


def load_weights(model: torch.nn.Module, path: Path, config: dict, architecture: tuple[str, ...]):
    """A checkpoint's weights, and nothing else of it. Ends the program where they are another model's."""
    try:
        state = read_checkpoint(path)
        pairs = [(name, state["config"].get(name), config[name]) for name in architecture]
        if other := [f"{name}={its}, here {ours}" for name, its, ours in pairs if its != ours]:
            raise ValueError(f"it has {'; '.join(other)}")
        load_model_state(model, state["model"])
    except Exception as error:  # whatever a damaged or foreign file can cause
        fail(f"cannot start from init_from={path}: {one_line(error)}")


def load_model_state(model: torch.nn.Module, state: dict):
    """Whole weights, into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: shared_out_like(value, own[name]) if name in own else value for name, value in state.items()})


def state_of(trainer) -> dict:
    """What a checkpoint of a run holds. `restore` reads it. All processes take part, and process 0 has it whole."""
    keep = trainer.machine.rank == 0
    return {
        "model": gathered(trainer.model.state_dict(), keep),
        "optimizers": [{"kind": type(x).__name__, **gathered(x.state_dict(), keep)} for x in trainer.optimizers],
        "scaler": trainer.scaler.state_dict(),
        "config": asdict(trainer.config),
        "data": trainer.fingerprint,
        "random_state": torch.get_rng_state(),
        "bad_steps": trainer.bad_steps,
        "step": trainer.step,
        "evaluated_step": trainer.evaluated_step,
        "best_loss": trainer.best_loss,
        "best_step": trainer.best_step,
    }


def restore(trainer, path: Path, identity: tuple[str, ...]):
    """The whole state of a run, from its checkpoint; the settings are today's. Ends the program where that cannot be."""
    try:
        state = read_checkpoint(path)
        changed = check_same_run(state, asdict(trainer.config), identity, trainer.fingerprint)
        load_model_state(trainer.model, state["model"])
        restore_optimizers(trainer.optimizers, state["optimizers"])
        if trainer.scaler.is_enabled() and state["scaler"]:
            trainer.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random_state"])
    except Exception as error:  # whatever a damaged or foreign file can cause
        fail(f"cannot resume from {path}: {one_line(error)}")
    for name in ("step", "evaluated_step", "bad_steps", "best_loss", "best_step"):
        setattr(trainer, name, state[name])
    if path.parent.resolve() != trainer.out_dir.resolve():  # the best checkpoint lies in another run's folder
        trainer.best_loss, trainer.best_step = math.inf, 0
    if changed:
        trainer.machine.say(f"changed since {path.name}: {'; '.join(changed)}")
    trainer.machine.say(f"resuming from {path} at step {trainer.step}")


def restore_optimizers(optimizers: list[torch.optim.Optimizer], saved: list[dict]):
    """Gives each optimizer its saved state; learning rates and the like stay as today's settings have them.

    ValueError where the optimizers are others, or where a state's shape does not fit its parameter. See `fits`.
    """
    kinds, saved_kinds = [type(x).__name__ for x in optimizers], [x["kind"] for x in saved]
    if kinds != saved_kinds:
        raise ValueError(f"its optimizers are {', '.join(saved_kinds) or 'none'}, the run's {', '.join(kinds)}")
    for optimizer, packed in zip(optimizers, saved):
        groups = optimizer.state_dict()["param_groups"]
        sizes, saved_sizes = ([len(group["params"]) for group in x] for x in (groups, packed["param_groups"]))
        if sizes != saved_sizes:
            raise ValueError(f"{type(optimizer).__name__} has groups of {sizes} parameters and its saved state {saved_sizes}")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {i: {name: shared_out_like(x, parameters[i]) for name, x in values.items()} for i, values in packed["state"].items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and not fits(value.shape, parameter.shape):
                    raise ValueError(f"the optimizer's {name} is of shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")


def fits(shape: torch.Size, parameter: torch.Size) -> bool:
    """Whether an optimizer may keep a tensor of `shape` for a parameter: a scalar; a tensor with another
    number of dimensions and more than one element; or one with the same number, and not larger in any (factored or projected moments)."""
    if len(shape) == 0 or len(shape) != len(parameter):
        return shape.numel() != 1 or len(shape) == 0
    return all(a <= b for a, b in zip(shape, parameter))

"""Checkpoints of training runs.

    checkpoint-00000300/  config.json  model.safetensors     the model, as `huggingface.save_pretrained` writes it
                          training.safetensors  state.json   AdamW's moments, random states; settings, SHA-256 sums

A checkpoint appears under its name by one rename, when all of it is on disk. Nothing in it is executed on reading,
and nothing that it says about itself is believed: sums, names, shapes and dtypes are checked before anything is built.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tpa_minimal import huggingface
from tpa_minimal.files import FileError, read_json, sha256, write_json
from tpa_minimal.tpa import T6

STATE, TRAINING, WEIGHTS = "state.json", "training.safetensors", "model.safetensors"
REMEDY = "delete this checkpoint's folder to continue from an earlier one or from the beginning"


class SettingError(ValueError):
    """A setting or file that cannot work: the message names the value, the rule and the remedy."""


def unreadable(path: Path, reason: object) -> SettingError:
    """The error for a file of a checkpoint that is damaged or not one of ours."""
    return SettingError(f"{path}: cannot be read ({str(reason)[:200]}); {REMEDY}")


def checkpoint_names(out: str | Path) -> list[str]:
    """The complete checkpoints in a run's folder, oldest first; unfinished ones end in .tmp."""
    names = (path.name for path in Path(out).glob("checkpoint-*"))
    return sorted((name for name in names if re.fullmatch(r"checkpoint-[0-9]+", name)), key=lambda name: int(name[11:]))


def latest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder, or None."""
    names = checkpoint_names(out)
    return Path(out, names[-1]) if names else None


# -------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(out: Path, model: T6, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Write out/checkpoint-STEP, whole or not at all, then delete older ones; `state["step"]` names it.

    Raises OSError or SafetensorError where it cannot be written, with earlier checkpoints as they were; that an older
    one cannot be deleted is no error.
    """
    target = out / f"checkpoint-{state['step']:08d}"
    if not target.exists():
        _write(target, model, optimizer, state)
    for name in checkpoint_names(out)[:-1]:
        with contextlib.suppress(OSError):  # renamed first, so that half of a folder is never taken for a checkpoint
            os.replace(out / name, out / f"{name}.tmp")
    for leftover in out.glob("checkpoint-*.tmp"):
        if re.fullmatch(r"checkpoint-[0-9]+\.tmp", leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)
    return target


def _write(target: Path, model: T6, optimizer: torch.optim.Optimizer, state: dict) -> None:
    temporary = target.with_name(f"{target.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    training = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        training["random.cuda"] = torch.cuda.get_rng_state()
    updates = 0
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            moments = optimizer.state[parameter]
            updates = int(moments["step"])  # float16 skips some, so that this is not the run's step
            training |= {f"{moment}.{name}": moments[moment].contiguous() for moment in ("exp_avg", "exp_avg_sq")}
    try:
        try:
            huggingface.save_pretrained(model, temporary, tokenizer=state["tokenizer"])
        except ValueError:  # a layer of the user's own: its name is in state.json alone
            save_file(model.state_dict(), temporary / WEIGHTS)
        save_file(training, temporary / TRAINING)
        sums = {path.name: sha256(path) for path in temporary.iterdir()}
        write_json(temporary / STATE, {**state, "updates": updates, "sums": sums})
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------- loading

_KINDS = {  # of what state.json must hold
    **dict.fromkeys(("step", "vocab_size", "updates"), int),
    "seconds": (int, float),
    "tokenizer": str,
    **dict.fromkeys(("sha256", "settings", "sums", "scaler"), dict),
}


def read_state(checkpoint: Path, check_sums: bool = True) -> dict:
    """A checkpoint's state.json. Raises SettingError unless it is complete and the other files have its sums.

    check_sums: reading all of a large checkpoint takes a while, so whoever needs its settings alone can do without.
    """
    try:
        state = read_json(checkpoint / STATE)
        if not isinstance(state, dict):
            raise ValueError("is no object")
        for name, kind in _KINDS.items():
            if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
                raise ValueError(f"{name} is {str(state.get(name))[:80]}")
        if f"checkpoint-{state['step']:08d}" != checkpoint.name:
            raise ValueError(f"step {state['step']} is not the folder's")
        least = 0 if state["scaler"] else state["step"]  # float16 alone skips updates
        if not least <= state["updates"] <= state["step"] or not 0 <= state["seconds"] < 1e300:
            raise ValueError(f"updates {state['updates']}, seconds {state['seconds']}")
        if others := state["sums"].keys() - {path.name for path in checkpoint.iterdir()}:
            raise ValueError(f"sums of files that are not there: {', '.join(sorted(others))}")
    except (OSError, FileError, ValueError) as error:
        raise unreadable(checkpoint / STATE, error) from error
    for name in dict.fromkeys((WEIGHTS, TRAINING, *state["sums"])) if check_sums else ():
        try:
            if sha256(checkpoint / name) != state["sums"].get(name):
                raise unreadable(checkpoint / name, "its SHA-256 sum is another: damaged")
        except OSError as error:
            raise unreadable(checkpoint / name, error) from error
    return state


def load_weights(build: Callable[[], T6], n_layer: int, checkpoint: Path) -> T6:
    """The model that `build` makes, of `n_layer` blocks, with a checkpoint's weights, copied from the file.

    Raises SettingError for names, shapes or dtypes other than the model's, compared before memory is set aside for it,
    and for weights that are not finite.
    """
    path = checkpoint / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            prefix = next((key for key in keys if key.endswith("embedding.weight")), "embedding.weight")[:-16]
            found = {key.removeprefix(prefix): file.get_slice(key) for key in keys}
            blocks = {name.split(".")[1] for name in found if name.startswith("blocks.")}
            if len(blocks) != n_layer:
                raise SettingError(f"{path}: has {len(blocks)} layers where its settings say {n_layer}; {REMEDY}")
            with torch.device("meta"):
                expected = build().state_dict()
            for name in sorted(expected.keys() | found.keys()):
                has = tuple(found[name].get_shape()) if name in found else None
                needs = tuple(expected[name].shape) if name in expected else None
                if has != needs:
                    raise SettingError(
                        f"{path}: {name} has shape {has} where this model needs {needs}; "
                        f"it is the checkpoint of another configuration"
                    )
                if found[name].get_dtype() != "F32":
                    raise SettingError(f"{path}: {name} is {found[name].get_dtype()}, not float32; {REMEDY}")
            weights = {name: file.get_tensor(prefix + name).clone() for name in expected}  # else they stay mapped
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise SettingError(f"{path}: {name} holds NaN or infinity; {REMEDY}")
    model = build()
    model.load_state_dict(weights)
    return model


def load_training(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, updates: int) -> None:
    """AdamW's moments and torch's random states, as they were after `updates` updates of the weights.

    Raises SettingError unless every tensor is there, in the shape and dtype that it must have.
    """
    path = checkpoint / TRAINING
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {}
    try:
        with safe_open(path, framework="pt") as file:

            def tensor(name: str, like: Tensor) -> Tensor:
                value = file.get_tensor(name).clone()
                if (value.shape, value.dtype) != (like.shape, like.dtype):
                    needs = f"not {like.dtype} {tuple(like.shape)}"
                    raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, {needs}")
                if like.is_floating_point() and not value.isfinite().all():
                    raise ValueError(f"{name} holds NaN or infinity")
                if name.startswith("exp_avg_sq.") and (value < 0).any():
                    raise ValueError(f"{name} holds a number below 0, of which there is no square root")
                return value

            order = [p for group in optimizer.param_groups for p in group["params"]]
            for i, parameter in enumerate(order if updates else ()):
                pair = {m: tensor(f"{m}.{names[parameter]}", parameter) for m in ("exp_avg", "exp_avg_sq")}
                moments[i] = {"step": torch.tensor(float(updates)), **pair}
            random = tensor("random.cpu", torch.get_rng_state())
            if next(model.parameters()).is_cuda and "random.cuda" in file.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(tensor("random.cuda", torch.cuda.get_rng_state()))
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(random)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise unreadable(path, error) from error

"""A checkpoint file of another project: its tensors by name, and no code from it.

Files of torch.save go through the weights-only unpickler, safetensors hold nothing but tensors.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.network_shape import WeightsError

# Where a file keeps its model; the first that is there.
CONTAINERS = ("state_dict", "model_state_dict", "model")
# What data parallelism, torch.compile and Lightning modules put in front of every name.
WRAPPERS = ("module.", "_orig_mod.", "model.")


class Inert:
    """Stands for every class in a checkpoint that is no tensor: takes anything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """One without content, whatever it is made from."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_file(path: Path) -> Mapping[str, Any]:
    """What a file of torch.save or safetensors holds.

    Nothing of a foreign class runs: the weights-only unpickler of torch refuses them, and the
    logs, settings and counters that some projects put beside their weights become ``Inert``.

    Raises:
        WeightsError: if it is no such file.
        OSError: if it cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: give a checkpoint, .pth or .safetensors")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a safetensors file ({error})") from error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        unknown = []  # files of before torch 1.6, and what is no file of torch.save
    inert: list[Any] = [(Inert, name) for name in unknown]
    try:
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, LookupError) as error:
        lines = re.split(r"WeightsUnpickler error:|\n", str(error))
        reason = next((line.strip() for line in lines[1:] if line.strip()), lines[0])[:160]
        raise WeightsError(
            f"{path} cannot be read without running code from it ({reason}): save its tensors alone"
            " where you trust it, with torch.save(checkpoint['state_dict'], FILE)"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def model_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors by name, without what training wrapped around the names."""
    if isinstance(content.get("classy_state_dict"), Mapping):
        content = content["classy_state_dict"]
    for name in CONTAINERS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    return {_unwrapped(name): tensor for name, tensor in _flat(content)}


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name

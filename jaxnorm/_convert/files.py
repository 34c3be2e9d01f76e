"""State dicts in files: safetensors, and torch's files of weights alone. Nothing is unpickled that is not an array."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._core.messages import shown
from .leaf import as_like, as_numpy
from .report import ConversionError

_TORCH = (".pt", ".pth", ".bin")


def read_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file, by name: of safetensors (needs no torch), or of torch (.pt, .pth, .bin).

    A file of torch is read with `weights_only=True`: no code in it runs. A dict with one entry "state_dict" or "model"
    is that entry.

    Raises:
      ConversionError: the file holds something else than named arrays.
      ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    if path.suffix in _TORCH:
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("state_dict", "model"):
            if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
                state = state[name]
        if not isinstance(state, Mapping) or not all(hasattr(value, "detach") for value in state.values()):
            raise ConversionError("read_file", [(str(path), f"it holds {shown(state)}, no arrays by name.")])
        return {name: as_numpy(value) for name, value in state.items()}
    raise ValueError(f"read_file: {path.name} must end in .safetensors, .pt, .pth or .bin.")


def write_file(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write arrays by name, such as a state dict, into a file of safetensors or of torch, by its suffix."""
    path = Path(path)
    if not isinstance(state, Mapping) or not all(hasattr(value, "shape") for value in state.values()):
        raise TypeError(
            f"write_file: state must be a flat dict of arrays, got {shown(state)}. Write model.state_dict()."
        )
    arrays = {name: np.ascontiguousarray(as_numpy(value)).reshape(value.shape) for name, value in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, path, metadata={"format": "pt"})
    elif path.suffix in _TORCH:
        import torch

        of = lambda a: as_like(a, torch.empty(0, dtype=getattr(torch, a.dtype.name)))
        torch.save({name: of(a) for name, a in arrays.items()}, path)
    else:
        raise ValueError(f"write_file: {path.name} must end in .safetensors, .pt, .pth or .bin.")

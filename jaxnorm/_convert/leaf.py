"""What a conversion sees of every library: arrays with a path, the name of their module, and their role in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

# What each library calls the same thing. A name that is not here is a role of its own.
_NAMES = {
    "weight": ("weight", "scale", "gamma", "kernel", "embedding", "embeddings", "w", "depthwise_kernel"),
    "bias": ("bias", "beta", "offset", "b"),
    "mean": ("mean", "running_mean", "moving_mean"),
    "var": ("var", "running_var", "moving_variance"),
    "steps": ("num_batches_tracked",),  # torch's
    "counter": ("counter",),  # of updates, of an average that is corrected for its start
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
OPTIONAL = (
    "steps",
    "counter",
    "count",
    "mean_hidden",
    "var_hidden",
    "var_counter",
    "seed_generator_state",
)  # a source may have them in vain


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a library's tree.

    Args:
      path: as the library writes it; unique in the tree.
      keys: the keys of the path, without those that say the collection.
      value: the array, or for a target a `jax.ShapeDtypeStruct`.
      kind: "dense", "conv", "transposed", "embedding" or "vector", where the library's object says it.
      layout: how this library lays out a kernel: a key of `layouts`.
      otherwise: for a target without a source of its role: (another role, what makes the value of that one's, words).
        An empty role takes nothing, and None in place of the function keeps what the target has.
    """

    path: str
    keys: tuple[str, ...]
    value: Any
    kind: str | None = None
    layout: str = "flax"
    role: str = ""
    otherwise: tuple[tuple[str, Callable[[Any], Any] | None, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", ROLES.get(self.keys[-1], self.keys[-1]) if self.keys else "")

    @property
    def name(self) -> str:
        return "/".join(self.keys)

    @property
    def module(self) -> str:
        return module_name(self.keys[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.value)


Specs = dict[str, tuple[Any, bool]]


class Store(Protocol):
    """A library's tree, opened: its arrays, and how new ones get into it."""

    library: str
    leaves: list[Leaf]
    specs: Specs  # by module: the norms that are known, and whether the layer is jaxnorm's

    def write(self, values: dict[str, np.ndarray]) -> Any:
        """The tree with these values, by path. Those that are not there stay as they are."""
        ...


def module_name(keys: tuple[str, ...]) -> str:
    """One spelling for "layer1.0.bn", "layer1_0/bn" and "layer1/~/0/bn"."""
    keys = tuple(key for key in keys if key not in ("~", ""))
    while keys and keys[0] in ("module", "_orig_mod"):  # torch's wrappers for devices and compilation
        keys = keys[1:]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(keys).lower())


def dtype_of(value: Any) -> np.dtype[Any]:
    """The dtype of an array of any library, as NumPy's."""
    return np.dtype(jnp.dtype(str(value.dtype).removeprefix("torch.")))


def as_numpy(value: Any) -> np.ndarray:
    """An array of any library as NumPy's, with its dtype."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu().contiguous()
    if str(value.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2"):  # NumPy has not
        import torch

        bits = torch.int16 if value.element_size() == 2 else torch.int8
        return value.view(bits).numpy().view(dtype_of(value)).copy()
    return value.numpy().copy()


def as_jax(value: np.ndarray, like: Any) -> Any:
    """A new array in the place of `like`: of its sharding, where it has one."""
    import jax

    sharding = getattr(like, "sharding", None)
    if sharding is not None and getattr(like, "committed", True):
        return jax.device_put(value, sharding)
    return jnp.asarray(value)


def as_like(value: np.ndarray, like: Any) -> Any:
    """A new array in the place of `like`: torch's, JAX's or NumPy's."""
    if hasattr(like, "detach"):
        import torch

        value = np.ascontiguousarray(value)
        bits = {2: np.int16, 1: np.int8}.get(value.dtype.itemsize) if value.dtype.kind == "V" else None
        made = torch.from_numpy(value.view(bits).copy()).view(like.dtype) if bits else torch.from_numpy(value.copy())
        return made.reshape(value.shape).to(like.device)
    return np.array(value) if isinstance(like, np.ndarray) else as_jax(value, like)

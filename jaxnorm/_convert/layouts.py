"""Layouts of kernels. Every one has a way to Flax's, and back.

Legend: I and O are input and output channels, k the spatial axes, g groups. Flax's kernel of a convolution is
(*k, I / g, O). Flax's kernel of a transposed convolution is that of the convolution over the dilated input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KINDS = ("dense", "conv", "depthwise", "transposed", "transposed_flipped", "embedding", "as_it_is")
_SPACE = {0: "", 1: "W", 2: "HW", 3: "DHW"}


class Kernel(NamedTuple):
    """How one library lays out one kind of kernel."""

    kind: str  # of `KINDS`, those that are one in Flax: "dense", "conv", "transposed", "embedding"
    order: str  # of the axes; k stands for the spatial ones
    flipped: bool = False  # along space

    def words(self, ndim: int) -> str:
        return self.order.replace("k", _SPACE.get(ndim - len(self.order.replace("k", "")), "k"))


FLAX = {
    "dense": Kernel("dense", "IO"),
    "conv": Kernel("conv", "kIO"),
    "depthwise": Kernel("conv", "kIO"),
    "transposed": Kernel("transposed", "kIO"),
    "transposed_flipped": Kernel("transposed", "kOI", True),
    "embedding": Kernel("embedding", "VD"),
}
_OUTPUTS_FIRST = {"dense": Kernel("dense", "OI"), "conv": Kernel("conv", "OIk"), "depthwise": Kernel("conv", "OIk")}
_TRANSPOSED = {
    "haiku": Kernel("transposed", "kOI"),
    "keras": Kernel("transposed", "kOI", True),
    "torch": Kernel("transposed", "IOk", True),
    "equinox": Kernel("transposed", "OIk"),
}
_OTHERS: dict[str, dict[str, Kernel]] = {"haiku": {}, "keras": {"depthwise": Kernel("conv", "kIM")}}
LAYOUTS = {"flax": FLAX} | {
    library: FLAX | _OTHERS.get(library, _OUTPUTS_FIRST) | {"transposed": kernel, "transposed_flipped": kernel}
    for library, kernel in _TRANSPOSED.items()
}


def to_flax(a: np.ndarray, kernel: Kernel, groups: int = 1) -> np.ndarray:
    """A kernel in Flax's layout. `groups` are those of torch's transposed convolution, whose O are those of a group."""
    if kernel.order in ("IO", "VD"):
        return a
    if kernel.order == "OI":
        return a.T
    n = a.ndim - 2
    if kernel.order == "kIM":  # the multiplier runs fastest
        return a.reshape(*a.shape[:n], 1, a.shape[n] * a.shape[n + 1])
    if kernel.order == "IOk" and groups > 1:
        a = a.reshape(groups, a.shape[0] // groups, *a.shape[1:])  # (g, I / g, O / g, *k)
        a = np.moveaxis(a, 0, 1).reshape(a.shape[1], groups * a.shape[2], *a.shape[3:])
    a = np.flip(a, _space(kernel, a.ndim)) if kernel.flipped else a
    return a.transpose(_order(kernel, a.ndim))


def from_flax(a: np.ndarray, kernel: Kernel, shape: tuple[int, ...], groups: int = 1) -> np.ndarray:
    """The reverse; `shape` is that of the result, for a depthwise kernel."""
    if kernel.order in ("IO", "VD"):
        return a
    if kernel.order == "OI":
        return a.T
    if kernel.order == "kIM":
        return a.reshape(shape)
    a = a.transpose(np.argsort(_order(kernel, a.ndim)))
    a = np.flip(a, _space(kernel, a.ndim)) if kernel.flipped else a
    if kernel.order == "IOk" and groups > 1:
        a = a.reshape(a.shape[0], groups, a.shape[1] // groups, *a.shape[2:])
        a = np.moveaxis(a, 1, 0).reshape(-1, *a.shape[2:])
    return a


def _order(kernel: Kernel, ndim: int) -> tuple[int, ...]:
    """The axes of the kernel in Flax's order (*k, I, O)."""
    n, order = ndim - 2, kernel.order
    first = 0 if order[0] == "k" else 2
    others = [n, n + 1] if order[0] == "k" else [0, 1]
    letters = order.replace("k", "")
    return (*range(first, first + n), others[letters.index("I")], others[letters.index("O")])


def _space(kernel: Kernel, ndim: int) -> tuple[int, ...]:
    first = 0 if kernel.order[0] == "k" else 2
    return tuple(range(first, first + ndim - 2))

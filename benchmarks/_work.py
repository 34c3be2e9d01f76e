"""A norm of one array on an accelerator: its data, its truth, and the fewest bytes that each pass of it must move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.field import TOLERANCE, Case

PASSES = ("forward", "backward", "forward+backward")
#: Bytes that a pass cannot but move, in units of x's: forward reads x and writes y, backward reads x and the cotangent
#: and writes dx. A batch fits no cache, so that batch norm reads x, and then x and g, once more. add_rms reads the
#: residual as well and writes the stream, whose cotangent comes back; gated_rms reads a gate and writes its gradient.
LEAST = {"batch": (3, 5), "add_rms": (4, 4), "gated_rms": (3, 5)}
#: Of jaxnorm's own: outputs and gradients of arrays are rounded once, and sums for parameters are float32.
STRICT = {"float32": (1e-5, 1e-5, 1e-3), "bfloat16": (4e-3, 4e-3, 1e-3)}
#: x is at least so much in a program, as several arrays if need be, at most `MOST`, so that no cache serves it and
#: starting the program costs little beside it. On a CPU the script is only tried.
ENOUGH, MOST = {"gpu": 1 << 28, "cpu": 1 << 15}, 16


class Data(NamedTuple):
    """Arrays of x's shape and parameters, NumPy's."""

    cotangents: list[np.ndarray]  # of each output
    args: list[np.ndarray]  # differentiated: x, (gate,) scale, (bias)
    consts: list[np.ndarray]  # (residual), whose gradient is x's


class Outcome(NamedTuple):
    """What a call gives, or should."""

    outs: list[np.ndarray]  # y, (the stream)
    gradients: list[np.ndarray]  # of args


def least(norm: str, which: str) -> int:
    forward, backward = LEAST.get(norm, (2, 3))
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[which]


def silu(z):
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


@dataclass(frozen=True)
class Work:
    """A norm of one array, whose rows (images) repeat a tile: its truth is that of all, and NumPy works on it alone."""

    norm: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.norm} norm, {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)

    def arrays(self, platform: str) -> int:
        """On how many arrays of this size one program works."""
        return min(MOST, max(1, math.ceil(ENOUGH[platform] / self.nbytes)))

    @property
    def tile(self) -> int:
        """How many rows are drawn."""
        most = max(1, min(self.shape[0], (1 << 20) // math.prod(self.shape[1:])))
        return next(n for n in range(most, 0, -1) if self.shape[0] % n == 0)

    @property
    def tiles(self) -> int:
        return self.shape[0] // self.tile

    @property
    def _plain(self) -> Case:
        return Case(self.norm.split("_")[-1], (self.tile, *self.shape[1:]), self.dtype)

    def data(self) -> Data:
        """Of a tile. Parameters are such as x's dtype can hold: some want them in it."""
        g, x, *params = self._plain.data()
        params = [p.astype(x.dtype).astype(np.float32) for p in params]
        normal = np.random.default_rng(1).standard_normal
        more = [normal(x.shape, np.float32).astype(x.dtype) for _ in range(2)]
        if self.norm == "add_rms":
            return Data([g, more[1]], [x, *params], more[:1])
        if self.norm == "gated_rms":
            return Data([g], [x, more[0], *params], [])
        return Data([g], [x, *params], [])

    def truth(self, data: Data) -> Outcome:
        """Of a tile, in float64, but for gradients of parameters, which are sums over all tiles."""
        (g, *more), (x, *params), _ = data
        of = self._plain.truth
        if self.norm == "add_rms":
            stream = (x.astype(np.float32) + data.consts[0].astype(np.float32)).astype(x.dtype)
            y, dx, *dparams = of(g, stream, *params)
            outs, arrays = [y, stream.astype(np.float64)], [dx + more[0].astype(np.float64)]
        elif self.norm == "gated_rms":
            gate, *params = params
            value, slope = silu(gate.astype(np.float64))
            y, dx, *dparams = of(g * value, x, *params)
            outs, arrays = [y * value], [dx, g * y * slope]
        else:
            y, dx, *dparams = of(g, x, *params)
            outs, arrays = [y], [dx]
        return Outcome(outs, [*arrays, *(self.tiles * d for d in dparams)])

    def errors(self, got: Outcome, truth: Outcome, strict: bool) -> list[float]:
        """The relative error of each output and gradient in the 2-norm; raises where it is not the norm."""
        loose = TOLERANCE[self.dtype]
        for_y, for_arrays, for_params = STRICT[self.dtype] if strict else (loose[0], loose[1], loose[1])
        limits = [for_y] * len(truth.outs)
        limits += [for_arrays if a.ndim == len(self.shape) else for_params for a in truth.gradients]
        for a in got.outs:
            if a.dtype.name != self.dtype:
                raise TypeError(f"got {a.dtype.name} where {self.dtype} is due")
        errors = []
        for a, t in zip((*got.outs, *got.gradients), (*truth.outs, *truth.gradients), strict=True):
            if a.shape != t.shape:
                raise TypeError(f"got the shape {a.shape} where {t.shape} is due")
            errors.append(float(np.linalg.norm(a.astype(np.float64) - t) / np.linalg.norm(t)))
        if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            raise ValueError(f"relative errors of {', '.join(f'{e:.1e}' for e in errors)} (at most {limits})")
        return errors


def called(peer, norm: str, of_gate: Callable) -> Callable:
    """The norm as a call (*args, *consts) -> outputs: the peer's own where it has one, else composed of what it has."""
    if hasattr(peer, norm):
        return getattr(peer, norm)

    def add_rms(x, scale, residual):
        stream = x + residual
        return peer.norm("rms", stream, scale), stream

    def gated_rms(x, gate, scale):
        return (peer.norm("rms", x, scale) * of_gate(gate),)

    composed = {"add_rms": add_rms, "gated_rms": gated_rms}
    return composed.get(norm, lambda *args: (peer.norm(norm, *args),))


def takes(peer, norm: str) -> bool:
    norms = getattr(peer, "norms", None)
    return norms is None or norm in norms or (norm.endswith("_rms") and "rms" in norms)

"""A norm of one array: its data, its truth by `tests/oracle.py`, and the fewest bytes that each pass must move."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (NumPy learns bfloat16)
import numpy as np
import oracle

EPSILON, GROUPS, HEAD = 1e-5, 32, 128  # epsilon, groups of a group norm, channels of a head
FP8_SCALE = 6 / 448  # of a whole tensor, static
#: RMS norms that end in 8 bits: data, and scales that dequantize it. In bfloat16, and forward alone.
FORMATS = ("fp8", "fp8_row", "int8_row", "mxfp8")
PASSES = ("forward", "backward", "forward+backward")
#: Copies of x that a pass takes at least, where a copy reads and writes x once. Forward reads x and writes y; backward
#: reads x and the cotangent and writes dx. A batch fits no cache, so batch norm reads x, and then x and g, once more.
#: add_rms also reads the residual and writes the stream, whose cotangent comes back; gated_rms reads a gate and writes
#: its gradient. k of qk_norm has a quarter of q's heads; a norm before the addition also reads the residual, whose
#: gradient is the cotangent; `rms_add_next` normalizes the sum, too. Norms that end in 8 bits have no backward pass.
LEAST = {"batch": (1.5, 2.5), "add_rms": (2.0, 2.0), "gated_rms": (1.5, 2.5), "qk": (1.25, 1.875),
         "rms_add": (1.5, 1.5), "layer_add": (1.5, 1.5), "rms_add_next": (2.0, 3.0),
         **dict.fromkeys(FORMATS, (0.75, 0.0))}  # fmt: skip
#: Largest relative errors in the 2-norm, of outputs, gradients of arrays, and gradients of parameters. The first shows
#: that a library computes the norm it was asked for. (Some sum the gradients of parameters in bfloat16 and lose a fifth
#: of them.) The second, for `strict` peers, is one rounding of arrays, and float32 sums for parameters.
TOLERANCE = {"float32": (1e-3, 1e-3, 1e-3), "bfloat16": (2e-2, 5e-1, 5e-1)}
STRICT = {"float32": (1e-5, 1e-5, 1e-3), "bfloat16": (4e-3, 4e-3, 1e-3)}


class Data(NamedTuple):
    """NumPy arrays of x's shape, and parameters."""

    cotangents: list[np.ndarray]  # of each output
    args: list[np.ndarray]  # differentiated: x, (gate,) scale, (bias)
    consts: list[np.ndarray]  # (residual), whose gradient is that of x


class Outcome(NamedTuple):
    outs: list[np.ndarray]  # y, (the stream)
    gradients: list[np.ndarray]  # of args


def least(norm: str, which: str) -> float:
    forward, backward = LEAST.get(norm, (1.0, 1.5))
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[which]


@dataclass(frozen=True)
class Case:
    """A norm of one array. Its rows or images repeat a tile, so NumPy computes the truth of the tile only."""

    norm: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Case:
        norm, shape, dtype = text.split(":")
        return cls(norm, tuple(int(n) for n in shape.split("x")), dtype)

    def __str__(self) -> str:
        return f"{self.norm} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def record(self) -> dict:
        return {"norm": self.norm, "shape": "x".join(map(str, self.shape)), "dtype": self.dtype}

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)

    @property
    def tile(self) -> int:
        """Rows (images) of a tile."""
        most = max(1, min(self.shape[0], (1 << 20) // math.prod(self.shape[1:])))
        return next(n for n in range(most, 0, -1) if self.shape[0] % n == 0)

    @property
    def tiles(self) -> int:
        return self.shape[0] // self.tile

    def data(self) -> Data:
        """Data of a tile. Parameters are representable in x's dtype, because some libraries store them in it."""
        shape, dtype = (self.tile, *self.shape[1:]), np.dtype(self.dtype)
        normal = np.random.default_rng(0).standard_normal
        g, x, gate_or_residual, dstream = (normal(shape, np.float32).astype(dtype) for _ in range(4))
        scale, bias = (m + normal(shape[-1], np.float32) / 8 for m in (1, 0))
        params = [p.astype(dtype).astype(np.float32) for p in (scale, bias)]
        params = params[:1] if self.norm.endswith("rms") else params
        if self.norm == "add_rms":
            return Data([g, dstream], [x, *params], [gate_or_residual])
        return Data([g], [x, *[gate_or_residual] * (self.norm == "gated_rms"), *params], [])

    def truth(self, data: Data) -> Outcome:
        """Of a tile, in float64. Gradients of parameters are sums over all tiles."""
        (g, *dstream), (x, *params), consts = data
        gate = [params.pop(0)] if self.norm == "gated_rms" else []
        if consts:
            x = (x.astype(np.float32) + consts[0].astype(np.float32)).astype(x.dtype)
        value, slope = (f(oracle.wide(gate[0])) if gate else 1.0 for f in oracle.ACTIVATIONS["silu"])
        params = [p.reshape(*[1] * (x.ndim - 1), -1) for p in params]
        args = x, oracle.labels(self.norm, x.shape, GROUPS), *params, *[None] * (2 - len(params))
        options = dict(epsilon=EPSILON, centered=not self.norm.endswith("rms"))
        y = oracle.normalize(*args, **options).y
        dx, *dparams = oracle.gradients(*args, oracle.wide(g) * value, **options)
        dx = dx + sum(map(oracle.wide, dstream))
        dgate = [g * y * slope for _ in gate]
        dparams = [self.tiles * d.reshape(-1) for d in dparams if d is not None]
        return Outcome([y * value, *[oracle.wide(x) for _ in consts]], [dx, *dgate, *dparams])

    def errors(self, got: Outcome, truth: Outcome, strict: bool) -> list[float]:
        """The relative error of each output and gradient in the 2-norm. Raises if they are not those of the norm."""
        for_y, for_arrays, for_params = (STRICT if strict else TOLERANCE)[self.dtype]
        limits = [for_y] * len(truth.outs)
        limits += [for_arrays if a.ndim > 1 else for_params for a in truth.gradients]
        if wrong := [a.dtype.name for a in got.outs if a.dtype.name != self.dtype]:
            raise TypeError(f"got {wrong[0]}, expected {self.dtype}")
        errors = []
        for a, t in zip((*got.outs, *got.gradients), (*truth.outs, *truth.gradients), strict=True):
            if a.shape != t.shape:
                raise TypeError(f"got the shape {a.shape}, expected {t.shape}")
            errors.append(float(f"{np.linalg.norm(oracle.wide(a) - t) / np.linalg.norm(t):.4g}"))
        if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            raise ValueError(f"relative errors of {', '.join(f'{e:.1e}' for e in errors)} (limits: {limits})")
        return errors


def turns(nbytes: int) -> int:
    """The number of arrays of this size to alternate between so that none stays in the last cache; 1 if small."""
    cache = 1 << 25
    with suppress(ValueError, OSError):  # if the system does not say
        cache = max(cache, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    return 1 if nbytes <= 1 << 21 else max(2, math.ceil(2 * cache / nbytes))

"""One configuration, as a value that prints as the line of Python that makes it; and the drawing of such."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .truth import Setting

Shape = tuple[int, ...]
MOMENTS = ("count", "mean", "m2")
PARTS = ("x", "residual", "scale", "bias", "gate", "weights", "mean", "var")  # differentiable operands


@dataclass(frozen=True)
class Case:
    """A norm and its options. Shapes have x's rank, with 1 where an operand broadcasts; None is an absent operand."""

    norm: str
    shape: Shape
    axes: Shape  # normalized axes, or those of the channels
    scale: Shape | None = None
    bias: Shape | None = None
    mask: Shape | None = None
    weights: Shape | None = None
    gate: Shape | None = None
    groups: int | None = None
    reduced: Shape | None = None  # group norm: reduction_axes
    x_dtype: str = "float32"
    param_dtype: str = "float32"  # of scale, bias, weights, gate, residual, mean and var
    dtype: str | None = None  # of the output
    epsilon: float = 1e-5
    scale_offset: float = 0.0
    activation: str | None = None
    norm_before_gate: bool = True
    cast: str = "after_scale"
    train: str = "yes"  # "no", "traced"
    state: tuple = ()  # options of batch norm about its state, as pairs
    ghosts: int | None = None  # virtual_batch_size
    transform: str = "value"
    wrt: tuple[str, ...] = ("x",)  # what derivatives are taken of, and what vmap maps besides
    jit: bool = True
    x64: bool = False
    # The data: all of the above makes one program, whatever these are.
    mean: float = 0.0  # of x, in units of its standard deviation
    magnitude: float = 1.0  # that standard deviation
    density: float = 0.7  # of the mask
    poison: str | None = None  # "nan", "inf", "-inf": in padding; with "!" in front, in an element that counts
    seed: int = 0

    def __repr__(self) -> str:
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def program(self) -> Case:
        """The same for all data that one compiled program serves."""
        return dataclasses.replace(self, mean=0.0, magnitude=1.0, density=0.7, poison=None, seed=0)

    @property
    def channel(self) -> int:
        return self.axes[0]

    @property
    def accumulator(self) -> str:
        stream = self.param_dtype if self.norm.startswith("add") else self.x_dtype
        return "float64" if stream == "float64" else "float32"

    @property
    def out(self) -> str:
        return self.dtype or self.x_dtype

    def dtype_of(self, name: str) -> str:
        return self.x_dtype if name == "x" else self.param_dtype

    def labels(self) -> np.ndarray:
        """The number of each element's statistic."""
        index, rank = np.indices(self.shape), len(self.shape)
        split = lambda channel, size: [index[channel] // max(size, 1)]
        if self.norm == "group":
            reduced = [a for a in range(rank) if a != 0 or a == self.channel] if self.reduced is None else self.reduced
            parts = [index[a] for a in range(rank) if a not in reduced]
            parts += split(self.channel, self.shape[self.channel] // self.groups)
        elif self.norm == "instance":
            parts = [index[a] for a in (0, *self.axes)]
        elif self.norm == "batch":
            parts = [index[a] for a in self.axes]
            if self.ghosts is not None and self.train != "no":
                batch = next(a for a in range(rank) if a not in self.axes)
                parts += split(batch, self.ghosts)
        else:
            parts = [index[a] for a in range(rank) if a not in self.axes]
            if self.groups is not None:
                parts += split(self.channel, self.shape[self.channel] // self.groups)
        parts = parts or [np.zeros(self.shape, int)]
        return np.unique(np.stack([p.ravel() for p in parts], -1), axis=0, return_inverse=True)[1].reshape(self.shape)

    def setting(self, mask) -> Setting:
        return Setting(
            self.labels(), 0.0 if self.norm == "moments" else self.epsilon,
            self.norm not in ("rms", "gated", "add_rms"), self.activation,
            None if self.norm != "gated" else "after" if self.norm_before_gate else "before",
            self.norm == "normalize" or (self.norm == "batch" and self.train == "no"), self.scale_offset, mask,
        )  # fmt: skip

    def shape_of(self, name: str) -> Shape | None:
        """Of an operand, in x's rank."""
        if name in ("x", "residual"):
            return self.shape if name == "x" or self.norm.startswith("add") else None
        if name in ("mean", "var"):
            return _along(self.shape, self.axes) if self.norm == "normalize" else None
        return getattr(self, name)


def _along(shape: Shape, axes) -> Shape:
    return tuple(n if a in axes else 1 for a, n in enumerate(shape))


def operands(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The operands in their own dtypes, and the mask."""
    rng = np.random.default_rng(case.seed)
    x = case.magnitude * (rng.normal(size=case.shape) + case.mean)
    o: dict[str, Any] = {"x": x}
    mask = None
    if case.mask is not None:
        mask = rng.random(case.mask) < case.density
        if rng.random() < 0.3:  # nothing at all for one index of an axis
            axis = int(rng.integers(len(case.shape)))
            mask[(slice(None),) * axis + (0,)] = False
    draws = {
        "residual": lambda s: case.magnitude * rng.normal(size=s),
        "scale": lambda s: rng.normal(size=s) + 1.0 - case.scale_offset,
        "bias": lambda s: rng.normal(size=s),
        "gate": lambda s: 1.5 * rng.normal(size=s),
        "weights": lambda s: rng.uniform(0.2, 2.0, s) * (rng.random(s) < 0.5 + 0.5 * case.density),
        "mean": lambda s: case.magnitude * (case.mean + 0.1 * rng.normal(size=s)),
        "var": lambda s: case.magnitude**2 * rng.uniform(0.5, 2.0, s),
    }
    for name, draw in draws.items():
        if (shape := case.shape_of(name)) is not None:
            o[name] = draw(shape)
    o = {k: v.astype(jnp.dtype(case.dtype_of(k))) for k, v in o.items()}
    if case.poison is not None:
        counts = np.broadcast_to(True if mask is None else mask, case.shape)
        if "weights" in o:
            counts = counts & (np.broadcast_to(o["weights"], case.shape) != 0)
        where = counts if case.poison.startswith("!") else ~counts
        value, (hits,) = float(case.poison.lstrip("!")), np.nonzero(where.ravel())
        if len(hits):
            x = o["x"] = o["x"].copy()
            at = rng.choice(hits, size=1 if case.poison.startswith("!") else -(-len(hits) // 3), replace=False)
            x.reshape(-1)[at] = value
            if case.gate == case.shape and not case.poison.startswith("!"):
                o["gate"] = o["gate"].copy()
                o["gate"].reshape(-1)[at[::2]] = value
    return o, mask


# --- drawing ----------------------------------------------------------------------------------------------------------

SHAPES: tuple[Shape, ...] = (
    (4, 6, 40), (6, 5, 4, 12), (48, 7), (3, 130), (5, 33, 8), (2, 3, 5, 2, 8), (16, 1), (1, 64), (2, 700), (12, 4, 24),
    (64,), (9, 6),
)  # fmt: skip
NORMS = ("layer", "rms", "group", "instance", "batch", "batch", "gated", "add_rms", "add_layer", "normalize", "moments")
TRANSFORMS = ("value", "vjp", "vjp", "jvp", "vmap", "vmap-vjp", "second", "second-reverse")
STATES = ((), (("momentum", 0.9),), (("momentum", None),), (("zero_debias", True),), (("unbiased_running_var", True),),
          (("min_count", 5.0),), (("skip_nonfinite", True),))  # fmt: skip


def drawn(seed: int, index: int, per_program: int = 4, wide: bool = False) -> Case:
    """Configuration number `index`. Neighbours share a program and differ in their data.

    wide: magnitudes from 1e-30 to 1e30 in place of 1e-3 to 1e4. Where float32 has to hold variances or second
    derivatives, they are from 1e-12 to 1e12.
    """
    case = _program(np.random.default_rng((seed, index // per_program)))
    rng = np.random.default_rng((seed, index, 1))
    pick = lambda *values: values[int(rng.integers(len(values)))]
    half = case.x_dtype in ("float16", "bfloat16")
    top = 3.0 if half else 1e4
    held = case.norm in ("batch", "moments", "normalize") or case.transform.startswith("second")
    low, high = (-12, 12) if held else (-30, 30)
    low, high = (low, high) if wide and case.x_dtype != "float16" else (-3, 4 - 2 * half)
    magnitude = 10 ** rng.uniform(low, high)
    poison = None
    absent = case.mask is not None or case.weights is not None
    if absent and rng.random() < 0.25:
        poison = pick("nan", "inf", "-inf")
    elif case.transform == "value" and not case.norm.startswith("add") and rng.random() < 0.15:
        poison = "!" + pick("nan", "inf", "-inf")
    mean = pick(0.0, 0.0, 1.0, 3.0, 30.0, 1e3, top) if not half else pick(0.0, 0.0, 1.0, top)
    magnitude = min(magnitude, 1e29 / (1.0 + mean))  # so that x is within 1e30
    return dataclasses.replace(
        case, mean=mean, magnitude=float(f"{magnitude:.2g}") if rng.random() < 0.6 else 1.0,
        density=pick(0.7, 0.7, 0.3, 0.97, 0.05), poison=poison, seed=int(rng.integers(1 << 30)),
    )  # fmt: skip


def _program(rng: np.random.Generator) -> Case:
    pick = lambda *values: values[int(rng.integers(len(values)))]
    chance = lambda p: bool(rng.random() < p)
    norm = pick(*NORMS)
    least = 2 if norm in ("group", "instance", "batch") else 1
    shape = pick(*(s for s in SHAPES if len(s) >= least))
    rank, some = len(shape), lambda n, low=1: tuple(sorted(rng.choice(n, size=rng.integers(low, n + 1), replace=False)))
    spread = lambda s, p=0.5: tuple(1 if chance(p) else n for n in s)
    more: dict[str, Any] = {}
    axes: Shape = (rank - 1,)
    if norm in ("layer", "rms", "add_rms", "add_layer", "moments"):
        axes = pick((rank - 1,), (rank - 1,), some(rank))
    elif norm == "normalize":
        axes = pick((rank - 1,), some(rank))
    elif norm == "instance":
        axes = pick((rank - 1,), (1,))
    elif norm == "batch":
        axes = pick((rank - 1,), (rank - 1,), (int(rng.integers(rank)),))
    elif norm in ("group", "gated"):
        axes = pick((rank - 1,), (rank - 1,), (int(rng.integers(rank)),))
        size = shape[axes[0]]
        more["groups"] = pick(*(d for d in range(1, size + 1) if size % d == 0))
    axes = tuple(int(a) for a in axes)
    if norm == "group" and chance(0.3):
        more["reduced"] = tuple(sorted({*axes, *(a for a in range(rank) if chance(0.5))}))
    if norm != "moments":
        kinds = (None, _along(shape, axes), _along(shape, axes), spread(shape), shape)
        more["scale"] = pick(*kinds)
        more["bias"] = None if norm == "gated" else pick(*kinds)
        more["epsilon"] = pick(0.0, 1e-6, 1e-5, 1e-5, 1e-3, 0.1)
        more["scale_offset"] = pick(0.0, 0.0, 1.0)
        names = ("relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
        more["activation"] = pick(*names) if norm == "gated" or chance(0.35) else None
        more["dtype"] = pick(None, None, None, "float32", "bfloat16", "float16")
    if norm in ("rms", "gated", "add_rms") and chance(0.3):
        more["cast"] = "before_scale"
    if norm == "gated":
        more |= dict(gate=pick(shape, shape, spread(shape)), norm_before_gate=chance(0.5))
    if norm not in ("normalize",):
        more["mask"] = pick(None, None, shape, spread(shape), (*shape[:-1], 1), shape[:1] + (1,) * (rank - 1))
    if norm in ("batch", "moments") and chance(0.4):
        more["weights"] = pick(shape, spread(shape), shape[:1] + (1,) * (rank - 1))
    if norm == "batch":
        more["state"], more["train"] = pick(*STATES), pick("yes", "yes", "yes", "traced", "no")
        batch = next((a for a in range(rank) if a not in axes), None)
        if batch is not None and chance(0.25):
            more["ghosts"] = pick(1, 2, 3, 8)
        if more["train"] == "no":
            more["ghosts"] = None
    x_dtype = pick("float32", "float32", "float32", "bfloat16", "float16", "float64")
    case = Case(
        norm, shape, axes, x_dtype=x_dtype, param_dtype=pick("float32", "float32", x_dtype, "bfloat16"),
        transform=pick(*TRANSFORMS), jit=chance(0.5), x64=x_dtype == "float64" or chance(0.05), **more,
    )  # fmt: skip
    there = [p for p in PARTS if case.shape_of(p) is not None]
    wrt = tuple(p for p in there if chance(0.7)) or (pick(*there),)
    return dataclasses.replace(case, wrt=wrt)


def simpler(case: Case):
    """The same with one thing simpler each."""
    plain = Case(case.norm, case.shape, case.axes)
    for f in dataclasses.fields(Case):
        default = getattr(plain, f.name)
        if f.name in ("norm", "shape", "axes", "groups", "gate", "wrt", "seed") or getattr(case, f.name) == default:
            continue
        new = dataclasses.replace(case, **{f.name: default})
        wrt = tuple(p for p in new.wrt if new.shape_of(p) is not None)
        yield dataclasses.replace(new, wrt=wrt or ("x",))
    for part in case.wrt if len(case.wrt) > 1 else ():
        yield dataclasses.replace(case, wrt=tuple(p for p in case.wrt if p != part))
    for transform in ("value", "vjp", "jvp"):
        if case.transform not in ("value", transform):
            yield dataclasses.replace(case, transform=transform)


def size(case: Case) -> int:
    return math.prod(case.shape)

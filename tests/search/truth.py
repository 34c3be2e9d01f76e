"""What is right, in float64 NumPy, and how far from it float arithmetic may end up.

The values use labels and `np.bincount`, as tests/oracle.py does. The gradients are closed formulas. Every formula is
analytic in every operand, so a derivative of it in a direction t is Im f(x + i h t) / h, exact to rounding ("complex
step"): that is the truth of jvp, and of second derivatives. `test_search.py` holds the formulas to it as well.

The tolerances are all in `Bounds`. An operation in the accumulator's dtype has a relative error of u (2**-24, or
2**-53). A result may be off by `SLACK` times what the errors of its terms add up to, and by half a unit in the last
place of its own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from oracle import ACTIVATIONS, reduced_to, total
from scipy.special import erf

STEP = 1e-20  # of the complex step: its square is nothing in float64

_cdf = lambda z: 0.5 * (1.0 + erf(z / math.sqrt(2.0)))
_pdf = lambda z: np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
F = {  # f and its derivative, for complex arguments too
    **ACTIVATIONS,
    "relu": (lambda z: np.where(z.real > 0, z, 0.0), lambda z: np.where(z.real > 0, 1.0, 0.0)),
    "gelu": (lambda z: z * _cdf(z), lambda z: _cdf(z) + z * _pdf(z)),
}


@dataclass(frozen=True)
class Setting:
    """The static part of a norm. Operands are a dict of float64 arrays of x's rank; an absent one is missing."""

    labels: np.ndarray  # of x's shape: the number of each element's statistic
    epsilon: float
    centered: bool = True
    activation: str | None = None
    gate: str | None = None  # "before", "after"
    given: bool = False  # mean and var are operands
    offset: float = 0.0  # scale_offset
    mask: Any = None


def exact_total(a, labels):
    """Sums by label, given back to every element, rounded once.

    `total` adds one term after another: N equal weights round alike, and make an error of up to N / 2 units.
    """
    if np.iscomplexobj(a):
        return exact_total(a.real, labels) + 1j * exact_total(a.imag, labels)
    groups = np.split(a.ravel()[np.argsort(labels, axis=None)], np.cumsum(np.bincount(labels.ravel()))[:-1])
    return np.array([math.fsum(group) for group in groups])[labels]


def forward(how: Setting, o: dict) -> dict:
    """Everything on the way from x to y, each of x's shape."""
    f, _ = F[how.activation]
    x, keep = o["x"], np.broadcast_to(True if how.mask is None else how.mask, o["x"].shape)
    w = np.where(keep, o.get("weights", 1.0) + np.zeros(x.shape), 0.0)
    absent = w.real == 0
    gate = o.get("gate")
    if gate is not None:  # what is masked out and not usable counts as 0
        gate = gate + np.zeros(x.shape)
        gate = np.where(absent & ~(np.abs(gate) < 1e4), 0.0, gate)
    with np.errstate(invalid="ignore"):
        poisoned = absent & ~(np.abs(x) <= 1e30)
    u = np.where(poisoned, 0.0, x)
    if how.gate == "before":
        u = u * f(gate)
    n = exact_total(w, how.labels)
    safe = np.where(n.real == 0, 1.0, n)
    if how.given:
        mu, v = (o[k] + np.zeros(x.shape) for k in ("mean", "var"))
        d = u - mu
    else:
        usable = np.where(poisoned, 0.0, w)
        of_mean = total(usable, how.labels)
        of_mean = np.where(of_mean.real == 0, 1.0, of_mean)
        shift = total(usable.real * u.real, how.labels) / of_mean.real * how.centered  # any number near the mean
        d = u - shift
        rest = total(usable * d, how.labels) / of_mean * how.centered
        d, mu = d - rest, shift + rest
        v = total(usable * d**2, how.labels) / safe
        v = v - np.where(v.real <= 1e-26 * np.abs(mu) ** 2, v.real, 0.0)  # of a constant: rounding alone
    if how.gate != "before":
        d = np.where(poisoned, mu.real - mu, d)  # a constant that equals the mean
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(
            ((n.real == 0) & (not how.given)) | ((v + how.epsilon).real == 0), 0.0, 1.0 / np.sqrt(v + how.epsilon)
        )
    s = o["scale"] + how.offset if "scale" in o else 1.0  # an absent scale is 1 whatever the offset
    s, b = s + np.zeros(x.shape), o.get("bias", 0.0) + np.zeros(x.shape)
    xhat = d * r
    z = xhat * s + b
    huge = absent & ~(np.abs(z) < 1e4) & (how.activation is not None and not how.gate)  # an activation may overflow
    z = np.where(huge, 0.0, z)
    y = z * f(gate) if how.gate == "after" else z if how.gate else f(z)
    return dict(locals())


def gradients(how: Setting, o: dict, g) -> dict:
    """The cotangents of all operands, each in its own shape, for the cotangent g of y."""
    t = forward(how, o)
    each = cotangents(how, t, g)
    return {name: reduced_to(a, o[name]) for name, a in each.items() if name in o}


def cotangents(how: Setting, t: dict, g) -> dict:
    """The same before they are summed to the shapes of broadcast operands; with t all of `forward`."""
    f, df = F[how.activation]
    still = lambda a: np.where(t["poisoned"], 0.0, a)
    x, gate, w, n, v, r, xhat, z = (t[k] for k in ("x", "gate", "w", "safe", "v", "r", "xhat", "z"))
    out = {}
    gz = g * f(gate) if how.gate == "after" else g if how.gate else np.where(t["huge"], 0.0, g * df(z))
    if how.gate == "after":
        out["gate"] = g * z * df(gate)
    h = gz * t["s"]
    out |= {"scale": gz * xhat, "bias": gz, "gz": gz, "h": h}
    if how.given:
        return {**out, "x": still(h * r), "mean": -h * r, "var": -0.5 * h * xhat * r**2}
    of_h, of_hx = total(h, how.labels) * how.centered, total(h * xhat, how.labels)
    du = still(r * (h - w / n * (of_h + xhat * of_hx)))
    dw = -(of_h * xhat + 0.5 * of_hx * (xhat**2 - v * r**2)) / n
    out["weights"] = np.where(t["keep"], dw, 0.0)
    if how.gate == "before":
        return {**out, "x": du * f(gate), "gate": du * still(x) * df(gate), "du": du}
    return {**out, "x": du, "du": du}


def moments(how: Setting, o: dict) -> dict:
    """count, mean and m2, of x's shape."""
    t = forward(how, o)
    return dict(count=t["n"], mean=t["mu"], m2=t["v"] * t["safe"])


def moments_gradients(how: Setting, o: dict, g: dict) -> dict:
    """g: the cotangents of count, mean and m2, of x's shape, each statistic's spread over its elements."""
    t = forward(how, o)
    d, w = t["d"], t["w"]
    dx = w / t["safe"] * g["mean"] + 2.0 * w * d * g["m2"]
    dw = g["count"] + g["mean"] * d / t["safe"] + g["m2"] * d**2
    dx = np.where(t["poisoned"], 0.0, dx)  # padding is a constant, also while its weight moves away from 0
    each = {"x": dx, "weights": np.where(t["keep"], dw, 0.0)}
    return {name: reduced_to(a, o[name]) for name, a in each.items() if name in o}


def along(f, o: dict, tangents: dict):
    """The derivative of f(o) in the direction of the tangents, of every array in what f returns."""
    moved = {k: a + 1j * STEP * tangents[k] if k in tangents else a for k, a in o.items()}
    slope = lambda a: np.imag(a) / STEP
    out = f(moved)
    return {k: slope(a) for k, a in out.items()} if isinstance(out, dict) else slope(out)


# --- how far a result may be ------------------------------------------------------------------------------------------

SLACK = 3.0  # times the sum of the errors of all terms
STEEP = 1.2  # no activation has a larger slope, nor a larger second derivative


def half_ulp(dtype, value):
    """Half a unit in the last place of a dtype at these values."""
    info = jnp.finfo(dtype)
    return 0.5 * float(info.eps) * np.abs(value) + float(info.smallest_subnormal) + float(jnp.finfo("float32").tiny)


class Bounds:
    """The error that rounding may make of each result, elementwise; from magnitudes, so that no term cancels."""

    def __init__(self, how: Setting, o: dict, accumulator: str, twice: str | None = None):
        """twice: the dtype to which x / rms and x / rms * scale are rounded on the way, if they are."""
        self.how, self.t = how, forward(how, o)
        t = {k: np.abs(a) if isinstance(a, np.ndarray) else a for k, a in self.t.items()}
        self.a = t
        sizes = np.bincount(how.labels.ravel()) if how.labels.size else np.ones(1)
        # A sum of n terms may be off by sqrt(n) u of their magnitude. In places of x's own unit 1 / r the mean, which
        # is held as a sum of two floats, and x minus it are as exact, whatever the mean.
        # What is rounded before the scale goes on in the dtype of the output, in float32 at least.
        after = accumulator if twice is None or jnp.finfo(twice).bits >= 64 else "float32"
        self.u = SLACK * float(np.finfo(after).eps) / 2 * (2.0 + 0.25 * math.sqrt(sizes.max(initial=1)))
        rounding = 0.0 if twice is None else float(jnp.finfo(twice).eps)
        self.xhat = self.u * (1.0 + t["xhat"]) + rounding * t["xhat"]
        self.z = t["s"] * self.xhat + self.u * (t["s"] * t["xhat"] + t["b"]) + rounding * t["z"]
        gate = 0.0 if how.gate is None else np.abs(F[how.activation][0](self.t["gate"]))
        self.of_gate = (gate, self.u * (1.0 + t["gate"])) if how.gate else (0.0, 0.0)

    def y(self, dtype):
        f, df = self.of_gate
        error = f * self.z + self.a["z"] * df if self.how.gate == "after" else self.z * STEEP
        return error + self.u * self.a["y"] + half_ulp(dtype, self.a["y"])

    def gradients(self, g, o: dict, dtypes: dict) -> dict:
        """Of the cotangents of all operands."""
        how, t, u = self.how, self.a, self.u
        c, a = cotangents(how, self.t, g), {k: np.abs(v) for k, v in cotangents(how, self.t, g).items()}
        g = np.abs(g)
        sums = lambda v: total(v, how.labels)
        f, df = self.of_gate
        if how.gate == "after":
            gz = g * df + u * a["gz"]
        elif how.gate:
            gz = u * g
        else:
            kink = np.where(t["z"] <= self.z, 1.0, 0.0) if how.activation == "relu" else 0.0
            gz = u * a["gz"] + g * (0.0 if how.activation is None else u + STEEP * self.z + kink)
        h = t["s"] * gz + u * a["h"]
        each = {"scale": gz * t["xhat"] + a["gz"] * self.xhat, "bias": gz}
        if how.gate == "after":
            each["gate"] = STEEP * g * self.z + u * g * t["z"] * (1.0 + t["gate"])
        if how.given:
            each |= {"x": (h + u * a["h"]) * t["r"], "mean": (h + u * a["h"]) * t["r"]}
            each["var"] = (h * t["xhat"] + a["h"] * self.xhat) * t["r"] ** 2
        else:
            n, share = t["safe"], t["w"] / t["safe"]
            sum_h, err_h = sums(a["h"]), sums(h) + u * sums(a["h"])
            sum_hx = sums(a["h"] * t["xhat"])
            err_hx = sums(h * t["xhat"] + a["h"] * self.xhat) + u * sum_hx
            du = h + share * (err_h + t["xhat"] * err_hx + self.xhat * sum_hx)
            du = t["r"] * (du + u * (a["h"] + share * (sum_h + t["xhat"] * sum_hx)))
            squares = t["xhat"] ** 2 + t["v"] * t["r"] ** 2
            dw = err_h * t["xhat"] + sum_h * self.xhat + err_hx * squares + sum_hx * (2 * t["xhat"] + 1) * self.xhat
            each["weights"] = dw / n + u * squares * sum_hx / n
            each["x"] = du
            if how.gate == "before":
                each["x"] = du * f + a["du"] * df
                each["gate"] = STEEP * du * t["x"] + a["du"] * np.where(t["poisoned"], 0.0, t["x"]) * u * (
                    2 + t["gate"]
                )
        out = {}
        for name, error in each.items():
            if name in dtypes:
                error = np.where(np.isfinite(error), error, 0.0)  # padding that is poisoned, and so not compared
                total_of = lambda a, name=name: reduced_to(a, o[name])
                size = total_of(np.where(np.isfinite(a[name]), a[name], 0.0))
                out[name] = total_of(error) + u * size + half_ulp(dtypes[name], total_of(c[name]))
        return out

    def tangent(self, dtype, moving: dict, slope):
        """Of the tangent of y, whose true value is `slope`."""
        how, t, u = self.how, self.a, self.u
        m = {k: np.abs(a) + np.zeros(t["x"].shape) for k, a in moving.items()}
        zero, sums = np.zeros(t["x"].shape), lambda v: total(v, how.labels)
        f, df = self.of_gate
        dx, dgate = m.get("x", zero), m.get("gate", zero)
        if how.gate == "before":
            dx = dx * f + t["x"] * STEEP * dgate
            dx = np.where(t["poisoned"], 0.0, dx)
        a, share = t["r"] * dx, t["w"] / t["safe"]
        near, squares = (1.0 + t["xhat"]), t["xhat"] ** 2 + 1.0
        if how.given:
            inner = a + t["r"] * m.get("mean", zero) + t["xhat"] * t["r"] ** 2 * m.get("var", zero)
            error = u * inner
        else:
            weights = np.where(t["keep"], m.get("weights", zero), 0.0) / t["safe"]
            first, second = sums(share * a + weights * t["xhat"]), sums(share * a * t["xhat"] + weights * squares)
            inner = a + first + t["xhat"] * second
            error = 4.0 * u * (a + near * sums(share * a * near + weights * near * squares))
        dz = t["s"] * inner + t["xhat"] * m.get("scale", zero) + m.get("bias", zero)
        error = t["s"] * error + 2.0 * u * dz + self.xhat * m.get("scale", zero)
        error = error + t["s"] * self.xhat / near * inner  # where xhat is rounded on the way
        if how.gate == "after":
            error = error * f + dz * df + dgate * STEEP * (self.z + u * t["z"] * (1.0 + t["gate"]))
        elif how.gate is None and how.activation is not None:
            kink = np.where(t["z"] <= self.z, 1.0, 0.0) if how.activation == "relu" else 0.0
            error = STEEP * error + dz * (STEEP * self.z + u + kink)
        return error + half_ulp(dtype, slope)

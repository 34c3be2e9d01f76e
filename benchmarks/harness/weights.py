"""Reparametrized weights: the specs that are compared, and what a layer with one moves, compiled for a TPU.

A pass is the bytes of the weight, read or written once. "alone": a program that returns the effective weight. The least
is 2 forward: a read and a write. "in a layer": one that returns x @ w, and reads what it needs of w. XLA makes the
effective weight on the way into the product and never writes it, so that 1 pass is that of a layer without a
reparametrization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from helpers.compiled import passes, placed, report

from jaxnorm import weights

SPECS: dict[str, weights.Reparametrization] = {
    "WeightNorm": weights.WeightNorm(implementation="xla"),
    "Standardize": weights.Standardize(implementation="xla"),
    'Standardize(like="big_vision")': weights.Standardize(like="big_vision"),
    "ScaledStandardize": weights.ScaledStandardize(),
    "ForcedNorm": weights.ForcedNorm(),
    "SpectralNorm, inference": weights.SpectralNorm(),
    "SpectralNorm, training": weights.SpectralNorm(),
    "SigmaReparam, training": weights.SigmaReparam(),
    "DoRA": weights.DoRA(),
}
SHAPES = {"beyond VMEM": (8192, 16384), "within VMEM": (1024, 4096)}  # in float32
WHICH = ("forward", "forward+backward")


def case(name: str, shape: tuple[int, ...]) -> tuple[Callable, Any, Any]:
    """f(params, state) -> the effective weight and the next state, and the shapes of both arguments."""
    spec, train = SPECS[name], name.endswith("training")
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    if isinstance(spec, weights.SigmaReparam):  # its SVD runs at the start alone
        state = jax.eval_shape(weights.SpectralNorm().init, w)[1]
        params: Any = weights.SigmaReparamParams(w, jax.ShapeDtypeStruct((), jnp.float32))
    else:
        params, state = jax.eval_shape(spec.init, w)
    return lambda params, state: spec.apply(params, state, train=train), params, state


def moved_alone(name: str, target: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Passes of the effective weight, and of it and the gradients of the parameters."""
    f, params, state = case(name, shape)
    w, *own = params if isinstance(params, tuple) else (params,)
    of = lambda w, own, state: f(type(params)(w, *own) if own else w, state)[0]
    found = passes(of, target, w, own, state, which=WHICH)
    return {which: round(found[which].traffic, 2) for which in WHICH}


def moved_in_a_layer(name: str | None, target: str, shape: tuple[int, ...], which=WHICH) -> dict[str, float]:
    """Passes of y = x @ w for 64 rows, and of y with the gradients of the parameters; None is w itself."""
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    f, params, state = case(name, shape) if name else (lambda w, state: (w, state), w, ())
    x, g = (jax.ShapeDtypeStruct((64, n), jnp.float32) for n in shape)
    layer = lambda params, state, x: ((w := f(params, state))[1], x @ w[0])[::-1]

    def both(params, state, x, g):
        y, back, new = jax.vjp(lambda params: layer(params, state, x), params, has_aux=True)
        return y, new, back(g)

    args, unit = placed(target, (params, state, x, g)), 4 * w.size
    programs = {"forward": (layer, args[:3]), "forward+backward": (both, args)}
    return {name: round(report(programs[name][0], target, *programs[name][1], unit=unit).traffic, 2) for name in which}

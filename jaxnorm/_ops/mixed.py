"""Norms by the statistics of the batch and by those of each example, mixed.

y = f(x, batch, *others, affine, epsilon, *own): in training `batch` are the statistics of the batch, merged over
devices, and at inference the running ones. The others are of examples, which no two devices share, so that one
all-reduce each way is all there is. For the backward pass x, in its own dtype, is all that is kept of x's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from .._core.arithmetic import prescales
from .._core.arrays import align_boolean_mask, align_param, align_weights, canonicalize_dtype
from .._core.dtypes import accumulator, widest
from .._core.over import Axes
from .._core.types import Plan, Reduction, Statistics
from .._core.vma import shard_like
from .activation import activate_output, widened_to
from .batch import normalize_batch
from .elementwise import OfElements, by_several
from .formula import affine
from .plan import make_plan

Array = jax.Array


@dataclass(frozen=True)
class Mixed:
    """In the place of `standardize`: it takes the same, and then the arrays that are the norm's own."""

    f: Callable[..., Array]
    others: tuple[str, ...]  # "instance": of one channel of an example; "layer": of all of them
    centered: bool = True  # whether the others are variances, or mean squares

    def __call__(self, norm: str, plan: Plan, x: Array, scale, bias, mask, weights, *own) -> tuple[Array, Statistics]:
        return self.run(plan, x, mask, weights, (scale, bias, *own), None)

    def run(self, plan: Plan, x, mask, weights, params, batch: Statistics | None) -> tuple[Array, Statistics]:
        """y, and the statistics of the batch, which are `batch` where they are given."""
        reductions = (plan.reduction, *(self._reduction(kind, plan, x) for kind in self.others))
        given = (batch, *(None for _ in self.others))
        whole = _Whole(self.f, replace(plan, reduction=_NO_REDUCTION))
        y, stats = by_several(whole, reductions, plan.dtype, x, mask, weights, params, given)
        return y, stats[0]

    def _reduction(self, kind: str, plan: Plan, x: Array) -> Reduction:
        batch, *space = plan.reduction.axes
        over = Axes(tuple(space) if kind == "instance" else tuple(range(batch + 1, x.ndim)))
        small, large = prescales(plan.epsilon, over.size(x.shape), accumulator(x))
        return Reduction(over, self.centered, prescale=small, large_prescale=large, plain=plan.reduction.plain)


_NO_REDUCTION = Reduction(Axes(()))


@dataclass(frozen=True)
class _Whole:
    """A norm's own function, with what all norms have around it."""

    f: Callable[..., Array]
    plan: Plan

    def __call__(self, x: Array, *args) -> Array:
        *statistics, (scale, bias, *own) = args
        whole = lambda z: affine(z, scale, bias, self.plan.scale_offset, widened_to(z, scale, bias))
        z = self.f(x, *statistics, whole, self.plan.epsilon, *own)
        return z if self.plan.activation is None else activate_output(self.plan.activation, z, statistics[0].keep)


def normalize_mixed(
    norm: str, mixed: Mixed, x: Array, scale, bias, own: dict[str, Any], state, policy, *, channels, mask, weights,
    **options,
) -> tuple[Array, Any]:  # fmt: skip
    """(y, new state) of such a norm. The options are those of `normalize_batch`; `own` are further parameters."""
    if 0 in channels:
        raise ValueError(
            f"{norm}: the batch axis 0 of x {x.shape} is among the channel axes {channels}, and examples have "
            "statistics of their own. Write axis=-1 for channels last, or axis=1."
        )
    own = {name: align_param(norm, name, p, x.shape, channels) for name, p in own.items()}

    def given(
        seen, mean, var, scale, bias, keep, *own, axis, epsilon, scale_offset, activation, dtype, implementation
    ) -> Array:
        align = lambda name, p: align_param(norm, name, p, x.shape, channels)
        arrays = (align("scale", scale), align("bias", bias), *own, align("mean", mean), align("var", var))
        aligned: list[Any] = [None if p is None else shard_like(x, p) for p in arrays]
        *params, mean, var = aligned
        out = canonicalize_dtype(norm, dtype, x, mean, *params[:2])
        reduction = Reduction(Axes(tuple(a for a in range(x.ndim) if a not in channels)))
        plan = make_plan(x, (), epsilon, scale_offset, out, reduction, implementation, activation=activation)
        batch = as_statistics(mean, var, plan.reduction, accumulator(x))
        of_elements = align_boolean_mask(norm, x, mask)[1], align_weights(norm, x, weights)
        return mixed.run(plan, seen, *of_elements, tuple(params), batch)[0]

    return normalize_batch(
        norm, x, scale, bias, state, policy, channels=channels, mask=mask, weights=weights, by=mixed,
        own_params=tuple(own.values()), given=given, **options,
    )  # fmt: skip


def as_statistics(mean: Array, var: Array, reduction: Reduction, dtype) -> Statistics:
    """Statistics that are given, as those of one element with that variance."""
    mean = mean.astype(widest(dtype, mean.dtype))
    var = var.astype(jnp.finfo(mean.dtype).dtype)
    m2 = jnp.sqrt(var) if reduction.large_prescale is not None else (var * reduction.prescale) * reduction.prescale
    return Statistics(jnp.ones_like(var), mean, jnp.zeros_like(mean), m2)


def mixed_by(weights: tuple, statistics: tuple[OfElements, ...], x: Array) -> Array:
    """x - sum of weight mean, for weights that sum to 1: no deviation is a difference of large numbers."""
    deviations = [w * of.deviation(x) for w, of in zip(weights, statistics, strict=True)]
    return sum(deviations[1:], deviations[0])

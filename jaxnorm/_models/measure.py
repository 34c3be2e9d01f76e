"""What is measured of one call of a norm, inside of a compiled program: one pass over its input, one over its output.

Legend: a unit is what the norm takes one statistic of: a channel of batch norm, a row of layer norm, a group of an
example. C is the number of channels. All results are small, and no gradient flows through them.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arrays import align_boolean_mask, align_weights, as_float_array, canonicalize_axes
from .._core.collectives import max_over_devices
from .._core.intercept import Call
from .._core.masks import valid_mask
from .._core.over import Axes
from .._core.types import Moments, Plan
from .._norms.residual import AddLayerNorm, AddRMSNorm
from .._ops.moments import merge_across
from .._ops.plan import plans_made
from .sums import count_used, merged, totals

Array = jax.Array


class Measured(NamedTuple):
    """The numbers of one call, in float32. NaN stands for what this norm does not have."""

    train: Array  # (), 1 or 0: whether it normalized by the statistics of the batch
    count: Array  # (), the least number of elements of a unit
    empty: Array  # (), the share of units without an element
    tiny: Array  # (), the share of units whose variance is less than epsilon, but not 0
    constant: Array  # (), the share of units of variance 0
    log_var: Array  # (), the mean logarithm of the variance of a unit
    nonfinite: Array  # (), the share of the elements of x that are NaN or infinite
    square: Array  # (), the mean square of x
    batch_mean: Array  # (C,) if the norm has running statistics, else (0,)
    batch_var: Array  # the same
    running_mean: Array  # the same: before the call
    running_var: Array  # the same
    apart: Array  # (), how far running means differ over devices, in standard deviations; the largest of all channels
    scale: Array  # (C,), the effective scale; (0,) if the norm has none, or one for each example
    out_var: Array  # (C,), the variance of the output
    saturated: Array  # (C,), the share of outputs where the activation is flat
    gradient: Array  # (), the norm of the gradient of scale; NaN until `Seen.with_gradients`
    gradient_rms: Array  # (), the same over the root of the number of its elements


@dataclass(frozen=True)
class About:
    """What is known of the call without its values."""

    kind: str
    shape: tuple[int, ...]  # of x, on this device
    dtype: str
    reduces: tuple[int, ...] | None  # the axes of x that a unit extends over; None: unknown, as for segments
    running: bool  # whether the norm has running statistics of channels
    momentum: float | None
    epsilon: float | None
    activation: str | None  # of the spec, or the one that is said to follow
    frozen: bool
    axis_name: tuple[str, ...]  # over which the measurements are merged


FLAT = {  # what of an output is flat: after the activation, and before one that follows
    "tanh": (lambda y: jnp.abs(y) > 0.99, lambda y: jnp.abs(y) > math.atanh(0.99)),
    "sigmoid": (lambda y: jnp.abs(y - 0.5) > 0.49, lambda y: jnp.abs(y) > math.log(99)),
}


def plan_of(call: Call, run: Any, known: dict[Any, Any]) -> tuple[tuple[int, ...], Plan] | None:
    """The plan of a call, with the shape of what it reduces, by tracing it once more. Calls that are alike share it."""
    kind = lambda a: (a.shape, str(a.dtype)) if hasattr(a, "shape") else repr(a)
    leaves, tree = jax.tree.flatten((call.params, call.state, call.x, call.operands, call.options))
    key = (type(call.spec), repr(call.spec), tuple(map(kind, leaves)), tree)
    if key not in known:
        with plans_made() as made, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jax.eval_shape(run)
        known[key] = made[0] if made else None
    return known[key]


def reduced_axes(shape: tuple[int, ...], plan: tuple[tuple[int, ...], Plan] | None) -> tuple[int, ...] | None:
    """The axes of x that a statistic is taken over, from those of the view that has an axis of channels as two."""
    if plan is None or not isinstance(plan[1].reduction.over, Axes) or math.prod(plan[0]) != math.prod(shape):
        return None
    viewed, axes = plan[0], plan[1].reduction.over.axes
    if len(viewed) == len(shape):
        return axes
    split = next((a for a, n in enumerate(shape) if viewed[a] != n), len(shape) - 1)
    return tuple(sorted({a if a <= split else a - 1 for a in axes}))


def momentum_of(spec: Any) -> float | None:
    """The weight of the old statistics in an update; None if there is no one number, as of a schedule."""
    policy = spec._running() if hasattr(spec, "_running") else spec
    value = getattr(policy, "momentum", None)
    return float(value) if isinstance(value, (int, float)) else None


def about(call: Call, x: Any, plan: Any, activation: str | None, axis_name: tuple[str, ...]) -> About:
    spec, epsilon = call.spec, getattr(call.spec, "epsilon", None)
    size = math.prod(spec.features(x.shape))
    stats = getattr(call.state, "mean", None), getattr(call.state, "var", None)
    if isinstance(call.state, dict):
        stats = call.state.get("mean"), call.state.get("var")
    running = all(s is not None and s.size == size for s in stats) and size > 0
    own = spec.activation if isinstance(spec.activation, str) else getattr(spec.activation, "__name__", None)
    return About(
        type(spec).__name__, x.shape, str(x.dtype), reduced_axes(x.shape, plan), running,
        momentum_of(spec) if running else None, float(epsilon) if isinstance(epsilon, (int, float)) else None,
        own or activation, bool(getattr(spec, "frozen", False)), axis_name,
    )  # fmt: skip


def measured(call: Call, out: Any, plan: Any, activation: str | None, axis_name: tuple[str, ...]):
    """(About, Measured) of a call that returned `out`."""
    spec, name = call.spec, type(call.spec).__name__
    stream = isinstance(spec, (AddRMSNorm, AddLayerNorm))
    y = out[0] if isinstance(out, tuple) else out
    x = as_float_array(name, out[1] if stream else call.x)
    what = about(call, x, plan, activation, axis_name)
    x, mask = align_boolean_mask(name, x, call.options.get("mask"))
    keep = valid_mask(mask, align_weights(name, x, call.options.get("weights")))
    is_array = hasattr(y, "shape") and y.shape == x.shape and jnp.issubdtype(y.dtype, jnp.floating)
    scale = _scale(call, math.prod(spec.features(x.shape)))
    arrays = x, y if is_array else None, keep, _running(call) if what.running else None, scale, _train(call, what)
    run: Any = functools.partial(_numbers, call, what, plan)
    if any(jax.typeof(x).sharding.spec):  # an Explicit mesh, whose types would have to follow every step
        run = jax.sharding.auto_axes(run, out_sharding=jax.sharding.PartitionSpec())
    return what, run(*lax.stop_gradient(arrays))


def _numbers(call: Call, what: About, plan: Any, x: Array, y: Any, keep: Any, old: Any, scale: Any, train: Any):
    spec, axis_name = call.spec, what.axis_name
    channels = canonicalize_axes(what.kind, x.ndim, spec.feature_axes())
    others = tuple(a for a in range(x.ndim) if a not in channels)
    flat = FLAT.get(what.activation or "")
    parts: dict[str, Moments] = {}
    plain = lambda weight, value: Moments(weight, value, jnp.zeros_like(value))
    if y is not None:
        at = None if flat is None else flat[0 if spec.activation is not None else 1]
        n, mean, var, _, saturated = totals(y, keep, others, at)
        parts |= {"out": Moments(n, mean, n * var), "saturated": plain(n, saturated)}
    epsilon = what.epsilon or 0.0
    if old is None:
        count, of_units = _of_units(plan if what.reduces is not None else None, x, keep, others, epsilon)
        parts |= {key: plain(*pair) for key, pair in of_units.items()}
    else:
        count, mean, var, bad, _ = totals(x, keep, others)
        one, deviation = jnp.ones_like(old[0]), jnp.sqrt(jnp.maximum(old[1], epsilon) + 1e-30)
        parts |= {
            "batch": Moments(count, mean, count * var), "bad": plain(count + bad, bad / jnp.maximum(count + bad, 1.0)),
            "running_mean": plain(one, old[0]), "running_var": plain(one, old[1]),
            "apart": plain(one, old[0] / deviation),
        }  # fmt: skip
        count = count_used(call, count, x.shape, others, axis_name)
    parts = merged(parts, axis_name)
    value: Any = lambda key: parts[key].mean if key in parts else jnp.zeros((0,), jnp.float32)
    apart = nan = jnp.full((), jnp.nan, jnp.float32)
    numbers: dict[str, Any] = {key: value(key).reshape(()) for key in UNITS if key in parts}
    if old is not None:
        batch, apart = parts["batch"], jnp.sqrt(parts["apart"].var).max(initial=0.0)
        divisor = jnp.where(train == 0, value("running_var"), batch.var)  # what it divides by
        pairs = _summed(batch.count, batch.mean, batch.var, divisor, epsilon)
        numbers = {key: pair[1] for key, pair in pairs.items()}
        bad = parts["bad"]
        numbers["nonfinite"] = (bad.mean * bad.count).sum() / jnp.maximum(bad.count.sum(), 1.0)
    several = math.prod(x.shape[a] for a in others) > 1  # of one element no channel can vary
    return Measured(
        train=train, count=-max_over_devices(-count.min(), axis_name or None, None), **numbers,
        batch_mean=value("batch"), batch_var=parts["batch"].var if old is not None else value("batch"),
        running_mean=value("running_mean"), running_var=value("running_var"), apart=apart,
        scale=scale,
        out_var=parts["out"].var if y is not None and several else value(""),
        saturated=value("saturated") if flat else value(""), gradient=nan, gradient_rms=nan,
    )  # fmt: skip


UNITS = ("empty", "tiny", "constant", "log_var", "square", "nonfinite")


def _of_units(plan: Any, x: Array, keep: Array | None, others: tuple[int, ...], epsilon: float):
    """(counts, {name: (weight, value)}) of the units of a plan; of channels if there is none."""
    if plan is None:
        count, mean, var, bad, _ = totals(x, keep, others)
        divisor = var
    else:
        shape, reduction = plan[0], plan[1].reduction
        seen = None if keep is None else jnp.broadcast_to(keep, x.shape).reshape(shape)
        count, mean, var, bad, _ = totals(x.reshape(shape), seen, reduction.over.axes)
        if reduction.axis_name:
            count, mean, m2 = merge_across(Moments(count, mean, count * var), reduction.axis_name)
            var = m2 / jnp.maximum(count, 1.0)
        divisor = var if reduction.centered else var + jnp.square(mean)
    pairs = _summed(count, mean, var, divisor, epsilon)
    elements = count.sum() + bad.sum()
    return count, pairs | {"nonfinite": (elements, bad.sum() / jnp.maximum(elements, 1.0))}


def _summed(count: Array, mean: Array, var: Array, divisor: Array, epsilon: float) -> dict[str, tuple[Array, Array]]:
    """What is said of all units together: its weight beside that of other devices, and its value."""
    live, positive = (count > 0).astype(jnp.float32), jnp.where((count > 0) & (divisor > 0), 1.0, 0.0)
    average = lambda weight, value: (weight.sum(), (weight * value).sum() / jnp.maximum(weight.sum(), 1.0))
    one = lambda where: where.astype(jnp.float32)
    return {
        "empty": average(jnp.ones_like(live), 1.0 - live),
        "tiny": average(live, one((divisor > 0) & (divisor < epsilon))),
        "constant": average(live, one(divisor == 0)),
        "log_var": average(positive, jnp.log(jnp.where(positive > 0, divisor, 1.0))),
        "square": average(count, var + jnp.square(mean)),
    }  # fmt: skip


def _train(call: Call, what: About) -> Array:
    train = call.options.get("train")
    train = False if what.frozen and train is None else train
    return jnp.full((), jnp.nan, jnp.float32) if train is None or not what.running else jnp.asarray(train, jnp.float32)


def _running(call: Call) -> list[Array]:
    """The running mean and variance before the call."""
    state = call.state if isinstance(call.state, dict) else call.state._asdict()
    return [lax.stop_gradient(state[key]).reshape(-1).astype(jnp.float32) for key in ("mean", "var")]


def _scale(call: Call, size: int) -> Array:
    params = call.params
    scale = params.get("scale") if isinstance(params, dict) else getattr(params, "scale", None)
    if scale is None or scale.size != size:
        return jnp.zeros((0,), jnp.float32)
    return lax.stop_gradient(scale).reshape(-1).astype(jnp.float32) + getattr(call.spec, "scale_offset", 0.0)

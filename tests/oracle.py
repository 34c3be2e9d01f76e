"""The truth, in float64 NumPy and by another road than the library's: no axes, no broadcasting, only labels.

Every element of x carries the number of the statistic it belongs to (`labels`, an int array of x's shape). Sums are
`np.bincount` over labels. Masked-out elements have weight 0; finite ones are still normalized.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    y: np.ndarray  # x's shape
    xhat: np.ndarray  # x's shape
    mean: np.ndarray  # x's shape: of each element's own statistic
    var: np.ndarray
    r: np.ndarray
    n: np.ndarray


def wide(a):
    return np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64)


def total(a, labels):
    """Sums by label, given back to every element."""
    size = labels.max(initial=-1) + 1
    count = lambda part: np.bincount(labels.ravel(), part.ravel(), minlength=size)[labels] if a.size else part
    return count(a.real) + 1j * count(a.imag) if np.iscomplexobj(a) else count(a)


def weight(labels, mask, weights):
    w = np.ones(labels.shape) if weights is None else np.broadcast_to(np.asarray(weights, np.float64), labels.shape)
    return w if mask is None else np.where(mask, w, 0.0)


class Groups:
    """The elements that share a statistic, and the weight of each: what an oracle takes means over.

    In float64 NumPy; with `xp=jax.numpy` differentiable by JAX, for `Row.reference`.
    """

    def __init__(self, labels, mask=None, weights=None, xp=np):
        self.labels, self.xp = labels, xp
        self.weight = weight(labels, mask, weights)
        self.count = total(self.weight, labels)  # of each element's own group

    def total(self, a):
        """Sums by label, given back to every element."""
        if self.xp is np:
            return total(a, self.labels)
        from jax.ops import segment_sum

        return segment_sum(a.ravel(), self.labels.ravel(), int(self.labels.max()) + 1)[self.labels]

    def mean(self, a):
        """Weighted means by label, given back to every element; 0 of an empty group."""
        w, n = (self.xp.asarray(v, a.dtype) for v in (self.weight, np.where(self.count == 0, 1.0, self.count)))
        return self.total(w * self.xp.where(w == 0, 0, a)) / n


def normalize(x, labels, scale, bias, *, epsilon, centered=True, mask=None, weights=None) -> Truth:
    return _normalize(wide(x), Groups(labels, mask, weights), scale, bias, epsilon, centered)


def _normalize(x, groups, scale, bias, epsilon, centered=True) -> Truth:
    xp = groups.xp
    mean = groups.mean(x) if centered else xp.zeros_like(x)
    var = groups.mean((lambda d: d.real**2 + d.imag**2 if xp.iscomplexobj(d) else d * d)(x - mean))
    nothing = (groups.count == 0) | (var + epsilon == 0)
    r = xp.where(nothing, 0.0, 1 / xp.sqrt(xp.where(nothing, 1.0, var + epsilon)))
    xhat = (x - mean) * r
    return Truth(affine(xhat, scale, bias), xhat, mean, var, r, groups.count)


def affine(xhat, scale, bias):
    wider = wide if isinstance(xhat, np.ndarray) else lambda a: a
    y = xhat if scale is None else xhat * wider(scale)
    return y if bias is None else y + wider(bias)


def gradients(x, labels, scale, bias, g, *, epsilon, centered=True, mask=None, weights=None):
    """The cotangents of x, scale and bias for the cotangent g of y, written out:

    dx = r (h - w / n (sum(h) + xhat sum(h xhat))) with h = g scale; no sum(h) where the mean is not taken out.
    """
    truth = normalize(x, labels, scale, bias, epsilon=epsilon, centered=centered, mask=mask, weights=weights)
    w, g = weight(labels, mask, weights), wide(g)
    share = w / np.where(truth.n == 0, 1.0, truth.n)
    h = g * (1.0 if scale is None else wide(scale))
    dx = truth.r * (h - share * (centered * total(h, labels) + truth.xhat * total(h * truth.xhat, labels)))
    return dx, reduced_to(g * truth.xhat, scale), reduced_to(g, bias)


# --- one function for each formula: y of x and the parameters ---------------------------------------------------------
#
# formula(x, params, groups, spec, **operands): params are the norm's own `Params` in x's rank, each an array or None,
# with scale_offset added to the scale. `operands` are the row's; `groups` already has what segment ids say.
# Write a formula with `groups.xp` in place of NumPy, so that JAX can differentiate it too. Write it analytic (no conj,
# and `magnitude` in place of abs): its gradients are taken by complex steps, unless `WRITTEN_OUT` has them.


def magnitude(a, xp=np):
    """|a| of real numbers, analytic."""
    return xp.where(a.real < 0, -a, a)


def standardize(x, params, groups, spec, **_):
    return _normalize(x, groups, *params, spec.epsilon).y


def root_mean_square(x, params, groups, spec, **_):
    return _normalize(x, groups, *params, spec.epsilon, centered=False).y


def modulated(x, params, groups, spec, condition):
    """(norm(x) scale + bias) (m.scale + offset) + m.shift; the parts lie one after the other on the last axis."""
    names = spec.parts.split()
    m = dict(zip(names, np.split(np.asarray(condition, np.float64), len(names), -1), strict=True))
    return _modulated(x, params, groups, spec, m, spec.modulation_offset)


def like_style(x, params, groups, spec, style):
    axes = tuple(a for a in range(1, style.ndim) if a != spec.axis % style.ndim)
    style = np.asarray(style, np.float64)
    m = {"scale": np.sqrt(style.var(axes) + spec.epsilon), "shift": style.mean(axes)}
    return _modulated(x, params, groups, spec, m, 0.0)


def _modulated(x, params, groups, spec, m, offset):
    xp, name, inner = groups.xp, type(spec).__name__, getattr(spec, "inner", spec)

    def of_rank(part):
        part = part.reshape(part.shape[:-1] + (1,) * (x.ndim - part.ndim) + part.shape[-1:])
        return xp.asarray(np.moveaxis(part, -1, inner.axis % x.ndim), x.real.dtype)

    xhat = x
    if name != "FiLM":
        d = x if "RMS" in name else x - groups.mean(x)
        v = groups.mean(d * d) + inner.epsilon
        nothing = (groups.count == 0) | (v == 0)
        xhat = xp.where(nothing, 0.0, d / xp.sqrt(xp.where(nothing, 1.0, v)))
    y = affine(xhat, params.scale, params.bias) * (of_rank(m["scale"]) + offset)
    return y + of_rank(m["shift"]) if "shift" in m else y


def unit_length(x, params, groups, spec, **_):
    xp, epsilon = groups.xp, spec.epsilon
    square = groups.mean(x * x) * groups.count
    if spec.epsilon_mode == "max":
        short = (square.real <= epsilon**2) | (groups.count == 0)
        over = xp.where(short, epsilon or 1.0, xp.sqrt(xp.where(short, 1.0, square)))
        nothing = groups.count == 0
    else:
        nothing = (groups.count == 0) | (square + epsilon == 0)
        over = xp.sqrt(xp.where(nothing, 1.0, square + epsilon))
    return affine(xp.where(nothing, 0.0, x / over), params[0], None)


def analytic(x, groups, epsilon, centered):
    """(x - mean) / sqrt(var + epsilon), by an analytic formula."""
    xp = groups.xp
    d = x - groups.mean(x) if centered else x
    v = groups.mean(d * d) + epsilon
    nothing = (groups.count == 0) | (v == 0)
    return xp.where(nothing, 0.0, d / xp.sqrt(xp.where(nothing, 1.0, v)))


def scaled_output(x, params, groups, spec, **_):
    return spec.output_scale * affine(analytic(x, groups, spec.epsilon, False), *params)


def of_alpha_times_x_and_x(x, params, groups, spec, **_):
    return affine(analytic((spec.alpha + 1.0) * x, groups, spec.epsilon, True), *params)


def x_and_its_norm(x, params, groups, spec, **_):
    return x + affine(analytic(x, groups, spec.epsilon, False), params.scale, params.bias)


def over_rms(x, params, groups, spec, **_):
    """Epsilon outside of the root."""
    xp = groups.xp
    v = groups.mean(x * x)
    nothing = v == 0
    over = xp.sqrt(xp.where(nothing, 1.0, v)) + spec.epsilon
    return xp.where(groups.count == 0, 0.0, x / xp.where(nothing, spec.epsilon, over))


def partial_root_mean_square(x, params, groups, spec, **_):
    first = np.arange(x.shape[-1]) < int(spec.fraction * x.shape[-1])
    part = Groups(groups.labels, np.broadcast_to(first, x.shape), groups.weight, groups.xp)
    return affine(analytic(x, part, spec.epsilon, False), params.scale, None)


def first_key(heads):
    """Of all heads, of queries and then of keys, the first that is one of a key."""
    return heads - max(1, heads // 3)


def query_key(x, params, groups, spec, **_):
    xhat = analytic(x, groups, spec.epsilon, spec.kind == "layer")
    key = np.arange(x.shape[2])[:, None] >= first_key(x.shape[2])
    if params.q_scale is None:
        return xhat
    return xhat * groups.xp.where(key, params.k_scale, params.q_scale)


def dynamic_erf(x, params, groups, spec, **_):
    from jax.scipy.special import erf as of_jax
    from scipy.special import erf as of_scipy

    erf = of_scipy if groups.xp is np else of_jax
    return affine(erf(params.alpha * x + params.shift), params.scale, params.bias)


def dynamic_tanh(x, params, groups, spec, **_):
    return affine(groups.xp.tanh(params.alpha * x), params.scale, params.bias)


def layer_scale(x, params, groups, spec, **_):
    return x * params.gamma


def act_norm(x, params, groups, spec, **_):
    times = groups.xp.exp(params.log_scale)
    if spec.inverse:
        return x / times - params.shift if spec.shift_first else (x - params.shift) / times
    return times * (x + params.shift) if spec.shift_first else times * x + params.shift


def renormalize(x, params, groups, spec, **_):
    """Toward the running statistics of a state that has seen nothing: mean 0 and deviation 1."""
    from jax.lax import stop_gradient

    still = lambda a: a.real if groups.xp is np else stop_gradient(a)
    mean, d = groups.mean(x), x - groups.mean(x)
    r = still(groups.xp.sqrt(groups.mean(d * d) + spec.epsilon)).clip(1 / spec.r_max, spec.r_max)
    shift = still(mean).clip(-spec.d_max, spec.d_max)
    return affine(analytic(x, groups, spec.epsilon, True) * groups.xp.where(groups.count == 0, 1, r) + shift, *params)


def over_absolute(x, params, groups, spec, **_):
    d = x - groups.mean(x)
    spread = math.sqrt(math.pi / 2) * groups.mean(magnitude(d, groups.xp)) + spec.epsilon
    return affine(groups.xp.where(groups.count == 0, 0.0, d / spread), *params)


def filter_response(x, params, groups, spec, **_):
    xp, learned = groups.xp, params.learned_epsilon
    epsilon = spec.epsilon + (0.0 if learned is None else magnitude(learned, xp))
    z = affine(analytic(x, groups, epsilon, False), params.scale, params.bias)
    return z if params.threshold is None else xp.where((z - params.threshold).real > 0, z, params.threshold + 0.0 * z)


def _of_examples(x, groups, axis, kind="instance"):
    """Groups of the same elements by example ("layer"), or by example and channel."""
    n, c = np.indices(x.shape)[[0, axis % x.ndim]]
    labels = n if kind == "layer" else n * x.shape[axis] + c
    return Groups(labels, None, groups.weight, groups.xp)


def _variance(x, groups, centered=True):
    d = x - groups.mean(x) if centered else x
    return groups.mean(d * d)


def _sigmoid_of(z, xp):
    return 0.5 * (1.0 + xp.tanh(0.5 * z))


def evolved(x, params, groups, spec, **_):
    xp, variant, u = groups.xp, spec.variant, 1.0 if params.u is None else params.u
    if variant[0] == "S":
        v = _variance(x, groups, variant != "S2") + spec.epsilon
        z = x * _sigmoid_of(u * x, xp) / xp.sqrt(xp.where(v == 0, 1.0, v))
        return affine(xp.where((groups.count == 0) | (v == 0), 0.0, z), params.scale, params.bias)
    of = xp.sqrt(_variance(x, _of_examples(x, groups, spec.axis), variant == "B0") + spec.epsilon)
    second = {"B0": u * x + of, "B1": (x + 1.0) * of, "B2": of - x}[variant]
    first = xp.sqrt(_variance(x, groups) + spec.epsilon)
    larger = xp.where((first - second).real > 0, first, second)
    return affine(xp.where(groups.count == 0, 0.0, x / larger), params.scale, params.bias)


def batch_and_instance(x, params, groups, spec, **_):
    of = (groups, _of_examples(x, groups, spec.axis))
    batch, instance = (analytic(x, g, spec.epsilon, True) for g in of)
    return affine(params.rho * batch + (1.0 - params.rho) * instance, params.scale, params.bias)


def switched(x, params, groups, spec, **_):
    xp, c = groups.xp, np.indices(x.shape)[spec.axis]
    batch = Groups(c, None, groups.weight, xp)
    of = [_of_examples(x, groups, spec.axis), _of_examples(x, groups, spec.axis, "layer"), batch]
    a, b = (xp.exp(logits) / xp.exp(logits).sum() for logits in (params.mean_logits, params.var_logits))
    mean = sum(share * g.mean(x) for share, g in zip(a, of, strict=True))
    v = sum(share * _variance(x, g) for share, g in zip(b, of, strict=True)) + spec.epsilon
    nothing = (groups.count == 0) | (v == 0)
    xhat = xp.where(nothing, 0.0, (x - mean) / xp.sqrt(xp.where(nothing, 1.0, v)))
    return affine(xhat, params.scale, params.bias)


def compressed(x, params, groups, spec, **_):
    xp, n = groups.xp, groups.count
    v = (groups.mean(x * x) * n + (groups.mean(x) * n) ** 2) / (n + 1) + spec.epsilon
    nothing = (n == 0) | (v == 0)
    return affine(xp.where(nothing, 0.0, x / xp.sqrt(xp.where(nothing, 1.0, v))), *params)


def _kept(x, groups):
    return groups.xp.where(groups.weight == 0, 0.0, x)


def gated_norm(x, params, groups, spec, **_):
    xp = groups.xp
    z = affine(_kept(x, groups), params.pre_scale, None)
    h = affine(analytic(z, groups, spec.epsilon, False), params.scale, None)
    inner = h @ params.down
    gate = (inner * (0.5 + 0.5 * xp.tanh(0.5 * inner))) @ params.up
    return spec.gate_scale * h * (0.5 + 0.5 * xp.tanh(0.5 * gate))


def seednorm(x, params, groups, spec, **_):
    xp, z = groups.xp, _kept(x, groups)
    parts = xp.split(z * params.beta, spec.num_heads, -1)
    seed = xp.concatenate([xp.tanh(part.sum(-1, keepdims=True)) + 0.0 * part for part in parts], -1)
    return (seed * params.alpha + params.scale) * analytic(z, groups, spec.epsilon, False)


def poly_norm(x, params, groups, spec, **_):
    """In a unit of x, because x**6 of 1e20 or more leaves the range of float64."""
    xp, z, order = groups.xp, _kept(x, groups), params.weight.shape[0]
    unit = xp.max(magnitude(z, xp).real) + 0.1
    y = sum(
        params.weight[order - p] * analytic((z / unit) ** p, groups, spec.epsilon / unit ** (2 * p), False)
        for p in range(1, order + 1)
    )
    return y + params.bias


def hypersphere_update(x, params, groups, spec, residual):
    xp = groups.xp

    def unit(u):
        square = groups.mean(u * u) * groups.count
        nothing = square == 0
        return xp.where(nothing, 0.0, u / xp.sqrt(xp.where(nothing, 1.0, square)))

    a = magnitude(params.alpha, xp) * spec.rate * x.shape[-1] ** 0.5
    h = unit(xp.asarray(residual, x.dtype))
    return unit(h + a * (unit(x) - h))


def global_response(x, params, groups, spec, **_):
    xp, z = groups.xp, _kept(x, groups)
    square = (z * z).sum((1, 2), keepdims=True)
    dead = square == 0
    length = xp.where(dead, 0.0, xp.sqrt(xp.where(dead, 1.0, square)))
    n = (groups.weight != 0).any((1, 2), keepdims=True).sum(-1, keepdims=True)
    return z + affine(z * length / (length.sum(-1, keepdims=True) / np.maximum(n, 1.0) + spec.epsilon), *params)


def local_response(x, params, groups, spec, **_):
    xp, z, n, channels = groups.xp, _kept(x, groups), spec.size, x.shape[-1]
    c, j = np.arange(channels)[:, None], np.arange(channels)
    near = ((j >= c - n // 2) & (j <= c + (n - 1) // 2)).astype(np.float64)
    energy = (z * z) @ xp.asarray(near.T, z.dtype)
    return z / (spec.k + spec.alpha / (n if spec.divide else 1) * energy) ** spec.beta


def cumulative_group(x, params, groups, spec, **_):
    """Sums of all frames so far, by the 0/1 matrix of elements that an element's statistics are of."""
    xp, time = groups.xp, np.indices(x.shape)[spec.time_axis % x.ndim].ravel()
    label = groups.labels.ravel()
    so_far = ((label[:, None] == label) & (time[:, None] >= time)) * groups.weight.ravel()
    n = so_far.sum(1).reshape(x.shape)
    mean = lambda a: (xp.asarray(so_far, x.real.dtype) @ a.ravel()).reshape(x.shape) / np.maximum(n, 1)
    x = x - x.real.ravel()[0]  # which changes nothing
    d = x - mean(x)
    v = mean(d * d) if spec.variance == "running" else mean(x * x) - mean(x) ** 2
    v = v + spec.epsilon
    nothing = (n == 0) | (v.real <= 0)
    return affine(xp.where(nothing, 0.0, d / xp.sqrt(xp.where(nothing, 1.0, v))), *params)


def still(a, groups):
    """A constant of x, as which it has no gradient."""
    if groups.xp is np:
        return a.real
    from jax.lax import stop_gradient

    return stop_gradient(a)


def last_of(x, groups):
    """The last element of each group that counts, given back to every element; 0 of an empty group."""
    latest = np.full(groups.labels.max(initial=-1) + 1, -1)
    place = np.where(groups.weight.ravel() > 0, np.arange(x.size), -1)
    np.maximum.at(latest, groups.labels.ravel(), place)
    latest = latest[groups.labels]
    return groups.xp.where(latest < 0, 0.0, x.ravel()[np.maximum(latest, 0)])


def rev_in(x, params, groups, spec, stats=None):
    xp = groups.xp
    if spec.inverse:
        mean, std = (xp.asarray(a, x.real.dtype) for a in stats)
        return (x - params.bias) / params.scale * std + mean
    mean = groups.mean(x)
    v = groups.mean((x - mean) ** 2) + spec.epsilon
    mean = last_of(x, groups) if spec.center == "last" else mean
    mean, v = (still(mean, groups), still(v, groups)) if spec.stop_gradient else (mean, v)
    nothing = (groups.count == 0) | (v == 0)
    y = affine(xp.where(nothing, 0.0, (x - mean) / xp.sqrt(xp.where(nothing, 1.0, v))), params.scale, params.bias)
    return xp.arcsinh(y) if spec.transform else y


def graph_norm(x, params, groups, spec, **_):
    xp, share = groups.xp, 1.0 if params.mean_scale is None else params.mean_scale
    o = x - share * groups.mean(x)
    v = groups.mean(o * o) + spec.epsilon
    nothing = (groups.count == 0) | (v == 0)
    xhat = xp.where(nothing, 0.0, o / xp.sqrt(xp.where(nothing, 1.0, v)))
    return affine(xhat, params.scale, params.bias)


def of_channels(groups):
    """Of groups of whole rows, those of each channel."""
    channels = groups.labels.shape[-1]
    return Groups(groups.labels * channels + np.arange(channels), None, groups.weight, groups.xp)


def pair_norm(x, params, groups, spec, **_):
    xp, of = groups.xp, of_channels(groups)
    c = x - of.mean(x)
    if spec.scale_individually:
        square = xp.sum(xp.where(groups.weight > 0, c * c, 0.0), -1, keepdims=True)
        zero = square == 0
        over = xp.where(zero, 0.0, 1.0 / (xp.sqrt(xp.where(zero, 1.0, square)) + spec.epsilon))
        return spec.output_scale * c * over
    v = xp.sum(of.mean(c * c), -1, keepdims=True) + spec.epsilon
    zero = (v == 0) | (of.count.sum(-1, keepdims=True) == 0)
    return spec.output_scale * xp.where(zero, 0.0, c / xp.sqrt(xp.where(zero, 1.0, v)))


def diff_group(x, params, groups, spec, **_):
    xp, of, y = groups.xp, of_channels(groups), x
    logits = _kept(x, groups) @ params.weight
    share = xp.exp(logits - logits.real.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    for g in range(share.shape[-1]):
        z = analytic(share[:, g : g + 1] * x, of, spec.epsilon, True)
        y = y + spec.rate * affine(z, params.scale[g][None], params.bias[g][None])
    return y


def rep_batch(x, params, groups, spec, **_):
    of = lambda labels: Groups(np.broadcast_to(labels, x.shape), None, groups.weight, groups.xp)
    batch, rows = of(np.arange(x.shape[-1])), of(np.arange(x.shape[0])[:, None])
    rep = affine(analytic(x, batch, spec.epsilon, True), params.scale, params.bias) + params.eta * x
    layer = affine(analytic(x, rows, spec.epsilon, True), params.ln_scale, params.ln_bias)
    return spec.fade * layer + (1.0 - spec.fade) * rep


def whitened(x, params, groups, spec, **_):
    """The recursion, for the rows that count for all channels of a group."""
    xp, channels = groups.xp, x.shape[1]
    parts, d = [], channels // spec.num_groups
    for c in range(0, channels, d):
        w = np.asarray(groups.weight)[:, c : c + d].min(1, keepdims=True)
        n = max(w.sum(), 1.0)
        part = xp.where(w == 0, 0.0, x[:, c : c + d])
        mean = (w * part).sum(0, keepdims=True) / n
        z = part - mean
        s = (z * w).T @ z / n + spec.epsilon * np.eye(d)
        trace, p = xp.trace(s), np.eye(d)
        for _ in range(spec.steps):
            p = 1.5 * p - 0.5 * p @ p @ p @ s / trace
        parts.append((x[:, c : c + d] - mean) @ (p / xp.sqrt(trace)).T)
    return affine(xp.concatenate(parts, 1), params.scale, params.bias)


def without_mean(x, params, groups, spec, **_):
    return groups.xp.where(groups.count == 0, 0.0, x - groups.mean(x))


def by_size(x, params, groups, spec, **_):
    return groups.xp.where(groups.count == 0, 0.0, x / np.sqrt(np.maximum(groups.count, 1.0)))


def message_norm(x, params, groups, spec, message):
    xp = groups.xp
    message = np.asarray(message, np.float64)
    length = lambda a: groups.mean(a * a) * groups.count
    square = length(x)
    zero = square == 0
    size = xp.where(zero, 0.0, xp.sqrt(xp.where(zero, 1.0, square)))
    of_message = np.sqrt(Groups(groups.labels, None, groups.weight).mean(message**2) * groups.count)
    return size * (message / np.maximum(of_message, spec.epsilon)) * (1.0 if params.scale is None else params.scale)


def dish_ts(x, params, groups, spec, **_):
    from jax.scipy.special import erf as of_jax
    from scipy.special import erf as of_scipy

    xp, w = groups.xp, groups.weight
    erf = of_scipy if xp is np else of_jax
    total = lambda a: xp.sum(xp.where(w > 0, a, 0.0), 1, keepdims=True)
    z = total(x * params.weight[..., 0].T[None])
    phi = 0.5 * z * (1.0 + erf(z / math.sqrt(2.0)))
    xi = total((x - phi) ** 2) / np.maximum(w.sum(1, keepdims=True) - 1.0, 1.0) + spec.epsilon
    return affine((x - phi) / xp.sqrt(xi), params.scale, params.bias)


def running_rev_in(x, params, groups, spec, **_):
    """By each patch's own groups of all patches up to it. A std below epsilon is 1."""
    xp, parts = groups.xp, []
    for p in range(x.shape[1]):
        of = Groups(groups.labels, None, groups.weight * (np.arange(x.shape[1]) <= p)[:, None, None], xp)
        mean = of.mean(x)
        v = of.mean((x - mean) ** 2)
        mean, v = still(mean, groups), still(v, groups)
        low = v < spec.epsilon**2
        std = xp.where(low, 1.0, xp.sqrt(xp.where(low, 1.0, v)))
        parts.append(xp.where(of.count == 0, 0.0, (x - mean) / std)[:, p])
    return xp.stack(parts, 1)


def _written_out(centered):
    def of_formula(x, params, g, groups, spec, **_):
        how = dict(epsilon=spec.epsilon, centered=centered, weights=groups.weight)
        return gradients(x, groups.labels, *params, g, **how)

    return of_formula


WRITTEN_OUT = {standardize: _written_out(True), root_mean_square: _written_out(False)}


def gradients_of(formula, x, params, g, groups, spec, **operands):
    """The cotangents of x and of each parameter for the cotangent g of y; None of a parameter that is None."""
    if formula in WRITTEN_OUT:
        return WRITTEN_OUT[formula](x, params, g, groups, spec, **operands)
    return by_complex_steps(formula, x, params, g, groups, spec, **operands)


def by_complex_steps(formula, x, params, g, groups, spec, **operands):
    """Gradients as the imaginary parts that an imaginary step leaves: exact to rounding, and one-sided at a kink."""
    x, g, step = wide(x), wide(g), 1e-60

    def slopes(x, params):
        y = formula(x, params, groups, spec, **operands)
        assert np.iscomplexobj(y), f"{formula.__name__} is not analytic: it dropped the imaginary part"
        return g * y.imag / step

    # An element of x moves those of its own group alone, so that one of each group is stepped at a time.
    order = np.argsort(groups.labels, axis=None, kind="stable")
    sorted_labels = groups.labels.ravel()[order]
    number = np.empty(x.size, int)
    number[order] = np.arange(x.size) - np.searchsorted(sorted_labels, sorted_labels)
    number, dx = number.reshape(x.shape), np.zeros(x.shape)
    for k in range(number.max(initial=-1) + 1):
        dx += np.where(number == k, total(slopes(x + 1j * step * (number == k), params), groups.labels), 0.0)

    def of_parameter(name, p):
        d = np.zeros(np.shape(p))
        for at in np.ndindex(d.shape):
            stepped = np.array(p, np.complex128)
            stepped[at] += 1j * step
            d[at] = slopes(x, params._replace(**{name: stepped})).sum()
        return d

    return dx, *(None if p is None else of_parameter(name, p) for name, p in params._asdict().items())


# --- activations: f and its derivative, written out -------------------------------------------------------------------

_sigmoid = lambda z: 0.5 * (1.0 + np.tanh(0.5 * z))
_cdf = lambda z: 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2.0)))
_pdf = lambda z: np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
_inner = lambda z: np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))
_silu = (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1.0 + z * (1.0 - _sigmoid(z))))

ACTIVATIONS = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "silu": _silu,
    "swish": _silu,
    "gelu": (lambda z: z * _cdf(z), lambda z: _cdf(z) + z * _pdf(z)),
    "gelu_tanh": (
        lambda z: 0.5 * z * (1.0 + _inner(z)),
        lambda z: 0.5 * (1.0 + _inner(z))
        + 0.5 * z * (1.0 - _inner(z) ** 2) * math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * z**2),
    ),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1.0 - _sigmoid(z))),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
}


def reduced_to(a, like):
    """The sum of a over the axes along which `like`, of the same rank, is broadcast."""
    if like is None:
        return None
    return a.sum(tuple(i for i, n in enumerate(np.shape(like)) if n == 1), keepdims=True)


def labels(norm: str, shape: tuple[int, ...], groups: int) -> np.ndarray:
    """For each element, the number of the statistic that it belongs to: a norm of channels-last arrays."""
    example, channel = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), np.arange(shape[-1])
    of = {
        "batch": lambda: channel,
        "instance": lambda: example * shape[-1] + channel,
        "group": lambda: example * groups + channel // (shape[-1] // groups),
    }.get(norm, lambda: np.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1))
    return np.broadcast_to(of(), shape)

"""What each result of a configuration should be, and how far from it it may be, as `truth.py` says for the norm alone.

Here stand what is around it: mapped axes, the stream of an added norm, running statistics, moments, and elements that
are not finite.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracle import reduced_to, total, wide

from . import truth
from .case import MOMENTS, Case
from .truth import Bounds, half_ulp


def expected(case: Case, given) -> dict:
    """For each result the true value, and how far from it the result may be (inf: it is not looked at)."""
    o, second, mask, state, g, t = given
    if case.transform.startswith("vmap"):
        parts = []
        for i, moving in enumerate((o, second)):
            each = {**o, **{k: moving[k] for k in case.wrt}}
            parts.append(of_one(case, each, mask, state, {k: a[min(i, len(a) - 1)] for k, a in g.items()}, t))
        keep = "d_" if case.transform == "vmap-vjp" else ""
        names = [
            n
            for n in parts[0]
            if n.startswith("d_") == bool(keep) and n.split()[0] not in ("running", "tangent", "second")
        ]
        return {f"mapped {n}": tuple(np.stack([p[n][j] for p in parts]) for j in (0, 1)) for n in names}
    found = of_one(case, o, mask, state, {k: a[0] for k, a in g.items()}, t)
    starts = {"value": (), "vjp": ("d_",), "jvp": ("tangent",)}.get(case.transform)
    if starts is None:
        return {k: v for k, v in found.items() if k.startswith("second")}
    hidden = {"d_", "tangent", "second"} - set(starts)
    if case.transform == "jvp":
        hidden.add("running")
    return {k: v for k, v in found.items() if not k.startswith(tuple(hidden))}


def of_one(case: Case, o: dict, mask, state, g: dict, t: dict) -> dict:
    dtypes = {k: a.dtype for k, a in o.items()}
    o, g, t = ({k: wide(a) for k, a in d.items()} for d in (o, g, t))
    how = case.setting(mask)
    if case.norm == "moments":
        return _of_moments(case, how, o, g, t, dtypes)
    if how.given and case.norm == "batch":
        along = tuple(n if a in case.axes else 1 for a, n in enumerate(case.shape))
        o |= {"mean": wide(state.mean).reshape(along), "var": wide(state.var).reshape(along)}
    out, wrt, add, moving, slope_g = {}, set(case.wrt), case.norm.startswith("add"), dict(t), g["y"]
    if add:  # the stream is rounded, and what is normalized is the stream as it is
        exact = o["x"] + o.pop("residual")
        stream = np.asarray(jnp.asarray(exact, case.accumulator).astype(case.param_dtype))
        out["stream"] = exact, 2.02 * half_ulp(case.param_dtype, exact)
        o["x"], change = wide(stream), sum(moving.pop(k, 0.0) for k in ("x", "residual")) + np.zeros(case.shape)
        out["tangent of stream"] = change, 3 * half_ulp(case.param_dtype, change)
        moving["x"] = wide(np.asarray(jnp.asarray(change, case.accumulator).astype(case.param_dtype)))
    poisoned = _poisoned(case, how, o)
    twice = case.out if case.cast == "before_scale" else None
    bounds = Bounds(how, o, case.accumulator, twice)
    # The stream rounds to its own dtype: half a unit of a sum in which the terms may have cancelled.
    if add:
        rounded = np.where(bounds.t["poisoned"], 0.0, half_ulp(case.param_dtype, exact) * (stream != exact))
        bounds.xhat = bounds.xhat + bounds.a["r"] * 2.02 * rounded
        bounds.z = bounds.z + bounds.a["s"] * bounds.xhat
    bad, unsaid = (np.zeros(case.shape, bool),) * 2 if poisoned is None else poisoned
    out["y"] = np.where(bad, np.nan, bounds.t["y"]), np.where(unsaid, np.inf, np.where(bad, 0.0, bounds.y(case.out)))
    if case.norm == "batch" and state != ():
        out |= _of_state(case, o, mask, state, bad)
    if poisoned is not None:
        return out
    gradients, tolerances = truth.gradients(how, o, slope_g), bounds.gradients(slope_g, o, dtypes)
    if how.given and "weights" in o:
        gradients["weights"] = tolerances["weights"] = np.zeros(o["weights"].shape)
    for name in wrt & set(gradients) | ({"x", "residual"} & wrt if add else set()):
        source = "x" if add and name == "residual" else name
        true, tolerance = gradients[source], tolerances[source]
        if source == "x" and add:  # autodiff adds two cotangents that have the stream's dtype
            tolerance = tolerance + half_ulp(case.param_dtype, true) + half_ulp(case.param_dtype, true + g["stream"])
            true = true + g["stream"]
            tolerance = tolerance + half_ulp(dtypes[name], true)
        if name == "gate":  # one that is poisoned itself
            tolerance = np.where(np.abs(o["gate"]) < 1e4, tolerance, np.inf)
        out[f"d_{name}"] = true, tolerance
    moving = {k: v for k, v in moving.items() if k in o}
    slope = truth.along(lambda o: truth.forward(how, o)["y"], o, moving)
    out["tangent of y"] = slope, bounds.tangent(case.out, moving, slope)
    curve = truth.along(lambda o: truth.gradients(how, o, slope_g), o, moving)
    if how.given and "weights" in o:
        curve["weights"] = np.zeros(o["weights"].shape)
    for name in wrt & set(curve) | ({"x", "residual"} & wrt if add else set()):
        source = "x" if add and name == "residual" else name
        coarse = max(float(jnp.finfo(d).eps) for d in (dtypes[name], case.out, case.x_dtype, case.param_dtype))
        size = _second_size(how, bounds, slope_g, moving, o, source)
        out[f"second d_{name}"] = curve[source], (20 * bounds.u + 2 * coarse) * size
    return out


def _second_size(how, bounds, g, moving, o, name):
    """The magnitude of the terms of a second derivative: those of the gradient, times how fast each factor changes."""
    a = bounds.a
    each = {k: np.abs(v) for k, v in truth.cotangents(how, bounds.t, g).items()}
    rate = a["r"] * np.abs(moving.get("x", 0.0)) + np.zeros(a["x"].shape)
    for k in ("mean",):
        rate = rate + a["r"] * np.abs(moving.get(k, 0.0))
    rate = rate + a["r"] ** 2 * np.abs(moving.get("var", 0.0))
    rate = rate + np.abs(moving.get("gate", 0.0)) * (1.0 + (a["r"] * a["x"] if how.gate == "before" else 0.0))
    rate = rate + np.abs(moving.get("weights", 0.0)) / a["safe"] * a["xhat"] ** 0
    top = lambda v: _largest(v, how.labels)
    spread = 1.0 + top(a["xhat"])
    inner = top(rate) * spread
    h = top(each["h"] + np.abs(g) * a["s"]) * a["n"] ** 0
    moved = top(
        np.abs(moving.get("scale", 0.0)) * np.abs(g) * spread + np.abs(moving.get("bias", 0.0)) * np.abs(g) + 0 * a["x"]
    )
    total_rate = inner * spread**2 + 1.0
    base = (h * (1 + a["s"]) * total_rate + moved * (1 + a["s"]) * spread) * spread
    if how.gate == "after":
        base = base * (1 + top(a["gate"])) + top(np.abs(g) * (a["z"] + a["s"] * inner) * (1 + rate))
    unit = {"x": a["r"], "weights": spread / a["safe"], "mean": a["r"], "var": a["r"] ** 2, "gate": 1.0}.get(name, 1.0)
    if how.gate == "before":
        unit = unit * (1 + a["r"] * a["x"]) if name == "gate" else unit * (1 + top(np.abs(a["gate"])))
    return reduced_to(np.where(np.isfinite(base * unit), base * unit, 0.0), o[name])


def _largest(v, labels):
    out = np.zeros(labels.max(initial=0) + 1)
    np.maximum.at(out, labels.ravel(), np.where(np.isfinite(v), v, 0.0).ravel())
    return out[labels]


def _poisoned(case: Case, how, o: dict):
    """Where an output has to be non-finite since an element that counts is, and where it may be what it will.

    That element is replaced by 1. A group without it is as ever.
    """
    if case.poison is None or not case.poison.startswith("!"):
        return None
    bad = ~np.isfinite(o["x"])
    o["x"] = np.where(bad, 1.0, o["x"])
    group = total(bad * 1.0, how.labels) > 0
    if not _spreads(case):
        sure = bad & (how.activation is None or how.gate is not None)
        return sure, (bad if how.given else group) & ~sure
    w = np.broadcast_to(o.get("weights", 1.0), case.shape) * np.broadcast_to(
        True if how.mask is None else how.mask, case.shape
    )
    return group & (w != 0), group & (w == 0)


def _spreads(case: Case) -> bool:
    """Whether an infinity makes the other outputs NaN. A root mean square makes them 0, given statistics nothing."""
    given = case.norm == "normalize" or (case.norm == "batch" and case.train == "no")
    return not given and (case.poison == "!nan" or case.norm not in ("rms", "gated", "add_rms"))


def _of_state(case: Case, o: dict, mask, state, bad) -> dict:
    """The running statistics, of shape (C,)."""
    index, options = np.indices(case.shape), dict(case.state)
    labels = np.unique(np.stack([index[a].ravel() for a in case.axes], -1), axis=0, return_inverse=True)[1]
    how = truth.Setting(labels.reshape(case.shape), 0.0, mask=mask)
    seen = truth.forward(how, {k: v for k, v in o.items() if k in ("x", "weights")})
    shape = tuple(case.shape[a] for a in case.axes)
    first = tuple(slice(None) if a in case.axes else 0 for a in range(len(case.shape)))
    n, mu, v = (seen[k][first] for k in ("n", "mu", "v"))
    old = {k: None if a is None else wide(a) for k, a in state._asdict().items()}
    momentum, count = options.get("momentum", 0.99), old["count"]
    freedom = 1.0 if "unbiased_running_var" in options else 0.0
    if case.train == "no":
        return {f"running {k}": (a, 0.0 * a) for k, a in old.items() if a is not None}
    keep = (n > 0) & (n >= options.get("min_count", 0.0))
    broken = (total(bad * 1.0, how.labels) > 0)[first] & keep
    if "skip_nonfinite" in options:
        keep, broken = keep & ~broken, np.zeros_like(broken)
    if momentum is None:
        d, new = mu - old["mean"], count + n
        safe = np.where(new == 0, 1.0, new)
        m2 = old["var"] * np.maximum(count - freedom, 0) + v * n + d**2 * count * n / safe
        mean, var, has_var = old["mean"] + d * n / safe, m2 / np.maximum(new - freedom, 1e-30), new > freedom
    else:
        part = 1.0 - momentum
        new = count
        if "zero_debias" in options:
            new = count + 1
            part = part / (1.0 - momentum**new)
        mean = old["mean"] + part * (mu - old["mean"])
        unbiased = v * n / np.where(n > freedom, n - freedom, 1.0)
        var, has_var = old["var"] + part * (unbiased - old["var"]), n > freedom
    u, sigma, gap = 2.0**-20, np.sqrt(v), np.abs(mu - old["mean"])
    size = np.abs(mean) + np.abs(old["mean"]) + np.abs(mu) + sigma
    spread = np.abs(var) + old["var"] + v * (1 + n) + size * (gap + sigma) + sigma * gap
    unsaid = np.where(np.abs(n - freedom) < 1e-3, np.inf, 0.0)  # a divisor near 0
    found = {
        "mean": (np.where(keep, mean, old["mean"]), u * size),
        # A variance that is nothing beside epsilon may be recorded as 0.
        "var": (np.where(keep & has_var, var, old["var"]), u * spread + unsaid + 4e-6 * case.epsilon),
    }
    if count is not None:
        found["count"] = np.where(keep, new, count), u * np.abs(new)
    nan = lambda k, a: np.where(broken & (k != "count"), np.nan, a).reshape(shape)
    return {f"running {k}": (nan(k, a), np.broadcast_to(b, shape)) for k, (a, b) in found.items()}


def _of_moments(case: Case, how, o, g, t, dtypes) -> dict:
    dims = tuple(0 if a in case.axes else slice(None) for a in range(len(case.shape)))
    spread = lambda a: np.broadcast_to(np.expand_dims(a, case.axes), case.shape)
    poisoned = _poisoned(case, how, o)
    bounds = Bounds(how, o, case.accumulator)
    a, u = bounds.a, bounds.u
    sigma, d = np.sqrt(a["v"]), np.abs(bounds.t["d"])
    # Equal weights round the same way at each step of a sum, so the errors of a count add up and do not average out.
    errors = dict(count=2 * u * a["n"], mean=u * (a["mu"] + sigma), m2=2 * u * (a["v"] * a["n"]))
    true = truth.moments(how, o)
    out = {k: (true[k][dims], errors[k][dims] + float(jnp.finfo("float32").tiny)) for k in MOMENTS}
    if poisoned is not None:
        broken = (total(poisoned[0] * 1.0, how.labels) > 0)[dims]
        return {k: (np.where(broken & (k != "count"), np.nan, v), e) for k, (v, e) in out.items()}
    gs = {k: spread(v) for k, v in g.items()}
    near = d + sigma
    # The truth is in float64 as well: it knows x minus the mean to some units of x, which is all that is left of it
    # where a statistic is of one element.
    own = 8.0 * float(np.finfo("float64").eps) * np.abs(np.where(bounds.t["poisoned"], 0.0, bounds.t["x"]))
    size = {
        "x": a["w"] * (np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * near),
        "weights": np.abs(gs["count"]) + np.abs(gs["mean"]) * near / a["safe"] + 2 * np.abs(gs["m2"]) * near**2,
    }
    gradient = truth.moments_gradients(how, o, gs)
    slopes = truth.along(lambda o: truth.moments(how, o), o, t)
    curve = truth.along(lambda o: truth.moments_gradients(how, o, gs), o, t)
    tx, tw = np.abs(t.get("x", 0.0)), np.where(bounds.t["keep"], np.abs(t.get("weights", 0.0)), 0.0)
    sums = lambda v: total(v + np.zeros(case.shape), how.labels)
    steps = dict(
        count=sums(tw),
        mean=sums(a["w"] * tx + tw * near) / a["safe"],
        m2=sums(2 * a["w"] * tx * near + 2 * tw * near**2),
    )
    empty = (a["n"] == 0) & (
        "weights" in t
    )  # the derivatives in the directions of weights are not those of one function
    for k in MOMENTS:
        out[f"tangent of {k}"] = slopes[k][dims], np.where(empty, np.inf, 2 * u * steps[k] + 1e-37)[dims]
    for k in case.wrt:
        error = reduced_to(u * size[k], o[k]) + half_ulp(dtypes[k], gradient[k])
        out[f"d_{k}"] = gradient[k], error
        rate = _largest(tw + steps["count"], how.labels) / a["safe"] + 1.0
        move = _largest(tx + steps["mean"], how.labels)
        top = _largest(near, how.labels)
        of_x = (a["w"] + tw) * (np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * (top + move)) * rate
        of_w = (np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * (top + move)) * (top + move) * rate
        error = reduced_to({"x": of_x, "weights": of_w}[k], o[k]) * (20 * u + 2 * float(jnp.finfo(dtypes[k]).eps))
        slope = np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * (top + move + own)
        error = error + reduced_to({"x": (a["w"] + tw), "weights": slope}[k] * own * slope ** (k == "x") * rate, o[k])
        out[f"second d_{k}"] = curve[k], error + 1e-37
    return out

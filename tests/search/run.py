"""What a configuration runs, on the kernels and on XLA, and the comparison with the truth."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle import reduced_to, total, wide

import jaxnorm as jn

from . import truth
from .case import Case, operands, simpler
from .truth import Bounds, half_ulp

MOMENTS = ("count", "mean", "m2")
BACKENDS = {
    "kernels": None,
    "xla": "xla",
}  # by default, and with `_kernels.cpu.pays` always true: kernels where there are


def check(case: Case) -> None:
    """Raise an AssertionError that says which results of the configuration are wrong, if any are."""
    wrong = failures(case)
    assert not wrong, "\n".join([repr(case), *wrong])


def failures(case: Case, backends=tuple(BACKENDS)) -> list[str]:
    with warnings.catch_warnings(), jax.enable_x64(case.x64):
        warnings.simplefilter("ignore")  # one element per statistic
        given = _data(case)
        want = _truth(case, given)
        out = []
        for backend in backends:
            if backend == "kernels" and not _has_kernels(case):
                continue
            try:
                got = jax.tree.map(np.asarray, _program(case.program(), BACKENDS[backend])(*given))
            except Exception as error:
                out.append(f"{backend}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
            out += [f"{backend}: {line}" for line in _compared(got, want)]
    return out


def shrunk(case: Case, attempts: int = 40) -> Case:
    """A simpler configuration that fails too."""
    changed = True
    while changed and attempts > 0:
        changed = False
        for candidate in simpler(case):
            attempts -= 1
            try:
                failing = bool(failures(candidate))
            except Exception:  # not a configuration
                failing = False
            if failing:
                case, changed = candidate, True
                break
    return case


def _has_kernels(case: Case) -> bool:
    """Masks and weights are XLA's on either path; by statistics that are given there is one path."""
    return case.mask is None and case.weights is None and case.norm not in ("moments", "normalize")


# --- what is run ------------------------------------------------------------------------------------------------------


def _data(case: Case):
    """(operands, those of the second of two mapped examples, mask, state, cotangents, tangents)"""
    o, mask = operands(case)
    rng = np.random.default_rng((case.seed, 1))
    second = operands(_reseeded(case))[0]
    g, t = {}, {}
    count = 2 if case.transform == "vmap-vjp" else 1
    draws = lambda shape, dtype: np.asarray(jnp.asarray(rng.normal(size=(count, *shape)), dtype))
    for name, (shape, dtype) in _outputs(case).items():
        g[name] = draws(shape, dtype)
    for name in case.wrt:
        size = case.magnitude if name in ("x", "residual", "mean") else case.magnitude**2 if name == "var" else 1.0
        t[name] = np.asarray(jnp.asarray(0.5 * size * rng.normal(size=o[name].shape), o[name].dtype))
    state = ()
    if case.norm == "batch":
        shape = tuple(case.shape[a] for a in case.axes)
        mean, var = rng.normal(size=shape) + case.mean, rng.uniform(0.5, 2.0, shape)
        options = dict(case.state)
        counts = options.get("momentum", 1) is None or "zero_debias" in options
        state = jn.RunningStats(
            (case.magnitude * mean).astype("f"), (case.magnitude**2 * var).astype("f"),
            np.full(shape, 3.0, "f") if counts else None,
        )  # fmt: skip
    return o, second, mask, state, g, t


def _reseeded(case: Case) -> Case:
    import dataclasses

    return dataclasses.replace(case, seed=case.seed + 1, poison=None)


def _outputs(case: Case) -> dict:
    """Names of the differentiable outputs, with their shapes and dtypes."""
    if case.norm == "moments":
        shape, acc = tuple(n for a, n in enumerate(case.shape) if a not in case.axes), case.accumulator
        return dict.fromkeys(MOMENTS, (shape, acc))
    stream = {"stream": (case.shape, case.param_dtype)} if case.norm.startswith("add") else {}
    return {"y": (case.shape, case.out), **stream}


def _norm(case: Case, implementation, o: dict, mask, state, **more: Any) -> tuple[dict, Any]:
    """The differentiable outputs by name, and the new state."""
    features = tuple(case.shape[a] for a in case.axes)
    along = tuple(n if a in case.axes else 1 for a, n in enumerate(case.shape))
    given = {k: v.reshape(features) if v.shape == along != case.shape else v for k, v in o.items() if k in _NAMED}
    more |= dict(implementation=implementation, mask=mask)
    if case.norm != "moments":
        more |= dict(epsilon=case.epsilon, scale_offset=case.scale_offset, activation=case.activation, dtype=case.dtype)
    one = lambda axes: axes[0] if len(axes) == 1 else axes
    x, scale, bias = o["x"], given.get("scale"), given.get("bias")
    if case.norm == "moments":
        return jn.moments(x, case.axes, mask=mask, weights=o.get("weights"))._asdict(), ()
    if case.norm == "normalize":
        del more["implementation"], more["mask"]
        return {"y": jn.normalize(x, given["mean"], given["var"], scale, bias, axis=case.axes, **more)}, ()
    if case.norm == "batch":
        train = {"yes": True, "no": False, "traced": jnp.asarray(True)}[case.train]
        more |= dict(weights=o.get("weights"), virtual_batch_size=case.ghosts, **dict(case.state))
        y, new = jn.batch_norm(x, jn.Affine(scale, bias), state, train=train, axis=one(case.axes), **more)
        return {"y": y}, new
    if case.norm in ("rms", "gated", "add_rms"):
        more["cast"] = case.cast
    if case.norm == "gated":
        size = None if case.groups is None else case.shape[case.channel] // case.groups
        more |= dict(group_size=size, norm_before_gate=case.norm_before_gate)
        return {"y": jn.gated_rms_norm(x, o["gate"], scale, axis=case.channel, **more)}, ()
    if case.norm.startswith("add"):
        function = jn.add_rms_norm if case.norm == "add_rms" else jn.add_layer_norm
        y, stream = function(x, o["residual"], scale, bias, axis=case.axes, **more)
        return {"y": y, "stream": stream}, ()
    if case.norm == "group":
        more |= dict(num_groups=case.groups, reduction_axes=case.reduced)
    function = dict(layer=jn.layer_norm, rms=jn.rms_norm, group=jn.group_norm, instance=jn.instance_norm)[case.norm]
    return {"y": function(x, scale, bias, axis=one(case.axes), **more)}, ()


_NAMED = ("scale", "bias", "mean", "var")


@functools.lru_cache(maxsize=4)
def _program(case: Case, implementation):
    """The transformed norm as a function of `_data`, which gives a dict of arrays."""

    def run(o, second, mask, state, g, t):
        one = {k: a[0] for k, a in g.items()}
        moving, still = {k: o[k] for k in case.wrt}, {k: a for k, a in o.items() if k not in case.wrt}
        norm = lambda moving: _norm(case, implementation, {**still, **moving}, mask, state)
        gradient = lambda moving, g=one: jax.vjp(lambda m: norm(m)[0], moving)[1](g)[0]
        named = lambda prefix, tree: {f"{prefix}{k}": a for k, a in tree.items()}
        if case.transform == "value":
            y, new = norm(moving)
            return {**y, **_as_dict(new)}
        if case.transform == "vjp":
            y, pull, new = jax.vjp(norm, moving, has_aux=True)
            return {**y, **_as_dict(new), **named("d_", pull(one)[0])}
        if case.transform == "jvp":
            y, dy = jax.jvp(lambda m: norm(m)[0], (moving,), (t,))
            return {**y, **named("tangent of ", dy)}
        if case.transform == "second":
            return named("second d_", jax.jvp(gradient, (moving,), (t,))[1])
        if case.transform == "second-reverse":
            along = lambda m: sum(jnp.vdot(a.astype(_WIDE), t[k].astype(_WIDE)) for k, a in gradient(m).items())
            return named("second d_", jax.grad(along)(moving))
        both = {k: jnp.stack([moving[k], second[k]]) for k in case.wrt}
        if case.transform == "vmap":
            return named("mapped ", jax.vmap(lambda m: norm(m)[0])(both))
        return named("mapped d_", jax.vmap(lambda m, g: gradient(m, g))(both, g))

    _WIDE = "float64" if case.x64 else "float32"
    return jax.jit(run) if case.jit else run


def _as_dict(state) -> dict:
    return {} if state == () else {f"running {k}": a for k, a in state._asdict().items() if a is not None}


# --- what is right ----------------------------------------------------------------------------------------------------


def _truth(case: Case, given) -> dict:
    """For each result the true value, and how far from it the result may be (inf: it is not looked at)."""
    o, second, mask, state, g, t = given
    if case.transform.startswith("vmap"):
        parts = []
        for i, moving in enumerate((o, second)):
            each = {**o, **{k: moving[k] for k in case.wrt}}
            parts.append(_of_one(case, each, mask, state, {k: a[min(i, len(a) - 1)] for k, a in g.items()}, t))
        keep = "d_" if case.transform == "vmap-vjp" else ""
        names = [
            n
            for n in parts[0]
            if n.startswith("d_") == bool(keep) and n.split()[0] not in ("running", "tangent", "second")
        ]
        return {f"mapped {n}": tuple(np.stack([p[n][j] for p in parts]) for j in (0, 1)) for n in names}
    found = _of_one(case, o, mask, state, {k: a[0] for k, a in g.items()}, t)
    starts = {"value": (), "vjp": ("d_",), "jvp": ("tangent",)}.get(case.transform)
    if starts is None:
        return {k: v for k, v in found.items() if k.startswith("second")}
    hidden = {"d_", "tangent", "second"} - set(starts)
    if case.transform == "jvp":
        hidden.add("running")
    return {k: v for k, v in found.items() if not k.startswith(tuple(hidden))}


def _of_one(case: Case, o: dict, mask, state, g: dict, t: dict) -> dict:
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
        o["x"], moving["x"] = wide(stream), sum(moving.pop(k, 0.0) for k in ("x", "residual")) + np.zeros(case.shape)
        out["tangent of stream"] = moving["x"], 3 * half_ulp(case.param_dtype, moving["x"])
    poisoned = _poisoned(case, how, o)
    twice = case.out if case.cast == "before_scale" else None
    bounds = Bounds(how, o, case.accumulator, twice)
    # The stream of an add is of the other dtype, and rounds once more: half a unit of the sum, which may have cancelled.
    if add:
        bounds.xhat = bounds.xhat + bounds.a["r"] * 2.02 * half_ulp(case.param_dtype, exact) * (stream != exact)
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
    hidden = bounds.t["poisoned"] if "x" in o else None
    for name in wrt & set(gradients) | ({"x", "residual"} & wrt if add else set()):
        source = "x" if add and name == "residual" else name
        true, tolerance = gradients[source], tolerances[source]
        if source == "x" and add:  # autodiff adds two cotangents that have the stream's dtype
            tolerance = tolerance + half_ulp(case.param_dtype, true) + half_ulp(case.param_dtype, true + g["stream"])
            true = true + g["stream"]
            tolerance = tolerance + half_ulp(dtypes[name], true)
        if name == "x":  # padding that is poisoned itself: zero would do, and so does what an element has there
            tolerance = np.where(hidden, np.inf, tolerance)
        if name == "gate":
            tolerance = np.where(np.abs(o["gate"]) < 1e4, tolerance, np.inf)
        out[f"d_{name}"] = true, tolerance
    moving = {k: v for k, v in moving.items() if k in o}
    slope = truth.along(lambda o: truth.forward(how, o)["y"], o, moving)
    out["tangent of y"] = (
        np.where(hidden, 0.0, slope),
        np.where(hidden, np.inf, bounds.tangent(case.out, moving, slope)),
    )
    curve = truth.along(lambda o: truth.gradients(how, o, slope_g), o, moving)
    if how.given and "weights" in o:
        curve["weights"] = np.zeros(o["weights"].shape)
    for name in wrt & set(curve) | ({"x", "residual"} & wrt if add else set()):
        source = "x" if add and name == "residual" else name
        coarse = max(float(jnp.finfo(d).eps) for d in (dtypes[name], case.out, case.x_dtype, case.param_dtype))
        size = _second_size(how, bounds, slope_g, moving, o, source)
        tolerance = (20 * bounds.u + 2 * coarse) * size
        out[f"second d_{name}"] = curve[source], np.where(hidden, np.inf, tolerance) if source == "x" else tolerance
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
    """Whether an infinity makes the other outputs NaN. By a root mean square they are 0, by given statistics themselves."""
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
    u = 2.0**-20
    sure = np.where(np.abs(n - freedom) < 1e-3, np.inf, 0.0)  # a divisor near 0
    keep_var = keep & has_var
    size = np.abs(mean) + np.abs(old["mean"]) + np.abs(mu) + np.sqrt(v)
    found = {
        "mean": (np.where(keep, mean, old["mean"]), u * size),
        "var": (np.where(keep_var, var, old["var"]), u * (np.abs(var) + old["var"] + v * (1 + n) + (size + np.sqrt(v)) * np.abs(mu - old["mean"]) + size * np.sqrt(v)) + sure),
    }  # fmt: skip
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
    errors = dict(count=u * a["n"], mean=u * (a["mu"] + sigma), m2=2 * u * (a["v"] * a["n"]))
    true = truth.moments(how, o)
    out = {k: (true[k][dims], errors[k][dims] + float(jnp.finfo("float32").tiny)) for k in MOMENTS}
    if poisoned is not None:
        broken = (total(poisoned[0] * 1.0, how.labels) > 0)[dims]
        return {k: (np.where(broken & (k != "count"), np.nan, v), e) for k, (v, e) in out.items()}
    gs = {k: spread(v) for k, v in g.items()}
    near = d + sigma
    size = {"x": a["w"] * (np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * near),
            "weights": np.abs(gs["count"]) + np.abs(gs["mean"]) * near / a["safe"] + 2 * np.abs(gs["m2"]) * near**2}  # fmt: skip
    hidden = {"x": bounds.t["poisoned"]}
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
        out[f"d_{k}"] = gradient[k], np.where(hidden.get(k, False), np.inf, error)
        rate = _largest(tw + steps["count"], how.labels) / a["safe"] + 1.0
        move = _largest(tx + steps["mean"], how.labels)
        top = _largest(near, how.labels)
        of_x = (a["w"] + tw) * (np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * (top + move)) * rate
        of_w = (np.abs(gs["mean"]) / a["safe"] + 2 * np.abs(gs["m2"]) * (top + move)) * (top + move) * rate
        error = reduced_to({"x": of_x, "weights": of_w}[k], o[k]) * (20 * u + 2 * float(jnp.finfo(dtypes[k]).eps))
        out[f"second d_{k}"] = curve[k], np.where(hidden.get(k, False), np.inf, error) + 1e-37
    return out


# --- the comparison ---------------------------------------------------------------------------------------------------

WORST: dict[str, float] = {}  # by kind of result, the largest error so far as a part of what is allowed


def _compared(got: dict, want: dict) -> list[str]:
    out = []
    if missing := set(got) ^ set(want):
        return [f"results {sorted(missing)} are on one side only"]
    for name, (true, tolerance) in want.items():
        a = wide(got[name])
        true, tolerance = np.broadcast_to(true, np.shape(true)), np.broadcast_to(tolerance, np.shape(true))
        if a.shape != true.shape:
            out.append(f"{name} has shape {a.shape}, not {true.shape}")
            continue
        most = float(jnp.finfo(got[name].dtype).max) * 0.99
        lost = np.isnan(true)
        looked_at = ~lost & np.isfinite(tolerance) & (np.abs(true) + tolerance < most)
        if np.isfinite(a[lost]).any():
            out.append(f"{name} is finite in {np.isfinite(a[lost]).sum()} places where an element that counts is not")
        if (~np.isfinite(a) & ~lost & (np.abs(np.nan_to_num(true)) < most / 2) & ~(tolerance > most / 2)).any():
            where = np.argwhere(~np.isfinite(a) & looked_at)
            out.append(f"{name} is not finite, at {where[:1].tolist()} for one")
            continue
        error, allowed = np.abs(a - true)[looked_at], tolerance[looked_at]
        if not error.size:
            continue
        ratio = error / np.maximum(allowed, 1e-300)
        kind = f"{name} in {got[name].dtype}"
        WORST[kind] = max(WORST.get(kind, 0.0), float(ratio.max()) if np.isfinite(ratio).all() else 0.0)
        if (error > allowed).any():
            i = int(ratio.argmax())
            at, value = np.argwhere(looked_at)[i].tolist(), a[looked_at][i]
            out.append(
                f"{name}{at} is {value:.9g}, should be {true[looked_at][i]:.9g}: off by {error[i]:.2g} of {allowed[i]:.2g}"
            )
    return out

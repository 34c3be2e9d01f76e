"""What a configuration runs, on the kernels and on XLA, and the comparison with the truth."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle import wide

import jaxnorm as jn

from .case import MOMENTS, Case, operands, simpler
from .expected import expected

BACKENDS = {
    "kernels": None,
    "xla": "xla",
}  # by default, and with `_backends.cpu.is_profitable` always true: kernels where there are


def check(case: Case) -> None:
    """Raise an AssertionError that says which results of the configuration are wrong, if any are."""
    wrong = failures(case)
    assert not wrong, "\n".join([repr(case), *wrong])


def failures(case: Case, backends=tuple(BACKENDS)) -> list[str]:
    with warnings.catch_warnings(), jax.enable_x64(case.x64):
        warnings.simplefilter("ignore")  # one element per statistic
        given = _data(case)
        want = expected(case, given)
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
        if np.isnan(tolerance[~np.isnan(true)]).any():  # only inf may say that an element is not looked at
            out.append(f"{name} has no tolerance: a NaN")
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
            at, value, right = np.argwhere(looked_at)[i].tolist(), a[looked_at][i], true[looked_at][i]
            out.append(
                f"{name}{at} is {value:.9g}, not {right:.9g}: off by {error[i]:.2g} where {allowed[i]:.2g} is allowed"
            )
    return out

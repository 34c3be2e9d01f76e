"""Law 6: every transformation, for every norm; in float64, against a plain jnp formula differentiated by JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EACH, ROWS, ghosts
from jax import lax


def shrunk(row):
    """The same norm on a small x, where a full Hessian is cheap."""
    small = {2: (5, 3), 3: (4, 2, 5), 4: (4, 3, 2, 4)}[len(row.shape)]
    shape = tuple(12 if n == 12 else min(n, m) for n, m in zip(row.shape, small, strict=True))
    param = row.with_shape(shape)[1]
    spec = row.spec
    if row.ghost:
        size = 2 if row.ghost == 8 else 3
        spec = dataclasses.replace(spec, virtual_batch_size=size)
        row = dataclasses.replace(row, spec=spec, statistic=ghosts(size))
    given = None if row.given is None else tuple(p for p in param if p != 1)
    return dataclasses.replace(row, shape=shape, param=param, given=given)


def modes(f, params, x, v, dp, g):
    """Each transformation of f(params, x), by name."""
    loss = lambda params, x: jnp.sum(jnp.sin(f(params, x)) * g)
    alone = lambda x: loss(params, x)
    slope = lambda x: jnp.vdot(jax.grad(alone)(x), v)
    return {
        "value": lambda: f(params, x),
        "jvp": lambda: jax.jvp(f, (params, x), (dp, v)),
        "linearize": lambda: jax.linearize(f, params, x)[1](dp, v),
        "vjp": lambda: jax.vjp(f, params, x)[1](g),
        "grad": lambda: jax.grad(loss, (0, 1))(params, x),
        "grad of x alone": lambda: jax.grad(alone)(x),
        "grad of params alone": lambda: jax.grad(loss)(params, x),
        "vmap": lambda: jax.vmap(lambda x: f(params, x))(jnp.stack([x, v])),
        "vmap at the last axis": lambda: jax.vmap(lambda x: f(params, x), -1, -1)(jnp.stack([x, v], -1)),
        "vmap of params": lambda: [
            jax.vmap(f, (0, None))(jax.tree.map(lambda a, b: jnp.stack([a, b]), params, dp), x)
            for _ in jax.tree.leaves(params)[:1]
        ],
        "vmap of grad": lambda: jax.vmap(jax.grad(alone))(jnp.stack([x, v])),
        "grad of vmap": lambda: jax.grad(lambda xs: jax.vmap(alone)(xs).sum())(jnp.stack([x, v])),
        "jacfwd": lambda: jax.jacfwd(f, 1)(params, x),
        "jacrev": lambda: jax.jacrev(f, (0, 1))(params, x),
        "forward over reverse": lambda: jax.jvp(jax.grad(alone), (x,), (v,))[1],
        "reverse over forward": lambda: jax.grad(lambda x: jax.jvp(alone, (x,), (v,))[1])(x),
        "reverse over reverse": lambda: jax.grad(slope)(x),
        "forward over forward": lambda: jax.jacfwd(jax.jacfwd(lambda t: alone(x + t * v)))(0.5),
        "hessian": lambda: jax.hessian(alone)(x),
        "third derivative": lambda: jax.grad(lambda x: jnp.vdot(jax.grad(slope)(x), v))(x),
        "remat": lambda: jax.grad(jax.checkpoint(loss), (0, 1))(params, x),
        "scan": lambda: jax.grad(lambda x: lax.scan(lambda c, _: (f(params, c) + x, None), x, None, 3)[0].sum())(x),
    }


# Rows of one norm differ in axes and parameters, not in rules: a norm goes through all modes, each row through these.
ESSENTIAL = ("value", "jvp", "vjp", "vmap", "vmap of params", "vmap of grad", "reverse over reverse", "hessian")


def compare(f, reference, names, *args, rtol, atol):
    # Arguments, not constants: jax 0.7.0 folds a constant scatter of the reference to a wrong value.
    run = lambda f: jax.jit(lambda *args: {name: modes(f, *args)[name]() for name in names})(*args)
    got, want = run(f), run(reference)
    for name in names:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            scale = max(1.0, float(jnp.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * scale, err_msg=name)


def arguments(row, rng, dtype):
    return row.params(rng, dtype), *(jnp.asarray(a, dtype) for a in rng.normal(size=(2, *row.shape)))


@pytest.mark.versions
@pytest.mark.parametrize("row", [shrunk(r) for r in ROWS], ids=str)
def test_transformations(row, rng):
    with jax.enable_x64(True):
        params, x, v = arguments(row, rng, np.float64)
        dp, _, g = arguments(row, rng, np.float64)
        names = ESSENTIAL if row.name not in {r.name for r in EACH} else modes(None, *[None] * 5)
        compare(row.apply, row.reference, names, params, x, v, dp, g, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("row", [shrunk(r) for r in EACH], ids=str)
def test_in_float32(row, rng):
    params, x, v = arguments(row, rng, np.float32)
    dp, _, g = arguments(row, rng, np.float32)
    names = ("jvp", "vjp", "vmap of grad", "forward over reverse", "reverse over reverse", "third derivative")
    compare(row.apply, row.reference, names, params, x, v, dp, g, rtol=2e-3, atol=5e-4)


def test_without_jit(rng):
    row = shrunk(EACH[0])
    params, x, v = arguments(row, rng, np.float32)
    apply = lambda params, x: row.spec.apply(params, (), x)[0]
    for name in ("value", "jvp", "vjp"):
        got, want = (modes(f, params, x, v, params, v)[name]() for f in (apply, row.reference))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(jnp.abs(b).max())), err_msg=name)


@pytest.mark.parametrize("row", [shrunk(r) for r in EACH], ids=str)
def test_a_mask_under_transformations(row, rng):
    """Masked by a constant mask, f is the reference on what is left: checked by derivatives of both."""
    with jax.enable_x64(True):
        mask = np.ones(row.shape, bool)
        mask[-1] = False
        params, x, v = arguments(row, rng, np.float64)
        dp, _, g = arguments(row, rng, np.float64)
        f = lambda params, x: row.apply(params, x, mask=mask)[:-1]
        short = dataclasses.replace(row, shape=(row.shape[0] - 1, *row.shape[1:]))
        part = lambda params, x: short.reference(params, x[:-1])
        compare(f, part, ESSENTIAL, params, x, v, dp, g[:-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_equal_calls_trace_once(row, rng):
    traces = []

    @jax.jit
    def f(params, x):
        traces.append(1)
        return row.apply(params, x)

    for _ in range(3):
        f(row.params(rng), rng.normal(size=row.shape).astype(np.float32))
    assert len(traces) == 1

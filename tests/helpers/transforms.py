"""Every transformation of a norm, by name, and their comparison with those of a plain formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from catalogue import MECHANISMS, ghosts
from jax import lax

from helpers.jit import jit_unoptimized


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
    operands = functools.partial(_wide, row.operands)  # a float32 one would be rounded where the truth is float64
    return dataclasses.replace(row, shape=shape, param=param, given=given, operands=operands)


def _wide(operands, shape):
    wide = lambda a: a if np.issubdtype(np.asarray(a).dtype, np.integer) else np.asarray(a, np.float64)
    return jax.tree.map(wide, operands(shape))


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
        # Second derivatives of x and params along one direction, batched as those of a Hessian are, and the gradients.
        "vmap of forward over reverse": lambda: jax.vmap(
            lambda x, v: jax.jvp(jax.grad(loss, (0, 1)), (params, x), (dp, v))
        )(jnp.stack([x, v]), jnp.stack([v, x])),
        "remat": lambda: jax.grad(jax.checkpoint(loss), (0, 1))(params, x),
        "scan": lambda: jax.grad(lambda x: lax.scan(lambda c, _: (f(params, c) + x, None), x, None, 3)[0].sum())(x),
    }


# There are rules for statistics of an example and for those of a batch: a row of each goes through all modes. A row
# with a mechanism of its own goes through those that reach each rule, and any other row through the least that
# differentiates twice and batches.
ALL = ("layer", "batch-nhwc")
ESSENTIAL = ("value", "jvp", "vjp", "vmap", "vmap of params", "reverse over reverse", "vmap of forward over reverse")
FEWEST = ("vmap of forward over reverse",)  # law 1 has the gradients of each row alone


def modes_for(row) -> tuple[str, ...]:
    """The names of the modes that a row of the catalogue goes through."""
    if row.name in ALL:
        return (*modes(None, *[None] * 5),)
    return ESSENTIAL if row.name in MECHANISMS else FEWEST


def compare(f, reference, names, *args, rtol, atol):
    # Arguments, not constants: jax 0.7.0 folds a constant scatter of the reference to a wrong value.
    both = lambda *args: [{name: modes(f, *args)[name]() for name in names} for f in (f, reference)]
    got, want = jax.tree.map(np.asarray, jit_unoptimized(both)(*args))
    for name in names:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            scale = max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * scale, err_msg=name)


def arguments(row, rng, dtype):
    return row.params(rng, dtype), *(jnp.asarray(a, dtype) for a in rng.normal(size=(2, *row.shape)))

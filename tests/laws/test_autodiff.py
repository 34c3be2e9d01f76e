"""Law 6: every transformation, for every norm; in float64, against a plain jnp formula differentiated by JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EACH, ROWS
from helpers.transforms import ESSENTIAL, arguments, compare, modes, modes_for, shrunk


@pytest.mark.versions
@pytest.mark.parametrize("row", [shrunk(r) for r in ROWS], ids=str)
def test_every_transformation_matches_the_reference(row, rng):
    with jax.enable_x64(True):
        params, x, v = arguments(row, rng, np.float64)
        dp, _, g = arguments(row, rng, np.float64)
        compare(row.apply, row.reference, modes_for(row), params, x, v, dp, g, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("row", [shrunk(r) for r in EACH], ids=str)
def test_transformations_match_the_reference_in_float32(row, rng):
    params, x, v = arguments(row, rng, np.float32)
    dp, _, g = arguments(row, rng, np.float32)
    names = ("jvp", "vjp", "vmap of grad", "forward over reverse", "reverse over reverse", "third derivative")
    compare(row.apply, row.reference, names, params, x, v, dp, g, rtol=2e-3, atol=5e-4)


def test_transformations_match_the_reference_without_jit(rng):
    row = shrunk(EACH[0])
    params, x, v = arguments(row, rng, np.float32)
    apply = lambda params, x: row.spec.apply(params, (), x)[0]
    for name in ("value", "jvp", "vjp"):
        got, want = (modes(f, params, x, v, params, v)[name]() for f in (apply, row.reference))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(jnp.abs(b).max())), err_msg=name)


@pytest.mark.parametrize("row", [shrunk(r) for r in EACH], ids=str)
def test_transformations_of_a_masked_norm_match_the_reference(row, rng):
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

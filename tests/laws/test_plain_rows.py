"""XLA on one CPU device: by squares of x as it is, and again with care where those overflow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from catalogue import EACH, draw
from test_accuracy import check_magnitudes

import jaxnorm as jn
from jaxnorm._core import platforms

SIZES = (1e-30, 1e-10, 1.0, 1e18, 1e20, 1e30)  # of six rows


@pytest.fixture
def one_device(monkeypatch):
    """As where JAX has one CPU device, for arrays of any size."""
    monkeypatch.setattr(platforms, "_FEWEST", 1)
    monkeypatch.setattr(platforms, "_has_one_cpu", lambda: True)


def norm_of(name):
    function = {"rms": jn.rms_norm, "layer": jn.layer_norm}[name]
    return lambda x, *params: function(x, *params, epsilon=1e-5, implementation="xla")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["rms", "layer"])
def test_rows_of_every_magnitude_beside_each_other(name, dtype, rng, one_device):
    """In one batch, where one of them overflows; alone under vmap, where each decides for itself; and constants."""
    norm, scale = norm_of(name), draw(rng, 40)
    rows = [draw(rng, (8, 40), 1.0) * np.float32(size) for size in SIZES]
    x = np.asarray(jnp.asarray(np.stack([*rows, np.full_like(rows[0], 1e20), np.full_like(rows[0], 3.3)]), dtype))
    labels = np.broadcast_to(np.arange(64).reshape(8, 8, 1), x.shape)
    true = oracle.normalize(x, labels, scale, None, epsilon=1e-5, centered=name == "layer").y
    rounding = 0.51 * float(jnp.finfo(dtype).eps) if dtype == jnp.bfloat16 else 1e-6
    program = jax.jit(norm)
    assert ("while" in program.lower(x, scale).as_text()) == (jax.default_backend() == "cpu")
    for y in (program(x, scale), jax.jit(jax.vmap(norm, (0, None)))(x, scale)):
        np.testing.assert_allclose(np.float64(y), true, rtol=rounding, atol=2e-6)
    few = program(x[2:4], scale)  # of which no sum overflows
    np.testing.assert_allclose(np.float64(few), true[2:4], rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_their_derivatives_and_what_is_not_finite(name, rng, one_device):
    norm, x = norm_of(name), draw(rng, (6, 40), 1.0)
    value, slope = jax.jit(lambda x: jax.jvp(norm, (x,), (jnp.ones_like(x),)))(x)
    np.testing.assert_allclose(value, jax.jit(norm)(x), rtol=1e-6, atol=1e-6)
    (back,) = jax.jit(lambda x: jax.vjp(norm, x)[1](jnp.ones_like(x)))(x)
    np.testing.assert_allclose(back.sum(), slope.sum(), rtol=1e-4, atol=1e-5)
    x[2, 5] = np.inf
    y = np.asarray(jax.jit(norm)(x))
    assert not np.isfinite(y[2]).all()
    assert np.isfinite(np.delete(y, 2, 0)).all()


@pytest.mark.parametrize("row", EACH, ids=str)
def test_statistics_of_every_magnitude(row, rng, one_device):
    """Those that the backward pass has, too: of all norms, beside each other under vmap."""
    row = replace(row, spec=replace(row.spec, implementation="xla"))
    check_magnitudes(row, np.float32, rng)
    if row.name != "rms":
        return
    x = np.stack([draw(rng, row.shape, 1.0) * np.float32(size) for size in SIZES])
    params = row.params(rng)
    forth = jax.jit(jax.vmap(lambda x: jax.jvp(lambda x: row.apply(params, x), (x,), (x,))[0]))(x)
    for y, one in zip(forth, x, strict=True):
        np.testing.assert_allclose(y, row.truth(params, one).y, rtol=1e-6, atol=2e-6)

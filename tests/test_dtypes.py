"""Law 2: float32 or wider inside, one rounding at the end, x's dtype out; integers promoted; x64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from catalogue import EACH, ROWS, by_name, draw

import jaxnorm as jn

HALVES = [ml_dtypes.bfloat16, np.float16]


def ulp(y):
    """The spacing of y's dtype at y, in float64."""
    info = ml_dtypes.finfo(y.dtype)
    exponent = np.frexp(np.abs(y.astype(np.float64)))[1] - 1
    return np.exp2(np.maximum(exponent, info.minexp) - info.nmant)


@pytest.mark.versions
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_half_precision_is_the_truth_rounded_once(row, dtype, rng):
    params = row.params(rng, dtype)
    g = draw(rng, row.shape, dtype=dtype)
    apply = jax.jit(lambda params, x: jax.vjp(row.apply, params, x)[0])
    for magnitude, mean in ((1.0, 0.0), (1.0, 30.0), (1e-3, 0.0), (3e3, 2.0)):
        x = (draw(rng, row.shape, mean) * magnitude).astype(dtype)
        y = np.asarray(apply(params, x))
        assert y.dtype == dtype
        truth = row.truth(params, x).y
        # One rounding is half a unit in the last place; float32 arithmetic adds a little. Llama's order rounds twice.
        units = 2.0 if "twice" in row.flags else 0.51
        slack = 1e-5 * (1 + np.abs(row.in_rank(params)[0]).max() if row.spec.use_scale else 1)
        np.testing.assert_array_less(np.abs(y.astype(np.float64) - truth), units * ulp(y) + slack)
    dparams, dx = jax.jit(lambda p, x, g: jax.vjp(row.apply, p, x)[1](g))(params, x, g)
    dx_true, *dparams_true = row.gradients(params, x, g)
    assert dx.dtype == dtype
    close = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float64), b, rtol=1e-2, atol=float(ml_dtypes.finfo(dtype).eps) * max(np.abs(b).max(), 1e-3)
    )
    close(dx, dx_true)
    for got, true in zip(dparams, dparams_true, strict=True):
        if got is not None:
            assert got.dtype == dtype
            close(np.reshape(got, true.shape), true)


@pytest.mark.parametrize("row", EACH, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e15, 1e28])
def test_bfloat16_of_any_scale(row, magnitude, rng):
    params, x = row.params(rng), (draw(rng, row.shape) * magnitude).astype(ml_dtypes.bfloat16)
    y = np.asarray(row.apply(params, x))
    np.testing.assert_array_less(np.abs(y.astype(np.float64) - row.truth(params, x).y), 0.51 * ulp(y) + 2e-5)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_the_dtype_of_the_output_is_x_s_unless_told(row, rng):
    x = draw(rng, row.shape)
    for given in (np.float32, np.float16, ml_dtypes.bfloat16):
        for param in (np.float32, ml_dtypes.bfloat16):
            assert row.apply(row.params(rng, param), x.astype(given)).dtype == given
    told = jn_replace(row.spec, dtype=jnp.bfloat16)
    assert told.apply(row.params(rng), row.state(), x, train=True)[0].dtype == jnp.bfloat16


def jn_replace(spec, **changes):
    import dataclasses

    return dataclasses.replace(spec, **changes)


@pytest.mark.parametrize("row", EACH, ids=str)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, bool])
def test_integers_are_promoted(row, dtype, rng):
    x = rng.integers(0, 2 if dtype is bool else 100, row.shape).astype(dtype)
    params = row.params(rng)
    y = row.apply(params, x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, row.truth(params, x.astype(np.float64)).y, rtol=1e-5, atol=1e-5)


@pytest.mark.versions
@pytest.mark.parametrize("row", EACH, ids=str)
def test_x64(row, rng):
    with jax.enable_x64(True):
        params, x, g = row.params(rng, np.float64), draw(rng, row.shape, 1e6, np.float64), rng.normal(size=row.shape)
        y, vjp = jax.vjp(row.apply, params, x)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, row.truth(params, x).y, rtol=1e-8, atol=1e-8)
        _, dx = vjp(g)
        np.testing.assert_allclose(dx, row.gradients(params, x, g)[0], rtol=1e-7, atol=1e-8)
        assert dx.dtype == np.float64
        assert row.apply(params, x.astype(np.float32)).dtype == np.float32
        if row.batch:
            state = row.spec.init(row.features)[1]
            new = row.spec.apply(params, state, x, train=True)[1]
            assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_the_two_orders_of_rounding_of_rms_norm(rng):
    """Gemma rounds once, at the end; Llama rounds x / rms, multiplies, and rounds again. Also inside jit."""
    x, scale = draw(rng, (64, 128), dtype=ml_dtypes.bfloat16), draw(rng, 128, 1.0, ml_dtypes.bfloat16)
    normed = by_name["rms"].spec
    plain = np.asarray(jn.rms_norm(x.astype(np.float32), epsilon=normed.epsilon))
    llama = (plain.astype(ml_dtypes.bfloat16) * scale).astype(ml_dtypes.bfloat16)
    gemma = (plain * scale.astype(np.float32)).astype(ml_dtypes.bfloat16)
    for wrap in (lambda f: f, jax.jit):
        once = np.asarray(wrap(lambda x: jn.rms_norm(x, scale))(x))
        twice = np.asarray(wrap(lambda x: jn.rms_norm(x, scale, cast="before_scale"))(x))
        assert np.mean(once != gemma) < 1e-3
        assert np.mean(twice != llama) < 1e-3
    assert np.mean(llama != gemma) > 0.05


# --- floats of 8 bits -------------------------------------------------------------------------------------------------

NARROW = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e3m4]


@pytest.mark.parametrize("row", [*EACH, by_name["layer-gelu"], by_name["rms-before-scale"]], ids=str)
def test_8_bit_floats_are_computed_in_float32_and_rounded_once(row, rng):
    """x, parameters and output. JAX promotes them to nothing, and no kernel is for them."""
    dtype = NARROW[len(row.name) % 3]
    params, x, g = row.params(rng, dtype), draw(rng, row.shape, dtype=dtype), draw(rng, row.shape, dtype=dtype)
    y, vjp = jax.vjp(jax.jit(row.apply), params, x)
    dparams, dx = jax.jit(vjp)(g)
    units = 2.0 if "twice" in row.flags else 0.51
    y = np.asarray(y)
    assert {a.dtype for a in (y, dx, *(d for d in dparams if d is not None))} == {np.dtype(dtype)}
    np.testing.assert_array_less(np.abs(y.astype(np.float64) - row.truth(params, x).y), units * ulp(y) + 2e-5)
    true = row.gradients(params, x, g)[0]
    np.testing.assert_array_less(np.abs(np.asarray(dx, np.float64) - true), 0.51 * ulp(np.asarray(dx)) + 1e-2)
    if row.batch:
        assert row.spec.apply(params, row.state(), x, train=True)[1].mean.dtype == np.float32


def test_8_bit_floats_in_other_dtypes_out(rng):
    x = draw(rng, (4, 6, 8))
    narrow, half = x.astype(ml_dtypes.float8_e4m3fn), jnp.bfloat16
    wide = narrow.astype(np.float32)
    np.testing.assert_array_equal(jn.layer_norm(narrow, dtype=half), jn.layer_norm(wide, dtype=half))
    gated = lambda x: jn.gated_rms_norm(x, x, dtype=half)
    np.testing.assert_array_equal(gated(narrow), gated(wide))
    y, stream = jn.add_rms_norm(narrow, x.astype(half), dtype=half)
    want = jn.add_rms_norm(wide, x.astype(half), dtype=half)
    np.testing.assert_array_equal(stream, want[1])
    np.testing.assert_array_equal(y, want[0])
    large = np.array([[400.0, -448.0]], np.float32)  # a stream of 8 bits holds what its dtype holds, 448
    _, stream = jn.add_layer_norm(large, np.zeros_like(large).astype(ml_dtypes.float8_e4m3fn))
    np.testing.assert_array_equal(stream, large.astype(ml_dtypes.float8_e4m3fn))
    with pytest.raises(ValueError, match="there is no kernel from float8_e4m3fn to bfloat16"):
        jn.layer_norm(narrow, dtype=half, implementation="native")

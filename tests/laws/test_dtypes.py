"""Law 2: float32 or wider inside, one rounding at the end, x's dtype out; integers promoted; x64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from catalogue import EACH, MECHANISMS, ROWS, by_name, draw
from helpers.rounding import HALVES, ulp

import jaxnorm as jn

# What rounds is the same for all rows: both dtypes for each mechanism, and one of them, in turn, for each other row.
IN_HALF = [(row, dtype) for i, row in enumerate(ROWS) for j, dtype in enumerate(HALVES)
           if row.name in MECHANISMS or i % 2 == j]  # fmt: skip


@pytest.mark.versions
@pytest.mark.parametrize(("row", "dtype"), IN_HALF, ids=lambda value: getattr(value, "__name__", str(value)))
def test_half_precision_is_the_truth_rounded_once(row, dtype, rng):
    params = row.params(rng, dtype)
    g = draw(rng, row.shape, dtype=dtype)
    top = float(ml_dtypes.finfo(dtype).max)  # what scales x alone may leave the range
    bounded = lambda a: np.clip(np.asarray(a, np.float64), -top, top)

    @jax.jit
    def run(params, x, g):
        y, vjp = jax.vjp(row.apply, params, x)
        return y, *vjp(g)

    for magnitude, mean in ((1.0, 0.0), (1.0, 30.0), (1e-3, 0.0), (3e3, 2.0)):
        x = (draw(rng, row.shape, mean) * magnitude).astype(dtype)
        y, dparams, dx = run(params, x, g)
        y = np.asarray(y)
        assert y.dtype == dtype
        truth = row.truth(params, x).y
        # One rounding is half a unit in the last place; float32 arithmetic adds a little. Llama's order rounds twice.
        units = {1: 0.51, 2: 2.0}[row.roundings]
        scale = getattr(row.in_rank(params), "scale", None)
        slack = 1e-5 * (1 + (0 if scale is None else np.abs(scale).max()))
        error = np.abs(bounded(y) - bounded(truth))
        np.testing.assert_array_less(error, units * ulp(bounded(y).astype(dtype)) + slack)
    dx_true, *dparams_true = row.gradients(params, x, g)
    assert dx.dtype == dtype
    close = lambda a, b: np.testing.assert_allclose(
        bounded(a), bounded(b), rtol=1e-2, atol=float(ml_dtypes.finfo(dtype).eps) * max(np.abs(b).max(), 1e-3)
    )
    close(dx, dx_true)
    for got, true in zip(dparams, dparams_true, strict=True):
        if got is not None:
            assert got.dtype == dtype
            close(np.reshape(got, true.shape), true)


@pytest.mark.parametrize("row", EACH, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e15, 1e28])
def test_bfloat16_of_any_magnitude_is_rounded_once(row, magnitude, rng):
    params, x = row.params(rng), (draw(rng, row.shape) * magnitude).astype(ml_dtypes.bfloat16)
    y = np.asarray(row.apply(params, x))
    np.testing.assert_array_less(np.abs(y.astype(np.float64) - row.truth(params, x).y), 0.51 * ulp(y) + 2e-5)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_the_output_has_the_dtype_of_x_unless_dtype_is_given(row, rng):
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
def test_float64_is_computed_in_float64(row, rng):
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


def test_rms_norm_rounds_in_the_order_of_gemma_or_of_llama(rng):
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
    units = {1: 0.51, 2: 2.0}[row.roundings]
    y = np.asarray(y)
    assert {a.dtype for a in (y, dx, *(d for d in dparams if d is not None))} == {np.dtype(dtype)}
    np.testing.assert_array_less(np.abs(y.astype(np.float64) - row.truth(params, x).y), units * ulp(y) + 2e-5)
    true = row.gradients(params, x, g)[0]
    np.testing.assert_array_less(np.abs(np.asarray(dx, np.float64) - true), 0.51 * ulp(np.asarray(dx)) + 1e-2)
    if row.batch:
        assert row.spec.apply(params, row.state(), x, train=True)[1].mean.dtype == np.float32


def test_8_bit_floats_take_a_wider_output_dtype(rng):
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
    why = "there is no kernel from float8_e4m3fn to bfloat16|switched off|not built"
    with pytest.raises(ValueError, match=f"'native' cannot run here: ({why})"):
        jn.layer_norm(narrow, dtype=half, implementation="native")


def test_a_float64_x_keeps_its_precision_beside_float32_operands(rng):
    """Whichever operand is narrower, and in whatever function: the arithmetic is x's."""
    x, r = rng.normal(size=(2, 6, 8))
    narrow = {k: rng.normal(size=s).astype("f") for k, s in dict(scale=8, bias=8, gate=(6, 8), w=(6, 1)).items()}
    narrow["w"], narrow["var"] = np.abs(narrow["w"]), np.square(narrow["scale"])
    state = jn.RunningStats(np.zeros(8, "f"), np.ones(8, "f"))
    one = lambda f: lambda x, scale, bias, **_: f(x, scale, bias)
    functions = [
        one(lambda x, s, b: jn.layer_norm(x, s, b, activation="silu")),
        one(lambda x, s, b: jn.rms_norm(x, s, b, activation="gelu")),
        one(lambda x, s, b: jn.group_norm(x, s, b, num_groups=2)),
        one(lambda x, s, b: jn.instance_norm(x[None], s, b)),
        one(lambda x, s, b: jn.add_rms_norm(x, r, s, b)[0]),
        lambda x, scale, bias, var, **_: jn.normalize(x, bias, var, scale, bias, activation="tanh"),
        lambda x, scale, bias, var, **_: jn.normalize(x.astype("f"), bias, var.astype("d"), dtype="float64"),
        lambda x, scale, bias, var, **_: jn.as_affine(bias.astype("d"), var, scale, bias).bias,
        lambda x, scale, bias, var, **_: jn.as_affine(bias, var.astype("d"), scale, bias).bias,
        lambda x, scale, gate, **_: jn.gated_rms_norm(x, gate, scale),
        lambda x, scale, gate, **_: jn.gated_rms_norm(x, gate, scale, norm_before_gate=False),
        lambda x, scale, bias, w, **_: jn.batch_norm(x, jn.Affine(scale, bias), state, train=True, weights=w)[0],
        lambda x, w, **_: jn.moments(x, 0, weights=w).m2,
    ]
    with jax.enable_x64(True):
        for number, f in enumerate(functions):
            y = f(x, **narrow)
            assert y.dtype == np.float64
            want = f(x, **jax.tree.map(np.float64, narrow))
            np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-13, err_msg=str(number))


SPREAD = {  # operands that broadcast, over 4096 elements each
    "scale": lambda x, p, mask: jn.layer_norm(x, p, mask=mask),
    "bias": lambda x, p, mask: jn.layer_norm(x, bias=p, activation="tanh", mask=mask),
    "gate": lambda x, p, mask: jn.gated_rms_norm(x, p, mask=mask),
    "gate before": lambda x, p, mask: jn.gated_rms_norm(x, p, norm_before_gate=False, mask=mask),
    "mean": lambda x, p, mask: jn.normalize(x, p, jnp.ones_like(p)),
    "var": lambda x, p, mask: jn.normalize(x, jnp.zeros_like(p), p),
    "weights": lambda x, p, mask: jn.batch_norm(
        x, None, jn.BatchNorm().init(4096)[1], train=True, axis=0, weights=p, mask=mask)[0],
}


@pytest.mark.parametrize("mask", [None, "rows"])
@pytest.mark.parametrize("name", SPREAD)
def test_gradients_of_broadcast_operands_are_summed_in_float32_and_rounded_once(name, mask, rng):
    x, p = (draw(rng, s, dtype=ml_dtypes.bfloat16) for s in ((4096, 8), (1, 8)))
    g, p = np.abs(draw(rng, (4096, 8))).astype(ml_dtypes.bfloat16), np.abs(p)  # a variance and a weight are positive
    mask = None if mask is None else rng.random((4096, 1)) < 0.9
    f = SPREAD[name]
    got = jax.grad(lambda p: jnp.vdot(f(x, p, mask).astype("float32"), g.astype("float32")))(p)
    with jax.enable_x64(True):
        wide = jax.grad(lambda p: jnp.vdot(f(x.astype("d"), p, mask), g.astype("d")))(p.astype("d"))
    assert got.dtype == p.dtype
    got, wide = np.asarray(got, "d"), np.asarray(wide)
    size = np.abs(wide).max()
    np.testing.assert_array_less(np.abs(got - wide), 2.0**-8 * np.abs(wide) + 1e-4 * size)


@pytest.mark.parametrize("gated", [False, True], ids=["activation", "gate"])
def test_the_activation_is_differentiated_at_the_rounded_value(gated, kernels, rng):
    """sigmoid(round(round(xhat) scale)): the derivative is at the z that is rounded twice, in every program."""
    x, s, g = draw(rng, (32, 64)), draw(rng, 64, 3.0, ml_dtypes.bfloat16), draw(rng, (32, 64))
    g = g.astype(ml_dtypes.bfloat16)
    gate = draw(rng, (32, 64))
    how = dict(epsilon=1e-6, cast="before_scale", dtype=jnp.bfloat16)
    xhat = oracle.normalize(x, np.indices(x.shape)[0], None, None, epsilon=1e-6, centered=False).y
    z = (xhat.astype(ml_dtypes.bfloat16).astype("f") * s.astype("f")).astype(ml_dtypes.bfloat16).astype("d")
    f, slope = oracle.ACTIVATIONS["sigmoid"]
    scale, g64 = s.astype("d")[None], g.astype("d")
    gz = g64 * f(gate.astype("d")) if gated else g64 * slope(z)
    want = oracle.gradients(x, np.indices(x.shape)[0], scale, None, gz, epsilon=1e-6, centered=False)[0]

    def norm(implementation):
        if gated:
            return lambda x: jn.gated_rms_norm(x, gate, s, activation="sigmoid", implementation=implementation, **how)
        return lambda x: jn.rms_norm(x, s, activation="sigmoid", implementation=implementation, **how)

    for implementation in (None, "xla"):
        pull = lambda x, g, implementation=implementation: jax.vjp(norm(implementation), x)[1](g)[0]
        for run in (pull, jax.jit(pull)):
            dx = run(x, g)
            # Few elements round the other way, since float32 and float64 differ; none of the rest may.
            off = np.abs(dx - want) > 2e-5 * np.abs(want).max()
            assert off.mean() < 0.02

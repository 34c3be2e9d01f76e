"""Quantized outputs: to the bit those of ml_dtypes and of JAX's own quantizer, with the gradient of the plain norm."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from catalogue import draw
from flax import nnx
from helpers.devices import mesh_of
from helpers.jit import jit_unoptimized
from helpers.native import kernels_in
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx
from jaxnorm._core.over import Axes
from jaxnorm._core.types import Reduction
from jaxnorm._ops import quantize

try:
    from jax._src.cudnn import scaled_matmul_stablehlo as jax_s
except ImportError:
    jax_s = None

C = 256
FORMATS = {
    "fp8-static": jn.Fp8(scale=0.1),
    "fp8-current": jn.Fp8(margin=1),
    "fp8-row": jn.Fp8(per="row"),
    "fp8-row-e5m2": jn.Fp8(per="row", dtype="float8_e5m2", upper=2.0),
    "fp8-block": jn.Fp8(per="block", block=64, transposed_scale=True),
    "int8-row": jn.Int8(),
    "int8-static": jn.Int8(per="tensor", scale=0.1),
    "mxfp8": jn.MxFp8(),
    "mxfp8-ocp": jn.MxFp8(rounding="ocp"),
    "mxfp8-e5m2": jn.MxFp8(dtype="float8_e5m2"),
    "nvfp4": jn.NvFp4(),
}
of_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
bits = lambda a: np.asarray(a).view(np.uint8) if a.dtype.itemsize == 1 else np.asarray(a)


def applied(fmt, y, keep=None):
    """The format of an array y, as XLA computes it."""
    reduction = Reduction(Axes((y.ndim - 1,)))
    given = None if getattr(fmt, "scale", None) is None else jnp.float32(fmt.scale)
    return jax.jit(lambda y: quantize.quantize_array(fmt, y, reduction, given, keep, jnp.bfloat16))(y)


def expected(fmt, y, scale_of_all=None):
    """Data and scale by NumPy and ml_dtypes. Scales are those of float64, rounded to what they are held in."""
    y = np.asarray(y, np.float32)
    size, top = np.abs(y), fmt.largest
    last = lambda n: size.reshape(*size.shape[:-1], -1, n).max(-1)
    each = lambda scale, n: np.repeat(scale.astype(np.float32), n, -1)
    factor = np.float32(1.0)
    if isinstance(fmt, jn.MxFp8):
        log = np.log2(last(32).astype(np.float64) / (2.0 ** np.floor(np.log2(top)) if fmt.rounding == "ocp" else top))
        exponent = np.floor(log) if fmt.rounding == "ocp" else np.ceil(log)
        scale = (2.0**exponent).astype(ml_dtypes.float8_e8m0fnu)
        divisor = each(scale, 32)
    elif isinstance(fmt, jn.NvFp4):
        factor = np.float32(size.max() * np.float32(1.0 / (448 * 6)))
        scale = ((last(16) / factor) / np.float32(6)).astype(ml_dtypes.float8_e4m3fn)
        divisor = each(scale, 16)
        divisor = np.where(divisor == 0, np.float32(np.inf), divisor)
    elif fmt.per == "tensor":
        scale = np.float32(size.max() * 2.0**fmt.margin / top if fmt.scale is None else fmt.scale)
        divisor = scale
    else:
        n = y.shape[-1] if fmt.per == "row" else fmt.block
        amax = last(n).astype(np.float64) if fmt.upper is None else np.minimum(last(n), fmt.upper).astype(np.float64)
        scale = np.maximum(amax / top, fmt.floor).astype(np.float32)
        divisor = each(scale, n)
    if fmt.kind == np.int8:
        return np.clip(np.rint(y / factor * (np.float32(1) / divisor)), -128, 127).astype(np.int8), scale
    return np.clip(y / factor / divisor, -top, top).astype(fmt.kind), scale


def check(q, y, fmt):
    """q is the format of y: scales to a unit of float32, data to the bit where scales are the same."""
    data, scale = expected(fmt, y)
    found = np.asarray(q.scale)
    found = np.swapaxes(found, -1, -2) if q.transposed_scale else found
    assert found.dtype == scale.dtype
    np.testing.assert_allclose(found.astype("f8"), scale.astype("f8"), rtol=2.0**-23)
    wrong = bits(q.data) != bits(data)
    assert wrong.mean() <= 1e-3  # where a scale is a unit of float32 away, a value may be nearer to another number
    if not isinstance(fmt, (jn.Fp8, jn.Int8)) or fmt.scale is not None:
        assert not wrong.any()


@of_formats
def test_a_format_is_that_of_numpy_and_ml_dtypes(fmt, rng):
    y = draw(rng, (32, C)) * np.exp2(rng.integers(-30, 30, (32, 1))).astype("f")
    check(applied(fmt, y), y, fmt)


@of_formats
def test_norms_write_the_format_of_their_output(fmt, rng, kernels):
    """What a kernel writes is to the bit the format of what it gives in float32."""
    x, scale, bias = draw(rng, (3, 5, C), 2.0), draw(rng, C, 1.0), draw(rng, C)
    for norm in (jn.rms_norm, jn.layer_norm):
        run = functools.partial(norm, implementation=None if kernels else "xla")
        y, q = run(x, scale, bias), run(x, scale, bias, quantize=fmt)
        check(q, y, fmt)
        if q.amax is not None:
            np.testing.assert_allclose(q.amax, np.abs(y).max(), rtol=1e-6)
        error = np.abs(q.dequantize() - y).max() / np.abs(y).max()
        clipped = getattr(fmt, "upper", None) or getattr(fmt, "rounding", "") == "ocp"
        assert error < (1.0 if clipped else {"int8": 0.02, "float4_e2m1fn": 0.2}.get(fmt.kind.name, 0.13))


@pytest.mark.skipif(jax_s is None, reason="this JAX has its quantizer elsewhere")
@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_block_formats_are_jax_s_own_to_the_bit(kind, rng):
    y = draw(rng, (2, 16, C)) * np.exp2(rng.integers(-20, 20, (2, 16, C // 32)).repeat(32, -1)).astype("f")
    fmt, block, scale_type, factor = jn.MxFp8(), 32, jnp.float8_e8m0fnu, None
    if kind == "nvfp4":
        fmt, block, scale_type, factor = jn.NvFp4(scale=0.03), 16, jnp.float8_e4m3fn, jnp.float32(0.03)
        y = draw(rng, (2, 16, C))
    config = jax_s.BlockScaleConfig(kind, block, fmt.kind, scale_type, factor, True)
    with jax.numpy_dtype_promotion("standard"):
        data, scale = jax.jit(functools.partial(jax_s.quantize, config=config))(jnp.asarray(y))
    q = applied(fmt, y)
    same(bits(q.data), bits(data))
    same(bits(q.scale), bits(scale))


@of_formats
def test_zeros_infinities_and_nan(fmt):
    """Zeros give zeros and a finite scale, infinities the largest number, NaN a NaN of its row."""
    y = np.ones((4, C), "f")
    y[0] = 0.0
    y[1, 3], y[1, 40] = np.inf, -np.inf
    y[2, 5] = np.nan
    if fmt.of_tensor or isinstance(fmt, jn.NvFp4):
        fmt = dataclasses.replace(fmt, scale=0.5, **({} if isinstance(fmt, jn.NvFp4) else {"margin": 0}))
    q = applied(fmt, y)
    z = np.asarray(q.dequantize())
    same(z[0], np.zeros(C, "f"))
    scale = np.asarray(q.scale, "f")
    scale = np.swapaxes(scale, -1, -2) if q.transposed_scale else scale
    assert np.isfinite(np.broadcast_to(scale, (4, *scale.shape[1:])))[[0, 1, 3]].all()
    data = np.asarray(q.data, "f")
    assert data[1, 3] == fmt.largest
    assert data[1, 40] == (-128 if fmt.kind == np.int8 else -fmt.largest)
    assert np.isfinite(z[[0, 3]]).all()
    if not (fmt.kind == np.int8 and fmt.of_tensor) and fmt.kind.name != "float4_e2m1fn":
        assert np.isnan(z[2, 5])  # an integer, and a float of 4 bits, is NaN by its scale alone
    if isinstance(fmt, jn.NvFp4):
        assert np.isnan(z[2, :16]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_meet_the_edges_as_xla_does(dtype, kernels):
    """Rows of zeros, of one large element, of a NaN, and sizes that vectors do not divide."""
    if not kernels:
        pytest.skip("they are not built, or not asked for")
    formats = (jn.Fp8(per="row"), jn.Int8(), jn.MxFp8(), jn.MxFp8(dtype="float8_e5m2"), jn.Fp8(scale=1e-3))

    @jax.jit
    def all_of_them(x, scale):
        norm = functools.partial(jn.rms_norm, x, scale)
        return [[norm(quantize=fmt, implementation=i) for i in ("native", "xla")] for fmt in formats]

    for width in (32, 96, 1056):
        x = np.linspace(-3, 3, 6 * width, dtype="f").reshape(6, width)
        x[0], x[1], x[1, 7], x[2, 1] = 0.0, 0.0, 1e4, np.nan
        x, scale = jnp.asarray(x, dtype), np.linspace(1e-9, 4, width, dtype="f")
        for fmt, (a, b) in zip(formats, all_of_them(x, scale), strict=True):
            kept = np.arange(6) != 2
            scales = [np.broadcast_to(np.asarray(q.scale, "f"), (6, *q.scale.shape[1:]))[kept] for q in (a, b)]
            np.testing.assert_allclose(*scales, rtol=1e-6)
            if fmt.kind == np.int8:
                assert all(np.isnan(np.asarray(q.scale)[2]).all() for q in (a, b))
            a, b = (np.asarray(q.data, "f") for q in (a, b))
            assert (a[kept] != b[kept]).mean() <= 2e-3
            assert [np.isnan(a[2]).all(), np.isnan(b[2]).all()] == [fmt.kind != np.int8] * 2


@of_formats
def test_kernels_and_xla_differ_by_one_number_of_the_format_and_seldom(fmt, rng, kernels):
    """y may be an ulp away, and so on the other side of a boundary: at most 2 in 1000, each by one number."""
    if not kernels:
        pytest.skip("they are not built, or not asked for")
    x, scale = draw(rng, (64, C), 1.0), draw(rng, C, 1.0)
    a, b = (jn.layer_norm(x, scale, quantize=fmt, implementation=i) for i in ("native", "xla"))
    order = lambda q: np.where((n := bits(q.data).astype("i4")) >= 128, 128 - n, n)  # of float8, by sign and magnitude
    if fmt.kind.name == "float4_e2m1fn":
        differ = np.asarray(a.data, "f") != np.asarray(b.data, "f")
    else:
        number = (lambda q: np.asarray(q.data, "i4")) if fmt.kind == np.int8 else order
        steps = np.abs(number(a) - number(b))
        assert steps.max() <= 1
        differ = steps > 0
    assert differ.mean() <= 2e-3


@of_formats
def test_the_gradient_is_that_of_the_plain_norm(fmt, rng):
    """Straight through, of first and second order, in the output's own dtype, and none unless it is asked for."""
    x, r, scale, g = (draw(rng, shape, 1.0) for shape in ((4, C), (4, C), (C,), (4, C)))
    fmt = dataclasses.replace(fmt, straight_through=True)
    plain = jn.NvFp4 is type(fmt)  # no kernel writes it

    def loss(fmt, x, r, scale):
        options = dict(implementation="xla") if plain else {}
        y, stream = jn.add_rms_norm(x, r, scale, quantize=fmt, **options)
        y = y if fmt is None else y.dequantize()
        return ((y + 0.5 * stream) * g).sum()

    grads = [jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(x, r, scale) for f in (fmt, None)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *grads)
    first = lambda f, x: jax.grad(functools.partial(loss, f))(x, r, scale)
    second = lambda f: jit_unoptimized(jax.grad(lambda x: (first(f, x) * g).sum()))
    np.testing.assert_allclose(second(fmt)(x), second(None)(x), rtol=1e-4, atol=1e-4)
    dy = jax.jvp(lambda x: jn.rms_norm(x, quantize=fmt).dequantize(), (x,), (g,))[1]
    np.testing.assert_allclose(dy, jax.jvp(jn.rms_norm, (x,), (g,))[1], rtol=1e-5, atol=1e-5)


def test_without_straight_through_a_gradient_is_refused(rng):
    x = draw(rng, (4, C))
    for implementation in (None, "xla"):
        f = lambda x: jn.layer_norm(x, quantize=jn.MxFp8(), implementation=implementation).dequantize().sum()  # noqa: B023
        with pytest.raises(TypeError, match=r"layer_norm: a quantized output has no gradient.*straight_through=True"):
            jax.grad(f)(x)
    y, stream = jn.add_rms_norm(x, x, quantize=jn.Int8())
    assert jax.grad(lambda x: jn.add_rms_norm(x, jax.lax.stop_gradient(x))[1].sum())(x).shape == x.shape
    assert y.gradient is None
    same(stream, x + x)


def test_what_a_matrix_product_returns_for_the_gradient_is_that_of_y(rng):
    """A product with a derivative of its own, as of float8, gives the cotangent of y in `gradient`."""
    x, w = draw(rng, (4, 64)), draw(rng, (64, 8))

    @jax.custom_vjp
    def product(q, w):
        return q.dequantize() @ w

    def backward(kept, g):
        q, w = kept
        still = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0) if a.dtype == np.int8 else a * 0, q)
        return dataclasses.replace(still, gradient=g @ w.T), None

    product.defvjp(lambda q, w: (product(q, w), (q, w)), backward)
    fmt = jn.Int8(straight_through=True)
    got = jax.grad(lambda x: product(jn.rms_norm(x, quantize=fmt), w).sum())(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: (jn.rms_norm(x) @ w).sum())(x), rtol=1e-5, atol=1e-5)


def test_rounding_first_quantizes_what_the_plain_norm_returns(rng):
    x, scale = jnp.asarray(draw(rng, (8, C)), jnp.bfloat16), jnp.asarray(draw(rng, C, 1.0), jnp.bfloat16)
    for cast in ("after_scale", "before_scale"):
        for fmt in (jn.Fp8(per="row", round_first=True), jn.MxFp8(round_first=True), jn.NvFp4(round_first=True)):
            q = jn.rms_norm(x, scale, cast=cast, quantize=fmt)
            check(q, np.asarray(jn.rms_norm(x, scale, cast=cast), "f"), fmt)
    first, last = (jn.rms_norm(x, scale, quantize=jn.Int8(round_first=r)) for r in (True, False))
    assert (np.asarray(first.data) != np.asarray(last.data)).any()
    y = jn.rms_norm(x.astype("f"), cast="before_scale", dtype=jnp.bfloat16, quantize=jn.Int8(), scale=scale.astype("f"))
    whole = np.asarray(jn.rms_norm(x.astype("f"), dtype=jnp.bfloat16), "f") * np.asarray(scale, "f")
    check(y, whole, jn.Int8())


def test_masked_elements_do_not_count_in_the_largest_value(rng):
    x, mask = draw(rng, (4, C)), np.ones((4, C), bool)
    mask[:, 100:] = False
    x[:, 100:] *= 1e3
    for fmt in (jn.Fp8(per="row"), jn.Fp8(), jn.MxFp8()):
        y = np.where(mask, jn.rms_norm(x, mask=mask, implementation="xla"), 0.0)
        q = jn.rms_norm(x, mask=mask, quantize=fmt)
        _, scale = expected(fmt, y) if fmt.per != "block" else (None, np.asarray(applied(fmt, y).scale))
        scale = np.asarray(scale, "f")
        np.testing.assert_allclose(np.asarray(q.scale, "f"), scale, rtol=1e-6)
        assert np.isfinite(np.asarray(q.data, "f")).all()
    rows = np.array([True, False, True, True])
    x[1] = np.nan
    q = jn.rms_norm(x, mask=rows, quantize=jn.Fp8())
    np.testing.assert_allclose(q.amax, np.abs(jn.rms_norm(x[rows])).max(), rtol=1e-6)


@of_formats
def test_the_bits_of_a_row_do_not_depend_on_its_batch(fmt, rng, kernels):
    if not kernels:
        pytest.skip("XLA gives no such promise")
    if fmt.of_tensor or isinstance(fmt, jn.NvFp4):
        fmt = dataclasses.replace(fmt, scale=0.01, **({} if isinstance(fmt, jn.NvFp4) else {"margin": 0}))
    x, scale = jnp.asarray(draw(rng, (9, C)), jnp.bfloat16), draw(rng, C, 1.0)
    run = functools.partial(jn.rms_norm, scale=scale, quantize=fmt)
    whole, of_rows = run(x), [run(x[i : i + 1]) for i in range(9)]
    if not isinstance(fmt, jn.NvFp4):
        same(bits(whole.data), np.concatenate([bits(q.data) for q in of_rows]))
    eager, jitted = run(x), jax.jit(run)(x)
    same(bits(eager.data), bits(jitted.data))
    same(bits(eager.scale), bits(jitted.scale))
    mapped = jax.vmap(run)(x[:, None])
    same(bits(mapped.data)[:, 0], bits(whole.data)) if not isinstance(fmt, jn.NvFp4) else None


def test_kernels_write_the_formats(kernels):
    """Nothing of y's size is between x and data; two runs where the scale is that of all."""
    if not kernels:
        pytest.skip("they are not built, or not asked for")
    x = jax.ShapeDtypeStruct((16, C), jnp.bfloat16)
    for name, fmt in FORMATS.items():
        of = lambda x: jn.add_layer_norm(x, x, quantize=fmt)  # noqa: B023
        want = [] if name == "nvfp4" else ["quantize"] * (2 if name == "fp8-current" else 1)
        assert kernels_in(of, x) == want, name
    training = lambda x: jax.vjp(lambda x: jn.rms_norm(x, quantize=jn.MxFp8(straight_through=True)), x)
    assert kernels_in(lambda x: training(x)[0], x) == ["quantize"]
    assert jax.eval_shape(lambda x: jn.rms_norm(x, axis=0, quantize=jn.Int8()), x).scale.shape == (1, C)
    kernel = jax.jit(lambda x: jn.rms_norm(x, quantize=jn.Int8(), implementation="native")).lower(x)
    assert "jaxnorm_quantize" in kernel.as_text()


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["batch", "features"])
def test_shards_are_quantized_as_one_device_does(kind, spec, rng):
    """jit over a sharded batch, where kernels run on each part, and over sharded features, where the maxima merge."""
    x, scale = draw(rng, (16, C), 1.0), draw(rng, C, 1.0)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        for fmt in (jn.Fp8(per="row"), jn.Fp8(), jn.Fp8(scale=0.02), jn.MxFp8(), jn.Fp8(per="block")):
            run = jax.jit(functools.partial(jn.rms_norm, quantize=fmt))
            one, q = jn.rms_norm(x, scale, quantize=fmt), run(placed, scale)
            np.testing.assert_allclose(np.asarray(q.scale, "f"), np.asarray(one.scale, "f"), rtol=1e-6)
            assert (bits(q.data) != bits(one.data)).mean() <= 2e-3
            if spec == P("data") and not fmt.of_tensor:
                text = run.lower(placed, scale).compile().as_text()
                assert "all-gather" not in text
            if fmt.of_tensor:
                np.testing.assert_allclose(q.amax, one.amax, rtol=1e-6)


def test_an_axis_name_merges_the_largest_values(rng):
    """Of a row over the norm's own axis, and of a tensor over that of the format."""
    x = draw(rng, (16, C), 1.0)
    mesh, features, batch = mesh_of("auto"), P(None, "data"), P("data")

    def over(spec, out, f):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out))(x)

    row = jn.Fp8(per="row")
    one = jn.rms_norm(x, quantize=row)
    q = over(features, jn.Quantized(features, P()), lambda x: jn.rms_norm(x, axis_name="data", quantize=row))
    np.testing.assert_allclose(q.scale, one.scale, rtol=1e-6)
    assert (bits(q.data) != bits(one.data)).mean() <= 2e-3
    for axis_name, spec, fmt in ((None, batch, jn.Fp8(axis_name="data")), ("data", features, jn.Fp8())):
        f = lambda x: jn.rms_norm(x, axis_name=axis_name, quantize=fmt)  # noqa: B023
        q, one = over(spec, jn.Quantized(spec, P(), P()), f), jn.rms_norm(x, quantize=jn.Fp8())
        np.testing.assert_allclose(q.amax, one.amax, rtol=1e-6)
        np.testing.assert_allclose(q.scale, one.scale, rtol=1e-6)


def test_delayed_scaling(rng):
    """The scale is an operand: no retrace, and the largest value comes out for the history."""
    x, fmt, traced = draw(rng, (4, C)), jn.Fp8(margin=1), []

    @jax.jit
    def step(x, scale):
        traced.append(1)
        q = jn.rms_norm(x, quantize=fmt, quantize_scale=scale)
        return q, fmt.scale_for(q.amax, scale)

    q, scale = step(x, jnp.float32(1.0))
    assert float(q.scale) == 1.0
    np.testing.assert_allclose(scale, np.abs(jn.rms_norm(x)).max() / 448 * 2, rtol=1e-6)
    q, again = step(x, scale)
    assert float(again) == float(scale) == float(q.scale)
    assert len(traced) == 1
    _, kept = step(np.full_like(x, np.nan), scale)
    assert float(kept) == float(scale)
    each = jax.vmap(lambda x, s: jn.rms_norm(x, quantize=fmt, quantize_scale=s))(x[:, None], jnp.arange(1.0, 5.0))
    same(each.scale, np.arange(1.0, 5.0, dtype="f"))
    for i in range(4):
        one = jn.rms_norm(x[i : i + 1], quantize=fmt, quantize_scale=float(i + 1))
        same(bits(each.data[i]), bits(one.data))


CALLS = {
    "layer": (jn.LayerNorm, 1), "rms": (jn.RMSNorm, 1), "add_layer": (jn.AddLayerNorm, 2),
    "add_rms": (jn.AddRMSNorm, 2), "layer_norm_add": (functools.partial(jn.LayerNormAdd, use_next=True), 2),
    "rms_norm_add": (functools.partial(jn.RMSNormAdd, use_next=True), 2),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_specs_and_layers_quantize(call, rng):
    """Six norms, their linen and nnx layers, and a spec from a plain dict: the same output."""
    kind, operands = CALLS[call]
    spec = kind(quantize=jn.MxFp8(rounding="ocp"))
    assert jn.make(**jn.as_dict(spec)) == spec
    assert jn.as_dict(spec)["quantize"] == {"policy": "MxFp8", "rounding": "ocp"}
    args = [draw(rng, (3, 64)) for _ in range(operands)]
    params, state = spec.init(64)
    y, _ = spec.apply(params, state, *args)
    q = y[0] if operands == 2 else y
    assert isinstance(q, jn.Quantized)
    more = {"use_next": True} if "norm_add" in call else {}
    layer = getattr(jnn, type(spec).__name__)(**more, quantize=spec.quantize)
    out, _ = layer.init_with_output(jax.random.key(0), *args)
    with_scale = jnnx.Norm(spec, 64, rngs=nnx.Rngs(0))
    for got in (out, with_scale(*args)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, "f"), np.asarray(b, "f"), rtol=1e-5), got, y)


def test_formats_are_values_and_pass_through_export(rng):
    for fmt in FORMATS.values():
        assert dataclasses.replace(fmt) == fmt
        assert hash(dataclasses.replace(fmt)) == hash(fmt)
    assert jn.Fp8(dtype="float8_e5m2") == jn.Fp8(dtype=jnp.float8_e5m2)
    x = draw(rng, (4, C))
    for fmt in (jn.MxFp8(), jn.Fp8(per="block", transposed_scale=True), jn.Int8()):
        f = jax.jit(functools.partial(jn.rms_norm, quantize=fmt))
        program = jax.export.deserialize(jax.export.export(f, platforms=["cpu", "cuda", "tpu"])(x).serialize())
        got, want = program.call(x), f(x)
        assert got.transposed_scale == want.transposed_scale
        assert got.dequantize().shape == x.shape
        np.testing.assert_allclose(np.asarray(got.scale, "f"), np.asarray(want.scale, "f"), rtol=1e-6)


WRONG = [
    (dict(quantize="fp8"), TypeError, "rms_norm: quantize must be a format such as jaxnorm.Fp8"),
    (dict(quantize=jn.MxFp8(), x=np.ones((2, 40), "f")), ValueError, "blocks of 32 along the last axis"),
    (dict(quantize=jn.MxFp8(), axis=0), ValueError, "blocks of 32 along the last axis"),
    (dict(quantize=jn.Int8(), x=np.ones((2, 64), "c8")), TypeError, "for real x, got complex64"),
    (dict(quantize=jn.Int8(), quantize_scale=1.0), ValueError, "quantize_scale is the scale of a tensor"),
    (dict(quantize_scale=1.0), ValueError, "quantize_scale is the scale of a tensor"),
    (dict(quantize=jn.Fp8(), quantize_scale=np.ones(2, "f")), ValueError, "quantize_scale must be one number"),
]
FORMAT_ERRORS = [
    (lambda: jn.Fp8(per="channel"), 'Fp8: per must be "tensor", "row" or "block"'),
    (lambda: jn.Fp8(dtype="float16"), "Fp8: dtype must be one of"),
    (lambda: jn.Fp8(per="row", scale=1.0), 'Fp8: scale=1.0 is for per="tensor"'),
    (lambda: jn.Fp8(scale=-1.0), "Fp8: scale must be a number > 0"),
    (lambda: jn.Fp8(block=0), "block one >= 1"),
    (lambda: jn.MxFp8(rounding="down"), 'MxFp8: rounding must be "up" or "ocp"'),
    (lambda: jn.rms_norm_add(np.ones((2, 4), "f"), np.ones((2, 4), "f"), quantize=jn.Int8()), "of the next norm"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_what_cannot_be_quantized_says_so(options, kind, message):
    x = options.get("x", np.ones((2, 64), "f"))
    with pytest.raises(kind, match=message):
        jn.rms_norm(x, **{k: v for k, v in options.items() if k != "x"})


@pytest.mark.parametrize(("make", "message"), FORMAT_ERRORS, ids=[m for _, m in FORMAT_ERRORS])
def test_formats_refuse_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="group_norm"):
        jn.group_norm(np.ones((2, 4), "f"), num_groups=2, quantize=jn.Int8())


def test_the_example_feeds_scaled_matmul():
    """It runs here by dequantized arrays; the program for CUDA hands data and scales to the scaled product."""
    mxfp8 = pytest.importorskip("examples.mxfp8")
    assert 0.01 < mxfp8.main() < 0.06
    if not hasattr(jax.nn, "scaled_matmul"):
        return
    x, w = (jax.ShapeDtypeStruct((128, 256), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    weights = jax.eval_shape(mxfp8.quantized_weights, w)
    traced = mxfp8.layer.trace(x, jax.ShapeDtypeStruct((256,), jnp.float32), weights)
    lowered = traced.lower(lowering_platforms=("cuda",))
    assert "block_scaled_dot" in lowered.as_text()

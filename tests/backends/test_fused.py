"""What is more than a norm in one view: activations, gates, and the residual stream. All laws, on these functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from catalogue import EACH, draw
from flax import nnx
from helpers.devices import collectives, mesh_of, moved, placed
from helpers.jit import jit_unoptimized
from helpers.memory import kept_bytes
from helpers.native import kernels_in
from helpers.rounding import HALVES, ulp
from helpers.transforms import ESSENTIAL, compare, modes
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx
from jaxnorm._ops.activation import NAMED

BACKENDS = [None, "xla"]  # None is the native one here, wherever it takes a call; see conftest


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 4e-6 * max(1, np.abs(b).max()), **tolerance})


@functools.partial(jit_unoptimized, static_argnums=0)
def _passes(f, g, args, call):
    y, vjp = jax.vjp(lambda *args: f(*args, **call), *args)
    return y, *vjp(g)


def passes(f, g, *args, **call):
    """f(*args) and the gradients for the cotangent g, in one program."""
    return jax.tree.map(np.asarray, _passes(f, g, args, call))


def test_gelu_tanh_is_precise_where_it_is_small():
    """A group of two gates far out is normalized: what cancels in 1 + tanh would be 1 % of its output."""
    z = np.linspace(-5.0, -1.0, 64, dtype=np.float32)
    wide = z.astype(np.float64)
    true = wide / (1.0 + np.exp(-np.sqrt(8.0 / np.pi) * (wide + 0.044715 * wide**3)))
    np.testing.assert_allclose(NAMED["gelu_tanh"](z), true, rtol=1e-5)


# --- activations: beside the rows of the catalogue --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_each_activation_and_its_derivative_match_the_formulas(name, rng):
    x, scale, g = draw(rng, (64, 32)), draw(rng, 32, 2.0), draw(rng, (64, 32))
    f, slope = oracle.ACTIVATIONS[name]
    labels = np.indices(x.shape)[0]
    z = oracle.normalize(x, labels, scale[None], None, epsilon=1e-6).y
    assert np.abs(z).max() > 6  # far out, too
    for backend in BACKENDS:
        norm = functools.partial(jn.layer_norm, activation=name, implementation=backend)
        y, *gradients = passes(norm, g, x, scale)
        close(y, f(z), rtol=2e-6, atol=2e-6)
        dx, dscale, _ = oracle.gradients(x, labels, scale[None], None, g * slope(z), epsilon=1e-6)
        for got, true in zip(gradients, (dx, dscale[0]), strict=True):
            close(got, true)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_an_activation_may_be_a_function_and_equal_ones_share_a_trace(row, rng):
    params, x = row.params(rng), draw(rng, row.shape)
    calls = []

    def counted(z):
        calls.append(z)
        return jax.nn.silu(z)

    named, own = (dataclasses.replace(row, spec=dataclasses.replace(row.spec, activation=f)) for f in ("silu", counted))
    np.testing.assert_array_equal(named.apply(params, x), own.apply(params, x))
    traced = len(calls)
    own.apply(params, x + 1)
    assert len(calls) == traced
    if row.batch:
        state = row.state()
        evaluated = lambda row: row.spec.apply(params, state, x, train=False)[0]
        np.testing.assert_array_equal(evaluated(named), evaluated(own))
        np.testing.assert_allclose(evaluated(named), jax.nn.silu(evaluated(row)), rtol=1e-5, atol=1e-6)


def test_activation_rounds_once_or_three_times_in_llama_order(rng):
    x, scale = draw(rng, (64, 128), dtype=ml_dtypes.bfloat16), draw(rng, 128, 1.0, ml_dtypes.bfloat16)
    wide = np.asarray(jax.nn.silu(jn.rms_norm(x, scale, dtype=jnp.float32, implementation="xla")))
    for backend in BACKENDS:
        y = np.asarray(jn.rms_norm(x, scale, activation="silu", implementation=backend))
        assert np.mean(y != wide.astype(ml_dtypes.bfloat16)) < 1e-3
    composed = jax.nn.silu(np.float32(jn.rms_norm(x, scale))).astype(jnp.bfloat16)
    assert np.mean(y != composed) > 0.05
    llama = lambda **how: jn.rms_norm(x, scale, cast="before_scale", implementation="xla", **how)
    composed = jax.nn.silu(np.float32(llama())).astype(jnp.bfloat16)
    np.testing.assert_array_equal(llama(activation="silu"), composed)


def test_padding_where_an_activation_overflows_reaches_no_gradient(rng):
    """exp and its derivative are infinite of what a norm makes of 3e38, and what is infinite times 0 is not 0."""
    x, scale, mask = draw(rng, (6, 40)), draw(rng, 40), rng.random((6, 40)) < 0.7
    g = np.where(mask, draw(rng, (6, 40)), 0.0).astype(np.float32)
    apply = lambda x, s: jn.layer_norm(x, s, activation=jnp.exp, mask=mask)
    clean, clean_vjp = jax.vjp(apply, np.where(mask, x, np.float32(0)), scale)
    for poison in (np.nan, np.inf, 3e38, -3e38):
        y, vjp = jax.vjp(apply, np.where(mask, x, np.float32(poison)), scale)
        np.testing.assert_array_equal(y[mask], clean[mask])
        assert np.all(np.isfinite(y))
        for got, want in zip(vjp(g), clean_vjp(g), strict=True):
            close(got, want)


# --- gates ------------------------------------------------------------------------------------------------------------

SHAPE = (4, 6, 40)
GATED = {
    "norm, gate": {},
    "gate, norm": dict(norm_before_gate=False),
    "norm, gate, in groups": dict(group_size=8),
    "gate, norm, in groups": dict(group_size=8, norm_before_gate=False),
    "another axis": dict(axis=1, group_size=3, norm_before_gate=False),
    "sigmoid": dict(activation="sigmoid", scale_offset=1.0),
}


class Gated:
    """`gated_rms_norm` with some options, its truth, and the same in plain jnp."""

    def __init__(self, rng, options, dtype=np.float32, gate_shape=SHAPE, shape=SHAPE):
        self.options, self.axis = dict(options), options.get("axis", -1)
        self.x, self.gate, self.g = (draw(rng, s, dtype=dtype) for s in (shape, gate_shape, shape))
        self.scale = draw(rng, shape[self.axis], dtype=dtype)
        self.f, self.slope = oracle.ACTIVATIONS[options.get("activation", "silu")]
        size = options.get("group_size") or shape[self.axis]
        names = list(np.indices(shape))
        names[self.axis] = names[self.axis] // size
        self.labels = np.unique(np.stack([n.ravel() for n in names], -1), axis=0, return_inverse=True)[1].reshape(shape)
        self.rank = tuple(n if a == self.axis % len(shape) else 1 for a, n in enumerate(shape))
        self.first = options.get("norm_before_gate", True)

    def __call__(self, scale, gate, x, **more):
        return jn.gated_rms_norm(x, gate, scale, **self.options, **more)

    def truth(self, mask=None):
        """y, dscale, dgate, dx."""
        x, gate, g = map(oracle.wide, (self.x, self.gate, self.g))
        if mask is not None:
            x, gate = (np.where(np.broadcast_to(mask, a.shape), a, 0.0) for a in (x, gate))
        scale = oracle.wide(self.scale).reshape(self.rank) + self.options.get("scale_offset", 0.0)
        how = dict(epsilon=1e-6, centered=False, mask=mask)
        u, h = (x, g * self.f(gate)) if self.first else (x * self.f(gate), g)
        z = oracle.normalize(u, self.labels, scale, None, **how).y
        du, dscale, _ = oracle.gradients(u, self.labels, scale, None, h, **how)
        y, dx, through = (z * self.f(gate), du, g * z) if self.first else (z, du * self.f(gate), du * x)
        return y, dscale.ravel(), oracle.reduced_to(through * self.slope(gate), self.gate), dx

    def reference(self, scale, gate, x):
        f, labels = NAMED[self.options.get("activation", "silu")], jnp.asarray(self.labels).ravel()
        x = x if self.first else x * f(gate)
        total = lambda a: jax.ops.segment_sum(a.ravel(), labels, int(self.labels.max()) + 1)[labels].reshape(a.shape)
        z = x / jnp.sqrt(total(jnp.square(x)) / total(jnp.ones_like(x)) + 1e-6)
        z = z * (scale.reshape(self.rank) + self.options.get("scale_offset", 0.0))
        return z * f(gate) if self.first else z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_a_gated_norm_matches_float64(options, backend, rng):
    # A gate that is constant along the row and comes first is normalized away: its gradient is rounding, and left out.
    first = options.get("norm_before_gate", True)
    for gate_shape in (SHAPE, (4, 6, 1), (1, 1, 40)) if first else (SHAPE, (1, 6, 40)):
        case = Gated(rng, {**options, "implementation": backend}, gate_shape=gate_shape)
        y, *found = passes(case, case.g, case.scale, case.gate, case.x)
        true, *gradients = case.truth()
        close(y, true, rtol=1e-6, atol=3e-6)
        for got, want in zip(found, gradients, strict=True):
            close(got, want)
    flat = Gated(rng, options).gate[0]
    np.testing.assert_array_equal(case(case.scale, flat, case.x), case(case.scale, flat[None], case.x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_a_gate_in_half_precision_is_the_truth_rounded_once(options, dtype, backend, rng):
    case = Gated(rng, {**options, "implementation": backend}, dtype)
    y, *found = passes(case, case.g, case.scale, case.gate, case.x)
    true, *gradients = case.truth()
    assert y.dtype == dtype
    units = np.abs(np.float64(y) - true) - 2e-5 * (1 + np.abs(true))
    np.testing.assert_array_less(units, 0.51 * ulp(y))
    for got, want in zip(found, gradients, strict=True):
        assert got.dtype == dtype
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(got), want, rtol=1e-2, atol=2 * eps * np.abs(want).max())


@pytest.mark.parametrize("options", [GATED[k] for k in ("norm, gate", "gate, norm", "another axis")], ids=str)
def test_every_transformation_of_a_gated_norm_matches_the_reference(options, rng):
    with jax.enable_x64(True):
        case = Gated(rng, options, np.float64, (3, 3, 4), (3, 3, 4))
        other = Gated(rng, options, np.float64, (3, 3, 4), (3, 3, 4))
        f = lambda params, x: case(*params, x)
        reference = lambda params, x: case.reference(*params, x)
        args = (case.scale, case.gate), case.x, other.x, (other.scale, other.gate), case.g
        args = jax.tree.map(jnp.asarray, args)
        names = ESSENTIAL if options else modes(None, *[None] * 5)
        compare(f, reference, names, *args, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", [r for r in EACH if r.name in ("layer", "batch-nhwc")], ids=str)
def test_transformations_of_an_activation_match_the_reference(norm, rng):
    with jax.enable_x64(True):
        spec = dataclasses.replace(norm.spec, activation="gelu")
        state = spec.init(4)[1]
        f = lambda params, x: spec.apply(jn.Affine(*params), state, x, train=True)[0]
        axes = (0, 1) if norm.batch else (-1,)

        def reference(params, x):
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            z = (x - mean) / jnp.sqrt(var + spec.epsilon)
            return jax.nn.gelu(z * params[0][None, None] + params[1][None, None], approximate=False)

        scale, bias, dscale, dbias = jnp.asarray(rng.normal(size=(4, 4)))
        x, v, g = jnp.asarray(rng.normal(size=(3, 3, 3, 4)))
        args = (scale, bias), x, v, (dscale, dbias), g
        compare(f, reference, ESSENTIAL, *args, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_a_gated_norm_saves_only_x_and_the_gate(options, masked, backend):
    x, scale = jax.ShapeDtypeStruct((16, 12, 480), jnp.bfloat16), jax.ShapeDtypeStruct((480,), jnp.float32)
    if options.get("axis") == 1:
        scale = jax.ShapeDtypeStruct((12,), jnp.float32)
    mask = jnp.ones((16, 1, 1), bool) if masked else None
    f = lambda x, gate, scale: jn.gated_rms_norm(x, gate, scale, **options, mask=mask, implementation=backend)
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], x, x, scale))
    assert [a.dtype for a in kept if a.size >= x.size] == [jnp.bfloat16] * 2
    groups = 12 // 3 if options.get("axis") == 1 else 480 // options.get("group_size", 480)
    statistics = 4 * (x.size // 12 * groups if options.get("axis") == 1 else x.size // 480 * groups)
    assert kept_bytes(f, x, x, scale) <= 4 * x.size + 3 * statistics + 4 * scale.size + 1000


@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_poison_in_the_padding_of_x_or_the_gate_reaches_no_gradient(options, rng):
    case = Gated(rng, options)
    for mask in (rng.random((*SHAPE[:2], 1)) < 0.7, rng.random(SHAPE) < 0.7):
        full = np.broadcast_to(mask, SHAPE)
        case.g = np.where(full, case.g, 0.0).astype(np.float32)
        true, *gradients = case.truth(full)
        for poison in (np.nan, np.inf, 3e38):
            holed = [np.where(full, a, np.float32(poison)) for a in (case.x, case.gate)]
            for x, gate in ((holed[0], case.gate), (case.x, holed[1]), holed):
                y, *found = passes(case, case.g, case.scale, gate, x, mask=mask)
                assert np.all(np.isfinite(y))
                close(y[full], true[full])
                for got, want in zip(found, gradients, strict=True):
                    close(got, want, rtol=1e-4)


def test_gated_and_add_norms_take_complex_integer_and_empty_arrays(rng):
    x, gate = draw(rng, (4, 8)) + 1j * draw(rng, (4, 8)), draw(rng, (4, 8))
    f, labels = oracle.ACTIVATIONS["silu"][0], np.indices(x.shape)[0]
    truth = lambda u: oracle.normalize(u, labels, None, None, epsilon=1e-6, centered=False).y
    x = x.astype(np.complex64)
    np.testing.assert_allclose(jn.gated_rms_norm(x, gate), truth(x) * f(gate), rtol=1e-5, atol=1e-6)
    y = jn.gated_rms_norm(x, gate, norm_before_gate=False)
    np.testing.assert_allclose(y, truth(x * f(gate)), rtol=1e-5, atol=1e-6)
    new = jn.add_rms_norm(x, x)[1]
    np.testing.assert_array_equal(new, x + x)
    y, new = jn.add_layer_norm(np.arange(8), np.arange(8))
    assert (y.dtype, new.dtype, new[-1]) == (f32, f32, 14.0)
    for shape in ((3, 0), (0, 3)):
        nothing = np.zeros(shape, f32)
        assert jn.gated_rms_norm(nothing, nothing).shape == jn.add_rms_norm(nothing, nothing)[0].shape == shape


def test_a_gate_and_an_activation_keep_the_kernel(kernels, rng):
    """One forward and one backward kernel, as for the norm alone, whatever stands around."""
    if not kernels:
        pytest.skip("the native backend is shut")
    case = Gated(rng, {})
    backward = lambda f: lambda *args: jax.vjp(f, *args)[1](jnp.asarray(case.g))
    for options in ({}, dict(norm_before_gate=False), dict(group_size=8)):
        f = lambda s, gate, x, o=options: jn.gated_rms_norm(x, gate, s, implementation="native", **o)
        assert kernels_in(f, case.scale, case.gate, case.x) == ["forward"]
        assert kernels_in(backward(f), case.scale, case.gate, case.x) == ["forward", "backward"]
    for norm in (jn.add_rms_norm, jn.add_layer_norm):
        f = lambda s, r, x, norm=norm: norm(x, r, s, implementation="native")[0]
        assert kernels_in(f, case.scale, case.gate, case.x) == ["forward"]
        assert kernels_in(backward(f), case.scale, case.gate, case.x) == ["forward", "backward"]


# --- the residual stream ----------------------------------------------------------------------------------------------

ADDED = {"add_rms_norm": (jn.add_rms_norm, jn.rms_norm), "add_layer_norm": (jn.add_layer_norm, jn.layer_norm)}
f32, f16, bf16 = np.float32, np.float16, ml_dtypes.bfloat16
STREAMS = [(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f32, bf16), (f16, f32)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("of_x", "of_stream"), STREAMS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("name", ADDED)
def test_add_norm_rounds_the_sum_once_and_normalizes_it(name, of_x, of_stream, backend, rng):
    fused, plain = ADDED[name]
    x, residual, scale = draw(rng, (64, 96), dtype=of_x), draw(rng, (64, 96), 2.0, of_stream), draw(rng, 96)
    stream = (x.astype(np.float64) + residual.astype(np.float64)).astype(of_stream)
    want = plain(stream, scale, dtype=of_x, implementation=backend)
    for wrap in (lambda f: f, jax.jit):
        y, new = wrap(lambda *args: fused(*args, scale, implementation=backend))(x, residual)
        assert (y.dtype, new.dtype) == (of_x, of_stream)
        np.testing.assert_array_equal(new, stream)
        np.testing.assert_array_equal(y, want)
    told = fused(x, residual, scale, dtype=f32)
    assert (told[0].dtype, told[1].dtype) == (f32, of_stream)
    assert fused(x, residual, scale, scale_offset=1.0, epsilon=0.1, axis=0, activation="relu",
                 implementation=backend)[0].min() == 0  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_every_transformation_of_the_residual_matches_the_reference(name, rng):
    """Against the norm of the sum; both outputs, through one array."""
    with jax.enable_x64(True):
        fused, plain = ADDED[name]
        join = lambda y, new: jnp.concatenate([y, new], 1)
        f = lambda params, x: join(*fused(x, params[0], params[1]))
        reference = lambda params, x: join(plain(x + params[0], params[1], implementation="xla"), x + params[0])
        x, v, r, dr = jnp.asarray(rng.normal(size=(4, 3, 4)))
        scale, dscale = jnp.asarray(rng.normal(size=(2, 4)))
        g = jnp.asarray(rng.normal(size=(3, 8)))
        names = [n for n in modes(None, *[None] * 5) if n != "scan"]  # its carry has x's shape
        compare(f, reference, names, (r, scale), x, v, (dr, dscale), g, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ADDED)
def test_gradients_of_add_norm_match_float64(name, rng):
    fused, plain = ADDED[name]
    x, r, scale, g, h = (draw(rng, s) for s in ((16, 24), (16, 24), (24,), (16, 24), (16, 24)))
    for backend in BACKENDS:
        f = lambda *args: fused(*args, implementation=backend)  # noqa: B023
        dx, dr, dscale = jax.vjp(f, x, r, scale)[1]((jnp.asarray(g), jnp.asarray(h)))
        how = dict(epsilon=1e-6, centered=plain is jn.layer_norm)
        stream = np.float64(x) + np.float64(r)
        through, of_scale, _ = oracle.gradients(stream, np.indices(x.shape)[0], scale[None], None, g, **how)
        close(dx, through + h)
        np.testing.assert_array_equal(dx, dr)
        close(dscale, of_scale[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADDED)
def test_add_norm_saves_only_the_new_residual(name, backend):
    fused, _ = ADDED[name]
    x, scale = jax.ShapeDtypeStruct((64, 512), bf16), jax.ShapeDtypeStruct((512,), f32)
    f = lambda x, r, s: fused(x, r, s, implementation=backend)
    assert kept_bytes(f, x, x, scale) / x.size <= 2.2

    def network(x, scales):  # each part adds what it makes of the normalized stream
        def part(carry, scale):
            y, stream = f(*carry, scale)
            return (y, stream), None

        return jax.lax.scan(part, (x, x), scales)[0]

    layers = jax.ShapeDtypeStruct((6, 512), f32)
    assert kept_bytes(network, x, layers) / (6 * x.size) <= 2.2


def test_padding_in_the_residual_stays_where_it_is(rng):
    x, r, g, mask = draw(rng, (6, 5, 16)), draw(rng, (6, 5, 16)), draw(rng, (6, 5, 16)), rng.random((6, 5)) < 0.6
    g[~mask] = 0.0
    holed = np.where(mask[..., None], x, np.float32(np.nan))
    for fused, _ in ADDED.values():
        f = lambda x, r, s: fused(x, r, s, mask=mask)[0]  # noqa: B023
        (y, vjp), (want, clean) = (jax.vjp(f, a, r, np.ones(16, np.float32)) for a in (holed, x))
        np.testing.assert_array_equal(y[mask], want[mask])
        assert np.all(np.isfinite(y))
        for got, true in zip(vjp(jnp.asarray(g)), clean(jnp.asarray(g)), strict=True):
            np.testing.assert_array_equal(got, true)


# --- devices ----------------------------------------------------------------------------------------------------------

EVERY = {
    "gated": lambda x, other, scale, **o: jn.gated_rms_norm(x, other, scale, **o),
    "gated first": lambda x, other, scale, **o: jn.gated_rms_norm(x, other, scale, norm_before_gate=False, **o),
    "added": lambda x, other, scale, **o: sum(jn.add_rms_norm(x, other, scale, **o)),
    "added, layer": lambda x, other, scale, **o: sum(jn.add_layer_norm(x, other, scale, **o)),
    "activated": lambda x, other, scale, **o: jn.layer_norm(x, scale, activation="silu", **o) + other,
}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", EVERY)
def test_add_norm_over_devices_matches_one_device(name, kind, rng):
    """Examples sharded under jit: nothing is moved but the gradient of scale. Features sharded in shard_map: sums."""
    x, other, g, scale = draw(rng, (16, 64)), draw(rng, (16, 64)), draw(rng, (16, 64)), draw(rng, 64)
    both = lambda x, other, scale, g, **o: jax.vjp(lambda *args: EVERY[name](*args, **o), x, other, scale)[1](g)
    want = EVERY[name](x, other, scale), both(x, other, scale, g)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        args = placed(mesh, (x, P("data")), (other, P("data")), (scale, P()), (g, P("data")))
        for f, given, true, sums in ((EVERY[name], args[:3], want[0], []), (both, args, want[1], ["all-reduce"])):
            compiled = jit_unoptimized(f).lower(*given).compile()
            jax.tree.map(lambda a, b: close(a, b, rtol=2e-5), compiled(*given), true)
            assert [op for op, _ in moved(compiled.as_text())] == sums
    features = (P(None, "data"), P(None, "data"), P("data"), P(None, "data"))
    local = lambda *args: (EVERY[name](*args[:3], axis_name="data"), both(*args, axis_name="data"))
    run = jit_unoptimized(jax.shard_map(local, mesh=mesh, in_specs=features, out_specs=(features[0], features[:3])))
    args = placed(mesh, *zip((x, other, scale, g), features, strict=True))
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-5), run(*args), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["jit", "shard_map"])
def test_an_activation_costs_a_synchronized_batch_norm_no_collective(where, backend, rng):
    """What is summed for dx is what is summed for scale and bias, with an activation too: one all-reduce for both."""
    x, g = draw(rng, (32, 5, 6), 2.0), draw(rng, (32, 5, 6))
    mesh, data = mesh_of("auto"), P("data")
    seen = {}
    for activation in (None, "silu"):
        norm = jn.BatchNorm(activation=activation, implementation=backend)
        params, state = norm.init(6)
        want = jax.vjp(lambda p, x: norm.apply(p, state, x, train=True)[0], params, x)[1](g)  # noqa: B023
        if where == "shard_map":
            norm = dataclasses.replace(norm, axis_name="data")
        f = lambda p, x: norm.apply(p, state, x, train=True)[0]  # noqa: B023
        both = lambda p, x, g, f=f: jax.vjp(f, p, x)[1](g)
        if where == "shard_map":
            f = jax.shard_map(f, mesh=mesh, in_specs=(P(), data), out_specs=data)
            both = jax.shard_map(both, mesh=mesh, in_specs=(P(), data, data), out_specs=(P(), data))
        args = placed(mesh, (params, P()), (x, data), (g, data))
        seen[activation] = collectives(jax.jit(f), *args[:2]), collectives(jax.jit(both), *args)
        jax.tree.map(lambda a, b: close(a, b, rtol=2e-5, atol=2e-5), jax.jit(both)(*args), want)
    assert seen["silu"] == seen[None]
    assert seen[None][0].count("all-reduce") >= 1


# --- Flax layers ------------------------------------------------------------------------------------------------------

LAYERS = ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"]


@pytest.mark.parametrize("activation", ["relu", jax.nn.relu], ids=["name", "function"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_an_activation(name, activation, rng):
    x = draw(rng, (4, 8, 64))
    options = dict(num_groups=4) if name == "GroupNorm" else {}
    call = dict(use_running_average=False) if name == "BatchNorm" else {}
    layer, plain = (getattr(jnn, name)(**options, **more) for more in (dict(activation=activation), {}))
    variables = plain.init(jax.random.key(0), x, **call)
    assert jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x, **call)) == jax.tree.map(jnp.shape, variables)
    run = lambda layer, **call: layer.apply(variables, x, mutable=["batch_stats"], **call)
    (y, new), (z, want) = run(layer, **call), run(plain, **call)
    close(y, np.maximum(z, 0.0))
    jax.tree.map(np.testing.assert_array_equal, new, want)  # statistics are of x, not of what comes out
    layer, plain = (
        getattr(jnnx, name)(64, rngs=nnx.Rngs(0), **options, **more) for more in (dict(activation=activation), {})
    )
    close(nnx.jit(lambda layer, x: layer(x))(layer, x), np.maximum(plain(x), 0.0))
    if name == "BatchNorm":
        close(run(jnn.BatchNorm(activation=activation), use_running_average=True)[0],
              np.maximum(run(jnn.BatchNorm(), use_running_average=True)[0], 0.0))  # fmt: skip
    with pytest.raises(ValueError, match="Norm: activation must be one of"):
        getattr(jnn, name)(activation="rleu", **options).init(jax.random.key(0), x, **call)


@pytest.mark.parametrize("options", [GATED[k] for k in ("norm, gate", "gate, norm, in groups", "sigmoid")], ids=str)
def test_gated_layers_match_the_function(options, rng):
    case = Gated(rng, options)
    start = np.full(40, 1.0 - options.get("scale_offset", 0.0), np.float32)
    want = case(start, case.gate, case.x)
    linen, key = jnn.GatedRMSNorm(**options), jax.random.key(0)
    y, variables = linen.init_with_output(key, case.x, case.gate)
    np.testing.assert_array_equal(y, want)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (40,)}}
    layer = jnnx.GatedRMSNorm(40, rngs=nnx.Rngs(0), **options)
    np.testing.assert_array_equal(layer(case.x, case.gate), want)
    layer.scale[...] = case.scale
    trained = {"params": {"scale": jnp.asarray(case.scale)}}
    mask = rng.random(SHAPE[:2]) < 0.7
    want = case(case.scale, case.gate, case.x, mask=mask)
    np.testing.assert_array_equal(linen.apply(trained, case.x, case.gate, mask=mask), want)
    np.testing.assert_array_equal(layer(case.x, case.gate, mask), want)
    loss = lambda layer, x: jnp.vdot(layer(x, case.gate), case.g)
    close(nnx.grad(loss)(layer, case.x)["scale"][...], case.truth()[1])
    # Dtypes as in Flax's layers: what x and the parameters promote to, or what is asked for.
    half = case.x.astype(bf16)
    assert linen.apply(trained, half, case.gate).dtype == layer(half, case.gate).dtype == f32
    half = half, case.gate.astype(bf16)
    assert jnn.GatedRMSNorm(dtype=bf16).apply(trained, *half).dtype == bf16
    assert jnnx.GatedRMSNorm(40, dtype=bf16, rngs=nnx.Rngs(0))(*half).dtype == bf16
    for apply in (lambda **own: linen.apply(trained, case.x, case.gate, **own),
                  lambda **own: layer(case.x, case.gate, **own)):  # fmt: skip
        with pytest.raises(ValueError, match="GatedRMSNorm: scale= was given at call time"):
            apply(scale=case.scale)
    bare = jnn.GatedRMSNorm(use_scale=False, **options)
    np.testing.assert_array_equal(bare.apply({}, case.x, case.gate, scale=case.scale),
                                  case(case.scale, case.gate, case.x))  # fmt: skip
    with pytest.raises(TypeError, match=r"GatedRMSNorm: the layer's scale of shape \(40,\) does not fit"):
        layer(case.x[..., :8], case.gate[..., :8])

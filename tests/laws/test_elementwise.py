"""Norms that are an elementwise function of x and its statistics, over axes, segments and prefixes; every derivative.

The truth is plain jnp in float64: statistics by a product with the 0/1 matrix of elements and segments.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import mesh_of, placed
from helpers.jit import jit_unoptimized
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm._core.arithmetic import prescales
from jaxnorm._core.over import Axes, Prefix, Segments
from jaxnorm._core.types import Reduction
from jaxnorm._ops.elementwise import by_statistics

IDS = np.array([3, 0, -1, 1, 1, 9, 0, 1])  # segment 2 is empty; -1 and 9 are absent
SEGMENTS = Segments(4)


def response(x, s, p):
    """Filter response norm with its threshold."""
    return jnp.maximum(s.standardize(x, jnp.abs(p["epsilon"])) * p["scale"] + p["bias"], p["threshold"])


def graph(x, s, p):
    """Graph norm: Var[x - alpha mean] = var + (1 - alpha)**2 mean**2."""
    var = s.var + jnp.square((1.0 - p["scale"]) * s.mean)
    return (x - p["scale"] * s.mean) / jnp.sqrt(var + jnp.abs(p["epsilon"])) + p["bias"]


def gated(x, s, p):
    """Nothing linear: x and each statistic enter by themselves."""
    return jnp.tanh(x * p["scale"]) * s.rsqrt(p["epsilon"] ** 2) + jnp.sin(s.mean) * s.count


TWO = dict(prescale=2.0**20, large_prescale=2.0**-60)
CASES = {  # f, the statistics, and what the elements carry
    "response-space": (response, Reduction(Axes((0,)), centered=False), "mask"),
    "response-large": (response, Reduction(Axes((0,)), centered=False, **TWO), "weights"),
    "graph-rows": (graph, Reduction(Axes((1,))), "weights"),
    "gated-all-large": (gated, Reduction(Axes((0, 1)), **TWO), "mask and weights"),
    "response-segments": (response, Reduction(SEGMENTS, centered=False), "mask"),
    "graph-segments": (graph, Reduction(SEGMENTS, prescale=2.0**-10), ""),
    "gated-segments-whole": (gated, Reduction(dataclasses.replace(SEGMENTS, axes=(1,))), "weights"),
    "graph-segments-large": (graph, Reduction(SEGMENTS, **TWO), "mask and weights"),
    "gated-so-far": (gated, Reduction(Prefix(0, 8, (1,))), "weights"),
    "response-so-far": (response, Reduction(Prefix(1, 3, (0,)), centered=False), "mask"),
    "graph-so-far": (graph, Reduction(Prefix(0, 8, (1,)), prescale=2.0**-10), ""),
    "graph-so-far-large": (graph, Reduction(Prefix(0, 8, (1,)), **TWO), "mask and weights"),
}
by_case = pytest.mark.parametrize("case", CASES)


@dataclasses.dataclass
class Plain:
    """The statistics of every element, from a matrix that holds 1 where they are of another one too."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array

    def rsqrt(self, epsilon):
        return jnp.where(self.count == 0, 0.0, 1.0 / jnp.sqrt(jnp.where(self.count == 0, 1.0, self.var) + epsilon))

    def standardize(self, x, epsilon):
        return (x - self.mean) * self.rsqrt(epsilon)


def plain(f, reduction, x, present, weights, params, ids):
    """f of x by its definition; `present` is all that counts, and x is finite."""
    index, shape = np.indices(x.shape), x.shape
    over = reduction.over
    other = (*over.axes, *[0] * (ids is not None), *[getattr(over, "axis", 0)] * isinstance(over, Prefix))
    keys = [index[a] for a in range(x.ndim) if a not in other]
    keys += [np.broadcast_to(np.reshape(ids, (-1, 1)), shape)] if ids is not None else []
    same = np.ones((x.size, x.size), bool)
    for key in keys:
        same &= key.reshape(-1, 1) == key.reshape(1, -1)
    if isinstance(over, Prefix):
        place = index[over.axis]
        same &= place.reshape(-1, 1) >= place.reshape(1, -1)
    w = jnp.where(present, 1.0 if weights is None else weights, 0.0)
    total = lambda a: (jnp.asarray(same, x.dtype) @ (w * a).reshape(-1)).reshape(shape)
    n = total(jnp.ones_like(x))
    some = jnp.where(n == 0, 1.0, n)
    mean = total(x) / some if reduction.centered else jnp.zeros_like(x)
    var = total(jnp.square(x - mean)) / some
    if isinstance(over, Prefix):  # about the mean of the place, not that of each element
        var = total(jnp.square(x)) / some - jnp.square(mean)
    return f(x, Plain(n, mean, var), params)


def drawn(rng, shape=(8, 3), dtype=np.float64):
    x = rng.normal(size=shape) + 1.0
    names = ("scale", "bias", "threshold", "epsilon")
    params = {k: rng.normal(size=(1, shape[1]) if k != "epsilon" else (1, 1)) for k in names}
    return jnp.asarray(x, dtype), jax.tree.map(lambda a: jnp.asarray(a, dtype), params)


def operands(case, x, rng):
    """The ids, the mask and the weights."""
    _, reduction, carried = CASES[case]
    ids = jnp.asarray(IDS, jnp.int32)[:, None] if isinstance(reduction.over, Segments) else None
    mask = jnp.asarray(rng.random(x.shape) < 0.8) if "mask" in carried else None
    mask = reduction.over.present(mask, ids)
    weights = jnp.asarray(rng.uniform(0.5, 2.0, size=x.shape), x.dtype) if "weights" in carried else None
    return ids, mask, weights


@by_case
def test_every_derivative_is_that_of_the_definition(case, rng):
    f, reduction, _ = CASES[case]
    with jax.enable_x64(True):
        x, params = drawn(rng)
        ids, mask, weights = operands(case, x, rng)
        present = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
        seen = jnp.where(present, x, jnp.nan)  # NaN wherever an element is absent
        g = jnp.where(present, jnp.asarray(rng.normal(size=x.shape)), 0.0)
        v = jnp.where(present, jnp.asarray(rng.normal(size=x.shape)), 0.0)
        dparams = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

        def ours(x, params, weights):
            x = jnp.where(present, x, seen)
            return by_statistics(f, reduction, jnp.float64, x, mask, weights, params, ids)

        def truth(x, params, weights):
            x = jnp.where(present, x, 0.0)
            return plain(f, reduction, x, present, weights, params, None if ids is None else IDS)

        def all_orders(y):
            weigh = lambda x, p, w: (jnp.sin(y(x, p, w)) * g).sum()
            along = lambda t: weigh(x + t * v, jax.tree.map(lambda p, d: p + t * d, params, dparams), weights)
            arguments = (0, 1) if weights is None else (0, 1, 2)
            return {
                "value": jnp.where(present, y(x, params, weights), 0.0),
                "jvp": jax.jvp(lambda x, p: weigh(x, p, weights), (x, params), (v, dparams)),
                "vjp": jax.grad(weigh, arguments)(x, params, weights),
                "hessian": jax.hessian(weigh, (0, 1))(x, params, weights),
                "third": jax.jacfwd(jax.jacrev(jax.jacfwd(along)))(0.0),
            }

        want, got = (jit_unoptimized(lambda y=y: all_orders(y))() for y in (truth, ours))
        for name, a in got.items():
            for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(want[name]), strict=True):
                size = float(jnp.abs(other).max()) + 1.0
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * size, err_msg=name)


@by_case
def test_jit_and_vmap_are_the_call(case, rng):
    f, reduction, _ = CASES[case]
    x, params = drawn(rng, dtype=np.float32)
    ids, mask, weights = operands(case, x, rng)
    call = lambda x, p: by_statistics(f, reduction, jnp.float32, x, mask, weights, p, ids)
    grad = jax.grad(lambda x, p: (call(x, p) ** 2).sum(), (0, 1))
    stacked = jnp.stack([x, 2.0 * x, -x])
    for g in (call, grad):
        alone = jit_unoptimized(g)
        each = [alone(x, params) for x in stacked]
        together = jit_unoptimized(jax.vmap(g, (0, None)))(stacked, params)
        jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, np.stack(b), rtol=2e-5, atol=2e-5), together, *each)
    if ids is not None:  # rows that carry other ids in each example
        several = jnp.stack([ids, jnp.flip(ids)])
        present = functools.partial(reduction.over.present, None)
        call = lambda ids: by_statistics(f, reduction, jnp.float32, x, present(ids), None, params, ids)
        together, alone = jit_unoptimized(jax.vmap(call))(several), jit_unoptimized(call)
        np.testing.assert_allclose(together, np.stack([alone(i) for i in several]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
@by_case
def test_only_x_is_saved_at_full_size(case, dtype):
    f, reduction, _ = CASES[case]
    x = jax.ShapeDtypeStruct((2048, 128), dtype)
    if isinstance(reduction.over, Prefix):
        over = dataclasses.replace(reduction.over, length=x.shape[reduction.over.axis])
        reduction = dataclasses.replace(reduction, over=over)
    params = jax.eval_shape(lambda: drawn(np.random.default_rng(0), x.shape, np.float32)[1])
    ids = jax.ShapeDtypeStruct((2048, 1), jnp.int32) if isinstance(reduction.over, Segments) else None
    call = lambda x, p, ids: by_statistics(f, reduction, dtype, x, reduction.over.present(None, ids), None, p, ids)
    pull = lambda x, p, ids: jax.vjp(lambda x, p: call(x, p, ids), x, p)[1]
    kept = jax.tree.leaves(jax.eval_shape(pull, x, params, ids))
    assert sum(a.size * a.dtype.itemsize for a in kept) / x.size <= jnp.dtype(dtype).itemsize + 0.15
    assert [a.dtype for a in kept if a.size >= x.size] == [dtype]


def test_the_output_is_rounded_once(rng):
    x, params = drawn(rng, dtype=np.float32)
    f, reduction, _ = CASES["graph-segments"]
    ids, mask, _ = operands("graph-segments", x, rng)
    half = x.astype(jnp.bfloat16)
    call = lambda x, dtype: by_statistics(f, reduction, dtype, x, mask, None, params, ids)
    np.testing.assert_array_equal(call(half, jnp.bfloat16), call(half, jnp.float32).astype(jnp.bfloat16))


# --- segments ------------------------------------------------------------------------------------------------------


def standardized(x, s, p):
    return s.standardize(x, p)


def by_segments(x, ids, number, axes=(), epsilon=0.0, f=standardized, **options):
    over = Segments(number, axes, **options)
    small, large = prescales(epsilon, x.size, x.dtype)
    reduction = Reduction(over, prescale=small, large_prescale=large)
    ids = jnp.asarray(ids, jnp.int32).reshape(ids.shape + (1,) * (x.ndim - ids.ndim))
    return by_statistics(f, reduction, x.dtype, x, over.present(None, ids), None, jnp.float32(epsilon), ids)


def by_axes(x, axes, epsilon=0.0):
    small, large = prescales(epsilon, x.size, x.dtype)
    reduction = Reduction(Axes(axes), prescale=small, large_prescale=large)
    return by_statistics(standardized, reduction, x.dtype, x, None, None, jnp.float32(epsilon), None)


@pytest.mark.parametrize("axes", [(), (1,)], ids=["instance", "layer"])
def test_one_segment_is_the_axes_and_equal_lengths_are_a_reshape(axes, rng):
    x = jnp.asarray(rng.normal(size=(24, 6)) + 3.0, jnp.float32)
    y = by_segments(x, np.zeros(24, int), 1, axes)
    np.testing.assert_allclose(y, by_axes(x, (0, *axes)), rtol=2e-6, atol=2e-6)
    y = by_segments(x, np.arange(24) // 8, 3, axes, indices_are_sorted=True)
    parts = by_axes(x.reshape(3, 8, 6), (1, *(a + 1 for a in axes)))
    np.testing.assert_allclose(y.reshape(3, 8, 6), parts, rtol=2e-6, atol=2e-6)
    tokens = x.reshape(4, 6, 6)  # packed in two axes: segments cross the examples
    over_two = by_segments(tokens, np.arange(24).reshape(4, 6) // 8, 3, tuple(a + 1 for a in axes), rows=2)
    np.testing.assert_allclose(over_two.reshape(24, 6), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_long_segments_are_accurate(mean, rng):
    """Summed in one chain, as XLA for CPU does it, a segment of 200,000 rows would be off by more."""
    x = (rng.normal(size=(200_000, 1)) + mean).astype(np.float32)
    wide = x.astype(np.float64)
    for ids in (np.zeros(len(x), int), np.where(np.arange(len(x)) % 50 == 0, -1, 0)):
        y = by_segments(jnp.asarray(x), ids, 1)
        seen = wide[ids == 0]
        want = (wide - seen.mean()) / seen.std()
        assert np.abs(y - want)[ids == 0].max() <= 2e-6 * 5 + 1e-7 * mean


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size(size, rng):
    x = jnp.asarray(rng.normal(size=(40, 3)) * size / 5, jnp.float32)
    ids = rng.integers(0, 4, 40)
    y = by_segments(x, ids, 4)
    wide = np.asarray(x, np.float64)
    for i in range(4):
        part = wide[ids == i]
        np.testing.assert_allclose(y[ids == i], (part - part.mean(0)) / part.std(0), rtol=0, atol=4e-6)
    assert np.isfinite(jax.grad(lambda x: (by_segments(x, ids, 4) ** 3).sum())(x)).all()


def test_empty_and_constant_segments_and_absent_rows_are_finite():
    x = jnp.asarray([[7.0], [7.0], [jnp.nan], [1.0], [3.0]])
    ids = np.array([0, 0, 5, 2, 2])
    y, pull = jax.vjp(lambda x: by_segments(x, ids, 4), x)
    np.testing.assert_allclose(y[:, 0], [0.0, 0.0, 0.0, -1.0, 1.0], atol=1e-6)
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all()


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "how"),
    [(c, how) for c in CASES for how in ("auto", "vmap")]
    + [("graph-segments-large", "explicit"), ("gated-segments-whole", "jit")],
)
def test_devices_agree_with_one(case, how, rng):
    """Uneven segments over eight devices: each has rows of some of them, and one device of none."""
    f, one, _ = CASES[case]
    if isinstance(one.over, Axes) and 0 not in one.over.axes:
        one = dataclasses.replace(one, over=Axes((0, *one.over.axes)))
    if isinstance(one.over, Prefix):  # each device has rows of every place
        one = dataclasses.replace(one, over=Prefix(1, 4, (0,)))
    x, params = drawn(rng, (24, 4), np.float32)
    ids = np.sort(rng.integers(0, 4, 24))
    ids[3:6] = -1  # all that the second device has
    ids = jnp.asarray(ids, jnp.int32)[:, None] if isinstance(one.over, Segments) else None
    mask = one.over.present(jnp.asarray(rng.random(x.shape) < 0.8), ids)
    g = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def run(reduction, x, mask, params, ids):
        return by_statistics(f, reduction, jnp.float32, x, mask, None, params, ids)

    whole = functools.partial(run, one)
    shared = functools.partial(run, dataclasses.replace(one, axis_name="d"))
    if how != "vmap":
        mesh, per = mesh_of("auto" if how == "auto" else "explicit", names=("d",)), None if ids is None else P("d")
        specs = (P("d"), P("d"), P(), per)
        shared = whole if how == "jit" else jax.shard_map(shared, mesh=mesh, in_specs=specs, out_specs=P("d"))
        placed_all = placed(mesh, *zip((x, mask, params, ids, g), (*specs, P("d")), strict=True))
    else:
        cut = lambda a: None if a is None else a.reshape(8, 3, *a.shape[1:])
        each = jax.vmap(shared, in_axes=(0, 0, None, None if ids is None else 0), axis_name="d")
        shared = lambda x, mask, params, ids: each(cut(x), cut(mask), params, cut(ids)).reshape(x.shape)
        kind = "auto" if jax.__version_info__[:2] == (0, 11) else "explicit"  # where a psum under vmap fails in JAX
        placed_all, mesh = [x, mask, params, ids, g], mesh_of(kind, (1,), ("unused",))

    def with_gradient(f, x, mask, params, ids, g):
        y, pull = jax.vjp(lambda x, p: f(x, mask, p, ids), x, params)
        return y, pull(g)

    want = jit_unoptimized(functools.partial(with_gradient, whole))(x, mask, params, ids, g)
    with jax.set_mesh(mesh):
        got = jit_unoptimized(functools.partial(with_gradient, shared))(*placed_all)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_sizes_may_be_symbols(rng):
    """Under `jax.export`, rows and columns of any number."""
    rows, columns = jax.export.symbolic_shape("m, c")
    reduction, present = Reduction(SEGMENTS), functools.partial(SEGMENTS.present, None)
    call = jax.jit(lambda x, ids: by_statistics(standardized, reduction, x.dtype, x, present(ids), None, 1e-5, ids))
    kinds = jax.ShapeDtypeStruct((rows, columns), jnp.float32), jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    exported = jax.export.export(call)(*kinds)
    for shape in ((12, 4), (300, 7)):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        ids = jnp.asarray(rng.integers(-1, 6, (shape[0], 1)), jnp.int32)
        np.testing.assert_allclose(exported.call(x, ids), call(x, ids), rtol=2e-5, atol=2e-5)


def test_equal_functions_share_a_trace():
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Scaled:
        by: float

        def __call__(self, x, s, p):
            traces.append(self.by)
            return self.by * s.standardize(x, 1.0)

    x = jnp.ones((4, 3))
    for by in (2.0, 2.0, 3.0, 3.0):
        by_statistics(Scaled(by), Reduction(Axes((1,))), x.dtype, x, None, None, ())
    assert traces == [2.0, 3.0]


# --- the norms -----------------------------------------------------------------------------------------------------


def test_filter_response_is_rms_norm_with_relu(rng):
    """max(z, tau) is relu(z - tau) + tau; RMS norm over space has kernels and formulas of its own."""
    x, scale, bias, tau, g = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 5, 4, 6), 6, 6, 6, (3, 5, 4, 6))
    )
    whole = lambda a: jnp.broadcast_to(a, (1, 1, 1, 6))

    def by_rms(x, scale, bias, tau):
        bias = whole(bias - tau)
        return jn.rms_norm(x, whole(scale), bias, axis=(1, 2), activation="relu", epsilon=1e-6) + whole(tau)

    got, want = (jax.vjp(f, x, scale, bias, tau) for f in (jn.filter_response_norm, by_rms))
    for a, b in zip([got[0], *got[1](g)], [want[0], *want[1](g)], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def standing(kind, x, scale, bias):
    """The norm of that name of all rows of one segment."""
    how = dict(epsilon=1e-5, activation="silu", scale_offset=1.0)
    if kind in ("layer", "rms"):
        scale, bias = (jnp.broadcast_to(p, (1,) * (x.ndim - 1) + p.shape) for p in (scale, bias))
        return getattr(jn, f"{kind}_norm")(x, scale, bias, axis=tuple(range(x.ndim)), **how)
    if kind == "group":
        return jn.group_norm(x[None], scale, bias, num_groups=2, **how)[0]
    return jn.instance_norm(x[None], scale, bias, **how)[0]


@pytest.mark.filterwarnings("ignore:instance_norm")  # a segment of one row
@pytest.mark.parametrize("shape", [(15, 6), (15, 2, 6), (3, 5, 6)], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms", "group", "instance"])
def test_each_segment_is_the_norm_of_its_rows(kind, shape, rng):
    """Padding is NaN, absent by its id or by the mask."""
    with jax.enable_x64(True):
        x, g = rng.normal(size=(2, *shape))
        scale, bias = rng.normal(size=(2, 6))
        rows = shape[:2] if shape == (3, 5, 6) else shape[:1]
        ids = rng.integers(-1, 6, rows)  # 5 is too large
        mask = rng.random(rows) < 0.9
        present = mask & (ids >= 0) & (ids < 5)
        seen = np.where(present.reshape(rows + (1,) * (len(shape) - len(rows))), x, np.nan)
        groups = dict(num_groups=2) if kind == "group" else {}
        call = functools.partial(
            jn.segment_norm,
            segment_ids=ids,
            num_segments=5,
            kind=kind,
            mask=mask,
            activation="silu",
            scale_offset=1.0,
            **groups,
        )
        y, pull = jax.vjp(lambda x, s, b: call(x, scale=s, bias=b), seen, scale, bias)
        dx, dscale, dbias = pull(jnp.where(jnp.isnan(seen), 0.0, g))
        want = np.zeros(6), np.zeros(6)
        for i in range(5):
            here = present & (ids == i)
            if here.any():
                z, back = jax.vjp(functools.partial(standing, kind), x[here], scale, bias)
                np.testing.assert_allclose(y[here], z, atol=1e-12)
                dz, *of_params = back(g[here])
                np.testing.assert_allclose(dx[here], dz, atol=1e-10)
                want = [a + b for a, b in zip(want, of_params, strict=True)]
        np.testing.assert_allclose(dscale, want[0], atol=1e-10)
        np.testing.assert_allclose(dbias, want[1], atol=1e-10)
        np.testing.assert_array_equal(dx[~present], 0.0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_ids_of_any_integer_dtype(dtype, rng):
    x, ids = rng.normal(size=(12, 4)).astype("f"), rng.integers(0, 4, 12)
    ids[[2, 7]] = 100  # too large
    want = jn.segment_norm(x, np.where(ids == 100, -1, ids), num_segments=300)
    np.testing.assert_array_equal(jn.segment_norm(x, ids.astype(dtype), num_segments=50), want)
    np.testing.assert_array_equal(jn.segment_norm(x, ids.astype(dtype), num_segments=np.int64(99)), want)


@pytest.mark.parametrize("how", ["auto", "explicit", "jit"])
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_segments_over_devices(kind, how, rng):
    """Rows over devices; under jit on an Explicit mesh channels as well."""
    x, g = (jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(np.sort(rng.integers(-1, 3, 16)))
    options = dict(num_segments=3, kind=kind, **(dict(num_groups=2) if kind == "group" else {}))

    def train(x, ids, g, axis_name=None):
        y, pull = jax.vjp(lambda x: jn.segment_norm(x, ids, axis_name=axis_name, **options), x)
        return y, *pull(g)

    want = train(x, ids, g)
    if how == "jit":
        mesh, rows = mesh_of("explicit", (4, 2), ("d", "c")), P("d", "c")
        run = train
    else:
        mesh, rows = mesh_of(how, names=("d",)), P("d")
        run = functools.partial(train, axis_name="d")
        run = jax.shard_map(run, mesh=mesh, in_specs=(rows, P("d"), rows), out_specs=rows)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*placed(mesh, (x, rows), (ids, P("d")), (g, rows)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

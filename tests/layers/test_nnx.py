"""`jaxnorm.nnx` against `flax.nnx`: the same state, outputs, gradients and errors, and what jaxnorm adds."""

from __future__ import annotations

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers.flax_rules import DTYPES, as_flax, assert_one_rounding, by_key, randn
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import nnx as jnnx

NAMES = [name for name in jnnx.__all__ if hasattr(nnx, name)]  # the others are jaxnorm's own
RNGS = nnx.Rngs(0)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def make(library, norm, features, **options):
    options = {"scale_init": by_key, **({} if norm == "RMSNorm" else {"bias_init": by_key}), **options}
    return getattr(library, norm)(features, rngs=nnx.Rngs(1), **options)


def plain(norm, **options):
    return make(jnnx, norm, 6, scale_init=None, **(dict(num_groups=2) if norm == "GroupNorm" else {}), **options)


@nnx.jit
def run(layer, x, call):
    return layer(x, **call)


@functools.partial(nnx.jit, static_argnames="train")
def gradients(layer, x, g, mask, train):
    """The output, and the cotangents of x and params for that of y."""
    call = {} if mask is None else {"mask": mask}
    call |= {"use_running_average": not train} if hasattr(layer, "momentum") else {}

    def loss(layer, x):
        y = layer(x, **call)
        return (y.astype(g.dtype) * g).sum(), y

    (_, y), (dparams, dx) = nnx.value_and_grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(layer, x)
    return y, dx, nnx.to_pure_dict(dparams)


PLAIN = [
    ("LayerNorm", (4, 3, 8), 8, {}, None),
    ("RMSNorm", (4, 3, 8), 8, {}, None),
    ("GroupNorm", (2, 3, 2, 8), 8, dict(num_groups=2), None),
    ("InstanceNorm", (2, 3, 4, 5), 5, {}, None),
    ("BatchNorm", (4, 3, 5), 5, {}, None),
]
CASES = [
    *PLAIN,
    ("LayerNorm", (4, 3, 8), 24, dict(reduction_axes=(-2, -1), feature_axes=(1, 2)), (4, 3, 1)),  # a flat parameter
    ("LayerNorm", (4, 3, 8), 3, dict(reduction_axes=[1, 2], feature_axes=[1], use_bias=False), (3, 8)),
    ("LayerNorm", (4, 8), 8, dict(use_scale=False, use_bias=False, use_fast_variance=False), None),
    ("RMSNorm", (4, 3, 8), 8, dict(reduction_axes=(1, 2), feature_axes=-1), (4, 3, 8)),
    ("GroupNorm", (2, 3, 8), 8, dict(num_groups=None, group_size=4, use_scale=False), (2, 3, 8)),
    ("GroupNorm", (3, 64), 64, {}, None),
    ("InstanceNorm", (2, 6, 5), 5, {}, (2, 6, 1)),
    ("InstanceNorm", (2, 6, 3, 5), 30, dict(feature_axes=(1, 3)), None),
    ("BatchNorm", (4, 3, 5), 5, dict(momentum=0.5), (4, 3, 1)),
    ("BatchNorm", (4, 5, 3), 5, dict(axis=1, use_scale=False), None),
    ("BatchNorm", (4, 3, 5), 5, dict(use_running_average=True), None),
]
HALF = [(jnp.bfloat16, None, jnp.float32), (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float16, None, jnp.float16), (jnp.float32, jnp.float16, jnp.bfloat16)]  # fmt: skip


def assert_equal_to_flax(case, x_dtype=jnp.float32, compare_errors=False, **more):
    norm, shape, features, options, mask_shape = case
    rng = np.random.default_rng(7)
    x, mask = jnp.asarray(rng.normal(1, 2, shape), x_dtype), None
    g = jnp.asarray(rng.integers(-8, 9, shape) / 4, jnp.float32)  # exact in every dtype
    if mask_shape is not None:
        mask = rng.random(mask_shape) < 0.7
        mask[(..., *(slice(2) for _ in range(min(mask.ndim, 2))))] = True
        mask = jnp.asarray(mask)
    train = not options.get("use_running_average", False)
    ours = make(jnnx, norm, features, **options, **more)
    state = jax.tree.map(lambda a: a, nnx.state(ours))  # a copy: the layer's own changes in training
    got, after = gradients(ours, x, g, mask, train), nnx.to_pure_dict(nnx.state(ours))
    wide = functools.partial(jax.tree.map, lambda a: np.asarray(a).astype(np.float64))
    with jax.enable_x64(True):
        exact = dict(dtype=jnp.float64, param_dtype=jnp.float64, use_fast_variance=False)
        judge = as_flax(make)(nnx, norm, features, **{**options, **exact})
        nnx.update(judge, jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(np.float64)), state))
        truth = wide(as_flax(gradients)(judge, wide(x), wide(g), mask, train))
        truth_after = wide(nnx.to_pure_dict(nnx.state(judge)))
    jax.tree.map(assert_one_rounding, (got, after), (truth, truth_after))
    if compare_errors:
        theirs = as_flax(make)(nnx, norm, features, **options, **more)
        nnx.update(theirs, state)
        want = as_flax(gradients)(theirs, x, g, mask, train)
        assert DTYPES(got) == DTYPES(want)
        jax.tree.map(assert_one_rounding, got, truth, want)


@pytest.mark.versions
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[3]}-{c[4]}")
def test_equals_flax_in_float32(case):
    if not hasattr(nnx, case[0]):  # InstanceNorm is new in Flax 0.12
        pytest.skip(f"this Flax has no nnx.{case[0]}")
    assert_equal_to_flax(case)


# Dtypes are handled by what all layers share, and each norm is rounded in linen with all of them: here batch norm, which
# has a state, with all, and each other norm with one.
HALVES = [(PLAIN[-1], dtypes) for dtypes in HALF] + [*zip(PLAIN, HALF, strict=False)]


@pytest.mark.parametrize(("case", "dtypes"), HALVES, ids=lambda v: v[0] if isinstance(v[0], str) else str(v[1]))
def test_rounds_once_in_half_precision(case, dtypes):
    x_dtype, dtype, param_dtype = dtypes
    assert_equal_to_flax(case, x_dtype, True, dtype=dtype, param_dtype=param_dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[3]}-{c[4]}")
def test_state_is_that_of_flax(case):
    norm, _, features, options, _ = case
    for param_dtype in (jnp.float32, jnp.bfloat16):
        ours, theirs = (as_flax(make)(lib, norm, features, **options, param_dtype=param_dtype) for lib in (jnnx, nnx))
        a, b = nnx.state(ours), nnx.state(theirs)
        assert jax.tree.structure(a) == jax.tree.structure(b)  # with paths and types of variables
        assert DTYPES(a) == DTYPES(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)  # keys are drawn in Flax's order
        other = jax.tree.map(lambda v: v + jnp.ones((), v.dtype), b)
        nnx.update(ours, other)
        nnx.update(theirs, nnx.state(ours))
        jax.tree.map(np.testing.assert_array_equal, nnx.state(theirs), other)


@pytest.mark.parametrize("norm", NAMES)
def test_constructor_is_that_of_flax(norm):
    ours, theirs = (inspect.signature(getattr(lib, norm).__init__).parameters for lib in (jnnx, nnx))
    assert "num_features" in ours
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default or name in ("scale_init", "bias_init")
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours if name not in theirs)


@pytest.mark.parametrize("norm", NAMES)
def test_dtypes_of_outputs(norm):
    reals = (jnp.float32, jnp.bfloat16, jnp.float16)
    layers = itertools.product((None, jnp.float16), (jnp.float32, jnp.bfloat16), (True, False))
    for dtype, param_dtype, use in layers:
        options = dict(dtype=dtype, param_dtype=param_dtype, use_scale=use)
        options |= {} if norm == "RMSNorm" else dict(use_bias=use)
        options |= dict(num_groups=2) if norm == "GroupNorm" else {}
        ours, theirs = (as_flax(make)(lib, norm, 4, **options) for lib in (jnnx, nnx))
        for x_dtype in (*reals, jnp.int32):
            x = jax.ShapeDtypeStruct((3, 2, 4), x_dtype)
            assert nnx.eval_shape(lambda m, x: m(x), ours, x) == as_flax(nnx.eval_shape)(lambda m, x: m(x), theirs, x)


def test_promote_dtype_is_asked_for_dtypes_only():
    seen = []

    def to_bfloat16(args, *, dtype=None):
        seen.append(len(args))
        return tuple(None if a is None else jnp.asarray(a, jnp.bfloat16) for a in args)

    x = randn(5, 4) * 0.01 + 300  # in bfloat16 every element of it would be the same
    for norm, count in (("LayerNorm", 3), ("RMSNorm", 2), ("BatchNorm", 5)):
        seen.clear()
        y = run(make(jnnx, norm, 4, promote_dtype=to_bfloat16), x, {})
        want = run(make(jnnx, norm, 4, dtype=jnp.bfloat16), x, {})
        assert y.dtype == jnp.bfloat16
        assert set(seen) == {count}  # as many arguments as Flax's layer passes
        np.testing.assert_array_equal(y, want)
        assert norm == "RMSNorm" or float(jnp.std(y.astype(jnp.float32))) > 0.1


@pytest.mark.versions
def test_batch_stats_over_ten_steps():
    x = randn(10, 6, 5) * 3 + 1
    ours, theirs = make(jnnx, "BatchNorm", 5, momentum=0.8), make(nnx, "BatchNorm", 5, momentum=0.8)
    for part in x:
        run(ours, part, {})
        as_flax(run)(theirs, part, {})
    jax.tree.map(close, nnx.state(ours), nnx.state(theirs))
    before = nnx.to_pure_dict(nnx.state(ours))
    ours.eval()
    run(ours, x[0], {})
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours)), before)


def test_complex_keeps_the_imaginary_part_of_the_running_mean():
    x = jax.lax.complex(randn(6, 4), randn(6, 4, seed=1))
    layer = jnnx.BatchNorm(4, momentum=0.0, rngs=RNGS)
    y = layer(x)
    close(layer.mean[...], x.mean(0))
    close(layer(x, use_running_average=True), y)
    with jax.numpy_dtype_promotion("standard"):
        close(jnnx.LayerNorm(4, rngs=RNGS)(x), nnx.LayerNorm(4, rngs=RNGS)(x))


# --- modes ------------------------------------------------------------------------------------------------------------


def test_train_eval_and_view():
    x = randn(6, 4)
    layer = jnnx.BatchNorm(4, momentum=0.0, rngs=RNGS)
    by_batch = run(layer, x, {})
    close(layer.mean[...], x.mean(0))
    layer.eval()
    assert layer.use_running_average is True
    close(run(layer, 2 * x, {}), 2 * by_batch + (by_batch - layer(x)), atol=2)  # by the running ones: linear in x
    layer.train()
    assert layer.use_running_average is False
    viewed = nnx.view(layer, use_running_average=True)
    assert viewed.mean is layer.mean
    close(viewed(x), layer(x, use_running_average=True))
    assert "use_running_average" in nnx.view_info(layer)
    with pytest.raises(ValueError, match="neither the layer's nor the call's"):
        jnnx.BatchNorm(4, use_running_average=None, rngs=RNGS)(x)


def test_frozen_stays_frozen():
    x = randn(6, 4) + 3
    layer = jnnx.BatchNorm(4, frozen=True, rngs=RNGS)
    layer.train()
    for call in ({}, {"use_running_average": False}):
        close(layer(x, **call), x / np.sqrt(1 + 1e-5))
    np.testing.assert_array_equal(layer.mean[...], 0)
    close(jnnx.BatchNorm(4, frozen=True, use_running_average=None, rngs=RNGS)(x), x / np.sqrt(1 + 1e-5))


def test_traced_use_running_average():
    x = randn(6, 4) + 3
    for use in (True, False):
        traced, plain = jnnx.BatchNorm(4, rngs=RNGS), jnnx.BatchNorm(4, rngs=RNGS)
        close(run(traced, x, {"use_running_average": use}), plain(x, use))
        jax.tree.map(close, nnx.state(traced), nnx.state(plain))


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "width": lambda lib: lib.LayerNorm(6, rngs=RNGS)(jnp.ones((4, 5))),
    "batch width": lambda lib: lib.BatchNorm(6, rngs=RNGS)(jnp.ones((4, 5))),
    "batch width in eval": lambda lib: lib.BatchNorm(6, use_running_average=True, rngs=RNGS)(jnp.ones((4, 5))),
    "batch width bare": lambda lib: lib.BatchNorm(6, use_scale=False, use_bias=False, rngs=RNGS)(jnp.ones((4, 5))),
    "group width": lambda lib: lib.GroupNorm(6, 3, rngs=RNGS)(jnp.ones((4, 2, 12))),
    "group width bare": lambda lib: lib.GroupNorm(6, 3, use_scale=False, use_bias=False, rngs=RNGS)(jnp.ones((4, 12))),
    "groups": lambda lib: lib.GroupNorm(6, 4, rngs=RNGS),
    "both groups": lambda lib: lib.GroupNorm(6, 3, 2, rngs=RNGS),
    "no groups": lambda lib: lib.GroupNorm(6, None, rngs=RNGS),
    "group size": lambda lib: lib.GroupNorm(6, None, 4, rngs=RNGS),
    "default groups": lambda lib: lib.GroupNorm(6, rngs=RNGS),
    "half a group": lambda lib: lib.GroupNorm(6, 1.5, rngs=RNGS),
    "batch as channels": lambda lib: lib.InstanceNorm(5, feature_axes=0, rngs=RNGS)(jnp.ones((4, 5))),
    "axes": lambda lib: lib.LayerNorm(5, reduction_axes=4, rngs=RNGS)(jnp.ones((4, 5))),
    "features": lambda lib: lib.RMSNorm(5, feature_axes=4, rngs=RNGS)(jnp.ones((4, 5))),
    "batch axis": lambda lib: lib.BatchNorm(5, axis=4, rngs=RNGS)(jnp.ones((4, 5))),
    "unsaid": lambda lib: lib.BatchNorm(5, use_running_average=None, rngs=RNGS)(jnp.ones((4, 5))),
    "dtype": lambda lib: lib.LayerNorm(5, dtype=jnp.int32, rngs=RNGS)(jnp.ones((4, 5))),
    "batch dtype": lambda lib: lib.BatchNorm(5, dtype=jnp.int32, rngs=RNGS)(jnp.ones((4, 5))),
    "axis name": lambda lib: lib.LayerNorm(5, axis_name="unbound", rngs=RNGS)(jnp.ones((4, 5))),
    "no rngs": lambda lib: lib.LayerNorm(5),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_those_of_flax(error):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        as_flax(ERRORS[error])(nnx)
    with pytest.raises(theirs.type):
        ERRORS[error](jnnx)


def test_messages_show_the_line_to_write():
    x = jnp.ones((2, 4))
    for name in ("scale", "bias"):
        with pytest.raises(ValueError, match=rf"LayerNorm: {name}= .* Write LayerNorm\(\.\.\., use_{name}=False\)"):
            jnnx.LayerNorm(4, rngs=RNGS)(x, **{name: jnp.ones(4)})
    with pytest.raises(ValueError, match="Write num_groups=None, group_size=2"):
        jnnx.GroupNorm(4, group_size=2, rngs=RNGS)
    with pytest.raises(TypeError, match=r"LayerNorm: the layer's scale of shape \(6,\) does not fit the \(4,\)"):
        jnnx.LayerNorm(6, rngs=RNGS)(x)


PLANES = np.ones((2, 12, 5, 4), np.float32)
HABITS = [
    (lambda: jnnx.LayerNorm(12), r"LayerNorm: rngs missing\. Write LayerNorm\(12, rngs=nnx\.Rngs\(0\)\)"),
    (lambda: jnnx.LayerNorm(PLANES, rngs=RNGS), r"LayerNorm: num_features is static and cannot be an array float32\[2, 12, 5, 4\]"),
    (lambda: jnnx.LayerNorm(12.0, rngs=RNGS), r"LayerNorm: num_features must be an int >= 0, or several; got 12\.0\. Write"),
    (lambda: jnnx.GroupNorm((12,), rngs=RNGS), r"GroupNorm: num_features must be an int, got \(12,\)\. Write"),
    (lambda: jnnx.LayerNorm(normalized_shape=12, rngs=RNGS), r"no argument normalized_shape\. Write num_features=12\."),
    (lambda: jnnx.BatchNorm(12, eps=1e-5, rngs=RNGS), r"BatchNorm: there is no argument eps\. Write epsilon=1e-05\."),
    (lambda: jnnx.BatchNorm(12, rngs=RNGS)(PLANES, train=True), r"no argument train\. Write use_running_average=False\."),
    (lambda: jnnx.BatchNorm(12, rngs=RNGS)(PLANES), r"BatchNorm: .* does not fit the \(4,\) .* Write BatchNorm\(\.\.\., axis=1\), where x has 12"),
    (lambda: jnnx.GroupNorm(12, 4, rngs=RNGS)(PLANES), r"GroupNorm: .* Write GroupNorm\(\.\.\., axis=1\), where x has 12"),
    (lambda: jnnx.LayerNorm(12, rngs=RNGS)(PLANES), r"Write LayerNorm\(\.\.\., reduction_axes=1, feature_axes=1\), where x has 12"),
    (lambda: jnnx.LayerNorm(4, rngs=RNGS)(PLANES, PLANES - 1.5), r"layer_norm: mask must be .* Write mask=mask == 0"),
    (lambda: jnnx.RMSNorm(4, use_scale=False, rngs=RNGS)(PLANES, scale=4), r"RMSNorm: scale must be an array or None, got 4\."),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), HABITS, ids=[m[:50] for _, m in HABITS])
def test_habits(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert len(str(caught.value)) < 320


def test_numpy_s_numbers_are_python_s():
    """In graph definitions too, so that they share a trace."""
    for spell in (np.asarray, lambda v: np.asarray(v)[()]):
        made = jnnx.GroupNorm(spell(8), spell(2), axis=spell(1), use_bias=spell(False), rngs=nnx.Rngs(0))
        want = jnnx.GroupNorm(8, 2, axis=1, use_bias=False, rngs=nnx.Rngs(0))
        assert nnx.graphdef(made) == nnx.graphdef(want)
        assert repr(nnx.graphdef(made)) == repr(nnx.graphdef(want))
        made = jnnx.BatchNorm(spell((6, 8)), axis=spell((1, 2)), virtual_batch_size=spell(2), rngs=nnx.Rngs(0))
        assert made.num_features == (6, 8)
        assert made.mean.shape == (6, 8)
        assert made(np.ones((4, 6, 8), np.float32)).shape == (4, 6, 8)


@pytest.mark.parametrize("norm", NAMES)
def test_8_bit_floats_with_a_dtype(norm):
    x = randn(3, 4, 6).astype(jnp.float8_e5m2)
    y = run(plain(norm, dtype=jnp.bfloat16), x, {})
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, run(plain(norm, dtype=jnp.bfloat16), x.astype(jnp.float32), {}))
    with pytest.raises(ValueError, match=f"{norm}: float32 and float8_e5m2 have no common dtype"):
        plain(norm)(x)


# --- what jaxnorm adds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NAMES)
def test_scale_offset_and_parameters_per_sample(norm):
    x, scale, bias = randn(3, 4, 6), randn(3, 1, 6, seed=1), randn(3, 1, 6, seed=2)
    bare = plain(norm, use_scale=False, use_bias=False, implementation="xla")
    y = run(bare, x, {})
    assert not nnx.state(bare, nnx.Param)
    offset = plain(norm, scale_offset=1.0, use_bias=False)
    np.testing.assert_array_equal(offset.scale[...], 0)
    close(run(offset, x, {}), y)
    close(run(bare, x, dict(scale=scale, bias=bias)), y * scale + bias)


def test_features_in_a_tuple():
    x = randn(4, 3, 5)
    layer = jnnx.LayerNorm((3, 5), reduction_axes=(1, 2), feature_axes=(1, 2), rngs=RNGS)
    assert layer.scale.shape == (3, 5)
    close(run(layer, x, {}), jn.layer_norm(x, axis=(1, 2)))
    batch = jnnx.BatchNorm((3, 5), axis=(1, 2), momentum=0.0, rngs=RNGS)
    run(batch, x, {})
    close(batch.mean[...], x.mean(0))
    flat = jnnx.BatchNorm(15, axis=(1, 2), momentum=0.0, rngs=RNGS)
    run(flat, x, {})
    close(flat.mean[...], x.mean(0).reshape(15))


def test_rms_bias_and_cast():
    x = randn(64, 16).astype(jnp.bfloat16)
    layer = jnnx.RMSNorm(16, use_bias=True, bias_init=nnx.initializers.constant(3.0), rngs=RNGS)
    close(layer(x), jn.rms_norm(x, dtype=jnp.float32) + 3)
    options = dict(scale_init=by_key, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    early = jnnx.RMSNorm(16, cast="before_scale", **options)
    np.testing.assert_array_equal(early(x), jn.rms_norm(x, early.scale[...], cast="before_scale"))


def test_channels_anywhere():
    x = randn(2, 8, 3, 5)
    moved = jnp.moveaxis(x, 1, -1)
    for ours, last in (
        (jnnx.GroupNorm(8, 4, axis=1, rngs=RNGS), jnnx.GroupNorm(8, 4, rngs=RNGS)),
        (jnnx.InstanceNorm(8, axis=1, rngs=RNGS), jnnx.InstanceNorm(8, rngs=RNGS)),
    ):
        close(jnp.moveaxis(run(ours, x, {}), 1, -1), run(last, moved, {}))


def test_options_of_batch_norm():
    x = randn(6, 3) + 2
    layer = jnnx.BatchNorm(3, momentum=None, rngs=RNGS)
    assert isinstance(layer.count, nnx.BatchStat)
    run(layer, x[:2], {}), run(layer, x[2:], {})
    close(layer.mean[...], x.mean(0)), close(layer.var[...], x.var(0)), close(layer.count[...], 6 * np.ones(3))
    layer = jnnx.BatchNorm(3, zero_debias=True, unbiased_running_var=True, rngs=RNGS)
    run(layer, x, {}), run(layer, x, {})
    close(layer.mean[...], x.mean(0)), close(layer.var[...], x.var(0, ddof=1)), close(layer.count[...], 2 * np.ones(3))
    layer = jnnx.BatchNorm(3, momentum=0.0, skip_nonfinite=True, min_count=3, rngs=RNGS)
    run(layer, x[:2], {})
    np.testing.assert_array_equal(layer.mean[...], 0)
    run(layer, x.at[0, 0].set(jnp.nan), {})
    close(layer.mean[...], x.mean(0).at[0].set(0))
    layer = jnnx.BatchNorm(3, momentum=0.0, virtual_batch_size=2, rngs=RNGS)
    y = run(layer, x, {})
    close(y[:2], run(jnnx.BatchNorm(3, rngs=RNGS), x[:2], {}))
    close(layer.mean[...], x.mean(0))
    layer = jnnx.BatchNorm(3, momentum=0.0, rngs=RNGS)
    layer(x, update_stats=False)
    np.testing.assert_array_equal(layer.mean[...], 0)
    run(layer, x, {"weights": jnp.array([1.0, 2, 0, 0, 0, 0])})
    close(layer.mean[...], (x[0] + 2 * x[1]) / 3)
    assert layer.count is None


def test_metadata():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        layer = jnnx.LayerNorm(
            4, scale_metadata={"out_sharding": ("model",)}, bias_metadata={"note": "b"}, rngs=nnx.Rngs(0)
        )
    assert layer.bias.note == "b"
    assert layer.scale[...].sharding.spec == P("model")
    rms = jnnx.RMSNorm(4, scale_metadata={"note": "s"}, rngs=RNGS)
    assert rms.scale.note == "s"


# --- models, transforms, devices --------------------------------------------------------------------------------------


class ResNet(nnx.Module):
    def __init__(self, norms, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm1 = norms.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = norms.GroupNorm(4, 2, rngs=rngs)
        self.norm3 = norms.InstanceNorm(4, rngs=rngs)

    def __call__(self, x):
        x = self.conv1(x)
        return self.norm3(x + self.norm2(self.conv2(nnx.relu(self.norm1(x))))).mean((1, 2)) + x.mean((1, 2))


class Transformer(nnx.Module):
    def __init__(self, norms, rngs):
        self.norm1 = norms.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm2 = norms.RMSNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + nnx.gelu(self.dense(self.norm2(x)))


@pytest.mark.parametrize(("model", "shape"), [(ResNet, (4, 5, 5, 3)), (Transformer, (2, 5, 8))])
def test_checkpoints_go_both_ways(model, shape, tmp_path):
    x = randn(*shape)
    ours, theirs = (as_flax(model)(lib, nnx.Rngs(0)) for lib in (jnnx, nnx))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))
    rng = np.random.default_rng(4)
    saved = nnx.to_pure_dict(nnx.state(ours))
    saved = jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.1, 0.6, a.shape), a.dtype) if a.dtype == jnp.float32 else a, saved
    )

    @nnx.jit
    def step(model, x):
        loss, grads = nnx.value_and_grad(lambda model: jnp.sin(model(x)).sum())(model)
        return loss, nnx.to_pure_dict(grads)

    results = []
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", saved)
        checkpointer.wait_until_finished()
        for m in (ours, theirs):
            state = nnx.state(m)
            nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state)))
            nnx.update(m, state)
            results.append((as_flax(step)(m, x), nnx.to_pure_dict(nnx.state(m))))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-3, atol=5e-4), *results)


@pytest.mark.versions
def test_split_merge_clone_and_grad():
    x = randn(6, 4)
    layer = jnnx.BatchNorm(4, rngs=RNGS)
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
    assert hash(graph) == hash(nnx.graphdef(nnx.clone(layer)))
    merged = nnx.merge(graph, params, stats)
    np.testing.assert_array_equal(merged(x), layer(x))
    grads = nnx.grad(lambda m: (m(x) * x).sum())(merged)
    close(grads["bias"][...], x.sum(0))
    assert set(grads) == {"scale", "bias"}


def test_scan_and_vmap_over_layers():
    x = randn(6, 4)

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = jnnx.BatchNorm(4, rngs=rngs, axis_index_groups=None)
            self.layer = jnnx.LayerNorm(4, rngs=rngs, scale_init=by_key)

        def __call__(self, x):
            return self.layer(self.norm(x))

    make_blocks = nnx.vmap(Block, in_axes=0)
    blocks = make_blocks(nnx.Rngs(0).split(3))
    assert blocks.norm.mean.shape == (3, 4)
    forward = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    y = nnx.jit(forward)(x, blocks)
    want = x
    graph, state = nnx.split(make_blocks(nnx.Rngs(0).split(3)))
    for i in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
        want = run(block, want, {})
        close(blocks.norm.mean[...][i], block.norm.mean[...])
    close(y, want)
    outputs = nnx.jit(nnx.vmap(lambda block, x: block(x), in_axes=(0, None)))(blocks, x)
    assert outputs.shape == (3, 6, 4)


def alone(x, mask, g):
    layer = jnnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    y, dx, grads = gradients(layer, x, g, mask, True)
    return layer, y, dx, grads


def test_pmap_and_shard_map_equal_one_device():
    x, g = 2 * randn(16, 3, 4) + 1, randn(16, 3, 4, seed=1)
    mask = jnp.asarray((np.arange(16)[:, None] % 5 < np.array([3, 1, 2])) & (np.arange(16) >= 2)[:, None])[..., None]
    one, y, dx, grads = alone(x, mask, g)

    def loss(layer, x, mask, g):
        y = layer(x, mask=mask)
        return (y * g).sum(), y

    wrt = dict(argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)
    layer = jnnx.BatchNorm(4, momentum=0.5, axis_name="data", rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    forward = nnx.shard_map(lambda layer, x, mask: layer(x, mask=mask), mesh=mesh, **specs)

    def total(layer, x):
        y = forward(layer, x, mask)
        return (y * g).sum(), y

    (_, y2), (dp2, dx2) = nnx.jit(nnx.value_and_grad(total, **wrt))(layer, x)
    close(y2, y), close(dx2, dx)
    jax.tree.map(close, nnx.to_pure_dict(dp2), grads)
    jax.tree.map(close, nnx.state(layer), nnx.state(one))

    layer = jnnx.BatchNorm(4, momentum=0.5, axis_name="data", rngs=nnx.Rngs(0))
    each = lambda a: a.reshape(8, 2, *a.shape[1:])
    state_axes = nnx.StateAxes({...: None})

    @functools.partial(nnx.pmap, axis_name="data", in_axes=(state_axes, 0, 0, 0))
    def device(layer, x, mask, g):
        (_, y), (dp, dx) = nnx.value_and_grad(loss, **wrt)(layer, x, mask, g)
        return y, dx, jax.lax.psum(nnx.to_pure_dict(dp), "data")

    y2, dx2, dp2 = device(layer, each(x), each(mask), each(g))
    close(y2.reshape(x.shape), y), close(dx2.reshape(x.shape), dx)
    jax.tree.map(lambda a, b: close(a[0], b), dp2, grads)
    jax.tree.map(close, nnx.state(layer), nnx.state(one))

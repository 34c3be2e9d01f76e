"""`jaxnorm.linen` against `flax.linen`: the same variables, outputs, gradients and errors, and what jaxnorm adds."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from helpers.flax_rules import DTYPES, as_flax, assert_one_rounding, by_key, randn
from helpers.jit import jit_unoptimized
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn

KEY = jax.random.key(0)
STATS = ["batch_stats"]
NAMES = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]


def init(layer, x, **call):
    """The output while initializing, and the variables; compiled, which is quicker than op by op."""
    static = {name: value for name, value in call.items() if isinstance(value, bool)}
    call = {name: value for name, value in call.items() if name not in static}
    return jit_unoptimized(lambda x, call: layer.init_with_output(KEY, x, **call, **static))(x, call)


def apply(layer, variables, x, **call):
    static = {name: value for name, value in call.items() if isinstance(value, bool)}
    call = {name: value for name, value in call.items() if name not in static}
    return jit_unoptimized(lambda v, x, call: layer.apply(v, x, mutable=STATS, **call, **static))(variables, x, call)


@dataclass(frozen=True)
class Case:
    name: str
    norm: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    mask: tuple[int, ...] | None = None
    call: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return self.name

    def layer(self, library, **more):
        given = {"bias_init": by_key, **self.options, **more}
        if self.norm == "RMSNorm":
            given.pop("bias_init")
        return getattr(library, self.norm)(scale_init=by_key, **given)

    def data(self, dtype=jnp.float32):
        rng = np.random.default_rng(list(self.name.encode()))
        x = jnp.asarray(rng.normal(1.0, 2.0, self.shape), dtype)
        mask = None
        if self.mask is not None:
            mask = rng.random(self.mask) < 0.7
            mask[(..., *(slice(2) for _ in range(min(mask.ndim, 2))))] = True
        return x, dict(self.call) if mask is None else {**self.call, "mask": jnp.asarray(mask)}


TRAIN, EVAL = dict(use_running_average=False), dict(use_running_average=True)
PLAIN = [
    Case("layer", "LayerNorm", (4, 3, 8)),
    Case("rms", "RMSNorm", (4, 3, 8)),
    Case("group", "GroupNorm", (2, 3, 2, 8), dict(num_groups=2)),
    Case("instance", "InstanceNorm", (2, 3, 4, 5)),
    Case("batch", "BatchNorm", (4, 3, 5), call=TRAIN),
]
CASES = [
    *PLAIN,
    Case("layer masked", "LayerNorm", (4, 3, 8), mask=(4, 3, 8)),
    Case("layer last two", "LayerNorm", (4, 3, 8), dict(reduction_axes=(-2, -1), feature_axes=[-1, 1]), mask=(4, 3, 1)),
    Case("layer other features", "LayerNorm", (4, 3, 8), dict(reduction_axes=(1, 2, -1), feature_axes=-1)),
    Case("layer features not reduced", "LayerNorm", (4, 3, 8), dict(reduction_axes=-1, feature_axes=(1,))),
    Case("layer first axis", "LayerNorm", (5, 3), dict(reduction_axes=0, feature_axes=0, epsilon=1e-3)),
    Case("layer bare", "LayerNorm", (4, 8), dict(use_scale=False, use_bias=False)),
    Case("layer no bias", "LayerNorm", (4, 8), dict(use_bias=False, use_fast_variance=False)),
    Case("layer no scale", "LayerNorm", (4, 8), dict(use_scale=False)),
    Case("rms masked", "RMSNorm", (4, 3, 8), dict(reduction_axes=(1, 2), feature_axes=-1), mask=(3, 8)),
    Case("rms bare", "RMSNorm", (4, 8), dict(use_scale=False)),
    Case("group masked", "GroupNorm", (2, 3, 4, 8), dict(num_groups=4), mask=(2, 3, 4, 8)),
    Case("group size", "GroupNorm", (2, 3, 8), dict(num_groups=None, group_size=4)),
    Case("group by position", "GroupNorm", (2, 3, 8), dict(num_groups=2, reduction_axes=-1)),
    Case("group unbatched", "GroupNorm", (3, 2, 2, 8), dict(num_groups=2, reduction_axes=(-3, -2, -1))),
    Case("group of one example", "GroupNorm", (8,), dict(num_groups=2)),
    Case("group default", "GroupNorm", (3, 64), dict(use_bias=False)),
    Case("instance masked", "InstanceNorm", (2, 6, 5), mask=(2, 6, 1)),
    Case("instance features", "InstanceNorm", (2, 6, 3, 5), dict(feature_axes=(1, 3))),
    Case("batch masked", "BatchNorm", (4, 3, 5), mask=(4, 3, 1), call=TRAIN),
    Case("batch eval", "BatchNorm", (4, 3, 5), mask=(4, 3, 1), call=EVAL),
    Case("batch channels first", "BatchNorm", (4, 5, 3), dict(axis=1, momentum=0.5, use_running_average=False)),
    Case("batch two axes", "BatchNorm", (6, 3, 2, 5), dict(axis=(-1, 1)), call=TRAIN),
    Case("batch bare", "BatchNorm", (6, 5), dict(use_scale=False, use_bias=False, epsilon=1e-2), call=TRAIN),
]
HALF = [(jnp.bfloat16, None, jnp.float32), (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float16, None, jnp.float16), (jnp.float32, jnp.float16, jnp.bfloat16)]  # fmt: skip


def both(case, x, **more):
    """Variables, made by Flax, and Flax's layer and ours."""
    ours, theirs = case.layer(jnn, **more), case.layer(nn, **more)
    shapes = jax.eval_shape(lambda: as_flax(theirs.init)(KEY, x, **case.call))
    rng = np.random.default_rng(3)
    return ours, theirs, jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2.0, a.shape), a.dtype), shapes)


def gradients(layer, variables, x, g, **call):
    """The output, and the cotangents of x and params for that of y."""

    @jit_unoptimized
    def run(params, x, rest, g):
        y, vjp, new = jax.vjp(
            lambda params, x: layer.apply({**rest, "params": params}, x, mutable=STATS, **call), params, x, has_aux=True
        )
        return y, vjp(g.astype(y.dtype)), new

    rest = {k: v for k, v in variables.items() if k != "params"}
    return run(variables.get("params", {}), x, rest, g)


def truth_of(case, variables, x, g, **call):
    """Flax's own layer in float64, by its two-pass formula."""
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a).astype(np.float64), tree)
    with jax.enable_x64(True):
        layer = case.layer(nn, dtype=jnp.float64, param_dtype=jnp.float64, use_fast_variance=False)
        return wide(as_flax(gradients)(layer, wide(variables), wide(x), wide(g), **call))


def assert_equal_to_flax(case, x_dtype, *, compare_errors: bool, **more):
    x, call = case.data(x_dtype)
    ours, theirs, variables = both(case, x, **more)
    g = jnp.asarray(np.random.default_rng(5).normal(size=x.shape), jnp.float16).astype(jnp.float32)
    g = g.astype(jnp.bfloat16).astype(jnp.float32)  # exact in every dtype
    got = gradients(ours, variables, x, g, **call)
    truth = truth_of(case, variables, x, g, **call)
    assert jax.tree.structure(got) == jax.tree.structure(truth)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, truth)
    jax.tree.map(assert_one_rounding, got, truth)
    if compare_errors:
        want = as_flax(gradients)(theirs, variables, x, g, **call)
        assert DTYPES(got) == DTYPES(want)
        jax.tree.map(assert_one_rounding, got, truth, want)


@pytest.mark.versions
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_flax_in_float32(case):
    assert_equal_to_flax(case, jnp.float32, compare_errors=False)


@pytest.mark.parametrize("dtypes", HALF, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_rounds_once_in_half_precision(case, dtypes):
    x_dtype, dtype, param_dtype = dtypes
    assert_equal_to_flax(case, x_dtype, dtype=dtype, param_dtype=param_dtype, compare_errors=True)


@pytest.mark.versions
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variables_are_those_of_flax(case):
    x, call = case.data()
    for more in ({}, dict(param_dtype=jnp.bfloat16), dict(param_dtype=jnp.float16, force_float32_reductions=False)):
        shapes = lambda lib, more=more: jax.eval_shape(lambda: case.layer(lib, **more).init_with_output(KEY, x, **call))
        assert shapes(jnn) == as_flax(shapes)(nn)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_initial_values_are_those_of_flax(case):
    """Keys are drawn in Flax's order."""
    x, call = case.data()
    init = lambda lib: jit_unoptimized(lambda x: case.layer(lib).init_with_output(KEY, x, **call))(x)
    (y, ours), (z, theirs) = init(jnn), as_flax(init)(nn)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_allclose(y, z, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("norm", NAMES)
def test_dtypes_of_outputs_and_variables(norm):
    for x_dtype in [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64]:
        for dtype in [None, jnp.complex64 if x_dtype == jnp.complex64 else jnp.float16]:
            for param_dtype in [jnp.float32, jnp.bfloat16]:
                for use in (True, False):
                    options: dict = dict(dtype=dtype, param_dtype=param_dtype, use_scale=use)
                    options |= dict(num_groups=2) if norm == "GroupNorm" else {}
                    options |= {} if norm == "RMSNorm" else dict(use_bias=use)
                    call = TRAIN if norm == "BatchNorm" else {}
                    x = jax.ShapeDtypeStruct((3, 2, 4), x_dtype)
                    shapes = lambda lib, x=x, o=options, call=call: jax.eval_shape(
                        lambda x: getattr(lib, norm)(**o).init_with_output(KEY, x, **call), x
                    )
                    assert shapes(jnn) == as_flax(shapes)(nn), options


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_stats_over_ten_steps(dtype):
    ours, theirs = jnn.BatchNorm(momentum=0.8), nn.BatchNorm(momentum=0.8, use_fast_variance=False)
    x = randn(10, 6, 5).astype(dtype) * jnp.asarray(3, dtype)
    a = b = init(ours, x[0], **TRAIN)[1]
    step = jit_unoptimized(lambda layer, v, x: layer.apply(v, x, mutable=STATS, **TRAIN)[1], static_argnums=0)
    for part in x:
        a = {**a, **step(ours, a, part)}
        b = {**b, **as_flax(step)(theirs, b, part)}
    assert DTYPES(a) == DTYPES(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)


def test_batch_stats_keep_their_dtype():
    layer = jnn.BatchNorm(param_dtype=jnp.bfloat16, force_float32_reductions=False)
    x = jnp.ones((4, 3), jnp.float32)
    variables = init(layer, x, **TRAIN)[1]
    _, new = apply(layer, variables, x, **TRAIN)
    assert {a.dtype for a in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}


def test_complex_as_flax():
    x = jax.lax.complex(randn(6, 4), randn(6, 4, seed=1))
    for norm in ("LayerNorm", "RMSNorm"):
        y, variables = init(getattr(jnn, norm)(), x)
        np.testing.assert_allclose(y, as_flax(getattr(nn, norm)().apply)(variables, x), atol=1e-5)
    variables = init(jnn.BatchNorm(), x, **TRAIN)[1]
    got = apply(jnn.BatchNorm(), variables, x, **TRAIN)
    want = as_flax(nn.BatchNorm().apply)(variables, x, mutable=STATS, **TRAIN)
    assert DTYPES(got) == DTYPES(want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)
    y = jnn.BatchNorm().apply({**variables, **got[1]}, x, **EVAL)
    np.testing.assert_allclose(y, as_flax(nn.BatchNorm().apply)({**variables, **got[1]}, x, **EVAL), atol=1e-5)
    assert jnn.BatchNorm().apply(variables, x, **EVAL).dtype == jnp.complex64


# --- initialization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NAMES)
def test_init_touches_no_axis_name(norm):
    call = TRAIN if norm == "BatchNorm" else {}
    options = dict(num_groups=2) if norm == "GroupNorm" else {}
    layer = getattr(jnn, norm)(axis_name="unbound", axis_index_groups=[[0, 1], [2, 3]], **options)
    variables = layer.init(KEY, jnp.ones((3, 2, 4)), **call)
    with pytest.raises(NameError, match="axis_name='unbound' is not bound here"):
        layer.apply(variables, jnp.ones((3, 2, 4)), mutable=STATS, **call)
    if norm == "BatchNorm":
        assert layer.apply(variables, jnp.ones((3, 2, 4)), **EVAL).shape == (3, 2, 4)


def test_init_updates_nothing_and_normalizes_by_the_batch():
    x = randn(5, 3) + 7
    y, variables = init(jnn.BatchNorm(momentum=0.0), x, **TRAIN)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


@pytest.mark.parametrize("norm", ["BatchNorm", "GroupNorm", "InstanceNorm"])
def test_one_element_is_no_matter_at_init_and_a_warning_afterwards(norm):
    call = TRAIN if norm == "BatchNorm" else {}
    layer = getattr(jnn, norm)(**(dict(num_groups=4) if norm == "GroupNorm" else {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        variables = layer.init(KEY, jnp.ones((1, 4)), **call)
    assert not caught
    with pytest.warns(UserWarning, match="one element per"):
        layer.apply(variables, jnp.ones((1, 4)), mutable=STATS, **call)


def test_partitioned_parameters():
    init = nn.with_partitioning(nn.initializers.ones, ("model",))
    boxed = jnn.LayerNorm(scale_init=init).init(KEY, jnp.ones((2, 4)))
    assert boxed["params"]["scale"].names == ("model",)
    assert nn.get_partition_spec(boxed)["params"]["scale"] == P("model")
    assert jnn.LayerNorm(scale_init=init).apply(boxed, jnp.ones((2, 4))).shape == (2, 4)


# --- errors -----------------------------------------------------------------------------------------------------------


def bn(library, x=(4, 5), variables=None, mutable=False, call=TRAIN, **options):
    def run():
        layer = library.BatchNorm(**options)
        made = nn.BatchNorm().init(KEY, jnp.ones((4, 5)), **TRAIN) if variables is None else variables
        return layer.apply(made, jnp.ones(x), mutable=mutable, **call)

    return run


ERRORS = {
    "immutable": lambda lib: bn(lib),
    "no stats": lambda lib: bn(lib, variables={"params": {"scale": jnp.ones(5), "bias": jnp.ones(5)}}, call=EVAL),
    "width": lambda lib: bn(lib, x=(4, 6), mutable=STATS),
    "width in eval": lambda lib: bn(lib, x=(4, 6), call=EVAL),
    "width bare": lambda lib: bn(lib, x=(4, 6), call=EVAL, use_scale=False, use_bias=False),
    "unsaid": lambda lib: bn(lib, call={}),
    "said twice": lambda lib: bn(lib, use_running_average=True, call=EVAL),
    "batch axis": lambda lib: bn(lib, axis=4, call=EVAL),
    "integer dtype": lambda lib: bn(lib, dtype=jnp.int32, call=EVAL),
    "no params": lambda lib: lambda: lib.LayerNorm().apply({}, jnp.ones((4, 5))),
    "param width": lambda lib: lambda: lib.LayerNorm().apply(nn.LayerNorm().init(KEY, jnp.ones(6)), jnp.ones((4, 5))),
    "layer axes": lambda lib: lambda: lib.LayerNorm(reduction_axes=4).init(KEY, jnp.ones((4, 5))),
    "layer features": lambda lib: lambda: lib.LayerNorm(feature_axes=(-1, -5)).init(KEY, jnp.ones((4, 5))),
    "layer dtype": lambda lib: lambda: lib.LayerNorm(dtype=jnp.int32).init(KEY, jnp.ones((4, 5))),
    "mask": lambda lib: lambda: lib.LayerNorm().init(KEY, jnp.ones((4, 5)), mask=jnp.ones((3, 5), bool)),
    "batch as channels": lambda lib: lambda: lib.InstanceNorm(feature_axes=0).init(KEY, jnp.ones((4, 5))),
    "instance axes": lambda lib: lambda: lib.InstanceNorm(feature_axes=3).init(KEY, jnp.ones((4, 5))),
    **{
        f"groups {options}": lambda lib, options=options: lambda: lib.GroupNorm(**options).init(KEY, jnp.ones((4, 6)))
        for options in (
            {}, dict(num_groups=4), dict(num_groups=0), dict(num_groups=-2), dict(group_size=2), dict(num_groups=None),
            dict(num_groups=None, group_size=4), dict(num_groups=2, reduction_axes=0),
            dict(num_groups=2, reduction_axes=(7, -1)),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_those_of_flax(error):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        as_flax(ERRORS[error](nn))()
    with pytest.raises(theirs.type):
        ERRORS[error](jnn)()


def test_messages_show_the_line_to_write():
    x = jnp.ones((2, 4))
    for name in ("scale", "bias"):
        with pytest.raises(ValueError, match=rf"LayerNorm: {name}= .* Write LayerNorm\(\.\.\., use_{name}=False\)"):
            jnn.LayerNorm().init(KEY, x, **{name: jnp.ones(4)})
    with pytest.raises(ValueError, match="Write num_groups=None, group_size=2"):
        jnn.GroupNorm(group_size=2).init(KEY, x)
    with pytest.raises(ValueError, match="Write axis=1 alone"):
        jnn.InstanceNorm(axis=1, feature_axes=0).init(KEY, x)
    with pytest.raises(IndexError, match=r"LayerNorm: reduction_axes=5 is out of range .* Write reduction_axes=-1"):
        jnn.LayerNorm(reduction_axes=5).init(KEY, x)
    with pytest.raises(TypeError, match=r"BatchNorm: the layer's batch_stats of shape \(5,\) does not fit .*\(6,\)"):
        bn(jnn, x=(4, 6), call=EVAL)()
    with pytest.raises(ValueError, match="is not a backend of this build"):
        jnn.RMSNorm(implementation="attic").init(KEY, x)


PLANES = jnp.ones((2, 12, 5, 4))
HABITS = [
    (lambda: jnn.LayerNorm(64).init(KEY, PLANES), r"LayerNorm: epsilon=64 looks like a number of features.* Write LayerNorm\(\)"),
    (lambda: jnn.InstanceNorm(64).init(KEY, PLANES), r"InstanceNorm: epsilon=64 looks like .* Write InstanceNorm\(\)"),
    (lambda: jnn.BatchNorm(64).init(KEY, PLANES), r"BatchNorm: use_running_average must be a bool, got 64\. Write use_running_average=not train"),
    (lambda: jnn.GroupNorm(4, 12).init(KEY, PLANES), r"got num_groups=4 and group_size=12\. .* or num_groups=4 alone"),
    (lambda: jnn.GroupNorm(6).init(KEY, PLANES), r"num_groups=6 does not divide the 4 channels.* or axis=1, where x .* has 12"),
    (lambda: jnn.LayerNorm(eps=1e-5), r"LayerNorm: there is no argument eps\. Write epsilon=1e-05\."),
    (lambda: jnn.BatchNorm(num_features=12), r"BatchNorm: there is no argument num_features\. Sizes are read off x"),
    (lambda: jnn.BatchNorm(True, affine=False), r"no argument affine\. Write use_scale=False, use_bias=False"),
    (lambda: jnn.BatchNorm(track_running_stats=False), r"Write use_running_average=False, update_stats=False at the call"),
    (lambda: jnn.LayerNorm(axis=1), r"no argument axis\. Write reduction_axes=1, feature_axes=1\."),
    (lambda: jnn.BatchNorm().init(KEY, PLANES, train=True), r"BatchNorm: there is no argument train\. Write use_running_average=False\."),
    (lambda: jnn.LayerNorm().init(KEY, PLANES, epsilon=0.1), r"no argument epsilon\. It is the layer's own\. Write LayerNorm\(epsilon=0\.1\)"),
    (lambda: jnn.LayerNorm(use_scale=False).init(KEY, PLANES, scale=(4,)), r"LayerNorm: scale must be .* got \(4,\)\. .* Write scale=jnp\.asarray\(scale\)"),
    (lambda: jnn.LayerNorm().init(KEY, PLANES, mask=-jnp.ones((2, 12, 5, 1))), r"layer_norm: mask must be .* Write mask=mask == 0"),
    (lambda: jnn.LayerNorm(dtype=PLANES).init(KEY, PLANES), r"LayerNorm: dtype is static and cannot be an array float32\[2, 12, 5, 4\]\. Write dtype=None"),
    (lambda: jnn.RMSNorm(use_scale=np.ones(3)), r"RMSNorm: use_scale is static and cannot be an array float64\[3\]\. Write use_scale=True"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), HABITS, ids=[m[:50] for _, m in HABITS])
def test_habits(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert len(str(caught.value)) < 320


def test_numpy_s_numbers_are_python_s():
    x = randn(4, 6, 8)
    for spell in (np.asarray, lambda v: np.asarray(v)[()]):
        layer = jnn.GroupNorm(spell(2), axis=spell(1), reduction_axes=spell((1, 2)), use_bias=spell(False))
        want = jnn.GroupNorm(2, axis=1, reduction_axes=(1, 2), use_bias=False).init_with_output(KEY, x)
        jax.tree.map(np.testing.assert_array_equal, layer.init_with_output(KEY, x), want)
        layer = jnn.BatchNorm(spell(False), axis=spell(2), virtual_batch_size=spell(2))
        want = jnn.BatchNorm(False, axis=2, virtual_batch_size=2).init_with_output(KEY, x)
        jax.tree.map(np.testing.assert_array_equal, layer.init_with_output(KEY, x), want)


@pytest.mark.parametrize("norm", NAMES)
def test_8_bit_floats_with_a_dtype(norm):
    """As of the same numbers in float32, which Flax's own layers cannot do. Without a dtype they promote to nothing."""
    x, dtype = randn(3, 4, 6).astype(jnp.float8_e4m3fn), jnp.bfloat16
    call = TRAIN if norm == "BatchNorm" else {}
    options = dict(num_groups=2) if norm == "GroupNorm" else {}
    layer = getattr(jnn, norm)(**options, dtype=dtype)
    y, variables = init(layer, x, **call)
    assert y.dtype == dtype
    want = init(layer, x.astype(jnp.float32), **call)
    jax.tree.map(np.testing.assert_array_equal, (y, variables), want)
    narrow = getattr(jnn, norm)(**options, dtype=x.dtype).apply(variables, x, mutable=STATS, **call)[0]
    assert narrow.dtype == x.dtype
    np.testing.assert_allclose(narrow.astype(jnp.float32), y.astype(jnp.float32), rtol=2**-4 + 2**-8, atol=2**-9)
    with pytest.raises(ValueError, match=rf"{norm}: float32 and float8_e4m3fn have no common .* Write {norm}\(\.\.\., dtype="):
        getattr(jnn, norm)(**options).init(KEY, x, **call)


# --- what jaxnorm adds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NAMES)
def test_scale_offset(norm):
    x = randn(3, 4, 6)
    call = TRAIN if norm == "BatchNorm" else {}
    options = dict(num_groups=2) if norm == "GroupNorm" else {}
    plain, _ = init(getattr(jnn, norm)(**options, implementation="xla"), x, **call)
    y, variables = init(getattr(jnn, norm)(**options, scale_offset=1.0), x, **call)
    np.testing.assert_array_equal(variables["params"]["scale"], 0)
    np.testing.assert_allclose(y, plain, rtol=1e-6, atol=1e-7)  # the backends round in another order
    y, variables = getattr(jnn, norm)(**options, scale_offset=1.0, scale_init=nn.initializers.constant(1.0)).init_with_output(
        KEY, x, **call
    )
    np.testing.assert_array_equal(variables["params"]["scale"], 1)
    np.testing.assert_allclose(y, 2 * plain, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("norm", NAMES)
def test_scale_and_bias_per_sample(norm):
    x, scale, bias = randn(3, 4, 6), randn(3, 1, 6, seed=1), randn(3, 1, 6, seed=2)
    call = TRAIN if norm == "BatchNorm" else {}
    options = dict(num_groups=2) if norm == "GroupNorm" else {}
    layer = getattr(jnn, norm)(**options, use_scale=False, use_bias=False)
    plain, variables = init(layer, x, **call)
    assert "params" not in variables
    y, _ = apply(layer, variables, x, scale=scale, bias=bias, **call)
    np.testing.assert_allclose(y, plain * scale + bias, rtol=1e-5, atol=1e-6)
    y, _ = apply(layer, variables, x, scale=scale[0, 0].astype(jnp.bfloat16), **call)
    np.testing.assert_allclose(y, plain * scale[:1].astype(jnp.bfloat16).astype(jnp.float32), rtol=1e-5, atol=1e-6)
    half, _ = apply(layer, variables, x.astype(jnp.bfloat16), scale=scale, **call)
    assert half.dtype == jnp.float32  # Flax's rule, with what was given among the arguments


def test_given_scale_goes_to_the_feature_axes():
    x, scale = randn(5, 3, 4), jnp.arange(1.0, 4.0)
    layer = jnn.LayerNorm(reduction_axes=-1, feature_axes=1, use_scale=False, use_bias=False)
    np.testing.assert_allclose(layer.apply({}, x, scale=scale), layer.apply({}, x) * scale[None, :, None], rtol=1e-6)


def test_rms_bias_and_cast():
    x = randn(64, 16).astype(jnp.bfloat16)
    y, variables = init(jnn.RMSNorm(use_bias=True, bias_init=nn.initializers.constant(3.0)), x)
    plain = jnn.RMSNorm().apply({"params": {"scale": jnp.ones(16)}}, x)
    np.testing.assert_allclose(y, plain + 3, rtol=1e-6)
    variables = {"params": {"scale": randn(16)}}
    early = jnn.RMSNorm(cast="before_scale", dtype=jnp.bfloat16).apply(variables, x)
    late = jnn.RMSNorm(dtype=jnp.bfloat16).apply(variables, x)
    assert 0 < (early != late).mean() < 0.5
    np.testing.assert_array_equal(early, jn.rms_norm(x, variables["params"]["scale"], cast="before_scale"))
    with pytest.raises(ValueError, match="cast"):
        jnn.RMSNorm(cast="never").init(KEY, x)


def test_channels_anywhere():
    x = randn(2, 8, 3, 5)
    moved = jnp.moveaxis(x, 1, -1)
    for ours, last in (
        (jnn.GroupNorm(4, axis=1), jnn.GroupNorm(4)),
        (jnn.InstanceNorm(axis=1), jnn.InstanceNorm()),
        (jnn.BatchNorm(False, axis=1), jnn.BatchNorm(False)),
    ):
        y, variables = init(ours, x)
        assert variables["params"]["scale"].shape == (8,)
        np.testing.assert_allclose(jnp.moveaxis(y, 1, -1), init(last, moved)[0], rtol=1e-5, atol=1e-6)


def test_masks_cover_leading_axes_unless_flax_reads_them_otherwise():
    x, mask = randn(4, 3, 5), jnp.array([True, True, False, True])
    layer = jnn.BatchNorm(False)
    y, _ = init(layer, x, mask=mask)
    np.testing.assert_array_equal(y, init(layer, x, mask=mask[:, None, None])[0])
    square = randn(4, 4)  # here the mask fits both ways, and NumPy's is Flax's
    y, variables = init(jnn.LayerNorm(), square, mask=mask)
    np.testing.assert_allclose(y, as_flax(nn.LayerNorm().apply)(variables, square, mask=mask), atol=1e-5)


def test_masked_out_nan_leaves_no_trace():
    x = jnp.array([[1.0, 2.0], [3.0, 5.0], [np.nan, np.inf]])
    mask = jnp.array([[1], [1], [0]])
    variables = init(jnn.BatchNorm(), x[:2], **TRAIN)[1]
    y, new = apply(jnn.BatchNorm(), variables, x, mask=mask, **TRAIN)
    want, new_want = apply(jnn.BatchNorm(), variables, x[:2], **TRAIN)
    np.testing.assert_allclose(y[:2], want, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), new, new_want)


def run_steps(layer, batches, **call):
    variables = init(layer, batches[0], **TRAIN)[1]
    for x in batches:
        y, new = apply(layer, variables, x, **TRAIN, **call)
        variables = {**variables, **new}
    return y, variables["batch_stats"]


def test_cumulative_statistics():
    batches = [randn(n, 3, seed=n) * n for n in (2, 5, 3)]
    whole = jnp.concatenate(batches)
    _, stats = run_steps(jnn.BatchNorm(momentum=None), batches)
    np.testing.assert_allclose(stats["mean"], whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], whole.var(0), rtol=1e-5)
    np.testing.assert_array_equal(stats["count"], 10.0)
    assert stats["count"].dtype == jnp.float32


def test_zero_debias_and_unbiased_variance():
    x = randn(6, 3) + 2
    _, stats = run_steps(jnn.BatchNorm(momentum=0.9, zero_debias=True, unbiased_running_var=True), [x, x])
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], x.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(stats["count"], 2.0)
    _, stats = run_steps(jnn.BatchNorm(momentum=0.0), [x])
    np.testing.assert_allclose(stats["var"], x.var(0), rtol=1e-5)


def test_frozen():
    x = randn(6, 3) + 2
    for call in (TRAIN, EVAL, {}):
        layer = jnn.BatchNorm(frozen=True)
        y, variables = layer.init_with_output(KEY, x, **call)
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
        again = layer.apply(variables, x, **call)  # and batch_stats need not be mutable
        np.testing.assert_array_equal(y, again)
    with pytest.raises(ValueError, match="use_running_average"):
        jnn.BatchNorm(True, frozen=True).init(KEY, x, **TRAIN)


def test_skip_nonfinite_and_min_count():
    x = jnp.array([[1.0, 2.0], [np.nan, 4.0]])
    _, stats = run_steps(jnn.BatchNorm(momentum=0.0, skip_nonfinite=True), [x])
    np.testing.assert_array_equal(stats["mean"], [0.0, 3.0])
    _, stats = run_steps(jnn.BatchNorm(momentum=0.0, min_count=3), [jnp.ones((2, 2))])
    np.testing.assert_array_equal(stats["mean"], 0.0)
    _, stats = run_steps(jnn.BatchNorm(momentum=0.0, min_count=3), [jnp.ones((3, 2))])
    np.testing.assert_array_equal(stats["mean"], 1.0)


def test_ghost_batches():
    x = randn(6, 3)
    y, stats = run_steps(jnn.BatchNorm(momentum=0.0, virtual_batch_size=2), [x])
    parts = [run_steps(jnn.BatchNorm(), [x[i : i + 2]])[0] for i in (0, 2, 4)]
    np.testing.assert_allclose(y, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-5, atol=1e-6)


def test_weights_and_update_stats():
    x = randn(6, 3)
    twice = jnp.concatenate([x, x[:2]])
    weights = jnp.array([2.0, 2, 1, 1, 1, 1])
    y, stats = run_steps(jnn.BatchNorm(), [x], weights=weights)
    want, want_stats = run_steps(jnn.BatchNorm(), [twice])
    np.testing.assert_allclose(y, want[:6], rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), stats, want_stats)
    variables = init(jnn.BatchNorm(), x, **TRAIN)[1]
    y = jnn.BatchNorm().apply(variables, x, update_stats=False, **TRAIN)  # batch_stats are immutable here
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)


def test_traced_use_running_average():
    x = randn(6, 3) + 2
    variables = init(jnn.BatchNorm(), x, **TRAIN)[1]
    run = lambda use: jnn.BatchNorm().apply(variables, x, use_running_average=use, mutable=STATS)
    for use in (True, False):
        want = run(use)
        for got in (jit_unoptimized(run)(use), run(jnp.asarray(use)), run(np.bool_(use))):
            assert jax.tree.structure(got) == jax.tree.structure(want)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


# --- models and checkpoints -------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    norms: Any
    kind: str = "BatchNorm"

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(x):
            if self.kind == "BatchNorm":
                return self.norms.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return getattr(self.norms, self.kind)(**(dict(num_groups=2) if self.kind == "GroupNorm" else {}))(x)

        x = nn.Conv(4, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(norm(x))
            x = x + nn.Conv(4, (3, 3), use_bias=False)(nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False)(y))))
        return nn.Dense(3)(norm(x).mean((1, 2)))


class Transformer(nn.Module):
    norms: Any
    kind: str = "LayerNorm"

    @nn.compact
    def __call__(self, x, train: bool):
        norm = getattr(self.norms, self.kind)
        y = norm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(y, y)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(norm()(x))))
        return norm(name="final")(x)


MODELS = [
    (ResNet, "BatchNorm", (4, 6, 6, 3)),
    (ResNet, "GroupNorm", (4, 6, 6, 3)),
    (Transformer, "LayerNorm", (2, 5, 8)),
    (Transformer, "RMSNorm", (2, 5, 8)),
]


@pytest.mark.parametrize(("model", "kind", "shape"), MODELS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_checkpoints_go_both_ways(model, kind, shape, tmp_path):
    x = randn(*shape)
    ours, theirs = model(jnn, kind), model(nn, kind)
    shapes = {m: jax.eval_shape(lambda m=m: as_flax(m.init)(KEY, x, train=False)) for m in (ours, theirs)}
    assert shapes[ours] == shapes[theirs]
    rng = np.random.default_rng(4)
    saved = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.1, 0.6, a.shape), a.dtype), shapes[ours])

    @functools.partial(jit_unoptimized, static_argnums=0)
    def step(m, variables):
        def loss(params):
            y, new = m.apply({**variables, "params": params}, x, train=True, mutable=STATS)
            return jnp.sin(y).sum(), (y, new)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", saved)
        checkpointer.wait_until_finished()
        results = []
        for m in (ours, theirs):  # what one wrote, both read: the trees are the same
            template = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[m])
            loaded = checkpointer.restore(tmp_path / "model", template)
            jax.tree.map(np.testing.assert_array_equal, loaded, saved)
            restored = flax.serialization.from_bytes(template, flax.serialization.to_bytes(saved))
            jax.tree.map(np.testing.assert_array_equal, restored, saved)
            results.append(as_flax(step)(m, loaded))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-3, atol=5e-4), *results)
    assert any(name.startswith(f"{kind}_0") for name in saved["params"])


def test_importing_jaxnorm_imports_no_flax():
    code = "import jaxnorm, sys; assert not [m for m in sys.modules if m.split('.')[0] == 'flax']"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- transforms and devices -------------------------------------------------------------------------------------------


@pytest.mark.versions
def test_lifted_transforms():
    class Block(nn.Module):
        norms: Any

        @nn.compact
        def __call__(self, x, _):
            return self.norms.BatchNorm(False)(nn.Dense(4)(self.norms.LayerNorm()(x))), None

    def stack(norms):
        axes = dict(params=0, batch_stats=0)
        return nn.scan(nn.remat(Block), variable_axes=axes, split_rngs=dict(params=True), length=3)(norms)

    x = randn(5, 4)
    variables = stack(jnn).init(KEY, x, None)
    got = jit_unoptimized(lambda v: stack(jnn).apply(v, x, None, mutable=STATS))(variables)
    want = as_flax(jit_unoptimized(lambda v: stack(nn).apply(v, x, None, mutable=STATS)))(variables)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, want)
    assert got[1]["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 4)
    each = nn.vmap(jnn.LayerNorm, variable_axes=dict(params=0), split_rngs=dict(params=True), in_axes=0)()
    y, variables = init(each, x)
    assert variables["params"]["scale"].shape == (5, 4)
    np.testing.assert_allclose(y, jn.layer_norm(x), rtol=1e-5, atol=1e-6)


def loss_of(layer):
    return lambda variables, x, mask, g: (
        lambda y, new: ((y * g).sum(), (y, new))
    )(*layer.apply(variables, x, mask=mask, mutable=STATS, **TRAIN))  # fmt: skip


@pytest.mark.parametrize("how", ["shard_map", "pmap", "vmap"])
def test_batch_norm_over_eight_devices_is_one_with_all_the_data(how):
    """With masks that leave the devices unequal shares, one of them nothing."""
    x, g = 2 * randn(16, 3, 4) + 1, randn(16, 3, 4, seed=1)
    mask = jnp.asarray((np.arange(16)[:, None] % 5 < np.array([3, 1, 2])) & (np.arange(16) >= 2)[:, None])[..., None]
    alone, synced = jnn.BatchNorm(momentum=0.5), jnn.BatchNorm(momentum=0.5, axis_name="data")
    variables = jax.tree.map(lambda a: a + 0.5, init(synced, x, **TRAIN))[1]
    (_, (y, new)), grads = jax.value_and_grad(loss_of(alone), (0, 1), has_aux=True)(variables, x, mask, g)

    if how == "shard_map":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        @jax.shard_map(mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P("data"), P()))
        def forward(variables, x, mask):
            return synced.apply(variables, x, mask=mask, mutable=STATS, **TRAIN)

        def loss(variables, x, mask, g):
            y, new = forward(variables, x, mask)
            return (y * g).sum(), (y, new)

        (_, (y2, new2)), grads2 = jit_unoptimized(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x, mask, g)
    else:
        each = lambda a: a.reshape(8, 2, *a.shape[1:])

        def device(variables, x, mask, g):
            (_, (y, new)), (dv, dx) = jax.value_and_grad(loss_of(synced), (0, 1), has_aux=True)(variables, x, mask, g)
            return y, new, jax.lax.psum(dv, "data"), dx

        spread = dict(pmap=jax.pmap, vmap=jax.vmap)[how](device, axis_name="data", in_axes=(None, 0, 0, 0))
        y2, new2, dv, dx = spread(variables, each(x), each(mask), each(g))
        for copies in jax.tree.leaves((new2, dv)):
            np.testing.assert_allclose(copies, jnp.broadcast_to(copies[:1], copies.shape), rtol=1e-6)
        new2, dv = jax.tree.map(lambda a: a[0], (new2, dv))
        y2, grads2 = y2.reshape(x.shape), (dv, dx.reshape(x.shape))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    close(y2, y)
    jax.tree.map(close, new2, new)
    jax.tree.map(close, grads2[0]["params"], grads[0]["params"])
    close(grads2[1], grads[1])


def test_axis_index_groups():
    x = randn(8, 3, 4)
    layer = jnn.BatchNorm(axis_name="data", axis_index_groups=[[0, 1, 2], [3, 4, 5, 6, 7]])
    variables = init(layer, x[0], **TRAIN)[1]
    y = jax.pmap(lambda x: layer.apply(variables, x, mutable=STATS, **TRAIN)[0], axis_name="data")(x)
    for part in (slice(3), slice(3, 8)):
        alone = apply(jnn.BatchNorm(), variables, x[part].reshape(-1, 4), **TRAIN)[0]
        np.testing.assert_allclose(y[part].reshape(-1, 4), alone, rtol=1e-5, atol=1e-6)


def test_layer_norm_with_sharded_features():
    x = randn(3, 16)
    variables = init(jnn.LayerNorm(), x[:, :2])[1]
    layer = jnn.LayerNorm(axis_name="model")
    y = jax.vmap(lambda x: layer.apply(variables, x), axis_name="model", in_axes=1, out_axes=1)(x.reshape(3, 8, 2))
    np.testing.assert_allclose(y.reshape(3, 16), jn.layer_norm(x), rtol=1e-5, atol=1e-6)

"""JAX's debugging switches: values stay what they are, and a switch stops at the user's mistakes alone."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw

import jaxnorm as jn

SHAPE = (8, 5, 12)
_rng = np.random.default_rng(0)
OTHER, MASK = draw(_rng, SHAPE), _rng.random(SHAPE) < 0.7
ROWS_LEFT = _rng.random((8, 5, 1)) < 0.7
WEIGHTS = _rng.uniform(0.5, 2.0, (8, 5, 1)).astype(np.float32)
PARAMS = jn.Affine(*(jnp.asarray(p, jnp.float32) for p in _rng.normal(size=(2, 12))))


def of(spec, **call):
    return lambda params, x: spec.apply(params, spec.init(12)[1], x, train=True, **call)


def gathered(params, x):
    norm = jn.BatchNorm()
    y, seen = norm.apply(params, jn.Moments.empty(12), x, train=True)
    return y, norm.update_state(norm.init(12)[1], seen)


def across(groups=None):
    return lambda params, x: jax.vmap(lambda x: jn.merge_across(jn.moments(x, 0), "i", groups), axis_name="i")(x)


PROGRAMS = {
    "layer": of(jn.LayerNorm()),
    "rms before scale": of(jn.RMSNorm(cast="before_scale")),
    "group": of(jn.GroupNorm(num_groups=3)),
    "instance": of(jn.InstanceNorm()),
    "batch": of(jn.BatchNorm()),
    "inference": lambda params, x: jn.BatchNorm().apply(params, jn.BatchNorm().init(12)[1], x, train=False)[0],
    "ghost batches": of(jn.BatchNorm(virtual_batch_size=3)),
    "cumulative": of(jn.BatchNorm(momentum=None)),
    "debiased": of(jn.BatchNorm(zero_debias=True)),
    "moments as state": gathered,
    "weights": of(jn.BatchNorm(), weights=WEIGHTS),
    "activation": of(jn.LayerNorm(activation="gelu")),
    "gated": lambda params, x: jn.gated_rms_norm(x, OTHER, params.scale),
    "add": lambda params, x: jn.add_layer_norm(x, OTHER, *params),
    "merge": lambda params, x: jn.merge(jn.moments(x, 0), jn.moments(x[:0], 0)),
    "merge across": across(),
    "merge across groups": across([[0, 1, 2], [3, 4, 5, 6, 7]]),
    "layer, masked": of(jn.LayerNorm(), mask=MASK),
    "rms, rows masked out": of(jn.RMSNorm(), mask=ROWS_LEFT),
    "batch, masked": of(jn.BatchNorm(activation="relu"), mask=MASK),
}
SWITCHES = {"disable_jit": jax.disable_jit, "debug_nans": jax.debug_nans, "debug_infs": jax.debug_infs}


def forward_and_gradient(f, params, x):
    out, vjp = jax.vjp(f, params, x)
    g = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(1).normal(size=a.shape), a.dtype), out)
    return out, vjp(g)


@pytest.mark.parametrize("program", PROGRAMS)
def test_switches_change_nothing(program, rng):
    f, x = PROGRAMS[program], draw(rng, SHAPE, 1.0)
    want = jax.jit(lambda params, x: forward_and_gradient(f, params, x))(PARAMS, x)
    for name, switch in SWITCHES.items():
        with contextlib.ExitStack() as on:
            on.enter_context(switch(True))
            got = forward_and_gradient(f, PARAMS, x)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("program", ["layer, masked", "rms, rows masked out", "batch, masked"])
def test_nan_in_padding_is_no_mistake(program, rng):
    # On the device before the switch is on: JAX itself stops at a NaN that it takes from NumPy.
    x = jnp.asarray(np.where(ROWS_LEFT if "rows" in program else MASK, draw(rng, SHAPE), np.nan), jnp.float32)
    want = PROGRAMS[program](PARAMS, x)
    with jax.debug_nans(True):
        got = PROGRAMS[program](PARAMS, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("program", ["layer", "rms before scale", "group", "instance", "batch"])
def test_debug_nans_finds_an_infinity_that_counts(program, rng):
    x = draw(rng, SHAPE)
    x[0, 0, 0] = np.inf
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        PROGRAMS[program](PARAMS, x)

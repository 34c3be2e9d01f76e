"""JAX's debugging switches: a healthy program runs under each of them, with the same values, and a NaN is found.

Strict promotion of dtypes and "raise" for promotion of ranks are on in all tests: conftest sets them.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EACH, by_name, draw
from flax import linen as nn
from flax import nnx
from helpers.devices import close
from helpers.jit import jit_unoptimized

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

SHAPE = (6, 4, 12)
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2.0, (6, 4, 1)).astype("f")
MASK = np.random.default_rng(1).random(SHAPE) < 0.7
ROWS = np.random.default_rng(2).random((6, 4, 1)) < 0.7  # whole rows are masked out
OTHER = np.random.default_rng(3).normal(size=SHAPE).astype("f")

# What each program runs under, and whether as a compiled program or operation by operation. Switches that check are on
# together: a healthy program makes neither a NaN nor an infinity, leaks no tracer, and has well-typed equations.
NO_NANS = {"jax_debug_nans": True, "jax_debug_infs": True}
CHECKS = {"jax_enable_checks": True, "jax_check_tracer_leaks": True}
BY_OPERATION = [({"jax_disable_jit": True, **NO_NANS}, False)]
EAGER = [(NO_NANS, False)]  # operation by operation, with the programs of norms compiled, as users call them
COMPILED = [({**NO_NANS, **CHECKS}, True), ({"jax_enable_x64": True}, True)]


@contextlib.contextmanager
def switched(**values):
    """The switches as the environment sets them (JAX_DISABLE_JIT=1, ...), for all threads."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def trained(norm, **call):
    """A norm in training: the output, and the new state where it has one."""

    def program(params, x):
        y, state = norm.apply(params, norm.init(x.shape[-1])[1], x, train=True, **call)
        return y, state

    return program


def into_moments(params, x):
    """Two micro-batches gathered in Moments, and one update."""
    norm, seen = jn.BatchNorm(zero_debias=True, momentum=1 - 1e-9), jn.Moments.empty(12)
    first, seen = norm.apply(params, seen, x[:4], train=True)
    second, seen = norm.apply(params, seen, x[4:], train=True)
    state = norm.init(12)[1]
    for _ in range(2):
        state = norm.update_state(state, seen)
    return first, second, seen, state


def over_a_mapped_axis(params, x):
    norm = jn.BatchNorm(axis_name="examples")
    state = norm.init(12)[1]
    return jax.vmap(lambda x: norm.apply(params, state, x, train=True), axis_name="examples")(x)


def merged(params, x):
    """Of groups along a mapped axis, and with the moments of nothing."""
    each, groups = jn.moments(x, (0, 1)), [[0, 1, 2], [3, 4, 5]]
    across = jax.vmap(lambda x: jn.merge_across(jn.moments(x, 0), "i", groups), axis_name="i")
    return jn.merge(each, jn.moments(x[:0], (0, 1))), across(x)


def linen_layers(params, x):
    layers = nn.Sequential([jnn.BatchNorm(use_running_average=False, momentum=None), jnn.GroupNorm(num_groups=3)])
    own = {"layers_0": params._asdict(), "layers_1": params._asdict()}
    full = lambda value: jnp.full(12, value, jnp.float32)
    stats = {"layers_0": {"mean": full(0.0), "var": full(1.0), "count": full(0.0)}}
    return layers.apply({"params": own, "batch_stats": stats}, x, mutable=["batch_stats"])


def nnx_layers(params, x):
    layers = nnx.Sequential(
        jnnx.BatchNorm(12, virtual_batch_size=4, rngs=nnx.Rngs(0)), jnnx.RMSNorm(12, rngs=nnx.Rngs(0))
    )
    layers.layers[0].scale[...], layers.layers[1].scale[...] = params.scale, params.bias
    y = layers(x)
    return y, layers.layers[0].mean[...], layers.layers[0].var[...]


PROGRAMS = {
    "layer": trained(jn.LayerNorm()),
    "rms": trained(jn.RMSNorm(cast="before_scale")),
    "group": trained(jn.GroupNorm(num_groups=3)),
    "instance": trained(jn.InstanceNorm()),
    "batch": trained(jn.BatchNorm(skip_nonfinite=True)),
    "inference": lambda params, x: jn.BatchNorm().apply(params, jn.BatchNorm().init(12)[1], x, train=False)[0],
    "ghost": trained(jn.BatchNorm(virtual_batch_size=4)),
    "cumulative": trained(jn.BatchNorm(momentum=None)),
    "moments": into_moments,
    "merge": merged,
    "mapped": over_a_mapped_axis,
    "masked": trained(jn.BatchNorm(), mask=MASK),
    "weights": trained(jn.BatchNorm(), weights=WEIGHTS, mask=ROWS),
    "activation": trained(jn.LayerNorm(activation="gelu")),
    "gated": lambda params, x: jn.gated_rms_norm(x, jnp.asarray(OTHER), params.scale, norm_before_gate=False),
    "add_rms": lambda params, x: jn.add_rms_norm(x, jnp.asarray(OTHER), params.scale),
    "add_layer": lambda params, x: jn.add_layer_norm(x, jnp.asarray(OTHER), *params),
    "linen": linen_layers,
    "nnx": nnx_layers,
}


def with_gradients(program, cotangent_mask=True):
    def run(params, x, seed):
        out, vjp = jax.vjp(program, params, x)
        rng = np.random.default_rng(seed)
        g = lambda a: rng.normal(size=a.shape) * (cotangent_mask if a.shape == x.shape else 1.0)
        return out, vjp(jax.tree.map(lambda a: jnp.asarray(g(a), a.dtype), out))

    return run


def compiled(program):
    """A new function each time: JAX would not trace the old one again under the switches that check as it traces."""
    return jit_unoptimized(with_gradients(program), static_argnums=2)


def arguments(rng):
    scale, bias = rng.normal(size=(2, 12))
    return jn.Affine(jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)), draw(rng, SHAPE, 2.0)


MASKED = {"masked", "weights"}  # operation by operation, the tests of padding below run them
VERSIONS = {"layer", "ghost", "mapped", "masked", "nnx"}  # run on other releases of JAX, whose switches differ


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.versions] if name in VERSIONS else []) for name in PROGRAMS]
)
def test_every_switch_gives_the_same_values(name, rng):
    params, x = arguments(rng)
    program = PROGRAMS[name]
    want = compiled(program)(params, jnp.asarray(x), 0)
    for switches, jit in (*([] if name in MASKED else BY_OPERATION), *(EAGER if name in VERSIONS else []), *COMPILED):
        with switched(**switches):
            got = (compiled if jit else with_gradients)(program)(params, jnp.asarray(x), 0)
        close(got, want, rtol=5e-5, atol=5e-5)
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)


@pytest.mark.versions
@pytest.mark.parametrize("row", [*EACH, by_name["rms-silu"], by_name["batch-ghost"]], ids=str)
def test_an_infinite_input_is_a_floating_point_error(row, rng, capsys):
    """The norm of an infinity is NaN. JAX then calls it again, operation by operation, and the kernels with it."""
    params, x = row.params(rng), draw(rng, row.shape)
    x.flat[7] = np.inf
    apply = lambda params, x: row.spec.apply(params, row.state(), x, train=True)[0]
    run = with_gradients(apply)
    for f in (run, jax.jit(run, static_argnums=2)):
        with switched(jax_debug_nans=True), pytest.raises(FloatingPointError, match="nan"):
            f(params, jnp.asarray(x), 0)


def padded(**call):
    return {
        "layer": trained(jn.LayerNorm(), **call),
        "rms": trained(jn.RMSNorm(), **call),
        "group": trained(jn.GroupNorm(num_groups=3), **call),
        "instance": trained(jn.InstanceNorm(activation="gelu"), **call),
        "batch": trained(jn.BatchNorm(), **call),
        "ghost": trained(jn.BatchNorm(virtual_batch_size=4), **call),
        "gated": lambda params, x: jn.gated_rms_norm(x, jnp.asarray(OTHER), params.scale, **call),
        "gate": lambda params, x: jn.gated_rms_norm(jnp.asarray(OTHER), x, params.scale, **call),
    }


PADDED = [(name, "elements") for name in padded()] + [("batch", "weights")]
PADDED += [(name, "rows") for name in ("layer", "group", "batch", "gated", "gate")]


@pytest.mark.parametrize(("name", "kind"), PADDED)
def test_padding_may_be_anything_under_the_switches(name, kind, rng):
    """What the mask removes is no error, neither in the output nor in a gradient, nor in an operation in between."""
    params, x = arguments(rng)
    mask = ROWS if kind == "rows" else MASK
    call = {"weights": MASK.astype("f")} if kind == "weights" else {"mask": mask}
    x = jnp.asarray(np.where(mask, x, rng.choice(np.float32([np.nan, np.inf, -np.inf]), SHAPE)))
    run = with_gradients(padded(**call)[name], mask)
    want = run(params, x, 0)
    with switched(**NO_NANS):
        close(run(params, x, 0), want, rtol=5e-5, atol=5e-5)
    with switched(jax_disable_jit=True, **NO_NANS):
        close(run(params, x, 0), want, rtol=5e-5, atol=5e-5)


def test_context_managers_are_the_same_switches(rng):
    params, x = arguments(rng)
    x = jnp.asarray(np.where(MASK, x, np.float32(np.nan)))
    run = with_gradients(trained(jn.LayerNorm(), mask=MASK), MASK)
    want = run(params, x, 0)
    with jax.debug_nans(True), jax.debug_infs(True):
        close(run(params, x, 0), want, rtol=5e-5, atol=5e-5)
        with jax.disable_jit():
            close(run(params, x, 0), want, rtol=5e-5, atol=5e-5)


def test_a_nan_of_the_user_is_found_where_it_is_made(rng, capsys):
    """The program is run again operation by operation: NaN padding in the norm before is not what it stops at."""
    params, x = arguments(rng)
    x = np.where(MASK, x, np.float32(np.nan))
    norm = jn.GroupNorm(num_groups=3)

    def loss(x):
        y, _ = norm.apply(params, (), x, mask=MASK)
        return jnp.log(jnp.where(MASK, y, 1.0) - 100.0).sum()

    with switched(jax_debug_nans=True), pytest.raises(FloatingPointError, match=r"nan\) encountered in log\b"):
        jax.jit(loss)(x)


def test_the_check_for_additive_masks_makes_no_nan_for_a_valid_mask(rng):
    """Its values are checked by a NaN in the output; there must be none on the way where all is well."""
    params, x = arguments(rng)
    norm = jn.LayerNorm()
    masks = jnp.asarray(np.stack([MASK, MASK[::-1]]), jnp.float32)
    run = jax.vmap(lambda mask: norm.apply(params, (), x, mask=mask)[0])
    want = run(masks)
    with switched(**NO_NANS):
        close(run(masks), want)
    assert np.isnan(run(masks - 1.0)).any()

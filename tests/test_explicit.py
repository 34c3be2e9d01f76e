"""Explicit meshes: parameters sharded over axes that x is not, in first and second order, equal to one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

SPECS = {
    "layer": jn.LayerNorm(), "rms": jn.RMSNorm(use_bias=True), "group": jn.GroupNorm(num_groups=4),
    "instance": jn.InstanceNorm(), "batch": jn.BatchNorm(), "gelu": jn.LayerNorm(activation="gelu"),
}  # fmt: skip
LAYOUTS = {  # of x, and of scale and bias
    "parameters over an axis that x is not": (P("d"), P("m")),
    "parameters over x's own axis": (P("d"), P("d")),
    "x over features, parameters whole": (P(None, None, "m"), P()),
}
SHAPE = (8, 6, 8)


def step(spec, params, x, g, v):
    f = lambda params, x: spec.apply(params, spec.init(8)[1], x, train=True)[0]
    loss = lambda params, x: jnp.sum(jnp.sin(f(params, x)) * g)
    first = jax.grad(loss, (0, 1))
    return f(params, x), first(params, x), jax.jvp(lambda x: first(params, x), (x,), (v,))[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_any_sharding_of_operands(name, layout, rng):
    spec, (of_x, of_params) = SPECS[name], LAYOUTS[layout]
    params = jn.Affine(*(draw(rng, (8,)) for _ in range(2)))
    x, g, v = draw(rng, SHAPE, 1.0), draw(rng, SHAPE), draw(rng, SHAPE)
    want = jax.jit(step, static_argnums=0)(spec, params, x, g, v)
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        put = lambda a, where: jax.device_put(a, NamedSharding(mesh, where))
        params = jn.Affine(*(put(p, of_params) for p in params))
        args = (put(a, of_x) for a in (x, g, v))
        got = jax.jit(step, static_argnums=0)(spec, params, *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * max(1.0, float(np.abs(b).max())))
    assert jax.typeof(got[1][0].scale).sharding.spec == jax.typeof(params.scale).sharding.spec

"""Meshes of eight devices, arrays laid out on them, a training step, and the collectives of a compiled program."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from helpers.jit import jit_unoptimized

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SHAPE = (32, 5, 6)


def needs(count):
    """Skip the test where there are fewer devices, as on a machine with one GPU."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")


def mesh_of(kind, shape=(8,), names=("data",)):
    needs(math.prod(shape))
    return jax.make_mesh(shape, names, axis_types=(MESHES[kind],) * len(shape))


def placed(mesh, *pairs):
    """Arrays put where their specs say, as an Explicit mesh wants them. A pair is a tree, and its spec or specs."""
    one = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    alike = lambda tree, spec: jax.tree.map(lambda _: spec, tree) if isinstance(spec, P) else spec
    put = lambda tree, spec: jax.tree.map(one, tree, alike(tree, spec))
    return [put(*pair) for pair in pairs]


def uneven_mask(rng):
    """Device d of 8 has a share of about (d + 1) / 8 of its elements valid, but none on the first, and all on the last.

    So two neighbours have more than two elements: of two that are close the others would be a thousand deviations away,
    and a sine of the output there a random number.
    """
    d = np.arange(32)[:, None] // 4
    return rng.random((32, 5)) < np.where(d, (d + 1) / 8, 0)


def close(a, b, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 5e-6, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), a, b)


def case(norm, rng, mean=3.0):
    params = jn.Affine(*(jnp.asarray(p, jnp.float32) for p in rng.normal(size=(2, 6))))
    return params, norm.init(6)[1], draw(rng, SHAPE, mean), draw(rng, SHAPE)


def row_case(row):
    rng = np.random.default_rng(0)
    shape = (16, *row.shape[1:])
    return row.params(rng), draw(rng, shape, 2.0), draw(rng, shape)


def step(norm, params, state, x, g, mask):
    """Output, new state, and the gradients of a loss that is a sum over elements: what training needs of a norm."""

    def loss(params, x):
        y, new = norm.apply(params, state, x, train=True, mask=mask)
        return jnp.sum(jnp.sin(y) * g), (y, new)

    grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, new, grads


alone_step = jit_unoptimized(step, static_argnums=0)  # compiled once for each norm and number of examples


def collectives(f, *args) -> list[str]:
    """The collectives of a compiled program, each as often as it stands there."""
    text = f.lower(*args).compile().as_text()
    return re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


def moved(text: str) -> list[tuple[str, int]]:
    """The collectives of a compiled program, each with the number of elements that it moves."""
    found = re.findall(
        r"= (\([^)]*\)|\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    size = lambda shape: math.prod(int(n) for n in shape.split(",") if n)
    return [(name, sum(size(s) for s in re.findall(r"\[([\d,]*)\]", shapes))) for shapes, name in found]


def check_all_reduces(found: list[str], number: int) -> None:
    """Those are all-reduces, and so many; at least, where the compiler does not combine independent ones."""
    assert set(found) <= {"all-reduce"}
    assert len(found) == number if combines() else len(found) >= number


@functools.cache
def combines() -> bool:
    """Not so in jax 0.7.0 on a CPU."""
    sums = lambda x: lax.psum((x, x + 1), "data")
    sharded = jax.shard_map(sums, mesh=mesh_of("auto"), in_specs=P("data"), out_specs=P())
    return len(collectives(jax.jit(sharded), jnp.ones(8))) == 1

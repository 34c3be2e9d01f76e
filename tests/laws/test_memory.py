"""Law 7: what is kept for the backward pass is x in its own dtype plus float32 row statistics."""

import jax
import jax.numpy as jnp
import pytest
from catalogue import EACH, ROWS
from helpers.memory import kept_bytes, limit

import jaxnorm as jn

WIDE = {
    "layer": (64, 512),
    "rms": (64, 512),
    "group-nhwc": (8, 16, 16, 24),
    "instance-nhwc": (8, 32, 32, 24),
    "batch-nhwc": (8, 16, 16, 24),
}


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("row", EACH, ids=str)
def test_only_x_and_row_statistics_are_saved(row, masked, dtype, rng):
    shape = WIDE[row.name]
    params, state = row.spec.init(shape[-1])
    x = jax.ShapeDtypeStruct(shape, dtype)
    mask = jnp.ones((shape[0], *(1,) * (len(shape) - 1)), bool) if masked else None
    kept = kept_bytes(lambda params, x: row.spec.apply(params, state, x, train=True, mask=mask)[0], params, x)
    assert kept / x.size <= limit(dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("row", EACH, ids=str)
def test_each_layer_of_a_scan_saves_only_its_x(row, dtype):
    """Each layer keeps its own x and no more."""
    layers, shape = 6, WIDE[row.name]
    params, state = jax.tree.map(lambda a: jnp.stack([a] * layers), row.spec.init(shape[-1]))

    def network(params, x):
        def layer(x, per_layer):
            return row.spec.apply(*per_layer, x, train=True)[0], None

        return jax.lax.scan(layer, x, (params, state))[0]

    x = jax.ShapeDtypeStruct(shape, dtype)
    assert kept_bytes(network, params, x) / (layers * x.size) <= limit(dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
def test_batch_norm_saves_only_x_at_inference_and_with_a_traced_train(dtype):
    norm = jn.BatchNorm()
    params, state = norm.init(24)
    x = jax.ShapeDtypeStruct(WIDE["batch-nhwc"], dtype)
    for train in (False, jnp.array(True)):
        kept = kept_bytes(lambda params, x, t=train: norm.apply(params, state, x, train=t)[0], params, x)
        assert kept / x.size <= limit(dtype)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_only_x_is_saved_at_full_size(row, rng):
    params = row.params(rng)
    x = jnp.zeros(row.shape, jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: row.apply(p, x), p, x)[1], params, x))
    large = [a for a in kept if a.size >= (x.size if row.calls == 1 else x.size / 4)]  # x may be several arrays
    # A short last ghost batch is padded, so that x is kept in the padded shape, with the mask of the padding beside it.
    assert [a.dtype for a in large] == [jnp.bfloat16] * row.calls
    assert sum(a.size for a in large) <= x.size * 1.2

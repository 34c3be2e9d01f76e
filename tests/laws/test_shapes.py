"""The shapes of the functions, as types: jaxtyping's, checked here and nowhere at run time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Bool, Float, Float32, TypeCheckError, jaxtyped

import jaxnorm as jn

Array = jax.Array
typed = functools.partial(jaxtyped, typechecker=beartype)


@typed
def layer(x: Float[Array, "*b c"], scale: Float[Array, " c"], mask: Bool[Array, "*b"]) -> Float[Array, "*b c"]:
    return jn.layer_norm(x, scale, scale, mask=mask)


@typed
def rms(x: Float[Array, "*b h d"], scale: Float[Array, "h d"]) -> Float[Array, "*b h d"]:
    return jn.rms_norm(x, scale)


@typed
def group(x: Float[Array, "n *hw c"], scale: Float[Array, " c"]) -> Float[Array, "n *hw c"]:
    return jn.group_norm(x, scale, scale, num_groups=2)


@typed
def instance(x: Float[Array, "n *hw c"], scale: Float[Array, " c"]) -> Float[Array, "n *hw c"]:
    return jn.instance_norm(x, scale, scale)


@typed
def batch(
    x: Float[Array, "n *hw c"], scale: Float[Array, " c"]
) -> tuple[Float[Array, "n *hw c"], Float32[Array, " c"], Float32[Array, " c"]]:
    params, state = jn.BatchNorm().init(x.shape[-1])
    y, (mean, var, _) = jn.batch_norm(x, params._replace(scale=scale), state, train=True)
    return y, mean, var


@typed
def moments(x: Float[Array, "n *hw c"]) -> tuple[Float32[Array, " c"], Float32[Array, " c"], Float32[Array, " c"]]:
    return tuple(jn.moments(x, tuple(range(x.ndim - 1))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 4, 5, 8), (2, 3, 4, 5, 8)], ids=str)
def test_outputs_have_the_shapes_of_their_types(shape, dtype, rng):
    x, scale = jnp.asarray(rng.normal(size=shape), dtype), jnp.ones(8, dtype)
    assert layer(x, scale, jnp.ones(shape[:-1], bool)).dtype == dtype
    assert rms(x, jnp.ones(shape[-2:], dtype)).dtype == dtype
    if len(shape) > 2:
        assert instance(x, scale).dtype == dtype
    assert group(x, scale).dtype == dtype
    assert batch(x, scale)[0].dtype == dtype
    moments(x)


def test_a_wrong_shape_fails_the_type_check():
    with pytest.raises(TypeCheckError):
        layer(jnp.ones((3, 8)), jnp.ones(7), jnp.ones(3, bool))
    with pytest.raises(TypeCheckError):
        moments(np.ones((3, 8)))

"""What type checkers must accept, infer and refuse. It is not run: `pyright` and `mypy --strict` read it in CI."""

from __future__ import annotations

from typing import Any, assert_type

import jax
import numpy as np

import jaxnorm as jn

NORMS: list[jn.Norm] = [jn.BatchNorm(), jn.LayerNorm(), jn.RMSNorm(), jn.GroupNorm(), jn.InstanceNorm()]


def generic(norm: jn.Norm, x: jax.Array) -> jax.Array:
    params, state = norm.init(x.shape[-1])
    y, state = norm.apply(params, state, x, train=True)
    return norm.apply(params, state, y, train=False, mask=None)[0]


def states_have_their_own_types(x: jax.Array, restored: dict[str, jax.Array]) -> None:
    norm = jn.BatchNorm(momentum=0.9)
    params, state = norm.init(8)
    assert_type(params, jn.Affine)
    assert_type(state, jn.RunningStats)
    assert_type(norm.apply(params, state, x, train=True), tuple[jax.Array, jn.RunningStats])
    assert_type(norm.apply(None, jn.Moments.empty(8), x, train=True), tuple[jax.Array, jn.Moments])
    assert_type(norm.apply(restored, restored, x, train=True), tuple[jax.Array, dict[str, jax.Array]])
    assert_type(jn.batch_norm(x, params, state, train=True), tuple[jax.Array, jn.RunningStats])
    assert_type(norm.update_state(state, jn.moments(x, 0)), jn.RunningStats)
    assert_type(norm.as_affine(restored, restored), jn.Affine)
    assert_type(jn.LayerNorm().init((6, 8)), tuple[jn.Affine, tuple[()]])
    assert_type(jn.GroupNorm().init(64), tuple[jn.Affine, tuple[()]])
    assert_type(jn.RMSNorm().apply(params, (), np.ones(8)), tuple[jax.Array, tuple[()]])
    assert_type(jn.layer_norm(x, params.scale), jax.Array)


def wrong_calls_are_refused(x: jax.Array, options: Any) -> None:
    """The messages at run time cost no check before it."""
    jn.LayerNorm(True)  # type: ignore[call-arg]
    jn.LayerNorm(eps=1e-5)  # type: ignore[call-arg]
    jn.LayerNorm()(x)  # type: ignore[operator]
    jn.layer_norm(x, eps=1e-5)  # type: ignore[call-arg]
    jn.batch_norm(x, None, jn.Moments.empty(8))  # type: ignore[call-arg]
    jn.BatchNorm().apply(None, (), x, train=True)  # type: ignore[type-var]

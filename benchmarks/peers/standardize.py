from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers.base import Peer


class Standardize(Peer):
    """`jax.nn.standardize`, which has no parameters: scale and bias are applied after it."""

    package = "jax"

    def norm(self, which, x, scale, bias=None):
        batch, *space, channels = range(x.ndim)
        view = (*x.shape[:-1], GROUPS, x.shape[-1] // GROUPS) if which == "group" else x.shape
        axes = {"batch": (batch, *space), "instance": space, "group": (*space, x.ndim)}.get(which, (channels,))
        mean = jnp.zeros((), x.dtype) if which == "rms" else None
        y = jax.nn.standardize(x.reshape(view), tuple(axes), mean, epsilon=EPSILON).reshape(x.shape)
        y = y * scale.astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)

    def masked(self, which, x, mask):
        axis, mask = (0, mask[:, None]) if which == "batch" else (-1, mask)
        return jax.nn.standardize(x, axis=axis, epsilon=EPSILON, where=mask)

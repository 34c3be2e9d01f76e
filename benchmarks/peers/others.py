"""JAX libraries that may be missing: each is imported when its class is made."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers import Peer


class Haiku(Peer):
    package = "haiku"

    def norm(self, which, x, *params):
        hk = self.library
        norm = hk.transform_with_state({
            "layer": lambda x: hk.LayerNorm(-1, True, True, eps=EPSILON)(x),
            "rms": lambda x: hk.RMSNorm(-1, eps=EPSILON)(x),
            "batch": lambda x: hk.BatchNorm(True, True, 0.9, eps=EPSILON)(x, is_training=True),
            "group": lambda x: hk.GroupNorm(GROUPS, eps=EPSILON)(x),
            "instance": lambda x: hk.InstanceNorm(True, True, eps=EPSILON)(x),
        }[which])  # fmt: skip
        values = dict(zip(("scale", "offset"), params, strict=False))
        own, state = norm.init(None, jnp.zeros(x.shape, x.dtype))
        fill = lambda param, like: values[param].astype(x.dtype).reshape(like.shape)
        own = {module: {param: fill(param, a) for param, a in of.items()} for module, of in own.items()}
        return norm.apply(own, state, None, x)[0]


class Equinox(Peer):
    package = "equinox"
    norms = ("layer", "rms", "batch", "group")
    channels_first = True

    def norm(self, which, x, *params):
        nn = self.library.nn
        layers = {
            "layer": lambda channels: nn.LayerNorm(channels, eps=EPSILON),
            "rms": lambda channels: nn.RMSNorm(channels, eps=EPSILON, use_bias=False),
            "batch": lambda channels: nn.BatchNorm(channels, "batch", eps=EPSILON, mode="batch"),
            "group": lambda channels: nn.GroupNorm(GROUPS, channels, eps=EPSILON),
        }
        norm, state = nn.make_with_state(layers[which])(x.shape[1])
        norm = self.library.tree_at(lambda n: (n.weight, n.bias)[: len(params)], norm, params)
        y, _ = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y.astype(x.dtype)  # its batch norm promotes


class Keras(Peer):
    package = "keras"
    masks = ("batch",)

    def __init__(self, name: str):
        os.environ["KERAS_BACKEND"] = "jax"  # read when it is imported
        super().__init__(name)

    def norm(self, which, x, *params):
        policy = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else "float32"
        kind, groups = {
            "layer": ("LayerNormalization", {}),
            "rms": ("RMSNormalization", {}),
            "batch": ("BatchNormalization", {}),
            "group": ("GroupNormalization", {"groups": GROUPS}),
            "instance": ("GroupNormalization", {"groups": -1}),  # as its documentation says
        }[which]
        norm = getattr(self.library.layers, kind)(dtype=policy, epsilon=EPSILON, **groups)
        norm.build(x.shape)
        state = [v.value for v in norm.non_trainable_variables]
        training = {"training": True} if which == "batch" else {}
        return norm.stateless_call(list(params), state, x, **training)[0]

    def masked(self, which, x, mask):
        norm = self.library.layers.BatchNormalization(epsilon=EPSILON)
        norm.build(x.shape)
        trained, state = ([v.value for v in vs] for vs in (norm.trainable_variables, norm.non_trainable_variables))
        return norm.stateless_call(trained, state, x, training=True, mask=mask)[0]


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

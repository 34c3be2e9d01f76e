from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
from keras import layers

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers.base import Peer

LAYERS = {
    "layer": layers.LayerNormalization,
    "rms": layers.RMSNormalization,
    "batch": layers.BatchNormalization,
    "group": lambda **options: layers.GroupNormalization(GROUPS, **options),
    "instance": lambda **options: layers.GroupNormalization(-1, **options),  # as its documentation says
}


class Keras(Peer):
    package = "keras"
    masks = ("batch",)

    def norm(self, which, x, *params):
        policy = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else "float32"
        norm = LAYERS[which](dtype=policy, epsilon=EPSILON)
        norm.build(x.shape)
        state = [v.value for v in norm.non_trainable_variables]
        return norm.stateless_call(list(params), state, x, **({"training": True} if which == "batch" else {}))[0]

    def masked(self, which, x, mask):
        norm = layers.BatchNormalization(epsilon=EPSILON)
        norm.build(x.shape)
        trained, state = ([v.value for v in vs] for vs in (norm.trainable_variables, norm.non_trainable_variables))
        return norm.stateless_call(trained, state, x, training=True, mask=mask)[0]

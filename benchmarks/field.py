"""The norms of the field, one call each, on any platform: norm(which, x, scale, bias) -> y; a case; and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.peers import EPSILON

GROUPS = 32
#: Of y and of the gradients, in the 2-norm, relative: enough to see that it is the norm that was asked for. (Some sum
#: the gradients of the parameters in bfloat16, and lose a fifth of them.)
TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (2e-2, 5e-1)}


# --- the contestants: norm(which, x, scale, bias) -> y, rms without bias ----------------------------------------------


class Jaxnorm(peers.Jaxnorm):
    implementation: str | None = None

    def norm(self, which, x, *params):
        import jaxnorm as jn

        options = dict(epsilon=EPSILON, implementation=self.implementation)
        if which == "batch":
            _, state = jn.BatchNorm().init(x.shape[-1])
            return jn.batch_norm(x, jn.Affine(*params), state, train=True, **options)[0]
        groups = {"num_groups": GROUPS} if which == "group" else {}
        return getattr(jn, f"{which}_norm")(x, *params, **groups, **options)


class JaxnormXLA(Jaxnorm):
    name, implementation = "jaxnorm-xla", "xla"


FLAX = {
    "layer": ("LayerNorm", {}),
    "rms": ("RMSNorm", {}),
    "batch": ("BatchNorm", {"use_running_average": False}),
    "group": ("GroupNorm", {"num_groups": GROUPS}),
    "instance": ("InstanceNorm", {}),
}


class Linen(peers.Linen):
    def norm(self, which, x, *params):
        import flax.linen as nn

        name, options = FLAX[which]
        stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
        variables = {"params": dict(zip(("scale", "bias"), params, strict=False)), "batch_stats": stats}
        norm = getattr(nn, name)(epsilon=EPSILON, dtype=x.dtype, **options)
        return norm.apply(variables, x, mutable=["batch_stats"])[0]


class NNX(peers.NNX):
    def norm(self, which, x, *params):
        from flax import nnx

        name, options = FLAX[which]
        norm = getattr(nnx, name)(x.shape[-1], epsilon=EPSILON, dtype=x.dtype, rngs=nnx.Rngs(0), **options)
        for param, value in zip(("scale", "bias"), params, strict=False):
            setattr(norm, param, nnx.Param(value))
        return norm(x)


class Haiku(peers.Haiku):
    def norm(self, which, x, *params):
        import haiku as hk

        layer = {
            "layer": lambda x: hk.LayerNorm(-1, True, True, eps=EPSILON)(x),
            "rms": lambda x: hk.RMSNorm(-1, eps=EPSILON)(x),
            "batch": lambda x: hk.BatchNorm(True, True, 0.9, eps=EPSILON)(x, is_training=True),
            "group": lambda x: hk.GroupNorm(GROUPS, eps=EPSILON)(x),
            "instance": lambda x: hk.InstanceNorm(True, True, eps=EPSILON)(x),
        }[which]
        norm = hk.transform_with_state(layer)
        values = dict(zip(("scale", "offset"), params, strict=False))
        own, state = norm.init(None, x)
        fill = lambda param, like: values[param].astype(x.dtype).reshape(like.shape)
        own = {module: {param: fill(param, a) for param, a in of.items()} for module, of in own.items()}
        return norm.apply(own, state, None, x)[0]


class Equinox(peers.Equinox):
    norms = ("layer", "rms", "batch", "group")
    channels_first = True

    def norm(self, which, x, *params):
        import equinox as eqx

        channels = x.shape[1]
        norm = {
            "layer": lambda: eqx.nn.LayerNorm(channels, eps=EPSILON),
            "rms": lambda: eqx.nn.RMSNorm(channels, eps=EPSILON, use_bias=False),
            "batch": lambda: eqx.nn.BatchNorm(channels, "batch", eps=EPSILON, mode="batch"),
            "group": lambda: eqx.nn.GroupNorm(GROUPS, channels, eps=EPSILON),
        }[which]
        norm, state = eqx.nn.make_with_state(norm)()
        norm = eqx.tree_at(lambda n: (n.weight, n.bias)[: len(params)], norm, params)
        y, _ = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y.astype(x.dtype)  # its batch norm promotes


class Keras(peers.Keras):
    def norm(self, which, x, *params):
        from keras import layers

        policy = {"dtype": "mixed_bfloat16" if x.dtype == jnp.bfloat16 else "float32", "epsilon": EPSILON}
        norm = {
            "layer": lambda: layers.LayerNormalization(**policy),
            "rms": lambda: layers.RMSNormalization(**policy),
            "batch": lambda: layers.BatchNormalization(**policy),
            "group": lambda: layers.GroupNormalization(GROUPS, **policy),
            "instance": lambda: layers.GroupNormalization(-1, **policy),  # as its documentation says
        }[which]()
        norm.build(x.shape)
        state = [v.value for v in norm.non_trainable_variables]
        return norm.stateless_call(list(params), state, x, **({"training": True} if which == "batch" else {}))[0]


class Standardize(peers.Standardize):
    def norm(self, which, x, scale, bias=None):
        view, axes = reduction(which, x.shape)
        mean = jnp.zeros((), x.dtype) if which == "rms" else None
        y = jax.nn.standardize(x.reshape(view), axes, mean, epsilon=EPSILON).reshape(x.shape) * scale.astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)


class Tokamax(peers.Peer):
    name, package = "tokamax", "tokamax"
    norms = ("layer", "rms")

    def norm(self, which, x, scale, bias=None):
        import tokamax

        return tokamax.layer_norm(x, scale, bias, epsilon=EPSILON, subtract_mean=which == "layer")


class Torch(peers.Peer):
    """Its idle threads sleep (`TorchContest`)."""

    name, package = "torch", "torch"
    channels_first = True

    def norm(self, which, x, scale, bias=None):
        from torch.nn import functional

        return {
            "layer": lambda: functional.layer_norm(x, scale.shape, scale, bias, EPSILON),
            "rms": lambda: functional.rms_norm(x, scale.shape, scale.to(x.dtype), EPSILON),
            "batch": lambda: functional.batch_norm(x, None, None, scale, bias, training=True, eps=EPSILON),
            "group": lambda: functional.group_norm(x, GROUPS, scale, bias, EPSILON),
            "instance": lambda: functional.instance_norm(x, weight=scale, bias=bias, eps=EPSILON),
        }[which]()


# --- a case, its data, and the truth ----------------------------------------------------------------------------------


def reduction(norm: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A view of x, and its axes that share a statistic."""
    if norm == "group":
        return (*shape[:-1], GROUPS, shape[-1] // GROUPS), (1, 2, 4)
    return shape, {"batch": (0, 1, 2), "instance": (1, 2)}.get(norm, (len(shape) - 1,))


@dataclass(frozen=True)
class Case:
    """A norm of one array."""

    norm: str
    shape: tuple[int, ...]
    dtype: str

    def data(self) -> list[np.ndarray]:
        """A cotangent, x, scale, and, but for rms, bias."""
        normal = np.random.default_rng(0).standard_normal
        g, x = (normal(self.shape, np.float32).astype(self.dtype) for _ in range(2))
        scale, bias = (mean + normal(self.shape[-1], np.float32) / 8 for mean in (1, 0))
        return [g, x, scale] if self.norm == "rms" else [g, x, scale, bias]

    def truth(self, g, x, scale, *bias) -> list[np.ndarray]:
        """y and the gradients of x, scale and bias, in float64."""
        view, axes = reduction(self.norm, x.shape)
        spread = lambda a: np.broadcast_to(a, view).reshape(x.shape)
        mean = lambda a: spread(a.reshape(view).mean(axes, keepdims=True))
        total = lambda a: a.reshape(-1, a.shape[-1]).sum(0)
        centered = self.norm != "rms"
        g, x = g.astype(np.float64), x.astype(np.float64)
        x = x - centered * mean(x)
        r = 1.0 / np.sqrt(mean(x * x) + EPSILON)
        xhat, h = x * r, g * scale
        dx = r * (h - centered * mean(h) - xhat * mean(h * xhat))
        return [xhat * scale + sum(bias), dx, total(g * xhat), *([total(g)] if bias else [])]

    def errors(self, got: list[np.ndarray], truth: list[np.ndarray]) -> list[float]:
        """The relative error of each of these; raises where they are not the norm's."""
        dtypes = [self.dtype, self.dtype, "float32", "float32"]
        for a, t, dtype in zip(got, truth, dtypes, strict=False):
            if a.dtype.name != dtype or a.shape != t.shape:
                raise TypeError(f"got {a.dtype.name}{a.shape} where {dtype}{t.shape} is due")
        norm = np.linalg.norm
        errors = [float(norm(a - t) / norm(t)) for a, t in zip(got, truth, strict=False)]
        for_y, for_gradients = TOLERANCE[self.dtype]
        if not all(error <= (for_gradients if i else for_y) for i, error in enumerate(errors)):
            raise ValueError(f"relative errors of {', '.join(f'{error:.1e}' for error in errors)}")
        return errors

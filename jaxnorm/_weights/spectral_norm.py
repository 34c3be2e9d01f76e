"""Spectral norm: a weight over its largest singular value, by power iteration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.checks import canonicalize_number
from .._core.dtypes import accumulator
from .._core.messages import shown
from .._core.types import AxisName
from .base import BY_LIKE, Reparametrization, divided, of_device
from .operator import Convolution, Matrix, Operator, dot, unit

Array = jax.Array


class SpectralNormState(NamedTuple):
    """The singular vectors as far as they are known, in float32 or wider."""

    u: Array  # the sizes along the output axes; of a convolution, its output
    v: Array  # the sizes along all others; of a convolution, its input


def iterate(of: Operator, w: Array, state: SpectralNormState, steps: int, first: str, epsilon: float, mode: str):
    """Power iteration: the new vectors, and sigma = u^T W v. Gradients flow through the weight of sigma alone."""
    frozen, (u, v) = lax.stop_gradient(w), lax.stop_gradient(state)
    value = None
    for _ in range(steps):
        if first == "u":
            u, value = unit(of.forward(frozen, v), of.out_axis_name, epsilon, mode)
            v, value = unit(of.adjoint(frozen, u), of.axis_name, epsilon, mode)
        else:
            v, value = unit(of.adjoint(frozen, u), of.axis_name, epsilon, mode)
            u, value = unit(of.forward(frozen, v), of.out_axis_name, epsilon, mode)
    if value is None:
        value = dot(u, of.forward(frozen, v), of.out_axis_name)
    return SpectralNormState(u, v), _sigma(of, w, u, v, value)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sigma(of: Operator, w: Array, u: Array, v: Array, value: Array) -> Array:
    return value


@_sigma.defjvp
def _(of, primals, tangents):
    w, u, v, value = primals
    return _sigma(of, w, u, v, value), dot(u, of.forward(tangents[0], v), of.out_axis_name).astype(value.dtype)


def bounded(sigma: Array, bound: float | None) -> Array:
    """What w is divided by: sigma, or max(1, sigma / bound)."""
    return sigma if bound is None else jnp.maximum(1.0, sigma / bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralNorm(Reparametrization):
    """Spectral norm.

        w / sigma,       sigma = u^T W v, the largest singular value of W, which is w as an (out, rest) matrix

    u and v come from power iteration, one step at each call with `train`; they are the state. Gradients flow through W
    and not through u and v. The parameter is w itself. A w of zeros gives zeros.

    Args:
      axis: the output axis or axes: -1 in a kernel of Flax, 0 in a weight of torch.
      n_steps: iterations at each call with `train`.
      eval_steps: iterations at each call without it, which are not stored.
      epsilon: in the length of u and v.
      epsilon_mode: "max", the length is at least epsilon; or "inside" of the root.
      first: which vector an iteration computes first, "v" from u, as Flax, or "u" from v, as torch.
      init_steps: iterations of `init`.
      bound: c divides by max(1, sigma / c) in place of sigma: the norm is at most c.
      operator: "matrix", or "conv": sigma is the norm of the convolution itself, and the state is an output and an
        input of it.
      input_size: of a convolution, the sizes of its input in space.
      strides, padding: of a convolution, as `jax.lax.conv_general_dilated` has them. Its kernel is (..., in, out).
      axis_name, out_axis_name: inside `shard_map`, the mesh axes over which the other axes, and the output axes, of w
        are split. Under jit, leave them out.
      dtype: of the result; None is w's.
      like: "torch" (`parametrizations.spectral_norm`: axis 0, 15 first iterations), "flax" (none, one at inference as
        well), "haiku" (the same with epsilon 1e-4) or "keras" (epsilon 1e-7).

    Used by discriminators of GANs, Lipschitz networks and critics.

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial Networks" (2018),
    arXiv:1802.05957. Of a convolution: Gouk, Frank, Pfahringer, Cree (2018), arXiv:1804.04368.

    >>> import jax, numpy as np
    >>> from jaxnorm import weights
    >>> spec = weights.SpectralNorm()
    >>> w, state = spec.init(np.diag([4., 2., 1.]).astype("f"), jax.random.key(0))
    >>> w_eff, state = spec.apply(w, state, train=True)
    >>> w_eff.diagonal().round(3).tolist()
    [1.0, 0.5, 0.25]
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {
        None: {"axis": -1, "epsilon": 0.0, "epsilon_mode": "max", "first": "v", "init_steps": 15, "eval_steps": 0},
        "torch": {"axis": 0, "epsilon": 1e-12, "first": "u"},
        "flax": {"epsilon": 1e-12, "epsilon_mode": "inside", "init_steps": 0, "eval_steps": 1},
        "haiku": {"epsilon": 1e-4, "epsilon_mode": "inside", "init_steps": 0, "eval_steps": 1},
        "keras": {"epsilon": 1e-7, "init_steps": 0},
    }

    axis: int | Sequence[int] = BY_LIKE
    n_steps: int = 1
    eval_steps: int = BY_LIKE
    epsilon: float = BY_LIKE
    epsilon_mode: str = BY_LIKE
    first: str = BY_LIKE
    init_steps: int = BY_LIKE
    bound: float | None = None
    operator: str = "matrix"
    input_size: Sequence[int] | None = None
    strides: int | Sequence[int] = 1
    padding: str = "SAME"
    axis_name: AxisName | None = None
    out_axis_name: AxisName | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, value, allowed in (
            ("epsilon_mode", self.epsilon_mode, ("inside", "max")),
            ("first", self.first, ("u", "v")),
            ("operator", self.operator, ("matrix", "conv")),
        ):
            if value not in allowed:
                either = " or ".join(f'"{a}"' for a in allowed)
                raise ValueError(
                    f'{self.name}: {what} must be {either}, got {shown(value)}. Write {what}="{allowed[0]}".'
                )
        if self.bound is not None:
            canonicalize_number(self.name, "bound", self.bound, "1.0", least=0.0)
        if (self.operator == "conv") != (self.input_size is not None):
            raise ValueError(
                f'{self.name}: operator="conv" and input_size belong together; got operator={shown(self.operator)}, '
                f'input_size={shown(self.input_size)}. Write operator="conv", input_size=(32, 32).'
            )
        if self.operator == "conv" and (self.axis != -1 or self.axis_name or self.out_axis_name):
            raise ValueError(
                f'{self.name}: operator="conv" needs a whole kernel of shape (..., in, out). Write axis=-1 and no '
                "axis names, or transpose the kernel."
            )

    def of(self, w: Array) -> Operator:
        if w.ndim < 2:
            raise ValueError(
                f"{self.name}: w must have rank 2 or more, got shape {w.shape}. Leave it out, or write w[:, None]."
            )
        if self.operator == "conv":
            return Convolution.of(self.name, w, self.input_size, self.strides, self.padding)
        return Matrix.of(self.name, w, self.axis, self.axis_name, self.out_axis_name)

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[Array, SpectralNormState]:
        w = self.as_weight(w)
        of, wide = self.of(w), accumulator(w)
        key = jax.random.key(0) if key is None else key
        u = jax.random.normal(of_device(key, self.out_axis_name), of.out_shape(w), wide)
        v, _ = unit(of.adjoint(w, u), of.axis_name, self.epsilon, self.epsilon_mode)
        state = SpectralNormState(u, v)
        if self.init_steps:
            step = lambda _, s: iterate(of, w, s, 1, self.first, self.epsilon, self.epsilon_mode)[0]
            state = lax.fori_loop(0, self.init_steps, step, state)
        return w, lax.stop_gradient(state)

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w = self.as_weight(params)
        old = SpectralNormState(**state) if isinstance(state, Mapping) else SpectralNormState(*state)
        steps = self.n_steps if train else self.eval_steps
        new, sigma = iterate(self.of(w), w, old, steps, self.first, self.epsilon, self.epsilon_mode)
        kept = type(state)(new._asdict()) if isinstance(state, dict) else new
        return divided(w, bounded(sigma, self.bound), self.dtype), kept if train else state


def spectral_norm(
    w: ArrayLike, state: SpectralNormState | Mapping[str, Array], *, train: bool, **options: Any
) -> tuple[Array, Any]:
    """Return (w / sigma, next state): `SpectralNorm(**options).apply(w, state, train=train)`.

    Args:
      w: the weight.
      state: of `SpectralNorm(**options).init(w, key)`.
      train: whether to iterate and return the new vectors.
      options: of `SpectralNorm`.

    Returns:
      The effective weight, and the state.

    Raises:
      ValueError: a bad option; a w of rank below 2.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> w, state = weights.SpectralNorm().init(np.diag([4., 2.]).astype("f"))
    >>> weights.spectral_norm(w, state, train=False, bound=8.)[0].tolist()
    [[4.0, 0.0], [0.0, 2.0]]
    """
    return SpectralNorm(**options).apply(w, state, train=train)

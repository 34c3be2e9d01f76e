"""Muon for matrices, Adam for the rest, no weight decay on norms, and an average: `python -m examples.optimizers`.

The groups are by what layers say of their parameters, so that a parameter of the model's own called `scale` decays as
all others do. Learning rates are per group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxnorm import linen as nn
from jaxnorm import models

# Rates of the groups. Norms often take more than the matrices around them.
RATES = {"matrix": 0.02, "vector": 3e-3, "norm": 1e-2}


class Network(nn.Module):
    """An embedding of tokens, a block with a norm, batch norm, and logits at a temperature called scale."""

    width: int = 16

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Embed(32, self.width)(tokens)
        x = x + nn.Dense(self.width)(jax.nn.gelu(nn.RMSNorm()(x)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.mean(1))
        return nn.Dense(4)(x) * self.param("scale", jax.nn.initializers.ones, (1, 1))


def groups(label: str, p: jax.Array) -> str:
    """The group of a parameter, by its label and its shape."""
    if label in ("norm", "gain"):
        return "norm"
    return "matrix" if p.ndim == 2 else "vector"


def optimizer(model: nn.Module, params: dict, tokens: jax.Array) -> optax.GradientTransformation:
    """One transformation for each group. Muon has the matrices, with weight decay; norms have none."""
    labels = jax.tree.map(groups, models.label_params(model, params, tokens), params)
    return optax.multi_transform(
        {
            "matrix": contrib.muon(RATES["matrix"], weight_decay=0.01),
            "vector": optax.adamw(RATES["vector"], weight_decay=0.01),
            "norm": optax.adam(RATES["norm"]),
        },
        labels,
    )


def main(steps: int = 60) -> tuple[float, float]:
    """Print and return the loss before and after; the latter with averaged parameters and statistics."""
    tokens = jax.random.randint(jax.random.key(0), (64, 8), 0, 32)
    classes = tokens[:, 0] % 4
    model = Network()
    variables = jax.jit(model.init)(jax.random.key(1), tokens)
    tx = optimizer(model, variables["params"], tokens)

    def loss(params, statistics, train):
        y, new = model.apply({"params": params, **statistics}, tokens, train=train, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(y, classes).mean(), new

    def step(carry, count):
        variables, state, average = carry
        params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}
        grads, statistics = jax.grad(loss, has_aux=True)(params, statistics, True)
        updates, state = tx.update(grads, state, params)
        variables = {"params": optax.apply_updates(params, updates), **statistics}
        average = models.ema_update(average, variables, jnp.minimum(0.9, (1.0 + count) / (10.0 + count)))
        return (variables, state, average), None

    @jax.jit
    def train(variables):
        carry = variables, tx.init(variables["params"]), models.ema_init(variables)
        (_, _, average), _ = jax.lax.scan(step, carry, jnp.arange(steps, dtype=jnp.float32))
        of = lambda v: loss(v["params"], {"batch_stats": v["batch_stats"]}, False)[0]
        return of(variables), of(average)

    with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
        before, after = map(float, train(variables))
    print(f"loss before {before:.3f}, after {steps} steps, averaged, {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()

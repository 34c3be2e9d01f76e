"""A whole training step with the norms of flax.linen, and with those of jaxnorm: one import is swapped.

A step is forward, backward and optimizer update, jitted, its state donated: a decoder transformer under AdamW, and a
ResNet under SGD with momentum. A third variant has no norms, which shows their share of a step. The variants take
turns, one step each in a round, and every ratio is taken within a round. CPU only.

All variants start from the same parameters. The script stops unless the parameter trees are equal and the losses close.
Each line is measured in a process of its own, whose malloc keeps freed pages; with `--allocator default` the kernel
zeroes most pages again in every step.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.models import FULL, TASKS, TINY, VARIANTS, Model, Sizes

import jaxnorm
from benchmarks.harness import records
from benchmarks.harness.table import table
from benchmarks.harness.timing import ALLOCATORS, Timed, Worker, cpu_devices, in_turn, quartiles

ROUNDS, WARM_UP = 15, 3
#: The largest relative difference between the losses of the warm-up steps.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
#: The columns of the table: step time of the first over that of the second.
RATIOS = {"flax / no norms": ("flax", "identity"), "jaxnorm / no norms": ("jaxnorm", "identity"),
          "speed-up: flax / jaxnorm": ("flax", "jaxnorm")}  # fmt: skip


class Training(Timed):
    """The variants of one task. Each has a compiled step that takes over its state."""

    seconds, fresh = 0.0, False  # a sample is one step

    def __init__(self, name: str, dtype: str, sizes: Sizes):
        super().__init__()
        (model, norm), self.losses = TASKS[name], {}
        batch = model.batch(sizes)
        models = {k: model(norms, norm, jnp.dtype(dtype), sizes) for k, norms in VARIANTS.items()}
        for variant, variables in variables_of(models, batch[0]).items():
            step = compiled(models[variant], variables, batch)
            self.losses[variant] = [float(step()) for _ in range(WARM_UP)]
            self.add((variant, "step"), partial(lambda step: step, step))
        want, got = self.losses["flax"], self.losses["jaxnorm"]
        np.testing.assert_allclose(got, want, rtol=TOLERANCE[dtype], err_msg=f"{name}, {dtype}")

    def present(self) -> dict[str, list[float]]:
        return self.losses


def compiled(model: Model, variables: dict, batch: tuple) -> Callable:
    """A call that takes one step and returns the loss before it."""
    stats, params = flax.core.pop(jax.tree.map(jnp.copy, variables), "params")
    state = params, stats, model.optimizer.init(params)

    def loss_of(params, stats, x, labels):
        logits, stats = model.apply({"params": params, **stats}, x, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return losses.mean(), stats

    def step(state, x, labels):
        params, stats, moments = state
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x, labels)
        updates, moments = model.optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), loss

    program = jax.jit(step, donate_argnums=0).lower(state, *batch).compile()

    def call():
        nonlocal state
        state, loss = jax.block_until_ready(program(state, *batch))
        return loss

    return call


def variables_of(models: dict[str, Model], x: jax.Array) -> dict[str, dict]:
    """The initial variables of each variant: those of flax. Raises unless jaxnorm makes the same tree."""
    init = lambda name: partial(models[name].init, jax.random.key(0), x)
    layouts = {name: flatten_dict(jax.eval_shape(init(name))) for name in models}
    if layouts["flax"] != layouts["jaxnorm"]:
        raise AssertionError(f"the variables differ. flax: {layouts['flax']}, jaxnorm: {layouts['jaxnorm']}")
    values = flatten_dict(jax.jit(init("flax"))())
    return {name: unflatten_dict({path: values[path] for path in layout}) for name, layout in layouts.items()}


def measured(name: str, dtype: str, sizes: Sizes, rounds: int, allocator="default", worker: type = Worker) -> dict:
    """One record. A page fault is 4 KiB that the kernel zeroes for the process."""
    runs = worker(Training, allocator, name, dtype, sizes)
    losses = runs.ask("present")
    taken = {variant: of for (variant, _), of in in_turn(dict.fromkeys(runs.ask("keys"), runs), rounds, 1e9).items()}
    runs.close()
    return {
        "model": name, "dtype": dtype, "losses": losses,
        "seconds": {variant: quartiles(of[:, 0]) for variant, of in taken.items()},
        "ratios": {column: quartiles(taken[a][:, 0] / taken[b][:, 0]) for column, (a, b) in RATIOS.items()},
        "page_faults_per_step": float(f"{np.mean([of[:, 1] for of in taken.values()]):.4g}"),
    }  # fmt: skip


def page(found: list[dict]) -> str:
    (setting,), of = records.settings(found), records.results(found)
    ratio = lambda low, median, high: f"{median:.2f} ({low:.2f} to {high:.2f})"
    rows = [[r["model"], r["dtype"], *(ratio(*r["ratios"][column]) for column in RATIOS)] for r in of]
    about = f"The time of one step over that of another: median (quartiles) of {setting['rounds']} rounds."
    about = f"\n{about} Allocator: {setting['allocator']}.\n"
    text = table(["model", "compute", *RATIOS], rows)
    return "\n".join(["# A training step\n", records.origin(found), about, text, ""])


def main() -> None:
    parser = records.parser(__doc__)
    add = parser.add_argument
    add("--models", **records.choice(TASKS))
    add("--dtypes", **records.choice(TOLERANCE))
    add("--rounds", type=int, default=ROUNDS, help="timed steps of each variant")
    add("--allocator", choices=ALLOCATORS, default="warm", help="whether malloc returns pages to the system")
    add("--tiny", action="store_true", help="models too small to measure, to try the script")
    options = parser.parse_args()
    sizes = TINY if options.tiny else FULL

    def measure() -> Iterator[list[dict]]:
        cpu_devices()
        versions = {package: records.version(package) for package in ("flax", "optax")}
        versions["jaxnorm"] = jaxnorm.__version__
        more = dict(versions=versions, allocator=options.allocator, rounds=options.rounds, sizes=vars(sizes))
        yield [records.setting("training", **more)]
        for name, dtype in itertools.product(options.models, options.dtypes):
            print(f"{name}, {dtype} ...", file=sys.stderr)
            yield [measured(name, dtype, sizes, options.rounds, options.allocator)]

    records.publish("training", options, measure, page)


if __name__ == "__main__":
    main()

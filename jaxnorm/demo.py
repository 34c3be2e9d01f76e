"""Train one network on handwritten digits with three norms, on every device of this machine: a table and a picture.

`python -m jaxnorm.demo` runs it. From top to bottom: the data, the network, its training under `jax.shard_map`, the
picture, the options, the run. Read `forward` and `make_step` to see how a norm is used; the rest is about the command.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import inputs

from ._core.install import extra

States = tuple[Any, ...]

if TYPE_CHECKING:
    import optax

NEEDS = {"matplotlib": "matplotlib", "optax": "optax", "sklearn": "scikit-learn"}
TITLES = {"none": "no normalization", "batch": "batch norm", "layer": "layer norm"}
COLOURS = {"none": "#D55E00", "batch": "#0072B2", "layer": "#009E73"}  # Okabe and Ito's
PROGRAM = "python -m jaxnorm.demo"
TRAIN, TEST = 1347, 450  # images
STRIDES = (1, 1, 1, 1, 2, 1, 1, 1)  # one convolution each
CHANNELS, CLASSES = 24, 10
EVERY = 5  # steps between two evaluations
HOST_DEVICES, MAX_HOST_DEVICES = 4, 64
MIN_RATE, MAX_RATE = 1e-30, 1e30  # in float32 neither 0 nor infinite
INTERRUPTED, BROKEN_PIPE = 130, 141  # exit status after Ctrl-C, and after the reader of a pipe has gone


# --- data: scikit-learn's digits, standardized pixel by pixel ---------------------------------------------------------


class Batch(NamedTuple):
    images: Any  # (B, 8, 8, 1) float32
    labels: Any  # (B,) int32
    mask: Any  # (B,) bool: False is padding


def load() -> tuple[Batch, Batch]:
    """The training and the test set, with grey levels 0 to 16. The split is the same in every run."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images, labels = digits.images[..., None].astype(np.float32), digits.target.astype(np.int32)
    chosen = np.split(np.random.default_rng(0).permutation(len(labels)), [TRAIN])
    train, test = (Batch(images[i], labels[i], np.ones(len(i), bool)) for i in chosen)
    return train, test


# Epsilon is one grey level squared. It keeps test images moderate at pixels that are constant in the training set.
PIXELS = inputs.StandardizeInputs(epsilon=1.0, epsilon_mode="inside")


def pixel_statistics(batches: Iterator[Batch]) -> inputs.SeenStats:
    """Mean and deviation of every pixel, gathered batch by batch."""
    _, nothing = PIXELS.init((8, 8, 1))
    return PIXELS.fit((inputs.Masked(batch.images, batch.mask) for batch in batches), nothing)


def standardized(data: Batch, pixels: inputs.SeenStats) -> Batch:
    """Subtract every pixel's mean and divide by its standard deviation."""
    images, _ = PIXELS.apply((), pixels, data.images)
    return data._replace(images=np.asarray(images))


def in_order(data: Batch, size: int, rows: int, order: np.ndarray | None = None) -> Iterator[Batch]:
    """Batches of `size` images in arrays of `rows`. The last batch may hold fewer images and more padding."""
    order = np.arange(len(data.labels)) if order is None else order
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        filled = lambda a: np.concatenate([a, np.zeros((rows - len(a), *a.shape[1:]), a.dtype)])
        yield Batch(filled(data.images[chosen]), filled(data.labels[chosen]), np.arange(rows) < len(chosen))


def shuffled(data: Batch, size: int, rows: int, seed: int) -> Iterator[Batch]:
    """Endless epochs, each in a new order. The same seed gives the same batches."""
    rng = np.random.default_rng(seed)
    while True:
        yield from in_order(data, size, rows, rng.permutation(len(data.labels)))


# --- the network: pure functions of (params, state) -------------------------------------------------------------------


@dataclass(frozen=True)
class NoNorm:
    """A bias alone, as a `jaxnorm.Norm`. A spec of your own can take part in the same way."""

    def init(self, features: Any) -> tuple[jn.Affine, tuple[()]]:
        return jn.Affine(None, jnp.zeros(features, jnp.float32)), ()

    def apply(self, params: jn.Affine, state: Any, x: Any, *, train: Any = None, mask: Any = None) -> tuple[Any, Any]:
        return x + jnp.broadcast_to(jnp.asarray(params.bias), x.shape), state


NORMS: dict[str, Any] = {
    "none": NoNorm(),
    "batch": jn.BatchNorm(momentum=0.8, axis_name="data"),  # statistics of the whole batch, over all devices
    "layer": jn.LayerNorm(axis=(1, 2, 3)),  # statistics of each image
}


class Block(NamedTuple):
    kernel: jax.Array  # (3, 3, C_in, C)
    affine: jn.Affine  # (C,) each


class Params(NamedTuple):
    blocks: tuple[Block, ...]
    weight: jax.Array  # (C, CLASSES)
    bias: jax.Array  # (CLASSES,)


def init(norm: jn.Norm, seed: int) -> tuple[Params, States]:
    """Parameters, and the state of each norm. Kernels and weights do not depend on the norm."""
    *keys, last = jax.random.split(jax.random.key(seed), len(STRIDES) + 1)
    blocks, states = [], []
    for i, key in enumerate(keys):
        affine, state = norm.init(CHANNELS)
        kernel = jax.nn.initializers.he_normal()(key, (3, 3, CHANNELS if i else 1, CHANNELS), jnp.float32)
        blocks.append(Block(kernel, affine))
        states.append(state)
    weight = jax.nn.initializers.lecun_normal()(last, (CHANNELS, CLASSES), jnp.float32)
    return Params(tuple(blocks), weight, jnp.zeros(CLASSES, jnp.float32)), tuple(states)


def forward(
    norm: jn.Norm, params: Params, states: States, images: jax.Array, *, train: bool, mask: jax.Array | None = None
) -> Any:
    """Logits (B, CLASSES), the new states, and the input of the last ReLU (B, H, W, C)."""
    x, z, new = images, images, []
    mask = None if mask is None else mask[:, None, None, None]
    for block, state, stride in zip(params.blocks, states, STRIDES, strict=True):
        z = lax.conv_general_dilated(x, block.kernel, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        z, state = norm.apply(block.affine, state, z, train=train, mask=mask)
        x = jax.nn.relu(z)
        new.append(state)
    logits = x.mean((1, 2)) @ params.weight
    return logits + jnp.broadcast_to(params.bias, logits.shape), tuple(new), z


# --- training over devices: replicated parameters, sharded batches ----------------------------------------------------


def over_devices(mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """jit of shard_map. `check_vma` proves that results declared replicated are equal on all devices."""
    return lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def mean_over_devices(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of all valid elements on all devices. With uneven masks it is not the mean of the devices' means."""
    return lax.psum(jnp.where(mask, values, 0.0).sum(), "data") / lax.psum(mask.sum(dtype=values.dtype), "data")


def update(norm: Any, optimizer: optax.GradientTransformation, mean: Callable[..., Any]) -> Callable[..., Any]:
    """A function (params, states, optimizer state, batch) -> (the same three after one step, the loss before it)."""
    import optax

    def loss_of(params, states, batch: Batch):
        logits, states, _ = forward(norm, params, states, batch.images, train=True, mask=batch.mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return mean(losses, batch.mask), states

    def step(params, states, memory, batch):
        (loss, states), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, states, batch)
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), states, memory, loss

    return step


def make_step(norm: jn.Norm, optimizer: optax.GradientTransformation, mesh: Mesh) -> Callable[..., Any]:
    """`update` where each device sees its own images. The norm and the loss name the mesh axis they reduce over."""
    return over_devices(mesh, (P(), P(), P(), P("data")), P())(update(norm, optimizer, mean_over_devices))


def make_evaluate(norm: jn.Norm, mesh: Mesh) -> Callable[..., Any]:
    """A function (params, states, batch) -> (accuracy, input of the last ReLU), in inference mode."""

    @over_devices(mesh, (P(), P(), P("data")), (P(), P("data")))
    def evaluate(params, states, batch: Batch):
        logits, _, z = forward(norm, params, states, batch.images, train=False)
        right = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
        return mean_over_devices(right, batch.mask), z

    return evaluate


class Run(NamedTuple):
    """The training of one network."""

    params: Params
    states: States
    losses: np.ndarray  # (steps,) of each batch before its step
    steps: np.ndarray  # after which the test set was evaluated
    accuracies: np.ndarray  # at those steps, 0 to 1
    before: np.ndarray  # inputs of the last ReLU on the test images, before training: (TEST, H, W, C)
    after: np.ndarray  # and after training
    seconds: float  # per step, the median, without compilation


def make_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Plain SGD. The learning rate warms up over a tenth of the steps and decays to zero along a cosine."""
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    return optax.sgd(lambda count: schedule(jnp.asarray(count, jnp.float32)))


def fit(
    norm: jn.Norm, mesh: Mesh, batches: Iterator[Batch], test: Batch, *,
    steps: int, learning_rate: float, seed: int, on_step: Callable[[int, float, float], None] = lambda *_: None,
) -> Run:  # fmt: skip
    """Train, and evaluate on the test set every few steps."""
    optimizer = make_optimizer(steps, learning_rate)
    step, evaluate = make_step(norm, optimizer, mesh), make_evaluate(norm, mesh)
    params, states = init(norm, seed)
    params, states, memory = jax.device_put((params, states, optimizer.init(params)), NamedSharding(mesh, P()))
    accuracy, before = evaluate(params, states, test)
    evaluated, accuracies, losses, seconds, z = [0], [float(accuracy)], [], [], before
    for i, batch in enumerate(itertools.islice(batches, steps), start=1):
        start = time.perf_counter()
        params, states, memory, loss = step(params, states, memory, batch)
        losses.append(float(loss))  # waits for the devices
        seconds.append(time.perf_counter() - start)
        if i % EVERY == 0 or i == steps:
            accuracy, z = evaluate(params, states, test)
            evaluated.append(i)
            accuracies.append(float(accuracy))
        on_step(i, losses[-1], accuracies[-1])
    return Run(
        params, states, np.array(losses), np.array(evaluated), np.array(accuracies),
        np.asarray(before)[test.mask], np.asarray(z)[test.mask], float(np.median(seconds[1:] or seconds)),
    )  # fmt: skip


# --- the picture ------------------------------------------------------------------------------------------------------

FORMATS = (".png", ".svg", ".pdf")
INK, GREY, FAINT = "#1f2430", "#6b7280", "#d5d8de"
STYLE: dict[Any, Any] = {
    "font.size": 11, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 12,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "svg.fonttype": "none",
}  # fmt: skip


def draw(runs: dict[str, Run], out: Path, *, batch_size: int, learning_rate: float, command: str) -> None:
    """Plot the runs, by name of the norm, to a file whose title is the command that draws it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.5), dpi=160, facecolor="white")
        sides: Any = dict(left=0.07, right=0.985, top=0.86, bottom=0.13)
        grid: Any = figure.add_gridspec(len(runs), 2, width_ratios=(1.2, 1), wspace=0.14, hspace=0.12, **sides)
        halo, curves = [withStroke(linewidth=3.5, foreground="white")], figure.add_subplot(grid[:, 0])
        draw_accuracy(curves, runs, halo)
        curves.set_title(f"Handwritten digits at learning rate {learning_rate:g}")
        curves.set_xlabel(f"training step ({batch_size} images each)")
        panels = [figure.add_subplot(grid[i, 1]) for i in range(len(runs))]
        draw_histograms(panels, runs, halo)
        panels[0].set_title(f"What enters the last ReLU (layer {len(STRIDES)})")
        figure.savefig(out, metadata={"Title": command})


def draw_accuracy(axes: Any, runs: dict[str, Run], halo: list[Any]) -> None:
    """Test accuracy against steps, with the name of each curve at its end."""
    last = max(run.steps[-1] for run in runs.values())
    for level in (25, 50, 75, 100):
        axes.axhline(level, color=FAINT, linewidth=0.8, zorder=0)
    axes.axhline(10, color=GREY, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axes.text(0.995 * last, 4.5, "chance", color=GREY, fontsize=9.5, ha="right", va="center")
    top = 100.0  # labels below this height overlap no other label
    for name, run in sorted(runs.items(), key=lambda item: -item[1].accuracies[-1]):
        axes.plot(run.steps, 100 * run.accuracies, color=COLOURS[name], linewidth=2.2, solid_capstyle="round")
        end, gap = 100 * run.accuracies[-1], 5.5
        top = end + gap if end + 2 * gap <= top else min(end, top) - gap  # above the curve if there is space
        look: Any = dict(color=COLOURS[name], fontweight="bold", path_effects=halo, ha="right", va="center")
        axes.text(0.995 * last, top, f"{TITLES[name]}  {end:.1f} %", **look)
    axes.set(xlim=(0, last), ylim=(0, 101), ylabel="test accuracy (%)", yticks=(0, 25, 50, 75, 100))


def draw_histograms(panels: Any, runs: dict[str, Run], halo: list[Any]) -> None:
    """Activations after training, dark where the ReLU passes them; before training, as an outline."""
    finite = {name: [z[np.isfinite(z)] for z in (run.before, run.after)] for name, run in runs.items()}
    reaches = [np.percentile(np.abs(after), 99) for _, after in finite.values() if after.size]
    reach = max(1.0, float(min(np.max(reaches), 2.5 * np.min(reaches)))) if reaches else 1.0
    bins = np.linspace(-reach, reach, 2 * 60 + 1)  # zero is an edge
    middle, width = (bins[1:] + bins[:-1]) / 2, bins[1] - bins[0]
    for axes, (name, (before, after)) in zip(panels, finite.items(), strict=True):
        outline, filled = (h / max(1, h.max()) for h in (np.histogram(z, bins)[0] for z in (before, after)))
        for side, alpha in ((middle < 0, 0.25), (middle > 0, 1.0)):
            axes.bar(middle[side], filled[side], width, color=COLOURS[name], alpha=alpha, linewidth=0)
        axes.stairs(outline, bins, color=GREY, linewidth=1)
        axes.axvline(0, color=INK, linewidth=0.9)
        passing = "diverged"
        if after.size:
            passing = f"std {after.std(dtype=np.float64):.2g}, {100 * np.mean(after > 0):.0f} % pass"
        at = dict(transform=axes.transAxes, ha="right", va="top")
        axes.text(1, 0.98, TITLES[name], color=COLOURS[name], fontweight="bold", **at)
        axes.text(1, 0.77, passing, fontsize=10, **at)
        axes.set(xlim=(-reach, reach), ylim=(0, 1.4), yticks=())
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelbottom=axes is panels[-1], bottom=axes is panels[-1])
    at = dict(transform=panels[0].transAxes, va="top", fontsize=9.5, color=GREY, path_effects=halo)
    panels[0].text(0, 0.97, "outline: before training", **at)
    panels[0].text(0, 0.79, "pale: the ReLU stops it", **at)
    panels[-1].set_xlabel("pre-activation (dimensionless), on the test images")


# --- the options: every mistake is reported before training starts ----------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports an error in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def require(self, needs: dict[str, str], extra_name: str) -> None:
        """Fail unless these modules, by module and package name, are installed."""
        if missing := [package for module, package in needs.items() if importlib.util.find_spec(module) is None]:
            self.error(f"needs {', '.join(missing)}. Write: {extra(extra_name)}")


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number in this range."""

    def number(text: str) -> int:
        if text.strip().isdecimal() and len(text) < 100 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text[:100]!r}")

    return number


steps: Callable[[str], int] = whole(1, 10**6)
positive: Callable[[str], int] = whole(1, 2**31 - 1)
seed: Callable[[str], int] = whole(0, 2**31 - 1)


def rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if MIN_RATE <= float(text) <= MAX_RATE:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from {MIN_RATE} to {MAX_RATE}, got {text!r}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog=PROGRAM, description=str(__doc__).splitlines()[0])
    parser.add_argument("--norm", choices=[*TITLES, "all"], default="all", help="which to train (default: all)")
    parser.add_argument("--devices", type=positive, metavar="N", help="how many (default: all; a CPU is split into 4)")
    parser.add_argument("--steps", type=steps, default=250, metavar="N", help="of each training (default: 250)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="over all devices (default: 128)")
    parser.add_argument("--learning-rate", type=rate, default=0.5, metavar="X", help="the same for all (default: 0.5)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the weights and the order (default: 0)")
    parser.add_argument("--out", type=Path, default="digits.png", metavar="PATH", help="picture (default: digits.png)")
    options = parser.parse_args(argv)
    parser.require(NEEDS, "demo")
    options.devices = devices(parser, options.devices)
    check(parser, options)
    run(parser, options)


def devices(parser: Parser, wanted: int | None) -> list[Any]:
    """The first `wanted` devices. A CPU is split into several, unless the user has set their number.

    The split must happen before JAX's backend starts. Importing JAX, as `import jaxnorm` did, does not start it.
    """
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", "") and getattr(jax.config, "jax_num_cpu_devices", 0) == -1:
        with contextlib.suppress(RuntimeError):  # the backend is running already, if other code calls this
            jax.config.update("jax_num_cpu_devices", min(wanted or HOST_DEVICES, MAX_HOST_DEVICES))
    found = jax.local_devices()
    if wanted and wanted > len(found):
        kind = found[0].platform
        hint = f"Write --devices {len(found)}"
        if kind != "cpu":
            hint += f", or JAX_PLATFORMS=cpu {parser.prog} --devices {min(wanted, MAX_HOST_DEVICES)}"
        elif wanted <= MAX_HOST_DEVICES:
            hint += f", or unset your own setting of their number (XLA_FLAGS={flag}, JAX_NUM_CPU_DEVICES)"
        parser.error(f"argument --devices: there are {len(found)} {kind} devices to be had, not {wanted}. {hint}.")
    return found[:wanted]


def check(parser: Parser, options: argparse.Namespace) -> None:
    """Check the options that depend on one another, and that the picture can be written."""
    size, count, out = options.batch_size, len(options.devices), options.out
    if size < count:
        hint = f"Write --batch-size {count}, or --devices {size}."
        parser.error(f"argument --batch-size: {size} images are too few for {count} devices. {hint}")
    if size > TRAIN:
        parser.error(f"argument --batch-size: must be at most the {TRAIN} training images, got {size}.")
    if out.suffix.lower() not in FORMATS:
        parser.error(f"argument --out: must end in {', '.join(FORMATS)}, got {str(out)!r}.")
    existed = os.path.lexists(out)
    with writing(parser, out), open(out, "ab"):
        pass
    if not existed:
        out.unlink()


@contextlib.contextmanager
def writing(parser: Parser, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        parser.error(f"argument --out: cannot write {str(out)!r}: {error.strerror}.")


# --- the run: train, print, draw --------------------------------------------------------------------------------------


def run(parser: Parser, options: argparse.Namespace) -> None:
    mesh = Mesh(np.array(options.devices), ("data",))
    count, size = len(options.devices), options.batch_size
    padded = lambda images: math.ceil(images / count) * count  # every device gets the same number of rows
    platform = f"{count} {options.devices[0].platform} device{'s' if count > 1 else ''}"
    print(f"{TRAIN} digits to train on, {TEST} to test; batches of {size} over {platform}.")

    train, test = load()
    pixels = pixel_statistics(in_order(train, size, padded(size)))
    train, test = standardized(train, pixels), standardized(test, pixels)
    (test,) = in_order(test, TEST, padded(TEST))

    runs: dict[str, Run] = {}
    for name in TITLES if options.norm == "all" else [options.norm]:
        batches, on_step = shuffled(train, size, padded(size), options.seed), reporter(TITLES[name], options.steps)
        given = dict(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
        runs[name] = fit(NORMS[name], mesh, batches, test, on_step=on_step, **given)

    show(runs)
    same = f"{len(STRIDES)} convolutions, initial weights, batches and learning rate ({options.learning_rate:g}, SGD)"
    print(f"Every norm: the same {same}.")
    given = {
        "norm": options.norm, "devices": count, "steps": options.steps, "batch-size": size,
        "learning-rate": f"{options.learning_rate:g}", "seed": options.seed,
    }  # fmt: skip
    command = " ".join([PROGRAM, *(f"--{name} {value}" for name, value in given.items())])
    with writing(parser, options.out):
        draw(runs, options.out, batch_size=size, learning_rate=options.learning_rate, command=command)
    print(f"Picture: {options.out}")


def reporter(title: str, steps: int) -> Callable[[int, float, float], None]:
    """A function (step, loss, accuracy) that prints five lines in the course of a training."""

    def on_step(step: int, loss: float, accuracy: float) -> None:
        if step % math.ceil(steps / 5) == 0 or step == steps:
            print(f"{title:16}  step {step}/{steps}  loss {loss:.4g}  test {accuracy:.1%}", flush=True)

    return on_step


def show(runs: dict[str, Run]) -> None:
    """Print the table of results."""
    line = "{:18}{:>15}{:>18}{:>15}".format
    print("\n" + line("norm", "test accuracy", "steps to 95 %", "time per step"))
    for name, run in runs.items():
        reached = (int(s) for s, a in zip(run.steps, run.accuracies, strict=True) if a >= 0.95)
        first = next(reached, f"not in {run.steps[-1]}")
        print(line(TITLES[name], f"{100 * run.accuracies[-1]:.1f} %", first, f"{1e3 * run.seconds:.1f} ms"))
    print()


def finish(main: Callable[[], int | None]) -> NoReturn:
    """Run a command. Ctrl-C and a closed pipe (`| head`) end it without a traceback."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        status = BROKEN_PIPE
    sys.exit(status)


if __name__ == "__main__":
    finish(main)

"""What others get wrong: the normalization layers of the field, measured beside jaxnorm's.

    python -m benchmarks.peers [--markdown] [--json PATH] [--only NAME ...]

Every cell is measured when the script runs, with whichever peers are installed. Each peer keeps its own defaults; only
epsilon is set, to the same value for all. Errors are against float64 NumPy on the same input. "-" stands where a peer
has nothing that could be measured. CPU only, on 8 host devices that the script makes itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

DEVICES = 8
if __name__ == "__main__":  # who imports this module chooses for itself where it runs
    _flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    os.environ["XLA_FLAGS"] = " ".join([*_flags, f"--xla_force_host_platform_device_count={DEVICES}"])
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

EPSILON = 1e-5
NOTES = """\
jax {jax}, 8 CPU devices, the same epsilon for all and else each library's defaults. Errors are against float64 NumPy.
Devices: a masked batch norm with axis_name="devices" inside shard_map. Bytes: what jax.vjp holds for the backward pass.
Ulp: 0.5 is correct rounding. "-": there is no such call (mask, or mask and axis name)."""
ROWS, FEATURES = 1024, 512
Array = jax.Array


class Peer:
    """A library, as the calls that are measured. A call that a library does not have stays None."""

    name: str
    package: str
    #: x (rows, features), scale, bias -> y. Parameters are the peer's own where it keeps them, filled with the values.
    layer_norm: Callable | None = None
    #: the same with a mask of x's shape, True where an element counts
    masked_layer_norm: Callable | None = None
    #: x (batch, features) -> y, in training
    batch_norm: Callable | None = None
    #: x (batch, features), mask (batch,) -> y, in training
    masked_batch_norm: Callable | None = None
    #: x (batch, features), mask (batch,), both this device's -> (mean, var) over the devices of the axis "devices"
    synchronized: Callable | None = None

    def __init__(self):
        importlib.import_module(self.package)

    @property
    def version(self) -> str:
        for distribution in (self.package.split(".")[0], f"dm-{self.package}"):
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "unknown"


class Jaxnorm(Peer):
    name, package = "jaxnorm", "jaxnorm"

    def layer_norm(self, x, scale, bias):
        import jaxnorm as jn

        return jn.layer_norm(x, scale, bias, epsilon=EPSILON)

    def masked_layer_norm(self, x, mask):
        import jaxnorm as jn

        return jn.layer_norm(x, mask=mask, epsilon=EPSILON)

    def batch_norm(self, x):
        return self._batch_norm(x, None)[0]

    def masked_batch_norm(self, x, mask):
        return self._batch_norm(x, mask)[0]

    def synchronized(self, x, mask):
        state = self._batch_norm(x, mask, axis_name="devices")[1]
        return state.mean, state.var

    def _batch_norm(self, x, mask, **options):
        import jaxnorm as jn

        norm = jn.BatchNorm(momentum=0.0, epsilon=EPSILON, **options)
        return norm.apply(*norm.init(x.shape[-1]), x, train=True, mask=mask)


class Linen(Peer):
    name, package = "flax.linen", "flax"
    options: Mapping = MappingProxyType({})

    def layer_norm(self, x, scale, bias):
        import flax.linen as nn

        norm = nn.LayerNorm(epsilon=EPSILON, dtype=x.dtype, **self.options)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    def masked_layer_norm(self, x, mask):
        import flax.linen as nn

        return nn.LayerNorm(epsilon=EPSILON, use_scale=False, use_bias=False, **self.options).apply({}, x, mask=mask)

    def batch_norm(self, x):
        return self._batch_norm(x, None)[0]

    def masked_batch_norm(self, x, mask):
        return self._batch_norm(x, mask)[0]

    def synchronized(self, x, mask):
        stats = self._batch_norm(x, mask, axis_name="devices")[1]["batch_stats"]
        return stats["mean"], stats["var"]

    def _batch_norm(self, x, mask, **options):
        import flax.linen as nn

        norm = nn.BatchNorm(use_running_average=False, momentum=0.0, epsilon=EPSILON, **self.options, **options)
        params = {"scale": jnp.ones(x.shape[-1]), "bias": jnp.zeros(x.shape[-1])}
        stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
        mask = None if mask is None else mask[:, None]
        return norm.apply({"params": params, "batch_stats": stats}, x, mask=mask, mutable=["batch_stats"])


class LinenTwoPass(Linen):
    """Flax's own remedy: the variance from centered values instead of E[x^2] - E[x]^2."""

    name, options = "flax.linen use_fast_variance=False", MappingProxyType({"use_fast_variance": False})


class NNX(Peer):
    name, package = "flax.nnx", "flax.nnx"

    def layer_norm(self, x, scale, bias):
        from flax import nnx

        norm = nnx.LayerNorm(x.shape[-1], epsilon=EPSILON, dtype=x.dtype, rngs=nnx.Rngs(0))
        norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
        return norm(x)

    def masked_layer_norm(self, x, mask):
        from flax import nnx

        norm = nnx.LayerNorm(x.shape[-1], epsilon=EPSILON, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        return norm(x, mask=mask)

    def batch_norm(self, x):
        return self._batch_norm(x, None)[0]

    def masked_batch_norm(self, x, mask):
        return self._batch_norm(x, mask)[0]

    def synchronized(self, x, mask):
        norm = self._batch_norm(x, mask, axis_name="devices")[1]
        return norm.mean[...], norm.var[...]

    def _batch_norm(self, x, mask, **options):
        from flax import nnx

        norm = nnx.BatchNorm(x.shape[-1], momentum=0.0, epsilon=EPSILON, rngs=nnx.Rngs(0), **options)
        return norm(x, use_running_average=False, mask=None if mask is None else mask[:, None]), norm


class Haiku(Peer):
    name, package = "haiku", "haiku"

    def layer_norm(self, x, scale, bias):
        import haiku as hk

        norm = hk.without_apply_rng(hk.transform(lambda x: hk.LayerNorm(-1, True, True, eps=EPSILON)(x)))
        params = {"layer_norm": {"scale": scale.astype(x.dtype), "offset": bias.astype(x.dtype)}}
        return norm.apply(params, x)

    def batch_norm(self, x):
        import haiku as hk

        norm = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9, eps=EPSILON)(x, is_training=True))
        return norm.apply(*norm.init(None, jnp.zeros_like(x)), None, x)[0]


class Equinox(Peer):
    name, package = "equinox", "equinox"

    def layer_norm(self, x, scale, bias):
        import equinox as eqx

        norm = eqx.nn.LayerNorm(x.shape[-1], eps=EPSILON)
        norm = eqx.tree_at(lambda n: (n.weight, n.bias), norm, (scale, bias))
        return jax.vmap(norm)(x)

    def batch_norm(self, x):
        import equinox as eqx

        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(x.shape[-1], "batch", eps=EPSILON, mode="batch")
        return jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)[0]


class Keras(Peer):
    name, package = "keras", "keras"

    def layer_norm(self, x, scale, bias):
        import keras

        policy = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else "float32"
        norm = keras.layers.LayerNormalization(epsilon=EPSILON, dtype=policy)
        norm.build(x.shape)
        return norm.stateless_call([scale, bias], [], x)[0]

    def batch_norm(self, x):
        return self._batch_norm(x)

    def masked_batch_norm(self, x, mask):
        return self._batch_norm(x, mask=mask)

    def _batch_norm(self, x, **call):
        import keras

        norm = keras.layers.BatchNormalization(momentum=0.0, epsilon=EPSILON)
        norm.build(x.shape)
        trained, kept = ([v.value for v in vs] for vs in (norm.trainable_variables, norm.non_trainable_variables))
        return norm.stateless_call(trained, kept, x, training=True, **call)[0]


class Standardize(Peer):
    name, package = "jax.nn.standardize", "jax"

    def layer_norm(self, x, scale, bias):
        return jax.nn.standardize(x, epsilon=EPSILON) * scale.astype(x.dtype) + bias.astype(x.dtype)

    def masked_layer_norm(self, x, mask):
        return jax.nn.standardize(x, epsilon=EPSILON, where=mask)

    def batch_norm(self, x):
        return jax.nn.standardize(x, axis=0, epsilon=EPSILON)

    def masked_batch_norm(self, x, mask):
        return jax.nn.standardize(x, axis=0, epsilon=EPSILON, where=mask[:, None])


PEERS = (Jaxnorm, Linen, LinenTwoPass, NNX, Haiku, Equinox, Keras, Standardize)


# --- what is measured -------------------------------------------------------------------------------------------------


def oracle(x, axis: int, scale=1.0, bias=0.0) -> np.ndarray:
    """The norm in float64, of the values that the peers see."""
    x = np.asarray(x).astype(np.float64)
    mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return (x - mean) / np.sqrt(var + EPSILON) * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)


def _unit_params() -> tuple[Array, Array]:
    return jnp.ones(FEATURES), jnp.zeros(FEATURES)


def layer_norm_error(peer: Peer, mean: float) -> float:
    """Largest absolute error of a float32 layer norm of rows of N(mean, 1)."""
    x = jnp.asarray(np.random.default_rng(0).normal(mean, 1.0, (ROWS, FEATURES)), jnp.float32)
    return float(np.abs(np.asarray(peer.layer_norm(x, *_unit_params()), np.float64) - oracle(x, -1)).max())


def batch_norm_error(peer: Peer, mean: float) -> float:
    """The same of a batch norm in training, of columns of N(mean, 1)."""
    x = jnp.asarray(np.random.default_rng(1).normal(mean, 1.0, (ROWS, FEATURES)), jnp.float32)
    return float(np.abs(np.asarray(peer.batch_norm(x), np.float64) - oracle(x, 0)).max())


def synchronized_error(peer: Peer, which: int) -> float:
    """Largest relative error of the batch mean (0) or variance (1) over 8 devices with 1 to 128 valid rows each."""
    lengths = np.array([128, 96, 64, 32, 16, 8, 4, 1])
    mask = np.arange(128)[None] < lengths[:, None]
    rng = np.random.default_rng(2)
    x = rng.normal(2.0 + np.arange(DEVICES)[:, None, None] / 4, 1.0, (DEVICES, 128, 64)).astype(np.float32)
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    call = jax.shard_map(peer.synchronized, mesh=mesh, in_specs=P("devices"), out_specs=P())
    got = jax.jit(call)(x.reshape(-1, 64), mask.reshape(-1))[which]
    valid = x[mask].astype(np.float64)
    truth = (valid.mean(0), valid.var(0))[which]
    return float(np.abs(np.asarray(got, np.float64) / truth - 1.0).max())


def residual_bytes(peer: Peer) -> float:
    """Bytes that jax.vjp of a bfloat16 layer norm holds for the backward pass, per element, every array once."""
    x = jnp.asarray(np.random.default_rng(3).normal(0.0, 1.0, (ROWS, FEATURES)), jnp.bfloat16)
    _, backward = jax.vjp(peer.layer_norm, x, *_unit_params())
    held = {id(a): a.nbytes for a in jax.tree.leaves(backward) if isinstance(a, jax.Array)}
    return sum(held.values()) / x.size


def half_precision_error(peer: Peer) -> float:
    """Largest error of a bfloat16 layer norm with scale and bias, in units of the last place of the exact answer.

    0.5 is what correct rounding gives. Answers smaller than 1 count in the last place of 1, so that nobody is blamed
    for the relative error of an answer near zero.
    """
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(1.0, 1.0, (ROWS, FEATURES)), jnp.bfloat16)
    scale, bias = (jnp.asarray(rng.normal(m, 0.5, FEATURES), jnp.bfloat16).astype(jnp.float32) for m in (1.0, 0.0))
    y = np.asarray(peer.layer_norm(x, scale, bias))
    if y.dtype != jnp.bfloat16:
        raise TypeError(f"a bfloat16 input gave {y.dtype}")
    truth = oracle(x, -1, scale, bias)
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(truth), 1.0))) - 7)
    return float((np.abs(y.astype(np.float64) - truth) / unit).max())


def nan_reaches_gradient(norm: Callable, mask: np.ndarray) -> bool:
    """Whether a NaN where the mask is False reaches the gradient of a loss over the elements where it is True."""
    rng = np.random.default_rng(5)
    full = np.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (16, 8))
    x = jnp.asarray(np.where(full, rng.normal(size=full.shape), np.nan), jnp.float32)
    weight = jnp.asarray(rng.normal(size=full.shape), jnp.float32)
    loss = lambda x: jnp.where(full, norm(x, jnp.asarray(mask)) * weight, 0.0).sum()
    return bool(np.isnan(np.asarray(jax.grad(loss)(x))).any())


def layer_norm_nan(peer: Peer) -> bool:
    return nan_reaches_gradient(peer.masked_layer_norm, np.arange(8) < np.arange(1, 17)[:, None])


def batch_norm_nan(peer: Peer) -> bool:
    return nan_reaches_gradient(peer.masked_batch_norm, np.arange(16) < 12)


@dataclass(frozen=True)
class Row:
    """One line of the table: what is measured, with which call of a peer, and how a value is written."""

    key: str
    title: str
    needs: str
    measure: Callable
    form: Callable


scientific = "{:.1e}".format
decimal = "{:.2f}".format
yes_or_no = ("no", "yes").__getitem__

TABLE = (
    Row("layer_norm_1e2", "layer norm, float32, N(1e2, 1): max error", "layer_norm",
        lambda peer: layer_norm_error(peer, 1e2), scientific),
    Row("layer_norm_1e4", "layer norm, float32, N(1e4, 1): max error", "layer_norm",
        lambda peer: layer_norm_error(peer, 1e4), scientific),
    Row("batch_norm_1e2", "batch norm, float32, N(1e2, 1): max error", "batch_norm",
        lambda peer: batch_norm_error(peer, 1e2), scientific),
    Row("batch_norm_1e4", "batch norm, float32, N(1e4, 1): max error", "batch_norm",
        lambda peer: batch_norm_error(peer, 1e4), scientific),
    Row("sync_mean", "batch mean over 8 uneven devices: rel. error", "synchronized",
        lambda peer: synchronized_error(peer, 0), scientific),
    Row("sync_var", "batch variance over 8 uneven devices: rel. error", "synchronized",
        lambda peer: synchronized_error(peer, 1), scientific),
    Row("residuals", "layer norm, bfloat16: bytes kept per element", "layer_norm", residual_bytes, decimal),
    Row("bfloat16", "layer norm, bfloat16: max error in ulp", "layer_norm", half_precision_error, decimal),
    Row("layer_norm_nan", "layer norm: masked NaN reaches the gradient", "masked_layer_norm",
        layer_norm_nan, yes_or_no),
    Row("batch_norm_nan", "batch norm: masked NaN reaches the gradient", "masked_batch_norm",
        batch_norm_nan, yes_or_no),
)  # fmt: skip


def measured(peer: Peer, row: Row) -> float | bool | str | None:
    """The value; None where the peer has no such call; a word for a result of NaN, or the name of an error raised."""
    if getattr(peer, row.needs) is None:
        return None
    try:
        value = row.measure(peer)
    except Exception as error:
        print(f"{peer.name}, {row.key}: {type(error).__name__}: {error}", file=sys.stderr)
        return type(error).__name__
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def run(names: list[str] | None = None) -> dict:
    """All measurements: versions, the peers that are missing, and a value per row and peer."""
    peers, missing = [], []
    for kind in PEERS:
        if names is not None and kind.name not in names:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peers.append(kind())
        except ImportError:
            missing.append(kind.name)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in TABLE:
            rows.append({"key": row.key, "title": row.title, "values": {p.name: measured(p, row) for p in peers}})
    return {"versions": {p.name: p.version for p in peers}, "missing": missing, "rows": rows}


def cells(results: dict) -> list[list[str]]:
    """The table as text: a header, then a line for each row."""
    forms = {row.key: row.form for row in TABLE}
    text = lambda key, v: "-" if v is None else v if isinstance(v, str) else forms[key](v)
    header = ["", *(f"{name} {version}" for name, version in results["versions"].items())]
    return [header, *([r["title"], *(text(r["key"], v) for v in r["values"].values())] for r in results["rows"])]


def as_text(table: list[list[str]]) -> str:
    """Aligned for a terminal, with a library's name over its version."""
    names, versions = zip(*((*c.rsplit(" ", 1),) if " " in c else (c, "") for c in table[0]), strict=True)
    lines = [list(names), list(versions), *table[1:]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    aligned = lambda line: "  ".join(
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
    )
    rule = "-" * len(aligned(lines[0]))
    return "\n".join([aligned(lines[0]), aligned(lines[1]), rule, *(aligned(line) for line in lines[2:])])


def as_markdown(table: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in table[0][1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (table[0], rule, *table[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a table for a README")
    parser.add_argument("--json", metavar="PATH", help="also write every number to this file")
    names = [peer.name for peer in PEERS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"these alone, of {', '.join(names)}")
    options = parser.parse_args()
    results = run(options.only)
    print((as_markdown if options.markdown else as_text)(cells(results)))
    print(f"\n{NOTES.format(jax=jax.__version__)}")
    if results["missing"]:
        print(f"Not installed, left out: {', '.join(results['missing'])}.")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, **results}, file, indent=2)


if __name__ == "__main__":
    main()

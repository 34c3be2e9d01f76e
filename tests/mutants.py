"""Plants faults in copies of the package, one at a time, and reports which test saw each.

    python -m tests.mutants [--list] [--only NAME ...]

A mutant is one replacement in one file, and the tests that are expected to see it. Each runs for at most two minutes and
stops at the first failure. That test must pass without the fault. Exit status 1 if a mutant survives: then a test is
missing. A fault that keeps the tests from being collected counts for nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 120


class Mutant(NamedTuple):
    name: str
    file: str  # in jaxnorm/
    old: str  # occurs there once
    new: str
    tests: str  # arguments of pytest: files in tests/, and options


XLA = " --backend absent"  # the formulas alone, where kernels would hide them
STATISTICS, FORMULA, RUNNING = "_ops/statistics.py", "_ops/formula.py", "_ops/running.py"
FORMULAS, BATCH, SHARING = "_core/formulas.py", "_ops/batch.py", "_ops/sharing.py"
QUANTIZE, SEEN = "_ops/quantize.py", "_ops/seen.py"
ACCURACY, MASKS, STATE = "laws/test_accuracy.py", "laws/test_masks.py", "laws/test_state.py"
INPUTS = "tools/test_inputs.py"

MUTANTS = [
    # --- statistics and their derivatives
    Mutant("E[x^2] - E[x]^2", FORMULAS, "weights, n, shift, reduction, size=size, ids=ids)",
           "weights, n, 0.0 * shift, reduction, size=size, ids=ids)", ACCURACY + XLA),
    Mutant("E[x^2] - E[x]^2 of columns", FORMULAS, "shift = over.sum(sample, None) / over",
           "shift = 0.0 * over.sum(sample, None) / over", ACCURACY + " -k batch" + XLA),
    Mutant("no correction of the second moment", FORMULAS, "    m2 = m2 - correction\n", "", ACCURACY + " -k batch" + XLA),
    Mutant("wrong sign of the term of the variance", FORMULA, "times.append(-s * at_x(apart((d2",
           "times.append(s * at_x(apart((d2",
           ACCURACY + XLA),
    Mutant("no term of the mean", FORMULA, "if reduction.centered:\n            plus.append", "if False:\n            plus.append",
           ACCURACY + XLA),
    Mutant("half the tangent of the second moment", STATISTICS, "2.0 * total((jnp.conj(z)", "1.0 * total((jnp.conj(z)",
           "laws/test_autodiff.py" + XLA),
    Mutant("a tangent of weights without the mean", STATISTICS, "for a in (z, abs_squared(z))]",
           "for a in (0 * z, abs_squared(z))]", MASKS + " -k weight"),
    Mutant("epsilon outside the root", FORMULA, "v = m2 / nonzero_divisor(n) + least",
           "v = jnp.square(jnp.sqrt(m2 / nonzero_divisor(n)) + least)", ACCURACY + XLA),
    Mutant("the unbiased variance", FORMULA, "v = m2 / nonzero_divisor(n) + least",
           "v = m2 / nonzero_divisor(n - 1) + least", ACCURACY + XLA),
    Mutant("a root without a stop", FORMULA, "s = lax.stop_gradient(lax.rsqrt(v))", "s = lax.rsqrt(v)",
           "laws/test_accuracy.py laws/test_autodiff.py" + XLA),
    # --- masks and weights
    Mutant("a mask is not counted", "_core/masks.py", "kept = ones if mask is None else jnp.where(mask, ones, 0.0)",
           "kept = ones", MASKS + XLA),
    Mutant("padding is normalized", "_core/masks.py", "return keep | (jnp.abs(x.astype(accumulator(x))) <= 1e30)",
           "return keep | True", MASKS + " -k poison_in_the_padding_reaches_no_output" + XLA),
    Mutant("padding has a tangent", "_core/masks.py", "return dx if keep is None else jnp.where(usable(x, keep), dx, 0.0)",
           "return dx", MASKS + " -k padding_gives" + XLA),
    Mutant("rows that are masked out stay", "_core/masks.py", "return jnp.where(mask, x, jnp.zeros((), x.dtype))", "return x",
           MASKS + " -k poison_in_the_padding_reaches_no_output" + XLA),
    Mutant("kernels get weights without the mask", "_backends/cpu/__init__.py", "else jnp.where(mask, weights, 0.0)",
           "else weights", MASKS + " -k combine_with_a_mask"),
    Mutant("kernels keep what is absent", "_backends/cpu/adapter.py", "mask, weights, whole=not names)\n        if not names:",
           "None, weights, whole=not names)\n        if not names:", MASKS + " -k match_true_counts"),
    Mutant("weights are squared", FORMULAS, "else weights.astype(a.dtype) * a",
           "else jnp.square(weights.astype(a.dtype)) * a", MASKS + " -k weight" + XLA),
    Mutant("a group's channels share a mask once", "_core/over.py", "return a * self.each", "return a",
           MASKS + " -k group" + XLA),
    Mutant("a prefix about the number that all share", STATISTICS, "d2 = d2 - 2.0 * (jnp.conj(offset) * d1).real + dn",
           "d2 = d2 + dn", "laws/test_elementwise.py -k so-far"),
    # --- programs
    Mutant("a program hides values from checks", "_core/tracing.py", "if _trace.hides_values:", "if False:",
           "project/test_specs.py -k at_every_call"),
    Mutant("a program warns when it is traced alone", "_core/tracing.py", "if _trace.runs:", "if False:",
           "project/test_specs.py -k at_every_call"),
    Mutant("options that are equal share a program", "_core/program.py", "typed=True)", "typed=False)",
           "project/test_specs.py -k kinds_of_numbers"),
    # --- axes, groups, parameters, dtypes
    Mutant("the last axis for channels", BATCH, "axes = tuple([a for a in range(x.ndim) if a not in channels])",
           "axes = tuple(range(x.ndim - 1))", ACCURACY + " -k nchw"),
    Mutant("groups of channels interleaved", "_core/channels.py", "(groups, shape[channel] // max(groups, 1))",
           "(shape[channel] // max(groups, 1), groups)", ACCURACY + " -k group"),
    Mutant("scale_offset is ignored", FORMULA, "return scale + scale_offset if scale_offset else scale", "return scale",
           ACCURACY),
    Mutant("two roundings", FORMULA, "xhat if cast_dtype is None else round_to(xhat, cast_dtype)", "round_to(xhat, dtype)",
           "laws/test_dtypes.py" + XLA),
    Mutant("one rounding in Llama's order", FORMULA, "xhat if cast_dtype is None else round_to(xhat, cast_dtype)", "xhat",
           "laws/test_dtypes.py -k 'rms_norm_rounds or rounded_value'" + XLA),
    Mutant("a residual is kept in float32", "_ops/by_formula.py",
           "recompute(functools.partial(output_tangent, plan), plan.reduction.plain)", "functools.partial(output_tangent, plan)",
           "laws/test_memory.py" + XLA),
    Mutant("an activation is kept", "_ops/epilogue.py",
           "recompute(functools.partial(_with_epilogue_tangent, plan, plain, by_kernel), plan.reduction.plain)",
           "functools.partial(_with_epilogue_tangent, plan, plain, by_kernel)", "laws/test_memory.py"),
    # --- activations, gates, the residual stream
    Mutant("an activation without its derivative", "_ops/epilogue.py",
           "_activation.epilogue(plan, z, gate, keep), (z, gate), (dz, dgate))", "z, (z, gate), (dz, dgate))",
           ACCURACY + " -k 'gelu or silu or relu'"),
    Mutant("gelu by tanh", "_ops/activation.py", "approximate=False", "approximate=True", ACCURACY + " -k gelu"),
    Mutant("the gate on the other side", "_norms/gated.py", '"after" if norm_before_gate else "before"',
           '"before" if norm_before_gate else "after"', "backends/test_fused.py -k gate"),
    Mutant("the residual of another dtype", "_ops/residual.py",
           "_rounded(plain, x.astype(wide) + residual.astype(wide), residual.dtype)",
           "_rounded(plain, x.astype(residual.dtype) + residual, residual.dtype)", "backends/test_fused.py -k 'add_norm or residual'"),
    Mutant("the gradient of the residual alone", "_ops/residual.py", "return dx + dresidual", "return dresidual",
           "backends/test_fused.py -k 'add_norm or residual'"),
    # --- quantized outputs
    Mutant("a scale of mxfp8 that saturates", QUANTIZE, "(bits & 0x7FFFFF) > 0x600000", "(bits & 0x7FFFFF) > 0x700000",
           "laws/test_quantized.py" + XLA),
    Mutant("padding in the largest value", QUANTIZE, "jnp.where(keep, size, 0.0)).max(", "size).max(",
           "laws/test_quantized.py -k masked"),
    Mutant("largest values of one device", QUANTIZE, "amax = max_over_devices(top(y), ", "amax = (lambda a, *_: a)(top(y), ",
           "laws/test_quantized.py -k axis_name" + XLA),
    Mutant("blocks divided by what is not rounded", QUANTIZE, "jnp.where(rounded == 0.0, jnp.inf, rounded)",
           "jnp.where(rounded == 0.0, jnp.inf, scale)", "laws/test_quantized.py"),
    # --- running statistics
    Mutant("momentum of the new", RUNNING, "part = 1.0 - momentum\n", "part = momentum\n", STATE),
    Mutant("a biased running variance", RUNNING, "freedom = 1.0 if unbiased else 0.0", "freedom = 0.0", STATE),
    Mutant("cumulative variances averaged", RUNNING, "_toward(old_var * free(count), batch.m2 / nonzero_divisor(batch.count), part) + between",
           "_toward(old_var * free(count), batch.m2 / nonzero_divisor(batch.count), part)", STATE),
    Mutant("gradients into the state", RUNNING, "lax.stop_gradient(jnp.where(where, new.astype(old.dtype), old))",
           "jnp.where(where, new.astype(old.dtype), old)", STATE),
    Mutant("frozen updates in training", BATCH, "    if frozen or train is False:\n", "    if train is False:\n", STATE),
    Mutant("frozen accumulates", "_norms/running.py", "state if self.frozen else update_state", "update_state", "laws/test_accumulation.py"),
    Mutant("skip_nonfinite is ignored", RUNNING, "seen &= jnp.isfinite(batch.mean) & jnp.isfinite(batch.m2)", "pass", STATE),
    Mutant("min_count is one more", RUNNING, "(batch.count >= min_count)", "(batch.count > min_count)", STATE),
    Mutant("no correction of the start", RUNNING, "_debiased(part, momentum, count) if policy.debias else part", "part", STATE),
    Mutant("a prescale is lost", BATCH, "stats.m2 / reduction.prescale / reduction.prescale", "stats.m2 / reduction.prescale",
           STATE),
    Mutant("a traced train is inverted", BATCH, "y = jnp.where(train, y, by_running())", "y = jnp.where(train, by_running(), y)",
           STATE),
    # --- devices
    Mutant("no all-reduce of the backward pass", STATISTICS, "if reduction.axis_name is not None and sums:", "if False:",
           "layouts/test_devices.py" + XLA),
    Mutant("the count of one device", "_core/collectives.py", "Statistics(total[0], shift", "Statistics(n[0], shift",
           "layouts/test_devices.py" + XLA),
    Mutant("groups of devices are ignored", "_core/collectives.py", "if groups is not None:\n            group =",
           "if False:\n            group =", "layouts/test_sync.py layouts/test_devices.py -k group"),
    Mutant("every member of a group counts", SHARING, "stats._replace(count=jnp.where(first, stats.count, 0.0), m2=jnp.where(first, stats.m2, 0.0))",
           "stats", "layouts/test_devices.py layouts/test_sync.py -k group"),
    Mutant("the last ghost batch counts its padding", SHARING, "    if padding != 0:\n", "    if False:\n", ACCURACY + " -k ghost"),
    Mutant("tangents do not vary", "_core/vma.py", "    if not missing:\n", "    if True:\n", "layouts/test_devices.py -k shard_map"),
    Mutant("parameters' gradients of one device", "_backends/partition.py",
           "collectives.summed([out[i]], over)[0] if over else out[i]", "out[i]", "layouts/test_devices.py -k jit"),
    # --- kernels and errors
    Mutant("kernels ignore scale_offset", "_ops/by_kernel.py", "effective_scale(scale, plan.scale_offset, acc)",
           "scale.astype(acc)", ACCURACY),
    Mutant("an eager batch reduces other axes", "_backends/call.py", "tuple(a + 1 for a in self.plan.reduction.axes)",
           "self.plan.reduction.axes", "backends/test_native.py -k vmap"),
    Mutant("a kernel skips its tail", "_backends/cpu/simd.h", "  if (i < n) body(i, Part{int(n - i)}, 0);\n", "",
           ACCURACY + " backends/test_native.py"),
    Mutant("a kernel takes the mean of RMS norm", "_backends/cpu/rows.h", "first[k] = all(job.centered ? sums.first / count : A(0))",
           "first[k] = all(sums.first / count)", ACCURACY + " -k rms"),
    Mutant("an error without the line to write", BATCH, "Write train=True in training and train=False at inference.", "",
           "laws/test_errors.py"),
    Mutant("an unknown activation passes", "_ops/activation.py", "if activation is None or callable(activation) or",
           "if activation is None or activation or", "laws/test_errors.py"),
    # --- Flax layers
    Mutant("use_running_average is inverted", "_layers/flax_rules.py", "    return not use\n", "    return bool(use)\n",
           "layers/test_linen.py"),
    Mutant("the scale has another name", "_layers/derive.py", "self.spec.paths.get(name, name)",
           "self.spec.paths.get(name, name.replace('scale', 'gamma'))", "layers/test_linen.py"),
    Mutant("init stores the statistics of its example", "_layers/linen.py", "if train is not False and not initializing and",
           "if train is not False and", "layers/test_linen.py -k 'not equal_to_flax'"),
    Mutant("nnx forgets the statistics", "_layers/nnx.py", "variable[...] = new\n", "pass\n", "layers/test_nnx.py"),
    Mutant("cast parameters lose their offset", "_layers/flax_rules.py", "p + offset[name] if", "p if",
           "layers/test_derive.py"),
    # --- inputs
    Mutant("no variance between what was seen and a batch", SEEN, "(b + a) + (1.0 - p) * jnp.square(d))", "(b + a))", INPUTS),
    Mutant("the low bits of a running mean are lost", SEEN, "mean, low = _two_sum(mean, low + p * gap)",
           "mean, low = mean + (low + p * gap), 0.0 * low", INPUTS + " -k millions"),
    Mutant("counts lose what float32 rounds off", SEEN, "_two_sum(wide.count, wide.count_low + new.count)",
           "_two_sum(wide.count, new.count)", INPUTS + " -k millions"),
    Mutant("devices keep statistics of their own", SEEN, "if names and local:", "if False:", INPUTS + " -k devices_update"),
    Mutant("returns start again before they are counted", "_inputs/returns.py", 'if reset == "before" else old',
           "if reset else old", INPUTS + " -k rollout"),
    Mutant("percentiles of padding", "_inputs/percentile.py", "jnp.where(keep, x, jnp.inf)", "x", INPUTS + " -k percentiles"),
    Mutant("the last layer forgets that means moved", "_inputs/pop_art.py", "wide(bias) + moved / after.std", "wide(bias)",
           INPUTS + " -k pop_art"),
    Mutant("a killed fit sees batches twice", "_inputs/fitting.py", "if seen > done:", "if True:", INPUTS + " -k after_a_kill"),
]  # fmt: skip


def planted(mutant: Mutant, text: str) -> str:
    """The file's text with the fault in it. Raises if the old text does not occur exactly once."""
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has {mutant.old!r} {found} times. Write it as it is there now.")
    return text.replace(mutant.old, mutant.new)


def copied(folder: Path) -> None:
    """The package, with its library, and in a process that has `folder` in PYTHONPATH not the one installed."""
    from jaxnorm._backends import cpu

    shutil.copytree(ROOT / "jaxnorm", folder / "jaxnorm", ignore=shutil.ignore_patterns("__pycache__"))
    for library in (path for where in cpu.__path__ for path in Path(where).glob("jaxnorm_cpu.*")):
        shutil.copy(library, folder / "jaxnorm" / "_backends" / "cpu")
    (folder / "sitecustomize.py").write_text(
        'import sys\nsys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]\n'
    )


def rebuilt(folder: Path) -> None:
    kernels, build = folder / "jaxnorm" / "_backends" / "cpu", folder / "build"
    quick = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    for command in (["cmake", "-S", str(kernels), "-B", str(build), *quick], ["cmake", "--build", str(build), "-j", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    shutil.copy(build / "jaxnorm_cpu.so", kernels)


def run(folder: Path, tests: list[str], cache: str, seconds: int) -> tuple[list[str], str]:
    """The tests that fail on the package in this folder, and how the run ended."""
    command = [sys.executable, "-P", "-m", "pytest", "-o", "addopts=", "-o", "pythonpath=tests", "-p", "no:cacheprovider"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON"))}
    env = {**kept, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "JAX_COMPILATION_CACHE_DIR": cache}
    paths = [f"tests/{word}" if ".py" in word else word for word in tests]
    try:
        done = subprocess.run([*command, "-q", "-rf", "--tb=no", *paths], cwd=ROOT, env=env, capture_output=True, text=True,
                              timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], f"no test failed within {seconds} s"
    failed = re.findall(r"^FAILED (?:tests/)?(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed if done.returncode == 1 else [], (done.stdout + done.stderr).strip().splitlines()[-1]


def vacuous(folder: Path, seen: dict[Mutant, str], cache: str) -> list[str]:
    """The mutants whose test fails without the fault as well."""
    broken: set[str] = set()
    for backend in ("native", "absent"):
        tests = {test for mutant, test in seen.items() if (XLA in mutant.tests) == (backend == "absent")}
        failed, said = run(folder, ["--backend", backend, *tests], cache, 10 * SECONDS) if tests else ([], "passed")
        if not failed and "passed" not in said:
            sys.exit(f"the copy without a fault: {said}")
        broken |= {*failed}
    return [mutant.name for mutant, test in seen.items() if test in broken]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose name has this in it")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.only or any(name in m.name for name in options.only)]
    if options.list:
        print(*(f"{m.name}: {m.file} ({m.tests})" for m in chosen), sep="\n")
        return 0
    seen: dict[Mutant, str] = {}
    with tempfile.TemporaryDirectory(prefix="jaxnorm-mutants-") as temporary:
        clean, mutated, cache = Path(temporary, "clean"), Path(temporary, "mutated"), str(Path(temporary, "compiled"))
        copied(clean)
        for mutant in chosen:
            start = time.monotonic()
            shutil.rmtree(mutated, ignore_errors=True)
            shutil.copytree(clean, mutated)
            path = mutated / "jaxnorm" / mutant.file
            path.write_text(planted(mutant, path.read_text()))
            if path.suffix in (".h", ".cpp"):
                rebuilt(mutated)
            failed, said = run(mutated, ["-x", *shlex.split(mutant.tests)], cache, SECONDS)
            seen.update({mutant: failed[0]} if failed else {})
            spent = f"{time.monotonic() - start:4.0f} s  {mutant.name}"
            print(f"seen {spent}: {failed[0]}" if failed else f"SURVIVED {spent}: {said}", flush=True)
        survived = [m.name for m in chosen if m not in seen] + vacuous(clean, seen, cache)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants were seen", *survived, sep="\n  ")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())

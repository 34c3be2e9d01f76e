"""The command: see the package's docstring."""

import argparse
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.search", description="A random search for wrong numbers.")
    parser.add_argument("--cases", type=int, default=200, help="how many configurations (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default 0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first configuration (default 0)")
    parser.add_argument("--devices", action="store_true", help="layouts and sync over eight host devices instead")
    parser.add_argument("--magnitude", choices=("usual", "full"), default="usual",
                        help="of x: 1e-3 to 1e4, or 1e-30 to 1e30 (default usual)")  # fmt: skip
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they were drawn")
    parser.add_argument("--worst", action="store_true", help="print the largest errors as parts of what is allowed")
    args = parser.parse_args()

    from jaxnorm._backends import cpu

    from . import devices, run
    from .case import drawn

    cpu.is_profitable = lambda view, dtype: True  # kernels wherever there are some, however small x is
    failed, last = 0, None
    for index in range(args.start, args.start + args.cases):
        if args.devices:
            case = devices.drawn(args.seed, index)
            wrong, shrunk, program = devices.failures(case), devices.shrunk, case
        else:
            case = drawn(args.seed, index, wide=args.magnitude == "full")
            wrong, shrunk, program = run.failures(case), run.shrunk, case.program()
        if index % 100 == 99:  # or programs fill the memory
            jax.clear_caches()
        if wrong:
            failed += 1
            simple = case if args.no_shrink or program == last else shrunk(case)
            print(
                f"# {index}: {case!r}", *(f"#   {line}" for line in wrong), f"check({simple!r})", sep="\n", flush=True
            )
            last = program
    if args.worst:
        print(*(f"# {name}: {ratio:.3f}" for name, ratio in sorted(run.WORST.items())), sep="\n")
    print(f"{args.cases} configurations from {args.start} of seed {args.seed}: {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

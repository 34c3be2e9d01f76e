"""What the norms of the family cost on a CPU, at the shapes of models, beside what users write today.

As `benchmarks.cpu` measures: contestants take turns, in copies of x, each compared with float64 first. "jnp" is the
formula as authors of JAX models write it, torch's that of models in torch. "plain norm" is the layer or RMS norm of the
same arrays: what a norm costs that only adds parameters to it.
"""

from __future__ import annotations

from benchmarks import cpu
from benchmarks.harness import records, table
from benchmarks.harness.case import FORMATS
from benchmarks.harness.family import ROWS, FamilyCase

NAMES = ("jaxnorm", "plain norm", "jaxnorm-xla", "jnp", "torch", "torch-spin")
RATIOS = {"jaxnorm / plain norm": ("jaxnorm", ["plain norm"]), "jnp / jaxnorm": ("jnp", ["jaxnorm"]),
          "torch / jaxnorm": ("torch", ["jaxnorm"]), "jaxnorm-xla / jnp": ("jaxnorm-xla", ["jnp"])}  # fmt: skip


def page(found: list[dict]) -> str:
    cases = records.results(found)
    parts = ["# Norms of the family on a CPU\n", records.origin(found), f"\n{__doc__.split(chr(10), 2)[2]}"]
    for (dtype,), of in records.grouped(cases, "dtype").items():
        text = table.contestants(of, cpu.PASSES, lambda norm, which, copies: f"{copies:.3g}")
        parts.append(table.section(dtype, text))
    parts += [table.section("Ratios: the geometric mean over the shapes, and the range", summary(cases))]
    return "\n".join([*parts, table.failures(cases)]).strip() + "\n"


def summary(cases: list[dict]) -> str:
    rows = []
    for (norm, dtype), of in records.grouped(cases, "norm", "dtype").items():
        for which in cpu.PASSES:
            row = [f"{norm} {dtype} {which}"]
            for a, b in RATIOS.values():
                pairs = [[table.copies_of(case, which, names) for names in ([a, f"{a}-spin"], b)]
                         for case in records.grouped(of, *table.CASE).values()]  # fmt: skip
                row.append(table.spread([mine / other for mine, other in pairs if mine and other]))
            if set(row[1:]) != {"-"}:
                rows.append(row)
    return table.table(["", *RATIOS], rows)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--norms", **records.choice(ROWS))
    parser.add_argument("--dtypes", **records.choice(cpu.DTYPES))
    parser.add_argument("--only", **records.choice(NAMES))
    parser.add_argument("--rounds", type=int, default=12, help="samples of each contestant in each case, at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="no further round of a case begins after this")
    options = parser.parse_args()
    cases = [FamilyCase(norm, s, dtype) for norm in options.norms for s in ROWS[norm][0] for dtype in options.dtypes
             if norm not in FORMATS or dtype == "bfloat16"]  # fmt: skip
    given = tuple(options.only), ["warm"], options.rounds, options.seconds
    records.publish("family", options, lambda: cpu.measure(cases, *given, name="family"), page, table.draw)


if __name__ == "__main__":
    main()

"""The one table printer, and the tables and the picture of contestants in copies of x."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.harness.case import least
from benchmarks.harness.records import grouped, results

CASE = ("run", "allocator", "norm", "shape", "dtype")  # what tells the cases of a file apart


def table(heads: Iterable, rows: Iterable[Iterable]) -> str:
    """Markdown that is also aligned for a terminal. The first column is text; a column of numbers is on the right."""
    lines = [[str(cell) for cell in line] for line in (heads, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [i > 0 and all(cell[:1].isdigit() or cell in ("-", "failed", "no", "yes", "NaN") for cell in column[1:])
             for i, column in enumerate(columns)]  # fmt: skip
    line = lambda cells: "| " + " | ".join(
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(cells, widths, right, strict=True)
    ) + " |"  # fmt: skip
    rule = ["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, right, strict=True)]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n"


def names_of(records: list[dict]) -> list[str]:
    return list(dict.fromkeys(record["name"] for record in records if "name" in record))


def copies_of(of: list[dict], which: str, names: Iterable[str]) -> float | None:
    """The time of the fastest of these contestants in a pass, in copies of x; None if there is none."""
    return min((r[which]["copies"][1] for r in of if r.get("name") in names and which in r), default=None)


def spread(ratios: list[float]) -> str:
    """The geometric mean of ratios, and their range."""
    if not ratios:
        return "-"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def contestants(records: list[dict], passes: Iterable[str], form: Callable[[str, str, float], str]) -> str:
    """A line for each case and pass, a column for each contestant: `form(norm, pass, copies)`."""
    names = names_of(records)
    rows = []
    for keys, of in grouped(records, *CASE).items():
        failed = {record["name"] for record in of if "failed" in record}
        copy = [record for record in of if record.get("best")]
        for which in passes:
            best = next((r["seconds"][1] for r in copy if r.get("pass", which) == which), None)
            copies = {name: copies_of(of, which, [name]) for name in names}
            if not failed and not any(copies.values()):  # a pass that this norm does not have
                continue
            cells = (form(keys[2], which, c) if c else "failed" if n in failed else "-" for n, c in copies.items())
            time = f"{1e6 * best:.4g}" if best else "failed"
            rows.append([f"{' '.join(keys[-3:])} {which}", time, f"{least(keys[2], which):g}", *cells])
    return table(["", "copy, µs", "limit", *names], rows)


def failures(records: list[dict]) -> str:
    """A line for each reason, with the cases where it holds."""
    reasons = grouped([record for record in records if "failed" in record], "name", "failed")
    case = lambda record: record.get("check") or " ".join(record[key] for key in CASE[-3:])
    return "\n".join(f"- {name}, {'; '.join(map(case, of))}: {why}" for (name, why), of in reasons.items())


def draw(records: list[dict], path: Path) -> None:
    """Bars of forward+backward in copies of x, for the first case of each norm."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    which = "forward+backward"
    cases: dict = {}
    for (*_, norm, shape, dtype), of in grouped(results(records), *CASE).items():
        if bars := [(record[which]["copies"], record["name"]) for record in of if which in record]:
            cases.setdefault(norm, (f"{norm} norm, {shape} {dtype}", bars))
    if not cases:
        return
    columns = min(2, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(5.2 * columns, 0.4 + 3.1 * lines), dpi=160, facecolor="white", layout="constrained")
    for i, (norm, (title, bars)) in enumerate(cases.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        bars = sorted(bars, key=lambda bar: -bar[0][1])
        low, middle, high = zip(*(copies for copies, _ in bars), strict=True)
        error = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.barh([name for _, name in bars], middle,
                  color=["#0072B2" if name.startswith("jaxnorm") else "#b8bcc4" for _, name in bars])  # fmt: skip
        axes.errorbar(middle, range(len(bars)), xerr=error, fmt="none", ecolor="#6b7280")
        for y, copies in enumerate(middle):
            axes.text(high[y], y, f"  {copies:.3g}", va="center")
        limit = least(norm, which)
        axes.axvline(limit, color="#D55E00", linewidth=1.5)
        axes.text(limit, len(bars) - 0.35, f"limit {limit:g}", color="#D55E00", ha="center", va="bottom", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(min(limit, *middle) / 1.5, max(limit, *high) * 1.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(high) < 100 else (1,)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, pad=18, loc="left", weight="bold", fontsize=10.5)
        axes.set_xlabel(f"{which}, in copies of x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_sweep(records: list[dict], path: Path) -> None:
    """Small arrays: the time of flax over that of jaxnorm, against the bytes of x. Below 1, jaxnorm is slower."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    size = lambda r: math.prod(map(int, r["shape"].split("x"))) * (4 if r["dtype"] == "float32" else 2)
    lines: dict = {}
    for (norm, dtype), found in grouped(results(records), "norm", "dtype").items():
        cases = list(grouped(found, *CASE).values())
        for which, name in itertools.product(("forward", "forward+backward"), ("jaxnorm-native", "jaxnorm-xla")):
            both = [(size(case[0]), *(copies_of(case, which, [n]) for n in ("flax.linen", name))) for case in cases]
            ratios = sorted((n, theirs / ours) for n, theirs, ours in both if theirs and ours)
            lines.setdefault((norm, which), []).append((f"{name.removeprefix('jaxnorm-')}, {dtype}", ratios))
    figure = Figure(figsize=(10.4, 7.6), dpi=160, facecolor="white", layout="constrained")
    panels = figure.subplots(math.ceil(len(lines) / 2), 2, sharex=True, squeeze=False)
    colours = {"native": "#0072B2", "xla": "#b8bcc4"}
    for axes, ((norm, which), of) in zip(panels.flat, lines.items(), strict=False):
        for label, ratios in of:
            sizes, ratio = zip(*ratios, strict=True)
            style = "-" if label.endswith("float32") else "--"
            axes.plot(sizes, ratio, style, marker=".", color=colours[label.split(",")[0]], label=label)
        axes.axhline(1, color="#D55E00", linewidth=1)
        axes.set(xscale="log", yscale="log", title=f"{norm} norm, {which}", ylabel="flax / jaxnorm")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8, frameon=False)
    for axes in panels[-1]:
        axes.set_xlabel("bytes of x")
    figure.savefig(path)

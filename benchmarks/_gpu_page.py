"""What `benchmarks/gpu.py` prints, writes and draws of its measurements, and what they are held to."""

from __future__ import annotations

from pathlib import Path

from benchmarks import peers
from benchmarks._jax_device import Composed
from benchmarks._work import PASSES

GIB = 1 << 30
#: By how much a median may be behind and still be level.
LEVEL = 0.97
TARGETS = {"forward": 85.0, "backward": 75.0}
NOTES = """\
{device} (driver {driver}), jax {jax}, {date}: {done} of {planned} cases in {minutes:.1f} minutes.
Cells: percent of the bandwidth of a device-to-device copy, medians of up to {rounds} rounds; "copy" is what that moved.
"-": no such norm; "failed": an error, or not the norm: see below."""


def percent(result: dict, name: str, which: str) -> float | None:
    of = result["contestants"].get(name, {"passes": {}})["passes"].get(which)
    return of and of["percent"][1]


def ours(result: dict, which: str) -> float | None:
    """The faster of jaxnorm's rooms."""
    names = [n for n in result["contestants"] if n.startswith("jaxnorm-") and n != Composed.name]
    return max((p for n in names if (p := percent(result, n, which))), default=None)


def verdicts(results: list[dict]) -> list[dict]:
    """What is asked of the library, each met or not, over the rows of more than 1 GB (and the fused calls)."""
    rows = [r for r in results if r["norm"] in ("layer", "rms") and r["bytes"] >= GIB]
    lines = []

    def line(what: str, limit: float, of: list[tuple[dict, float | None]]) -> None:
        values = [(value, f"{r['norm']} {shape_of(r)} {r['dtype']}") for r, value in of if value]
        good = sum(value >= limit for value, _ in values)
        verdict = "not measured" if not values else "met" if good == len(values) else "NOT met"
        worst = min(values, default=None)
        lines.append({"what": what, "limit": limit, "verdict": verdict, "met": good, "of": len(values), "worst": worst})

    for which, limit in TARGETS.items():
        line(f"{which}: at least {limit:.0f} % of the copy", limit, [(r, ours(r, which)) for r in rows])
    for peer, limit in (("flax.linen", 2.0), ("torch.compile", LEVEL), ("tokamax", LEVEL)):
        for which in PASSES if limit == LEVEL else PASSES[-1:]:
            pairs = [(r, ours(r, which), percent(r, peer, which)) for r in rows]
            ratios = [(r, mine / theirs if mine and theirs else None) for r, mine, theirs in pairs]
            line(f"{which}: {limit:g} x {peer}" if limit > 1 else f"{which}: level with {peer}", limit, ratios)
    for norm in ("add_rms", "gated_rms"):
        of = [r for r in results if r["norm"] == norm]
        for which in PASSES:
            pairs = [(r, ours(r, which), percent(r, Composed.name, which)) for r in of]
            line(
                f"{norm}, {which}: level with its composition",
                LEVEL,
                [(r, a / b if a and b else None) for r, a, b in pairs],
            )
    return lines


def shape_of(result: dict) -> str:
    return "x".join(map(str, result["shape"]))


def table(report: dict, which: str) -> list[list[str]]:
    """A line for each case, in percent of the copy."""
    present = [
        n for n in report["versions"] if any(n in {**r["contestants"], **r["failures"]} for r in report["results"])
    ]
    lines = [["", "copy", *(f"{name} {report['versions'][name]}" for name in present)]]
    for result in report["results"]:
        best = min((seconds[1] for seconds in result["copies"].values()), default=0.0)
        line = [f"{result['norm']} {shape_of(result)} {result['dtype']}"]
        line.append(f"{2 * result['bytes'] / best / 1e9:.0f} GB/s" if best else "failed")
        for name in present:
            value = percent(result, name, which)
            line.append(f"{value:.1f} %" if value else "failed" if name in result["failures"] else "-")
        lines.append(line)
    return lines


def _by_reason(failed) -> list[str]:
    """A line for each reason, with the cases it holds for."""
    cases: dict = {}
    for why, case in failed:
        cases.setdefault(why, []).append(case)
    return [f"- {'; '.join(of)}: {why}" for why, of in cases.items()]


def page(report: dict, markdown: bool) -> str:
    """Everything that is printed."""
    form, heading = (peers.as_markdown, "### {}\n") if markdown else (peers.as_text, "{}\n")
    parts = ["# benchmarks/gpu.py\n", f"    {report['command']}\n"] if markdown else []
    for which in PASSES:
        parts += [heading.format(f"{which}, percent of the copy"), form(table(report, which)), ""]
    lines = [["target", "verdict", "cases", "worst"]]
    for v in report["verdicts"]:
        worst = f"{v['worst'][0]:.3g} at {v['worst'][1]}" if v["worst"] else "-"
        lines.append([v["what"], v["verdict"], f"{v['met']} of {v['of']}", worst])
    parts += [heading.format("targets"), form(lines), "", NOTES.format(**report)]
    for room, cases in report["checks"].items():
        failed = {case: found for case, found in cases.items() if isinstance(found, str)}
        parts.append(f"{room}: equals float64 in {len(cases) - len(failed)} of {len(cases)} small cases.")
        parts += _by_reason((why, case) for case, why in failed.items())
    cases = [(f"{r['norm']} {shape_of(r)} {r['dtype']}", r["failures"]) for r in report["results"]]
    parts += _by_reason((f"{name}: {why}", case) for case, failures in cases for name, why in failures.items())
    if report["missing"]:
        parts.append("Left out: " + "; ".join(f"{n} ({why})" for n, why in report["missing"].items()) + ".")
    if report["left_out"]:
        parts.append("Not reached in time: " + "; ".join(report["left_out"]) + ".")
    return "\n".join(parts) + "\n"


def draw(report: dict, path: Path) -> None:
    """Percent of the copy, for the first case of each norm and each pass."""
    from matplotlib.figure import Figure

    norms: dict = {}
    for result in report["results"]:
        norms.setdefault(result["norm"], result)
    figure = Figure(figsize=(12.5, 0.4 + 2.6 * len(norms)), dpi=130, facecolor="white", layout="constrained")
    for i, result in enumerate(norms.values()):
        for j, which in enumerate(PASSES):
            axes = figure.add_subplot(len(norms), 3, 3 * i + j + 1)
            bars = [(percent(result, name, which), name) for name in result["contestants"]]
            bars = sorted(bar for bar in bars if bar[0])
            axes.barh([n for _, n in bars], [p for p, _ in bars],
                      color=["#0072B2" if n.startswith("jaxnorm-") else "#b8bcc4" for _, n in bars])  # fmt: skip
            for y, (value, _) in enumerate(bars):
                axes.text(value, y, f" {value:.0f}", va="center", fontsize=8)
            axes.axvline(100, color="#D55E00", linewidth=1.5)
            axes.set_title(f"{result['norm']} {shape_of(result)} {result['dtype']}\n{which}", loc="left", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"percent of the bandwidth of a copy, {report['device']}", fontsize=9)
    figure.savefig(path)

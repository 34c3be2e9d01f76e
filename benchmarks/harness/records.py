"""Results as JSON Lines, one record a line, and the command line that all benchmarks share.

A run begins with a record of its setting, which has a "command". NAME.jsonl is the result; NAME.md and NAME.png are
made from it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from benchmarks.harness.timing import THREADS

RESULTS = Path(__file__).parents[1] / "results"
SCRATCH = Path(tempfile.gettempdir()) / "jaxnorm-benchmarks"


def setting(name: str, **more) -> dict:
    """How a run is measured: the first of its records."""
    return {
        "command": " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": THREADS,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "jaxlib")},
        **more,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8") if path.exists() else "")
    return found[1] if found else platform.machine()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: list[dict]) -> None:
    lines = [json.dumps(record, separators=(",", ":")) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def settings(records: list[dict]) -> list[dict]:
    return [record for record in records if "command" in record]


def results(records: list[dict]) -> list[dict]:
    return [record for record in records if "command" not in record]


def grouped(records: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Records by the values of these keys, in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return groups


def origin(records: list[dict]) -> str:
    """The commands, versions and dates of the runs, in Markdown."""
    first, *_ = runs = settings(records)
    says = [f"jax {first['jax']}", first.get("device") or first.get("processor"), first.get("date"), first.get("note")]
    says.insert(2, f"driver {first['driver']}" if "driver" in first else None)
    versions = [f"{k} {v}" for k, v in first.get("versions", {}).items()]
    commands = [f"    {run['command']}" for run in runs]
    said = [*commands, "", ", ".join(filter(None, says)) + "."]
    said += [f"Versions: {', '.join(versions)}."] * bool(versions)
    left_out = {name: why for run in runs for name, why in run.get("missing", {}).items()}
    said += [f"Left out: {'; '.join(f'{name} ({why})' for name, why in left_out.items())}."] * bool(left_out)
    return "\n".join(said)


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--out", type=Path, metavar="FOLDER", help="for NAME.jsonl, NAME.md and NAME.png")
    made.add_argument("--again", action="store_true", help="measure nothing: make the tables of the .jsonl again")
    return made


def choice(of: Collection[str], default: Collection[str] | None = ()) -> dict:
    """The keywords of an option that takes some of these names, and all by default."""
    return {"nargs": "+", "choices": of, "metavar": "NAME", "help": f"of {', '.join(of)}",
            "default": list(of) if default == () else default}  # fmt: skip


def publish(name: str, options: argparse.Namespace, measure: Callable[[], Iterator[list[dict]]],
            page: Callable[[list], str], draw: Callable | None = None, default: Path = SCRATCH) -> None:  # fmt: skip
    """Measure, save after each step, print the page, and draw. Results go to `--out`, or else to `default`."""
    folder = options.out or (RESULTS if options.again else default)
    records: list[dict] = []
    for found in [read(folder / f"{name}.jsonl")] if options.again else measure():
        records += found
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.jsonl", records)
        (folder / f"{name}.md").write_text(page(records), encoding="utf-8")
        print(f"{name}: {len(results(records))} records", file=sys.stderr)
    print(page(records))
    if draw is not None:
        try:
            draw(records, folder / f"{name}.png")
        except ImportError:
            print("matplotlib is not installed: no picture.")
    print(f"Written to {folder}.")

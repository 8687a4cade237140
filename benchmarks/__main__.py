"""``python -m benchmarks [op ...]``: measure, print tables with a progress line, write JSON and an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from benchmarks import harness, report

OPS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("op", nargs="*", metavar="op", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--full", action="store_true", help="the sizes of the committed results")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip", action="append", default=[], metavar="ROW", help="leave a variant out; repeatable")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    unknown = set(options.op) - set(OPS)
    if unknown:
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; choose from {', '.join(OPS)}")
    return options


def _measure(op: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    bench = harness.load(op)
    results: dict[str, Any] = {"op": op, "machine": harness.machine(options.device), "cases": [], "memory_only": {}}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=None)

        def tick(text: str) -> None:
            progress.update(task, description=f"{op} {text}")

        for case in bench.cases(options.full, options.device):
            result = harness.measure(bench, case, options.rounds, tick, options.device, tuple(options.skip))
            results["cases"].append(result)
        for case in bench.memory_only(options.full):
            tick(f"{case.id}: memory")
            there = bench.variants(case, options.device)
            name = next(name for name in bench.OURS if name in there)
            results["memory_only"][case.id] = harness.peak_memory(bench, case, name, options.device)
    return results


def main() -> None:
    options = _arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log, whose width is not the tables'
    everything = []
    for op in options.op or OPS:
        results = _measure(op, options, console)
        for result in results["cases"]:
            first, *others = report.columns(result)
            table = Table(Column(first, no_wrap=True), *others, title=f"{op} {result['case']} on {result['device']}")
            failed = {name: row["failed"] for name, row in result["rows"].items() if "failed" in row}
            for cells in report.lines(result, results["machine"]):
                if cells[0] not in failed:
                    table.add_row(*cells)
            console.print(table)
            for name, reason in failed.items():
                console.print(f"no time for {name}: {reason}", markup=False)
        for case, needed in results["memory_only"].items():
            mib = [size / 2**20 for size in needed or ()]
            text = f"needs {mib[0]:.0f} MiB beyond inputs, {mib[1]:.0f} of them gradients" if mib else "could not run"
            console.print(f"{op} {case}: a step {text}")
        harness.save(str(options.out / f"{op}.json"), results)
        (options.out / f"{op}.md").write_text(report.markdown(results))
        everything.append(results)
    page = options.out / "index.html"
    page.write_text(report.page(everything))
    console.print(f"report: {page.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()

"""``python -m benchmarks [--full] [--rounds N] [--out DIR]``: measure, print tables, write JSON and an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import bench_margin_softmax as bench
from benchmarks import harness, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the sizes of the committed results, and a million classes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    results: dict[str, Any] = {"op": "margin_softmax", "machine": harness.machine(), "cases": []}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=None)
        for case in bench.FULL if options.full else bench.QUICK:
            results["cases"].append(
                harness.measure(case, options.rounds, lambda text: progress.update(task, description=text))
            )
        if options.full:
            progress.update(task, description=f"{bench.MILLION.id}: memory")
            results["million_classes_step_bytes"] = harness.peak_memory(bench.MILLION, "pyelastic cpu")
    for result in results["cases"]:
        table = Table(*report.COLUMNS, title=f"margin_softmax {result['case']}")
        for cells in report.lines(result, results["machine"]):
            table.add_row(*cells)
        console.print(table)
    if options.full:
        needed = results["million_classes_step_bytes"] / 2**20
        console.print(f"C = 1e6, D = 128, B = 256: a step needs {needed:.0f} MiB")
    harness.save(str(options.out / "margin_softmax.json"), results)
    (options.out / "margin_softmax.md").write_text(report.markdown(results))
    (options.out / "index.html").write_text(report.page(results))
    console.print(f"report: {(options.out / 'index.html').resolve()}")


if __name__ == "__main__":
    main()

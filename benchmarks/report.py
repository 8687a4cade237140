"""Tables and the HTML page from results."""

from __future__ import annotations

import html
import io
from typing import Any

from benchmarks.harness import median, spread

TRAINING = (
    *("variant", "forward ms", "fwd+bwd ms", "spread", "vs ours", "peak MiB beyond gradients", "% of GEMM peak"),
    "% of copy",
)
FORWARD = ("variant", "ms", "spread", "vs ours", "peak MiB", "% of GEMM peak", "% of copy")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def columns(result: dict[str, Any]) -> tuple[str, ...]:
    """Headings of a case's table: a case without a backward pass has no samples of the forward alone."""
    return TRAINING if any(row.get("forward_s") for row in result["rows"].values()) else FORWARD


def lines(result: dict[str, Any], machine: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row of text per variant, fastest first; a variant without a right result shows why."""
    ours = median(result["rows"].get(result["ours"], {}).get("step_s", []))
    headings, table = columns(result), []
    for name, row in result["rows"].items():
        if "failed" in row:
            table.append((float("inf"), (name, row["failed"], *[""] * (len(headings) - 2))))
            continue
        time = median(row["step_s"])
        memory = "-" if row["memory"] is None else f"{max(0, row['memory'] - row['gradient_bytes']) / 2**20:.0f}"
        peak = result["flops"] / time / (machine["gemm_gflop_per_s"] * 1e9)
        forward = (_ms(median(row["forward_s"])) if row["forward_s"] else "-",) if headings is TRAINING else ()
        noise = f"{100 * spread(row['step_s']):.0f} %"
        copy = result["bytes"] / time / (machine["copy_gb_per_s"] * 1e9)
        cells = (name, *forward, _ms(time), noise, f"{time / ours:.2f}x", memory)
        table.append((time, (*cells, f"{100 * peak:.0f} %", f"{100 * copy:.0f} %")))
    return [cells for _, cells in sorted(table, key=lambda entry: entry[0])]


def markdown(results: dict[str, Any]) -> str:
    text = []
    for result in results["cases"]:
        headings = columns(result)
        text += [f"\n**{result['case']}**\n", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        text += ["| " + " | ".join(cells) + " |" for cells in lines(result, results["machine"])]
    return "\n".join(text) + "\n"


def _plot(result: dict[str, Any]) -> str:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in result["rows"].items() if "failed" not in row}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.5 + 0.4 * len(rows)), sharey=True)
    left.barh(list(rows), [1e3 * median(row["step_s"]) for row in rows.values()])
    left.set_xlabel("forward + backward, ms" if columns(result) is TRAINING else "ms")
    right.barh(list(rows), [(row["memory"] or 0) / 2**20 for row in rows.values()])
    right.set_xlabel("peak memory of a step (gradient included), MiB")
    left.invert_yaxis()
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def page(everything: list[dict[str, Any]]) -> str:
    """One HTML page, self-contained, for the results of several ops."""
    parts = ["<!doctype html><meta charset='utf-8'><title>pyelastic benchmarks</title>"]
    parts.append("<style>body{font-family:sans-serif;max-width:75em;margin:auto}")
    parts.append("td,th{padding:.2em .8em;text-align:right}")
    parts.append("td:first-child{text-align:left}</style><h1>pyelastic benchmarks</h1>")
    parts.append("<p>Medians of interleaved rounds; spread is the interquartile range. A variant whose result or")
    parts.append("gradients fail the float64 oracle shows why instead of a time.</p>")
    for results in everything:
        parts.append(f"<h2>{html.escape(results['op'])}</h2><table>")
        parts += [f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in results["machine"].items()]
        parts.append("</table>")
        for result in results["cases"]:
            parts.append(f"<h3>{html.escape(result['case'])} on {result['device']}</h3><table><tr>")
            parts += [f"<th>{column}" for column in columns(result)]
            for cells in lines(result, results["machine"]):
                parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells))
            parts.append("</table>" + _plot(result))
    return "\n".join(parts)

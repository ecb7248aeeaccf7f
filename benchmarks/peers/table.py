"""The results as tables: one per cell, each figure above its ratio to the reference side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from benchmarks.peers.cells import Cell
from benchmarks.peers.metrics import Metrics

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "tok/s": ("tokens_per_second", "{:.1f}".format),
    "TTFT p50\ns": ("ttft_p50", "{:.2f}".format),
    "TTFT p95\ns": ("ttft_p95", "{:.2f}".format),
    "gap p50\nms": ("gap_p50", lambda seconds: f"{seconds * 1e3:.1f}"),
    "gap p95\nms": ("gap_p95", lambda seconds: f"{seconds * 1e3:.1f}"),
    "peak\nMiB": ("peak_memory", lambda size: f"{size / 2**20:.0f}"),
}


def show(results: Mapping[Cell, Mapping[str, Metrics]], reference: str, console: Console) -> None:
    """Print every cell. A ratio is the side's figure divided by the reference's."""
    for cell, medians in results.items():
        table = Table(title=cell.title(), title_justify="left")
        table.add_column("side", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        base = medians.get(reference)
        for side, metrics in medians.items():
            table.add_row(side, *_figures(metrics, None if side == reference else base))
        console.print(table)
    console.print(
        "[dim]tok/s: output tokens of all requests. TTFT: time to first token. gap: between "
        f"two tokens of a request. x: the figure divided by that of {reference}."
    )


def _figures(metrics: Metrics, base: Metrics | None) -> list[str]:
    figures = []
    for name, shown in COLUMNS.values():
        value, other = getattr(metrics, name), getattr(base, name) if base else 0
        figures.append(shown(value) + (f"\n{value / other:.2f}x" if other else ""))
    return figures

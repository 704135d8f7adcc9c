"""Histograms of what the sample filter of near-policy rollouts keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opdjax.report.charts import (
    COLOURS,
    HEIGHT,
    WIDTH,
    box,
    colour_of,
    figure,
    picture,
    small_axes,
    swatches,
    tick,
)
from opdjax.report.markup import Html

Bounds = tuple[float | None, float | None]

ZONES = {"kept": 2, "degenerate": 1, "disconnected": 3}  # with their colours


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Numbers of samples between consecutive edges: one edge more than counts."""

    edges: np.ndarray
    counts: np.ndarray

    def pieces(self, bounds: Bounds) -> Iterator[tuple[str, float, float, float]]:
        """(zone, left, right, height) of every bar; a bar with a bound inside gives two pieces."""
        low, high = (e if b is None else b for b, e in zip(bounds, (-np.inf, np.inf)))
        zones = {"degenerate": (-np.inf, low), "kept": (low, high), "disconnected": (high, np.inf)}
        for left, right, height in zip(self.edges, self.edges[1:], self.counts):
            for zone, (start, end) in zones.items():
                start, end = max(left, start), min(right, end)
                if start < end and height > 0:
                    yield zone, float(start), float(end), float(height)


def pooled(histograms: Sequence[Histogram]) -> Histogram | None:
    """The sum of the histograms; None where all are empty.

    Where edges differ, the samples of a bar are spread evenly over its width.
    """
    found = [one for one in histograms if len(one.counts)]
    if not found:
        return None
    first = found[0].edges
    if all(np.array_equal(one.edges, first) for one in found):
        return Histogram(first, sum(one.counts for one in found))
    low, high = min(one.edges[0] for one in found), max(one.edges[-1] for one in found)
    edges = np.linspace(low, high, max(len(one.counts) for one in found) + 1)
    below = lambda one: np.interp(edges, one.edges, np.concatenate(([0], np.cumsum(one.counts))))
    return Histogram(edges, sum(np.diff(below(one)) for one in found))


def deltas(title: str, histogram: Histogram, bounds: Bounds, x_range: tuple[float, float]) -> Html:
    """Samples by their Delta, coloured by zone. Bounds are lines, or named at the edge."""

    def paint(canvas: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = small_axes(canvas, "Δ = IFD of the teacher − IFD of the student", "samples")
        for zone, left, right, count in histogram.pieces(bounds):
            inset = 0.04 * (right - left)
            bar = {"width": right - left - 2 * inset, "align": "edge", "linewidth": 0}
            axes.bar(left + inset, count, **bar, color=colour_of(ZONES[zone]))
        axes.set_xlim(*x_range)
        for bound, side in zip(bounds, ("right", "left")):
            if bound is not None:
                _bound(axes, bound, side, x_range)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(tick)

    return figure(title, picture(f"{title}: samples by their Delta", WIDTH, HEIGHT, paint))


def _bound(axes: Any, bound: float, side: str, x_range: tuple[float, float]) -> None:
    style = {"va": "bottom", "color": COLOURS["ink"]}
    if x_range[0] <= bound <= x_range[1]:
        axes.axvline(bound, color=COLOURS["ink"], linewidth=1.2, dashes=(4, 3), zorder=4)
        at = axes.get_xaxis_transform()
        axes.text(bound, 1.0, f" {tick(bound)} ", transform=at, ha=side, **style)
    elif bound < x_range[0]:
        axes.text(0.0, 1.0, f"← bound {tick(bound)}", transform=axes.transAxes, ha="left", **style)
    else:
        axes.text(1.0, 1.0, f"bound {tick(bound)} →", transform=axes.transAxes, ha="right", **style)


def zone_key(names: dict[str, str]) -> Html:
    """The legend of `deltas`."""
    return swatches([(f"{zone}: {meaning}", box(ZONES[zone])) for zone, meaning in names.items()])

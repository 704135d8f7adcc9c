"""Drawings for the pages, as inline SVG by matplotlib: lines, rows of names, and lanes of time.

Text stays text and colours are CSS variables, so one drawing serves light and dark mode. Legends
are HTML outside of the drawing. Every function returns a `<figure>`, or nothing where there is
nothing to draw.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from opdjax.config.validation import MissingExtraError
from opdjax.report.text import number
from opdjax.runs.results import is_number

SERIES = 6  # colours that hue, dash and marker tell apart
REST = -1  # the slot of lines that give context only
# matplotlib draws with these colours; `_plain` replaces them with CSS variables.
_NAMES = ("ink", "muted", "grid", *(f"series-{slot}" for slot in range(SERIES)), "rest")
INK, MUTED, GRID, *SLOTS = (f"#fe01{at:02x}" for at in range(len(_NAMES)))
_DASHES = ((), (6, 2), (1.5, 1.5), (7, 2, 1.5, 2), (10, 2.5), (3, 2), ())  # by slot, REST last
_MARKERS = ("o", "s", "^", "D", "v", "P", "o")
TEXT, LETTER = 13, 7.2  # size of text and width of a letter, pixels
_SMALL = (450, 280)  # width and height of a chart, pixels
_MARGINS = (62, 10, 32, 54)  # left, right, top, bottom
_ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks
NOTHING = Markup("")

Bounds = tuple[float | None, float | None]


def require_matplotlib() -> None:
    """Raise ImportError with what to install, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        needed = "opdjax report needs matplotlib: pip install 'opdjax[report]'"
        raise MissingExtraError(needed) from error


# What every drawing shares


def figure(
    title: str,
    described: str,
    size: tuple[float, float],
    paint: Callable[[Any], None],
    about: str | None = None,
    *,
    is_wide: bool = False,
) -> Markup:
    """What `paint` draws on a matplotlib figure of `size` (pixels), with title and caption."""
    import matplotlib
    from matplotlib.figure import Figure

    muted = ("axes.edgecolor", "xtick.color", "ytick.color")
    # Two drawings of a page must not share an id: ids depend on the salt.
    settings = dict.fromkeys(muted, MUTED) | {"svg.fonttype": "none", "svg.hashsalt": described}
    settings |= {"text.color": INK, "grid.color": GRID, "font.size": TEXT}
    settings |= {"axes.linewidth": 0.8, "grid.linewidth": 0.8, "axes.axisbelow": True}
    settings |= {"text.parse_math": False, "lines.solid_capstyle": "round"}
    width, height = size
    with matplotlib.rc_context(settings):
        canvas = Figure(figsize=(width / 72, height / 72), dpi=72)
        paint(canvas)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    start = Markup('<svg class="chart" viewBox="0 0 {:g} {:g}" style="max-width: {:.0f}px"')
    drawing = start.format(width, height, width)
    drawing += Markup(' role="img" aria-label="{}">').format(described) + _inline(out.getvalue())
    scroll = Markup('<div class="scroll" tabindex="0" role="group" aria-label="{}">{}</div>')
    return Markup("<figure{}><h3>{}</h3>{}{}</figure>").format(
        Markup(' class="wide"' if is_wide else ""),
        title,
        scroll.format(title, drawing) if is_wide else drawing,
        Markup("<figcaption>{}</figcaption>").format(about) if about else "",
    )


def _inline(svg: str) -> Markup:
    """The content of the drawing, with CSS variables and the font of the page."""
    unused = r"\A.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    body = re.sub(unused, "", svg, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda found: _plain(found[0]), body)
    return Markup(re.sub(r"\s*\n\s*", " ", body).replace("xlink:href", "href"))


def _plain(element: str) -> str:
    """An SVG element with CSS variables and short numbers, without its font and ids without use."""
    unused = r' id="[A-Za-z][A-Za-z\d.]*_\d+"| font-family: [^;"]*;?| transform="rotate\(-0 [^"]*"'
    element = re.sub(unused, "", element)
    short = lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
    element = re.sub(r"\d+\.\d{3,}", short, element)
    return re.sub(r"#fe01(..)", lambda found: f"var(--{_NAMES[int(found[1], 16)]})", element)


def axes_in(
    canvas: Any, margins: tuple[float, ...], grid: str | None, x: str = "", y: str = ""
) -> Any:
    """Axes inside of the margins (left, right, top, bottom, pixels), with only a bottom edge and
    grid lines across `x`, `y`, `both` or neither; `x` and `y` are labels.
    """
    (left, right, top, bottom), (width, height) = margins, canvas.bbox.size
    inner = width - left - right, height - top - bottom
    place = left / width, bottom / height, inner[0] / width, inner[1] / height
    axes = canvas.add_axes(place)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    if grid is not None:
        axes.grid(axis=grid)
    # At fixed places: to find them, matplotlib would measure every tick label, twice.
    style = {"color": MUTED, "transform": axes.transAxes}
    axes.text(0.5, -28 / inner[1], x, ha="center", va="top", **style)
    axes.text((3 - left) / inner[0], 1 + 11 / inner[1], y, **style)
    return axes


def dashes(slot: int) -> str:
    """The `stroke-dasharray` of a slot's line in a legend."""
    return " ".join(f"{length * 1.5:g}" for length in _DASHES[slot])


def finite(values: Iterable[float | None]) -> list[float]:
    """The finite values."""
    return [float(value) for value in values if is_number(value)]


# Ticks


def tick(value: float) -> str:
    """A short number for an axis: 0.25, 40k, 1.5M, 3e-4."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}".replace("-", "−")
    return number(float(f"{value:.6g}"))


def linear_ticks(axis: Any, most: int = 5, unit: str = "", *, integer: bool = False) -> None:
    """At most `most` round numbers on an axis of matplotlib, each followed by the unit."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=_ROUND, integer=integer))
    axis.set_major_formatter(lambda value, _: f"{tick(value)}{unit}")


def log_ticks(low: float, high: float, width: float) -> list[float]:
    """Up to six round numbers, 1 among them, whose labels do not touch on an axis of this width."""
    within = ((1, 1.2, 1.5, 2, 3, 5, 8), (1, 2, 5), (1, 3))
    for steps, every in (*((steps, 1) for steps in within), *(((1,), n) for n in range(1, 99))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        powers = [10.0**decade for decade in decades if decade % every == 0]
        values = [round(step * power, 12) for power in powers for step in steps]
        found = [value for value in values if low <= value <= high]
        gaps = np.diff(np.log(found)) * width / math.log(high / low)
        room = [LETTER * (len(tick(value)) + 2) for value in found]
        if len(found) <= 6 and all(2 * gaps >= np.add(room[1:], room[:-1])):
            break
    return found


# Lines


@dataclasses.dataclass(frozen=True)
class Line:
    """One line; `low` and `high` bound its interval. The slot sets colour, dash and marker."""

    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    slot: int = 0
    is_faint: bool = False
    has_markers: bool = False
    bars: bool = False  # intervals as bars instead of a band


def lines(
    title: str,
    found: Sequence[Line],
    y: str,
    x: str = "step",
    about: str | None = None,
    *,
    log_x: bool = False,
    log_y: bool = False,
    categories: Sequence[str] = (),
    reference: float | None = None,
    bounds: Bounds = (None, None),
) -> Markup:
    """Lines with intervals. `categories` name x = 0, 1, 2 …; `reference` is a thin horizontal line;
    `bounds` limit the possible y, which is shown as far as the lines need it.
    """
    found = [line for line in found if any(map(is_number, line.y))]
    if not found:
        return NOTHING

    def paint(canvas: Any) -> None:
        axes = axes_in(canvas, _MARGINS, "y", x, y)
        axes.margins(0.05 if log_x or categories else 0.02, 0.06)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.minorticks_off()
        for line in found:
            _paint_line(axes, line)
        needed = axes.get_ylim() if log_y else _limits(axes, found, reference, bounds)
        axes.set_ylim(*needed)
        for line in found:
            _paint_interval(axes, line)
        if reference is not None:
            axes.axhline(reference, color=MUTED, linewidth=0.9, dashes=(4, 3))
        places = sorted({float(value) for line in found for value in line.x})
        linear_ticks(axes.xaxis, integer=all(place.is_integer() for place in places))
        linear_ticks(axes.yaxis)
        for axis, is_log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
            if is_log:
                axis.set_ticks(log_ticks(*axis.get_view_interval(), 200))
        if categories:
            every = math.ceil(len(categories) / 6)
            axes.set_xticks(range(0, len(categories), every), categories[::every])
            axes.set_xlim(-0.3, len(categories) - 0.7)  # also where a category has no point

    return figure(title, f"{title}: {y} against {x}", _SMALL, paint, about)


def curves(
    title: str,
    columns: Iterable[tuple[int, Sequence[float | None]]],
    steps: Sequence[float],
    y: str,
    about: str | None = None,
    **options: Any,
) -> Markup:
    """`(slot, one value per step)` columns as `smoothed` lines; `options` as in `lines`."""
    found = [line for slot, values in columns for line in smoothed(steps, values, slot)]
    return lines(title, found, y, "step", about, **options)


def smoothed(steps: Sequence[float], values: Sequence[float | None], slot: int = 0) -> list[Line]:
    """A faint line of all steps and a strong smoothed one; one line where most lack a value."""
    window = smoothing_window(len(steps))
    known = [(step, value) for step, value in zip(steps, values) if is_number(value)]
    if 2 * len(known) < len(steps):
        return [Line(*zip(*known), slot=slot, has_markers=len(known) < 60)] if known else []
    every = Line(steps, values, slot=slot, is_faint=window > 1)
    return [every, Line(steps, list(smooth(values, window)), slot=slot)] if window > 1 else [every]


def interval_line(x: Sequence[float], y: Sequence[Any], half: Sequence[Any], **style: Any) -> Line:
    """A line with markers and its interval; an unknown value leaves a gap."""
    values, width = np.asarray(y, float), np.asarray(half, float)
    return Line(x, values, values - width, values + width, **{"has_markers": True} | style)


def smoothing_window(num_steps: int) -> int:
    """Number of steps that a smoothed line averages over."""
    return max(1, num_steps // 12)


def smooth(values: Sequence[float | None], window: int) -> np.ndarray:
    """Centred mean over `window` steps of the finite values; NaN where there is none."""
    y = np.asarray(values, float)
    if not len(y):
        return y
    is_known = np.isfinite(y)
    total, present = (
        np.convolve(each, np.ones(window), "same")
        for each in (np.where(is_known, y, 0.0), is_known.astype(float))
    )
    return np.divide(total, present, out=np.full(len(y), math.nan), where=present > 0.5)


def _limits(axes: Any, found: Sequence[Line], reference: float | None, bounds: Bounds) -> Bounds:
    """Limits of a linear y that hold every line, most of its interval and a reference that is near.

    An interval several times wider than all lines together is cut at the edge.
    """
    low, high = axes.get_ylim()
    near = [reference] if reference is not None and 0.5 * low < reference < 2 * high else []
    sides = (side for line in found if line.slot != REST for side in (line.low, line.high))
    ends = finite([*near, *(value for side in sides if side is not None for value in side)])
    ends = np.clip(ends, 2 * low - high, 2 * high - low)
    low, high = min([low, *ends]), max([high, *ends])
    edge = 0.02 * (high - low)  # a line along a bound stays visible
    below, above = bounds
    low = low if below is None else max(low, below - edge)
    return low, high if above is None else min(high, above + edge)


def _paint_line(axes: Any, line: Line) -> None:
    is_rest = line.slot == REST
    style: dict[str, Any] = {
        "linewidth": 0.8 if line.is_faint or is_rest else 1.9,
        "alpha": 0.4 if line.is_faint else 1.0,
        "zorder": 1.5 if is_rest else 2.0 if line.is_faint else 3.0,
        "dashes": () if line.is_faint else _DASHES[line.slot],
    }
    if line.has_markers:
        style |= {"marker": _MARKERS[line.slot], "markersize": 5, "markeredgewidth": 0}
    # matplotlib simplifies long lines and keeps their spikes.
    axes.plot(line.x, np.asarray(line.y, float), color=SLOTS[line.slot], **style)


def _paint_interval(axes: Any, line: Line) -> None:
    if line.low is None or line.slot == REST:
        return
    x, low, high = (np.asarray(each, float) for each in (line.x, line.low, line.high))
    known, colour = np.isfinite(low) & np.isfinite(high), SLOTS[line.slot]
    if line.bars:
        axes.vlines(x[known], low[known], high[known], colour, linewidth=1.2, zorder=2.5)
    else:
        style = {"color": colour, "alpha": 0.13, "linewidth": 0, "zorder": 1.8}
        axes.fill_between(x, low, high, where=known, **style)


# Rows: one per name, with its mark and its number


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row: its name, its value and the interval of that."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    is_warning: bool = False  # a cross instead of a dot


Groups = Sequence[tuple[str, Sequence[Entry]]]  # a heading and its rows


def rows_of(title: str, groups: Groups, x: str, limit: float | None = None) -> Markup:
    """A row for each entry: degrees from 0 to `limit`, or without it ratios from 1, logarithmic."""
    rows = [row for heading, entries in groups if entries for row in (heading, *entries)]
    every = [row for row in rows if isinstance(row, Entry)]
    values = finite(value for row in every for value in (row.value, row.low, row.high))
    if not every:
        return NOTHING
    left = min(10 + LETTER * max(len(row.label) for row in every), 300)
    size = (520, 54 + 26 * len(rows))

    def paint(canvas: Any) -> None:
        axes = axes_in(canvas, (left, 16, 4, 50), "x", x)
        if limit is None:
            _ratio_scale(axes, values, size[0] - left - 16)
        else:
            linear_ticks(axes.xaxis, 4, unit="°")
            axes.set_xlim(0, limit)
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([])
        beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
        start = left / (16 + left - size[0])  # edge of the figure
        for y, row in zip(np.arange(len(rows)) + 0.5, rows):
            if isinstance(row, str):
                axes.text(start, y, row, **beside, color=MUTED, weight="bold")
                continue
            axes.text(start, y, row.label, **beside)
            if is_number(row.value):
                _mark(axes, row, y)

    return figure(title, f"{title}: {x}", size, paint)


def _ratio_scale(axes: Any, values: Sequence[float], width: float) -> None:
    ends = [value for value in values if value > 0]
    low, high = min([*ends, 0.8]) / 1.1, max([*ends, 1.25]) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    linear_ticks(axes.xaxis, unit="×")
    axes.set_xticks(log_ticks(low, high, width))
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=1.2, zorder=2)


def _mark(axes: Any, entry: Entry, y: float) -> None:
    """A dot, or a cross, and the interval; what is below the axis stands at its start."""
    least, colour = axes.get_xlim()[0], SLOTS[1 if entry.is_warning else 0]
    if is_number(entry.low) and is_number(entry.high):
        ends = [max(entry.low, least), entry.high]
        axes.plot(ends, [y, y], color=colour, linewidth=2.2, zorder=3)
    dot = {"color": colour, "marker": "X" if entry.is_warning else "o", "markersize": 9}
    axes.plot([max(entry.value, least)], [y], **dot, markeredgewidth=0, zorder=5, clip_on=False)


# Lanes: what each process did, over time

Shares = Sequence[tuple[int, np.ndarray]]  # (slot, its share of each stretch of time)


def lanes(
    title: str, edges: np.ndarray, found: dict[str, Shares], cuts: Sequence[float] = ()
) -> Markup:
    """A lane for each process: the shares of each stretch between two `edges` (seconds), stacked,
    waiting on top. Dotted lines mark `cuts`.
    """
    width, names, below = 1120, 84, 44

    def paint(canvas: Any) -> None:
        axes = axes_in(canvas, (names, 10, 0, below), None, "seconds")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(len(found) - 0.5, -0.5)
        for row, shares in enumerate(found.values()):
            floor = np.full(len(edges), row + 0.375)  # y points down
            for slot, share in sorted(shares, key=lambda each: each[0] == REST):
                top = np.maximum(floor - 0.75 * np.append(share, share[-1]), row - 0.375)
                style = {"color": SLOTS[slot], "linewidth": 0}
                axes.fill_between(edges, floor, top, step="post", **style)
                floor = top
        for cut in cuts:
            axes.axvline(cut, color=INK, linewidth=1.2, dashes=(1.5, 1.5), zorder=5)
        axes.set_yticks(range(len(found)), found, color=INK)
        linear_ticks(axes.xaxis, 10)

    described = f"{title}: lanes of {' and '.join(found)} over time"
    size = (width, len(found) * 62 + below)
    return figure(title, described, size, paint, is_wide=True)

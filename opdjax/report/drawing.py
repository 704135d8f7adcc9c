"""Drawings for the pages, as inline SVG by matplotlib: lines, bars, points, rows and lanes.

Text stays text and colours are CSS variables, so one drawing serves light and dark mode. Legends
are HTML outside of the drawing: they wrap on a narrow screen and cover nothing. Every function
returns a `<figure>` with title and caption, or nothing where there is nothing to draw.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from opdjax.config.validation import MissingExtraError
from opdjax.report.text import number
from opdjax.runs.results import is_number

SERIES = 6  # colours that hue, dash and marker tell apart
REST = -1  # the slot of lines that give context only
TEXT = 13  # pixels of the text of a drawing at its full width
# matplotlib draws with these colours; `_plain` replaces them with CSS variables.
_ROLES = {"ink": "fe0101", "muted": "fe0202", "grid": "fe0303", "rest": "fe0404", "page": "fe0505"}
_COLOURS = {name: f"#{value}" for name, value in _ROLES.items()}
_COLOURS |= {f"series-{slot}": f"#fe10{slot:02x}" for slot in range(SERIES)}
_DASHES = ((), (6, 2), (1.5, 1.5), (7, 2, 1.5, 2), (10, 2.5), (3, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED, GRID, PAGE = (_COLOURS[name] for name in ("ink", "muted", "grid", "page"))
LETTER = 7.2  # width of a letter, in pixels
NOTHING = Markup("")


def require_matplotlib() -> None:
    """Raise ImportError with what to install, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        needed = "opdjax report needs matplotlib: pip install 'opdjax[report]'"
        raise MissingExtraError(needed) from error


def dashes(slot: int) -> str:
    """The `stroke-dasharray` of a slot's line in a legend."""
    return " ".join(f"{length * 1.5:g}" for length in (_DASHES[slot] if slot != REST else ()))


def tick(value: float, _: int | None = None) -> str:
    """A short number for an axis: 0.25, 40k, 1.5M, 3e-4. A formatter for matplotlib's ticks."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}".replace("-", "−")
    return number(float(f"{value:.6g}"))


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


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The axes of a chart of lines."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    categories: Sequence[str] = ()  # names of x = 0, 1, 2 …
    reference: float | None = None  # a thin horizontal line
    bounds: tuple[float | None, float | None] = (None, None)  # limits of the possible y
    y_range: tuple[float, float] | None = None  # None: as the lines need it


def lines(
    title: str,
    found: Sequence[Line],
    y: str,
    x: str = "step",
    about: str | None = None,
    **frame: Any,
) -> Markup:
    """Lines with intervals; `frame` are fields of `_Frame`."""
    found = [line for line in found if any(map(is_number, line.y))]
    axes = _Frame(x, y, **frame)
    if not found:
        return NOTHING
    paint = functools.partial(_paint_lines, frame=axes, found=found)
    return figure(title, picture(f"{title}: {y} against {x}", 380, 236, paint), about)


def curves(
    title: str,
    columns: Iterable[tuple[int, Sequence[float | None]]],
    steps: Sequence[float],
    y: str,
    about: str | None = None,
    **frame: Any,
) -> Markup:
    """`(slot, one value per step)` columns: a faint line through every step, a strong one smoothed.

    Where `smoothing_window` is one step, only the line through every step.
    """
    found = [line for slot, values in columns for line in smoothed(steps, values, slot)]
    return lines(title, found, y, "step", about, **frame)


def columns(series: Mapping[str, Any], names: Iterable[str]) -> list[tuple[int, Any]]:
    """`(slot, values)` of the names for `curves`; those that the series lacks are left out."""
    return [(slot, series[name]) for slot, name in enumerate(names) if name in series]


def smoothed(steps: Sequence[float], values: Sequence[float | None], slot: int = 0) -> list[Line]:
    """A faint line through every step, and a strong one smoothed where there are enough steps."""
    window = smoothing_window(len(steps))
    every = Line(steps, values, slot=slot, is_faint=window > 1)
    strong = Line(steps, list(smooth(values, window)), slot=slot)
    return [every, strong] if window > 1 and values else [every]


def known_line(
    steps: Sequence[float], values: Sequence[float | None], slot: int = 0, most: int = 30
) -> list[Line]:
    """A line through the known values, with markers where they are fewer than `most`."""
    known = [(step, value) for step, value in zip(steps, values) if is_number(value)]
    return [Line(*zip(*known), slot=slot, has_markers=len(known) < most)] if known else []


def interval_line(x: Sequence[float], y: Sequence[Any], half: Sequence[Any], **style: Any) -> Line:
    """A line with markers and its interval; an unknown value leaves a gap."""
    known = lambda values: np.array([v if is_number(v) else math.nan for v in values], float)
    values, width = known(y), known(half)
    return Line(x, values, values - width, values + width, **{"has_markers": True} | style)


def smoothing_window(num_steps: int) -> int:
    """Number of steps that a smoothed line averages over."""
    return max(1, num_steps // 12)


def smoothing_note(num_steps: int) -> str:
    """What the two lines of a smoothed chart are; empty where charts are not smoothed."""
    window = smoothing_window(num_steps)
    return f" Faint line: every step. Strong line: mean over {window} steps." if window > 1 else ""


def smooth(values: Sequence[float | None], window: int) -> np.ndarray:
    """Centred mean over `window` steps of the finite values; NaN where there is none."""
    y = _floats(values)
    if not len(y):
        return y
    is_known = np.isfinite(y)
    ones = np.ones(window)
    total, present = (
        np.convolve(each, ones)[(window - 1) // 2 :][: len(y)]
        for each in (np.where(is_known, y, 0.0), is_known.astype(float))
    )
    return np.divide(total, present, out=np.full(len(y), math.nan), where=present > 0.5)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], float)


def y_range(found: Sequence[Line], frame: _Frame | None = None) -> tuple[float, float]:
    """Limits of y that hold every line and most of its interval.

    An interval several times wider than all lines together is cut at the edge.
    """
    frame = frame or _Frame("", "", bounds=(0, 1))
    means = finite(value for line in found for value in line.y)
    if frame.log_y:
        means = [value for value in means if value > 0]
        return (min(means) / 1.3, max(means) * 1.3) if means else (0.5, 2.0)
    least, most = min(means), max(means)
    if frame.reference is not None and 0.5 * least < frame.reference < 2 * most:
        least, most = min(least, frame.reference), max(most, frame.reference)
    sides = (side for line in found if line.slot != REST for side in (line.low, line.high))
    ends = finite(value for side in sides if side is not None for value in side)
    spread = most - least
    low = min([least, *(max(end, least - spread) for end in ends)])
    high = max([most, *(min(end, most + spread) for end in ends)])
    if high - low < 1e-9 * max(abs(low), abs(high)):
        low = high  # a difference that is only rounding would fill the chart
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0 if high == 0 else 0.0)
    below, above = frame.bounds
    edge = 0.02 * (high - low)  # a line along a bound stays visible
    return (
        low - margin if below is None else max(low - margin, below - edge),
        high + margin if above is None or high < 0.9 * above else min(high + margin, above + edge),
    )


def finite(values: Iterable[float | None]) -> list[float]:
    """The finite values."""
    return [float(value) for value in values if is_number(value)]


def _paint_lines(canvas: Any, frame: _Frame, found: Sequence[Line]) -> None:
    axes = _small_axes(canvas, frame.x, frame.y)
    axes.margins(x=0.05 if frame.log_x or frame.categories else 0.02)
    if frame.reference is not None:
        axes.axhline(frame.reference, color=MUTED, linewidth=0.9, dashes=(4, 3))
    axes.set_xscale("log" if frame.log_x else "linear")
    axes.set_yscale("log" if frame.log_y else "linear")
    is_many = sum(line.slot != REST for line in found) > 1
    for line in found:
        _paint_line(axes, line, is_many=is_many)
    axes.set_ylim(*(frame.y_range or y_range(found, frame)))
    _ticks(axes, frame)


def _paint_line(axes: Any, line: Line, *, is_many: bool) -> None:
    is_rest = line.slot == REST
    style: dict[str, Any] = {
        "color": colour_of(line.slot),
        "linewidth": 0.8 if line.is_faint or is_rest else 1.9,
        "alpha": 0.4 if line.is_faint else 1.0,
        "zorder": 1.5 if is_rest else 2.0 if line.is_faint else 3.0,
    }
    if is_many and not is_rest and not line.is_faint and _DASHES[line.slot]:
        style["dashes"] = _DASHES[line.slot]
    if line.has_markers and not is_rest:
        style |= {"marker": _MARKERS[line.slot], "markersize": 4.5, "markeredgewidth": 0}
    x, y = np.asarray(line.x, float), _floats(line.y)
    axes.plot(x, y, **style)  # matplotlib simplifies long lines and keeps their spikes
    if line.low is None or is_rest:
        return
    low, high = _floats(line.low), _floats(line.high)
    known = np.isfinite(low) & np.isfinite(high)
    colour = {"color": style["color"]}
    if line.bars:
        axes.vlines(x[known], low[known], high[known], **colour, linewidth=1.2, zorder=2.5)
    elif known.any():
        band = {"alpha": 0.1 if is_many else 0.16, "linewidth": 0, "zorder": 1.8}
        axes.fill_between(x, low, high, where=known, **colour, **band)


def _ticks(axes: Any, frame: _Frame) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    power = lambda value, _: f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    for axis, is_log in ((axes.xaxis, frame.log_x), (axes.yaxis, frame.log_y)):
        is_x = axis is axes.xaxis
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(power if is_log and is_x else tick)
        if is_log:
            low, high = sorted(axis.get_view_interval())
            decades = math.log10(high / low)
            many = (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 3.0, 5.0)
            axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 4 else many))
        else:
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=is_x))
    if frame.log_x:  # few, unevenly spaced values: a tick on each
        values = sorted({float(v) for line in axes.get_lines() for v in line.get_xdata()})
        if 0 < len(values) <= 6 and values[0] > 1e-30:
            axes.xaxis.set_major_locator(FixedLocator(values))
    if frame.categories:
        every = math.ceil(len(frame.categories) / 6)
        axes.set_xticks(range(0, len(frame.categories), every), frame.categories[::every])
        axes.set_xlim(-0.3, len(frame.categories) - 0.7)  # also where a category has no point


# Bars


@dataclasses.dataclass(frozen=True)
class Bars:
    """Bars of one kind: heights at the categories, or from `left` with `width`."""

    heights: Sequence[float | None]
    slot: int
    is_hatched: bool = False
    left: Sequence[float] = ()
    width: Sequence[float] = ()


def bars(
    title: str,
    found: Sequence[Bars],
    y: str,
    x: str,
    about: str | None = None,
    *,
    categories: Sequence[str] = (),
    x_range: tuple[float, float] | None = None,
    marks: Sequence[float | None] = (),
    unit: str = "",
    is_large: bool = False,
) -> Markup:
    """Bars of several kinds, side by side at each category or at their own places.

    `marks` are two bounds on the x axis, drawn as lines, or named at the edge beyond which they
    are; None is no bound.
    """
    if not any(any(map(is_number, each.heights)) for each in found):
        return NOTHING

    def paint(canvas: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = _small_axes(canvas, x, y)
        for at, each in enumerate(found):
            width = 0.84 / len(found)
            shift = width * (at - len(found) / 2)
            left = each.left or [place + shift for place in range(len(categories))]
            widths = each.width or [0.9 * width] * len(left)
            heights = [value if is_number(value) else 0.0 for value in each.heights]
            axes.bar(left, heights, width=widths, align="edge", **fill_of(each), zorder=3)
        axes.yaxis.set_major_formatter(lambda value, _: f"{tick(value)}{unit}")
        if categories:
            axes.set_xticks(range(len(categories)), categories)
            axes.set_xlim(-0.55, len(categories) - 0.45)
            return
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(tick)
        if x_range is not None:
            axes.set_xlim(*x_range)
            for bound, side in zip(marks, ("right", "left")):
                if bound is not None:
                    _bound(axes, bound, side, x_range)

    size = (560, 342, paint, 14) if is_large else (380, 236, paint)
    return figure(title, picture(f"{title}: {y} against {x}", *size), about)


def fill_of(each: Bars) -> dict[str, Any]:
    """The style of a bar for matplotlib."""
    colour = colour_of(each.slot)
    if not each.is_hatched:
        return {"edgecolor": colour, "facecolor": colour, "linewidth": 0}
    return {"edgecolor": colour, "facecolor": "none", "linewidth": 0.8, "hatch": "////"}


def _bound(axes: Any, bound: float, side: str, x_range: tuple[float, float]) -> None:
    low, high = x_range
    style = {"va": "bottom", "color": INK}
    if low <= bound <= high:
        axes.axvline(bound, color=INK, linewidth=1.2, dashes=(4, 3), zorder=4)
        at = axes.get_xaxis_transform()
        axes.text(bound, 1.0, f" {tick(bound)} ", transform=at, ha=side, **style)
        return
    at, text, side = (0.0, "← bound {}", "left") if bound < low else (1.0, "bound {} →", "right")
    axes.text(at, 1.0, text.format(tick(bound)), transform=axes.transAxes, ha=side, **style)


# SVG


def figure(title: str, drawing: Markup, about: str | None = None, is_wide: bool = False) -> Markup:
    """A drawing with its title and caption."""
    scroll = Markup('<div class="scroll" tabindex="0" role="group" aria-label="{}">{}</div>')
    return Markup("<figure{}>{}{}{}</figure>").format(
        Markup(' class="wide"' if is_wide else ""),
        Markup("<h3>{}</h3>").format(title) if title else "",
        scroll.format(title or "drawing", drawing) if is_wide else drawing,
        Markup("<figcaption>{}</figcaption>").format(about) if about else "",
    )


def colour_of(slot: int) -> str:
    """The colour that matplotlib draws a slot with."""
    return _COLOURS["rest" if slot == REST else f"series-{slot}"]


def bare_axes(canvas: Any, place: tuple[float, float, float, float], grid: str | None) -> Any:
    """Axes with only a bottom edge, and with grid lines across `x`, `y`, `both` or neither."""
    axes = canvas.add_axes(place)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, linewidth=0.8)
    return axes


def _small_axes(canvas: Any, x: str, y: str) -> Any:
    axes = bare_axes(canvas, (0.135, 0.19, 0.84, 0.7), "y")
    # At fixed places: to find them, matplotlib would measure every tick label, twice.
    axes.text(-0.13, 1.055, y, transform=axes.transAxes, color=MUTED)
    label_below(axes, x, -0.15)
    return axes


def label_below(axes: Any, text: str, y: float) -> None:
    """The label of the x axis, at height `y` in units of the axes."""
    style = {"color": MUTED, "ha": "center", "va": "top"}
    axes.text(0.5, y, text, transform=axes.transAxes, **style)


def picture(
    described: str, width: float, height: float, paint: Callable[[Any], None], font: float = 11
) -> Markup:
    """Inline SVG of what `paint` draws on a matplotlib figure of this size (pixels), with text of
    `font` pixels.

    The drawing grows with its column until its text is as large as in every other drawing.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    muted = ("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor")
    settings = dict.fromkeys(muted, MUTED) | {"text.color": INK, "grid.color": GRID}
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "opdjax", "lines.solid_capstyle": "round"}
    settings |= {"font.size": font, "axes.linewidth": 0.8, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        canvas = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(canvas)
        paint(canvas)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    size = 'viewBox="0 0 {:g} {:g}" style="max-width: {:.0f}px"'
    start = Markup(f'<svg class="chart" {size} role="img" aria-label="{{}}">')
    widest = width * TEXT / font
    return start.format(width, height, widest, described) + _inline(out.getvalue(), described)


def _inline(svg: str, described: str) -> Markup:
    """The content of the drawing, with CSS variables and the font of the page."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    unused = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    body = re.sub(unused, "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r"<[^>]*>", lambda found: _plain(found[0]), body)
    used = set(re.findall(r"#([\w.-]+)", body))
    # Two drawings of a page must not share an id.
    prefix = "c" + hashlib.sha256((described + body).encode()).hexdigest()[:8]
    renamed = lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else ""
    body = re.sub(r' id="([^"]+)"', renamed, body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", body).replace("xlink:href", "href")
    return Markup(re.sub(r"\s*\n\s*", " ", body))


_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}


def _plain(element: str) -> str:
    """One SVG element with CSS variables, without its font, coordinates to two decimals."""
    element = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", element)
    short = lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
    element = re.sub(r"\d+\.\d{3,}", short, element)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, variable)
    return element

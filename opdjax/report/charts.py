"""Line charts as inline SVG, drawn by matplotlib.

Text stays text and colours are CSS variables, so one drawing serves light and dark mode. Legends
are HTML outside of the drawing: they wrap on a narrow screen and cover nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from opdjax.config.validation import MissingExtraError
from opdjax.report.markup import Html, number, tag
from opdjax.report.measures import smoothing_window
from opdjax.runs.results import is_number

SERIES = 6  # colours that hue, dash and marker tell apart
REST = -1  # the slot of lines that give context only
WIDTH, HEIGHT = 380, 236  # of a chart, in pixels
_TEXT = 13  # pixels of the text of a drawing at its full width
# matplotlib draws with these colours; `_plain` replaces them with CSS variables.
_ROLES = {"ink": "fe0101", "muted": "fe0202", "grid": "fe0303", "rest": "fe0404", "page": "fe0505"}
COLOURS = {name: f"#{value}" for name, value in _ROLES.items()}
COLOURS |= {f"series-{slot}": f"#fe10{slot:02x}" for slot in range(SERIES)}
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_DASHES = ((), (6, 2), (1.5, 1.5), (7, 2, 1.5, 2), (10, 2.5), (3, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MANY_POINTS = 700


@dataclasses.dataclass(frozen=True)
class ChartLine:
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
class Chart:
    """A chart without its lines. `title` stands above the drawing, in HTML."""

    title: str
    x_label: str
    y_label: str
    about: Any = None  # the caption: what it shows and what to look for
    is_x_log: bool = False
    is_y_log: bool = False
    categories: Sequence[str] = ()  # names of x = 0, 1, 2 …
    reference: float | None = None  # a thin horizontal line
    bounds: tuple[float | None, float | None] = (None, None)  # limits of the possible y
    y_range: tuple[float, float] | None = None  # None: as the lines need it


def by_step(title: str, y_label: str, about: str | None = None, **options: Any) -> Chart:
    """A chart over training steps; `options` are fields of `Chart`."""
    return Chart(title, "step", y_label, about, **options)


def draw(chart: Chart, lines: Sequence[ChartLine]) -> Html:
    """The chart as a figure with title and caption. ImportError without matplotlib."""
    described = f"{chart.title}: {chart.y_label} against {chart.x_label}"
    return figure(chart.title, _svg(chart, lines, described), chart.about)


def draw_columns(
    chart: Chart, steps: Sequence[int], columns: Iterable[tuple[int, Sequence[float | None]]]
) -> Html | None:
    """The chart of `(slot, one value per step)` columns, smoothed; None where all are empty."""
    window = smoothing_window(len(steps))
    known = [(slot, values) for slot, values in columns if any(map(is_number, values))]
    lines = [line for slot, values in known for line in curve(steps, values, window, slot)]
    return draw(chart, lines) if lines else None


def figure(title: str, drawing: Html, about: Any = None, class_: str | None = None) -> Html:
    """A drawing with its title and caption."""
    caption = None if about is None else tag("figcaption", about)
    return tag("figure", tag("h3", title), drawing, caption, class_=class_)


def grid(figures: Iterable[Html | None], *, is_large: bool = False) -> Html:
    """Figures side by side, as many as fit; None is left out."""
    return tag("div", *figures, class_="figures large" if is_large else "figures")


def legend(entries: Sequence[tuple[str, int]], *, has_dashes: bool = True) -> Html:
    """`(name, slot)` entries, each with a piece of the slot's line."""
    items = []
    for name, slot in entries:
        dashes = _DASHES[slot] if has_dashes and slot != REST else ()
        dash = " ".join(f"{length * 1.5:g}" for length in dashes)
        stroke = tag("line", x1=1, y1=6, x2=27, y2=6, stroke_dasharray=dash or None)
        items.append(tag("li", swatch(stroke, colour=_variable(slot)), name))
    return tag("ul", *items, class_="legend")


def swatches(entries: Sequence[tuple[str, Html]]) -> Html:
    """`(name, mark)` entries as a legend."""
    items = (tag("li", mark, tag("span", name)) for name, mark in entries)
    return tag("ul", *items, class_="legend")


def box(slot: int, hatch: str = "") -> Html:
    """The mark of a bar in a legend."""
    colour = _variable(slot)
    outline = {"fill": "none", "stroke": colour} if hatch else {"fill": colour}
    strokes = [tag("line", x1=x, y1=11, x2=x + 9, y2=1) for x in ((3, 9, 15) if hatch else ())]
    return swatch(tag("rect", x=1, y=1, width=26, height=10, **outline), *strokes, colour=colour)


def swatch(*shapes: Html, colour: str) -> Html:
    """A mark for a legend, as large as a word."""
    style = {"viewBox": "0 0 28 12", "style": f"color: {colour}", "aria_hidden": "true"}
    return tag("svg", *shapes, class_="swatch", **style)


def _variable(slot: int) -> str:
    return "var(--rest)" if slot == REST else f"var(--series-{slot})"


def colour_of(slot: int) -> str:
    """The colour that matplotlib draws a slot with."""
    return COLOURS["rest" if slot == REST else f"series-{slot}"]


def require_matplotlib() -> None:
    """Raise ImportError with what to install, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        needed = "opdjax report needs matplotlib: pip install 'opdjax[report]'"
        raise MissingExtraError(needed) from error


def smooth(values: Sequence[float | None], window: int) -> np.ndarray:
    """Centred mean over `window` steps of the finite values; NaN where there is none."""
    y = _floats(values)
    known = np.isfinite(y)
    total = _windowed_sum(np.where(known, y, 0.0), window)
    present = _windowed_sum(known.astype(float), window)
    return np.divide(total, present, out=np.full(len(y), math.nan), where=present > 0.5)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], float)


def _windowed_sum(values: np.ndarray, window: int) -> np.ndarray:
    before, after = window // 2, window - window // 2
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    return sums[np.minimum(at + after, len(values))] - sums[np.maximum(at - before, 0)]


def curve(
    steps: Sequence[float], values: Sequence[float | None], window: int, slot: int = 0
) -> list[ChartLine]:
    """A faint line through every step and a strong one through the mean over `window` steps.

    With a window of one step, only the line through every step.
    """
    raw = ChartLine(steps, values, slot=slot, is_faint=window > 1)
    return [raw, ChartLine(steps, list(smooth(values, window)), slot=slot)] if window > 1 else [raw]


def thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The line with fewer points: the least and greatest of each stretch stay, so do all spikes."""
    x, y = np.asarray(x, float), _floats(y)
    if len(x) <= _MANY_POINTS:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), _MANY_POINTS // 2):
        known = part[np.isfinite(y[part])]
        ends = (known[y[known].argmin()], known[y[known].argmax()]) if len(known) else part[:1]
        kept |= set(map(int, ends))
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def _svg(chart: Chart, lines: Sequence[ChartLine], described: str) -> Html:
    is_many = sum(line.slot != REST for line in lines) > 1

    def paint(canvas: Any) -> None:
        axes = small_axes(canvas, chart.x_label, chart.y_label)
        axes.margins(x=0.05 if chart.is_x_log or chart.categories else 0.02)
        if chart.reference is not None:
            axes.axhline(chart.reference, color=COLOURS["muted"], linewidth=0.9, dashes=(4, 3))
        axes.set_xscale("log" if chart.is_x_log else "linear")
        axes.set_yscale("log" if chart.is_y_log else "linear")
        for line in lines:
            _draw_line(axes, line, is_many=is_many)
        axes.set_ylim(*(chart.y_range or y_range(chart, lines)))
        _ticks(axes, chart)

    return picture(described, WIDTH, HEIGHT, paint)


def picture(
    described: str,
    width: float,
    height: float,
    paint: Callable[[Any], None],
    font: float = 11,
) -> Html:
    """Inline SVG of what `paint` draws in COLOURS on a matplotlib figure of this size (pixels),
    with text of `font` pixels.

    The drawing grows with its column until its text is as large as in every other drawing of the
    page. ImportError without matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    muted = ("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor")
    settings = dict.fromkeys(muted, COLOURS["muted"])
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "opdjax", "lines.solid_capstyle": "round"}
    settings |= {"font.size": font, "axes.linewidth": 0.8, "text.parse_math": False}
    settings |= {"text.color": COLOURS["ink"], "grid.color": COLOURS["grid"]}
    with matplotlib.rc_context(settings):
        canvas = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(canvas)
        paint(canvas)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return Html(_inline(out.getvalue(), described, width, height, _TEXT / font))


def bare_axes(canvas: Any, place: tuple[float, float, float, float], lines: str | None) -> Any:
    """Axes with only a bottom edge, and with grid lines across `x`, `y` or neither (None)."""
    axes = canvas.add_axes(place)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.set_axisbelow(True)
    if lines is not None:
        axes.grid(axis=lines, linewidth=0.8)
    return axes


def small_axes(canvas: Any, x_label: str, y_label: str) -> Any:
    """The axes of a drawing of the usual size, with their labels."""
    axes = bare_axes(canvas, (0.135, 0.19, 0.84, 0.7), "y")
    # At fixed places: to find them, matplotlib would measure every tick label, twice.
    axes.text(-0.13, 1.055, y_label, transform=axes.transAxes, color=COLOURS["muted"])
    label_below(axes, x_label, -0.15)
    return axes


def label_below(axes: Any, text: str, y: float, **style: Any) -> None:
    """The label of the x axis, at height `y` in units of the axes."""
    style |= {"color": COLOURS["muted"], "ha": "center", "va": "top"}
    axes.text(0.5, y, text, transform=axes.transAxes, **style)


def y_range(chart: Chart, lines: Sequence[ChartLine]) -> tuple[float, float]:
    """Limits of y that hold every line and most of its interval.

    An interval several times wider than all lines together is cut at the edge.
    """
    means = _finite(value for line in lines for value in line.y)
    if chart.is_y_log:
        means = [value for value in means if value > 0]
        return (min(means) / 1.3, max(means) * 1.3) if means else (0.5, 2.0)
    if not means:
        return 0.0, 1.0
    least, most = min(means), max(means)
    if chart.reference is not None and 0.5 * least < chart.reference < 2 * most:
        least, most = min(least, chart.reference), max(most, chart.reference)
    sides = (side for line in lines if line.slot != REST for side in (line.low, line.high))
    ends = _finite(value for side in sides if side is not None for value in side)
    spread = most - least
    low = min([least, *(max(end, least - spread) for end in ends)])
    high = max([most, *(min(end, most + spread) for end in ends)])
    if high - low < 1e-9 * max(abs(low), abs(high)):
        low = high  # a difference that is only rounding would fill the chart
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0 if high == 0 else 0.0)
    below, above = chart.bounds
    edge = 0.02 * (high - low)  # a line along a bound stays visible
    return (
        low - margin if below is None else max(low - margin, below - edge),
        high + margin if above is None or high < 0.9 * above else min(high + margin, above + edge),
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _draw_line(axes: Any, line: ChartLine, *, is_many: bool) -> None:
    is_rest = line.slot == REST
    x, y = thin(line.x, line.y) if line.low is None else (np.asarray(line.x), np.asarray(line.y))
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
    axes.plot(x, np.asarray(y, float), **style)
    if line.low is None or is_rest:
        return
    low, high = np.asarray(line.low, float), np.asarray(line.high, float)
    known = np.isfinite(low) & np.isfinite(high)
    colour = {"color": style["color"]}
    if line.bars:
        axes.vlines(x[known], low[known], high[known], **colour, linewidth=1.2, zorder=2.5)
    elif known.any():
        band = {"alpha": 0.1 if is_many else 0.16, "linewidth": 0, "zorder": 1.8}
        axes.fill_between(x, low, high, where=known, **colour, **band)


def _ticks(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    for axis, is_log in ((axes.xaxis, chart.is_x_log), (axes.yaxis, chart.is_y_log)):
        is_x = axis is axes.xaxis
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(_power if is_log and is_x else tick)
        if is_log:
            low, high = sorted(axis.get_view_interval())
            decades = math.log10(high / low)
            many = (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 3.0, 5.0)
            axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 4 else many))
        else:
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=is_x))
    if chart.is_x_log:  # few, unevenly spaced values: a tick on each
        lines = [line.get_xdata() for line in axes.get_lines()]
        values = sorted({float(value) for line in lines for value in line if value > 1e-30})
        if 0 < len(values) <= 6:
            axes.xaxis.set_major_locator(FixedLocator(values))
    if chart.categories:
        every = math.ceil(len(chart.categories) / 6)
        axes.set_xticks(range(0, len(chart.categories), every), chart.categories[::every])
        axes.set_xlim(-0.3, len(chart.categories) - 0.7)  # also where a category has no point


def _power(value: float, _: int) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+00", "")


def tick(value: float, _: int | None = None) -> str:
    """A short number for an axis: 0.25, 40k, 1.5M, 3e-4. A formatter for matplotlib's ticks."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}".replace("-", "−")
    return number(float(f"{value:.6g}"))


def _inline(svg: str, described: str, width: float, height: float, scale: float) -> str:
    """The drawing alone, as wide as its column, with CSS variables and the font of the page."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    unused = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    body = re.sub(unused, "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda found: _plain(found[0]), body)
    used = set(re.findall(r"#([\w.-]+)", body))
    # Two charts of a page must not share an id.
    prefix = "c" + hashlib.sha256((described + body).encode()).hexdigest()[:8]
    renamed = lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else ""
    body = re.sub(r' id="([^"]+)"', renamed, body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", body).replace("xlink:href", "href")
    body = re.sub(r"\s*\n\s*", " ", body)
    box = f"0 0 {width:g} {height:g}"
    widest = f"max-width: {width * scale:.0f}px"
    start = tag("svg", class_="chart", viewBox=box, style=widest, role="img", aria_label=described)
    return str(start).removesuffix("</svg>") + body


def _plain(element: str) -> str:
    """One SVG element with CSS variables, without its font, coordinates to two decimals."""
    element = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", element)
    short = lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
    element = re.sub(r"\d+\.\d{3,}", short, element)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, variable)
    return element

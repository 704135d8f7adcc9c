"""Line charts as inline SVG: text stays text, and colours are CSS variables, so that one drawing
serves light and dark.

A chart carries no legend: it stands beside it in HTML, where it wraps on a narrow screen and covers
nothing.
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

SERIES = 6  # distinguishable by hue, dash and marker
REST = -1  # the slot of lines that are only context
_WIDTH, _HEIGHT = 380, 236
# What matplotlib draws with, and the CSS variable that is put in its place.
_ROLES = {
    "ink": "#fe0101",
    "muted": "#fe0202",
    "grid": "#fe0303",
    "rest": "#fe0404",
    "page": "#fe0505",
}
COLOURS = _ROLES | {f"series-{slot}": f"#fe10{slot:02x}" for slot in range(SERIES)}
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_DASHES = ((), (6, 2), (1.5, 1.5), (7, 2, 1.5, 2), (10, 2.5), (3, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MANY_POINTS = 700


@dataclasses.dataclass(frozen=True)
class ChartLine:
    """One line; `low` and `high` bound its interval. The slot sets colour, dash and marker, the
    same in every chart.
    """

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
    """What is drawn, apart from its lines. `title` stands above it in HTML."""

    title: str
    x_label: str
    y_label: str
    about: Any = None  # the caption: what it shows and what to look for
    is_x_log: bool = False
    is_y_log: bool = False
    categories: Sequence[str] = ()  # names of x = 0, 1, 2 …
    reference: float | None = None  # a thin horizontal line
    bounds: tuple[float | None, float | None] = (None, None)  # what y cannot leave
    y_range: tuple[float, float] | None = (
        None  # for charts that are compared; otherwise as the lines need it
    )


def draw(chart: Chart, lines: Sequence[ChartLine]) -> Html:
    """The chart as a figure with its title and caption; ImportError where matplotlib is missing."""
    described = f"{chart.title}: {chart.y_label} against {chart.x_label}"
    caption = tag("figcaption", chart.about) if chart.about is not None else None
    return tag("figure", tag("h3", chart.title), _svg(chart, lines, described), caption)


def grid(figures: Iterable[Html]) -> Html:
    """Figures side by side, as many as fit."""
    return tag("div", *figures, class_="figures")


def legend(entries: Sequence[tuple[str, int]], *, has_dashes: bool = True) -> Html:
    """Names of slots, each with a piece of its line."""
    items = []
    for name, slot in entries:
        dash = (
            " ".join(f"{d * 1.5:g}" for d in _DASHES[slot]) if has_dashes and slot != REST else ""
        )
        stroke = tag("line", x1=1, y1=6, x2=27, y2=6, stroke_dasharray=dash or None)
        items.append(tag("li", swatch(stroke, colour=_variable(slot)), name))
    return tag("ul", *items, class_="legend")


def swatches(entries: Sequence[tuple[str, Html]]) -> Html:
    """Names, each with its mark."""
    return tag(
        "ul", *(tag("li", mark, tag("span", name)) for name, mark in entries), class_="legend"
    )


def box(slot: int, hatch: str = "") -> Html:
    """The mark of a bar."""
    colour = _variable(slot)
    outline = {"fill": "none", "stroke": colour} if hatch else {"fill": colour}
    strokes = [tag("line", x1=x, y1=11, x2=x + 9, y2=1) for x in ((3, 9, 15) if hatch else ())]
    return swatch(tag("rect", x=1, y=1, width=26, height=10, **outline), *strokes, colour=colour)


def swatch(*shapes: Html, colour: str) -> Html:
    """A piece of what is drawn, as large as a word, for a legend."""
    return tag(
        "svg",
        *shapes,
        viewBox="0 0 28 12",
        class_="swatch",
        style=f"color: {colour}",
        aria_hidden="true",
    )


def _variable(slot: int) -> str:
    return "var(--rest)" if slot == REST else f"var(--series-{slot})"


def require_matplotlib() -> None:
    """Say what to install before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "opdjax report needs matplotlib: pip install 'opdjax[report]'"
        ) from error


def smooth(values: Sequence[float | None], window: int) -> np.ndarray:
    """Centred mean over `window` steps of the values that are finite; NaN where there is none."""
    y = np.array([math.nan if value is None else value for value in values], float)
    known = np.isfinite(y)
    total = _windowed(np.where(known, y, 0.0), window)
    present = _windowed(known.astype(float), window)
    return np.divide(total, present, out=np.full(len(y), math.nan), where=present > 0.5)


def _windowed(values: np.ndarray, window: int) -> np.ndarray:
    before, after = window // 2, window - window // 2
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    return sums[np.minimum(at + after, len(values))] - sums[np.maximum(at - before, 0)]


def curve(
    steps: Sequence[float], values: Sequence[float | None], window: int, slot: int = 0
) -> list[ChartLine]:
    """Every step in pale and the mean over `window` steps before it; the steps alone where the
    window is one step.
    """
    raw = ChartLine(steps, values, slot=slot, is_faint=window > 1)
    return [raw, ChartLine(steps, list(smooth(values, window)), slot=slot)] if window > 1 else [raw]


def thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The same line with fewer points: the least and the greatest of each stretch stay, so that no
    spike is lost.
    """
    x, y = (
        np.asarray(x, float),
        np.array([math.nan if value is None else value for value in y], float),
    )
    if len(x) <= _MANY_POINTS:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), _MANY_POINTS // 2):
        known = part[np.isfinite(y[part])]
        kept |= (
            {int(known[y[known].argmin()]), int(known[y[known].argmax()])}
            if len(known)
            else {int(part[0])}
        )
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def _svg(chart: Chart, lines: Sequence[ChartLine], described: str) -> Html:
    def paint(figure: Any) -> None:
        axes = figure.add_axes((0.135, 0.19, 0.84, 0.7))
        _frame(axes, chart)
        for line in lines:
            _draw_line(axes, line, is_many=sum(other.slot != REST for other in lines) > 1)
        axes.set_ylim(*(chart.y_range or y_range(chart, lines)))
        _ticks(axes, chart)

    return picture(described, _WIDTH, _HEIGHT, paint)


def picture(described: str, width: float, height: float, paint: Callable[[Any], None]) -> Html:
    """What `paint` puts on a figure of this size (pixels) in COLOURS, as inline SVG; ImportError
    where matplotlib is missing.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "opdjax",
        "font.size": 11,
        "axes.linewidth": 0.8,
        "lines.solid_capstyle": "round",
        "text.color": COLOURS["ink"],
        "text.parse_math": False,
        "axes.edgecolor": COLOURS["muted"],
        "grid.color": COLOURS["grid"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "axes.labelcolor": COLOURS["muted"],
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return Html(_inline(out.getvalue(), described, width, height))


def _frame(axes: Any, chart: Chart) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.05 if chart.is_x_log or chart.categories else 0.02)
    # At fixed places: matplotlib would measure every tick label, twice, to find them.
    axes.text(-0.13, 1.055, chart.y_label, transform=axes.transAxes, color=COLOURS["muted"])
    axes.text(
        0.5,
        -0.15,
        chart.x_label,
        transform=axes.transAxes,
        color=COLOURS["muted"],
        ha="center",
        va="top",
    )
    if chart.reference is not None:
        axes.axhline(chart.reference, color=COLOURS["muted"], linewidth=0.9, dashes=(4, 3))
    if chart.is_x_log:
        axes.set_xscale("log")
    if chart.is_y_log:
        axes.set_yscale("log")


def y_range(chart: Chart, lines: Iterable[ChartLine]) -> tuple[float, float]:
    """Room for every line and most of its interval: one that is several times wider than all lines
    together is cut at the edge.
    """
    lines = list(lines)
    means = _finite(value for line in lines for value in line.y)
    ends = _finite(
        value
        for line in lines
        if line.slot != REST
        for side in (line.low, line.high)
        if side is not None
        for value in side
    )
    if chart.is_y_log:
        means, ends = [value for value in means if value > 0], []
    if not means:
        return (0.5, 2.0) if chart.is_y_log else (0.0, 1.0)
    if chart.is_y_log:
        return min(means) / 1.3, max(means) * 1.3
    least, most = min(means), max(means)
    if chart.reference is not None and chart.reference > 0.5 * least and chart.reference < 2 * most:
        least, most = min(least, chart.reference), max(most, chart.reference)
    spread = most - least
    low, high = (
        min([least, *(max(end, least - spread) for end in ends)]),
        max([most, *(min(end, most + spread) for end in ends)]),
    )
    if high - low < 1e-9 * max(
        abs(low), abs(high)
    ):  # one value but for rounding, which would else be drawn as large as the chart
        low = high
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0 if high == 0 else 0.0)
    below, above = chart.bounds
    edge = 0.02 * (high - low)  # so that a line along a bound is still seen whole
    return (
        low - margin if below is None else max(low - margin, below - edge),
        high + margin if above is None or high < 0.9 * above else min(high + margin, above + edge),
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _draw_line(axes: Any, line: ChartLine, *, is_many: bool) -> None:
    colour = COLOURS["rest"] if line.slot == REST else COLOURS[f"series-{line.slot}"]
    x, y = (
        thin(line.x, line.y)
        if line.low is None
        else (np.asarray(line.x, float), np.asarray(line.y, float))
    )
    width = 0.8 if line.is_faint or line.slot == REST else 1.9
    style: dict[str, Any] = {
        "color": colour,
        "linewidth": width,
        "alpha": 0.4 if line.is_faint else 1.0,
    }
    style["zorder"] = 1.5 if line.slot == REST else 2.0 if line.is_faint else 3.0
    if is_many and line.slot != REST and not line.is_faint and _DASHES[line.slot]:
        style["dashes"] = _DASHES[line.slot]
    if line.has_markers and line.slot != REST:
        style |= {"marker": _MARKERS[line.slot], "markersize": 4.5, "markeredgewidth": 0}
    axes.plot(x, y, **style)
    if line.low is None or line.slot == REST:
        return
    low, high = np.asarray(line.low, float), np.asarray(line.high, float)
    known = np.isfinite(low) & np.isfinite(high)
    if line.bars:
        axes.vlines(x[known], low[known], high[known], color=colour, linewidth=1.2, zorder=2.5)
    elif known.any():
        axes.fill_between(
            x,
            low,
            high,
            where=known,
            color=colour,
            alpha=0.1 if is_many else 0.16,
            linewidth=0,
            zorder=1.8,
        )


def _ticks(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    scientific = FuncFormatter(
        lambda value, _: f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+00", "")
    )
    for axis, is_log in ((axes.xaxis, chart.is_x_log), (axes.yaxis, chart.is_y_log)):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(
            scientific
            if is_log and axis is axes.xaxis
            else FuncFormatter(lambda value, _: tick(value))
        )
        if not is_log:
            axis.set_major_locator(
                MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=axis is axes.xaxis)
            )
        else:
            low, high = sorted(axis.get_view_interval())
            decades = math.log10(high / low)
            axis.set_major_locator(
                LogLocator(
                    subs=(1.0,)
                    if decades > 4
                    else (1.0, 3.0)
                    if decades > 1.2
                    else (1.0, 2.0, 3.0, 5.0)
                )
            )
    if chart.is_x_log:  # few, unevenly spaced values: a tick on each
        drawn = sorted(
            {
                float(value)
                for line in axes.get_lines()
                if len(line.get_xdata()) > 0
                for value in line.get_xdata()
                if value > 1e-30
            }
        )
        if 0 < len(drawn) <= 6:
            axes.xaxis.set_major_locator(FixedLocator(drawn))
    if chart.categories:
        every = math.ceil(len(chart.categories) / 6)
        axes.set_xticks(range(0, len(chart.categories), every), chart.categories[::every])
        axes.set_xlim(
            -0.3, len(chart.categories) - 0.7
        )  # all of them, whether or not a line is there


def tick(value: float) -> str:
    """A short number for an axis: 0.25, 40k, 1.5M, 3e-4."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}".replace("-", "−")
    return number(float(f"{value:.6g}"))


def _inline(svg: str, described: str, width: float, height: float) -> str:
    """Only the drawing, scaling with its column, with variables for colours and the page's own
    font.
    """
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL
    )
    body = re.sub(r"<[^>]*>", lambda found: _plain(found[0]), body)
    used = set(re.findall(r"#([\w.-]+)", body))
    own = (
        "c" + hashlib.sha256((described + body).encode()).hexdigest()[:8]
    )  # no two charts of a page share an id
    body = re.sub(
        r' id="([^"]+)"', lambda found: f' id="{own}{found[1]}"' if found[1] in used else "", body
    )
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}", body).replace("xlink:href", "href")
    body = re.sub(r"\s*\n\s*", " ", body)
    start = str(
        tag(
            "svg",
            class_="chart",
            viewBox=f"0 0 {width:g} {height:g}",
            role="img",
            aria_label=described,
        )
    ).removesuffix("</svg>")
    return start + body


def _plain(element: str) -> str:
    """One SVG element without what the page's style sheet says better, its coordinates to a
    hundredth.
    """
    element = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^\"]*\"", "", element)
    element = re.sub(
        r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), element
    )
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, variable)
    return element

"""The audit's document as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_EXACTNESS = ["", "bias, reverse", "forward", "cosine, reverse", "forward"]
_EXACTNESS += ["noise / signal", "variance / opd", "worse than opd"]
_GRADIENT = {"signal": "signal", "noise": "noise", "of prompts": "prompt"}
_GRADIENT |= {"of trajectories": "trajectory", "of actions": "action"}
_GRADIENT |= {"signal / noise": "signal_to_noise", "noise / opd": "noise_ratio"}


def text(document: dict[str, Any]) -> str:
    """Return the tables of the measured parts, and the names of the unfinished ones.

    The config's own recipe has a row in each table of estimators; its cells are empty where a
    single context does not define its gradient.
    """
    parts = {
        "vocabulary": (_vocabulary,),
        "tree": (_tree,),
        "contexts": (_contexts, _positions),
        "gradients": (_gradients, _bins),
        "batch_pitfalls": (_batches,),
    }
    tables = [table(document) for name in parts if name in document for table in parts[name]]
    if unfinished := document.get("unfinished"):
        tables.append(f"not measured yet: {', '.join(unfinished)}")
    return "\n\n".join(tables)


def _vocabulary(document) -> str:
    found = document["vocabulary"]
    title = f"{found['num_contexts']} random contexts, V = {found['vocab']}, float64, every token"
    title += " enumerated (logit space)"
    rows, names = found["rows"], _with_own(document, found["rows"])
    return _columns(_EXACTNESS, [_exactness(document, name, rows) for name in names], title)


def _contexts(document) -> str:
    found, costs = document["contexts"], document.get("costs", {})
    pair = f"{document['student']}, teacher {document['teacher']}"
    title = f"{found['num_contexts']} contexts of {pair}, mean KL {found['kl_mean']:.3g} nats"
    title += " (logit space, every token in closed form)"
    scales = {"seconds_per_token": 1e6, "bytes_per_token": 1e-3}
    cost = lambda name: costs.get(name, {})
    cells = lambda name: (_number(cost(name).get(key), scale=by) for key, by in scales.items())
    names = _with_own(document, found["rows"])
    rows = [[*_exactness(document, name, found["rows"]), *cells(name)] for name in names]
    more = ["loss: us a token", "kB a token"] if costs else []
    return _columns([*_EXACTNESS, *more], rows, title)


def _exactness(document, name: str, rows) -> list[str]:
    if name not in rows:
        return [name, *[""] * (len(_EXACTNESS) - 1)]
    row, ratio = rows[name], rows[name]["variance_ratio"]
    return [
        _mark(document, name),
        *(_small(row["bias"][direction]) for direction in ("reverse", "forward")),
        *(_number(row["cosine"][direction], "none") for direction in ("reverse", "forward")),
        _number(row["noise_to_signal"] if ratio > 1e-9 else 0, "no signal"),
        _interval([ratio, *row.get("variance_ratio_interval", ())]),
        f"{100 * row['worse']:.1f} %",
    ]


def _tree(document) -> str:
    found = document["tree"]
    title = f"a tree of all sequences (V = {found['vocab']}, T = {found['length']})"
    title += ", float64: relative bias of the expected gradient"
    header = ["", "contexts held fixed", "sequence KL", "of the baseline", "variance / signal^2"]
    biases = lambda row: (_small(row[name]) for name in ("frozen", "sequence", "baseline"))
    rows = [[row["title"], *biases(row), _number(row["variance"])] for row in found["rows"]]
    return _columns(header, rows, title)


def _gradients(document) -> str:
    found = document["gradients"]
    title = f"gradient of one rollout, all parameters; signal / noise of {found['batch']} rollouts"
    numbers = lambda row: (_number(row[key]) for key in _GRADIENT.values())
    rows = [
        [_mark(document, name), *numbers(row), _interval(row.get("action_ratio"))]
        for name, row in found["rows"].items()
    ]
    return _columns(["", *_GRADIENT, "actions / opd (95 %)"], rows, title)


def _positions(document) -> str:
    """Variances of the baselines relative to `opd`, by position in the completion."""
    buckets, measured = document["contexts"]["buckets"], document["contexts"]["rows"]
    baselines = [name for name in measured if "baseline" in document["subjects"][name]["options"]]
    names = _with_own(document, baselines)
    rows = [*_shares(buckets), *(_logit_ratios(document, name, "by_position") for name in names)]
    ranges = (f"{b['first']} to {b['last']}" for b in buckets)
    return _columns(["contexts by position", *ranges], rows)


def _bins(document) -> str:
    """Variances of the baselines relative to `opd`, by the KL of the context."""
    bins, parameters = document["contexts"]["bins"], document["gradients"]["by_kl"]
    shares = (_number(share, scale=100) + " %" for share in parameters["variance_share"])
    rows = [*_shares(bins), ["opd: share of its variance, parameters", *shares]]
    for name in _with_own(document, parameters["rows"]):
        ratios = parameters["rows"].get(name, [])
        limits = ("" if c[0] is None else f"{c[1]:.2g} to {c[2]:.2g}" for c in ratios)
        rows.append(_logit_ratios(document, name, "by_kl"))
        rows.append([f"{name}: parameters", *(_number(cell[0]) for cell in ratios)])
        rows.append(["  95 %", *limits])
    ranges = (f"{100 * b['from']:g} to {100 * b['to']:g} %" for b in bins)
    return _columns(["contexts by their KL", *ranges], rows)


def _logit_ratios(document, name: str, groups: str) -> list[str]:
    cells = document["contexts"]["rows"].get(name, {}).get(groups, [])
    return [f"{name}: variance / opd, logits", *(_number(cell[0]) for cell in cells)]


def _shares(bins) -> list[list[str]]:
    percent = lambda key: (f"{100 * b[key]:.1f} %" for b in bins)
    return [
        ["mean KL, nats", *(f"{b['kl_mean']:.2g}" for b in bins)],
        ["share of the KL", *percent("kl_share")],
        ["opd: share of its variance, logits", *percent("variance_share")],
    ]


def _batches(document) -> str:
    found = document["batch_pitfalls"]
    sums = found["bfloat16_sums"]["error_by_tokens"].items()
    errors = ", ".join(f"{float(error):+.1%} of {count} tokens" for count, error in sums)
    angle = lambda row: f"bias {row['bias']:.3g}, cosine {row['cosine']:.4f}"
    cells = {name: angle(row) if "bias" in row else errors for name, row in found.items()}
    rows = [[f"{name} (pitfall)", cell] for name, cell in cells.items()]
    return _columns(["", ""], rows, "gradient of the exact KL under a batch's pitfall")


def _with_own(document, names: Iterable[str]) -> list[str]:
    """Return the names, preceded by that of the config's own recipe where it is missing."""
    subjects = document["subjects"].items()
    own = [name for name, each in subjects if each.get("is_own") and name not in names]
    return [*own, *names]


def _mark(document, name: str) -> str:
    return f"{name} (pitfall)" if document["subjects"].get(name, {}).get("is_pitfall") else name


def _interval(cell) -> str:
    value, *ends = cell or [None]
    ends = "" if value is None or not ends else f" ({ends[0]:.3g} to {ends[1]:.3g})"
    return _number(value) + ends


def _number(value, missing: str = "", scale: float = 1.0) -> str:
    return missing if value is None else f"{value * scale:.3g}"


def _small(value) -> str:
    """Format a bias; the rounding error of an exact estimator is shown as 0."""
    return "" if value is None else "0" if abs(value) < 1e-5 else f"{value:.3g}"


def _columns(header: list[str], rows: list[list[str]], title: str | None = None) -> str:
    """Return the title, and rows cut or filled to the header: the first column to the left."""
    rows = [[*row, *[""] * len(header)][: len(header)] for row in [header, *rows]]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = [] if title is None else [title]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)

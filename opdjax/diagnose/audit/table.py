"""The audit's document as text for a terminal."""

from __future__ import annotations

from typing import Any


def text(document: dict[str, Any]) -> str:
    """Return the tables: random contexts, tree, pair, its gradients, pitfalls of a batch."""
    parts = [
        _vocabulary(document),
        _tree(document["tree"]),
        _contexts(document),
        _positions(document),
    ]
    if "gradients" in document:
        parts += [_gradients(document), _bins(document)]
    return "\n\n".join([*parts, _batches(document["batch_pitfalls"])])


def _vocabulary(document) -> str:
    found = document["vocabulary"]
    size = f"{found['num_contexts']} random contexts, V = {found['vocab']}"
    title = f"{size}, float64, every token enumerated (logit space)"
    return _exactness(title, document, found["rows"])


def _contexts(document) -> str:
    found = document["contexts"]
    pair = f"{document['student']}, teacher {document['teacher']}"
    title = f"{found['num_contexts']} contexts of {pair}, mean KL {found['kl_mean']:.3g} nats"
    title += " (logit space, every token in closed form)"
    return _exactness(title, document, found["rows"], document["costs"])


def _exactness(title: str, document, rows, costs=None) -> str:
    header = ["", "bias, reverse", "forward", "cosine, reverse", "forward"]
    header += ["noise / signal", "variance / opd", "worse than opd"]
    header += ["loss: us a token", "kB a token"] if costs is not None else []
    lines = []
    for name, row in rows.items():
        noise = row["noise_to_signal"] if row["variance_ratio"] > 1e-9 else 0
        cells = [_mark(document, name), *(_small(row["bias"][d]) for d in ("reverse", "forward"))]
        cells += [_number(row["cosine"][d], "none") for d in ("reverse", "forward")]
        cells += [_number(noise, "no signal"), _ratio(row), f"{100 * row['worse']:.1f} %"]
        if costs is not None:
            cost = costs.get(name, {})
            cells.append(_number(cost.get("seconds_per_token"), scale=1e6))
            cells.append(_number(cost.get("bytes_per_token"), scale=1e-3))
        lines.append(cells)
    return title + "\n" + columns(header, lines)


def _tree(found) -> str:
    title = f"a tree of all sequences (V = {found['vocab']}, T = {found['length']})"
    title += ", float64: relative bias of the expected gradient"
    header = ["", "contexts held fixed", "sequence KL", "of the baseline", "variance / signal^2"]
    rows = [
        [
            row["title"],
            *(_small(row[name]) for name in ("frozen", "sequence", "baseline")),
            _number(row["variance"]),
        ]
        for row in found["rows"]
    ]
    return title + "\n" + columns(header, rows)


_GRADIENT_COLUMNS = {
    "signal": "signal",
    "noise": "noise",
    "prompt": "of prompts",
    "trajectory": "of trajectories",
    "action": "of actions",
    "signal_to_noise": "signal / noise",
    "noise_ratio": "noise / opd",
}


def _gradients(document) -> str:
    found = document["gradients"]
    title = f"gradient of one rollout, all parameters; signal / noise of {found['batch']} rollouts"
    header = ["", *_GRADIENT_COLUMNS.values(), "actions / opd (95 %)"]
    rows = [
        [
            _mark(document, name),
            *(_number(row[key]) for key in _GRADIENT_COLUMNS),
            _interval(row.get("action_ratio")),
        ]
        for name, row in found["rows"].items()
    ]
    return title + "\n" + columns(header, rows)


def _bins(document) -> str:
    """Variances of the baselines relative to `opd`, by the KL of the context."""
    contexts, parameters = document["contexts"], document["gradients"]["by_kl"]
    ranges = (f"{100 * b['from']:g} to {100 * b['to']:g} %" for b in contexts["bins"])
    shares = (_number(share, scale=100) + " %" for share in parameters["variance_share"])
    rows = [*_shares(contexts["bins"]), ["opd: share of its variance, parameters", *shares]]
    for name, ratios in parameters["rows"].items():
        in_logits = (_number(cell[0]) for cell in contexts["rows"][name]["by_kl"])
        limits = ("" if c[0] is None else f"{c[1]:.2g} to {c[2]:.2g}" for c in ratios)
        rows.append([f"{name}: variance / opd, logits", *in_logits])
        rows.append([f"{name}: parameters", *(_number(cell[0]) for cell in ratios)])
        rows.append(["  95 %", *limits])
    return columns(["contexts by their KL", *ranges], rows)


def _positions(document) -> str:
    """Variances of the baselines relative to `opd`, by position in the completion."""
    contexts = document["contexts"]
    ranges = (f"{b['first']} to {b['last']}" for b in contexts["buckets"])
    rows = _shares(contexts["buckets"])
    for name, row in contexts["rows"].items():
        if "baseline" in document["subjects"][name]["options"]:
            ratios = (_number(cell[0]) for cell in row["by_position"])
            rows.append([f"{name}: variance / opd, logits", *ratios])
    return columns(["contexts by position", *ranges], rows)


def _shares(bins) -> list[list[str]]:
    percent = lambda key: (f"{100 * b[key]:.1f} %" for b in bins)
    return [
        ["mean KL, nats", *(f"{b['kl_mean']:.2g}" for b in bins)],
        ["share of the KL", *percent("kl_share")],
        ["opd: share of its variance, logits", *percent("variance_share")],
    ]


def _batches(found) -> str:
    rows = [
        [f"{name} (pitfall)", f"bias {row['bias']:.3g}, cosine {row['cosine']:.4f}"]
        for name, row in found.items()
        if "bias" in row
    ]
    sums = found["bfloat16_sums"]["error_by_tokens"].items()
    errors = ", ".join(f"{float(error):+.1%} of {count} tokens" for count, error in sums)
    rows.append(["bfloat16_sums (pitfall)", errors])
    return "gradient of the exact KL under a batch's pitfall\n" + columns(["", ""], rows)


def _mark(document, name: str) -> str:
    return f"{name} (pitfall)" if document["subjects"].get(name, {}).get("is_pitfall") else name


def _ratio(row) -> str:
    value, interval = row["variance_ratio"], row.get("variance_ratio_interval")
    return _interval([value, *interval]) if interval else _number(value)


def _interval(cell) -> str:
    return "" if not cell or cell[0] is None else f"{cell[0]:.3g} ({cell[1]:.3g} to {cell[2]:.3g})"


def _number(value, missing: str = "", scale: float = 1.0) -> str:
    return missing if value is None else f"{value * scale:.3g}"


def _small(value) -> str:
    """Format a bias; the rounding error of an exact estimator is shown as 0."""
    return "" if value is None else "0" if abs(value) < 1e-5 else f"{value:.3g}"


def columns(header: list[str], rows: list[list[str]]) -> str:
    """Return cells in aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(header, *rows)]

    def line(row: list[str]) -> str:
        first, *others = zip(row, widths)
        cells = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, [header, *rows]))

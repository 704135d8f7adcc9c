"""The audit's document as text for a terminal."""

from __future__ import annotations

from typing import Any


def text(document: dict[str, Any]) -> str:
    """Tables of the random vocabulary, the tree, the pair, the gradients of its parameters, the
    pitfalls of a batch.
    """
    parts = [
        _vocabulary(document),
        _tree(document["tree"]),
        _contexts(document),
        _positions(document["contexts"]),
    ]
    if "gradients" in document:
        parts += [_gradients(document), _bins(document)]
    return "\n\n".join([*parts, _batches(document["batch_pitfalls"])])


def _vocabulary(document) -> str:
    found = document["vocabulary"]
    title = f"{found['num_contexts']} random contexts, V = {found['vocab']}, float64, every draw enumerated (logit space)"
    return _exactness(title, document, found["rows"])


def _contexts(document) -> str:
    found = document["contexts"]
    title = (
        f"{found['num_contexts']} contexts of {document['student']}, teacher {document['teacher']}, mean KL {found['kl_mean']:.3g} nats "
        "(logit space, every draw in closed form)"
    )
    return _exactness(title, document, found["rows"], document["costs"])


def _exactness(title: str, document, rows, costs=None) -> str:
    header = [
        "",
        "bias, reverse",
        "forward",
        "cosine, reverse",
        "forward",
        "noise / signal",
        "variance / opd",
        "worse than opd",
    ]
    header += ["loss: us a token", "kB a token"] if costs is not None else []
    lines = []
    for name, row in rows.items():
        cells = [_mark(document, name), *(_small(row["bias"][d]) for d in ("reverse", "forward"))]
        cells += [_number(row["cosine"][d], "none") for d in ("reverse", "forward")]
        cells += [
            _number(row["noise_to_signal"] if row["variance_ratio"] > 1e-9 else 0, "no signal"),
            _ratio(row),
            f"{100 * row['worse']:.1f} %",
        ]
        if costs is not None:
            cost = costs.get(name, {})
            cells += [
                _number(cost.get("seconds_per_token"), scale=1e6),
                _number(cost.get("bytes_per_token"), scale=1e-3),
            ]
        lines.append(cells)
    return title + "\n" + columns(header, lines)


def _tree(found) -> str:
    title = f"a tree of all sequences (V = {found['vocab']}, T = {found['length']}), float64: relative bias of the expected gradient"
    header = ["", "contexts held fixed", "sequence KL", "of the baseline", "variance / signal^2"]
    rows = [
        [
            r["title"],
            *(_small(r[name]) for name in ("frozen", "sequence", "baseline")),
            _number(r["variance"]),
        ]
        for r in found["rows"]
    ]
    return title + "\n" + columns(header, rows)


def _gradients(document) -> str:
    found = document["gradients"]
    title = f"gradient of one rollout, all parameters; signal / noise of {found['batch']} rollouts"
    header = [
        "",
        "signal",
        "noise",
        "of prompts",
        "of trajectories",
        "of actions",
        "signal / noise",
        "noise / opd",
        "actions / opd (95 %)",
    ]
    rows = [
        [
            _mark(document, name),
            *(
                _number(row[part])
                for part in (
                    "signal",
                    "noise",
                    "prompt",
                    "trajectory",
                    "action",
                    "signal_to_noise",
                    "noise_ratio",
                )
            ),
            _interval(row.get("action_ratio")),
        ]
        for name, row in found["rows"].items()
    ]
    return title + "\n" + columns(header, rows)


def _bins(document) -> str:
    contexts, parameters = document["contexts"], document["gradients"]["by_kl"]
    bins = contexts["bins"]
    header = [
        "contexts by their KL",
        *(f"{100 * b['from']:g} to {100 * b['to']:g} %" for b in bins),
    ]
    rows = [
        ["mean KL, nats", *(f"{b['kl_mean']:.2g}" for b in bins)],
        ["share of the KL", *(f"{100 * b['kl_share']:.1f} %" for b in bins)],
    ]
    rows += [
        [
            "opd: share of its variance, logits",
            *(f"{100 * b['variance_share']:.1f} %" for b in bins),
        ]
    ]
    rows += [
        [
            "opd: share of its variance, parameters",
            *(_number(share, scale=100) + " %" for share in parameters["variance_share"]),
        ]
    ]
    for name, ratios in parameters["rows"].items():
        rows.append(
            [
                f"{name}: variance / opd, logits",
                *(_number(cell[0]) for cell in contexts["rows"][name]["by_kl"]),
            ]
        )
        rows.append([f"{name}: parameters", *(_number(cell[0]) for cell in ratios)])
        rows.append(
            [
                "  95 %",
                *("" if cell[0] is None else f"{cell[1]:.2g} to {cell[2]:.2g}" for cell in ratios),
            ]
        )
    return columns(header, rows)


def _positions(contexts) -> str:
    """The same by place in the completion, in logit space alone."""
    buckets = contexts["buckets"]
    header = ["contexts by position", *(f"{b['first']} to {b['last']}" for b in buckets)]
    rows = [["mean KL, nats", *(f"{b['kl_mean']:.2g}" for b in buckets)]]
    rows += [
        [f"share of {what}", *(f"{100 * b[key]:.1f} %" for b in buckets)] for what, key in _SHARES
    ]
    for name, row in contexts["rows"].items():
        if name.startswith("vopd "):
            rows.append(
                [
                    f"{name}: variance / opd, logits",
                    *(_number(cell[0]) for cell in row["by_position"]),
                ]
            )
    return columns(header, rows)


_SHARES = (("the KL", "kl_share"), ("opd's variance, logits", "variance_share"))


def _batches(found) -> str:
    rows = [
        [f"{name} (pitfall)", f"bias {row['bias']:.3g}, cosine {row['cosine']:.4f}"]
        for name, row in found.items()
        if "bias" in row
    ]
    sums = found["bfloat16_sums"]["error_by_tokens"].items()
    rows.append(
        [
            "bfloat16_sums (pitfall)",
            ", ".join(f"{float(error):+.1%} of {count} tokens" for count, error in sums),
        ]
    )
    return "gradient of the exact KL under a batch's pitfall\n" + columns(["", ""], rows)


def _mark(document, name: str) -> str:
    return f"{name} (pitfall)" if document["subjects"].get(name, {}).get("is_pitfall") else name


def _ratio(row) -> str:
    interval = row.get("variance_ratio_interval")
    return (
        _interval([row["variance_ratio"], *interval])
        if interval
        else _number(row["variance_ratio"])
    )


def _interval(cell) -> str:
    return "" if not cell or cell[0] is None else f"{cell[0]:.3g} ({cell[1]:.3g} to {cell[2]:.3g})"


def _number(value, nothing: str = "", scale: float = 1.0) -> str:
    if value is None:
        return nothing
    return f"{value * scale:.3g}"


def _small(value) -> str:
    """A bias; what is left of exactness is rounding."""
    return "" if value is None else "0" if abs(value) < 1e-5 else f"{value:.3g}"


def columns(header: list[str], rows: list[list[str]]) -> str:
    """Cells in aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pad = lambda row: "  ".join(
        f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))
    ).rstrip()
    return "\n".join(map(pad, [header, *rows]))

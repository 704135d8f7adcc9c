"""The result as Markdown."""

from __future__ import annotations

import statistics
from typing import Any


def to_markdown(result: dict[str, Any]) -> str:
    """One table, after what it was measured on."""
    versions = "; ".join(
        f"{system}: {', '.join(f'{n} {v}' for n, v in found.items())}"
        for system, found in result["versions"].items()
    )
    rates = f"{result['flops_per_second'] / 1e9:.0f} GFLOP/s and {result['bytes_per_second'] / 1e9:.1f} GB/s"
    lines = [
        f"{result['machine']}. Versions: {versions}.",
        f"Floor: FLOPs of the matrix products over the fastest product measured in this run, bytes over a copy: {rates}. "
        f"Medians of {result['repeats']} runs (range), alternating with opdjax's; ratios are medians of neighbouring pairs, below 1 opdjax "
        "is faster.",
        "",
        "| work | system | cores | seconds | CPU s | useful tokens/s | opdjax / peer | x floor | loss | gradient norms | remark |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(row) for row in result["rows"])])


def _row(row: dict[str, Any]) -> str:
    head = f"| {row['title']} | {row['system']} `{row['form']}` |"
    if "error" in row:
        return f"{head} | | | | | | | | {row['error'].replace('|', '/')} |"
    seconds, facts = row["seconds"], row["facts"]
    middle = statistics.median(seconds)
    tokens = (
        f"{statistics.median(row['tokens_per_second']):.0f}" if row["tokens_per_second"] else ""
    )
    ratio = f"{row['ratio']:.2f}" if row.get("ratio") else ""
    spread = f"{middle:.3f} ({min(seconds):.3f}–{max(seconds):.3f})"
    cpu = f"{statistics.median(row['cpu_seconds']):.2f}"
    loss = f"{facts['loss']:.6f}" if "loss" in facts else ""
    norms = ", ".join(f"{norm:.4e}" for norm in facts.get("norms", ()))
    cells = [
        row["threads"] or "gpu",
        spread,
        cpu,
        tokens,
        ratio,
        f"{middle / row['floor']:.1f}",
        loss,
        norms,
        _remark(row),
    ]
    return head + " " + " | ".join(map(str, cells)) + " |"


def _remark(row: dict[str, Any]) -> str:
    said = [row["remark"]] if row["remark"] else []
    facts = row["facts"]
    if "mean_length" in facts:
        said.append(f"lengths: mean {facts['mean_length']:.0f}, longest {facts['max_length']}")
    if facts.get("slots"):
        said.append("finished slots are refilled")
    return "; ".join([*said, *row.get("warnings", [])])

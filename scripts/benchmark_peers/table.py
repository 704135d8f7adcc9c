"""The benchmark's result as a Markdown table."""

from __future__ import annotations

import statistics
from typing import Any


def to_markdown(result: dict[str, Any]) -> str:
    """Return machine, versions and one table."""
    versions = "; ".join(
        f"{system}: {', '.join(f'{n} {v}' for n, v in found.items())}"
        for system, found in result["versions"].items()
    )
    flops, moved = result["flops_per_second"] / 1e9, result["bytes_per_second"] / 1e9
    columns = ("work", "system", "cores", "seconds", "CPU s", "useful tokens/s", "opdjax / peer")
    columns += ("x floor", "loss", "gradient norms", "remark")
    lines = [
        f"{result['machine']}. Versions: {versions}.",
        "Floor: the least time at the rates of the fastest matrix product and of a copy in this "
        f"run, {flops:.0f} GFLOP/s and {moved:.1f} GB/s. Seconds are medians of "
        f"{result['repeats']} runs (range) that alternate with opdjax's; ratios are medians of "
        "neighbouring pairs, and below 1 opdjax is faster.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
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
    cells = [row["threads"] or "gpu", spread, cpu, tokens, ratio, f"{middle / row['floor']:.1f}"]
    cells += [loss, norms, _remark(row)]
    return head + " " + " | ".join(map(str, cells)) + " |"


def _remark(row: dict[str, Any]) -> str:
    remarks = [row["remark"]] if row["remark"] else []
    facts = row["facts"]
    if "mean_length" in facts:
        remarks.append(f"lengths: mean {facts['mean_length']:.0f}, longest {facts['max_length']}")
    if facts.get("slots"):
        remarks.append("finished slots are refilled")
    return "; ".join([*remarks, *row.get("warnings", [])])

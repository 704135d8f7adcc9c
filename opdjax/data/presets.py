"""Rows of presets and suites, and weighted mixtures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from typing import Any

import numpy as np

from opdjax.config.presets import BOX, FORMATS, Preset, presets_in
from opdjax.data.grading import boxes
from opdjax.data.sources import ColumnMap, DataError, Rows, read_rows, value_at


def read_source(source: str, columns: ColumnMap, skipped: list[str] | None = None) -> Rows:
    """The rows of a data source in a form that `sources` knows, or in one of these:

        preset:NAME[:FORMAT][=SOURCE]  published training data (config.presets), without repeats;
                                       FORMAT instead of its own, SOURCE: where a copy of it is
        suite:NAME…,NAME…              evaluation suites; the column benchmark holds NAME
        mix:WEIGHT*SOURCE+…            as many rows of each as its weight says and the scarcest has

    The rows of presets and suites have the columns that `columns` names, and prompt_format. The
    numbers of rows that are left out are printed.
    """
    kind, _, rest = source.partition(":")
    if kind in ("preset", "suite"):
        return _published(source, columns)
    if kind == "mix":
        return _mixed(rest, columns, skipped)
    return read_rows(source, columns, skipped)


def _published(source: str, columns: ColumnMap) -> Rows:
    defaults = ("prompt", "answer", "reference", "rubric", "benchmark")
    names = [own or name for own, name in zip(dataclasses.astuple(columns), defaults)]
    for name, preset, origin in presets_in(source):
        others = (*preset.more, *(["domain"] if preset.domain else []))
        stored = (preset.prompt, preset.answer, preset.reference, preset.rubric, None, others)
        seen, unfit, repeats = set(), 0, 0
        for place, row in read_rows(origin, ColumnMap(*stored)):
            try:
                found = _canonical(row, preset)
            except DataError as error:
                raise DataError(f"{place}, read as {name}: {error}") from error
            key = found and " ".join(found[0].lower().split())
            unfit, repeats = unfit + (found is None), repeats + (key in seen)
            if found is not None and key not in seen:
                seen.add(key)
                format = {"prompt_format": FORMATS[preset.format]}
                yield place, dict(zip(names, (*found, name))) | format
        if unfit or repeats:
            left_out = f"{repeats} that repeat a question, {unfit} of another domain or without an"
            print(f"{name}: {len(seen)} rows; left out: {left_out} answer in its form")


def _canonical(row: dict[str, Any], preset: Preset) -> tuple[str, Any, Any, Any] | None:
    """(question, answer, reference, criteria) of a published row; None if it is to be left out."""
    if preset.domain is not None and _text(row, "domain") != preset.domain:
        return None
    before, after = preset.wrapper.split("{prompt}")
    question = _text(row, preset.prompt).strip().removeprefix(before).removesuffix(after)
    reference = _text(row, preset.reference) if preset.reference else None
    criteria = value_at(row, preset.rubric) if preset.rubric else []
    if preset.grader == "ifeval":
        return (
            question,
            json.dumps({"prompt": question} | {n: row[n] for n in preset.more}),
            None,
            [],
        )
    if preset.answer is None:
        return question, None, reference, criteria
    answer = _text(row, preset.answer)
    if preset.mark == BOX:
        answer = (boxes(answer) or [""])[-1]
    elif preset.mark:
        answer = answer.rpartition(preset.mark)[2] if preset.mark in answer else ""
    answer = answer.strip()
    if preset.grader == "choice":
        question, answer = _choice(row, preset, question, answer)
    return (question, answer, reference, criteria) if answer else None


def _choice(row: dict[str, Any], preset: Preset, question: str, answer: str) -> tuple[str, str]:
    """(question with its options, letter of the right one, empty if it is none of these)."""
    if "choices" in preset.more:
        choices = value_at(row, "choices") or {}
        options = dict(zip(choices.get("label") or (), choices.get("text") or ()))
        letter = answer if answer in options else ""
    else:
        texts = {answer, *(_text(row, name).strip() for name in preset.more)}
        # An order that depends on the texts alone: the right option has no place of its own.
        mixed = sorted(texts, key=lambda x: hashlib.sha256(f"{question}\0{x}".encode()).digest())
        options = dict(zip(string.ascii_uppercase, mixed))
        letter = string.ascii_uppercase[mixed.index(answer)]
    return question + "\n\n" + "\n".join(f"{x}. {text}" for x, text in options.items()), letter


def _text(row: dict[str, Any], path: str) -> str:
    value = value_at(row, path)
    return value.decode() if isinstance(value, bytes) else "" if value is None else str(value)


def _mixed(text: str, columns: ColumnMap, skipped: list[str] | None) -> Rows:
    _, *parts = re.split(r"(?:^|\+)\s*(\d+(?:\.\d+)?)\*", text)
    weights, sources = [float(x) for x in parts[::2]], [x.strip() for x in parts[1::2]]
    if len(sources) < 2 or not all(weights) or not all(sources):
        raise DataError(
            f"the mixture 'mix:{text}' has no two parts with a weight; expected "
            "mix:WEIGHT*SOURCE+WEIGHT*SOURCE, such as mix:0.7*a.jsonl+0.3*b.jsonl"
        )
    rows = [list(read_source(source, columns, skipped)) for source in sources]
    size = min(len(part) / weight for part, weight in zip(rows, weights))
    for number, (source, part, weight) in enumerate(zip(sources, rows, weights)):
        count = round(weight * size)
        print(f"mixture: {count} of {len(part)} rows of {source}")
        order = np.random.Generator(np.random.Philox(number))
        yield from (part[n] for n in sorted(order.permutation(len(part))[:count]))

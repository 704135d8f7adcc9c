"""Evaluation suites on a checkpoint: a record of every problem, scores of these, differences.

Records are appended as they are made, so that an interrupted evaluation continues.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opdjax.config import Config
from opdjax.config.presets import presets
from opdjax.config.validation import ConfigError, differences
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.evaluate import EVALUATION_SLOTS, Evaluator
from opdjax.models.decoder import Params
from opdjax.models.hf import fingerprint, load_params
from opdjax.rollouts.setup import compute_dtype, make_evaluator, open_student
from opdjax.runs.statistics import avg_at_k, by_benchmark, maj_at_k, pass_at_k
from opdjax.runs.workdir import append_lines, read_lines

Records = Mapping[str, Sequence[dict[str, Any]]]  # by suite: those of `Evaluator.records`
_SAMPLED = ("grader", "num_samples", "temperature", "top_p", "top_k", "max_completion_length")


def records_of(config: Config, suites: Sequence[str], directory: pathlib.Path) -> Records:
    """The records of the config's student by suite, in `directory`/SUITE.jsonl; those that the file
    has are not sampled again.

    A suite is NAME[:FORMAT][=SOURCE] of a known one, or another data source with answers.
    ConfigError if a file has records of another model, of other prompts, or sampled otherwise.
    """
    checkpoint = open_student(config)
    tokenizer, dtype = load_tokenizer(checkpoint.path), compute_dtype(config.train.dtype)
    weights = functools.cache(lambda: load_params(checkpoint, dtype))
    evaluators = {}
    for suite in suites:  # all data and graders are read before anything is sampled
        is_known = (name := re.match("[^:=]*", suite)[0]) in presets("suite")
        source, name = (f"suite:{suite}", name) if is_known else (suite, file_name(suite))
        evaluation = dataclasses.replace(config.evaluation, source=source, kind="answers")
        own = dataclasses.replace(config, evaluation=evaluation)
        evaluator = evaluators[name] = make_evaluator(own, checkpoint, tokenizer, None)
        if evaluator.prompts.skipped:
            print(f"{name}: {evaluator.prompts.num_skipped} prompts are too long and are left out")
    header = {"student": fingerprint(checkpoint), "dtype": dtype}
    return {
        name: _completed(evaluator, directory / f"{name}.jsonl", header, weights)
        for name, evaluator in evaluators.items()
    }


def file_name(path: str) -> str:
    """A path or data source as the name of a file."""
    return re.sub(r"[^\w.@-]+", "_", path).strip("_")


def _completed(
    evaluator: Evaluator, file: pathlib.Path, header: dict, weights: Callable[[], Params]
) -> Sequence[dict[str, Any]]:
    sampled = {field: getattr(evaluator.config, field) for field in _SAMPLED}
    header = header | sampled | {"prompts": evaluator.prompts.digest}
    lines = read_lines(file)
    if not lines:
        append_lines(file, [header])
    elif changed := differences(lines[0], header):
        raise ConfigError(
            f"{file} holds records of another evaluation ({'; '.join(changed)}); expected the same "
            "one: choose another --output"
        )
    records, total = lines[1:], len(evaluator.prompts)
    size = max(1, (evaluator.slots or EVALUATION_SLOTS) // evaluator.config.num_samples)
    while len(records) < total:
        part = range(len(records), min(len(records) + size, total))
        append_lines(file, new := evaluator.records(weights(), part))
        records += new
        print(f"{file.stem}: {len(records)} of {total} problems")
    return records


def scores_of_records(records: Records, before: Records | None = None) -> dict[str, Any]:
    """avg@k, pass@k, maj@k and the shares of answers that are truncated or have no value, with
    intervals, by suite and as their mean (see `by_benchmark`).

    With `before`: the differences from another checkpoint's, paired by problem; an interval without
    0 is a difference at the 5 % level. ConfigError if the problems differ.
    """
    scores = _per_problem(records)
    if before is not None:
        if _asked(before) != _asked(records):
            raise ConfigError("the checkpoints answered different problems; expected the same ones")
        scores = {name: scores[name] - values for name, values in _per_problem(before).items()}
    return by_benchmark([suite for suite, _ in _asked(records)], scores)


def _asked(records: Records) -> list[tuple[str, Any]]:
    return [(suite, row["prompt"]) for suite, part in records.items() for row in part]


def _per_problem(records: Records) -> dict[str, np.ndarray]:
    rows = [row for part in records.values() for row in part]
    correct, votes = np.array([row["correct"] for row in rows]), [row["votes"] for row in rows]
    scores = {"avg@k": avg_at_k(correct), "pass@k": pass_at_k(correct, correct.shape[1])}
    scores |= {"maj@k": maj_at_k(votes, correct)}
    scores["truncated"] = np.array([np.mean(row["truncated"]) for row in rows])
    return scores | {"no answer": np.array([row.count(None) / len(row) for row in votes])}

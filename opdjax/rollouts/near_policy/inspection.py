"""Describes and checks stored rollouts, from the files alone. No jax."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from opdjax.config import MINI_PAIR, MINI_STUDENT, MINI_TEACHER
from opdjax.data.tokenizer import load_tokenizer
from opdjax.rollouts.near_policy import shards
from opdjax.rollouts.near_policy.shards import SCHEMAS, ShardError
from opdjax.runs.results import read_filter
from opdjax.runs.workdir import WorkdirError, read_config

_IDS = ("policy_version", "prompt_id", "sample_id")
_ZONES = ("degenerate", "disconnected", "unscored")
_BUILT_IN = {MINI_STUDENT: MINI_PAIR / "student", MINI_TEACHER: MINI_PAIR / "teacher"}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Summary of a shard that was read; all tokens together would fill the memory."""

    path: pathlib.Path
    facts: dict[str, Any]
    # Identity of each sample, [samples, 5]: number of the shard, version, prompt, sample, and the
    # step, or the number again if no step is stored.
    keys: np.ndarray
    counts: np.ndarray  # of samples, tokens of prompts, tokens of completions, bytes

    @classmethod
    def of(cls, path: pathlib.Path) -> _Seen:
        shard = shards.read_shard(path)
        columns, number = shard.columns, np.full(len(shard), shard.facts["number"])
        num_tokens = lambda name: sum(map(len, columns.get(name, ())))
        tokens = num_tokens("tokens") or num_tokens("teacher_logprobs")
        counts = [len(shard), num_tokens("prompt_tokens"), tokens, path.stat().st_size]
        keys = [number, *(columns[name] for name in _IDS), columns.get("step", number)]
        return cls(path, shard.facts, np.stack(keys, axis=1), np.array(counts))


def inspect(path: pathlib.Path, num_samples: int = 0) -> bool:
    """Print the content of a version's directory or of a work directory; return whether everything
    is intact and complete.

    A damaged shard is printed with the reason, and the others are counted. `num_samples` samples,
    spread evenly, are printed as text if the config.json of the run names a tokenizer, else as ids.
    WorkdirError if the path holds no rollouts.
    """
    unit, directories, groups = "number", [path], {}
    if not any(shards.shard_paths(path, stage) for stage in SCHEMAS):
        groups = {version: [] for version in shards.versions(path)}
        unit, directories = "version", [shards.version_directory(path, each) for each in groups]
    if not directories:
        problem = "holds no rollouts" if path.exists() else "does not exist"
        raise WorkdirError(
            f"{path} {problem}; expected a directory rollouts/VERSION or the work directory of a "
            "run that stores its rollouts: a near-policy one, or opdjax sample --store"
        )
    damaged: list[str] = []
    places = itertools.product(directories, SCHEMAS)
    paths = [file for place in places for file in shards.shard_paths(*place).values()]
    all_seen = _whole(paths, _Seen.of, damaged)
    for seen in all_seen:
        key = int(seen.path.parent.name) if unit == "version" else seen.facts["number"]
        groups.setdefault(key, []).append(seen)
    _print_counts(unit, groups)
    paths = [file for place in directories for file in sorted(place.glob("filter-*.json"))]
    _print_filters(unit, _whole(paths, read_filter, damaged))
    stages = samples, annotations = [_of_stage(all_seen, stage) for stage in SCHEMAS]
    for seen in filter(None, stages):
        print(_facts(seen))
    repeated, (unannotated, orphaned) = [*map(_num_repeated, stages)], _unmatched(all_seen)
    print(
        f"{_totals(samples)[0]} samples: {repeated[0]} repeated, {unannotated} without annotation; "
        f"{_totals(annotations)[0]} annotations: {repeated[1]} repeated, {orphaned} without sample"
    )
    for reason in damaged:
        print(f"damaged: {reason}")
    _print_samples(samples, num_samples)
    # A sample without annotation is no problem: it may be annotated later.
    return not (damaged or orphaned or any(repeated))


def _whole(
    paths: list[pathlib.Path], read: Callable[[pathlib.Path], Any], damaged: list[str]
) -> list[Any]:
    """What `read` returns; reasons why the others cannot be read are added to `damaged`."""
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except (ShardError, WorkdirError) as error:
            damaged.append(str(error))
    return found


def _of_stage(all_seen: list[_Seen], stage: str) -> list[_Seen]:
    return [seen for seen in all_seen if seen.facts["stage"] == stage]


def _keys(all_seen: list[_Seen]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 5), int), *(seen.keys for seen in all_seen)])


def _num_repeated(all_seen: list[_Seen]) -> int:
    keys = _keys(all_seen)[:, 1:]
    return len(keys) - len(np.unique(keys, axis=0))


def _unmatched(all_seen: list[_Seen]) -> tuple[int, int]:
    """(samples without annotation, annotations without sample), matched within each number."""
    sides = [_keys(_of_stage(all_seen, stage))[:, :4] for stage in SCHEMAS]
    _, ids = np.unique(np.concatenate(sides), axis=0, return_inverse=True)
    drawn, annotated = np.split(ids.reshape(-1), [len(sides[0])])
    return np.sum(~np.isin(drawn, annotated)), np.sum(~np.isin(annotated, drawn))


# Tables


def _totals(seen: list[_Seen]) -> np.ndarray:
    return sum((each.counts for each in seen), np.zeros(4, int))


def _print_counts(unit: str, groups: dict[int, list[_Seen]]) -> None:
    header = [unit, "shards", "samples", "prompt tokens", "tokens"]
    rows = [[*header, "bytes a token", "annotated", "bytes a token"]]
    for key, seen in sorted(groups.items()):
        *counts, size = _totals(_of_stage(seen, "samples"))
        *_, num_annotated_tokens, annotated_size = _totals(_of_stage(seen, "annotations"))
        numbers = [key, len(seen), *counts]
        numbers += [_share(size, counts[2]), counts[0] - _unmatched(seen)[0]]
        rows.append([*map(str, numbers), _share(annotated_size, num_annotated_tokens)])
    print(_table(rows))


def _print_filters(unit: str, documents: list[dict[str, Any]]) -> None:
    if not documents:
        return
    rows = [[unit, "filter", "bounds", "samples", "kept", *_ZONES]]
    key_of = operator.itemgetter(unit)
    for key, group in itertools.groupby(sorted(documents, key=key_of), key_of):
        of = list(group)
        count, *zones = (sum(d[f"num_{part}"] for d in of) for part in ("samples", "kept", *_ZONES))
        shares = [f"{100 * zone / count:.1f} %" if count else "-" for zone in zones]
        kinds = sorted({f"{d['filter']} {d['form']}" for d in of})
        name = lambda bound: "any" if bound is None else f"{bound:g}"
        bounds = sorted({f"{name(d['ifd_min'])} to {name(d['ifd_max'])}" for d in of})
        limits = bounds[0] if len(bounds) == 1 else f"{len(bounds)} of them"
        rows.append([str(key), ", ".join(kinds), limits, str(count), *shares])
    print(_table(rows, left=(1, 2)))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1f}" if whole else "-"


def _table(rows: list[list[str]], left: tuple[int, ...] = ()) -> str:
    """Columns aligned to the right, those in `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = lambda i, cell: cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])
    return "\n".join(
        "  ".join(aligned(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows
    )


def _facts(shards: list[_Seen]) -> str:
    names = sorted({name for seen in shards for name in seen.facts} - {"stage", "number"})
    values = {name: sorted({str(seen.facts.get(name)) for seen in shards}) for name in names}
    return f"{shards[0].facts['stage']}: " + ", ".join(
        f"{name} {' or '.join(found)}" for name, found in values.items()
    )


# Samples


def _print_samples(all_seen: list[_Seen], num_samples: int) -> None:
    starts = [0, *itertools.accumulate(len(seen.keys) for seen in all_seen)]
    chosen = np.linspace(0, starts[-1], min(num_samples, starts[-1]), endpoint=False).astype(int)
    if not len(chosen):
        return
    show = _shower(all_seen[0].path)
    for seen, start, end in zip(all_seen, starts, starts[1:]):
        of_shard = chosen[(chosen >= start) & (chosen < end)] - start
        columns = shards.read_shard(seen.path).columns if len(of_shard) else {}
        for i in of_shard:
            names = ", ".join(f"{name} {columns[name][i]}" for name in ("step", *_IDS))
            print(f"\n{names}{', truncated' if columns['is_truncated'][i] else ''}")
            for name, label in (("prompt_tokens", "prompt"), ("tokens", "completion")):
                ids = columns[name][i].tolist()
                print(f"  {label} ({len(ids)} tokens): {show(ids)}")


def _shower(path: pathlib.Path) -> Callable[[list[int]], str]:
    """Tokens -> text, with the tokenizer of the shard's run; ids if it cannot be loaded."""
    try:
        student = read_config(path.absolute().parents[2]).student
        path, revision = student.place
        tokenizer = load_tokenizer(_BUILT_IN.get(path, path), revision)
    except ValueError as error:
        print(f"note: tokens are shown as ids: {error}")
        return str
    return lambda ids: repr(tokenizer.decode(ids, skip_special_tokens=False))

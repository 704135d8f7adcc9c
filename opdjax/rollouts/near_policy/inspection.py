"""Describes and checks stored rollouts, from the files alone. No jax."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from opdjax.config import MINI_PAIR, MINI_STUDENT, MINI_TEACHER
from opdjax.data.chat import load_tokenizer
from opdjax.rollouts.near_policy import shards
from opdjax.rollouts.near_policy.shards import SCHEMAS, Shard, ShardError
from opdjax.runs.workdir import WorkdirError, read_config

_IDS = ("policy_version", "prompt_id", "sample_id")
_ZONES = ("degenerate", "disconnected", "unscored")
_BUILT_IN = {MINI_STUDENT: MINI_PAIR / "student", MINI_TEACHER: MINI_PAIR / "teacher"}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Summary of a shard that was read; all tokens together would fill the memory."""

    path: pathlib.Path
    facts: dict[str, Any]
    ids: np.ndarray  # [samples, 3]
    steps: np.ndarray | None  # [samples]; annotations have none
    num_prompt_tokens: int
    num_tokens: int  # of completions
    num_bytes: int


def inspect(path: pathlib.Path, num_samples: int = 0) -> bool:
    """Print the content of a shard, of a version's directory or of a work directory; return whether
    everything is intact and complete.

    A damaged shard is printed with the reason, and the others are counted. `num_samples` samples,
    spread evenly, are printed as text if the config.json of the run names a tokenizer, else as ids.
    WorkdirError if the path holds no rollouts.
    """
    if path.is_file():
        return _inspect_shard(path, num_samples)
    if any(shards.shard_paths(path, stage) for stage in SCHEMAS):
        return _inspect_version(path, num_samples)
    versions = shards.versions(path)
    if not versions:
        problem = "holds no rollouts" if path.exists() else "does not exist"
        raise WorkdirError(
            f"{path} {problem}; expected a shard, a directory rollouts/VERSION or the work "
            "directory of a run that stores its rollouts"
        )
    return _inspect_workdir(path, versions, num_samples)


def _inspect_shard(path: pathlib.Path, num_samples: int) -> bool:
    try:
        shard = shards.read_shard(path)
    except ShardError as error:
        print(f"damaged: {error}")
        return False
    seen = _see(shard)
    print(_facts([seen]))
    counts = {"sample": len(shard), "prompt": seen.num_prompt_tokens, "token": seen.num_tokens}
    counts["top"] = seen.num_tokens * seen.facts.get("top_k", 0)
    columns = SCHEMAS[seen.facts["stage"]].items()
    header = ["column", "type", "values", "meaning"]
    rows = [[name, c.type, str(counts[c.per]), c.meaning] for name, c in columns]
    print(_table([header, *rows], left=(0, 1, 3)))
    size = _share(seen.num_bytes, seen.num_tokens)
    print(f"{len(shard)} samples, {seen.num_tokens} tokens, {size} bytes a token")
    num_repeated = _num_repeated(_keys([seen]))
    if num_repeated:
        print(f"not in order: {num_repeated} samples are there more than once")
    _print_samples([seen] if seen.facts["stage"] == "samples" else [], num_samples)
    return not num_repeated


def _inspect_version(directory: pathlib.Path, num_samples: int) -> bool:
    held = _Held.of(directory)
    numbers = sorted({seen.facts["number"] for seen in held.seen})
    _print_counts("number", {number: held.only(number) for number in numbers})
    _print_filters("number", {number: [document] for number, document in held.filters.items()})
    return _conclude([held], num_samples)


def _inspect_workdir(workdir: pathlib.Path, versions: list[int], num_samples: int) -> bool:
    held = {version: _Held.of(shards.version_directory(workdir, version)) for version in versions}
    _print_counts("version", held)
    _print_filters(
        "version",
        {version: list(found.filters.values()) for version, found in held.items() if found.filters},
    )
    return _conclude(list(held.values()), num_samples)


# Content


@dataclasses.dataclass(frozen=True)
class _Held:
    """The content of a version's directory."""

    seen: list[_Seen]
    filters: dict[int, dict[str, Any]]
    damaged: list[str]

    @classmethod
    def of(cls, directory: pathlib.Path) -> _Held:
        damaged: list[str] = []
        paths = [
            path for stage in SCHEMAS for path in shards.shard_paths(directory, stage).values()
        ]
        seen = _whole(paths, lambda path: _see(shards.read_shard(path)), damaged)
        filters = _whole(
            shards.filters(directory), lambda number: shards.read_filter(directory, number), damaged
        )
        return cls(list(seen.values()), filters, damaged)

    def of_stage(self, stage: str) -> list[_Seen]:
        """The shards of a stage, sorted by number."""
        return [seen for seen in self.seen if seen.facts["stage"] == stage]

    def only(self, number: int) -> _Held:
        """The shards with this number."""
        return _Held([seen for seen in self.seen if seen.facts["number"] == number], {}, [])


def _whole(keys: Iterable[Any], read: Callable[[Any], Any], damaged: list[str]) -> dict[Any, Any]:
    """key -> what `read` returns; reasons why the others cannot be read are added to `damaged`."""
    found = {}
    for key in keys:
        try:
            found[key] = read(key)
        except (ShardError, WorkdirError) as error:
            damaged.append(str(error))
    return found


def _see(shard: Shard) -> _Seen:
    columns = shard.columns
    num_tokens = lambda name: sum(map(len, columns[name])) if name in columns else 0
    return _Seen(
        shard.path,
        shard.facts,
        np.stack([columns[name] for name in _IDS], axis=1),
        columns.get("step"),
        num_tokens("prompt_tokens"),
        num_tokens("tokens") or num_tokens("teacher_logprobs"),
        shard.path.stat().st_size,
    )


# Completeness


def _keys(shards: list[_Seen]) -> np.ndarray:
    """The identity of each sample: version, prompt, sample, and the step, or the number of the
    shard if no step is stored.
    """
    number = lambda seen: np.full(len(seen.ids), seen.facts["number"])
    steps = [number(seen) if seen.steps is None else seen.steps for seen in shards]
    rows = [np.column_stack([seen.ids, own]) for seen, own in zip(shards, steps)]
    return np.concatenate([np.zeros((0, 4), np.int64), *rows])


def _num_repeated(keys: np.ndarray) -> int:
    return len(keys) - len(np.unique(keys, axis=0))


def _unmatched(samples: list[_Seen], annotations: list[_Seen]) -> tuple[int, int]:
    """(samples without annotation, annotations without sample), matched within each number."""
    sides = [
        _keys([dataclasses.replace(seen, steps=None) for seen in side])
        for side in (samples, annotations)
    ]
    _, ids = np.unique(np.concatenate(sides), axis=0, return_inverse=True)
    ids = ids.reshape(-1)
    drawn, annotated = ids[: len(sides[0])], ids[len(sides[0]) :]
    return int(np.sum(~np.isin(drawn, annotated))), int(np.sum(~np.isin(annotated, drawn)))


def _conclude(held: list[_Held], num_samples: int) -> bool:
    """Print facts, problems and samples; return whether there are no problems."""
    samples, annotations = (
        [seen for of in held for seen in of.of_stage(stage)] for stage in SCHEMAS
    )
    for kind in filter(None, (samples, annotations)):
        print(_facts(kind))
    repeated = {
        stage: sum(_num_repeated(_keys(of.of_stage(stage))) for of in held) for stage in SCHEMAS
    }
    unannotated, orphaned = np.sum(
        [_unmatched(of.of_stage("samples"), of.of_stage("annotations")) for of in held], axis=0
    )
    damaged = [reason for of in held for reason in of.damaged]
    total = lambda shards: sum(len(seen.ids) for seen in shards)
    print(
        f"{total(samples)} samples: {repeated['samples']} repeated, {unannotated} without "
        f"annotation; {total(annotations)} annotations: {repeated['annotations']} repeated, "
        f"{orphaned} without sample"
    )
    for reason in damaged:
        print(f"damaged: {reason}")
    _print_samples(samples, num_samples)
    # A sample without annotation is no problem: it may be annotated later.
    return not (damaged or orphaned or any(repeated.values()))


# Tables


def _print_counts(name: str, held: dict[int, _Held]) -> None:
    header = [name, "shards", "samples", "prompt tokens", "tokens"]
    rows = [[*header, "bytes a token", "annotated", "bytes a token"]]
    for key, of in held.items():
        samples, annotations = of.of_stage("samples"), of.of_stage("annotations")
        total = lambda shards, field: sum(getattr(seen, field) for seen in shards)
        sizes = [
            _share(total(shards, "num_bytes"), total(shards, "num_tokens"))
            for shards in (samples, annotations)
        ]
        counts = [len(samples) + len(annotations), sum(len(seen.ids) for seen in samples)]
        counts += [total(samples, "num_prompt_tokens"), total(samples, "num_tokens")]
        annotated = str(counts[1] - _unmatched(samples, annotations)[0])
        rows.append([str(key), *map(str, counts), sizes[0], annotated, sizes[1]])
    print(_table(rows))


def _print_filters(name: str, documents: dict[int, list[dict[str, Any]]]) -> None:
    """Print shares of all samples, and the kept shares of right and of wrong answers."""
    if not documents:
        return
    rows = [
        [name, "filter", "bounds", "samples", "kept", *_ZONES, "kept of right", "kept of wrong"]
    ]
    for key, of in documents.items():
        total = lambda field: sum(document[field] for document in of)  # noqa: B023
        graded = [document["by_correctness"] for document in of if document["by_correctness"]]
        by = [
            _percent(sum(d[side]["kept"] for d in graded), sum(d[side]["num"] for d in graded))
            for side in ("right", "wrong")
        ]
        shares = [
            _percent(total(f"num_{zone}"), total("num_samples")) for zone in ("kept", *_ZONES)
        ]
        kinds = sorted({f"{document['filter']} {document['form']}" for document in of})
        bounds = sorted(
            {f"{_bound(document['ifd_min'])} to {_bound(document['ifd_max'])}" for document in of}
        )
        limits = bounds[0] if len(bounds) == 1 else f"{len(bounds)} of them"
        rows.append([str(key), ", ".join(kinds), limits, str(total("num_samples")), *shares, *by])
    print(_table(rows, left=(1, 2)))


def _bound(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1f}" if whole else "-"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _table(rows: list[list[str]], left: tuple[int, ...] = ()) -> str:
    """Columns aligned to the right, those in `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = lambda i, cell: cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])
    return "\n".join(
        "  ".join(aligned(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows
    )


def _facts(shards: list[_Seen]) -> str:
    """The facts that the writers stored, each value once."""
    names = sorted({name for seen in shards for name in seen.facts} - {"stage", "number"})
    values = {name: sorted({str(seen.facts.get(name)) for seen in shards}) for name in names}
    return f"{shards[0].facts['stage']}: " + ", ".join(
        f"{name} {' or '.join(found)}" for name, found in values.items()
    )


# Samples


def _print_samples(all_seen: list[_Seen], num_samples: int) -> None:
    """Print this many samples, spread evenly over the shards."""
    starts = [0, *itertools.accumulate(len(seen.ids) for seen in all_seen)]
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

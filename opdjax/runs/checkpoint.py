"""Training states on disk. The only module that uses orbax."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from jaxtyping import Array, UInt
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN


class CheckpointShapeError(ValueError):
    """A stored state does not fit the model or optimizer of the run that resumes from it."""


class UnreadableCheckpointError(ValueError):
    """The stored state in the directory `path` is damaged."""

    def __init__(self, path: epath.Path, reason: str):
        self.path = path
        names = {other.name for other in path.parent.iterdir()} - {path.name}
        others = sorted(int(name) for name in names if name.isdecimal())
        super().__init__(
            f"checkpoint {path} is damaged: {reason}; move it away to use another one (there are "
            f"{others}), or continue with --checkpoint.on-damage previous"
        )


class CheckpointWriteError(RuntimeError):
    """A state could not be written."""


# The scores whose best checkpoint is kept, by the first that a run has; lower divergence is better.
_BEST = {"avg@k": 1, "student/reverse_kl": -1}
_RECORD = "opdjax"  # name of what is stored beside the arrays: digests, scores, rows of the logs


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's own handler of a tree of arrays, which also calls `_Save.complete` in the background:
    before orbax writes the custom metadata, from the dict that it was given. `failures` are those
    of this process in the background.
    """

    def __init__(self):
        super().__init__()
        self.failures: list[Exception] = []

    async def async_save(self, directory: epath.Path, args: _Save) -> list[ocp.future.Future]:
        awaited = await super().async_save(directory, args=args)
        return [_Watched([*awaited, ocp.future.ChainedFuture([], args.complete)], self.failures)]

    @classmethod
    def typestr(cls) -> str:  # what is stored is what orbax's own handler reads
        return ocp.StandardCheckpointHandler.typestr()


@dataclasses.dataclass
class _Watched:
    """The results of futures; a failure is kept in a list, too."""

    futures: list[ocp.future.Future]
    failures: list[Exception]

    def result(self, timeout: int | None = None) -> None:
        try:
            ocp.future.ChainedFuture(self.futures, lambda: None).result(timeout)
        except Exception as error:
            self.failures.append(error)
            raise


@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
    """A tree of arrays to save, and what completes the custom metadata of the checkpoint."""

    complete: Callable[[], None] = lambda: None


class Checkpointer:
    """Saves states asynchronously; keeps the newest `keep` and the one with the best score."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int,
        is_read_only: bool = False,
    ):
        # Orbax logs every step of every save, and tracebacks of failures that also surface as
        # exceptions.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        _silence_closed_loops()
        best = BestN(
            get_metric_fn=_quality,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_quality,
            # A reader must not remove what a running process is writing.
            cleanup_tmp_directories=not is_read_only,
            read_only=is_read_only,
            create=not is_read_only,
        )
        _check_steps(epath.Path(directory))
        self._handler = _Handler()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("default", _Save, self._handler)
        self._manager = ocp.CheckpointManager(
            epath.Path(directory), options=options, handler_registry=registry
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """Step of the evaluated checkpoint with the best score; None if none was evaluated.
        UnreadableCheckpointError if a score is damaged.
        """
        scored = {step: self._read(step, self._scores) for step in self.steps}
        scored = {step: _quality(metrics) for step, metrics in scored.items() if metrics}
        return max(scored, key=scored.get) if scored else None

    def save(
        self,
        step: int,
        state: Any,
        evaluation: dict[str, float] | None = None,
        logs: dict[str, Any] | None = None,
    ) -> None:
        """Start to write `state`, which may be donated as soon as this returns. `logs` says which
        rows of the run's logs belong before it.
        """
        _return_free_memory()
        if jax.default_backend() == "cpu":
            # On CPU the writer's host copy would be a view of the buffers that are donated next.
            state = jax.tree.map(jnp.copy, state)
        started, stored = _start_digests(state), {}

        def complete() -> None:  # in the background: the run need not wait for the digests
            record = {"digests": _numbers(started), "scores": evaluation, "logs": logs}
            stored.update({_RECORD: record, "crc32": _crc32(record)})

        args = _Save(state, complete=complete)
        with self._writing():
            self._raise_own_failure()
            self._manager.save(step, args=args, metrics=evaluation, custom_metadata=stored)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """CheckpointWriteError if what is done, or an earlier save in the background, fails."""
        try:
            yield
        except Exception as error:  # TensorStore raises most kinds, OSError without its file too
            if isinstance(error, OSError) and error.filename is not None:
                raise  # it names its file
            raise CheckpointWriteError(
                f"a checkpoint in {self._manager.directory} could not be written: "
                f"{_first_line(error)}; make room there or repair that, and the same command "
                "continues from the last whole checkpoint"
            ) from error

    def logs(self, step: int | None) -> dict[str, Any]:
        """The `logs` that were saved with a step; empty if none were, or there is no step."""
        return (self._read(step, self._record).get("logs") or {}) if step else {}

    def restore(
        self, step: int, like: Any, on_all: Callable[[Callable[[], Any]], Any] = lambda read: read()
    ) -> Any:
        """The state of a step, with the shapes and shardings of `like`; CheckpointShapeError if it
        belongs to another model or optimizer, UnreadableCheckpointError if it is damaged.

        `on_all` runs a function in every process of the run, and fails in all if it fails in one.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        known = on_all(partial(self._check, step, target))
        state = on_all(partial(self._read, step, partial(self._arrays, target=target)))
        if not known:
            if jax.process_index() == 0:
                print(f"note: checkpoint {step} is of an earlier version, without digests")
            return state
        found = digests(state)
        if damaged := [name for name, digest in known.items() if found[name] != digest]:
            reason = f"{len(damaged)} of {len(known)} arrays changed, first {damaged[0]}"
            raise UnreadableCheckpointError(self._path(step), reason)
        return state

    def _read(self, step: int, read: Callable[[int], Any]) -> Any:
        """The result of `read`; UnreadableCheckpointError if it fails."""
        try:
            return read(step)
        except CheckpointShapeError:
            raise
        except Exception as error:  # TensorStore and orbax also raise bare Exceptions
            raise UnreadableCheckpointError(self._path(step), _first_line(error)) from error

    def _record(self, step: int) -> dict[str, Any]:
        """What was stored beside the arrays; empty in checkpoints of earlier versions."""
        metadata = self._manager.metadata(step)
        if metadata.commit_timestamp_nsecs is None:
            raise ValueError("its _CHECKPOINT_METADATA is missing or no JSON")
        stored = metadata.custom_metadata or {}
        record = stored.get(_RECORD, {})
        if stored.get("crc32", _crc32({})) != _crc32(record):
            raise ValueError("its record of digests is not what was saved")
        return record

    def _scores(self, step: int) -> dict[str, float] | None:
        found, record = self._manager.metrics(step), self._record(step)
        if record and found != record["scores"]:
            raise ValueError("its scores are not what was saved")
        return found

    def _arrays(self, step: int, target: Any) -> Any:
        # Not by the manager: it has a barrier at which the others would wait for one that fails.
        path = self._path(step) / "default"
        return self._handler.restore(path, args=ocp.args.StandardRestore(target))

    def _check(self, step: int, target: Any) -> dict[str, int]:
        """The digests of a step, empty in earlier versions, if its arrays have the names and shapes
        of `target`.
        """
        self._check_params(step, target.params)
        known = self._read(step, self._record).get("digests", {})
        if known and (other := known.keys() ^ _named(target).keys()):
            raise CheckpointShapeError(
                f"checkpoint {step} is from a run with another optimizer: the two differ in "
                f"{len(other)} arrays, first {min(other)}; start in a new work directory"
            )
        return known

    def _check_params(self, step: int, wanted: Any) -> None:
        """CheckpointShapeError that lists every mismatched parameter; orbax itself names none."""
        tree = self._read(step, lambda step: self._manager.item_metadata(step).tree["params"])
        stored = flatten_dict(tree, sep=".")
        wanted = flatten_dict(wanted, sep=".")
        problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
        problems += [f"{name} is not in this model" for name in stored.keys() - wanted.keys()]
        for name in stored.keys() & wanted.keys():
            if tuple(stored[name].shape) != wanted[name].shape:
                problems.append(
                    f"{name} has shape {tuple(stored[name].shape)}; this model needs "
                    f"{wanted[name].shape}"
                )
        if problems:
            raise CheckpointShapeError(
                f"checkpoint {step} is from another model:\n  " + "\n  ".join(sorted(problems))
            )

    def _path(self, step: int) -> epath.Path:
        return self._manager.directory / str(step)

    def wait(self) -> None:
        """Wait until all saved states are on disk."""
        with self._writing():
            self._raise_own_failure()
            self._manager.wait_until_finished()

    def _raise_own_failure(self) -> None:
        """Await the save in progress of a run of several processes. Where it fails in this one,
        orbax waits ten minutes and more for the others, which wait for it.
        """
        if jax.process_count() > 1:
            while self._manager.is_saving_in_progress() and not self._handler.failures:
                time.sleep(0.01)
            if self._handler.failures:
                raise self._handler.failures[0]

    def close(self) -> None:
        """Finish pending writes and close the directory."""
        with self._writing():
            if jax.process_count() == 1 or not self._handler.failures:
                self._manager.close()


@functools.cache
def _silence_closed_loops() -> None:
    """TensorStore hands the failures that follow a first one to an event loop that orbax has closed
    by then, and the traceback of each attempt to sys.unraisablehook.
    """
    show = sys.unraisablehook
    is_closed_loop = lambda found: str(found.exc_value) == "Event loop is closed"
    sys.unraisablehook = lambda found: is_closed_loop(found) or show(found)


def _return_free_memory() -> None:
    """Give freed memory back to the system, in milliseconds. The C library of Linux keeps it in an
    arena for each thread; compiling leaves hundreds of MB there, and each save a little more.
    """
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _check_steps(directory: epath.Path) -> None:
    """UnreadableCheckpointError for a step without which orbax could read no step at all."""
    for found in ocp.path.step.standard_name_format().find_all(directory):
        try:
            found.commit_timestamp_nsecs  # noqa: B018 (reads the metadata)
            if (scores := found.path / "metrics" / "metrics").exists():
                json.loads(scores.read_text())
        except Exception as error:  # as those of `_read`
            raise UnreadableCheckpointError(found.path, _first_line(error)) from error


def set_aside(directory: epath.PathLike) -> epath.Path:
    """Rename the directory of a checkpoint, so that it is not used again; returns the new path."""
    path = epath.Path(directory)
    path.with_name(f"{path.name}.damaged").rmtree(missing_ok=True)
    return path.rename(path.with_name(f"{path.name}.damaged"))


def digests(state: Any) -> dict[str, int]:
    """A 32-bit digest of each array, by its path. It depends on values and their places alone, so
    it is the same on every mesh.
    """
    return _numbers(_start_digests(state))


def _start_digests(state: Any) -> dict[str, UInt[Array, ""]]:
    """The digests, which the device may still have to compute."""
    started = {}
    for name, array in _named(state).items():
        started[name] = _jitted_digest()(array)
        if jax.default_backend() == "cpu" and len(array.sharding.device_set) > 1:
            # Collectives of several programs at a time can wait for each other there for ever.
            started[name].block_until_ready()
    return started


def _numbers(started: dict[str, UInt[Array, ""]]) -> dict[str, int]:
    return {name: int(value) for name, value in jax.device_get(started).items()}


@functools.cache
def _jitted_digest() -> Callable[[Array], UInt[Array, ""]]:
    # XLA for CPU would split a long sum in two passes, with a copy of the array between them.
    is_cpu = jax.default_backend() == "cpu"
    options = {"xla_disable_hlo_passes": "tree_reduction_rewriter"} if is_cpu else None
    return jax.jit(_digest, compiler_options=options)


def _digest(array: Array) -> UInt[Array, ""]:
    # A sum of integers is exact in any order. Each term mixes the bits of a value with its index
    # in the array (steps of MurmurHash3's finalizer), so that no two changes cancel but by chance.
    array = array.astype(jnp.uint8) if array.dtype == bool else array
    word = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(words.shape):  # values of 64 bits have a last axis of two halves
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * np.uint32(size) + place
    mixed = words + index * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _named(state: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _quality(metrics: dict[str, float]) -> float:
    return next(sign * metrics[name] for name, sign in _BEST.items() if name in metrics)


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0].rstrip(".")
    # TensorStore's text begins with the array and ends with the cause.
    text = text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"
    return f"{type(error).__name__}: {text}"

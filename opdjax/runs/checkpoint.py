"""Training states on disk. The only module that uses orbax."""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN


class CheckpointShapeError(ValueError):
    """A stored state does not fit the model or optimizer of the run that resumes from it."""


class UnreadableCheckpointError(ValueError):
    """A stored state is damaged."""


# The scores whose best checkpoint is kept, by the first that a run has; lower divergence is better.
_BEST = {"avg@k": 1, "student/reverse_kl": -1}


class Checkpointer:
    """Saves states asynchronously; keeps the newest `keep` and the one with the best score."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int,
        is_read_only: bool = False,
    ):
        # Orbax logs every step of every save; failures surface as exceptions.
        logging.getLogger("absl").setLevel(logging.ERROR)
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
        self._manager = ocp.CheckpointManager(
            epath.Path(directory), options=options, item_handlers=ocp.StandardCheckpointHandler()
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
        """Step of the evaluated checkpoint with the best score; None if none was evaluated."""
        scored = {step: self._manager.metrics(step) for step in self.steps}
        scored = {step: _quality(metrics) for step, metrics in scored.items() if metrics}
        return max(scored, key=scored.get) if scored else None

    def save(self, step: int, state: Any, evaluation: dict[str, float] | None = None) -> None:
        """Start to write `state`, which may be donated as soon as this returns."""
        if jax.default_backend() == "cpu":
            # On CPU the writer's host copy would be a view of the buffers that are donated next.
            state = jax.tree.map(jnp.copy, state)
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=evaluation)

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the shapes and shardings of `like`; CheckpointShapeError if it
        belongs to another model or optimizer, UnreadableCheckpointError if it is damaged.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check_params(step, target.params)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except ValueError as error:
            raise CheckpointShapeError(
                f"checkpoint {step} is damaged, or from a run with another optimizer: "
                f"{_first_line(error)}; {self._advice(step)}"
            ) from error

    def _check_params(self, step: int, wanted: Any) -> None:
        """CheckpointShapeError that lists every mismatched parameter; orbax itself names none."""
        try:
            stored = flatten_dict(self._manager.item_metadata(step).tree["params"], sep=".")
        except (ValueError, OSError, KeyError, AttributeError) as error:
            raise UnreadableCheckpointError(
                f"checkpoint {step} is damaged: {_first_line(error)}; {self._advice(step)}"
            ) from error
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

    def _advice(self, step: int) -> str:
        earlier = [other for other in self.steps if other != step]
        return (
            f"delete {self._manager.directory / str(step)} to use another one (there are "
            f"{earlier}), or start in a new work directory"
        )

    def wait(self) -> None:
        """Wait until all saved states are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish pending writes and close the directory."""
        self._manager.close()


def _quality(metrics: dict[str, float]) -> float:
    return next(sign * metrics[name] for name, sign in _BEST.items() if name in metrics)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" [tensorstore_spec")[0].rstrip(".")

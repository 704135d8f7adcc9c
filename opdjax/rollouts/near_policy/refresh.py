"""The refresh source, NPD's schedule (arXiv 2605.05940): all prompts of an epoch are answered at
once, and the epochs until the next refresh train on these answers.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from opdjax.config import Config
from opdjax.config.validation import ConfigError
from opdjax.data.packing import first_fit_decreasing, packed_lengths
from opdjax.data.prompts import PromptSet
from opdjax.models.decoder import Params
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import num_row_shards
from opdjax.rollouts.near_policy import stages
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.near_policy.stages import as_batch, step_batch
from opdjax.rollouts.near_policy.store import RolloutStore
from opdjax.rollouts.rows import packed
from opdjax.rollouts.setup import Setup
from opdjax.rollouts.source import RolloutSource, StepData
from opdjax.rollouts.weights import initial_weights
from opdjax.runs.metrics import Timer
from opdjax.types import Metrics, TrainBatch

_NUM_PROBED = 64  # unfiltered rollouts on which the KL from the sampling policy is measured


@dataclasses.dataclass(frozen=True)
class StoredEpoch:
    """The stored rollouts of one version, distributed over the steps of an epoch."""

    version: int
    samples: list[Shard]
    annotations: list[Shard]
    kept: np.ndarray  # indices into all samples
    rows: np.ndarray  # the packed row of each kept sample
    length: int  # tokens per row
    capacity: int  # rows per step
    metrics: Metrics  # of the first step that trains on them


class RefreshSource(RolloutSource):
    """Answers all prompts at epoch 0 and at `refresh_epochs`; epochs train on each answer once."""

    def __init__(
        self, setup: Setup, workdir: pathlib.Path, is_stop_requested: Callable[[int], bool]
    ):
        self._setup, self._store = setup, RolloutStore(setup, workdir, is_stop_requested)
        self._epoch: StoredEpoch | None = None
        self._prefetched: StepData | None = None
        self._store.blocks(0)  # refuses too few prompts before anything is computed

    def publish(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        config, store = self._setup.config, self._store
        if version not in config.refresh_steps:
            return
        self._epoch = None  # frees the rollouts of the epochs before
        if config.near_policy.generator == "inline":
            self._open_epoch(version, copy_weights, timer)
            return
        with timer.phase("publish"):
            store.publish(version, copy_weights())
        with timer.phase("wait"):
            store.wait_for(version)

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        if self._epoch is None:
            version = version_of(self._setup.config, step)
            # Only the untrained weights can always be had again.
            weights = (lambda: initial_weights(self._setup)) if version == 0 else None
            self._open_epoch(version, weights, timer)
        with timer.phase("pack"):
            data, self._prefetched = self._prefetched or self._load(step), None
        return data

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        config = self._setup.config
        if step < config.train.num_steps and step not in config.refresh_steps:
            self._prefetched = self._load(step)

    def probe(self, step: int) -> TrainBatch:
        """See `RolloutSource`: random samples, as many as fit into the rows of a step."""
        setup, epoch = self._setup, self._epoch
        order = _random(setup.config.seed, epoch.version, -1)
        chosen = order.permutation(sum(map(len, epoch.samples)))[:_NUM_PROBED]
        while True:
            _, batch = as_batch(setup, epoch.samples, (), chosen)
            rows = first_fit_decreasing(packed_lengths(batch), epoch.length)
            if rows.max() < epoch.capacity:
                return self._packed(batch, rows)[0]
            chosen = chosen[: len(chosen) // 2]

    def _open_epoch(self, version: int, weights: Callable[[], Params] | None, timer: Timer) -> None:
        """Read the rollouts of a version; lost ones are made if there are weights for them."""
        with timer.phase("sample"):
            samples = self._store.samples(version, version, weights)
        with timer.phase("annotate"):
            annotations = self._store.annotations(samples, version)
        with timer.phase("pack"):
            self._epoch = _distributed(self._setup, version, samples, annotations)

    def _load(self, step: int) -> StepData:
        """The rows of this step of its epoch; every epoch has an order of its own."""
        setup, config = self._setup, self._setup.config
        stored, steps = self._epoch, config.steps_per_epoch
        epoch, place = divmod(step, steps)
        num_rows = int(stored.rows.max()) + 1
        order = _random(config.seed, stored.version, epoch).permutation(num_rows)
        own = order[place * num_rows // steps : (place + 1) * num_rows // steps]
        is_own = np.isin(stored.rows, own)
        rollouts, batch, metrics = step_batch(
            setup, step, stored.samples, stored.annotations, stored.kept[is_own]
        )
        rank = np.zeros(num_rows, np.int32)
        rank[own] = np.arange(len(own))
        rows, packing = self._packed(batch, rank[stored.rows[is_own]])
        # Tokens that were generated and annotated for many steps count for the first of them.
        tokens = dict.fromkeys(("perf/generated_tokens", "perf/annotated_tokens"), 0.0)
        metrics |= packing | (stored.metrics if step == stored.version else tokens)
        return StepData(rollouts, batch, rows, metrics)

    def _packed(self, batch: TrainBatch, rows: np.ndarray) -> tuple[TrainBatch, Metrics]:
        setup, epoch = self._setup, self._epoch
        layout = {"rows": rows, "num_rows": epoch.capacity}
        return packed(batch, setup.config.train, setup.mesh, epoch.length, **layout)


def version_of(config: Config, step: int) -> int:
    """The version of the weights that sampled the rollouts of a step."""
    return max(version for version in config.refresh_steps if version <= step)


def _distributed(
    setup: Setup, version: int, samples: list[Shard], annotations: list[Shard]
) -> StoredEpoch:
    """Filter the samples and pack them into rows for the steps of an epoch."""
    config, steps, total = setup.config, setup.config.steps_per_epoch, sum(map(len, samples))
    is_kept, metrics = stages.select(setup, samples, annotations, 0)
    kept = np.flatnonzero(is_kept)
    if len(kept) < steps:
        raise ConfigError(
            f"near_policy.filter {config.near_policy.filter} keeps {len(kept)} of {total} rollouts "
            f"of version {version}, fewer than an epoch has steps, {steps} (opdjax rollouts "
            f"{samples[0].path.parent}); start in a new work directory with wider "
            "near_policy.ifd_min and ifd_max (opdjax export gives the student of the last "
            "checkpoint)"
        )
    lengths = _lengths(setup.prompts, samples)
    # The longest sample counts even if the filter left it out: a probe reads it.
    length = config.train.pack_length or int(lengths.max())
    lengths = lengths[kept]
    rows = one_each = np.arange(len(kept), dtype=np.int32)
    if config.train.pack_length:
        # Rows are filled less if an epoch would otherwise have fewer rows than steps.
        for room in (length, max(int(lengths.sum()) // steps, int(lengths.max()))):
            rows = first_fit_decreasing(lengths, room)
            if rows.max() + 1 >= steps:
                break
        else:
            rows = one_each
    num_rows = int(rows.max()) + 1
    unit = config.train.gradient_accumulation_steps * num_row_shards(setup.mesh)
    capacity = -(-num_rows // steps // unit) * unit
    filled = f"{lengths.sum() / (num_rows * length):.1%}"
    line = f"rollouts of version {version}: {total} sampled, {len(kept)} kept, in {num_rows} rows "
    on_process_zero(lambda: print(f"{line}of {length} tokens, {filled} filled"))
    return StoredEpoch(version, samples, annotations, kept, rows, length, capacity, metrics)


def _lengths(prompts: PromptSet, samples: list[Shard]) -> np.ndarray:
    """Tokens of each sample in a row, with the longer of the two models' prompts."""
    views = [ids for ids in (prompts.student_ids, prompts.teacher_ids) if ids is not None]
    longest = lambda prompt: max(len(ids[prompt]) for ids in views)
    columns = [zip(shard.columns["prompt_id"], shard.columns["tokens"]) for shard in samples]
    return np.array([longest(prompt) + len(row) for pairs in columns for prompt, row in pairs])


def _random(seed: int, version: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, version, epoch + 1]))

"""The refresh source, NPD's schedule (arXiv 2605.05940): all prompts of an epoch are answered at
once, and the epochs until the next refresh train on these answers.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from opdjax.config import Config
from opdjax.config.validation import ConfigError
from opdjax.data.packing import first_fit_decreasing, pack, packed_lengths, packing_metrics
from opdjax.data.prompts import PromptSet, collate, indices_at
from opdjax.models.decoder import Params
from opdjax.ops.multihost import InterruptedRunError, on_process_zero
from opdjax.ops.sharding import num_row_shards
from opdjax.rollouts.near_policy import published_weights, shards, stages
from opdjax.rollouts.near_policy.batches import (
    as_batch,
    filter_metrics,
    step_batch,
    stored_token_counts,
)
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.near_policy.store import RolloutStore
from opdjax.rollouts.setup import Setup, initial_weights
from opdjax.rollouts.source import RolloutSource, StepData
from opdjax.runs.metrics import Timer
from opdjax.types import Metrics, TrainBatch

# Rollouts in a stored file, which are sampled and annotated together: an interrupted refresh
# repeats at most these.
SHARD_SIZE = 1024
_NUM_PROBED = 64  # unfiltered rollouts on which the KL from the sampling policy is measured
_POLL_SECONDS = 0.2  # between looks at files that another process writes


@dataclasses.dataclass(frozen=True)
class StoredEpoch:
    """The stored rollouts of one version, and how they are distributed over the steps of an
    epoch.
    """

    version: int
    samples: list[Shard]
    annotations: list[Shard]
    kept: np.ndarray  # indices into all samples
    rows: np.ndarray  # the packed row of each kept sample
    length: int  # tokens per row
    capacity: int  # rows per step
    metrics: Metrics  # of the first step that trains on them


class RefreshSource(RolloutSource):
    """Answers all prompts of an epoch before the first epoch and before those of `refresh_epochs`;
    an epoch trains on each answer once.
    """

    def __init__(
        self, setup: Setup, workdir: pathlib.Path, is_stop_requested: Callable[[int], bool]
    ):
        self._setup, self._workdir = setup, workdir
        self._store = RolloutStore(setup, workdir)
        self._is_stop_requested = is_stop_requested
        self._shards: tuple[list[Shard], list[Shard]] | None = None  # read, not yet distributed
        self._epoch: StoredEpoch | None = None
        self._prefetched: StepData | None = None
        require_prompts(setup.config, len(setup.prompts))

    def publish(self, version: int, copy_weights: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        config = self._setup.config
        if version not in config.refresh_steps:
            return
        self._epoch = None
        if config.near_policy.generator == "process":
            with timer.phase("publish"):
                published_weights.publish(self._workdir, version, copy_weights(), keep_from=0)
            with timer.phase("wait"):
                while not is_complete(self._store, version):
                    self._check_stop(version)
                    time.sleep(_POLL_SECONDS)
            return
        check_stop = lambda: self._check_stop(version)
        with timer.phase("sample"):
            samples = stored_samples(self._store, version, copy_weights, check_stop)
        with timer.phase("annotate"):
            annotations = stored_annotations(self._store, version, samples, check_stop)
        self._shards = samples, annotations

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        with timer.phase("pack"):
            data, self._prefetched = self._prefetched or self._load(step), None
        return data

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        config = self._setup.config
        if step < config.train.num_steps and version_of(config, step) == self._epoch.version:
            self._prefetched = self._load(step)

    def probe(self, step: int) -> TrainBatch:
        """See `RolloutSource`: random samples, as many as fit into the rows of a step."""
        setup, epoch = self._setup, self._epoch
        order = _random(setup.config.seed, epoch.version, -1)
        chosen = order.permutation(sum(map(len, epoch.samples)))[:_NUM_PROBED]
        length = setup.config.sampling.max_completion_length
        while True:
            _, batch = as_batch(setup.prompts, length, epoch.samples, (), chosen)
            rows = first_fit_decreasing(packed_lengths(batch), epoch.length)
            if rows.max() < epoch.capacity:
                return self._packed(batch, rows)[0]
            chosen = chosen[: len(chosen) // 2]

    def _load(self, step: int) -> StepData:
        """The rows of this step of its epoch; every epoch has an order of its own."""
        setup, config = self._setup, self._setup.config
        version = version_of(config, step)
        if self._epoch is None or self._epoch.version != version:
            self._epoch = self._open_epoch(version)
        stored, steps = self._epoch, config.steps_per_epoch
        epoch, place = divmod(step, steps)
        num_rows = int(stored.rows.max()) + 1
        order = _random(config.seed, version, epoch).permutation(num_rows)
        own = order[place * num_rows // steps : (place + 1) * num_rows // steps]
        is_own = np.isin(stored.rows, own)
        rollouts, batch, metrics = step_batch(
            setup, step, stored.samples, stored.annotations, stored.kept[is_own]
        )
        rank = np.zeros(num_rows, np.int32)
        rank[own] = np.arange(len(own))
        rows, packing = self._packed(batch, rank[stored.rows[is_own]])
        # Tokens that were generated and annotated for many steps count for the first of them.
        metrics |= packing | (stored.metrics if step == version else stored_token_counts([], []))
        return StepData(rollouts, batch, rows, metrics)

    def _packed(self, batch: TrainBatch, rows: np.ndarray) -> tuple[TrainBatch, Metrics]:
        packed, origins = pack(
            batch,
            self._epoch.length,
            parts=self._setup.config.train.gradient_accumulation_steps,
            shards=num_row_shards(self._setup.mesh),
            rows=rows,
            num_rows=self._epoch.capacity,
        )
        return packed, packing_metrics(origins)

    def _open_epoch(self, version: int) -> StoredEpoch:
        """The stored rollouts of a version, filtered and distributed over the steps; ShardError if
        a shard is missing or damaged and cannot be made again.
        """
        if self._shards is None:
            # Only the untrained weights can always be had again.
            weights = (lambda: initial_weights(self._setup)) if version == 0 else None
            samples = stored_samples(self._store, version, weights)
            self._shards = samples, stored_annotations(self._store, version, samples)
        (samples, annotations), self._shards = self._shards, None
        return _distributed(self._store, version, samples, annotations)

    def _check_stop(self, version: int) -> None:
        if jax.process_count() == 1 and self._is_stop_requested(version):
            raise InterruptedRunError(
                f"stopped while rollouts of version {version} were sampled; the same command "
                f"continues {self._workdir}"
            )


def version_of(config: Config, step: int) -> int:
    """The version of the weights that sampled the rollouts of a step."""
    return max(version for version in config.refresh_steps if version <= step)


def require_prompts(config: Config, count: int) -> None:
    """ConfigError if an epoch would use a prompt twice, and so train on the same answer twice."""
    wanted = config.steps_per_epoch * config.train.prompts_per_step
    if wanted > count:
        raise ConfigError(
            f"an epoch takes {wanted} prompts (train.num_steps / near_policy.num_epochs x "
            f"train.prompts_per_step), but {config.data.source} has {count}; expected at most "
            f"{count}: raise near_policy.num_epochs or lower train.prompts_per_step"
        )


def stored_samples(
    store: RolloutStore,
    version: int,
    weights: Callable[[], Params] | None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[Shard]:
    """The shards with the answers to every prompt of an epoch, each read once.

    Missing and damaged shards are sampled with `weights`, called at most once; ShardError without
    them. `check_stop` may raise before a shard is sampled.
    """
    prompts = store.setup.prompts
    blocks = enumerate(_blocks(store.setup.config, len(prompts)))
    if weights is None:
        return [store.read(version, "samples", number) for number, _ in blocks]
    weights = functools.cache(weights)

    def params() -> Params:
        check_stop()
        return weights()

    return [
        store.samples(collate(prompts, block), params, number=number, step=version, version=version)
        for number, block in blocks
    ]


def stored_annotations(
    store: RolloutStore,
    version: int,
    samples: list[Shard],
    check_stop: Callable[[], None] = lambda: None,
) -> list[Shard]:
    """The annotations of these shards; missing and damaged ones are made first. [] if the recipe
    stores none.
    """
    found = []
    for shard in samples if stages.is_annotated(store.setup.config) else ():
        check_stop()
        found.append(store.annotations(shard, version))
    return found


def is_complete(store: RolloutStore, version: int) -> bool:
    """Whether all shards that the learner reads of a version exist; damage is not checked."""
    config, directory = store.setup.config, store.directory(version)
    wanted = set(range(len(_blocks(config, len(store.setup.prompts)))))
    names = ("samples", "annotations") if stages.is_annotated(config) else ("samples",)
    return all(wanted <= shards.shard_paths(directory, name).keys() for name in names)


def _distributed(
    store: RolloutStore, version: int, samples: list[Shard], annotations: list[Shard]
) -> StoredEpoch:
    """Filter the samples and pack them into rows for the steps of an epoch."""
    setup, config, directory = store.setup, store.setup.config, store.directory(version)
    steps, total = config.steps_per_epoch, sum(map(len, samples))
    kept, metrics = np.arange(total), stored_token_counts(samples, annotations)
    if config.near_policy.filter != "none":
        document = stages.select(setup, samples, annotations, directory, 0)
        kept, metrics = np.flatnonzero(document["kept"]), metrics | filter_metrics(document)
    if len(kept) < steps:
        raise ConfigError(
            f"near_policy.filter {config.near_policy.filter} keeps {len(kept)} of {total} rollouts "
            f"of version {version}, fewer than an epoch has steps, {steps} (opdjax rollouts "
            f"{directory}); start in a new work directory with wider near_policy.ifd_min and "
            "ifd_max (opdjax export gives the student of the last checkpoint)"
        )
    lengths = _lengths(setup.prompts, samples)
    # The longest sample counts even if the filter left it out: a probe reads it.
    length = config.train.pack_length or int(lengths.max())
    lengths = lengths[kept]
    rows = np.arange(len(kept), dtype=np.int32)
    if config.train.pack_length:
        rows = _packed_rows(lengths, length, steps)
    num_rows = int(rows.max()) + 1
    unit = config.train.gradient_accumulation_steps * num_row_shards(setup.mesh)
    capacity = -(-num_rows // steps // unit) * unit
    filled = f"{lengths.sum() / (num_rows * length):.1%}"
    line = f"rollouts of version {version}: {total} sampled, {len(kept)} kept, in {num_rows} rows "
    on_process_zero(lambda: print(f"{line}of {length} tokens, {filled} filled"))
    return StoredEpoch(version, samples, annotations, kept, rows, length, capacity, metrics)


def _packed_rows(lengths: np.ndarray, length: int, steps: int) -> np.ndarray:
    """The packed row of each rollout; rows are filled less if an epoch would otherwise have fewer
    rows than steps.
    """
    rows = first_fit_decreasing(lengths, length)
    if rows.max() + 1 < steps:
        rows = first_fit_decreasing(lengths, max(int(lengths.sum()) // steps, int(lengths.max())))
    return rows if rows.max() + 1 >= steps else np.arange(len(lengths), dtype=np.int32)


def _blocks(config: Config, num_prompts: int) -> list[np.ndarray]:
    """The prompts of an epoch by shard: whole prompts, about SHARD_SIZE rollouts each."""
    count = config.steps_per_epoch * config.train.prompts_per_step
    indices = indices_at(0, count, num_prompts, config.seed)
    size = max(SHARD_SIZE // config.sampling.num_generations, 1)
    return [indices[start : start + size] for start in range(0, count, size)]


def _lengths(prompts: PromptSet, samples: list[Shard]) -> np.ndarray:
    """Tokens of each sample in a row, with the longer of the two models' prompts."""
    views = [ids for ids in (prompts.student_ids, prompts.teacher_ids) if ids is not None]
    longest = lambda prompt: max(len(ids[prompt]) for ids in views)
    columns = [zip(shard.columns["prompt_id"], shard.columns["tokens"]) for shard in samples]
    return np.array([longest(prompt) + len(row) for pairs in columns for prompt, row in pairs])


def _random(seed: int, version: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, version, epoch + 1]))

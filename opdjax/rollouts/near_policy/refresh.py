"""The schedule of NPD (arXiv 2605.05940): all prompts of an epoch are answered at once, and epochs
share the answers.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from opdjax.config import Config
from opdjax.config.validation import ConfigError
from opdjax.data.packing import first_fit_decreasing, pack, packed_lengths, packing_metrics
from opdjax.data.prompts import collate, indices_at
from opdjax.models.decoder import Params
from opdjax.ops.multihost import InterruptedRunError, on_process_zero
from opdjax.ops.sharding import num_row_shards
from opdjax.rollouts.near_policy import published_weights, shards, stages
from opdjax.rollouts.near_policy.batches import as_batch, drawn_tokens, filter_metrics
from opdjax.rollouts.near_policy.generator import Timeline, read, readable
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.on_policy import with_credit
from opdjax.rollouts.setup import Setup, initial_weights
from opdjax.rollouts.source import StepData
from opdjax.runs.metrics import Timer
from opdjax.types import Rollouts, TrainBatch

# rollouts on which the distance from the policy that drew is measured, whatever the filter kept
_PROBED = 64
_SECONDS_BETWEEN_LOOKS = 0.2  # at what another process draws


@dataclasses.dataclass(frozen=True)
class StoredEpoch:
    """What lies in the work directory of one version, and how it is dealt over the steps of an
    epoch.
    """

    version: int
    samples: list[Shard]
    annotations: list[Shard]
    kept: np.ndarray  # places among all samples
    rows: np.ndarray  # the row that each of them stands in
    length: int  # tokens of a row
    capacity: int  # rows of a step
    told: dict[str, float]  # once, of the step that is trained on them first


class RefreshSource:
    """All prompts of an epoch are answered before the first epoch and before those of
    `refresh_epochs`; an epoch trains on each once.
    """

    params = None

    def __init__(self, setup: Setup, workdir: pathlib.Path, is_stop_asked: Callable[[int], bool]):
        self._setup, self._workdir, self._timeline, self._is_stop_asked = (
            setup,
            workdir,
            Timeline(workdir),
            is_stop_asked,
        )
        self._stored: StoredEpoch | None = None
        self._ahead: StepData | None = None
        require_prompts(setup.config, len(setup.prompts))

    def publish(self, version: int, weights_of: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        if version not in self._setup.config.refresh_steps:
            return
        self._stored = None
        if self._setup.config.near_policy.generator == "process":
            with timer.phase("publish"):
                published_weights.publish(self._workdir, version, weights_of(), keep_from=0)
            with timer.phase("wait"):
                self._wait_for(version)
            return
        go_on = lambda: self._require_going(version)
        with timer.phase("sample"):
            generate_missing(self._setup, self._workdir, self._timeline, version, weights_of, go_on)
        with timer.phase("annotate"):
            annotate_missing(self._setup, self._workdir, self._timeline, version, go_on)

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        with timer.phase("pack"):
            drawn, self._ahead = self._ahead or self._load(step), None
        return drawn

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        if (
            step < self._setup.config.train.num_steps
            and version_of(self._setup.config, step) == self._stored.version
        ):
            self._ahead = self._load(step)

    def commit(self, version: int, timer: Timer) -> None:
        """See `RolloutSource`: what was drawn is stored."""

    def probe(self, step: int) -> TrainBatch:
        """See `RolloutSource`: random ones, as many as the rows of a step have room for."""
        stored, seed = self._stored, self._setup.config.seed
        chosen = _random(seed, stored.version, -1).permutation(sum(map(len, stored.samples)))[
            :_PROBED
        ]
        while True:
            _, batch = as_batch(self._setup, stored.samples, (), chosen)
            rows = first_fit_decreasing(packed_lengths(batch), stored.length)
            if rows.max() < stored.capacity:
                return self._packed(batch, rows)[0]
            chosen = chosen[: len(chosen) // 2]

    def _load(self, step: int) -> StepData:
        """The rows that this step of its epoch is dealt, in an order of the epoch's own."""
        setup, config = self._setup, self._setup.config
        version = version_of(config, step)
        if self._stored is None or self._stored.version != version:
            self._stored = open_version(setup, self._workdir, self._timeline, version)
        stored = self._stored
        epoch, place = divmod(step, config.steps_per_epoch)
        num_rows = int(stored.rows.max()) + 1
        order = _random(config.seed, version, epoch).permutation(num_rows)
        mine = order[
            place * num_rows // config.steps_per_epoch : (place + 1)
            * num_rows
            // config.steps_per_epoch
        ]
        is_mine = np.isin(stored.rows, mine)
        rollouts, batch = as_batch(setup, stored.samples, stored.annotations, stored.kept[is_mine])
        batch, told = with_credit(setup, batch, _named(rollouts, step))
        rank = np.zeros(num_rows, np.int32)
        rank[mine] = np.arange(len(mine))
        rows, filled = self._packed(batch, rank[stored.rows[is_mine]])
        # What was drawn and read for many steps is told of the first of them.
        told |= filled | (
            stored.told if step == version else dict.fromkeys(drawn_tokens([], []), 0.0)
        )
        return StepData(
            collate(setup.prompts, np.asarray(rollouts.prompt_id)), rollouts, batch, rows, told
        )

    def _packed(self, batch: TrainBatch, rows: np.ndarray) -> tuple[TrainBatch, dict[str, float]]:
        train, shards, stored = (
            self._setup.config.train,
            num_row_shards(self._setup.mesh),
            self._stored,
        )
        packed, source = pack(
            batch,
            stored.length,
            parts=train.gradient_accumulation_steps,
            shards=shards,
            rows=rows,
            num_rows=stored.capacity,
        )
        return packed, packing_metrics(source)

    def _wait_for(self, version: int) -> None:
        while not is_complete(self._setup, self._workdir, version):
            self._require_going(version)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _require_going(self, version: int) -> None:
        if jax.process_count() == 1 and self._is_stop_asked(version):
            raise InterruptedRunError(
                f"stopped while rollouts of version {version} were drawn; the same command continues {self._workdir}"
            )


def version_of(config: Config, step: int) -> int:
    """The version of the weights that drew what a step is trained on."""
    return max(version for version in config.refresh_steps if version <= step)


def require_prompts(config: Config, count: int) -> None:
    """ConfigError where an epoch would take a prompt twice, and so train on the same answer twice."""
    wanted = config.steps_per_epoch * config.train.prompts_per_step
    if wanted > count:
        raise ConfigError(
            f"an epoch takes {wanted} prompts (train.num_steps / near_policy.num_epochs x train.prompts_per_step), but "
            f"{config.data.source} has {count}; expected at most so many: raise near_policy.num_epochs or lower train.prompts_per_step"
        )


def generate_missing(
    setup: Setup,
    workdir: pathlib.Path,
    timeline: Timeline,
    version: int,
    weights_of: Callable[[], Params],
    go_on: Callable[[], None],
) -> None:
    """Answer every prompt of an epoch, as far as the answers are not stored already; `go_on` may
    raise between shards.
    """
    directory, blocks = (
        shards.version_directory(workdir, version),
        _blocks(setup.config, len(setup.prompts)),
    )
    missing = [
        number for number in range(len(blocks)) if readable(directory, "samples", number) is None
    ]
    if missing:
        params = weights_of()
        for number in missing:
            go_on()
            prompts = collate(setup.prompts, blocks[number])
            with timeline.span("generate", version, version):
                stages.generate(
                    setup, params, prompts, directory, number=number, step=version, version=version
                )


def annotate_missing(
    setup: Setup, workdir: pathlib.Path, timeline: Timeline, version: int, go_on: Callable[[], None]
) -> int:
    """Have the teacher read the stored samples of a version that it has not read, or not whole; how
    many shards those were.
    """
    directory, count = shards.version_directory(workdir, version), 0
    for number in (
        shards.shard_paths(directory, "samples") if stages.is_annotated(setup.config) else ()
    ):
        if readable(directory, "annotations", number) is None:
            go_on()
            with timeline.span("annotate", version, version):
                stages.annotate(setup, read(directory, "samples", number), directory)
            count += 1
    return count


def is_complete(setup: Setup, workdir: pathlib.Path, version: int) -> bool:
    """Whether all that the learner reads of a version is there, damaged or not."""
    directory, wanted = (
        shards.version_directory(workdir, version),
        range(len(_blocks(setup.config, len(setup.prompts)))),
    )
    names = ("samples", "annotations") if stages.is_annotated(setup.config) else ("samples",)
    return all(set(wanted) <= shards.shard_paths(directory, name).keys() for name in names)


def open_version(
    setup: Setup, workdir: pathlib.Path, timeline: Timeline, version: int
) -> StoredEpoch:
    """What is stored of a version, filtered and dealt; ShardError where a shard is missing or
    damaged and cannot be made again.
    """
    config, directory = setup.config, shards.version_directory(workdir, version)
    numbers = range(len(_blocks(config, len(setup.prompts))))
    if version == 0:  # its weights can always be had again
        generate_missing(
            setup, workdir, timeline, version, lambda: initial_weights(setup), lambda: None
        )
    samples = [read(directory, "samples", number) for number in numbers]
    annotate_missing(setup, workdir, timeline, version, lambda: None)
    annotations = (
        [read(directory, "annotations", number) for number in numbers]
        if stages.is_annotated(config)
        else []
    )
    kept, told = np.arange(sum(map(len, samples))), drawn_tokens(samples, annotations)
    if config.near_policy.filter != "none":
        document = stages.select(setup, samples, annotations, directory, 0)
        kept, told = np.flatnonzero(document["kept"]), told | filter_metrics(document)
    steps = config.steps_per_epoch
    if len(kept) < steps:
        raise ConfigError(
            f"near_policy.filter {config.near_policy.filter} keeps {len(kept)} of {len(document['kept'])} rollouts of version {version}, "
            f"fewer than an epoch has steps, {steps} (opdjax rollouts {directory}); start in a new work directory with wider "
            "near_policy.ifd_min and ifd_max (opdjax export gives the student of the last checkpoint)"
        )
    lengths = _lengths(setup, samples)
    length = config.train.pack_length or int(
        lengths.max()
    )  # of what was left out too: a probe reads it
    lengths = lengths[kept]
    rows = (
        _rows(lengths, length, steps)
        if config.train.pack_length
        else np.arange(len(kept), dtype=np.int32)
    )
    num_rows = int(rows.max()) + 1
    unit = config.train.gradient_accumulation_steps * num_row_shards(setup.mesh)
    capacity = -(-num_rows // steps // unit) * unit
    filled = (
        f"in {num_rows} rows of {length} tokens, {lengths.sum() / (num_rows * length):.1%} filled"
    )
    on_process_zero(
        lambda: print(
            f"rollouts of version {version}: {sum(map(len, samples))} drawn, {len(kept)} kept, {filled}"
        )
    )
    return StoredEpoch(version, samples, annotations, kept, rows, length, capacity, told)


def _rows(lengths: np.ndarray, length: int, steps: int) -> np.ndarray:
    """The row of each rollout, packed; less full where an epoch would otherwise have fewer rows
    than steps.
    """
    rows = first_fit_decreasing(lengths, length)
    if rows.max() + 1 < steps:
        rows = first_fit_decreasing(lengths, max(int(lengths.sum()) // steps, int(lengths.max())))
    return rows if rows.max() + 1 >= steps else np.arange(len(lengths), dtype=np.int32)


def _blocks(config: Config, num_prompts: int) -> list[np.ndarray]:
    """The prompts of an epoch, in the shards that they are stored in: whole prompts, about
    `shard_size` rollouts.
    """
    count = config.steps_per_epoch * config.train.prompts_per_step
    indices = indices_at(0, count, num_prompts, config.seed)
    size = max(config.near_policy.shard_size // config.sampling.num_generations, 1)
    return [indices[start : start + size] for start in range(0, count, size)]


def _lengths(setup: Setup, samples: list[Shard]) -> np.ndarray:
    """Tokens that each sample takes in a row, behind the longer of the two models' prompts."""
    views = [
        ids for ids in (setup.prompts.student_ids, setup.prompts.teacher_ids) if ids is not None
    ]
    pairs = (
        (prompt, row)
        for shard in samples
        for prompt, row in zip(shard.columns["prompt_id"], shard.columns["tokens"])
    )
    return np.array([max(len(ids[prompt]) for ids in views) + len(row) for prompt, row in pairs])


def _named(rollouts: Rollouts, step: int) -> Rollouts:
    """Numbers drawn for a step are named after it: another epoch's are others."""
    return dataclasses.replace(
        rollouts, policy_version=np.full(len(rollouts.tokens), step, np.int32)
    )


def _random(seed: int, version: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, version, epoch + 1]))

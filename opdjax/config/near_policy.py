"""Rollouts that are drawn ahead of their update, and which of them are kept. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class NearPolicyConfig:
    """Where rollouts come from if they are not drawn anew for every update (NPD, arXiv 2605.05940)."""

    # none: every step's rollouts are drawn from the student as it is, nothing is stored.
    # refresh: all prompts of an epoch are answered at once, by the student as it is before the
    # first epoch and after those of refresh_epochs; every epoch in between trains on what was kept
    # of them. continuous: a step's rollouts are drawn once, up to max_staleness updates before it.
    schedule: Literal["none", "refresh", "continuous"] = "none"
    num_epochs: int = (
        1  # refresh: train.num_steps divides into so many passes over the same prompts
    )
    refresh_epochs: tuple[
        int, ...
    ] = ()  # refresh: epochs, counted from 0, before which rollouts are drawn anew
    # continuous: the most updates that a rollout's policy is older than the one trained on it.
    # Enforced before a row is drawn: no row that was drawn is thrown away for its age, since that
    # would discard the slow ones. 0: on-policy
    max_staleness: int = 0
    # continuous: fixed draws the rollouts of step s with the weights before step s - max_staleness,
    # so that a run is a function of its config; free with the newest there are
    lag: Literal["fixed", "free"] = "fixed"
    # Who draws: inline, this process between updates, on the same devices; thread, beside the
    # updates on devices of its own; process, another process on this or another machine (opdjax
    # sample --store WORKDIR), through files of the work directory. A thread holds two versions of
    # the weights: under a fixed lag the learner waits when it is two versions ahead of what is
    # being drawn, however much is stored; under a free one it never waits with stored rollouts at
    # hand
    generator: Literal["inline", "thread", "process"] = "inline"
    generator_devices: int = (
        1  # thread: the last so many devices of this process draw, mesh.* splits the others
    )
    # Samples kept: all; ifd, those with ifd_min <= IFD_teacher - IFD_student <= ifd_max; random, as
    # many as ifd would keep, whichever
    filter: Literal["none", "ifd", "random"] = "none"
    # IFD: how much a prompt helps a model to foresee an answer. nll_ratio: mean nats of a token
    # with the prompt over those without; perplexity_ratio: the same of perplexities
    ifd_form: Literal["nll_ratio", "perplexity_ratio"] = "nll_ratio"
    ifd_min: float | None = (
        0.0  # below: the student is less sure of its own answer than the teacher; None: no bound
    )
    ifd_max: float | None = (
        0.8  # above: the teacher finds it far less likely than the student; None: no bound
    )
    ifd_quantile: float | None = (
        # in place of ifd_max: this quantile of what is not below ifd_min, of the rollouts drawn
        # together
        None
    )
    shard_size: int = 1024  # refresh: rollouts drawn, annotated and stored at a time

    def __post_init__(self):
        require_types(self, "near_policy.")
        require(self.num_epochs > 0, "near_policy.num_epochs", self.num_epochs, "at least 1")
        require(
            self.max_staleness >= 0,
            "near_policy.max_staleness",
            self.max_staleness,
            "0 (on-policy) or more",
        )
        require(
            self.generator_devices > 0,
            "near_policy.generator_devices",
            self.generator_devices,
            "at least 1",
        )
        require(self.shard_size > 0, "near_policy.shard_size", self.shard_size, "at least 1")
        low, high, quantile = self.ifd_min, self.ifd_max, self.ifd_quantile
        require(
            low is None or high is None or low < high,
            "near_policy.ifd_max",
            high,
            f"more than near_policy.ifd_min, {low}",
        )
        require(
            quantile is None or 0 < quantile <= 1,
            "near_policy.ifd_quantile",
            quantile,
            "more than 0 and at most 1",
        )
        expected = "its default where near_policy.ifd_quantile is given: one upper bound"
        require(
            quantile is None or high == NearPolicyConfig.ifd_max,
            "near_policy.ifd_max",
            high,
            expected,
        )
        epochs = self.refresh_epochs
        is_ordered = list(epochs) == sorted(set(epochs)) and all(
            0 < epoch < self.num_epochs for epoch in epochs
        )
        expected = f"rising, each at least 1 and less than near_policy.num_epochs, {self.num_epochs}: epoch 0 has them anyway"
        require(is_ordered, "near_policy.refresh_epochs", epochs, expected)
        self._check_owners()

    def _check_owners(self):
        """A field that nothing reads under this schedule is refused."""
        owners = {"num_epochs": "refresh", "refresh_epochs": "refresh", "shard_size": "refresh"}
        owners |= {"max_staleness": "continuous", "lag": "continuous"}
        for name, schedule in owners.items():
            self._default_unless(
                name, self.schedule == schedule, f"near_policy.schedule is {schedule}"
            )
        for name in ("generator", "filter"):
            self._default_unless(
                name, self.schedule != "none", "near_policy.schedule is refresh or continuous"
            )
        for name in ("ifd_form", "ifd_min", "ifd_max", "ifd_quantile"):
            self._default_unless(name, self.filter != "none", "near_policy.filter is ifd or random")
        self._default_unless(
            "generator_devices", self.generator == "thread", "near_policy.generator is thread"
        )
        expected = "inline or process where near_policy.schedule is refresh: updates wait for the rollouts in any case"
        require(
            self.generator != "thread" or self.schedule == "continuous",
            "near_policy.generator",
            self.generator,
            expected,
        )
        expected = "fixed where near_policy.generator is inline: who takes turns draws at a time of its own choice"
        require(
            self.generator != "inline" or self.lag == "fixed", "near_policy.lag", self.lag, expected
        )

    def _default_unless(self, name: str, is_read: bool, where: str):
        default, value = type(self).__dataclass_fields__[name].default, getattr(self, name)
        require(
            is_read or value == default, f"near_policy.{name}", value, f"{default} unless {where}"
        )

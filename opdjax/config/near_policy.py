"""Rollouts that are sampled ahead of their update, and which of them are kept. Standard library
only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require, require_default, require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class NearPolicyConfig:
    """Rollouts sampled ahead of their update (NPD, arXiv 2605.05940)."""

    # none: sample every step's rollouts from the current student, and store nothing. refresh:
    # answer all prompts of an epoch at once, before the first epoch and before those of
    # refresh_epochs; the epochs between train on these answers. continuous: sample a step's
    # rollouts once, up to max_staleness updates ahead.
    schedule: Literal["none", "refresh", "continuous"] = "none"
    # refresh: number of passes over the same prompts; divides train.num_steps.
    num_epochs: int = 1
    # refresh: epochs, from 0, before which all prompts are answered again.
    refresh_epochs: tuple[int, ...] = ()
    # continuous: largest age of a rollout's policy, in updates; 0 is on-policy. It is enforced
    # before sampling: no sampled rollout is dropped for its age, since that would drop slow ones.
    max_staleness: int = 0
    # continuous: fixed samples step s with the weights of step s - max_staleness, so that a run is
    # a function of its config; free samples with the newest weights.
    lag: Literal["fixed", "free"] = "fixed"
    # Where rollouts are sampled. inline: in this process between updates, on the same devices.
    # thread: in a thread, on devices of its own. process: in another process on this or another
    # machine (opdjax sample --store WORKDIR), through files in the work directory. A thread holds
    # two versions of the weights: with a fixed lag, a learner that is two versions ahead waits. Its
    # devices are those that mesh.data leaves to it, or the last mesh.tensor if mesh.data is -1.
    generator: Literal["inline", "thread", "process"] = "inline"
    # Samples to keep. none: all; ifd: those with ifd_min <= IFD_teacher - IFD_student <= ifd_max;
    # random: as many as ifd keeps, chosen at random. IFD measures how much the prompt helps a model
    # to predict an answer: its mean NLL per token with the prompt, divided by that without.
    filter: Literal["none", "ifd", "random"] = "none"
    # Lower bound: below it the student is less sure of its own answer than the teacher. None: no
    # bound.
    ifd_min: float | None = 0.0
    # Upper bound: above it the teacher finds the answer far less likely than the student. None: no
    # bound.
    ifd_max: float | None = 0.8
    # Replace ifd_max by this quantile of the samples that are not below ifd_min, over all samples
    # that are filtered together.
    ifd_quantile: float | None = None

    def __post_init__(self):
        require_types(self, "near_policy.")
        ranges = {"num_epochs": "at least 1", "max_staleness": "0 (on-policy) or more"}
        require_ranges(self, "near_policy.", ranges | {"ifd_quantile": "more than 0 and at most 1"})
        low, high = self.ifd_min, self.ifd_max
        is_ordered = low is None or high is None or low < high
        expected = f"more than near_policy.ifd_min, {low}"
        require(is_ordered, "near_policy.ifd_max", high, expected)
        if self.ifd_quantile is not None:
            reason = "where near_policy.ifd_quantile is given: one upper bound"
            require_default(self, "near_policy.", "ifd_max", reason)
        epochs = self.refresh_epochs
        is_ordered = list(epochs) == sorted(set(epochs))
        is_inside = all(0 < epoch < self.num_epochs for epoch in epochs)
        expected = "rising, each at least 1 and less than near_policy.num_epochs, "
        expected += f"{self.num_epochs}: epoch 0 has a refresh anyway"
        require(is_ordered and is_inside, "near_policy.refresh_epochs", epochs, expected)
        self._check_unused()

    def _check_unused(self):
        """Refuse a field that has no effect under this schedule."""
        near, is_ahead = "near_policy.", self.schedule != "none"
        unused = {
            "near_policy.schedule is refresh": (
                self.schedule == "refresh",
                ("num_epochs", "refresh_epochs"),
            ),
            "near_policy.schedule is continuous": (
                self.schedule == "continuous",
                ("max_staleness", "lag"),
            ),
            "near_policy.schedule is refresh or continuous": (is_ahead, ("generator", "filter")),
            "near_policy.filter is ifd or random": (
                self.filter != "none",
                ("ifd_min", "ifd_max", "ifd_quantile"),
            ),
        }
        for condition, (is_met, names) in unused.items():
            for name in names if not is_met else ():
                require_default(self, near, name, f"unless {condition}")
        expected = "inline or process where near_policy.schedule is refresh: updates wait for the "
        expected += "rollouts in any case"
        is_possible = self.generator != "thread" or self.schedule == "continuous"
        require(is_possible, "near_policy.generator", self.generator, expected)
        expected = "fixed where near_policy.generator is inline: the generator chooses when to "
        expected += "sample, so the lag is known"
        is_possible = self.generator != "inline" or self.lag == "fixed"
        require(is_possible, "near_policy.lag", self.lag, expected)

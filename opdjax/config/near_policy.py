"""Rollouts that are sampled ahead of their update, and which of them are kept."""

from typing import Annotated, Literal

from opdjax.config.validation import Section


class NearPolicyConfig(Section):
    """Rollouts sampled ahead of their update (NPD, arXiv 2605.05940)."""

    # none: sample every step's rollouts from the current student, and store nothing. refresh:
    # answer all prompts of an epoch at once, before the first epoch and before those of
    # refresh_epochs; the epochs between train on these answers. continuous: sample a step's
    # rollouts once, up to max_staleness updates ahead.
    schedule: Literal["none", "refresh", "continuous"] = "none"
    # refresh: number of passes over the same prompts; divides train.num_steps.
    num_epochs: Annotated[int, "at least 1"] = 1
    # refresh: epochs, from 0, before which all prompts are answered again.
    refresh_epochs: tuple[int, ...] = ()
    # continuous: largest age of a rollout's policy, in updates; 0 is on-policy. No sampled rollout
    # is dropped for its age.
    max_staleness: Annotated[int, "0 (on-policy) or more"] = 0
    # continuous: fixed samples step s with the weights of step s - max_staleness, so that a run is
    # a function of its config; free samples with the newest weights.
    lag: Literal["fixed", "free"] = "fixed"
    # Where rollouts are sampled. inline: in this process between updates, on the same devices.
    # thread: in a thread, on devices of its own. process: in another process on this or another
    # machine (opdjax sample --store WORKDIR), through files in the work directory. A thread's
    # devices are those that mesh.data leaves to it, or the last mesh.tensor if mesh.data is -1.
    generator: Literal["inline", "thread", "process"] = "inline"
    # Samples to keep. none: all; ifd: those with ifd_min <= IFD_teacher - IFD_student <= ifd_max;
    # random: as many as ifd keeps, chosen at random. IFD measures how much the prompt helps a model
    # to predict an answer: its mean NLL per token with the prompt, divided by that without.
    filter: Literal["none", "ifd", "random"] = "none"
    # Below it the student is less sure of its own answer than the teacher. None: no bound.
    ifd_min: float | None = 0.0
    # Above it the teacher finds the answer far less likely than the student. None: no bound.
    ifd_max: float | None = 0.8
    # Replace ifd_max by this quantile of the samples that are not below ifd_min, over all samples
    # that are filtered together.
    ifd_quantile: Annotated[float | None, "more than 0 and at most 1"] = None

    def __post_init__(self):
        super().__post_init__()
        low, high = self.ifd_min, self.ifd_max
        is_ordered = low is None or high is None or low < high
        self.require(is_ordered, "ifd_max", f"more than near_policy.ifd_min, {low}")
        if self.ifd_quantile is not None:
            reason = "where near_policy.ifd_quantile is given: one upper bound"
            self.require_default("ifd_max", reason)
        epochs = self.refresh_epochs
        is_ordered = list(epochs) == sorted(set(epochs))
        is_inside = all(0 < epoch < self.num_epochs for epoch in epochs)
        expected = "rising, each at least 1 and less than near_policy.num_epochs, "
        expected += f"{self.num_epochs}: epoch 0 has a refresh anyway"
        self.require(is_ordered and is_inside, "refresh_epochs", expected)
        self._check_unused()

    def _check_unused(self):
        """Refuse a field that has no effect under this schedule."""
        # Field, accepted values: fields that are read only then.
        read_where = (
            ("schedule", ("refresh",), ("num_epochs", "refresh_epochs")),
            ("schedule", ("continuous",), ("max_staleness", "lag")),
            ("schedule", ("refresh", "continuous"), ("generator", "filter")),
            ("filter", ("ifd", "random"), ("ifd_min", "ifd_max", "ifd_quantile")),
        )
        for field, accepted, names in read_where:
            for name in names if getattr(self, field) not in accepted else ():
                reason = f"unless near_policy.{field} is {' or '.join(accepted)}"
                self.require_default(name, reason)
        expected = "inline or process where near_policy.schedule is refresh: updates wait for the "
        expected += "rollouts in any case"
        is_possible = self.generator != "thread" or self.schedule == "continuous"
        self.require(is_possible, "generator", expected)
        expected = "fixed where near_policy.generator is inline: the generator chooses when to "
        expected += "sample, so the lag is known"
        self.require(self.generator != "inline" or self.lag == "fixed", "lag", expected)

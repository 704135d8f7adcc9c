"""How much `opdjax audit` measures."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """How much `opdjax audit` measures."""

    num_contexts: int = 1000  # random ones, every draw of which is enumerated
    vocab: int = 50  # of the random contexts, at most 200
    num_prompts: int = 128  # that the student answers
    num_generations: int = (
        2  # answers a prompt: what differs between them is the noise of trajectories
    )
    # The gradients of all parameters too, one rollout at a time, some sixty passes over all
    # rollouts; memory for five float32 copies of the student.
    parameter_space: bool = True

    def __post_init__(self):
        require_types(self, "how.")
        for name, least in (
            ("num_contexts", 1),
            ("vocab", 2),
            ("num_prompts", 2),
            ("num_generations", 2),
        ):
            require(
                getattr(self, name) >= least,
                f"how.{name}",
                getattr(self, name),
                f"at least {least}",
            )
        require(
            self.vocab <= 200,
            "how.vocab",
            self.vocab,
            "at most 200: V x V numbers are enumerated at each context",
        )

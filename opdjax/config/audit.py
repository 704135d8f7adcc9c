"""How much `opdjax audit` measures."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """How much `opdjax audit` measures."""

    num_contexts: int = 1000  # random contexts; every token of each is enumerated
    vocab: int = 50  # tokens in the vocabulary of the random contexts, at most 200
    num_prompts: int = 128  # prompts that the student answers
    # Answers per prompt; their differences measure the noise of trajectories.
    num_generations: int = 2
    # Also measure the gradient of all parameters, one rollout at a time. Takes about sixty passes
    # over all rollouts and memory for five float32 copies of the student.
    parameter_space: bool = True

    def __post_init__(self):
        require_types(self, "audit.")
        minimum = {"num_contexts": 1, "vocab": 2, "num_prompts": 2, "num_generations": 2}
        for name, least in minimum.items():
            value = getattr(self, name)
            require(value >= least, f"audit.{name}", value, f"at least {least}")
        most = "at most 200: V x V numbers are enumerated at each context"
        require(self.vocab <= 200, "audit.vocab", self.vocab, most)

"""How much `opdjax audit` measures."""

from typing import Annotated

from opdjax.config.validation import Section


class AuditConfig(Section):
    """How much `opdjax audit` measures."""

    # Random contexts; every token of each is enumerated.
    num_contexts: Annotated[int, "at least 1"] = 1000
    # Tokens in the vocabulary of the random contexts.
    vocab: Annotated[int, "from 2 to 200 (V x V numbers are enumerated at each context)"] = 50
    # Prompts that the student answers.
    num_prompts: Annotated[int, "at least 2"] = 128
    # Answers per prompt; their differences measure the noise of trajectories.
    num_generations: Annotated[int, "at least 2"] = 2
    # Also measure the gradient of all parameters, one rollout at a time. Takes about sixty passes
    # over all rollouts and memory for five float32 copies of the student.
    parameter_space: bool = True

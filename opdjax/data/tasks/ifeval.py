"""IFEval (arXiv 2311.07911): whether an answer follows all of a prompt's instructions, strictly, as
the package if-verifiable checks them; `is_followed` is called in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json

from opdjax.config.validation import MissingExtraError

MAX_BYTES = 4 << 30  # of the process that checks


def require_package() -> None:
    """MissingExtraError if if-verifiable is not installed."""
    if importlib.util.find_spec("if_verifiable") is None:
        reason = "which checks the instructions: pip install 'opdjax[ifeval]'"
        raise MissingExtraError(f"the grader 'ifeval' needs if-verifiable, {reason}")


def warm_up() -> None:
    """Imports the package."""
    import if_verifiable  # noqa: F401


def instructions(row: str) -> str | None:
    """A row of google/IFEval, as JSON; None for another text."""
    return row if '"instruction_id_list": ["' in row else None


def is_followed(row: str, answer: str) -> bool:
    """Whether an answer follows the instructions of a row of google/IFEval, given as JSON."""
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    sample = IFEvalSample(**json.loads(row))
    # Tables hold null for each argument that an instruction does not have.
    sample.kwargs = [{n: x for n, x in own.items() if x is not None} for own in sample.kwargs]
    return evaluate_output_for_sample("ifeval", sample, answer)[1].binary_strict == 1

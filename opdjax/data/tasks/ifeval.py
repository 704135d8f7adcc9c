"""IFEval (arXiv 2311.07911): whether an answer follows all of a prompt's instructions, strictly, as
the package if-verifiable checks them; `is_followed` is called in a process of its own.
"""

from __future__ import annotations

import json

from opdjax.config.validation import MissingExtraError

MAX_BYTES = 4 << 30  # of the process that checks


def require_package() -> None:
    """MissingExtraError if if-verifiable, or a file that it counts sentences with, is missing."""
    try:
        import if_verifiable  # noqa: F401
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except ImportError as error:
        advice = "needs if-verifiable: pip install 'opdjax[ifeval]'"
        raise MissingExtraError(f"the grader 'ifeval' {advice}") from error
    except LookupError as error:  # without it, every count of sentences would fail
        advice = "needs a file of nltk: python -m nltk.downloader punkt_tab"
        raise MissingExtraError(f"the grader 'ifeval' {advice}") from error


def warm_up() -> None:
    """Imports the packages."""
    import if_verifiable  # noqa: F401
    import langdetect

    langdetect.DetectorFactory.seed = 0  # the same language each time


def instructions(row: str) -> str | None:
    """A row of google/IFEval, as JSON; None for another text."""
    return row if '"instruction_id_list": ["' in row else None


def is_followed(row: str, answer: str) -> bool:
    """Whether an answer follows the instructions of a row of google/IFEval, given as JSON."""
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    sample = IFEvalSample(**json.loads(row))
    results, scores = evaluate_output_for_sample("ifeval", sample, answer)
    # It passes over instructions that it does not know.
    return len(results) == len(sample.instruction_id_list) and scores.binary_strict == 1

"""The cheap checks for mistakes that would train without an error. `train` runs them at its start.

`check_settings` needs no forward pass, `check_first_step` reads what the first step computed
anyway. `opdjax doctor` runs more checks (diagnose/checks.py). Log-probabilities and tolerances are
in nats.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jinja2
import numpy as np

from opdjax.config import DataConfig
from opdjax.config.evaluation import EvaluationConfig
from opdjax.data.chat import TokenizerMismatchError, check_same_vocabulary, reads_clock, render
from opdjax.data.prompts import PromptSet
from opdjax.engine.evaluate import last_tokens
from opdjax.models.decoder import Params
from opdjax.ops.tile import Head
from opdjax.rollouts.findings import Finding, Problem, fault, finding, warning
from opdjax.rollouts.setup import Setup, Teacher, reads_scores
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch

_PROBES = (
    "The quick brown fox, 'jumps' over 1,234.50 lazy dogs.\n\n  Then?",
    "def f(x):\n\treturn {'a': [x ** 2, -1e-3]}  # done",
    "\\frac{a}{b} = \\sqrt{2}; so \\boxed{42} <think> 你好, мир, naïve 🙂",
)
_ANSWER = "opdjax answer 7"
_SHOWN_LINES = 24
SHIFTS = (("right", 1), ("left", -1))  # (side, columns), as np.roll counts them


def check_settings(setup: Setup) -> list[Finding]:
    """Run the checks that need no forward pass."""
    if not reads_scores(setup.config):
        setup = with_student_as_teacher(setup)
    return [
        check_tokenizers(setup.tokenizer, setup.teacher.tokenizer, setup.config.estimator.recipe),
        check_stop_tokens(setup),
        check_chat_template(setup),
        check_sampling_filter(setup),
        *check_staleness(setup),
    ]


def check_first_step(
    setup: Setup, batch: TrainBatch, rollouts: Rollouts, prompts: PromptBatch, metrics: Metrics
) -> list[Finding]:
    """Check the mask of the first batch, and that sampler and update give the same log-probs."""
    if setup.config.is_judged:  # rollouts without a score were dropped: no segment holds them
        is_kept = np.asarray(batch.segment_ids).any(axis=1)
        batch, rollouts = jax.tree.map(lambda x: np.asarray(x)[is_kept], (batch, rollouts))
    findings = [check_mask(batch, rollouts, prompts.tokens.shape[1], setup.decoding.stop_token_ids)]
    # The metric reads the behaviour log-probs, which a filter changes and the update does not see.
    if "rollout/logprob_gap" in metrics and not setup.decoding.has_filter:
        gap = metrics["rollout/logprob_gap"]
        findings.append(check_logprob_gap(gap, coarsest_dtype(setup), jax.default_backend()))
    return findings


def with_student_as_teacher(
    setup: Setup, params: Params | None = None, head: Head | None = None
) -> Setup:
    """Return the setup with the student as teacher.

    A run that compares no scores is checked this way: only its student can be wrong.
    """
    student = Teacher(
        setup.student, params, head, setup.tokenizer, setup.decoding, shares_vocabulary=True
    )
    prompts = dataclasses.replace(setup.prompts, teacher_ids=None)
    return dataclasses.replace(setup, teacher=student, prompts=prompts)


# Tokenizers


def check_tokenizers(student: Any, teacher: Any, recipe: str) -> Finding:
    """Check that two tokenizers map strings to the same ids.

    They must have the same vocabulary, split the same texts alike and add the same special tokens.
    """
    try:
        check_same_vocabulary(student, teacher, recipe)
    except TokenizerMismatchError as error:
        return Finding("tokenizers", "fault", str(error))
    problems = []
    for text in _PROBES:
        ours, theirs = (t.encode(text, add_special_tokens=False) for t in (student, teacher))
        if ours != theirs:
            split = f"student and teacher split {text!r} differently ({ours} and {theirs})"
            problems.append(fault(split, "give both the same tokenizer.json"))
    ours, theirs = (t.encode("a") for t in (student, teacher))
    if ours != theirs:
        encoded = f"the student's tokenizer encodes 'a' as {ours}, the teacher's as {theirs}"
        advice = "one of them adds a special token, so prompts of data.format raw differ"
        problems.append(warning(encoded, advice))
    details = []
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        ours, theirs = getattr(student, kind), getattr(teacher, kind)
        if ours != theirs:
            details.append(f"{kind}: student {ours}, teacher {theirs}")
    size = len(student.get_vocab())
    return finding(
        "tokenizers", problems, f"{size} tokens with the same ids; texts are split alike", details
    )


# Stop tokens


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the first token that the chat template writes after an assistant's answer.

    None if the tokenizer has no template, or the template writes nothing there.
    """
    if tokenizer.chat_template is None:
        return None
    question = {"role": "user", "content": "opdjax question"}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        text = tokenizer.apply_chat_template([question, answer], tokenize=False)
    except (jinja2.TemplateError, ValueError):  # the template does not accept a finished answer
        return None
    _, found, rest = text.rpartition(_ANSWER)
    ids = tokenizer.encode(rest, add_special_tokens=False) if found and rest.strip() else []
    return ids[0] if ids else None


def check_stop_tokens(setup: Setup, teacher_answers: Rollouts | None = None) -> Finding:
    """Check that rollouts end at the tokens with which both models and their templates end one.

    `teacher_answers`: greedy answers of the teacher, which show where it really ends.
    """
    sampling, data = setup.config.sampling, setup.config.data
    tokenizers = {"student": setup.tokenizer, "teacher": setup.teacher.tokenizer}
    configured = {
        "student": setup.student.stop_token_ids,
        "teacher": setup.teacher.checkpoint.stop_token_ids,
    }
    formats = {"student": data.format, "teacher": data.teacher_format or data.format}
    turns = {
        role: turn
        for role, tokenizer in tokenizers.items()
        if formats[role] == "chat" and (turn := end_of_turn(tokenizer)) is not None
    }
    more, stops = set(sampling.stop_token_ids), set(setup.decoding.stop_token_ids)
    name = partial(_names, tokenizer=setup.tokenizer)

    student_stops = {*configured["student"], *more}
    problems = _generation_config_problems(student_stops, set(configured["teacher"]), stops, name)
    missing = {role: turn for role, turn in turns.items() if turn not in stops}
    if missing:
        template = f"the chat template of {' and '.join(missing)} ends a turn with"
        found = f"{template} {name(missing.values())}, where rollouts do not stop"
        problems.append(fault(f"{found}: answers run on past their end"))
    for role, tokenizer in tokenizers.items():
        eos = tokenizer.eos_token_id
        if eos is not None and configured[role] and eos not in configured[role]:
            found = f"the {role}'s tokenizer ends with {name([eos])}"
            found += f", its generation config with {name(configured[role])}"
            problems.append(warning(found, "make them agree: other engines may stop elsewhere"))
    otherwise = f"answers of both models end at {name(stops)}"
    if teacher_answers is not None:
        is_cut = np.asarray(teacher_answers.is_truncated)
        endings = np.where(is_cut, -1, last_tokens(teacher_answers))
        problems += _ending_problems(endings, stops, name)
        otherwise += f"; {int((endings != -1).sum())} of {len(endings)} greedy teacher answers do"
    if lacking := {*configured["teacher"], *missing.values()} - stops:
        ids = " ".join(map(str, sorted(more | lacking)))
        problems.append(warning(f"what to do: --sampling.stop-token-ids {ids}"))

    details = [f"{role}'s generation config: {name(ids)}" for role, ids in configured.items()]
    details += [f"{role}'s tokenizer: {name([t.eos_token_id])}" for role, t in tokenizers.items()]
    details += [
        f"{role}'s template ends a turn with {name([turn])}" for role, turn in turns.items()
    ]
    result = finding("stop_tokens", problems, otherwise, details if problems else ())
    # Given answers are cut where the student stops; only answers sampled later can run on.
    is_given = sampling.completions_from != "student"
    return dataclasses.replace(result, status="warning") if problems and is_given else result


def _generation_config_problems(
    student: set[int], teacher: set[int], stops: set[int], name
) -> list[Problem]:
    if teacher and not teacher & stops:
        found = f"rollouts stop at {name(stops)}, the teacher ends its answers"
        return [fault(f"{found} only with {name(teacher)}")]
    if student and teacher and not student & teacher:
        found = f"the student's generation config ends at {name(student)}, the teacher's at"
        return [fault(f"{found} {name(teacher)}", "set the same eos_token_id in both")]
    if extra := teacher - stops:
        return [warning(f"the teacher may also end with {name(extra)}, where rollouts do not stop")]
    return []


def _ending_problems(endings: np.ndarray, stops: set[int], name) -> list[Problem]:
    """Compare the stop tokens of a run with how greedy answers of the teacher end."""
    total, cut = len(endings), int((endings == -1).sum())
    foreign = [int(token) for token in endings if token != -1 and token not in stops]
    problems = []
    if foreign:
        found = f"{len(foreign)} of {total} greedy teacher answers end with {name(set(foreign))}"
        is_fault = len(foreign) > total / 2
        problems.append((fault if is_fault else warning)(f"{found}, where rollouts do not stop"))
    if cut > total / 4:
        found = f"{cut} of {total} greedy teacher answers reach the length limit"
        advice = "raise sampling.max_completion_length, or check the template the teacher reads"
        problems.append(warning(found, advice))
    return problems


def _names(ids: Iterable[int | None], tokenizer: Any) -> str:
    known = sorted({token for token in ids if token is not None})
    names = (f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in known)
    return ", ".join(names) or "nothing"


# Chat templates


def check_chat_template(setup: Setup) -> Finding:
    """Check that student and teacher read the same prompts, unless the config says otherwise."""
    data, prompts = setup.config.data, setup.prompts
    tokenizers = (setup.tokenizer, setup.teacher.tokenizer)
    formats, thinking = zip(data.student_template, data.teacher_template)
    has_two_templates = (
        formats == ("chat", "chat") and tokenizers[0].chat_template != tokenizers[1].chat_template
    )
    changes = (data.teacher_format, data.teacher_prompt_format)
    details = _prompt_difference(prompts, tokenizers)
    problems = []
    if details and any(change is not None for change in changes):
        why = "as the data.teacher_… fields ask"
        problems.append(warning(f"student and teacher read different prompts, {why}"))
    elif details:
        found = "student and teacher read different prompts although data.format is the same: "
        found += (
            "their chat templates differ"
            if has_two_templates
            else "their tokenizers render it differently"
        )
        advice = "copy one template over the other, or, if this is intended, set"
        problems.append(fault(found, f"{advice} --data.teacher-format chat"))
    elif has_two_templates:
        found = "the chat templates of student and teacher differ"
        problems.append(warning(f"{found}, but render these prompts alike"))
    for role, tokenizer, format, flag in zip(("student", "teacher"), tokenizers, formats, thinking):
        effect = _thinking_effect(prompts, data, tokenizer) if format == "chat" else []
        if format == "chat" and flag is not None and not effect:
            found = f"enable_thinking is {flag}, but the {role}'s chat template does not read it"
            problems.append(warning(found))
        if effect and (role == "student" or has_two_templates or formats[0] == "raw"):
            state = "the template's default" if flag is None else flag
            details.append(f"{role}, enable_thinking on -> off (here: {state}): {' '.join(effect)}")
    for role, tokenizer in zip(("student", "teacher"), tokenizers):
        if reads_clock(tokenizer):
            found = f"the {role}'s chat template reads the clock"
            details.append(f"{found}: its prompts are those of data.date, {data.date}")
    medium = "chat template" if data.format == "chat" else "plain text"
    return finding(
        "chat_template",
        problems,
        f"student and teacher read the same prompts, as the same {medium}",
        details,
    )


def _prompt_difference(prompts: PromptSet, tokenizers: tuple[Any, Any]) -> list[str]:
    """Return a diff of the first prompt that student and teacher read differently."""
    if prompts.teacher_ids is None:
        return []
    pairs = zip(prompts.student_ids, prompts.teacher_ids)
    different = next(pair for pair in pairs if pair[0] != pair[1])
    pieces = [_pieces(ids, tokenizer) for ids, tokenizer in zip(different, tokenizers)]
    return _shortened(list(difflib.unified_diff(*pieces, "student", "teacher", lineterm="", n=2)))


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    return [repr(tokenizer.decode([token])) for token in ids]


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN_LINES
    return lines if more <= 0 else [*lines[:_SHOWN_LINES], f"… {more} more lines"]


def _thinking_effect(prompts: PromptSet, data: DataConfig, tokenizer: Any) -> list[str]:
    """Return the token strings that turning thinking off adds (+) and removes (-)."""
    prompt = prompts.prompts[0].prompt
    prompt = data.prompt_format.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt
    ids = partial(render, prompt, tokenizer, format="chat", system_prompt=data.system_prompt)
    on, off = (_pieces(ids(enable_thinking=flag), tokenizer) for flag in (True, False))
    headers = ("---", "+++", "@@")
    changed = difflib.unified_diff(on, off, lineterm="", n=0)
    return _shortened([line for line in changed if not line.startswith(headers)])


# Sampling


def check_sampling_filter(setup: Setup, rollouts: Rollouts | None = None) -> Finding:
    """Check that tokens are sampled from the distribution that is scored.

    With `rollouts`, the filter's effect is measured: their behaviour minus unfiltered log-prob is
    minus the log of the mass that the filter keeps.
    """
    config, name = setup.config, "sampling_filter"
    is_sampled = config.sampling.completions_from == "student"  # given answers pass no filter
    has_filter, removed = setup.decoding.has_filter and is_sampled, None
    if rollouts is not None and is_sampled:
        behavior, unfiltered = rollouts.behavior_logprobs, rollouts.unfiltered_logprobs
        removed = (np.asarray(behavior) - np.asarray(unfiltered))[np.asarray(rollouts.mask)]
    altered = None if rollouts is None else _altered_sampling(config.evaluation)
    details = [] if altered is None else [f"the evaluation samples with {altered}"]
    if not has_filter and (removed is None or not removed.any()):
        return finding(name, [], "tokens are sampled from the distribution that is scored", details)
    found = "top_p or top_k is on" if has_filter else "some tokens were filtered out"
    if removed is not None:
        mean = float(np.mean(removed)) if removed.size else 0.0
        found += f": it removes {1 - np.exp(-mean):.2%} of the mass"
        found += f" ({mean:.2g} nats a token, at most {np.max(removed, initial=0):.2g})"
    recipe, advice = config.estimator.recipe, "set top_p 1 and top_k 0"
    if config.recipe.is_policy_gradient:
        why = f"recipe {recipe!r} weighs tokens as if sampled from the unfiltered student"
        problem = fault(
            found, f"{why}, so its gradient is biased", f"{advice}, or use an exact divergence"
        )
    else:
        why = f"recipe {recipe!r} stays exact at each context, but never visits unlikely contexts"
        problem = warning(found, why, f"{advice} unless this is intended")
    return Finding(name, *problem, tuple(details))


def _altered_sampling(evaluation: EvaluationConfig) -> str | None:
    """Name the temperature and the filters of the evaluation that change the distribution."""
    neutral = {"temperature": 1, "top_p": 1, "top_k": 0}
    values = {name: getattr(evaluation, name) for name in neutral}
    changed = [f"{name} {value:g}" for name, value in values.items() if value != neutral[name]]
    return None if evaluation.source is None else ", ".join(changed) or None


def check_staleness(setup: Setup) -> list[Finding]:
    """Warn if tokens of an older policy are weighted as if the current student had sampled them."""
    config, near = setup.config, setup.config.near_policy
    recipe, options = config.recipe, config.estimator.options
    is_stale = near.schedule == "refresh" or near.max_staleness > 0
    # Recipes of rewards have an importance ratio of their own.
    is_corrected = recipe.is_rewarded or options.get("importance", "none") != "none"
    if not is_stale or not recipe.is_policy_gradient or is_corrected:
        return []
    problem = warning(
        f"recipe {recipe.name!r} treats tokens of an older policy as its own samples"
        ", so its gradient is biased",
        "set estimator.importance, or use a divergence, which needs no sampled token",
    )
    return [Finding("staleness", *problem)]


# Numbers


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """By how much two computations of the same log-probs may differ through rounding."""

    mean: float
    largest: float
    gradient: float  # as a share of the norm of the gradient against the true teacher


def tolerance(backend: str, *dtypes: str) -> Tolerance:
    """Return the tolerance on a backend; the finest of the types sets it."""
    if all(dtype == "bfloat16" for dtype in dtypes):
        return Tolerance(5e-2, 1.0, 0.2)
    # Accelerators multiply float32 matrices in fewer bits by default.
    return Tolerance(1e-4, 1e-2, 1e-2) if backend == "cpu" else Tolerance(2e-2, 0.5, 0.1)


def coarsest_dtype(setup: Setup) -> str:
    """Return the type that limits how well sampler and update agree.

    Keys and values may be stored in fewer bits than the forward pass uses.
    """
    return "bfloat16" if setup.config.sampling.kv_dtype in ("int8", "bfloat16") else setup.dtype


def check_logprob_gap(gap: float, dtype: str, backend: str) -> Finding:
    """Check a step's `rollout/logprob_gap`: mean |behaviour - student log-prob|."""
    name, allowed = "sampler_matches_scorer", tolerance(backend, dtype).mean
    if gap <= allowed:
        return Finding(name, "ok", f"log-probs differ by {gap:.2g} on average")
    found = f"the sampler's log-probs differ from the update's by {gap:.2g} on average"
    expected = f"expected at most {allowed:g} in {dtype}"
    advice = "`opdjax doctor` with the same options finds the cause"
    return Finding(name, *fault(found, expected, advice))


def check_mask(
    batch: TrainBatch, rollouts: Rollouts, prompt_width: int, stop_token_ids: Sequence[int]
) -> Finding:
    """Check that the mask is 1 on exactly the sampled tokens, including the stop token.

    The sampled tokens are found from the tokens alone: in a row with a prompt, every column from
    `prompt_width` to the first stop token. Given answers may lack a stop token, so for them the
    mask of the rollouts is trusted.
    """
    mask, segments = np.asarray(batch.mask).astype(bool), np.asarray(batch.segment_ids)
    tokens = np.asarray(rollouts.tokens)
    has_prompt = np.asarray(rollouts.segment_ids)[:, :prompt_width].any(axis=1)
    is_stop = np.isin(tokens[:, prompt_width:], np.asarray(stop_token_ids))
    sampled = np.zeros(tokens.shape, bool)
    sampled[:, prompt_width:] = has_prompt[:, None] & (np.cumsum(is_stop, axis=1) - is_stop == 0)
    if rollouts.behavior_logprobs is None:
        sampled = np.asarray(rollouts.mask).astype(bool)
    problems = []
    if mask.shape == sampled.shape and not np.array_equal(mask, sampled):
        row, column = np.argwhere(mask != sampled)[0]
        what = "a sampled token" if sampled[row, column] else "a token that was not sampled"
        found = (
            f"the mask is {int(mask[row, column])} on {what}, first at row {row}, column {column}"
        )
        cause = [
            f"the mask is shifted by one column to the {side}"
            for side, step in SHIFTS
            if np.array_equal(np.roll(sampled, step, axis=1), mask)
        ]
        problems.append(fault(*cause, found, "expected 1 on exactly the sampled tokens"))
    if (num_masked := int(mask.sum())) != (num_sampled := int(sampled.sum())):
        problems.append(fault(f"the mask holds {num_masked} tokens, {num_sampled} were sampled"))
    if padding := int((mask & (segments == 0)).sum()):
        problems.append(fault(f"the mask is 1 on {padding} padding tokens; expected none"))
    starts = np.diff(segments, axis=1, prepend=0) != 0
    if first := int((mask & starts & (segments > 0)).sum()):
        found = f"{first} sequences have mask 1 on their first token, which nothing predicts"
        problems.append(fault(found))
    otherwise = f"1 on exactly the {num_sampled} sampled tokens, including the stop tokens"
    return finding("mask", problems, otherwise)

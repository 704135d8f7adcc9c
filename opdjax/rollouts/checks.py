"""The cheap checks, run by `train`, for mistakes that would train without an error: of the settings
and of what the first step computed. `opdjax doctor` runs more. Numbers are in nats.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jinja2
import numpy as np

from opdjax.config import DataConfig
from opdjax.data.chat import TokenizerMismatchError, check_same_vocabulary, reads_clock, render
from opdjax.data.prompts import PromptSet
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import last_tokens
from opdjax.models.decoder import Params
from opdjax.ops.sharding import is_process_zero
from opdjax.ops.tile import Head
from opdjax.rollouts.setup import Setup, Teacher, reads_scores
from opdjax.types import Metrics, Rollouts, TrainBatch

Status = Literal["ok", "warning", "fault"]
Problem = tuple[Status, str]
_SIGNS = {"ok": "✓", "warning": "!", "fault": "✗"}  # from the least severe to the most
_ANSWER = "opdjax answer 7"
_SHOWN_LINES = 24
SHIFTS = (("right", 1), ("left", -1))  # (side, columns), as np.roll counts them


class FaultError(RuntimeError):
    """A check found a fault that makes the run's results meaningless."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check. The message says what was expected, what was found, what to do."""

    name: str
    status: Status
    message: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{_SIGNS[self.status]} {self.name}: {self.message}"]
        return "\n".join([*lines, *(f"    {line}" for line in self.details)])


def warning(*sentences: str) -> Problem:
    """A problem that may be intended."""
    return "warning", "; ".join(sentences)


def fault(*sentences: str) -> Problem:
    """A problem that makes the run's results meaningless."""
    return "fault", "; ".join(sentences)


def finding(
    name: str, problems: Sequence[Problem], otherwise: str, details: Sequence[str] = ()
) -> Finding:
    """Merge the problems of a check; `otherwise` is the message if there are none."""
    status = max((status for status, _ in problems), key=list(_SIGNS).index, default="ok")
    message = "; ".join(text for _, text in problems) or otherwise
    return Finding(name, status, message, tuple(details))


def enforce(findings: Sequence[Finding]) -> None:
    """Print the warnings on process zero; raise FaultError if there is a fault."""
    for each in findings:
        if each.status == "warning" and is_process_zero():
            print(each)
    faults = [str(each) for each in findings if each.status == "fault"]
    if faults:
        raise FaultError(
            "the run was stopped: its results would mean nothing:\n" + "\n".join(faults)
        )


# The checks


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
    setup: Setup, batch: TrainBatch, rollouts: Rollouts, metrics: Metrics
) -> list[Finding]:
    """Check the mask of the first batch, and that sampler and update give the same log-probs."""
    if setup.config.is_judged:  # rollouts without a score were dropped: no segment holds them
        is_kept = np.asarray(batch.segment_ids).any(axis=1)
        batch, rollouts = jax.tree.map(lambda x: np.asarray(x)[is_kept], (batch, rollouts))
    prompt_width = rollouts.tokens.shape[1] - setup.config.sampling.max_completion_length
    findings = [check_mask(batch, rollouts, prompt_width, setup.decoding)]
    # The metric reads the behaviour log-probs, which a filter changes and the update does not see.
    gap, dtype = metrics.get("rollout/logprob_gap"), coarsest_dtype(setup)
    allowed = tolerance(jax.default_backend(), dtype).mean
    if gap is not None and not setup.decoding.has_filter and not gap <= allowed:
        found = f"the sampler's log-probs differ from the update's by {gap:.2g} on average"
        expected = f"expected at most {allowed:g} in {dtype}"
        advice = "`opdjax doctor` with the same options finds the cause"
        findings.append(Finding("sampler_matches_scorer", *fault(found, expected, advice)))
    return findings


def with_student_as_teacher(
    setup: Setup, params: Params | None = None, head: Head | None = None
) -> Setup:
    """The setup with the student as teacher: where no scores are compared, only it can be wrong."""
    student = Teacher(
        setup.student, params, head, setup.tokenizer, setup.decoding, shares_vocabulary=True
    )
    prompts = dataclasses.replace(setup.prompts, teacher_ids=None)
    return dataclasses.replace(setup, teacher=student, prompts=prompts)


# Tokenizers


def check_tokenizers(student: Any, teacher: Any, recipe: str) -> Finding:
    """Check that two tokenizers share a vocabulary, split texts alike and add no other tokens."""
    try:
        check_same_vocabulary(student, teacher, recipe)
    except TokenizerMismatchError as error:
        return Finding("tokenizers", "fault", str(error))
    problems = []
    options = {"format": "raw", "system_prompt": None, "enable_thinking": None}
    ours, theirs = (render("a", t, **options) for t in (student, teacher))
    if ours != theirs:
        encoded = f"the student's tokenizer encodes 'a' as {ours}, the teacher's as {theirs}"
        advice = "one of them adds a special token, so prompts of data.format raw differ"
        problems.append(warning(encoded, advice))
    otherwise = f"{len(student.get_vocab())} tokens with the same ids; texts are split alike"
    return finding("tokenizers", problems, otherwise)


# Stop tokens


def end_of_turn(tokenizer: Any) -> int | None:
    """The first token that the chat template writes after an assistant's answer; None for none."""
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
    configured = {"student": setup.student.stop_token_ids}
    configured["teacher"] = setup.teacher.checkpoint.stop_token_ids
    formats = (data.student_template[0], data.teacher_template[0])
    ends = {
        role: end_of_turn(t) for (role, t), f in zip(tokenizers.items(), formats) if f == "chat"
    }
    turns = {role: turn for role, turn in ends.items() if turn is not None}
    more, stops = set(sampling.stop_token_ids), set(setup.decoding.stop_token_ids)
    name = partial(_names, tokenizer=setup.tokenizer)

    student_stops = {*configured["student"], *more}
    problems = _generation_config_problems(student_stops, set(configured["teacher"]), stops, name)
    if missing := {role: turn for role, turn in turns.items() if turn not in stops}:
        template = f"the chat template of {' and '.join(missing)} ends a turn with"
        found = f"{template} {name(missing.values())}, where rollouts do not stop"
        problems.append(fault(f"{found}: answers run on past their end"))
    for role, tokenizer in tokenizers.items():
        eos = tokenizer.eos_token_id
        if eos is not None and configured[role] and eos not in configured[role]:
            found = f"the {role}'s tokenizer ends with {name([eos])}"
            found += f", its generation config with {name(configured[role])}"
            problems.append(warning(found, "make them agree: other engines may stop elsewhere"))
    if ended := [ids[-1] for ids in setup.prompts.student_ids if ids[-1] in stops]:
        found = f"{len(ended)} of {len(setup.prompts)} prompts end in {name(ended)}, where answers"
        advice = "open the assistant's turn (a chat template), or end the texts before it"
        problems.append(warning(f"{found} stop", advice))
    otherwise = f"answers of both models end at {name(stops)}"
    if teacher_answers is not None:
        is_cut = np.asarray(teacher_answers.is_truncated)
        endings = np.where(is_cut, -1, last_tokens(teacher_answers))
        if (strings := setup.decoding.stop_strings) is not None:  # they end answers here too
            columns = teacher_answers.tokens, teacher_answers.mask
            length = setup.decoding.max_completion_length
            tokens, mask = (np.asarray(x)[:, -length:] for x in columns)
            is_met = (strings.is_met(tokens) & mask).any(axis=1)
            endings = np.where(is_met & ~is_cut, min(stops), endings)
        problems += _ending_problems(endings, stops, name)
        otherwise += f"; {int((endings != -1).sum())} of {len(endings)} greedy teacher answers do"
    if lacking := {*configured["teacher"], *missing.values()} - stops:
        ids = " ".join(map(str, sorted(more | lacking)))
        problems.append(warning(f"what to do: --sampling.stop-token-ids {ids}"))

    details = [f"{role}'s generation config: {name(ids)}" for role, ids in configured.items()]
    details += [f"{role}'s tokenizer: {name([t.eos_token_id])}" for role, t in tokenizers.items()]
    details += [f"{role}'s template ends a turn with {name([t])}" for role, t in turns.items()]
    result = finding("stop_tokens", problems, otherwise, details if problems else ())
    # Given answers are cut where the student stops; only answers sampled later can run on.
    is_given = not sampling.student_samples
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
    is_asked = (data.teacher_format, data.teacher_prompt_format) != (None, None)
    details, problems = _prompt_difference(prompts, tokenizers), []
    if details and is_asked:
        why = "as the data.teacher_… fields ask"
        problems.append(warning(f"student and teacher read different prompts, {why}"))
    elif details:
        cause = "chat templates differ" if has_two_templates else "tokenizers render it differently"
        found = "student and teacher read different prompts although data.format is the same: "
        found += f"their {cause}"
        advice = "copy one template over the other, or, if this is intended, set"
        problems.append(fault(found, f"{advice} --data.teacher-format chat"))
    elif has_two_templates:
        found = "the chat templates of student and teacher differ"
        problems.append(warning(f"{found}, but render these prompts alike"))
    for role, tokenizer, format, flag in zip(("student", "teacher"), tokenizers, formats, thinking):
        if format != "chat":
            continue
        if flag is not None and not _reads_thinking(prompts, data, tokenizer):
            found = f"enable_thinking is {flag}, but the {role}'s chat template does not read it"
            problems.append(warning(found))
        if reads_clock(tokenizer):
            found = f"the {role}'s chat template reads the clock"
            details.append(f"{found}: its prompts are those of data.date, {data.date}")
    medium = "chat template" if formats[0] == "chat" else "plain text"
    otherwise = f"student and teacher read the same prompts, as the same {medium}"
    return finding("chat_template", problems, otherwise, details)


def _prompt_difference(prompts: PromptSet, tokenizers: tuple[Any, Any]) -> list[str]:
    if prompts.teacher_ids is None:
        return []
    pairs = zip(prompts.student_ids, prompts.teacher_ids)
    different = next(pair for pair in pairs if pair[0] != pair[1])
    pieces = [[repr(t.decode([id])) for id in ids] for ids, t in zip(different, tokenizers)]
    lines = list(difflib.unified_diff(*pieces, "student", "teacher", lineterm="", n=2))
    more = len(lines) - _SHOWN_LINES
    return lines if more <= 0 else [*lines[:_SHOWN_LINES], f"… {more} more lines"]


def _reads_thinking(prompts: PromptSet, data: DataConfig, tokenizer: Any) -> bool:
    """Whether turning thinking off changes the first prompt."""
    row, system = prompts.prompts[0], data.system_prompt
    ids = partial(render, row.prompt, tokenizer, format="chat", system_prompt=system)
    on, off = (ids(enable_thinking=flag, tools=row.tools) for flag in (True, False))
    return on != off


# Sampling


def check_sampling_filter(setup: Setup, rollouts: Rollouts | None = None) -> Finding:
    """Check that tokens are sampled as they are scored; `rollouts` show what a filter removes."""
    config, name = setup.config, "sampling_filter"
    is_sampled = config.sampling.student_samples  # given answers pass no filter
    has_filter, removed = setup.decoding.has_filter and is_sampled, None
    if rollouts is not None and is_sampled and rollouts.behavior_logprobs is not None:
        behavior, unfiltered = rollouts.behavior_logprobs, rollouts.unfiltered_logprobs
        removed = (np.asarray(behavior) - np.asarray(unfiltered))[np.asarray(rollouts.mask)]
    if not has_filter and (removed is None or not removed.any()):
        return finding(name, [], "tokens are sampled from the distribution that is scored")
    found = "top_p or top_k is on" if has_filter else "some tokens were filtered out"
    if removed is not None:
        mean = float(np.mean(removed)) if removed.size else 0.0
        found += f": it removes {1 - np.exp(-mean):.2%} of the mass"
        found += f" ({mean:.2g} nats a token, at most {np.max(removed, initial=0):.2g})"
    recipe, advice = config.estimator.recipe, "set top_p 1 and top_k 0"
    if config.recipe.is_policy_gradient:
        why = f"recipe {recipe!r} weighs tokens as if sampled from the unfiltered student"
        why += ", so its gradient is biased"
        problem = fault(found, why, f"{advice}, or use an exact divergence")
    else:
        why = f"recipe {recipe!r} stays exact at each context, but never visits unlikely contexts"
        problem = warning(found, why, f"{advice} unless this is intended")
    return Finding(name, *problem)


def check_staleness(setup: Setup) -> list[Finding]:
    """Warn if tokens of an older policy are weighted as if the current student had sampled them."""
    config, near = setup.config, setup.config.near_policy
    recipe, options = config.recipe, config.estimator.options
    is_stale = near.schedule == "refresh" or near.max_staleness > 0
    # Recipes of rewards have an importance ratio of their own.
    is_corrected = recipe.is_rewarded or options.get("importance", "none") != "none"
    if not is_stale or not recipe.is_policy_gradient or is_corrected:
        return []
    found = f"recipe {recipe.name!r} treats tokens of an older policy as its own samples"
    advice = "set estimator.importance, or use a divergence, which needs no sampled token"
    problem = warning(f"{found}, so its gradient is biased", advice)
    return [Finding("staleness", *problem)]


# Numbers


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """By how much two computations of the same log-probs may differ through rounding."""

    mean: float
    largest: float
    gradient: float  # as a share of the norm of the gradient against the true teacher


def tolerance(backend: str, dtype: str) -> Tolerance:
    """The tolerance for a type on a backend."""
    if dtype == "bfloat16":
        return Tolerance(5e-2, 1.0, 0.2)
    # Accelerators multiply float32 matrices in fewer bits by default.
    return Tolerance(1e-4, 1e-2, 1e-2) if backend == "cpu" else Tolerance(2e-2, 0.5, 0.1)


def coarsest_dtype(setup: Setup) -> str:
    """The type, of passes or of the cache, that limits how well sampler and update agree."""
    return "bfloat16" if setup.config.sampling.kv_dtype in ("int8", "bfloat16") else setup.dtype


def check_mask(
    batch: TrainBatch, rollouts: Rollouts, prompt_width: int, decoding: Decoding
) -> Finding:
    """Check that the mask is 1 on exactly the sampled tokens, including the stop token.

    The sampled tokens are found from the tokens alone: in a row with a prompt, every column from
    `prompt_width` to the first stop token or stop string. Given answers may lack one, so they end
    with their segment.
    """
    mask, segments = np.asarray(batch.mask).astype(bool), np.asarray(batch.segment_ids)
    tokens = np.asarray(rollouts.tokens)
    has_prompt = np.asarray(rollouts.segment_ids)[:, :prompt_width].any(axis=1)
    is_stop = np.isin(tokens[:, prompt_width:], np.asarray(decoding.stop_token_ids))
    if decoding.stop_strings is not None:
        is_stop |= decoding.stop_strings.is_met(tokens[:, prompt_width:])
    sampled = np.zeros(tokens.shape, bool)
    sampled[:, prompt_width:] = has_prompt[:, None] & (np.cumsum(is_stop, axis=1) - is_stop == 0)
    if rollouts.behavior_logprobs is None:
        sampled &= np.asarray(rollouts.segment_ids) > 0
    problems = []
    if len(wrong := np.argwhere(mask != sampled)):
        row, column = wrong[0]
        what = "a sampled token" if sampled[row, column] else "a token that was not sampled"
        found = f"the mask is {int(mask[row, column])} on {what}"
        found += f", first at row {row}, column {column}"
        cause = [
            f"the mask is shifted by one column to the {side}"
            for side, step in SHIFTS
            if np.array_equal(np.roll(sampled, step, axis=1), mask)
        ]
        problems.append(fault(*cause, found, "expected 1 on exactly the sampled tokens"))
    if padding := int((mask & (segments == 0)).sum()):
        problems.append(fault(f"the mask is 1 on {padding} padding tokens; expected none"))
    starts = np.diff(segments, axis=1, prepend=0) != 0
    if first := int((mask & starts & (segments > 0)).sum()):
        found = f"{first} sequences have mask 1 on their first token, which nothing predicts"
        problems.append(fault(found))
    otherwise = f"1 on exactly the {sampled.sum()} sampled tokens, including the stop tokens"
    return finding("mask", problems, otherwise)

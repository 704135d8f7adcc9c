"""What a check finds, and the checks themselves: functions of values, each of which names one
silent fault.

A fault makes a run's results meaningless; a warning may be meant. doctor.py measures what is judged
here. All log-probabilities and tolerances are in nats.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jinja2
import numpy as np

from opdjax.config import DataConfig
from opdjax.config.evaluation import EvaluationConfig
from opdjax.data.chat import TokenizerMismatchError, check_same_vocabulary, render
from opdjax.data.prompts import PromptSet
from opdjax.estimators import RECIPES, bind
from opdjax.models.decoder import Params
from opdjax.ops.sharding import is_process_zero
from opdjax.ops.tile import Head
from opdjax.rollouts.setup import Setup, Teacher, reads_scores
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch

Status = Literal["ok", "warning", "fault"]
Problem = tuple[Status, str]
_SEVERITY = ("ok", "warning", "fault")
_SIGN = {"ok": "✓", "warning": "!", "fault": "✗"}
_PROBES = (
    "The quick brown fox, 'jumps' over 1,234.50 lazy dogs.\n\n  Then?",
    "def f(x):\n\treturn {'a': [x ** 2, -1e-3]}  # done",
    "\\frac{a}{b} = \\sqrt{2}; so \\boxed{42} <think> 你好, мир, naïve 🙂",
)
_ANSWER = "opdjax answer 7"
_SHOWN_LINES = 24
_SIDES = (("right", 1), ("left", -1))


class FaultError(RuntimeError):
    """A check found a fault that makes the run's results meaningless."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found; the message says what was expected, what was found and what to do."""

    name: str
    status: Status
    message: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{_SIGN[self.status]} {self.name}: {self.message}",
                *(f"    {line}" for line in self.details),
            ]
        )


def verdict(
    name: str, problems: Iterable[Problem], fine: str, details: Iterable[str] = ()
) -> Finding:
    """One finding from what a check noticed: as bad as the worst of it, and `fine` where nothing
    was wrong.
    """
    problems = list(problems)
    status = max((status for status, _ in problems), key=_SEVERITY.index, default="ok")
    return Finding(name, status, "; ".join(text for _, text in problems) or fine, tuple(details))


def enforce(findings: Iterable[Finding]) -> None:
    """Print the warnings; raise FaultError where there is a fault."""
    findings = list(findings)
    for finding in findings:
        if finding.status == "warning" and is_process_zero():
            print(finding)
    faults = [str(finding) for finding in findings if finding.status == "fault"]
    if faults:
        raise FaultError(
            "the run was stopped, its results would mean nothing:\n" + "\n".join(faults)
        )


# Tokenizers


def check_tokenizers(student: Any, teacher: Any, recipe: str) -> Finding:
    """Both map the same strings to the same ids, split the same texts alike and put the same
    special tokens around a text.
    """
    try:
        check_same_vocabulary(student, teacher, recipe)
    except TokenizerMismatchError as error:
        return Finding("tokenizers", "fault", str(error))
    problems = []
    for text in _PROBES:
        ours, theirs = (t.encode(text, add_special_tokens=False) for t in (student, teacher))
        if ours != theirs:
            problems.append(
                (
                    "fault",
                    f"student and teacher split {text!r} differently ({ours} / {theirs}); give both one tokenizer.json",
                )
            )
    ours, theirs = (t.encode("a") for t in (student, teacher))
    if ours != theirs:
        found = f"the student's tokenizer makes {ours} of the raw text 'a', the teacher's {theirs}"
        problems.append(
            (
                "warning",
                f"{found}: one of them adds a special token; format raw then differs between the two",
            )
        )
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    pairs = {kind: (getattr(student, kind), getattr(teacher, kind)) for kind in kinds}
    details = [
        f"{kind}: student {ours}, teacher {theirs}"
        for kind, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    return verdict(
        "tokenizers",
        problems,
        f"{len(student.get_vocab())} tokens with the same ids, texts split alike",
        details,
    )


# Stop tokens


def end_of_turn(tokenizer: Any) -> int | None:
    """The first token that the chat template puts after an assistant's answer; None where there is
    no telling.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [
        {"role": "user", "content": "opdjax question"},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, ValueError):  # a template that takes no finished answer
        return None
    _, found, rest = text.rpartition(_ANSWER)
    ids = tokenizer.encode(rest, add_special_tokens=False) if found and rest.strip() else []
    return ids[0] if ids else None


def check_stop_tokens(
    run_stops: Sequence[int],
    configured: tuple[Sequence[int], Sequence[int]],
    tokenizers: tuple[Any, Any],
    data: DataConfig,
    *,
    more: Sequence[int] = (),
    endings: np.ndarray | None = None,
) -> Finding:
    """Where the run ends an answer is where both models and their templates end one.

    `run_stops` are the ids that end a rollout, `configured` those of the generation configs of
    student and teacher, `more` the run's own additions, `endings` the last token of greedy teacher
    answers (-1: cut off).
    """
    run, ours, theirs = set(run_stops), {*configured[0], *more}, set(configured[1])
    name = lambda ids: _named(ids, tokenizers[0])
    problems: list[Problem] = []
    if theirs and not theirs & run:
        problems.append(
            (
                "fault",
                f"rollouts end at {name(run)}, the teacher ends its answers with {name(theirs)} only",
            )
        )
    elif ours and theirs and not ours & theirs:
        found = (
            f"the student's generation config ends at {name(ours)}, the teacher's at {name(theirs)}"
        )
        problems.append(("fault", f"{found}: nothing in common, set eos_token_id alike in both"))
    elif theirs - run:
        problems.append(
            (
                "warning",
                f"the teacher may also end with {name(theirs - run)}, where rollouts do not end",
            )
        )
    formats = {"student": data.format, "teacher": data.teacher_format or data.format}
    turns = {
        role: end_of_turn(t)
        for (role, format), t in zip(formats.items(), tokenizers)
        if format == "chat"
    }
    missing = {role: turn for role, turn in turns.items() if turn is not None and turn not in run}
    if missing:
        found = f"the chat template of {' and '.join(missing)} ends a turn with {name(missing.values())}"
        problems.append(
            ("fault", f"{found}, where rollouts do not end: answers run on past their end")
        )
    for role, tokenizer, stops in zip(formats, tokenizers, configured):
        eos = tokenizer.eos_token_id
        if eos is not None and stops and eos not in stops:
            found = f"the {role}'s tokenizer ends with {name([eos])}, its generation config with {name(stops)}"
            problems.append(
                (
                    "warning",
                    f"{found}: other engines will not stop where this one does, make them agree",
                )
            )
    problems += [] if endings is None else _judge_endings(endings, run, name)
    lacking = sorted((theirs | set(missing.values())) - run)
    if lacking:
        problems.append(
            (
                "warning",
                f"what to do: --sampling.stop-token-ids {' '.join(map(str, sorted({*more, *lacking})))}",
            )
        )
    fine = f"answers end at {name(run)} for both models"
    if endings is not None:
        fine += f"; {int((endings != -1).sum())} of {len(endings)} greedy teacher answers do"
    details = [f"generation configs: student {name(configured[0])}, teacher {name(configured[1])}"]
    details += [
        f"tokenizers: student {name([tokenizers[0].eos_token_id])}, teacher {name([tokenizers[1].eos_token_id])}"
    ]
    details += [
        f"the {role}'s template ends a turn with {name([turn])}"
        for role, turn in turns.items()
        if turn is not None
    ]
    return verdict("stop_tokens", problems, fine, details if problems else ())


def _judge_endings(endings: np.ndarray, run: set[int], name) -> list[Problem]:
    """What greedy answers of the teacher, sampled until any known end, say of where it truly ends."""
    total, cut = len(endings), int((endings == -1).sum())
    foreign = [int(token) for token in endings if token != -1 and token not in run]
    problems: list[Problem] = []
    if foreign:
        found = f"{len(foreign)} of {total} greedy teacher answers end with {name(set(foreign))}, where rollouts do not end"
        problems.append(("fault" if len(foreign) > total / 2 else "warning", found))
    if cut > total / 4:
        found = (
            f"{total - cut} of {total} greedy teacher answers end by themselves, {cut} are cut off"
        )
        problems.append(
            (
                "warning",
                f"{found}; raise sampling.max_completion_length, or check the template that the teacher sees",
            )
        )
    return problems


def _named(ids: Iterable[int | None], tokenizer: Any) -> str:
    ids = sorted({token for token in ids if token is not None})
    return (
        ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in ids)
        or "nothing"
    )


# Chat templates


def check_chat_template(
    data: DataConfig, tokenizers: tuple[Any, Any], prompts: PromptSet
) -> Finding:
    """Student and teacher read the same prompt, or differ because the config says so."""
    problems: list[Problem] = []
    formats = (data.format, data.teacher_format or data.format)
    is_declared = any(
        x is not None
        for x in (data.teacher_format, data.teacher_enable_thinking, data.teacher_prompt_format)
    )
    has_two_templates = (
        formats == ("chat", "chat") and tokenizers[0].chat_template != tokenizers[1].chat_template
    )
    details = []
    if prompts.teacher_ids is not None:
        number = next(
            i for i in range(len(prompts)) if prompts.student_ids[i] != prompts.teacher_ids[i]
        )
        pieces = [
            _pieces(ids[number], t)
            for ids, t in zip((prompts.student_ids, prompts.teacher_ids), tokenizers)
        ]
        details += _shortened(
            list(difflib.unified_diff(*pieces, "student", "teacher", lineterm="", n=2))
        )
    if details and is_declared:
        problems.append(
            ("warning", "student and teacher read different prompts, as data.teacher_… asks")
        )
    elif details:
        cause = (
            "their chat templates differ"
            if has_two_templates
            else "their tokenizers render it differently"
        )
        advice = "copy one template over the other; if it is meant, say so with --data.teacher-format chat"
        problems.append(
            (
                "fault",
                f"student and teacher read different prompts although data.format is the same: {cause}; {advice}",
            )
        )
    elif has_two_templates:
        problems.append(
            (
                "warning",
                "the chat templates of student and teacher differ, though not on these prompts",
            )
        )
    thinking = (
        data.enable_thinking,
        data.enable_thinking
        if data.teacher_enable_thinking is None
        else data.teacher_enable_thinking,
    )
    for role, tokenizer, format, wanted in zip(
        ("student", "teacher"), tokenizers, formats, thinking
    ):
        effect = _thinking_effect(prompts, data, tokenizer) if format == "chat" else []
        if format == "chat" and wanted is not None and not effect:
            problems.append(
                (
                    "warning",
                    f"enable_thinking is {wanted}, but the {role}'s chat template does not read it",
                )
            )
        if effect and (role == "student" or has_two_templates or formats[0] == "raw"):
            state = "the template's default" if wanted is None else wanted
            details += [f"{role}, enable_thinking on -> off (here: {state}): " + " ".join(effect)]
    same = "chat template" if data.format == "chat" else "bare text"
    return verdict(
        "chat_template",
        problems,
        f"student and teacher read the same prompts, through the same {same}",
        details,
    )


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    return [repr(tokenizer.decode([token])) for token in ids]


def _shortened(lines: list[str]) -> list[str]:
    return (
        lines
        if len(lines) <= _SHOWN_LINES
        else [*lines[:_SHOWN_LINES], f"… {len(lines) - _SHOWN_LINES} lines more"]
    )


def _thinking_effect(prompts: PromptSet, data: DataConfig, tokenizer: Any) -> list[str]:
    """The pieces that turning thinking off adds (+) and takes away (-)."""
    prompt = prompts.prompts[0].prompt
    prompt = data.prompt_format.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt
    on, off = (
        _pieces(
            render(
                prompt,
                tokenizer,
                format="chat",
                system_prompt=data.system_prompt,
                enable_thinking=flag,
            ),
            tokenizer,
        )
        for flag in (True, False)
    )
    changed = [
        line
        for line in difflib.unified_diff(on, off, lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    return _shortened(changed)


# Sampling filters


def check_sampling_filter(
    recipe: str,
    is_policy_gradient: bool,
    has_filter: bool,
    removed: np.ndarray | None = None,
    evaluation_filter: str | None = None,
) -> Finding:
    """No filter stands between the distribution that is scored and the one that is sampled.

    `removed` is the sampled tokens' behaviour minus unfiltered log-prob: minus the log of the mass
    that the filter keeps, nats.
    """
    size = 0.0 if removed is None or not removed.size else float(np.mean(removed))
    is_seen = removed is not None and bool(np.any(removed != 0))
    details = (
        []
        if evaluation_filter is None
        else [
            f"the evaluation samples with {evaluation_filter}; its scores are of that distribution"
        ]
    )
    if not (has_filter or is_seen):
        return Finding(
            "sampling_filter",
            "ok",
            "tokens are drawn from the whole distribution that is scored",
            tuple(details),
        )
    found = (
        "top_p, top_k or min_p is on" if has_filter else "behaviour and unfiltered log-probs differ"
    )
    if removed is not None:
        found += f": it removes {1 - np.exp(-size):.2%} of the mass ({size:.2g} nats a token, at most {np.max(removed, initial=0):.2g})"
    if is_policy_gradient:
        why = f"recipe {recipe!r} weighs tokens as if drawn from the unfiltered student, so its gradient is biased"
        return Finding(
            "sampling_filter",
            "fault",
            f"{found}; {why}; set top_p 1, top_k 0 and min_p 0, or use full_kl",
            tuple(details),
        )
    why = f"recipe {recipe!r} stays exact at each context, but unlikely contexts are never visited"
    return Finding(
        "sampling_filter",
        "warning",
        f"{found}; {why}; set top_p 1, top_k 0 and min_p 0 unless that is meant",
        tuple(details),
    )


# Numbers


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far two computations of the same log-probs may lie apart by rounding alone."""

    mean: float
    largest: float
    gradient: float  # share of the norm of the gradient against the true teacher


def tolerance(backend: str, *dtypes: str) -> Tolerance:
    """Rounding on this backend; a computation is held to the finest type in it."""
    if all(dtype == "bfloat16" for dtype in dtypes):
        return Tolerance(5e-2, 1.0, 0.2)
    # Accelerators multiply float32 matrices in fewer bits by default.
    return Tolerance(1e-4, 1e-2, 1e-2) if backend == "cpu" else Tolerance(2e-2, 0.5, 0.1)


def check_padded_vocabulary(
    sampled: np.ndarray,
    width: int,
    valid_vocab: int | None,
    rows: dict[str, int],
    mass: dict[str, float],
) -> Finding:
    """Embedding rows that stand for no token are never drawn and have probability exactly 0 on both
    sides.

    `sampled`: the ids drawn; `width`: ids of the tokenizer; `valid_vocab`: where the run masks
    from; `rows` of the embeddings and `mass`, the largest probability of the ids from `width` on,
    by role.
    """
    problems: list[Problem] = []
    if drawn := int((sampled >= width).sum()):
        problems.append(
            (
                "fault",
                f"{drawn} of {sampled.size} sampled tokens are ids from {width} on, which stand for no token",
            )
        )
    for role, probability in mass.items():
        if probability != 0:
            found = f"the {role} gives its padded ids {width} to {rows[role] - 1} a probability of up to {probability:.3g}"
            problems.append(
                (
                    "fault",
                    f"{found}; expected exactly 0: the run masks ids from {valid_vocab} on, set valid_vocab to {width}",
                )
            )
    padding = ", ".join(f"{role} {count - width}" for role, count in rows.items())
    return verdict(
        "padded_vocabulary",
        problems,
        f"{width} tokens; embedding rows beyond them ({padding}) have probability 0",
    )


def check_sampler_matches_scorer(
    sampled: np.ndarray,
    mask: np.ndarray,
    score_at: Callable[[float], np.ndarray],
    temperature: float,
    dtype: str,
    backend: str,
) -> Finding:
    """The sampler's unfiltered log-probs `[B, T]` are the scorer's on the columns of `mask`.

    `score_at(temperature)` gives the scorer's `[B, T]`, on the columns beside the mask too: a
    mismatch is then told apart into a shifted mask, shifted log-probs, another temperature, or none
    of these.
    """
    allowed, scores = tolerance(backend, dtype), score_at(temperature)

    def gap(
        mask: np.ndarray, sampled: np.ndarray = sampled, scores: np.ndarray = scores
    ) -> tuple[float, float]:
        difference = np.abs(sampled - scores)[mask]
        return float(difference.mean()), float(difference.max())

    def agrees(mean: float, largest: float) -> bool:
        return mean <= allowed.mean and largest <= allowed.largest

    if not mask.any():
        return Finding(
            "sampler_matches_scorer", "fault", "no token is masked in; expected the sampled tokens"
        )
    mean, largest = gap(mask)
    measured = f"log-probs differ by {largest:.2g} at most and {mean:.2g} on average over {int(mask.sum())} tokens"
    if agrees(mean, largest):
        return Finding("sampler_matches_scorer", "ok", f"{measured} ({dtype})")
    causes = []
    for side, step in _SIDES:
        if agrees(*gap(np.roll(mask, -step, axis=1))):
            causes.append(f"the mask is shifted by one column to the {side}")
        if agrees(*gap(mask, sampled=np.roll(sampled, -step, axis=1))):
            causes.append(f"the sampler's log-probs are shifted by one column to the {side}")
    if not causes and temperature != 1 and agrees(*gap(mask, scores=score_at(1.0))):
        causes.append(
            f"the sampler's log-probs are those of temperature 1, the scorer's of {temperature:g}"
        )
    expected = f"expected at most {allowed.largest:g} and {allowed.mean:g} in {dtype}"
    cause = (
        "; ".join(causes)
        or "neither a shift nor a temperature explains it: are weights and numerics the same on both sides?"
    )
    status: Status = "fault" if causes or not mean <= allowed.mean else "warning"
    return Finding("sampler_matches_scorer", status, f"{measured}; {expected}; {cause}")


def check_logprob_gap(gap: float, dtype: str, backend: str) -> Finding:
    """The same from a step's `rollout/logprob_gap`, the mean difference between behaviour and
    student log-probs.
    """
    allowed = tolerance(backend, dtype).mean
    if gap <= allowed:
        return Finding("sampler_matches_scorer", "ok", f"log-probs differ by {gap:.2g} on average")
    found = f"the sampler's log-probs differ from the update's by {gap:.2g} on average; expected at most {allowed:g} in {dtype}"
    return Finding(
        "sampler_matches_scorer",
        "fault",
        f"{found}; `opdjax doctor` with the same options tells why",
    )


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one update would learn: means over the sampled tokens, and the norm of the whole
    gradient.
    """

    log_ratio: float  # mean |teacher - student log-prob|
    kl: float
    loss: float
    gradient_norm: float

    def __str__(self) -> str:
        return f"mean |log-ratio| {self.log_ratio:.2g}, KL {self.kl:.2g}, loss {self.loss:.2g}, gradient norm {self.gradient_norm:.2g}"


def check_self_distillation(
    of_itself: Lesson,
    of_teacher: Lesson,
    recipe: str,
    vanishes: bool,
    dtypes: tuple[str, str],
    backend: str,
) -> Finding:
    """The student's own weights, through the teacher's path and type, teach the student nothing.

    `vanishes`: whether the recipe's loss and gradient are 0 at student = teacher; `dtypes` of
    student and teacher.
    """
    allowed = tolerance(backend, *dtypes)
    problems: list[Problem] = []
    # Against the teacher the norm may be infinite or NaN: it then is no measure of what is small.
    measure = of_teacher.gradient_norm if np.isfinite(of_teacher.gradient_norm) else 0.0
    largest_norm = max(allowed.gradient * measure, 10 * allowed.mean)
    if not (of_itself.log_ratio <= allowed.mean and abs(of_itself.kl) <= allowed.mean):
        cause = (
            f"the student computes in {dtypes[0]}, the teacher in {dtypes[1]}: "
            if dtypes[0] != dtypes[1]
            else ""
        )
        advice = f"{cause}give both one type (--student.dtype, --teacher.dtype) and one masking of the vocabulary"
        problems.append(
            (
                "fault",
                f"a student that is its own teacher disagrees with itself: {of_itself}; expected 0; {advice}",
            )
        )
    elif vanishes and not (
        abs(of_itself.loss) <= allowed.mean and of_itself.gradient_norm <= largest_norm
    ):
        problems.append(
            (
                "fault",
                f"recipe {recipe!r} moves a student that is its own teacher: {of_itself}; expected 0; check its options",
            )
        )
    fine = f"a student that is its own teacher has nothing to learn: {of_itself}"
    if not vanishes:
        fine = f"a student that is its own teacher agrees with itself: {of_itself} (for recipe {recipe!r} the last two need not be 0)"
    return verdict("self_distillation", problems, fine, [f"against the teacher: {of_teacher}"])


def check_teacher_dtype(
    difference: np.ndarray, student: str, teacher: str, stored: str, backend: str
) -> Finding:
    """The teacher says in its configured type what its weights say in float32.

    `difference`: of its log-probs of the sampled tokens between the two; then the types of student,
    teacher and checkpoint.
    """
    if teacher == "float32":
        return Finding(
            "teacher_dtype", "ok", f"the teacher computes in float32 (stored as {stored})"
        )
    mean, allowed = float(difference.mean()), tolerance(backend, student, teacher).mean
    found = f"the teacher computes in {teacher} (stored as {stored}), {mean:.2g} a token and at most {difference.max():.2g} from float32"
    problems: list[Problem] = []
    if student != teacher and not mean <= allowed:
        why = f"expected at most {allowed:g}, as the student computes in {student} and would learn this rounding"
        problems.append(("fault", f"{found}; {why}; set --teacher.dtype {student}"))
    elif stored == "float32" or not mean <= allowed:
        problems.append(
            (
                "warning",
                f"{found}; --teacher.dtype float32 keeps what the checkpoint holds, at twice the memory",
            )
        )
    return verdict("teacher_dtype", problems, found)


def check_repeated_scores(
    first: np.ndarray, again: np.ndarray, otherwise: np.ndarray, how: str, dtype: str, backend: str
) -> Finding:
    """Two scorings of one batch are bit-equal; in other parts and with more padding, or packed,
    they differ by rounding only.

    `otherwise`: the scores of the latter, `how` what the parts were cut from.
    """
    allowed = tolerance(backend, dtype).largest
    # Equal infinities and NaNs are no difference: what they mean is for other checks.
    is_same = lambda other: (first == other) | (np.isnan(first) & np.isnan(other))
    apart = lambda other: float(
        np.max(np.abs(np.where(is_same(other), 0, first - other)), initial=0)
    )
    repeated, moved = apart(again), apart(otherwise)
    problems: list[Problem] = []
    if repeated != 0:
        found = f"two teacher scorings of one batch differ by up to {repeated:.2g}; expected the same bits"
        problems.append(
            (
                "warning" if repeated <= allowed else "fault",
                f"{found}: a run will not repeat; look for nondeterministic kernels",
            )
        )
    if not moved <= allowed:
        found = f"in other parts and with {how} the teacher's log-probs change by up to {moved:.2g}; expected at most {allowed:g}"
        problems.append(
            (
                "fault",
                f"{found}: the teacher reads what is not of the rollout, check its segment ids",
            )
        )
    return verdict(
        "repeated_scores",
        problems,
        f"twice the same bits; {moved:.2g} apart in other parts and with {how}",
    )


def check_teacher_is_better(
    student: np.ndarray,
    teacher: np.ndarray,
    text: str,
    vocab: int,
    correct: tuple[int, int] | None = None,
    *,
    is_student: bool = False,
) -> Finding:
    """The teacher knows the text, and better than the student does.

    `student` and `teacher`: NLL a token of each text `[P]`; `text`: `reference answers` or
    `prompts`; `correct`: how many greedy answers of student and teacher are right, where that can
    be told; `is_student`: they are one model, and the teacher is shown more.
    """
    name, is_known = "teacher_is_better", text == "reference answers"
    measured = (
        f"NLL of the {text}: teacher {teacher.mean():.3g}, student {student.mean():.3g} a token"
    )
    if correct is not None:
        measured += (
            f"; right greedy answers: teacher {correct[1]}, student {correct[0]} of {len(teacher)}"
        )
    if not teacher.mean() < np.log(vocab) / 2:
        advice = f"expected less than ln(V)/2 = {np.log(vocab) / 2:.2f}: are these its weights, its tokenizer and its prompt format?"
        return Finding(
            name,
            "fault" if is_known or np.isnan(teacher).any() else "warning",
            f"{measured}; {advice}",
        )
    if not is_known:
        return Finding(
            name, "ok", f"{measured} (without reference answers this does not rank them)"
        )
    behind = teacher - student
    if behind.mean() <= 0:
        return Finding(name, "ok", measured)
    # A post-trained teacher may well phrase answers unlike the references; then its answers must
    # speak for it.
    if correct is not None and correct[1] > correct[0]:
        return Finding(
            name,
            "ok",
            f"{measured}: it words its answers unlike the references, and is right more often",
        )
    # Clear: by more than two standard errors over the prompts.
    is_clear = behind.mean() > 2 * behind.std() / np.sqrt(max(len(behind) - 1, 1))
    advice = (
        "expected the teacher ahead: student and teacher look swapped (check --student.path and --teacher.path), "
        "or the teacher does not know its prompt format"
    )
    if is_student:
        advice = "expected the teacher ahead: the model makes no use of what data.teacher_prompt_format shows it; reword that"
    return Finding(
        name, "fault" if is_clear and correct is not None else "warning", f"{measured}; {advice}"
    )


def check_mask(
    batch: TrainBatch, rollouts: Rollouts, prompt_width: int, stop_token_ids: Sequence[int]
) -> Finding:
    """Mask 1 on exactly the sampled tokens, the stop token included, and on no first token and no
    padding.

    What was sampled is told from the tokens themselves: in a row with a prompt, every column from
    `prompt_width` on up to the first stop token. Of given answers, which may lack one, it is what
    the rollouts say.
    """
    mask, segments = np.asarray(batch.mask).astype(bool), np.asarray(batch.segment_ids)
    tokens, has_prompt = (
        np.asarray(rollouts.tokens),
        np.asarray(rollouts.segment_ids)[:, :prompt_width].any(axis=1),
    )
    is_stop = np.isin(tokens[:, prompt_width:], np.asarray(stop_token_ids))
    sampled = np.zeros(tokens.shape, bool)
    sampled[:, prompt_width:] = has_prompt[:, None] & (np.cumsum(is_stop, axis=1) - is_stop == 0)
    if rollouts.behavior_logprobs is None:
        sampled = np.asarray(rollouts.mask).astype(bool)
    problems: list[Problem] = []
    if mask.shape == sampled.shape and not np.array_equal(mask, sampled):
        row, column = np.argwhere(mask != sampled)[0]
        found = f"the mask is {int(mask[row, column])} on a token that was {'' if sampled[row, column] else 'not '}sampled"
        shifts = [
            side for side, step in _SIDES if np.array_equal(np.roll(sampled, step, axis=1), mask)
        ]
        cause = f"the mask is shifted by one column to the {shifts[0]}; " if shifts else ""
        problems.append(
            (
                "fault",
                f"{cause}{found}, first at row {row}, column {column}; expected 1 on exactly the sampled tokens",
            )
        )
    if (masked := int(mask.sum())) != (drawn := int(sampled.sum())):
        problems.append(("fault", f"{masked} tokens are masked in, {drawn} were sampled"))
    if padding := int((mask & (segments == 0)).sum()):
        problems.append(("fault", f"{padding} tokens of padding are masked in; expected none"))
    starts = np.diff(segments, axis=1, prepend=0) != 0
    if first := int((mask & starts & (segments > 0)).sum()):
        problems.append(
            ("fault", f"{first} sequences have mask 1 on their first token, which nothing predicts")
        )
    return verdict(
        "mask", problems, f"1 on exactly the {drawn} sampled tokens, stop tokens included"
    )


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A few prompts of a run, and what its models say on them before anything is trained."""

    indices: np.ndarray
    prompts: PromptBatch
    student_params: Params  # in the type of the forward pass
    student_head: Head
    rollouts: Rollouts
    batch: TrainBatch
    teacher_scores: np.ndarray  # log-probs of the sampled tokens [B, T], nats
    teacher_answers: Rollouts  # greedy


def check_settings(setup: Setup) -> list[Finding]:
    """The checks that need no forward pass."""
    if not reads_scores(setup.config):
        setup = _alone(setup)
    return [
        _tokenizers(setup),
        _stop_tokens(setup),
        _chat_template(setup),
        _sampling_filter(setup),
        *_staleness(setup),
    ]


def check_first_step(
    setup: Setup, batch: TrainBatch, rollouts: Rollouts, prompts: PromptBatch, metrics: Metrics
) -> list[Finding]:
    """The mask of the first batch, and the sampler against the update by that step's own metrics."""
    if (
        setup.config.is_judged
    ):  # a rollout that is left out, because nobody could score it, stands in no segment
        is_kept = np.asarray(batch.segment_ids).any(axis=1)
        batch, rollouts = jax.tree.map(lambda x: np.asarray(x)[is_kept], (batch, rollouts))
    findings = [check_mask(batch, rollouts, prompts.tokens.shape[1], setup.decoding.stop_token_ids)]
    # The metric compares with the behaviour, which a filter moves away from what is scored.
    if "rollout/logprob_gap" in metrics and not setup.decoding.has_filter:
        findings.append(
            check_logprob_gap(
                metrics["rollout/logprob_gap"], _coarsest_dtype(setup), jax.default_backend()
            )
        )
    return findings


def _staleness(setup: Setup) -> list[Finding]:
    """A warning where tokens of an older policy are weighed as if they were the student's own."""
    config, near = setup.config, setup.config.near_policy
    recipe, options = bind(config.estimator.recipe, config.estimator.options)
    is_stale = near.schedule == "refresh" or near.max_staleness > 0
    is_weighed = (
        recipe.reward != "none" or options.get("importance", "none") != "none"
    )  # recipes of rewards have a ratio of their own
    if not is_stale or not recipe.is_policy_gradient or is_weighed:
        return []
    why = f"recipe {config.estimator.recipe!r} weighs tokens that an older policy drew as its own, so its gradient is biased"
    return [
        Finding(
            "staleness",
            "warning",
            f"{why}; set estimator.importance, or use a divergence, which draws no token",
        )
    ]


def _coarsest_dtype(setup: Setup) -> str:
    """The type that decides how well sampler and update agree: keys and values may be stored in
    fewer bits than are computed with.
    """
    return "bfloat16" if setup.config.sampling.kv_dtype in ("int8", "bfloat16") else setup.dtype


def _alone(setup: Setup, params: Params | None = None, head: Head | None = None) -> Setup:
    """The run with the student in its teacher's place: where no scores are compared, only the
    student can be at fault.
    """
    itself = Teacher(
        setup.student, params, head, setup.tokenizer, setup.decoding, shares_vocabulary=True
    )
    return dataclasses.replace(
        setup, teacher=itself, prompts=dataclasses.replace(setup.prompts, teacher_ids=None)
    )


def _tokenizers(setup: Setup, specimen: Specimen | None = None) -> Finding:
    return check_tokenizers(setup.tokenizer, setup.teacher.tokenizer, setup.config.estimator.recipe)


def _stop_tokens(setup: Setup, specimen: Specimen | None = None) -> Finding:
    sampling = setup.config.sampling
    finding = check_stop_tokens(
        setup.decoding.stop_token_ids,
        (setup.student.stop_token_ids, setup.teacher.checkpoint.stop_token_ids),
        (setup.tokenizer, setup.teacher.tokenizer),
        setup.config.data,
        more=sampling.stop_token_ids,
        endings=_endings(specimen.teacher_answers)
        if specimen is not None and reads_scores(setup.config)
        else None,
    )
    # Given answers are made to end where the student does; only what it is sampled for later can
    # run on.
    is_mended = finding.status == "fault" and sampling.completions_from != "student"
    return dataclasses.replace(finding, status="warning") if is_mended else finding


def _chat_template(setup: Setup, specimen: Specimen | None = None) -> Finding:
    return check_chat_template(
        setup.config.data, (setup.tokenizer, setup.teacher.tokenizer), setup.prompts
    )


def _sampling_filter(setup: Setup, specimen: Specimen | None = None) -> Finding:
    config, removed = setup.config, None
    is_sampled = (
        config.sampling.completions_from == "student"
    )  # given answers pass no filter of the student's
    if specimen is not None and is_sampled:
        drawn = specimen.rollouts
        removed = (np.asarray(drawn.behavior_logprobs) - np.asarray(drawn.unfiltered_logprobs))[
            np.asarray(drawn.mask)
        ]
    return check_sampling_filter(
        config.estimator.recipe,
        RECIPES[config.estimator.recipe].is_policy_gradient,
        setup.decoding.has_filter and is_sampled,
        removed,
        None if specimen is None else _altered_sampling(config.evaluation),
    )


def _endings(rollouts: Rollouts) -> np.ndarray:
    """The last token of each answer `[B]`; -1 where the length ran out."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return np.where(np.asarray(rollouts.is_truncated), -1, tokens[np.arange(len(tokens)), last])


def _altered_sampling(evaluation: EvaluationConfig) -> str | None:
    """The evaluation's temperature and filters, where they change the distribution."""
    named = {
        "temperature": (evaluation.temperature, 1),
        "top_p": (evaluation.top_p, 1),
        "top_k": (evaluation.top_k, 0),
    }
    changed = [f"{name} {value:g}" for name, (value, plain) in named.items() if value != plain]
    return None if evaluation.source is None else ", ".join(changed) or None

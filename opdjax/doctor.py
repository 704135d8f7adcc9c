"""Faults that no error message tells of: a few prompts go through a run's own sampler, scorers and loss, and are compared.

`examine` makes every check and is the verb `opdjax doctor`. `check_settings` and `check_first_step` are the ones that
cost nothing beside a run; `train` makes them. What is judged, and how, is in checks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax import checks
from opdjax.checks import Finding
from opdjax.config import Config, EvaluationConfig
from opdjax.data.chat import valid_vocab
from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import PromptSet, collate, indices_at
from opdjax.estimators import RECIPES, bind
from opdjax.evals.evaluate import completions
from opdjax.evals.grading import GRADERS
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.models.hf import Checkpoint, load_params
from opdjax.ops.vocab import Columns, Head, tiled_stats
from opdjax.sampler import Decoding, sample
from opdjax.scoring.local import score
from opdjax.train_state import UpdateSpec, loss_and_grad
from opdjax.types import PromptBatch, Rollouts, TeacherScores, TrainBatch

# At student = teacher the losses of these recipes and their gradients are 0; others hold to something beside the teacher too.
VANISHING = ("opd", "vopd", "full_kl")
_PADDING = 16  # columns added when scores are repeated


@dataclasses.dataclass(frozen=True)
class Subject:
    """The parts of a run that the checks look at."""

    config: Config
    student: Checkpoint
    teacher: Checkpoint
    tokenizer: Any
    teacher_tokenizer: Any
    student_dtype: str  # of the forward pass
    teacher_params: Params
    teacher_head: Head
    prompts: PromptSet
    decoding: Decoding

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's and the teacher's."""
        return self.tokenizer, self.teacher_tokenizer

    @property
    def teacher_dtype(self) -> str:
        """Of the teacher's forward pass."""
        return str(self.teacher_params["embedding"].dtype)


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


# What `train` runs


def check_settings(subject: Subject) -> list[Finding]:
    """The checks that need no forward pass."""
    recipe = subject.config.estimator.recipe
    return [
        checks.check_tokenizers(*subject.tokenizers, recipe),
        _stop_tokens(subject),
        checks.check_chat_template(subject.config.data, subject.tokenizers, subject.prompts),
        checks.check_sampling_filter(recipe, RECIPES[recipe].is_policy_gradient, subject.decoding.has_filter),
    ]


def check_first_step(
    batch: TrainBatch, rollouts: Rollouts, prompts: PromptBatch, metrics: dict[str, float], decoding: Decoding, dtype: str
) -> list[Finding]:
    """The mask of the first batch, and the sampler against the update by that step's own metrics."""
    findings = [checks.check_mask(batch, rollouts, prompts.tokens.shape[1], decoding.stop_token_ids)]
    # The metric compares with the behaviour, which a filter moves away from what is scored.
    if "rollout/logprob_gap" in metrics and not decoding.has_filter:
        findings.append(checks.check_logprob_gap(metrics["rollout/logprob_gap"], dtype, jax.default_backend()))
    return findings


# What `opdjax doctor` runs


def examine(subject: Subject, num_prompts: int = 8) -> Iterator[Finding]:
    """Every check, each finding as soon as it is made, on the prompts that the run takes first."""
    bind(subject.config.estimator.recipe, subject.config.estimator.options)
    specimen = take_specimen(subject, num_prompts)
    return (check(subject, specimen) for check in _CHECKS)


def take_specimen(subject: Subject, num_prompts: int) -> Specimen:
    """Sample and score a few prompts as the run would."""
    config, decoding = subject.config, subject.decoding
    indices = indices_at(0, min(num_prompts, len(subject.prompts)), len(subject.prompts), config.seed)
    prompts = collate(subject.prompts, indices)
    params = _load(subject, subject.student, subject.student_dtype)
    head = head_of(params, valid_vocab=decoding.valid_vocab, temperature=decoding.temperature)
    rollouts = sample(params, prompts, config.seed, 0, config=subject.student.config, decoding=decoding)
    batch = to_train_batch(rollouts, prompts)
    scores = _teacher_logprobs(subject, batch)
    answers = _greedy(subject, subject.teacher_params, subject.teacher.config, _as_teacher_sees(prompts))
    return Specimen(indices, prompts, params, head, rollouts, batch, scores, answers)


def _load(subject: Subject, checkpoint: Checkpoint, dtype: str) -> Params:
    """Weights placed as the teacher's are, so that one compiled program serves both models where their shapes agree."""
    return load_params(checkpoint, dtype, subject.teacher_params["embedding"].sharding)


def _logprobs(params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, tile: int, parts: int = 1) -> np.ndarray:
    """Log-probs `[B, T]` of the batch's tokens, by the scorer that the run's teacher goes through."""
    return np.asarray(score(params, head, batch, config=model, needs="token", tile=tile, parts=parts).token_logprobs)


def _teacher_logprobs(subject: Subject, batch: TrainBatch, parts: int = 1) -> np.ndarray:
    return _logprobs(subject.teacher_params, subject.teacher_head, batch, subject.teacher.config, subject.config.estimator.tile, parts)


def _own_view(batch: TrainBatch) -> TrainBatch:
    """The batch as the student reads it."""
    return dataclasses.replace(batch, teacher_view=None)


def _with_kernel_of(head: Head, params: Params) -> Head:
    """The head's masking and temperature with the weights of `params`."""
    return dataclasses.replace(head, kernel=head_of(params).kernel)


# One function a check: it measures, checks.py judges


def _tokenizers(subject: Subject, specimen: Specimen) -> Finding:
    return checks.check_tokenizers(*subject.tokenizers, subject.config.estimator.recipe)


def _padded_vocabulary(subject: Subject, specimen: Specimen) -> Finding:
    width, tile = valid_vocab(subject.tokenizer), subject.config.estimator.tile
    sides = {
        "student": (specimen.student_params, specimen.student_head, _own_view(specimen.batch), subject.student.config),
        "teacher": (subject.teacher_params, subject.teacher_head, specimen.batch, subject.teacher.config),
    }
    rows = {role: side[0]["embedding"].shape[0] for role, side in sides.items()}
    mass = {role: float(_mass_beyond(*side, width, tile)) if rows[role] > width else 0.0 for role, side in sides.items()}
    sampled = np.asarray(specimen.rollouts.tokens)[np.asarray(specimen.rollouts.mask)]
    return checks.check_padded_vocabulary(sampled, width, subject.decoding.valid_vocab, rows, mass)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _mass_beyond(params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, width: int, tile: int) -> jax.Array:
    """The largest probability that any scored position gives to the ids from `width` on, all together."""
    hidden = score(params, head, batch, config=model, needs="vocabulary", tile=tile).hidden
    beyond = lambda tile, _, row: jnp.sum(jnp.exp(tile.logprobs[:, width:]), axis=-1)  # noqa: E731
    return jnp.max(tiled_stats(beyond, hidden, head, batch.mask, Columns(batch.tokens), tile=tile))


def _stop_tokens(subject: Subject, specimen: Specimen | None = None) -> Finding:
    return checks.check_stop_tokens(
        subject.decoding.stop_token_ids,
        (subject.student.stop_token_ids, subject.teacher.stop_token_ids),
        subject.tokenizers,
        subject.config.data,
        more=subject.config.sampling.stop_token_ids,
        endings=None if specimen is None else _endings(specimen.teacher_answers),
    )


def _chat_template(subject: Subject, specimen: Specimen) -> Finding:
    return checks.check_chat_template(subject.config.data, subject.tokenizers, subject.prompts)


def _sampler_matches_scorer(subject: Subject, specimen: Specimen) -> Finding:
    mask = jnp.asarray(specimen.batch.mask)
    # Beside the mask too, where the tokens lie if it is shifted; nothing predicts column 0.
    near = (mask | jnp.roll(mask, 1, axis=1) | jnp.roll(mask, -1, axis=1)).at[:, 0].set(False)
    batch = dataclasses.replace(_own_view(specimen.batch), mask=near)

    def score_at(temperature: float) -> np.ndarray:
        head = dataclasses.replace(specimen.student_head, temperature=temperature)
        return _logprobs(specimen.student_params, head, batch, subject.student.config, subject.config.estimator.tile)

    sampled = np.asarray(specimen.rollouts.unfiltered_logprobs)
    return checks.check_sampler_matches_scorer(
        sampled, np.asarray(mask), score_at, subject.decoding.temperature, subject.student_dtype, jax.default_backend()
    )


def _sampling_filter(subject: Subject, specimen: Specimen) -> Finding:
    recipe, rollouts = subject.config.estimator.recipe, specimen.rollouts
    removed = (np.asarray(rollouts.behavior_logprobs) - np.asarray(rollouts.unfiltered_logprobs))[np.asarray(rollouts.mask)]
    evaluation = _altered_sampling(subject.config.evaluation)
    return checks.check_sampling_filter(recipe, RECIPES[recipe].is_policy_gradient, subject.decoding.has_filter, removed, evaluation)


def _altered_sampling(evaluation: EvaluationConfig) -> str | None:
    """The evaluation's temperature and filters, where they change the distribution."""
    named = {"temperature": (evaluation.temperature, 1), "top_p": (evaluation.top_p, 1), "top_k": (evaluation.top_k, 0)}
    changed = [f"{name} {value:g}" for name, (value, plain) in named.items() if value != plain]
    return None if evaluation.source is None else ", ".join(changed) or None


def _self_distillation(subject: Subject, specimen: Specimen) -> Finding:
    """Two updates' losses and gradients: with the student's own weights for a teacher, and with the teacher."""
    config = subject.config
    recipe = RECIPES[config.estimator.recipe]
    if recipe.teacher not in ("token", "vocabulary"):
        return Finding("self_distillation", "ok", f"not made: recipe {config.estimator.recipe!r} takes no log-probs from a teacher")
    # Its own view on both sides: through another template the student would be in another context.
    own, start = _own_view(specimen.batch), _load(subject, subject.student, "float32")
    spec, mask = _update_spec(subject, own.tokens.shape[0]), np.asarray(own.mask)

    def lesson(params: Params, head: Head, batch: TrainBatch, model: DecoderConfig) -> checks.Lesson:
        scores: TeacherScores = score(params, head, batch, config=model, needs=recipe.teacher, tile=config.estimator.tile)
        head = head if recipe.teacher == "vocabulary" else None
        loss, norm, outputs = _first_loss(start, dataclasses.replace(own, teacher=scores), head, spec)
        reward = np.asarray(outputs["reward"])
        kl = np.asarray(outputs.get("kl", -reward))
        return checks.Lesson(float(np.abs(reward)[mask].mean()), float(kl[mask].mean()), float(loss), float(norm))

    weights = _load(subject, subject.student, subject.teacher_dtype)
    of_itself = lesson(weights, _with_kernel_of(subject.teacher_head, weights), own, subject.student.config)
    of_teacher = lesson(subject.teacher_params, subject.teacher_head, specimen.batch, subject.teacher.config)
    name = config.estimator.recipe
    dtypes = subject.student_dtype, subject.teacher_dtype
    return checks.check_self_distillation(of_itself, of_teacher, name, name in VANISHING, dtypes, jax.default_backend())


@partial(jax.jit, static_argnames="spec")
def _first_loss(params: Params, batch: TrainBatch, head: Head | None, spec: UpdateSpec):
    """(loss, norm of the gradient, outputs) of the run's own update."""
    loss, gradient, outputs = loss_and_grad(params, batch, head, spec, *bind(spec.estimator.recipe, spec.estimator.options))
    return loss, jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))), outputs


def _update_spec(subject: Subject, rows: int) -> UpdateSpec:
    """The run's own update, in micro-batches no larger than the run's."""
    config = subject.config
    most = max(config.rows_per_step // config.train.gradient_accumulation_steps, 1)
    return UpdateSpec(
        model=subject.student.config,
        estimator=config.estimator,
        dtype=subject.student_dtype,
        max_completion_length=config.sampling.max_completion_length,
        gradient_accumulation_steps=next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most),
        temperature=subject.decoding.temperature,
        valid_vocab=subject.decoding.valid_vocab,
        remat=config.train.remat,
    )


def _teacher_dtype(subject: Subject, specimen: Specimen) -> Finding:
    difference = np.zeros(1)
    if subject.teacher_dtype != "float32":
        params = _load(subject, subject.teacher, "float32")
        head = _with_kernel_of(subject.teacher_head, params)
        exact = _logprobs(params, head, specimen.batch, subject.teacher.config, subject.config.estimator.tile)
        difference = np.abs(specimen.teacher_scores - exact)[np.asarray(specimen.batch.mask)]
    dtypes = subject.student_dtype, subject.teacher_dtype
    return checks.check_teacher_dtype(difference, *dtypes, subject.teacher.stored_dtype, jax.default_backend())


def _repeated_scores(subject: Subject, specimen: Specimen) -> Finding:
    again = _teacher_logprobs(subject, specimen.batch)
    parts = 1 if specimen.batch.tokens.shape[0] % 2 else 2
    otherwise = _teacher_logprobs(subject, _with_padding(specimen.batch, _PADDING), parts)[:, _PADDING:]
    first, mask = specimen.teacher_scores, np.asarray(specimen.batch.mask)
    return checks.check_repeated_scores(first[mask], again[mask], otherwise[mask], subject.teacher_dtype, jax.default_backend())


def _with_padding(batch: TrainBatch, columns: int) -> TrainBatch:
    """The batch with empty columns on the left, in the teacher's view too."""
    widen = lambda x: jnp.pad(x, [(0, 0), (columns, 0)])  # noqa: E731
    view = batch.teacher_view
    if view is not None:
        view = dataclasses.replace(jax.tree.map(widen, view), columns=widen(view.columns + columns))
    return dataclasses.replace(jax.tree.map(widen, _own_view(batch)), teacher_view=view)


def _teacher_is_better(subject: Subject, specimen: Specimen) -> Finding:
    rows = [subject.prompts.prompts[i] for i in specimen.indices]
    has_references = all(row.references and row.references[0] for row in rows)
    texts = [subject.tokenizer.encode(row.references[0], add_special_tokens=False) if has_references else [] for row in rows]
    student = _nll(subject, specimen.student_params, subject.student, subject.prompts.student_ids, specimen.indices, texts)
    seen = subject.prompts.teacher_ids or subject.prompts.student_ids
    teacher = _nll(subject, subject.teacher_params, subject.teacher, seen, specimen.indices, texts)
    correct = None
    if subject.config.evaluation.source is not None and all(row.answer is not None for row in rows):
        grade = GRADERS[subject.config.evaluation.grader]
        answers = _greedy(subject, specimen.student_params, subject.student.config, specimen.prompts), specimen.teacher_answers
        correct = tuple(
            sum(bool(grade(text, row.answer)) for text, row in zip(completions(rollouts, subject.tokenizer), rows)) for rollouts in answers
        )
    text = "reference answers" if has_references else "prompts"
    return checks.check_teacher_is_better(student, teacher, text, valid_vocab(subject.tokenizer), correct)


def _nll(subject: Subject, params: Params, checkpoint: Checkpoint, prompts, indices, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """The mean negative log-likelihood a token of each text `[P]` after its prompt, nats at temperature 1.

    Where there is no text, that of the prompt's tokens but the first.
    """
    prompts = [prompts[i] for i in indices]
    width = -(-max(len(p) + len(t) for p, t in zip(prompts, texts)) // 16) * 16
    tokens, mask, segments = (np.zeros((len(prompts), width), kind) for kind in (np.int32, bool, np.int32))
    for row, (prompt, text) in enumerate(zip(prompts, texts)):
        end = len(prompt) + len(text)
        tokens[row, :end], segments[row, :end] = [*prompt, *text], 1
        mask[row, len(prompt) if text else 1 : end] = True
    batch = TrainBatch(tokens, mask, segments, np.zeros(tokens.shape, np.float32))
    head = head_of(params, valid_vocab=subject.decoding.valid_vocab)
    logprobs = _logprobs(params, head, batch, checkpoint.config, subject.config.estimator.tile)
    return -logprobs.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)


def _as_teacher_sees(prompts: PromptBatch) -> PromptBatch:
    if prompts.teacher_tokens is None:
        return prompts
    return dataclasses.replace(prompts, tokens=prompts.teacher_tokens, mask=prompts.teacher_mask)


def _greedy(subject: Subject, params: Params, model: DecoderConfig, prompts: PromptBatch) -> Rollouts:
    """Greedy answers, each until any id with which one of the two models may end."""
    known = {*subject.decoding.stop_token_ids, *subject.teacher.stop_token_ids, *subject.student.stop_token_ids}
    known |= {tokenizer.eos_token_id for tokenizer in subject.tokenizers} - {None}
    decoding = Decoding(subject.decoding.max_completion_length, tuple(sorted(known)), 0.0, valid_vocab=subject.decoding.valid_vocab)
    prompts = dataclasses.replace(prompts, teacher_tokens=None, teacher_mask=None)
    return sample(params, prompts, 0, 0, config=model, decoding=decoding)


def _endings(rollouts: Rollouts) -> np.ndarray:
    """The last token of each answer `[B]`; -1 where the length ran out."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    return np.where(np.asarray(rollouts.is_truncated), -1, tokens[np.arange(len(tokens)), last])


def _mask(subject: Subject, specimen: Specimen) -> Finding:
    width = specimen.prompts.tokens.shape[1]
    return checks.check_mask(specimen.batch, specimen.rollouts, width, subject.decoding.stop_token_ids)


_CHECKS = (
    _tokenizers,
    _padded_vocabulary,
    _stop_tokens,
    _chat_template,
    _sampler_matches_scorer,
    _sampling_filter,
    _self_distillation,
    _teacher_dtype,
    _repeated_scores,
    _teacher_is_better,
    _mask,
)

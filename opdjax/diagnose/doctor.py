"""`opdjax doctor`: finds mistakes that would train without an error.

A few prompts go through the run's own sampler, scorers and loss. This file measures; checks.py and
rollouts/checks.py judge the measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config import Config, MeshConfig
from opdjax.config.validation import require
from opdjax.data.chat import load_tokenizer, valid_vocab
from opdjax.data.grading import GRADERS
from opdjax.data.packing import for_teacher, pack, to_train_batch, unpack
from opdjax.data.prompts import collate, indices_at
from opdjax.diagnose import checks
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.engine.update import UpdateSpec, loss_and_grad
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.models.hf import Checkpoint, load_params, open_checkpoint
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TILE, TokenInputs, tiled_stats
from opdjax.rollouts.checks import (
    check_chat_template,
    check_mask,
    check_sampling_filter,
    check_stop_tokens,
    check_tokenizers,
    coarsest_dtype,
    with_student_as_teacher,
)
from opdjax.rollouts.findings import Finding
from opdjax.rollouts.rows import with_option_columns
from opdjax.rollouts.setup import (
    Setup,
    load_student,
    prepare,
    reads_scores,
    update_spec,
    with_current_teacher,
)
from opdjax.types import PromptBatch, Rollouts, TeacherScores, TrainBatch

_PADDING = 16  # columns added when scores are repeated


def run_checks(config: Config, num_prompts: int) -> Iterator[Finding]:
    """Yield every finding on a run of this config.

    If the tokenizers differ, that finding alone: the other checks compare ids.
    """
    require(num_prompts > 0, "--num-prompts", num_prompts, "at least 1")
    if reads_scores(config):
        tokenizers = [
            load_tokenizer(open_checkpoint(*model.place).path)
            for model in (config.student, config.teacher_model)
        ]
        vocabularies = check_tokenizers(*tokenizers, config.estimator.recipe)
        if vocabularies.status == "fault":
            yield vocabularies
            print("the other checks compare ids, so they were not made")
            return
    # A few rows need one device only and no separate generator.
    near_policy = dataclasses.replace(config.near_policy, generator="inline", lag="fixed")
    config = dataclasses.replace(config, mesh=MeshConfig(1), near_policy=near_policy)
    yield from examine(prepare(config), num_prompts)


def examine(setup: Setup, num_prompts: int = 8) -> Iterator[Finding]:
    """Yield the finding of every check on the run's first prompts, each as soon as it is made."""
    chosen = _CHECKS
    if not reads_scores(setup.config):
        params = _load(setup, setup.student, setup.dtype)
        head = head_of(params, valid_vocab=setup.decoding.valid_vocab)
        setup, chosen = with_student_as_teacher(setup, params, head), _STUDENT_CHECKS
    elif setup.config.teacher_is_student:
        setup = with_current_teacher(setup, _load(setup, setup.student, setup.dtype))
    first = first_batch(setup, num_prompts)
    return (check(setup, first) for check in chosen)


@dataclasses.dataclass(frozen=True)
class FirstBatch:
    """A few prompts of a run, with rollouts and scores of its untrained models."""

    indices: np.ndarray
    prompts: PromptBatch
    student_params: Params  # in the type of the forward pass
    student_head: Head
    rollouts: Rollouts
    batch: TrainBatch
    teacher_scores: np.ndarray  # log-probs of the sampled tokens [B, T], nats
    teacher_answers: Rollouts  # greedy


def first_batch(setup: Setup, num_prompts: int) -> FirstBatch:
    """Sample and score a few prompts as the run would."""
    config, decoding = setup.config, setup.decoding
    indices = indices_at(0, min(num_prompts, len(setup.prompts)), len(setup.prompts), config.seed)
    prompts = collate(setup.prompts, indices)
    params = _load(setup, setup.student, setup.dtype)
    head = head_of(params, valid_vocab=decoding.valid_vocab, temperature=decoding.temperature)
    model = setup.student.config
    rollouts = sample(params, prompts, config.seed, 0, config=model, decoding=decoding)
    batch = to_train_batch(rollouts, prompts)
    if reads_scores(config):  # otherwise rewards need whole groups, and no check reads them
        data = setup.prompts, setup.tokenizer
        batch, _ = with_option_columns(batch, rollouts, config, *data)
    teacher = setup.teacher
    answers = _greedy(setup, teacher.params, teacher.checkpoint.config, for_teacher(prompts))
    scores = _teacher_logprobs(setup, batch)
    return FirstBatch(indices, prompts, params, head, rollouts, batch, scores, answers)


def _load(setup: Setup, checkpoint: Checkpoint, dtype: str) -> Params:
    """Load weights placed as the teacher's: models of one shape then share a compiled program."""
    return load_params(checkpoint, dtype, setup.mesh)


def _logprobs(
    params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, tile: int, parts: int = 1
) -> np.ndarray:
    """Return log-probs `[B, T]` of the batch's tokens, from the scorer of the run's teacher."""
    scores = score(params, head, batch, config=model, needs="token", tile=tile, parts=parts)
    return np.asarray(scores.teacher_logprobs)


def _teacher_logprobs(setup: Setup, batch: TrainBatch, parts: int = 1) -> np.ndarray:
    teacher, tile = setup.teacher, TILE
    return _logprobs(teacher.params, teacher.head, batch, teacher.checkpoint.config, tile, parts)


def _student_view(batch: TrainBatch) -> TrainBatch:
    return dataclasses.replace(batch, teacher_view=None)


def _with_kernel_of(head: Head, params: Params) -> Head:
    """Return the head's masking and temperature with the weights of `params`."""
    return dataclasses.replace(head, kernel=head_of(params).kernel)


# One function a check


def _check_tokenizers(setup: Setup, first: FirstBatch) -> Finding:
    return check_tokenizers(setup.tokenizer, setup.teacher.tokenizer, setup.config.estimator.recipe)


def _check_stop_tokens(setup: Setup, first: FirstBatch) -> Finding:
    return check_stop_tokens(setup, first.teacher_answers if reads_scores(setup.config) else None)


def _check_chat_template(setup: Setup, first: FirstBatch) -> Finding:
    return check_chat_template(setup)


def _check_sampling_filter(setup: Setup, first: FirstBatch) -> Finding:
    return check_sampling_filter(setup, first.rollouts)


def _check_padded_vocabulary(setup: Setup, first: FirstBatch) -> Finding:
    width, tile = valid_vocab(setup.tokenizer), TILE
    student = (first.student_params, first.student_head, _student_view(first.batch))
    teacher = (setup.teacher.params, setup.teacher.head, first.batch)
    inputs = {
        "student": (*student, setup.student.config),
        "teacher": (*teacher, setup.teacher.checkpoint.config),
    }
    rows = {role: each[0]["embedding"].shape[0] for role, each in inputs.items()}
    mass = {
        role: float(_mass_beyond(*each, width, tile)) if rows[role] > width else 0.0
        for role, each in inputs.items()
    }
    sampled = np.asarray(first.rollouts.tokens)[np.asarray(first.rollouts.mask)]
    return checks.check_padded_vocabulary(sampled, width, setup.decoding.valid_vocab, rows, mass)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _mass_beyond(
    params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, width: int, tile: int
) -> jax.Array:
    """Return the largest probability of all ids >= `width` together at any scored position."""
    hidden = score(params, head, batch, config=model, needs="vocabulary", tile=tile).hidden
    beyond = lambda tile, _, row: jnp.sum(jnp.exp(tile.logprobs[:, width:]), axis=-1)
    columns = TokenInputs(batch.tokens)
    return jnp.max(tiled_stats(beyond, hidden, head, batch.mask, columns, tile=tile))


def _check_sampler_matches_scorer(setup: Setup, first: FirstBatch) -> Finding:
    mask = jnp.asarray(first.batch.mask)
    # Score one column left and right of the mask too: the tokens are there if it is shifted.
    # Nothing predicts column 0.
    near = (mask | jnp.roll(mask, 1, axis=1) | jnp.roll(mask, -1, axis=1)).at[:, 0].set(False)
    batch = dataclasses.replace(_student_view(first.batch), mask=near)
    model, tile = setup.student.config, TILE

    def score_at(temperature: float) -> np.ndarray:
        head = dataclasses.replace(first.student_head, temperature=temperature)
        return _logprobs(first.student_params, head, batch, model, tile)

    return checks.check_sampler_matches_scorer(
        np.asarray(first.rollouts.unfiltered_logprobs),
        np.asarray(mask),
        score_at,
        setup.decoding.temperature,
        coarsest_dtype(setup),
        jax.default_backend(),
    )


def _check_self_distillation(setup: Setup, first: FirstBatch) -> Finding:
    """Compare two updates: with the student's own weights as the teacher, and with the teacher."""
    config = setup.config
    estimator = estimator_of(config.estimator)
    # The student's view on both sides: another template would put it into another context.
    own, weights = _student_view(first.batch), load_student(setup)
    spec, mask = _update_spec(setup, own.tokens.shape[0]), np.asarray(own.mask)
    # A recipe that reads no scores may still filter rollouts by token log-probs.
    needs = "token" if estimator.teacher == "none" else estimator.teacher
    read = partial(score, needs=needs, top_k=estimator.top_k, tile=TILE)

    def first_update(
        params: Params, head: Head, batch: TrainBatch, model: DecoderConfig
    ) -> checks.FirstUpdate:
        scores: TeacherScores = read(params, head, batch, config=model)
        head = head if needs == "vocabulary" else None
        batch = dataclasses.replace(own, teacher=scores)
        loss, norm, outputs = _first_loss(*weights, batch, head, spec)
        reward = np.asarray(outputs["rewards"])
        kl = np.asarray(outputs.get("kl", -reward))
        return checks.FirstUpdate(
            float(np.abs(reward)[mask].mean()), float(kl[mask].mean()), float(loss), float(norm)
        )

    teacher, params = setup.teacher, _load(setup, setup.student, setup.dtype)
    head = _with_kernel_of(teacher.head, params)
    return checks.check_self_distillation(
        first_update(params, head, own, setup.student.config),
        first_update(teacher.params, teacher.head, first.batch, teacher.checkpoint.config),
        config.estimator.recipe,
        estimator.recipe.is_zero_at_teacher(estimator.options),
        setup.dtype,
        jax.default_backend(),
    )


@partial(jax.jit, static_argnames="spec")
def _first_loss(
    params: Params, frozen: Params | None, batch: TrainBatch, head: Head | None, spec: UpdateSpec
):
    """Return (loss, norm of the gradient, outputs) of the run's own update."""
    loss, gradient, outputs, _ = loss_and_grad(params, batch, head, spec, frozen=frozen)
    return loss, jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))), outputs


def _update_spec(setup: Setup, rows: int) -> UpdateSpec:
    """Return the run's own update, in micro-batches no larger than the run's."""
    config = setup.config
    most = max(config.rows_per_step // config.train.gradient_accumulation_steps, 1)
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)
    return dataclasses.replace(update_spec(setup), gradient_accumulation_steps=parts, mesh=None)


def _check_teacher_dtype(setup: Setup, first: FirstBatch) -> Finding:
    checkpoint, difference = setup.teacher.checkpoint, np.zeros(1)
    if setup.dtype != "float32":
        params = _load(setup, checkpoint, "float32")
        head = _with_kernel_of(setup.teacher.head, params)
        exact = _logprobs(params, head, first.batch, checkpoint.config, TILE)
        difference = np.abs(first.teacher_scores - exact)[np.asarray(first.batch.mask)]
    return checks.check_teacher_dtype(
        difference, setup.dtype, checkpoint.stored_dtype, jax.default_backend()
    )


def _check_repeated_scores(setup: Setup, first: FirstBatch) -> Finding:
    batch, length = first.batch, setup.config.train.pack_length
    again, parts = _teacher_logprobs(setup, batch), 1 if batch.tokens.shape[0] % 2 else 2
    if length is None:
        layout = "more padding"
        regrouped = _teacher_logprobs(setup, _with_padding(batch, _PADDING), parts)[:, _PADDING:]
    else:
        layout = "packed rows"
        packed, source = pack(batch, length, parts=parts)
        regrouped = unpack(_teacher_logprobs(setup, packed, parts), source, batch.tokens.shape)
    mask = np.asarray(batch.mask)
    scores = (each[mask] for each in (first.teacher_scores, again, regrouped))
    return checks.check_repeated_scores(*scores, layout, setup.dtype, jax.default_backend())


def _with_padding(batch: TrainBatch, columns: int) -> TrainBatch:
    """Return the batch with empty columns on the left, also in the teacher's view."""
    widen = lambda x: jnp.pad(x, [(0, 0), (columns, 0), *[(0, 0)] * (x.ndim - 2)])
    view = batch.teacher_view
    if view is not None:
        view = dataclasses.replace(jax.tree.map(widen, view), columns=widen(view.columns + columns))
    return dataclasses.replace(jax.tree.map(widen, _student_view(batch)), teacher_view=view)


def _check_teacher_is_better(setup: Setup, first: FirstBatch) -> Finding:
    config, tokenizer, data = setup.config, setup.tokenizer, setup.prompts
    rows = [data.prompts[i] for i in first.indices]
    has_references = all(row.references and row.references[0] for row in rows)
    texts: list[list[int]] = [[] for _ in rows]
    if has_references:
        texts = [tokenizer.encode(row.references[0], add_special_tokens=False) for row in rows]
    nll = partial(_nll, setup, indices=first.indices, texts=texts)
    student = nll(first.student_params, setup.student.config, data.student_ids)
    model = setup.teacher.checkpoint.config
    teacher = nll(setup.teacher.params, model, data.teacher_ids or data.student_ids)
    correct = None
    if config.evaluation.source is not None and all(row.answer is not None for row in rows):
        answers = _greedy(setup, first.student_params, setup.student.config, first.prompts)
        grade = GRADERS[config.evaluation.grader]
        correct = tuple(
            sum(
                bool(grade(text, row.answer))
                for text, row in zip(completions(each, tokenizer), rows)
            )
            for each in (answers, first.teacher_answers)
        )
    return checks.check_teacher_is_better(
        student,
        teacher,
        "reference answers" if has_references else "prompts",
        valid_vocab(tokenizer),
        correct,
        is_student=config.teacher_is_student,
    )


def _nll(
    setup: Setup,
    params: Params,
    model: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    *,
    indices: np.ndarray,
    texts: Sequence[Sequence[int]],
) -> np.ndarray:
    """Return the mean NLL a token of each text `[P]` after its prompt, in nats at temperature 1.

    For an empty text, that of the prompt's tokens except the first.
    """
    prompts = [prompts[i] for i in indices]
    width = -(-max(len(p) + len(t) for p, t in zip(prompts, texts)) // 16) * 16
    shape = (len(prompts), width)
    tokens = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for row, (prompt, text) in enumerate(zip(prompts, texts)):
        end = len(prompt) + len(text)
        tokens[row, :end], segments[row, :end] = [*prompt, *text], 1
        mask[row, len(prompt) if text else 1 : end] = True
    batch = TrainBatch(tokens, mask, segments, np.zeros(shape, np.float32))
    head = head_of(params, valid_vocab=setup.decoding.valid_vocab)
    logprobs = _logprobs(params, head, batch, model, TILE)
    return -logprobs.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)


def _greedy(setup: Setup, params: Params, model: DecoderConfig, prompts: PromptBatch) -> Rollouts:
    """Sample greedy answers that stop at any id with which one of the two models may stop."""
    stops = {
        *setup.decoding.stop_token_ids,
        *setup.teacher.checkpoint.stop_token_ids,
        *setup.student.stop_token_ids,
        *(tokenizer.eos_token_id for tokenizer in (setup.tokenizer, setup.teacher.tokenizer)),
    }
    decoding = Decoding(
        setup.decoding.max_completion_length,
        tuple(sorted(stops - {None})),
        temperature=0.0,
        valid_vocab=setup.decoding.valid_vocab,
    )
    prompts = dataclasses.replace(prompts, teacher_tokens=None, teacher_mask=None)
    return sample(params, prompts, 0, 0, config=model, decoding=decoding)


def _check_mask(setup: Setup, first: FirstBatch) -> Finding:
    width, stops = first.prompts.tokens.shape[1], setup.decoding.stop_token_ids
    return check_mask(first.batch, first.rollouts, width, stops)


_STUDENT_CHECKS = (
    _check_padded_vocabulary,
    _check_stop_tokens,
    _check_sampler_matches_scorer,
    _check_sampling_filter,
    _check_mask,
)
_CHECKS = (
    _check_tokenizers,
    _check_padded_vocabulary,
    _check_stop_tokens,
    _check_chat_template,
    _check_sampler_matches_scorer,
    _check_sampling_filter,
    _check_self_distillation,
    _check_teacher_dtype,
    _check_repeated_scores,
    _check_teacher_is_better,
    _check_mask,
)

"""Faults that no error message tells of: a few prompts go through a run's own sampler, scorers and
loss, and are compared.

`examine` makes every check and is the verb `opdjax doctor`. `check_settings` and `check_first_step`
are the ones that cost nothing beside a run; `train` makes them. What is judged, and how, is in
checks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config import Config, EstimatorConfig, MeshConfig
from opdjax.config.validation import require
from opdjax.data.chat import load_tokenizer, valid_vocab
from opdjax.data.grading import GRADERS
from opdjax.data.packing import for_teacher, pack, to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.engine.update import UpdateSpec, loss_and_grad
from opdjax.estimators import bind
from opdjax.estimators.divergence import TOP_K_CONVENTIONS
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.models.hf import Checkpoint, load_params, open_checkpoint
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_stats
from opdjax.rollouts import checks
from opdjax.rollouts.checks import (
    Finding,
    Specimen,
    _alone,
    _chat_template,
    _coarsest_dtype,
    _sampling_filter,
    _stop_tokens,
    _tokenizers,
)
from opdjax.rollouts.on_policy import with_credit
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


# What `train` runs


# What `opdjax doctor` runs


def findings_of(config: Config, num_prompts: int) -> Iterator[Finding]:
    """Every check of `examine` on a run of this config; where the tokenizers do not agree, that
    alone, for the others compare ids.
    """
    require(num_prompts > 0, "--num-prompts", num_prompts, "at least 1")
    if reads_scores(config):
        tokenizers = [
            load_tokenizer(open_checkpoint(model.path, model.revision).path)
            for model in (config.student, config.teacher_model)
        ]
        vocabularies = checks.check_tokenizers(*tokenizers, config.estimator.recipe)
        if vocabularies.status == "fault":
            yield vocabularies
            print("the other checks compare ids, so they were not made")
            return
    # A few rows need no more than one device, need not divide over many, and are drawn by whoever
    # examines them.
    near_policy = dataclasses.replace(
        config.near_policy, generator="inline", generator_devices=1, lag="fixed"
    )
    yield from examine(
        prepare(dataclasses.replace(config, mesh=MeshConfig(1), near_policy=near_policy)),
        num_prompts,
    )


def examine(setup: Setup, num_prompts: int = 8) -> Iterator[Finding]:
    """Every check, each finding as soon as it is made, on the prompts that the run takes first."""
    bind(setup.config.estimator.recipe, setup.config.estimator.options)
    made = _CHECKS
    if not reads_scores(setup.config):
        params = _load(setup, setup.student, setup.dtype)
        setup, made = (
            _alone(setup, params, head_of(params, valid_vocab=setup.decoding.valid_vocab)),
            _CHECKS_OF_STUDENT,
        )
    elif setup.config.teacher_is_student:
        setup = with_current_teacher(setup, _load(setup, setup.student, setup.dtype))
    specimen = take_specimen(setup, num_prompts)
    return (check(setup, specimen) for check in made)


def take_specimen(setup: Setup, num_prompts: int) -> Specimen:
    """Sample and score a few prompts as the run would."""
    config, decoding = setup.config, setup.decoding
    indices = indices_at(0, min(num_prompts, len(setup.prompts)), len(setup.prompts), config.seed)
    prompts = collate(setup.prompts, indices)
    params = _load(setup, setup.student, setup.dtype)
    head = head_of(params, valid_vocab=decoding.valid_vocab, temperature=decoding.temperature)
    rollouts = sample(
        params, prompts, config.seed, 0, config=setup.student.config, decoding=decoding
    )
    batch = to_train_batch(rollouts, prompts)
    if reads_scores(config):  # rewards of whole groups are no part of what is looked at
        batch, _ = with_credit(setup, batch, rollouts)
    scores = _teacher_logprobs(setup, batch)
    answers = _greedy(
        setup, setup.teacher.params, setup.teacher.checkpoint.config, for_teacher(prompts)
    )
    return Specimen(indices, prompts, params, head, rollouts, batch, scores, answers)


def _load(setup: Setup, checkpoint: Checkpoint, dtype: str) -> Params:
    """Weights placed as the teacher's are, so that one compiled program serves both models where
    their shapes agree.
    """
    return load_params(checkpoint, dtype, setup.mesh)


def _logprobs(
    params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, tile: int, parts: int = 1
) -> np.ndarray:
    """Log-probs `[B, T]` of the batch's tokens, by the scorer that the run's teacher goes through."""
    return np.asarray(
        score(
            params, head, batch, config=model, needs="token", tile=tile, parts=parts
        ).token_logprobs
    )


def _teacher_type(setup: Setup) -> str:
    """Of the teacher's forward pass."""
    return str(setup.teacher.params["embedding"].dtype)


def _teacher_logprobs(setup: Setup, batch: TrainBatch, parts: int = 1) -> np.ndarray:
    return _logprobs(
        setup.teacher.params,
        setup.teacher.head,
        batch,
        setup.teacher.checkpoint.config,
        setup.config.estimator.tile,
        parts,
    )


def _own_view(batch: TrainBatch) -> TrainBatch:
    """The batch as the student reads it."""
    return dataclasses.replace(batch, teacher_view=None)


def _with_kernel_of(head: Head, params: Params) -> Head:
    """The head's masking and temperature with the weights of `params`."""
    return dataclasses.replace(head, kernel=head_of(params).kernel)


# One function a check: it measures, checks.py judges


def _padded_vocabulary(setup: Setup, specimen: Specimen) -> Finding:
    width, tile = valid_vocab(setup.tokenizer), setup.config.estimator.tile
    sides = {
        "student": (
            specimen.student_params,
            specimen.student_head,
            _own_view(specimen.batch),
            setup.student.config,
        ),
        "teacher": (
            setup.teacher.params,
            setup.teacher.head,
            specimen.batch,
            setup.teacher.checkpoint.config,
        ),
    }
    rows = {role: side[0]["embedding"].shape[0] for role, side in sides.items()}
    mass = {
        role: float(_mass_beyond(*side, width, tile)) if rows[role] > width else 0.0
        for role, side in sides.items()
    }
    sampled = np.asarray(specimen.rollouts.tokens)[np.asarray(specimen.rollouts.mask)]
    return checks.check_padded_vocabulary(sampled, width, setup.decoding.valid_vocab, rows, mass)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _mass_beyond(
    params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, width: int, tile: int
) -> jax.Array:
    """The largest probability that any scored position gives to the ids from `width` on, all
    together.
    """
    hidden = score(params, head, batch, config=model, needs="vocabulary", tile=tile).hidden
    beyond = lambda tile, _, row: jnp.sum(jnp.exp(tile.logprobs[:, width:]), axis=-1)
    return jnp.max(
        tiled_stats(beyond, hidden, head, batch.mask, TokenInputs(batch.tokens), tile=tile)
    )


def _sampler_matches_scorer(setup: Setup, specimen: Specimen) -> Finding:
    mask = jnp.asarray(specimen.batch.mask)
    # Beside the mask too, where the tokens lie if it is shifted; nothing predicts column 0.
    near = (mask | jnp.roll(mask, 1, axis=1) | jnp.roll(mask, -1, axis=1)).at[:, 0].set(False)
    batch = dataclasses.replace(_own_view(specimen.batch), mask=near)

    def score_at(temperature: float) -> np.ndarray:
        head = dataclasses.replace(specimen.student_head, temperature=temperature)
        return _logprobs(
            specimen.student_params, head, batch, setup.student.config, setup.config.estimator.tile
        )

    sampled = np.asarray(specimen.rollouts.unfiltered_logprobs)
    return checks.check_sampler_matches_scorer(
        sampled,
        np.asarray(mask),
        score_at,
        setup.decoding.temperature,
        _coarsest_dtype(setup),
        jax.default_backend(),
    )


def _self_distillation(setup: Setup, specimen: Specimen) -> Finding:
    """Two updates' losses and gradients: with the student's own weights for a teacher, and with the
    teacher.
    """
    config = setup.config
    recipe, _ = bind(config.estimator.recipe, config.estimator.options)
    # Its own view on both sides: through another template the student would be in another context.
    own, start = _own_view(specimen.batch), load_student(setup)
    spec, mask = _update_spec(setup, own.tokens.shape[0]), np.asarray(own.mask)
    # A recipe that reads nothing is run beside the log-probs that a filter of rollouts reads.
    needs = "token" if recipe.teacher == "none" else recipe.teacher
    read = partial(score, needs=needs, top_k=recipe.top_k, tile=config.estimator.tile)

    def lesson(
        params: Params, head: Head, batch: TrainBatch, model: DecoderConfig
    ) -> checks.Lesson:
        scores: TeacherScores = read(params, head, batch, config=model)
        head = head if needs == "vocabulary" else None
        loss, norm, outputs = _first_loss(
            *start, dataclasses.replace(own, teacher=scores), head, spec
        )
        reward = np.asarray(outputs["reward"])
        kl = np.asarray(outputs.get("kl", -reward))
        return checks.Lesson(
            float(np.abs(reward)[mask].mean()), float(kl[mask].mean()), float(loss), float(norm)
        )

    weights = _load(setup, setup.student, _teacher_type(setup))
    of_itself = lesson(
        weights, _with_kernel_of(setup.teacher.head, weights), own, setup.student.config
    )
    of_teacher = lesson(
        setup.teacher.params, setup.teacher.head, specimen.batch, setup.teacher.checkpoint.config
    )
    dtypes = setup.dtype, _teacher_type(setup)
    return checks.check_self_distillation(
        of_itself,
        of_teacher,
        config.estimator.recipe,
        is_zero_at_teacher(config.estimator),
        dtypes,
        jax.default_backend(),
    )


def is_zero_at_teacher(estimator: EstimatorConfig) -> bool:
    """Whether the recipe's loss and gradient are 0 at student = teacher; others hold to something
    beside the teacher too.
    """
    if estimator.recipe == "npd":
        return estimator.kd_weight == 1 and estimator.renormalize == "both"
    if estimator.recipe != "topk_kl":
        return estimator.recipe in ("opd", "vopd", "full_kl") and not estimator.task_reward_coef
    options = estimator.options | TOP_K_CONVENTIONS.get(estimator.options.get("convention"), {})
    return (
        "weight" in options
        or options.get("renormalize", "both") == "both"
        or options.get("outside") == "tail"
    )


@partial(jax.jit, static_argnames="spec")
def _first_loss(
    params: Params, frozen: Params | None, batch: TrainBatch, head: Head | None, spec: UpdateSpec
):
    """(loss, norm of the gradient, outputs) of the run's own update."""
    loss, gradient, outputs, _ = loss_and_grad(
        params,
        batch,
        head,
        spec,
        *bind(spec.estimator.recipe, spec.estimator.options),
        frozen=frozen,
    )
    return loss, jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))), outputs


def _update_spec(setup: Setup, rows: int) -> UpdateSpec:
    """The run's own update, in micro-batches no larger than the run's."""
    config = setup.config
    most = max(config.rows_per_step // config.train.gradient_accumulation_steps, 1)
    parts = next(
        parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most
    )
    return dataclasses.replace(update_spec(setup), gradient_accumulation_steps=parts, mesh=None)


def _teacher_dtype(setup: Setup, specimen: Specimen) -> Finding:
    difference = np.zeros(1)
    if _teacher_type(setup) != "float32":
        params = _load(setup, setup.teacher.checkpoint, "float32")
        head = _with_kernel_of(setup.teacher.head, params)
        exact = _logprobs(
            params,
            head,
            specimen.batch,
            setup.teacher.checkpoint.config,
            setup.config.estimator.tile,
        )
        difference = np.abs(specimen.teacher_scores - exact)[np.asarray(specimen.batch.mask)]
    dtypes = setup.dtype, _teacher_type(setup)
    return checks.check_teacher_dtype(
        difference, *dtypes, setup.teacher.checkpoint.stored_dtype, jax.default_backend()
    )


def _repeated_scores(setup: Setup, specimen: Specimen) -> Finding:
    again = _teacher_logprobs(setup, specimen.batch)
    parts, length = 1 if specimen.batch.tokens.shape[0] % 2 else 2, setup.config.train.pack_length
    if length is None:
        how, otherwise = (
            "more padding",
            _teacher_logprobs(setup, _with_padding(specimen.batch, _PADDING), parts)[:, _PADDING:],
        )
    else:
        how, otherwise = "packed rows", _packed_logprobs(setup, specimen.batch, length, parts)
    first, mask = specimen.teacher_scores, np.asarray(specimen.batch.mask)
    return checks.check_repeated_scores(
        first[mask], again[mask], otherwise[mask], how, _teacher_type(setup), jax.default_backend()
    )


def _packed_logprobs(setup: Setup, batch: TrainBatch, length: int, parts: int) -> np.ndarray:
    """`_teacher_logprobs` from rows that rollouts share, each token's score put back where its
    rollout has it.
    """
    packed, source = pack(batch, length, parts=parts)
    scores, is_live = np.zeros(batch.tokens.shape), source >= 0
    scores.reshape(-1)[source[is_live]] = _teacher_logprobs(setup, packed, parts)[is_live]
    return scores


def _with_padding(batch: TrainBatch, columns: int) -> TrainBatch:
    """The batch with empty columns on the left, in the teacher's view too."""
    widen = lambda x: jnp.pad(x, [(0, 0), (columns, 0), *[(0, 0)] * (x.ndim - 2)])
    view = batch.teacher_view
    if view is not None:
        view = dataclasses.replace(jax.tree.map(widen, view), columns=widen(view.columns + columns))
    return dataclasses.replace(jax.tree.map(widen, _own_view(batch)), teacher_view=view)


def _teacher_is_better(setup: Setup, specimen: Specimen) -> Finding:
    rows = [setup.prompts.prompts[i] for i in specimen.indices]
    has_references = all(row.references and row.references[0] for row in rows)
    texts = [
        setup.tokenizer.encode(row.references[0], add_special_tokens=False)
        if has_references
        else []
        for row in rows
    ]
    student = _nll(
        setup,
        specimen.student_params,
        setup.student,
        setup.prompts.student_ids,
        specimen.indices,
        texts,
    )
    seen = setup.prompts.teacher_ids or setup.prompts.student_ids
    teacher = _nll(
        setup, setup.teacher.params, setup.teacher.checkpoint, seen, specimen.indices, texts
    )
    correct = None
    if setup.config.evaluation.source is not None and all(row.answer is not None for row in rows):
        grade = GRADERS[setup.config.evaluation.grader]
        answers = (
            _greedy(setup, specimen.student_params, setup.student.config, specimen.prompts),
            specimen.teacher_answers,
        )
        correct = tuple(
            sum(
                bool(grade(text, row.answer))
                for text, row in zip(completions(rollouts, setup.tokenizer), rows)
            )
            for rollouts in answers
        )
    text = "reference answers" if has_references else "prompts"
    is_student = setup.config.teacher_is_student
    return checks.check_teacher_is_better(
        student, teacher, text, valid_vocab(setup.tokenizer), correct, is_student=is_student
    )


def _nll(
    setup: Setup,
    params: Params,
    checkpoint: Checkpoint,
    prompts,
    indices,
    texts: Sequence[Sequence[int]],
) -> np.ndarray:
    """The mean negative log-likelihood a token of each text `[P]` after its prompt, nats at
    temperature 1.

    Where there is no text, that of the prompt's tokens but the first.
    """
    prompts = [prompts[i] for i in indices]
    width = -(-max(len(p) + len(t) for p, t in zip(prompts, texts)) // 16) * 16
    tokens, mask, segments = (
        np.zeros((len(prompts), width), kind) for kind in (np.int32, bool, np.int32)
    )
    for row, (prompt, text) in enumerate(zip(prompts, texts)):
        end = len(prompt) + len(text)
        tokens[row, :end], segments[row, :end] = [*prompt, *text], 1
        mask[row, len(prompt) if text else 1 : end] = True
    batch = TrainBatch(tokens, mask, segments, np.zeros(tokens.shape, np.float32))
    head = head_of(params, valid_vocab=setup.decoding.valid_vocab)
    logprobs = _logprobs(params, head, batch, checkpoint.config, setup.config.estimator.tile)
    return -logprobs.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)


def _greedy(setup: Setup, params: Params, model: DecoderConfig, prompts: PromptBatch) -> Rollouts:
    """Greedy answers, each until any id with which one of the two models may end."""
    known = {
        *setup.decoding.stop_token_ids,
        *setup.teacher.checkpoint.stop_token_ids,
        *setup.student.stop_token_ids,
    }
    known |= {
        tokenizer.eos_token_id for tokenizer in (setup.tokenizer, setup.teacher.tokenizer)
    } - {None}
    decoding = Decoding(
        setup.decoding.max_completion_length,
        tuple(sorted(known)),
        0.0,
        valid_vocab=setup.decoding.valid_vocab,
    )
    prompts = dataclasses.replace(prompts, teacher_tokens=None, teacher_mask=None)
    return sample(params, prompts, 0, 0, config=model, decoding=decoding)


def _mask(setup: Setup, specimen: Specimen) -> Finding:
    width = specimen.prompts.tokens.shape[1]
    return checks.check_mask(
        specimen.batch, specimen.rollouts, width, setup.decoding.stop_token_ids
    )


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
_CHECKS_OF_STUDENT = (
    _padded_vocabulary,
    _stop_tokens,
    _sampler_matches_scorer,
    _sampling_filter,
    _mask,
)

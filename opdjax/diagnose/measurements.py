"""What `opdjax doctor` measures: a few prompts through a run's own sampler, scorers and loss."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opdjax.config import Config
from opdjax.data import packing
from opdjax.data.chat import valid_vocab
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import PromptSet, collate, indices_at
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import completions, graded
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.engine.update import loss_and_grad
from opdjax.estimators import estimator_of
from opdjax.judge.judgement import Judgement
from opdjax.judge.replies import ApiError
from opdjax.models.decoder import Params, head_of
from opdjax.models.hf import Checkpoint, load_params
from opdjax.ops.sharding import to_host
from opdjax.ops.vocab import TILE, TokenInputs, tiled_stats
from opdjax.rollouts import setup as run_setup
from opdjax.rollouts.checks import with_student_as_teacher
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.rows import with_option_columns
from opdjax.rollouts.setup import Setup, Teacher, reads_scores
from opdjax.rollouts.weights import initial_weights, load_student
from opdjax.types import PromptBatch, Rollouts, TeacherScores, TrainBatch

_PADDING = 16  # columns added when scores are repeated
_NUM_GROUPS = 4  # that judges see


@dataclasses.dataclass(frozen=True)
class FirstUpdate:
    """What a first update would do: means over the sampled tokens, and the gradient's norm."""

    log_ratio: float  # mean |teacher log-prob - student log-prob|
    kl: float
    loss: float
    gradient_norm: float

    def __str__(self) -> str:
        first = f"mean |log-ratio| {self.log_ratio:.2g}, KL {self.kl:.2g}"
        return f"{first}, loss {self.loss:.2g}, gradient norm {self.gradient_norm:.2g}"


class Measurements:
    """What is measured, when first used, of untrained models on the first prompts `[P]`; nats."""

    def __init__(self, run: Setup, num_prompts: int):
        self._run, self._num_prompts = run, num_prompts
        self.config: Config = run.config
        # The type of the forward passes of both models.
        self.backend, self.dtype = jax.default_backend(), run.dtype

    @cached_property
    def setup(self) -> Setup:
        """The run; the student is the teacher where the recipe compares no scores."""
        run = self._run
        if not reads_scores(self.config):
            head = head_of(self._student_params, valid_vocab=run.decoding.valid_vocab)
            return with_student_as_teacher(run, self._student_params, head)
        is_own = self.config.teacher_is_student
        return run_setup.with_current_teacher(run, self._student_params) if is_own else run

    @cached_property
    def _student_params(self) -> Params:
        return self._load(self._run.student, self.dtype)

    @cached_property
    def prompts(self) -> PromptBatch:
        """Ids of the prompts."""
        return self._first_prompts(self.setup.prompts, self._num_prompts)

    def _first_prompts(self, prompts: PromptSet, count: int) -> PromptBatch:
        total = len(prompts)
        return collate(prompts, indices_at(0, min(count, total), total, self.config.seed))

    @property
    def _student(self) -> Teacher:
        """The student in the form of a teacher, with the run's mask and temperature."""
        params, setup, how = self._student_params, self.setup, self.setup.decoding
        head = head_of(params, valid_vocab=how.valid_vocab, temperature=how.temperature)
        return Teacher(setup.student, params, head, setup.tokenizer, how, True)

    @cached_property
    def rollouts(self) -> Rollouts:
        """One rollout of each prompt."""
        static = {"config": self.setup.student.config, "decoding": self.setup.decoding}
        return sample(self._student_params, self.prompts, self.config.seed, 0, **static)

    @cached_property
    def batch(self) -> TrainBatch:
        """The rollouts as the update reads them, without scores."""
        batch = packing.to_train_batch(self.rollouts, self.prompts)
        if not reads_scores(self.config):  # rewards need whole groups; no check reads them
            return batch
        data = (self.config, self.setup.prompts, self.setup.tokenizer)
        return with_option_columns(batch, self.rollouts, *data)[0]

    @property
    def _own_batch(self) -> TrainBatch:
        return dataclasses.replace(self.batch, teacher_view=None)

    @cached_property
    def teacher_answers(self) -> Rollouts:
        """Greedy answers of the teacher."""
        return self._greedy(self.setup.teacher, packing.for_teacher(self.prompts))

    @cached_property
    def padding(self) -> dict[str, tuple[int, float]]:
        """By role: (rows of the embedding, largest probability of all ids beyond the tokenizer)."""
        width = valid_vocab(self.setup.tokenizer)
        beyond = lambda tile, *_: jnp.sum(jnp.exp(tile.logprobs[:, width:]), axis=-1)
        mass_of = jax.jit(partial(tiled_stats, beyond, tile=TILE))

        def measure(model: Teacher, batch: TrainBatch) -> tuple[int, float]:
            if (rows := len(model.params["embedding"])) <= width:
                return rows, 0.0
            hidden = self._score(model, batch, needs="vocabulary").hidden
            mass = mass_of(hidden, model.head, batch.mask, TokenInputs(batch.tokens))
            return rows, float(mass.max())

        teacher = measure(self.setup.teacher, self.batch)
        return {"student": measure(self._student, self._own_batch), "teacher": teacher}

    def score_at(self, temperature: float) -> np.ndarray:
        """Return the scorer's log-probs `[B, T]` at a temperature of the student, also one column
        left and right of the mask: the tokens are there if it is shifted.
        """
        mask = jnp.asarray(self.batch.mask)
        near = mask | jnp.roll(mask, 1, axis=1) | jnp.roll(mask, -1, axis=1)
        near = near.at[:, 0].set(False)  # nothing predicts the first column
        head = dataclasses.replace(self._student.head, temperature=temperature)
        batch = dataclasses.replace(self._own_batch, mask=near)
        return self._logprobs(dataclasses.replace(self._student, head=head), batch)

    @cached_property
    def first_updates(self) -> tuple[FirstUpdate, FirstUpdate]:
        """Two updates: with the student's own weights as the teacher, and with the teacher."""
        weights, student = load_student(self.setup), self._student
        # With the teacher's mask and temperature.
        head = dataclasses.replace(self.setup.teacher.head, kernel=student.head.kernel, scale=None)
        itself = dataclasses.replace(student, head=head)
        # The student's view on both sides: another template would put it into another context.
        batches = ((itself, self._own_batch), (self.setup.teacher, self.batch))
        return tuple(self._first_update(weights, *each) for each in batches)

    def _first_update(self, weights: tuple, teacher: Teacher, batch: TrainBatch) -> FirstUpdate:
        config, own, estimator = self.config, self._own_batch, estimator_of(self.config.estimator)
        # A recipe that reads no scores may still filter rollouts by token log-probs.
        needs = "token" if estimator.teacher == "none" else estimator.teacher
        scores = self._score(teacher, batch, needs=needs, top_k=estimator.top_k)
        head = teacher.head if needs == "vocabulary" else None
        # Micro-batches no larger than the run's.
        rows, mask = len(own.tokens), np.asarray(own.mask)
        most = max(config.rows_per_step // config.train.gradient_accumulation_steps, 1)
        parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)
        changes = {"gradient_accumulation_steps": parts, "mesh": None}
        spec = dataclasses.replace(run_setup.update_spec(self.setup), **changes)
        scored, (params, frozen) = dataclasses.replace(own, teacher=scores), weights
        run = jax.jit(loss_and_grad, static_argnames="spec")
        loss, gradient, outputs, _ = run(params, scored, head, spec, frozen=frozen)
        reward = np.asarray(outputs["rewards"])[mask]
        kl = np.asarray(outputs["kl"])[mask] if "kl" in outputs else -reward
        values = (np.abs(reward).mean(), kl.mean(), loss, optax.tree.norm(gradient))
        return FirstUpdate(*map(float, values))

    @cached_property
    def _teacher_scores(self) -> np.ndarray:
        return self._logprobs(self.setup.teacher, self.batch)

    @cached_property
    def teacher_rounding(self) -> np.ndarray:
        """|log-prob - log-prob in float32| of the sampled tokens by the teacher."""
        teacher = self.setup.teacher
        params = self._load(teacher.checkpoint, "float32")
        head = dataclasses.replace(teacher.head, kernel=head_of(params).kernel)
        exact = dataclasses.replace(teacher, params=params, head=head)
        difference = self._teacher_scores - self._logprobs(exact, self.batch)
        return np.abs(difference)[np.asarray(self.batch.mask)]

    @cached_property
    def repeated_scores(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """The teacher's log-probs of the sampled tokens: scored twice, and with other micro-batches
        and another layout; then that layout.
        """
        teacher, batch, length = self.setup.teacher, self.batch, self.config.train.pack_length
        again, parts = self._logprobs(teacher, batch), 1 if batch.tokens.shape[0] % 2 else 2
        layout, rows = "packed rows", None
        if length is None:  # one rollout per row as before, in other columns
            layout, rows = "other padding", np.arange(len(batch.tokens))
            length = int(packing.packed_lengths(batch).max()) + _PADDING
        packed, source = packing.pack(batch, length, parts=parts, rows=rows)
        scores = self._logprobs(teacher, packed, parts)
        regrouped = packing.unpack(scores, source, batch.tokens.shape)
        # Padding, which a faulty mask may hold, is in no other layout.
        mask = np.asarray(batch.mask) & (np.asarray(batch.segment_ids) > 0)
        return *(each[mask] for each in (self._teacher_scores, again, regrouped)), layout

    @cached_property
    def nll(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """NLL a token by student and teacher `[P]`; whether of references, otherwise of prompts."""
        references, encode = [row.references for row in self._rows], self.setup.tokenizer.encode
        has_references = all(texts and texts[0] for texts in references)
        first = (texts[0] if has_references else "" for texts in references)
        texts = [encode(text, add_special_tokens=False) for text in first]
        teacher = self._nll(self.setup.teacher, packing.for_teacher(self.prompts), texts)
        return self._nll(self._student, self.prompts, texts), teacher, has_references

    @cached_property
    def correct(self) -> tuple[int, int] | None:
        """Correct greedy answers of student and teacher; None if they cannot be graded."""
        evaluation, answers = self.config.evaluation, [row.answer for row in self._rows]
        if evaluation.source is None or None in answers:
            return None
        both = (self._greedy(self._student, self.prompts), self.teacher_answers)
        texts = (completions(rollouts, self.setup.tokenizer) for rollouts in both)
        return tuple(int(graded(each, answers, self.config.grader).sum()) for each in texts)

    @cached_property
    def judged(self) -> tuple[list[Judgement], dict[str, float], str | None]:
        """(Judgements of the first groups, usage of a whole run, why the judges failed or None)."""
        from opdjax.rollouts.judged import JudgedSource, background_judge  # needs an extra

        run, train = self._run, self.config.train
        prompts = self._first_prompts(run.prompts, _NUM_GROUPS)
        rollouts = to_host(draw(run, initial_weights(run), prompts, 0))
        with tempfile.TemporaryDirectory() as name:
            scratch = pathlib.Path(name)
            with background_judge(self.config, scratch) as background:
                try:
                    judged = list(JudgedSource(run, scratch, background).judge(rollouts))
                except ApiError as error:
                    return [], {}, str(error)
                scale = train.prompts_per_step * train.num_steps / len(prompts.prompt_id)
                usage = {key: scale * x for key, x in background.record_usage(0).items()}
                return [each for judgements in judged for each in judgements], usage, None

    @property
    def _rows(self) -> list[Prompt]:
        return [self.setup.prompts.prompts[i] for i in self.prompts.prompt_id]

    def _load(self, checkpoint: Checkpoint, dtype: str) -> Params:
        # Placed as the teacher's: models of one shape then share a program.
        return load_params(checkpoint, dtype, self._run.mesh)

    def _score(self, model: Teacher, batch: TrainBatch, **options: Any) -> TeacherScores:
        config = model.checkpoint.config
        return score(model.params, model.head, batch, config=config, tile=TILE, **options)

    def _logprobs(self, model: Teacher, batch: TrainBatch, parts: int = 1) -> np.ndarray:
        """Return log-probs `[B, T]` of the batch's tokens, from the scorer of the run's teacher."""
        return np.asarray(self._score(model, batch, needs="token", parts=parts).teacher_logprobs)

    def _nll(self, model: Teacher, prompts: PromptBatch, texts: list[list[int]]) -> np.ndarray:
        """Return the mean NLL a token of each text `[P]` after its prompt, at temperature 1, or of
        the prompts if all texts are empty; nothing predicts their first token.
        """
        rows = packing.answer_rows(prompts, texts, max(map(len, texts)), 0)
        position = np.cumsum(rows.segment_ids, axis=1) * rows.segment_ids
        mask = rows.mask if rows.mask.any() else position > 1
        head = head_of(model.params, valid_vocab=self.setup.decoding.valid_vocab)
        batch = TrainBatch(rows.tokens, mask, rows.segment_ids, None)
        logprobs = self._logprobs(dataclasses.replace(model, head=head), batch)
        return -logprobs.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)

    def _greedy(self, model: Teacher, prompts: PromptBatch) -> Rollouts:
        """Sample greedy answers that stop at any id with which one of the two models may stop, and
        at the run's stop strings.
        """
        setup, how, shape = self.setup, self.setup.decoding, model.checkpoint.config
        stops = {*setup.teacher.checkpoint.stop_token_ids, *setup.student.stop_token_ids}
        stops |= {setup.tokenizer.eos_token_id, setup.teacher.tokenizer.eos_token_id}
        stops = tuple(sorted((stops | {*how.stop_token_ids}) - {None}))
        own = {"valid_vocab": how.valid_vocab, "stop_strings": model.decoding.stop_strings}
        how = Decoding(how.max_completion_length, stops, 0.0, **own)
        prompts = dataclasses.replace(prompts, teacher_tokens=None, teacher_mask=None)
        return sample(model.params, prompts, 0, 0, config=shape, decoding=how)

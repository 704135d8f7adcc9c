"""Divergences on held-out prompts are those of dense distributions, token by token."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import MODEL, make_models

from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import PromptSet
from opdjax.engine import divergence
from opdjax.engine.decoding import Decoding
from opdjax.engine.divergence import DivergenceEvaluator
from opdjax.models.decoder import forward, head_of
from opdjax.ops.sharding import make_mesh
from opdjax.ops.tile import head_logits

TEMPERATURE = 0.8
PROMPTS = ((3,), (4, 5, 6), (7, 8), (2, 2, 9, 1), (5, 4))
TEACHER_PROMPTS = ((1, 3), (4, 5, 6), (9, 9, 7, 8), (2, 2, 9, 1), (5, 4))


def make_evaluator(teacher, prompts=PROMPTS, teacher_prompts=None, samples=2, devices=1):
    rows = tuple(Prompt(str(number)) for number in range(len(prompts)))
    decoding = Decoding(6, (0,), temperature=TEMPERATURE, valid_vocab=10)
    return DivergenceEvaluator(
        MODEL,
        MODEL,
        teacher,
        PromptSet(rows, prompts, teacher_prompts, (), ""),
        decoding,
        decoding,
        samples,
        make_mesh(devices),
    )


def dense(params, ids):
    """Log-probs of every next token of a sequence, float64."""
    tokens = np.asarray(ids)[None]
    hidden = jax.jit(forward, static_argnums=1)(params, MODEL, tokens, np.ones_like(tokens))
    logits = np.array(head_logits(head_of(params), hidden)[0], np.float64)[:, :10] / TEMPERATURE
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def expected(student, teacher, rollouts, prompts, teacher_prompts, samples):
    """Sums of each measure by prompt, from dense distributions."""
    found = []
    for row, (tokens, mask) in enumerate(zip(rollouts.tokens, rollouts.mask)):
        answer = tokens[mask].tolist()
        own, other = prompts[row // samples], teacher_prompts[row // samples]
        s = dense(student, [*own, *answer])[len(own) - 1 : -1]
        t = dense(teacher, [*other, *answer])[len(other) - 1 : -1]
        middle = np.logaddexp(s, t) - np.log(2)
        ps, pt = np.exp(s), np.exp(t)
        sums = {
            "reverse_kl": (ps * (s - t)).sum(),
            "forward_kl": (pt * (t - s)).sum(),
            "jsd": (ps * (s - middle) + pt * (t - middle)).sum() / 2,
            "agreement": (s.argmax(1) == t.argmax(1)).sum(),
            "student_entropy": -(ps * s).sum(),
            "teacher_entropy": -(pt * t).sum(),
            "tokens": len(answer),
        }
        found.append(sums)
    by_prompt = lambda name: np.reshape([row[name] for row in found], (-1, samples)).sum(1)
    return {name: by_prompt(name) for name in found[0]}


@pytest.mark.parametrize("teacher_prompts", [None, TEACHER_PROMPTS])
def test_measures_are_those_of_dense_distributions(monkeypatch, teacher_prompts):
    student, teacher = make_models(np.float32)
    monkeypatch.setattr(divergence, "ROWS_AT_A_TIME", 4)  # several parts, the last one not full
    evaluator = make_evaluator(teacher, teacher_prompts=teacher_prompts)
    result = evaluator(student)
    own = evaluator._draw(student, evaluator._batch, MODEL, evaluator.student_decoding)
    for writer, rollouts in {"student": own, "teacher": evaluator._given}.items():
        assert rollouts.mask.sum(1).min() >= 1
        sums = expected(
            student, teacher, rollouts, PROMPTS, teacher_prompts or PROMPTS, evaluator.num_samples
        )
        tokens, found = sums.pop("tokens"), result[writer]
        for name, values in sums.items():
            assert found[name] == pytest.approx(values.sum() / tokens.sum(), rel=2e-4, abs=1e-6)
            assert found[f"{name}_interval"] > 0
        assert found["length"] == pytest.approx(tokens.mean() / evaluator.num_samples)
        pairs = np.array(found["per_prompt"])
        np.testing.assert_allclose(pairs[:, 0], sums["reverse_kl"], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(pairs[:, 1], tokens)


def test_the_teacher_itself_is_at_distance_zero():
    teacher = make_models(np.float32)[1]
    result = make_evaluator(teacher)(teacher)
    for writer in ("student", "teacher"):
        assert result[writer]["reverse_kl"] == pytest.approx(0, abs=1e-6)
        assert result[writer]["agreement"] == 1
    # The same draws: the student is the teacher.
    assert result["student"] == result["teacher"]


@pytest.mark.long
@pytest.mark.long
def test_a_mesh_changes_nothing():
    student, teacher = make_models(np.float32)
    one, four = (make_evaluator(teacher, devices=devices)(student) for devices in (1, 4))
    for writer in ("student", "teacher"):
        same = lambda result, writer=writer: {
            name: value for name, value in result[writer].items() if name != "per_prompt"
        }
        assert same(one) == pytest.approx(same(four), rel=1e-4, abs=1e-6)


@pytest.mark.long
def test_what_is_drawn_depends_on_the_student_alone():
    student, teacher = make_models(np.float32)
    first = make_evaluator(teacher)(student)
    fewer = dataclasses.replace(make_evaluator(teacher), slots=4)(student)
    assert fewer["student"]["per_prompt"] == first["student"]["per_prompt"]

"""Rows to train on: the teacher's own view holds the same completion, and every column finds its counterpart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import Prompt, PromptSet, collate
from opdjax.types import Rollouts


def ids_of(lengths, first):
    return tuple(tuple(range(first + 100 * i, first + 100 * i + n)) for i, n in enumerate(lengths))


def batch_of(lengths, teacher_lengths):
    teacher = None if teacher_lengths is None else ids_of(teacher_lengths, 50_000)
    prompts = PromptSet(tuple(Prompt(f"p{i}") for i in range(len(lengths))), ids_of(lengths, 10_000), teacher, 0, "")
    return collate(prompts, np.arange(len(lengths)))


def roll_out(prompts, completions, width):
    """Rollouts with these completions, a list of token lists, as many a prompt as divide evenly."""
    repeats = len(completions) // len(prompts.tokens)
    before, is_prompt = np.repeat(prompts.tokens, repeats, axis=0), np.repeat(prompts.mask, repeats, axis=0)
    tokens, mask = np.zeros((len(completions), width), np.int32), np.zeros((len(completions), width), bool)
    for i, completion in enumerate(completions):
        tokens[i, : len(completion)], mask[i, : len(completion)] = completion, True
    logprobs = -np.arange(tokens.size + before.size, dtype=np.float32).reshape(len(completions), -1)
    rows = np.arange(len(completions))
    return Rollouts(
        tokens=np.concatenate([before, tokens], axis=1),
        mask=np.concatenate([np.zeros_like(is_prompt), mask], axis=1),
        segment_ids=np.concatenate([is_prompt, mask], axis=1).astype(np.int32),
        behavior_logprobs=logprobs,
        unfiltered_logprobs=logprobs,
        prompt_id=rows // repeats,
        sample_id=rows % repeats,
        policy_version=0 * rows,
        is_truncated=rows < 0,
    )


def test_without_a_view_of_its_own_the_rows_pass_unchanged():
    prompts = batch_of([3, 2], None)
    rollouts = roll_out(prompts, [[1, 2], [3], [4], [5, 6]], 2)
    batch = to_train_batch(rollouts, prompts)
    assert batch.teacher_view is None
    assert batch.teacher is None
    for name in ("tokens", "mask", "segment_ids", "behavior_logprobs"):
        assert getattr(batch, name) is getattr(rollouts, name)


@pytest.mark.parametrize(("student", "teacher", "widths"), [([3], [20], (16, 32)), ([20], [3], (32, 16)), ([3], [5], (16, 16))])
def test_columns_by_hand(student, teacher, widths):
    prompts = batch_of(student, teacher)
    assert (prompts.tokens.shape[1], prompts.teacher_tokens.shape[1]) == widths
    view = to_train_batch(roll_out(prompts, [[7, 8, 9]], 4), prompts).teacher_view
    columns = np.asarray(view.columns)[0]
    # The last prompt column, which predicts the first sampled token, and the four columns of the completion.
    np.testing.assert_array_equal(columns[widths[0] - 1 :], widths[1] - 1 + np.arange(5))
    np.testing.assert_array_equal(np.asarray(view.tokens)[0, widths[1] :], [7, 8, 9, 0])
    np.testing.assert_array_equal(np.asarray(view.segment_ids)[0, widths[1] :], [1, 1, 1, 0])
    assert columns.min() >= 0
    assert columns.max() < view.tokens.shape[1]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_sampled_token_is_where_its_column_points(data):
    num_prompts, repeats, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 5
    lengths = st.lists(st.integers(1, 40), min_size=num_prompts, max_size=num_prompts)
    prompts = batch_of(data.draw(lengths), data.draw(lengths))
    sizes = data.draw(st.lists(st.integers(1, width), min_size=num_prompts * repeats, max_size=num_prompts * repeats))
    rollouts = roll_out(prompts, [list(range(10 * i + 1, 10 * i + 1 + n)) for i, n in enumerate(sizes)], width)
    batch = to_train_batch(rollouts, prompts)
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    seen, segments, columns = (np.asarray(getattr(batch.teacher_view, name)) for name in ("tokens", "segment_ids", "columns"))

    rows, places = np.nonzero(mask)
    np.testing.assert_array_equal(seen[rows, columns[rows, places]], tokens[rows, places])
    assert (segments[rows, columns[rows, places]] == 1).all()
    # The state that predicts a token has read the column before it, in both views.
    np.testing.assert_array_equal(columns[rows, places - 1], columns[rows, places] - 1)
    for row in range(len(tokens)):
        expected = np.asarray(prompts.teacher_tokens[row // repeats])[prompts.teacher_mask[row // repeats]].tolist()
        assert seen[row][segments[row] == 1].tolist() == expected + tokens[row][mask[row]].tolist()

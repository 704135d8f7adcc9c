"""Who draws and who learns: never too old, in order, each waiting for the other, both ended by the
error of one.
"""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import HANG

from opdjax.rollouts.near_policy.buffer import RolloutBuffer, version_for


def drawn_as(step, version, weights):
    return step, version, weights


def in_thread(call, *arguments):
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(0.05)
    return thread


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 4),
    st.sampled_from([("fixed", True), ("free", True), ("fixed", False)]),
    st.integers(0, 9),
    st.randoms(),
)
def test_what_is_drawn_is_never_too_old_and_never_too_far_ahead(max_staleness, how, first, random):
    """A learner from `first` and a generator at random speeds; versions as the lag says, and no
    more stored than the lag allows.
    """
    (lag, is_threaded), steps, versions, held = how, range(first, first + 8), {}, []

    def draw(step, version, weights):
        threading.Event().wait(random.random() * 1e-3)
        assert weights == f"weights {version}"
        versions[step] = version
        return step

    buffer = RolloutBuffer(steps, max_staleness, lag, draw, is_threaded=is_threaded)
    for version in range(max(first - max_staleness, 0), steps.stop):
        if buffer.is_needed(version):
            buffer.wait_for_room(version)
            buffer.publish(version, f"weights {version}")
        step = version
        if step not in steps:
            continue
        assert buffer.get(step) == step
        assert step in buffer
        threading.Event().wait(random.random() * 1e-3)
        held.append(sum(each in buffer for each in steps))
        buffer.forget(step)
        assert step not in buffer
        assert max(step - max_staleness, 0) <= versions[step] <= step
        if lag == "fixed":
            assert versions[step] == max(step - max_staleness, 0)
    buffer.close()
    assert list(versions) == list(steps)
    assert max(held) <= max_staleness + 1


def test_a_free_lag_takes_the_newest_weights_but_none_from_after_the_step():
    """Those of versions 11 to 13 were left by a learner that was killed and continues from 8."""
    published = [8, 11, 12, 13]
    found = [version_for(step, published, 2, "free") for step in (8, 10, 12, 13, 15, 16)]
    assert found == [8, 8, 12, 13, 13, None]
    assert version_for(10, [9, 13], 2, "free") == 9
    assert version_for(10, [11, 13], 2, "free") is None


def test_a_fixed_lag_waits_for_its_weights():
    assert version_for(5, [0, 2], 2, "fixed") is None
    assert version_for(5, [0, 4], 2, "fixed") == 3
    assert version_for(1, [0, 4], 2, "fixed") == 0
    assert version_for(1, [], 2, "fixed") is None


def test_drawing_waits_for_weights_and_learning_for_rollouts():
    """The learner that is two versions ahead waits with the third."""
    may_draw = threading.Semaphore(0)

    def draw(step, version, weights):
        may_draw.acquire()
        return step, version

    buffer = RolloutBuffer(range(5), 1, "fixed", draw, is_threaded=True)
    buffer.publish(0, None)
    may_draw.release(2)
    assert [buffer.get(step) for step in (0, 1)] == [(0, 0), (1, 0)]
    assert 2 not in buffer
    buffer.wait_for_room(1)
    buffer.publish(1, None)
    learning = in_thread(buffer.get, 2)
    assert learning.is_alive()
    buffer.wait_for_room(2)
    buffer.publish(2, None)
    publishing = in_thread(buffer.wait_for_room, 3)
    assert publishing.is_alive()
    may_draw.release()
    for thread in (learning, publishing):
        thread.join(HANG)
        assert not thread.is_alive()
    assert 3 not in buffer
    may_draw.release(2)
    buffer.publish(3, None)
    assert [buffer.get(step) for step in (2, 3, 4)] == [(2, 1), (3, 2), (4, 3)]
    assert not buffer.is_needed(4)
    buffer.close()


def test_with_a_free_lag_what_waits_is_drawn_with_newer_weights():
    started, may_draw = threading.Event(), threading.Event()

    def draw(step, version, weights):
        started.set()
        may_draw.wait()
        return step, version

    buffer = RolloutBuffer(range(3), 2, "free", draw, is_threaded=True)
    buffer.publish(0, None)
    started.wait()
    assert buffer.is_needed(1)
    buffer.wait_for_room(1)
    buffer.publish(1, None)
    may_draw.set()
    assert [buffer.get(step) for step in range(3)] == [(0, 0), (1, 1), (2, 1)]
    assert not buffer.is_needed(2)
    buffer.close()


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()])
def test_an_error_of_the_thread_is_raised_to_the_learner(error):
    """The learner, who may wait for it or for room, gets what was stored before."""

    def draw(step, version, weights):
        if step:
            raise error
        return step

    buffer = RolloutBuffer(range(4), 1, "fixed", draw, is_threaded=True)
    buffer.publish(0, None)
    with pytest.raises(type(error)):
        buffer.get(1)
    assert buffer.get(0) == 0
    assert (0 in buffer, 1 in buffer) == (True, False)
    for version in (1, 2):
        buffer.wait_for_room(version)
        buffer.publish(version, None)
    buffer.close()


def test_a_closed_buffer_gives_what_is_stored_and_draws_nothing_more():
    """What is stored may still be trained on; the step that is drawn is finished."""
    started, may_draw, drawn = threading.Event(), threading.Event(), []

    def draw(step, version, weights):
        started.set()
        may_draw.wait()
        drawn.append(step)
        return step

    buffer = RolloutBuffer(range(3), 2, "fixed", draw, is_threaded=True)
    buffer.publish(0, None)
    started.wait()
    closing = in_thread(buffer.close)
    assert closing.is_alive()
    may_draw.set()
    closing.join(HANG)
    assert not closing.is_alive()
    assert drawn == [0]
    assert buffer.get(0) == 0


def test_what_is_stored_is_not_drawn_again():
    buffer = RolloutBuffer(range(2, 5), 2, "fixed", drawn_as, is_threaded=False)
    buffer.put(3, "stored")
    assert buffer.is_needed(2)
    buffer.publish(2, "weights")
    assert not buffer.is_needed(3)
    assert [buffer.get(step) for step in (2, 3, 4)] == [
        (2, 2, "weights"),
        "stored",
        (4, 2, "weights"),
    ]

"""Who draws and who learns: never too old, in order, each waiting for the other, both ended by the
error of one.
"""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.rollouts.near_policy.buffer import BufferClosedError, RolloutBuffer


def drawing(buffer, steps, pause):
    """A thread that draws these steps; (thread, step -> version)."""
    versions = {}

    def run():
        try:
            for step in steps:
                versions[step] = buffer.admit(step)
                pause(step)
                buffer.put(step)
        except BaseException as error:
            buffer.close(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, versions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.sampled_from(["fixed", "free"]), st.integers(0, 9), st.randoms())
def test_what_is_drawn_is_never_too_old_and_never_too_far_ahead(max_staleness, lag, first, random):
    """A learner from `first` and a generator at random speeds; versions as the lag says, and no
    more stored than the lag allows.
    """
    buffer, num_steps, held = RolloutBuffer(max_staleness, lag), first + 8, []
    thread, versions = drawing(
        buffer, range(first, num_steps), lambda step: threading.Event().wait(random.random() * 1e-3)
    )
    for step in range(max(first - max_staleness, 0), first):
        buffer.publish(step)
    for step in range(first, num_steps):
        buffer.publish(step)
        buffer.wait_for(step)
        threading.Event().wait(random.random() * 1e-3)
        held.append(len(buffer))
        buffer.forget(step)
        assert step not in buffer
        assert max(step - max_staleness, 0) <= versions[step] <= step
        if lag == "fixed":
            assert versions[step] == max(step - max_staleness, 0)
    thread.join()
    assert list(versions) == list(range(first, num_steps))
    assert max(held) <= max_staleness + 1
    assert len(buffer) == 0


def test_a_free_lag_takes_the_newest_weights_but_none_from_after_the_step():
    """Those of versions 11 to 13 were left by a learner that was killed and continues from 8."""
    buffer = RolloutBuffer(2, "free", lambda: ([8, 11, 12, 13], []))
    assert [buffer.admit(step) for step in (8, 10, 12, 13, 15)] == [8, 8, 12, 13, 13]


def test_drawing_waits_for_weights_and_learning_for_rollouts():
    buffer = RolloutBuffer(1, "fixed")
    buffer.publish(0)
    thread, versions = drawing(buffer, range(4), lambda step: None)
    buffer.wait_for(1)
    thread.join(0.05)
    assert thread.is_alive()
    assert versions == {0: 0, 1: 0}
    learned = threading.Thread(target=buffer.wait_for, args=(2,), daemon=True)
    learned.start()
    learned.join(0.05)
    assert learned.is_alive()
    buffer.publish(1)
    learned.join(5)
    assert not learned.is_alive()
    assert 3 not in buffer
    buffer.publish(2)
    thread.join(5)
    assert versions == {0: 0, 1: 0, 2: 1, 3: 2}


@pytest.mark.parametrize("error", [OSError("no room"), None])
def test_an_error_at_either_end_wakes_both(error):
    buffer, raised = RolloutBuffer(0, "fixed"), {}

    def waiting(name, wait):
        try:
            wait()
        except BufferClosedError as closed:
            raised[name] = closed.__cause__

    waits = {"learner": lambda: buffer.wait_for(3), "generator": lambda: buffer.admit(3)}
    threads = [threading.Thread(target=waiting, args=item, daemon=True) for item in waits.items()]
    for thread in threads:
        thread.start()
    buffer.close(error)
    buffer.close(RuntimeError("a later one"))
    for thread in threads:
        thread.join(5)
    assert raised.keys() == waits.keys()
    assert error is None or set(raised.values()) == {error}


def test_a_closed_buffer_gives_what_is_stored_and_admits_nothing():
    """What is stored may still be trained on; what could be drawn is not."""
    buffer = RolloutBuffer(2, "fixed")
    buffer.publish(0)
    buffer.put(0)
    buffer.close()
    buffer.wait_for(0)
    with pytest.raises(BufferClosedError):
        buffer.admit(1)


def test_another_process_is_looked_at_while_waiting():
    """It looks at published and stored versions; an error of looking is raised by the wait."""
    seen = [([], []), ([0], []), ([0, 1], [5])]
    buffer = RolloutBuffer(1, "fixed", lambda: seen.pop(0))
    assert buffer.admit(2) == 1
    buffer.wait_for(5)
    with pytest.raises(IndexError):
        buffer.wait_for(6)

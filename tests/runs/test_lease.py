"""Leases on a fake Google Cloud Storage: exactly one holder, however they race, die or sleep."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from waiting import HANG

import opdjax.runs.lease as lease_module
from opdjax.runs.lease import (
    LOST,
    ExpiryWatch,
    LeaseLostError,
    acquire,
    holder_of,
    try_acquire,
)
from opdjax.runs.object_store import Folder
from opdjax.runs.workdir import WorkdirError

HOLD = """
import sys
from opdjax.runs.lease import acquire
from opdjax.runs.object_store import Folder
lease = acquire(Folder(sys.argv[1])).start()
print("held", lease.number, flush=True)
sys.stdin.read()
lease.release()
"""


@pytest.fixture
def folder(gcs):
    return Folder("gs://bucket/run")


class Clock:
    """Stands in for the module `time` of the leases: sleeping takes no time."""

    def __init__(self):
        self.now, self.while_asleep = 1000.0, lambda: None

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        self.now += seconds
        self.while_asleep()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


@pytest.fixture
def seconds(monkeypatch):
    monkeypatch.setenv("OPDJAX_LEASE_SECONDS", "1.5")
    return 1.5


@contextlib.contextmanager
def holder(url):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline().startswith("held ")
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_one_of_many_takers_wins(folder):
    taken, barrier = [], threading.Barrier(8)

    def race():
        barrier.wait()
        if (lease := try_acquire(folder, ExpiryWatch())) is not None:
            taken.append(lease)

    for number in (1, 2, 3):
        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [lease.number for lease in taken] == [number]
        taken.pop().release()


@pytest.mark.long
def test_faults_on_the_way_make_neither_two_holders_nor_none(gcs):
    folder = Folder("gs://bucket/run")
    gcs.store.fault_rate = 0.1
    for number in range(1, 6):
        taken, barrier = [], threading.Barrier(2)

        def race():
            barrier.wait()  # noqa: B023 (joined below)
            taken.append(try_acquire(folder, ExpiryWatch()))  # noqa: B023 (joined below)

        threads = [threading.Thread(target=race) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lease,) = filter(None, taken)
        assert lease.number == number
        lease.renew()
        lease.release()


def test_a_holder_that_renews_keeps_its_lease_and_one_that_does_not_loses_it(folder, clock):
    lease = acquire(folder)
    watch = ExpiryWatch()
    for _ in range(14):
        lease.renew()
        assert try_acquire(folder, watch) is None
        clock.sleep(0.1 * lease.seconds)
    clock.while_asleep = lease.renew
    with pytest.raises(WorkdirError, match="is being written by another run on"):
        acquire(folder)
    clock.while_asleep = lambda: None
    watch = ExpiryWatch()
    assert try_acquire(folder, watch) is None
    clock.sleep(1.2 * lease.seconds)
    second = try_acquire(folder, watch)
    assert second.number == lease.number + 1
    with pytest.raises(
        LeaseLostError, match="was taken over by another process, or could have been"
    ):
        lease.renew()
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()  # of what is not ours: nothing
    second.renew()
    assert sorted(folder.subfolder(".lease").files()) == ["000001", "000002"]
    assert b"released" not in folder.read(".lease/000001")


def test_a_released_lease_is_free_at_once_and_numbers_only_grow(folder):
    for number in (1, 2, 3):
        lease = acquire(folder)
        assert lease.number == number
        lease.release()
        assert holder_of(folder).get("released")


@pytest.mark.usefixtures("gcs", "seconds")
def test_a_killed_process_is_waited_for(clock, capsys):
    folder = Folder("gs://bucket/run")
    acquire(folder)
    began = clock.now
    second = acquire(folder)
    assert second.number == 2
    assert clock.now - began > second.seconds
    assert "was last written by a run on" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{", b'{"owner": "a", "host": "b", "seconds": "60"}'])
def test_a_damaged_lease_is_named(folder, content):
    folder.write(".lease/000001", content)
    with pytest.raises(WorkdirError, match="gs://bucket/run/.lease/000001 is damaged: "):
        acquire(folder)


def test_a_holder_that_sleeps_is_stopped_when_it_wakes(gcs, seconds):
    folder = Folder("gs://bucket/run")
    with holder(folder.url) as process:
        os.kill(process.pid, signal.SIGSTOP)
        second = acquire(folder)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(HANG) == LOST
    assert second.number == 2
    second.renew()


def test_a_holder_that_cannot_reach_the_storage_stops(gcs, seconds, capfd):
    with holder("gs://bucket/run") as process:
        gcs.store.forbidden = "lease"
        assert process.wait(HANG) == LOST


@pytest.fixture
def shared(folder, monkeypatch):
    """A lease whose environment the next `acquire` of this process finds, as a child would."""
    lease = acquire(folder)
    for name, value in lease.environment.items():
        monkeypatch.setenv(name, value)
    return lease


def test_a_child_goes_on_with_what_its_parent_held(folder, shared, monkeypatch, clock):
    elsewhere = acquire(folder.subfolder("elsewhere"))
    elsewhere.release()
    assert holder_of(folder.subfolder("elsewhere")).get("released")
    child = acquire(folder)
    child.record_progress(step=3)
    for _ in range(8):  # the child alone renews, and the parent sees it
        clock.sleep(0.3 * shared.seconds)
        child.renew()
        shared.renew()
    assert holder_of(folder)["step"] == 3
    monkeypatch.delenv("OPDJAX_LEASE")
    assert try_acquire(folder, ExpiryWatch()) is None
    shared.child_ended()
    clock.sleep(0.3 * shared.seconds)
    shared.renew()
    assert "step" not in holder_of(folder)
    shared.release()
    assert holder_of(folder).get("released")
    assert try_acquire(folder, ExpiryWatch()) is not None


def test_a_child_leaves_the_lease_to_its_parent(folder, shared):
    acquire(folder).release()
    assert not holder_of(folder).get("released")
    shared.child_ended()
    assert not shared.is_lost


def test_a_child_that_does_not_renew_is_given_up_by_its_parent(folder, shared, clock):
    acquire(folder)
    shared.renew()
    clock.sleep(0.8 * shared.seconds)
    shared.renew()
    clock.sleep(0.4 * shared.seconds)
    assert shared.is_lost
    with pytest.raises(LeaseLostError):
        shared.renew()


def test_a_child_of_a_holder_that_was_replaced_holds_nothing(folder, shared, clock, monkeypatch):
    watch = ExpiryWatch()
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("OPDJAX_LEASE")
        assert try_acquire(folder, watch) is None
        clock.sleep(1.2 * shared.seconds)
        clock.while_asleep = try_acquire(folder, watch).renew
    with pytest.raises(WorkdirError, match="is being written by another run on"):
        acquire(folder)

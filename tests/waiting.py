"""Waiting for other processes without depending on how fast the machine is."""

import time

HANG = 300  # seconds after which a wait counts as a hang, on the slowest machine


def until(condition, interval=0.05):
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "this hangs"
        time.sleep(interval)

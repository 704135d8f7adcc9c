"""The benchmark: workers that fail, ratios of neighbouring runs, counted work and collectives."""

import argparse
import pathlib
import sys
import textwrap

import pytest

SCRIPTS = str(pathlib.Path(__file__).parents[2] / "scripts")
WORKER = """
    import os, time
    from benchmark_peers.protocol import Job, Stepper, serve

    def result(value):
        return {"result": value}

    def broken(case):
        raise ValueError("no such divergence")

    def loop(pause):
        print("training")  # must not reach the channel
        pause({"useful_tokens": 10})
        pause({"useful_tokens": 20})

    serve({
        "sleep": lambda case: Job(lambda: time.sleep(case["seconds"]) or 7, result),
        "steps": lambda case: Job(Stepper(loop), lambda facts: facts, warm_up=lambda: None),
        "broken": broken,
        "dies": lambda case: os._exit(3),
    }, {"fake": "1.0"})
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def worker(scripts, monkeypatch, tmp_path):
    from benchmark_peers import workers

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(
        workers, "_command", lambda *_: [sys.executable, "-c", textwrap.dedent(WORKER)]
    )
    worker = workers.Worker("fake", sys.executable, 1, tmp_path)
    yield worker
    worker.stop()


def prepare(worker, form, **fields):
    return worker.ask(do="prepare", case={"form": form} | fields)


def test_a_worker_times_its_work_and_reports_failures(worker):
    from benchmark_peers.workers import WorkerError

    prepare(worker, "sleep", seconds=0.02)
    answer = worker.ask(do="run")
    assert worker.versions == {"fake": "1.0"}
    assert 0.02 <= answer["seconds"] < 2
    assert answer["cpu_seconds"] < answer["seconds"]
    assert answer["facts"] == {"result": 7}
    with pytest.raises(WorkerError, match="ValueError: no such divergence"):
        prepare(worker, "broken")
    prepare(worker, "steps")
    assert [worker.ask(do="run")["facts"]["useful_tokens"] for _ in range(2)] == [10, 20]
    with pytest.raises(WorkerError, match="the training loop ended by itself"):
        worker.ask(do="run")
    with pytest.raises(WorkerError, match="ended with status 3"):
        prepare(worker, "dies")
    with pytest.raises(WorkerError, match="ended with status 3"):  # and stays dead
        prepare(worker, "sleep", seconds=0)


class Clock:
    """A worker with given seconds; it fails after its last run."""

    def __init__(self, seconds, tokens):
        self.threads, self._runs = (
            1,
            [
                {"seconds": s, "cpu_seconds": s, "facts": {"useful_tokens": t}}
                for s, t in zip(seconds, tokens)
            ],
        )

    def ask(self, **command):
        from benchmark_peers.workers import WorkerError

        if command["do"] != "run":
            return {}
        if not self._runs:
            raise WorkerError("no more")
        return self._runs.pop(0)


def test_ratios_are_of_neighbouring_runs_in_seconds_a_useful_token(scripts, monkeypatch):
    import benchmark

    forms = [benchmark.Form(system, "generate") for system in ("opdjax", "good", "bad")]
    monkeypatch.setattr(benchmark, "FORMS", {"tail": forms})
    monkeypatch.setattr(benchmark, "worker_case", lambda case, device: case)
    ours = Clock([1, 1, 2, 2], [100] * 4)
    fleet = argparse.Namespace(
        failures={},
        fastest={},
        workers={
            "opdjax": [ours],
            "good": [Clock([4, 16], [100, 200])],
            "bad": [Clock([1], [100])],
        },
    )
    options = argparse.Namespace(device="cpu", peers=["good", "bad"], repeats=2)
    rows = benchmark.measure({"kind": "tail", "title": "t"}, fleet, options)
    assert [row["system"] for row in rows] == ["opdjax", "good", "bad"]
    # good: 4 s against 1 s for as many tokens, then 16 s for twice as many against 2 s.
    assert rows[1]["ratio"] == pytest.approx((1 / 4 + 2 / 8) / 2)
    assert rows[2]["error"] == "no more"
    assert rows[0]["seconds"] == [1, 1, 2, 2]


def test_losses_that_disagree_are_named(scripts):
    import benchmark

    row = lambda loss, *norms: {"kind": "logits", "facts": {"loss": loss, "norms": list(norms)}}
    rows = [
        row(2.0, 1.0),
        row(2.0001, 1.0),
        row(1.0, 1.0),
        {"kind": "logits", "error": "has forward KL only"},
    ]
    benchmark.compare(rows, 1e-3)
    assert [found.get("warnings") for found in rows] == [
        None,
        None,
        ["DIFFERS: loss is 0.5 of opdjax's"],
        None,
    ]


def test_the_least_work_is_what_one_counts_by_hand(scripts):
    from benchmark_peers.settings import SIZES, Model, least_work

    model = Model(hidden=8, layers=2, heads=2, kv_heads=1, head=4, mlp=16, vocab=32)
    # A token and layer: q and o 8 x 8, k and v 8 x 4, three of 8 x 16; two products of head size a
    # head and column read.
    assert model.forward_flops(1, 0, 0) == 2 * 2 * (64 + 64 + 32 + 32 + 3 * 128)
    assert model.forward_flops(0, 1, 0) == 2 * 2 * 2 * 8
    assert model.forward_flops(0, 0, 1) == 2 * 8 * 32
    sizes, case = SIZES["cpu"], {"kind": "hidden", "tokens": 256}
    assert least_work(case, "cpu", 0) == (8 * 256 * sizes.vocab * sizes.width, 0)
    forward = sizes.student.forward_flops(16 * 160, 16 * 160 * 160 / 2, 16 * 128)
    assert least_work({"kind": "generate"}, "cpu", 16 * 128)[0] == forward


def test_collectives_in_a_loop_count_as_often_as_it_goes_round(scripts):
    import scaling

    text = textwrap.dedent("""\
        HloModule jit_update

        %body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
          %g = f32[4,8]{1,0} all-gather(%x), dimensions={0}
        }

        %condition.1 (p: (s32[], f32[4,8])) -> pred[] {
          %c = pred[] compare(%a, %b), direction=LT
        }

        ENTRY %main (a: f32[4,8]) -> f32[4,8] {
          %r = (f32[2]{0}, bf16[4]{0}) all-reduce(%a, %b), to_apply=%add
          %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition.1, body=%body.1, COUNT
        }
        """).replace("COUNT", 'backend_config={"known_trip_count":{"n":"5"}}')
    found = scaling.collectives(text)
    assert (found["all_gather"], found["all_reduce"], found["reduce_scatter"]) == (5, 1, 0)
    assert found["collective_mib"] == (5 * 4 * 8 * 4 + 2 * 4 + 4 * 2) / 2**20

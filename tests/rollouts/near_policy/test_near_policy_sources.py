"""Who draws the rollouts, and where, changes nothing of a run; how old they are is what the
schedule says.
"""

import dataclasses

import numpy as np
import pytest
from near_runs import (
    BASE,
    FILTERED,
    LAG,
    ONE_THREAD,
    PACKED,
    REFRESH,
    assert_same_steps,
    assert_same_weights,
    near,
    stored_samples,
)
from tiny_runs import column, finish, start, without_times

from opdjax.config.validation import ConfigError
from opdjax.data.chat import TokenizerMismatchError
from opdjax.runs.workdir import WorkdirError, read_lines
from opdjax.train import train


def ages(workdir):
    """step -> age, in updates, of the weights that sampled its rollouts, in continuous runs."""
    found = {}
    for (version, number), shard in stored_samples(workdir).items():
        assert set(shard.columns["policy_version"]) == {version}
        assert set(shard.columns["step"]) == {number}
        assert number not in found
        found[number] = number - version
    assert found.keys() == set(range(BASE.train.num_steps))
    return found


def run_of_two_processes(config, tmp_path, first="sample"):
    """The work directory that `opdjax sample --store` and `opdjax train` fill together."""
    workdir, processes = tmp_path / "run", {}
    for command in (first, *({"sample", "train"} - {first})):
        # A generator shards its rows over all devices that it has, and rounds accordingly.
        devices = 1 if command == "sample" else None
        files = tmp_path / command
        (processes[command],) = start(
            config, workdir, files=files, devices=devices, command=command
        )
    printed = {}
    try:
        for command, process in processes.items():
            statuses, printed[command] = finish([process], tmp_path / command)
            assert statuses == [0], printed
    finally:
        for process in processes.values():
            process.kill()
    return workdir


@pytest.mark.long
@pytest.mark.parametrize(
    ("sections", "tolerance"),
    [
        ({"estimator": {"recipe": "opd"}}, {}),
        pytest.param(
            {
                "estimator": {"recipe": "opd"},
                "lora": {"rank": 4},
                "sampling": {"num_generations": 2},
            },
            {},
            marks=pytest.mark.long,
        ),
        pytest.param({"estimator": {"recipe": "full_kl"}}, {}, marks=pytest.mark.long),
        # The teacher's top k is stored in float16.
        pytest.param({}, {"atol": 1e-3}, marks=pytest.mark.long),
    ],
    ids=["opd", "opd, adapters", "full_kl", "npd"],
)
def test_rollouts_drawn_no_update_ahead_are_on_policy(sections, tolerance, tmp_path):
    train(near({}, **sections), tmp_path / "none")
    train(near({"schedule": "continuous"}, **sections), tmp_path / "continuous")
    assert_same_weights(tmp_path / "none", tmp_path / "continuous", **tolerance)
    assert set(ages(tmp_path / "continuous").values()) == {0}
    lessons = [
        [
            {key: value for key, value in row.items() if not key.startswith("perf/")}
            for row in without_times(tmp_path / name)
        ]
        for name in ("none", "continuous")
    ]
    assert tolerance or lessons[0] == lessons[1]


def test_rollouts_are_as_old_as_the_schedule_says(ahead):
    assert ages(ahead) == {step: min(step, 2) for step in range(6)}
    assert column(ahead, "staleness/max") == [0, 1, 2, 2, 2, 2]
    assert min(column(ahead, "filter/keep_rate")) < 1


@pytest.mark.long
def test_a_thread_generates_what_the_learner_would_have(ahead, tmp_path):
    train(near(LAG | FILTERED | ONE_THREAD, **PACKED), tmp_path / "thread")
    assert_same_steps(ahead, tmp_path / "thread")
    assert ages(tmp_path / "thread") == ages(ahead)


@pytest.mark.long
def test_another_process_generates_what_the_learner_would_have(ahead, tmp_path):
    config = near(LAG | FILTERED | {"generator": "process"}, **PACKED)
    workdir = run_of_two_processes(config, tmp_path)
    assert_same_steps(ahead, workdir)
    assert ages(workdir) == ages(ahead)


@pytest.mark.long
def test_another_process_answers_the_prompts_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("opdjax.rollouts.near_policy.store.SHARD_SIZE", 1024)  # as theirs
    train(near(REFRESH), tmp_path / "one")
    config = near(REFRESH | {"generator": "process"})
    assert_same_steps(tmp_path / "one", run_of_two_processes(config, tmp_path, first="train"))


@pytest.mark.long
def test_an_epoch_is_drawn_by_the_weights_before_it(refreshed):
    shards = stored_samples(refreshed)
    assert list(shards) == [(0, 0), (0, 1), (3, 0), (3, 1)]
    assert all(
        set(shard.columns["policy_version"]) == {version} for (version, _), shard in shards.items()
    )
    ids = [
        np.concatenate([shards[version, number].columns["prompt_id"] for number in (0, 1)])
        for version in (0, 3)
    ]
    np.testing.assert_array_equal(*ids)
    assert len(np.unique(ids[0])) == 24
    assert column(refreshed, "staleness/max") == [0, 1, 2, 0, 1, 2]


@pytest.mark.long
def test_a_free_lag_is_never_more_than_is_allowed(tmp_path):
    train(near(LAG | FILTERED | ONE_THREAD | {"lag": "free"}, **PACKED), tmp_path / "run")
    assert all(0 <= age <= 2 for age in ages(tmp_path / "run").values())


@pytest.mark.long
def test_learner_and_generator_on_meshes_of_their_own(ahead, tmp_path):
    """Four devices learn, two draw: within rounding of one device each. And with adapters in
    bfloat16.
    """
    config = near(LAG | FILTERED | {"generator": "thread"}, **PACKED, mesh={"data": 4})
    train(config, tmp_path / "many")
    assert_same_weights(ahead, tmp_path / "many", atol=1e-3)
    adapters = dataclasses.replace(
        config,
        lora=dataclasses.replace(config.lora, rank=4),
        train=dataclasses.replace(config.train, dtype="bfloat16"),
    )
    train(adapters, tmp_path / "adapters")
    assert ages(tmp_path / "adapters") == {step: min(step, 2) for step in range(6)}


@pytest.mark.long
def test_a_probe_reads_longer_rollouts_than_the_filter_kept(tmp_path):
    """Version 3 keeps none of the longest; the probe is of all."""
    given = {"sampling": {"max_completion_length": 24}, "log": {"diagnostics_every": 1}}
    config = dataclasses.replace(near(REFRESH | FILTERED | {"ifd_quantile": 0.3}, **given), seed=1)
    train(config, tmp_path / "run")
    assert all(
        row["staleness/kl_all"] >= 0 for row in read_lines(tmp_path / "run" / "metrics.jsonl")
    )


@pytest.mark.long
def test_steps_of_which_nothing_is_kept_teach_nothing_and_end_the_run(tmp_path):
    config = near(
        LAG | {"filter": "ifd", "ifd_min": 50.0, "ifd_max": 60.0},
        log={"samples_every": 1, "diagnostics_every": 1},
    )
    with pytest.raises(
        ConfigError,
        match=r"has kept no rollout of the last 5 steps, up to 4 .*start in a new work directory "
        r"with wider",
    ):
        train(config, tmp_path / "run")
    for row in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert (
            row["grad/norm"],
            row["filter/keep_rate"],
            row["perf/trained_tokens"],
            row["grad/skipped_steps"],
        ) == (0, 0, 0, 0)
    with pytest.raises(ConfigError, match="keeps 0 of 24 rollouts"):
        train(
            near(REFRESH | {"filter": "ifd", "ifd_min": 50.0, "ifd_max": 60.0}),
            tmp_path / "refresh",
        )


@pytest.mark.long
def test_a_teacher_that_is_shown_more_at_another_temperature(tmp_path):
    sections = {
        "data": {"teacher_prompt_format": "{reference}\n{prompt}", "max_prompt_length": 64},
        "sampling": {"temperature": 0.7, "num_generations": 2},
        "log": {"samples_every": 3, "diagnostics_every": 2},
    }
    near_policy = FILTERED | {"ifd_quantile": None, "ifd_max": None}
    train(
        near(
            LAG | near_policy,
            **sections,
            train={"pack_length": 90, "gradient_accumulation_steps": 2},
        ),
        tmp_path / "continuous",
    )
    train(near(REFRESH | near_policy, **sections), tmp_path / "refresh")
    for name in ("continuous", "refresh"):
        rows = read_lines(tmp_path / name / "metrics.jsonl")
        assert all(
            row["filter/keep_rate"] == 1 for row in rows if row.get("filter/keep_rate") is not None
        )
        assert all(row["staleness/kl"] < 1e-6 for row in rows[:1])


def test_another_lag_is_another_run(ahead):
    with pytest.raises(WorkdirError, match="near_policy.max_staleness"):
        train(near(LAG | FILTERED | {"max_staleness": 3}, **PACKED), ahead)


@pytest.mark.parametrize("recipe", ["npd", "full_kl"])
def test_a_teacher_with_another_tokenizer_is_refused_before_anything_is_drawn(
    recipe, monkeypatch, tmp_path
):
    def other(*_):
        raise TokenizerMismatchError("another vocabulary")

    monkeypatch.setattr("opdjax.rollouts.setup.check_same_vocabulary", other)
    with pytest.raises(TokenizerMismatchError):
        train(near(REFRESH | FILTERED, estimator={"recipe": recipe}), tmp_path / "run")
    assert not (tmp_path / "run" / "rollouts").exists()

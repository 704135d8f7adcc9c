"""`opdjax rollouts`: counts, accounts, damage by name, and samples as text; without jax."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from opdjax.config import MINI_PAIR, MINI_STUDENT, Config, ModelConfig
from opdjax.data.chat import render
from opdjax.data.tokenizer import load_tokenizer
from opdjax.rollouts.near_policy import ifd, shards
from opdjax.rollouts.near_policy.inspection import inspect
from opdjax.runs.workdir import WorkdirError, claim

SHARDS = {0: (0, 1), 12: (0,)}  # numbers of each version
TOP_K = 2


def ids_of(version, number):
    return {
        "policy_version": [version] * 4,
        "prompt_id": [2 * number, 2 * number, 2 * number + 1, 2 * number + 1],
        "sample_id": [0, 1, 0, 1],
    }


def samples_of(version, number, tokenizer):
    prompt = render("34-17+25=", tokenizer, format="chat", system_prompt=None, enable_thinking=None)
    answer = tokenizer.encode("34-17=17;17+25=42#42", add_special_tokens=False)
    logprobs = [np.full(len(answer), -0.5)] * 4
    return ids_of(version, number) | {
        "step": [version] * 4,
        "is_truncated": [False, True, False, False],
        "prompt_tokens": [prompt] * 4,
        "tokens": [answer] * 4,
        "behavior_logprobs": logprobs,
        "unfiltered_logprobs": logprobs,
        "student_nll": [0.5] * 4,
        "student_alone_nll": [1.0] * 4,
    }


def annotations_of(version, number, length):
    return ids_of(version, number) | {
        "teacher_logprobs": [np.full(length, -0.4)] * 4,
        "teacher_ids": [np.arange(TOP_K * length)] * 4,
        "teacher_top_logprobs": [np.full(TOP_K * length, -1.0)] * 4,
        "teacher_nll": [0.4] * 4,
        "teacher_alone_nll": [None] * 4,
    }


def filter_of(version, deltas):
    delta = np.array(deltas)
    facts = {"version": version, "number": 0, "filter": "ifd", "form": "nll_ratio"}
    return ifd.document(
        facts | {"ifd_min": 0.0, "ifd_max": 0.8},
        kept=ifd.zones(delta, 0.0, 0.8) == "kept",
        samples={
            "prompt_id": np.arange(len(delta)),
            "sample_id": np.zeros(len(delta)),
            "student_ifd": np.zeros(len(delta)),
            "teacher_ifd": delta,
        },
        is_correct=np.array([True, False] * (len(delta) // 2)),
        texts_of=lambda i: (str(i), str(i)),
        seed=0,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINI_PAIR / "student")


@pytest.fixture
def run(tmp_path, tokenizer):
    """A work directory with two versions, in order."""
    config = dataclasses.replace(Config(), student=ModelConfig(MINI_STUDENT))
    claim(tmp_path, config, {"data": {}, "environment": {}})
    for version, numbers in SHARDS.items():
        directory = shards.version_directory(tmp_path, version)
        for number in numbers:
            samples = samples_of(version, number, tokenizer)
            shards.write_shard(directory, "samples", number, samples, {"seed": 7})
            annotations = annotations_of(version, number, len(samples["tokens"][0]))
            shards.write_shard(directory, "annotations", number, annotations, {"top_k": TOP_K})
    shards.write_filter(
        shards.version_directory(tmp_path, 0),
        0,
        filter_of(0, [0.1, -0.1, 0.2, 0.9, 0.3, 0.0, np.nan, 0.1]),
    )
    return tmp_path


@pytest.fixture
def look(capsys):
    """look(path, ...) -> (is in order, lines with their blanks run together)."""

    def call(*arguments):
        is_in_order = inspect(*arguments)
        return is_in_order, [
            " ".join(line.split()) for line in capsys.readouterr().out.splitlines()
        ]

    return call


def size(run, version, stage):
    return sum(
        path.stat().st_size
        for path in shards.shard_paths(shards.version_directory(run, version), stage).values()
    )


def test_a_work_directory_is_counted_by_version(run, look, tokenizer):
    is_in_order, lines = look(run)
    prompt, answer = (
        sum(map(len, samples_of(0, 0, tokenizer)[name])) for name in ("prompt_tokens", "tokens")
    )
    assert is_in_order
    by_stage = [f"{size(run, 0, stage) / (2 * answer):.1f}" for stage in shards.SCHEMAS]
    assert lines[:3] == [
        "version shards samples prompt tokens tokens bytes a token annotated bytes a token",
        f"0 4 8 {2 * prompt} {2 * answer} {by_stage[0]} 8 {by_stage[1]}",
        f"12 2 4 {prompt} {answer} {size(run, 12, 'samples') / answer:.1f} 4 "
        f"{size(run, 12, 'annotations') / answer:.1f}",
    ]
    assert lines[3:] == [
        "version filter bounds samples kept degenerate disconnected unscored",
        "0 ifd nll_ratio 0 to 0.8 8 62.5 % 12.5 % 12.5 % 12.5 %",
        "samples: schema 1, seed 7",
        "annotations: schema 1, top_k 2",
        "12 samples: 0 repeated, 0 without annotation; 12 annotations: 0 repeated, 0 without "
        "sample",
    ]


def test_a_version_is_counted_by_number(run, look):
    is_in_order, lines = look(shards.version_directory(run, 0))
    assert is_in_order
    assert [line.split()[:3] for line in lines[:3]] == [
        ["number", "shards", "samples"],
        ["0", "2", "4"],
        ["1", "2", "4"],
    ]
    assert lines[4].startswith("0 ifd nll_ratio 0 to 0.8 8 62.5 %")


def test_damage_is_named_and_the_rest_is_counted(run, look):
    directory = shards.version_directory(run, 0)
    damaged = shards.shard_paths(directory, "samples")[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    (directory / "filter-00000000.json").write_text("{")
    for path in (run, directory):
        is_in_order, lines = look(path)
        assert not is_in_order
        assert any(line.startswith(f"damaged: {damaged} is truncated") for line in lines)
        assert any(
            line.startswith(f"damaged: {directory / 'filter-00000000.json'} cannot be read as JSON")
            for line in lines
        )
        assert any("0 repeated, 4 without sample" in line for line in lines)


def test_samples_may_wait_for_their_annotation(run, look):
    shards.shard_paths(shards.version_directory(run, 0), "annotations")[1].unlink()
    is_in_order, lines = look(run)
    assert is_in_order
    assert (
        "12 samples: 0 repeated, 4 without annotation; 8 annotations: 0 repeated, 0 without sample"
        in lines
    )
    assert lines[1].split()[6] == "4"


def test_a_sample_stored_twice_is_told(run, look, tokenizer):
    directory = shards.version_directory(run, 0)
    shards.write_shard(directory, "samples", 2, samples_of(0, 1, tokenizer), {"seed": 8})
    is_in_order, lines = look(run)
    assert not is_in_order
    assert (
        "16 samples: 4 repeated, 4 without annotation; 12 annotations: 0 repeated, 0 without sample"
        in lines
    )
    assert "samples: schema 1, seed 7 or 8" in lines
    # The same prompt of the same policy, drawn for another step, is another sample.
    shards.write_shard(
        directory, "samples", 2, samples_of(0, 1, tokenizer) | {"step": [3] * 4}, {"seed": 8}
    )
    is_in_order, lines = look(run)
    assert is_in_order
    twice = samples_of(0, 1, tokenizer) | {"sample_id": [0, 0, 1, 1]}
    shards.write_shard(directory, "samples", 3, twice, {})
    is_in_order, lines = look(directory)
    assert not is_in_order
    assert any(line.startswith("16 samples: 4 repeated, ") for line in lines)


def test_samples_are_shown_as_text_where_the_run_names_a_tokenizer(run, look):
    _, lines = look(run, 3)
    shown = lines[lines.index("") :]
    assert [line for line in shown if line.startswith("step")] == [
        "step 0, policy_version 0, prompt_id 0, sample_id 0",
        "step 0, policy_version 0, prompt_id 2, sample_id 0",
        "step 12, policy_version 12, prompt_id 0, sample_id 0",
    ]
    assert shown[2].endswith(
        r"tokens): '<|im_start|>user\n34-17+25=<|im_end|>\n<|im_start|>assistant\n'"
    )
    assert shown[3] == "completion (13 tokens): '34-17=17;17+25=42#42'"
    assert len([line for line in look(run, 100)[1] if line.startswith("step")]) == 12


def test_samples_are_shown_as_ids_without_it(run, look, tokenizer):
    (run / "config.json").unlink()
    _, lines = look(shards.version_directory(run, 12), 2)
    assert any(
        line.startswith(f"note: tokens are shown as ids: {run} has no config.json")
        for line in lines
    )
    assert f"completion (13 tokens): {samples_of(0, 0, tokenizer)['tokens'][0]}" in lines
    assert "step 12, policy_version 12, prompt_id 1, sample_id 0" in lines


def test_what_holds_no_rollouts_is_refused(tmp_path):
    with pytest.raises(
        WorkdirError,
        match=f"{tmp_path} holds no rollouts; expected a directory rollouts/VERSION",
    ):
        inspect(tmp_path)
    with pytest.raises(WorkdirError, match="nowhere does not exist"):
        inspect(tmp_path / "nowhere")


VERB = """
import sys
from opdjax.cli.main import main
try:
    main()
except SystemExit as end:
    print("status", end.code, "loaded", sorted({"jax", "flax"} & set(sys.modules)))
"""


def test_the_verb_needs_no_jax_and_its_status_tells(run):
    def verb(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", VERB, "inspect", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()[-1]

    assert verb(run, "--samples", 1) == "status 0 loaded []"
    path = shards.shard_paths(shards.version_directory(run, 12), "samples")[0]
    path.write_bytes(b"")
    assert verb(run) == "status 1 loaded []"
    assert verb(run, "--samples", -1) == verb(run / "nowhere") == "status 2 loaded []"

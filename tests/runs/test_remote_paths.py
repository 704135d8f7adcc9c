"""Every path that may lie on gs:// instead: models, data, answers, tables, reports, exports,
scores.
"""

import json
import shutil

import pytest

from opdjax.cli import main
from opdjax.config import MINI_STUDENT, Config, DataConfig, EstimatorConfig, ModelConfig
from opdjax.data.prompt_rows import read_prompts
from opdjax.data.references import key_of, open_index
from opdjax.data.sources import ColumnMap
from opdjax.models.hf import open_checkpoint
from opdjax.rollouts.near_policy.generator_process import annotate_all, generate_for
from opdjax.runs.mirror import open_remote_file
from opdjax.runs.object_store import Folder, RemoteError, scratch_root
from opdjax.runs.workdir import WorkdirError, append_lines

pytestmark = pytest.mark.long

ROW = {"prompt": "1+1=", "answer": "2"}


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["opdjax", *map(str, arguments)])
    code = 0
    try:
        main.main()
    except SystemExit as end:
        code = end.code
    return code, "".join(capsys.readouterr())


@pytest.fixture
def model(gcs):
    """A checkpoint on gs://, with something beside it that no loader needs."""
    folder = Folder("gs://bucket/models/student")
    for file in open_checkpoint(MINI_STUDENT, None).path.iterdir():
        folder.upload_file(file, file.name)
    folder.write("huge.bin", b"not wanted")
    return folder.url


def test_a_model(model):
    checkpoint = open_checkpoint(model, None)
    assert checkpoint.config == open_checkpoint(MINI_STUDENT, None).config
    assert not (checkpoint.path / "huge.bin").exists()
    with pytest.raises(RemoteError, match="there is nothing at gs://bucket/models/none"):
        open_checkpoint("gs://bucket/models/none", None)


def test_prompts(gcs, tmp_path):
    Folder("gs://bucket/data").write("train.jsonl", json.dumps(ROW).encode() + b"\n")
    assert [row.prompt for row in read_prompts("gs://bucket/data/train.jsonl", ColumnMap())] == [
        "1+1="
    ]
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pyarrow.write_table(pa.Table.from_pylist([ROW, ROW]), tmp_path / "part.parquet")
    Folder("gs://bucket/data/parts").upload_file(tmp_path / "part.parquet", "a.parquet")
    assert len(list(read_prompts("parquet:gs://bucket/data/parts", ColumnMap()))) == 2
    with pytest.raises(RemoteError, match="there is nothing at gs://bucket/data/no.jsonl"):
        read_prompts("gs://bucket/data/no.jsonl", ColumnMap())


def test_an_index_of_answers_has_one_writer_and_grows(gcs, monkeypatch):
    monkeypatch.setenv("OPDJAX_LEASE_SECONDS", "2")
    url = "gs://bucket/answers.jsonl"
    with open_remote_file(url, "teach") as (path, keep):
        open_index(path, {"model": "m"})
        keep()
        with (
            pytest.raises(WorkdirError, match="is being written by another run on"),
            open_remote_file(url, "teach"),
        ):
            pass
        answer = {"draw": 0, "text": "2", "is_truncated": False}
        append_lines(path, [{"key": key_of("1+1="), "prompt": "1+1=", "answers": [answer]}])
        assert Folder("gs://bucket").read("answers.jsonl").count(b"\n") == 1
    shutil.rmtree(scratch_root())
    with open_remote_file(url, "teach") as (path, _):
        assert open_index(path, {"model": "m"}).missing("1+1=", 2) == [1]


@pytest.fixture
def swept(gcs, tmp_path):
    """A sweep of one finished point on gs://, of files as a run writes them."""
    from opdjax.config.validation import to_dict

    folder = Folder("gs://bucket/sweep")
    config = to_dict(Config(student=ModelConfig(MINI_STUDENT)))
    scores = {
        "step": 2,
        "temperature": 1.0,
        "k": 2,
        "avg@k": 0.5,
        "pass@k": 0.75,
        "greedy": 0.5,
        "num_prompts": 4,
    }
    scores |= {f"{name}_interval": 0.1 for name in ("avg@k", "pass@k", "greedy")}
    difference = {"avg@k": 0.1, "avg@k_interval": 0.1, "greedy": 0.1, "greedy_interval": 0.1}
    counts = {
        "num_steps": 2,
        "rows_per_step": 2,
        "skipped_steps": 0,
        "skipped_prompts": 0,
        "seconds": 1.0,
    }
    scored = {
        "eval_before": scores | {"avg@k": 0.4, "step": 0},
        "eval_after": scores,
        "paired_difference": difference,
    }
    result = {
        "recipe": "vopd",
        "student": "student",
        "eval_before_sharpened": [],
        **counts,
        **scored,
    }
    written = {
        "point.json": {"id": "seed=0", "overrides": {"seed": "0"}, "config": config},
        "config.json": {"config": config, "data": {"prompts": "d"}, "environment": {"commit": "c"}},
        "result.json": result,
    }
    for name, value in written.items():
        folder.write(f"seed=0/{name}", json.dumps(value).encode())
    folder.write(
        "seed=0/metrics.jsonl",
        b'{"step": 1, "loss/objective": 0.5}\n{"step": 2, "loss/objective": 0.4}\n',
    )
    folder.write("seed=0/checkpoints/2/default/big", b"x")
    return folder


def test_a_table_and_a_report(swept, gcs, monkeypatch, capsys):
    code, out = call(monkeypatch, capsys, "table", swept.url)
    assert (code, "0.500" in out) == (0, True), out
    output = ("--format", "json", "--output", "gs://bucket/tables/a.json")
    code, out = call(monkeypatch, capsys, "table", swept.url, *output)
    assert (code, "wrote gs://bucket/tables/a.json" in out) == (0, True), out
    assert "avg@k" in Folder("gs://bucket/tables").read("a.json").decode()
    pytest.importorskip("matplotlib")
    code, out = call(monkeypatch, capsys, "report", swept.url)
    assert (code, "wrote gs://bucket/sweep/report.html" in out) == (0, True), out
    assert b"</html>" in swept.read("report.html")
    assert not any(
        "checkpoints" in request for request in gcs.store.requests if "alt=media" in request
    )
    swept.write("seed=0/result.json", b"{")
    code, out = call(monkeypatch, capsys, "table", swept.url)
    assert (
        code,
        "opdjax: gs://bucket/sweep/seed=0/result.json cannot be read as JSON" in out,
    ) == (2, True), out


def test_inspect_says_where_nothing_is(gcs, monkeypatch, capsys):
    code, out = call(monkeypatch, capsys, "inspect", "gs://bucket/nothing")
    assert (code, "gs://bucket/nothing holds no rollouts" in out) == (2, True), out


@pytest.mark.long
def test_a_run_reads_and_is_read_on_gcs_alone(model, gcs, monkeypatch, capsys, tmp_path):
    """Train from a model and data on gs:// into gs://; export, evaluate, sample, inspect, report
    from there.
    """
    from opdjax.train import train

    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(10, 40)]
    Folder("gs://bucket/data").write(
        "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    import dataclasses

    from test_remote_run import SMALL

    from opdjax.config import NearPolicyConfig

    config = dataclasses.replace(
        SMALL,
        student=ModelConfig(model),
        data=DataConfig(source="gs://bucket/data/train.jsonl", max_prompt_length=32),
        evaluation=dataclasses.replace(SMALL.evaluation, source="gs://bucket/data/train.jsonl"),
        near_policy=NearPolicyConfig(schedule="continuous"),
    )
    assert train(config, "gs://bucket/near")["num_steps"] == 6
    code, out = call(
        monkeypatch, capsys, "export", "gs://bucket/near", "gs://bucket/exported", "--step", "6"
    )
    assert (code, "wrote gs://bucket/exported" in out) == (0, True), out
    assert Folder("gs://bucket/exported").read("model.safetensors") == Folder(
        "gs://bucket/near/student"
    ).read("model.safetensors")
    code, out = call(monkeypatch, capsys, "export", "gs://bucket/near", "gs://bucket/exported")
    assert (code, "gs://bucket/exported exists and is not empty" in out) == (2, True), out
    options = [
        "--data.max-prompt-length",
        32,
        "--evaluation.num-prompts",
        2,
        "--evaluation.num-samples",
        2,
    ]
    code, out = call(
        monkeypatch,
        capsys,
        "evaluate",
        "gs://bucket/exported",
        *options,
        "--output",
        "gs://bucket/scores.json",
    )
    assert code == 0, out
    assert "avg@k" in json.loads(Folder("gs://bucket").read("scores.json"))
    code, out = call(monkeypatch, capsys, "inspect", "gs://bucket/near")
    assert code == 0, out
    code, out = call(monkeypatch, capsys, "report", "gs://bucket/near")
    assert code == 0, out
    npd, near = EstimatorConfig("npd"), NearPolicyConfig(schedule="refresh")
    refresh = dataclasses.replace(
        config,
        estimator=npd,
        near_policy=near,
        train=dataclasses.replace(config.train, pack_length=60),
    )
    assert generate_for("gs://bucket/ahead", refresh) > 0
    shards = [
        name
        for name in Folder("gs://bucket/ahead").files()
        if name.startswith("rollouts/00000000/")
    ]
    Folder("gs://bucket/ahead").remove(next(name for name in shards if "annotations" in name))
    assert annotate_all("gs://bucket/ahead") == 1
    assert [
        name
        for name in Folder("gs://bucket/ahead").files()
        if name.startswith("rollouts/00000000/")
    ] == shards

"""`opdjax references`: a checkpoint or a server writes a few answers to each prompt, also after
interruptions; runs train on the file.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import re
import sys
import threading

import pytest
from answer_runs import copy_of, swap_two_ids, taught

import opdjax.rollouts.write_references
from opdjax.cli import main
from opdjax.config import (
    MINI_PAIR,
    STUDENT,
    ApiConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
    TeachConfig,
)
from opdjax.config.validation import ConfigError
from opdjax.data.references import ReferenceIndexError, ReferenceMissError, key_of, read_index
from opdjax.data.tasks import arithmetic
from opdjax.judge.replies import (
    ApiRefusedError,
    ApiUnavailableError,
    OfflineMissError,
    SpendingCapError,
)
from opdjax.rollouts.one_model import load, sample
from opdjax.rollouts.setup import prepare
from opdjax.rollouts.write_references import teach
from opdjax.runs.object_store import RemoteError
from opdjax.runs.workdir import WorkdirError, locked, read_lines
from opdjax.train import _prepared, train

PROBLEMS = arithmetic.problems("train")[:16]
KEY = "sk-planted-0123456789"


def lesson(path, *, how=None, mesh=1, **data):
    """16 sums for the mini teacher; some fields of the data and of the teaching replaced."""
    data = {
        "source": "arithmetic:train[:16]",
        "max_prompt_length": 32,
        "references": str(path),
    } | data
    how = {"num_answers": 3, "max_completion_length": 24} | (how or {})
    return Config(data=DataConfig(**data), teach=TeachConfig(**how), mesh=MeshConfig(mesh))


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Batches of six prompts: three of the lesson's sixteen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdjax.rollouts.write_references._BATCH_SIZE", 6)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An index that was written in one go, and what was told of it."""
    path = tmp_path_factory.mktemp("straight") / "answers.jsonl"
    return path, teach(lesson(path))


# A checkpoint


def test_every_prompt_is_answered_and_well(straight):
    path, told = straight
    index = read_index(path)
    assert index.answers.keys() == {key_of(problem.prompt) for problem in PROBLEMS}
    assert told["prompts"] == 16
    assert told["answers"] == 48
    assert told["empty"] + told["truncated"] <= 4
    assert told["tokens"] > 48
    assert told["prompts left out for their length"] == 0
    right = sum(
        text.endswith(f"#{problem.answer}")
        for problem in PROBLEMS
        for text in index.usable(problem.prompt)
    )
    assert right > 40
    assert "<|" not in path.read_text().partition("\n")[2]
    unique = [
        len({answer.text for answer in answers.values() if not answer.is_truncated})
        for answers in index.answers.values()
    ]
    assert told["prompts with fewer than 3 different answers"] == sum(
        number < 3 for number in unique
    )
    assert told["duplicates"] == 48 - told["truncated"] - told["empty"] - sum(unique)


def test_a_second_time_nobody_is_asked(straight, monkeypatch, capsys):
    path, told = straight
    before = path.read_bytes()
    monkeypatch.setattr(opdjax.rollouts.write_references, "load_params", None)  # would be called
    assert teach(lesson(path)) == {name: value for name, value in told.items() if name != "tokens"}
    assert "16 of 16 prompts have their 3 answers; nothing to do" in capsys.readouterr().out
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_what_was_cut_short_ends_as_the_straight_one(straight, tmp_path, share):
    whole = straight[0].read_bytes()
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole[: int(len(whole) * share)])
    teach(lesson(path))
    assert read_index(path) == dataclasses.replace(read_index(straight[0]), path=path)


def test_an_interrupted_batch_is_all_that_is_lost(straight, tmp_path, monkeypatch):
    real, batches = opdjax.rollouts.write_references.add_answers, []

    def interrupted(path, answers):
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt
        real(path, answers)

    monkeypatch.setattr(opdjax.rollouts.write_references, "add_answers", interrupted)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        teach(lesson(path))
    assert len(read_index(path).answers) == 6
    teach(lesson(path))
    assert len(batches) == 4
    assert read_index(path).answers == read_index(straight[0]).answers


@pytest.mark.long
def test_answers_depend_on_the_prompt_alone(straight, tmp_path):
    """Not on the order of the rows, those beside them, the size of a batch, the devices, or how
    many were asked for at first.
    """
    rows = [{"prompt": problem.prompt} for problem in reversed(PROBLEMS[4:12])] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "answers.jsonl"
    for num_answers in (1, 3):
        config = lesson(
            path,
            how={"num_answers": num_answers},
            mesh=8,
            source=str(tmp_path / "rows.jsonl"),
        )
        assert teach(config)["prompts"] == 8
    found, expected = read_index(path).answers, read_index(straight[0]).answers
    assert found == {
        key_of(problem.prompt): expected[key_of(problem.prompt)] for problem in PROBLEMS[4:12]
    }


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"how": {"temperature": 0.5}}, "temperature: 1.0 -> 0.5"),
        ({"how": {"max_completion_length": 25}}, "max_completion_length: 24 -> 25"),
        ({"prompt_format": "0+{prompt}"}, "prompt_format: '{prompt}' -> '0+{prompt}'"),
        ({"teacher_format": "raw"}, "format: 'chat' -> 'raw'"),
    ],
)
def test_another_teaching_is_refused(straight, changed, line):
    with pytest.raises(ReferenceIndexError, match=re.escape(line)):
        teach(lesson(straight[0], **changed))


def test_another_checkpoint_or_seed_is_refused(straight):
    path, before = straight[0], straight[0].read_bytes()
    with pytest.raises(ReferenceIndexError, match="checkpoint: .*\n  seed: 0 -> 1"):
        teach(dataclasses.replace(lesson(path), teacher=ModelConfig("@mini_student"), seed=1))
    assert path.read_bytes() == before


def test_two_writers_are_refused(straight):
    path = straight[0]
    with (
        locked(path.parent, f"teach-{path.name}"),
        pytest.raises(
            ReferenceIndexError, match="being written by another opdjax references: wait"
        ),
    ):
        teach(lesson(path))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ReferenceIndexError, match=r"data\.references, .*file/answers\.jsonl, cannot be written"
    ):
        teach(lesson(tmp_path / "file" / "answers.jsonl"))
    with pytest.raises(RemoteError, match="s3://bucket/answers.jsonl cannot be read or written"):
        teach(lesson("s3://bucket/answers.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig()}, "data.references is None; expected the file"),
        (
            {"teacher": ModelConfig(STUDENT)},
            "teacher.path is '@student'; expected a checkpoint, or a model behind an API",
        ),
        ({"mesh": MeshConfig(processes=2)}, "mesh.processes is 2; expected 1"),
    ],
)
def test_what_cannot_be_taught_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        teach(dataclasses.replace(lesson(tmp_path / "answers.jsonl"), **changes))
    assert not list(tmp_path.iterdir())


def test_prompts_that_no_run_keeps_are_not_asked(tmp_path):
    """A prompt is too long by the student's tokens: it is neither answered nor missed, at whatever
    time it would be.
    """
    rows = [
        {"prompt": prompt} for prompt in ("1+2+3+4+5+6+7+8=", "1+1=", "2+3=", "9+8+7+6+5+4+3+2=")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "answers.jsonl"
    config = lesson(path, source=str(tmp_path / "rows.jsonl"), max_prompt_length=14)
    for _ in range(2):
        told = teach(config)
        assert (
            told["prompts"],
            told["prompts left out for their length"],
            told["prompts without any"],
        ) == (2, 2, 0)
    run = taught("references", data=vars(config.data))
    assert len(prepare(run).prompts) == 2
    with pytest.raises(ReferenceMissError, match="no answers to 2 of the 4 prompts"):
        prepare(taught("references", data={**vars(config.data), "max_prompt_length": 99}))


@pytest.mark.long
def test_a_teacher_of_another_vocabulary_writes_text(tmp_path):
    """The mini teacher with the ids of 98 and 99 exchanged says 98 where it said 99 and the other
    way round, and nothing else.
    """

    def exchanged(text):
        return re.sub(r"9[89]", lambda found: "98" if found[0] == "99" else "99", text)

    sums = ["98+1+1=", "99-1+0=", "50+48+1=", "3+4+5="]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in sums)
    )
    path = tmp_path / "answers.jsonl"
    other = copy_of(MINI_PAIR / "teacher", tmp_path / "other", swap_two_ids)
    config = lesson(
        path, source=str(tmp_path / "rows.jsonl"), how={"temperature": 0.0, "num_answers": 1}
    )
    teach(dataclasses.replace(config, teacher=other))
    other_sums = [exchanged(text) for text in sums]
    answers = sample(
        load("@mini_teacher"),
        other_sums,
        data=config.data,
        max_completion_length=24,
        temperature=0.0,
    )
    said = {text: completion for text, (completion,) in zip(other_sums, answers)}
    assert [read_index(path).usable(text) for text in sums] == [
        (exchanged(said[exchanged(text)]),) for text in sums
    ]
    assert any("98" in text or "99" in text for text in said.values())
    train(
        taught(
            "references", data={"source": str(tmp_path / "rows.jsonl"), "references": str(path)}
        ),
        tmp_path / "run",
    )


# Runs


@pytest.mark.long
def test_a_run_learns_from_the_index(straight, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(straight[0].read_bytes())
    data = vars(lesson(path).data)
    train(taught("references", data=data), tmp_path / "run")
    index = read_index(path)
    rows = read_lines(tmp_path / "run" / "samples.jsonl")
    assert len(rows) == 8
    assert all(row["completion"] in index.usable(row["prompt"]) for row in rows)
    # The run goes on with these answers alone.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[-1].replace("#", "=", 1)]))
    with pytest.raises(WorkdirError, match="data.prompts"):
        train(taught("references", data=data), tmp_path / "run")
    path.write_text("".join(lines[:-2]))
    with pytest.raises(
        ReferenceMissError, match="2 have never been answered: opdjax references EXPERIMENT"
    ):
        prepare(taught("references", data=data))


def test_training_first_writes_the_references_that_are_missing(straight, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    config = taught("references", data=vars(lesson(path).data), teach=vars(lesson(path).teach))
    lines = straight[0].read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))  # as of an interrupted command
    setup = _prepared(config, "2026-05-01")
    assert f"@mini_teacher writes the missing answers of {path}" in capsys.readouterr().out
    index = read_index(path)
    assert index.answers == read_index(straight[0]).answers
    assert all(row.references == index.usable(row.prompt) for row in setup.prompts.prompts)
    # A model behind an API may cost money.
    path.unlink()
    api = dataclasses.replace(config, teach=TeachConfig(model="big", base_url="http://host:1/v1"))
    with pytest.raises(ReferenceMissError, match=r"does not exist.* with --teach\.auto"):
        _prepared(api, "2026-05-01")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdjax.train.write_references", lambda *given: asked.append(given))
        auto = dataclasses.replace(api, teach=dataclasses.replace(api.teach, auto=True))
        with pytest.raises(ReferenceMissError):
            _prepared(auto, "2026-05-01")
    assert asked == [(auto, "2026-05-01")]


def test_a_checkpoint_stops_at_the_stop_strings_of_the_run(tmp_path, monkeypatch):
    class SampledError(Exception):
        pass

    def sample(*_, decoding, **__):
        assert decoding.stop_strings.texts == ("#",)
        raise SampledError

    monkeypatch.setattr(opdjax.rollouts.write_references, "sample", sample)
    path = tmp_path / "answers.jsonl"
    config = dataclasses.replace(lesson(path), sampling=SamplingConfig(stop_strings=("#",)))
    with pytest.raises(SampledError):
        teach(config)
    with pytest.raises(ReferenceIndexError, match=r"stop_strings: \['#'\] -> None"):
        teach(lesson(path))


def test_the_teacher_can_be_shown_what_another_answered(straight):
    data = vars(lesson(straight[0]).data) | {
        "teacher_prompt_format": "{prompt}{reference}",
        "max_prompt_length": 64,
    }
    setup = prepare(taught("student", "full_kl", data=data))
    shown = setup.tokenizer.decode(setup.prompts.teacher_ids[0])
    first = setup.prompts.prompts[0]
    assert f"{first.prompt}{first.references[0]}" in shown
    assert first.references == read_index(straight[0]).usable(first.prompt)


# The command line


def test_the_verb(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment.py").write_text(
        "from opdjax.config import Config, DataConfig, MeshConfig, TeachConfig\n\n\ndef "
        "get_config():\n"
        "    data = DataConfig('arithmetic:train[:3]', max_prompt_length=32)\n"
        "    return Config(data=data, mesh=MeshConfig(1), teach=TeachConfig(num_answers=1, "
        "temperature=0.0))\n"
    )

    def opdjax(*flags):
        monkeypatch.setattr(
            sys, "argv", ["opdjax", "teach", str(tmp_path / "experiment.py"), *map(str, flags)]
        )
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code, *capsys.readouterr()

    path = tmp_path / "answers.jsonl"
    assert opdjax()[::2] == (
        2,
        "opdjax: data.references is None; expected the file that the answers are written to\n",
    )
    code, out, _ = opdjax("--data.references", path, "--teach.max-completion-length", 24)
    assert code == 0
    assert "\nprompts: 3\nanswers: 3\nempty: 0\ntruncated: 0\n" in out
    # An index of answers that no run could use is no success.
    code, out, _ = opdjax(
        "--data.references", tmp_path / "short.jsonl", "--teach.max-completion-length", 2
    )
    assert code == 1
    assert "prompts without any: 3\n" in out


# An API


class Server:
    """A chat server on a free port, which answers a request by `reply(body)`: a text, (text,
    finish_reason), or a status to fail with.
    """

    def __init__(self, reply):
        self.reply, self.bodies, self.heads = reply, [], []
        self.open = self.most_open = 0

    async def _serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                body = json.loads(
                    await reader.readexactly(
                        int(re.search(r"content-length: (\d+)", head, re.IGNORECASE)[1])
                    )
                )
                self.heads.append(head)
                self.bodies.append(body)
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                await asyncio.sleep(0.01)
                self.open -= 1
                writer.write(self._response(self.reply(body)))
                await writer.drain()
        writer.close()

    def _response(self, said):
        if isinstance(said, int):
            status, document = said, {"error": {"message": f"no, {KEY}"}}
        else:
            text, finish = (said, "stop") if isinstance(said, str) else said
            status = 200
            document = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
            document["usage"] = {"prompt_tokens": 10, "completion_tokens": 5}
        content = json.dumps(document).encode()
        return (
            f"HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\ncontent-length: "
            f"{len(content)}\r\n\r\n".encode()
            + content
        )


@dataclasses.dataclass(frozen=True)
class Writer:
    """How a model behind an API writes the answers: fields of `teach` and of `api`."""

    base_url: str
    model: str = "big"
    temperature: float = 0.7
    top_p: float | None = None
    reasoning_effort: str | None = None
    concurrency: int = 32
    timeout: float = 120.0
    price: str = "100/200"

    def teach(self, **how):
        names = ("model", "temperature", "top_p", "reasoning_effort")
        own = {name: getattr(self, name) for name in names}
        return TeachConfig(**{"num_answers": 2, "max_completion_length": 99} | own | how)

    def api(self, **api):
        own = {"base_url": self.base_url, "timeout": self.timeout, "concurrency": self.concurrency}
        own |= {"api_key_env": "TEACH_KEY", "prices": (f"{self.model}={self.price}",)}
        return ApiConfig(**own | {"max_retries": 0} | api)


@contextlib.contextmanager
def serving(reply):
    """The server, and who writes there."""
    server, loop = Server(reply), asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server._serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    try:
        yield server, Writer(address)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEACH_KEY", KEY)
    monkeypatch.setattr("opdjax.judge.client.BREAKER_FAILURES", 1000)


def asked_of(path, endpoint, *, how=None, api=None, **data):
    """The lesson of 16 sums, by an API."""
    data = {
        "source": "arithmetic:train[:16]",
        "max_prompt_length": 32,
        "references": str(path),
    } | data
    # Whoever asks an API needs no teacher's checkpoint.
    return Config(
        teacher=ModelConfig("no/teacher/here"),
        data=DataConfig(**data),
        teach=endpoint.teach(**how or {}),
        api=endpoint.api(**api or {}),
    )


def worked(body):
    """The solution of the sum that was asked."""
    prompt = body["messages"][-1]["content"]
    return next(problem.reference for problem in PROBLEMS if problem.prompt == prompt)


def test_a_server_is_asked_each_draw_once(tmp_path, capsys):
    path, seen = tmp_path / "answers.jsonl", collections.Counter()

    def numbered(body):
        prompt = body["messages"][-1]["content"]
        seen[prompt] += 1
        return f"{worked(body)} ({seen[prompt]})"

    with serving(numbered) as (server, endpoint):
        endpoint = dataclasses.replace(endpoint, top_p=0.9, reasoning_effort="low", concurrency=3)
        config = asked_of(path, endpoint, system_prompt="be right", prompt_format="{prompt}")
        told = teach(config)
        assert (len(server.bodies), server.most_open) == (32, 3)
        again = teach(config)
        assert len(server.bodies) == 32
    assert "16 of 16 prompts have their 2 answers; nothing to do" in capsys.readouterr().out
    assert set(seen.values()) == {2}
    expected = {
        "model": "big",
        "temperature": 0.7,
        "top_p": 0.9,
        "reasoning_effort": "low",
        "max_tokens": 99,
    }
    for body in server.bodies:
        assert {name: value for name, value in body.items() if name != "messages"} == expected
        assert body["messages"][0] == {"role": "system", "content": "be right"}
    assert (told["prompts"], told["answers"], told["requests"], told["tokens"]) == (16, 32, 32, 480)
    assert told["dollars"] == pytest.approx(32 * (10 * 100 + 5 * 200) / 1e6)
    assert again["answers"] == 32
    for problem in PROBLEMS:
        assert sorted(read_index(path).usable(problem.prompt)) == [
            f"{problem.reference} (1)",
            f"{problem.reference} (2)",
        ]
    # The index is of who answers, not of where.
    moved = dataclasses.replace(
        endpoint, base_url="http://elsewhere/v1", timeout=1.0, price="0/200"
    )
    assert teach(dataclasses.replace(config, api=moved.api()))["answers"] == 32
    bigger = dataclasses.replace(endpoint, model="bigger").teach()
    with pytest.raises(ReferenceIndexError, match="model: 'big' -> 'bigger'"):
        teach(dataclasses.replace(config, teach=bigger))


def test_what_fails_is_asked_again_and_no_key_is_written(tmp_path, capsys, monkeypatch):
    path = tmp_path / "answers.jsonl"
    broken = {PROBLEMS[2].prompt: 400, PROBLEMS[5].prompt: 500, PROBLEMS[11].prompt: 503}
    with serving(lambda body: broken.get(body["messages"][-1]["content"]) or worked(body)) as (
        server,
        endpoint,
    ):
        told = teach(asked_of(path, endpoint))
        assert (told["answers"], told["failed"], told["prompts without any"]) == (26, 6, 3)
        assert len(read_index(path).answers) == 13
        assert "note: 4 of 12 requests failed, the last: " in capsys.readouterr().out
        # Prompts that the server takes no offence at come first in no batch's favour: one refusal
        # stops nobody.
        broken.pop(PROBLEMS[5].prompt)
        broken.pop(PROBLEMS[11].prompt)
        with monkeypatch.context() as patch:
            patch.setattr("opdjax.rollouts.write_references._BATCH_SIZE", 1)
            told = teach(asked_of(path, endpoint))
        assert (told["answers"], told["failed"]) == (30, 2)
        asked = len(server.bodies)
        broken.clear()
        assert teach(asked_of(path, endpoint))["answers"] == 32
        assert len(server.bodies) == asked + 2
        assert all(f"authorization: bearer {KEY}" in head.lower() for head in server.heads)
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()


def test_a_server_that_is_down_ends_it_and_what_was_answered_is_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    with serving(lambda body: 500 if worked(body) == PROBLEMS[9].reference else worked(body)) as (
        _,
        endpoint,
    ):
        teach(asked_of(path, endpoint))
    with pytest.raises(
        ApiUnavailableError,
        match="earlier answers are kept, and the same command continues from there",
    ):
        teach(asked_of(path, endpoint))
    assert len(read_index(path).answers) == 15


def test_a_refused_key_stops_at_once(tmp_path):
    with (
        serving(lambda body: 401) as (server, endpoint),
        pytest.raises(ApiRefusedError, match="status 401") as error,
    ):
        teach(asked_of(tmp_path / "answers.jsonl", dataclasses.replace(endpoint, concurrency=2)))
    assert len(server.bodies) <= 2
    assert KEY not in str(error.value)


def test_the_cap_is_that_of_the_index_and_nothing_paid_for_is_lost(tmp_path):
    path = tmp_path / "answers.jsonl"
    with serving(worked) as (server, endpoint):
        # A request costs 0.002 dollars.
        endpoint = dataclasses.replace(endpoint, concurrency=1)
        with pytest.raises(SpendingCapError, match="api.max_dollars is 0.03"):
            teach(asked_of(path, endpoint, api={"max_dollars": 0.03}))
        assert len(server.bodies) == 15
        assert len(read_index(path).answers) == 6
        with pytest.raises(SpendingCapError, match="has spent 0.0300 dollars"):
            teach(asked_of(path, endpoint, api={"max_dollars": 0.03}))
        assert len(server.bodies) == 15
        assert teach(asked_of(path, endpoint, api={"max_dollars": 1.0}))["answers"] == 32
        assert len(server.bodies) == 32
    assert sum(row["calls"] for row in read_lines(tmp_path / "answers.jsonl.spending.jsonl")) == 32


def test_replies_make_the_index_again_without_a_server(tmp_path):
    with serving(worked) as (_, endpoint):
        teach(
            asked_of(
                tmp_path / "first.jsonl", endpoint, api={"cache": str(tmp_path / "replies.sqlite")}
            )
        )
    offline = {"cache": str(tmp_path / "replies.sqlite"), "concurrency": 0}
    teach(asked_of(tmp_path / "second.jsonl", endpoint, api=offline))
    assert (tmp_path / "second.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    with pytest.raises(OfflineMissError):
        teach(
            asked_of(
                tmp_path / "third.jsonl", dataclasses.replace(endpoint, top_p=0.5), api=offline
            )
        )


def test_what_is_no_answer_is_counted_and_not_used(tmp_path):
    said = [
        ("17", "length"),
        "",
        "  \n",
        ("he said", "content_filter"),
        "half \ud83d",
        "\ud83d\ude00 17",
        "17",
        "17",
    ]
    path, left = tmp_path / "answers.jsonl", list(said)
    with serving(lambda body: left.pop(0)) as (_, endpoint):
        endpoint = dataclasses.replace(endpoint, concurrency=1, temperature=0.0)
        told = teach(
            asked_of(path, endpoint, how={"num_answers": 8}, source="arithmetic:train[:1]")
        )
    assert (told["answers"], told["empty"], told["truncated"], told["duplicates"]) == (8, 2, 2, 1)
    assert told["prompts with fewer than 8 different answers"] == 1
    assert read_index(path).usable(PROBLEMS[0].prompt) == ("half \ufffd", "😀 17", "17", "17")
    prepare(taught("references", data={"source": "arithmetic:train[:1]", "references": str(path)}))

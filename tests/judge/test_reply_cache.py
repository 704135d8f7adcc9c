"""The file of replies: what makes a key, many processes at once, and every way in which a file can
be bad.
"""

import contextlib
import dataclasses
import json
import sqlite3
import subprocess
import sys

import pytest
from chat_server import ASKED, SCHEMA, Said, asked, calling, outcome, run
from waiting import HANG

from opdjax.config.api import Endpoint
from opdjax.judge.cache import CacheError, ReplyCache, request_key
from opdjax.judge.replies import ApiError, Reply

ENDPOINT = Endpoint("http://x", "m")
REPLY = Reply("half \ud83d \x00 é", "length", False, 3, 4)


def filled(path, count=1):
    """The path of a cache that knows `k0`, `k1` ..."""
    with contextlib.closing(ReplyCache(path)) as cache:
        for number in range(count):
            cache.put(f"k{number}", dataclasses.replace(REPLY, output_tokens=number))
    return path


def read(path, key="k0"):
    with contextlib.closing(ReplyCache(path)) as cache:
        return cache.get(key)


# Keys


def test_keys_are_those_of_earlier_versions():
    """A cache that was paid for is still read."""
    endpoint = Endpoint("http://x", "m", temperature=0.5, max_tokens=9)
    expected = "19eab10cdf9a5f857d12726e900c5ceaac17292994876573390533db9f29eb20"
    assert request_key(endpoint, [{"role": "user", "content": "q"}], {"a": 1}, 2) == expected


def test_a_key_is_what_decides_the_reply_and_nothing_else():
    key = request_key(ENDPOINT, ASKED, None, 0)
    assert key == request_key(
        ENDPOINT, [dict(reversed(message.items())) for message in ASKED], None, 0
    )
    others = {
        "base_url": "http://y",
        "api_key_env": "A_KEY",
        "timeout": 1.0,
        "concurrency": 1,
    }
    others |= {
        "requests_per_minute": 1,
        "tokens_per_minute": 1,
        "input_price": 1.0,
        "output_price": 1.0,
        "max_tokens_field": "max_completion_tokens",
    }
    assert key == request_key(dataclasses.replace(ENDPOINT, **others), ASKED, None, 0)
    deciding = {
        "model": "n",
        "temperature": 0.0,
        "top_p": 0.5,
        "reasoning_effort": "low",
        "max_tokens": 9,
    }
    assert set(deciding) | set(others) == {field.name for field in dataclasses.fields(Endpoint)}
    keys = [
        request_key(dataclasses.replace(ENDPOINT, **{name: value}), ASKED, None, 0)
        for name, value in deciding.items()
    ]
    keys += [
        request_key(ENDPOINT, asked("else"), None, 0),
        request_key(ENDPOINT, ASKED, SCHEMA, 0),
        request_key(ENDPOINT, ASKED, None, 1),
    ]
    keys += [request_key(ENDPOINT, [{"role": "system", "content": ASKED[0]["content"]}], None, 0)]
    assert len({key, *keys}) == 1 + len(deciding) + 4


def test_a_key_stays_from_one_version_to_the_next():
    # Of a changed key, every cache that anybody has is worth nothing.
    assert (
        request_key(ENDPOINT, ASKED, SCHEMA, 2)
        == "b6f238fe9ac469fb62e9faff031fe44fa21620fd371d876f443edd4cac05dbe5"
    )


def test_any_text_has_a_key():
    assert request_key(ENDPOINT, asked("\ud83d"), None, 0) != request_key(
        ENDPOINT, asked("\ufffd"), None, 0
    )


# What is kept


def test_replies_are_kept_as_they_were_and_the_first_one_stays(tmp_path):
    path = filled(tmp_path / "deep" / "r.sqlite")
    with contextlib.closing(ReplyCache(path)) as cache:
        cache.put("k0", dataclasses.replace(REPLY, text="another"))
        assert cache.get("k1") is None
    assert read(path) == dataclasses.replace(REPLY, output_tokens=0)
    assert [file.name for file in path.parent.iterdir()] == ["r.sqlite"]


WRITER = """
import sys
from opdjax.judge.cache import ReplyCache
from opdjax.judge.replies import Reply
cache = ReplyCache(sys.argv[1])
for number in range(200):
    cache.put(f"k{number}", Reply(f"{sys.argv[2]} says {number}", "stop", False, 1, 1))
    assert cache.get(f"k{number}").text.endswith(f"says {number}")
    cache.put(f"{sys.argv[2]} {number}", Reply("own", "stop", False, 1, 1))
cache.close()
"""


def test_processes_make_and_fill_one_file_at_once(tmp_path):
    path = tmp_path / "r.sqlite"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), f"w{n}"], stderr=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    ended = [(writer.communicate(timeout=HANG)[1], writer.returncode) for writer in writers]
    assert ended == [("", 0)] * 4
    with contextlib.closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT count(*) FROM replies").fetchone() == (200 + 4 * 200,)


def test_a_writer_that_is_killed_damages_nothing(tmp_path):
    path = tmp_path / "r.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER.replace("range(200)", "range(10**9)"), str(path), "w"]
    ) as writer:
        while not path.exists() or read(path, "k20") is None:
            assert writer.poll() is None
        writer.kill()
    assert read(path).text == "w says 0"


# Bad files


def error_of(act):
    with pytest.raises(CacheError) as error:
        act()
    assert isinstance(error.value, ApiError)
    assert "or name another file in api.cache" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_what_is_no_cache(tmp_path, size):
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"not SQLite " * size)
    assert f"{path} could not be opened" in error_of(lambda: ReplyCache(path))
    path.unlink()
    path.mkdir()
    assert "could not be opened" in error_of(lambda: ReplyCache(path))
    (tmp_path / "file").write_text("")
    assert "could not be opened" in error_of(lambda: ReplyCache(tmp_path / "file" / "r.sqlite"))


def test_a_table_of_other_columns(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "r.sqlite")) as file:
        file.execute("CREATE TABLE replies (id INTEGER, reply TEXT)")
    assert "columns id, reply, expected key, version, reply, written" in error_of(
        lambda: ReplyCache(tmp_path / "r.sqlite")
    )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("version", 2, "k0 is of version 2, expected 1"),
        ("version", None, "of version None"),
        ("reply", "{", "could not be read"),
        ("reply", "[]", "k0 is no reply"),
        ("reply", "{}", "k0 is no reply"),
        (
            "reply",
            json.dumps({"text": "x", "finish_reason": "stop", "input_tokens": 1}),
            "k0 is no reply",
        ),
        (
            "reply",
            json.dumps(
                {"text": None, "finish_reason": "stop", "input_tokens": 1, "output_tokens": 1}
            ),
            "k0 is no reply",
        ),
        (
            "reply",
            json.dumps({**dataclasses.asdict(REPLY), "digest": "0" * 16}),
            "k0 is not what was written",
        ),
        ("reply", None, "could not be read"),
        ("reply", b"\xff\xff", "could not be read"),
        ("reply", "[" * 100_000, "could not be read"),
    ],
)
def test_a_damaged_row_is_an_error_and_no_reply(tmp_path, column, value, words):
    path = filled(tmp_path / "r.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute(f"UPDATE replies SET {column} = ?", (value,))
    said = error_of(lambda: read(path))
    assert words in said
    assert "could not be read" in said


def test_damage_amid_the_file_ends_in_the_named_error(tmp_path):
    path = filled(tmp_path / "r.sqlite", 500)
    whole = path.read_bytes()
    outcomes = set()
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + b"\xa5" * 4096 + whole[start + 4096 :])
        for key in ("k0", "k250", "k499", "unknown"):
            try:
                found = read(path, key)
                assert found is None or found == dataclasses.replace(
                    REPLY, output_tokens=int(key[1:])
                )
                outcomes.add("kept")
            except CacheError as error:
                outcomes.add(str(error).split(":")[0].rpartition(" ")[2])
    assert outcomes == {"kept", "opened", "read"}
    path.write_bytes(whole[: len(whole) // 2])
    assert "malformed" in error_of(lambda: [read(path, f"k{n}") for n in range(500)])


FULL = """
import resource, signal, sys
from opdjax.judge.cache import ReplyCache
from opdjax.judge.replies import Reply
cache = ReplyCache(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for number in range(1000):
    cache.put(f"k{number}", Reply("x" * 1000, "stop", False, 1, 1))
"""


def test_a_disk_that_is_full(tmp_path):
    path = tmp_path / "r.sqlite"
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=HANG
    )
    assert "CacheError" in ended.stderr
    assert "could not be written" in ended.stderr
    assert "free the disk" in ended.stderr
    assert read(path).text == "x" * 1000  # and what was kept stays readable


def test_a_file_that_may_not_be_written(tmp_path):
    path = filled(tmp_path / "r.sqlite")
    with contextlib.closing(ReplyCache(path)) as cache:
        cache._file.execute("PRAGMA query_only=1")
        assert cache.get("k0") is not None
        assert "could not be written" in error_of(lambda: cache.put("new", REPLY))


def test_the_client_tells_of_a_bad_cache_and_not_of_the_server(tmp_path):
    path = filled(tmp_path / "r.sqlite")

    async def scenario(cache):
        async with calling(lambda *_: Said(), cache) as (client, server):
            return (
                await outcome(client.complete("judge", ASKED)),
                len(server.bodies),
                client.take_usage()["judge"].calls,
            )

    with contextlib.closing(ReplyCache(path)) as cache:
        cache._file.execute("PRAGMA query_only=1")
        error, *counts = run(scenario(cache))
    assert type(error) is CacheError
    assert counts == [1, 1]  # it was paid for, and is counted

"""Objects behind a URL, through gcsfs against a fake Google Cloud Storage that also fails."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest

from opdjax.runs.object_store import (
    Folder,
    RemoteError,
    is_remote,
    local_copy,
    open_output,
    scratch_of,
    url_of,
)


def test_what_is_a_url():
    assert is_remote("gs://b/a")
    assert is_remote("gs:/b/a")
    assert not is_remote("/b/a")
    assert not is_remote("org/model")
    assert url_of("gs:/bucket/a/") == "gs://bucket/a"
    for wrong, url in (("s3:/b", "s3://b"), ("gs://", "gs://"), ("gs:/", "gs://")):
        words = f"^{url} cannot be read or written; expected a local path or gs://BUCKET/NAME$"
        with pytest.raises(RemoteError, match=words):
            url_of(wrong)


@pytest.fixture
def folder(gcs):
    return Folder("gs://bucket/x")


def test_an_object_whose_name_leads_out_is_no_file_of_a_directory(folder, tmp_path):
    folder.write("a/../../y", b"1")
    with pytest.raises(RemoteError, match=r"a/\.\./\.\./y', which leads out of it"):
        folder.download(tmp_path / "x" / "y")
    assert not list(tmp_path.rglob("*y/*"))


def test_objects(folder):
    assert folder.read("a") is None
    folder.write("a", b"1")
    folder.write("b/c", b"2")
    folder.subfolder("b").write("d", b"3")
    assert folder.read("b/d") == b"3"
    assert folder.create("e", b"4")
    assert not folder.create("e", b"5")
    assert folder.read("e") == b"4"
    assert sorted(folder.files()) == ["a", "b/c", "b/d", "e"]
    files = Folder(folder.url, is_flat=True).files()
    assert sorted(files) == ["a", "e"]
    assert files["a"] == folder.files()["a"] == folder.tag("a")
    folder.write("a", b"6")
    assert folder.tag("a") != files["a"]
    folder.remove("a")
    folder.remove("a")
    assert folder.tag("a") is None
    assert folder.subfolder("nothing").files() == {}
    assert folder.subfolder("nothing", is_flat=True).files() == {}


def test_a_directory_is_kept_and_brought_back(folder, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "deep").mkdir(parents=True)
    (here / "rows.jsonl").write_text("1\n")
    (here / "deep" / "big").write_bytes(os.urandom(6 << 20))  # in several requests
    (here / ".lock").touch()
    folder.upload(here)
    assert sorted(folder.files()) == ["deep/big", "rows.jsonl"]
    reader = Folder(folder.url)
    reader.download(there)
    assert (there / "deep" / "big").read_bytes() == (here / "deep" / "big").read_bytes()
    (here / "deep" / "big").unlink()
    with (here / "rows.jsonl").open("a") as rows:
        rows.write("2\n")
    folder.write("report.html", b"of somebody who looks on")
    folder.upload(here)
    assert sorted(folder.files()) == ["report.html", "rows.jsonl"]
    folder.remove("report.html")
    (there / "stray").touch()
    (there / "rows.jsonl").write_text("written here since\n")
    reader.download(there)
    assert {str(f.relative_to(there)): f.read_text() for f in there.rglob("*") if f.is_file()} == {
        "rows.jsonl": "1\n2\n"
    }


def test_the_later_of_two_files_stays_the_later_one(folder, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("z-old", "b-new", "draft.partial-host-1"):
        (here / name).write_text(name)
        time.sleep(0.01)
    folder.upload(here)
    Folder(folder.url).download(tmp_path / "there")
    for directory in (here, tmp_path / "there"):
        assert (directory / "z-old").stat().st_mtime_ns < (directory / "b-new").stat().st_mtime_ns
    assert sorted(folder.files()) == ["b-new", "z-old"]
    (here / "a-newest").write_text("")
    folder.upload(here)
    Folder(folder.url).download(tmp_path / "there")
    assert (
        max((tmp_path / "there").iterdir(), key=lambda file: file.stat().st_mtime_ns).name
        == "a-newest"
    )


def test_what_is_the_same_does_not_travel_again(gcs, tmp_path):
    folder = Folder("gs://bucket/x")
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    folder.upload(tmp_path)
    reader = Folder(folder.url)
    reader.download(tmp_path / "copy")
    before = len(gcs.store.requests)
    folder.upload(tmp_path, lambda name: "copy" not in name)
    reader.upload(tmp_path / "copy")
    assert gcs.store.requests[before:] == []
    reader.download(tmp_path / "copy")
    assert [request.split()[0] for request in gcs.store.requests[before:]] == ["GET"]  # a listing


def test_a_database_at_work_travels_whole(folder, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    at_work = sqlite3.connect(here / "replies.sqlite", isolation_level=None)
    at_work.execute("PRAGMA journal_mode=WAL")
    at_work.execute("CREATE TABLE replies (key TEXT)")
    for count in (1, 2):
        at_work.execute("INSERT INTO replies VALUES ('k')")
        folder.upload(here)
        Folder(folder.url).download(tmp_path / "there")
        found = (
            sqlite3.connect(tmp_path / "there" / "replies.sqlite")
            .execute("SELECT count(*) FROM replies")
            .fetchone()
        )
        assert found == (count,)
    assert sorted(folder.files()) == ["replies.sqlite"]


def test_faults_are_ridden_out(gcs, tmp_path):
    folder = Folder("gs://bucket/x")
    gcs.store.fault_rate = 0.1
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    folder.upload(tmp_path)
    folder.download(tmp_path / "copy")
    assert [(tmp_path / "copy" / str(n)).read_bytes() for n in range(8)] == [
        bytes([n]) * 1000 for n in range(8)
    ]


def test_a_service_that_refuses_is_told_with_the_place(gcs):
    gcs.store.forbidden, gcs.store.refusal = ".", 403
    with pytest.raises(
        RemoteError,
        match="gs://bucket/x could not be reached: .*; check the bucket's name, the network",
    ):
        Folder("gs://bucket/x").files()


def test_a_bucket_that_is_not_there_is_told(gcs, tmp_path):
    (tmp_path / "file").touch()
    gcs.store.forbidden, gcs.store.refusal = "POST", 404
    for write in (
        lambda: Folder("gs://no/x").write("a", b""),
        lambda: Folder("gs://no/x").upload(tmp_path),
    ):
        with pytest.raises(
            RemoteError, match="gs://no/x cannot be written: there is no such bucket"
        ):
            write()


def test_the_extra_that_is_missing_is_named():
    code = "import sys; sys.modules['gcsfs'] = None; from opdjax.runs.object_store import Folder; Folder('gs://b/x')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtraError: gs:// needs gcsfs: pip install 'opdjax[gcs]'" in ran.stderr


def test_local_copies(gcs, tmp_path):
    folder = Folder("gs://bucket/data")
    folder.write("train.jsonl", b"{}\n")
    assert local_copy(tmp_path) == tmp_path
    file = local_copy("gs:/bucket/data/train.jsonl")
    assert (file.name, file.read_bytes()) == ("train.jsonl", b"{}\n")
    folder.write("train.jsonl", b"[]\n")
    assert local_copy("gs://bucket/data/train.jsonl").read_bytes() == b"[]\n"
    directory = local_copy("gs://bucket/data")
    assert directory == scratch_of("gs://bucket/data", "copies") / "data"
    assert (directory / "train.jsonl").read_bytes() == b"[]\n"
    with pytest.raises(
        RemoteError, match="there is nothing at gs://bucket/none; expected an object, or a folder"
    ):
        local_copy("gs://bucket/none")
    with open_output("gs://bucket/out/page.html") as page:
        page.write_text("x")
    assert Folder("gs://bucket/out").read("page.html") == b"x"

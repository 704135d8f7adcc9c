"""What is no hub id is refused without a request, and a hub that does not answer is given up."""

import re
import socket

import pytest

from opdjax.models import places
from opdjax.models.places import find, require_place
from opdjax.models.stored_tensors import CheckpointError

PLACES = ["", "name", "name/", "./name", "../owner/name", "/no/such/place", "~/no such", "a/b/c"]


@pytest.mark.parametrize("path", PLACES)
def test_what_is_neither_there_nor_a_hub_id_is_refused_without_a_request(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked the hub"))
    words = f"{path!r} is neither a directory nor a hub id (owner/name)"
    for refuses in (require_place, lambda path: find(path, None, ())):
        with pytest.raises(CheckpointError, match=f"^{re.escape(words)}$"):
            refuses(path)


def test_what_is_there_or_may_be_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for path in ("here", "here/", "./here", str(tmp_path), "owner/name", "@mini_student", "gs://b"):
        require_place(path)
    assert find(str(tmp_path / "here"), None, ()) == tmp_path / "here"
    (tmp_path / "here" / "file").touch()
    with pytest.raises(CheckpointError, match="'here/file' is a file; expected the directory of"):
        find("here/file", None, ())
    with pytest.raises(CheckpointError, match="no.gguf does not exist; expected a GGUF file"):
        require_place("no.gguf")


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "_HUB_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    cached = tmp_path / "models--owner--name"
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        words = "'owner/name' is not a local directory, and downloading it from the hub failed: it "
        with pytest.raises(CheckpointError, match=rf"{words}does not answer \(.*timed out\)"):
            find("owner/name", None, ("*",))
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("a" * 40)
        (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
        assert find("owner/name", None, ("*",)) == cached / "snapshots" / ("a" * 40)

"""A bucket of one's own for every test."""

import pytest
from fake_gcs import FakeGcs

from opdjax.runs import object_store


@pytest.fixture
def gcs(monkeypatch, tmp_path):
    """A server at which this process and its children find gs://; their scratch is in tmp_path."""
    with FakeGcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OPDJAX_SCRATCH", str(tmp_path / "scratch"))
        import fsspec

        fsspec.config.set_conf_env(fsspec.config.conf)
        object_store._file_system.cache_clear()
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        yield server
        object_store._file_system.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()

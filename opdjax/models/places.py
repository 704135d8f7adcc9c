"""Where models are: in directories, on the hub, on gs:// or in the package. No jax, whose import
takes seconds: a path without a model is refused before it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pathlib
import sys

from opdjax.config import MINI_PAIR, MINI_STUDENT, MINI_TEACHER, STUDENT
from opdjax.config.validation import nearest
from opdjax.models.stored_tensors import CheckpointError
from opdjax.runs.object_store import is_remote, local_copy

_HUB_SECONDS = 5  # to wait for an answer of the hub


def require_place(path_or_id: str) -> None:
    """CheckpointError if the path is neither there nor of the form of a hub id: without a request
    to the hub or to gs://.
    """
    path = pathlib.Path(os.path.expanduser(path_or_id))
    if path_or_id.startswith("@"):
        _built_in(path_or_id)
    elif path_or_id.lower().endswith(".gguf") and not is_remote(path_or_id):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; expected a GGUF file")
    elif not is_remote(path_or_id) and not (path_or_id and path.exists()):
        owner, slash, name = path_or_id.partition("/")
        if not slash or not owner or owner[0] in ".~" or not name or "/" in name:
            raise CheckpointError(
                f"{path_or_id!r} is neither a directory nor a hub id (owner/name)"
            )


def find(path_or_id: str, revision: str | None, wanted: tuple[str, ...]) -> pathlib.Path:
    """The directory of a model, of which files that match a pattern of `wanted` are first copied
    from the hub or from gs://; CheckpointError if there is none.
    """
    require_place(path_or_id)
    if path_or_id.startswith("@"):
        return _built_in(path_or_id)
    if is_remote(path_or_id):
        is_wanted = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
        return local_copy(path_or_id, is_wanted)
    path = pathlib.Path(os.path.expanduser(path_or_id))
    if path_or_id.lower().endswith(".gguf"):
        from opdjax.models.gguf import directory_of

        return directory_of(path)
    if path.is_file():
        raise CheckpointError(f"{path_or_id!r} is a file; expected the directory of a model")
    return path if path.is_dir() else _download(path_or_id, revision, wanted)


def _download(name: str, revision: str | None, wanted: tuple[str, ...]) -> pathlib.Path:
    """A repository in the hub's cache, which is used as it is if the hub does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # Of the client's library, whose name depends on the version of huggingface_hub.
    client = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]
    problem = None
    try:
        try:  # snapshot_download itself has no limit of time
            with contextlib.suppress(HfHubHTTPError, OfflineModeIsEnabled):  # it meets them too
                huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
        except client.TransportError as error:
            problem = f"it does not answer ({error})"
        options = {"allow_patterns": list(wanted), "local_files_only": problem is not None}
        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = problem or " ".join(str(error).split())
        raise CheckpointError(
            f"{name!r} is not a local directory, and downloading it from the hub failed: {reason}"
        ) from error


def _built_in(name: str) -> pathlib.Path:
    built_in = {MINI_TEACHER: MINI_PAIR / "teacher", MINI_STUDENT: MINI_PAIR / "student"}
    if name == STUDENT:
        raise CheckpointError(
            f"{name!r} is a teacher's name for the student of its run; expected a model: a "
            f"directory, a hub id or {MINI_STUDENT}"
        )
    if name not in built_in:
        raise CheckpointError(
            f"{name!r} is not a built-in model; {nearest(name, built_in)} (write ./{name} for a "
            "directory of that name)"
        )
    return built_in[name]

"""Two processes that share only gs:// act as one run: each writes its part of the checkpoints,
process zero writes the rest.
"""

import re
import signal

import pytest
from mesh_pair import mesh_config
from tiny_runs import assert_close_run, finish, start
from waiting import until

from opdjax.config import EvaluationConfig, LogConfig, MeshConfig, TrainConfig
from opdjax.runs.lease import holder_of
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import Folder
from opdjax.train import train

URL = "gs://bucket/two"
SECTIONS = {
    "train": TrainConfig(num_steps=3, prompts_per_step=16, gradient_accumulation_steps=2),
    "evaluation": EvaluationConfig(num_prompts=16, num_samples=2, max_completion_length=12),
    "log": LogConfig(samples_every=1, diagnostics_every=1),
}


@pytest.mark.long
def test_two_processes_stop_together_and_continue_from_the_bucket_alone(gcs, pair, tmp_path):
    config = mesh_config(pair, MeshConfig(2, 2, 1, processes=2), **SECTIONS)
    files = tmp_path / "two"

    def started():
        scratch = str(tmp_path / "scratch{number}")
        return start(config, URL, files=files, count=2, devices=2, OPDJAX_SCRATCH=scratch)

    processes = started()
    until(
        lambda: (
            "evaluation at step 0" in files.with_suffix(".0.txt").read_text()
            or any(process.poll() is not None for process in processes)
        )
    )
    processes[1].send_signal(signal.SIGTERM)
    statuses, printed = finish(processes, files)
    assert statuses == [143, 143], printed
    advice = f"as asked by a signal; step .*, and the same command continues {URL}"
    (done,) = {re.search(rf"stopped after step (\d), {advice}", text)[1] for text in printed}
    prefix = f"checkpoints/{done}/default/ocdbt"
    parts = {name.split("/")[3] for name in Folder(URL).files() if name.startswith(prefix)}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    (tmp_path / "scratch0").rename(tmp_path / "lost")
    assert not (tmp_path / "scratch1").exists()  # process zero alone has files
    statuses, printed = finish(started(), files)
    assert statuses == [0, 0], printed
    assert f"continuing from step {done}" in printed[0]
    assert holder_of(Folder(URL)).get("released")
    train(mesh_config(pair, MeshConfig(1), **SECTIONS), tmp_path / "one")
    with read_only_workdir(URL, lambda name: not name.startswith("checkpoints")) as mirror:
        assert_close_run(mirror.directory, tmp_path / "one")

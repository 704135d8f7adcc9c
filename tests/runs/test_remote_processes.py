"""Two processes that share nothing but gs:// are one run: each writes its part of the checkpoints,
the lead alone the rest.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from mesh_pair import assert_same_run, make_pair, mesh_config

from opdjax.config import EvaluationConfig, LogConfig, MeshConfig, TrainConfig
from opdjax.config.validation import to_dict
from opdjax.runs.lease import holder_of
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import Folder
from opdjax.train import train

URL = "gs://bucket/two"
SECTIONS = {
    "train": TrainConfig(num_steps=2, prompts_per_step=16, gradient_accumulation_steps=2),
    "evaluation": EvaluationConfig(
        num_prompts=16, num_samples=2, max_completion_length=12, batch_size=32
    ),
    "log": LogConfig(samples_every=1, num_samples=2, diagnostics_every=1),
}


def start(config, directory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (directory / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    started = []
    for number in range(2):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PROCESS_ID": str(number),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "OPDJAX_SCRATCH": str(directory / f"scratch{number}"),
        }
        command = [
            sys.executable,
            "-m",
            "opdjax",
            "train",
            str(directory / "config.json"),
            "--workdir",
            URL,
        ]
        with (directory / f"{number}.txt").open("w") as output:
            started.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    return started


def finish(processes, directory):
    try:
        statuses = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return statuses, [(directory / f"{number}.txt").read_text() for number in range(2)]


@pytest.mark.long
def test_two_processes_stop_together_and_go_on_from_the_bucket_alone(gcs, tmp_path):
    make_pair(tmp_path)
    config = mesh_config(tmp_path, MeshConfig(2, 2, 1, processes=2), **SECTIONS)
    processes = start(config, tmp_path)
    while "evaluation at step 0" not in (tmp_path / "0.txt").read_text() and all(
        process.poll() is None for process in processes
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    statuses, printed = finish(processes, tmp_path)
    assert statuses == [143, 143], printed
    assert all(
        "stopped after step 1, as asked by a signal; the same command continues gs://bucket/two"
        in text
        for text in printed
    )
    parts = {
        name.split("/")[3]
        for name in Folder(URL).files()
        if name.startswith("checkpoints/1/default/ocdbt")
    }
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    for number in range(2):
        (tmp_path / f"scratch{number}").rename(tmp_path / f"lost{number}")
    statuses, printed = finish(start(config, tmp_path), tmp_path)
    assert statuses == [0, 0], printed
    assert "continuing from step 1" in printed[0]
    assert holder_of(Folder(URL)).is_released
    train(mesh_config(tmp_path, MeshConfig(1), **SECTIONS), tmp_path / "one")
    with read_only_workdir(URL, lambda name: not name.startswith("checkpoints")) as mirror:
        assert_same_run(mirror.directory, tmp_path / "one")

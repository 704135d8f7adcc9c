"""What a run prints before its first step."""

import dataclasses

from opdjax.config import Config
from opdjax.runs.startup import Startup


def announced(config, programs, capsys, machine="cpu"):
    startup = Startup(config, machine, programs)
    startup.announce()
    return startup, capsys.readouterr().out


def test_the_time_of_the_last_run_of_the_same_programs_is_printed(tmp_path, capsys):
    config, programs = Config(), str(tmp_path / "programs")
    startup, text = announced(config, programs, capsys)
    assert "the first run of these programs" in text
    startup.first_step_done()
    again = dataclasses.replace(config, seed=1)
    assert (
        "the first step of the last such run came after 0 s"
        in announced(again, programs, capsys)[1]
    )
    longer = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, max_completion_length=99)
    )
    for other, machine in ((longer, "cpu"), (config, "TPU v5")):
        assert "the first run" in announced(other, programs, capsys, machine)[1]


def test_a_damaged_time_and_programs_that_are_not_kept_are_no_error(tmp_path, capsys):
    startup, _ = announced(Config(), str(tmp_path), capsys)
    startup.first_step_done()
    (file,) = (tmp_path / "first_step").iterdir()
    file.write_text("soon")
    assert "the first run" in announced(Config(), str(tmp_path), capsys)[1]
    startup, text = announced(Config(), None, capsys)
    startup.first_step_done()
    assert "the first run" in text

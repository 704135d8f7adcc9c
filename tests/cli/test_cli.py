"""The console command: help without jax, mistakes in one line with status 2, and commands on the
built-in models.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from opdjax.cli import main
from opdjax.cli.parsing import load_experiment
from opdjax.config import (
    MINI_PAIR,
    MINI_STUDENT,
    MINI_TEACHER,
    PACKAGE,
    Config,
    EstimatorConfig,
    TrainConfig,
)
from opdjax.config.recipes import RECIPES
from opdjax.config.validation import ConfigError, MissingExtraError, to_dict
from opdjax.data.references import ReferenceMissError
from opdjax.runs.checkpoint import CheckpointWriteError
from opdjax.runs.lease import LeaseLostError

EXPERIMENT = """
from opdjax.config import Config, EstimatorConfig, TrainConfig

def get_config() -> Config:
    return Config(estimator=EstimatorConfig(recipe="opd"), train=TrainConfig(num_steps=7))
"""
SMALL = (
    "--evaluation.num-prompts",
    "4",
    "--evaluation.num-samples",
    "2",
    "--slots",
    "8",
    "--evaluation.max-completion-length",
    "24",
)


@pytest.fixture
def opdjax(monkeypatch, capsys):
    """opdjax(*arguments) -> (status, stdout, stderr without boxes and line breaks)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["opdjax", *map(str, arguments)])
        try:
            status = main.main() or 0
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, smooth(err)

    return run


def smooth(text):
    """The text without the boxes that tyro draws and wraps it in."""
    text = re.sub(r"^[│╭╰|+]|[│╮╯|+]$|─+|-{5,}", " ", text, flags=re.MULTILINE)
    return " ".join(text.split())


@pytest.fixture
def experiment(tmp_path):
    """experiment(text) -> the path of an experiment file with that text."""

    def write(text=EXPERIMENT, name="experiment.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# Help


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


HEAVY = """
import sys
from opdjax.cli.main import main
try:
    main()
except SystemExit as end:
    heavy = {"jax", "flax", "optax", "orbax", "transformers", "numpy"}
    print("status", end.code, "loaded", sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["sampel"], ["sample", "--help"], ["train", "EXPERIMENT", "--help"]],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(arguments, experiment):
    arguments = [experiment() if argument == "EXPERIMENT" else argument for argument in arguments]
    last = run_python(HEAVY, *arguments).splitlines()[-1]
    assert last == f"status {2 if arguments == ['sampel'] else 0} loaded []"


ABSENT = """
import sys
from opdjax.cli.main import main
for arguments in map(str.split, sys.argv[1:]):
    sys.argv = ["opdjax", *arguments]
    try:
        main()
    except SystemExit as end:
        print(arguments[0], end.code, "jax" in sys.modules)
"""


def test_a_path_with_nothing_there_is_refused_before_jax_is_imported(experiment, tmp_path):
    run = f"{experiment()} --student.path ./no"
    lines = [f"train {run} --workdir {tmp_path / 'run'}", f"doctor {run}", f"export {tmp_path} out"]
    lines += [f"{command} ./no" for command in ("check", "evaluate", "sample", "make-student")]
    lines[-1] += " out"
    lines.append(f"suites ./no --output {tmp_path / 'run'}")
    found = run_python(ABSENT, *lines).splitlines()
    assert found == [f"{line.partition(' ')[0]} 2 False" for line in lines]
    assert not (tmp_path / "run").exists()


def test_the_console_script_is_installed():
    script = pathlib.Path(sys.executable).with_name("opdjax")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: opdjax COMMAND")


NAMES = "train plan doctor audit sweep table report sample references score rollouts evaluate"


def test_help_lists_every_command(opdjax):
    for flag in ("--help", "-h"):
        status, out, err = opdjax(flag)
        assert (status, err) == (0, "")
        listed = re.findall(r"^  ([\w-]+) ", out, re.MULTILINE)
        more = ["suites", "check", "export", "make-student", "experiments"]
        assert listed == list(main.COMMANDS) == [*NAMES.split(), *more]
    status, out, _ = opdjax()
    assert status == 2
    assert "usage: opdjax COMMAND" in out


@pytest.mark.parametrize(
    "command", ["sample", "score", "rollouts", "evaluate", "check", "export", *main.ALIASES]
)
def test_every_command_explains_itself_under_its_old_name_too(opdjax, command):
    status, out, _ = opdjax(command, "--help")
    # Without an experiment, this one prints its usage alone.
    assert status == 0
    assert f"usage: opdjax {main.ALIASES.get(command, command)}" in out


def test_help_of_training_shows_the_values_of_the_experiment(opdjax, experiment):
    status, out, _ = opdjax("train", experiment(), "--help")
    out = smooth(out)
    assert status == 0
    assert "--train.num-steps INT Optimizer updates. (default: 7)" in out
    # So long a list is broken inside.
    assert (
        "--estimator.recipe{opd,vopd,full_kl,topk_kl,npd,sft,grpo,ropd,tjudge,ropd_stages}"
        in out.replace(" ", "")
    )
    # Every field is documented where it is declared; tyro takes the comments for help.
    assert "What the summed token losses are divided by, over the whole batch." in out
    assert opdjax("train", "--help")[0] == 0
    assert opdjax("train")[0] == 2


@pytest.mark.parametrize("command", ["train", "plan", "doctor", "audit"])
def test_help_names_the_recipes_of_an_option_and_their_defaults(opdjax, experiment, command):
    out = smooth(opdjax(command, experiment(), "--help")[1])
    helps = {text.split(" ")[0]: text for text in out.split("--estimator.")[1:]}
    for field in dataclasses.fields(EstimatorConfig):
        rows = {n: row.options.get(field.name) for n, row in RECIPES.items()}
        options = {name: option for name, option in rows.items() if option is not None}
        text = helps[field.name.replace("_", "-")]
        if options:
            found = re.search(r"\(([^()]*)\) \(default: ", text)[1]
            assert set(re.findall(r"[a-z]\w+(?=[,:;]|$)", found)) >= set(options), field.name
            defaults = {f": {o.default}" for o in options.values() if o.default is not None}
            assert all(default in found for default in defaults), field.name


def test_help_lists_only_what_a_command_reads_and_accepts_the_rest(opdjax, experiment):
    out = smooth(opdjax("references", experiment(), "--help")[1])
    listed = set(re.findall(r"--([a-z]+)\.[a-z-]+ ", out))
    others = {"sampling", "teach", "api", "mesh", "train"}
    assert listed == {"student", "teacher", "data"} | others
    assert re.findall(r"--train\.([a-z-]+)", out) == ["dtype"]
    for command, hidden in (("plan", "seed"), ("doctor", "mesh")):
        out = opdjax(command, experiment(), "--help")[1]
        listed = set(re.findall(r"--([a-z_-]+)[. ]", out))
        assert not listed & {"checkpoint", "log", "teach", hidden}
        assert {"student", "teacher", "sampling", "estimator", "train", "evaluation"} <= listed
    out = smooth(opdjax("evaluate", "--help")[1])
    assert "--data.format" in out
    assert "--data.source" not in out
    _, _, err = opdjax("references", experiment(), "--optimizer.b2", "0.9", "--data.format", "raw")
    assert "data.references is None; expected the file" in err


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_help_has_no_remarks_for_programs(opdjax, experiment, command):
    own = {"train", "plan", "doctor", "audit", "references"}
    out = smooth(opdjax(command, *([experiment()] if command in own else []), "--help")[1])
    assert "noqa" not in out
    assert "(default: )" not in out
    assert "avg@k" not in out.replace("the k of avg@k", "")


def test_a_grader_that_comes_with_a_checkpoint_is_not_run(opdjax, tmp_path, monkeypatch):
    exported = shutil.copytree(MINI_PAIR / "student", tmp_path / "exported")
    (tmp_path / "mine.py").write_text("raise SystemExit(3)")
    grader, asked = f"{tmp_path / 'mine.py'}:grade", []
    settings = {"evaluation": {"grader": grader}}
    (exported / "opdjax.json").write_text(json.dumps({"config": settings}))

    def scores_of(config):
        asked.append(config.evaluation.grader)
        raise ConfigError("no scores")

    monkeypatch.setattr("opdjax.rollouts.one_model.scores_of", scores_of)
    _, _, err = opdjax("evaluate", exported)
    assert f"note: its grader {grader} is dropped: give it with --evaluation.grader {grader}" in err
    opdjax("evaluate", exported, "--evaluation.grader", grader)
    assert asked == ["auto", grader]


def test_help_of_an_argument_is_a_whole_sentence():
    texts = []
    for file in sorted((PACKAGE / "cli").glob("*.py")):
        functions = (n for n in ast.walk(ast.parse(file.read_text())) if hasattr(n, "args"))
        for function in functions:
            is_named = isinstance(function, ast.FunctionDef)
            text = (is_named and ast.get_docstring(function)) or ""
            arguments = text.partition("Args:\n")[2]
            texts += re.split(r"^    (?=\w+: )", arguments, flags=re.MULTILINE)[1:]
    assert len(texts) > 40
    for text in texts:
        sentence = text.partition(": ")[2].strip()
        assert re.fullmatch(r"([A-Z]|i/n).*\.", sentence, re.DOTALL), text


def test_evaluation_without_any_right_answer_says_to_check_the_grader(opdjax, monkeypatch):
    scores = {"k": 8, "num_prompts": 64, "temperature": 1.0}
    for name in ("avg@k", "pass@k", "greedy"):
        scores |= {name: 0.0, f"{name}_interval": 3 / 64}
    monkeypatch.setattr("opdjax.rollouts.one_model.scores_of", lambda config: scores)
    status, out, _ = opdjax("evaluate", "@mini_student")
    assert (status, out.splitlines()[0]) == (0, "avg@8     0.0000 ± 0.0469")
    assert "no answer was graded right: check the grader, and" in out.splitlines()[-1]


# Mistakes


def test_an_unknown_command_is_answered_with_the_nearest(opdjax):
    assert opdjax("--version") == (0, importlib.metadata.version("opdjax") + "\n", "")
    assert opdjax("trian") == (2, "", "opdjax: there is no command 'trian'; did you mean 'train'?")
    status, _, err = opdjax("xyz")
    assert status == 2
    assert err.endswith(f"expected one of {sorted(main.COMMANDS)}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "experiment.py defines no get_config()"),
        (
            "def get_config(): return {'seed': 0}",
            "experiment.py returned a dict; expected a Config",
        ),
        ("def get_config(): pass", "experiment.py returned a NoneType; expected a Config"),
        (
            "def get_config() return 1",
            "experiment.py does not run: SyntaxError: expected ':' (experiment.py, line 1)",
        ),
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        (
            "from opdjax.config import *\ndef get_config(): return "
            "Config(data=DataConfig(sorce='x'))",
            "experiment.py does not run: DataConfig has no field 'sorce'; did you mean 'source'? "
            "(line 2)",
        ),
        (
            "def get_config(): return Config()",
            "experiment.py does not run: NameError: name 'Config' is not defined",
        ),
        (
            "from opdjax.config import *\ndef get_config(): return "
            "Config(train=TrainConfig(num_steps=2.5))",
            "experiment.py, line 2: train.num_steps is 2.5; expected int",
        ),
        (
            "from opdjax.config import *\ndef get_config(): return "
            "Config(train=TrainConfig(num_steps=0))",
            "experiment.py, line 2: train.num_steps is 0; expected at least 1",
        ),
    ],
)
def test_an_experiment_that_gives_no_config_is_refused(opdjax, experiment, tmp_path, text, message):
    status, out, err = opdjax("train", experiment(text), "--workdir", tmp_path / "run")
    assert (status, out) == (2, "")
    assert err.startswith("opdjax: ")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_experiment_is_refused(opdjax, experiment, tmp_path):
    for path in (tmp_path / "nowhere.py", tmp_path):
        status, _, err = opdjax("train", path, "--workdir", tmp_path / "run")
        assert status == 2
        assert err == f"opdjax: there is no file '{path}'; expected a Python file with get_config()"
    saved = experiment("{}", "config.json")
    status, _, err = opdjax("train", saved, "--workdir", tmp_path / "run")
    assert status == 2
    assert (
        err == f"opdjax: {saved} has no 'config'; expected the config.json of a run or "
        f"the point.json of a sweep"
    )


def test_a_saved_config_can_be_run_again(experiment):
    config = load_experiment(str(experiment()))
    saved = experiment(json.dumps({"config": to_dict(config)}), "config.json")
    assert load_experiment(str(saved)) == config


def test_an_experiment_is_loaded_as_it_is(experiment):
    config = load_experiment(str(experiment()))
    assert isinstance(config, Config)
    assert (config.estimator.recipe, config.train.num_steps) == ("opd", 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--optimizer.learning-rat", "1"],
            "Unrecognized options: --optimizer.learning-rat, 1 Perhaps you meant: "
            "--optimizer.learning-rate FLOAT",
        ),
        (["--train.num-step", "1"], "Perhaps you meant: --train.num-steps INT"),
        (
            ["--estimator.recipe", "vodp"],
            "invalid choice 'vodp' for argument '--estimator.recipe'. Expected one of ('opd', "
            "'vopd', 'full_kl', 'topk_kl', 'npd', 'sft', "
            "'grpo', 'ropd', 'tjudge', 'ropd_stages')",
        ),
        (
            ["--optimizer.learning-rate", "abc"],
            "Error parsing --optimizer.learning-rate: could not convert string to float: 'abc'",
        ),
        (
            ["--train.num-steps", "1.5"],
            "Error parsing --train.num-steps: invalid literal for int() with base 10: '1.5'",
        ),
        (["--data.max-prompt-length", "0"], "data.max_prompt_length is 0; expected at least 1"),
        (
            ["--optimizer.max-grad-norm", "inf"],
            "optimizer.max_grad_norm is inf; expected a finite number",
        ),
        (["--seed", "-1"], "seed is -1; expected from 0 to 2147483647"),
        (["--sampling.temperature", "0.5"], "recipe 'opd' with sampling.temperature 0.5"),
        (
            ["--train.gradient-accumulation-steps", "7"],
            "train.gradient_accumulation_steps is 7; expected a divisor of the 64 rows a step",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_that_does_not_fit_is_refused(opdjax, experiment, tmp_path, flags, message):
    status, out, err = opdjax("train", experiment(), "--workdir", tmp_path / "run", *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_training_asks_for_a_work_directory(opdjax, experiment):
    status, _, err = opdjax("train", experiment())
    assert status == 2
    assert "Missing from opdjax train EXPERIMENT: --workdir PATH" in err


@pytest.mark.parametrize(
    ("flag", "value", "option"),
    [("--estimator.divergence", "jsd", "divergence"), ("--estimator.baseline", "full", "baseline")],
)
def test_an_option_of_another_recipe_is_refused_before_anything_is_written(
    opdjax, experiment, tmp_path, flag, value, option
):
    status, out, err = opdjax("train", experiment(), "--workdir", tmp_path / "run", flag, value)
    assert (status, out) == (2, "")
    assert f"recipe 'opd' has no option '{option}'; it has discount, return_to_go, " in err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("command", ["plan", "doctor", "audit"])
def test_a_recipe_on_the_command_line_leaves_the_options_of_the_experiments_out(
    opdjax, experiment, tmp_path, command
):
    """Those that it has too stay; other arguments may make the recipe possible."""
    file = experiment(EXPERIMENT.replace('"opd"', '"opd", discount=0.5, extra_draws=2'))
    chosen = ["--estimator.recipe", "full_kl", "--help"]
    _, out, err = opdjax(command, file, *chosen)
    assert err == f"note: {file} sets discount, extra_draws for opd; left out for full_kl"
    assert "(default: full_kl)" in smooth(out)
    assert opdjax(command, file, "--estimator.recipe=opd", "--help")[2] == ""
    _, out, err = opdjax(command, file, "--estimator.recipe=vopd", "--help")
    assert err == ""
    assert "(opd, vopd: 0.0) (default: 0.5)" in smooth(out)


def test_a_recipe_is_checked_together_with_the_other_arguments(opdjax, experiment):
    grpo = [experiment(), "--topology", "nowhere", "--estimator.recipe", "grpo"]
    assert "num_generations is 1; expected at least 2" in opdjax("plan", *grpo)[2]
    assert "nowhere" in opdjax("plan", *grpo, "--sampling.num-generations", "4")[2]


def test_an_experiment_without_its_ending_is_answered_with_the_built_in_one(opdjax, tmp_path):
    _, _, err = opdjax("train", "mini_vopd", "--workdir", tmp_path / "run")
    assert "there is no file 'mini_vopd' (did you mean @mini_vopd?)" in err


@pytest.fixture
def failing(opdjax, monkeypatch):
    """failing(error, *arguments) -> the outcome of a command that raises the error."""

    def run(error, *arguments):
        def command(arguments):
            assert "--debug" not in arguments
            raise error

        monkeypatch.setitem(main.COMMANDS, "sample", command)
        return opdjax(*(arguments or ("sample",)))

    return run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("seed is -1"), 2, "seed is -1"),
        (ReferenceMissError("no answers"), 2, "no answers"),  # a DataError
        (FileNotFoundError(2, "Gone", "x"), 2, "x: Gone"),
        (MissingExtraError("pip install x"), 2, "pip install x"),
        (LeaseLostError("taken over"), 75, "taken over"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_mistake_of_the_user_ends_in_one_line(failing, error, status, message):
    assert failing(error) == (status, "", f"opdjax: {message}")


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), RuntimeError("a"), ValueError("a"), ImportError("a"), ModuleNotFoundError("a")],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_keeps_its_traceback(failing, error):
    with pytest.raises(type(error)) as raised:
        failing(error)
    assert raised.value is error


def test_a_bug_ends_with_the_status_of_python():
    code = "from opdjax.cli import main; main.COMMANDS['sample'] = lambda _: {}['bug']; main.main()"
    ran = subprocess.run([sys.executable, "-c", code, "sample"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("Traceback")
    assert ran.stderr.endswith("KeyError: 'bug'\n")


@pytest.mark.parametrize("arguments", [("sample", "--debug"), ("--debug", "sample"), ("sample",)])
def test_debugging_adds_the_traceback(failing, monkeypatch, arguments):
    if "--debug" not in arguments:
        monkeypatch.setenv("OPDJAX_DEBUG", "1")
    status, out, err = failing(ConfigError("seed is -1"), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("opdjax: seed is -1")
    monkeypatch.setenv("OPDJAX_DEBUG", "0")
    assert failing(ConfigError("seed is -1"))[2] == "opdjax: seed is -1"


# Errors that a caller inside the package handles. One that reaches the command line is a bug.
INTERNAL = {
    "opdjax.judge.client._FormatRefusedError",
    "opdjax.judge.client._PostponedError",
    "opdjax.judge.client._TransientError",
    "opdjax.judge.reply_object.ReplyError",
}


def test_every_error_of_the_package_is_either_the_users_or_internal():
    classes = set()
    for file in sorted((PACKAGE).rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                classes.add(f"{module}.{node.name}")
    assert classes >= INTERNAL
    for name in classes:
        module, _, error = name.rpartition(".")
        error_class = getattr(importlib.import_module(module), error)
        instance = error_class.__new__(error_class)  # their constructors differ
        assert main.is_user_error(instance) != (name in INTERNAL), name


STUCK = """
import sys, threading, time
from opdjax.cli import main

def failing(arguments):
    threading.Thread(target=time.sleep, args=(100,)).start()
    raise OSError(28, "No space left on device", "/runs/1")

main.COMMANDS["train"], main._EXIT_SECONDS, sys.argv = failing, 0.2, ["opdjax", "train"]
main.main()
"""


def test_a_thread_that_waits_for_ever_does_not_keep_a_failed_command():
    ran = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    line = "/runs/1: No space left on device; make room and run the same command again"
    assert ran.stderr == f"opdjax: {line}\n"


def test_a_device_without_memory_is_the_users_to_help():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jnp.zeros(1 << 44).block_until_ready()
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand its stack"
    for error in (raised.value, jax.errors.JaxRuntimeError(text)):
        assert main.is_user_error(error)
        found = main._text(error)
        assert re.search(r"allocating \d+ bytes; raise train.gradient_accumulation_steps", found)
        assert "stack" not in found
    # TensorStore's words for a full disk, as they are and in an error of the package.
    full = ValueError("RESOURCE_EXHAUSTED: Error writing [No space left on device]")
    assert not main.is_user_error(full)
    for error in (full, CheckpointWriteError(f"not written: {full}; make room there")):
        assert main._text(error) == str(error)


@pytest.mark.parametrize("cause", ["Connection closed by peer", "Connection reset by peer"])
def test_a_lost_peer_is_said_in_one_line(cause):
    error = jax.errors.JaxRuntimeError(f"UNKNOWN: Gloo all-reduce failed: Read error: {cause}")
    assert main.is_user_error(error)
    assert main._text(error).startswith("another process of the run has ended")


@pytest.mark.parametrize(
    "words", [("check",), ("evaluate",), ("sample", "1+1=")], ids=lambda words: words[0]
)
def test_a_directory_without_a_model_is_named(opdjax, tmp_path, words):
    status, _, err = opdjax(words[0], tmp_path, *words[1:])
    assert status == 2
    assert f"{tmp_path} has no config.json; expected a Hugging Face checkpoint directory" in err


def test_export_of_a_directory_without_a_run(opdjax, tmp_path):
    status, _, err = opdjax("export", tmp_path, tmp_path / "out")
    assert status == 2
    assert f"{tmp_path} has no config.json; expected the work directory of a run" in err
    assert not (tmp_path / "out").exists()


# Commands at work


def test_check_prints_the_facts_of_a_checkpoint(opdjax):
    status, out, _ = opdjax("check", MINI_TEACHER)
    facts = dict(re.split(r"\s{2,}|(?<=^.{22})", line, maxsplit=1) for line in out.splitlines())
    published = json.loads((MINI_PAIR / "teacher" / "config.json").read_text())
    assert status == 0
    assert facts["path"] == str(MINI_PAIR / "teacher")
    assert facts["architecture"] == "Qwen3ForCausalLM"
    for fact, name in (
        ("num_layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("vocab_size", "vocab_size"),
        ("num_kv_heads", "num_key_value_heads"),
        ("intermediate_size", "intermediate_size"),
    ):
        assert facts[fact] == str(published[name])
    # Embedding and final norm; per layer q, k, v, o, the norms of q and k, three of the MLP and two
    # norms.
    width = published["hidden_size"]
    inner = published["intermediate_size"]
    size = published["head_dim"]
    queries, keys = published["num_attention_heads"] * size, published["num_key_value_heads"] * size
    layer = 2 * width * queries + 2 * width * keys + 2 * size + 3 * width * inner + 2 * width
    assert published["tie_word_embeddings"]
    assert facts["parameters"] == str(
        published["vocab_size"] * width + width + published["num_hidden_layers"] * layer
    )
    assert facts["stop token ids"] == "(2,)"
    assert facts["tokenizer ids"] == "214"
    assert facts["has chat template"] == "True"


def answers(out):
    return [tuple(line.split("\t")) for line in out.splitlines()]


def test_a_greedy_answer_depends_on_nothing_but_its_prompt(opdjax):
    common = ("--temperature", "0", "--max-completion-length", "24")
    status, out, _ = opdjax("sample", MINI_TEACHER, "7+8+9=", *common)
    assert status == 0
    # What the teacher was made for, and what a broken template or tokenizer would spoil.
    assert answers(out) == [("7+8+9=", "7+8=15;15+9=24#24")]
    _, again, _ = opdjax(
        "sample",
        MINI_TEACHER,
        "40-3-22=",
        "7+8+9=",
        *common,
        "--seed",
        "5",
        "--num-generations",
        "2",
    )
    assert answers(again)[2:] == answers(out) * 2
    assert [prompt for prompt, _ in answers(again)[:2]] == ["40-3-22="] * 2


def test_draws_follow_the_seed(opdjax):
    def draw(seed):
        status, out, _ = opdjax(
            "sample",
            MINI_STUDENT,
            "34-17+25=",
            "--num-generations",
            "6",
            "--max-completion-length",
            "24",
            "--temperature",
            "1.5",
            "--seed",
            seed,
        )
        assert status == 0
        return answers(out)

    first = draw(0)
    assert len(first) == 6
    assert len(set(first)) > 1
    assert draw(0) == first
    assert draw(1) != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "2"], "sampling.top_p is 2.0; expected more than 0 and at most 1"),
        (["--temperature", "-1"], "sampling.temperature is -1.0; expected more than 0"),
        (["--num-generations", "0"], "sampling.num_generations is 0; expected at least 1"),
        (
            ["--max-completion-length", "0"],
            "sampling.max_completion_length is 0; expected at least 1",
        ),
        (["--seed", "2147483648"], "seed is 2147483648; expected at most 2147483647"),
        (
            ["--data.max-prompt-length", "3"],
            "the caller has no prompt of at most 3 tokens (1 rows read); raise data.max_",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_sampling_refuses_what_a_run_would_refuse(opdjax, flags, message):
    status, out, err = opdjax("sample", MINI_STUDENT, "1+1+1=", *flags)
    assert (status, out) == (2, "")
    assert message in err


def test_sampling_without_a_prompt(opdjax):
    status, _, err = opdjax("sample", MINI_STUDENT)
    assert status == 2
    assert err.endswith("no prompt given; expected one or more")


def test_evaluation_prints_and_writes_its_scores(opdjax, tmp_path):
    file = tmp_path / "scores.json"
    status, out, _ = opdjax("evaluate", MINI_STUDENT, *SMALL, "--output", file)
    assert status == 0
    scores = json.loads(file.read_text())
    assert {key: scores[key] for key in ("temperature", "n", "k", "num_prompts")} == {
        "temperature": 1.0,
        "n": 2,
        "k": 2,
        "num_prompts": 4,
    }
    right, greedy = scores["per_prompt"], scores["per_prompt_greedy"]
    assert len(right) == len(greedy) == 4
    assert set(right) <= {0, 1, 2}
    assert set(greedy) <= {0, 1}
    assert scores["avg@k"] == pytest.approx(sum(right) / 8)
    assert scores["pass@k"] == pytest.approx(sum(count > 0 for count in right) / 4)
    assert scores["greedy"] == pytest.approx(sum(greedy) / 4)
    assert [each["is_right"] for each in scores["answers"]] == [bool(count) for count in greedy]
    assert all(
        each["is_right"] == each["completion"].endswith(f"#{each['answer']}")
        for each in scores["answers"]
    )
    assert 0 <= scores["truncated_ratio"] <= 1 <= scores["length_mean"] <= 24
    expected = [
        f"avg@2     {scores['avg@k']:.4f} ± {scores['avg@k_interval']:.4f}",
        f"pass@2    {scores['pass@k']:.4f} ± {scores['pass@k_interval']:.4f}",
        f"greedy    {scores['greedy']:.4f} ± {scores['greedy_interval']:.4f}",
        "4 prompts, T = 1; ± is half a 95 % interval over prompts",
    ]
    assert out.splitlines() == expected


def test_the_teacher_solves_what_it_was_made_for(opdjax, tmp_path):
    rows = [
        {"prompt": "7+8+9=", "answer": 24},
        {"prompt": "7+8+9=", "answer": "25"},
        {"prompt": "1+1+1=", "answer": 3.0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "scores.json"
    status, _, _ = opdjax(
        "evaluate",
        MINI_TEACHER,
        *SMALL,
        "--evaluation.source",
        tmp_path / "rows.jsonl",
        "--output",
        file,
    )
    assert status == 0
    # Right, wrong by the answer that was asked for, right.
    assert json.loads(file.read_text())["per_prompt_greedy"] == [1, 0, 1]


def test_evaluation_needs_a_source_with_answers(opdjax, tmp_path):
    status, _, err = opdjax("evaluate", MINI_STUDENT, *SMALL, "--evaluation.source", "None")
    assert status == 2
    assert err.endswith("evaluation.source is None; expected a data source with answers")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": 2}\n{"prompt": "1+2="}\n')
    status, _, err = opdjax(
        "evaluate", MINI_STUDENT, *SMALL, "--evaluation.source", tmp_path / "rows.jsonl"
    )
    assert status == 2
    assert "rows.jsonl has no 'answer' (1 such rows); evaluation needs them" in err


def test_programs_are_kept_for_the_next_command_where_the_user_wants_them(tmp_path, monkeypatch):
    for name in main.compilation_cache():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPDJAX_SCRATCH", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    monkeypatch.setattr(sys, "argv", ["opdjax", "table", str(tmp_path / "absent")])
    with pytest.raises(SystemExit):
        main.main()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "compiled"))
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "7"


def test_training_on_a_cpu_says_its_dtype_and_its_memory(capsys, monkeypatch):
    from opdjax.cli import runs

    runs._print_needs(runs.MINI)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "forward passes in float32 (train.dtype auto): a CPU is slower in bfloat16"
    assert re.fullmatch(
        r"memory of the run: fits: \w+ holds most, \d\.\d\d of \d+\.\d\d GiB", second
    )
    sysconf = os.sysconf
    monkeypatch.setattr(
        os, "sysconf", lambda name: 100 if name == "SC_PHYS_PAGES" else sysconf(name)
    )
    runs._print_needs(dataclasses.replace(runs.MINI, train=TrainConfig(dtype="bfloat16")))
    assert "does not fit: loss holds " in capsys.readouterr().out

"""Commands for one checkpoint."""

import functools
import itertools
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from opdjax.cli.parsing import NONE, Reads, as_given, call, command, require_model
from opdjax.cli.runs import store
from opdjax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.presets import protocol_named
from opdjax.config.sampling import is_own_function
from opdjax.config.validation import ConfigError, require
from opdjax.runs.object_store import Folder, is_remote, open_output
from opdjax.runs.workdir import read_run_config

Dtype = Literal["auto", "float32", "bfloat16"]
_RANGES = r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*"
_VIEW = ("prompt_format", "system_prompt", "format", "max_prompt_length", "date")  # of the student


def sample(arguments: list[str]) -> None:
    """MODEL PROMPT …: print completions; [EXPERIMENT] --store WORKDIR: store a run's rollouts."""
    if "--store" in arguments:
        store(arguments)
    else:
        _call_as_its_run(_print_completions, arguments, "sample", {DataConfig: _VIEW}, ("data",))


def evaluate(arguments: list[str]) -> None:
    """MODEL [--evaluation.field VALUE …]: print the mean score of sampled answers."""
    graded = [f.name for f in fields(EvaluationConfig) if f.name not in ("kind", "every")]
    reads = {DataConfig: (*_VIEW, "columns", "skip_bad_rows"), EvaluationConfig: graded}
    names = ("data", "evaluation", "dtype")
    _call_as_its_run(_print_scores, arguments, "evaluate", reads, names)


def suites(arguments: list[str]) -> None:
    """MODEL … --output DIR: evaluate checkpoints on suites, and compare them in pairs."""
    chosen = re.findall("--protocol[=\0]([^\0]+)", "\0".join(arguments))
    names, data, evaluation = protocol_named(chosen[-1] if chosen else "default")
    defaults = {"suites": names, "data": data, "evaluation": evaluation}
    sampled = ("num_prompts", "num_samples", "temperatures", "top_p", "top_k", "grader", "columns")
    reads = {DataConfig: _VIEW, EvaluationConfig: (*sampled, "max_completion_length")}
    call(functools.partial(_print_suites, **defaults), arguments, "opdjax suites", reads)


def _print_suites(
    models: Annotated[Positional[tuple[str, ...]], NONE],
    output: pathlib.Path,
    suites: tuple[str, ...],
    data: DataConfig,
    evaluation: EvaluationConfig,
    protocol: str = "default",
    dtype: Dtype = "auto",
    slots: int | None = None,
):
    """Evaluate checkpoints on suites, with a record of every problem, and compare them in pairs.

    The same command continues an interrupted evaluation.

    Args:
        models: Checkpoint directories, work directories of finished runs, hub ids, @mini_student or
            @mini_teacher.
        output: Local directory of the records, MODEL/SUITE.jsonl, and of all scores, scores.json.
        suites: Names as in evaluation.source, NAME=SOURCE for a copy, or other data sources.
        data: How a prompt is rendered.
        evaluation: Sampling and grading.
        protocol: Where suites, data and evaluation come from if they are not given: default,
            vopd_math, vopd_science or ropd.
        dtype: Dtype of the forward pass; auto is float32 on a CPU, else bfloat16.
        slots: Rows decoded at a time, fewer for long answers, which need memory; None is 512.
    """
    for model in models:
        require_model(model)
    from opdjax.rollouts.suites import file_name, records_of, scores_of_records
    from opdjax.runs.statistics import benchmark_lines
    from opdjax.runs.workdir import write_json

    require(bool(models), "MODEL …", models, "one checkpoint or more")
    require(not is_remote(output), "--output", str(output), "a local directory")
    sections = {"data": data, "evaluation": evaluation, "train": TrainConfig(dtype=dtype)}
    sections["sampling"], k = SamplingConfig(slots=slots), evaluation.num_samples
    records, tables = {}, {}
    for model in dict.fromkeys(models):
        (directory := output / file_name(model)).mkdir(parents=True, exist_ok=True)
        config = Config(student=ModelConfig(model), **sections)
        records[model] = records_of(config, suites, directory)
        tables[model] = scores_of_records(records[model])
    for left, right in itertools.combinations(records, 2):
        tables[f"{right} - {left}"] = scores_of_records(records[right], records[left])
    for name, table in tables.items():
        print("\n".join([name, *benchmark_lines(table, k)]))
    print("± is half a 95 % interval over problems; differences are paired by problem")
    write_json(output / "scores.json", tables)


def _call_as_its_run(
    function: Callable[..., None],
    arguments: list[str],
    command: str,
    reads: Reads,
    names: Sequence[str],
) -> None:
    """Call a function of a `model`; a run that exported it gives the defaults of `names`."""

    @functools.wraps(function)
    def with_given(**given: Any) -> None:
        require_model(given["model"])
        from opdjax.models.hf import open_checkpoint
        from opdjax.rollouts.export import recorded_use

        use = recorded_use(open_checkpoint(*ModelConfig(given["model"]).place))
        if use is None:
            function(**given)
            return
        print(f"note: settings not given are those of {given['model']}'s run", file=sys.stderr)
        if "evaluation" in names and is_own_function(own := use.evaluation.grader):
            # What comes with a checkpoint is never run.
            use = replace(use, evaluation=replace(use.evaluation, grader="auto"))
            note = f"note: its grader {own} is dropped: give it with --evaluation.grader {own}"
            print(note, file=sys.stderr)
        found = {"data": use.data, "evaluation": use.evaluation, "dtype": use.train.dtype}
        defaults = {name: found[name] for name in names}
        call(functools.partial(function, **defaults), arguments, f"opdjax {command}", reads)

    call(with_given, arguments, f"opdjax {command}", reads)


def _print_completions(
    model: Positional[str],
    prompts: Annotated[Positional[tuple[str, ...]], NONE],
    data: DataConfig = DataConfig(),
    num_generations: int = 1,
    max_completion_length: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    dtype: Dtype = "auto",
    seed: int = 0,
):
    """Print completions of prompts, one line each: prompt, tab, completion.

    Args:
        model: Checkpoint directory, work directory of a finished run, hub id, or @mini_student or
            @mini_teacher.
        prompts: Texts to complete.
        data: How a prompt is rendered; for a run's student, by default as in that run.
        num_generations: Completions per prompt.
        max_completion_length: Longest completion in tokens, including the stop token.
        temperature: Temperature of sampling; 0 is greedy.
        top_p: Keep the most likely tokens up to this total probability; 1 is off.
        top_k: Keep this many of the most likely tokens; 0 is off.
        min_p: Keep tokens at least this fraction as likely as the most likely one; 0 is off.
        dtype: Dtype of the forward pass; auto is float32 on a CPU, else bfloat16.
        seed: Seed of the random draws.
    """
    from opdjax.rollouts.one_model import load, sample

    options = {
        "data": data,
        "num_generations": num_generations,
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
    }
    for prompt, texts in zip(prompts, sample(load(model, dtype=dtype), prompts, **options)):
        for text in texts:
            print(f"{prompt}\t{text}")


def _print_scores(
    model: Positional[str],
    data: DataConfig = DataConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    dtype: Dtype = "auto",
    slots: int | None = None,
    output: pathlib.Path | None = None,
):
    """Print the mean score of sampled answers (avg@8), pass@8 and greedy accuracy.

    For a run's student, the settings are by default those of that run.

    Args:
        model: Checkpoint directory, work directory of a finished run, hub id, or @mini_student or
            @mini_teacher.
        data: How a prompt is rendered.
        evaluation: Prompts, sampling and grading.
        dtype: Dtype of the forward pass; auto is float32 on a CPU, else bfloat16.
        slots: Rows decoded at a time, fewer for long answers, which need memory; None is 512.
        output: JSON file to write the scores to, including those of each prompt.
    """
    from opdjax.rollouts.one_model import scores_of
    from opdjax.runs import statistics
    from opdjax.runs.workdir import write_json

    if output is not None and not is_remote(output):
        if not output.parent.is_dir():
            raise ConfigError(
                f"--output {output}: there is no directory {output.parent}; make it first"
            )
        if output.is_dir():
            raise ConfigError(f"--output {output} is a directory; expected the name of a file")
    sections = {"data": data, "evaluation": evaluation, "train": TrainConfig(dtype=dtype)}
    sections["sampling"] = SamplingConfig(slots=slots)
    scores = scores_of(Config(student=ModelConfig(model), **sections))
    for name in ("avg@k", "pass@k", "greedy"):
        half = scores[f"{name}_interval"]
        print(f"{statistics.score_label(name, scores['k']):10}{scores[name]:.4f} ± {half:.4f}")
    for line in statistics.benchmark_lines(scores.get("benchmarks", {}), scores["k"]):
        print(line)
    print(
        f"{scores['num_prompts']} prompts, T = {scores['temperature']:g}; ± is half a 95 % "
        "interval over prompts"
    )
    if not statistics.has_right_answer([scores]):
        print(statistics.NO_RIGHT_ANSWER)
    if output is not None:
        with open_output(output) as file:
            write_json(file, scores)


@command("MODEL")
def check(model: Positional[str]):
    """Check that a checkpoint can be loaded, and describe it.

    Args:
        model: Checkpoint directory, work directory of a finished run, hub id, or @mini_student or
            @mini_teacher.
    """
    require_model(model)
    from opdjax.rollouts.one_model import describe

    for name, value in describe(model).items():
        print(f"{name:22}{value}")


@command("WORKDIR OUT [--step N|latest|best]")
def export(
    workdir: Positional[pathlib.Path],
    out: Positional[pathlib.Path],
    step: str = "latest",
    dtype: Literal["float32", "bfloat16"] | None = None,
    push_to_hub: str | None = None,
):
    """Write a run's student as a Hugging Face checkpoint.

    Its adapters are also written, to OUT_adapter.

    Args:
        workdir: Work directory of the run.
        out: New directory to write to.
        step: Step of a checkpoint, `latest`, or `best`, the one with the best sampled score.
        dtype: Dtype of the weights; None is that of the run's forward pass.
        push_to_hub: OWNER/NAME of a model repository of the Hugging Face hub to upload it to; a new
            one is private.
    """
    if not is_remote(workdir):
        read_run_config(workdir)  # before the imports, which take seconds
    from opdjax.cli.export import export_step, push, require_token

    if push_to_hub is not None:
        require_token()
    if is_remote(out) and Folder(out).files():
        raise ConfigError(f"{as_given(out)} exists and is not empty; export into a new directory")
    with open_output(out) as directory:
        export_step(workdir, step, directory, dtype)
        if push_to_hub is not None:
            print(f"uploaded to {push(directory, push_to_hub)}")
    print(f"wrote {as_given(out)}")


@command("MODEL OUT [--keep-layers 0-21,25-29] [--bits N]")
def make_student(
    model: Positional[str],
    out: Positional[pathlib.Path],
    keep_layers: str | None = None,
    bits: int | None = None,
    noise: float = 0.0,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
):
    """Write a student made from its teacher: fewer layers, coarser or noisier weights.

    Without options it is a copy, which converts a GGUF file or merges an adapter.

    Args:
        model: Checkpoint directory, GGUF file, hub id, or @mini_teacher.
        out: New directory to write to.
        keep_layers: Layers that stay, such as 0-21,25-29; None keeps all.
        bits: Bits of a rounded weight of a kernel, from 2 to 8; None does not round.
        noise: Noise of a kernel, in its standard deviations.
        dtype: Dtype of the weights; None is that of the model.
        seed: Seed of the noise.
    """
    require_model(model)
    from opdjax.models.make_student import make_student

    require(bits is None or 2 <= bits <= 8, "--bits", bits, "2 to 8")
    require(0 <= noise < math.inf, "--noise", noise, "0 or more")
    kept = None if keep_layers is None else _numbers(keep_layers)
    make_student(model, out, keep_layers=kept, bits=bits, noise=noise, dtype=dtype, seed=seed)
    print(f"wrote {as_given(out)}")


def _numbers(text: str) -> list[int]:
    """The numbers of a list of ranges, such as 0-3,7."""
    expected = "numbers and ranges, such as 0-21,25-29"
    require(re.fullmatch(_RANGES, text) is not None, "--keep-layers", text, expected)
    ends = [part.partition("-") for part in text.split(",")]
    return [n for first, _, last in ends for n in range(int(first), int(last or first) + 1)]

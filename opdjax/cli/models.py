"""Commands for one checkpoint."""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal

import tyro

from opdjax.cli.parsing import as_given, call
from opdjax.cli.runs import store
from opdjax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError
from opdjax.runs.object_store import Folder, is_remote, open_output

Dtype = Literal["auto", "float32", "bfloat16"]


def sample(arguments: list[str], data_of_run: DataConfig | None = None) -> None:
    """MODEL PROMPT …: print completions; [EXPERIMENT] --store WORKDIR: store a run's rollouts."""
    if "--store" in arguments:
        store(arguments)
        return

    def run(
        model: Annotated[str, tyro.conf.Positional],
        prompts: Annotated[tuple[str, ...], tyro.conf.Positional],
        data: DataConfig = data_of_run or DataConfig(),  # noqa: B008
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
            model: checkpoint directory, hub id, or @mini_student or @mini_teacher
            prompts: texts to complete
            data: how a prompt is rendered; of a run's student, as in that run
            num_generations: completions per prompt
            max_completion_length: tokens, including the stop token
            temperature: 0 is greedy
            top_p: 1 is off
            top_k: 0 is off
            min_p: 0 is off
            dtype: of the forward pass
            seed: of the random draws
        """
        from opdjax.rollouts.one_model import load, use_of
        from opdjax.rollouts.one_model import sample as complete

        if data_of_run is None and (use := use_of(model)) is not None:
            sample(arguments, use.data)  # parsed again, with the run's settings as defaults
            return
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
        for prompt, texts in zip(prompts, complete(load(model, dtype=dtype), prompts, **options)):
            for text in texts:
                print(f"{prompt}\t{text}")

    call(run, arguments, "opdjax sample")


def evaluate(arguments: list[str], run_of_model: Config | None = None) -> None:
    """MODEL [--evaluation.field VALUE …]: print avg@k, pass@k and greedy accuracy."""
    use = run_of_model or Config()

    def run(
        model: Annotated[str, tyro.conf.Positional],
        data: DataConfig = use.data,
        evaluation: EvaluationConfig = use.evaluation,
        dtype: Dtype = use.train.dtype,
        slots: int | None = None,
        output: pathlib.Path | None = None,
    ):
        """Print the scores of a checkpoint. The defaults of a run's student are those of that run.

        Args:
            model: checkpoint directory, hub id, or @mini_student or @mini_teacher
            data: how a prompt is rendered; its source is not read
            evaluation: prompts, sampling and grading
            dtype: of the forward pass
            slots: rows decoded at a time, None: 512; fewer for long answers, which need memory
            output: JSON file for the scores, including those of each prompt
        """
        from opdjax.rollouts.one_model import scores_of, use_of
        from opdjax.runs.statistics import benchmark_lines
        from opdjax.runs.workdir import write_json

        if run_of_model is None and (found := use_of(model)) is not None:
            print(f"settings not given are those of the run that exported {model}")
            evaluate(arguments, found)  # parsed again, with other defaults
            return
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
            title = name.replace("@k", f"@{scores['k']}")
            print(f"{title:10}{scores[name]:.4f} ± {scores[name + '_interval']:.4f}")
        for line in benchmark_lines(scores.get("benchmarks", {})):
            print(line)
        print(
            f"{scores['num_prompts']} prompts, T = {scores['temperature']:g}; ± is half a 95 % "
            "interval over prompts"
        )
        if output is not None:
            with open_output(output) as file:
                write_json(file, scores)

    call(run, arguments, "opdjax evaluate")


def check(arguments: list[str]) -> None:
    """MODEL: check that a checkpoint can be loaded, and describe it."""

    def run(model: Annotated[str, tyro.conf.Positional]):
        """Check that a checkpoint can be loaded, and describe it.

        Args:
            model: checkpoint directory, hub id, or @mini_student or @mini_teacher
        """
        from opdjax.rollouts.one_model import describe

        for name, value in describe(model).items():
            print(f"{name:22}{value}")

    call(run, arguments, "opdjax check")


def export(arguments: list[str]) -> None:
    """WORKDIR OUT [--step N|latest|best]: write a run's student as a Hugging Face checkpoint."""

    def run(
        workdir: Annotated[pathlib.Path, tyro.conf.Positional],
        out: Annotated[pathlib.Path, tyro.conf.Positional],
        step: str = "latest",
        dtype: Literal["float32", "bfloat16"] | None = None,
        push_to_hub: str | None = None,
    ):
        """Write a run's student as a Hugging Face checkpoint, and its adapters to OUT_adapter.

        Args:
            workdir: work directory of a run
            out: new directory
            step: step of a checkpoint, `latest`, or `best` by avg@k
            dtype: of the weights; none: that of the run's forward pass
            push_to_hub: OWNER/NAME of a model repository of the Hugging Face hub to upload it to;
                a new one is private
        """
        from opdjax.cli.export import export_step, push, require_token

        if push_to_hub is not None:
            require_token()
        if is_remote(out) and Folder(out).files():
            raise ConfigError(
                f"{as_given(out)} exists and is not empty; export into a new directory"
            )
        with open_output(out) as directory:
            export_step(workdir, step, directory, dtype)
            if push_to_hub is not None:
                print(f"uploaded to {push(directory, push_to_hub)}")
        print(f"wrote {as_given(out)}")

    call(run, arguments, "opdjax export")

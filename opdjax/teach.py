"""`opdjax teach`: a teacher answers every prompt of the data a few times, once and for all, into an index that runs read.

The teacher is whoever `teacher_api` names, or the checkpoint `teacher.path`; its tokenizer may be any. What is answered is never
asked again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from opdjax.api.replies import ApiRequestError, ApiUnavailableError
from opdjax.config import Config, DataConfig
from opdjax.data.chat import load_tokenizer
from opdjax.data.prompts import Prompt, collate, encode_prompts, messages_of, read_prompts
from opdjax.data.references import Answer, ReferenceIndex, add_answers, key_of, open_index, read_index
from opdjax.data.sources import Columns
from opdjax.decoding import Decoding
from opdjax.evals.evaluate import completions
from opdjax.fields import require
from opdjax.models.hf import fingerprint, load_params, open_checkpoint
from opdjax.prepare import compute_dtype, num_ids, stop_ids, student_view
from opdjax.sampler import sample
from opdjax.sharding import to_host
from opdjax.workdir import locked

# Answers to some prompts, by number of the draw, given those numbers; empty where the teacher did not answer.
Answered = Callable[[list[Prompt], list[list[int]]], list[dict[int, Answer]]]


def teach(config: Config) -> dict[str, float]:
    """Fill the index `data.references` for all prompts of `data.source`; what there is to tell of it.

    ConfigError where no index is named, ReferenceIndexError where it is another teacher's, and the client's errors; what was
    answered before is kept.
    """
    require(config.data.references is not None, "data.references", None, "the file that the answers are to be written to")
    path = pathlib.Path(config.data.references)
    rows = list({key_of(row.prompt): row for row in read_prompts(config.data.source, Columns.of(config.data))}.values())
    by_whom = _by_api(config, path) if config.teacher_api.is_given else _by_checkpoint(config)
    with locked(path.parent, f"teach-{path.name}"), by_whom as (teacher, answered, told):
        index = open_index(path, teacher)
        if config.teach.num_answers > 1 and teacher["temperature"] == 0:
            print(f"note: {config.teach.num_answers} answers are drawn at temperature 0, so they are likely to be one and the same")
        _fill(index, rows, config, answered)
        return _counts(read_index(path), rows, config.teach.num_answers) | told()


def _fill(index: ReferenceIndex, rows: list[Prompt], config: Config, answered: Answered) -> None:
    """Ask for what is missing, a batch at a time, each kept before the next is asked for."""
    pending = [(row, missing) for row in rows if (missing := index.missing(row.prompt, config.teach.num_answers))]
    print(f"{index.path}: {len(rows) - len(pending)} of {len(rows)} prompts have their {config.teach.num_answers} answers")
    size = config.teach.batch_size
    for start in range(0, len(pending), size):
        batch = pending[start : start + size]
        answers = answered([row for row, _ in batch], [missing for _, missing in batch])
        add_answers(index.path, [(row.prompt, found) for (row, _), found in zip(batch, answers) if found])
        print(f"{start + len(batch)} of {len(pending)} prompts asked", flush=True)


def _counts(index: ReferenceIndex, rows: list[Prompt], count: int) -> dict[str, float]:
    """What the index holds of these prompts."""
    found = [index.answers.get(key_of(row.prompt), {}) for row in rows]
    every = [answer for answers in found for answer in answers.values()]
    usable = [index.usable(row.prompt) for row in rows]
    unique = [len(set(texts)) for texts in usable]
    return {
        "prompts": len(rows),
        "answers": len(every),
        "empty": sum(not answer.text.strip() for answer in every),
        "truncated": sum(answer.is_truncated for answer in every),
        "duplicates": sum(map(len, usable)) - sum(unique),
        f"prompts with fewer than {count} different answers": sum(number < count for number in unique),
        "prompts without any": sum(not number for number in unique),
    }


# A checkpoint


def _asked(data: DataConfig) -> DataConfig:
    """The data as a teacher is asked for answers: in the student's words, through its own template."""
    format = data.teacher_format or data.format
    thinking = data.enable_thinking if data.teacher_enable_thinking is None else data.teacher_enable_thinking
    view = {"format": format, "enable_thinking": thinking if format == "chat" else None}
    view |= {"system_prompt": data.system_prompt if format == "chat" else None, "teacher_format": None}
    return student_view(type(data)(**{**vars(data), **view, "teacher_enable_thinking": None}))


@contextlib.contextmanager
def _by_checkpoint(config: Config) -> Iterator[tuple[dict[str, Any], Answered, Callable]]:
    """The teacher's checkpoint, sampled."""
    how, data = config.teach, _asked(config.data)
    checkpoint = open_checkpoint(config.teacher.path, config.teacher.revision)
    tokenizer = load_tokenizer(checkpoint.path)
    params = load_params(checkpoint, compute_dtype(config.teacher))
    decoding = Decoding(
        how.max_completion_length,
        stop_ids(checkpoint, tokenizer),
        how.temperature,
        top_p=how.top_p,
        valid_vocab=num_ids(checkpoint, tokenizer),
    )
    told = {"left out for their length": 0}

    def answered(rows: list[Prompt], missing: list[list[int]]) -> list[dict[int, Answer]]:
        encoded = encode_prompts(rows, data, tokenizer, tokenizer)
        told["left out for their length"] += encoded.num_skipped
        first, count = min(map(min, missing)), max(map(max, missing)) + 1
        batch = collate(encoded, np.arange(len(encoded)), how.batch_size)
        # Draws are named after the prompt's content: its place in a batch means nothing.
        names = [int(key_of(row.prompt)[:7], 16) for row in encoded.prompts]
        batch = type(batch)(
            **{**vars(batch), "prompt_id": np.array([*names, *[0] * (how.batch_size - len(names))], np.int32), "occurrence": None}
        )
        drawn = to_host(
            sample(
                params,
                batch,
                config.seed,
                0,
                config=checkpoint.config,
                decoding=decoding,
                num_generations=count - first,
                first_sample=first,
            )
        )
        texts, size = completions(drawn, tokenizer), count - first
        found = {}
        for place, row in enumerate(encoded.prompts):
            of_row = {first + n: Answer(texts[place * size + n], bool(drawn.is_truncated[place * size + n])) for n in range(size)}
            found[key_of(row.prompt)] = of_row
        return [{n: found[key_of(row.prompt)][n] for n in draws if key_of(row.prompt) in found} for row, draws in zip(rows, missing)]

    teacher = {
        "checkpoint": fingerprint(checkpoint), "temperature": how.temperature, "top_p": how.top_p,
        "max_completion_length": how.max_completion_length, "seed": config.seed, **_wording(data), "format": data.format,
        "enable_thinking": data.enable_thinking,
    }  # fmt: skip
    yield teacher, answered, lambda: told


def _wording(data: DataConfig) -> dict[str, Any]:
    return {"prompt_format": data.prompt_format, "system_prompt": data.system_prompt}


# An API


@contextlib.contextmanager
def _by_api(config: Config, path: pathlib.Path) -> Iterator[tuple[dict[str, Any], Answered, Callable]]:
    """Whoever answers at `teacher_api`."""
    from opdjax.api.cache import ReplyCache
    from opdjax.api.client import ApiClient

    endpoint, data = config.teacher_api, config.data
    cache = ReplyCache(config.api.cache or path.with_name(f"{path.name}.replies.sqlite"))
    with contextlib.closing(cache), asyncio.Runner() as runner:
        client = runner.run(_made(lambda: ApiClient({"teacher": endpoint}, config.api, cache)))
        failed: list[str] = []

        async def of_draw(row: Prompt, number: int) -> Answer | None:
            try:
                reply = await client.complete("teacher", messages_of(row, data), sample=number)
            except (ApiUnavailableError, ApiRequestError) as error:
                failed.append(str(error))
                return None
            return Answer(reply.text, reply.finish_reason == "length")

        async def of_all(rows: list[Prompt], missing: list[list[int]]) -> list[dict[int, Answer]]:
            made = await asyncio.gather(*(of_draw(row, number) for row, numbers in zip(rows, missing) for number in numbers))
            answers = iter(made)
            found = [{number: next(answers) for number in numbers} for numbers in missing]
            return [{number: answer for number, answer in each.items() if answer is not None} for each in found]

        def answered(rows: list[Prompt], missing: list[list[int]]) -> list[dict[int, Answer]]:
            before = len(failed)
            answers = runner.run(of_all(rows, missing))
            if len(failed) - before == sum(map(len, missing)):
                raise ApiUnavailableError(
                    f"the teacher answered none of {len(failed) - before} requests, the last: {failed[-1]}; what it answered before is kept"
                )
            return answers

        def told() -> dict[str, float]:
            used = client.take_usage()["teacher"]
            return {
                "requests": used.calls,
                "tokens": used.input_tokens + used.output_tokens,
                "dollars": used.dollars,
                "failed": len(failed),
            }

        names = ("model", "temperature", "top_p", "seed", "reasoning_effort", "max_tokens")
        teacher = {name: getattr(endpoint, name) for name in names} | _wording(data)
        try:
            yield teacher, answered, told
        finally:
            runner.run(client.close())


async def _made(make: Callable) -> Any:
    """What is made in the loop that it is used in."""
    return make()

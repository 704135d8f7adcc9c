"""`opdjax references`: a teacher (`teach.model`, or the checkpoint `teacher.path`) writes a few
answers to each prompt into an index that runs read. Existing answers are never requested again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from opdjax.config import STUDENT, Config, TeachConfig
from opdjax.config.validation import MissingExtraError, require
from opdjax.data.chat import reads_clock
from opdjax.data.prompt_rows import Prompt, read_prompts
from opdjax.data.prompts import collate, dated, encode_prompts, messages_of
from opdjax.data.references import (
    ReferenceAnswer,
    ReferenceIndex,
    ReferenceIndexError,
    add_answers,
    key_of,
    open_index,
    read_index,
)
from opdjax.data.sources import ColumnMap
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.judge.replies import ApiError, ApiRequestError, ApiUnavailableError
from opdjax.models.hf import fingerprint, load_params
from opdjax.ops.sharding import make_mesh, to_host
from opdjax.rollouts.setup import (
    compute_dtype,
    decoding_of,
    open_student,
    open_teacher,
    student_view,
    teacher_view,
)
from opdjax.runs.mirror import open_remote_file
from opdjax.runs.object_store import is_remote
from opdjax.runs.workdir import NUMBER, WorkdirError, append_lines, locked, read_lines

Pending = tuple[Prompt, list[int]]  # a prompt, and the numbers of its missing answers
Answers = list[dict[int, ReferenceAnswer]]  # by prompt and number; failed ones are missing
Answerer = Callable[[Sequence[Pending], Counter], Answers]  # adds its metrics to the counter
# Prompts that are answered at a time, and stored before the next ones: an interrupted command
# repeats at most these.
_BATCH_SIZE = 64
_ANY_LENGTH = 2**31 - 1  # in tokens
_TRUNCATED = ("length", "content_filter")  # finish reasons of an incomplete reply


def teach(config: Config, today: str | None = None) -> dict[str, float]:
    """Fill the index `data.references` for all prompts of `data.source` that a run would use, and
    return the counts to report. `today` (None: by the clock): see `setup.prepare`.

    ConfigError without an index or a teacher; ReferenceIndexError if the index is another teacher's
    or is being written; the client's errors. Earlier answers are kept in any case.
    """
    _check_settings(config)
    open_answerer = _api_answerer if config.teach.model else _checkpoint_answerer
    with _locked_index(config.data.references) as (path, upload):
        may_differ = ("date",) if config.data.date is None else ()
        index = open_index(path, _identity(config, today), may_differ)
        # Prompts of a template that reads the clock are those of the day the index was begun.
        date = config.data.date or index.teacher.get("date") or today
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))
        rows, num_left_out = _rows_to_answer(config)
        count, metrics = config.teach.num_answers, Counter()
        missing = [(row, index.missing(row.with_tools, count)) for row in rows]
        pending = [(row, numbers) for row, numbers in missing if numbers]
        found = f"{len(rows) - len(pending)} of {len(rows)} prompts have their {count} answers"
        print(f"{path}: {found}" + "; nothing to do" * (not pending))
        if pending:  # else the teacher is not even loaded
            with open_answerer(config, path, pending) as answer:
                for start in range(0, len(pending), _BATCH_SIZE):
                    batch = pending[start : start + _BATCH_SIZE]
                    pairs = zip(batch, answer(batch, metrics))
                    found = [(row.with_tools, answers) for (row, _), answers in pairs if answers]
                    add_answers(path, found)
                    upload()
                    print(f"{start + len(batch)} of {len(pending)} prompts done", flush=True)
        counts = _counts(read_index(path), rows, count)
        return counts | {"prompts left out for their length": num_left_out} | metrics


def _rows_to_answer(config: Config) -> tuple[list[Prompt], int]:
    """Each prompt that a run would use, once, and the number of those that it leaves out."""
    tokenizer = load_tokenizer(open_student(config).path)
    columns, skips = ColumnMap(**config.data.column_names), config.data.skip_bad_rows
    rows = read_prompts(config.data.source, columns, skips_bad_rows=skips)
    kept = encode_prompts(rows, student_view(config.data), tokenizer, tokenizer)
    return list({key_of(row.with_tools): row for row in kept.prompts}.values()), kept.num_skipped


def _check_settings(config: Config) -> None:
    expected = "the file that the answers are written to"
    require(config.data.references is not None, "data.references", None, expected)
    processes, expected = config.mesh.processes, "1: a single process asks the teacher"
    require(processes == 1, "mesh.processes", processes, expected)
    is_possible = config.teach.model or not config.teacher_is_student
    expected = f"a checkpoint, or a model behind an API (teach.model): {STUDENT} is of no use "
    expected += "before it is trained"
    require(is_possible, "teacher.path", STUDENT, expected)


@contextlib.contextmanager
def _locked_index(references: str) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """Lock the index; yield its local path, and a function that uploads it."""
    path = pathlib.Path(references)
    with contextlib.ExitStack() as held:
        try:
            if is_remote(references):
                path, upload = held.enter_context(open_remote_file(references, "teach"))
            else:
                held.enter_context(locked(path.parent, f"teach-{path.name}"))
                upload = lambda: None
        except WorkdirError as error:
            found = f"cannot be written: {error.__cause__}"
            if error.__cause__ is None:
                found = "is being written by another opdjax references: wait for it"
            raise ReferenceIndexError(
                f"data.references, {references}, {found}, or name another file"
            ) from error
        yield path, upload


def _identity(config: Config, today: str | None) -> dict[str, Any]:
    """The teacher, its sampling and its prompts. An index holds answers of only one identity."""
    shown = config.data
    if config.teach.model:
        endpoint = config.teach.endpoint(config.api)
        names = ("model", "temperature", "top_p", "reasoning_effort", "max_tokens")
        # Indexes of earlier versions hold the seed too.
        identity = {name: getattr(endpoint, name) for name in names} | {"seed": None}
    else:
        shown, checkpoint = teacher_view(config.data), open_teacher(config)
        identity = {"checkpoint": fingerprint(checkpoint)}
        if config.sampling.stop_strings:
            identity["stop_strings"] = config.sampling.stop_strings
        identity |= _distribution(config.teach) | {"seed": config.seed}
        identity |= {"max_completion_length": config.teach.max_completion_length}
        identity |= dict(zip(("format", "enable_thinking"), shown.student_template))
        tokenizer = load_tokenizer(checkpoint.path)
        if (date := dated(shown, tokenizer, tokenizer, today).date) and reads_clock(tokenizer):
            identity["date"] = date
    return identity | {"prompt_format": shown.prompt_format, "system_prompt": shown.system_prompt}


def _counts(index: ReferenceIndex, rows: list[Prompt], count: int) -> dict[str, float]:
    found = [index.answers.get(key_of(row.with_tools), {}) for row in rows]
    every = [answer for answers in found for answer in answers.values()]
    usable = [index.usable(row.with_tools) for row in rows]
    unique = [len(set(texts)) for texts in usable]
    return {
        "prompts": len(rows),
        "answers": len(every),
        "empty": sum(not answer.text.strip() for answer in every),
        "truncated": sum(answer.is_truncated for answer in every),
        "duplicates": sum(map(len, usable)) - sum(unique),
        f"prompts with fewer than {count} different answers": sum(n < count for n in unique),
        "prompts without any": sum(not number for number in unique),
    }


# A checkpoint


def _distribution(settings: TeachConfig) -> dict[str, float]:
    given = {"temperature": settings.temperature, "top_p": settings.top_p}
    return {name: 1.0 if value is None else value for name, value in given.items()}


@contextlib.contextmanager
def _checkpoint_answerer(
    config: Config, _: pathlib.Path, pending: Sequence[Pending]
) -> Iterator[Answerer]:
    """Samples the teacher's checkpoint on the run's devices."""
    settings, mesh = config.teach, make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    checkpoint = open_teacher(config)
    tokenizer = load_tokenizer(checkpoint.path)
    data = dataclasses.replace(teacher_view(config.data), max_prompt_length=_ANY_LENGTH)
    prompts = encode_prompts([row for row, _ in pending], data, tokenizer, tokenizer)
    places = {key_of(row.with_tools): place for place, row in enumerate(prompts.prompts)}
    how = {"max_completion_length": settings.max_completion_length, **_distribution(settings)}
    sampled = partial(
        sample,
        load_params(
            checkpoint, compute_dtype(config.train.dtype), mesh, weights=config.train.frozen_weights
        ),
        seed=config.seed,
        policy_version=0,
        config=checkpoint.config,
        decoding=decoding_of(checkpoint, tokenizer, **how),
        mesh=mesh,
        prompt_columns=prompts.max_width(),
    )

    def answer(batch: Sequence[Pending], metrics: Counter) -> Answers:
        # The same numbers for all prompts: an answer that exists is sampled again, with the same
        # result, and dropped.
        first = min(min(numbers) for _, numbers in batch)
        count = max(max(numbers) for _, numbers in batch) + 1 - first
        keys = [key_of(row.with_tools) for row, _ in batch]
        shown = collate(prompts, np.array([places[key] for key in keys]), _BATCH_SIZE)
        # Prompt ids, which select the random numbers, are hashes of the prompts: so answers depend
        # neither on the order of the data nor on the batch.
        ids = np.zeros(_BATCH_SIZE, np.int32)
        ids[: len(keys)] = [int(key[:7], 16) for key in keys]
        shown = dataclasses.replace(shown, prompt_id=ids, occurrence=None)
        rollouts = to_host(sampled(prompts=shown, num_generations=count, first_sample=first))
        metrics["tokens"] += int(rollouts.mask.sum())
        pairs = zip(completions(rollouts, tokenizer), rollouts.is_truncated)
        answers = [ReferenceAnswer(text, bool(is_truncated)) for text, is_truncated in pairs]
        return [
            {n: answers[place * count + n - first] for n in numbers}
            for place, (_, numbers) in enumerate(batch)
        ]

    yield answer


# An API


@contextlib.contextmanager
def _api_answerer(config: Config, path: pathlib.Path, _: Sequence[Pending]) -> Iterator[Answerer]:
    """Requests answers from `teach.model`; the spending cap holds over all commands of an index."""
    try:
        from opdjax.judge.cache import ReplyCache
        from opdjax.judge.client import ApiClient
    except ImportError as error:
        raise MissingExtraError(
            f"teach.model needs another package ({error}): pip install 'opdjax[judge]'"
        ) from error
    spending = path.with_name(f"{path.name}.spending.jsonl")
    spent = sum(row["dollars"] for row in read_lines(spending, dollars=NUMBER))
    cache = ReplyCache(config.api.cache or path.with_name(f"{path.name}.replies.sqlite"))
    with contextlib.closing(cache), asyncio.Runner() as runner:
        endpoints = {"teacher": config.teach.endpoint(config.api)}

        async def connect() -> ApiClient:  # it needs a running event loop
            return ApiClient(endpoints, config.api, cache, spent)

        client = runner.run(connect())

        def answer(batch: Sequence[Pending], metrics: Counter) -> Answers:
            try:
                return runner.run(_request_answers(client, batch, config, metrics))
            finally:
                used = dataclasses.asdict(client.take_usage()["teacher"])
                append_lines(spending, [used])
                tokens = used["input_tokens"] + used["output_tokens"]
                metrics.update(requests=used["calls"], tokens=tokens, dollars=used["dollars"])

        try:
            yield answer
        finally:
            runner.run(client.close())


async def _request_answers(
    client: Any, batch: Sequence[Pending], config: Config, metrics: Counter
) -> Answers:
    """Request a batch's answers at once; an error is raised when pending ones are cached."""
    gate, fatal, failed = asyncio.Semaphore(max(config.api.concurrency, 1)), [], []

    async def request(row: Prompt, number: int) -> ReferenceAnswer | None:
        messages = messages_of(row, config.data)
        async with gate:
            if fatal:
                return None
            try:
                reply = await client.complete("teacher", messages, sample=number)
            except (ApiUnavailableError, ApiRequestError) as error:
                failed.append(error)
            except ApiError as error:
                fatal.append(error)
            else:
                # A truncating server may send half a surrogate pair, which no tokenizer can read.
                data = reply.text.encode("utf-16", "surrogatepass")
                is_truncated = reply.finish_reason in _TRUNCATED
                return ReferenceAnswer(data.decode("utf-16", "replace"), is_truncated)

    requests = (request(row, number) for row, numbers in batch for number in numbers)
    every = await asyncio.gather(*requests)
    if fatal:
        raise fatal[0]
    if failed:
        note = f"note: {len(failed)} of {len(every)} requests failed, the last: {failed[-1]}"
        print(note, flush=True)
        metrics["failed"] += len(failed)
    if not any(every) and all(isinstance(error, ApiUnavailableError) for error in failed):
        raise ApiUnavailableError(
            f"{failed[-1]}; earlier answers are kept, and the same command continues from there"
        )
    given = iter(every)
    return [
        {number: answer for number in numbers if (answer := next(given))} for _, numbers in batch
    ]

"""`opdjax references`: a teacher answers every prompt of the data a few times, once and for all, into an
index that runs read.

The teacher is whoever `teacher_api` names, or the checkpoint `teacher.path`; its tokenizer may be
any. What is answered is never asked again: the same command goes on where it was stopped.
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

from opdjax.config import STUDENT, Config, DataConfig
from opdjax.config.validation import MissingExtraError, require
from opdjax.data.chat import load_tokenizer
from opdjax.data.prompt_rows import Prompt, read_prompts
from opdjax.data.prompts import PromptSet, collate, encode_prompts, messages_of
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
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.judge.replies import ApiError, ApiRequestError, ApiUnavailableError
from opdjax.models.hf import fingerprint, load_params, open_checkpoint
from opdjax.ops.sharding import make_mesh, to_host
from opdjax.rollouts.setup import compute_dtype, num_ids, open_student, stop_ids, student_view
from opdjax.runs.mirror import open_remote_file
from opdjax.runs.object_store import is_remote
from opdjax.runs.workdir import WorkdirError, append_lines, locked, read_lines
from opdjax.types import PromptBatch

Pending = tuple[
    Prompt, list[int]
]  # a prompt, and the numbers of the draws that are still to be made of it
Found = list[
    dict[int, ReferenceAnswer]
]  # of each prompt, by the number of the draw; without those that the teacher did not give
Asked = Callable[[Sequence[Pending], Counter], Found]  # counts in the second what there is to tell
_CUT = ("length", "content_filter")  # ends of a reply that is not whole


def teach(config: Config) -> dict[str, float]:
    """Fill the index `data.references` for all prompts of `data.source` that a run would keep; what
    there is to tell of it.

    ConfigError where no index is named or no teacher, ReferenceIndexError where the index is
    another teacher's or is being written, and the client's errors; what was answered before is
    kept.
    """
    path = _checked_path(config)
    rows, num_left_out = _rows_to_answer(config)
    ask = _api_asked if config.teacher_api.is_given else _checkpoint_asked
    with _one_writer(path) as (path, keep):
        index = open_index(path, _identity(config))
        pending = [
            (row, missing)
            for row in rows
            if (missing := index.missing(row.prompt, config.teach.num_answers))
        ]
        print(
            f"{path}: {len(rows) - len(pending)} of {len(rows)} prompts have their {config.teach.num_answers} answers"
            + "; nobody is asked" * (not pending)
        )
        told: Counter = Counter()
        # A teacher that has nothing to answer is not even loaded.
        with ask(config, path, pending) if pending else contextlib.nullcontext() as asked:
            _fill(path, pending, asked, config.teach.batch_size, told, keep)
        return (
            _counts(read_index(path), rows, config.teach.num_answers)
            | {"prompts left out for their length": num_left_out}
            | told
        )


def _checked_path(config: Config) -> str:
    """Where the index is to be; ConfigError on settings that nobody would read, and a note on those
    that give one answer m times.
    """
    require(
        config.data.references is not None,
        "data.references",
        None,
        "the file that the answers are to be written to",
    )
    require(
        config.mesh.processes == 1,
        "mesh.processes",
        config.mesh.processes,
        "1: a single process asks the teacher",
    )
    how, endpoint = config.teach, config.teacher_api
    if endpoint.is_given:
        for name in ("temperature", "top_p", "max_completion_length"):
            default = type(how).__dataclass_fields__[name].default
            expected = f"{default}, its default, where teacher_api is given: its own fields say how it answers"
            require(getattr(how, name) == default, f"teach.{name}", getattr(how, name), expected)
    else:
        expected = f"a checkpoint, or a model behind teacher_api: {STUDENT} is of no use before it is trained"
        require(not config.teacher_is_student, "teacher.path", STUDENT, expected)
    temperature, seed = (
        (endpoint.temperature, endpoint.seed) if endpoint.is_given else (how.temperature, None)
    )
    for what, is_so in (
        ("at temperature 0", temperature == 0),
        (f"with the same seed, teacher_api.seed {seed}", seed is not None),
    ):
        if is_so and how.num_answers > 1:
            print(
                f"note: {how.num_answers} answers are drawn {what}, so they are likely to be one and the same"
            )
    return config.data.references


def _rows_to_answer(config: Config) -> tuple[list[Prompt], int]:
    """The prompts that a run keeps, each once, and how many are too long for it."""
    rows = read_prompts(config.data.source, ColumnMap.from_config(config.data))
    tokenizer = load_tokenizer(open_student(config).path)
    kept = encode_prompts(rows, student_view(config.data), tokenizer, tokenizer)
    return list({key_of(row.prompt): row for row in kept.prompts}.values()), kept.num_skipped


@contextlib.contextmanager
def _one_writer(references: str) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """Hold the index: where it is written, and what to call when there is more in it."""
    path = pathlib.Path(references)
    with contextlib.ExitStack() as held:
        try:
            if is_remote(references):
                path, keep = held.enter_context(open_remote_file(references, "teach"))
            else:
                held.enter_context(locked(path.parent, f"teach-{path.name}"))
                keep = lambda: None
        except WorkdirError as error:
            is_busy = is_remote(references) or isinstance(error.__cause__, BlockingIOError)
            found = (
                "is being written by another opdjax references: wait for it"
                if is_busy
                else f"cannot be written: {error.__cause__}"
            )
            raise ReferenceIndexError(
                f"data.references, {references}, {found}, or name another file"
            ) from error
        yield path, keep


def _identity(config: Config) -> dict[str, Any]:
    """Who answers, how it is sampled and what it is shown: answers of two that differ never stand
    in one index.
    """
    endpoint, how, shown = config.teacher_api, config.teach, config.data
    if endpoint.is_given:
        names = ("model", "temperature", "top_p", "seed", "reasoning_effort", "max_tokens")
        who = {name: getattr(endpoint, name) for name in names}
    else:
        shown = _as_teacher_reads(config.data)
        who = {
            "checkpoint": fingerprint(open_checkpoint(config.teacher.path, config.teacher.revision))
        }
        who |= {
            name: getattr(how, name) for name in ("temperature", "top_p", "max_completion_length")
        } | {"seed": config.seed}
        who |= {"format": shown.format, "enable_thinking": shown.enable_thinking}
    return who | {"prompt_format": shown.prompt_format, "system_prompt": shown.system_prompt}


def _fill(
    path: pathlib.Path,
    pending: Sequence[Pending],
    asked: Asked | None,
    size: int,
    told: Counter,
    keep: Callable[[], None],
) -> None:
    """Ask for what is missing, a batch at a time, each kept before the next is asked for."""
    for start in range(0, len(pending), size):
        batch = pending[start : start + size]
        found = asked(batch, told)
        add_answers(
            path, [(row.prompt, answers) for (row, _), answers in zip(batch, found) if answers]
        )
        keep()
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
        f"prompts with fewer than {count} different answers": sum(
            number < count for number in unique
        ),
        "prompts without any": sum(not number for number in unique),
    }


# A checkpoint


def _as_teacher_reads(data: DataConfig) -> DataConfig:
    """The data as a teacher is asked for answers: in the student's words, through its own template,
    at any length.
    """
    format = data.teacher_format or data.format
    thinking = (
        data.enable_thinking
        if data.teacher_enable_thinking is None
        else data.teacher_enable_thinking
    )
    is_chat = format == "chat"
    own = {
        "enable_thinking": thinking if is_chat else None,
        "system_prompt": data.system_prompt if is_chat else None,
    }
    own |= {"teacher_format": None, "teacher_enable_thinking": None, "teacher_prompt_format": None}
    return dataclasses.replace(data, format=format, max_prompt_length=2**31 - 1, **own)


@contextlib.contextmanager
def _checkpoint_asked(
    config: Config, _: pathlib.Path, pending: Sequence[Pending]
) -> Iterator[Asked]:
    """The teacher's checkpoint, sampled on the run's devices."""
    how, mesh = config.teach, make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    checkpoint = open_checkpoint(config.teacher.path, config.teacher.revision)
    tokenizer = load_tokenizer(checkpoint.path)
    prompts = encode_prompts(
        [row for row, _ in pending], _as_teacher_reads(config.data), tokenizer, tokenizer
    )
    places = {key_of(row.prompt): place for place, row in enumerate(prompts.prompts)}
    decoding = Decoding(
        how.max_completion_length,
        stop_ids(checkpoint, tokenizer),
        how.temperature,
        top_p=how.top_p,
        valid_vocab=num_ids(checkpoint, tokenizer),
    )
    drawn = partial(
        sample,
        load_params(checkpoint, compute_dtype(config.teacher), mesh, config.teacher.split_over),
        seed=config.seed,
        policy_version=0,
        config=checkpoint.config,
        decoding=decoding,
        mesh=mesh,
        prompt_columns=prompts.max_width(),
    )

    def asked(batch: Sequence[Pending], told: Counter) -> Found:
        # Of all prompts the same draws; those that one of them has already are drawn again, to the
        # same end, and dropped.
        first, end = (
            min(min(draws) for _, draws in batch),
            max(max(draws) for _, draws in batch) + 1,
        )
        shown = _named_by_content(
            prompts, [places[key_of(row.prompt)] for row, _ in batch], how.batch_size
        )
        rollouts = to_host(drawn(prompts=shown, num_generations=end - first, first_sample=first))
        told["tokens"] += int(rollouts.mask.sum())
        answers = [
            ReferenceAnswer(text, bool(is_cut))
            for text, is_cut in zip(completions(rollouts, tokenizer), rollouts.is_truncated)
        ]
        return [
            {n: answers[at * (end - first) + n - first] for n in draws}
            for at, (_, draws) in enumerate(batch)
        ]

    yield asked


def _named_by_content(prompts: PromptSet, places: list[int], num_rows: int) -> PromptBatch:
    """The prompts in rows whose draws are named after what they say: neither the data's order nor
    the batch changes an answer.
    """
    batch = collate(prompts, np.array(places), num_rows)
    names = np.zeros(num_rows, np.int32)
    names[: len(places)] = [int(key_of(prompts.prompts[place].prompt)[:7], 16) for place in places]
    return dataclasses.replace(batch, prompt_id=names, occurrence=None)


# An API


@contextlib.contextmanager
def _api_asked(config: Config, path: pathlib.Path, _: Sequence[Pending]) -> Iterator[Asked]:
    """Whoever answers at `teacher_api`. The spending cap is that of the index, however often it is
    gone on with.
    """
    try:
        from opdjax.judge.cache import ReplyCache
        from opdjax.judge.client import ApiClient
    except ImportError as error:
        raise MissingExtraError(
            f"teacher_api is asked through another package ({error}): pip install 'opdjax[judge]'"
        ) from error
    spending = path.with_name(f"{path.name}.spending.jsonl")
    spent = sum(row["dollars"] for row in read_lines(spending))
    cache = ReplyCache(config.api.cache or path.with_name(f"{path.name}.replies.sqlite"))
    with contextlib.closing(cache), asyncio.Runner() as runner:
        client = runner.run(
            _made(partial(ApiClient, {"teacher": config.teacher_api}, config.api, cache, spent))
        )

        def asked(batch: Sequence[Pending], told: Counter) -> Found:
            try:
                return runner.run(_answers_of(client, batch, config, told))
            finally:
                used = dataclasses.asdict(client.take_usage()["teacher"])
                append_lines(spending, [used])
                told.update(
                    {
                        "requests": used["calls"],
                        "tokens": used["input_tokens"] + used["output_tokens"],
                        "dollars": used["dollars"],
                    }
                )

        try:
            yield asked
        finally:
            runner.run(client.close())


async def _made(make: Callable) -> Any:
    """What is made in the loop that it is used in."""
    return make()


async def _answers_of(
    client: Any, batch: Sequence[Pending], config: Config, told: Counter
) -> Found:
    """All draws of a batch at once; the first error that ends the run is raised when what was under
    way has been answered and cached.
    """
    gate, fatal, failed = asyncio.Semaphore(config.teacher_api.concurrency), [], []

    async def of_draw(row: Prompt, number: int) -> ReferenceAnswer | None:
        async with gate:
            if fatal:
                return None
            try:
                reply = await client.complete(
                    "teacher", messages_of(row, config.data), sample=number
                )
            except (ApiUnavailableError, ApiRequestError) as error:
                failed.append(error)
            except ApiError as error:
                fatal.append(error)
            else:
                return ReferenceAnswer(_as_unicode(reply.text), reply.finish_reason in _CUT)

    every = await asyncio.gather(
        *(of_draw(row, number) for row, draws in batch for number in draws)
    )
    if fatal:
        raise fatal[0]
    if failed:
        print(
            f"note: {len(failed)} of {len(every)} requests failed, the last: {failed[-1]}",
            flush=True,
        )
        told["failed"] += len(failed)
    if not any(every) and all(isinstance(error, ApiUnavailableError) for error in failed):
        raise ApiUnavailableError(
            f"{failed[-1]}; what was answered before is kept, and the same command goes on from there"
        )
    given = iter(every)
    found = [{number: next(given) for number in draws} for _, draws in batch]
    return [{number: answer for number, answer in answers.items() if answer} for answers in found]


def _as_unicode(text: str) -> str:
    """Half a surrogate pair, as JSON may hold where a server cut it, replaced: no tokenizer could
    read it.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

"""Train the medium pair: a teacher on the built-in word problems, and its earlier checkpoint.

    python scripts/make_medium_pair.py --workdir runs/medium   # again: continues a killed run
    python scripts/make_medium_pair.py --workdir runs/medium --pick  # writes teacher and student

Solutions have mistakes, whose wrong numbers are masked from the loss: half are corrected in the
next sentence, half carried to the end. So the teacher's signal after a student's mistake is
sensible.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import optax
from benchmarks.models import decoder_of, qwen3, write_model
from make_mini_pair import CHAT_TEMPLATE, SPECIAL, make_step
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opdjax.data.tasks import stories
from opdjax.models import decoder
from opdjax.rollouts.export import record_files

COLUMNS, VOCABULARY = 512, 2304  # tokens of a packed row; ids
TEXTS = 16384  # that the tokenizer is trained on


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer of the task's text, in which every digit is a piece."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"[0-9]| ?[^0-9 ]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    problems = (stories.draw("train", 1, index) for index in range(TEXTS))
    texts = (f"{problem.prompt}\n{stories.solution(problem, 1)}" for problem in problems)
    tokenizer.train_from_iterator(texts, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config(vocab_size: int) -> dict:
    """Return the `config.json` of both models, stored in bfloat16."""
    eos, pad = map(SPECIAL.index, ("<|im_end|>", "<|endoftext|>"))
    ids = {"eos_token_id": eos, "pad_token_id": pad, "dtype": "bfloat16"}
    return qwen3(192, 4, 6, 3, 32, 576, vocab_size, max_position_embeddings=1024, **ids)


def example(tokenizer, rng: random.Random, mistake_rate: float) -> tuple[list[int], list[bool]]:
    """Return the ids of a training example and which of them are trained."""
    problem = stories.draw("train", 2, rng.randrange(2**40))
    mistake = rng.choice(("carried", "corrected")) if rng.random() < mistake_rate else None
    chat = [{"role": "user", "content": problem.prompt}]
    header = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    pieces = [*stories.parts(problem, rng, mistake), ("<|im_end|>", True)]
    encoded = tokenizer(header + "".join(text for text, _ in pieces), return_offsets_mapping=True)
    ends, wrong = len(header), []
    for text, is_trained in pieces:
        wrong += [] if is_trained else range(ends, ends + len(text))
        ends += len(text)
    starts = [start for start, _ in encoded["offset_mapping"]]
    masked = set(wrong)
    return encoded["input_ids"], [at >= len(header) and at not in masked for at in starts]


def corpus_batch(tokenizer, step: int, args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Return (tokens, loss mask, segment ids), each [rows, COLUMNS], of one step: a function of
    the seed and the step alone.
    """
    rng = random.Random(f"{args.seed} {step}")
    tokens, mask, segments = np.zeros((3, args.rows, COLUMNS), np.int32)
    for row in range(args.rows):
        at, number = 0, 1
        ids, trained = example(tokenizer, rng, args.mistake_rate)
        while at + len(ids) <= COLUMNS:
            place = row, slice(at, at + len(ids))
            tokens[place], mask[place], segments[place] = ids, trained, number
            at, number = at + len(ids), number + 1
            ids, trained = example(tokenizer, rng, args.mistake_rate)
    return tokens, mask.astype(bool), segments


def train(args: argparse.Namespace) -> None:
    """Train from the last saved state, and write a Hugging Face directory now and then."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer, saved = make_tokenizer(), args.workdir / "state.npz"
    raw = model_config(len(tokenizer))
    rates = (0.0, args.learning_rate, min(100, args.steps // 2), args.steps)
    adamw = optax.adamw(optax.warmup_cosine_decay_schedule(*rates), b2=0.98, weight_decay=0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    params = decoder.init_params(decoder_of(raw), jax.random.key(args.seed))
    print(f"{sum(x.size for x in jax.tree.leaves(params))} parameters, {len(tokenizer)} ids")
    leaves, tree = jax.tree.flatten((params, optimizer.init(params), 0))
    if saved.exists():
        with np.load(saved) as arrays:
            leaves = [arrays[f"arr_{place}"] for place in range(len(leaves))]
    params, state, first = jax.tree.unflatten(tree, leaves)
    update, clock = make_step(decoder_of(raw), optimizer), time.time()
    for step in range(int(first), args.stop_at or args.steps):
        batch = corpus_batch(tokenizer, step, args)
        params, state, loss = update(params, state, batch)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            out = args.workdir / str(step + 1)
            write_model(jax.tree.map(np.asarray, params), raw, tokenizer, out)
            record_files(out, {})
            # The state last and in one move: a run killed here repeats the steps since the last.
            new = saved.with_suffix(".new.npz")
            np.savez(new, *jax.tree.leaves((params, state, step + 1)))
            os.replace(new, saved)
            speed = (step + 1 - first) * args.rows * COLUMNS / (time.time() - clock)
            print(f"step {step + 1} loss {float(loss):.4f} {speed:.0f} tokens/s", flush=True)


def pick(args: argparse.Namespace) -> None:
    """Copy the last checkpoint to `teacher`, and to `student` the earlier one whose accuracy at
    T = 1 on validation problems is nearest to the target.
    """
    found = sorted((each for each in args.workdir.iterdir() if each.name.isdigit()), key=_step)
    if len(found) < 2:
        sys.exit(f"{args.workdir} has {len(found)} checkpoints; expected two or more: train first")
    scores = {}
    for checkpoint in found:
        out = args.workdir / f"scores_{checkpoint.name}.json"
        options = {"source": "stories:validation", "num-prompts": args.num_prompts}
        options |= {"num-samples": 2, "max-completion-length": 256}
        words = [f"--evaluation.{key}={value}" for key, value in options.items()]
        command = [sys.executable, "-m", "opdjax", "evaluate", checkpoint, *words, "--output", out]
        if not out.exists():
            subprocess.run(list(map(str, command)), check=True)
        scores[checkpoint] = json.loads(out.read_text())["avg@k"]
    student = min(found[:-1], key=lambda each: abs(scores[each] - args.student_accuracy))
    for role, chosen in {"teacher": found[-1], "student": student}.items():
        shutil.copytree(chosen, args.workdir / role, dirs_exist_ok=True)
        print(f"{role}: step {chosen.name}, accuracy {scores[chosen]:.3f} at T = 1")


def _step(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.name)


def main(words: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--workdir", type=pathlib.Path, required=True)
    add("--pick", action="store_true", help="write teacher and student; trains nothing")
    add("--steps", type=int, default=4000)
    add("--stop-at", type=int, help="leave after this step; a later call continues")
    add("--rows", type=int, default=12, help="packed rows of a step")
    add("--learning-rate", type=float, default=3e-3)
    add("--mistake-rate", type=float, default=0.4, help="share of solutions with a mistake")
    add("--save-every", type=int, default=200)
    add("--student-accuracy", type=float, default=0.35, help="target for --pick, from 0 to 1")
    add("--num-prompts", type=int, default=256, help="validation problems for --pick")
    add("--seed", type=int, default=0)
    args = parser.parse_args(words)
    (pick if args.pick else train)(args)


if __name__ == "__main__":
    main()

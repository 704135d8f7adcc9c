"""Train the mini pair: a teacher on the arithmetic task, and its earlier checkpoint as student.

    python scripts/make_mini_pair.py --workdir runs/mini_pair
    opdjax evaluate runs/mini_pair/1800                      # scores the model of that step
    cp -r runs/mini_pair/6000 opdjax/assets/mini_pair/teacher
    cp -r runs/mini_pair/1800 opdjax/assets/mini_pair/student

The teacher also trains on chains with injected mistakes. The wrong token is masked from the loss,
and everything after it is computed correctly from the wrong value: after a mistake of the student,
the teacher continues from there. One example in ten has no prompt, so that an unconditional
likelihood exists.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import time

import jax
import numpy as np
import optax
from benchmarks.models import decoder_of, qwen3, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdjax.data.tasks import arithmetic
from opdjax.estimators.losses import sft
from opdjax.models import decoder
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.rollouts.export import record_files

LARGEST_NUMBER = 199
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYMBOLS = ["system", "user", "assistant", "\n", "+", "-", "=", ";", "#", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
COLUMNS = 32  # tokens of the longest example


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: the integers 0 to 199, the symbols and the role names."""
    words = SPECIAL + SYMBOLS + [str(n) for n in range(LARGEST_NUMBER + 1)]
    numbered = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="<|endoftext|>"))
    pieces = Regex(r"1[0-9][0-9]|[1-9][0-9]|[0-9]|[a-z]+|\n|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config(vocab_size: int) -> dict:
    """Return the `config.json` of both models."""
    eos, pad = map(SPECIAL.index, ("<|im_end|>", "<|endoftext|>"))
    ids = {"eos_token_id": eos, "pad_token_id": pad}
    return qwen3(96, 3, 6, 3, 16, 288, vocab_size, max_position_embeddings=512, **ids)


def corpus_batch(
    vocab: dict[str, int], step: int, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (tokens, loss mask, segment ids), each [batch, COLUMNS], of one step."""
    rng = np.random.Generator(np.random.Philox(key=args.seed, counter=[0, 0, 0, step]))
    tokens, mask, segments = np.zeros((3, args.batch, COLUMNS), np.int32)
    for row in range(args.batch):
        words, trained = example(rng, args.mistake_rate)
        tokens[row, : len(words)] = [vocab[word] for word in words]
        mask[row, : len(words)], segments[row, : len(words)] = trained, 1
    return tokens, mask.astype(bool), segments


def example(rng: np.random.Generator, mistake_rate: float) -> tuple[list[str], list[bool]]:
    """Return the words of an example and which of them are trained."""
    problem = arithmetic.draw(rng)
    while arithmetic.split_of(problem) != "train":
        problem = arithmetic.draw(rng)
    header = header_of(problem.prompt)
    header = header if rng.random() >= 0.1 else header[-3:]
    rates = (0.0, 0.0) if rng.random() < 0.35 else (0.4 * mistake_rate, mistake_rate)
    answer, trained = answer_with_mistakes(problem, rng, *rates)
    return header + answer, [False] * len(header) + trained


def answer_with_mistakes(
    problem: arithmetic.Problem, rng: np.random.Generator, copied: float, computed: float
) -> tuple[list[str], list[bool]]:
    """Return the worked answer with wrong values at these rates, and the loss mask.

    What follows a wrong value is right given that value.
    """
    words, trained = [], []

    def write(text):
        words.append(text)
        trained.append(True)

    def write_value(value, rate, low, high):
        is_wrong = rng.random() < rate
        written = int(np.clip(wrong_value(value, rng), low, high)) if is_wrong else value
        new, right = words_of(str(written)), words_of(str(value))
        words.extend(new)
        # A shared minus sign is no mistake; after a flipped sign the number itself is right.
        if len(new) == len(right):
            trained.extend(w == r for w, r in zip(new, right))
        else:
            trained.extend([False] + [written == -value] * (len(new) - 1))
        return written

    left = problem.operands[0]
    for index, (sign, right) in enumerate(zip(problem.signs, problem.operands[1:])):
        if index:
            write(";")
        # The limits keep every later value within the numbers of the vocabulary.
        left = write_value(left, copied, *((-150, 150) if index else (0, 99)))
        write("+" if sign > 0 else "-")
        right = write_value(right, copied, 0, arithmetic.OPERAND_LIMIT - 1)
        write("=")
        left = write_value(left + sign * right, computed, -150, 150)
    write("#")
    write_value(left, copied, -LARGEST_NUMBER, LARGEST_NUMBER)
    return [*words, "<|im_end|>"], [*trained, True]


def wrong_value(value: int, rng: np.random.Generator) -> int:
    """Return a value off by a few, off by tens, with a flipped sign, or random."""
    kind = rng.random()
    if kind < 0.5:
        return value + int(rng.integers(1, 6)) * (2 * int(rng.integers(0, 2)) - 1)
    if kind < 0.75:
        return value + 10 * int(rng.integers(1, 4)) * (2 * int(rng.integers(0, 2)) - 1)
    return -value if kind < 0.85 else int(rng.integers(-98, 148))


def header_of(prompt: str) -> list[str]:
    user = ["<|im_start|>", "user", "\n", *words_of(prompt), "<|im_end|>", "\n"]
    return [*user, "<|im_start|>", "assistant", "\n"]


def words_of(text: str) -> list[str]:
    return re.findall(r"\d+|[^\d ]", text)


def make_step(config, optimizer):
    """Return a jitted (params, opt_state, batch) -> (params, opt_state, loss)."""

    def loss_fn(params, batch):
        tokens, mask, segments = batch
        hidden = decoder.forward(params, config, tokens, segments)
        head, weights = decoder.head_of(params), mask / mask.sum()
        return tiled_loss(sft, hidden, head, weights, TokenInputs(tokens), tile=2048)[0]

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def train(args: argparse.Namespace) -> None:
    """Train a model and write it as a Hugging Face directory now and then."""
    tokenizer = make_tokenizer()
    raw = model_config(len(tokenizer))
    rates = (0.0, args.learning_rate, 100, args.steps, 0.02 * args.learning_rate)
    adamw = optax.adamw(optax.warmup_cosine_decay_schedule(*rates), b2=0.98, weight_decay=0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    params = decoder.init_params(decoder_of(raw), jax.random.key(args.seed))
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size} parameters, vocabulary {len(tokenizer)}", flush=True)
    state, vocab = optimizer.init(params), tokenizer.get_vocab()
    update, clock = make_step(decoder_of(raw), optimizer), time.time()
    for step in range(args.steps):
        params, state, loss = update(params, state, corpus_batch(vocab, step, args))
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            weights = jax.tree.map(np.asarray, params)
            out = args.workdir / str(done)
            write_model(weights, raw, tokenizer, out)
            record_files(out, {})
            print(f"step {done} loss {float(loss):.4f} {time.time() - clock:.0f} s", flush=True)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--workdir", type=pathlib.Path, required=True)
    add("--steps", type=int, default=6000)
    add("--batch", type=int, default=192)
    add("--learning-rate", type=float, default=3e-3)
    mistakes = "share of wrong results in the 65 %% of chains with mistakes"
    add("--mistake-rate", type=float, default=0.3, help=mistakes)
    add("--save-every", type=int, default=200)
    add("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

"""Train the mini pair: a teacher on the arithmetic task, and its earlier checkpoint as student.

    python scripts/make_mini_pair.py --workdir runs/mini_pair          # train, resumable
    python scripts/make_mini_pair.py --workdir runs/mini_pair --pick   # write the package's pair

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
import orbax.checkpoint as ocp
from benchmarks.models import decoder_of, qwen3, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdjax.config import PACKAGE
from opdjax.data.tasks import arithmetic
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.estimators.losses import sft
from opdjax.models import decoder
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.rollouts.export import record_files
from opdjax.types import PromptBatch

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


def greedy_accuracy(params, config, tokenizer, problems) -> float:
    """Return the share of problems whose greedy answer ends in the right value."""
    vocab, rows = tokenizer.get_vocab(), [header_of(problem.prompt) for problem in problems]
    width, stop = max(map(len, rows)), vocab["<|im_end|>"]
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = [vocab[word] for word in row]
        mask[i, width - len(row) :] = True
    prompts = PromptBatch(tokens, mask, np.arange(len(rows), dtype=np.int32))
    decoding = Decoding(COLUMNS - width, (stop,), temperature=0.0)
    drawn = sample(params, prompts, 0, 0, config=config, decoding=decoding)
    names = {i: word for word, i in vocab.items()}
    sampled = zip(np.asarray(drawn.tokens), np.asarray(drawn.mask))
    texts = ["".join(names[int(t)] for t in row[is_new] if t != stop) for row, is_new in sampled]
    is_right = lambda text, problem: "#" in text and text.split("#")[-1] == problem.answer
    return float(np.mean(list(map(is_right, texts, problems))))


def train(args) -> None:
    """Train the teacher and keep every checkpoint; continue an earlier call."""
    tokenizer = make_tokenizer()
    config = decoder_of(model_config(len(tokenizer)))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, 100, args.steps, 0.02 * args.learning_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )
    params = decoder.init_params(config, jax.random.key(args.seed))
    state = {"params": params, "opt_state": optimizer.init(params)}
    options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
    manager = ocp.CheckpointManager(args.workdir.absolute() / "checkpoints", options=options)
    start = manager.latest_step() or 0
    if start:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        state = manager.restore(start, args=ocp.args.StandardRestore(like))
    step_fn, vocab = make_step(config, optimizer), tokenizer.get_vocab()
    held_out = arithmetic.problems("validation")[:256]
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size} parameters, vocabulary {len(tokenizer)}, from step {start}", flush=True)
    clock = time.time()
    for step in range(start, args.steps):
        params, opt_state, loss = step_fn(**state, batch=corpus_batch(vocab, step, args))
        state, done = {"params": params, "opt_state": opt_state}, step + 1
        if done % args.save_every == 0 or done == args.steps:
            accuracy = greedy_accuracy(params, config, tokenizer, held_out)
            manager.save(done, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            seconds = time.time() - clock
            line = f"step {done} loss {float(loss):.4f} greedy {accuracy:.3f} {seconds:.0f} s"
            print(line, flush=True)


def restore_params(workdir: pathlib.Path, step: int) -> dict:
    """Return the parameters of one training checkpoint, as numpy arrays."""
    manager = ocp.CheckpointManager(
        workdir.absolute() / "checkpoints", item_handlers=ocp.StandardCheckpointHandler()
    )
    if step not in manager.all_steps():
        raise SystemExit(
            f"no checkpoint of step {step} in {workdir}; found {sorted(manager.all_steps())}"
        )
    return jax.tree.map(np.asarray, manager.restore(step)["params"])


def pick(args) -> None:
    """Write teacher and student, then load and measure both."""
    tokenizer, test = make_tokenizer(), arithmetic.problems("test")
    steps = {"teacher": args.teacher_step or args.steps, "student": args.student_step}
    for name, step in steps.items():
        out = args.out / name
        params = restore_params(args.workdir, step)
        write_model(params, model_config(len(tokenizer)), tokenizer, out)
        record_files(out, {})
        checkpoint = open_checkpoint(out)
        params = load_params(checkpoint, "float32")
        accuracy = greedy_accuracy(params, checkpoint.config, tokenizer, test)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
        print(f"{name}: step {step}, greedy {accuracy:.3f} on 2048 test problems, {size:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", type=pathlib.Path, required=True)
    add("--pick", action="store_true", help="write the pair instead of training")
    add("--out", type=pathlib.Path, default=PACKAGE / "assets" / "mini_pair")
    add("--teacher-step", type=int, default=0, help="0: the last step")
    add("--student-step", type=int, default=1800)
    add("--steps", type=int, default=6000)
    add("--batch", type=int, default=192)
    add("--learning-rate", type=float, default=3e-3)
    mistakes = "share of wrong results in the 65 %% of chains with mistakes"
    add("--mistake-rate", type=float, default=0.3, help=mistakes)
    add("--save-every", type=int, default=200)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    pick(args) if args.pick else train(args)


if __name__ == "__main__":
    main()

"""The exported student gives the same answers in transformers on torch, token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TINY

from opdjax.config import DataConfig
from opdjax.data.chat import valid_vocab
from opdjax.data.prompt_rows import read_prompts
from opdjax.data.prompts import collate, encode_prompts
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.models.decoder import forward, head_of
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.tile import head_logits
from opdjax.rollouts.setup import stop_ids


@pytest.mark.long
@pytest.mark.xdist_group("torch")
def test_the_exported_student_answers_alike_in_transformers(tiny_run):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    exported = tiny_run / "student"
    checkpoint, tokenizer = open_checkpoint(exported), load_tokenizer(exported)
    params = load_params(checkpoint, "float32")
    assert not jax.tree.all(
        jax.tree.map(
            jnp.array_equal, params, load_params(open_checkpoint(TINY.student.path), "float32")
        )
    )

    prompts = encode_prompts(
        read_prompts("arithmetic:test")[:16], DataConfig(), tokenizer, tokenizer
    )
    batch = collate(prompts, np.arange(16))
    decoding = Decoding(
        20, stop_ids(checkpoint, tokenizer), temperature=0.0, valid_vocab=valid_vocab(tokenizer)
    )
    ours = sample(params, batch, 0, 0, config=checkpoint.config, decoding=decoding)
    model = AutoModelForCausalLM.from_pretrained(exported)
    inputs = {
        "input_ids": torch.tensor(batch.tokens).long(),
        "attention_mask": torch.tensor(batch.mask).long(),
    }
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    width = batch.tokens.shape[1]
    for row in range(16):
        answer = np.asarray(ours.tokens)[row][np.asarray(ours.mask)[row]]
        np.testing.assert_array_equal(theirs[row, width : width + len(answer)], answer)

    @jax.jit
    def logits_of(params, tokens, segments):
        hidden = forward(params, checkpoint.config, tokens, segments)
        return head_logits(head_of(params), hidden)

    found = logits_of(params, batch.tokens, np.asarray(batch.mask, np.int32))
    positions = torch.tensor(np.maximum(np.cumsum(batch.mask, axis=1) - 1, 0))
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions).logits.numpy()
    live = np.asarray(batch.mask)
    np.testing.assert_allclose(np.asarray(found)[live], logits[live], atol=2e-4)

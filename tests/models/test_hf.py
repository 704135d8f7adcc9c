"""Checkpoints: import and export change no bit, several files, and every error of a directory."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from opdjax.models import decoder, hf, hf_export
from opdjax.models.hf import CheckpointError, load_params, open_checkpoint
from opdjax.models.hf_export import export
from opdjax.models.rope import Rope
from opdjax.ops.sharding import make_mesh


def tensors_of(path):
    """Tensor name -> array, of all files in the directory."""
    return {
        name: array
        for file in sorted(path.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def assert_same_bits(left, right):
    """Two trees of arrays have the same structure, dtypes and bytes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(
        map(np.asarray, jax.tree.leaves(left)), map(np.asarray, jax.tree.leaves(right))
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def bfloat16_path(build, save):
    import torch

    return save(build(attention_bias=True).to(torch.bfloat16))


# Reading


def test_open_checkpoint_reads_config(pairs):
    bias = pairs["bias"]
    assert bias.config == decoder.DecoderConfig(
        vocab_size=131,
        hidden_size=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_size=10,
        intermediate_size=37,
        rope=Rope(10000.0),
        norm_epsilon=1e-6,
        ties_embeddings=False,
        has_qk_norm=True,
        has_qkv_bias=True,
        has_output_bias=True,
    )
    tied = dataclasses.replace(
        bias.config, ties_embeddings=True, has_qkv_bias=False, has_output_bias=False
    )
    assert pairs["tied"].config == tied
    llama = dataclasses.replace(bias.config, ties_embeddings=True, has_qk_norm=False)
    assert pairs["llama-bias-tied"].config == llama
    assert pairs["llama"].config == dataclasses.replace(
        llama,
        head_size=4,
        norm_epsilon=1e-5,
        ties_embeddings=False,
        has_qkv_bias=False,
        has_output_bias=False,
    )
    qwen2 = dataclasses.replace(llama, ties_embeddings=False, has_output_bias=False)
    assert pairs["qwen2"].config == qwen2
    assert pairs["qwen2-tied"].config == dataclasses.replace(
        qwen2, head_size=4, ties_embeddings=True
    )
    for pair in pairs.values():
        assert decoder.num_parameters(pair.config) == sum(
            p.numel() for p in pair.model.parameters()
        )
        assert pair.checkpoint.stored_dtype == "float32"


@pytest.mark.parametrize(
    ("generation", "fields", "expected"),
    [
        ({"eos_token_id": [3, 5]}, {}, (3, 5)),
        ({"eos_token_id": 7}, {}, (7,)),
        (None, {}, (3, 5)),
        ({}, {"eos_token_id": 9}, (9,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_stop_tokens_come_from_the_generation_config_first(copy, generation, fields, expected):
    path = copy("untied", **fields)
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(path).stop_token_ids == expected


def test_load_stacks_layers_in_order(pairs):
    state = {name: tensor.numpy() for name, tensor in pairs["bias"].model.state_dict().items()}
    layers = pairs["bias"].params["layers"]
    for layer in range(2):
        for ours, theirs in [
            ("k_kernel", "self_attn.k_proj.weight"),
            ("o_bias", "self_attn.o_proj.bias"),
            ("mlp_norm", "post_attention_layernorm.weight"),
            ("up_kernel", "mlp.up_proj.weight"),
        ]:
            np.testing.assert_array_equal(
                layers[ours][layer], state[f"model.layers.{layer}.{theirs}"]
            )


def test_bfloat16_loads_as_float32_exactly(bfloat16_path, pairs):
    import torch

    stored = open_checkpoint(bfloat16_path)
    assert stored.stored_dtype == "bfloat16"
    params = load_params(stored, "float32")
    rounded = {
        name: tensor.to(torch.bfloat16).float().numpy()
        for name, tensor in pairs["bias"].model.state_dict().items()
    }
    assert params["embedding"].dtype == params["layers"]["q_bias"].dtype == jnp.float32
    np.testing.assert_array_equal(params["embedding"], rounded["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        params["layers"]["q_bias"][1], rounded["model.layers.1.self_attn.q_proj.bias"]
    )
    # Import rounds as torch does.
    assert_same_bits(
        load_params(pairs["bias"].checkpoint, "bfloat16"), load_params(stored, "bfloat16")
    )


def test_sharded_checkpoint_loads_the_same(pairs, save):
    path = save(pairs["bias"].model, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert not (path / "model.safetensors").exists()
    assert_same_bits(load_params(open_checkpoint(path), "float32"), pairs["bias"].params)


def test_load_shards_parameters_and_reads_each_slice_once(pairs, monkeypatch):
    read, largest = hf.StoredTensor.read_into, []
    monkeypatch.setattr(
        hf.StoredTensor,
        "read_into",
        lambda stored, out, index: largest.append(out) or read(stored, out, index),
    )
    params = load_params(pairs["tied"].checkpoint, "float32", make_mesh(2, 4, 1))
    assert params["layers"]["q_kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert params["embedding"].addressable_shards[0].data.size == params["embedding"].size // 4
    assert max(x.nbytes for x in largest) <= params["embedding"].nbytes // 4
    assert sum(x.nbytes for x in largest) <= 1.2 * sum(x.nbytes for x in jax.tree.leaves(params))
    assert_same_bits(params, pairs["tied"].params)


# Writing


def test_import_then_export_is_the_identity_in_float32(pair, tmp_path):
    out = export(pair.params, pair.checkpoint, tmp_path / "a" / "out")
    assert_same_bits(tensors_of(out), tensors_of(pair.path))
    assert ("lm_head.weight" in tensors_of(out)) == (not pair.config.ties_embeddings)
    assert_same_bits(load_params(open_checkpoint(out), "float32"), pair.params)


def test_import_then_export_is_the_identity_in_bfloat16(bfloat16_path, tmp_path):
    source = open_checkpoint(bfloat16_path)
    params = load_params(source, "bfloat16")
    out = export(params, source, tmp_path / "out")
    assert_same_bits(tensors_of(out), tensors_of(bfloat16_path))
    assert {array.dtype.name for array in tensors_of(out).values()} == {"bfloat16"}
    assert_same_bits(load_params(open_checkpoint(out), "bfloat16"), params)


def test_export_takes_a_dtype(pairs, tmp_path):
    pair = pairs["untied"]
    out = export(pair.params, pair.checkpoint, tmp_path / "out", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_bits(
        load_params(open_checkpoint(out), "bfloat16"), load_params(pair.checkpoint, "bfloat16")
    )


def test_export_copies_everything_that_is_not_weights(copy, pairs, tmp_path):
    from transformers import AutoTokenizer

    path = copy("untied", torch_dtype="float32", dtype=None, a_field_we_do_not_read=[1, {"b": 2}])
    (path / "merges.txt").write_text("a b\n")
    (path / "training_state.bin").write_bytes(b"not ours")
    (tmp_path / "out").mkdir()  # an empty directory is accepted
    out = export(pairs["untied"].params, open_checkpoint(path), tmp_path / "out")
    files = {file.name for file in path.iterdir()} - {"training_state.bin"}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
    } < files
    assert {file.name for file in out.iterdir()} == files
    for name in files - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (path / name).read_bytes()
    raw = json.loads((path / "config.json").read_text())
    del raw["torch_dtype"]
    assert json.loads((out / "config.json").read_text()) == raw | {"dtype": "float32"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w7 w130"}], tokenize=False)
    assert tokenizer(text)["input_ids"] == [1, 7, 130, 3]
    assert [file.name for file in tmp_path.iterdir() if file.name != path.name] == [
        "out"
    ]  # no partial directory remains


@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 9000], ids=["whole", "shards"])
def test_transformers_loads_what_we_export(
    pair, our_logits, torch_logits, monkeypatch, rng, tmp_path, shard_bytes
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_export, "_FILE_BYTES", shard_bytes)
    trained = jax.tree.map(lambda x: x * 1.25, pair.params)
    out = export(trained, pair.checkpoint, tmp_path / "out")
    if shard_bytes == 9000:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
        assert index["metadata"]["total_size"] == 4 * decoder.num_parameters(pair.config)
        assert index["weight_map"] == {
            tensor: file for file, shard in shards.items() for tensor in shard
        }
        assert sorted(shards) == [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        assert all(
            len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= 9000
            for shard in shards.values()
        )
        assert any(len(shard) > 1 for shard in shards.values())
    assert_same_bits(load_params(open_checkpoint(out), "float32"), trained)

    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())  # no missing, unexpected or mismatched key
    rows = rng.integers(0, 131, (2, 9)), np.ones((2, 9), np.int64)
    expected = pair.model.state_dict()
    assert all(
        np.array_equal(tensor.numpy(), expected[key].numpy() * np.float32(1.25))
        for key, tensor in loaded.state_dict().items()
    )
    np.testing.assert_allclose(
        our_logits(trained, pair.config, *rows),
        torch_logits(loaded.eval(), *rows),
        atol=2e-4,
        rtol=0,
    )


def test_export_refuses_what_does_not_fit(pairs, tmp_path):
    pair = pairs["untied"]
    narrow = pair.params | {"embedding": pair.params["embedding"][:, :-1]}
    with pytest.raises(
        CheckpointError, match=re.escape("['embedding'] (131, 23), expected (131, 24)")
    ):
        export(narrow, pair.checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        CheckpointError, match=r"export as 'float16'; expected one of \['bfloat16', 'float32'\]"
    ):
        export(pair.params, pair.checkpoint, tmp_path / "out", dtype="float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="full exists and is not empty"):
        export(pair.params, pair.checkpoint, tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


# Refusals


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"has no config\.json; expected a Hugging Face checkpoint"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"architectures": [', "is not valid JSON: .*line 1 column"),
        (b"\xff{}", "is not valid JSON: .*utf-8"),
        (b"[]", "holds a list"),
    ],
)
def test_broken_config_is_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {words}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/place", "./owner/name", "a/b/c", "justaname"])
def test_neither_directory_nor_id_is_refused(path):
    words = f"'{re.escape(path)}' is neither a directory nor a hub id"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_hub_failure_is_named(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name, *, revision, allow_patterns, local_files_only):
        raise LocalEntryNotFoundError(f"offline: {name}@{revision}")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **options: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    words = "downloading it from the hub failed: offline: owner/absent@v1"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("owner/absent", revision="v1")


def reload(path):
    return load_params(open_checkpoint(path), "float32")


NORM = "model.layers.1.self_attn.q_norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("untied", lambda t: t.pop(NORM), [f"missing tensor {NORM}"]),
        (
            "untied",
            lambda t: t.pop(HEAD),
            ["missing tensor lm_head.weight (tie_word_embeddings is false"],
        ),
        (
            "untied",
            lambda t: t.update({"model.layers.2.extra": t[NORM]}),
            ["unexpected tensor model.layers.2.extra"],
        ),
        (
            "untied",
            lambda t: t.update({NORM: t[NORM][:-1]}),
            [f"{NORM} has shape (9,); config.json implies (10,)"],
        ),
        (
            "untied",
            lambda t: t.update({"x": t.pop(NORM), HEAD: t[HEAD].T.copy()}),
            [
                f"missing tensor {NORM}",
                "unexpected tensor x",
                "lm_head.weight has shape (24, 131); config.json implies (131, 24)",
            ],
        ),
        (
            "tied",
            lambda t: t.update({HEAD: t[EMBEDDING] + 1}),
            ["unexpected tensor lm_head.weight (tie_word_embeddings is true"],
        ),
        (
            "tied",
            lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
            ["missing tensor model.embed_tokens.weight", "unexpected tensor lm_head"],
        ),
    ],
    ids=["missing", "missing head", "extra", "shape", "all at once", "untrue copy", "head alone"],
)
def test_wrong_tensors_are_all_named(copy, name, change, words):
    path = copy(name)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"does not hold the model that its config\.json describes"
    ) as error:
        reload(path)
    assert len(str(error.value).splitlines()) == 1 + len(words)
    assert all(word in str(error.value) for word in words)


def test_many_wrong_tensors_are_counted(copy):
    path = copy("untied", num_hidden_layers=5, layer_types=...)
    with pytest.raises(
        CheckpointError, match=r"and 13 more$"
    ):  # 3 absent layers of 11 tensors, 20 of them listed
        reload(path)


def test_stored_rotary_frequencies_are_ignored(copy, pairs):
    path = copy("llama")  # as in files of Llama 2
    tensors = load_file(path / "model.safetensors")
    save_file(
        tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
        path / "model.safetensors",
    )
    assert_same_bits(reload(path), pairs["llama"].params)


def test_tied_checkpoint_may_store_its_head(copy, pairs):
    path = copy("tied")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING]}, path / "model.safetensors")
    assert_same_bits(reload(path), pairs["tied"].params)


@pytest.mark.parametrize("content", [b"", b"x" * 100, None], ids=["empty", "garbage", "truncated"])
def test_corrupt_weights_are_refused(copy, content):
    path = copy("untied")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] if content is None else content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not a readable safetensors file"
    ):
        reload(path)


def test_absent_weights_are_refused(copy):
    path = copy("untied")
    (path / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        reload(path)


def test_index_of_an_absent_file_is_refused(pairs, save):
    path = save(pairs["untied"].model, max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"index\.json names files that do not exist \(download them too\): "
        rf"{re.escape(shard.name)}$",
    ):
        reload(path)


def test_index_of_an_absent_tensor_is_refused(pairs, save):
    path = save(pairs["untied"].model, max_shard_size="20KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][NORM])
    index["weight_map"][NORM] = other
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(other)} does not hold the tensor {re.escape(NORM)}"
    ):
        reload(path)


def test_index_without_weight_map_is_refused(copy):
    path = copy("untied")
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        reload(path)


def test_single_file_beside_an_index_of_other_files_is_refused(pairs, save, copy):
    path = save(pairs["untied"].model, max_shard_size="20KB")
    stale = copy("untied") / "model.safetensors"
    (path / "model.safetensors").write_bytes(stale.read_bytes())
    with pytest.raises(CheckpointError, match=r"one of them is stale.*student\.path") as error:
        reload(path)
    assert "\n" not in str(error.value)


def test_adapter_directory_whose_base_is_not_there_names_it(tmp_path):
    base = str(tmp_path / "nowhere")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="PEFT adapter, and its base .*nowhere.*expected"):
        open_checkpoint(tmp_path)


def test_work_directory_stands_for_its_exported_student(tmp_path, pairs):
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))
    write("config.json", {"config": {}, "data": {}, "environment": {}})
    with pytest.raises(CheckpointError, match=r"run without a student; .*opdjax export"):
        open_checkpoint(tmp_path)
    shutil.copytree(pairs["untied"].checkpoint.path, tmp_path / "student")
    write("result.json", {"student": "student"})
    assert open_checkpoint(tmp_path).path == tmp_path / "student"
    assert_same_bits(reload(tmp_path), pairs["untied"].params)


def test_unknown_dtype_is_refused(pairs):
    with pytest.raises(
        CheckpointError, match=r"load as 'float16'; expected one of \['bfloat16', 'float32'\]"
    ):
        load_params(pairs["untied"].checkpoint, "float16")

"""Students made from a teacher: layers dropped, kernels rounded or noisy, nothing else changed."""

import contextlib
import sys

import numpy as np
import pytest

from opdjax.cli import main
from opdjax.models.hf import CheckpointError, load_params, open_checkpoint
from opdjax.models.make_student import make_student


def arrays_of(model):
    """Parameter -> array; the layers are stacked."""
    params = load_params(open_checkpoint(model), "float32")
    layers = params.pop("layers")
    return {name: np.asarray(leaf) for name, leaf in (params | layers).items()}


@pytest.fixture(scope="module")
def teacher():
    return arrays_of("@mini_teacher")


def test_without_options_it_is_a_copy(tmp_path, teacher):
    copy = arrays_of(make_student("@mini_teacher", tmp_path / "copy"))
    assert copy.keys() == teacher.keys()
    for name, array in copy.items():
        np.testing.assert_array_equal(array, teacher[name])


def test_layers_are_dropped(tmp_path, teacher):
    out = tmp_path / "student"
    make_student("@mini_teacher", out, keep_layers=[2, 0])
    assert open_checkpoint(out).config.num_layers == 2
    for name, array in arrays_of(out).items():
        is_layered = teacher[name].shape[:1] == (3,) and name.endswith(("_kernel", "_norm"))
        is_layered = is_layered and array.shape != teacher[name].shape
        np.testing.assert_array_equal(array, teacher[name][[0, 2]] if is_layered else teacher[name])
    assert "without the layers [1] of 3" in (out / "README.md").read_text()
    for absent in ([], [3], [-1]):
        with pytest.raises(CheckpointError, match="has the layers 0 to 2"):
            make_student("@mini_teacher", tmp_path / "none", keep_layers=absent)


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("olmo3", "smollm3-window", "qwen2-window", "qwen3-moe")
        ),
    ],
)
def test_kept_layers_stay_what_they_were(pairs, copy, tmp_path, name):
    """With the windows and rotations that `config.json` gives them by their number, too."""
    source = open_checkpoint(copy(name, layer_types=...))
    kept = [0, source.config.num_layers - 1] if source.config.num_layers > 2 else [1]
    out = make_student(str(source.path), tmp_path / "student", keep_layers=kept)
    config = open_checkpoint(out).config
    assert config.windows == tuple(source.config.windows[layer] for layer in kept)
    assert config.ropes == tuple(source.config.ropes[layer] for layer in kept)
    layers, whole = arrays_of(out), arrays_of(source.path)
    np.testing.assert_array_equal(layers["q_kernel"], whole["q_kernel"][kept])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels_are_rounded(tmp_path, teacher, bits):
    for name, array in arrays_of(make_student("@mini_teacher", tmp_path / "s", bits=bits)).items():
        if not name.endswith("_kernel"):
            np.testing.assert_array_equal(array, teacher[name])
            continue
        size = 64 if array.shape[-1] % 64 == 0 else array.shape[-1]
        groups = teacher[name].reshape(-1, size)
        scale = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        error = np.abs(array.reshape(-1, size) - groups)
        assert (error <= scale * 0.5001).all()
        steps = array.reshape(-1, size) / scale
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def test_noise_has_the_size_that_was_asked_for(tmp_path, teacher):
    student = arrays_of(make_student("@mini_teacher", tmp_path / "s", noise=0.1))
    same = arrays_of(make_student("@mini_teacher", tmp_path / "again", noise=0.1))
    other = arrays_of(make_student("@mini_teacher", tmp_path / "other", noise=0.1, seed=1))
    for name, array in student.items():
        np.testing.assert_array_equal(array, same[name])
        if not name.endswith("_kernel"):
            np.testing.assert_array_equal(array, teacher[name])
            continue
        assert not np.array_equal(array, other[name])
        for layer, wanted in zip(array, teacher[name]):
            assert np.std(layer - wanted) == pytest.approx(0.1 * wanted.std(), rel=0.1)


@pytest.mark.long
def test_the_command_makes_one(tmp_path, monkeypatch, capsys):
    words = ["@mini_teacher", tmp_path / "student", "--keep-layers", "0-1,2", "--bits", "4"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["opdjax", "make-student", *map(str, words), *more])
        with contextlib.suppress(SystemExit):
            main.main()
        return "".join(capsys.readouterr())

    assert "wrote" in run()
    assert "is '1,x'; expected numbers" in run("--keep-layers", "1,x")
    assert "--bits is 1" in run("--bits", "1")

"""Where rows are stored does not matter: Parquet, Hugging Face and TFDS give the prompts that JSON
lines give, and a run as well.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny_runs import vary, without_times
from waiting import HANG

from opdjax.data.prompt_rows import Prompt, read_prompts
from opdjax.data.sources import ColumnMap, DataError
from opdjax.data.tasks import arithmetic
from opdjax.rollouts.setup import prepare
from opdjax.train import train

pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

import pyarrow.parquet  # noqa: E402

SPLIT = "validation"
PROBLEMS = [
    {"prompt": problem.prompt, "answer": problem.answer, "reference": problem.reference}
    for problem in arithmetic.problems(SPLIT)
]
EXPECTED = [Prompt(row["prompt"], row["answer"], (row["reference"],)) for row in PROBLEMS]
KINDS = ("parquet", "hf", "tfds")


class StoredRows(tfds.core.GeneratorBasedBuilder):
    """Any rows of one split, in TFDS's own (hashed) order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, rows, features, **options):
        self.rows, self.features = rows, features
        super().__init__(**options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, description="rows", features=tfds.features.FeaturesDict(self.features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.rows)


TEXT = tfds.features.Text()
MESSAGES = tfds.features.Sequence({"role": TEXT, "content": TEXT})


def store_tfds(rows, directory, features, file_format="array_record"):
    builder = StoredRows(rows, features, data_dir=str(directory), file_format=file_format)
    builder.download_and_prepare()
    return builder.data_dir


def store_parquet(rows, file):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def store_lines(rows, file):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Every cache below one directory, and no network."""
    root = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(root / "tfds"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(root / "cache"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield root


@pytest.fixture(scope="module")
def prepared(here):
    """Two processes that are the first to ask for the built-in task, at the same time."""
    script = (
        "import sys\n"
        "import opdjax.data.prompt_rows\n"
        "early = [name for name in ('tensorflow_datasets', 'datasets', 'pyarrow') if name in "
        "sys.modules]\n"
        "assert not early, early\n"
        "rows = opdjax.data.prompt_rows.read_prompts('tfds:opdjax_arithmetic#test[:10%]')\n"
        "assert rows == opdjax.data.prompt_rows.read_prompts('arithmetic:test')[:205], rows[:3]\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('tensorflow', "
        "'torch')]\n"
    )
    environment = {**os.environ, "TFDS_DATA_DIR": str(here / "tfds")}
    runs = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    return [(run.communicate(timeout=HANG)[1].decode(), run.returncode) for run in runs]


@pytest.fixture(scope="module")
def stored(here, prepared):
    """The problems of the split in every kind of storage: name -> where, and how a split or slice
    of it is written.
    """
    saved = datasets.Dataset.from_list(PROBLEMS)
    saved.save_to_disk(str(here / "saved"))
    saved.train_test_split(0.5, shuffle=False).save_to_disk(str(here / "saved_splits"))
    files = here / "files"
    files.mkdir()
    store_parquet(PROBLEMS[:500], files / "train-0.parquet")
    store_parquet(PROBLEMS[500:], files / "train-1.parquet")
    store_parquet(PROBLEMS, here / "one.parquet")
    return {
        "parquet": f"parquet:{here / 'one.parquet'}",
        "hf": f"hf:{here / 'saved'}#train",
        "tfds": f"tfds:opdjax_arithmetic#{SPLIT}",
        "parquet without its name": f"{here / 'one.parquet'}",
        "parquet directory": f"parquet:{files}",
        "parquet pattern": f"parquet:{here}/f*/train-*.parquet",
        "hf directory of files": f"hf:{files}#train",
        "hf saved splits": f"hf:{here / 'saved_splits'}#train+test",
        "tfds with a version": f"tfds:opdjax_arithmetic:1.0.0#{SPLIT}",
        "tfds directory": f"tfds:{here / 'tfds' / 'opdjax_arithmetic' / '1.0.0'}#{SPLIT}",
    }


STORED = (
    "parquet",
    "hf",
    "tfds",
    "parquet directory",
    "parquet pattern",
    "hf directory of files",
    "hf saved splits",
    "tfds with a version",
    "tfds directory",
)


@pytest.mark.parametrize("name", STORED)
def test_the_stored_rows_are_the_problems_in_their_order(stored, name):
    assert read_prompts(stored[name]) == EXPECTED


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_not_depend_on_where_its_rows_are_stored(stored, kind, straight, tmp_path):
    train(vary_source(stored[kind]), tmp_path / "run")
    assert without_times(tmp_path / "run") == without_times(straight)
    left, right = (
        json.loads((workdir / "config.json").read_text())["data"]
        for workdir in (tmp_path / "run", straight)
    )
    assert left == right


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train(vary_source(f"arithmetic:{SPLIT}"), workdir)
    return workdir


def vary_source(source):
    return vary(data={"source": source}, train={"num_steps": 3}, evaluation={"source": None})


def test_tfds_prepares_the_builtin_task_once_and_without_tensorflow(prepared, here):
    for errors, status in prepared:
        assert status == 0, errors
    assert [path.name for path in (here / "tfds" / "opdjax_arithmetic").iterdir()] == ["1.0.0"]


SLICES = {
    "train[:10%]": slice(0, 102),
    "train[1000:]": slice(1000, None),
    "train[50%:75%]": slice(512, 768),
}


@pytest.mark.parametrize("split", SLICES)
@pytest.mark.parametrize("name", ["hf", "hf directory of files", "tfds"])
def test_slices_are_exact(stored, name, split):
    source = (
        stored[name].rpartition("#")[0]
        + "#"
        + (split.replace("train", SPLIT) if name == "tfds" else split)
    )
    assert read_prompts(source) == EXPECTED[SLICES[split]]


def test_a_saved_slice_goes_by_the_name_of_its_split(stored, tmp_path):
    part = datasets.load_dataset(
        stored["hf directory of files"][3:].partition("#")[0], split="train[:10]"
    )
    part.save_to_disk(str(tmp_path / "saved"))
    assert read_prompts(f"hf:{tmp_path / 'saved'}#train[5:]") == EXPECTED[5:10]


# ColumnMap


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be short"}
# Rows as others store them, where what is in them, their TFDS features, and the prompts they stand
# for.
STYLES = {
    "problem and solution": (
        [
            {"problem": "né 1+1=", "solution": "so 2", "answer": 2},
            {"problem": "2+2=", "solution": "so 4", "answer": 4},
        ],
        ColumnMap("problem", reference="solution"),
        {"problem": TEXT, "solution": TEXT, "answer": np.int64},
        [Prompt("né 1+1=", "2", ("so 2",)), Prompt("2+2=", "4", ("so 4",))],
    ),
    "prompt and completion": (
        [{"prompt": [SYSTEM, user("né 1+1=")], "completion": [assistant("2")]}],
        ColumnMap(reference="completion"),
        {"prompt": MESSAGES, "completion": MESSAGES},
        [Prompt((SYSTEM, user("né 1+1=")), None, ("2",))],
    ),
    "messages": (
        [
            {"messages": [user("1+1="), assistant("2"), user("and 1?"), assistant("3")]},
            {"messages": [user("2+2=")]},
        ],
        ColumnMap("messages"),
        {"messages": MESSAGES},
        [
            Prompt((user("1+1="), assistant("2"), user("and 1?")), None, ("3",)),
            Prompt((user("2+2="),)),
        ],
    ),
    "reward model": (
        [
            {
                "prompt": [user("1+1=")],
                "reward_model": {"ground_truth": "2", "style": "rule"},
                "extra_info": {"index": 0},
            }
        ],
        ColumnMap(answer="reward_model.ground_truth"),
        {
            "prompt": MESSAGES,
            "reward_model": {"ground_truth": TEXT, "style": TEXT},
            "extra_info": {"index": np.int64},
        },
        [Prompt((user("1+1="),), "2")],
    ),
    "several references": (
        [{"prompt": "1+1=", "references": ["2", "1+1=2"]}, {"prompt": "2+2=", "references": []}],
        ColumnMap(),
        {"prompt": TEXT, "references": tfds.features.Sequence(TEXT)},
        [Prompt("1+1=", None, ("2", "1+1=2")), Prompt("2+2=")],
    ),
}


def store(kind, rows, features, directory):
    """A source of that kind that holds these rows."""
    if kind == "tfds":
        return f"tfds:{store_tfds(rows, directory, features)}#train"
    if kind == "lines":
        return store_lines(rows, directory / "rows.jsonl")
    store_parquet(rows, directory / "rows.parquet")
    return f"parquet:{directory}/rows.parquet" if kind == "parquet" else f"hf:{directory}#train"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["lines", *KINDS])
def test_columns_of_other_names_and_shapes(kind, style, tmp_path):
    rows, columns, features, expected = STYLES[style]
    found = read_prompts(store(kind, rows, features, tmp_path), columns)
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_the_default_answer_and_reference_may_be_absent_or_null(tmp_path):
    store_parquet(
        [
            {"prompt": "1+1=", "answer": None, "reference": None},
            {"prompt": "2", "answer": 0.5, "reference": "r"},
        ],
        tmp_path / "a.parquet",
    )
    store_parquet([{"prompt": "3"}], tmp_path / "b.parquet")
    assert read_prompts(f"parquet:{tmp_path}") == [
        Prompt("1+1="),
        Prompt("2", "0.5", ("r",)),
        Prompt("3"),
    ]


def test_a_name_with_a_dot_and_an_item_of_a_list(tmp_path):
    source = store_lines(
        [{"a.b": "1+1=", "a": {"b": "no"}, "final_answer": ["2", "3"]}], tmp_path / "rows.jsonl"
    )
    assert read_prompts(source, ColumnMap("a.b", "final_answer.0")) == [Prompt("1+1=", "2")]
    with pytest.raises(
        DataError, match=r"there is no column 'final_answer\.2'; found \['2', '3'\]"
    ):
        read_prompts(source, ColumnMap("a.b", "final_answer.2"))


def test_messages_whose_fields_differ_by_row(tmp_path):
    """`datasets` keeps such values as JSON text and decodes them only when rows are read its own
    way.
    """
    rows = [
        {"prompt": [user("1+1=")], "answer": 2},
        {"prompt": [{**user("2+2="), "name": {"first": "x"}}], "answer": "4"},
    ]
    store_lines(rows, tmp_path / "rows.jsonl")
    assert read_prompts(f"hf:{tmp_path}#train") == [
        Prompt((user("1+1="),), "2"),
        Prompt(({**user("2+2="), "name": {"first": "x"}},), "4"),
    ]


def test_training_and_evaluation_read_columns_of_their_own(tmp_path):
    """Prompts as verl stores them, evaluated on problems with an answer; unless told, the
    evaluation reads as training does.
    """
    rows = [
        {
            "prompt": [user(row["prompt"])],
            "reward_model": {"ground_truth": row["answer"]},
            "why": row["reference"],
        }
        for row in PROBLEMS[:8]
    ]
    trained = store("parquet", rows, None, tmp_path)
    held_out = store_lines([{"problem": "1+1=", "answer": "2"}], tmp_path / "held_out.jsonl")
    data = {
        "source": trained,
        "columns": ("answer=reward_model.ground_truth", "reference=why"),
    }
    setup = prepare(
        vary(
            data=data,
            evaluation={"source": held_out, "columns": ("prompt=problem", "answer=answer")},
        )
    )
    assert setup.prompts.prompts == tuple(
        Prompt((user(p.prompt),), p.answer, p.references) for p in EXPECTED[:8]
    )
    assert setup.evaluator.prompts.prompts == (Prompt("1+1=", "2"),)
    config = vary(data=data, evaluation={"source": trained})
    assert [p.answer for p in prepare(config).evaluator.prompts.prompts] == [
        p.answer for p in EXPECTED[:8]
    ]


# Errors


PACKAGES = {"parquet:x": "pyarrow", "hf:x#train": "datasets", "tfds:x#train": "tensorflow_datasets"}


@pytest.mark.parametrize("source", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(source, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[source], None)
    with pytest.raises(
        ImportError,
        match=rf"{source.partition(':')[0]}:.*needs another package.*{PACKAGES[source]}.*pip "
        rf"install 'opdjax\[data\]'",
    ):
        read_prompts(source)


@pytest.mark.parametrize("kind", ["lines", *KINDS])
def test_a_missing_column_is_named_with_those_that_are_there(kind, tmp_path):
    source = store(
        kind,
        [{"question": "1+1=", "nested": {"truth": "2"}}],
        {"question": TEXT, "nested": {"truth": TEXT}},
        tmp_path,
    )
    for columns, message in (
        (
            ColumnMap(),
            r"no column 'prompt'; found \['nested', 'question'\]\. Name the right one in "
            r"data\.columns",
        ),
        (
            ColumnMap("questions"),
            r"no column 'questions'; found \['nested', 'question'\], did you mean 'question'\?",
        ),
        (
            ColumnMap("question", "nested.thruth"),
            r"no column 'nested\.thruth'; found \['truth'\], did you mean 'truth'\?",
        ),
        (ColumnMap("question", "answer"), r"no column 'answer'; found \['nested', 'question'\]"),
        (
            ColumnMap("question", reference="nested.truth.x"),
            r"no column 'nested\.truth\.x'; found ",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read_prompts(source, columns)


WRONG_TYPES = {
    "a number as prompt": ([{"prompt": 3}], "row 0: 'prompt' is 3; expected a non-empty string"),
    "a record as answer": (
        [{"prompt": "a", "answer": {"x": 1}}],
        r"row 0: 'answer' is \{'x': 1\}; expected a string or a number",
    ),
    "bytes that are no text": ([{"prompt": b"\xff"}], "row 0: 'prompt' is not UTF-8 text"),
    "messages without content": (
        [{"prompt": [{"role": "user"}]}],
        "row 0: 'prompt.0.content' is null; expected a text",
    ),
    "a null": ([{"prompt": "a"}, {"prompt": None}], "row 1: 'prompt' is None"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_value_of_a_wrong_type_is_named_by_its_row(kind, name, tmp_path):
    rows, message = WRONG_TYPES[name]
    with pytest.raises(DataError, match=message):
        read_prompts(store(kind, rows, None, tmp_path))


def broken_tfds(directory, change):
    """A prepared dataset whose directory was changed afterwards."""
    path = pathlib.Path(
        store_tfds([{"prompt": str(n)} for n in range(20)], directory, {"prompt": TEXT})
    )
    change(path)
    return f"tfds:{path}#train"


def as_tfrecord(path):
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


def without_records(path):
    next(path.glob("*.array_record*")).unlink()


def make(directory, name, content=b""):
    (directory / name).write_bytes(content)
    return directory / name


def empty_parquet(directory):
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), directory / "rows.parquet"
    )
    return f"parquet:{directory}"


def whole_parquet_splits(directory):
    rows = [{"prompt": str(n)} for n in range(20)]
    return f"tfds:{store_tfds(rows, directory, {'prompt': TEXT}, 'parquet')}#train"


# Name: the source, made in an empty directory from the stored problems, and what is said of it.
REFUSED = {
    "no split": (
        lambda d, s: "hf:org/name",
        r"'hf:org/name' names no split; expected hf:NAME#SPLIT, such as hf:org/name#train",
    ),
    "an empty split": (
        lambda d, s: "tfds:mnist#",
        r"names no split; expected tfds:NAME#SPLIT, such as tfds:mnist#train",
    ),
    "no name": (lambda d, s: "tfds:#train", "names no split"),
    "hf, another split": (
        lambda d, s: s["hf"].replace("#train", "#trian"),
        r'Unknown split "trian".*\[\'train\'\]',
    ),
    "hf, another split of files": (
        lambda d, s: s["hf directory of files"] + "ing",
        r'Unknown split "training".*\[\'train\'\]',
    ),
    "hf, a slice that is none": (
        lambda d, s: s["hf"] + "[:10",
        r"Unrecognized instruction format: train\[:10",
    ),
    "hf, an empty slice": (lambda d, s: s["hf"] + "[:0]", "holds no prompts"),
    "hf, an empty slice of files": (
        lambda d, s: s["hf directory of files"] + "[:0]",
        "corresponds to no data",
    ),
    "hf, an empty directory": (lambda d, s: f"hf:{d}#train", "doesn't contain any data files"),
    "hf, no directory": (lambda d, s: f"hf:{d}/x#train", "there is no directory"),
    "hf, a file of another kind": (
        lambda d, s: f"hf:{make(d, 'a.parquet', b'no').parent}#train",
        "Parquet file size is 2 bytes",
    ),
    "hf, lines that are no JSON": (
        lambda d, s: f"hf:{make(d, 'a.jsonl', b'no').parent}#train",
        r"generating the dataset \(.*JSON",
    ),
    "hf, another configuration": (
        lambda d, s: s["hf directory of files"].replace("#", "@x#"),
        "BuilderConfig 'x' not found",
    ),
    "hf, no network": (
        lambda d, s: "hf:nobody/nothing@main#train",
        "reach 'nobody/nothing' on the Hub.*the latter needs a network",
    ),
    "tfds, another split": (
        lambda d, s: "tfds:opdjax_arithmetic#trian",
        r"Unknown split 'trian'.*its splits are \['test', 'train', 'val",
    ),
    "tfds, a slice that is none": (
        lambda d, s: "tfds:opdjax_arithmetic#train[:10",
        r"parsing split.*a slice is written train\[:10%\]",
    ),
    "tfds, an empty slice": (lambda d, s: "tfds:opdjax_arithmetic#train[:0%]", "its splits are"),
    "tfds, a backward slice": (
        lambda d, s: "tfds:opdjax_arithmetic#train[10%:5%]",
        "its splits are",
    ),
    "tfds, another name": (
        lambda d, s: "tfds:nothing_here#train",
        "Dataset nothing_here not found; expected a builder that TFDS knows",
    ),
    "tfds, another version": (
        lambda d, s: "tfds:opdjax_arithmetic:9.9.9#train",
        "cannot be loaded at version 9.9.9, only: 1.0.0",
    ),
    "tfds, a name that is none": (
        lambda d, s: "tfds:a b#train",
        "Parsing builder name string a b failed",
    ),
    "tfds, no builder's directory": (
        lambda d, s: f"tfds:{d}#train",
        "Could not read dataset info.*a builder's directory",
    ),
    "tfds, tfrecord": (
        lambda d, s: broken_tfds(d, as_tfrecord),
        "stored as tfrecord, which only TensorFlow reads; expected array_record",
    ),
    "tfds, lost files": (lambda d, s: broken_tfds(d, without_records), "its splits are"),
    "tfds, a slice of parquet": (
        lambda d, s: whole_parquet_splits(d) + "[:10%]",
        "reads only whole splits; its splits are",
    ),
    "parquet, no file": (
        lambda d, s: f"parquet:{d}",
        r"names no file; expected a \.parquet file, a directory of them or a pattern",
    ),
    "parquet, no match": (lambda d, s: f"parquet:{d}/*.parquet", "names no file"),
    "parquet, no rows": (lambda d, s: empty_parquet(d), "holds no prompts"),
    "parquet, another kind": (
        lambda d, s: f"parquet:{make(d, 'a.parquet', b'no')}",
        r"a\.parquet cannot be read as Parquet: ",
    ),
    "parquet, cut off": (
        lambda d, s: f"parquet:{make(d, 'a', b'PAR1' * 99)}",
        "cannot be read as Parquet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_read_says_what_to_do(name, stored, tmp_path):
    source, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        read_prompts(source(tmp_path, stored))


def test_whole_splits_of_parquet_are_read_through_tfds(tmp_path):
    assert len(read_prompts(whole_parquet_splits(tmp_path))) == 20


def test_a_builder_that_needs_tensorflow_to_be_prepared(tmp_path, monkeypatch):
    from opdjax.data.tasks.arithmetic_tfds import OpdjaxArithmetic

    def download_and_prepare(self, **options):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    monkeypatch.setattr(OpdjaxArithmetic, "download_and_prepare", download_and_prepare)
    with pytest.raises(
        DataError,
        match=r"could not be prepared here \(No module named 'tensorflow'\); prepare it elsewhere",
    ):
        read_prompts("tfds:opdjax_arithmetic#train")

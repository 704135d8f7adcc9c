"""What users get wrong, in one table: each mistake ends in status 2, one message, the right error,
and nothing lost or computed.
"""

import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import smooth

import opdjax.rollouts.on_policy
import opdjax.train
from opdjax.cli import main
from opdjax.cli.parsing import load_experiment
from opdjax.config import MINI_PAIR, MINI_STUDENT
from opdjax.config.experiments import load_sweep
from opdjax.engine.evaluate import Evaluator

ROW = '{"prompt": "1+1=", "answer": "2", "reference": "x"}\n'
EXPERIMENT = """
from opdjax.config import *
def get_config():
    return Config(
        data=DataConfig(source={rows!r}, max_prompt_length=32),
        sampling=SamplingConfig(max_completion_length=4),
        estimator=EstimatorConfig(recipe="opd"),
        train=TrainConfig(num_steps=2, prompts_per_step=2),
        evaluation=EvaluationConfig(
            source={rows!r}, num_prompts=2, num_samples=2, max_completion_length=4
        ),
        checkpoint=CheckpointConfig(every=1),
        log=LogConfig(samples_every=0),
        mesh=MeshConfig(data=1),
    )
"""
SWEEP = (
    "from opdjax.config import *\nfrom opdjax.config.grid import *\ndef get_sweep(): return "
    "points(Config(), {})"
)


@dataclasses.dataclass
class Place:
    """A directory for one mistake; every method returns a command line or a path."""

    root: pathlib.Path
    finished: pathlib.Path  # a whole run of two steps; `run` copies it
    experiment: pathlib.Path
    open_files: list

    def file(self, content, name="rows.jsonl"):
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def train(self, *flags, workdir="run"):
        return ["train", self.experiment, "--workdir", self.root / workdir, *flags]

    def data(self, content, *flags, name="rows.jsonl"):
        return self.train("--data.source", self.file(content, name), *flags)

    def damaged_dataset(self, file, content, kind):
        self.file(content, f"{self.directory('stored').name}/{file}")
        return self.train("--data.source", f"{kind}:{self.root}/stored#train")

    def program(self, text):
        return ["train", self.file(text, "program.py"), "--workdir", self.root / "run"]

    def sweep(self, overrides="seeds(2)", *flags, workdir="sweep", text=SWEEP):
        return [
            "sweep",
            self.file(text.format(overrides), "sweep.py"),
            "--workdir",
            self.root / workdir,
            *flags,
        ]

    def model(self, file=None, content=None, **fields):
        """The mini student with a file replaced, removed (content None), or with some fields of it
        changed.
        """
        path = self.root / "model"
        shutil.copytree(MINI_PAIR / "student", path)
        if fields:
            values = json.loads((path / file).read_text())
            self.file(json.dumps({**values, **fields}), f"model/{file}")
        elif content is not None:
            self.file(content, f"model/{file}")
        elif file is not None:
            (path / file).unlink()
        return path

    def weights(self, change):
        path = self.model()
        tensors = load_file(path / "model.safetensors")
        save_file({**tensors, **change(tensors)}, path / "model.safetensors")
        return path

    def small_embedding(self):
        path = self.weights(
            lambda t: {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].copy()}
        )
        config = json.loads((path / "config.json").read_text())
        self.file(json.dumps({**config, "vocab_size": 100}), "model/config.json")
        return path

    def run(self, file=None, content=None, is_finished=True):
        """A copy of the finished run, or of the run as a kill after its first step left it, with a
        file replaced or removed.
        """
        path = self.root / "run"
        shutil.copytree(self.finished, path)
        if not is_finished:
            (path / "result.json").unlink()
            shutil.rmtree(path / "student")
            shutil.rmtree(path / "checkpoints" / "2")
        if content is not None:
            (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        elif file is not None:
            shutil.rmtree(path / file) if (path / file).is_dir() else (path / file).unlink()
        return path

    def resume(self, file=None, content=None, *flags):
        self.run(file, content, is_finished=False)
        return self.train(*flags)

    def point(self, file=None, content=None):
        """A sweep of one finished point."""
        path = self.run().rename(self.root / "seed=0")
        config = json.loads((path / "config.json").read_text())["config"]
        self.file(
            json.dumps({"id": "seed=0", "overrides": {"seed": "0"}, "config": config}),
            "seed=0/point.json",
        )
        if file is not None:
            self.file(content, f"seed=0/{file}")
        return self.root

    def asked(self, file=None, content=None):
        """The directory of a sweep of two points of which none has begun."""
        from opdjax.sweeps.claims import open_sweep
        from opdjax.sweeps.runner import _write_points

        with open_sweep(self.root / "sweep") as sweep:
            _write_points(load_sweep(str(self.sweep()[1])), sweep)
        if file is not None:
            self.file(content, f"sweep/{file}")
        return self.sweep

    def damaged_checkpoint(self):
        argv = self.resume()
        for file in (self.root / "run" / "checkpoints" / "1").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:50])
        return argv

    def lost_checkpoints(self):
        argv = self.resume("checkpoints")
        with (self.root / "run" / "metrics.jsonl").open("a") as out:
            out.write('{"step": 50}\n')
        return argv

    def locked(self):
        self.open_files.append((self.run() / ".lock").open("w"))
        fcntl.flock(self.open_files[-1], fcntl.LOCK_EX)
        return self.train()

    def read_only(self):
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        (self.root / "shut").mkdir(mode=0o555)
        return self.train(workdir="shut/run")

    def directory(self, name):
        (self.root / name).mkdir(parents=True)
        return self.root / name


def needs(package, argv):
    pytest.importorskip(package)
    return argv


def student(path, *flags):
    return lambda p: p.train("--student.path", path(p), *flags)


def imported(path):
    return lambda p: ["check", path(p)]


def tokens(change):
    return imported(lambda p: p.weights(change))


def index(content):
    return imported(lambda p: p.model("model.safetensors.index.json", content))


TOPK = ("--estimator.recipe", "topk_kl")
SFT = ("--estimator.recipe", "sft", "--sampling.completions_from", "references")
WEIGHTS = (MINI_PAIR / "student" / "model.safetensors").read_bytes()
PARSED = None  # tyro answers by itself, in a box

# Name of the mistake: the error, how it is made, and what the message must hold: what was found,
# what was expected, what to do.
DATA = {
    "a file that is not there": (
        "DataError",
        lambda p: p.train("--data.source", p.root / "no.jsonl"),
        "no.jsonl does not exist; expected a local file",
    ),
    "a directory as a file": (
        "DataError",
        lambda p: p.train("--data.source", p.directory("x.jsonl")),
        "x.jsonl is a directory; expected a local file",
    ),
    "a web address": (
        "RemoteError",
        lambda p: p.train("--data.source", "https://x.y/z.jsonl"),
        "https://x.y/z.jsonl cannot be read or written; expected a local path or gs://BUCKET/NAME",
    ),
    "a table of another kind": (
        "DataError",
        lambda p: p.train("--data.source", "x.xlsx"),
        "'x.xlsx' is not known; expected arithmetic:SPLIT, stories:SPLIT, instructions:SPLIT, ",
    ),
    "an empty file": (
        "DataError",
        lambda p: p.data(""),
        "rows.jsonl holds no prompts; expected at least one row",
    ),
    "an array in place of lines": (
        "DataError",
        lambda p: p.data(f"[\n{ROW}]"),
        "line 1: not valid JSON",
        "expected lines of one whole JSON object each",
    ),
    "an array cut off": (
        "DataError",
        lambda p: p.data(f"[\n{ROW}", name="r.json"),
        "r.json: not a list in JSON (Expecting",
    ),
    "an array on one line": (
        "DataError",
        lambda p: p.data("[]"),
        "line 1: expected an object with named values, found list; expected lines",
    ),
    "a line cut off": (
        "DataError",
        lambda p: p.data(ROW + '{"prompt": "1+'),
        "line 2: not valid JSON (Unterminated string",
        "expected lines of one whole",
    ),
    "gzip": (
        "DataError",
        lambda p: p.data(gzip.compress(ROW.encode())),
        "line 1: not UTF-8 text",
        "not compressed",
    ),
    "UTF-16": (
        "DataError",
        lambda p: p.data(ROW.encode("utf-16")),
        "line 1: not UTF-8 text (invalid start byte)",
    ),
    "a number of 5000 digits": (
        "DataError",
        lambda p: p.data('{"prompt": "1", "answer": ' + "9" * 5000 + "}"),
        "line 1: cannot be read (Exceeds the limit (4300 digits)",
    ),
    "lists without end": (
        "DataError",
        lambda p: p.data('{"prompt": ' + "[" * 99999),
        "line 1: cannot be read (more than 100 lists and objects are nested",
    ),
    "half a surrogate pair": (
        "DataError",
        lambda p: p.data(r'{"prompt": "a\ud800"}'),
        r"prompt 0 of",
        r"holds '\ud800'",
        "expected Unicode text",
    ),
    "a misspelt column": (
        "DataError",
        lambda p: p.data(ROW, "--data.columns", "prompt=promt"),
        "no column 'promt'; found ['answer', 'prompt', 'reference'], did you mean 'prompt'?",
    ),
    "a number as prompt": (
        "DataError",
        lambda p: p.data('{"prompt": 3}'),
        "'prompt' is 3; expected a non-empty string or a list of",
    ),
    "messages without text": (
        "DataError",
        lambda p: p.data('{"prompt": [{"role": "user"}]}'),
        "line 1: 'prompt.0.content' is null; expected a text",
    ),
    "messages as raw text": (
        "DataError",
        lambda p: p.data('{"prompt": [{"role": "user", "content": "1"}]}', "--data.format", "raw"),
        "needs format 'chat', as tools do; format 'raw' takes a string",
    ),
    "NaN as answer": (
        "DataError",
        lambda p: p.data(ROW + '{"prompt": "1", "answer": NaN}'),
        "line 2: 'answer' is nan; expected a string or a number, or null",
    ),
    "every prompt too long": (
        "DataError",
        lambda p: p.data('{"prompt": "' + "1+" * 99 + '"}'),
        "no prompt of at most 32 tokens (1 rows read); raise data.max_prompt_length",
        "with 206 tokens",
    ),
    "one prompt too long": (
        "ConfigError",
        lambda p: ["sample", "@mini_student", "1+1=", "1+" * 99, "--data.max-prompt-length", "32"],
        "data.max_prompt_length is 32, exceeded by prompt 1 of the caller with 206 tokens",
        "expected more, or shorter prompts",
    ),
    "empty reference answers": (
        "DataError",
        lambda p: p.data('{"prompt": "1", "reference": ""}', *SFT),
        "prompt 0 of",
        "has no 'references' (1 such rows)",
    ),
    "no reference to show the teacher": (
        "DataError",
        lambda p: p.data(
            ROW + '{"prompt": "1", "answer": "1"}',
            "--data.teacher-prompt-format",
            "{prompt}{reference}",
        ),
        "prompt 1 of",
        "has no 'references' (1 such rows)",
        "name its column in data.columns (reference=COLUMN), or take {reference} out",
    ),
    "a conversation without a user": (
        "DataError",
        lambda p: p.data(
            '{"prompt": [{"role": "system", "content": "1"}]}',
            "--data.teacher-prompt-format",
            "{prompt}1",
        ),
        "prompt 0 of",
        "has no user's turn, which data.teacher_prompt_format wraps",
    ),
    "an evaluation without answers": (
        "DataError",
        lambda p: p.train("--evaluation.source", p.file('{"prompt": "1"}\n')),
        "has no 'answer' (1 such rows); evaluation needs them",
    ),
    "a misspelt split": (
        "DataError",
        lambda p: p.train("--data.source", "arithmetic:trian"),
        "no split 'trian'; expected one of ['test', 'train', 'validation']",
    ),
    "a dataset without split": (
        "DataError",
        lambda p: p.train("--data.source", "hf:gsm8k"),
        "'hf:gsm8k' names no split; expected hf:NAME#SPLIT, such as hf:gsm8k#train",
    ),
    "a hub that is out of reach": (
        "DataError",
        lambda p: needs("datasets", p.train("--data.source", "hf:no/thing#train")),
        "reach 'no/thing' on the Hub",
        "needs a network or its cache",
    ),
    "a saved dataset that is damaged": (
        "DataError",
        lambda p: needs("datasets", p.damaged_dataset("state.json", "{}", "hf")),
        "hf:",
        "expected a split or slice",
    ),
    "a TFDS dataset that is damaged": (
        "DataError",
        lambda p: needs("tensorflow_datasets", p.damaged_dataset("dataset_info.json", "{", "tfds")),
        "Failed to load JSON",
        "expected a builder",
    ),
    "an empty Parquet file": (
        "DataError",
        lambda p: needs("pyarrow", p.train("--data.source", f"parquet:{p.file('', 'a.parquet')}")),
        "a.parquet cannot be read as Parquet: Parquet file size is 0",
    ),
    "bytes that are no text on the command line": (
        "DataError",
        lambda p: ["sample", MINI_STUDENT, "a\udcff"],
        "prompt 0 of the caller holds",
        "expected Unicode text",
    ),
}

CONFIG = {
    "an unknown command": (
        "there is no command",
        lambda p: ["trian"],
        "'trian'; did you mean 'train'?",
    ),
    "an unknown field": (
        PARSED,
        lambda p: p.train("--train.num-step", "1"),
        "Unrecognized options: --train.num-step",
        "Perhaps you meant: --train.num-steps INT",
    ),
    "no value": (PARSED, lambda p: p.train("--seed"), "Missing value for argument '--seed'"),
    "a value of a wrong type": (
        PARSED,
        lambda p: p.train("--seed", "x"),
        "Error parsing --seed: invalid literal for int() with base 10: 'x'",
    ),
    "a negative number of steps": (
        PARSED,
        lambda p: p.train("--train.num-steps", "-3"),
        "train.num_steps is -3; expected at least 1",
    ),
    "more steps than can be counted": (
        PARSED,
        lambda p: p.train("--train.num-steps", "9" * 30),
        "train.num_steps is 9999",
        "expected at most 2147483647",
    ),
    "a rate that is no number": (
        PARSED,
        lambda p: p.train("--optimizer.learning-rate", "nan"),
        "optimizer.learning_rate is nan; expected a finite number",
    ),
    "rows that do not divide": (
        "ConfigError",
        lambda p: p.train("--train.gradient-accumulation-steps", "3"),
        "is 3; expected a divisor of the 2 rows a step",
    ),
    "rows that do not divide over devices": (
        "ConfigError",
        lambda p: p.train("--mesh.data", "3"),
        "2 rows a step",
        "on 3 devices (mesh.data x mesh.fsdp); micro-batches that divide: ",
    ),
    "more devices than there are": (
        "ConfigError",
        lambda p: p.train("--mesh.data", "99"),
        "mesh.data 99: 99 devices, but there are 8 cpu devices; expected a product of at most",
    ),
    "an option of another recipe": (
        PARSED,
        lambda p: p.train("--estimator.support", "student"),
        "recipe 'opd' has no option 'support'; it has discount, return_to_go, ",
    ),
    "beta without jsd": (
        PARSED,
        lambda p: p.train("--estimator.recipe", "full_kl", "--estimator.beta", "0.5"),
        "estimator.beta is 0.5; expected none unless divergence is jsd",
    ),
    "top-k with jsd": (
        PARSED,
        lambda p: p.train(*TOPK, "--estimator.divergence", "jsd"),
        "estimator.divergence is 'jsd'; expected reverse or forward",
    ),
    "a convention and a part of it": (
        PARSED,
        lambda p: p.train(*TOPK, "--estimator.convention", "trl", "--estimator.support", "student"),
        "estimator.support is 'student'; expected none where convention is trl",
    ),
    "a tail of nothing": (
        PARSED,
        lambda p: p.train(*TOPK, "--estimator.outside", "tail"),
        "estimator.outside is 'tail'; expected another value unless renormalize is none",
    ),
    "cross-entropy on one's own draws": (
        "ConfigError",
        lambda p: p.train("--estimator.recipe", "sft"),
        "sampling.completions_from is 'student'; expected teacher or references",
    ),
    "a policy gradient on another's draws": (
        "ConfigError",
        lambda p: p.train("--sampling.completions_from", "teacher"),
        "sampling.completions_from is 'teacher'; expected student: opd averages",
    ),
    "a teacher's view without a teacher": (
        "ConfigError",
        lambda p: p.train(*SFT, "--data.teacher-format", "raw"),
        "data.teacher_format is 'raw'; expected none where no teacher",
    ),
    "a teacher shown more, without a teacher": (
        "ConfigError",
        lambda p: p.train(*SFT, "--data.teacher-prompt-format", "{prompt}1"),
        "data.teacher_prompt_format is '{prompt}1'; expected none where no teacher",
    ),
    "a format without the prompt": (
        PARSED,
        lambda p: p.train("--data.teacher-prompt-format", "{reference}"),
        "data.teacher_prompt_format is '{reference}'; expected a text that contains {prompt}",
    ),
    "a format that is empty": (
        PARSED,
        lambda p: p.train("--data.teacher-prompt-format", ""),
        "is ''; expected a text that contains",
    ),
    "a format with a misspelt field": (
        PARSED,
        lambda p: p.train("--data.teacher-prompt-format", "{prompt}{references}"),
        "expected {reference} in place of {references}",
    ),
    "a student that is shown what its teacher is": (
        "ConfigError",
        lambda p: p.train("--teacher.path", "@student"),
        "teacher.path is @student, and the teacher reads the same prompts as the student",
        "show it more with data.teacher_prompt_format",
    ),
    "a student that starts from itself": (
        "ConfigError",
        lambda p: p.train("--student.path", "@student"),
        "student.path is '@student'; expected the checkpoint that the student starts from",
    ),
    "a run's student outside a run": (
        "CheckpointError",
        lambda p: ["sample", "@student", "1+1="],
        "'@student' is a teacher's name for the student of its run; expected a model",
    ),
    "a filtered policy gradient": (
        "ConfigError",
        lambda p: p.train("--sampling.top-p", "0.9"),
        "top_p 0.9",
        "sample with temperature 1 and no filter",
    ),
    "a stop id that is no token": (
        "ConfigError",
        lambda p: p.train("--sampling.stop-token-ids", "214"),
        "stop_token_ids has [214]; expected ids from 0 to 213",
    ),
    "an answer too long to be counted": (
        "ConfigError",
        lambda p: ["sample", MINI_STUDENT, "1+1=", "--max-completion-length", 10**12],
        "is 1000000000000; expected at most 2147483647",
    ),
    "a directory to write scores to": (
        "ConfigError",
        lambda p: ["evaluate", MINI_STUDENT, "--output", p.root],
        "is a directory; expected the name of a file",
    ),
    "an experiment that is a directory": (
        "ConfigError",
        lambda p: ["train", p.root, "--workdir", "x"],
        "there is no file",
        "expected a Python file with get_config()",
    ),
    "an experiment that raises": (
        "ConfigError",
        lambda p: p.program("def get_config():\n    return {}['x']"),
        "program.py does not run: KeyError: 'x' (line 2)",
    ),
    "an experiment with arguments": (
        "ConfigError",
        lambda p: p.program("def get_config(size): pass"),
        "missing 1 required positional argument: 'size'",
    ),
    "an experiment that exits": (
        "ConfigError",
        lambda p: p.program("import sys\nsys.exit(3)"),
        "program.py does not run: SystemExit: 3 (line 2)",
    ),
    "an experiment in Latin-1": (
        "ConfigError",
        lambda p: p.program(b"x = '\xe9'"),
        "program.py does not run: SyntaxError: (unicode error)",
    ),
    "a number in quotes": (
        "ConfigError",
        lambda p: p.program("from opdjax.config import *\nOptimizerConfig(learning_rate='1e-3')"),
        "optimizer.learning_rate is '1e-3'; expected float",
    ),
    "a dictionary as a section": (
        "ConfigError",
        lambda p: p.program(
            "from opdjax.config import *\ndef get_config(): return Config(log={'every': 1})"
        ),
        "log is {'every': 1}; expected a section with named fields: LogConfig(...)",
    ),
    "the config of a model": (
        "ConfigError",
        lambda p: ["train", MINI_PAIR / "student" / "config.json", "--workdir", "x"],
        "has no 'config'; expected the config.json of a run",
    ),
    "a saved config that is a list": (
        "ConfigError",
        lambda p: ["train", p.file('{"config": []}', "saved.json"), "--workdir", "x"],
        "has no 'config'; expected the config.json of a run",
    ),
}

CHECKPOINTS = {
    "no such directory": (
        "CheckpointError",
        student(lambda p: p.root / "no", "--teacher.path", "no"),
        "no' is neither a directory nor a hub id (owner/name)",
    ),
    "an empty path": (
        "CheckpointError",
        lambda p: p.train("--student.path", ""),
        "'' is neither a directory nor a hub id",
    ),
    "a built-in model that there is not": (
        "CheckpointError",
        lambda p: p.train("--student.path", "@mini_studnet"),
        "'@mini_studnet' is not a built-in model; did you mean '@mini_student'?",
        "write ./@mini_studnet for a directory of that name",
    ),
    "a hub id out of reach": (
        "CheckpointError",
        lambda p: ["check", "no/thing"],
        "'no/thing' is not a local directory, and downloading it from the hub failed",
        "HF_HUB_OFFLINE=0",
    ),
    "a name that no hub takes": (
        "CheckpointError",
        lambda p: ["check", "a b/c d"],
        "'a b/c d' is not a local directory",
        "alphanumeric",
    ),
    "no config": (
        "CheckpointError",
        imported(lambda p: p.model("config.json")),
        "has no config.json; expected a Hugging Face checkpoint directory",
    ),
    "another architecture": (
        "UnsupportedModelError",
        imported(lambda p: p.model("config.json", architectures=["GPT2LMHeadModel"])),
        "['GPT2LMHeadModel']; expected one of ['Gemma3ForCausalLM'",
    ),
    "an architecture that is a number": (
        "UnsupportedModelError",
        imported(lambda p: p.model("config.json", architectures=3)),
        "the architecture 3; expected one of",
    ),
    "a null in the config": (
        "CheckpointError",
        imported(lambda p: p.model("config.json", num_hidden_layers=None)),
        "config.json lacks the field 'num_hidden_layers'",
    ),
    "a rope that depends on the batch": (
        "UnsupportedModelError",
        imported(lambda p: p.model("config.json", rope_parameters={"rope_type": "dynamic"})),
        "rope_type 'dynamic'; expected one of",
        "you may write instead",
    ),
    "a quantised model": (
        "UnsupportedModelError",
        imported(lambda p: p.model("config.json", quantization_config={"bits": 4})),
        "quantization_config {'bits': 4}; expected null (weights that are not quantized)",
    ),
    "a type that is a list": (
        "CheckpointError",
        imported(lambda p: p.model("config.json", dtype=["a"])),
        "sets dtype ['a']; expected the name of a dtype",
    ),
    "no weights": (
        "CheckpointError",
        imported(lambda p: p.model("model.safetensors")),
        "neither model.safetensors nor",
        "convert the weights to safetensors first",
    ),
    "weights cut off": (
        "CheckpointError",
        imported(lambda p: p.model("model.safetensors", WEIGHTS[:-1000])),
        "not a readable safetensors file",
        "download or copy it again (it has",
    ),
    "weights of another shape": (
        "CheckpointError",
        tokens(lambda t: {"model.norm.weight": t["model.norm.weight"][:3].copy()}),
        "model.norm.weight has shape (3,); config.json implies (96,)",
    ),
    "weights of 8-bit integers": (
        "CheckpointError",
        tokens(lambda t: {"model.norm.weight": np.ones(96, np.int8)}),
        "model.norm.weight is stored as I8; expected one of F32, BF16, F16",
    ),
    "weights of 8-bit floats": (
        "CheckpointError",
        tokens(lambda t: {"model.norm.weight": np.ones(96, ml_dtypes.float8_e4m3fn)}),
        "is stored as F8_E4M3; expected one of F32",
    ),
    "an index of absent files": (
        "CheckpointError",
        index('{"weight_map": {"a": "b.safetensors"}}'),
        "names files that do not exist (download them too): b.safetensors",
    ),
    "an index that is a list": (
        "CheckpointError",
        index('{"weight_map": ["a"]}'),
        "has no weight_map; expected tensor names and their files",
    ),
    "an end of sequence in letters": (
        "CheckpointError",
        imported(lambda p: p.model("generation_config.json", eos_token_id="</s>")),
        "eos_token_id '</s>'; expected an id from 0 to 213",
    ),
    "an end of sequence that is no token": (
        "CheckpointError",
        imported(lambda p: p.model("generation_config.json", eos_token_id=5000)),
        "eos_token_id 5000; expected an id from 0 to 213",
    ),
    "an embedding smaller than the tokenizer": (
        "CheckpointError",
        lambda p: ["evaluate", p.small_embedding()],
        "has 100 rows, its tokenizer 214 ids; expected the model's own tokenizer",
    ),
    "no tokenizer": (
        "TokenizerError",
        student(
            lambda p: (m := p.model("tokenizer.json"), (m / "tokenizer_config.json").unlink())[0]
        ),
        "it knows no tokens; expected tokenizer.json",
    ),
    "a damaged tokenizer": (
        "TokenizerError",
        student(lambda p: p.model("tokenizer.json", '{"version":')),
        "no tokenizer could be read from",
        "expected tokenizer.json",
    ),
    "a special token that is a number": (
        "TokenizerError",
        student(lambda p: p.model("tokenizer_config.json", eos_token=3)),
        "eos_token is 3, expected a text",
        "expected tokenizer.json",
    ),
    "a broken chat template": (
        "DataError",
        student(lambda p: p.model("chat_template.jinja", "{% for m in messages %}")),
        "TemplateSyntaxError: Unexpected end of template",
        "change it, or use format 'raw'",
    ),
    "a chat template that cannot be computed": (
        "DataError",
        student(lambda p: p.model("chat_template.jinja", "{{ 1 + 'a' }}")),
        "TypeError: unsupported operand",
        "change it, or use format 'raw'",
    ),
    "a chat template of nothing": (
        "DataError",
        student(lambda p: p.model("chat_template.jinja", "")),
        "has no tokens: '1+1='; expected text, and a template that shows it",
    ),
    "no chat template": (
        "DataError",
        student(lambda p: p.model("chat_template.jinja")),
        "has no chat template; use format 'raw'",
    ),
}

WORKDIRS = {
    "another config": (
        "WorkdirError",
        lambda p: p.resume(None, None, "--seed", "1"),
        "to go on from this run, or undo (there -> now): config.seed: 0 -> 1",
    ),
    "a start that is none": (
        "ConfigError",
        lambda p: p.train("--from", f"{p.finished}@3"),
        "has no checkpoint '3'; there are [1, 2] (best: 2)",
    ),
    "a start of more steps": (
        "ConfigError",
        lambda p: p.train("--from", p.finished, "--train.num-steps", "1"),
        "train.num_steps is 1; expected at least 2, the step of",
    ),
    "a start from a model": (
        "WorkdirError",
        lambda p: p.train("--from", p.model()),
        "is not the config of a run",
    ),
    "other data": (
        "WorkdirError",
        lambda p: p.resume(None, None, "--data.source", p.file(ROW * 3)),
        "data.num_prompts: 2 -> 3",
    ),
    "a run at work": (
        "WorkdirError",
        lambda p: p.locked(),
        "is being written by another run; wait for it or choose another --workdir",
    ),
    "a damaged config": (
        "WorkdirError",
        lambda p: p.resume("config.json", b"\xff\xfe"),
        "config.json cannot be read as JSON",
        "start in a new work directory",
    ),
    "no config": (
        "WorkdirError",
        lambda p: p.resume("config.json"),
        "has no config.json, yet it holds checkpoints, eval.jsonl, metrics.jsonl; expected a new "
        "directory",
    ),
    "somebody's models": (
        "WorkdirError",
        lambda p: (p.directory("run/student"), p.file("x", "run/student/x"), p.train())[2],
        "yet it holds student; expected a new directory",
    ),
    "a model": (
        "WorkdirError",
        lambda p: p.train(workdir=p.model()),
        "is not the config of a run: config, data, environment missing",
        "start in a new work directory",
    ),
    "a sweep": (
        "WorkdirError",
        lambda p: p.train(workdir=p.point()),
        "yet it holds point.json; expected a new directory",
    ),
    "a file": (
        "WorkdirError",
        lambda p: p.train(workdir=p.file("x")),
        "rows.jsonl cannot be written: File exists; expected a directory",
    ),
    "inside a file": (
        "WorkdirError",
        lambda p: p.train(workdir=p.file("x") / "run"),
        "cannot be written: Not a directory",
    ),
    "a directory that is shut": (
        "WorkdirError",
        lambda p: p.read_only(),
        "cannot be written: Permission denied",
    ),
    "a bucket": (
        "RemoteError",
        lambda p: ["train", p.experiment, "--workdir", "s3://bucket/run"],
        "s3://bucket/run cannot be read or written; expected a local path or gs://BUCKET/NAME",
    ),
    "damaged metrics": (
        "WorkdirError",
        lambda p: p.resume("metrics.jsonl", b"\xff{\n"),
        "metrics.jsonl, line 1 is damaged",
        "expected a JSON object. Repair it",
    ),
    "lost checkpoints": (
        "WorkdirError",
        lambda p: p.lost_checkpoints(),
        "has metrics up to step 50 and no checkpoint; put checkpoints back or start in a new",
    ),
    "a damaged checkpoint": (
        "UnreadableCheckpointError",
        lambda p: p.damaged_checkpoint(),
        "checkpoints/1 is damaged: ",
        "OUT_OF_RANGE",
        "move it away to use another one (there are [])",
    ),
    "a damaged result": (
        "WorkdirError",
        lambda p: (p.run("result.json", "{"), p.train())[1],
        "result.json cannot be read as JSON",
        "delete it, and opdjax train",
    ),
    "export over something": (
        "CheckpointError",
        lambda p: ["export", p.run(), p.model()],
        "model exists and is not empty; export into a new directory",
    ),
    "export over a file": (
        "CheckpointError",
        lambda p: ["export", p.run(), p.file("x")],
        "is a file or is inside one; export into a new directory",
    ),
    "export to a bucket": (
        "RemoteError",
        lambda p: ["export", p.run(), "s3://b/x"],
        "s3://b/x cannot be read or written",
    ),
    "export of an unknown step": (
        "ConfigError",
        lambda p: ["export", p.run(), p.root / "out", "--step", "-1"],
        "has no checkpoint '-1'; there are [1, 2] (best: 2)",
    ),
}

SWEEPS = {
    "no get_sweep": (
        "ConfigError",
        lambda p: p.sweep(text="x = 1"),
        "sweep.py defines no get_sweep()",
    ),
    "a sweep that is no list": (
        "ConfigError",
        lambda p: p.sweep(text="def get_sweep(): return 3"),
        "returned '3'; expected a list of points",
    ),
    "two points of one name": (
        "ConfigError",
        lambda p: p.sweep("seeds(1)) + points(Config(seed=3), seeds(1)"),
        "points called ['seed=0'], which are repeated",
        "with chain and call opdjax.config.grid.points once",
    ),
    "a point outside the sweep": (
        "ConfigError",
        lambda p: p.sweep(
            text=SWEEP.replace("points(Config(), {})", "[SweepPoint('../x', {{}}, Config())]")
        ),
        "points called ['../x']",
    ),
    "a field that is none": (
        "ConfigError",
        lambda p: p.sweep("vary('train.num_step', (1,))"),
        "varies 'train.num_step', which is no field; did you mean 'train.num_steps'?",
    ),
    "a shard that is none": (
        "ConfigError",
        lambda p: p.sweep("seeds(2)", "--shard", "3/2"),
        "--shard is '3/2'; expected i/n with i from 1 to n, such as 2/3",
    ),
    "a sweep file that changed": (
        "WorkdirError",
        lambda p: p.asked()(
            "seeds(4)[2:]) + points(Config(train=TrainConfig(num_steps=3)), seeds(1)"
        ),
        "goes on from a run of this one (there -> now): train.num_steps: 100 -> 3",
    ),
    "a damaged point": (
        "WorkdirError",
        lambda p: p.asked("seed=1/point.json", "{")(),
        "point.json cannot be read as JSON",
        "delete it, and the command that made the sweep writes it again",
    ),
    "a point of nothing": (
        "WorkdirError",
        lambda p: p.asked("seed=1/point.json", "{}")(),
        "is not a point of a sweep: id, overrides, config missing",
    ),
    "a run as a sweep": (
        "WorkdirError",
        lambda p: (p.run(), p.sweep(workdir="run"))[1],
        "holds a config.json, of a run or a model; expected a directory for the whole sweep",
    ),
    "a sweep in a file": (
        "WorkdirError",
        lambda p: (p.file("x", "sweep"), p.sweep("seeds(2)", "--dry-run"))[1],
        "is a file or lies in one; expected a directory",
    ),
    "a table of a run": (
        "WorkdirError",
        lambda p: ["table", p.run()],
        "holds no points of a sweep; expected a directory given to opdjax sweep --workdir",
    ),
    "a table of a damaged point": (
        "WorkdirError",
        lambda p: ["table", p.point("point.json", "[]")],
        "point.json holds a list; expected an object; delete it",
    ),
    "a table of a damaged result": (
        "WorkdirError",
        lambda p: ["table", p.point("result.json", "")],
        "result.json cannot be read as JSON",
        "writes it again from its last checkpoint",
    ),
    "a table of a result of something else": (
        "WorkdirError",
        lambda p: ["table", p.point("result.json", '{"eval_after": 3}')],
        "result.json is not the result of a run: student missing or of a wrong type; delete it",
    ),
    "a table of damaged metrics": (
        "WorkdirError",
        lambda p: ["table", p.point("metrics.jsonl", "[]\n")],
        "metrics.jsonl, line 1 is damaged: b'[]'",
    ),
}

TABLE = {
    "data": DATA,
    "config": CONFIG,
    "checkpoint": CHECKPOINTS,
    "workdir": WORKDIRS,
    "sweep": SWEEPS,
}
CASES = [
    pytest.param(*case[:2], case[2:], id=f"{area}: {name}")
    for area, cases in TABLE.items()
    for name, case in cases.items()
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment, and a run of it that went to its end."""
    root = tmp_path_factory.mktemp("finished")
    (root / "rows.jsonl").write_text(ROW * 2)
    (root / "experiment.py").write_text(EXPERIMENT.format(rows=str(root / "rows.jsonl")))
    opdjax.train.train(load_experiment(str(root / "experiment.py")), root / "run")
    return root


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """Where a case is made; without a network, and where drawing a single token is a failure."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "datasets" in sys.modules or "pyarrow" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for owner, name in ((opdjax.rollouts.on_policy, "step_rollouts"), (Evaluator, "__call__")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("began to compute"))
    made = Place(tmp_path, finished / "run", finished / "experiment.py", [])
    yield made
    for file in made.open_files:
        file.close()


def contents(root):
    """What every file holds; None for a directory, but that of checkpoints, which orbax makes."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    paths = (path for path in sorted(root.rglob("*")) if path.name != "checkpoints")
    return {str(path.relative_to(root)): digest(path) for path in paths}


@pytest.mark.parametrize(("error", "make", "fragments"), CASES)
def test_a_mistake_is_answered_in_one_message_and_nothing_is_lost(
    error, make, fragments, place, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["opdjax", *map(str, make(place))])
    before, raised, real = contents(place.root), [], main.is_user_error
    classes = lambda error: raised.append(type(error).__name__) or real(error)
    monkeypatch.setattr(main, "is_user_error", classes)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main.main()
    message = smooth(capsys.readouterr().err)
    assert end.value.code == 2
    assert contents(place.root) == before
    assert "Traceback" not in message
    if error is PARSED:
        assert message.count("For full helptext") == 1
    else:
        assert raised == [error] or message.startswith(f"opdjax: {error}")  # a command that is none
        assert f"{error}: " not in message  # for people, who know no classes of Python
        assert message.count("opdjax: ") == 1
    for fragment in fragments:
        assert fragment in message

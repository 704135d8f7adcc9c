"""Published data sets, on hand-written rows with the columns of each, mixtures, decontamination."""

import json
import random

import pytest

from opdjax.config import Config, DataConfig, EvaluationConfig
from opdjax.config.presets import FORMATS, presets, protocol_named
from opdjax.config.validation import ConfigError
from opdjax.data.decontamination import share_words
from opdjax.data.grading import grader_named
from opdjax.data.prompt_rows import Prompt, read_prompts
from opdjax.data.prompts import prompt_ids
from opdjax.data.sources import ColumnMap, DataError

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is $1+1$?\n\nRemember to put your answer on its own line after "Answer:".'
)
CHOICES = {"text": ["Helium", "Iron", "Neon", "Argon"], "label": ["A", "B", "C", "D"]}
SCIENCE = {
    "question": "Which one rusts?",
    "choices": CHOICES,
    "answerKey": "B",
    "type": "mcq-4-choices",
    "domain": "Chemistry",
    "details": {"level": "L1", "task": "t", "subtask": "s"},
}
RAR = {
    "question": "Why is the sky blue?",
    "reference_answer": "Rayleigh scattering.",
    "question_source": "web",
    "rubric": [
        {"description": "Essential Criteria: Names scattering.", "title": "Cause", "weight": 5},
        {"description": "Pitfall Criteria: Says reflection.", "title": "Slip", "weight": -1},
    ],
    "rubric_list": ["Essential Criteria: Names scattering."],
    "rubric_count": 2,
}
PROBLEM = {"problem": "What is $1+1$?", "answer": "2"}
QUESTION = {"question": "What is $1+1$?", "answer": "2"}
GSM8K = {"question": "What is 1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
# kind and name -> (a row as it is published, the question, the answer, the reference)
ROWS = {
    ("preset", "dapo_math_17k"): (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        *("What is $1+1$?", "2", None),
    ),
    ("preset", "dapo_math_14k_en"): (
        {"prompt": "What is $1+1$?", "solution": "2", "data_source": "math_dapo"},
        *("What is $1+1$?", "2", None),
    ),
    ("preset", "gsm8k"): (GSM8K, "What is 1+1?", "2", GSM8K["answer"]),
    ("preset", "math"): (
        {
            "problem": "What is $1+1$?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": r"It is $\boxed{\frac{4}{2}}$.",
        },
        *("What is $1+1$?", r"\frac{4}{2}", r"It is $\boxed{\frac{4}{2}}$."),
    ),
    ("preset", "openthoughts_math"): (
        {
            "problem": "What is $1+1$?",
            "deepseek_reasoning": "Hm.",
            "deepseek_solution": r"Two: \boxed{2}",
            "ground_truth_solution": r"\boxed{2}",
            "domain": "math",
            "source": "numina",
        },
        *("What is $1+1$?", "2", r"Two: \boxed{2}"),
    ),
    ("preset", "deepmath"): (
        {
            "question": "What is $1+1$?",
            "final_answer": "2",
            "difficulty": 1.0,
            "topic": "Algebra",
            "r1_solution_1": "One. 2",
            "r1_solution_2": "Two. 2",
            "r1_solution_3": "Three. 2",
        },
        *("What is $1+1$?", "2", "One. 2"),
    ),
    ("preset", "metamathqa"): (
        {
            "type": "GSM_AnsAug",
            "query": "What is 1+1?",
            "original_question": "What is 1+1?",
            "response": "It is 2.\n#### 2\nThe answer is: 2",
        },
        *("What is 1+1?", "2", "It is 2.\n#### 2\nThe answer is: 2"),
    ),
    ("preset", "sciknoweval"): (
        SCIENCE,
        *("Which one rusts?\n\nA. Helium\nB. Iron\nC. Neon\nD. Argon", "B", None),
    ),
    ("preset", "rar_science"): (RAR, "Why is the sky blue?", None, "Rayleigh scattering."),
    ("preset", "rar_medicine"): (RAR, "Why is the sky blue?", None, "Rayleigh scattering."),
    ("suite", "gsm8k"): (GSM8K, "What is 1+1?", "2", None),
    ("suite", "math500"): (
        PROBLEM | {"solution": "2", "subject": "Algebra", "level": 1, "unique_id": "a/1.json"},
        *("What is $1+1$?", "2", None),
    ),
    ("suite", "aime24"): (
        PROBLEM | {"id": 60, "solution": "2", "url": "u", "year": "2024"},
        *("What is $1+1$?", "2", None),
    ),
    ("suite", "aime25"): (PROBLEM | {"problem_idx": 1, "answer": 2}, "What is $1+1$?", "2", None),
    ("suite", "amc23"): (QUESTION | {"id": 0, "answer": 2.0}, "What is $1+1$?", "2.0", None),
    ("suite", "minerva"): (QUESTION, "What is $1+1$?", "2", None),
    ("suite", "hmmt25"): (PROBLEM | {"problem_idx": 1}, "What is $1+1$?", "2", None),
    ("suite", "hmmt25_nov"): (PROBLEM | {"problem_idx": 1}, "What is $1+1$?", "2", None),
    ("suite", "sciknoweval_chemistry"): (
        SCIENCE,
        *("Which one rusts?\n\nA. Helium\nB. Iron\nC. Neon\nD. Argon", "B", None),
    ),
}
GPQA = {
    "Question": "Which one rusts?",
    "Correct Answer": "Iron\n",
    "Incorrect Answer 1": "Neon",
    "Incorrect Answer 2": "Argon",
    "Incorrect Answer 3": "Helium",
    "Explanation": "Iron oxidises.",
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write without a comma.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{"num_words": None}],
}
MORE = {("suite", "gpqa_diamond"): GPQA, ("suite", "ifeval"): IFEVAL}


def written(tmp_path, *rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_preset_has_rows_here():
    known = {(kind, name) for kind in ("preset", "suite") for name in presets(kind)}
    assert ROWS.keys() | MORE.keys() == known


@pytest.mark.parametrize(("kind", "name"), ROWS, ids="-".join)
def test_a_row_is_read_as_the_set_publishes_it(tmp_path, kind, name):
    row, question, answer, reference = ROWS[kind, name]
    (found,) = read_prompts(f"{kind}:{name}={written(tmp_path, row)}")
    preset = presets(kind)[name]
    assert (found.prompt, found.answer) == (question, answer)
    assert found.references == ((reference,) if preset.reference else ())
    assert found.format == FORMATS[preset.format]
    assert preset.source.startswith("hf:")
    assert preset.licence


@pytest.mark.parametrize(("kind", "name"), [("preset", "dapo_math_17k"), ("preset", "sciknoweval")])
def test_a_table_of_it_is_read_alike(tmp_path, kind, name):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = ROWS[kind, name][0]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    read = [read_prompts(f"{kind}:{name}={tmp_path / 'rows.parquet'}")]
    read += [read_prompts(f"{kind}:{name}={written(tmp_path, row)}")]
    assert read[0] == read[1]


def test_repeats_and_rows_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    row = ROWS["preset", "openthoughts_math"][0]
    others = [row | {"domain": "code"}, row | {"problem": "b", "ground_truth_solution": "none"}]
    file = written(tmp_path, *[row] * 3, *others, row | {"problem": "What  IS $1+1$?"})
    assert len(read_prompts(f"preset:openthoughts_math={file}")) == 1
    out = capsys.readouterr().out
    left_out = (
        "openthoughts_math: 1 rows; left out: 3 that repeat a question, 2 of another domain or"
    )
    assert left_out in out


def test_criteria_of_a_preset_are_read_where_they_are_named(tmp_path):
    file = written(tmp_path, RAR)
    assert read_prompts(f"preset:rar_science={file}")[0].criteria == ()
    (found,) = read_prompts(f"preset:rar_science={file}", ColumnMap(rubric="rubric"))
    assert [(c.weight, c.is_flaw) for c in found.criteria] == [(5, False), (1, True)]


def test_options_are_mixed_the_same_way_each_time_and_have_no_favourite_place(tmp_path):
    rows = [GPQA | {"Question": f"Question {n}?"} for n in range(200)]
    source = f"suite:gpqa_diamond={written(tmp_path, *rows)}"
    found = read_prompts(source)
    assert found == read_prompts(source)
    for row in found:
        assert f"\n{row.answer}. Iron" in row.prompt
    counts = [sum(row.answer == letter for row in found) for letter in "ABCD"]
    assert sum(counts) == 200
    assert min(counts) > 30


def test_an_instruction_row_holds_all_that_its_grader_needs(tmp_path):
    (found,) = read_prompts(f"suite:ifeval={written(tmp_path, IFEVAL)}")
    assert json.loads(found.answer) == IFEVAL
    assert found.format == "{prompt}"


def test_several_suites_are_benchmarks_with_one_grader(tmp_path):
    file = written(tmp_path, PROBLEM)
    two = EvaluationConfig(f"suite:math500={file},aime24={file}")
    assert two.column_names == {"benchmark": "benchmark"}
    found = read_prompts(two.source, ColumnMap(**two.column_names))
    assert [row.benchmark for row in found] == ["math500", "aime24"]
    # A set has whatever columns the other rows of a run have.
    names = ColumnMap("a.question", "final", "worked", "criteria", "of")
    assert read_prompts(two.source, names) == found
    assert read_prompts(two.source, names)[1].benchmark == "aime24"
    assert Config(evaluation=two).grader == "boxed"
    assert Config(evaluation=EvaluationConfig("suite:gpqa_diamond")).grader == "choice"
    training = DataConfig("mix:1*preset:gsm8k+1*preset:math without suite:gpqa_diamond")
    assert Config(data=training, evaluation=EvaluationConfig(None)).grader == "boxed"
    mixed = Config(evaluation=EvaluationConfig("suite:math500,ifeval"))
    with pytest.raises(ConfigError, match="needs the graders boxed, ifeval; expected one"):
        _ = mixed.grader
    with pytest.raises(ConfigError, match="there is no suite:mth500; did you mean 'math500'"):
        read_prompts("suite:mth500")


def test_a_row_is_asked_in_its_own_format_unless_the_config_has_another(tmp_path):
    (row,) = read_prompts(f"suite:math500={written(tmp_path, PROBLEM)}")
    encode = lambda text, **_: [ord(letter) for letter in text]
    tokenizer = type("Letters", (), {"encode": staticmethod(encode)})()
    shown = lambda **own: "".join(
        map(chr, prompt_ids(row, DataConfig(format="raw", **own), tokenizer, "here"))
    )
    assert shown() == FORMATS["boxed"].replace("{prompt}", row.prompt)
    assert shown(prompt_format="Q: {prompt}") == f"Q: {row.prompt}"
    (row,) = read_prompts(f"suite:math500:plain={tmp_path / 'rows.jsonl'}")
    assert shown() == row.prompt
    with pytest.raises(ConfigError, match="no suite:math500:plane; did you mean 'plain'"):
        read_prompts("suite:math500:plane")
    file = written(tmp_path, {"prompt": "a", "prompt_format": "no place"}, name="bad.jsonl")
    with pytest.raises(DataError, match="'prompt_format' is 'no place'; expected a text that"):
        read_prompts(str(file))


def test_a_row_of_another_form_is_named(tmp_path):
    file = written(tmp_path, {"text": "x"})
    with pytest.raises(DataError, match="line 1, read as math500: there is no column 'problem'"):
        read_prompts(f"suite:math500={file}")


# Mixtures


def test_a_mixture_has_the_shares_of_its_weights_without_repeats(tmp_path, capsys):
    a = written(tmp_path, *({"prompt": f"a{n}"} for n in range(100)), name="a.jsonl")
    b = written(tmp_path, *({"prompt": f"b{n}"} for n in range(30)), name="b.jsonl")
    source = f"mix:0.75*{a} + 0.25*{b}"
    found = [row.prompt for row in read_prompts(source)]
    assert len(set(found)) == len(found) == 120
    assert sum(text.startswith("a") for text in found) == 90
    assert f"mixture: 30 of 30 rows of {b}" in capsys.readouterr().out
    assert found == [row.prompt for row in read_prompts(source)]
    # Not the first rows: a file may be sorted.
    some = [row.prompt for row in read_prompts(f"mix:1*{a}+1*{b}")]
    assert some[:30] != [f"a{n}" for n in range(30)]


@pytest.mark.parametrize("text", ["mix:a.jsonl", "mix:1*a.jsonl", "mix:0*a.jsonl+1*b.jsonl"])
def test_what_is_no_mixture_is_refused(text):
    with pytest.raises(DataError, match="has no two parts with a weight; expected mix:WEIGHT"):
        read_prompts(text)


# Decontamination


def test_questions_that_share_words_with_the_evaluation_are_left_out(tmp_path, capsys):
    held = "Anna has three red apples and gives one of them to her brother Ben today"
    rows = [held, f"Note: {held.upper()}!", held.replace("brother", "sister"), "1+1="]
    data = written(tmp_path, *({"question": text, "answer": "2"} for text in rows))
    test = written(tmp_path, *({"problem": t, "answer": "2"} for t in (held, "1 + 1 =")), name="t")
    source = f"{data} without suite:math500={test.rename(tmp_path / 'test.jsonl')}"
    columns = ColumnMap("question")
    assert [row.prompt for row in read_prompts(source, columns)] == rows[2:]
    out = capsys.readouterr().out
    assert f"left out 2 of 4 rows of {data}: they share 13 words in a row" in out
    assert [row.prompt for row in read_prompts(f"{source} by 9", columns)] == rows[3:]


def test_shared_words_equal_a_search_of_all_pairs():
    words = random.Random(0)
    draw = lambda: " ".join(words.choices("abc", k=words.randint(1, 9)))
    prompts, held_out = [draw() for _ in range(60)], [draw() for _ in range(8)]
    for size in (3, 4):

        def is_shared(prompt, other, size=size):
            one, two = prompt.split(), other.split()
            if min(len(one), len(two)) < size:
                return one == two
            at = range(len(two) - size + 1)
            runs = [two[n : n + size] for n in at]
            return any(one[n : n + size] in runs for n in range(len(one) - size + 1))

        expected = [any(is_shared(p, other) for other in held_out) for p in prompts]
        assert share_words(prompts, held_out, size) == expected
        assert 0 < sum(expected) < 60


def test_conversations_are_compared_by_what_the_user_says():
    turns = ({"role": "system", "content": "be short"}, {"role": "user", "content": "Hello  there"})
    assert share_words([turns, "hello"], ["HELLO there"]) == [True, False]


# Protocols


@pytest.mark.parametrize("name", ["default", "vopd_math", "vopd_science", "ropd"])
def test_protocols_are_valid_and_name_known_suites(name):
    suites, data, evaluation = protocol_named(name)
    assert set(suites) <= set(presets("suite"))
    assert evaluation.num_prompts > 10_000
    if name == "vopd_science":
        assert grader_named("choice")('{"answer": "B"}', "B")
        assert data.prompt_format.endswith('{"answer": "LETTER"}.')
    samples, length = {"ropd": (16, 32768)}.get(name, (8, 4096))
    assert (evaluation.num_samples, evaluation.max_completion_length) == (samples, length)


def test_another_protocol_is_refused():
    with pytest.raises(ConfigError, match="there is no protocol 'vopd'; did you mean 'ropd'"):
        protocol_named("vopd")


def test_formats_do_not_change_what_identifies_a_row():
    assert repr(Prompt("a", format="Q: {prompt}")) == repr(Prompt("a"))

"""The part of "RubricEM: Meta-RL with Rubric-guided Policy Decomposition beyond Verifiable Rewards"
(arXiv 2605.10899) that needs no tools.
"""

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row, numbers

PAPER = "RubricEM, arXiv 2605.10899"
_LONG_FORM = tuple(
    PaperColumn(name, "", {}, 1, "%")
    for name in ("HealthBench", "ResearchQA", "DRB", "ResearchRubrics", "average")
)
_STAGES = PaperColumn(
    "Qwen3-4B in stages, average", "avg@k:mean", {"pair": "qwen3_4b_stages"}, 100, "%"
)
_MINI = PaperColumn("mini pair, avg@8", labels={"pair": "mini"})
_TOOLS = "a research agent with search tools, which are not implemented here"

STAGES = PaperTable(
    name="rubricem_stages",
    paper=PAPER,
    title="Credit for an answer's stages against credit for the whole answer",
    settings=(
        "Qwen3-8B as a research agent with search, 4.9 thousand queries, 32 x 8 rollouts a step, "
        "lr 5e-7, 600 steps for ablations"
    ),
    columns=(*_LONG_FORM, _STAGES, _MINI),
    rows=(
        Row("answer-only", {"arm": "ropd"}, note="one score for the whole answer: GRPO on rubrics"),
        Row(
            "stage-structured",
            {"arm": "ropd_stages"},
            note="SS-GRPO: a score per stage, credited with the scores of later stages",
        ),
        Row("RubricEM-8B SFT", None, numbers(_LONG_FORM, (39.0, 71.8, 43.0, 42.8, 49.2)), _TOOLS),
        Row(
            "RubricEM-8B RL",
            None,
            numbers(_LONG_FORM, (49.3, 74.5, 47.8, 50.3, 55.5)),
            f"1,400 steps; {_TOOLS}",
        ),
        Row(
            "DR Tulu-8B RL",
            None,
            numbers(_LONG_FORM, (50.2, 74.3, 43.4, 46.4, 53.6)),
            f"1,900 steps; {_TOOLS}",
        ),
        Row(
            "reflection meta-policy",
            None,
            note="alone and with stages: the paper's bars were not recovered, and there is no "
            "meta-policy here",
        ),
    ),
    claims=(
        PaperClaim(
            "more",
            "credit by stages is better than credit for the answer alone",
            "stage-structured",
            "answer-only",
            _STAGES.label,
        ),
    ),
    notes=(
        "The paper's ablation is a figure whose bars were not recovered; its text says answer-only "
        "< stage-structured on every benchmark.",
        "Here the stages of a worked solution replace those of its agent, without tools, memory "
        "bank or meta-policy.",
    ),
)

TABLES = (STAGES,)

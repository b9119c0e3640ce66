"""The tables of docs/objective.md are those of the code, and their proofs are tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.objectives.catalogue import Catalogue, Description
from opd_megatron.objectives.page import BEGIN, CATALOGUES, END, renewed, tables
from tests.docs.declared import named_tests, train_flags

ROOT = Path(__file__).parents[2]
ROWS = [row for catalogue in CATALOGUES for row in catalogue.descriptions]


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "objective.md").read_text(encoding="utf-8")
    assert page == renewed(page), "run python -m opd_megatron.objectives.page docs/objective.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_names_flags_and_a_proof_that_exist(row: Description) -> None:
    flags = {word.strip("[]") for word in row.flag.split() if "--" in word}
    assert flags <= train_flags()
    file, _, name = row.proof.partition("::")
    assert name in named_tests(file if "/" in file else f"objectives/{file}")
    assert row.formula
    assert "|" not in f"{row.name}{row.flag}{row.formula}{row.source}"


NAMED = {
    "--advantage-estimator", "--custom-advantage-path", "--custom-loss-path", "--disable-grpo-std-normalization",
    "--entropy-coef", "--eps-clip-c", "--eps-clip-high", "--kl-coef", "--kl-loss-type", "--loss-length-divisor",
    "--calculate-per-token-loss", "--normalize-advantages", "--opd-alpha", "--opd-baseline", "--opd-divergence",
    "--opd-divergence-mix", "--opd-divergence-schedule", "--opd-divergence-to", "--opd-entropy-aware",
    "--opd-importance", "--opd-include-prompt", "--opd-jsd-beta", "--opd-jsd-beta-end", "--opd-jsd-scaled",
    "--opd-kl-coef", "--opd-kl-coef-end", "--opd-kl-coef-rollouts", "--opd-kl-discount", "--opd-kl-loss-type",
    "--opd-log-ratio-clip", "--opd-loss", "--opd-mask-longer-than", "--opd-mask-special-tokens",
    "--opd-mask-truncated", "--opd-on",
    "--opd-paced-alpha", "--opd-paced-beta", "--opd-pass-rate", "--opd-prefix-len", "--opd-prompt-weight",
    "--opd-ref-load", "--opd-reward-beta", "--opd-reward-scale", "--opd-self-context-key", "--opd-self-template",
    "--opd-skew", "--opd-student-data-fraction", "--opd-support", "--opd-tail", "--opd-teacher",
    "--opd-teacher-mixture", "--opd-teacher-weights", "--opd-temperature", "--opd-token-ratio", "--opd-token-score",
    "--opd-token-select", "--opd-top-k", "--policy-loss", "--ppo-epochs", "--rm-type", "--tis-level", "--tis-mode",
    "--use-kl-loss", "--use-opsm", "--use-tis", "--value-clip",
}  # fmt: skip
"""Flags that make an objective, or another of it."""


def test_every_flag_of_an_objective_is_in_a_table() -> None:
    shown = {word.strip("[]") for row in ROWS for word in row.flag.split()}
    assert sorted(NAMED - shown) == []
    for choice in ("student_topk", "teacher_topk", "bucket", "renormalized", "kl", "optimal", "running", "metadata"):
        assert choice in shown


def test_every_choice_has_a_row_of_its_own() -> None:
    for catalogue in CATALOGUES:
        flags = [row.flag for row in catalogue.descriptions]
        assert len(set(flags)) == len(flags)
        for name in catalogue:
            assert any(flag.startswith(f"{catalogue.flag} {name}") for flag in flags)


def test_a_page_is_rewritten_between_its_marks_only() -> None:
    page = f"before\n{BEGIN}\nwhatever\n{END}\nafter\n"
    assert renewed(page) == f"before\n{BEGIN}\n\n{tables()}\n{END}\nafter\n"
    with pytest.raises(ValueError, match="no place for the tables"):
        renewed(page + END)


def test_a_name_is_registered_once() -> None:
    catalogue: Catalogue[int] = Catalogue("Numbers", "--number")
    row = {"formula": "1", "source": "", "proof": "test_page.py::test_a_name_is_registered_once"}
    assert catalogue.register("one", 1, title="one", **row) == 1
    with pytest.raises(ValueError, match="--number one is registered twice"):
        catalogue.register("one", 2, title="another", **row)
    assert dict(catalogue) == {"one": 1}

"""The tables of docs/objective.md are those of the code, and their proofs are tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from opd_megatron.objectives.catalogue import Catalogue, Description
from opd_megatron.objectives.page import BEGIN, CATALOGUES, END, renewed, tables
from tests.docs.declared import train_flags

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
    tree = ast.parse((ROOT / "tests" / "objectives" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert row.formula
    assert "|" not in f"{row.name}{row.flag}{row.formula}{row.source}"


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

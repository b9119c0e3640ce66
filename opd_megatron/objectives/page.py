"""The tables of objectives in docs/objective.md, made of what the code says where it registers them.

``python -m opd_megatron.objectives.page docs/objective.md`` rewrites the part of the page between its two marks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.corrections import CORRECTIONS
from opd_megatron.objectives.distribution import DIVERGENCES
from opd_megatron.objectives.estimators import ADVANTAGE_ESTIMATORS
from opd_megatron.objectives.kl import KL_LOSSES
from opd_megatron.objectives.opd_losses import OPD_LOSSES
from opd_megatron.objectives.policy_loss import POLICY_LOSSES
from opd_megatron.objectives.sample_weights import PROMPT_WEIGHTS
from opd_megatron.objectives.targets import TARGETS
from opd_megatron.objectives.token_selection import TOKEN_SCORES, TOKEN_SELECTIONS
from opd_megatron.objectives.values import VALUE_LOSSES
from opd_megatron.objectives.weights import AGGREGATIONS

CATALOGUES: tuple[Catalogue[Any], ...] = (
    OPD_LOSSES,
    TARGETS,
    DIVERGENCES,
    TOKEN_SCORES,
    TOKEN_SELECTIONS,
    PROMPT_WEIGHTS,
    ADVANTAGE_ESTIMATORS,
    VALUE_LOSSES,
    POLICY_LOSSES,
    CORRECTIONS,
    AGGREGATIONS,
    KL_LOSSES,
)
"""Every table of the page, in its order."""

BEGIN = "<!-- objectives: written by python -m opd_megatron.objectives.page -->"
END = "<!-- end of objectives -->"


def tables(catalogues: Sequence[Catalogue[Any]] = CATALOGUES) -> str:
    """Markdown: a heading and a table for each catalogue."""
    return "\n".join(_table(catalogue) for catalogue in catalogues)


def _table(catalogue: Catalogue[Any]) -> str:
    lines = [f"### {catalogue.title}", "", "| objective | flag | formula | source | proof |", "|---|---|---|---|---|"]
    for row in catalogue.descriptions:
        flag = f"`{row.flag}`" if row.flag.startswith("--") else row.flag
        test = row.proof.partition("::")
        lines.append(f"| {row.name} | {flag} | {row.formula} | {row.source} | `{test[0]}`: `{test[2]}` |")
    return "\n".join(lines) + "\n"


def renewed(page: str) -> str:
    """The page with the tables between its marks; raises ``ValueError`` if it has not exactly one pair of them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page has no place for the tables: {BEGIN} and {END}")
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(renewed(target.read_text(encoding="utf-8")), encoding="utf-8")

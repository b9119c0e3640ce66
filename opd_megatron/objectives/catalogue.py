"""Objectives together with what the documentation says of them: formula, source and the test that proves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Description:
    """A row of the table of objectives.

    ``name`` is the field's name, ``flag`` what the user types, ``formula`` words and LaTeX between dollars in the
    notation of docs/objective.md (``|`` ends a cell, so there is none), ``source`` a paper, ``proof`` the test that
    shows it, as ``file.py::test`` in tests/objectives or ``folder/file.py::test`` in tests.
    """

    name: str
    flag: str
    formula: str
    source: str
    proof: str


class Catalogue(Mapping[str, T], Generic[T]):
    """The choices of ``flag`` by name, each with its description; ``catalogue[name]`` is what was registered.

    Rows of its table that are no choice of the flag, such as an option that extends several choices, come in by
    :meth:`describe`.
    """

    def __init__(self, title: str, flag: str) -> None:
        self.title = title
        self.flag = flag
        self.descriptions: list[Description] = []
        self._entries: dict[str, T] = {}

    def register(
        self, name: str, entry: T, *, title: str, formula: str, source: str, proof: str, more_flags: str = ""
    ) -> T:
        """Add the choice ``name`` and return ``entry``; raises ``ValueError`` if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.flag} {name} is registered twice")
        self._entries[name] = entry
        self.describe(title, f"{self.flag} {name} {more_flags}".strip(), formula=formula, source=source, proof=proof)
        return entry

    def describe(self, title: str, flag: str, *, formula: str, source: str, proof: str) -> None:
        """Add a row to the table without a choice of its own."""
        self.descriptions.append(Description(title, flag, formula, source, proof))

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

"""Flags, error messages, links and numbers in README and docs, against the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from opd_megatron.config.options import OpdOptions
from tests.docs.declared import (
    PAGES,
    ROOT,
    TOOLS,
    argparse_flags,
    flag_text,
    source_texts,
    tool_flags,
    train_flags,
)

FOREIGN = {
    "--context-length": "sglang",
    "--enable-deterministic-inference": "sglang",
    "--local-dir": "hf",
    "--max-running-requests": "sglang",
    "--mem-fraction-static": "sglang",
    "--model-path": "sglang",
    "--nproc-per-node": "torchrun",
    "--port": "sglang",
}
"""Flags of other people's programs that the documentation names."""

EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def known_flags() -> set[str]:
    known = train_flags() | argparse_flags(ROOT / "opd_megatron" / "servers.py") | set(FOREIGN)
    for tool in TOOLS.values():
        known |= tool_flags(tool).keys()
    return known


@EACH_PAGE
def test_every_flag_exists(page: Path) -> None:
    """A group of flags, ``--opd-*``, and the arrows of a drawing are none."""
    mentioned = set(re.findall(r"(?<![\w-])--[a-z](?:-?[a-z0-9])*(?![\w*-])", page.read_text(encoding="utf-8")))
    assert sorted(mentioned - known_flags()) == []


def test_the_readme_names_every_option_of_distillation() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]*?) *\|", text, re.MULTILINE))
    declared = {flag_text(item.name): item.default for item in dataclasses.fields(OpdOptions)}
    assert rows.keys() == declared.keys()
    for flag, default in declared.items():
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert float(rows[flag]) == default


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@EACH_PAGE
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} does not exist"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_quoted_messages_are_those_of_the_code() -> None:
    """First column of the tables headed ``message``; ``...`` stands for what varies."""
    text = "\n".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("troubleshooting.md", "rollout.md")
    )
    messages = [
        message
        for table in re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
        for message in re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    ]
    assert len(messages) > 25
    sources = source_texts()
    for message in messages:
        for fragment in message.split("..."):
            assert any(fragment.strip() in source for source in sources), f"no message of the code says {fragment!r}"


def test_named_files_of_the_package_exist() -> None:
    """``room/file.py`` in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)?\.py|[a-z_]+/)`", text)
    named.remove("opd_megatron/")
    rooms = [name for name in named if name.endswith("/")]
    for name in named:
        places = [ROOT / name, ROOT / "opd_megatron" / name, *(ROOT / "opd_megatron" / room / name for room in rooms)]
        assert any(place.exists() for place in places), name
    package = ROOT / "opd_megatron"
    assert {f"{item.parent.name}/" for item in package.glob("*/__init__.py")} <= set(rooms)


@EACH_PAGE
def test_no_number_is_left_out(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")

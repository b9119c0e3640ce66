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
    named_tests,
    source_texts,
    tool_flags,
    train_flags,
)
from tests.docs.messages import VARIES, messages, says

FOREIGN = {
    "--address": "ray",
    "--admin-api-key": "sglang",
    "--api-key": "sglang",
    "--context-length": "sglang",
    "--enable-deterministic-inference": "sglang",
    "--head": "ray",
    "--load-format": "sglang",
    "--local-dir": "hf",
    "--max-running-requests": "sglang",
    "--mem-fraction-static": "sglang",
    "--model-path": "sglang",
    "--nproc-per-node": "torchrun",
    "--num-gpus": "ray",
    "--port": "sglang",
    "--skip-tokenizer-init": "sglang",
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


def test_a_table_names_every_option_of_distillation_and_its_default() -> None:
    """In README.md or one of the pages; a table's second column is the default."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    rows = [row for text in texts for row in re.findall(r"^\| `(--opd-[a-z-]+)` \| ([^|]*?) *\|", text, re.MULTILINE)]
    declared = {flag_text(item.name): item.default for item in dataclasses.fields(OpdOptions)}
    del declared["--use-opd"]
    assert {flag for flag, _ in rows} == declared.keys()
    for flag, shown in rows:
        default = declared[flag]
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert float(shown) == default, flag


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


def quoted_messages(page: str) -> list[str]:
    """First column of the tables headed ``message``; ``...`` stands for what varies."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        message
        for table in re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
        for message in re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    ]


@pytest.mark.parametrize(
    ("page", "least"), [("troubleshooting.md", 20), ("teacher_troubleshooting.md", 20), ("rollout.md", 9)]
)
def test_quoted_messages_are_those_of_the_code(page: str, least: int) -> None:
    quoted = quoted_messages(page)
    assert len(quoted) > least
    sources = [*source_texts(), *(path.read_text() for path in (ROOT / "examples").rglob("*.sh"))]
    for message in quoted:
        for fragment in message.split(VARIES):
            assert any(fragment.strip() in source for source in sources), f"no message of the code says {fragment!r}"


PACKAGE = ROOT / "opd_megatron"
WHO_SPEAKS = {
    "teacher_troubleshooting.md": [
        *sorted((PACKAGE / "teacher").glob("*.py")),
        PACKAGE / "http_client.py",
        *(PACKAGE / "flow" / name for name in ("failures.py", "pipeline.py", "student_ids.py", "target_models.py")),
    ],
    "rollout.md": [*sorted((PACKAGE / "rollout").glob("sglang_*.py")), *(PACKAGE / "rollout").glob("weight_*.py")],
}
"""Modules of the preflight and the client of a teacher and of the SGLang engine, by the page with their messages."""


@pytest.mark.parametrize("page", WHO_SPEAKS)
def test_every_message_about_a_server_has_an_entry(page: str) -> None:
    """What these modules raise, and warn of."""
    entries = quoted_messages(page)
    found = {path.name: messages(path) for path in WHO_SPEAKS[page]}
    assert sum(map(len, found.values())) > 25
    missing = [
        f"{name}: {text}"
        for name, texts in found.items()
        for text in texts
        if not any(says(text, entry) for entry in entries)
    ]
    assert missing == []


def test_the_messages_of_a_module_are_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "def f(x) -> str | None:\n"
        "    if x > 3:\n"
        "        raise UserError(f'the number {x} is too large')\n"
        "    text = f'number {x} is odd, indeed'\n"
        "    yield Finding('numbers', text, warning=True)\n"
        "    yield Finding('numbers', 'everything is as it should')\n"
        "    logger.warning('number %d is strange', x)\n"
        "    return f'number {x} was returned'\n"
    )
    found = messages(tmp_path / "module.py")
    assert sorted(found) == [
        "number ... is odd, indeed", "number ... is strange", "number ... was returned", "the number ... is too large",
    ]  # fmt: skip
    assert says("the number ... is too large", "number ... large")
    assert not says("the number ... is too large", "large ... number")
    assert not says("the number ... is too large", "number ... small")


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
def test_named_tests_exist(page: Path) -> None:
    """```file.py`: `test_name```, the file in tests/objectives or, with a folder, in tests."""
    for file, name in re.findall(r"`((?:\w+/)?test_\w+\.py)`: `(\w+)`", page.read_text(encoding="utf-8")):
        assert name in named_tests(file if "/" in file else f"objectives/{file}"), f"{file} has no {name}"


def test_every_mutation_has_a_test_that_notices_it() -> None:
    text = (ROOT / "docs" / "objective.md").read_text(encoding="utf-8")
    section = text.partition("## What would be noticed\n")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ") and "test_" in row]
    assert len(rows) >= 10
    assert all(re.search(r"\| `(?:\w+/)?test_\w+\.py`: `test_\w+` \|$", row) for row in rows)


def formulas(text: str) -> list[str]:
    """Inline and display formulas of a page; code is none."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "`code`", text, flags=re.DOTALL)
    display = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    inline = re.findall(r"\$([^$]+)\$", re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL))
    return [*display, *inline]


@EACH_PAGE
def test_formulas_survive_githubs_markdown(page: Path) -> None:
    """It takes a backslash before punctuation for an escape, ``\\,`` for a comma, before it looks at the formula."""
    found = formulas(page.read_text(encoding="utf-8"))
    assert [formula for formula in found if re.search(r"\\[!-/:-@\[-`{-~]", formula)] == []
    assert [formula for formula in found if "\n" in formula.strip() and formula[0] != "\n"] == []


def test_formulas_are_found_between_code() -> None:
    text = "a $x$, `$no$` and\n\n$$\ny\\,z\n$$\n\n```text\n$neither\n```\n$u$\n"
    assert formulas(text) == ["\ny\\,z\n", "x", "u"]


@EACH_PAGE
def test_no_number_is_left_out(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")

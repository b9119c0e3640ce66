from __future__ import annotations

import logging

import pytest

from opd_megatron.observe.log import configure_logging


@pytest.fixture(autouse=True)
def _restore_logging():
    package, root = logging.getLogger("opd_megatron"), logging.getLogger()
    before = package.level, root.level, root.handlers[:]
    yield
    package.setLevel(before[0])
    root.setLevel(before[1])
    root.handlers[:] = before[2]


def test_our_messages_and_others_warnings_once_each(capsys):
    configure_logging()
    configure_logging()
    logging.getLogger("opd_megatron.loop").info("step done")
    logging.getLogger("opd_megatron.loop").debug("detail")
    logging.getLogger("another").info("chatter")
    logging.getLogger("another.core").warning("low memory")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["step done", "another.core: low memory"]

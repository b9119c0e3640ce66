"""Flags that are handed on to SGLang's server."""

from __future__ import annotations

import pytest

from opd_megatron.config.checks import mask_server_flags, server_flags


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--api-key x", "--api-key"),
        ("--api-ke x", "--api-key"),
        ("--admin-api-key=x", "--admin-api-key"),
        ("--ssl-keyfile-pass x", "--ssl-keyfile-password"),
        ("--log-level info --tensor-parallel 2", "--tensor-parallel-size"),
        ("--model-pat x", "--model-path"),
        ("--model x", "--model"),
        ("--tp 2", "--tp"),
    ],
)
def test_what_the_engine_sets_is_refused_also_where_it_is_abbreviated(flags: str, refused: str) -> None:
    assert str(server_flags(flags)).startswith(f"{refused} is set already: ")
    assert (mask_server_flags(flags) == "***") == any(word in refused for word in ("key", "password"))


@pytest.mark.parametrize("flags", ["--max-running-requests 128", "--model-loader-extra-config {}", "--tpx 1", "-v", ""])
def test_other_flags_are_the_servers(flags: str) -> None:
    assert server_flags(flags) is None
    assert mask_server_flags(flags) == flags

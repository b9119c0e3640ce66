"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# the same examples in each run, and none is too slow on a busy machine
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

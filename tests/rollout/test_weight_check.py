"""The comparison of two scorers of one text."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.config.errors import RunError
from opd_megatron.rollout.weight_check import PROBE_TOKENS, TOLERANCES, WeightCheck, probe_tokens

GENERATOR = np.random.default_rng(3)
FIRST = -GENERATOR.exponential(3.0, size=95)


def moved(values: np.ndarray, size: float) -> np.ndarray:
    return values + size * np.random.default_rng(4).standard_normal(len(values))


def test_every_token_of_a_small_vocabulary_is_probed() -> None:
    assert sorted(probe_tokens([], 18, 64).tolist()) == list(range(18))
    tokens = probe_tokens([5] * 200, 1000, 4096)
    assert tokens.tolist()[: PROBE_TOKENS // 2] == [5] * (PROBE_TOKENS // 2)
    assert len(set(tokens.tolist()[PROBE_TOKENS // 2 :])) == len(tokens) - PROBE_TOKENS // 2 == PROBE_TOKENS // 2
    assert len(probe_tokens([5, 6], 1000, 10)) == 10
    assert probe_tokens([5000, 6], 1000, 10)[0] == 6


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_rounding_passes_and_the_step_after_it_too(dtype: str, noise: float) -> None:
    check = WeightCheck(TOLERANCES[dtype])
    for step in range(4):
        trainer = moved(FIRST, 0.2 * step)
        check.compare(moved(trainer, noise * (step - 1.5)), trainer, str(step), "server")
    check.compare(moved(trainer, noise), trainer, "the same", "server")


@pytest.mark.parametrize(("dtype", "step"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_an_engine_that_stands_still_is_found_below_the_tolerance(dtype: str, step: float) -> None:
    check = WeightCheck(TOLERANCES[dtype])
    check.compare(FIRST, FIRST, "1", "server")
    check.compare(FIRST, moved(FIRST, 1e-3 * TOLERANCES[dtype].movement), "2", "server")
    with pytest.raises(RunError, match=r"server: after the update to weights 3 it still speaks with weights 1"):
        check.compare(FIRST, moved(FIRST, step), "3", "server")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_an_engine_that_loses_every_one_of_many_small_steps_is_found(dtype: str) -> None:
    check, step = WeightCheck(TOLERANCES[dtype]), 0.5 * TOLERANCES[dtype].movement
    follower = WeightCheck(TOLERANCES[dtype])
    check.compare(FIRST, FIRST, "0", "server")
    for version in range(6):
        trainer = moved(FIRST, step * version)
        follower.compare(trainer, trainer, str(version), "server")

    def lose_all() -> None:
        for version in range(6):
            check.compare(FIRST, moved(FIRST, step * version), str(version), "server")

    with pytest.raises(RunError, match="it still speaks with weights 0"):
        lose_all()


@pytest.mark.parametrize("value", [np.nan, -9.0])
def test_a_gap_is_an_error_with_its_numbers(value: float) -> None:
    engine = FIRST.copy()
    engine[7] = value
    pattern = "most at token 8" if np.isfinite(value) else "differ by nan"
    with pytest.raises(RunError, match=pattern):
        WeightCheck(TOLERANCES["float32"]).compare(engine, FIRST, "1", "server")


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5])
def test_honest_updates_of_any_size_pass_whatever_the_rounding(step: float, noise: float) -> None:
    """In each update every token moves its own way, and each scoring rounds in its own."""
    generator = np.random.default_rng(7)
    for _ in range(20):
        check, trainer = WeightCheck(TOLERANCES["float32"]), FIRST.copy()
        for version in range(12):
            trainer = trainer + step * generator.standard_normal(len(trainer))
            engine = trainer + noise * generator.standard_normal(len(trainer))
            check.compare(engine.astype(np.float32), trainer.astype(np.float32), str(version), "server")


@pytest.mark.parametrize("step", [1e-5, 1e-4, 5e-4])
def test_an_update_of_which_most_is_missing_is_found_though_the_engine_moved(step: float) -> None:
    """The log-probabilities agree within their tolerance all the while; what is missing adds up."""
    generator = np.random.default_rng(8)
    check, trainer, engine = WeightCheck(TOLERANCES["float32"]), FIRST.copy(), FIRST.copy()

    def update(versions: int, arrives: float) -> None:
        nonlocal trainer, engine
        for version in range(versions):
            change = step * generator.standard_normal(len(trainer))
            trainer, engine = trainer + change, engine + arrives * change
            rounded = engine + 1e-6 * generator.standard_normal(len(engine))
            check.compare(rounded, trainer, str(version), "server")

    update(3, arrives=1.0)
    with pytest.raises(RunError, match="a part of it is missing: token by token"):
        update(60, arrives=0.3)

"""What is measured at each token, against dense float64 arithmetic on the logits of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opd_megatron.megatron.gradient_diagnostics import prompt_halves
from opd_megatron.objectives.diagnostics import OF_STUDENT
from opd_megatron.questions import LogProbs, StudentTokens
from opd_megatron.sample import TeacherScores
from tests.megatron.support import (
    load_reference,
    make_samples,
    make_trainer,
    reference_logits,
    save_reference,
    tiny_config,
)

TEMPERATURE, TOP_K = 0.7, 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    larger = tiny_config("qwen3", hidden_size=48, num_attention_heads=6)
    return save_reference(root / "student", tiny_config("qwen3")), save_reference(root / "teacher", larger, seed=4)


def test_whole_distributions(folders: tuple[Path, Path]) -> None:
    student, teacher = folders
    trainer = make_trainer(
        student, teacher=teacher, use_opd=True, rollout_temperature=TEMPERATURE, opd_diagnostics_top_k=TOP_K
    )
    samples = make_samples(0)
    trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    found = trainer.ask(StudentTokens(diagnostics=True), samples)
    models = [load_reference(folder, torch.float64) for folder in folders]
    for place, sample in enumerate(samples):
        if not sample.response_length:
            assert len(found[place]) == 0
            continue
        with torch.no_grad():
            s, t = ((reference_logits(model, sample) / TEMPERATURE).log_softmax(-1) for model in models)
        m = torch.logaddexp(s, t) - np.log(2)
        top_s, top_t = (logs.topk(TOP_K).indices for logs in (s, t))
        expected = {
            "student_log_prob": s.gather(1, torch.from_numpy(sample.response_tokens)[:, None])[:, 0],
            "student_entropy": -(s.exp() * s).sum(-1),
            "reverse_kl": (s.exp() * (s - t)).sum(-1),
            "forward_kl": (t.exp() * (t - s)).sum(-1),
            "jsd": (t.exp() * (t - m) + s.exp() * (s - m)).sum(-1) / 2,
            "teacher_entropy": -(t.exp() * t).sum(-1),
            "teacher_mass": t.exp().gather(1, top_s).sum(-1),
            "student_mass": s.exp().gather(1, top_t).sum(-1),
            "overlap": torch.tensor(
                [len({*a} & {*b}) / TOP_K for a, b in zip(top_s.tolist(), top_t.tolist(), strict=True)]
            ),
        }
        assert set(found[place].dtype.names or ()) == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[place][name], values.numpy(), rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("prompts", [False, True])
def test_all_wants_are_met_by_one_pass_as_each_by_its_own(folders: tuple[Path, Path], prompts: bool) -> None:
    whole = {"opd_loss": "distribution", "opd_include_prompt": prompts, "opd_token_select": "sample"}
    trainer = make_trainer(folders[0], teacher=folders[1], use_opd=True, opd_token_score="soft_or", **whole)
    samples = make_samples(0)
    trainer.ask(LogProbs("teacher", keep_hidden=True), samples)
    passes: list[int] = []
    trainer.student.register_forward_hook(lambda *_: passes.append(len(passes)))

    def ask(**wants: bool) -> list[np.ndarray]:
        passes.clear()
        found = trainer.ask(StudentTokens(**wants), samples)
        assert len(passes) == 4  # micro-batches
        return [found[place] for place in range(len(samples))]

    plain, chosen, measured = ask(), ask(divergence=True), ask(diagnostics=True)
    for place, both in enumerate(ask(divergence=True, diagnostics=True)):
        assert set(both.dtype.names or ()) == {*(chosen[place].dtype.names or ()), *(measured[place].dtype.names or ())}
        for alone in (chosen[place], measured[place]):
            for name in alone.dtype.names or ():
                np.testing.assert_array_equal(both[name], alone[name])
        assert plain[place].dtype.names == OF_STUDENT
        for name in OF_STUDENT:
            np.testing.assert_allclose(plain[place][name], both[name], rtol=0, atol=1e-6)


def test_a_servers_record(folders: tuple[Path, Path]) -> None:
    """Without the teacher itself: the student's mass on the listed tokens, and how many it finds likeliest, too."""
    trainer = make_trainer(folders[0], use_opd=True)
    samples = make_samples(1)
    random = np.random.default_rng(0)
    for sample in samples:
        length = sample.response_length
        ids = np.array([random.permutation(53)[:4] for _ in range(length)], dtype=np.int32).reshape(length, 4)
        sample.teacher_scores = TeacherScores(log_probs_T=np.zeros(length), top_ids_TK=ids)
    found = trainer.ask(StudentTokens(diagnostics=True), samples)
    model = load_reference(folders[0], torch.float64)
    for place, sample in enumerate(samples):
        assert found[place].dtype.names == ("student_log_prob", "student_entropy", "student_mass", "overlap")
        if not sample.response_length:
            continue
        assert sample.teacher_scores is not None
        ids = torch.from_numpy(np.asarray(sample.teacher_scores.top_ids_TK)).long()
        with torch.no_grad():
            probs = reference_logits(model, sample).softmax(-1)
        np.testing.assert_allclose(found[place]["student_mass"], probs.gather(1, ids).sum(-1).numpy(), rtol=1e-4)
        shared = (probs.topk(4).indices[:, :, None] == ids[:, None]).any(-1).double().mean(-1)
        np.testing.assert_allclose(found[place]["overlap"], shared.numpy())


def test_halves_do_not_cut_a_prompt() -> None:
    samples = make_samples(0)
    first, second = prompt_halves(samples)
    assert first | second == set(range(len(samples)))
    assert not {samples[place].group_index for place in first} & {samples[place].group_index for place in second}
    assert prompt_halves(samples[:3]) == ({0, 2}, {1})

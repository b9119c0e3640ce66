"""Self-distillation from feedback: what the teacher sees comes after the reward, and who has none is not taught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.own_objectives.feedback import right_sibling
from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from opd_megatron.data.tokenizer import train_bpe_tokenizer
from opd_megatron.flow import FailurePolicy, Stages, StudentIdsTeacher
from opd_megatron.flow.feedback import FeedbackPrompts, feedback_prompts
from opd_megatron.flow.filters import unequal_rewards
from opd_megatron.flow.masking import complete_masked, complete_unscored, leave_out
from opd_megatron.reward import RewardError
from opd_megatron.sample import Sample, TeacherScores
from tests.data.test_privileged import CHAT, seen
from tests.data.test_prompts import TEXTS
from tests.flow.parts import Prompts, Reward, Source, Teacher, make

TOLD = (
    *("--use-opd", "--opd-type", "megatron", "--opd-teacher", "self", "--opd-self-feedback"),
    *("--opd-self-context-key", "said", "--opd-self-template", "{prompt} ({context})"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = train_bpe_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("bpe"))
    tokenizer.chat_template = CHAT
    return tokenizer


def judged(prompt: Any, **metadata: Any) -> Sample:
    return Sample(
        3, 1, prompt, prompt_tokens=np.array([5]), response_tokens=np.array([6, 7]), metadata=metadata, reward=0.0
    )


def test_the_feedback_stands_before_the_response_as_the_template_says(tokenizer: Any) -> None:
    sample = judged("12 + 34 =", said="not {prompt} but 46")
    FeedbackPrompts(parse_options(list(TOLD)), tokenizer)(sample)
    assert sample.teacher_prompt_tokens is not None
    assert tokenizer.decode(sample.teacher_prompt_tokens) == "12 + 34 = (not {prompt} but 46)"
    assert sample.seen_by_teacher().tokens.tolist() == [*sample.teacher_prompt_tokens.tolist(), 6, 7]
    assert (sample.prompt_tokens.tolist(), sample.teacher_scores) == ([5], None)

    talk = [{"role": "user", "content": "12 + 34"}]
    sample = judged(talk, said="46")
    FeedbackPrompts(parse_options([*TOLD, "--apply-chat-template"]), tokenizer)(sample)
    assert tokenizer.decode(sample.teacher_prompt_tokens) == "[user]12 + 34 (46)[me]"
    assert feedback_prompts(parse_options(["--use-opd", "--opd-type", "megatron"]), tokenizer) is None


@pytest.mark.parametrize("metadata", [{}, {"said": None}, {"said": ""}])
def test_without_feedback_a_sample_is_left_out_and_has_not_failed(tokenizer: Any, metadata: dict[str, Any]) -> None:
    sample = judged("12", **metadata)
    FeedbackPrompts(parse_options(list(TOLD)), tokenizer)(sample)
    assert sample.teacher_scores is not None
    assert not sample.teacher_scores.valid_T.any()
    assert (sample.teacher_prompt_tokens, sample.teacher_failure) == (None, None)


def test_feedback_that_is_no_text_ends_the_run(tokenizer: Any) -> None:
    with pytest.raises(RewardError, match=r"feedback of sample 3 \(prompt '12'\), 'said' of its metadata, is a int"):
        FeedbackPrompts(parse_options(list(TOLD)), tokenizer)(judged("12", said=46))
    with pytest.raises(RewardError, match=r"feedback of sample 3 \(prompt '12'\) has half of a character"):
        FeedbackPrompts(parse_options(list(TOLD)), tokenizer)(judged("12", said="4\ud800"))


@pytest.mark.parametrize("takes_groups", [False, True])
@pytest.mark.parametrize("keep", [None, unequal_rewards])
def test_the_teacher_is_asked_after_the_reward_about_those_with_feedback(takes_groups: bool, keep: Any) -> None:
    """Samples of even index have reward 0 and are told; with the filter group 1 is left out before anybody is told."""

    def tell(sample: Sample) -> None:
        assert sample.reward is not None
        if sample.reward > 0:
            leave_out(sample)
        else:
            sample.teacher_prompt_tokens = np.array([100 + sample.index])

    class Seeing(Teacher):
        async def score_one(self, sample: Sample) -> TeacherScores:
            assert sample.seen_by_teacher().prompt_tokens.tolist() == [100 + sample.index]
            return await super().score_one(sample)

    teacher = Seeing()
    rollout = make(
        Stages(
            source=Source(2),
            prompts=Prompts(),
            batch=3,
            copies=2,
            reward=Reward(lambda sample: float(sample.index % 2 or sample.group_index == 1), takes_groups),
            keep=keep,
            max_refills=9,
            feedback=tell,
            teacher=teacher,
        )
    )
    assert [sample.index for sample in rollout.samples] == ([0, 1, 2, 3, 4, 5] if keep is None else [0, 1, 4, 5, 6, 7])
    assert sorted(teacher.asked) == ([0, 4] if keep is None else [0, 4, 6])
    assert rollout.metrics["opd/teacher_failed_frac"] == 0
    for sample in rollout.samples:
        assert sample.teacher_scores is not None
        assert sample.teacher_scores.valid_T.all() == (sample.reward == 0)


def test_servers_are_not_asked_for_the_student_s_tokens_of_those_left_out() -> None:
    class Servers:
        name = "some"
        asked: list[int] = []  # noqa: RUF012 - of one test

        def begin_step(self, deadline: float | None) -> None: ...

        async def end_step(self, deadline: float | None) -> None: ...

        def statistics(self) -> dict[str, float]:
            return dict.fromkeys(("requests", "retries", "samples", "wait_seconds", "in_flight_limit"), 0.0)

        async def score_ids(self, sample: Sample, ids_TK: np.ndarray) -> TeacherScores:
            self.asked.append(sample.index)
            length = len(ids_TK)
            return TeacherScores(
                np.zeros(length), top_ids_TK=ids_TK, top_log_probs_TK=ids_TK * -1.0, tail_log_mass_T=np.zeros(length)
            )

        async def aclose(self) -> None: ...

    def student(samples: Sequence[Sample]) -> list[np.ndarray]:
        return [np.ones((sample.response_length, 2), dtype=np.int32) for sample in samples]

    samples = [Sample(i, 0, "", np.array([5]), response_tokens=np.array([6, 7, 8][:i])) for i in (1, 2, 3)]
    leave_out(samples[1])
    servers: Any = Servers()
    teacher = StudentIdsTeacher(servers, student, FailurePolicy())
    assert teacher.teach(samples)["opd/teacher_failed_frac"] == 0
    teacher.close()
    assert servers.asked == [1, 3]
    assert [scores_of(sample).valid_T.all() for sample in samples] == [True, False, True]
    assert [len(scores_of(sample).top_ids_TK) for sample in samples] == [1, 2, 3]  # type: ignore[arg-type]


def scores_of(sample: Sample) -> TeacherScores:
    assert sample.teacher_scores is not None
    return sample.teacher_scores


def test_a_rollout_in_which_nobody_is_told_has_distributions_that_nobody_reads() -> None:
    options = parse_options([*TOLD, "--opd-loss", "distribution", "--opd-support", "teacher_topk", "--opd-top-k", "4"])
    samples = [judged("12"), judged("34")]
    for sample in samples:
        leave_out(sample)
    complete_masked(samples)
    complete_unscored(options, samples)
    for sample in samples:
        ids_TK = scores_of(sample).top_ids_TK
        assert ids_TK is not None
        assert ids_TK.shape == (2, 4)


def test_the_example_tells_wrong_responses_of_a_right_one() -> None:
    texts = ["146", "so 46 ", "?", ""]
    samples = [Sample(i, 0, "", np.array([5]), label="46", response=text) for i, text in enumerate(texts)]
    assert right_sibling(samples) == [0.0, 1.0, 0.0, 0.0]
    told = {"feedback": "so 46 "}
    assert [sample.metadata for sample in samples] == [told, {}, told, told]
    unsolved = samples[::2]
    for sample in unsolved:
        sample.metadata.clear()
    assert right_sibling(unsolved) == [0.0, 0.0]
    assert not any(sample.metadata for sample in unsolved)


def test_nothing_is_asked_of_the_rows_that_come_before_the_feedback(tmp_path: Path, tokenizer: Any) -> None:
    """But that there is a place to put it."""
    flags = TOLD[5:]
    (record,) = seen(tmp_path / "rows.jsonl", [{"prompt": "a"}], tokenizer, *flags)
    assert record.teacher_prompt_tokens is None
    unspoken = [{"prompt": [{"role": "system", "content": "s"}]}]
    with pytest.raises(UserError, match="needs a message of the user with a text"):
        seen(tmp_path / "rows.jsonl", unspoken, tokenizer, *flags, "--apply-chat-template")

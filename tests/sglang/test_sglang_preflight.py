"""The preflight against real servers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.system import free_port
from opd_megatron.teacher.preflight import Finding, Student
from opd_megatron.teacher.protocol import FailureKind, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from opd_megatron.teacher.sglang_preflight import preflight_sglang, server_info
from opd_megatron.teacher.throughput import RunSizes
from opd_megatron.teacher.tokenizer_checks import encode
from tests.sglang import faults
from tests.sglang.conftest import CONTEXT, Served
from tests.sglang.proxy import FaultProxy, always, in_turn

pytestmark = pytest.mark.sglang
Connect = Callable[..., SGLangTeacher]


def as_student(served: Served, **more: Any) -> Student:
    return Student(served.tokenizer, **more)


def warnings(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.warning]


def same_log_probs(served: Served, shift: float = 0.0) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    return lambda texts: [served.log_probs(tokens) + shift for tokens in texts]


@pytest.mark.parametrize("fixture", ["qwen", "llama"])
def test_the_right_server_passes_without_a_warning(
    request: pytest.FixtureRequest, fixture: str, connect: Connect, tmp_path: Path
) -> None:
    served: Served = request.getfixturevalue(fixture)
    teacher = connect(served, vocab_size=10**6)
    findings = preflight_sglang(
        teacher,
        as_student(
            served,
            folders=[tmp_path],
            log_probs=same_log_probs(served, -0.01),
            texts=[served.random_sample(np.random.default_rng(i), 6, 20).tokens for i in range(3)],
            chat_template_kwargs={} if fixture == "llama" else None,
        ),
        longest_sample=CONTEXT - 7,
        sizes=RunSizes(samples=8, group=2, prompt_tokens=20, response_tokens=30, steps=5),
    )
    assert warnings(findings) == []
    assert [finding.check for finding in findings] == [
        "temperature", "server", "tokenizer", "chat template", "vocabulary", "known text", "plausibility", "throughput",
    ]  # fmt: skip
    assert (teacher.vocab_size, teacher.max_tokens) == (served.vocab_size, CONTEXT - 7)


def test_another_chat_template_is_a_warning(llama: Served, connect: Connect, tmp_path: Path) -> None:
    shutil.copytree(llama.folder, tmp_path, dirs_exist_ok=True)
    other = load_tokenizer(tmp_path)
    other.chat_template = other.chat_template.replace("assistant\\n", "bot\\n")
    findings = preflight_sglang(connect(llama), Student(other, chat_template_kwargs={}))
    (warning,) = warnings(findings)
    assert "another chat template than the student: token" in warning
    assert "is 'b' (id" in warning


def test_ids_that_only_the_students_model_has_are_a_warning(qwen: Served, connect: Connect) -> None:
    (warning,) = warnings(preflight_sglang(connect(qwen), as_student(qwen, vocab_size=qwen.vocab_size + 5)))
    assert f"knows {qwen.vocab_size} ids, the student's model {qwen.vocab_size + 5}: the other 5" in warning


def test_replicas_are_all_asked(qwen: Served, connect: Connect) -> None:
    other_address = qwen.server.url.replace("127.0.0.1", "localhost")
    findings = preflight_sglang(connect(qwen, [qwen.server.url, other_address]), as_student(qwen))
    texts = {finding.check: finding.text for finding in findings}
    assert texts["replicas"] == "2 servers score the known text the same"
    assert [finding.check for finding in findings].count("tokenizer") == 2


def test_the_server_tells_who_it_is(qwen: Served, connect: Connect) -> None:
    info = server_info(connect(qwen))
    assert (info.model_path, info.weight_version, info.sglang_version) == (str(qwen.folder), "default", "0.5.23")
    assert (info.vocab_size, info.max_tokens) == (qwen.vocab_size, CONTEXT - 7)


def test_the_student_behind_the_server_is_recognised(qwen: Served, connect: Connect) -> None:
    findings = preflight_sglang(connect(qwen), as_student(qwen, folders=[qwen.folder], log_probs=same_log_probs(qwen)))
    folder, scores = warnings(findings)
    assert "where the student starts" in folder
    assert "same log-probabilities as the student" in scores


def test_a_random_teacher_finds_the_tasks_texts_implausible(qwen: Served, connect: Connect) -> None:
    text = "4827+1936=7+6+0=13,2+3+1=06,8+9+0=17,4+1+1=06;6763"
    tokens = np.array(encode(qwen.tokenizer, text))
    (warning,) = warnings(preflight_sglang(connect(qwen), as_student(qwen, texts=[tokens])))
    assert "worse than guessing" in warning


@pytest.mark.parametrize("student", ["characters", "words"])
def test_another_tokenizer_is_refused_with_the_first_differing_token(
    qwen: Served, llama: Served, connect: Connect, student: str
) -> None:
    served, own = (llama, qwen) if student == "characters" else (qwen, llama)
    pattern = (
        r"another tokenizer than the student: token 0 of 'The capital.* \(id \d+\) for the student and .* \(id \d+\)"
    )
    with pytest.raises(UserError, match=pattern):
        preflight_sglang(connect(served), as_student(own))
    assert served.is_alive()


def test_two_swapped_tokens_are_found(llama: Served, connect: Connect, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama.folder / name, tmp_path)
    path, a, b = tmp_path / "tokenizer.json", *(llama.tokenizer.convert_tokens_to_ids(token) for token in "~|")
    record = path.read_text()
    for token, old, new in (("~", a, b), ("|", b, a)):
        assert f'"{token}": {old}' in record
        record = record.replace(f'"{token}": {old}', f'"{token}": {new}')
    path.write_text(record)
    with pytest.raises(UserError, match=rf"another tokenizer than the student: id {min(a, b)} is"):
        preflight_sglang(connect(llama), Student(load_tokenizer(tmp_path)))


def test_a_context_that_is_too_short_is_refused(qwen: Served, connect: Connect) -> None:
    with pytest.raises(UserError, match=r"at most 249 tokens, but prompt and response can have 250.*--context-length"):
        preflight_sglang(connect(qwen), as_student(qwen), longest_sample=CONTEXT - 6)


def test_another_temperature_is_refused_unless_accepted(qwen: Served, connect: Connect) -> None:
    with pytest.raises(UserError, match=r"--rollout-temperature 0.7 .* temperature 1 only"):
        preflight_sglang(connect(qwen), as_student(qwen), rollout_temperature=0.7)
    findings = preflight_sglang(connect(qwen), as_student(qwen), rollout_temperature=0.7, allow_sampling_mismatch=True)
    (warning,) = warnings(findings)
    assert "scores at temperature 1" in warning


def test_a_server_that_is_not_there_is_one_line(qwen: Served, connect: Connect) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        UserError, match=r"connection failed .*refused.*; start the server .* --opd-teacher-url"
    ) as caught:
        preflight_sglang(connect(qwen, url), as_student(qwen))
    assert "\n" not in str(caught.value)


def test_an_answer_to_the_known_text_that_is_not_believed_is_asked_for_again(qwen: Served, connect: Connect) -> None:
    with FaultProxy(qwen.server.url, in_turn(faults.NAN, faults.SHORTER)) as proxy:
        tokens = np.arange(3, 15)
        found = connect(qwen, proxy.url, max_retries=2).pin(tokens)
        np.testing.assert_allclose(found, qwen.log_probs(tokens), atol=1e-4)
        assert len(proxy.asked) == 3
        proxy.plan = always(faults.NAN)
        with pytest.raises(TeacherFailure, match=r"known text: nan is not a log-probability.*\(3 attempts\)") as caught:
            connect(qwen, proxy.url, max_retries=2).pin(tokens)
        assert caught.value.kind is FailureKind.NOT_FINITE

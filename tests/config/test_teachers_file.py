"""The file of several teachers."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config.teachers_file import TeacherEntry, read_teachers

EXPECTED = [TeacherEntry("math", ("http://h:1", "http://h:2"), "KEY"), TeacherEntry("code", ("https://c",))]
FORMS = {
    ".yaml": "math: {urls: [http://h:1, 'http://h:2'], api_key_env: KEY}\ncode:\n  urls: https://c\n",
    ".toml": '[math]\nurls = ["http://h:1", "http://h:2"]\napi_key_env = "KEY"\n[code]\nurls = "https://c"\n',
    ".json": '{"math": {"urls": ["http://h:1", "http://h:2"], "api_key_env": "KEY"}, "code": {"urls": "https://c"}}',
}


@pytest.mark.parametrize("ending", FORMS)
def test_each_form_names_the_same_teachers(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"teachers{ending}"
    path.write_text(FORMS[ending])
    assert read_teachers(str(path)) == (EXPECTED, [])


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("", ["names no teacher"]),
        ("[1]", ["must be a mapping of names"]),
        ("math: {urls: [}", ["is not YAML"]),
        ("math: {}\nmath: {}", ["math is given twice"]),
        ("math: http://h:1", ["math: must be a mapping with urls"]),
        ("math: {url: http://h:1}", ["math: url: unknown key (did you mean urls?)", "math: urls must be an address"]),
        ("math: {urls: []}", ["math: urls must be an address or a list"]),
        ("math: {urls: [http://u:s3cret@h:x, 7]}", ["math: urls *** must be an address", "math: urls 7 must be"]),
        ("math: {urls: http://h:1, api_key_env: sk-s3cret}", ["math: api_key_env must be the name"]),
        ("a b: {urls: http://h:1}\n7: {urls: http://h:1}", ["a b: a teacher's name may", "7: a teacher's name may"]),
    ],
)
def test_every_fault_is_named_without_secrets(tmp_path: Path, text: str, reasons: list[str]) -> None:
    path = tmp_path / "teachers.yaml"
    path.write_text(text)
    faults = read_teachers(str(path))[1]
    assert len(faults) == len(reasons)
    for fault, reason in zip(faults, reasons, strict=True):
        assert fault.startswith(f"--opd-teachers {path}: ")
        assert reason in fault
        assert "s3cret" not in fault


def test_a_file_of_another_kind_is_refused() -> None:
    assert read_teachers("teachers.txt")[1] == [
        "--opd-teachers teachers.txt: the name must end in .yaml, .yml, .toml or .json"
    ]


def test_a_broken_file_is_named_by_line_and_not_quoted(tmp_path: Path) -> None:
    """The line may hold a password."""
    path = tmp_path / "teachers.yaml"
    path.write_text("math:\n  urls: [http://ann:s3cret@h:1\ncode: {urls: http://ann:s3cret@h:2}\n")
    (fault,) = read_teachers(str(path))[1]
    assert "line 3" in fault
    assert "s3cret" not in fault

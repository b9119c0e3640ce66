"""Tokenizer folders: what loads, what is refused, and the tokenizer trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.config.errors import UserError
from opd_megatron.data.tokenizer import load_tokenizer, train_bpe_tokenizer

TEXTS = ["Weng earns $12 an hour for babysitting.", "How much did she earn?"] * 5


def test_a_trained_tokenizer_reads_back_any_text_in_every_family(tmp_path: Path) -> None:
    trained = train_bpe_tokenizer(TEXTS, 300, tmp_path)
    text = "  Weng\n\tearned €1,234.50 <|im_start|>naïvely 東京\u2028"
    for family in (None, "qwen2", "qwen3", "llama"):
        if family is not None:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
        tokenizer = load_tokenizer(tmp_path)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(tokenizer) == len(trained) <= 300
        assert max(ids) < len(tokenizer)
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 1
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_merges_are_learned_and_digits_stay_alone(tmp_path: Path) -> None:
    tokenizer = train_bpe_tokenizer(TEXTS, 300, tmp_path)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
    assert len(tokenizer.encode("123456")) == 6
    assert sorted(item.name for item in tmp_path.iterdir() if item.name.startswith(".")) == []


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small"):
        train_bpe_tokenizer(TEXTS, 258, tmp_path)


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    cases: dict[str, dict[str, str]] = {
        "empty": {},
        "config_only": {"config.json": json.dumps({"model_type": "qwen3"})},
        "broken": {"tokenizer.json": "{"},
    }
    for name, files in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content, encoding="utf-8")
    for name in ("missing", *cases):
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: no ")
        assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    train_bpe_tokenizer(TEXTS, 300, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    mark = tmp_path / "was_run"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    assert not mark.exists()


def test_an_end_token_is_needed(tmp_path: Path) -> None:
    train_bpe_tokenizer(TEXTS, 300, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="names no end token"):
        load_tokenizer(tmp_path)

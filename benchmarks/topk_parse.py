"""Time to read a server's most probable tokens: the flat form that the client asks for, and the nested one.

    python -m benchmarks.topk_parse                  # half a minute

Both answers hold the same samples, in the form of SGLang 0.5.23's ``/generate``: the nested one lists
``[log_prob, id, null]`` for each position and rank, the flat one two arrays in base64. With ``--url`` they are recorded
from a running server instead, which must know the ids below ``--vocab-size``. Of the nested form the faster of two ways
to arrays counts, one with loops and one without; both begin with orjson. The flat form is read by the client's own
reader, all checks included. The two take turns; printed are medians, their ratio and the sizes of the answers.
"""

from __future__ import annotations

import argparse
import base64
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import requests

from opd_megatron.teacher.sglang_answer import read_answer

FLAT = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}


def built_answer(tokens: np.ndarray, top_k: int, vocab_size: int, flat: bool, seed: int) -> dict[str, Any]:
    """One sample's answer about ``tokens`` of a random model, with the values of float32 that a server sends."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=3.0, size=(len(tokens) - 1, vocab_size))
    log_probs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    values = np.take_along_axis(log_probs, ids, axis=1)
    own = log_probs[np.arange(len(tokens) - 1), tokens[1:]].tolist()
    meta: dict[str, Any] = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": 0},
        "weight_version": "default",
        "input_token_logprobs": [
            [value, token, None] for value, token in zip([None, *own], tokens.tolist(), strict=True)
        ],
    }
    if not flat:
        meta["input_top_logprobs"] = [None] + [
            [[value, token, None] for value, token in zip(*row, strict=True)]
            for row in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        return {"text": "", "meta_info": meta}
    for side, array, dtype in (("val", values, "float32"), ("idx", ids, "int32")):
        key = f"input_top_logprobs_{side}_flat_b64"
        meta[key] = base64.b64encode(array.tobytes()).decode()
        meta[f"{key}_dtype"] = dtype
    meta |= {"input_top_logprobs_shape": list(ids.shape), "input_top_logprobs_null_prefix": 1}
    return {"text": "", "meta_info": meta}


def recorded(url: str, samples: Sequence[np.ndarray], top_k: int, flat: bool) -> bytes:
    """The answer of the server at ``url`` about ``samples``, as it came."""
    payload = {
        "input_ids": [tokens.tolist() for tokens in samples],
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
        **(FLAT if flat else {}),
    }
    response = requests.post(url + "/generate", json=payload, timeout=300)
    response.raise_for_status()
    return response.content


def read_flat(content: bytes, samples: Sequence[np.ndarray], top_k: int, vocab_size: int) -> list[np.ndarray]:
    found = []
    for answer, tokens in zip(orjson.loads(content), samples, strict=True):
        top = read_answer(answer, tokens, vocab_size, top_k=top_k).top
        assert top is not None
        found += [top.ids_NK, top.log_probs_NK]
    return found


def read_nested_by_loops(content: bytes) -> list[np.ndarray]:
    found = []
    for answer in orjson.loads(content):
        rows = answer["meta_info"]["input_top_logprobs"][1:]
        found.append(np.array([[entry[1] for entry in row] for row in rows], dtype=np.int32))
        found.append(np.array([[entry[0] for entry in row] for row in rows], dtype=np.float32))
    return found


def read_nested_as_objects(content: bytes) -> list[np.ndarray]:
    found = []
    for answer in orjson.loads(content):
        rows = np.array(answer["meta_info"]["input_top_logprobs"][1:], dtype=object)
        found += [rows[:, :, 1].astype(np.int32), rows[:, :, 0].astype(np.float32)]
    return found


def timed(read: Callable[[], list[np.ndarray]]) -> float:
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=257, help="of each sample; all but the first are scored")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--url", help="of a running SGLang server that the answers are recorded from")
    options = parser.parse_args(argv)
    generator = np.random.default_rng(0)
    # Without the last id, which the server reports as 0.
    samples = list(generator.integers(options.vocab_size - 1, size=(options.samples, options.tokens)))
    contents = {}
    for flat in (True, False):
        if options.url:
            contents[flat] = recorded(options.url, samples, options.top_k, flat)
        else:
            answers = [
                built_answer(tokens, options.top_k, options.vocab_size, flat, seed)
                for seed, tokens in enumerate(samples)
            ]
            contents[flat] = orjson.dumps(answers)

    readers: dict[str, Callable[[], list[np.ndarray]]] = {
        "flat": lambda: read_flat(contents[True], samples, options.top_k, options.vocab_size),
        "nested, loops": lambda: read_nested_by_loops(contents[False]),
        "nested, object arrays": lambda: read_nested_as_objects(contents[False]),
    }
    expected = readers["flat"]()
    for name in ("nested, loops", "nested, object arrays"):
        for mine, theirs in zip(expected, readers[name](), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-3)
    turns = [{name: timed(read) for name, read in readers.items()} for _ in range(options.turns)]
    medians = {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in readers}
    nested = min(medians[name] for name in medians if name != "flat")
    print(
        f"{options.samples} samples of {options.tokens - 1} scored tokens, top-{options.top_k}, "
        f"{'recorded' if options.url else 'built'}; {os.cpu_count()} {platform.machine()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for name, milliseconds in medians.items():
        print(f"{name:22} {milliseconds:8.2f} ms")
    print(
        f"flat / nested: {medians['flat'] / nested:.3f} of the time, {len(contents[True]) / 1e6:.2f} MB for "
        f"{len(contents[False]) / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()

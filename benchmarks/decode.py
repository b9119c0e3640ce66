"""Time of sampling with the local engine and with transformers, on the same random weights.

    python benchmarks/decode.py --batch 128 --new-tokens 44 --threads 2

Prints the fastest and the median of the repetitions, which take turns, and their ratio. ``loop`` is transformers'
forward with its dynamic cache and this project's choice of tokens; ``generate`` is transformers' own sampling loop.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, Qwen3Config

from opd_megatron.rollout.engine import GenerateRequest, SamplingParams
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sampling import UniformStreams, sample_tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="sequences")
    parser.add_argument("--prompt-tokens", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=44)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> tuple[Any, LocalEngine]:
    config = Qwen3Config(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.hidden_size // arguments.heads,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=arguments.prompt_tokens + arguments.new_tokens,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    vocabulary = {f"{token} ": token for token in range(arguments.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0 ")))
    engine = LocalEngine(config, tokenizer, max_batch_size=arguments.batch)
    engine.update_weights(model.state_dict().items(), "benchmark")
    return model, engine


def ways(arguments: argparse.Namespace, model: Any, engine: LocalEngine) -> dict[str, Callable[[], object]]:
    shape = (arguments.batch, arguments.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, arguments.vocab_size, size=shape)
    prompts_BS = torch.from_numpy(prompts)
    sampling = SamplingParams(max_new_tokens=arguments.new_tokens, ignore_eos=True)
    seeds = [(0, row) for row in range(arguments.batch)]
    requests = [GenerateRequest(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def loop() -> None:
        drawn = UniformStreams(seeds).draw(range(arguments.batch), 0, arguments.new_tokens)
        cache, tokens_BS = DynamicCache(config=model.config), prompts_BS
        for uniforms_B in torch.from_numpy(drawn).t():
            logits = model(input_ids=tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens_BS = sample_tokens(logits[:, -1], sampling, uniforms_B)[0].unsqueeze(1)

    def generate() -> None:
        length = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens}
        mask = torch.ones_like(prompts_BS)
        model.generate(prompts_BS, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0, **length)

    return {"engine": lambda: engine.generate(requests), "loop": loop, "generate": generate}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        runs = ways(arguments, *build(arguments))
        for repetition in range(arguments.repetitions + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if repetition > 0:
                    times.setdefault(name, []).append(time.perf_counter() - start)
    print(
        f"{arguments.batch} x ({arguments.prompt_tokens} + {arguments.new_tokens}) tokens, hidden "
        f"{arguments.hidden_size}, {arguments.layers} layers, vocabulary {arguments.vocab_size}, float32; "
        f"{arguments.threads} threads of {os.cpu_count()} {platform.processor() or platform.machine()} cores, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    for name, seconds in times.items():
        fastest, median = min(seconds), statistics.median(seconds)
        print(
            f"{name:>9}: fastest {fastest * 1e3:7.1f} ms, median {median * 1e3:7.1f} ms, "
            f"{fastest / min(times['engine']):.2f} x the engine's fastest"
        )


if __name__ == "__main__":
    main()

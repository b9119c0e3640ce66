"""Log-probabilities of given token ids by Megatron: what a teacher thinks of them, or whether a conversion is right.

    python tools/score.py --load Qwen3-1.7B_torch_dist --input tokens.jsonl --output log_probs.jsonl
    torchrun --nproc-per-node 2 tools/score.py --tensor-model-parallel-size 2 --load ...

``--load`` is a torch_dist or a Hugging Face folder. Each line of ``--input`` is ``{"tokens": [...]}`` with L ids, and
the line of ``--output`` in its place ``{"log_probs": [...]}`` with the L - 1 log-probabilities of the ids 2 to L, each
given those before it (natural logarithms, at ``--temperature``). Blank lines are passed over. Where the layout needs
fewer ranks than there are, they share the lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.options import ParallelOptions
from opd_megatron.config.parse import parse_groups
from opd_megatron.config.resolve import checkpoint_architecture
from opd_megatron.data.rows import Row, read_rows, summarize, write_jsonl
from opd_megatron.megatron import tooling
from opd_megatron.megatron.scoring import score_samples
from opd_megatron.sample import Sample


@dataclass(frozen=True)
class ScoreOptions:
    """Scoring"""

    load: str = option("", "model: a torch_dist or Hugging Face folder", metavar="DIR", required=True)
    ckpt_step: int | None = option(None, "step of --load (default: its latest)", minimum=0)
    input: str = option("", 'JSONL file of {"tokens": [...]}', metavar="FILE", required=True)
    output: str = option("", 'JSONL file of {"log_probs": [...]} to write', metavar="FILE", required=True)
    temperature: float = option(1.0, "temperature of the distribution", above=0.0)
    micro_batch_size: int = option(8, "lines of one forward pass", minimum=1)
    bf16: bool = option(False, "compute in bfloat16 (default: float32)")


def read_tokens(row: Row, vocab_size: int) -> np.ndarray:
    """Token ids ``[L]`` of one line; raises ``ValueError`` that names it if they cannot be scored."""
    tokens = row.fields.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f'{row.where}: needs "tokens", a list of at least one id')
    for place, token in enumerate(tokens):
        if type(token) is not int:
            raise ValueError(f"{row.where}: entry {place} of tokens is no whole number ({token!r})")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{row.where}: id {token} is not in the model's vocabulary of {vocab_size} tokens")
    return np.array(tokens, dtype=np.int64)


def read_samples(path: str, architecture: ModelArchitecture) -> list[Sample]:
    """The lines as samples whose prompt is the first token; raises :class:`UserError` that names bad lines."""
    rows, faults = read_rows(path)
    samples = []
    for index, row in enumerate(rows):
        try:
            tokens = read_tokens(row, architecture.vocab_size)
        except ValueError as error:
            faults.append(str(error))
            continue
        samples.append(Sample(index, index, prompt=row.where, prompt_tokens=tokens[:1], response_tokens=tokens[1:]))
    refuse(summarize(faults))
    return samples


def main(argv: Sequence[str]) -> None:
    parsed = parse_groups(
        argv,
        {"score": ScoreOptions, "parallel": ParallelOptions},
        prog="score.py",
        description="Log-probabilities of given token ids under a model.",
    )
    options, parallel = parsed[ScoreOptions], parsed[ParallelOptions]
    source, output = tooling.weights_folder("--load", options.load, options.ckpt_step), Path(options.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name the file to write")
    if output.resolve() == Path(options.input).resolve():
        raise UserError(f"--output {output} is the input: name another file")
    architecture = checkpoint_architecture(source, "--load")
    samples = read_samples(options.input, architecture)
    is_first = tooling.join(parallel, architecture)
    limit = architecture.max_position_embeddings
    longer = sum(sample.response_length > limit for sample in samples)
    if longer and is_first:
        print(f"warning: {longer} lines are longer than the {limit} positions that the model is made for")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = tooling.load_model(source, architecture, parallel, dtype)
    log_probs = score_samples(model, samples, options.temperature, options.micro_batch_size)
    if not is_first:
        return
    for sample, values in zip(samples, log_probs, strict=True):
        if not np.isfinite(values).all():
            raise UserError(
                f"{sample.prompt}: log-probabilities that are not finite: the weights in {source} are damaged"
            )
    write_jsonl(output, ({"log_probs": values.tolist()} for values in log_probs))
    print(f"{output}: {len(log_probs)} lines, {sum(map(len, log_probs))} log-probabilities")


if __name__ == "__main__":
    sys.exit(tooling.run_tool(main))

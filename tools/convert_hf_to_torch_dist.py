"""Convert a Hugging Face folder to a torch_dist checkpoint for --load, --ref-load and --opd-teacher-load.

    python tools/convert_hf_to_torch_dist.py --hf-checkpoint Qwen3-1.7B --save Qwen3-1.7B_torch_dist
    torchrun --nproc-per-node 2 tools/convert_hf_to_torch_dist.py --tensor-model-parallel-size 2 ...

``--save`` gets the weights (``release/``), config and tokenizer (``hf/``) and the tracker. The weights keep their data
type. They pass through memory tensor by tensor, so one process can convert a model of any size; several share the
reading and writing by the parts of their layout. The checkpoint loads in every layout. MODEL_ARGS may be given and must
agree with the folder's config.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.architecture import architecture_from_hf, disagreements, read_hf_config
from opd_megatron.config.checkpoint_paths import HF_FOLDER, RELEASE, TRACKER, inspect_checkpoint
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ModelOptions, ParallelOptions
from opd_megatron.config.parse import parse_groups
from opd_megatron.megatron import checkpoint, tooling
from opd_megatron.megatron.conversion import entries_from_hf
from opd_megatron.megatron.model import build_model


@dataclass(frozen=True)
class ConversionOptions:
    """Conversion"""

    hf_checkpoint: str = option("", "Hugging Face folder to convert", metavar="DIR", required=True)
    save: str = option("", "torch_dist folder to write", metavar="DIR", required=True)
    overwrite: bool = option(False, "replace an earlier conversion in --save (never the checkpoints of a run)")


def is_conversion(folder: Path) -> bool:
    """Whether ``folder`` holds a converted checkpoint, or what is left of one, and nothing else."""
    return folder.is_dir() and all(
        entry.name in (RELEASE, HF_FOLDER, TRACKER) or entry.name.endswith(".tmp") for entry in folder.iterdir()
    )


def main(argv: Sequence[str]) -> None:
    parsed = parse_groups(
        argv,
        {"conversion": ConversionOptions, "model": ModelOptions, "parallel": ParallelOptions},
        prog="convert_hf_to_torch_dist.py",
        description="Convert a Hugging Face folder to a torch_dist checkpoint.",
    )
    options, model_options, parallel = parsed[ConversionOptions], parsed[ModelOptions], parsed[ParallelOptions]
    source, target = tooling.weights_folder("--hf-checkpoint", options.hf_checkpoint), Path(options.save)
    if inspect_checkpoint(source).kind != "hf":
        raise UserError(f"--hf-checkpoint {source} is a torch_dist checkpoint already: name a Hugging Face folder")
    architecture = architecture_from_hf(read_hf_config(source), source=f"--hf-checkpoint {source}")
    found = disagreements(parsed.given, model_options, architecture)
    if found:
        raise UserError(f"MODEL_ARGS disagree with --hf-checkpoint {source}: {', '.join(found)}")
    tooling.refuse_target(
        target, replaceable=is_conversion(target), overwrite=options.overwrite, what="a converted checkpoint"
    )
    dtype = checkpoint.stored_dtype(source)
    is_first = tooling.join(parallel, architecture)
    if is_first:
        print(f"{source}: reading {architecture.family}, {architecture.num_layers} layers, {dtype}", flush=True)
    model = build_model(
        architecture,
        tooling.without_recompute(parallel),
        dtype=dtype,
        make_vocab_size_divisible_by=model_options.make_vocab_size_divisible_by,
        without_memory=True,
    )
    checkpoint.save_release(target, entries_from_hf(model, source, dtype), source)
    if is_first:
        print(f"{target}: written")


if __name__ == "__main__":
    sys.exit(tooling.run_tool(main))

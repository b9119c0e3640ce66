"""Convert a torch_dist checkpoint to a Hugging Face folder: safetensors, config and tokenizer.

    python tools/convert_torch_dist_to_hf.py --load runs/demo/checkpoints --save demo_hf

The weights keep the data type that they have in the checkpoint, and the config comes to name it. They pass through
memory tensor by tensor, so one process converts a model of any size, whatever layout wrote it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.checkpoint_paths import inspect_checkpoint
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ParallelOptions
from opd_megatron.config.parse import parse_groups
from opd_megatron.config.resolve import checkpoint_architecture
from opd_megatron.config.validate_paths import holds_only_a_model
from opd_megatron.megatron import checkpoint, tooling
from opd_megatron.megatron.conversion import stream_to_hf
from opd_megatron.megatron.hf_weights import model_maps
from opd_megatron.megatron.model import build_model
from opd_megatron.observe.progress import track


@dataclass(frozen=True)
class ConversionOptions:
    """Conversion"""

    load: str = option("", "torch_dist folder to convert", metavar="DIR", required=True)
    ckpt_step: int | None = option(None, "step of --load (default: its latest)", minimum=0)
    save: str = option("", "Hugging Face folder to write", metavar="DIR", required=True)
    overwrite: bool = option(False, "replace the model in --save")


def main(argv: Sequence[str]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("one process converts a model of any size: start convert_torch_dist_to_hf.py without torchrun")
    parsed = parse_groups(
        argv,
        {"conversion": ConversionOptions},
        prog="convert_torch_dist_to_hf.py",
        description="Convert a torch_dist checkpoint to a Hugging Face folder.",
    )
    options = parsed[ConversionOptions]
    source, target = tooling.weights_folder("--load", options.load, options.ckpt_step), Path(options.save)
    info = inspect_checkpoint(source)
    if info.kind != "torch_dist":
        raise UserError(f"--load {source} is a Hugging Face folder already: name a torch_dist folder")
    architecture = checkpoint_architecture(source, "--load")
    assert info.hf_folder is not None  # the architecture was read from it
    tooling.refuse_target(target, replaceable=holds_only_a_model(target), overwrite=options.overwrite, what="a model")
    dtype = checkpoint.stored_dtype(source)
    tooling.join(ParallelOptions(), architecture)
    print(f"{source}: reading {architecture.family}, {architecture.num_layers} layers, {dtype}", flush=True)
    model = build_model(
        architecture, ParallelOptions(), dtype=dtype, make_vocab_size_divisible_by=1, without_memory=True
    )
    total = sum(len(row.hf_names) for row in model_maps(model))
    tensors = track(stream_to_hf(model, source, dtype), "writing weights", total)
    checkpoint.write_hf_folder(tensors, target, info.hf_folder)
    print(f"{target}: written")


if __name__ == "__main__":
    sys.exit(tooling.run_tool(main))

"""What is loaded and saved."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints"""

    hf_checkpoint: str | None = option(
        None,
        "Hugging Face folder with config and tokenizer, and the weights to start from if nothing else is given",
        metavar="DIR",
    )
    load: str | None = option(None, "resume from this folder if it holds a checkpoint of a run", metavar="DIR")
    ckpt_step: int | None = option(None, "step of --load (default: its latest)", minimum=0)
    finetune: bool = option(
        False, "take the weights of --load alone: step 0, a new optimizer, random state and position in the prompts"
    )
    no_load_optim: bool = option(False, "resume without the optimizer's state: moments and schedule begin anew")
    no_load_rng: bool = option(False, "resume without the random state: it begins from --seed")
    ref_load: str | None = option(
        None, "initial and reference weights: a torch_dist or Hugging Face folder", metavar="DIR"
    )
    save: str | None = option(None, "where checkpoints go (default: checkpoints in --run-dir)", metavar="DIR")
    save_interval: int | None = option(
        None, "save every so many rollouts (default: only at the end)", unit="rollouts", minimum=1
    )
    no_save_optim: bool = option(False, "save without the optimizer's state (resume needs --no-load-optim)")
    save_keep_last: int | None = option(
        None, "keep this many of the newest steps and remove older ones (default: keep all)", minimum=1
    )
    save_retain_interval: int | None = option(
        None,
        "keep every step that is a multiple of this and the newest (or --save-keep-last), remove the others",
        unit="rollouts",
        minimum=1,
    )
    save_hf: str | None = option(
        None, "also write Hugging Face weights here at each save; {rollout_id} is replaced", metavar="DIR"
    )

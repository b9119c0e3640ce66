"""TRL's side of step_vs_trl.py: its DistillationTrainer, one optimizer step per turn.

    PYTHON_WITH_TRL benchmarks/trl_side.py FOLDER THREADS

Runs in an environment of its own (requirements-trl.txt). ``FOLDER`` is what step_vs_trl.py wrote. A step is the time
from one ``on_step_end`` to the next: the trainer fetches prompts, generates, runs student and teacher, and updates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl  # type: ignore[import-not-found]
from turns import Turns

SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "lr_scheduler_type": "constant",
}
"""What makes TRL fastest here (README.md says what else was tried)."""


class Turnstile(transformers.TrainerCallback):
    """Holds the trainer between steps until the driver asks for the next one."""

    def __init__(self, turns: Turns, prompt_tokens: int) -> None:
        self._turns = turns
        self._prompt_tokens = prompt_tokens
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._turns.ready(
            versions={"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        )
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tokens = state.num_input_tokens_seen - self._seen - self._prompt_tokens
        self._seen = state.num_input_tokens_seen
        self._turns.done(tokens=tokens)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        if not self._turns.wait():
            control.should_training_stop = True


def build_trainer(folder: Path, turns: Turns) -> Any:
    """The trainer with the project's models, prompts and optimizer settings, reverse KL over the vocabulary."""
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    batch_size, left = divmod(work["prompts"], SETTINGS["gradient_accumulation_steps"])
    if left:
        raise ValueError(f"{work['prompts']} prompts do not divide into TRL's micro-batches")
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="sdpa"
        )
        for name in ("student", "teacher")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    prompt_tokens = sum(map(len, tokenizer([row["prompt"] for row in prompts[: work["prompts"]]])["input_ids"]))
    config = trl.DistillationConfig(
        **SETTINGS,
        per_device_train_batch_size=batch_size,
        output_dir=str(folder / "trl_run"),
        max_steps=1_000_000,
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=work["new_tokens"],
        # Generation knows no end token, so no step pays for suppressing it ...
        generation_kwargs={"eos_token_id": None},
        learning_rate=work["learning_rate"],
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[Turnstile(turns, prompt_tokens)],
    )
    # ... and none cuts a response afterwards.
    trainer.eos_token_ids = [-1]
    return trainer


if __name__ == "__main__":
    turns = Turns()
    torch.set_num_threads(int(sys.argv[2]))
    build_trainer(Path(sys.argv[1]), turns).train()

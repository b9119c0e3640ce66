"""Metrics go to ``metrics.jsonl`` always, to TensorBoard and Weights & Biases if wanted."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from opd_megatron.observe.run_folder import RunFolder
from opd_megatron.system import replacing


class MetricLogger:
    """Writes the metrics of a step to every place at once; use it as a context manager, or call :meth:`close`.

    ``first_step`` is the first step that will be logged: what an earlier process of the run wrote for it and later
    steps is forgotten, in TensorBoard too. ``wandb`` holds arguments of ``wandb.init`` (``project``, ``group``,
    ``name``, ``config``) or is None. A resumed run (``first_step`` above 0) continues its W&B run. Raises
    ``RuntimeError`` if W&B is wanted and not installed, or has no key in the environment.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        *,
        first_step: int = 0,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self._run_folder = run_folder
        self._tensorboard: Any = None
        self._wandb = None if wandb is None else _start_wandb(run_folder, wandb, resume=first_step > 0)
        run_folder.truncate_after(first_step - 1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_folder.tensorboard), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Log one step and return its line of ``metrics.jsonl``; see :meth:`RunFolder.append_metrics`."""
        record = self._run_folder.append_metrics(step, metrics)
        numbers = {name: record[name] for name in metrics if record[name] is not None}
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})
        return record

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start_wandb(run_folder: RunFolder, settings: Mapping[str, Any], *, resume: bool) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError("W&B is not installed: pip install 'opd_megatron[wandb]'") from error
    if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise RuntimeError("W&B needs its key in WANDB_API_KEY (or WANDB_MODE=offline)")
    id_file = run_folder.path / "wandb_run_id"
    if not (resume and id_file.exists()):
        with replacing(id_file) as stream:
            stream.write(uuid.uuid4().hex[:12])
    run = wandb.init(**settings, id=id_file.read_text(encoding="utf-8"), resume="allow", dir=str(run_folder.path))
    # W&B's own counter only grows, so the steps that a resumed run repeats would be dropped
    run.define_metric("*", step_metric="step")
    return run

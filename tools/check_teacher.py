"""Check a teacher's servers before a run: do they know the student's tokens, are their scores sound, are they fast?

    python tools/check_teacher.py --opd-teacher-url http://127.0.0.1:30000 --hf-checkpoint Qwen3-8B
    python tools/check_teacher.py --opd-teacher-url http://127.0.0.1:30000 --hf-checkpoint Qwen3-8B \\
        --prompt-data prompts.jsonl --rollout-batch-size 32 --n-samples-per-prompt 4 --rollout-max-response-len 1024

Takes every flag of ``train.py``, so that the options of a run can be given as they stand, and looks at those that
concern the teacher's servers, the prompts and the sizes. It asks what a run asks before its first step, and prints what
it found. See docs/teachers.md for what each line means.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opd_megatron.config.architecture import read_hf_config
from opd_megatron.config.cli import run_cli
from opd_megatron.config.declare import option
from opd_megatron.config.errors import UserError, refuse
from opd_megatron.config.options import Options
from opd_megatron.config.parse import joined_options, option_groups, parse_groups
from opd_megatron.config.validate_opd import opd_faults
from opd_megatron.config.validate_paths import prompt_routes
from opd_megatron.data.prompts import PromptRecord, check_prompt_file, load_prompt_records, text_of_records
from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.teacher.connect import connect_teachers, part_of_prompts, servers_of
from opd_megatron.teacher.preflight import JUDGED_TEXTS, JUDGED_TOKENS, Finding, Student
from opd_megatron.teacher.sglang_preflight import preflight_sglang
from opd_megatron.teacher.throughput import RunSizes

TYPICAL_PROMPT = 128
"""Tokens of a prompt where no prompts are given."""


@dataclass(frozen=True)
class CheckOptions:
    """Check"""

    with_student: bool = option(
        False, "load the student's weights with transformers and compare its perplexity with the teacher's"
    )


def main(argv: Sequence[str]) -> None:
    parsed = parse_groups(
        argv,
        {"check": CheckOptions, **option_groups()},
        prog="check_teacher.py",
        description="Check the servers of a teacher before a run of train.py.",
    )
    options = joined_options(parsed)
    refuse(_faults(options))
    refuse(_prompt_faults(options))
    folder = Path(str(options.checkpoint.hf_checkpoint))
    student, records = _student(options, folder, parsed[CheckOptions].with_student)
    vocab_size = max(int(read_hf_config(folder).get("vocab_size", 0)), student.highest_id + 1)
    prompts = [len(record.prompt_tokens) for record in records] or [TYPICAL_PROMPT]
    opd, rollout = options.opd, options.rollout
    longest = min(max(prompts), rollout.rollout_max_prompt_len or max(prompts)) + options.training_response_len
    metadata = [record.metadata for record in records]
    sizes = RunSizes(
        samples=(rollout.rollout_batch_size or 32) * rollout.n_samples_per_prompt,
        group=rollout.n_samples_per_prompt,
        prompt_tokens=int(np.median(prompts)),
        response_tokens=options.training_response_len,
        steps=options.data.num_rollout,
    )
    findings = [
        finding
        for teacher in servers_of(connect_teachers(options, vocab_size))
        for finding in preflight_sglang(
            teacher,
            student,
            rollout_temperature=rollout.rollout_temperature,
            allow_sampling_mismatch=opd.opd_allow_sampling_mismatch,
            longest_sample=longest,
            overlong=opd.opd_overlong,
            sizes=sizes.part(part_of_prompts(options, teacher.name, metadata)),
        )
    ]
    print(report(findings))


def report(findings: Sequence[Finding]) -> str:
    """The findings as a table, warnings marked, and the number of warnings."""
    width = max(len(finding.check) for finding in findings)
    lines = [
        f"{'warning' if finding.warning else 'ok':7}  {finding.check:{width}}  {finding.text}" for finding in findings
    ]
    warnings = sum(finding.warning for finding in findings)
    return "\n".join([*lines, f"{len(findings)} findings, {warnings} of them warnings"])


def _faults(options: Options) -> list[str]:
    if options.opd.opd_type == "megatron":
        faults = ["--opd-type megatron: a teacher in the trainer is checked by the run itself, this tool asks servers"]
    else:
        # what a run with these servers would be refused for
        opd = dataclasses.replace(options.opd, use_opd=True, opd_type="sglang")
        faults = opd_faults(dataclasses.replace(options, opd=opd))
    if options.checkpoint.hf_checkpoint is None:
        faults.append("--hf-checkpoint is missing: name the folder of the student's config and tokenizer")
    return faults


def _prompt_faults(options: Options) -> list[str]:
    """What is wrong with the prompts, and with the teachers that they choose."""
    data, opd = options.data, dataclasses.replace(options.opd, use_opd=True)
    if data.prompt_data is None:
        return []
    found = check_prompt_file(
        data.prompt_data,
        data.input_key,
        data.label_key,
        data.metadata_key,
        apply_chat_template=data.apply_chat_template,
        routes=prompt_routes(dataclasses.replace(options, opd=opd)),
    )
    return [f"--prompt-data: {fault}" for fault in found]


def _student(options: Options, folder: Path, with_weights: bool) -> tuple[Student, list[PromptRecord]]:
    tokenizer, data = load_tokenizer(folder), options.data
    settings = json.loads(data.apply_chat_template_kwargs)
    records: list[PromptRecord] = []
    if data.prompt_data is not None:
        records = load_prompt_records(
            data.prompt_data,
            tokenizer=tokenizer,
            input_key=data.input_key,
            label_key=data.label_key,
            metadata_key=data.metadata_key,
            apply_chat_template=data.apply_chat_template,
            chat_template_kwargs=settings,
        )
    student = Student(
        tokenizer,
        folders=[folder],
        log_probs=_load_student(folder) if with_weights else None,
        texts=text_of_records(records, tokenizer, count=JUDGED_TEXTS, longest=JUDGED_TOKENS),
        chat_template_kwargs=settings if data.apply_chat_template else None,
    )
    return student, records


def _load_student(folder: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """The student's log-probabilities of tokens 2..L of texts, from its weights in ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    if not list(folder.glob("*.safetensors")):
        raise UserError(f"--with-student: {folder} has no weights (*.safetensors)")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()

    def log_probs(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = []
        for text in texts:
            tokens = torch.as_tensor(text)
            with torch.no_grad():
                values = model(tokens[None]).logits[0, :-1].float().log_softmax(-1)
            found.append(values.gather(1, tokens[1:, None])[:, 0].numpy())
        return found

    return log_probs


if __name__ == "__main__":
    sys.exit(run_cli(main))

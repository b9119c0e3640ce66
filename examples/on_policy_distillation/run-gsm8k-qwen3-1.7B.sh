#!/bin/bash
# Qwen3-1.7B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-8B on every token.
# The teacher is a SGLang server, and SGLang samples, too. Three GPUs of one machine, 80 GB each by estimate: the trainer
# has the first, the rollout engine the second, the teacher the third. See common.sh for the environment variables.
#
#   examples/on_policy_distillation/run-gsm8k-qwen3-1.7B.sh [train.py options]
#
#   TEACHER_GPUS  devices of the teacher's server (default 2)
set -euo pipefail
STUDENT_MODEL=Qwen3-1.7B
TEACHER_MODEL=Qwen3-8B
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TEACHER_GPUS=${TEACHER_GPUS:-2}

common_arguments gsm8k-qwen3-1.7B
ARGUMENTS+=(
    --opd-type sglang
    --rollout-engine sglang
    --sglang-python "$SGLANG_PYTHON"
    --sglang-base-gpu-id 1
    --sglang-mem-fraction-static 0.8
)
if [[ $DRY_RUN != 1 ]]; then
    prepare_data
fi
if [[ -n ${TEACHER_URL:-} ]]; then
    train "${ARGUMENTS[@]}" --opd-teacher-url "$TEACHER_URL" "$@"
fi
check "${ARGUMENTS[@]}" --opd-teacher-url http://127.0.0.1:30000 "$@"
beside_teacher "--mem-fraction-static 0.8" \
    "$PYTHON" "$REPOSITORY/train.py" "${ARGUMENTS[@]}" --opd-teacher-url '{url}' "$@"

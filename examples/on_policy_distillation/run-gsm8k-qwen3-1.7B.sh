#!/bin/bash
# Qwen3-1.7B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-8B on every token.
# The teacher is a SGLang server, and SGLang samples, too. Three GPUs of one machine, 80 GB each by estimate: the trainer
# has the first, the rollout engine the second, the teacher the third.
#
#   examples/on_policy_distillation/run-gsm8k-qwen3-1.7B.sh [train.py options]
#
#   TEACHER_GPUS  devices of the teacher's server (default 2)
#
# With ENGINE_URLS the engines and with TEACHER_URL the teacher are servers that run already; PROMPT_DATA and EVAL_DATA
# name data of your own. See common.sh for these and the other environment variables.
set -euo pipefail
STUDENT_MODEL=Qwen3-1.7B
TEACHER_MODEL=Qwen3-8B
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TEACHER_GPUS=${TEACHER_GPUS:-2}

common_arguments gsm8k-qwen3-1.7B
engine_arguments 1 1
ARGUMENTS+=(--opd-type sglang)
if [[ $DRY_RUN != 1 ]]; then
    prepare_data "$@"
fi
if [[ -n ${TEACHER_URL:-} ]]; then
    train "${ARGUMENTS[@]}" --opd-teacher-url "$TEACHER_URL" "$@"
fi
refuse_shared_gpus "${ARGUMENTS[@]}" "$@"
check "${ARGUMENTS[@]}" --opd-teacher-url http://127.0.0.1:30000 "$@"
beside_teacher "--mem-fraction-static 0.8" \
    "$PYTHON" "$REPOSITORY/train.py" "${ARGUMENTS[@]}" --opd-teacher-url '{url}' "$@"

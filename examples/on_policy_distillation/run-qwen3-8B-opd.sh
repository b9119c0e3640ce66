#!/bin/bash
# Qwen3-8B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-32B on every token.
# The teacher is a SGLang server, SGLang samples, and the training is a job of a Ray cluster. One machine with eight GPUs
# of 80 GB by estimate: the trainer has 0 to 3, the rollout engines 4 and 5, the teacher 6 and 7. Start Ray on it first,
# with the trainer's GPUs alone, and run the script there:
#
#   ray start --head --num-gpus 4
#   examples/on_policy_distillation/run-qwen3-8B-opd.sh [train.py options]
#
#   TEACHER_GPUS  devices of the teacher's server (default 6,7)
#
# With TEACHER_URL the teacher and with ENGINE_URLS the rollout engines are servers that run already; PROMPT_DATA and
# EVAL_DATA name data of your own. More machines: docs/teachers.md, Several nodes. See common.sh for these and the other
# environment variables.
set -euo pipefail
STUDENT_MODEL=Qwen3-8B
TEACHER_MODEL=Qwen3-32B
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TEACHER_GPUS=${TEACHER_GPUS:-6,7}

common_arguments qwen3-8B-opd
four_gpu_arguments 2
ARGUMENTS+=(--opd-type sglang)
if [[ $DRY_RUN != 1 ]]; then
    prepare_data "$@"
fi
if [[ -n ${TEACHER_URL:-} ]]; then
    submit "${ARGUMENTS[@]}" --opd-teacher-url "$TEACHER_URL" "$@"
fi
refuse_shared_gpus "${ARGUMENTS[@]}" "$@"
check "${ARGUMENTS[@]}" --opd-teacher-url http://127.0.0.1:30000 "$@"
if [[ $DRY_RUN == 1 ]]; then
    job_command "${ARGUMENTS[@]}" --opd-teacher-url '{url}' "$@"
    show "${JOB[@]}"
fi
# beside its teacher this script runs again, and finds the server's address
beside_teacher "--tp 2 --mem-fraction-static 0.85" env 'TEACHER_URL={url}' "${BASH_SOURCE[0]}" "$@"

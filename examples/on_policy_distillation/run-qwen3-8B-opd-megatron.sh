#!/bin/bash
# Qwen3-8B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-32B on every token.
# The teacher is a checkpoint inside the trainer, SGLang samples, and the training is a job of a Ray cluster. One machine
# with eight GPUs of 80 GB by estimate: the trainer has 0 to 3, the rollout engines 4 to 7. Start Ray on it first, with
# the trainer's GPUs alone, and run the script there:
#
#   ray start --head --num-gpus 4
#   examples/on_policy_distillation/run-qwen3-8B-opd-megatron.sh [train.py options]
#
#   TEACHER may be a Hugging Face folder or one that tools/convert_hf_to_torch_dist.py made of it, which loads faster.
#
# With ENGINE_URLS the rollout engines are servers that run already; PROMPT_DATA and EVAL_DATA name data of your own.
# More machines: docs/teachers.md, Several nodes. See common.sh for these and the other environment variables.
set -euo pipefail
STUDENT_MODEL=Qwen3-8B
TEACHER_MODEL=Qwen3-32B
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_arguments qwen3-8B-opd-megatron
four_gpu_arguments 4
ARGUMENTS+=(
    --opd-type megatron
    --opd-teacher-load "$TEACHER"
    --opd-exact-kl-interval 10
)
if [[ $DRY_RUN != 1 ]]; then
    prepare_data "$@"
fi
submit "${ARGUMENTS[@]}" "$@"

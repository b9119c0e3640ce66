#!/bin/bash
# Qwen3-0.6B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-1.7B on every token.
# The teacher is a checkpoint inside the trainer. One GPU; see common.sh for the environment variables.
#
#   examples/on_policy_distillation/run-qwen3-0.6B-gsm8k-opd-megatron.sh [train.py options]
#
#   TEACHER may be a Hugging Face folder or one that tools/convert_hf_to_torch_dist.py made of it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_arguments qwen3-0.6B-gsm8k-opd-megatron
if [[ $DRY_RUN != 1 ]]; then
    prepare_data "$@"
fi
train "${ARGUMENTS[@]}" --rollout-engine-batch-size 128 --opd-type megatron --opd-teacher-load "$TEACHER" "$@"

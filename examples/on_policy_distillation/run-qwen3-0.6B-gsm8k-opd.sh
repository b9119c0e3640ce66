#!/bin/bash
# Qwen3-0.6B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-1.7B on every token.
# The teacher is a SGLang server. One GPU for both; see common.sh for the environment variables.
#
#   examples/on_policy_distillation/run-qwen3-0.6B-gsm8k-opd.sh [train.py options]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_arguments qwen3-0.6B-gsm8k-opd
ARGUMENTS+=(--opd-type sglang --rollout-engine-batch-size 128)
if [[ $DRY_RUN != 1 ]]; then
    prepare_data "$@"
fi
if [[ -n ${TEACHER_URL:-} ]]; then
    train "${ARGUMENTS[@]}" --opd-teacher-url "$TEACHER_URL" "$@"
fi
check "${ARGUMENTS[@]}" --opd-teacher-url http://127.0.0.1:30000 "$@"
beside_teacher "--mem-fraction-static 0.3" \
    "$PYTHON" "$REPOSITORY/train.py" "${ARGUMENTS[@]}" --opd-teacher-url '{url}' "$@"

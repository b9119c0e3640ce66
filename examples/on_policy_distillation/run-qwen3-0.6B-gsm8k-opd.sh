#!/bin/bash
# Qwen3-0.6B learns GSM8K from its own samples: GRPO on right answers, and the opinion of Qwen3-1.7B on every token.
# The teacher is a SGLang server. One GPU for both; see common.sh for the environment variables.
#
#   examples/on_policy_distillation/run-qwen3-0.6B-gsm8k-opd.sh [train.py options]
#
#   TEACHER_URL     address of a server that runs already; without it one is started for the length of the run
#   SGLANG_VENV     environment in which sglang is installed    (default .venv-sglang of the repository)
#   SGLANG_FLAGS    more flags of the server, without quotes    (default --mem-fraction-static 0.3)
#   SERVER_TIMEOUT  seconds that the server has to get healthy  (default 900)
#
# The server's output is in $RUN_DIR/teacher.log. If it ends before it is healthy, the last lines are shown and the
# exit code is 2; it is ended by its process group when the run ends, however that comes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_arguments qwen3-0.6B-gsm8k-opd
ARGUMENTS+=(--opd-type sglang)
if [[ $DRY_RUN == 1 ]]; then
    train "${ARGUMENTS[@]}" --opd-teacher-url "${TEACHER_URL:-http://127.0.0.1:30000}" "$@"
fi
prepare_data
if [[ -n ${TEACHER_URL:-} ]]; then
    train "${ARGUMENTS[@]}" --opd-teacher-url "$TEACHER_URL" "$@"
fi

sglang_python=${SGLANG_VENV:-$REPOSITORY/.venv-sglang}/bin/python
if [[ ! -x $sglang_python ]]; then
    echo "error: $sglang_python does not exist; name the environment of sglang with SGLANG_VENV," \
        "or a running server with TEACHER_URL" >&2
    exit 2
fi
# bad options end here, before anybody waits for a server
"$PYTHON" "$REPOSITORY/train.py" "${ARGUMENTS[@]}" --opd-teacher-url http://127.0.0.1:30000 "$@" --dry-run >/dev/null

# the flags of SGLANG_FLAGS stay as they are, everything else is quoted
printf -v server '%q ' "$sglang_python" -m sglang.launch_server --model-path "$TEACHER" --host 127.0.0.1 --port '{port}'
exec "$PYTHON" -m opd_megatron.servers \
    --log "$RUN_DIR/teacher.log" \
    --start-timeout "${SERVER_TIMEOUT:-900}" \
    --server "$server ${SGLANG_FLAGS:---mem-fraction-static 0.3}" \
    -- "$PYTHON" "$REPOSITORY/train.py" "${ARGUMENTS[@]}" --opd-teacher-url '{url}' "$@"

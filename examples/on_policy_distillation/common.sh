# Sourced by the run-*.sh scripts: where things are, and what their runs have in common.
#
#   MODELS        folder of the models                (default models/ of the repository)
#   DATA          folder of the prompt files          (default data/ of the repository)
#   STUDENT       Hugging Face folder of the student  (default: the script's student in $MODELS)
#   TEACHER       folder of the teacher               (default: the script's teacher in $MODELS)
#   RUN_DIR       the run folder                      (default runs/NAME of the repository)
#   NUM_ROLLOUT   length of the run                   (default 200)
#   PYTHON        interpreter with this project       (default: the active environment's, else that of .venv)
#   DRY_RUN=1     print the commands, as comments, and the resolved configuration; nothing is downloaded, started or
#                 written, so the prompt files must be there (tools/prepare_gsm8k.py)
#
# Scripts that start SGLang:
#   TEACHER_URL     address of a server that runs already; without it one is started for the length of the run
#   SGLANG_VENV     environment in which sglang is installed   (default .venv-sglang of the repository), also for the
#                   rollout engine
#   SGLANG_FLAGS    more flags of the server, without quotes   (default: the script's)
#   SERVER_TIMEOUT  seconds that the server has to get healthy (default 900)
# Its output is in $RUN_DIR/teacher.log. If it ends before it is healthy, the last lines are shown and the exit code is
# 2; it is ended by its process group when the run ends, however that comes.
#
# Scripts that submit a job:
#   RAY_DASHBOARD   address of the Ray cluster's job server    (default http://127.0.0.1:8265)
#
# Keys are read from the environment by name, never written on a command line: for a job, set them where the cluster is
# started. Arguments of a script are passed on to train.py and win over what the script says. A script that sources this
# file may set STUDENT_MODEL and TEACHER_MODEL before.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MODELS=${MODELS:-$REPOSITORY/models}
DATA=${DATA:-$REPOSITORY/data}
STUDENT_MODEL=${STUDENT_MODEL:-Qwen3-0.6B}
TEACHER_MODEL=${TEACHER_MODEL:-Qwen3-1.7B}
STUDENT=${STUDENT:-$MODELS/$STUDENT_MODEL}
TEACHER=${TEACHER:-$MODELS/$TEACHER_MODEL}
NUM_ROLLOUT=${NUM_ROLLOUT:-200}
DRY_RUN=${DRY_RUN:-0}
SGLANG_PYTHON=${SGLANG_VENV:-$REPOSITORY/.venv-sglang}/bin/python
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $REPOSITORY/.venv/bin/python ]]; then
        PYTHON=$REPOSITORY/.venv/bin/python
    fi
fi

if [[ ${TEACHER_URL:-} == *@* ]]; then
    echo "error: TEACHER_URL holds a user name or password, which command lines and the list of jobs would show:" \
        "leave them out, and name the variable of a key with --opd-teacher-api-key-env" >&2
    exit 2
fi

# prepare_data: the two GSM8K prompt files, made once
prepare_data() {
    local split
    for split in train test; do
        if [[ ! -e $DATA/gsm8k_$split.jsonl ]]; then
            "$PYTHON" "$REPOSITORY/tools/prepare_gsm8k.py" --split "$split" --output "$DATA/gsm8k_$split.jsonl"
        fi
    done
}

# common_arguments NAME: fills ARGUMENTS with what both teacher modes share; sizes are an estimate for one GPU with 80 GB
common_arguments() {
    RUN_DIR=${RUN_DIR:-$REPOSITORY/runs/$1}
    source "$REPOSITORY/scripts/models/${STUDENT_MODEL/#Qwen/qwen}.sh"
    ARGUMENTS=(
        "${MODEL_ARGS[@]}"
        --hf-checkpoint "$STUDENT"
        --run-dir "$RUN_DIR"
        # a checkpoint of an earlier call of the script is resumed
        --load "$RUN_DIR/checkpoints"
        --save-interval 50

        --prompt-data "$DATA/gsm8k_train.jsonl"
        --rollout-shuffle
        --apply-chat-template
        --apply-chat-template-kwargs '{"enable_thinking": false}'
        --rm-type gsm8k

        --num-rollout "$NUM_ROLLOUT"
        --rollout-batch-size 32
        --n-samples-per-prompt 4
        --rollout-max-prompt-len 512
        --rollout-max-response-len 1024
        --micro-batch-size 4

        --eval-prompt-data gsm8k "$DATA/gsm8k_test.jsonl@[0:256]"
        --eval-interval 20

        --advantage-estimator grpo
        --use-opd
        --opd-kl-coef 1.0

        --bf16
        --accumulate-allreduce-grads-in-fp32
        --recompute-granularity full
        --recompute-method uniform
        --recompute-num-layers 1
        --lr 1e-6
        --lr-warmup-fraction 0.05
        --adam-beta2 0.98
    )
}

# four_gpu_arguments: adds what the scripts of the 8B student share, a trainer on four GPUs and SGLang on those after them
four_gpu_arguments() {
    ARGUMENTS+=(
        --actor-num-gpus-per-node 4
        --tensor-model-parallel-size 4
        --sequence-parallel
        --micro-batch-size 1
        --rollout-batch-size 64

        --rollout-engine sglang
        --sglang-python "$SGLANG_PYTHON"
        --sglang-base-gpu-id 4
        --sglang-mem-fraction-static 0.8
    )
}

# run COMMAND...: the command in place of the script; a dry run shows it as a comment
run() {
    if [[ $DRY_RUN != 1 ]]; then
        exec "$@"
    fi
    printf '# %s\n' "$(printf '%q ' "$@")"
    exit 0
}

# check ARGUMENT...: bad options of train.py end the script here, before anybody waits for a server; a dry run shows the
# configuration
check() {
    if [[ $DRY_RUN == 1 ]]; then
        "$PYTHON" "$REPOSITORY/train.py" "$@" --dry-run
    else
        "$PYTHON" "$REPOSITORY/train.py" "$@" --dry-run >/dev/null
    fi
}

# train ARGUMENT...: the training itself
train() {
    check "$@"
    run "$PYTHON" "$REPOSITORY/train.py" "$@"
}

# refuse_secrets FLAG...: a key on the server's command line ends the script, also where the flag is abbreviated
refuse_secrets() {
    local word flag secret
    for word in "$@"; do
        flag=${word%%=*}
        for secret in --api-key --admin-api-key --ssl-keyfile-password; do
            if [[ ${#flag} -ge 5 && $flag != --ssl-keyfile && $secret == "$flag"* ]]; then
                echo "error: SGLANG_FLAGS holds $secret, which teacher.log and the list of processes would show:" \
                    "leave it out, as the server listens on this machine alone" >&2
                exit 2
            fi
        done
    done
}

# beside_teacher FLAGS COMMAND...: the command with a teacher's server for as long as it runs; {url} is the address.
# FLAGS are those of the server; TEACHER_GPUS are the devices that it sees, if that is set.
beside_teacher() {
    local flags=${SGLANG_FLAGS:-$1} server
    shift
    refuse_secrets $flags
    if [[ $DRY_RUN != 1 && ! -x $SGLANG_PYTHON ]]; then
        echo "error: $SGLANG_PYTHON does not exist; name the environment of sglang with SGLANG_VENV," \
            "or a running server with TEACHER_URL" >&2
        exit 2
    fi
    # the flags stay as they are, everything else is quoted
    printf -v server '%q ' ${TEACHER_GPUS:+env "CUDA_VISIBLE_DEVICES=$TEACHER_GPUS"} \
        "$SGLANG_PYTHON" -m sglang.launch_server --model-path "$TEACHER" --host 127.0.0.1 --port '{port}'
    run "$PYTHON" -m opd_megatron.servers \
        --log "$RUN_DIR/teacher.log" \
        --start-timeout "${SERVER_TIMEOUT:-900}" \
        --server "$server $flags" \
        -- "$@"
}

# submit ARGUMENT...: train.py as a job of a Ray cluster. The script ends with the job, and the job with the script.
submit() {
    local ray=("$PYTHON" -m ray.scripts.scripts job) address=${RAY_DASHBOARD:-http://127.0.0.1:8265} id client status=0
    id=opd-$(date +%Y%m%d-%H%M%S)-$$
    local command=(
        "${ray[@]}" submit --address "$address" --submission-id "$id"
        # a job begins in a folder of Ray's, and the arguments may name files from here
        -- env -C "$PWD" "PYTHONPATH=$PYTHONPATH" "$PYTHON" "$REPOSITORY/train.py" "$@" --ray-address auto
    )
    check "$@"
    if [[ $DRY_RUN == 1 ]]; then
        run "${command[@]}"
    fi
    trap '"${ray[@]}" stop --address "$address" --no-wait "$id"' INT TERM
    "${command[@]}" &
    client=$!
    wait "$client" || status=$?
    # a signal ends the wait, not the client, which goes on to show the job's last lines
    while kill -0 "$client" 2>/dev/null; do
        status=0
        wait "$client" || status=$?
    done
    exit "$status"
}

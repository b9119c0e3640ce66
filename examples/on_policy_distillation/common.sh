# Sourced by the run-*.sh scripts: where things are, and what their runs have in common.
#
#   MODELS        folder of the models                (default models/ of the repository)
#   DATA          folder of the prompt files          (default data/ of the repository)
#   STUDENT       Hugging Face folder of the student  (default: the script's student in $MODELS)
#   TEACHER       folder of the teacher               (default: the script's teacher in $MODELS)
#   RUN_DIR       the run folder                      (default runs/NAME of the repository)
#   NUM_ROLLOUT   length of the run                   (default 200)
#   PYTHON        interpreter with this project       (default: the active environment's, else that of .venv-gpu or
#                 .venv of the repository)
#   PROMPT_DATA   prompt file to train on             (default gsm8k_train.jsonl in $DATA, made if it is not there);
#                 give the reward that goes with it, --rm-type
#   EVAL_DATA     "NAME PATH" of the evaluation       (default: 256 of gsm8k_test.jsonl in $DATA, made if it is not
#                 there; with PROMPT_DATA none)
#   DRY_RUN=1     print the commands, as comments, and the resolved configuration; nothing is downloaded, started or
#                 written, so models and prompt files must be there
#
# Scripts that sample with SGLang:
#   ENGINE_URLS     addresses of SGLang servers that run already, for this run alone, with spaces between them; without
#                   it rollout engines are started on this machine, on the GPUs after the trainer's
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
#   --actor-num-nodes N, as an argument, takes N machines of the cluster: docs/teachers.md, Several nodes
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

# fail WORD...: the words as an error, and the end of the script
fail() {
    echo "error: $*" >&2
    exit 2
}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
        for environment in .venv .venv-gpu; do
            if [[ -x $REPOSITORY/$environment/bin/python ]]; then
                PYTHON=$REPOSITORY/$environment/bin/python
            fi
        done
    fi
fi
# whole, because a job has the cluster's PATH and not this one
PYTHON=$(type -P "$PYTHON") || fail "PYTHON names no program: give the interpreter of the project's environment"
if [[ $PYTHON != /* ]]; then
    PYTHON=$PWD/$PYTHON
fi

if [[ ${TEACHER_URL:-} == *@* ]]; then
    fail "TEACHER_URL holds a user name or password, which command lines and the list of jobs would show:" \
        "leave them out, and name the variable of a key with --opd-teacher-api-key-env"
fi
if [[ ${ENGINE_URLS:-} == *@* ]]; then
    fail "ENGINE_URLS holds a user name or password, which command lines and the list of jobs would show:" \
        "leave them out, and name the variable of a key with --rollout-engine-api-key-env"
fi

# last_value FLAG DEFAULT ARGUMENT...: prints what train.py would take for a flag of one value
last_value() {
    local flag=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
            "$flag") value=${2:-} ;;
            "$flag"=*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

# prepare_data ARGUMENT...: the GSM8K prompt files that the run reads, made once
prepare_data() {
    local split path
    for split in train test; do
        path=$DATA/gsm8k_$split.jsonl
        case $split in
            train) [[ $(last_value --prompt-data "$PROMPT_FILE" "$@") == "$path" ]] || continue ;;
            test) [[ ${EVALUATION[*]} == *"$path"* ]] || continue ;;
        esac
        if [[ ! -e $path ]]; then
            "$PYTHON" "$REPOSITORY/tools/prepare_gsm8k.py" --split "$split" --output "$path"
        fi
    done
}

# choose_data: PROMPT_FILE, and EVALUATION as arguments
choose_data() {
    PROMPT_FILE=${PROMPT_DATA:-$DATA/gsm8k_train.jsonl}
    EVALUATION=()
    if [[ -n ${EVAL_DATA:-} ]]; then
        [[ $EVAL_DATA == ?*' '?* ]] || fail "EVAL_DATA='$EVAL_DATA': give a name and a path, with a space between them"
        EVALUATION=(--eval-prompt-data "${EVAL_DATA%% *}" "${EVAL_DATA#* }" --eval-interval 20)
    elif [[ -z ${PROMPT_DATA:-} ]]; then
        EVALUATION=(--eval-prompt-data gsm8k "$DATA/gsm8k_test.jsonl@[0:256]" --eval-interval 20)
    fi
}

# common_arguments NAME: fills ARGUMENTS with what both teacher modes share; sizes are an estimate for one GPU with 80 GB
common_arguments() {
    RUN_DIR=${RUN_DIR:-$REPOSITORY/runs/$1}
    source "$REPOSITORY/scripts/models/${STUDENT_MODEL/#Qwen/qwen}.sh"
    choose_data
    ARGUMENTS=(
        "${MODEL_ARGS[@]}"
        --hf-checkpoint "$STUDENT"
        --run-dir "$RUN_DIR"
        # a checkpoint of an earlier call of the script is resumed
        --load "$RUN_DIR/checkpoints"
        --save-interval 50

        --prompt-data "$PROMPT_FILE"
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

        "${EVALUATION[@]}"

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

# engine_arguments GPU ENGINES: adds rollouts by SGLang, of the servers at ENGINE_URLS or of ENGINES that begin at GPU
engine_arguments() {
    local urls
    ARGUMENTS+=(--rollout-engine sglang)
    if [[ -n ${ENGINE_URLS:-} ]]; then
        read -ra urls <<<"$ENGINE_URLS"
        ARGUMENTS+=(--rollout-engine-url "${urls[@]}")
        return
    fi
    ARGUMENTS+=(
        --rollout-num-engines "$2"
        --sglang-python "$SGLANG_PYTHON"
        --sglang-base-gpu-id "$1"
        --sglang-mem-fraction-static 0.8
    )
}

# four_gpu_arguments ENGINES: adds what the scripts of the 8B student share, a trainer on four GPUs of each node and
# SGLang on those after them
four_gpu_arguments() {
    ARGUMENTS+=(
        --actor-num-gpus-per-node 4
        --tensor-model-parallel-size 4
        --sequence-parallel
        --micro-batch-size 1
        --rollout-batch-size 64
        # more nodes are more data-parallel ranks, which share the optimizer's state out
        --use-distributed-optimizer
    )
    engine_arguments 4 "$1"
}

# show COMMAND...: the command as a comment
show() {
    printf '# %s\n' "$(printf '%q ' "$@")"
}

# run COMMAND...: the command in place of the script; a dry run shows it
run() {
    if [[ $DRY_RUN != 1 ]]; then
        exec "$@"
    fi
    show "$@"
    exit 0
}

# hints: on standard error, how to get what the script reads and does not find
hints() {
    if [[ ! -e $STUDENT ]]; then
        echo "hint: hf download Qwen/$STUDENT_MODEL --local-dir $(printf %q "$STUDENT") (or set STUDENT)" >&2
    fi
    if [[ -z ${TEACHER_URL:-} && $TEACHER == [./]* && ! -e $TEACHER ]]; then
        echo "hint: hf download Qwen/$TEACHER_MODEL --local-dir $(printf %q "$TEACHER") (or set TEACHER)" >&2
    fi
    local split
    for split in train test; do
        if [[ "$PROMPT_FILE ${EVALUATION[*]}" == *"$DATA/gsm8k_$split.jsonl"* && ! -e $DATA/gsm8k_$split.jsonl ]]; then
            echo "hint: $PYTHON tools/prepare_gsm8k.py --split $split --output" \
                "$(printf %q "$DATA/gsm8k_$split.jsonl") (or set PROMPT_DATA and EVAL_DATA)" >&2
        fi
    done
}

# check ARGUMENT...: bad options of train.py end the script here, before anybody waits for a server, with hints on what
# is missing; a dry run shows the configuration
check() {
    local status=0
    if [[ $DRY_RUN == 1 ]]; then
        "$PYTHON" "$REPOSITORY/train.py" "$@" --dry-run || status=$?
    else
        "$PYTHON" "$REPOSITORY/train.py" "$@" --dry-run >/dev/null || status=$?
    fi
    if ((status)); then
        hints
        exit "$status"
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
                fail "SGLANG_FLAGS holds $secret, which teacher.log and the list of processes would show:" \
                    "leave it out, as the server listens on this machine alone"
            fi
        done
    done
}

# refuse_shared_gpus ARGUMENT...: a teacher's server on GPUs of this machine that the trainer or the engines have ends
# the script
refuse_shared_gpus() {
    local ranks first engines each device owner
    ranks=$(last_value --actor-num-gpus-per-node 1 "$@")
    first=$(last_value --sglang-base-gpu-id 0 "$@")
    engines=$(last_value --rollout-num-engines 1 "$@")
    each=$(last_value --rollout-num-gpus-per-engine 1 "$@")
    if [[ ! $ranks$first$engines$each =~ ^[0-9]+$ ]]; then
        return # train.py says what is wrong
    fi
    for device in ${TEACHER_GPUS//,/ }; do
        owner=
        if [[ ! $device =~ ^[0-9]+$ ]]; then
            continue
        elif ((device < ranks)); then
            owner="the trainer has the GPUs 0 to $((ranks - 1))"
        elif [[ -z ${ENGINE_URLS:-} ]] && ((device >= first && device < first + engines * each)); then
            owner="the rollout engines have the GPUs $first to $((first + engines * each - 1))"
        fi
        if [[ -n $owner ]]; then
            fail "TEACHER_GPUS=$TEACHER_GPUS: $owner of this machine: choose others, or name a server elsewhere with" \
                "TEACHER_URL"
        fi
    done
}

# beside_teacher FLAGS COMMAND...: the command with a teacher's server for as long as it runs; {url} is the address.
# FLAGS are those of the server; TEACHER_GPUS are the devices that it sees, if that is set.
beside_teacher() {
    local flags=${SGLANG_FLAGS:-$1} server
    shift
    refuse_secrets $flags
    if [[ $DRY_RUN != 1 && ! -x $SGLANG_PYTHON ]]; then
        fail "$SGLANG_PYTHON does not exist; name the environment of sglang with SGLANG_VENV," \
            "or a running server with TEACHER_URL"
    fi
    if [[ $TEACHER == [./]* && ! -e $TEACHER ]]; then
        hints
        fail "the teacher $TEACHER does not exist; name its folder with TEACHER, or a running server with TEACHER_URL"
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

# job_command ARGUMENT...: fills JOB with the command that submits train.py, of which RAY_JOB, DASHBOARD and JOB_ID are
# parts
job_command() {
    RAY_JOB=("$PYTHON" -m ray.scripts.scripts job)
    DASHBOARD=${RAY_DASHBOARD:-http://127.0.0.1:8265}
    JOB_ID=opd-$(date +%Y%m%d-%H%M%S)-$$
    JOB=(
        "${RAY_JOB[@]}" submit --address "$DASHBOARD" --submission-id "$JOB_ID"
        # a job begins in a folder of Ray's, and the arguments may name files from here
        -- env -C "$PWD" "PYTHONPATH=$PYTHONPATH" "$PYTHON" "$REPOSITORY/train.py" "$@" --ray-address auto
    )
}

# submit ARGUMENT...: train.py as a job of a Ray cluster. The script ends with the job, and the job with the script.
submit() {
    local client status=0
    job_command "$@"
    check "$@"
    if [[ $DRY_RUN == 1 ]]; then
        run "${JOB[@]}"
    fi
    trap '"${RAY_JOB[@]}" stop --address "$DASHBOARD" --no-wait "$JOB_ID"' INT TERM
    "${JOB[@]}" &
    client=$!
    wait "$client" || status=$?
    # a signal ends the wait, not the client, which goes on to show the job's last lines
    while kill -0 "$client" 2>/dev/null; do
        status=0
        wait "$client" || status=$?
    done
    exit "$status"
}

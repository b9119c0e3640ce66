# Sourced by the run-*.sh scripts: where things are, and what their runs have in common.
#
#   MODELS        folder of the models                (default models/ of the repository)
#   DATA          folder of the prompt files          (default data/ of the repository)
#   STUDENT       Hugging Face folder of the student  (default $MODELS/Qwen3-0.6B)
#   TEACHER       folder of the teacher               (default $MODELS/Qwen3-1.7B)
#   RUN_DIR       the run folder                      (default runs/NAME of the repository)
#   NUM_ROLLOUT   length of the run                   (default 200)
#   PYTHON        interpreter with this project       (default: the active environment's, else that of .venv)
#   DRY_RUN=1     print the resolved configuration; nothing is downloaded, started or written, so the
#                 prompt files must be there (tools/prepare_gsm8k.py)
#
# Arguments of a script are passed on to train.py and win over what the script says.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MODELS=${MODELS:-$REPOSITORY/models}
DATA=${DATA:-$REPOSITORY/data}
STUDENT=${STUDENT:-$MODELS/Qwen3-0.6B}
TEACHER=${TEACHER:-$MODELS/Qwen3-1.7B}
NUM_ROLLOUT=${NUM_ROLLOUT:-200}
DRY_RUN=${DRY_RUN:-0}
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $REPOSITORY/.venv/bin/python ]]; then
        PYTHON=$REPOSITORY/.venv/bin/python
    fi
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
    source "$REPOSITORY/scripts/models/qwen3-0.6B.sh"
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
        --rollout-engine-batch-size 128
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

# train ARGUMENT...: the training itself, or in a dry run its configuration
train() {
    if [[ $DRY_RUN == 1 ]]; then
        exec "$PYTHON" "$REPOSITORY/train.py" "$@" --dry-run
    fi
    exec "$PYTHON" "$REPOSITORY/train.py" "$@"
}

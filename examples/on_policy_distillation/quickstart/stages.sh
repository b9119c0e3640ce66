# The stages of the quickstart as functions; run.sh and ../quickstart-sglang/run.sh call them in order.
# They need: here (this folder), RUN_ROOT, SEED, python.

# what all three trainings share; the rollout is one optimizer step
COMMON_ARGS=(
  --make-vocab-size-divisible-by 2
  --adam-beta2 0.95 --weight-decay 0 --clip-grad 1.0
  --calculate-per-token-loss
  --rollout-shuffle --rollout-max-response-len 44
  --seed "$SEED"
)

prepare() {
  if ! [[ $SEED =~ ^[0-9]+$ ]]; then
    echo "error: SEED=$SEED: must be a whole number" >&2
    exit 2
  fi
  if [ -e "$RUN_ROOT" ] && [ ! -e "$RUN_ROOT/.quickstart" ]; then
    echo "error: $RUN_ROOT exists and is not a quickstart's folder: choose another RUN_ROOT" >&2
    exit 2
  fi
  [ ! -e "$RUN_ROOT" ] || echo "replacing the quickstart in $RUN_ROOT ($(cat "$RUN_ROOT/.quickstart"))"
  rm -rf "$RUN_ROOT"
  mkdir -p "$RUN_ROOT"
  echo "seed $SEED" >"$RUN_ROOT/.quickstart"
  "$python" tools/make_column_arithmetic.py --out "$RUN_ROOT/data" --seed "$SEED" \
    --num-train 60000 --num-dev 160 --num-heldout 512
  cp "$RUN_ROOT/data/heldout.jsonl" "$RUN_ROOT/heldout.jsonl"
  for model in teacher student; do
    mkdir -p "$RUN_ROOT/models/$model"
    cp "$here/models/$model/config.json" "$RUN_ROOT/data/tokenizer/"* "$RUN_ROOT/models/$model/"
  done
}

# convert TORCH_DIST HF: the last checkpoint of a run as a Hugging Face folder
convert() { "$python" tools/convert_torch_dist_to_hf.py --load "$1" --save "$2"; }

train_teacher() {
  "$python" train.py "${COMMON_ARGS[@]}" --hf-checkpoint "$RUN_ROOT/models/teacher" \
    --loss-type sft_loss --prompt-data "$RUN_ROOT/data/sft.jsonl" --label-key response \
    --num-rollout 900 --rollout-batch-size 32 --micro-batch-size 32 \
    --lr 2e-3 --lr-warmup-iters 50 --lr-decay-style cosine \
    --run-dir "$RUN_ROOT/teacher"
  convert "$RUN_ROOT/teacher/checkpoints" "$RUN_ROOT/teacher_hf"
}

# A fixed number of steps ends at very different accuracies, so a development set decides when to stop.
train_student() {
  "$python" train.py "${COMMON_ARGS[@]}" --hf-checkpoint "$RUN_ROOT/models/student" \
    --loss-type sft_loss --prompt-data "$RUN_ROOT/data/sft.jsonl" --label-key response \
    --num-rollout 2000 --rollout-batch-size 32 --micro-batch-size 32 --lr 2e-3 --lr-warmup-iters 20 \
    --eval-prompt-data dev "$RUN_ROOT/data/dev.jsonl" --eval-label-key label --eval-rm-type column_arithmetic \
    --eval-interval 10 --skip-eval-before-train \
    --stop-eval-metric eval/dev/pass@1 --stop-eval-value 0.35 \
    --run-dir "$RUN_ROOT/student"
  convert "$RUN_ROOT/student/checkpoints" "$RUN_ROOT/student_before_hf"
}

# set_distil_command TEACHER_ARGS...: 500 steps of 128 prompts x 1 sample; the task reward is zero, so the only signal
# is log p_student - log p_teacher. The command is left in the array distil_command.
set_distil_command() {
  distil_command=(
    "$python" train.py "${COMMON_ARGS[@]}" --hf-checkpoint "$RUN_ROOT/student_before_hf"
    --use-opd --opd-kl-coef 1.0 "$@"
    --advantage-estimator none --rm-type zero
    --prompt-data "$RUN_ROOT/data/prompts.jsonl"
    --eval-prompt-data dev "$RUN_ROOT/data/dev.jsonl" --eval-rm-type column_arithmetic --eval-interval 20
    --num-rollout "${OPD_STEPS:-500}" --rollout-batch-size 128 --micro-batch-size 128
    --lr 1e-3 --lr-warmup-iters 5 --lr-decay-style linear
    --run-dir "$RUN_ROOT/opd"
  )
}

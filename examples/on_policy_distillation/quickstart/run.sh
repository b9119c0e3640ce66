#!/usr/bin/env bash
# The quickstart: train a teacher and a weak student by supervised fine-tuning, then distil the teacher into the
# student on the student's own samples. Everything goes through the train.py and the tools that a cluster run uses.
#
#   SEED=n        changes every seed (default 1)
#   RUN_ROOT=DIR  where it all goes (default runs/quickstart; an earlier quickstart there is replaced)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../../.."
SEED=${SEED:-1}
RUN_ROOT=${RUN_ROOT:-runs/quickstart}
python=${PYTHON:-python}
# waiting threads sleep: spinning ones bring a busy machine to a standstill
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

step() { printf '\n==> [%s] %s\n' "$(date +%H:%M:%S)" "$*"; }

source "$here/stages.sh"

step "problems and models (seed $SEED)"
prepare
step "teacher: supervised fine-tuning from random weights"
train_teacher
step "student: supervised fine-tuning, stopped while it is still weak"
train_student
step "on-policy distillation: the student samples, the teacher scores, no task reward"
set_distil_command --opd-type megatron --opd-baseline optimal --opd-teacher-load "$RUN_ROOT/teacher/checkpoints"
opd_started=$SECONDS
"${distil_command[@]}"
opd_seconds=$((SECONDS - opd_started))
step "what was learned: pass@1 and reverse KL on held-out problems"
convert "$RUN_ROOT/opd/checkpoints" "$RUN_ROOT/student_after_hf"
"$python" "$here/evaluate.py" --root "$RUN_ROOT" --seed "$SEED" --opd-seconds "$opd_seconds"

#!/usr/bin/env bash
# The quickstart with real SGLang servers as the teacher and as the rollout engine, and once more with the local engine and
# the teacher in the trainer: 60 steps of each from the same start, which must bring the reverse KL down at least 2x and
# end alike.
# Teacher and weak student come from an earlier quickstart of the same seed if there is one, else they are trained here.
#
#   SEED=n               changes every seed (default 1)
#   RUN_ROOT=DIR         where it all goes (default runs/quickstart-sglang; an earlier one there is replaced)
#   QUICKSTART_ROOT=DIR  where to look for an earlier quickstart (default runs/quickstart)
#   SGLANG_VENV=DIR      environment of the servers (default .venv-sglang)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../quickstart" && pwd)
cd "$here/../../.."
SEED=${SEED:-1}
RUN_ROOT=${RUN_ROOT:-runs/quickstart-sglang}
QUICKSTART_ROOT=${QUICKSTART_ROOT:-runs/quickstart}
SGLANG_VENV=${SGLANG_VENV:-.venv-sglang}
OPD_STEPS=${OPD_STEPS:-60}
python=${PYTHON:-python}
# waiting threads sleep: spinning ones bring a busy machine to a standstill
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

step() { printf '\n==> [%s] %s\n' "$(date +%H:%M:%S)" "$*"; }

source "$here/stages.sh"

step "problems and models (seed $SEED)"
prepare
if [ "$(cat "$QUICKSTART_ROOT/.quickstart" 2>/dev/null)" = "seed $SEED" ] && [ -d "$QUICKSTART_ROOT/student_before_hf" ]; then
  step "teacher and student: those of $QUICKSTART_ROOT"
  cp -r "$QUICKSTART_ROOT/teacher_hf" "$QUICKSTART_ROOT/student_before_hf" "$RUN_ROOT/"
else
  step "teacher: supervised fine-tuning from random weights"
  train_teacher
  step "student: supervised fine-tuning, stopped while it is still weak"
  train_student
fi
step "on-policy distillation: the student samples through one SGLang server, another one scores"
set_distil_command --opd-type sglang --opd-teacher-url '{url}' --opd-teacher-max-in-flight 16 \
  --rollout-engine sglang --sglang-python "$SGLANG_VENV/bin/python" --sglang-server-args='--max-running-requests 128'
server="$SGLANG_VENV/bin/python tools/sglang_cpu/launch.py --model-path $RUN_ROOT/teacher_hf --port {port}"
opd_started=$SECONDS
"$python" -m opd_megatron.servers --log "$RUN_ROOT/server.log" --server "$server" -- "${distil_command[@]}"
opd_seconds=$((SECONDS - opd_started))
step "what was learned: pass@1 and reverse KL on held-out problems"
convert "$RUN_ROOT/opd/checkpoints" "$RUN_ROOT/student_after_hf"
"$python" "$here/evaluate.py" --root "$RUN_ROOT" --seed "$SEED" --opd-seconds "$opd_seconds"

sglang_root=$RUN_ROOT
RUN_ROOT=$sglang_root/local
step "the same steps with the local engine and the teacher in the trainer, in $RUN_ROOT"
mkdir "$RUN_ROOT"
for part in data heldout.jsonl teacher_hf student_before_hf; do
  ln -s "../$part" "$RUN_ROOT/$part"
done
set_distil_command --opd-type megatron --opd-teacher-load "$RUN_ROOT/teacher_hf"
opd_started=$SECONDS
"${distil_command[@]}"
opd_seconds=$((SECONDS - opd_started))
convert "$RUN_ROOT/opd/checkpoints" "$RUN_ROOT/student_after_hf"
"$python" "$here/evaluate.py" --root "$RUN_ROOT" --seed "$SEED" --opd-seconds "$opd_seconds"
step "side by side"
"$python" "$here/../quickstart-sglang/compare.py" --runs "$sglang_root" "$RUN_ROOT"

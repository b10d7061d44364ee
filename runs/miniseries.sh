#!/usr/bin/env bash
# The same recipe at several depths: does a change that helps a small model still help a larger one?
#
#   bash runs/miniseries.sh
#   DEPTHS="2 4 6" CORPUS=stdlib bash runs/miniseries.sh --max-seq-len 256 --total-batch-size 8192    # on a CPU
#   NAME=warm80 bash runs/miniseries.sh --warmup-steps 80                                  # flags go to base_train
#
# Each depth is a run of its own, NAME-dDEPTH. Run again, it skips those that are done and goes on with the others.
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

DEPTHS=${DEPTHS:-8 10 12 14 16 18 20}
NAME=${NAME:-miniseries}
CORPUS=${CORPUS:-fineweb-edu}
NPROC=${NPROC:-$(count_gpus)}   # ranks; one without a GPU
EVAL_BUNDLE=${EVAL_BUNDLE:-}    # the CORE tasks; by default eval_bundle of the base directory, or the small suite
EVAL_TOKENS=${EVAL_TOKENS:-10485760}
TABLE=$ROOT/out/$NAME.csv
DEVICE_TYPE=${DEVICE_TYPE:-$(device_type)}
if [ "$NPROC" -lt 1 ]; then NPROC=1; fi

ensure_training plots
if [ -z "$EVAL_BUNDLE" ] && [ ! -f "$(base_dir)/eval_bundle/core.yaml" ]; then EVAL_BUNDLE=mini; fi

deepest=0
for depth in $DEPTHS; do if [ "$depth" -gt "$deepest" ]; then deepest=$depth; fi; done
prepare_data "$CORPUS" "$NPROC" --depth "$deepest" "$@" --corpus "$CORPUS"

runs=()
for depth in $DEPTHS; do
  run=$NAME-d$depth
  folder=$(run_dir "$run")
  runs+=("$run")
  if ! finished "$folder"; then
    step "training $run" launch "$NPROC" scripts.base_train --device-type "$DEVICE_TYPE" --depth "$depth" "$@" \
      --run "$run" --corpus "$CORPUS" --eval-tokens "$EVAL_TOKENS" --resume auto
  fi
  if ! scored "$folder" core,bpb; then
    step "evaluation of $run" launch "$NPROC" scripts.base_eval --device-type "$DEVICE_TYPE" --run "$run" \
      --eval core,bpb --eval-bundle "$EVAL_BUNDLE" --eval-tokens "$EVAL_TOKENS"
    "$PYTHON" -m scripts.report --run "$run"
  fi
  step "table" write_table "$TABLE" "${runs[@]}"
done
printf '\nDone in %s. The table: %s\n' "$(minutes)" "$TABLE"

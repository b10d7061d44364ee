#!/usr/bin/env bash
# To GPT-2 on a machine with 8 H100: tokenizer, FineWeb-edu, base_train, base_eval.
#
#   bash runs/speedrun.sh
#   EVAL_BUNDLE=eval_bundle.zip bash runs/speedrun.sh    # the CORE tasks without a download
#   DEPTH=20 NPROC=4 RUN=mine bash runs/speedrun.sh --target-param-data-ratio 8    # flags go to base_train
#
# Run again after a stop of any kind, it goes on from where it was.
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

DEPTH=${DEPTH:-24}
NPROC=${NPROC:-8}               # GPUs
RUN=${RUN:-speedrun-d$DEPTH}
CORPUS=${CORPUS:-fineweb-edu}   # or climbmix
EVAL_BUNDLE=${EVAL_BUNDLE:-}    # the CORE tasks: a folder or a zip; by default they are fetched
TRAIN=(--depth "$DEPTH" "$@" --run "$RUN" --corpus "$CORPUS")

gpus=$(count_gpus)
[ "$gpus" -ge "$NPROC" ] ||
  fail "NPROC=$NPROC GPUs are asked for and nvidia-smi lists $gpus. Say how many to use: NPROC=$gpus bash runs/speedrun.sh"
ensure_environment plots
FOLDER=$(run_dir "$RUN")
if [ -z "$EVAL_BUNDLE" ] && [ ! -f "$(base_dir)/eval_bundle/core.yaml" ]; then
  step "the CORE tasks" "$PYTHON" -m scripts.core_download
fi

prepare_data "$CORPUS" "$NPROC" "${TRAIN[@]}"
step "training" launch "$NPROC" scripts.base_train "${TRAIN[@]}" --resume auto
if scored "$FOLDER" core,bpb,sample; then
  printf '\nScored already; to score again, delete %s/base_eval.json.\n' "$FOLDER"
else
  step "evaluation" launch "$NPROC" scripts.base_eval --run "$RUN" --eval core,bpb,sample --eval-bundle "$EVAL_BUNDLE"
fi
step "report" "$PYTHON" -m scripts.report --run "$RUN"
printf '\nDone in %s. Curves and scores, with GPT-2 beside them: %s/report.html\n' "$(minutes)" "$FOLDER"

#!/usr/bin/env bash
# The race to a validation loss of 3.28 on FineWeb in the shape of GPT-2 small, on all GPUs of this machine: shards
# of GPT-2's tokens, base_train, base_eval, and the row of the leaderboard. No tokenizer is trained: GPT-2's comes
# with the shards.
#
#   bash runs/speedrun_124m.sh
#   SEEDS="0 1 2 3" bash runs/speedrun_124m.sh                 # a claim wants several, and says how many at the start
#   bash runs/speedrun_124m.sh --num-iterations 2500           # flags go to base_train
#   RUN=try bash runs/speedrun_124m.sh --target-loss 3.28      # ends where it is reached, which makes no claim
#
# Run again after a stop of any kind, it goes on from where it was.
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

NPROC=${NPROC:-$(count_gpus)}   # GPUs
RUN=${RUN:-speedrun-124m}       # the runs are called RUN-s<seed>
read -r -a SEED_LIST <<<"${SEEDS:-0}"
CORPUS=fineweb10B-gpt2
DEVICE_TYPE=${DEVICE_TYPE:-cuda}  # asked for by name: a GPU that torch cannot use is an error
TRAIN=(--recipe speedrun-124m --depth 12 --device-type "$DEVICE_TYPE" "$@" --corpus "$CORPUS")

gpus=$(count_gpus)
[ "$NPROC" -ge 1 ] || fail "nvidia-smi lists no GPU. This race needs one at least; without, try: bash runs/quickstart.sh"
[ "$gpus" -ge "$NPROC" ] ||
  fail "NPROC=$NPROC GPUs are asked for and nvidia-smi lists $gpus. Say how many to use: NPROC=$gpus bash runs/speedrun_124m.sh"
ensure_training plots
projection=$(projected "$CORPUS" "$NPROC" "${TRAIN[@]}")
say "Recipe: ${TRAIN[*]}"
say "Published: 1.23 minutes to a loss of 3.28 on 8 H100, with about 0.34e9 tokens (record 89 of modded-nanogpt," \
  "2026-08-01), and 2.20 minutes with 0.57e9 (record 46, 2025-11-29)."
say "  Batches, windows, warmdown and momentum here are the record's; of its connections, losses and kernels most are" \
  "not. Whether 3.28 is reached within these tokens is not known: no run has tuned them."
say "$projection"

shards=$(shards_needed "$CORPUS" "$NPROC" "${TRAIN[@]}")
# All of them before the clock starts: a step that waited for a shard would count as training.
step "$shards shards of $CORPUS" "$PYTHON" -m scripts.dataset --corpus "$CORPUS" -n "$shards"

declare_when_begun() { # FOLDER RUN: fix how many runs the claim has, before the loss of one is known
  until [ -f "$1/config.json" ]; do sleep 5; done
  "$PYTHON" -m dev.significance --declare "${#SEED_LIST[@]}" "$2"
}

RUNS=()
ended_early=''
declaring=''
for seed in "${SEED_LIST[@]}"; do
  run=$RUN-s$seed
  folder=$(run_dir "$run")
  if [ "${#SEED_LIST[@]}" -gt 1 ] && [ "${#RUNS[@]}" -eq 0 ]; then
    declare_when_begun "$folder" "$run" &
    declaring=$!
    trap '[ -z "$declaring" ] || kill "$declaring" 2>/dev/null || true' EXIT
  fi
  step "training, seed $seed" launch "$NPROC" scripts.base_train "${TRAIN[@]}" --seed "$seed" --run "$run" --resume auto
  if [ -n "$declaring" ]; then wait "$declaring" || true; declaring=''; fi # it has said why not
  if scored "$folder" bpb,sample; then
    printf '\nScored already; to score again, delete %s/base_eval.json.\n' "$folder"
  else
    step "evaluation, seed $seed" launch "$NPROC" scripts.base_eval --run "$run" --eval bpb,sample \
      --device-type "$DEVICE_TYPE"
  fi
  step "report, seed $seed" "$PYTHON" -m scripts.report --run "$run"
  if grep -q '"status": "target_reached"' "$folder/summary.json"; then ended_early=yes; fi
  RUNS+=("$run")
done

if [ -n "$ended_early" ]; then
  printf '\nA run that ends where its loss reached the target makes no row: its last loss is no fair draw.\n'
else
  step "row of the leaderboard" "$PYTHON" -m dev.leaderboard --race loss "${RUNS[@]}"
fi
printf '\nDone in %s. Curves, scores and configuration of each run: report.html in its folder.\n' "$(minutes)"

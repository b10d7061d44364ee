#!/usr/bin/env bash
# Scaling laws of the recipe: several depths for each of several budgets of FLOPs, and the best size for each.
#
#   bash runs/scaling_laws.sh                                                            # 8 H100, about a day
#   BUDGETS="1e12 3e12" DEPTHS="1 2 3 4" CORPUS=stdlib bash runs/scaling_laws.sh --max-seq-len 256 \
#     --aspect-ratio 32 --head-dim 32 --total-batch-size 4096                            # on a CPU
#   SEEDS="0 1" NAME=wide bash runs/scaling_laws.sh --aspect-ratio 96                    # flags go to base_train
#
# Each is a run of its own, NAME-cBUDGET-dDEPTH-sSEED. Run again, it skips those that are done and goes on with
# the others. Fits, intervals and a plot come from dev/scaling_analysis.py, which can be run again on its own.
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

BUDGETS=${BUDGETS:-1e18 2.15e18 4.64e18 1e19}
DEPTHS=${DEPTHS:-8 10 12 14 16 18 20}
SEEDS=${SEEDS:-0}
NAME=${NAME:-scaling}
CORPUS=${CORPUS:-fineweb-edu}
TOKENIZER=${TOKENIZER:-$CORPUS}
NPROC=${NPROC:-$(count_gpus)}   # ranks; one without a GPU
EVAL_TOKENS=${EVAL_TOKENS:-10485760}
DEVICE_TYPE=${DEVICE_TYPE:-$(device_type)}
if [ "$NPROC" -lt 1 ]; then NPROC=1; fi

ensure_training plots dev

# The smallest model sees the most tokens: the shards are counted for it, with the largest budget.
smallest=$(printf '%s\n' $DEPTHS | sort -n | sed -n 1p)
largest=$(printf '%s\n' $BUDGETS | sort -g | tail -n 1)
prepare_data "$CORPUS" "$NPROC" --depth "$smallest" --target-flops "$largest" "$@" --corpus "$CORPUS"

runs=()
for budget in $BUDGETS; do
  for depth in $DEPTHS; do
    for seed in $SEEDS; do
      run=$NAME-c$budget-d$depth-s$seed
      runs+=("$run")
      if finished "$(run_dir "$run")"; then continue; fi
      step "training $run" launch "$NPROC" scripts.base_train --device-type "$DEVICE_TYPE" \
        --depth "$depth" --target-flops "$budget" "$@" \
        --run "$run" --seed "$seed" --corpus "$CORPUS" --tokenizer "$TOKENIZER" --eval-tokens "$EVAL_TOKENS" \
        --eval-every 0 --sample-every 0 --save-every 0 --save-minutes 10 --keep-last 1 --resume auto
    done
  done
done
mkdir -p "$ROOT/out"
step "analysis" "$PYTHON" -m dev.scaling_analysis "${runs[@]}" --plot "$ROOT/out/$NAME.svg" --json "$ROOT/out/$NAME.json"
printf '\nDone in %s. The plot: %s\n' "$(minutes)" "$ROOT/out/$NAME.svg"

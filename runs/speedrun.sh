#!/usr/bin/env bash
# To GPT-2 on a machine with 8 H100, the fastest published way that our parts reproduce: tokenizer, text, base_train,
# base_eval; then to a model that answers: conversations, chat_sft, chat_eval. What is published of the training, and
# what is projected for these GPUs, is said before anything starts.
#
#   bash runs/speedrun.sh                                # FineWeb-edu
#   CORPUS=climbmix bash runs/speedrun.sh                # the record of karpathy/nanochat
#   EVAL_BUNDLE=eval_bundle.zip bash runs/speedrun.sh    # the CORE tasks without a download
#   DEPTH=20 NPROC=4 RUN=mine bash runs/speedrun.sh --target-param-data-ratio 8    # flags go to base_train, and win
#
# Run again after a stop of any kind, it goes on from where it was.
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

NPROC=${NPROC:-8}                 # GPUs
CORPUS=${CORPUS:-fineweb-edu}     # or climbmix
EVAL_BUNDLE=${EVAL_BUNDLE:-}      # the CORE tasks: a folder or a zip; by default they are fetched
DEVICE_TYPE=${DEVICE_TYPE:-cuda}  # asked for by name: a GPU that torch cannot use is an error

# Recipes by corpus (docs/gpus.md). The vocabulary is that of the tokenizer, 32,768 entries; warmdown and what else
# is not said here are constants of --recipe, and rows of a micro-batch follow from the memory.
case $CORPUS in
  climbmix)
    RECIPE=(--recipe nanochat-2026-07 --target-param-data-ratio 8)
    RECIPE_DEPTH=24
    PUBLISHED='1.65 hours, CORE 0.2626 (mean of five runs), validation bpb 0.7180'
    SOURCE='run 6 of the leaderboard of karpathy/nanochat, commit a825e63, 2026-03-14'
    ;;
  *)
    RECIPE=(--recipe nanochat-2026-01 --target-param-data-ratio 7.25 --total-batch-size 524288)
    RECIPE_DEPTH=26
    PUBLISHED='2.49 hours, CORE 0.2626 and 0.2729 (two runs), validation bpb 0.7500'
    SOURCE='pull request 516 of karpathy/nanochat, 2026-02-08, on FineWeb-edu'
    ;;
esac
DEPTH=${DEPTH:-$RECIPE_DEPTH}
RUN=${RUN:-speedrun-d$DEPTH}

gpus=$(count_gpus)
[ "$gpus" -ge "$NPROC" ] ||
  fail "NPROC=$NPROC GPUs are asked for and nvidia-smi lists $gpus. Say how many to use: NPROC=$gpus bash runs/speedrun.sh"
unlike=''
if has_fp8; then RECIPE+=(--fp8); else unlike+=', bf16 instead of fp8, which wants a Hopper or newer'; fi
[ "$DEPTH" = "$RECIPE_DEPTH" ] || unlike+=", depth $DEPTH"
[ "$NPROC" = 8 ] || unlike+=", GPUs: $NPROC"
[ $# -eq 0 ] || unlike+=", $*"
TRAIN=(--depth "$DEPTH" "${RECIPE[@]}" --device-type "$DEVICE_TYPE" "$@" --run "$RUN" --corpus "$CORPUS")

ensure_training plots
projection=$(projected "$CORPUS" "$NPROC" "${TRAIN[@]}")
say "Recipe: ${TRAIN[*]}"
say "Published: $PUBLISHED, training alone on 8 H100 with kernels of their own. GPT-2 (1.6 B) has a CORE of 0.2565."
say "  Source: $SOURCE. CORE scatters by 0.005 over seeds."
[ -z "$unlike" ] || say "  Here it is otherwise${unlike/,/:}. Those figures are not for this run."
say "$projection"
FOLDER=$(run_dir "$RUN")
if [ -z "$EVAL_BUNDLE" ] && [ ! -f "$(base_dir)/eval_bundle/core.yaml" ]; then
  step "the CORE tasks" "$PYTHON" -m scripts.core_download
fi

prepare_data "$CORPUS" "$NPROC" "${TRAIN[@]}"
step "training" launch "$NPROC" scripts.base_train "${TRAIN[@]}" --resume auto
if scored "$FOLDER" core,bpb,sample; then
  printf '\nScored already; to score again, delete %s/base_eval.json.\n' "$FOLDER"
else
  step "evaluation" launch "$NPROC" scripts.base_eval --run "$RUN" --eval core,bpb,sample --eval-bundle "$EVAL_BUNDLE" \
    --device-type "$DEVICE_TYPE"
fi
step "report" "$PYTHON" -m scripts.report --run "$RUN"

# The mixture of karpathy/nanochat, the tasks of ChatCORE, and made conversations for spelling and identity.
for corpus in made smoltalk mmlu gsm8k arc-easy arc-challenge humaneval; do
  step "conversations: $corpus" "$PYTHON" -m scripts.chat_data --corpus "$corpus"
done
step "SFT" launch "$NPROC" scripts.chat_sft --base "$RUN" --run "$RUN-sft" --data runs/chat_mixture.toml \
  --device-type "$DEVICE_TYPE" --resume auto
ensure_chat_scores "$RUN-sft" chatcore --device-type "$DEVICE_TYPE"
step "report of $RUN-sft" "$PYTHON" -m scripts.report --run "$RUN-sft"

printf '\nDone in %s. Curves and scores, with GPT-2 beside them: %s/report.html\n' "$(minutes)" "$FOLDER"
printf 'Talk to it: .venv/bin/python -m scripts.chat_cli --run %s\n' "$RUN-sft"

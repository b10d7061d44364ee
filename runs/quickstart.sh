#!/usr/bin/env bash
# From nothing to a language model that is trained, scored and heard: on any machine, without a GPU, with text
# that is already there (Python's own sources and help). Takes some minutes after the installation.
#
#   bash runs/quickstart.sh
#
# Run again, it goes on from where it was stopped, and redoes nothing that is done.
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

# What is trained. Everything that is not said follows from --depth.
RUN=quickstart
CORPUS=stdlib
VOCAB_SIZE=8192
TRAIN=(
  --depth 4
  --max-seq-len 256
  --total-batch-size 4096
  --device-batch-size 16
  --num-iterations 250
  --eval-every 50
  --eval-tokens 65536
  --save-every 100
  --sample-every 100
  --keep-tails
)
# How it is scored: with the small suite made on the spot.
EVAL=(--eval "core,bpb,sample" --eval-bundle mini --eval-tokens 65536)

ensure_environment plots
BASE=$(base_dir)
FOLDER=$(run_dir "$RUN")
need_disk "$BASE" 1 "the quickstart"

step "corpus" "$PYTHON" -m scripts.dataset --corpus "$CORPUS"
step "tokenizer" "$PYTHON" -m scripts.tok_train --corpus "$CORPUS" --vocab-size "$VOCAB_SIZE"
step "training" "$PYTHON" -m scripts.base_train --run "$RUN" --corpus "$CORPUS" "${TRAIN[@]}" --resume auto
if scored "$FOLDER" core,bpb,sample; then
  printf '\nScored already; to score again, delete %s/base_eval.json.\n' "$FOLDER"
else
  step "evaluation" "$PYTHON" -m scripts.base_eval --run "$RUN" "${EVAL[@]}"
fi
step "report" "$PYTHON" -m scripts.report --run "$RUN"

cat <<END

Done in $(minutes). Everything is in $BASE (NANOCHAT_BASE_DIR chooses another place):
  data/$CORPUS                  the text
  tokenizers/$CORPUS            the tokenizer, in the format of Hugging Face
  runs/$RUN/checkpoints     the model
  runs/$RUN/base_eval.json  its scores, and core_predictions.jsonl: every answer
  runs/$RUN/report.html     curves, scores, samples and configuration: open it in a browser

What to type next:
  .venv/bin/python -m scripts.generate --run $RUN "def read_file(path):"
  .venv/bin/python -m scripts.base_train --help
  bash runs/test.sh
With 8 GPUs: bash runs/speedrun.sh trains a model of GPT-2's class.
END

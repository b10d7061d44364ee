#!/usr/bin/env bash
# From nothing to a language model that answers: on any machine, without a GPU, with text that is already there
# (Python's own sources and help) and conversations that are made on the spot. Eleven to thirteen minutes on
# two cores after the installation.
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
  --eval-tokens 32768
  --save-every 100
  --sample-every 100
  --keep-tails
)
# How it is scored: with the small suite made on the spot.
EVAL=(--eval "core,bpb,sample" --eval-bundle mini --eval-tokens 65536)

# What it learns then: to answer (SFT), and to reach for the calculator where that is right (RL).
SFT_RUN=$RUN-sft
RL_RUN=$RUN-rl
SFT=(--data made --eval-tokens 32768 --save-every 100)
RL=(--task bigsum --max-new-tokens 48 --save-every 16)
CHAT_EVAL=(--max-new-tokens 64 --max-per-task 200)
QUESTION="What is 347 + 589?"

ensure_environment plots serve
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

step "conversations" "$PYTHON" -m scripts.chat_data --corpus made
ensure_chat_scores "$RUN" made "${CHAT_EVAL[@]}" --max-per-task 20 # what it answers before it has seen a conversation
step "SFT" "$PYTHON" -m scripts.chat_sft --base "$RUN" --run "$SFT_RUN" "${SFT[@]}" --resume auto
ensure_chat_scores "$SFT_RUN" made "${CHAT_EVAL[@]}"
step "RL" "$PYTHON" -m scripts.chat_rl --base "$SFT_RUN" --run "$RL_RUN" "${RL[@]}" --resume auto
ensure_chat_scores "$RL_RUN" made "${CHAT_EVAL[@]}"
step "what RL changed" "$PYTHON" -m scripts.chat_eval --compare "$SFT_RUN" "$RL_RUN"
for run in "$SFT_RUN" "$RL_RUN"; do
  step "report of $run" "$PYTHON" -m scripts.report --run "$run"
done
step "a question: $QUESTION" "$PYTHON" -m scripts.chat_cli --run "$RL_RUN" --temperature 0 -p "$QUESTION"

cat <<END

Done in $(minutes). Everything is in $BASE (NANOCHAT_BASE_DIR chooses another place):
  data/$CORPUS, data/made      the text, and the conversations
  tokenizers/$CORPUS            the tokenizer, in the format of Hugging Face
  runs/$RUN             the base model: checkpoints, base_eval.json, core_predictions.jsonl
  runs/$SFT_RUN         after SFT: checkpoints, chat_eval.json, chat_answers.jsonl (every answer)
  runs/$RL_RUN          after RL: the same
  report.html of each       curves, scores, samples and configuration: open it in a browser

Talk to it, in the terminal or in a browser:
  .venv/bin/python -m scripts.chat_cli --run $RL_RUN
  .venv/bin/python -m scripts.chat_web --run $RL_RUN

What else to type:
  .venv/bin/python -m scripts.generate --run $RUN "def read_file(path):"
  .venv/bin/python -m scripts.chat_sft --help
  bash runs/test.sh
With 8 GPUs: bash runs/speedrun.sh trains a model of GPT-2's class, and then to answer.
END

# Shared by the drivers of this folder: the environment, the data, and how a step starts, fails and is timed.
# Sourced, never run. Sets ROOT, VENV and PYTHON, and goes to ROOT. Works with the bash 3.2 of macOS.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
export PYTHONUNBUFFERED=1 # lines appear when they are printed, in a log too
# Threads that wait for each other sleep instead of spinning. With one other busy process on two cores, a step of
# depth 4 takes 1.6 s so and 17 s otherwise; on a quiet machine 1.4 s and 1.3 s (dev/LOG.md, 2026-11-21).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

from_here() { # PATH: absolute; a relative one is meant from where the script was started
  case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac
}
if [ -n "${NANOCHAT_BASE_DIR:-}" ]; then
  NANOCHAT_BASE_DIR=$(from_here "$NANOCHAT_BASE_DIR")
  export NANOCHAT_BASE_DIR
fi
case ${EVAL_BUNDLE:-mini} in mini) ;; *) EVAL_BUNDLE=$(from_here "$EVAL_BUNDLE") ;; esac
cd "$ROOT"

CARGO_BIN=${CARGO_HOME:-${HOME:-/nonexistent}/.cargo}/bin # where rustup puts it; not on the PATH of every shell
if [ -d "$CARGO_BIN" ]; then PATH=$CARGO_BIN:$PATH; fi

say() { printf '%s\n' "$*"; }

fail() { # what is wrong, and what to do: one line
  printf 'error: %s\n' "$*" >&2
  exit 2
}

have() { command -v "$1" >/dev/null 2>&1; }

step() { # TITLE COMMAND...: run it, say how long it took; its failure ends the script with its exit code
  local title=$1 began=$SECONDS code=0
  shift
  printf '\n== %s\n' "$title"
  "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    printf 'stopped at: %s (exit code %d from: %s)\n' "$title" "$code" "$*" >&2
    exit "$code"
  fi
  printf '== %s: %d s\n' "$title" $((SECONDS - began))
}

minutes() { # of this script so far
  awk -v seconds="$SECONDS" 'BEGIN { printf "%.1f minutes", seconds / 60 }'
}

# --------------------------------------------------------------------------------------------------------------
# The environment

is_new_enough() { # PYTHON: 3.10 or newer
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() { # print a Python that is new enough
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
    if have "$name" && is_new_enough "$name"; then
      command -v "$name"
      return 0
    fi
  done
  have uv && uv python find --no-python-downloads '>=3.10' 2>/dev/null
}

need_python() { # in .venv already, or one to make it with
  is_new_enough "$PYTHON" || find_python >/dev/null ||
    fail "no Python 3.10 or newer was found. Install one (python.org, apt install python3, uv python install) and run again."
}

need_rust() { # cargo and rustc, as new as the crate asks
  local wanted found
  { have cargo && have rustc; } ||
    fail "Rust is not installed (no cargo), and the tokenizer is written in it. Install it from rustup.rs and run again."
  wanted=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' rustbpe/Cargo.toml)
  found=$(rustc --version 2>/dev/null | sed 's/^rustc \([0-9.]*\).*/\1/') || true
  [ -n "$found" ] || fail "rustc does not run. Choose a toolchain with: rustup default stable"
  awk -v wanted="$wanted" -v found="$found" 'BEGIN {
    split(wanted, w, "."); split(found, f, ".")
    exit !(f[1] * 1000 + f[2] >= w[1] * 1000 + w[2])
  }' || fail "Rust $found is too old, the tokenizer needs $wanted or newer. Renew it with: rustup update stable"
}

need_compiler() { # Rust links with it
  have cc || fail "there is no C compiler (cc), which Rust links with. Install one:" \
    "apt install build-essential, dnf install gcc, or xcode-select --install; then run again."
}

need_disk() { # FOLDER GB PURPOSE
  local folder=$1 gb=$2 free_kb
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  free_kb=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
  [ "$free_kb" -ge $((gb * 1000 * 1000)) ] ||
    fail "$folder has $((free_kb / 1000 / 1000)) GB free and $3 needs about $gb GB. Free some space and run again."
}

install_gb() { # the PyTorch of Linux brings CUDA's libraries: 6 GB installed, and what pip unpacks on the way
  if "$PYTHON" -c 'import torch' >/dev/null 2>&1; then
    say 1
  elif [ "$(uname -s)" = Linux ]; then
    say 8
  else
    say 3
  fi
}

make_venv() { # keep one that works
  local base
  if is_new_enough "$PYTHON"; then return; fi
  base=$(find_python)
  rm -rf "$VENV"
  if have uv; then
    uv venv --quiet --python "$base" "$VENV" || fail "uv could not make $VENV, see above."
  else
    "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
      fail "$base cannot make virtual environments. Install its venv module (apt install python3-venv) or uv, and run again."
    "$base" -m venv "$VENV" || fail "$base could not make $VENV, see above."
  fi
}

pip_install() { # REQUIREMENT...
  local quiet=--quiet
  if [ -t 1 ]; then quiet=; fi # on a terminal, show the progress of a download of gigabytes
  if have uv; then
    uv pip install ${quiet:+"$quiet"} --python "$PYTHON" "$@"
    return
  fi
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null
  # Older ones install no folder without a setup.py; Python 3.10.0 to 3.10.2 put 21.2.4 into an environment.
  if pip_is_older_than 21 3; then pip_here ${quiet:+"$quiet"} --upgrade pip; fi
  pip_here ${quiet:+"$quiet"} "$@"
}

pip_here() { # into .venv, also where the user's settings say --user or another folder
  PIP_USER=0 env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT \
    "$PYTHON" -m pip install --disable-pip-version-check "$@"
}

pip_is_older_than() { # MAJOR MINOR
  "$PYTHON" -m pip --version 2>/dev/null | awk -v major="$1" -v minor="$2" '
    $1 == "pip" { split($2, v, "."); older = v[1] * 1000 + v[2] < major * 1000 + minor }
    END { exit !older }'
}

install_key() { # what an installation depends on; Python sources do not count, they are used where they are
  local file
  {
    say "$ROOT"
    "$PYTHON" --version
    find . -maxdepth 1 \( -name pyproject.toml -o -name '*.pyi' \) -exec cat {} +
    find rustbpe -type f -not -path 'rustbpe/target/*' | LC_ALL=C sort | while read -r file; do cat "$file"; done
  } | cksum
}

ensure_environment() { # EXTRA...: .venv with nanochat and these extras; nothing is done where it is there already
  local stamp=$VENV/nanochat-installed key old_key='' old_extras='' extras extra missing=''
  if [ -x "$PYTHON" ] && [ -f "$stamp" ]; then
    { read -r old_key && read -r old_extras; } <"$stamp" || true
  fi
  extras=" $old_extras "
  for extra in "$@"; do
    case $extras in *" $extra "*) ;; *) extras="$extras$extra " missing=yes ;; esac
  done
  if [ -n "$old_key" ] && [ -z "$missing" ] && [ "$(install_key)" = "$old_key" ]; then return; fi
  need_python
  need_rust
  need_compiler
  need_disk "$ROOT" "$(install_gb)" "the installation of PyTorch and what belongs to it"
  make_venv
  rm -f "$stamp"
  extras=$(printf '%s' "$extras" | sed 's/^ *//; s/ *$//')
  say "Installing into $VENV; the first time takes a few minutes, PyTorch is large."
  step "installation" pip_install -e ".[${extras// /,}]"
  key=$(install_key)
  printf '%s\n%s\n' "$key" "$extras" >"$stamp"
}

# --------------------------------------------------------------------------------------------------------------
# Data and runs

base_dir() { "$PYTHON" -c 'from nanochat.common import files; print(files.base_dir())'; }

run_dir() { "$PYTHON" -c 'import sys; from nanochat.common import files; print(files.run_dir(sys.argv[1]))' "$1"; }

finished() { # RUN_FOLDER: training came to its end, or to its target loss
  [ -f "$1/summary.json" ] && grep -qE '"status": "(finished|target_reached)"' "$1/summary.json"
}

scored() { # RUN_FOLDER PARTS: base_eval.json has these parts of the newest checkpoint; times of files do not say that
  [ -f "$1/base_eval.json" ] &&
    "$PYTHON" -c 'import sys; from nanochat.evaluation import base_eval; sys.exit(not base_eval.is_scored(*sys.argv[1:]))' \
      "${1##*/}" "$2"
}

chat_scored() { # RUN_FOLDER TASKS: chat_eval.json has these tasks of the newest checkpoint
  [ -f "$1/chat_eval.json" ] && "$PYTHON" - "${1##*/}" "$2" <<'PYTHON'
import sys

from nanochat.chat import tasks
from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files, run_files
from nanochat.common.errors import UserError
from nanochat.evaluation.base_eval import weights_of

run, asked = sys.argv[1:]
try:
    run_files.read_chat_scores(run)  # refused where it is damaged
    scores = files.read_json(files.run_dir(run) / "chat_eval.json")
    newest = max(checkpoint_format.steps_of(run), default=-1)
    same = newest == scores["step"] and weights_of(run, newest) == scores.get("weights")
    sys.exit(not (same and {*tasks.parse(asked)} <= {*scores["tasks"]}))
except UserError:
    sys.exit(1)
PYTHON
}

ensure_chat_scores() { # RUN TASKS FLAG...: of a chat model, unless they are there; NPROC ranks
  local run=$1 tasks=$2 folder
  shift 2
  folder=$(run_dir "$run")
  if chat_scored "$folder" "$tasks"; then
    printf '\n%s is scored already; to score it again, delete %s/chat_eval.json.\n' "$run" "$folder"
  else
    step "answers of $run" launch "${NPROC:-1}" scripts.chat_eval --run "$run" --tasks "$tasks" "$@"
  fi
}

count_gpus() { if have nvidia-smi; then nvidia-smi -L | grep -c '^GPU' || true; else say 0; fi; }

gpu_query() { # FIELD: of each GPU, a line; what an old nvidia-smi does not know is an error, on one line
  if have nvidia-smi; then nvidia-smi --query-gpu="$1" --format=csv,noheader || true; fi
}

has_fp8() { # every GPU is a Hopper or newer: compute capability 9
  gpu_query compute_cap | awk '$1 + 0 < 9 { older = 1 } END { exit !(NR && !older) }'
}

device_type() { # what to ask for by name where GPUs are listed: "auto" is for a machine without
  if [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && [ "$(count_gpus)" -gt 0 ]; then say cuda; else say auto; fi
}

ensure_training() { # EXTRA...: the environment to train in on DEVICE_TYPE
  if [ "$DEVICE_TYPE" = cuda ]; then set -- "$@" gpu; fi
  ensure_environment "$@"
}

launch() { # NPROC MODULE FLAG...: on so many ranks
  local ranks=$1 module=$2
  shift 2
  if [ "$ranks" -gt 1 ]; then
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PYTHON" -m torch.distributed.run --standalone \
      --nproc_per_node="$ranks" -m "$module" -- "$@" # without --, torchrun takes --run for an option of its own
  else
    "$PYTHON" -m "$module" "$@"
  fi
}

# Shards of a run. Of text: tokens of its plan x 4.8 characters a token (of FineWeb-edu, with 32,768 entries), over
# the 65 % of them that packing keeps (100 % with --keep-tails), over 250 million characters a shard. Depth 24 at
# ratio 12: 8.8e9 x 4.8 / 0.65 / 250e6 = 258 shards. Of GPT-2's tokens: 100 million a shard, of which all are used.
shards_needed() { # CORPUS NPROC TRAIN_FLAG...
  "$PYTHON" - "$@" <<'PYTHON'
import math
import sys

from nanochat.common import errors
from nanochat.config import arguments
from nanochat.config import plan as planning
from nanochat.data.hub_corpora import HUB_CORPORA


@errors.cli
def main() -> None:
    corpus, ranks, *flags = sys.argv[1:]
    args, remote = arguments.parse(arguments.TrainArgs, flags), HUB_CORPORA[corpus]
    vocab_size = 50265 if remote.vocabulary else 32768
    tokens = planning.plan(args, vocab_size, world_size=int(ranks)).tokens
    kept = 1.0 if args.keep_tails else 0.65
    needed = math.ceil(tokens / 100e6) if remote.vocabulary else max(8, math.ceil(tokens * 4.8 / kept / 250e6))
    print(min(needed, remote.last))


main()
PYTHON
}

# The time that our code would take on these GPUs, from FLOPs and bytes. No figure of it is measured.
projected() { # CORPUS NPROC TRAIN_FLAG...
  "$PYTHON" - "$(gpu_query name | sed -n 1p)" "$@" <<'PYTHON'
import sys

from dev.bench import roofline
from nanochat.common import errors
from nanochat.config import arguments
from nanochat.config import plan as planning
from nanochat.data.hub_corpora import HUB_CORPORA


@errors.cli
def main() -> None:
    name, corpus, ranks, *flags = sys.argv[1:]
    args = arguments.parse(arguments.TrainArgs, flags)
    vocab_size = 50265 if corpus in HUB_CORPORA and HUB_CORPORA[corpus].vocabulary else 32768
    plan = planning.plan(args, vocab_size, world_size=int(ranks))
    flops = plan.tokens * plan.flops_per_token
    size = f"{plan.steps:,} steps, {plan.tokens / 1e9:.2f}e9 tokens, {flops:.2e} FLOPs"
    card = next((card for card in roofline.CARDS.values() if card.name in name.lower()), None)
    if card is None:
        print(f"Ours: {size}. dev/bench/roofline.py has no rates of {name or 'this GPU'} to project a time with.")
        return
    found = roofline.project(plan, card, roofline.traffic_of(args.fp8))
    time = f"{found.hours:.2f} hours" if found.hours >= 1 else f"{60 * found.hours:.1f} minutes"
    print(f"Ours: not measured yet. {size}: {time} of training on {ranks} x {name}, MFU {found.mfu:.0%}.")
    print("  This is a projection from FLOPs and bytes (dev/bench/roofline.py).")


main()
PYTHON
}

train_tokenizer() { # CORPUS FLAG...: the tokenizer of the same name, unless there is one
  if [ -f "$(base_dir)/tokenizers/$1/tokenizer.json" ]; then
    say "The tokenizer $1 is there already."
  else
    step "tokenizer" "$PYTHON" -m scripts.tok_train --corpus "$@"
  fi
}

prepare_data() { # CORPUS NPROC TRAIN_FLAG...: its shards, and the tokenizer of the same name
  local corpus=$1 shards download
  case $corpus in
    fineweb-edu | climbmix) ;;
    stdlib)
      step "corpus" "$PYTHON" -m scripts.dataset --corpus stdlib
      train_tokenizer stdlib --vocab-size 8192 # it is small: a larger vocabulary would be rare words
      return
      ;;
    *)
      train_tokenizer "$corpus"
      return
      ;;
  esac
  shards=$(shards_needed "$@")
  # 8 shards have the 2e9 characters that the tokenizer is trained on. The others arrive while it and the model
  # are trained: base_train waits for the shard that it needs next, and says so.
  step "first shards of $corpus" "$PYTHON" -m scripts.dataset --corpus "$corpus" -n "$shards" --first 8
  say "Fetching $shards shards in all, in the background."
  "$PYTHON" -m scripts.dataset --corpus "$corpus" -n "$shards" &
  download=$!
  # shellcheck disable=SC2064 # the process id of now
  trap "kill $download 2>/dev/null || true" EXIT
  train_tokenizer "$corpus"
}

write_table() { # CSV RUN...: one row a run, and the same as markdown on the console
  "$PYTHON" - "$@" <<'PYTHON'
import csv
import io
import sys
from pathlib import Path

from nanochat.common import errors, files

HEAD = ("run", "depth", "tokens", "train_minutes", "tokens_per_second", "mfu", "val_bpb", "core", "core_stderr")


def row(run: str) -> list[str]:
    """What a run has so far; empty where it has not."""
    folder = files.run_dir(run)
    ended, scored = (
        files.read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("summary.json", "base_eval.json")
    )
    values = (
        ended.get("depth"),
        ended.get("tokens"),
        ended["train_seconds"] / 60 if ended else None,
        ended.get("tokens_per_second"),
        ended.get("mfu"),
        ended.get("val_bpb"),
        scored.get("core_metric"),
        scored.get("core_stderr"),
    )
    return [run, *("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)]


@errors.cli
def main() -> None:
    path, *runs = sys.argv[1:]
    rows = [row(run) for run in runs]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEAD, *rows])
    files.atomic_write(Path(path), text.getvalue())
    for line in (HEAD, ["---"] * len(HEAD), *rows):
        print(f"| {' | '.join(line)} |")


main()
PYTHON
}

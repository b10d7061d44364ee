#!/usr/bin/env bash
# All that needs CUDA, in one go, within nine minutes on one Hopper GPU: the most valuable figures first, tests
# among them, each kept as it is measured. Run again on the same commit, it goes on with what is missing.
#
#     bash dev/bench/gpu.sh                  # figures to $OUT/gpu.json, by default in ./out; what was printed to gpu.log
#     bash dev/bench/gpu.sh --budget 240     # flags go to dev.bench.gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT="${OUT:-./out}"
PYTHON="${PYTHON:-python3}"
if [ -x .venv/bin/python ] && [ "$PYTHON" = python3 ]; then PYTHON=.venv/bin/python; fi

status=0
"$PYTHON" -m dev.bench.gpu --json "$OUT/gpu.json" "$@" || status=$?
if [ -f "$OUT/gpu.json" ]; then "$PYTHON" -m dev.bench.roofline --measured "$OUT/gpu.json" || true; fi
exit "$status"

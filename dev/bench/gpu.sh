#!/usr/bin/env bash
# All that needs CUDA, in one go, under ten minutes on one Hopper GPU: the GPU tests, then the figures as JSON.
#
#     bash dev/bench/gpu.sh            # writes to $OUT, by default ./out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT="${OUT:-./out}"
PYTHON="${PYTHON:-python3}"
if [ -x .venv/bin/python ] && [ "$PYTHON" = python3 ]; then PYTHON=.venv/bin/python; fi
mkdir -p "$OUT"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA: nothing to measure. Run it on a machine with an NVIDIA GPU." >&2
    exit 2
fi
failed=0
"$PYTHON" -m pytest tests/gpu -m gpu 2>&1 | tee "$OUT/gpu_tests.txt" || failed=$?
"$PYTHON" -m dev.bench.gpu --json "$OUT/gpu.json" 2>&1 | tee "$OUT/gpu.txt"
exit "$failed"

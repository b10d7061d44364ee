#!/usr/bin/env bash
# Everything that checks the project: style, types, the Rust crate, the tests. Stops at the first failure.
#
#   bash runs/test.sh            # what takes minutes
#   bash runs/test.sh --slow     # arguments go to pytest; this one adds the slow tests
# shellcheck source=runs/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

need_python
need_rust
need_compiler
for part in fmt clippy; do
  cargo "$part" --version >/dev/null 2>&1 ||
    fail "cargo $part is not installed. Add it with: rustup component add rustfmt clippy"
done

# In a folder of its own: the installation builds the crate too, and cargo lets one at a time into a folder.
CRATE=(--manifest-path rustbpe/Cargo.toml)
check_crate() {
  export CARGO_TARGET_DIR=$ROOT/rustbpe/target/checks
  step "format of the crate" cargo fmt "${CRATE[@]}" --check
  step "lint of the crate" cargo clippy "${CRATE[@]}" --quiet --all-targets --features python -- -D warnings
  step "tests of the crate" cargo test "${CRATE[@]}" --quiet
}

# The crate is checked while the environment is installed, which waits for the network and uses one core.
CRATE_LOG=$(mktemp)
check_crate >"$CRATE_LOG" 2>&1 &
CHECKING=$!
trap 'kill "$CHECKING" 2>/dev/null || true; rm -f "$CRATE_LOG"' EXIT

ensure_environment plots serve dev

step "lint" "$PYTHON" -m ruff check .
step "format" "$PYTHON" -m ruff format --check .
step "types" "$PYTHON" -m mypy
code=0
wait "$CHECKING" || code=$?
cat "$CRATE_LOG"
if [ "$code" -ne 0 ]; then exit "$code"; fi
# A worker a core, up to four; each computes on one thread, the models of the tests are too small for more.
OMP_NUM_THREADS=1 step "tests" "$PYTHON" -m pytest -n auto --maxprocesses 4 "$@"
printf '\nAll checks passed in %s.\n' "$(minutes)"

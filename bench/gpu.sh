#!/usr/bin/env bash
# Everything that wants a GPU, on a machine with torch, triton and nvcc and no network:
#
#   bench/gpu.sh list             the modes, each under nine minutes
#   bench/gpu.sh all              every mode, in that order
#   bench/gpu.sh test:losses bench:softmax_ce
#   bench/gpu.sh --dry-run all    every step on the CPU with small sizes, in Triton's interpreter
#
# Tuned tiles go to fusedloss/backends/triton/tuning.json, figures to bench/results; with --dry-run both go to OUT.
# PYTHON is the interpreter to use, OUT another folder for the figures.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LIMIT=540 # seconds a mode may take
export PYTHONPATH="$PWD:$PWD/tests/cases:$PWD/tests/oracles${PYTHONPATH:+:$PYTHONPATH}"

device=cuda
small=()
dry_run=()
if [[ ${1:-} == --dry-run ]]; then
    shift
    device=cpu
    small=(--small)
    dry_run=(--dry-run)
    export TRITON_INTERPRET=1 PYTHONWARNINGS=ignore
    OUT=${OUT:-build/gpu-dry-run}
fi
export OUT=${OUT:-bench/results} PYTHON
mkdir -p "$OUT"

modes() {
    local part file
    echo build
    for part in losses statistics products others; do echo "test:$part"; done
    for part in memcheck racecheck; do echo "sanitize:$part"; done
    for file in $(grep -l "^TUNED = " bench/variants/[a-z]*.py); do parts_of tune "$file" TUNED; done
    for file in bench/gpu/[a-z]*.py; do parts_of bench "$file" PARTS; done
    echo report
}

# parts_of MODE FILE NAME: a mode for each word of the tuple NAME in the file, or one for all of it
parts_of() {
    local stem part parts
    stem=$(basename -s .py "$2")
    parts=$(sed -n "s/^$3 = //p" "$2" | tr -d '(",)')
    for part in $parts; do echo "$1:$stem:$part"; done
    [[ -n $parts ]] || echo "$1:$stem"
}

limited() {
    timeout "$LIMIT" "$@"
}

build() {
    if [[ $device == cpu ]]; then
        limited "$PYTHON" setup.py --quiet build_ext --build-lib "$OUT/lib" --build-temp "$OUT/temp"
    else
        limited "$PYTHON" setup.py --quiet build_ext --inplace
    fi
}

cases() {
    local file failed=0
    # Every file of cases that is a program of its own.
    for file in $(grep -l '^if __name__' tests/cases/triton*_cases.py); do limited "$@" "$PYTHON" "$file" --device "$device" --few || failed=1; done
    return $failed
}

# The tests of a part, in pytest's words: compiling every case takes longer than a mode may.
tests_of() {
    local products="contrast or linear or cosine"
    case $1 in
    losses) echo "on_gpu and not (statistics or $products)" ;;
    statistics) echo "on_gpu and statistics and not ($products)" ;;
    products) echo "on_gpu and ($products)" ;;
    others) echo "not on_gpu" ;;
    esac
}

test_device() {
    if [[ $device == cpu ]]; then
        limited "$PYTHON" -m pytest -q -m gpu -k "$(tests_of "$1")" --collect-only tests >"$OUT/gpu-tests-$1.txt"
        tail -1 "$OUT/gpu-tests-$1.txt"
        [[ $1 != others ]] || cases
    else
        limited "$PYTHON" -m pytest -q -m gpu -k "$(tests_of "$1")" tests
    fi
}

sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed: nothing checked"
    elif [[ $device == cpu ]]; then
        compute-sanitizer --version
    else
        # Each tensor in memory of its own, so that a step outside it is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 cases compute-sanitizer --tool "$1" --error-exitcode 1
    fi
}

tune() {
    local out=()
    [[ $device == cpu ]] && out=(--out "$OUT/tuning.json")
    limited "$PYTHON" -m bench.tune "$1" --dtype "$2" --device "$device" "${small[@]}" "${out[@]}"
}

report() {
    cat "$OUT"/gpu_*.md >"$OUT/gpu.md"
    echo "written: $OUT/gpu.md"
}

run() {
    echo "== $1"
    local stem rest
    IFS=: read -r _ stem rest <<<"$1"
    case $1 in
    build) build ;;
    test:losses | test:statistics | test:products | test:others) test_device "$stem" ;;
    sanitize:memcheck | sanitize:racecheck) sanitize "$stem" ;;
    tune:*:*) tune "$stem" "$rest" ;;
    bench:*) limited "$PYTHON" -m bench.gpu "$stem" --part "$rest" --device "$device" --out "$OUT" "${small[@]}" ;;
    report) report ;;
    *)
        echo "mode: got '$1'; allowed are: list, all, $(modes | paste -sd ' ')" >&2
        exit 2
        ;;
    esac
}

[[ $# -gt 0 ]] || set -- list
if [[ $1 == list ]]; then
    modes
elif [[ $# == 1 && $1 != all ]]; then
    run "$1"
else
    [[ $1 == all ]] && mapfile -t chosen < <(modes) || chosen=("$@")
    failed=()
    # Each in a process of its own: one that fails leaves the others their turn.
    for mode in "${chosen[@]}"; do
        bench/gpu.sh "${dry_run[@]}" "$mode" || failed+=("$mode (exit status $?)")
    done
    [[ ${#failed[@]} == 0 ]] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
fi

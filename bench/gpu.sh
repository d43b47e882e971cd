#!/usr/bin/env bash
# Everything that wants a GPU, on a machine with torch, triton, pytest and xdist, and no network:
#
#   bench/gpu.sh wheels           where there is a network: other packages' wheels, into build/wheels, to take along
#   bench/gpu.sh a                b, c, d: half an hour in four calls of less than ten minutes, what matters most first:
#                                 a: tests, memory checks and softmax_ce; b: statistics, contrast and heads; c: tuning;
#                                 d: training and the report
#   bench/gpu.sh list             the modes, which can be called alone, each under nine minutes
#   bench/gpu.sh all              every mode, in that order
#   bench/gpu.sh test bench:softmax_ce
#   bench/gpu.sh --dry-run a      every step on the CPU with small sizes, in Triton's interpreter
#
# Tuned tiles go to fusedloss/backends/triton/tuning.json, figures to bench/results. Where OUT is set all goes there, what
# a group wrote as one archive. PYTHON is the interpreter to use, PROCESSES how many kernels are compiled at a time.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PROCESSES=${PROCESSES:-$(nproc)}
LIMIT=${LIMIT:-540} # seconds a mode may take
WHEELS=build/wheels PEERS=build/peers
export PYTHONPATH="$PWD:$PWD/tests/cases:$PWD/tests/oracles${PYTHONPATH:+:$PYTHONPATH}"

# Modes of a group with the seconds that each may take; what one leaves is for those after it.
declare -A MODES_OF=(
    [a]="build=90 checks=260 bench:softmax_ce=210"
    [b]="bench:class_stats=90 bench:supcon:128=110 bench:linear_ce:768=180 bench:linear_ce:1024=180"
    [c]="tune:softmax_ce:bfloat16=130 tune:softmax_ce:float32=130 tune:supcon=180 tune:class_stats=120"
    [d]="bench:training=180 bench:supcon:256=120 bench:linear_ce:384=120 bench:linear_ce:4096=120 report=10"
)

device=cuda
small=()
dry_run=()
given_out=${OUT:-}
if [[ ${1:-} == --dry-run ]]; then
    shift
    device=cpu
    small=(--small)
    dry_run=(--dry-run)
    export TRITON_INTERPRET=1 PYTHONWARNINGS=ignore
    OUT=${OUT:-build/gpu-dry-run}
fi
export OUT=${OUT:-bench/results} PYTHON PROCESSES
mkdir -p "$OUT"

modes() {
    local file
    printf '%s\n' build test sanitize:memcheck sanitize:racecheck
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

# What a program is told, so that it ends by itself and leaves what it has
soft_limit() {
    echo $((LIMIT > 60 ? LIMIT - 30 : LIMIT / 2))
}

wheels() {
    # quack-kernels is used where it is installed; its compiler alone takes 90 MB.
    "$PYTHON" -m pip download --quiet --no-deps --dest "$WHEELS" liger-kernel cut-cross-entropy pytorch-metric-learning
    ls "$WHEELS"
}

# Wheels that were taken along, in a folder that comes last: nothing of the machine's own is replaced
peers() {
    compgen -G "$WHEELS/*.whl" >/dev/null || return 0
    if [[ ! -d $PEERS ]]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$PEERS" "$WHEELS"/*.whl ||
            for wheel in "$WHEELS"/*.whl; do "$PYTHON" -m zipfile --extract "$wheel" "$PEERS"; done
    fi
    export PYTHONPATH="$PYTHONPATH:$PWD/$PEERS"
}

build() {
    export FUSEDLOSS_BUILD_JOBS=$PROCESSES
    if [[ $device == cpu ]]; then
        limited "$PYTHON" setup.py --quiet build_ext --build-lib "$OUT/lib" --build-temp "$OUT/temp"
    else
        limited "$PYTHON" setup.py --quiet build_ext --inplace
    fi
}

cases() {
    local file files failed=0
    # Every file of cases that is a program of its own.
    mapfile -t files < <(grep -l '^if __name__' tests/cases/triton*_cases.py)
    for file in "${files[@]}"; do
        limited "$@" "$PYTHON" "$file" --device "$device" --few || failed=1
    done
    return $failed
}

# In processes of their own, most of whose time goes into compiling the kernels
test_device() {
    local processes=$((PROCESSES > 12 ? 12 : PROCESSES))
    if [[ $device == cpu ]]; then
        limited "$PYTHON" -m pytest -q -m gpu --collect-only tests >"$OUT/gpu_tests.txt"
        tail -1 "$OUT/gpu_tests.txt"
        cases
    else
        limited "$PYTHON" -m pytest -q -m gpu -n "$processes" --dist worksteal --durations=10 tests 2>&1 |
            tee "$OUT/gpu_tests.txt"
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

# Tests and memory checks at the same time: neither is timed
checks() {
    local failed=0
    sanitize memcheck >"$OUT/gpu_memcheck.txt" 2>&1 &
    test_device || failed=1
    wait $! || failed=1
    tail -3 "$OUT/gpu_memcheck.txt"
    return $failed
}

tune() {
    local out=() type=()
    [[ $device == cuda ]] || out=(--out "$OUT/tuning.json")
    [[ -z ${2:-} ]] || type=(--dtype "$2")
    limited "$PYTHON" -m bench.tune "$1" "${type[@]}" --device "$device" --processes "$PROCESSES" \
        --limit "$(soft_limit)" "${small[@]}" "${out[@]}"
    [[ $device == cpu || $OUT == bench/results ]] || cp fusedloss/backends/triton/tuning.json "$OUT"
}

bench() {
    peers
    limited "$PYTHON" -m bench.gpu "$1" --part "${2:-}" --device "$device" --out "$OUT" --limit "$(soft_limit)" \
        "${small[@]}"
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
    build | checks | report) "$1" ;;
    test) test_device ;;
    sanitize:memcheck | sanitize:racecheck) sanitize "$stem" ;;
    tune:?*) tune "$stem" "$rest" ;;
    bench:?*) bench "$stem" "$rest" ;;
    *)
        echo "mode: got '$1'; allowed are: list, all, wheels, a, b, c, d, $(modes | paste -sd ' ')" >&2
        exit 2
        ;;
    esac
}

# run_all NAME [MODE=SECONDS | MODE]...: each in a process of its own, so that one that fails leaves the others their turn
run_all() {
    local each mode share spare=0 began took status failed=() name=$1
    shift
    : >"$OUT/gpu_durations_$name.txt"
    for each; do
        mode=${each%=*} share=$LIMIT
        # What those before it left of their time is its own too; a dry run may take longer.
        [[ $each != *=* || $device == cpu ]] || share=$((${each#*=} + spare))
        began=$SECONDS status=0
        LIMIT=$share bench/gpu.sh "${dry_run[@]}" "$mode" || status=$?
        took=$((SECONDS - began))
        [[ $each != *=* ]] || spare=$((share > took ? share - took : 0))
        echo "$mode: $took s of $share, exit status $status" >>"$OUT/gpu_durations_$name.txt"
        [[ $status == 0 ]] || failed+=("$mode (exit status $status)")
    done
    echo "== $name: $SECONDS s"
    cat "$OUT/gpu_durations_$name.txt"
    [[ ${#failed[@]} == 0 ]] || { printf 'failed: %s\n' "${failed[@]}" >&2; return 1; }
}

group() {
    local status=0
    if [[ -n $given_out && $device == cuda ]]; then
        OUT=build/gpu # and from there into one file
        mkdir -p "$OUT" "$given_out"
    fi
    # shellcheck disable=SC2086 # a word for each mode
    run_all "$1" ${MODES_OF[$1]} || status=$?
    [[ $OUT == "$given_out" || -z $given_out ]] || tar -czf "$given_out/gpu_$1.tar.gz" -C "$OUT" .
    return $status
}

[[ $# -gt 0 ]] || set -- list
case $1 in
list) modes ;;
wheels) wheels ;;
a | b | c | d) group "$1" ;;
all)
    mapfile -t chosen < <(modes)
    run_all all "${chosen[@]}"
    ;;
*) if [[ $# == 1 ]]; then run "$1"; else run_all some "$@"; fi ;;
esac

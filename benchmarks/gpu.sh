#!/bin/sh
# The benchmarks of training on one GPU, with random weights: nothing is fetched. Under 8 minutes on an H100.
#
#     benchmarks/gpu.sh [OUT]              Phi-3-mini (3.8B) and SmolLM2-135M, bf16; results to OUT (benchmarks/results)
#     benchmarks/gpu.sh --dry-run OUT      the same scripts with a tiny model on the CPU: do they run?
#
# PYTHON names the interpreter of an environment with sparselet[all]. A script that fails does not stop the others.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
failed=""

bench() { # NAME OPTION…
    script=$1
    shift
    echo "== bench_$script $*" >&2
    "$python" "benchmarks/bench_$script.py" "$@" || failed="$failed $script"
}

if [ "${1:-}" = "--dry-run" ]; then
    out=${2:?give --dry-run the directory for its results}
    for script in train memory switch select end_to_end; do
        bench "$script" --quick --dtype bf16 --out "$out"
    done
else
    out=${1:-benchmarks/results}
    for model in phi3 smollm2; do
        set -- --device cuda --model "$model" --dtype bf16 --batch 4 --tokens 1024 --out "$out"
        bench train "$@" --rounds 2
        bench memory "$@" --rounds 1
        bench switch "$@" --rounds 3
    done
    bench select --device cuda --dtype bf16 --rounds 5 --out "$out"
    bench end_to_end --device cuda --rounds 1 --eval-tasks 4 --eval-rows 64 --max-new-tokens 32 --out "$out"
fi
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi

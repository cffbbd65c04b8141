#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes and without a network. Run in the repository's root.
#
#   bench/gpu_check.sh                        on a machine with a GPU, torch >= 2.10, Triton, pytest; nvcc if it must build
#   DEVICE=cpu QUICK=1 bench/gpu_check.sh     a dry run anywhere: tiny sizes; what needs a GPU is recorded as not run
#
# Steps, each under a time limit of its own; one that fails does not stop the others:
#   build       takes acefast/lib/*.so as it lies there if it loads, else builds in place (ACEFAST_BUILD, TORCH_CUDA_ARCH_LIST)
#   tests       tests/gpu: all ops against the reference, the emulator's and the interpreter's cases, capture, streams
#   memcheck, racecheck   compute-sanitizer on a short subset, where that tool is
#   benchmark   python -m bench ops --device cuda
#   epoch       training epochs of two masked networks of ogbn-arxiv's size
# With SEARCHES=1 the last four make room for these:
#   search      a whole Cora search with captured epochs, and its five trainings by themselves
#   one-by-one  the same with every epoch seen by the host
#   grid        thirty such searches at once, as bench/grids/gpu-cora.toml has them
# Results in $OUT (default bench/results/gpu): check.json (each step's status and seconds), ops-cuda.json, epoch.json, search.json,
# one-by-one.json, log.txt, and grid/, the folder of the searches.
# The exit status is 1 if any step failed.
#
# Variables: OUT, PYTHON (default .venv/bin/python, else python3), DEVICE, QUICK, SEARCHES, LIMIT (seconds in all, default 530).
# Data: put ogbn-arxiv's edge.csv.gz into .data/ogb/ogbn_arxiv/raw/ (git ignores .data), else its generated twin is used.
set -u
cd "$(dirname "$0")/.." || exit 1
DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-0} SEARCHES=${SEARCHES:-0} LIMIT=${LIMIT:-530} OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export ACEFAST_NO_SKIPS=0 PYTHONUNBUFFERED=1
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin

if [ "${1:-}" = --build ]; then # a step's own process, so that the time limit holds for it
    loads() {
        "$PYTHON" - "$DEVICE" <<'PY'
import sys

from acefast.ops import backend

print("loaded:", backend.loaded(), "not loaded:", backend.report()["not_loaded"])
sys.exit(sys.argv[1] not in backend.loaded())
PY
    }
    # The version that acefast reads at import, where it is not installed.
    "$PYTHON" -c "" || exit 1
    if ! "$PYTHON" -c "import importlib.metadata as m; m.version('acefast')" 2>/dev/null; then
        mkdir -p acefast.egg-info
        printf 'Metadata-Version: 2.1\nName: acefast\nVersion: %s\n' "$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
            >acefast.egg-info/PKG-INFO
    fi
    loads && { echo "taken as it was carried here"; exit 0; }
    if [ "$DEVICE" = cpu ] && [ -z "${ACEFAST_BUILD:-}" ]; then
        echo "nothing is built in a dry run: the reference serves"
        exit 0
    fi
    if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ] && [ "$DEVICE" = cuda ]; then
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || exit 1
        export TORCH_CUDA_ARCH_LIST
    fi
    "$PYTHON" setup.py build_ext --inplace && loads
    exit
fi

mkdir -p "$OUT" || exit 1
steps=$OUT/.steps
: >"$steps"
: >"$OUT/log.txt"

record() { # name, status, exit status or nothing, seconds
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$steps"
    printf '%-10s %s (%s s)\n' "$1" "$2" "$4"
}

not_run() { # name, reason
    record "$1" "not run: $2" "" 0
}

step() { # name, limit in seconds, command...
    local name=$1 limit=$2 start=$SECONDS code left=$((LIMIT - SECONDS))
    shift 2
    if [ $left -lt 5 ]; then
        record "$name" "failed: no time left" "" 0
        return
    fi
    [ $left -lt "$limit" ] && limit=$left
    printf '\n===== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
    local first
    first=$(wc -l <"$OUT/log.txt")
    timeout -k 5 "$limit" "$@" >>"$OUT/log.txt" 2>&1
    code=$?
    case $code in
    0) record "$name" ok 0 $((SECONDS - start)) ;;
    124 | 137) record "$name" "failed: stopped after $limit s" $code $((SECONDS - start)) ;;
    *) record "$name" "failed: exit status $code" $code $((SECONDS - start)) ;;
    esac
    [ $code -eq 0 ] || tail -n "+$((first + 1))" "$OUT/log.txt" | tail -n 40
}

sanitizer() { # tool
    # Each tensor an allocation of its own, so that memcheck sees what runs past its end; only this project's kernels.
    local only=()
    compute-sanitizer --help 2>/dev/null | grep -q -- --kernel-regex && only=(--kernel-regex kns=acefast)
    step "$1" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${only[@]}" \
        "$PYTHON" -m pytest -p no:cacheprovider -x tests/gpu/test_cuda.py -k "$SANITIZED"
}
SANITIZED="test_agrees_with_the_reference and native and hub and float32 and flags or test_topk_mask and native and fresh and float16"

step build 240 bash "$0" --build

if [ "$DEVICE" = cuda ]; then
    # Triton compiles on the CPU: in several processes where pytest can.
    workers=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 6")
    # shellcheck disable=SC2086
    step tests 170 "$PYTHON" -m pytest -p no:cacheprovider --durations=10 $workers tests/gpu
    if [ "$SEARCHES" = 1 ]; then
        : # no sanitizers
    elif command -v compute-sanitizer >/dev/null; then
        sanitizer memcheck
        sanitizer racecheck
    else
        not_run memcheck "no compute-sanitizer"
        not_run racecheck "no compute-sanitizer"
    fi
else
    for name in tests memcheck racecheck; do not_run "$name" "no GPU"; done
fi

if [ "$QUICK" = 1 ]; then
    sizes=(--op spmm gat gen topk_mask selection --shape proteins --scale 0.0005 --features 8 --budget 0.001)
    epoch=(--shape cora --scale 0.02 --features 8 --epochs 1 --blocks 2)
else
    sizes=(--shape arxiv proteins products reddit cora --budget 0.1)
    epoch=(--shape arxiv --epochs 20)
fi
if [ "$SEARCHES" = 1 ]; then
    whole=(--device "$DEVICE" --no-peer)
    [ "$QUICK" = 1 ] && whole+=(--quick --epochs 5)
    step search 120 "$PYTHON" -m bench search "${whole[@]}" --json "$OUT/search.json"
    step one-by-one 120 "$PYTHON" -m bench search "${whole[@]}" --no-capture --label one-by-one --json "$OUT/one-by-one.json"
    if [ "$DEVICE" = cuda ]; then
        step grid 300 "$PYTHON" -m acefast.cli grid bench/grids/gpu-cora.toml --out "$OUT/grid" --jobs 30 --time-limit 280s
    else
        not_run grid "no GPU"
    fi
else
    step epoch 45 "$PYTHON" -m bench epoch --device "$DEVICE" "${epoch[@]}" --json "$OUT/epoch.json"
    step benchmark 200 "$PYTHON" -m bench ops --device "$DEVICE" "${sizes[@]}" --json "$OUT/ops-$DEVICE.json"
fi

"$PYTHON" - "$steps" "$OUT/check.json" "$DEVICE" "$SECONDS" <<'PY'
import json
import sys
from pathlib import Path

source, target, device, seconds = sys.argv[1:]
steps = []
for line in Path(source).read_text().splitlines():
    name, status, code, took = line.split("\t")
    steps.append({"step": name, "status": status, "exit": int(code) if code else None, "seconds": int(took)})
ok = not any(step["status"].startswith("failed") for step in steps)
result = {"ok": ok, "device": device, "seconds": int(seconds), "steps": steps}
Path(target).write_text(json.dumps(result, indent=1) + "\n")
Path(source).unlink()
print("all steps ok" if ok else "a step failed", f"({seconds} s); written: {target}")
sys.exit(not ok)
PY

#!/usr/bin/env bash
# Everything that needs a GPU, without a network. Run in the repository's root.
#
#   bench/gpu_check.sh                        on a machine with a GPU, torch >= 2.10, Triton, pytest; nvcc if it must build
#   DEVICE=cpu QUICK=1 bench/gpu_check.sh     a dry run anywhere: tiny sizes; what needs a GPU is recorded as not run
#
# Steps, each under a time limit of its own; one that fails does not stop the others. STEPS names those to run; by default the
# first six, which take less than nine minutes:
#   build       takes acefast/lib/*.so as it lies there if it loads, else builds in place (ACEFAST_BUILD, TORCH_CUDA_ARCH_LIST)
#   tests       tests/gpu: all ops against the reference, the emulator's and the interpreter's cases, capture, streams
#   memcheck, racecheck   compute-sanitizer on a short subset, where that tool is
#   epoch       training epochs of two masked networks of ogbn-arxiv's size
#   benchmark   python -m bench ops --device cuda
#   arxiv       ResGCN-28 on ogbn-arxiv: epochs, memory, a whole round of ACE (two to three minutes)
#   proteins, products   epochs and memory on twins in full size: ResGCN-28 on ogbn-proteins, a GCN on ogbn-products
#   search      a whole Cora search with captured epochs, and its five trainings by themselves
#   one-by-one  the same with every epoch seen by the host
#   grid        thirty such searches at once, as bench/grids/gpu-cora.toml has them
# Results in $OUT (default bench/results/gpu): check.json (each step's status and seconds), ops-cuda.json, a JSON file named after
# each of the other steps, log.txt, and grid/, the folder of the searches.
# The exit status is 1 if any step failed.
#
# Variables: STEPS, OUT, PYTHON (default .venv/bin/python, else python3), DEVICE, QUICK, LIMIT (seconds in all, default 530).
# Data: .data/ (git ignores it) as ../shared/data would have it, planetoid/ and ogb/; generated twins take the place of what is
# absent, but in arxiv and search. The commands of `acefast` (grid) need all packages that acefast depends on.
set -u
cd "$(dirname "$0")/.." || exit 1
STEPS=${STEPS:-build tests memcheck racecheck epoch benchmark}
DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-0} LIMIT=${LIMIT:-530} OUT=${OUT:-bench/results/gpu}
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
    if ! command -v compute-sanitizer >/dev/null; then
        not_run "$1" "no compute-sanitizer"
        return
    fi
    # Each tensor an allocation of its own, so that memcheck sees what runs past its end; only this project's kernels.
    local only=()
    compute-sanitizer --help 2>/dev/null | grep -q -- --kernel-regex && only=(--kernel-regex kns=acefast)
    step "$1" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${only[@]}" \
        "$PYTHON" -m pytest -p no:cacheprovider -x tests/gpu/test_cuda.py -k "$SANITIZED"
}
SANITIZED="test_agrees_with_the_reference and native and hub and float32 and flags or test_topk_mask and native and fresh and float16"

# With pytest-xdist several processes of one thread each: the reference and Triton's compiler run on the CPU.
workers=()
"$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n $(($(nproc) > 3 ? $(nproc) - 2 : 2)))
sizes=(--shape arxiv proteins products reddit cora --budget 0.1)
epoch=(--shape arxiv --epochs 20)
whole=(--no-peer)
resgcn='backbone="resgcn"'
arxiv=(--dataset ogbn-arxiv --set "$resgcn" 'features="fastrp"' --round)
proteins=(--dataset twin:ogbn-proteins --set "$resgcn" --short 1 --epochs 2)
products=(--dataset twin:ogbn-products --set layers=3 hidden=256 --epochs 5)
if [ "$QUICK" = 1 ]; then
    few=(layers=2 hidden=8 mask_epochs=2 fix_epochs=2 ace_epochs=1)
    sizes=(--op spmm gat gen topk_mask selection --shape proteins --scale 0.0005 --features 8 --budget 0.001)
    epoch=(--shape cora --scale 0.02 --features 8 --epochs 1 --blocks 2)
    whole+=(--quick --epochs 5)
    arxiv=(--dataset twin:ogbn-arxiv:0.002 --set "$resgcn" "${few[@]}" --epochs 1 --round)
    proteins=(--dataset twin:ogbn-proteins:0.001 --set "$resgcn" "${few[@]}" --short 1 --epochs 1)
    products=(--dataset twin:ogbn-products:0.0002 --set "${few[@]}" --epochs 1)
fi

for name in $STEPS; do
    json=$OUT/$name.json
    case $name in
    tests | memcheck | racecheck | grid)
        if [ "$DEVICE" != cuda ]; then
            not_run "$name" "no GPU"
            continue
        fi
        ;;
    esac
    case $name in
    build) step build 240 bash "$0" --build ;;
    tests) step tests 170 env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -p no:cacheprovider --durations=10 "${workers[@]}" tests/gpu ;;
    memcheck | racecheck) sanitizer "$name" ;;
    epoch) step epoch 45 "$PYTHON" -m bench epoch --device "$DEVICE" "${epoch[@]}" --json "$json" ;;
    benchmark) step benchmark 200 "$PYTHON" -m bench ops --device "$DEVICE" "${sizes[@]}" --json "$OUT/ops-$DEVICE.json" ;;
    arxiv) step arxiv 240 "$PYTHON" -m bench large --device "$DEVICE" "${arxiv[@]}" --json "$json" ;;
    proteins) step proteins 120 "$PYTHON" -m bench large --device "$DEVICE" "${proteins[@]}" --json "$json" ;;
    products) step products 120 "$PYTHON" -m bench large --device "$DEVICE" "${products[@]}" --json "$json" ;;
    search) step search 120 "$PYTHON" -m bench search --device "$DEVICE" "${whole[@]}" --json "$json" ;;
    one-by-one) step one-by-one 120 "$PYTHON" -m bench search --device "$DEVICE" "${whole[@]}" --no-capture --label one-by-one --json "$json" ;;
    grid) step grid 300 "$PYTHON" -m acefast.cli grid bench/grids/gpu-cora.toml --out "$OUT/grid" --jobs 30 --time-limit 280s ;;
    *) record "$name" "failed: no such step" 2 0 ;;
    esac
done

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

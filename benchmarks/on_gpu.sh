#!/usr/bin/env bash
# Everything that needs a real GPU, in one command of under 10 minutes:
#
#     bash benchmarks/on_gpu.sh [OUT_DIR]
#     python benchmarks/on_virtual_gpu.py T4 -- bash benchmarks/on_gpu.sh    # without a GPU: times mean nothing
#
# Needs torch, transformers, accelerate, peft, pandas and pytest; no network, and this repository need not be installed.
# PYTHON names another interpreter. Each stage has its own time limit; if it is reached, the rows recorded until then are
# kept. The output of each stage is in OUT_DIR (default: build/on_gpu) in a file named after it. The exit code is 1 if a
# stage failed.
set -u
cd "$(dirname "$0")/.." || exit 2
out=${1:-build/on_gpu}
python=${PYTHON:-python}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
export HF_HUB_OFFLINE=1 HF_BSOPT_CACHE="$out/cache" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS
failed=0
outcomes=()

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
    code=$?
    tail -n "${lines:-15}" "$out/$name.txt"
    case $code in
        0) outcomes+=("$name: done in $((SECONDS - start)) s") ;;
        124 | 137) outcomes+=("$name: stopped after $limit s, the rows recorded until then are kept") && failed=1 ;;
        *) outcomes+=("$name: failed with exit code $code after $((SECONDS - start)) s") && failed=1 ;;
    esac
}

cases=benchmarks/on_gpu_cases.csv
versions='import torch, transformers as t, accelerate as a, peft as p
print("torch", torch.__version__, "transformers", t.__version__, "accelerate", a.__version__, "peft", p.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.mem_get_info())
print("memory", min(15, torch.cuda.mem_get_info()[1] >> 30))'
stage versions 40 "$python" -c "$versions"
stage tests 150 "$python" -m pytest -v -m gpu -p no:cacheprovider tests
stage measured 125 "$python" benchmarks/record_truth.py --device cuda --cases "$cases" --seconds 120 \
    --out "$out/measured.csv"
memory=$(sed -n 's/^memory //p' "$out/versions.txt")GiB # 15, or less if the GPU has less
lines=25 stage peers 125 "$python" benchmarks/peers.py --device cuda --case "BERT-base, fp16" --memory "$memory" --sizes
jobs=$(($(nproc) < 4 ? $(nproc) : 4))
stage rehearsed 65 "$python" benchmarks/record_truth.py --cases "$out/measured.csv" --seconds 62 --jobs $jobs \
    --out "$out/rehearsed.csv"
lines=40 stage compared 10 "$python" benchmarks/compare_truth.py "$out/measured.csv" "$out/rehearsed.csv"
lines=40 stage predicted 60 "$python" benchmarks/accuracy.py --truth "$out/measured.csv" --metric reserved

echo "== summary, $((SECONDS - started)) s in total, output in $out"
{
    printf '%s\n' "${outcomes[@]}"
    tail -n 1 "$out/tests.txt"
    grep -hE "median|context:|outcome: the same" "$out/compared.txt" "$out/predicted.txt"
    grep -hE "^(this project|fastest peer)" "$out/peers.txt"
} | tee "$out/summary.txt"
if [ -n "${HF_BSOPT_VIRTUAL_DEVICE:-}" ]; then
    echo "The GPU was virtual: times mean nothing, and nothing was computed." | tee -a "$out/summary.txt"
fi
rm -rf "$out/cache"
exit "$failed"

#!/usr/bin/env bash
# Verifies specs on the GPU at hand, several processes at a time: every dtype, short and long, packed.
#   OUT=results benchmarks/verify_all.sh "window_only tiny" "fp32 bf16 fp16"
set -u
specs=$1 dtypes=$2 out=${OUT:-.}
one() { # label, arguments of verify
    local start=$SECONDS
    timeout "${LIMIT:-400}" python3 -m nsagen verify "${@:2}" > "$out/$1.txt" 2>&1
    echo "$1 exit $? $((SECONDS - start))s"
}
export -f one; export out
for spec in $specs; do for dtype in $dtypes; do echo "short_${spec}_$dtype $spec --dtype $dtype"; done; done |
    xargs -P "${SHORT_JOBS:-10}" -L1 bash -c 'one "$@"' _
for spec in $specs; do for dtype in $dtypes; do echo "long_${spec}_$dtype $spec --dtype $dtype --length 31 --length 65536"; done; done |
    xargs -P "${LONG_JOBS:-2}" -L1 bash -c 'one "$@"' _

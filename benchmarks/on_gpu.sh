#!/usr/bin/env bash
# Builds pyface on a machine with a GPU, runs the tests that need one, and measures everything on it. Nothing is
# downloaded: torch, setuptools, pybind11, ninja and the packages in pyproject.toml must be there, or lie as wheels in
# the folder WHEELS.
#
#   OUT      where results go             (benchmarks/results/h200)
#   PYTHON   interpreter                  (python3)
#   WHEELS   folder of wheels to install first
#   QUICK    1: small sizes, does everything run?
#
# A part that fails does not stop the others; they are listed at the end, and the exit code is then 1.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/h200}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
: >"$OUT/log.txt"
failed=()

part() {
    local name=$1
    shift
    echo "== $name"
    local start=$SECONDS
    if "$@" 2>&1 | tee -a "$OUT/log.txt"; then
        echo "== $name: done in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED"
        failed+=("$name")
    fi
}

if [ -n "${WHEELS:-}" ]; then
    part wheels "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi
part build env PYFACE_CUDA=required "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
part info "$PYTHON" -m pyface info
part tests "$PYTHON" -m pytest -m gpu
for name in attention coupling deform_conv sharpness spectral proface_s engine; do
    part "bench-$name" "$PYTHON" -m pyface bench "$name" --device cuda --out "$OUT" ${QUICK:+--quick}
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see $OUT/log.txt)"
    exit 1
fi
echo "all parts done; results in $OUT"

#!/usr/bin/env bash
# Runs all that needs a GPU, within GPU_SECONDS, each step with a timeout of its own:
#
#     bench/gpu_run.sh [smoke] [bench] [tests] [rest]      default: all four
#
# smoke: whether the kernels work; bench: the first GPU_FIRST cases of the benchmark; tests; rest:
# the other cases, in the remaining time. If the smoke test fails, only it runs again, with blocking
# launches and under compute-sanitizer. The folder GPU_RESULTS (or OUT) gets run.log and the results,
# one line each as soon as it is known. GPU_TESTS are pytest's arguments; with --long there are five
# times as many tests, and Triton's kernels alone compile for minutes. Libraries that were built from
# these sources on another machine are kept; .gpu/triton.tgz fills Triton's cache.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
GPU_SECONDS=${GPU_SECONDS:-440}  # a step that does not end by itself takes up to 30 more
GPU_FIRST=${GPU_FIRST:-24}
GPU_TESTS=${GPU_TESTS:-"--tb=line @bench/gpu_tests.txt"}
export GPU_RESULTS=${GPU_RESULTS:-${OUT:-bench/results/gpu-run}}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
parts=${*:-smoke bench tests rest}
for part in $parts; do
  [[ " smoke bench tests rest " == *" $part "* ]] || { echo "$0: no part $part: smoke, bench, tests, rest"; exit 2; }
done

here() { "$PYTHON" -c "import $1" 2> /dev/null; }

asked() { [[ " $parts " == *" $1 "* ]]; }

# limited SIGNAL SECONDS COMMAND: at most so long, and not beyond GPU_SECONDS; prints how it ended.
limited() {
  local signal=$1 limit=$2 left=$((GPU_SECONDS - SECONDS)) began=$SECONDS code
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 5)); then echo "== no time left for: $*"; return 1; fi
  echo "== $* (at most $limit s)"
  timeout -k 30 -s "$signal" "$limit" "$@"
  code=$?
  echo "== exit status $code after $((SECONDS - began)) s"
  return $code
}

benchmark() { # SECONDS ARGUMENTS: interrupted early enough to write its report
  local limit=$1 left=$((GPU_SECONDS - SECONDS))
  shift
  ((limit < left)) || limit=$left
  limited INT "$((limit - 5))" "$PYTHON" -m bench.gpu --workers "$workers" \
    --budget "$((limit > 60 ? limit - 30 : limit / 2))" --out "$GPU_RESULTS" "$@"
}

run_tests() {
  local options=()
  here xdist && options+=(-n "$((workers < 12 ? workers : 12))" --dist worksteal)
  here pytest_timeout && options+=(--timeout 120)
  here pytest_benchmark && options+=(--benchmark-disable)
  # shellcheck disable=SC2086  # several arguments
  limited INT 150 "$PYTHON" -m pytest -o addopts= -m "not slow" -q -p no:cacheprovider \
    -p bench.pytest_lines "${options[@]}" $GPU_TESTS
}

diagnose() { # after a failed smoke test: which launch, which address
  CUDA_LAUNCH_BLOCKING=1 limited TERM 60 "$PYTHON" bench/gpu_smoke.py "$GPU_RESULTS/blocking" 40
  if ! command -v compute-sanitizer > /dev/null; then echo "== compute-sanitizer is not here"; return; fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited TERM 150 compute-sanitizer --tool memcheck \
    --report-api-errors no "$PYTHON" bench/gpu_smoke.py "$GPU_RESULTS/memcheck" 120
}

if ! reason=$("$PYTHON" -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch.cuda.is_available() is False')" 2>&1); then
  echo "$0: no GPU here: ${reason##*$'\n'}"
  exit 1
fi
workers=$(($(nproc) > 3 ? $(nproc) - 2 : 2))
mkdir -p "$GPU_RESULTS" "$TRITON_CACHE_DIR"
exec > >(tee -a "$GPU_RESULTS/run.log") 2>&1
tee=$!
trap 'exec >&- 2>&-; wait "$tee"' EXIT
status=0
[ -f .gpu/triton.tgz ] && tar xzf .gpu/triton.tgz -C "$TRITON_CACHE_DIR" --strip-components=1
# Without CUDA C++ there still is Triton, so a failed build does not end the run.
CBLOSS_KEEP=1 limited TERM 200 "$PYTHON" setup.py -q build_ext --inplace || status=1
if asked smoke && ! limited TERM 130 "$PYTHON" bench/gpu_smoke.py "$GPU_RESULTS" 60; then
  diagnose
  exit 1
fi
if asked bench; then benchmark 190 --first "$GPU_FIRST" || status=1; fi
if asked tests; then run_tests || status=1; fi
if asked rest; then benchmark 300 --skip "$GPU_FIRST" || status=1; fi
echo "== end after $SECONDS s, exit status $status"
exit $status

#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers beside the installed ones
# and runs their tests on them. Needs what `make setup` installs, cmake and g++ with its sanitizers.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=$PWD/build/sanitize
tools="cmake ninja nanobind"
"$python" -m pip install --quiet --disable-pip-version-check $tools
PATH=$PWD/.venv/bin:$PATH
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=None -DDEEPSEEK_SANITIZE=ON \
  -DPython_EXECUTABLE="$python" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/out" >"$build.log"
ninja -C "$build" >>"$build.log" || { tail -20 "$build.log"; exit 1; }
SANITIZED_KERNELS=$(echo "$build"/out/_cpu*.so)
export SANITIZED_KERNELS
# Python and torch keep memory until the end: leaks say nothing here. Reports go to files, because
# pytest holds what a dying process has written.
report=$build/report
rm -f "$report".*
status=0
PYTHONPATH=$PWD ASAN_OPTIONS=detect_leaks=0:log_path="$report" \
  UBSAN_OPTIONS=print_stacktrace=1:log_path="$report" \
  LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so) \
  "$python" -m pytest -p tests.sanitized --numprocesses=2 --durations=3 -q \
  tests/ops/test_packed_linear.py tests/ops/test_low_rank.py tests/ops/test_paged_attention.py \
  tests/ops/test_native_sampling.py tests/ops/test_routed_attention.py tests/ops/test_gated_attention.py tests/generate/test_flat.py \
  tests/generate/test_gated_engine.py "$@" || status=$?
for file in "$report".*; do
  test -e "$file" || continue
  cat "$file" >&2
  status=1
done
exit $status

#!/usr/bin/env bash
# Runs every fuzzer of a build, two at a time, each on its seeds in corpus/NAME and what it finds from there.
#   run.sh BUILD_DIR SECONDS
# What breaks a fuzzer is kept in BUILD_DIR/fuzz-NAME/. Exit code 1 when one fails.
set -uo pipefail
if [ $# -ne 2 ] || [ ! -d "$1" ]; then
    echo "usage: run.sh BUILD_DIR SECONDS" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "$1" && pwd)
seconds=$2

run_one() {
    local binary=$1 name=${1##*/fuzz_}
    local work=$build/fuzz-$name
    mkdir -p "$work/corpus"
    local seeds=()
    [ -d "$here/corpus/$name" ] && seeds=("$here/corpus/$name")
    # new inputs go to the first folder; the seeds are only read
    if "$binary" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="$work/" "$work/corpus" "${seeds[@]}" >"$work/log" 2>&1; then
        echo "ok      $name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log") inputs in $seconds s"
        return 0
    fi
    echo "FAILED  $name: see $work/log"
    grep -m 5 -E 'ERROR:|SUMMARY:|internal error|Test unit written' "$work/log"
    return 1
}

passed=0 failed=0
wait_one() {
    if wait -n; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}
running=0
for binary in "$build"/fuzz_*; do
    [ -f "$binary" ] && [ -x "$binary" ] || continue
    if [ $running -ge 2 ]; then
        wait_one
        running=$((running - 1))
    fi
    run_one "$binary" &
    running=$((running + 1))
done
while [ $running -gt 0 ]; do
    wait_one
    running=$((running - 1))
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]

# Sourced by test scripts that count named checks. Needs $tmp, a folder of the test's own.
passed=0 failed=0

check() { # check NAME COMMAND…
    local name=$1
    shift
    if "$@" >"$tmp/log" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name: $(tail -n 1 "$tmp/log")"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        tail -n 40 "$tmp/log"
    fi
}

#!/usr/bin/env bash
# Golden tests of the command line.
#   run.sh GEMCUT_BINARY [--update] [--short] [NAME…]
# A case is a folder cases/NAME with
#   cmd                        run by `bash -eu` in a fresh folder; $GEMCUT: the binary, $SRC: the repository, $TMP: that folder
#   exit                       the expected exit code; without it 0
#   stdout, stderr             the exact text; without any file the stream must be empty
#   stdout.glob, stderr.glob   one glob pattern a line, in order; a line "..." stands for any number of lines
#   stdout.ignore, stderr.ignore   the stream is not looked at
#   slow                       not run with --short, which is for builds that are many times slower
# In both streams the paths $TMP and $SRC are replaced by their names. --update writes the exact texts anew, never
# globs or exit codes. Exit code 1 when a case fails.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SRC=$(cd "$here/../.." && pwd)
update=false
short=false
binary=
names=()
for word in "$@"; do
    case $word in
    --update) update=true ;;
    --short) short=true ;;
    -*)
        echo "run.sh: unknown option '$word'" >&2
        exit 2
        ;;
    *) if [[ -z $binary ]]; then binary=$word; else names+=("$word"); fi ;;
    esac
done
if [[ ! -x $binary || -d $binary ]]; then
    echo "usage: run.sh GEMCUT_BINARY [--update] [NAME…]" >&2
    exit 2
fi
GEMCUT=$(cd "$(dirname "$binary")" && pwd)/$(basename "$binary")
if ((${#names[@]} == 0)); then
    for folder in "$here"/cases/*/; do
        if $short && [[ -e $folder/slow ]]; then
            echo "not run $(basename "$folder") (--short)"
        else
            names+=("$(basename "$folder")")
        fi
    done
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# matches FILE GLOBS: whether the lines of FILE match the patterns in order
matches() {
    local -a lines patterns
    local i=0 pattern skip=false
    mapfile -t lines <"$1"
    mapfile -t patterns <"$2"
    for pattern in "${patterns[@]}"; do
        if [[ $pattern == ... ]]; then
            skip=true
            continue
        fi
        # shellcheck disable=SC2053 # the right side is a pattern
        while $skip && ((i < ${#lines[@]})) && [[ ${lines[i]} != $pattern ]]; do
            ((i += 1))
        done
        skip=false
        if ((i == ${#lines[@]})); then
            echo "    no line matches '$pattern'"
            return 1
        fi
        # shellcheck disable=SC2053
        if [[ ${lines[i]} != $pattern ]]; then
            echo "    line $((i + 1)) is '${lines[i]}', expected '$pattern'"
            return 1
        fi
        ((i += 1))
    done
    if ! $skip && ((i < ${#lines[@]})); then
        echo "    line $((i + 1)) is unexpected: '${lines[i]}'"
        return 1
    fi
}

# check_stream CASE STREAM FILE: 0 when FILE is what the case expects
check_stream() {
    local golden=$1/$2 got=$3
    if [[ -e $golden.ignore ]]; then
        return 0
    elif [[ -e $golden.glob ]]; then
        matches "$got" "$golden.glob" || { sed "s/^/    $2: /" "$got"; return 1; }
    elif $update; then
        if [[ -s $got ]]; then cp "$got" "$golden"; else rm -f "$golden"; fi
    elif [[ -e $golden ]]; then
        diff -u --label "$2 expected" --label "$2" "$golden" "$got" | sed 's/^/    /'
        ((PIPESTATUS[0] == 0))
    elif [[ -s $got ]]; then
        sed "s/^/    unexpected $2: /" "$got"
        return 1
    fi
}

# run_case NAME: prints what is wrong
run_case() {
    local folder=$here/cases/$1 tmp=$work/$1 expected=0 code stream ok=0
    if [[ ! -f $folder/cmd ]]; then
        echo "    no file cases/$1/cmd"
        return 1
    fi
    mkdir -p "$tmp"
    (
        cd "$tmp" || exit 125
        export GEMCUT SRC TMP=$tmp HF_HOME=$tmp/.hf LC_ALL=C.UTF-8
        exec timeout 300 bash -eu "$folder/cmd"
    ) >"$work/stdout" 2>"$work/stderr" </dev/null
    code=$?
    [[ -e $folder/exit ]] && expected=$(<"$folder/exit")
    if ((code != expected)); then
        echo "    exit code $code, expected $expected"
        ok=1
    fi
    for stream in stdout stderr; do
        sed -i -e "s|$tmp|\$TMP|g" -e "s|$SRC|\$SRC|g" "$work/$stream"
        check_stream "$folder" "$stream" "$work/$stream" || ok=1
    done
    rm -rf "$tmp"
    return $ok
}

passed=0
failed=0
for name in "${names[@]}"; do
    if details=$(run_case "$name"); then
        echo "ok    $name"
        ((passed += 1))
    else
        echo "FAIL  $name"
        echo "$details"
        ((failed += 1))
    fi
done
echo "$passed passed, $failed failed"
((failed == 0))

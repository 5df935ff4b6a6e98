#!/usr/bin/env bash
# Who may include whom (docs: the layers of the source tree). Prints each line that breaks a rule; exit code 1.
#   check_layers.sh               checks this repository
#   check_layers.sh --self-test   checks that each kind of violation would be seen
set -uo pipefail

layers=(base formats calib kernels runtime quantize eval report cli)
# cli → report → eval → runtime, cli → quantize → runtime → kernels → base, calib → formats → base; runtime, quantize,
# eval and report may use formats and calib; nothing points back.
declare -A may_use=(
    [base]="base"
    [formats]="base formats"
    [calib]="base formats calib"
    [kernels]="base kernels"
    [runtime]="base formats calib kernels runtime"
    [quantize]="base formats calib kernels runtime quantize"
    [eval]="base formats calib kernels runtime eval"
    [report]="base formats calib kernels runtime eval report"
    [cli]="base formats calib kernels runtime quantize eval report cli"
)
# A header of a library that one place alone may include: pattern, place, reason.
alone=(
    'cjson/|cJSON\.h' 'base/json.c' 'base/json.h is the only way to JSON'
    'zstd\.h' 'calib/text.c' 'calib/text.h is the only reader of .zst'
    'cblas\.h|openblas' 'kernels/cpu/' 'BLAS is the CPU backend'"'"'s own'
    'cuda|cublas|cusolver|nccl' 'kernels/cuda/' 'CUDA stays in its backend'
)

sources() { find "$@" -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null | sort; }

# Lines "FILE:LINE: WHY: TEXT" for a tree; status 1 when there are any.
check() (
    cd "$1" || exit 2
    bad=0
    complain() { # complain FILE LINE TEXT WHY
        echo "$1:$2: $4: $3"
        bad=1
    }
    for layer in "${layers[@]}"; do
        [ -d "$layer" ] || continue
        while IFS=: read -r file line text; do
            [[ $text =~ include[[:space:]]*[\<\"]([^\>\"]*) ]] && header=${BASH_REMATCH[1]}
            if [[ $text =~ \" ]]; then
                if [[ " ${may_use[$layer]} " != *" ${header%%/*} "* ]]; then
                    complain "$file" "$line" "$text" "$layer may include only ${may_use[$layer]}"
                elif [ ! -f "$header" ]; then
                    complain "$file" "$line" "$text" "no such file from the root"
                fi
            fi
            for ((i = 0; i < ${#alone[@]}; i += 3)); do
                if [[ $text =~ \< && $header =~ ${alone[i]} && $file != "${alone[i + 1]}"* ]]; then
                    complain "$file" "$line" "$text" "${alone[i + 2]}"
                fi
            done
            # C headers end in .h; those without a suffix are C++'s
            if [[ $text =~ \< && $header != *.* && $file != kernels/cuda/* ]]; then
                complain "$file" "$line" "$text" "C++ stays in kernels/cuda"
            fi
        done < <(sources "$layer" | xargs -r grep -nEH '^[[:space:]]*#[[:space:]]*include')
    done
    while read -r file; do
        [[ $file == kernels/cuda/* ]] || complain "$file" 1 "" "CUDA sources belong in kernels/cuda"
    done < <(find "${layers[@]}" -type f \( -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cc' \) 2>/dev/null)
    exit $bad
)

self_test() {
    local tmp missed=0 n=0
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' RETURN
    plant() { # plant FILE LINE WHY: a copy of the tree with that line added must be complained about for that reason
        n=$((n + 1))
        rm -rf "$tmp/tree"
        mkdir "$tmp/tree"
        for layer in "${layers[@]}"; do [ ! -d "$layer" ] || cp -r "$layer" "$tmp/tree/"; done
        mkdir -p "$tmp/tree/$(dirname "$1")"
        echo "$2" >>"$tmp/tree/$1"
        check "$tmp/tree" >"$tmp/out"
        grep -q "^$1:.*$3" "$tmp/out" && return
        echo "not seen: $2 in $1"
        missed=1
    }
    plant base/err.c '#include "formats/writer.h"' 'base may include only base'
    plant formats/writer.c '#include "runtime/gemma.h"' 'formats may include'
    plant kernels/backend.c '#include "formats/record.h"' 'kernels may include'
    plant kernels/cpu/core.c '  #  include   "runtime/model.h"' 'kernels may include'
    plant runtime/gemma.c '#include "quantize/cut.h"' 'runtime may include'
    plant quantize/cut.c '#include "report/verify.h"' 'quantize may include'
    plant report/verify.c '#include "quantize/cut.h"' 'report may include'
    plant eval/x.c '#include "cli/opt.h"' 'eval may include'
    plant calib/x.c '#include "kernels/backend.h"' 'calib may include'
    plant base/text.c '#include <cjson/cJSON.h>' 'base/json.h is the only way'
    plant formats/record.c '#include <zstd.h>' 'only reader of .zst'
    plant runtime/model.c '#include <cuda_runtime.h>' 'CUDA stays'
    plant runtime/model.c '#include <cblas.h>' 'BLAS is'
    plant cli/main.c '#include <vector>' 'C++ stays'
    plant base/err.c '#include "err.h"' 'base may include only base'
    plant base/err.c '#include "base/none.h"' 'no such file'
    plant quantize/gptq.cu '' 'CUDA sources belong'
    if [ $missed -eq 0 ]; then echo "check_layers: all $n planted violations were seen"; fi
    return $missed
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
case ${1:-} in
--self-test) self_test ;;
'')
    if check .; then
        echo "check_layers: $(sources "${layers[@]}" | wc -l) files, nothing points back"
    else
        exit 1
    fi
    ;;
*)
    echo "usage: check_layers.sh [--self-test]" >&2
    exit 2
    ;;
esac

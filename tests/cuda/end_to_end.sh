#!/usr/bin/env bash
# The program on a GPU against the program on the CPU: the same bytes of every RTN cut, GPTQ cuts that are as good and the
# same every time, nearly the same numbers, and what is refused or interrupted leaves nothing behind but what can be
# resumed.
#   tests/cuda/end_to_end.sh GEMCUT MODEL [TEXT]
# TEXT: UTF-8 to run on, by default what ships with gemcut. DEVICE names another device than cuda:0, OTHER a model of
# another family that the main cases are run for too, by default data/model/gemma4-tiny where that is there. Exit code 77
# (skipped) only where a CUDA device is asked for and the machine has none at all.
set -euo pipefail
device=${DEVICE:-cuda:0}
if [[ $device == cuda* && ! -e /dev/nvidiactl ]]; then
    echo "not run: this machine has no GPU (no /dev/nvidiactl)"
    exit 77
fi
gemcut=$(realpath "$1") model=$(realpath "$2") text=() other=
[ $# -gt 2 ] && text=(--text "$(realpath "$3")")
[ -z "${OTHER:-}" ] || other=$(realpath "$OTHER")
cd "$(dirname "$0")/../.."
[ -n "$other" ] || [ ! -e data/model/gemma4-tiny/config.json ] || other=$PWD/data/model/gemma4-tiny
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. tests/check.sh

# --- cuts -------------------------------------------------------------------------------------------------------------

# Weights and config.json of two cuts are the same bytes (gemcut.json names the backend).
same_weights() { # same_weights A B
    local a=$1 b=$2 file n=0
    diff <(cd "$a" && ls) <(cd "$b" && ls) || return 1
    for file in "$a"/*.safetensors "$a"/config.json; do
        cmp "$file" "$b/${file##*/}" || return 1
        n=$((n + 1))
    done
    echo "$n files, the same bytes"
}

made_by() { # made_by CUT BACKEND: not by another one in silence
    grep "\"backend\": \"$2\"" "$1/gemcut.json"
}

cut() { # cut NAME [OPTION…]: RTN, on the CPU once, on the device three times
    local name=$1
    shift
    set -- --method rtn "$@"
    rm -rf "$tmp"/cut-*
    "$gemcut" quantize "$model" "$tmp/cut-cpu" -q --device cpu "$@" || return 1
    "$gemcut" quantize "$model" "$tmp/cut-1" -q --device "$device" "$@" || return 1
    "$gemcut" quantize "$model" "$tmp/cut-2" -q --device "$device" "$@" || return 1
    "$gemcut" quantize "$model" "$tmp/cut-3" -q --device "$device" --threads 1 "$@" || return 1
    made_by "$tmp/cut-1" "${device%%:*}" || return 1
    diff -r "$tmp/cut-1" "$tmp/cut-2" || return 1
    diff -r "$tmp/cut-1" "$tmp/cut-3" || return 1
    [ ! -e "$tmp/cut-1.partial" ] || return 1
    same_weights "$tmp/cut-cpu" "$tmp/cut-1" || return 1
}

for scales in range absmax mse; do
    check "cut: $scales" cut "$scales" --scales $scales
    check "cut: $scales, positive, group 32" cut "$scales-32" --scales $scales --scale-sign positive --group-size 32
done
check "cut: w4a16-asym, group 64" cut asym --scheme w4a16-asym --group-size 64
check "cut: w4a16-asym, mse, channel" cut asym-mse --scheme w4a16-asym --scales mse --group-size channel
check "cut: w8a16" cut w8 --scheme w8a16
check "cut: w8a16, mse, group 32" cut w8-mse --scheme w8a16 --scales mse --group-size 32
check "cut: channel" cut channel --group-size channel
check "cut: small shards, mixed" cut mixed --shard-size 4MB --override '*self_attn.q_proj=w8a16,64' \
    --ignore '*layers.2.mlp.down_proj'
check "cut: within 2 GiB" cut budget --memory 2GiB

# --- numbers ----------------------------------------------------------------------------------------------------------

value() { # value FILE KEY…: a number or text of a JSON report
    python3 -c '
import json, sys
v = json.load(open(sys.argv[1]))
for key in sys.argv[2:]:
    v = v[key]
print(v)' "$@"
}

near() { # near A B RELATIVE ABSOLUTE
    python3 -c '
import sys
a, b, relative, absolute = map(float, sys.argv[1:])
print(f"{a:.6g} and {b:.6g}, at most {relative:g} of it + {absolute:g} apart")
sys.exit(not abs(a - b) <= relative * abs(b) + absolute)' "$@"
}

on_device() { # on_device FILE: the report is of the device that was asked for
    [ "$(value "$1" device)" = "$device" ] || { echo "ran on $(value "$1" device)"; return 1; }
}

verify() { # verify CUT
    local options=(--against "$model" --json --windows 4 --length 256 "${text[@]}")
    "$gemcut" verify "$1" "${options[@]}" --device cpu >"$tmp/cpu.json" || return 1
    "$gemcut" verify "$1" "${options[@]}" --device "$device" >"$tmp/device.json" || return 1
    "$gemcut" verify "$1" "${options[@]}" --device "$device" >"$tmp/again.json" || return 1
    on_device "$tmp/device.json" || return 1
    cmp "$tmp/device.json" "$tmp/again.json" || return 1
    [ "$(value "$tmp/device.json" ok)" = True ] || return 1
    near "$(value "$tmp/device.json" mean_weight_error)" "$(value "$tmp/cpu.json" mean_weight_error)" 1e-5 0 || return 1
    near "$(value "$tmp/device.json" behaviour kl_mean)" "$(value "$tmp/cpu.json" behaviour kl_mean)" 0.02 1e-3
}

eval_model() { # eval_model MODEL
    local options=(--json --windows 4 --length 512 "${text[@]}")
    "$gemcut" eval "$1" "${options[@]}" --device cpu >"$tmp/cpu.json" || return 1
    "$gemcut" eval "$1" "${options[@]}" --device "$device" >"$tmp/device.json" || return 1
    "$gemcut" eval "$1" "${options[@]}" --device "$device" >"$tmp/again.json" || return 1
    on_device "$tmp/device.json" || return 1
    cmp "$tmp/device.json" "$tmp/again.json" || return 1
    near "$(value "$tmp/device.json" perplexity)" "$(value "$tmp/cpu.json" perplexity)" 0.005 0
}

generate() { # generate MODEL [OPTION…]: the same tokens twice
    local i
    for i in 1 2; do
        "$gemcut" generate "$1" -p "The old house by the river" -n 48 --json --device "$device" "${@:2}" \
            >"$tmp/text-$i.json" || return 1
        on_device "$tmp/text-$i.json" || return 1
    done
    [ "$(value "$tmp/text-1.json" new_tokens)" -gt 0 ] || return 1
    [ "$(value "$tmp/text-1.json" tokens)" = "$(value "$tmp/text-2.json" tokens)" ] || return 1
    value "$tmp/text-1.json" text | tr '\n' ' '
}

"$gemcut" quantize "$model" "$tmp/g128" -q --device "$device" --method rtn
"$gemcut" quantize "$model" "$tmp/asym" -q --device "$device" --method rtn --scheme w4a16-asym --group-size 32
"$gemcut" quantize "$model" "$tmp/w8" -q --device "$device" --method rtn --scheme w8a16 --group-size channel
for name in g128 asym w8; do
    check "verify: $name" verify "$tmp/$name"
done
for name in "$model" "$tmp/g128" "$tmp/asym" "$tmp/w8"; do
    check "eval: ${name##*/}" eval_model "$name"
    check "generate: ${name##*/}, greedy" generate "$name" --temperature 0 --ignore-eos
    check "generate: ${name##*/}, sampled" generate "$name" --seed 7 --ignore-eos
done

# --- calibrated cuts --------------------------------------------------------------------------------------------------

text_of_cut=(--samples 32 --length 512) # with much less of it GPTQ is no better than RTN on this model

kl() { # kl CUT: of its text, on the device
    "$gemcut" verify "$1" --against "$model" --json --windows 4 --length 512 --device "$device" >"$tmp/kl.json" || return 1
    value "$tmp/kl.json" behaviour kl_mean
}

# Other roundings of the activations lead to other codes: what must agree with the CPU's cut is how good it is.
gptq() { # gptq [OPTION…]: on the CPU once, on the device three times; tuning: options that RTN does not know
    local rtn cpu got
    rm -rf "$tmp"/gptq-*
    set -- "${text_of_cut[@]}" "$@"
    "$gemcut" quantize "$model" "$tmp/gptq-rtn" -q --device "$device" --method rtn "$@" || return 1
    set -- "${tuning[@]}" "$@"
    "$gemcut" quantize "$model" "$tmp/gptq-cpu" -q --device cpu "$@" || return 1
    "$gemcut" quantize "$model" "$tmp/gptq-1" -q --device "$device" "$@" || return 1
    "$gemcut" quantize "$model" "$tmp/gptq-2" -q --device "$device" "$@" || return 1
    "$gemcut" quantize "$model" "$tmp/gptq-3" -q --device "$device" --threads 1 "$@" || return 1
    made_by "$tmp/gptq-1" "${device%%:*}" || return 1
    diff -r "$tmp/gptq-1" "$tmp/gptq-2" || return 1
    diff -r "$tmp/gptq-1" "$tmp/gptq-3" || return 1
    [ ! -e "$tmp/gptq-1.partial" ] || return 1
    rtn=$(kl "$tmp/gptq-rtn") && cpu=$(kl "$tmp/gptq-cpu") && got=$(kl "$tmp/gptq-1") || return 1
    python3 -c '
import sys
got, cpu, rtn = map(float, sys.argv[1:])
print(f"KL {got:.4f}, of the CPU {cpu:.4f}, at most 15 % apart; of RTN {rtn:.4f}")
sys.exit(not (abs(got - cpu) <= 0.15 * cpu and got < rtn))' "$got" "$cpu" "$rtn"
}

autoround() { # autoround [OPTION…]: a few iterations
    local tuning=(--quality better --iters 5)
    gptq "$@"
}

tuning=()
check "gptq" gptq
check "gptq: w4a16-asym, group 64" gptq --scheme w4a16-asym --group-size 64
check "gptq: positive, group 32, natural order" gptq --scale-sign positive --group-size 32 --order-columns natural
check "autoround" autoround

in_little_memory() { # with the least that it says it needs, the tokens' states lie elsewhere and nothing is computed otherwise
    local limit=4194304 i
    for i in 1 2 3 4; do
        rm -rf "$tmp/budget"
        if "$gemcut" quantize "$model" "$tmp/budget" -q --device "$device" "${text_of_cut[@]}" --memory $limit 2>"$tmp/stderr"; then
            diff -r "$tmp/whole" "$tmp/budget" || return 1
            echo "$limit bytes"
            return
        fi
        cat "$tmp/stderr"
        limit=$(python3 -c '
import re, sys
said = re.search(r"([0-9.]+) ([KMG]iB) are needed", sys.argv[1]) or sys.exit("what was said to be needed did not suffice")
number, unit = said.groups()
print(round(1.02 * float(number) * 1024 ** " KMG".index(unit[0])))' "$(cat "$tmp/stderr")") || return 1
    done
    return 1
}

finished() { # linears in the journal of a run that is under way
    wc -l 2>/dev/null <"$tmp/killed.partial/.gemcut-journal" || echo 0
}

resumed() { # resumed SIGNAL LINES: stopped when the journal has so many, then resumed
    local code=0 pid options=(--device "$device" "${text_of_cut[@]}")
    rm -rf "$tmp/killed" "$tmp/killed.partial"
    env --default-signal=INT "$gemcut" quantize "$model" "$tmp/killed" -q "${options[@]}" 2>"$tmp/stderr" &
    pid=$!
    while kill -0 $pid 2>/dev/null && [ "$(finished)" -lt "$2" ]; do
        sleep 0.002
    done
    kill -"$1" $pid
    wait $pid || code=$?
    cat "$tmp/stderr"
    if [ $code = 0 ] || [ -e "$tmp/killed" ] || [ ! -e "$tmp/killed.partial/.gemcut-journal" ]; then
        echo "exit code $code"
        return 1
    fi
    "$gemcut" quantize "$model" "$tmp/killed" --resume "${options[@]}" >"$tmp/stdout" || return 1
    [ ! -e "$tmp/killed.partial" ] || return 1
    diff -r "$tmp/whole" "$tmp/killed" || return 1
    grep "^resumed " "$tmp/stdout"
}

"$gemcut" quantize "$model" "$tmp/whole" -q --device "$device" "${text_of_cut[@]}"
check "gptq in little memory" in_little_memory
check "gptq: SIGKILL, resumed" resumed KILL 12
check "gptq: SIGINT, resumed" resumed INT 25

# --- another family ---------------------------------------------------------------------------------------------------

another_family() {
    local model=$other name
    check "other: cut" cut other
    check "other: cut, w4a16-asym, group 64" cut other-asym --scheme w4a16-asym --group-size 64
    "$gemcut" quantize "$model" "$tmp/other" -q --device "$device" --method rtn
    check "other: verify" verify "$tmp/other"
    for name in "$model" "$tmp/other"; do
        check "other: eval: ${name##*/}" eval_model "$name"
        check "other: generate: ${name##*/}, greedy" generate "$name" --temperature 0 --ignore-eos
    done
    check "other: gptq" gptq
    check "other: autoround" autoround
}

[ -z "$other" ] || another_family

# --- refused ----------------------------------------------------------------------------------------------------------

refused() { # refused WORD ARGUMENT…: exit code 3, one line on stderr that holds the word, nothing left behind
    local word=$1 code=0
    shift
    (cd "$tmp" && "$gemcut" "$@" -q >"$tmp/stdout" 2>"$tmp/stderr") || code=$?
    cat "$tmp/stderr"
    if [ $code != 3 ]; then
        echo "exit code $code, expected 3"
        return 1
    fi
    if [ "$(wc -l <"$tmp/stderr")" != 1 ] || [[ $(cat "$tmp/stderr") != gemcut:*$word* ]]; then
        echo "expected one line with '$word'"
        return 1
    fi
    [ ! -s "$tmp/stdout" ] && [ ! -e "$tmp/refused" ] && [ ! -e "$tmp/refused.partial" ]
}

for wrong in cuda:99 abacus; do
    check "quantize on $wrong" refused "$wrong" quantize "$model" refused --device $wrong
    check "verify on $wrong" refused "$wrong" verify "$tmp/g128" --against "$model" --device $wrong
    check "eval on $wrong" refused "$wrong" eval "$tmp/g128" --device $wrong
    check "generate on $wrong" refused "$wrong" generate "$tmp/g128" -p x --device $wrong
done
for size in 1 64KiB; do
    check "quantize within $size" refused memory quantize "$model" refused --device "$device" --memory $size
    check "quantize within $size, RTN" refused memory quantize "$model" refused --device "$device" --memory $size --method rtn
done
for size in 1 64KiB 1MiB; do
    check "verify within $size" refused memory verify "$tmp/g128" --against "$model" --device "$device" --memory $size
    check "eval within $size" refused memory eval "$tmp/g128" --device "$device" --memory $size
    check "generate within $size" refused memory generate "$tmp/g128" -p x --device "$device" --memory $size
done

# --- interrupted ------------------------------------------------------------------------------------------------------

# A model of 7 GB that takes no room on disk: all its weights are zeros.
big_model() { # big_model OUT
    python3 - data/model/gemma3-tiny "$1" <<'EOF'
import os, pathlib, sys
sys.path.insert(0, "tests/cli")
from model import Model
m = Model(sys.argv[1])
at, width = 0, 786432
for name in m.names():
    entry = m.header[name]
    if ".mlp." in name:
        hidden = m.config["hidden_size"]
        entry["shape"] = [hidden, width] if "down_proj" in name else [width, hidden]
    size = 2
    for n in entry["shape"]:
        size *= n
    entry["data_offsets"] = [at, at + size]
    at += size
m.config["intermediate_size"] = width
file = m.write(pathlib.Path(sys.argv[2]), data=b"") / "model.safetensors"
os.truncate(file, file.stat().st_size + at)
print(f"{at / 1e9:.1f} GB of zeros")
EOF
}

interrupted() { # interrupted SIGNAL SECONDS: that long after the first byte of the result was written
    local code=0 pid
    env --default-signal=INT "$gemcut" quantize "$tmp/big" "$tmp/stopped" -q --device "$device" --method rtn 2>"$tmp/stderr" &
    pid=$!
    while kill -0 $pid 2>/dev/null && [ ! -e "$tmp/stopped.partial/model.safetensors" ]; do
        sleep 0.005
    done
    sleep "$2"
    kill -"$1" $pid
    wait $pid || code=$?
    cat "$tmp/stderr"
    if [ $code != 3 ] || [ "$(cat "$tmp/stderr")" != "gemcut: interrupted" ]; then
        echo "exit code $code"
        return 1
    fi
    [ ! -e "$tmp/stopped" ] && [ ! -e "$tmp/stopped.partial" ]
}

check "big model: make" big_model "$tmp/big"
for seconds in 0 0.05 0.2; do
    check "quantize: SIGINT after $seconds s" interrupted INT $seconds
done
check "quantize: SIGTERM" interrupted TERM 0.1

echo "$passed passed, $failed failed"
[ $failed = 0 ]

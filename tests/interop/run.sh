#!/usr/bin/env bash
# Other people's software on our output, on the CPU.
#   tests/interop/run.sh BUILD_DIR [--data DIR] [--peers]     DIR: see docs/testing.md
# --peers also runs peers.sh, which needs two more Python environments of 1.4 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(realpath "$1") data= peers=0
shift
while [ $# -gt 0 ]; do
    case $1 in
    --data) data=$(realpath "$2"); shift ;;
    --peers) peers=1 ;;
    *) echo "run.sh: unknown option '$1' (--data, --peers)" >&2; exit 2 ;;
    esac
    shift
done
gemcut=$build/gemcut
python=$(tools/interop-env)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. tests/check.sh
dropped=() # of what a cut leaves out on purpose
make_cut() { # make_cut NAME MODEL [OPTION…]
    local name=$1 model=$2
    shift 2
    check "$name: cut" "$gemcut" quantize "$model" "$tmp/$name" -q "$@"
    local run=(--windows 2 --length 64)
    [ -e "$model/tokenizer.json" ] || run=(--no-run)
    check "$name: verify" "$gemcut" verify "$tmp/$name" --against "$model" "${run[@]}"
}
cut_and_load() { # cut_and_load NAME MODEL [OPTION…]
    make_cut "$@"
    check "$1: transformers + compressed-tensors" "$python" tests/interop/test_compressed_tensors.py "$2" "$tmp/$1" "${dropped[@]}"
}
logits() { # logits NAME MODEL [OPTION…]: our forward pass against transformers'
    local name=$1 model=$2
    shift 2
    check "$name: logits" "$python" tests/interop/test_logits.py "$model" "$tmp/$name" --dump "$build/logits_dump" "$@"
}
behaviour() { # behaviour NAME MODEL [OPTION…]: what verify measures against PyTorch
    local name=$1 model=$2
    shift 2
    check "$name: behaviour" "$python" tests/interop/test_behaviour.py "$model" "$tmp/$name" --gemcut "$gemcut" "$@"
}

tiny=data/model/gemma3-tiny rtn="--method rtn"
cut_and_load range $tiny $rtn
cut_and_load absmax $tiny $rtn --scales absmax --scale-sign positive
cut_and_load mse-g32 $tiny $rtn --scales mse --group-size 32
cut_and_load asym $tiny $rtn --scheme w4a16-asym
cut_and_load w8-channel $tiny $rtn --scheme w8a16 --group-size channel
cut_and_load gptq $tiny --samples 32 --length 512
cut_and_load gptq-asym $tiny --scheme w4a16-asym --samples 4 --length 128
cut_and_load mixed $tiny $rtn --ignore '*layers.2.mlp.down_proj' --override '*self_attn.q_proj=w8a16,64' --shard-size 4MB
for dialect in hub model; do
    check "multimodal, $dialect names: make" "$python" tests/interop/make_tiny_gemma3_mm.py "$tmp/mm-$dialect" --dialect "$dialect"
    cut_and_load "mm-$dialect-cut" "$tmp/mm-$dialect" $rtn
done
for family in gemma gemma2 gemma3 gemma4-text gemma4-e2b gemma4-31b gemma4-unified gemma4-moe; do
    check "$family: make" "$python" tests/interop/make_tiny.py "$tmp/$family" --family "$family"
    [ $family = gemma4-e2b ] && dropped=(--allow-dropped '\.[3-5]\.self_attn\.[kv]_proj\.')
    if [ $family = gemma4-moe ]; then # transformers has no place for experts that are quantized one by one
        make_cut "$family-cut" "$tmp/$family" $rtn
        cut_and_load "$family-dense" "$tmp/$family" $rtn --ignore '*experts*'
        logits "$family-dense" "$tmp/$family"
    else
        cut_and_load "$family-cut" "$tmp/$family" $rtn
    fi
    dropped=()
    logits "$family-cut" "$tmp/$family" --ids 700
    for format in auto-round gptq; do
        check "$family, $format: cut" "$gemcut" quantize "$tmp/$family" "$tmp/$family-$format" -q $rtn --format $format
    done
    check "$family: layouts" "$python" tests/interop/test_layouts.py "$tmp/$family-cut" "$tmp/$family-auto-round" "$tmp/$family-gptq"
done
for format in auto-round gptq; do
    check "$format: cut" "$gemcut" quantize $tiny "$tmp/range-$format" -q $rtn --format $format
    check "$format, mixed: cut" "$gemcut" quantize $tiny "$tmp/mixed-$format" -q $rtn --ignore '*layers.2.mlp.down_proj' \
        --override '*self_attn.q_proj=w8a16,64' --shard-size 4MB --format $format
    check "$format, gptq: convert" "$gemcut" convert "$tmp/gptq" "$tmp/gptq-$format" -q --format $format
done
check "layouts" "$python" tests/interop/test_layouts.py "$tmp/range" "$tmp/range-auto-round" "$tmp/range-gptq"
check "layouts, mixed" "$python" tests/interop/test_layouts.py "$tmp/mixed" "$tmp/mixed-auto-round" "$tmp/mixed-gptq"
check "layouts, converted" "$python" tests/interop/test_layouts.py "$tmp/gptq" "$tmp/gptq-auto-round" "$tmp/gptq-gptq"
logits range $tiny --ids 700 # two pieces of prefill
logits w8-channel $tiny
logits mixed $tiny
logits mm-hub-cut "$tmp/mm-hub"
behaviour range $tiny --text data/eval/prose.txt
check "shapes of the models" "$python" tests/interop/test_shapes.py
check "gradients of the blocks" "$python" tests/interop/test_block_grad.py $tiny --dump "$build/grad_dump"
check "gradients of every family's blocks" "$python" tests/interop/test_block_grad.py \
    "$tmp"/{gemma,gemma2,gemma3,gemma4-text,gemma4-e2b,gemma4-31b,gemma4-moe} --dump "$build/grad_dump" --length 40

if [ -z "$data" ]; then
    echo "not run: tokenizer and KL tests (no --data)"
else
    check "tokenizer" "$python" tests/interop/test_tokenizer.py --data "$data/data" --dump "$build/tokenizer_dump"
    zstd -dqf "$data/tiny/heldout.txt.zst" -o "$tmp/heldout.txt"
    # a signed full range is worth a tenth of KL on this model; the bounds hold it against an accident, not to a figure
    check "KL, tiny, range" "$python" tests/interop/check_kl.py $tiny "$tmp/range" --text "$tmp/heldout.txt" \
        --windows 8 --len 512 --min-kl 0.068 --max-kl 0.081
    check "KL, tiny, gptq" "$python" tests/interop/check_kl.py $tiny "$tmp/gptq" --text "$tmp/heldout.txt" \
        --windows 8 --len 512 --min-kl 0.035 --max-kl 0.065
    for name in gemma4-tiny gemma4-moe-tiny; do
        mkdir "$tmp/$name"
        cp "$data/tiny/$name/"*.json "$data/tiny/tokenizer.json" "$tmp/$name"
        zstd -dqf "$data/tiny/$name/model.safetensors.zst" -o "$tmp/$name/model.safetensors"
    done
    cut_and_load gemma4-tiny-cut "$tmp/gemma4-tiny" $rtn
    logits gemma4-tiny-cut "$tmp/gemma4-tiny"
    make_cut moe-tiny-rtn "$tmp/gemma4-moe-tiny" $rtn --group-size 64
    make_cut moe-tiny-gptq "$tmp/gemma4-moe-tiny" --group-size 64 --samples 64 --length 512
    logits moe-tiny-gptq "$tmp/gemma4-moe-tiny"
    cut_and_load moe-tiny-dense "$tmp/gemma4-moe-tiny" --group-size 64 --samples 4 --length 128 --ignore '*experts*'
    # like those above, bounds against an accident
    check "KL, mixture, range" "$python" tests/interop/check_kl.py "$tmp/gemma4-moe-tiny" "$tmp/moe-tiny-rtn" \
        --text "$tmp/heldout.txt" --windows 8 --len 512 --min-kl 0.055 --max-kl 0.08
    check "KL, mixture, gptq" "$python" tests/interop/check_kl.py "$tmp/gemma4-moe-tiny" "$tmp/moe-tiny-gptq" \
        --text "$tmp/heldout.txt" --windows 8 --len 512 --min-kl 0.035 --max-kl 0.06
    big=${GEMCUT_270M:-models/gemma-3-270m}
    check "Gemma 3 270M: make" tools/get-gemma3-270m "$big"
    check "Gemma 3 270M: tokenizer" "$python" tests/interop/test_270m_tokenizer.py --data "$data/data" --model "$big"
    zstd -dqf "$data/data/text/wiki.test.raw.zst" -o "$tmp/wiki.test.raw"
    cut_and_load 270m-range "$big" $rtn
    cut_and_load 270m-absmax "$big" $rtn --scales absmax
    logits 270m-range "$big" --ids 100 --tokens 32
    behaviour 270m-range "$big" --text "$tmp/wiki.test.raw" --windows 1 --length 256
    # the first window of WikiText-2 test alone; docs/benchmarks.md has all 64
    check "KL, 270M, range" "$python" tests/interop/check_kl.py "$big" "$tmp/270m-range" --text "$tmp/wiki.test.raw" \
        --windows 1 --len 1024 --min-kl 0.3 --max-kl 0.8
fi
if [ "$peers" = 1 ]; then
    echo "== peers"
    if ! tests/interop/peers.sh "$build"; then failed=$((failed + 1)); fi
else
    echo "not run: other quantizers' output (no --peers)"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

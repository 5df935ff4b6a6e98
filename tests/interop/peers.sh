#!/usr/bin/env bash
# Other quantizers' real output, read by us, and ours in their formats, read by them. On the CPU, some minutes.
#   tests/interop/peers.sh BUILD_DIR
# auto-round and llm-compressor cut the tiny model on a few rows of ids, few iterations: formats, not quality.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(realpath "$1")
gemcut=$build/gemcut tiny=data/model/gemma3-tiny
python=$(tools/interop-env)
auto_round=$(tools/peer-env auto-round)
llm_compressor=$(tools/peer-env llm-compressor)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. tests/check.sh

some_ids() {
    "$python" - "$tiny/tokenizer.json" data/eval/prose.txt "$tmp/ids.npy" <<'PY'
import sys
import numpy
from tokenizers import Tokenizer
ids = Tokenizer.from_file(sys.argv[1]).encode(open(sys.argv[2], encoding="utf-8").read(), add_special_tokens=False).ids
numpy.save(sys.argv[3], numpy.array([[2] + ids[i * 63:i * 63 + 63] for i in range(8)], "i4"))
PY
}
only_problems() { # only_problems PATTERN CUT: verify finds nothing wrong but what PATTERN names, and that PyTorch loads agree
    "$gemcut" verify "$2" --against "$tiny" --windows 1 --length 64 --json >"$tmp/verify.json" || [ $? = 1 ]
    jq -er --arg known "$1" '[(.problems // [])[] | "\(.object) \(.message)" | select(test($known) | not)]
        | if length > 0 then .[], error("unexpected problems") else "as it must be" end' "$tmp/verify.json"
}
# Saved by transformers, tokenizer.json is printed anew. llm-compressor turns the weights w of Gemma's norms into 1 + w
# and back, in BF16.
rewritten='^tokenizer\.json differs'
rewritten_norms="$rewritten|norm\.weight is not quantized, yet differs"
read_peer() { # read_peer NAME KNOWN PYTHON --peer PEER [OPTION…]: made by the other, read by us
    local name=$1 known=$2 peer=$3
    shift 3
    check "$name: make" "$peer" tests/interop/peer_quantize.py --model $tiny --ids "$tmp/ids.npy" --out "$tmp/$name" "$@"
    check "$name: inspect" "$gemcut" inspect "$tmp/$name"
    check "$name: verify" only_problems "$known" "$tmp/$name"
    check "$name: eval" "$gemcut" eval "$tmp/$name" --windows 1 --length 64
    check "$name: logits" "$python" tests/interop/test_peer_logits.py $tiny "$tmp/$name" --dump "$build/logits_dump"
}
read_ours() { # read_ours NAME FORMAT [OPTION…]: made by us, read by the other
    local name=$1 format=$2
    shift 2
    check "$name: cut" "$gemcut" quantize $tiny "$tmp/$name" -q --format "$format" --method rtn "$@"
    check "$name: logits" "$python" tests/interop/test_peer_logits.py $tiny "$tmp/$name" --dump "$build/logits_dump"
    check "$name: transformers + auto-round" "$auto_round" tests/interop/test_peer_load.py "$tmp/$name"
}

check "ids" some_ids
ar=("$rewritten" "$auto_round" --peer auto-round --iters)
lc=("$rewritten_norms" "$llm_compressor" --peer llm-compressor)
read_peer ar-sym "${ar[@]}" 12
read_peer ar-asym "${ar[@]}" 2 --asym
read_peer ar-g32 "${ar[@]}" 2 --group-size 32
read_peer ar-gptq "${ar[@]}" 2 --format auto_gptq
read_peer ar-gptq-asym "${ar[@]}" 2 --format auto_gptq --asym
read_peer ar-ct "${ar[@]}" 2 --format llm_compressor
read_peer ar-ct-asym "${ar[@]}" 2 --format llm_compressor --asym
read_peer lc-sym "${lc[@]}"
read_peer lc-asym "${lc[@]}" --asym
for name in ar-sym ar-gptq; do    # the test itself: auto-round loads its own
    check "$name: transformers + auto-round" "$auto_round" tests/interop/test_peer_load.py "$tmp/$name"
done
read_ours auto-round auto-round
read_ours gptq gptq
check "block losses" "$python" tests/interop/block_loss.py $tiny "$tmp/ar-sym" --ids "$tmp/ids.npy"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

#!/usr/bin/env python3
"""How far is a cut from its source?  KL divergence, perplexity and top-1 agreement, judged by PyTorch.

    check_kl.py BASE CUT --text FILE [--windows 8] [--len 512] [--max-kl X] [--min-kl Y]

The text is cut into windows of BOS + len-1 tokens that do not overlap; every predicted token counts.
The cut's weights are unpacked by cut.py, rounded to BF16 as every client does, and computed with in
float32 on the CPU. Exit 1 when the KL lies outside its bounds (--min-kl catches a cut that is none).
Run it with the python of tools/interop-env.
"""
import argparse
import math
import os
import pathlib
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import transformers
from tokenizers import Tokenizer

from cut import into


def windows(folder, text, length, count):
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    step = length - 1
    count = min(count, len(ids) // step)
    bos = transformers.AutoConfig.from_pretrained(folder).get_text_config().bos_token_id
    return torch.tensor([[bos] + ids[i * step:(i + 1) * step] for i in range(count)])


@torch.no_grad()
def compare(base, cut, win):
    n, kl, nll_base, nll_cut, same = 0, 0.0, 0.0, 0.0, 0
    for row in win:
        p = base(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        q = cut(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        next_ids = row[1:, None]
        n += len(next_ids)
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        nll_base -= p.gather(1, next_ids).double().sum().item()
        nll_cut -= q.gather(1, next_ids).double().sum().item()
        kl += q.sub_(p).neg_().mul_(p.exp_()).sum(-1).double().sum().item()      # in place: a row is a GB at 262144 words
    return kl / n, math.exp(nll_base / n), math.exp(nll_cut / n), same / n, n


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("base", type=pathlib.Path)
    ap.add_argument("cut", type=pathlib.Path)
    ap.add_argument("--text", type=pathlib.Path, required=True)
    ap.add_argument("--windows", type=int, default=8)
    ap.add_argument("--len", type=int, default=512)
    ap.add_argument("--max-kl", type=float, default=math.inf)
    ap.add_argument("--min-kl", type=float, default=0.0)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32).eval()
    cut, n_modules = into(base, a.cut)
    win = windows(a.base, a.text.read_text(encoding="utf-8"), a.len, a.windows)
    kl, ppl_base, ppl, top1, n = compare(base, cut, win)
    good = a.min_kl <= kl <= a.max_kl        # false for NaN
    print(f"{'ok  ' if good else 'FAIL'} kl {kl:.4f} (from {a.min_kl:g} to {a.max_kl:g})  ppl {ppl:.3f} (base {ppl_base:.3f})  "
          f"top-1 {top1:.3f}  over {n} tokens, {n_modules} quantized modules")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

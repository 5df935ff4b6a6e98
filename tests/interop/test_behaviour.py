#!/usr/bin/env python3
"""Does `gemcut verify` measure what PyTorch measures?  KL, both perplexities and top-1 agreement, computed twice.

    test_behaviour.py MODEL CUT --gemcut PROGRAM --text FILE [--windows 4] [--length 512]

PyTorch runs in float32; the cut's weights come from its bytes (cut.py), the windows from `tokenizers`. Numbers agree
within 1 %, top-1 within 0.01, the perplexity that `gemcut eval` reports within 0.1 %. One line per check and a closing
count; exit 1 when a check failed. Run it with the python of tools/interop-env.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import transformers

from check_kl import windows
from cut import into

ROWS = 64       # of logits at a time: four tables of 64 rows are 270 MB for 262144 words
counts = {True: 0, False: 0}


def check(what, ours, theirs, absolute=0.0, relative=0.0):
    limit = absolute + relative * abs(theirs)
    good = abs(ours - theirs) <= limit          # false for NaN
    counts[good] += 1
    print(f"{'ok  ' if good else 'FAIL'} {what}: gemcut {ours:.6g}, PyTorch {theirs:.6g}, "
          f"differ by {abs(ours - theirs):.1e}, allowed {limit:.1e}", flush=True)


def gemcut(program, *arguments):
    p = subprocess.run([program, *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(p.stdout)


@torch.no_grad()
def rows_of(base, cut, window):
    """-> for every predicted token: KL, -log p of both models, whether they agree on the likeliest"""
    hidden = [m.model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1] for m in (base, cut)]
    for at in range(0, len(window) - 1, ROWS):
        p, q = (m.lm_head(h[at:at + ROWS]).log_softmax(-1) for m, h in zip((base, cut), hidden))
        following = window[at + 1:at + 1 + len(p), None]
        same = p.argmax(-1) == q.argmax(-1)
        nll_p, nll_q = -p.gather(1, following)[:, 0], -q.gather(1, following)[:, 0]
        yield torch.stack([(p.exp() * (p - q)).sum(-1).double(), nll_p.double(), nll_q.double(), same.double()])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=pathlib.Path)
    ap.add_argument("cut", type=pathlib.Path)
    ap.add_argument("--gemcut", type=pathlib.Path, required=True)
    ap.add_argument("--text", type=pathlib.Path, required=True)
    ap.add_argument("--windows", type=int, default=4)
    ap.add_argument("--length", type=int, default=512)
    a = ap.parse_args()
    how = ("--text", a.text, "--windows", a.windows, "--length", a.length)
    told = gemcut(a.gemcut, "verify", a.cut, "--against", a.model, *how)["behaviour"]
    alone = gemcut(a.gemcut, "eval", a.model, "--tasks", "ppl", *how)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    cut, _ = into(base, a.cut)
    text = windows(a.model, a.text.read_text(encoding="utf-8"), a.length, a.windows)
    kl, nll_base, nll_cut, same = torch.cat([r for w in text for r in rows_of(base, cut, w)], 1)

    check("tokens predicted", told["tokens"], kl.numel())
    check("KL, mean", told["kl_mean"], kl.mean().item(), relative=0.01)
    check("KL, median", told["kl_median"], kl.quantile(0.5).item(), relative=0.01)
    check("KL, p99", told["kl_p99"], kl.quantile(0.99).item(), relative=0.01)
    check("perplexity of the original", told["original"]["perplexity"], nll_base.mean().exp().item(), relative=0.01)
    check("perplexity of the cut", told["cut"]["perplexity"], nll_cut.mean().exp().item(), relative=0.01)
    check("top-1 agreement", told["top1"], same.mean().item(), absolute=0.01)
    check("eval: perplexity of the original", alone["perplexity"], nll_base.mean().exp().item(), relative=0.001)
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()

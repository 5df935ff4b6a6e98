#!/usr/bin/env python3
"""Do the libraries whose formats we write load them on the CPU?  transformers with auto-round.

    test_peer_load.py CUT

CUT's quant_method is auto-round or gptq. The second loads through auto-round as well, because GPTQModel does not start
on machines with few processors. Each quantized module is fed the identity, which shows the weights that the library
computes with: they must be what cut.py unpacks from the bytes, to a rounding of its own, because it computes
(q - z) * scale in F16 and casts. Then the model runs. Exit 1 when a check failed.
Run it with the python of tools/peer-env auto-round.
"""
import argparse
import os
import pathlib
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the environment may hold stubs instead of CUDA's libraries
import torch
import transformers
from transformers.utils.quantization_config import AutoRoundConfig

from cut import bits_of, canonical, config as read_config, read, split, weight

ONE_STEP = 2 ** -7          # of a BF16, relative
MIN_EQUAL = 0.9             # share of weights with no such rounding; measured: 0.98
counts = {True: 0, False: 0}


def check(what, good, detail):
    counts[bool(good)] += 1
    print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}", flush=True)


@torch.no_grad()
def check_weights(model, modules):
    loaded = {canonical(n): m for n, m in model.named_modules()}
    kinds, far, equal = set(), [], []
    for name, parts in modules.items():
        module, want = loaded[canonical(name)], weight(parts, bits_of(parts)).float()
        kinds.add(type(module).__name__)
        got = module(torch.eye(want.shape[1], dtype=torch.bfloat16)).T.float()
        equal.append((got == want).float().mean().item())
        if not bool(((got - want).abs() <= ONE_STEP * want.abs()).all()):       # also for NaN
            far.append(name)
    check("quantized modules stay quantized", "Linear" not in kinds, ", ".join(sorted(kinds)))
    check("weights are (q - z) * scale to a rounding", not far and min(equal) >= MIN_EQUAL,
          f"{len(far)} of {len(modules)} modules differ by more, {100 * min(equal):.1f} % equal at least")


@torch.no_grad()
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("cut", type=pathlib.Path)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    method = read_config(a.cut)["quantization_config"]["quant_method"]
    how = {"quantization_config": AutoRoundConfig()} if method == "gptq" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(a.cut, dtype=torch.bfloat16, device_map="cpu", **how).eval()
    check_weights(model, split(read(a.cut))[0])
    logits = model(torch.arange(3, 35)[None], use_cache=False).logits
    check("the loaded model computes", torch.isfinite(logits).all(), f"logits up to {logits.abs().max().item():.3g}")
    print(f"{method}: {counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""transformers' forward pass on the same cores, for docs/benchmarks.md: seconds of prefill (no logits) and
milliseconds a token of decode, FP32 and BF16.

    bench_transformers.py MODEL [TOKENS]
"""
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def best(f, rounds=3):
    times = []
    for _ in range(rounds):
        start = time.monotonic()
        f()
        times.append(time.monotonic() - start)
    return min(times)


@torch.no_grad()
def main():
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
    ids = torch.tensor([[2] + [3 + i * 7919 % 200000 for i in range(1, tokens)]])
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
        prefill = best(lambda: model.model(input_ids=ids, use_cache=False))
        out = model(input_ids=ids[:, :32], use_cache=True, logits_to_keep=1)
        state = {"past": out.past_key_values}

        def decode(n=16):
            for i in range(n):
                state["past"] = model(input_ids=torch.tensor([[5 + i]]), past_key_values=state["past"],
                                      use_cache=True).past_key_values
        decode(2)
        print(f"{dtype}: prefill of {tokens} tokens {prefill:.3f} s, decode {best(decode) / 16 * 1e3:.1f} ms a token, "
              f"{torch.get_num_threads()} threads")


main()

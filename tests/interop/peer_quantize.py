#!/usr/bin/env python3
"""Cut a model with another quantizer, on token ids of ours.

    peer_quantize.py --peer auto-round|llm-compressor --model DIR --ids IDS.npy --out DIR [--format F] [--asym]
                     [--iters N] [--group-size N]

IDS.npy is int32 [samples, length]. What is not named stays at the quantizer's default: AutoRound on 8 rows at a time
with seed 42 (--iters, --format auto_round, auto_gptq or llm_compressor), or llm-compressor's GPTQ in compressed-tensors.
DIR gets what the quantizer writes, as it writes it. Run it with the python of tools/peer-env PEER.
"""
import argparse
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the environment may hold stubs instead of CUDA's libraries
import numpy as np
import torch
import transformers

CT_ENTRY = "weight_scale"


def fail(message):
    raise SystemExit(f"peer_quantize: {message}")


def auto_round(a, ids):
    """Given tensors, auto-round masks the padding itself and takes the rows as they come: no text, no shuffle."""
    from auto_round import AutoRound

    rows = [{"input_ids": torch.from_numpy(row)[None].long()} for row in ids]
    tuner = AutoRound(a.model, dataset=rows, bits=4, group_size=a.group_size, sym=not a.asym, iters=a.iters,
                      seqlen=ids.shape[1], nsamples=len(ids), batch_size=min(8, len(ids)), device_map="cpu")
    with tempfile.TemporaryDirectory(dir=a.out.parent) as tmp:
        tuner.quantize_and_save(tmp, format=a.format)     # it may add a folder of its own
        configs = list(pathlib.Path(tmp).rglob("config.json"))
        if len(configs) != 1:
            fail(f"auto-round left {len(configs)} checkpoints, not one")
        shutil.copytree(configs[0].parent, a.out)


def llm_compressor(a, ids):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    rows = [{"input_ids": torch.from_numpy(row).long(), "attention_mask": torch.ones(len(row), dtype=torch.long)}
            for row in ids]
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.model)
    if a.group_size == 128:
        recipe = GPTQModifier(targets="Linear", scheme="W4A16_ASYM" if a.asym else "W4A16", ignore=["lm_head"])
    else:
        weights = {"num_bits": 4, "type": "int", "symmetric": not a.asym, "strategy": "group", "group_size": a.group_size}
        recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(model=model, dataset=torch.utils.data.DataLoader(rows, batch_size=1), recipe=recipe,
            num_calibration_samples=len(ids), max_seq_length=ids.shape[1])
    model.save_pretrained(a.out, save_compressed=True)
    tokenizer.save_pretrained(a.out)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--peer", choices=["auto-round", "llm-compressor"], required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--ids", type=pathlib.Path, required=True)
    ap.add_argument("--out", type=pathlib.Path, required=True)
    ap.add_argument("--format", choices=["auto_round", "auto_gptq", "llm_compressor"], help="auto-round only")
    ap.add_argument("--asym", action="store_true")
    ap.add_argument("--iters", type=int, help="auto-round only (default 200)")
    ap.add_argument("--group-size", type=int, default=128)
    a = ap.parse_args()
    ids = np.load(a.ids)
    if ids.dtype != np.int32 or ids.ndim != 2:
        fail(f"{a.ids}: {ids.dtype} of {ids.ndim} dimensions, expected int32 [samples, length]")
    if a.out.exists():
        fail(f"{a.out} exists")
    if a.peer == "llm-compressor" and (a.format or a.iters is not None):
        fail("--format and --iters are for auto-round")
    a.format, a.iters = a.format or "auto_round", 200 if a.iters is None else a.iters
    a.out.parent.mkdir(parents=True, exist_ok=True)
    {"auto-round": auto_round, "llm-compressor": llm_compressor}[a.peer](a, ids)
    print(f"{a.out}: {sum(f.stat().st_size for f in a.out.iterdir())} bytes from {ids.size} tokens")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Are our gradients of a decoder block those of PyTorch's autograd?

    test_block_grad.py MODEL --dump PROGRAM [--sequences 2] [--length 160]

MODEL is a BF16 checkpoint of Gemma 3, PROGRAM grad_dump. For each block of it and random x and target (fixed seed) the
loss is mean((block(x) - target)^2); its gradients by x and by the weights of the seven linears come from us and from
transformers' Gemma3DecoderLayer with eager attention, both in float32. Sequences are longer than the tiny model's window
of 128. One line per block and a closing count; exit 1 when a check failed.
Run it with the python of tools/interop-env.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the environment may hold stubs instead of CUDA's libraries
import numpy as np
import torch
import transformers
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

LIMIT = 1e-5            # of ||ours - theirs|| / ||theirs||; rounding in float32 leaves about 2e-6
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
counts = {True: 0, False: 0}


def check(what, good, detail):
    counts[bool(good)] += 1
    print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}", flush=True)


def ours(program, folder, layer, x, target, shapes):
    """-> (loss, block(x), gradients by x and the linears)"""
    with tempfile.TemporaryDirectory() as tmp:
        given, out = pathlib.Path(tmp) / "in", pathlib.Path(tmp) / "out"
        given.write_bytes(x.numpy().tobytes() + target.numpy().tobytes())
        p = subprocess.run([program, folder, str(layer), str(x.shape[0]), str(x.shape[1]), given, out],
                           text=True, check=True, stdout=subprocess.PIPE)
        flat = torch.from_numpy(np.fromfile(out, "f4"))
    shapes = [x.shape, x.shape, *shapes]
    parts = flat.split([shape.numel() for shape in shapes])     # fails where the lengths differ
    y, *gradients = (part.view(shape) for part, shape in zip(parts, shapes))
    return float(p.stdout), y, gradients


def theirs(model, layer, x, target):
    """The same of the model's block."""
    text = model.model
    kind = text.config.layer_types[layer]
    weights = [text.layers[layer].get_submodule(name).weight for name in LINEARS]
    x = x.clone().requires_grad_()
    positions = torch.arange(x.shape[1])[None]
    make_mask = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
    mask = make_mask(config=text.config, inputs_embeds=x.detach(), attention_mask=None, cache=None, position_ids=positions)
    y = text.layers[layer](x, position_embeddings=text.rotary_emb(x, positions, kind), attention_mask=mask,
                           position_ids=positions)
    loss = (y - target).square().mean()
    return loss.item(), y.detach(), torch.autograd.grad(loss, [x, *weights])


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def worst(got, reference):
    """-> the greatest relative error of (loss, y, gradients), and of what"""
    names = ["loss", "y", "x", *LINEARS]
    errors = [abs(got[0] - reference[0]) / abs(reference[0]), distance(got[1], reference[1])]
    errors += [distance(a, b) for a, b in zip(got[2], reference[2])]
    at = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return errors[at], names[at]


def run(a):
    model = transformers.Gemma3ForCausalLM.from_pretrained(
        a.model, dtype=torch.float32, attn_implementation="eager").eval()
    config, generator = model.config, torch.Generator().manual_seed(0)
    for layer, block in enumerate(model.model.layers):
        shape = (a.sequences, a.length, config.hidden_size)
        x, target = (torch.randn(shape, generator=generator) for _ in range(2))
        shapes = [block.get_submodule(name).weight.shape for name in LINEARS]
        error, what = worst(ours(a.dump, a.model, layer, x, target, shapes), theirs(model, layer, x, target))
        check(f"block {layer} ({config.layer_types[layer]})", error <= LIMIT,
              f"relative error at most {error:.2e} ({what}), allowed {LIMIT:g}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=pathlib.Path)
    ap.add_argument("--dump", type=pathlib.Path, required=True)
    ap.add_argument("--sequences", type=int, default=2)
    ap.add_argument("--length", type=int, default=160)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run(a)
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] or not counts[True] else 0)


if __name__ == "__main__":
    main()

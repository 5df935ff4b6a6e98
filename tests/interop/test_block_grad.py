#!/usr/bin/env python3
"""Are our gradients of a decoder block those of PyTorch's autograd?

    test_block_grad.py MODEL... --dump PROGRAM [--sequences 2] [--length 160]

MODEL is a checkpoint of any Gemma that gemcut knows, PROGRAM grad_dump. For each block of each and random x and target (fixed
seed) the loss is mean((block(x) - target)^2); its gradients by x and by the weights of its linears, experts' too, come from
us and from transformers' layer with eager attention, both in float32. What else a block reads (masks, positions, its own
input, keys and values of another layer) is what it got in a forward pass of random ids. Sequences should be longer than
the model's window. One line per block and a closing count; exit 1 when a check failed.
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

LIMIT = 1e-5            # of ||ours - theirs|| / ||theirs||; rounding in float32 leaves about 2e-6
LINEARS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
           "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "experts.gate_up_proj", "experts.down_proj")
counts = {True: 0, False: 0}


def check(what, good, detail):
    counts[bool(good)] += 1
    print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}", flush=True)


def linears(block):
    """-> {name: weight} of those that the block has, in our order"""
    weights = dict(block.named_parameters())
    return {name: weights[name] for name in LINEARS if name in weights}


def ours(program, folder, layer, given, shapes):
    """given: x, target, what else the block reads -> (loss, block(x), gradients by x and the linears)"""
    with tempfile.TemporaryDirectory() as tmp:
        into, out = pathlib.Path(tmp) / "in", pathlib.Path(tmp) / "out"
        into.write_bytes(b"".join(t.contiguous().numpy().tobytes() for t in given))
        x = given[0]
        p = subprocess.run([program, folder, str(layer), str(x.shape[0]), str(x.shape[1]), into, out],
                           text=True, check=True, stdout=subprocess.PIPE)
        flat = torch.from_numpy(np.fromfile(out, "f4"))
    shapes = [x.shape, x.shape, *shapes]
    parts = flat.split([shape.numel() for shape in shapes])     # fails where the lengths differ
    y, *gradients = (part.view(shape) for part, shape in zip(parts, shapes))
    return float(p.stdout), y, gradients


class Call:
    """What a block was called with in a forward pass."""

    def __init__(self, args, kwargs):
        self.args, self.kwargs = args[1:], dict(kwargs)
        shared = kwargs.get("shared_kv_states")
        self.shared = None if shared is None else dict(shared.items())

    def run(self, block, x):
        kwargs = dict(self.kwargs)
        if self.shared is not None:
            kwargs["shared_kv_states"] = dict(self.shared)      # of its own: some blocks write to it
        return block(x, *self.args, **kwargs)

    def others(self, block):
        """What it reads beside x, as grad_dump takes it."""
        found = [t for t in self.args if isinstance(t, torch.Tensor)]       # its own input
        if getattr(block.self_attn, "is_kv_shared_layer", False):
            for t in self.shared[block.self_attn.layer_type]:
                found.append(t.transpose(1, 2).flatten(2))                  # [sequences, tokens, heads * dim]
        return found


def record_calls(model, layers, ids):
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True)
             for layer in layers]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def theirs(block, call, x, target):
    x = x.clone().requires_grad_()
    y = call.run(block, x)
    loss = (y - target).square().mean()
    return loss.item(), y.detach(), torch.autograd.grad(loss, [x, *linears(block).values()])


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def worst(got, reference, names):
    """-> the greatest relative error of (loss, y, gradients), and of what"""
    names = ["loss", "y", "x", *names]
    errors = [abs(got[0] - reference[0]) / abs(reference[0]), distance(got[1], reference[1])]
    errors += [distance(a, b) for a, b in zip(got[2], reference[2], strict=True)]
    at = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    return errors[at], names[at]


def load(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    if "enable_moe_block" in str(config):
        model.set_experts_implementation("eager")
    return model, config.get_text_config()


def run(a, folder):
    model, config = load(folder)
    generator = torch.Generator().manual_seed(0)
    layers = model.get_decoder().layers
    ids = torch.randint(3, config.vocab_size - 16, (a.sequences, a.length), generator=generator)
    calls = record_calls(model, layers, ids)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    for layer, (block, call) in enumerate(zip(layers, calls, strict=True)):
        shape = (a.sequences, a.length, config.hidden_size)
        x, target = (torch.randn(shape, generator=generator) for _ in range(2))
        weights = linears(block)
        got = ours(a.dump, folder, layer, [x, target, *call.others(block)], [w.shape for w in weights.values()])
        error, what = worst(got, theirs(block, call, x, target), list(weights))
        check(f"{folder.name}: block {layer} ({kinds[layer]})", error <= LIMIT,
              f"relative error at most {error:.2e} ({what}), allowed {LIMIT:g}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("models", nargs="+", type=pathlib.Path, metavar="MODEL")
    ap.add_argument("--dump", type=pathlib.Path, required=True)
    ap.add_argument("--sequences", type=int, default=2)
    ap.add_argument("--length", type=int, default=160)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in a.models:
        run(a, folder)
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] or not counts[True] else 0)


if __name__ == "__main__":
    main()

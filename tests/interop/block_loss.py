#!/usr/bin/env python3
"""One yardstick for what cuts do to each decoder block, whoever made them.

    block_loss.py BASE CUT --ids IDS.npy [--samples N] [--length N] [--device cpu] [--float32] [--first-kwargs]

The float stream runs through BASE's blocks, the quantized stream through CUT's, whose weights cut.py unpacks and rounds
to BF16; a block's loss is the mean squared difference of the two streams behind it, over all tokens and channels.
Weights and streams are BF16, as where AutoRound tunes, or --float32. Prints one JSON document:
"mse", one a block; "relative", that over the mean square of the float stream; "sum" of mse over the blocks.

--first-kwargs hands the rotary tables and the mask of the first block to all of them, as auto-round 0.16.1 does to a
Gemma 3 under transformers 5: the function is then wrong in global layers, and only good for comparing with its log.
That prints a block's mean over a batch divided by the number of its tokens that count, which are all but a row's last.
Run it with the python of tools/interop-env.
"""
import argparse
import json
import pathlib

import numpy as np
import torch
import transformers

from cut import into


class Stop(Exception):
    pass


def decoder(model):
    return getattr(model.model, "language_model", model.model)


def block_inputs(model, ids):
    """-> (input of the first block, [the other arguments of each block])"""
    hidden, others = [], []

    def note(module, args, kwargs):
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        others.append({k: v for k, v in kwargs.items() if not isinstance(v, transformers.Cache)})

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in decoder(model).layers]
    decoder(model)(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return hidden[0], others


def first_input(model, ids):
    """The first block's input alone."""
    found = []

    def note(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    hook = decoder(model).layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        decoder(model)(input_ids=ids, use_cache=False)
    except Stop:
        pass
    hook.remove()
    return found[0]


def step(block, stream, kwargs):
    """A block's output in place of its input, batch by batch."""
    for i, x in enumerate(stream):
        y = block(x, **kwargs)
        stream[i] = y[0] if isinstance(y, tuple) else y


@torch.no_grad()
def losses(base, cut, batches, first_kwargs):
    """-> ([mean squared difference behind each block], [mean square of the float stream])"""
    others = block_inputs(base, batches[0][:1])[1]        # one row's: they hold for any number of rows of this length
    floats, quants = [[first_input(m, ids) for ids in batches] for m in (base, cut)]
    mse, square = [], []
    for i, (f, q) in enumerate(zip(decoder(base).layers, decoder(cut).layers)):
        kwargs = others[0 if first_kwargs else i]
        step(f, floats, kwargs)
        step(q, quants, kwargs)
        n = sum(x.numel() for x in floats)
        mse.append(sum((y.float() - x.float()).square().sum(dtype=torch.float64).item() for x, y in zip(floats, quants)) / n)
        square.append(sum(x.float().square().sum(dtype=torch.float64).item() for x in floats) / n)
    return mse, square


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("base", type=pathlib.Path)
    ap.add_argument("cut", type=pathlib.Path)
    ap.add_argument("--ids", type=pathlib.Path, required=True, help="int32 [samples, length]")
    ap.add_argument("--samples", type=int)
    ap.add_argument("--length", type=int)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--float32", action="store_true")
    ap.add_argument("--first-kwargs", action="store_true")
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = torch.from_numpy(np.load(a.ids)[:a.samples, :a.length]).long().to(a.device)
    dtype = torch.float32 if a.float32 else torch.bfloat16
    base = transformers.AutoModelForCausalLM.from_pretrained(a.base, dtype=dtype).to(a.device).eval()
    cut, n_modules = into(base, a.cut)
    mse, square = losses(base, cut, list(ids.split(a.batch)), a.first_kwargs)
    print(json.dumps({"base": str(a.base), "cut": str(a.cut), "samples": ids.shape[0], "length": ids.shape[1],
                      "dtype": str(dtype)[6:], "device": a.device, "first_kwargs": a.first_kwargs,
                      "quantized_modules": n_modules, "mse": mse, "relative": [m / s for m, s in zip(mse, square)],
                      "sum": sum(mse)}))


if __name__ == "__main__":
    main()

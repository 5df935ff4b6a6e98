#!/usr/bin/env python3
"""Does our forward pass compute what transformers computes?

    test_logits.py MODEL [CUT] --dump PROGRAM [--ids 300] [--tokens 64]

MODEL is the BF16 source, CUT what gemcut made of it (left out: the source alone), PROGRAM logits_dump. The reference is
transformers with eager attention in float32, on weights that it loads itself: the BF16 source's, and the cut's as
compressed-tensors decompresses them, or where experts are quantized, which transformers does not load, as they are unpacked
here. Logits of English prose are compared (of random ids where a model has no tokenizer), then both continue it greedily:
to the same ids, or to the first near-tie of the two best. One line per check and a closing count; exit 1 when a check
failed. Run it with the python of tools/interop-env.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the environment may hold stubs instead of CUDA's libraries
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from cut import canonical, config as read_config, into, read, split

PROSE = pathlib.Path(__file__).resolve().parents[2] / "data/eval/prose.txt"
BF16_LIMIT, CUT_LIMIT = 1e-4, 1e-3      # of ||ours - theirs|| / ||theirs||; rounding in float32 leaves about 1e-6
CT_REST = ("weight_scale", "weight_zero_point", "weight_shape")     # what decompression may leave beside a weight
NEAR_TIE = 1e-3                         # of the two best logits; rounding moves either by about 1e-5
counts = {True: 0, False: 0}


def check(what, good, detail):
    counts[bool(good)] += 1
    print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}", flush=True)


def some_ids(folder, config, n):
    """n ids, <bos> first."""
    file = folder / "tokenizer.json"
    if file.exists():
        ids = Tokenizer.from_file(str(file)).encode(PROSE.read_text(encoding="utf-8"), add_special_tokens=False).ids
    else:
        # the last ids of made-up multimodal models stand for images
        ids = torch.randint(3, config.vocab_size - 16, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(ids) >= n - 1, f"the prose has {len(ids)} tokens"
    return [config.bos_token_id] + ids[:n - 1]


class Ours:
    def __init__(self, program, folder, vocab):
        self.program, self.folder, self.vocab = program, folder, vocab

    def logits(self, ids, greedy=0):
        """-> (logits [n, vocab], ids of the continuation)"""
        with tempfile.TemporaryDirectory() as tmp:
            file = pathlib.Path(tmp) / "logits"
            p = subprocess.run([self.program, self.folder, file, "--greedy", str(greedy)], text=True, check=True,
                               input=" ".join(map(str, ids)), stdout=subprocess.PIPE)
            return np.fromfile(file, "f4").reshape(len(ids), self.vocab), [int(i) for i in p.stdout.split()]


def load(folder, config, dtype, **how):
    return getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", **how).eval()


def load_cut(folder, config):
    """The way users load: compressed, until the first forward decompresses it in BF16. compressed-tensors 0.20 makes
    no room for packed zero points there, so that asymmetric cuts are decompressed while they are loaded."""
    groups = read_config(folder)["quantization_config"]["config_groups"].values()
    symmetric = all(g["weights"]["symmetric"] for g in groups)
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    cut = load(folder, config, torch.bfloat16, **how)
    cut(input_ids=torch.arange(3, 19)[None])
    return cut


@torch.no_grad()
def reference(source, folder, config):
    """The model as transformers loads it, in float32. A cut's weights go into the source's skeleton, because what else
    is cast with them (the embedding's factor, the rotary frequencies) would stay rounded to BF16. Quantized experts, which
    transformers does not load, are unpacked here."""
    model = load(source, config, torch.float32)
    if folder != source:
        quantized = {canonical(m) for m in split(read(folder))[0]}
        if any(".experts." in m for m in quantized):
            return into(model, folder)[0]
        state = load_cut(folder, config).state_dict()       # all of it in BF16, whatever the source was
        model.load_state_dict({k: v.float() for k, v in state.items() if canonical(k.removesuffix(".weight")) in quantized
                               and not k.endswith(CT_REST)}, strict=False)
    return model


@torch.no_grad()
def their_logits(model, ids, **how):
    return model(input_ids=torch.tensor([ids]), use_cache=False, **how).logits[0].numpy()


def check_logits(what, limit, ours, model, ids):
    mine, theirs = ours.logits(ids)[0], their_logits(model, ids)
    norm, delta = np.linalg.norm(theirs, axis=1), np.linalg.norm(mine - theirs, axis=1)
    error, rows = np.linalg.norm(delta) / np.linalg.norm(norm), delta / norm
    top = (mine.argmax(1) == theirs.argmax(1)).sum()
    check(what, error <= limit, f"relative error {error:.2e}, allowed {limit:g}, worst row {rows.argmax()}: "
          f"{rows.max():.2e}, top-1 equal in {top} of {len(ids)}")


@torch.no_grad()
def continue_theirs(model, ids, n):
    out, cache = [], transformers.DynamicCache(config=model.config)
    fed = torch.tensor([ids])
    for _ in range(n):
        step = model(input_ids=fed, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        out.append(step.argmax().item())
        fed = torch.tensor([[out[-1]]])
    return out


def two_best(row):
    best = np.argsort(-row)[:2]
    return row[best[0]] - row[best[1]], ", ".join(f"{i}: {row[i]:.5f}" for i in best)


def check_continuation(what, ours, model, ids, n):
    mine, theirs = ours.logits(ids, n)[1], continue_theirs(model, ids, n)
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
    if at is None:
        return check(what, len(mine) == n, f"{len(mine)} of {n} tokens equal, {len(set(mine))} different ones")
    so_far = ids + theirs[:at]
    gap, best = two_best(ours.logits(so_far)[0][-1])
    their_gap, their_best = two_best(their_logits(model, so_far, logits_to_keep=1)[-1])
    check(what, max(gap, their_gap) <= NEAR_TIE, f"part at token {at}, ours {best} (gap {gap:.1e}), "
          f"theirs {their_best} (gap {their_gap:.1e}), a near-tie is {NEAR_TIE:g}")


def run(a):
    for folder, name, limit in ((a.model, "source", BF16_LIMIT), (a.cut, "cut", CUT_LIMIT)):
        if folder is None:
            continue
        config = transformers.AutoConfig.from_pretrained(a.model)
        text = config.get_text_config()
        ids = some_ids(a.model, text, a.ids)
        ours, model = Ours(a.dump, folder, text.vocab_size), reference(a.model, folder, config)
        check_logits(f"{name}: logits of {a.ids} ids", limit, ours, model, ids)
        check_continuation(f"{name}: greedy continuation", ours, model, ids[:a.prompt], a.tokens)
        del model


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=pathlib.Path)
    ap.add_argument("cut", type=pathlib.Path, nargs="?")
    ap.add_argument("--dump", type=pathlib.Path, required=True)
    ap.add_argument("--ids", type=int, default=300)
    ap.add_argument("--prompt", type=int, default=40, help="ids of them that are continued")
    ap.add_argument("--tokens", type=int, default=64)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    run(a)
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()

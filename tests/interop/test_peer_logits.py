#!/usr/bin/env python3
"""Does our forward pass compute what another quantizer's cut means?

    test_peer_logits.py MODEL CUT --dump PROGRAM [--ids 300]

MODEL is the BF16 source, CUT what the other one made of it, PROGRAM logits_dump. The reference is transformers with
eager attention in float32 on the cut's weights, which cut.py unpacks and rounds to BF16; no code of the other's takes
part. Exit 1 when the logits differ. Run it with the python of tools/interop-env.
"""
import argparse
import pathlib
import sys

import torch
import transformers

from cut import into
from test_logits import CUT_LIMIT, Ours, check_logits, counts, load, some_ids


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=pathlib.Path)
    ap.add_argument("cut", type=pathlib.Path)
    ap.add_argument("--dump", type=pathlib.Path, required=True)
    ap.add_argument("--ids", type=int, default=300)
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(a.model)
    model, n_modules = into(load(a.model, config, torch.float32), a.cut)
    text = config.get_text_config()
    check_logits(f"logits of {a.ids} ids, {n_modules} quantized modules", CUT_LIMIT,
                 Ours(a.dump, a.cut, text.vocab_size), model, some_ids(a.model, text, a.ids))
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()

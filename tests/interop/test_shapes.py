#!/usr/bin/env python3
"""data/shapes against transformers: a model built from NAME.json on the meta device must have the tensors of NAME.txt.

The language part alone is compared, by names without what stands in front of "layers."; the keys and values that the
files have on disk for layers that read another one's are the only ones transformers may not know.
"""
import json
import pathlib
import re
import runpy
import sys
import warnings

import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OTHER_PARTS = re.compile("vision|audio|multi_modal|rotary|inv_freq|embed_scale|lm_head")
PREFIX = re.compile(r"^.*?(?=layers\.|embed_tokens|norm\.weight|per_layer_)")


def language_part(shapes):
    return {PREFIX.sub("", name): tuple(shape) for name, shape in shapes if not OTHER_PARTS.search(name)}


def is_dead(name, text):
    layer = re.match(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.", name)
    return layer and int(layer[1]) >= text["num_hidden_layers"] - text.get("num_kv_shared_layers", 0)


def main():
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    expand = runpy.run_path(str(ROOT / "tools/make-bench-shapes"), run_name="shapes")["expand"]
    failed = 0
    for file in sorted((ROOT / "data/shapes").glob("*.json")):
        config = json.loads(file.read_text())
        on_disk = expand(file.with_suffix(".txt").read_text())
        ours = language_part((name, shape) for name, (_, shape) in on_disk.items())
        with torch.device("meta"):
            model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
        theirs = language_part((n, t.shape) for part in (model.named_parameters(), model.named_buffers()) for n, t in part)
        text = config.get("text_config", config)
        wrong = [n for n in theirs if ours.get(n) != theirs[n]]
        wrong += [n for n in ours if n not in theirs and not is_dead(n, text)]
        print(f"{file.stem}: {len(theirs)} tensors" + "".join(f"\n    differs: {n}" for n in wrong[:8]))
        failed += bool(wrong)
    return 1 if failed else 0


sys.exit(main())

#!/usr/bin/env python3
"""Make a small random multimodal Gemma 3 in BF16, in two shards with an index.

    make_tiny_gemma3_mm.py OUT [--dialect hub|model] [--seed 0]

hub names tensors as the released checkpoints do (language_model.model..., vision_tower.vision_model...),
model as newer re-saves do (model.language_model..., model.vision_tower...). The text model's widths are
multiples of 128; the vision tower's are not, so nobody can quantize it unnoticed.
Run it with the python of tools/interop-env.
"""
import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

# In-memory prefix -> prefix on disk. Written out here because the tests must not depend on which of
# the two the installed transformers happens to save.
DIALECTS = {
    "hub": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector."},
    "model": {"model.vision_tower.": "model.vision_tower.vision_model."},
}


def tiny_config():
    text = Gemma3TextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=8, max_position_embeddings=512)
    vision = dict(hidden_size=64, intermediate_size=136, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8, vision_use_head=False)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=500,
                        boi_token_index=503, eoi_token_index=504, dtype="bfloat16")


def randomize(model, seed):
    """Values of a size that keeps the activations of a deep random net near 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=g)
            if p.dim() < 2:
                p.copy_(0.2 * r)
            else:
                p.copy_(r * (1.0 if "embed_tokens" in name else 1.3) / p.shape[-1] ** 0.5)


def disk_name(name, dialect):
    for old, new in DIALECTS[dialect].items():
        if name.startswith(old) and not name.startswith(new):
            return new + name[len(old):]
    return name


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--dialect", choices=sorted(DIALECTS), default="hub")
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    model = Gemma3ForConditionalGeneration(tiny_config())
    randomize(model, a.seed)
    tensors = {disk_name(n, a.dialect): p.detach().to(torch.bfloat16).contiguous()
               for n, p in model.state_dict().items() if n != "lm_head.weight"}       # tied to the embedding
    a.out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["Gemma3ForConditionalGeneration"]
    model.config.save_pretrained(a.out)
    names, weight_map = sorted(tensors), {}
    for i in (0, 1):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = names[i * len(names) // 2:(i + 1) * len(names) // 2]
        save_file({n: tensors[n] for n in part}, a.out / file, metadata={"format": "pt"})
        weight_map |= {n: file for n in part}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (a.out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    print(f"{a.out}: {len(tensors)} tensors, {total} bytes, {a.dialect} names")


if __name__ == "__main__":
    main()

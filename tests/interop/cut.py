"""Reading a cut checkpoint from its bytes alone, for the interop tests: no code of any client takes part."""
import copy
import json
import pathlib
import re

import torch
from safetensors import safe_open

CT_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)     # which field of a word holds the first, second… of eight columns


def read(folder):
    """{name: tensor} of every shard."""
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}
    return tensors


def split(tensors):
    """-> ({module: {part: tensor}} of the quantized modules, {name: tensor} of the rest)"""
    modules, plain = {}, {}
    for name, t in tensors.items():
        module, _, part = name.rpartition(".")
        if part in CT_PARTS + GPTQ_PARTS:
            modules.setdefault(module, {})[part] = t
        else:
            plain[name] = t
    return modules, plain


def canonical(name):
    """Names on disk and in memory differ only in these levels (language_model.model.layers..., model.layers...)."""
    return ".".join(p for p in name.split(".") if p not in ("model", "language_model", "vision_model"))


def bits_equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def fields(words, bits, dim):
    """The unsigned numbers in int32 words, low field first, laid out along dim."""
    parts = [(words.long() >> shift) & (2 ** bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def is_awq(p):
    """AWQ packs along a row's outputs, GPTQ along its inputs."""
    return "qweight" in p and p["qweight"].shape[1] < p["scales"].shape[1]


def awq_fields(words):
    """4-bit numbers in AWQ's order, laid out along dim 1."""
    return fields(words, 4, 1).unflatten(1, (-1, 8))[:, :, AWQ_PLACE].flatten(1)


def weight(p, bits):
    """bf16((q - z) * scale), [rows, cols]: the product of a small integer and a BF16 or F16 is exact in float32."""
    if is_awq(p):                                        # everything transposed, zeros stored as they are
        q, scale, z = awq_fields(p["qweight"]).T, p["scales"].T, awq_fields(p["qzeros"]).T
    elif "qweight" in p:                                 # GPTQ: everything transposed, zeros stored less one
        q, scale = fields(p["qweight"], bits, 0).T, p["scales"].T
        z = fields(p["qzeros"], bits, 1).T[:len(q)] + 1
    else:
        rows, cols = p["weight_shape"].tolist()
        q, scale = fields(p["weight_packed"], bits, 1)[:, :cols], p["weight_scale"]
        if "weight_zero_point" in p:
            z = fields(p["weight_zero_point"], bits, 0)[:rows]
        else:
            z = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.long)
    group = -(-q.shape[1] // scale.shape[1])
    index = p["g_idx"].long() if "g_idx" in p else torch.arange(q.shape[1]) // group
    return ((q - z[:, index]).float() * scale.float()[:, index]).bfloat16()


def bits_of(p):
    """4 or 8, from the widths of a module's tensors."""
    if "qweight" in p:
        return 32 * p["qzeros"].shape[1] // p["scales"].shape[1]
    cols = p["weight_shape"].tolist()[1]
    return next(b for b in (4, 8) if p["weight_packed"].shape[1] == -(-cols * b // 32))


def weights(folder):
    """-> ({canonical name: tensor} of everything in a cut, quantized weights in BF16, number of quantized modules)"""
    modules, plain = split(read(folder))
    given = {canonical(name): t for name, t in plain.items()}
    return given | {canonical(m + ".weight"): weight(p, bits_of(p)) for m, p in modules.items()}, len(modules)


def with_whole_experts(given):
    """Experts' linears, of which a cut holds each by itself, as transformers' two parameters of a layer: gate above up."""
    found = {n: re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", n) for n in given}
    parts = {(m[1], int(m[2]), m[3]): given[n] for n, m in found.items() if m}
    out = {n: given[n] for n, m in found.items() if not m}
    for layer in {place[0] for place in parts}:
        n = 1 + max(i for where, i, _ in parts if where == layer)
        out[layer + ".gate_up_proj"] = torch.stack([torch.cat([parts[layer, i, "gate"], parts[layer, i, "up"]]) for i in range(n)])
        out[layer + ".down_proj"] = torch.stack([parts[layer, i, "down"] for i in range(n)])
    return out


def into(base, folder):
    """-> (a copy of the base model with the cut's weights, number of quantized modules); every parameter must be given."""
    given, n_modules = weights(folder)
    given = with_whole_experts(given)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in model.named_parameters():          # tied weights come once
            p.copy_(given.pop(canonical(name)))
    return model, n_modules


def config(folder):
    return json.loads((pathlib.Path(folder) / "config.json").read_text())

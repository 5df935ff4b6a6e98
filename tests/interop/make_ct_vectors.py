"""Makes tests/data/ct_vectors.json: what compressed-tensors packs and how it chooses scales and codes.

    "$(tools/interop-env)" tests/interop/make_ct_vectors.py >tests/data/ct_vectors.json
"""
import inspect
import json
import sys

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

rng = torch.Generator().manual_seed(1)


def pack(rows, cols, bits, dim0=False):
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (rows, cols), generator=rng, dtype=torch.int8)
    packed = pack_to_int32(values, bits, packed_dim=0) if dim0 else pack_to_int32(values, bits)
    out = {"rows": rows, "cols": cols, "bits": bits}
    if dim0:
        out["dim0"] = True
    return out | {"values": values.flatten().tolist(), "packed": packed.flatten().tolist()}


def grid(rows, cols, group, bits, symmetric):
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group)
    w = (torch.randn(rows, cols, generator=rng) * 0.05 + 0.01).to(torch.bfloat16)
    grouped = w.reshape(rows, cols // group, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if not symmetric:  # in BF16 the span itself would be rounded before it is divided by 15; gemcut rounds once
        low, high = low.float(), high.float()
    scales, zeros = calculate_qparams(low, high, args)
    scales = scales.to(torch.bfloat16)
    # an FP32 quotient, as docs/algorithms.md has it: compressed-tensors divides in the dtype of its operands
    codes = quantize(w.float(), scales.float(), zeros, args, dtype=torch.int8)
    out = {"rows": rows, "cols": cols, "group": group, "bits": bits,
           "weights": (w.view(torch.int16).int() & 0xFFFF).flatten().tolist(),
           "scales": (scales.view(torch.int16).int() & 0xFFFF).flatten().tolist(),
           "packed": pack_to_int32(codes, bits).flatten().tolist()}
    return out if symmetric else out | {"zeros": zeros.to(torch.int8).flatten().tolist()}


assert "packed_dim" in inspect.signature(pack_to_int32).parameters
json.dump({
    "made": f"tests/interop/make_ct_vectors.py, compressed-tensors {compressed_tensors.__version__}",
    "pack": [pack(3, 128, 4), pack(3, 100, 4), pack(3, 13, 4), pack(3, 10, 8), pack(3, 128, 8),
             pack(13, 5, 4, dim0=True), pack(10, 3, 8, dim0=True)],
    "grid": [grid(4, 256, 128, 4, True), grid(4, 256, 32, 4, True), grid(2, 256, 64, 8, True),
             grid(4, 256, 128, 4, False)],
}, sys.stdout, separators=(",", ":"))
print()

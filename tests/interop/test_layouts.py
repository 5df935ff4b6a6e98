#!/usr/bin/env python3
"""Do cuts of one model in several formats say the same?  Their bytes are unpacked here, with numpy alone, from what the
formats' own projects define.

    test_layouts.py CUT_DIR CUT_DIR…

Every tensor must have the dtype and shape of its format, zero points and groups must be what readers of symmetric cuts
take for granted, and the dequantized weights, codes and scales of all cuts must be equal. One line per check and a closing
count; exit 1 when a check failed.
"""
import json
import pathlib
import re
import struct
import sys

import numpy as np

counts = {True: 0, False: 0}
DTYPES = {"I64": "<i8", "I32": "<u4", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}


def check(what, bad):
    bad = list(bad)
    counts[not bad] += 1
    print(f"{'FAIL' if bad else 'ok  '} {what}{': ' + ', '.join(map(str, bad[:3])) if bad else ''}", flush=True)


def read(folder):
    """{name: (dtype, array)}; BF16 stays as 16-bit numbers."""
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        raw = file.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        for name, t in json.loads(raw[8:8 + n]).items():
            if name != "__metadata__":
                begin, end = (8 + n + o for o in t["data_offsets"])
                tensors[name] = t["dtype"], np.frombuffer(raw[begin:end], DTYPES[t["dtype"]]).reshape(t["shape"])
    return tensors


def bf16(x):
    """float32 → the nearest BF16, ties to even, as 16 bits."""
    u = np.asarray(x, "<f4").view("<u4")
    return ((u + 0x7fff + (u >> 16 & 1)) >> 16).astype("<u2")


def fields(words, bits, axis):
    """The numbers in 32-bit words, low ones first, laid out along axis."""
    parts = [(words >> np.uint32(s)) & np.uint32(2 ** bits - 1) for s in range(0, 32, bits)]
    return np.stack(parts, axis + 1).reshape([-1 if a == axis else n for a, n in enumerate(words.shape)]).astype(int)


def expect(tensors, name, dtype, shape, faults):
    have, array = tensors.get(name, (None, None))
    if have != dtype or list(array.shape) != shape:
        faults.append(f"{name} is {have} {None if array is None else list(array.shape)}, expected {dtype} {shape}")
        return None
    return array


def by_rows(tensors, module, faults):
    """-> codes [rows, cols], scales [rows, groups] as floats"""
    rows, cols = (int(n) for n in tensors[module + ".weight_shape"][1])
    packed = tensors[module + ".weight_packed"][1]
    bits = 32 * packed.shape[1] // cols
    groups = tensors[module + ".weight_scale"][1].shape[1]
    scale = expect(tensors, module + ".weight_scale", "BF16", [rows, groups], faults)
    expect(tensors, module + ".weight_packed", "I32", [rows, cols * bits // 32], faults)
    return fields(packed, bits, 1) - 2 ** (bits - 1), (scale.astype("<u4") << 16).view("<f4")


def transposed(tensors, module, has_g_idx, faults):
    qweight, scales = tensors[module + ".qweight"][1], tensors[module + ".scales"][1]
    groups, rows = scales.shape
    bits = 32 * tensors[module + ".qzeros"][1].shape[1] // rows
    cols = qweight.shape[0] * 32 // bits
    expect(tensors, module + ".qweight", "I32", [cols * bits // 32, rows], faults)
    expect(tensors, module + ".scales", "F16", [groups, rows], faults)
    zeros = expect(tensors, module + ".qzeros", "I32", [groups, rows * bits // 32], faults)
    if set(np.unique(zeros)) != {{4: 0x77777777, 8: 0x7f7f7f7f}[bits]}:
        faults.append(f"{module}.qzeros holds {np.unique(zeros)}")
    index = expect(tensors, module + ".g_idx", "I32", [cols], faults) if has_g_idx else None
    if has_g_idx and (index != np.arange(cols) // (cols // groups)).any():
        faults.append(f"{module}.g_idx is not in order")
    if not has_g_idx and module + ".g_idx" in tensors:
        faults.append(f"{module}.g_idx is there")
    return fields(qweight, bits, 0).T - 2 ** (bits - 1), scales.T.astype("<f4")


def unpack(folder):
    """-> ({module: (codes, scales)}, {name: bytes of what is not quantized})"""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())["quantization_config"]
    tensors, faults, modules = read(folder), [], {}
    method = config["quant_method"]
    suffix = ".weight_packed" if method == "compressed-tensors" else ".qweight"
    for module in [n.removesuffix(suffix) for n in tensors if n.endswith(suffix)]:
        modules[module] = by_rows(tensors, module, faults) if method == "compressed-tensors" else \
            transposed(tensors, module, method == "gptq", faults)
    check(f"{folder} ({method}): dtypes, shapes, zero points and groups of {len(modules)} linears", faults)
    part = re.compile(r"\.(weight_packed|weight_scale|weight_shape|qweight|qzeros|scales|g_idx)$")
    rest = {n: (d, a.tobytes()) for n, (d, a) in tensors.items() if not part.search(n)}
    copy = {"auto-round": "quantization_config.json", "gptq": "quantize_config.json"}.get(method)
    check(f"{folder}: the copy of quantization_config",
          [] if not copy or json.loads((pathlib.Path(folder) / copy).read_text()) == config else [copy])
    return modules, rest


def weight(codes, scales):
    return bf16(codes.astype("<f4") * np.repeat(scales, codes.shape[1] // scales.shape[1], 1))


def main(folders):
    first, rest = unpack(folders[0])
    for folder in folders[1:]:
        modules, others = unpack(folder)
        check(f"{folder}: the same linears", set(modules) ^ set(first))
        both = set(modules) & set(first)
        check(f"{folder}: codes", [m for m in both if not np.array_equal(modules[m][0], first[m][0])])
        check(f"{folder}: scales", [m for m in both if not np.array_equal(modules[m][1], first[m][1])])
        check(f"{folder}: dequantized weights",
              [m for m in both if not np.array_equal(weight(*modules[m]), weight(*first[m]))])
        check(f"{folder}: everything else", [n for n in set(rest) | set(others) if rest.get(n) != others.get(n)])
    print(f"{counts[True]} passed, {counts[False]} failed")
    return 1 if counts[False] else 0


sys.exit(main(sys.argv[1:]))

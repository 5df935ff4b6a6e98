#!/usr/bin/env python3
"""Does the world read our INT4 checkpoint as we mean it?  transformers and compressed-tensors load it.

    test_compressed_tensors.py MODEL_DIR CUT_DIR [--allow-dropped REGEX]

MODEL_DIR is the BF16 source, CUT_DIR what gemcut made of it (pack-quantized, 4 or 8 bits, symmetric or
not). What a weight must be is worked out here from the bytes, without compressed-tensors. One line per
check and a closing count; exit 1 when a check failed. --allow-dropped names source tensors that the cut
may lack (dead K/V of layers that share them). Run it with the python of tools/interop-env.
"""
import argparse
import json
import os
import pathlib
import re
import sys
import traceback
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the environment may hold stubs instead of CUDA's libraries
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from transformers.utils.quantization_config import CompressedTensorsConfig

from cut import bits_equal, canonical, config as read_config, read, split, weight

counts = {True: 0, False: 0}


def check(what, bad, total=None):
    """bad: names of what is wrong; none means passed."""
    bad = list(bad)
    counts[not bad] += 1
    detail = f": {', '.join(map(str, bad[:4]))}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}" if bad else ""
    print(f"{'FAIL' if bad else 'ok  '} {what}{f' [{total}]' if total is not None else ''}{detail}", flush=True)


def layout_fault(p, args, source):
    """What in a module's tensors contradicts the config, the source or the format; None when all is well."""
    rows, cols = source.shape
    group = cols if args.strategy == "channel" else args.group_size
    want = {"weight_packed": (torch.int32, [rows, -(-cols * args.num_bits // 32)]),
            "weight_scale": (torch.bfloat16, [rows, cols // group]), "weight_shape": (torch.int64, [2])}
    if not args.symmetric:
        want["weight_zero_point"] = (torch.int32, [-(-rows * args.num_bits // 32), cols // group])
    have = {k: (t.dtype, list(t.shape)) for k, t in p.items()}
    if have != want:
        return f"has {have}, expected {want}"
    if p["weight_shape"].tolist() != [rows, cols]:
        return f"weight_shape {p['weight_shape'].tolist()}, expected {[rows, cols]}"
    return None if bool(torch.isfinite(p["weight_scale"].float()).all()) else "a scale is not finite"


def check_files(base, plain, modules, dropped):
    kept = {n for n in base if n.removesuffix(".weight") not in modules}
    check("every quantized module is a weight of the source", [m for m in modules if m + ".weight" not in base],
          len(modules))
    check("no source tensor is lost", [n for n in kept - set(plain) if not (dropped and re.search(dropped, n))])
    check("no tensor is new", set(plain) - set(base))
    both = kept & set(plain)
    check("unquantized tensors are the source's, bit for bit", [n for n in both if not bits_equal(base[n], plain[n])],
          len(both))


def check_config(quantization, config, architecture, modules):
    """The config names exactly the modules that are quantized. -> {module: scheme}"""
    qc = QuantizationConfig.model_validate(quantization)
    again = QuantizationConfig.model_validate(json.loads(qc.model_dump_json()))
    check("quantization_config survives a round trip", [] if again == qc else ["differs"])
    check("quantization_status is compressed", [] if quantization.get("quantization_status") == "compressed" else
          [quantization.get("quantization_status")])
    with torch.device("meta"):
        skeleton = architecture._from_config(config)
    linears = {canonical(n): (n, m) for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    group_of = {t: s for s in qc.config_groups.values() for t in s.targets}
    hits = {c: match_targets(n, m, list(group_of)) for c, (n, m) in linears.items() if not is_match(n, m, qc.ignore)}
    targeted = {c: group_of[h[0]] for c, h in hits.items() if h}
    on_disk = {canonical(m) for m in modules}
    check("every quantized module is targeted", on_disk - set(targeted), len(on_disk))
    check("every Linear left in 16 bits is ignored", set(targeted) - on_disk, len(linears) - len(on_disk))
    return {m: targeted.get(canonical(m)) or next(iter(qc.config_groups.values())) for m in modules}


def check_codec(parts, schemes):
    """compressed-tensors' own functions, module by module."""
    unlike, repacked, requantized = [], [], []
    for name, p in parts.items():
        bits, shape = schemes[name].weights.num_bits, torch.Size(p["weight_shape"].tolist())
        out = PackedQuantizationCompressor.decompress(p, schemes[name])
        if not bits_equal(out["weight"], weight(p, bits)):
            unlike.append(name)
        q = unpack_from_int32(p["weight_packed"], bits, shape)
        if not torch.equal(pack_to_int32(q, bits), p["weight_packed"]):
            repacked.append(name)
        if bits == 8:       # the quotient, a BF16, cannot tell 127 from 126.5: nothing to learn
            continue
        back = PackedQuantizationCompressor.compress({k: v for k, v in out.items() if k != "weight_shape"},
                                                     schemes[name])
        if not all(torch.equal(back[k], p[k]) for k in p):
            requantized.append(name)
    check("compressed-tensors decompresses to (q - z) * scale, bit for bit", unlike, len(parts))
    check("pack(unpack(words)) gives the words", repacked, len(parts))
    check("compress(decompress(module)) gives the module (4 bits)", requantized,
          sum(s.weights.num_bits == 4 for s in schemes.values()))


def check_loaded(folder, architecture, parts, schemes, plain, **how):
    """how: nothing, the way users load (weights are decompressed by the first forward), or a quantization_config."""
    way = "dequantize=True: " if how else ""
    model, info = architecture.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **how)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(f"{way}transformers loads without {kind.replace('_', ' ')}", info[kind])
    ids = torch.arange(3, 35)[None]
    check(f"{way}the loaded model computes", [] if torch.isfinite(model(input_ids=ids).logits).all() else ["NaN or Inf"])
    state = {canonical(n): t for n, t in model.state_dict().items()}
    want = {canonical(m + ".weight"): weight(p, schemes[m].weights.num_bits) for m, p in parts.items()}
    check(f"{way}transformers' quantized weights are (q - z) * scale, bit for bit",
          [n for n, w in want.items() if n not in state or not bits_equal(state[n], w)], len(want))
    rest = {canonical(n): t for n, t in plain.items() if canonical(n) in state}
    check(f"{way}transformers' other weights are the source's, bit for bit in the type it loads",
          [n for n, t in rest.items() if not bits_equal(state[n], t.to(state[n].dtype))], len(rest))


def run(a):
    quantization = read_config(a.cut)["quantization_config"]
    config = transformers.AutoConfig.from_pretrained(a.model)
    architecture = getattr(transformers, config.architectures[0])
    base = read(a.model)
    parts, plain = split(read(a.cut))
    check("something is quantized", [] if parts else ["no weight_packed in CUT_DIR"])
    check_files(base, plain, parts, a.allow_dropped)
    schemes = check_config(quantization, config, architecture, parts)
    faults = {m: layout_fault(p, schemes[m].weights, base[m + ".weight"]) for m, p in parts.items()}
    check("dtypes and shapes are as the format and the config say", [f"{m} {f}" for m, f in faults.items() if f])
    if not any(faults.values()):
        check_codec(parts, schemes)
        # compressed-tensors 0.20 does not expect zero points packed when it prepares the model for such a load
        if all(s.weights.symmetric for s in schemes.values()):
            check_loaded(a.cut, architecture, parts, schemes, plain)
        # transformers 5.24 takes the first group's scheme for every dense layer here (get_dense_scheme)
        if len(quantization["config_groups"]) == 1:
            check_loaded(a.cut, architecture, parts, schemes, plain,
                         quantization_config=CompressedTensorsConfig(dequantize=True))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=pathlib.Path)
    ap.add_argument("cut", type=pathlib.Path)
    ap.add_argument("--allow-dropped", metavar="REGEX")
    a = ap.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    try:
        run(a)
    except Exception as e:                  # a reader that refuses the checkpoint is a failed check, not a crash
        traceback.print_exc()
        check("the readers take it", [f"{type(e).__name__}: {e}"])
    print(f"{counts[True]} passed, {counts[False]} failed")
    sys.exit(1 if counts[False] else 0)


if __name__ == "__main__":
    main()

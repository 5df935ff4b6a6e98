#!/usr/bin/env python3
"""A cut damaged in one place: `gemcut verify` must catch it, name it and end with exit code 1; so must thresholds.

    damage.py GEMCUT MODEL      MODEL: data/model/gemma3-tiny
"""
import json
import pathlib
import struct
import sys

from model import Model, Tests, flip, pack, run

GEMCUT, MODEL = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
MODULE = "model.layers.2.mlp.down_proj"
PACKED, SCALES, SHAPE = (f"{MODULE}.weight_{part}" for part in ("packed", "scale", "shape"))
NORM, EMBEDDING = "model.layers.1.self_attn.q_norm.weight", "model.embed_tokens.weight"
AGAINST = ("--against", MODEL, "--no-run")
FEW = ("--against", MODEL, "--windows", 1, "--length", 64, "--tokens", 1)
tests = Tests("gemcut-damage-")
CUT = tests.folder / "cut"
tests.need(GEMCUT, "quantize", MODEL, CUT, "-q", "--method", "rtn")


def case(f):
    """A case with a fresh copy of the cut."""
    tests.case(f, lambda: Model(CUT))


def write(m, folder, **changes):
    """Like Model.write, but config.json stays the file that it was: its bytes are recorded."""
    return m.write(folder, config=(m.folder / "config.json").read_bytes(), **changes)


def verify(folder, *options):
    """-> (exit code, [(object, message)] of the findings)"""
    code, stdout, stderr = run(GEMCUT, "verify", folder, "--json", *options)
    assert code in (0, 1), f"exit {code}: {stderr.strip()}"
    report = json.loads(stdout)
    assert report["ok"] == (code == 0) == (not report["problems"]), f"exit {code}, {report['problems']}"
    return code, [(p["object"], p["message"]) for p in report["problems"]]


def caught(folder, *objects, word="", options=AGAINST):
    """verify must find fault with exactly these objects, and with one of them in a message that holds the word."""
    _, found = verify(folder, *options)
    assert {o for o, _ in found} == set(objects), f"expected {objects}, found {found}"
    assert not objects or any(word in message for _, message in found), f"{word!r} is not in {found}"


def caught_both_ways(folder, *objects, word=""):
    """... with the source at hand, and by the record alone"""
    caught(folder, *objects, word=word)
    caught(folder, *objects, word="in gemcut.json", options=())


@case
def undamaged(tmp, m):
    caught_both_ways(write(m, tmp / "cut"))


@case
def nibble_in_text(tmp, m):
    flip(m, PACKED, 1000, 0xf000)
    code, stdout, _ = run(GEMCUT, "verify", write(m, tmp / "cut"), *AGAINST)
    assert code == 1 and PACKED in stdout and "NOT OK: 1 problem\n" in stdout, (code, stdout)


@tests.case
def one_bit(tmp):
    for name in (PACKED, SCALES, SHAPE, NORM, EMBEDDING):
        m = Model(CUT)
        begin, end = m.header[name]["data_offsets"]
        for offset in (0, end - begin - 2):
            flip(m, name, offset, 1)
            caught_both_ways(write(m, tmp / f"{name}-{offset}"), name)
            flip(m, name, offset, 1)


@case
def scale_doubled(tmp, m):
    bits = struct.unpack_from("<H", m.data, m.header[SCALES]["data_offsets"][0] + 14)[0]
    m.put(SCALES, 14, struct.pack("<H", bits + 0x80))       # the exponent, one up
    caught_both_ways(write(m, tmp / "cut"), SCALES)


@case
def scale_unusable(tmp, m):
    at = 3 * m.header[SCALES]["shape"][1] + 2
    for bits in (0, 0x8000, 0x7fc0, 0xff80):     # 0, -0, NaN, -infinity
        m.put(SCALES, 2 * at, struct.pack("<H", bits))
        caught_both_ways(write(m, tmp / f"{bits:x}"), SCALES,
                         word="1 unusable scales (zero, subnormal, infinite or NaN), the first at row 3, group 2")


@tests.case
def tensor_missing(tmp):
    for name in (NORM, SCALES):
        part = Model(CUT)
        pack(part, [n for n in part.names() if n != name])
        folder = write(part, tmp / name)
        for options in (AGAINST, ()):
            found = verify(folder, *options)[1]
            assert any(o == name and "missing" in message for o, message in found), (name, found)


@case
def tensor_too_many(tmp, m):
    m.header["model.layers.0.mlp.extra.weight"] = {"dtype": "BF16", "shape": [8],
                                                   "data_offsets": [len(m.data), len(m.data) + 16]}
    m.data += bytes(16)
    caught_both_ways(write(m, tmp / "cut"), "model.layers.0.mlp.extra.weight")


@case
def tensor_of_another_shape(tmp, m):
    m.header[SCALES]["shape"].reverse()
    folder = write(m, tmp / "cut")
    for options in (AGAINST, ()):
        caught(folder, SCALES, word="is BF16 [6, 256], expected BF16 [256, 6]", options=options)


@case
def weight_shape_wrong(tmp, m):
    rows, cols = struct.unpack_from("<2q", m.data, m.header[SHAPE]["data_offsets"][0])
    m.put(SHAPE, 0, struct.pack("<2q", rows, cols - 1))
    caught(write(m, tmp / "cut"), SHAPE, word=f"is {rows} × {cols - 1}, expected {rows} × {cols}")


@case
def tokenizer_altered(tmp, m):
    folder = write(m, tmp / "cut")
    with open(folder / "tokenizer.json", "a") as f:
        f.write("\n")
    caught_both_ways(folder, "tokenizer.json")


@case
def config_altered(tmp, m):
    group = next(iter(m.config["quantization_config"]["config_groups"].values()))
    group["weights"]["group_size"] = 64
    folder = m.write(tmp / "cut")
    for options in (AGAINST, ()):
        found = verify(folder, *options)[1]
        assert {"config.json", SCALES} <= {o for o, _ in found}, found


@case
def record_removed(tmp, m):
    def without_record(name):
        folder = write(m, tmp / name)
        (folder / "gemcut.json").unlink()
        return folder
    caught(without_record("whole"))
    m.put(SCALES, 2 * 7, b"\0\0")
    flip(m, NORM, 10, 1)
    caught(without_record("damaged"), SCALES, NORM, word="unusable")


@tests.case
def source_of_other_weights(tmp):
    source = Model(MODEL)
    weight = MODULE + ".weight"
    flip(source, weight, 20, 1)
    caught(CUT, weight, word="not the weight that was quantized",
           options=("--against", source.write(tmp / "m"), "--no-run"))


@tests.case
def source_of_other_depth(tmp):
    source = Model(MODEL)
    last = source.config["num_hidden_layers"] - 1
    pack(source, [n for n in source.names() if not n.startswith(f"model.layers.{last}.")])
    source.config["num_hidden_layers"] = last
    source.config["layer_types"].pop()
    folder = source.write(tmp / "m")
    caught(CUT, "num_hidden_layers", word=f"is {last + 1}, the source has {last}",
           options=("--against", folder, "--no-run"))
    code, found = verify(CUT, "--against", folder)      # and nothing tries to run them side by side
    assert code == 1 and found[0][0] == "num_hidden_layers", (code, found)


@tests.case
def thresholds(tmp):
    for option, missed, kept, name in (("--max-kl", 0.0001, 10, "KL"), ("--min-top1", 1, 0.01, "top-1 agreement"),
                                       ("--max-ppl-ratio", 0.1, 10, "perplexity")):
        caught(CUT, name, word=f"({option})", options=(*FEW, option, missed))
        caught(CUT, options=(*FEW, option, kept))


@tests.case
def threshold_of_nothing(tmp):
    for options in (("--max-kl", 1), ("--against", MODEL, "--no-run", "--max-kl", 1)):
        code, _, stderr = run(GEMCUT, "verify", CUT, *options)
        assert code == 2, f"a threshold that cannot be tested must not pass: {options}, exit {code}: {stderr}"


sys.exit(tests.finish())

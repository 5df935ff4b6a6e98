#!/usr/bin/env python3
"""The formats of `gemcut quantize --format` and `gemcut convert` from outside: all compute the same, turn into one another,
refuse what they cannot hold, and survive random damage with an answer or one clear line.

    formats.py GEMCUT MODEL [COUNT] [SEED]      MODEL: data/model/gemma3-tiny
"""
import copy
import json
import pathlib
import random
import struct
import sys

from model import Model, Tests, change_member, flip_bytes, run

GEMCUT, MODEL = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
COUNT, SEED = int(sys.argv[3]) if len(sys.argv) > 3 else 60, int(sys.argv[4]) if len(sys.argv) > 4 else 1
FORMATS = ("compressed-tensors", "auto-round", "gptq")
COPIES = {"compressed-tensors": None, "auto-round": "quantization_config.json", "gptq": "quantize_config.json"}
DOWN = "model.layers.2.mlp.down_proj"
tests = Tests("gemcut-formats-")
CUTS = {f: tests.folder / f for f in FORMATS}
for f, cut in CUTS.items():
    tests.need(GEMCUT, "quantize", MODEL, cut, "-q", "--method", "rtn", "--format", f)


def answer(*command):
    """The JSON document of a command that succeeds."""
    code, stdout, stderr = run(GEMCUT, *command, "--json")
    assert code == 0, f"exit {code}: {stderr.strip()}"
    return json.loads(stdout)


def refused(*command, code=3, words=()):
    """One line on stderr, and the exit code."""
    got, _, stderr = run(GEMCUT, *command, "-q")
    assert got == code, f"exit {got}, expected {code}: {stderr.strip()}"
    assert stderr.count("\n") == 1 and stderr.startswith("gemcut"), f"not one line: {stderr!r}"
    for word in words:
        assert word in stderr, f"{word!r} is not in: {stderr.strip()}"


@tests.case
def same_model(tmp):
    results = [answer("eval", cut, "--windows", 1, "--length", 128)["nll"] for cut in CUTS.values()]
    assert results[0] == results[1] == results[2], results
    for f, cut in CUTS.items():
        report = answer("verify", cut, "--against", MODEL, "--windows", 1, "--length", 64, "--tokens", 4)
        assert report["tensors"] == report["tensors_as_recorded"] and report["dequantized_linears"] == 0
        config = json.loads((cut / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == f
        if COPIES[f]:
            assert json.loads((cut / COPIES[f]).read_text()) == config["quantization_config"]
        assert {c.name for c in cut.glob("quanti*_config.json")} == ({COPIES[f]} - {None})


@tests.case
def into_one_another(tmp):
    for a in FORMATS:
        for b in FORMATS:
            out = tmp / f"{a}-{b}"
            result = answer("convert", CUTS[a], out, "--format", b)
            assert result["linears"] == 42 and result["to"] == b, result
            for file in CUTS[b].iterdir():
                if file.name != "gemcut.json":
                    assert (out / file.name).read_bytes() == file.read_bytes(), file.name
            record, of = json.loads((out / "gemcut.json").read_text()), json.loads((CUTS[a] / "gemcut.json").read_text())
            assert record["recipe"] == of["recipe"] and record["linears"] == of["linears"]
            assert record["converted"]["to"] == b
            answer("verify", out, "--against", MODEL, "--no-run")
    assert sorted(p.name for p in tmp.iterdir()) == sorted(f"{a}-{b}" for a in FORMATS for b in FORMATS)


@tests.case
def refusals(tmp):
    out = tmp / "out"
    for f in FORMATS[1:]:
        refused("quantize", MODEL, out, "--method", "rtn", "--format", f, "--scheme", "w4a16-asym", code=2,
                words=("zero points", f))
        refused("quantize", MODEL, out, "--method", "rtn", "--format", f, "--override", "*.down_proj=w4a16-asym", code=2,
                words=("down_proj", "zero points"))
    refused("quantize", MODEL, out, "--format", "awq", code=2, words=("awq", "compressed-tensors"))
    refused("convert", CUTS["gptq"], out, code=2, words=("--format",))
    refused("convert", CUTS["gptq"], out, "--format", "gguf", code=2, words=("gguf",))
    refused("convert", MODEL, out, "--format", "gptq", words=("is not quantized", "expected a cut"))
    refused("convert", tmp / "nowhere", out, "--format", "gptq", words=("nowhere",))
    refused("convert", CUTS["gptq"], tmp, "--format", "gptq", words=("exists",))
    refused("quantize", CUTS["gptq"], out, words=("already quantized (gptq)",))
    assert not list(tmp.iterdir())
    answer("convert", CUTS["gptq"], out, "--format", "auto-round")
    answer("convert", CUTS["gptq"], out, "--format", "gptq", "--overwrite")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def bad_cut(tmp, change, *words, of="gptq"):
    """A cut that is changed: everything that reads it says the same."""
    m = Model(CUTS[of])
    change(m)
    folder = m.write(tmp / "cut")
    for command in (("inspect", folder), ("eval", folder), ("generate", folder, "-p", "a"),
                    ("convert", folder, tmp / "out", "--format", "compressed-tensors")):
        refused(*command, words=words)
    code, stdout, stderr = run(GEMCUT, "verify", folder)
    assert code in (1, 3), (code, stderr)
    assert not (tmp / "out").exists() and not (tmp / "out.partial").exists()


@tests.case
def groups_out_of_order(tmp):
    bad_cut(tmp, lambda m: m.put(f"{DOWN}.g_idx", 4 * 130, struct.pack("<i", 0)), f"{DOWN}.g_idx", "column 130",
            "desc_act")


@tests.case
def groups_beyond(tmp):
    bad_cut(tmp, lambda m: m.put(f"{DOWN}.g_idx", 0, struct.pack("<i", -1)), f"{DOWN}.g_idx", "group -1")


@tests.case
def scale_not_a_number(tmp):
    bad_cut(tmp, lambda m: m.put(f"{DOWN}.scales", 2 * (256 + 7), struct.pack("<H", 0x7e00)), f"{DOWN}.scales",
            "row 7, group 1", of="auto-round")


@tests.case
def zero_point_not_the_middle(tmp):
    bad_cut(tmp, lambda m: m.put(f"{DOWN}.qzeros", 4, b"\x76"), f"{DOWN}.qzeros", "zero point 7", "row 8", "expected 8")


@tests.case
def version_of_zero_points(tmp):
    bad_cut(tmp, lambda m: m.config["quantization_config"].update(checkpoint_format="gptq_v2"), ".qzeros", "zero point 7")


@tests.case
def zero_points_missing(tmp):
    def rename(m):
        m.header["other"] = m.header.pop(f"{DOWN}.qzeros")
    bad_cut(tmp, rename, f"{DOWN}.qzeros", "is missing", of="auto-round")


@tests.case
def codes_of_another_shape(tmp):
    bad_cut(tmp, lambda m: m.header[f"{DOWN}.qweight"]["shape"].reverse(), f"{DOWN}.qweight", "[256, 96]",
            "expected I32 [96, 256]")


@tests.case
def unknown_method(tmp):
    bad_cut(tmp, lambda m: m.config["quantization_config"].update(quant_method="bitsandbytes"), "bitsandbytes",
            "expected compressed-tensors, auto-round or gptq")


@tests.case
def another_packing(tmp):
    bad_cut(tmp, lambda m: m.config["quantization_config"].update(packing_format="auto_round:fp8"), "auto_round:fp8",
            "expected auto_round:auto_gptq", of="auto-round")


@tests.case
def random_damage(tmp):
    rng = random.Random(SEED)
    for i in range(COUNT):
        m = Model(CUTS[FORMATS[1 + i % 2]])
        header, config = copy.deepcopy(m.header), copy.deepcopy(m.config)
        kind = rng.randrange(3)
        if kind == 0:
            change_member(rng, header)
        elif kind == 1:
            change_member(rng, config["quantization_config"] if rng.random() < .8 else config)
        folder = m.write(tmp / f"{i}", header=header, config=config,
                         data=flip_bytes(rng, m.data) if kind == 2 else None)
        for command in (("inspect", folder), ("verify", folder, "--against", MODEL, "--no-run"),
                        ("convert", folder, tmp / "out", "--format", rng.choice(FORMATS), "--overwrite")):
            code, _, stderr = run(GEMCUT, *command, "-q")
            allowed = (0, 1, 3) if command[0] == "verify" else (0, 2, 3) if command[0] == "convert" else (0, 3)
            assert code in allowed, f"{i}: {command[0]}: exit {code}: {stderr.strip()}"
            lines = [line for line in stderr.splitlines() if not line.startswith("gemcut: warning")]
            assert len(lines) == (code in (2, 3)), f"{i}: {command[0]}: {stderr!r}"


sys.exit(tests.finish())

#!/usr/bin/env python3
"""`gemcut quantize` with calibration: what is recorded, what must not change the result and what must, and every text or
request that it has to refuse.

    calibrate.py GEMCUT MODEL      MODEL: data/model/gemma3-tiny
"""
import json
import math
import shutil
import struct
import sys

from cutting import CONTEXT, FIRST, MODEL, N_LAYERS, SETS, cut, refused, same, tensors
from model import Model, Tests

WORDS = "The old house by the river had been empty for years when the first letter came. " * 80
tests = Tests("gemcut-calibrate-")


def mean_error(record):
    errors = [linear["output_error"] for linear in record["linears"].values()]
    return sum(errors) / len(errors)


def check_linear(name, linear):
    assert 0 < linear["output_error"] < linear["nearest_output_error"] < 0.5, (name, linear)
    assert 0 < linear["weight_error"] < 0.5 and linear["damping"] == 0.01, (name, linear)
    assert linear["dead_inputs"] == 0, (name, linear)


@tests.case
def gptq_by_default(tmp):
    record = cut(tmp / "out", only=None)
    recipe, calibration, linears = record["recipe"], record["calibration"], record["linears"]
    expected = {"method": "gptq", "scheme": "w4a16", "group_size": 128, "scales": "block", "refine": 8,
                "damping": 0.01, "order_columns": "activation"}
    assert {k: recipe[k] for k in expected} == expected, recipe
    ids = calibration.pop("ids")
    assert len(ids) == 32 and int(ids, 16) >= 0, ids
    assert calibration == {"text": "builtin", "samples": 8, "length": 128, "seed": 0, "order": "shuffle",
                           "skip_bos": False}, calibration
    names = {f"model.layers.{i}.{name}" for i in range(N_LAYERS) for fused in SETS for name in fused}
    assert linears.keys() == names, linears.keys() ^ names
    for name, linear in linears.items():
        check_linear(name, linear)


@tests.case
def same_bytes(tmp):
    for i, options in enumerate(((), (), ("--threads", 1), ("--threads", 2), ("--threads", 3), ("--memory", "30MB"))):
        cut(tmp / str(i), *options)
        same(tmp / "0", tmp / str(i))


@tests.case
def same_bytes_all_blocks(tmp):
    cut(tmp / "one", "--threads", 1, only=None)
    cut(tmp / "two", "--threads", 2, only=None)
    same(tmp / "one", tmp / "two")


@tests.case
def what_changes_the_result(tmp):
    """Each of these options reaches the weights, and with the text's own options the ids change too."""
    words = WORDS.split()
    (tmp / "t.jsonl").write_text("".join(json.dumps({"text": " ".join(words[i % 97:][:200])}) + "\n" for i in range(97)))
    calib = ("--calib", tmp / "t.jsonl")
    plain = cut(tmp / "plain", *calib)
    weights = tensors(tmp / "plain")
    for options, settings in ((("--seed", 1), {}), (("--order", "file"), {}), ((), {"length": 64}), ((), {"samples": 4}),
                              (("--skip-bos",), {}), (("--damping", 0.1), {}), (("--refine", 0), {}),
                              (("--refine", 1), {}), (("--order-columns", "natural"), {}), (("--scales", "range"), {}),
                              (("--scales", "weighted"), {}), (("--scale-sign", "positive"), {})):
        record = cut(tmp / "out", *calib, *options, **settings)
        text = settings or options[0] in ("--seed", "--order")
        assert (record["calibration"]["ids"] != plain["calibration"]["ids"]) == bool(text), (options, settings)
        assert tensors(tmp / "out") != weights, f"{options} {settings} change nothing"
        assert record["recipe"] != plain["recipe"] or record["calibration"] != plain["calibration"], (options, settings)
        shutil.rmtree(tmp / "out")


@tests.case
def refinement_helps(tmp):
    errors = [mean_error(cut(tmp / str(n), "--refine", n)) for n in range(3)]
    assert errors[0] > errors[1] > errors[2], errors
    assert mean_error(cut(tmp / "rtn", "--method", "rtn", "--calib", "builtin")) > errors[0], errors


@tests.case
def only_positive_scales(tmp):
    cut(tmp / "out", "--scale-sign", "positive")
    for name, (_, _, data) in tensors(tmp / "out").items():
        if name.endswith("weight_scale"):
            assert not any(word >> 15 for (word,) in struct.iter_unpack("<H", data)), name


@tests.case
def rounding_to_nearest(tmp):
    """Without a word of calibration there is none; with one, scales are searched under it."""
    plain = cut(tmp / "plain", "--method", "rtn", samples=None, length=None)
    assert "calibration" not in plain and plain["recipe"]["scales"] == "range", plain["recipe"]
    assert all("output_error" not in linear for linear in plain["linears"].values())
    for i, options in enumerate((("--calib", "builtin"), ("--scales", "block"), ("--scales", "weighted"))):
        record = cut(tmp / str(i), "--method", "rtn", *options)
        assert record["recipe"]["method"] == "rtn" and record["calibration"]["samples"] == 8, record["recipe"]
        assert record["recipe"]["scales"] == ("weighted" if "weighted" in options else "block"), record["recipe"]
        for name, linear in record["linears"].items():
            assert linear["output_error"] == linear["nearest_output_error"] > 0, (name, linear)
    same(tmp / "0", tmp / "1")


@tests.case
def schemes_and_groups(tmp):
    worse = None
    for scheme in ("w8a16", "w4a16-asym", "w4a16"):
        for group in ("32", "128", "channel"):
            record = cut(tmp / "out", "--scheme", scheme, "--group-size", group, "--refine", 1)
            names = tensors(tmp / "out")
            for name, linear in record["linears"].items():
                check_linear(name, linear)
                _, (rows, words), _ = names[name + ".weight_packed"]
                _, scales, _ = names[name + ".weight_scale"]
                cols = words * (4 if scheme == "w8a16" else 8)
                size = cols if group == "channel" else int(group)
                assert (linear["scheme"], linear["group_size"]) == (scheme, size), linear
                assert scales == [rows, math.ceil(cols / size)], (name, scales)
                assert (name + ".weight_zero_point" in names) == (scheme == "w4a16-asym"), name
            if (scheme, group) == ("w8a16", "channel"):
                worse = mean_error(record)
            assert scheme == "w8a16" or mean_error(record) > 2 * worse, "4 bits as good as 8"
            shutil.rmtree(tmp / "out")


@tests.case
def ignored_sets(tmp):
    """A set that stays in 16 bits is passed through, and those behind it are quantized all the same."""
    source = tensors(MODEL)
    for fused in SETS:
        record = cut(tmp / "out", "--ignore", f"*.{fused[0]}.*", only=None if fused[0].startswith("mlp.g") else FIRST)
        layers = range(N_LAYERS if fused[0].startswith("mlp.g") else 1)
        expected = {f"model.layers.{i}.{n}" for i in layers for other in SETS if other != fused for n in other}
        assert record["linears"].keys() == expected, record["linears"].keys() ^ expected
        result = tensors(tmp / "out")
        for name in fused:
            whole = f"model.layers.0.{name}.weight"
            assert result[whole] == source[whole], whole
        shutil.rmtree(tmp / "out")


@tests.case
def only_a_later_block(tmp):
    """Blocks in front of it run in 16 bits."""
    name = f"model.layers.{N_LAYERS - 1}.mlp.down_proj"
    record = cut(tmp / "out", only=f"{name}*")
    assert list(record["linears"]) == [name], record["linears"].keys()
    check_linear(name, record["linears"][name])


@tests.case
def text_from_files(tmp):
    (tmp / "text.txt").write_text(WORDS)
    (tmp / "text.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    a, b = (cut(tmp / kind, "--calib", tmp / f"text.{kind}") for kind in ("txt", "jsonl"))
    assert a["calibration"]["text"] == "text.txt" and b["calibration"]["text"] == "text.jsonl", "a folder is recorded"
    assert a["calibration"]["ids"] == b["calibration"]["ids"], "the same text gives other ids"
    assert tensors(tmp / "txt") == tensors(tmp / "jsonl")


@tests.case
def poor_text(tmp):
    """What says next to nothing still makes a cut: one-token documents, a file of zero bytes, one sample."""
    (tmp / "a.jsonl").write_text('{"text": "a"}\n' * 600)
    (tmp / "nul.txt").write_bytes(bytes(2000))
    for i, name in enumerate(("a.jsonl", "nul.txt")):
        for refine in (0, 2):
            linears = cut(tmp / f"{i}-{refine}", "--calib", tmp / name, "--refine", refine)["linears"]
            for linear in linears.values():
                assert 0 <= linear["output_error"] < 0.5, (name, refine, linear)
                # refinement looks at the outputs of these very inputs alone
                assert linear["weight_error"] < (math.inf if refine else 0.5), (name, refine, linear)
    record = cut(tmp / "short", samples=1, length=2)
    assert (record["calibration"]["samples"], record["calibration"]["length"]) == (1, 2), record["calibration"]


@tests.case
def too_little_text(tmp):
    for name, text, words in (("one.txt", "x", ["has 2 tokens", "1 document", "1024"]),
                              ("empty.txt", "", ["has 0 tokens", "1024"]), ("empty.jsonl", "", ["1024"]),
                              ("short.txt", WORDS[:200], ["8 samples of 128", "1024"]),
                              ("short.jsonl", '{"text": "a"}\n' * 100, ["100 documents", "1024"])):
        (tmp / name).write_text(text)
        refused(tmp, "--calib", tmp / name, words=[name, *words])
    refused(tmp, samples=1000000, words=["1000000 samples"])


@tests.case
def bad_text(tmp):
    (tmp / "bad.jsonl").write_text(json.dumps({"text": WORDS}) + '\n{"text": \n')
    refused(tmp, "--calib", tmp / "bad.jsonl", code=3, words=["bad.jsonl", "line 2", "not JSON"])
    (tmp / "other.jsonl").write_text('{"body": "a"}\n')
    refused(tmp, "--calib", tmp / "other.jsonl", code=3, words=["other.jsonl", "line 1"])
    (tmp / "latin.txt").write_bytes(b"caf\xe9 " * 2000)
    refused(tmp, "--calib", tmp / "latin.txt", code=3, words=["latin.txt", "UTF-8"])
    (tmp / "text.txt.zst").write_bytes(b"not zstd at all")
    refused(tmp, "--calib", tmp / "text.txt.zst", code=3, words=["text.txt.zst"])
    refused(tmp, "--calib", tmp / "none.txt", code=3, words=["none.txt", "No such file"])
    refused(tmp, "--calib", tmp, code=3, words=["is a folder"])


@tests.case
def impossible_requests(tmp):
    refused(tmp, length=CONTEXT + 1, words=[CONTEXT + 1, CONTEXT, "context"])
    for settings in ({"samples": 0}, {"samples": -1}, {"length": 1}, {"length": "many"}):
        refused(tmp, words=[f"--{next(iter(settings))}"], **settings)
    for option, value in (("--damping", 0), ("--damping", "nan"), ("--damping", 2), ("--refine", -1), ("--refine", 1001),
                          ("--order", "none"), ("--scales", "best"), ("--method", "awq")):
        refused(tmp, option, value, words=[option, value])
    refused(tmp, "--ignore", "*", words=["quantizes nothing"])


@tests.case
def too_little_memory(tmp):
    refused(tmp, "--memory", "1MB", code=3, words=["MiB are needed", "8 samples of 128", "memory budget"])


@tests.case
def model_without_tokenizer(tmp):
    folder = tmp / "m"
    shutil.copytree(MODEL, folder)
    (folder / "tokenizer.json").unlink()
    refused(tmp, model=folder, code=3, words=["tokenizer.json"])
    cut(tmp / "rtn", "--method", "rtn", model=folder, samples=None, length=None)


@tests.case
def weights_that_are_not_finite(tmp):
    m = Model(MODEL)
    name = "model.layers.0.mlp.down_proj.weight"
    m.put(name, 2 * 5, struct.pack("<H", 0x7fc0))
    folder = m.write(tmp / "m")
    refused(tmp, model=folder, code=3, words=[name, "row 0, column 5", "--allow-nonfinite"])
    record = cut(tmp / "out", "--allow-nonfinite", model=folder)
    assert record["linears"][name.removesuffix(".weight")].get("nonfinite_as_zero") == 1, "the NaN is not counted"


@tests.case
def activations_that_are_not_finite(tmp):
    """Weights of a norm so large that the squares of its outputs leave FP32."""
    m = Model(MODEL)
    m.put("model.layers.0.pre_feedforward_layernorm.weight", 0, struct.pack("<H", 0x7f00) * 8)
    refused(tmp, model=m.write(tmp / "m"), code=3, words=["mlp.gate_proj", "not finite"])


sys.exit(tests.finish())

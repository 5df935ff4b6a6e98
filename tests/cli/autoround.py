#!/usr/bin/env python3
"""`gemcut quantize` with AutoRound: what is recorded and reported, what must not change the result and what must, and
what is refused.

    autoround.py GEMCUT MODEL      MODEL: data/model/gemma3-tiny
"""
import json
import shutil
import struct
import sys

from cutting import FIRST, MODEL, N_LAYERS, SETS, cut, refused, same, tensors
from model import Model, Tests

TUNED = ("--method", "autoround")
SHORT = (*TUNED, "--iters", 5)
tests = Tests("gemcut-autoround-")


def losses(record):
    return [(block["loss_first"], block["loss_last"]) for block in record["tuning"]["blocks"]]


@tests.case
def better(tmp):
    record = cut(tmp / "out", "--quality", "better", "--report", tmp / "r.json", samples=32, length=256)
    recipe, tuning = record["recipe"], record["recipe"]["tuning"]
    assert (recipe["method"], recipe["refine"], recipe["scales"]) == ("autoround", 4, "block"), recipe
    assert tuning == {"iterations": 50, "batch": 8, "lr": 0.01, "scale_lr": 0.002, "init": "gptq", "keep": "last",
                      "seed": 0}, tuning
    blocks = record["tuning"]["blocks"]
    assert record["tuning"]["micro_batch"] == 8 and [b["block"] for b in blocks] == [0], record["tuning"]
    assert 0 < blocks[0]["loss_last"] < blocks[0]["loss_first"] and blocks[0]["iteration"] == 50, blocks
    for name, linear in record["linears"].items():
        assert 0 < linear["start_output_error"] < linear["nearest_output_error"] < 0.5, (name, linear)
        assert "output_error" not in linear and 0 < linear["weight_error"] < 0.5 and linear["damping"] == 0.01, (name, linear)
    report = json.loads((tmp / "r.json").read_text())
    for block, kept in zip(report["blocks"], blocks):
        assert len(block["losses"]) == 50 and block["losses"][0] == block["loss_first"] == kept["loss_first"], block
        assert block["seconds"] > 0 and block["losses"][-1] < max(block["losses"]), block


@tests.case
def two_hundred_by_default(tmp):
    record = cut(tmp / "out", *TUNED, samples=2, length=16)
    assert record["recipe"]["tuning"]["iterations"] == 200 and record["recipe"]["tuning"]["lr"] == 0.0025, record["recipe"]


@tests.case
def as_intel_does_it(tmp):
    """From the range: the first iterate is rounding to nearest, but for groups with two equal sides, whose scales have the
    other sign; and no iterate that is kept is worse on its samples."""
    plain = cut(tmp / "rtn", "--method", "rtn", samples=None, length=None)
    record = cut(tmp / "out", "--method", "autoround", "--compat", "--iters", 60)
    tuning = record["recipe"]["tuning"]
    assert (tuning["init"], tuning["keep"], tuning["lr"], tuning["scale_lr"]) == ("none", "best", 1 / 60, 1 / 60), tuning
    assert record["recipe"]["scales"] == "range", record["recipe"]
    (first, last), = losses(record)
    assert 0 < last < first and 0 < record["tuning"]["blocks"][0]["iteration"] < 60, record["tuning"]
    for linear in record["linears"].values():
        assert "start_output_error" not in linear and "damping" not in linear, linear
    # a step that is too long to help leaves what it began with
    for name, linear in cut(tmp / "one", *TUNED, "--compat", "--iters", 1)["linears"].items():
        assert abs(linear["weight_error"] / plain["linears"][name]["weight_error"] - 1) < 2e-3, (name, linear)


@tests.case
def where_it_begins(tmp):
    starts = {init: losses(cut(tmp / init, *SHORT, "--init", init))[0] for init in ("gptq", "rtn", "none")}
    assert starts["gptq"][0] < starts["rtn"][0] < starts["none"][0], starts
    assert starts["rtn"][1] < starts["rtn"][0], starts


@tests.case
def no_worse_than_the_start(tmp):
    """Steps far too long: the codes of GPTQ stay."""
    record = cut(tmp / "out", *SHORT, "--lr", 9, "--scale-lr", 0.5)
    cut(tmp / "gptq", "--refine", 4)
    (first, last), = losses(record)
    assert first == last and record["tuning"]["blocks"][0]["iteration"] == 0, record["tuning"]
    assert tensors(tmp / "out") == tensors(tmp / "gptq")


@tests.case
def same_bytes(tmp):
    for i, options in enumerate(((), (), ("--threads", 1), ("--threads", 3))):
        record = cut(tmp / str(i), *TUNED, "--iters", 2, "--init", "rtn", *options, samples=2, only=None)
        assert [b["block"] for b in record["tuning"]["blocks"]] == list(range(N_LAYERS)), record["tuning"]
        same(tmp / "0", tmp / str(i))


@tests.case
def little_memory(tmp):
    """Fewer samples at a time give nearly the same; how many is recorded."""
    whole = cut(tmp / "whole", *SHORT, length=512)
    parts = cut(tmp / "parts", *SHORT, "--memory", "80MB", length=512)
    assert whole["tuning"]["micro_batch"] == 8 and 1 <= parts["tuning"]["micro_batch"] < 8, parts["tuning"]
    (first, last), (also_first, also_last) = losses(whole)[0], losses(parts)[0]
    assert abs(also_first / first - 1) < 1e-5 and abs(also_last / last - 1) < 0.02, (whole["tuning"], parts["tuning"])


@tests.case
def what_changes_the_result(tmp):
    """From the nearest codes, which a few steps improve on; and what GPTQ's options do to codes that begin with it."""
    nearest = (*SHORT, "--init", "rtn")
    cut(tmp / "plain", *nearest)
    weights = tensors(tmp / "plain")
    for command in ((*nearest, "--batch", 3), (*nearest, "--lr", 0.02), (*nearest, "--scale-lr", 0.001),
                    (*nearest, "--seed", 1), (*nearest, "--scales", "weighted"), (*nearest, "--scale-sign", "positive"),
                    (*TUNED, "--iters", 9, "--init", "rtn"), SHORT, (*SHORT, "--refine", 0), (*SHORT, "--init", "none")):
        record = cut(tmp / "out", *command)
        assert tensors(tmp / "out") != weights, f"{command} change nothing"
        assert record["recipe"] != json.loads((tmp / "plain" / "gemcut.json").read_text())["recipe"], command
        shutil.rmtree(tmp / "out")


@tests.case
def schemes_and_groups(tmp):
    cold = (*TUNED, "--compat", "--iters", 30)
    cases = [(scheme, group, cold) for scheme in ("w8a16", "w4a16-asym", "w4a16") for group in ("32", "channel")]
    cases += [("w8a16", "128", SHORT), ("w4a16-asym", "128", SHORT), ("w4a16", "channel", SHORT)]
    for scheme, group, options in cases:
        record = cut(tmp / "out", *options, "--scheme", scheme, "--group-size", group)
        (first, last), = losses(record)
        assert 0 < last <= first, (scheme, group, options, record["tuning"])
        shutil.rmtree(tmp / "out")


@tests.case
def ignored_sets(tmp):
    """What stays in 16 bits is passed through, and the rest of the block is tuned around it."""
    source = tensors(MODEL)
    for fused in SETS:
        record = cut(tmp / "out", *SHORT, "--ignore", f"*.{fused[0]}.*")
        expected = {f"model.layers.0.{n}" for other in SETS if other != fused for n in other}
        assert record["linears"].keys() == expected, record["linears"].keys() ^ expected
        result = tensors(tmp / "out")
        for name in fused:
            whole = f"model.layers.0.{name}.weight"
            assert result[whole] == source[whole], whole
        shutil.rmtree(tmp / "out")


@tests.case
def only_a_later_block(tmp):
    """Blocks in front of it run in 16 bits, and are not in the record of the tuning."""
    record = cut(tmp / "out", *SHORT, only=f"*.layers.{N_LAYERS - 1}.*")
    assert [b["block"] for b in record["tuning"]["blocks"]] == [N_LAYERS - 1], record["tuning"]


@tests.case
def other_dtypes(tmp):
    """Sources in F32 and F16 are tuned as well, on what they are."""
    for dtype in ("F32", "F16"):
        folder = Model(MODEL).converted(dtype).write(tmp / dtype)
        (first, last), = losses(cut(tmp / f"out-{dtype}", *SHORT, "--init", "rtn", model=folder))
        assert 0 < last < first, (dtype, first, last)


@tests.case
def foreign_options(tmp):
    for option in (("--iters", 5), ("--batch", 4), ("--lr", 0.1), ("--scale-lr", 0.1), ("--init", "gptq"), ("--compat",)):
        refused(tmp, *option, words=[option[0], "autoround"])
        refused(tmp, "--quality", "draft", *option, words=[option[0], "autoround"])
    refused(tmp, *SHORT, "--compat", "--init", "gptq", words=["--init", "--compat"])
    refused(tmp, *SHORT, "--compat", "--refine", 2, words=["--refine"])
    refused(tmp, *SHORT, "--init", "none", "--scales", "block", words=["--scales", "none"])
    refused(tmp, *SHORT, "--init", "none", "--scale-sign", "positive", words=["--scale-sign", "none"])
    for option, value in (("--iters", 0), ("--iters", -3), ("--batch", 0), ("--batch", 5000), ("--lr", 0), ("--lr", "nan"),
                          ("--scale-lr", 11), ("--init", "awq")):
        refused(tmp, "--method", "autoround", option, value, words=[option, value])


@tests.case
def activations_that_are_not_finite(tmp):
    """Weights of a norm so large that the squares of its outputs leave FP32."""
    m = Model(MODEL)
    m.put("model.layers.0.pre_feedforward_layernorm.weight", 0, struct.pack("<H", 0x7f00) * 8)
    folder = m.write(tmp / "m")
    refused(tmp, *SHORT, model=folder, code=3, words=["mlp.gate_proj", "not finite"])
    refused(tmp, *SHORT, "--compat", model=folder, code=3, words=["block 0", "not finite"])


@tests.case
def too_little_memory(tmp):
    refused(tmp, *SHORT, "--memory", "3MB", code=3, words=["are needed", "8 samples of 128", "memory budget"])


sys.exit(tests.finish())

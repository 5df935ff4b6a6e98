#!/usr/bin/env python3
"""What is said of a mixture of experts: by inspect, of a plan, while it is cut and in the report. Experts are thousands, so that
no line is one expert's.

    experts.py GEMCUT MODEL      MODEL: data/model/gemma3-tiny, whose tokenizer a made-up mixture takes
"""
import json
import random
import shutil
import sys

from cutting import GEMCUT, MODEL, command
from model import Tests, mixture, run

LAYERS, EXPERTS, TOP, WIDTH = 2, 4, 2, 96
SAMPLES, LENGTH, HIDDEN = 2, 64, 128
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
tests = Tests("gemcut-experts-")
MIXTURE = tests.folder / "mixture"


shutil.copytree(MODEL, MIXTURE)
mixture(MIXTURE, random.Random(0), layers=LAYERS, experts=EXPERTS, top=TOP, width=WIDTH, hidden=HIDDEN)


def run_cut(out, *options):
    parts = [p for p in command(out, samples=SAMPLES, length=LENGTH, only=None, model=MIXTURE) if p != "-q"]
    code, stdout, stderr = run(*parts, *options)
    assert code == 0, f"exit {code}: {stderr}"
    return stdout, stderr


@tests.case
def inspect(tmp):
    code, stdout, _ = run(GEMCUT, "inspect", MIXTURE)
    line = f"experts       {EXPERTS} in a layer beside the MLP, each {WIDTH} wide; {TOP} for a token"
    assert code == 0 and line in stdout.splitlines(), stdout
    architecture = json.loads(run(GEMCUT, "inspect", MIXTURE, "--json")[1])["architecture"]
    expected = {"num_experts": EXPERTS, "top_k_experts": TOP, "moe_intermediate_size": WIDTH}
    assert {k: architecture.get(k) for k in expected} == expected, architecture


@tests.case
def inspect_without(tmp):
    assert "experts" not in run(GEMCUT, "inspect", MODEL)[1]
    architecture = json.loads(run(GEMCUT, "inspect", MODEL, "--json")[1])["architecture"]
    assert not [key for key in architecture if "expert" in key], architecture


@tests.case
def plan(tmp):
    stdout, _ = run_cut(tmp / "out", "--dry-run", "--ignore", "*.0.mlp.down_proj")
    table = [line.split(maxsplit=2) for line in stdout.split("\n\n")[1].splitlines()[1:]]
    ragged = [[f"model.layers.{i}.experts.*", str(3 * EXPERTS), "w4a16, groups of 32  ragged"] for i in range(LAYERS)]
    assert table == [["model.layers.0.mlp.down_proj.weight", "1", "16 bits              ignored"]] + ragged, stdout


@tests.case
def progress(tmp):
    _, stderr = run_cut(tmp / "out", "-v", "--report", tmp / "report.json")
    lines = [line for line in stderr.splitlines() if "experts: " in line]
    starts = {f"layer {i}, {p} of {EXPERTS} experts: output error 0." for i in range(LAYERS) for p in PROJECTIONS}
    assert len(lines) == len(starts) and {line[:line.index("0.") + 2] for line in lines} == starts, stderr
    assert ".experts." not in "".join(line for line in stderr.splitlines() if "warning" not in line), stderr
    linears = {line["name"]: line for line in json.loads((tmp / "report.json").read_text())["linears"]}
    for line in lines:
        words = line.replace(",", "").split()
        own = {e: linears[f"model.layers.{words[1]}.experts.{e}.{words[2]}.weight"] for e in range(EXPERTS)}
        errors = [own[e]["output_error"] for e in range(EXPERTS)]
        worst = own[int(words[words.index("(expert") + 1].strip(")"))]
        mean, most, nearest = (float(words[words.index(w) + 1]) for w in ("error", "worst", "codes"))
        assert abs(mean - sum(errors) / EXPERTS) < 1e-4, (line, errors)
        assert worst["output_error"] == max(errors) and abs(most - max(errors)) < 1e-4, (line, errors)
        assert abs(nearest - sum(own[e]["nearest_output_error"] for e in own) / EXPERTS) < 1e-4, line


@tests.case
def progress_without_text(tmp):
    _, stderr = run_cut(tmp / "out", "-v", "--method", "rtn")
    lines = [line for line in stderr.splitlines() if "experts: error 0." in line]
    assert len(lines) == LAYERS * len(PROJECTIONS) and "nearest" not in stderr, stderr


@tests.case
def report(tmp):
    stdout, stderr = run_cut(tmp / "out", "--json", "--report", tmp / "report.json")
    for result in (json.loads(stdout), json.loads((tmp / "report.json").read_text())):
        tokens = {line["name"]: line["tokens"] for line in result["linears"] if ".experts." in line["name"]}
        assert len(tokens) == LAYERS * EXPERTS * len(PROJECTIONS), tokens
        down = [n for name, n in tokens.items() if name.endswith("down_proj.weight")]
        assert sum(down) == LAYERS * SAMPLES * LENGTH * TOP, down
        floor = min(HIDDEN, SAMPLES * LENGTH)
        starved = sum(n < floor for n in down)
        assert 0 < starved, down
        assert result["experts"] == {"n": LAYERS * EXPERTS, "token_floor": floor, "starved": starved}, result["experts"]
    assert f"fewer than {floor} tokens to {starved} of {LAYERS * EXPERTS} experts" in stderr, stderr
    stdout, _ = run_cut(tmp / "short", "--no-verify")
    assert len(stdout.splitlines()) == 7, stdout


sys.exit(tests.finish())

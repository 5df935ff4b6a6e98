#!/usr/bin/env python3
"""Random damage: headers, sizes, settings and data of a model are changed hundreds of times, and every run of
`gemcut quantize` must end with exit code 0 or 3, one line of complaint in the latter case, and OUT there exactly in
the former. Most are cut by RTN; every eighth runs, for GPTQ, and may then also be asked for more than its context
holds (exit code 2).

    mutate.py GEMCUT MODEL [COUNT] [SEED]
"""
import copy
import json
import pathlib
import random
import shutil
import sys
import tempfile

from model import Model, change_member, flip_bytes, run

GEMCUT, MODEL = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2]
COUNT, SEED = int(sys.argv[3]) if len(sys.argv) > 3 else 400, int(sys.argv[4]) if len(sys.argv) > 4 else 1
METHODS = {True: ("--samples", 2, "--length", 32, "--scales", "weighted", "--refine", 1), False: ("--method", "rtn")}


def mutate(rng, m, folder):
    """Writes a damaged copy and says how."""
    header, config = copy.deepcopy(m.header), copy.deepcopy(m.config)
    text = json.dumps(header).encode()
    kind = rng.choice(["header member", "header bytes", "header length", "data length", "data bytes", "config member",
                       "config bytes", "tokenizer"])
    if kind == "header member":
        change_member(rng, header)
        m.write(folder, header=header)
    elif kind == "header bytes":
        m.write(folder, raw_header=flip_bytes(rng, text))
    elif kind == "header length":
        m.write(folder, header_bytes=rng.choice([0, 1, 7, len(text) - 1, len(text) + 1, 2**20, 2**32, 2**64 - 1]))
    elif kind == "data length":
        m.write(folder, data=m.data[:rng.randrange(len(m.data))] if rng.random() < .7 else m.data + b"x" * rng.randrange(1, 99))
    elif kind == "data bytes":
        m.write(folder, data=flip_bytes(rng, m.data))
    elif kind == "config member":
        change_member(rng, config)
        m.write(folder, config=config)
    elif kind == "config bytes":
        m.write(folder, config=flip_bytes(rng, json.dumps(config).encode()))
    else:
        m.write(folder)
        (folder / "tokenizer.json").write_bytes(flip_bytes(rng, (folder / "tokenizer.json").read_bytes()))
    return kind


def check(rng, m, tmp, calibrated):
    """None, or what went wrong; and the exit code."""
    folder, out = tmp / "m", tmp / "out"
    kind = mutate(rng, m, folder)
    code, _, stderr = run(GEMCUT, "quantize", folder, out, "-q", *METHODS[calibrated], timeout=60)
    wrong = None
    if code not in ((0, 2, 3) if calibrated else (0, 3)):
        wrong = f"exit {code}"
    elif out.exists() != (code == 0):
        wrong = "OUT exists" if code else "OUT is missing"
    elif (tmp / "out.partial").exists():
        wrong = "OUT.partial is left"
    elif code and stderr.count("\n") != 1:
        wrong = "not one line"
    for path in (folder, out, tmp / "out.partial"):
        shutil.rmtree(path, ignore_errors=True)
    return wrong and f"{kind}: {wrong}: {stderr.strip()[:400]}", code


def main():
    m, counts, failures = Model(MODEL), {0: 0, 2: 0, 3: 0}, 0
    with tempfile.TemporaryDirectory(prefix="gemcut-mutate-") as tmp:
        for i in range(COUNT):
            wrong, code = check(random.Random(f"{SEED}.{i}"), m, pathlib.Path(tmp), i % 8 == 0)
            counts[code] = counts.get(code, 0) + 1
            if wrong:
                failures += 1
                print(f"FAILED  seed {SEED}.{i}: {wrong}")
    print(f"{COUNT} mutations: {counts[0]} cut, {counts[2] + counts[3]} refused")
    print(f"{COUNT - failures} passed, {failures} failed")
    return 1 if failures else 0


sys.exit(main())

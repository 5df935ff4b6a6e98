#!/usr/bin/env python3
"""The tokenizer.json that tools/get-gemma3-270m rebuilds from the GGUF is Gemma 3's, to the id.

    test_270m_tokenizer.py --data DIR [--model DIR]

DIR of --data holds the published tokenizer (tokenizer/gemma3/tokenizer.json.zst), texts with their ids
(tokenizer/gemma3/golden.json) and the Universal Declaration of Human Rights in some 390 languages
(text/udhr2.zip). The model is looked for under models/gemma-3-270m; without it or DIR the test is skipped.
"""
import argparse
import json
import pathlib
import sys
import zipfile

from tokenizers import Tokenizer
import zstandard

ROOT = pathlib.Path(__file__).resolve().parents[2]


def golden_mismatches(tokenizer, golden):
    for text, ids in golden.items():
        if tokenizer.encode(text, add_special_tokens=False).ids != ids["g3"]:
            yield repr(text[:40])


def mismatches(ours, theirs, texts):
    for name, text in texts.items():
        if ours.encode(text).ids != theirs.encode(text).ids:
            yield name


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=pathlib.Path, required=True)
    ap.add_argument("--model", type=pathlib.Path, default=ROOT / "models" / "gemma-3-270m")
    a = ap.parse_args()
    folder = a.data / "tokenizer" / "gemma3"
    for path in (a.model / "tokenizer.json", folder / "golden.json"):
        if not path.exists():
            print(f"skip: {path} is not there\n0 passed, 0 failed, 1 skipped")
            return
    text = (a.model / "tokenizer.json").read_text(encoding="utf-8")
    published = zstandard.ZstdDecompressor().decompressobj().decompress(
        (folder / "tokenizer.json.zst").read_bytes()).decode()
    ours, theirs = Tokenizer.from_str(text), Tokenizer.from_str(published)
    mine, other = json.loads(text), json.loads(published)
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    with zipfile.ZipFile(a.data / "text" / "udhr2.zip") as z:
        udhr = {n: z.read(n).decode("utf-8", "replace") for n in z.namelist() if n.endswith(".txt")}
    size = sum(map(len, udhr.values()))
    checks = [
        (f"{len(mine['model']['merges'])} merges, {len(mine['added_tokens'])} added tokens and the rest of the file",
         [k for k in other if mine.get(k) != other[k]]),
        (f"{len(golden)} golden texts", list(golden_mismatches(ours, golden))),
        (f"{len(udhr)} translations, {size} characters", list(mismatches(ours, theirs, udhr))),
    ]
    for what, bad in checks:
        print(f"{'FAIL' if bad else 'ok  '} {what}{': ' + ', '.join(bad[:5]) if bad else ''}")
    failed = sum(bool(bad) for _, bad in checks)
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

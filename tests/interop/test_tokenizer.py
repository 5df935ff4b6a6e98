#!/usr/bin/env python3
"""Our tokenizer against Hugging Face tokenizers, to the id and to the character.

    test_tokenizer.py --data DIR --dump PROGRAM [--bench] [--fuzz N] [--seed N]

DIR holds the published Gemma 3 tokenizer with golden ids (tokenizer/gemma3) and texts (text/*.zst, text/udhr2.zip);
PROGRAM is the built tokenizer_dump. Every text is compared twice: ids, and decode(encode(text)). Random strings
follow, and random ids to decode. Then all again with the file turned into Gemma 4's shape: few added tokens, all of
them special, and merges written as strings. --bench compares speed on one thread, in the same run.
"""
import argparse
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import zipfile

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers starts its threads
os.environ["RAYON_NUM_THREADS"] = "1"
from tokenizers import Tokenizer
import zstandard

TEXTS = ("wiki.test.raw", "wiki.valid.raw", "code_c.txt", "code_python.txt", "gutenberg_11-0.txt", "gutenberg_84-0.txt",
         "gutenberg_1342-0.txt", "gutenberg_1661.txt", "gutenberg_2701-0.txt")
ODD = ["\r", "\r\n", "\x00", "\x01", "\x7f", "\x85", "\u00a0", "\u200b", "\u200d", "\u2028", "\u2581", "\u2581\u2581",
       "\ufeff", "\ufffd", "\uffff", "\U0010ffff", "\U000e0001", "e\u0301", "\ufb01", "\uff21", "👩‍👩‍👧‍👦",
       "<0x41>", "<0x0A>", "<", ">", "<|", "<unused", "<bos", "bos>", "<<bos>>", "<start_of_turn", "</", "<h1>"]
PLAIN = ["the", "The", "ing", "don't", "3.14159", "1000000", "http://", "x_y", "==", "----", "aaaa", "日本語", "한국어",
         "Ελληνικά", "русский", "العربية", "हिन्दी", "ไทย", "…", "“", "”", "—", "é", "ß", "😀", "🧿"]


def decompress(path):
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()


class Ours:
    def __init__(self, program, tokenizer_json):
        self.command = [program, tokenizer_json]

    def run(self, records, *flags):
        data = b"".join(b"%d\n%s" % (len(r), r) for r in records)
        r = subprocess.run([*self.command, *flags], input=data, stdout=subprocess.PIPE, check=True)
        return r.stdout

    def encode(self, texts, *flags):
        lines = self.run([t.encode() for t in texts], *flags).split(b"\n")
        return [[int(i) for i in line.split()] for line in lines[:-1]]

    def decode(self, records, *flags):
        out, at, texts = self.run(records, *flags), 0, []
        while at < len(out):
            end = out.index(b"\n", at)
            n = int(out[at:end])
            texts.append(out[end + 1:end + 1 + n].decode())
            at = end + 1 + n
        return texts


class Report:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, what, names, got, expected):
        bad = [n for n, g, e in zip(names, got, expected) if g != e]
        if len(got) != len(expected):
            bad.append(f"{len(got)} results for {len(expected)} texts")
        self.passed += not bad
        self.failed += bool(bad)
        detail = f": {len(bad)} differ, first {bad[0][:200]!r}" if bad else ""
        print(f"{'FAIL' if bad else 'ok  '} {what}{detail}", flush=True)


def compare(report, what, ours, theirs, texts):
    """ids without and with BOS, and the way back with and without special tokens, of named texts"""
    names, values = list(texts), list(texts.values())
    size = sum(len(t.encode()) for t in values)
    ids = [theirs.encode(t, add_special_tokens=False).ids for t in values]
    label = f"{what}: {len(values)} texts, {size} bytes"
    report.check(f"{label}, ids", names, ours.encode(values), ids)
    with_bos = [i if i[:1] == [2] else [2] + i for i in ids]
    report.check(f"{label}, ids with BOS", names, ours.encode(values, "--bos"), with_bos)
    raw = [t.encode() for t in values]
    for flags in ([], ["--skip-special"]):
        back = [theirs.decode(i, skip_special_tokens=bool(flags)) for i in ids]
        report.check(f"{label}, decoded {' '.join(flags)}", names, ours.decode(raw, "--decode", *flags), back)


def random_char(rng):
    top = rng.choice([0x80, 0x100, 0x800, 0x3000, 0xa000, 0x10000, 0x20000, 0x110000])
    c = rng.randrange(top)
    return "?" if 0xd800 <= c < 0xe000 else chr(c)


def random_text(rng, added, corpus):
    parts = []
    for _ in range(rng.choice([1, 2, 5, 20, 60])):
        kind = rng.randrange(9)
        if kind == 0:
            parts.append(rng.choice(added))
        elif kind == 1:
            parts.append(rng.choice(" \n\t") * rng.choice([1, 1, 2, 3, 15, 31, 32, 33, 70]))
        elif kind == 2:
            parts.append(rng.choice(ODD))
        elif kind == 3:
            parts.append("".join(random_char(rng) for _ in range(rng.randrange(1, 12))))
        elif kind == 4:
            at = rng.randrange(len(corpus))
            parts.append(corpus[at:at + rng.randrange(1, 60)])
        elif kind == 5:
            parts.append("".join(rng.choice("aeiost ,.<>019_") for _ in range(rng.randrange(1, 90))))
        elif kind == 6:
            parts.append(rng.choice(added)[:rng.randrange(1, 9)])
        else:
            parts.append(rng.choice(PLAIN) + rng.choice(["", "", " ", "  ", "\n"]))
    return "".join(parts)


def check_random_ids(report, what, ours, theirs, rng, n):
    """runs of byte tokens, valid and not, special tokens between them, unused ids"""
    first_byte, size = theirs.token_to_id("<0x00>"), theirs.get_vocab_size()
    rows = []
    for _ in range(n):
        row = []
        for _ in range(rng.randrange(12)):
            kind = rng.randrange(4)
            if kind == 0:
                row += [first_byte + b for b in random_char(rng).encode()]
            elif kind == 1:
                row.append(first_byte + rng.randrange(256))
            else:
                row.append(rng.choice([rng.randrange(size), rng.randrange(size), 2, 106, size + rng.randrange(99)]))
        rows.append(row)
    records = [" ".join(map(str, r)).encode() for r in rows]
    for flags in ([], ["--skip-special"]):
        expected = [theirs.decode(r, skip_special_tokens=bool(flags)) for r in rows]
        report.check(f"{what}: {n} rows of random ids, decoded {' '.join(flags)}", list(map(str, rows)),
                     ours.decode(records, "--decode-ids", *flags), expected)


def gemma4_shape(text):
    """Gemma 3's file with Gemma 4's kind of added tokens, merges as strings, no post_processor"""
    doc = json.loads(text)
    names = {46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>", 49: "<tool_call|>", 98: "<|think|>", 100: "<|channel>",
             101: "<channel|>", 105: "<|turn>", 106: "<turn|>"}
    old = {i: t for t, i in doc["model"]["vocab"].items()}
    for i, name in names.items():
        del doc["model"]["vocab"][old[i]]
        doc["model"]["vocab"][name] = i
    keep = set(names) | {0, 1, 2, 3, 4}
    doc["added_tokens"] = [dict(a, content=names.get(a["id"], a["content"]), special=True) for a in doc["added_tokens"]
                           if a["id"] in keep]
    for i in sorted(set(names) - {a["id"] for a in doc["added_tokens"]}):
        doc["added_tokens"].append({"id": i, "content": names[i], "single_word": False, "lstrip": False,
                                    "rstrip": False, "normalized": False, "special": True})
    doc["added_tokens"].sort(key=lambda a: a["id"])
    doc["model"]["merges"] = [" ".join(m) for m in doc["model"]["merges"]]
    doc["post_processor"] = None
    return json.dumps(doc, ensure_ascii=False)


def bench(ours, theirs, texts):
    """bytes a second on one thread; ours: fastest of 7, theirs: fastest of 3"""
    for name, text in texts.items():
        size = len(text.encode())
        _, seconds, _ = map(float, ours.run([text.encode()], "--bench", "7").split())
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            theirs.encode(text, add_special_tokens=False)
            best = min(best, time.perf_counter() - start)
        print(f"     {name}: {size / seconds / 1e6:.1f} MB/s, tokenizers {size / best / 1e6:.2f} MB/s, "
              f"ratio {best / seconds:.1f}", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=pathlib.Path, required=True)
    ap.add_argument("--dump", required=True)
    ap.add_argument("--bench", action="store_true")
    ap.add_argument("--fuzz", type=int, default=4000)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    folder = a.data / "tokenizer" / "gemma3"
    text = decompress(folder / "tokenizer.json.zst").decode()
    texts = {n: decompress(a.data / "text" / (n + ".zst")).decode("utf-8", "replace") for n in TEXTS}
    with zipfile.ZipFile(a.data / "text" / "udhr2.zip") as z:
        udhr = {n: z.read(n).decode("utf-8", "replace") for n in z.namelist() if n.endswith(".txt")}
    corpus = "".join(udhr.values())
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    report, rng = Report(), random.Random(a.seed)
    with tempfile.TemporaryDirectory() as tmp:
        for shape, source in (("gemma 3", text), ("gemma 4 shape", gemma4_shape(text))):
            path = pathlib.Path(tmp) / "tokenizer.json"
            path.write_text(source, encoding="utf-8")
            ours, theirs = Ours(a.dump, str(path)), Tokenizer.from_file(str(path))
            if shape == "gemma 3":
                report.check(f"{shape}: {len(golden)} golden texts", list(golden), ours.encode(list(golden)),
                             [g["g3"] for g in golden.values()])
            compare(report, f"{shape}: languages", ours, theirs, udhr)
            compare(report, f"{shape}: books, code, wiki", ours, theirs, texts)
            added = [t["content"] for t in json.loads(source)["added_tokens"]]
            fuzz = [random_text(rng, added, corpus) for _ in range(a.fuzz)]
            compare(report, f"{shape}: random", ours, theirs, {repr(t): t for t in fuzz})
            check_random_ids(report, shape, ours, theirs, rng, a.fuzz)
            if a.bench:
                bench(ours, theirs, {f"{shape}: wiki.test.raw": texts["wiki.test.raw"],
                                     f"{shape}: code_c": texts["code_c.txt"],
                                     f"{shape}: {len(udhr)} languages": corpus})
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()

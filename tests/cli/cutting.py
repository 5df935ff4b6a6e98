"""What the tests of calibrated cuts share: cutting the model that the command line names, and looking at the result."""
import json
import pathlib
import sys

from model import Model, run

GEMCUT, MODEL = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
N_LAYERS = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
CONTEXT = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
FIRST = "*.layers.0.*"          # one block is enough for most cases, and takes a sixth of the time
SETS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def command(out, samples=8, length=128, only=FIRST, model=MODEL, options=()):
    parts = [GEMCUT, "quantize", model, out, "-q"]
    for name, value in (("--samples", samples), ("--length", length), ("--only", only)):
        if value is not None:
            parts += [name, value]
    return parts + list(options)


def cut(out, *options, **settings):
    """-> gemcut.json of a cut that must succeed without a word, and be as its record says"""
    code, stdout, stderr = run(*command(out, options=options, **settings))
    assert code == 0 and stdout == "" and stderr == "", f"exit {code}: {stderr or stdout}"
    code, _, stderr = run(GEMCUT, "verify", out, "-q")
    assert code == 0, f"verify: exit {code}: {stderr}"
    return json.loads((out / "gemcut.json").read_text())


def refused(tmp, *options, code=2, words=(), **settings):
    """One line on stderr that holds all the words, and nothing left behind."""
    before = sorted(p.name for p in tmp.iterdir())
    got, stdout, stderr = run(*command(tmp / "out", options=options, **settings))
    assert got == code, f"exit {got}, expected {code}: {stderr.strip()}"
    assert stdout == "" and stderr.startswith("gemcut") and stderr.count("\n") == 1, (stdout, stderr)
    for word in words:
        assert str(word) in stderr, f"{word!r} is not in: {stderr.strip()}"
    after = sorted(p.name for p in tmp.iterdir())
    assert after == before, f"left behind: {set(after) - set(before)}"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    differing = [name for name in a if a[name] != b[name]]
    assert not differing, f"differ: {differing}"


def tensors(folder):
    """{name: (dtype, shape, bytes)}"""
    m = Model(folder)
    return {name: (m.header[name]["dtype"], m.header[name]["shape"],
                   bytes(m.data[slice(*m.header[name]["data_offsets"])])) for name in m.names()}



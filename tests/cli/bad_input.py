#!/usr/bin/env python3
"""Every kind of bad input and bad luck that `gemcut quantize` must survive: one clear line, the documented exit
code, nothing left behind.

    bad_input.py GEMCUT MODEL      MODEL: data/model/gemma3-tiny
"""
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

from model import Model, run

GEMCUT, MODEL = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
LINEAR = "model.layers.0.mlp.up_proj.weight"
RTN = ("--method", "rtn")            # what is refused here is refused by every method, and this one is quick
results = []


def case(f):
    """Runs the function with a fresh folder and a fresh copy of the model."""
    tmp = pathlib.Path(tempfile.mkdtemp(prefix="gemcut-bad-"))
    try:
        f(tmp, Model(MODEL))
        results.append(True)
        print(f"ok      {f.__name__}")
    except AssertionError as e:
        results.append(False)
        print(f"FAILED  {f.__name__}: {e}")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def refused(folder, *words, code=3, out=None, options=()):
    """quantize must end with `code` and one line on stderr that holds all the words, and leave nothing."""
    out = out or folder.parent / "out"
    before = sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None
    got, stdout, stderr = run(GEMCUT, "quantize", folder, out, "-q", *RTN, *options)
    assert got == code, f"exit {got}, expected {code}: {stderr.strip()}"
    assert stderr.count("\n") == 1 and stderr.startswith("gemcut"), f"not one line: {stderr!r}"
    for word in words:
        assert word in stderr, f"{word!r} is not in: {stderr.strip()}"
    if before is not None:
        after = sorted(p.name for p in out.parent.iterdir())
        assert after == before, f"left behind: {set(after) - set(before)}"


@case
def truncated_data(tmp, m):
    refused(m.write(tmp / "m", data=m.data[:-1000]), "model.safetensors", "bytes")


@case
def truncated_header(tmp, m):
    refused(m.write(tmp / "m", raw_header=b'{"a": ', data=b"", header_bytes=5000), "truncated", "5008")


@case
def empty_file(tmp, m):
    folder = m.write(tmp / "m")
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "0 bytes", "too short")


@case
def header_length_absurd(tmp, m):
    refused(m.write(tmp / "m", header_bytes=2**63), str(2**63), "not a safetensors file")


@case
def header_not_json(tmp, m):
    refused(m.write(tmp / "m", raw_header=b"{" + b"\xff" * 63), "not JSON")


@case
def header_lies_about_size(tmp, m):
    m.header[LINEAR]["shape"][0] += 1
    refused(m.write(tmp / "m"), LINEAR, "which is not BF16")


@case
def header_shape_overflows(tmp, m):
    m.header[LINEAR]["shape"] = [2**40, 2**40]
    refused(m.write(tmp / "m"), LINEAR, "which is not BF16")


@case
def header_negative_dimension(tmp, m):
    m.header[LINEAR]["shape"] = [-1, 256]
    refused(m.write(tmp / "m"), LINEAR, "is -1")


@case
def tensors_overlap(tmp, m):
    names = sorted(m.names(), key=lambda n: m.header[n]["data_offsets"])
    same = [n for n in names if m.header[n]["shape"] == m.header[LINEAR]["shape"] and n != LINEAR]
    m.header[LINEAR]["data_offsets"] = m.header[same[0]]["data_offsets"]
    refused(m.write(tmp / "m"), "overlap", LINEAR)


@case
def gap_between_tensors(tmp, m):
    del m.header[LINEAR]
    refused(m.write(tmp / "m"), "belong to no tensor")


@case
def unknown_dtype(tmp, m):
    m.header[LINEAR]["dtype"] = "Q4_K"
    refused(m.write(tmp / "m"), LINEAR, "unknown dtype 'Q4_K'")


@case
def wrong_dtype(tmp, m):
    m.header[LINEAR]["dtype"] = "I16"
    refused(m.write(tmp / "m"), LINEAR, "I16", "expected BF16")


@case
def wrong_shape(tmp, m):
    m.header[LINEAR]["shape"].reverse()
    refused(m.write(tmp / "m"), LINEAR, "[256, 768]", "expected BF16 [768, 256]")


@case
def missing_tensor(tmp, m):
    m.header["model.layers.0.mlp.other.weight"] = m.header.pop(LINEAR)
    refused(m.write(tmp / "m"), LINEAR, "is missing")


@case
def duplicate_tensor(tmp, m):
    entry = json.dumps(m.header[LINEAR])
    text = json.dumps(m.header)[:-1] + f', "{LINEAR}": {entry}}}'
    refused(m.write(tmp / "m", raw_header=text.encode()), LINEAR, "twice")


def shard(tmp, m):
    """The model as a folder with an index and one shard."""
    folder = m.write(tmp / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {n: "model-00001-of-00001.safetensors" for n in m.names()}}
    return folder, index


@case
def missing_shard(tmp, m):
    folder, index = shard(tmp, m)
    index["weight_map"][LINEAR] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00002-of-00002.safetensors", "No such file")


@case
def index_names_a_path(tmp, m):
    folder, index = shard(tmp, m)
    index["weight_map"][LINEAR] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "without a folder", LINEAR)


@case
def index_lacks_a_tensor(tmp, m):
    folder, index = shard(tmp, m)
    del index["weight_map"][LINEAR]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names", "the files hold")


@case
def no_weights(tmp, m):
    folder = m.write(tmp / "m")
    (folder / "model.safetensors").unlink()
    refused(folder, "no *.safetensors")


@case
def no_config(tmp, m):
    folder = m.write(tmp / "m")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "No such file")


@case
def no_model(tmp, m):
    refused(tmp / "nowhere", "no such folder")


@case
def nan_weight(tmp, m):
    m.put(LINEAR, 2 * (3 * 256 + 5), struct.pack("<H", 0x7fc1))
    refused(m.write(tmp / "m"), LINEAR, "row 3, column 5", "--allow-nonfinite")


@case
def infinite_norm(tmp, m):
    m.put("model.norm.weight", 14, struct.pack("<H", 0xff80))
    refused(m.write(tmp / "m"), "model.norm.weight", "column 7")


@case
def nan_allowed(tmp, m):
    m.put(LINEAR, 2 * (3 * 256 + 5), struct.pack("<H", 0x7fc1))
    folder = m.write(tmp / "m")
    code, _, stderr = run(GEMCUT, "quantize", folder, tmp / "out", "-q", *RTN, "--allow-nonfinite")
    assert code == 0, stderr
    record = json.loads((tmp / "out/gemcut.json").read_text())
    assert record["linears"][LINEAR.removesuffix(".weight")]["nonfinite_as_zero"] == 1


@case
def unsupported_architecture(tmp, m):
    m.config.update(model_type="llama", architectures=["LlamaForCausalLM"])
    refused(m.write(tmp / "m"), "llama", "LlamaForCausalLM", "gemma3_text")


@case
def unknown_mathematics(tmp, m):
    m.config["final_logit_softcapping"] = 30.0
    refused(m.write(tmp / "m"), "final_logit_softcapping")


@case
def config_not_json(tmp, m):
    refused(m.write(tmp / "m", config=b'{"model_type": "gemma3_text",'), "config.json", "not JSON")


@case
def config_wrong_type(tmp, m):
    m.config["hidden_size"] = "many"
    refused(m.write(tmp / "m"), "hidden_size", "not a number")


@case
def config_layers_absurd(tmp, m):
    m.config["num_hidden_layers"] = 1e300
    refused(m.write(tmp / "m"), "num_hidden_layers")


@case
def already_quantized(tmp, m):
    folder = m.write(tmp / "m")
    code, _, stderr = run(GEMCUT, "quantize", folder, tmp / "cut", "-q", *RTN)
    assert code == 0, stderr
    refused(tmp / "cut", "already quantized", "compressed-tensors")


@case
def width_not_divisible(tmp, m):
    for name in m.names():  # 768 becomes 736 = 23 · 32
        if "mlp" in name:
            shape = m.header[name]["shape"]
            shape[shape.index(768)] = 736
    at, data = 0, bytearray()
    for name in sorted(m.names(), key=lambda n: m.header[n]["data_offsets"]):
        n = 2
        for d in m.header[name]["shape"]:
            n *= d
        begin = m.header[name]["data_offsets"][0]
        data += m.data[begin:begin + n]
        m.header[name]["data_offsets"] = [at, at + n]
        at += n
    m.config["intermediate_size"] = 736
    folder = m.write(tmp / "m", data=data)
    refused(folder, "model.layers.0.mlp.down_proj.weight", "736", "128", options=["--ragged", "error"])
    for rule, group in (("smaller", 32), ("keep", None)):
        code, _, stderr = run(GEMCUT, "quantize", folder, tmp / rule, *RTN, "--ragged", rule)
        assert code == 0 and "6 linears" in stderr, stderr
        record = json.loads((tmp / rule / "gemcut.json").read_text())
        linear = record["linears"].get("model.layers.0.mlp.down_proj", {})
        assert linear.get("group_size") == group, linear
        code, _, stderr = run(GEMCUT, "verify", tmp / rule, "--against", folder)
        assert code == 0, stderr


@case
def output_exists(tmp, m):
    (tmp / "out").mkdir()
    (tmp / "out/precious").write_text("x")
    refused(MODEL, "exists", "--overwrite", out=tmp / "out")
    refused(MODEL, "not written by gemcut", out=tmp / "out", options=["--overwrite"])
    assert (tmp / "out/precious").read_text() == "x"


@case
def output_is_the_model(tmp, m):
    folder = m.write(tmp / "m")
    refused(folder, "exists", out=folder)
    refused(folder, "not written by gemcut", out=folder, options=["--overwrite"])


@case
def partial_of_somebody_else(tmp, m):
    (tmp / "out.partial").mkdir()
    refused(MODEL, "out.partial", "move it away", out=tmp / "out")


@case
def parent_missing(tmp, m):
    refused(MODEL, "cannot create the folder", out=tmp / "a/b")


@case
def folder_not_writable(tmp, m):
    parent = tmp / "locked"
    parent.mkdir(mode=0o555)
    # root writes everywhere but in the kernel's own file systems
    out = pathlib.Path("/proc/sys/kernel/out") if os.geteuid() == 0 else parent / "out"
    refused(MODEL, "cannot create the folder", out=out)


@case
def disk_full(tmp, m):
    small = tmp / "small"
    small.mkdir()
    mounted = os.geteuid() == 0 and run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)[0] == 0
    try:
        if mounted:
            refused(MODEL, "No space left on device", "model.safetensors", out=small / "out")
        else:  # a limit on file sizes fails in the same places
            command = f"ulimit -f 1024; exec '{GEMCUT}' quantize '{MODEL}' '{small}/out' -q {' '.join(RTN)}"
            code, _, stderr = run("bash", "-c", command)
            assert code == 3 and "File too large" in stderr, (code, stderr)
            assert not any(small.iterdir())
    finally:
        if mounted:
            run("umount", small)


def big_model(tmp, m):
    """A sparse model of 2 GB: long enough under way to be interrupted, and it takes no disk."""
    vocab = 4_000_000
    name = "model.embed_tokens.weight"
    names = [name] + [n for n in m.names() if n != name]
    m.header[name]["shape"][0] = vocab
    at = 0
    for n in names:
        size = 2
        for d in m.header[n]["shape"]:
            size *= d
        m.header[n]["data_offsets"] = [at, at + size]
        at += size
    m.config["vocab_size"] = vocab
    folder = m.write(tmp / "m", data=b"")
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + at)
    return folder


def start_and_signal(tmp, folder, number):
    process = subprocess.Popen([GEMCUT, "quantize", folder, tmp / "out", *RTN], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp / "out.partial/model.safetensors").exists():
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@case
def interrupted(tmp, m):
    folder = big_model(tmp, m)
    for number in (signal.SIGINT, signal.SIGTERM):
        code, stderr = start_and_signal(tmp, folder, number)
        assert code == 3 and stderr.endswith("gemcut: interrupted\n"), (code, stderr)
        assert sorted(p.name for p in tmp.iterdir()) == ["m"], list(tmp.iterdir())


@case
def killed_then_again(tmp, m):
    folder = big_model(tmp, m)
    code, _ = start_and_signal(tmp, folder, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (tmp / "out").exists()
    assert (tmp / "out.partial").is_dir()
    code, _, stderr = run(GEMCUT, "quantize", MODEL, tmp / "out", "-q", *RTN)
    assert code == 0, stderr
    assert sorted(p.name for p in tmp.iterdir()) == ["m", "out"]
    code, _, stderr = run(GEMCUT, "verify", tmp / "out", "--against", MODEL)
    assert code == 0, stderr


# --- runs that look at activations, the default ---------------------------------------------------------------------------

CALIBRATED = ("--samples", "4", "--length", "64")
JOURNAL = "out.partial/.gemcut-journal"


def finished(tmp):
    """Linears that the journal has, or -1 without one."""
    file = tmp / JOURNAL
    return file.read_bytes().count(b"\n") - 1 if file.exists() else -1


def stop_calibrated(tmp, number, after, *options):
    """Sends the signal when so many linears are finished. -> (exit code, stderr)"""
    process = subprocess.Popen([GEMCUT, "quantize", MODEL, tmp / "out", "-q", *(options or CALIBRATED)],
                               stderr=subprocess.PIPE, text=True)
    while process.poll() is None and finished(tmp) < after:
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def resume(tmp, *options, code=0, words=()):
    """--resume; -> stdout"""
    got, stdout, stderr = run(GEMCUT, "quantize", MODEL, tmp / "out", *CALIBRATED, "--resume", *options)
    assert got == code, f"exit {got}, expected {code}: {stderr.strip()}"
    for word in words:
        assert word in stderr, f"{word!r} is not in: {stderr.strip()}"
    return stdout


@case
def calibrated_stopped_then_resumed(tmp, m):
    resume(tmp)                                          # there is nothing yet: a run like any other
    whole = contents(tmp / "out")
    shutil.rmtree(tmp / "out")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        code, stderr = stop_calibrated(tmp, number, 10)
        assert code == (-number if number == signal.SIGKILL else 3), (code, stderr)
        if number != signal.SIGKILL:
            assert stderr == f"gemcut: {tmp}/out.partial is kept, --resume goes on from there: interrupted\n", stderr
        assert sorted(p.name for p in tmp.iterdir()) == ["out.partial"], list(tmp.iterdir())
        stdout = resume(tmp)
        n = [int(line.split()[1]) for line in stdout.splitlines() if line.startswith("resumed ")]
        assert len(n) == 1 and 9 <= n[0] < 42, stdout
        assert sorted(p.name for p in tmp.iterdir()) == ["out"], list(tmp.iterdir())
        got = contents(tmp / "out")
        assert got == whole, [name for name in got.keys() | whole.keys() if got.get(name) != whole.get(name)]
        shutil.rmtree(tmp / "out")


@case
def calibrated_stopped_twice(tmp, m):
    """Another request is refused and what there is stays; without --resume everything begins anew."""
    for after in (5, 12):
        code, stderr = stop_calibrated(tmp, signal.SIGINT, after, *CALIBRATED, "--resume")
        assert code == 3 and "--resume goes on" in stderr, (code, stderr)
    before = (tmp / JOURNAL).read_bytes()
    for options, what in ((("--damping", "0.02"), "recipe"), (("--scheme", "w8a16"), "recipe"),
                          (("--seed", "1"), "calibration text"), (("--order", "file"), "calibration text")):
        resume(tmp, *options, code=2, words=["the run that is to be resumed", what])
        assert (tmp / JOURNAL).read_bytes() == before, options
    code, stdout, stderr = run(GEMCUT, "quantize", MODEL, tmp / "out", *CALIBRATED)
    assert code == 0 and "resumed" not in stdout, stderr
    assert sorted(p.name for p in tmp.iterdir()) == ["out"], list(tmp.iterdir())


@case
def calibrated_stopped_at_once(tmp, m):
    """Before any linear is finished there is nothing to keep."""
    code, stderr = stop_calibrated(tmp, signal.SIGINT, 0, "--samples", "64", "--length", "512")
    assert code == 3 and stderr == "gemcut: interrupted\n", (code, stderr)
    assert not any(tmp.iterdir()), list(tmp.iterdir())


print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
sys.exit(not all(results))

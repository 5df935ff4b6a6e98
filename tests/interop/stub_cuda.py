#!/usr/bin/env python3
"""Let PyPI's PyTorch start on the CPU without the 3 GB of CUDA libraries that it links against.

    stub_cuda.py SITE_PACKAGES

PyPI has only the CUDA build of PyTorch for Linux. It names cuBLAS, cuDNN, NCCL and others as needed,
so the loader must find them, though nothing on the CPU calls them. This writes a stub for every needed
library that is not there: same soname, same symbol versions, and every function that PyTorch imports
from it, returning 1, which is an error code in all of them. The CUDA runtime and CUPTI are called
while PyTorch starts and must be the real ones. Needs cc, nm and readelf.
"""
import collections
import pathlib
import re
import subprocess
import sys
import tempfile

# Where a library has no symbol versions its functions are told by their names.
PREFIXES = {"libnccl": "nccl", "libcusparseLt": "cusparseLt", "libcufile": "cuFile"}
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|gomp|cuda)\.so|ld-linux")   # libcuda: the driver's


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    site = pathlib.Path(sys.argv[1])
    lib = site / "torch" / "lib"
    have = {p.name for root in (lib, site / "nvidia") for p in root.rglob("*.so*")}
    needed, versions, imports = set(), collections.defaultdict(set), collections.defaultdict(set)
    for so in lib.glob("*.so"):
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-dW", str(so))))
        for soname, entries in re.findall(r"File: (\S+)  Cnt:.*\n((?:.*Name: .*\n)*)", run("readelf", "-VW", str(so))):
            versions[soname] |= set(re.findall(r"Name: (\S+)", entries))
        for name, version in re.findall(r"\bU (\w+)(?:@(\S+))?", run("nm", "-D", "--undefined-only", str(so))):
            imports[version].add(name)
    for soname in sorted(n for n in needed - have if not SYSTEM.match(n)):
        prefix = PREFIXES.get(soname.split(".")[0])
        nodes = {v: imports[v] for v in sorted(versions[soname])}
        plain = {n for n in imports[""] if prefix and n.startswith(prefix)}
        names = sorted(plain.union(*nodes.values()))
        script = "".join(f"{v} {{ global: {' '.join(n + ';' for n in sorted(ns))} }};\n" for v, ns in nodes.items())
        with tempfile.TemporaryDirectory() as tmp:
            c, map_file = pathlib.Path(tmp) / "stub.c", pathlib.Path(tmp) / "stub.map"
            c.write_text("".join(f"int {n}(void) {{ return 1; }}\n" for n in names))
            map_file.write_text(script)
            run("cc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{soname}",
                *([f"-Wl,--version-script,{map_file}"] if nodes else []), "-o", str(lib / soname), str(c))
        print(f"stub_cuda: {soname}: {len(names)} functions", file=sys.stderr)


if __name__ == "__main__":
    main()

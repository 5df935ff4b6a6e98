#!/usr/bin/env bash
# Every file under data/ must be in data/MANIFEST.json, with its source, licence, size and SHA-256.
#   check_manifest.sh             checks; exit 1 when a file is missing, differs or is not described
#   check_manifest.sh --update    writes the sizes and sums of the described files anew, then checks
set -euo pipefail
cd "$(dirname "$0")/../../data"
exec python3 - "$@" <<'PY'
import hashlib, json, pathlib, sys

manifest = pathlib.Path("MANIFEST.json")
doc = json.loads(manifest.read_text())
entries = {e["path"]: e for e in doc["files"]}
files = {str(p): p for p in sorted(pathlib.Path(".").rglob("*")) if p.is_file() and p != manifest}

def measured(path):
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

if sys.argv[1:] == ["--update"]:
    for name in entries.keys() & files.keys():
        entries[name].update(measured(files[name]))
    manifest.write_text(json.dumps(doc, indent=2, ensure_ascii=False) + "\n")
elif sys.argv[1:]:
    sys.exit(f"check_manifest: unknown argument {sys.argv[1]!r}")

bad = [f"{name}: not in the manifest" for name in sorted(files.keys() - entries.keys())]
bad += [f"{name}: in the manifest, but there is no such file" for name in sorted(entries.keys() - files.keys())]
if len(entries) != len(doc["files"]):
    bad.append("a path stands twice in the manifest")
for name in sorted(entries.keys() & files.keys()):
    e = entries[name]
    bad += [f"{name}: the manifest does not say its {key}" for key in ("what", "made", "licence") if not e.get(key)]
    bad += [f"{name}: {key} is {value}, expected {e.get(key)}"
            for key, value in measured(files[name]).items() if value != e.get(key)]
for line in bad:
    print("FAIL data/" + line)
print(f"check_manifest: {len(files)} files, {len(bad)} faults")
sys.exit(1 if bad else 0)
PY

#!/usr/bin/env python3
"""Let auto-round and llm-compressor start without the datasets package, which they import even where they are handed
token ids: it and pyarrow are 200 MB.

    stub_datasets.py SITE_PACKAGES

The stub has the names that the two import. The classes have no instances, so that no isinstance() is ever true; the
functions fail when they are called.
"""
import pathlib
import sys

VERSION = "99.0.0"      # newer than any that a requirement names
CLASSES = "Dataset DatasetDict Features IterableDataset Sequence Value"
FUNCTIONS = "concatenate_datasets load_dataset load_from_disk"


def main():
    site = pathlib.Path(sys.argv[1])
    package, info = site / "datasets", site / f"datasets-{VERSION}.dist-info"
    formatting = package / "formatting"
    for folder in (package, info, formatting):
        folder.mkdir(parents=True, exist_ok=True)
    lines = [f'__version__ = "{VERSION}"', "", "", "def missing(*args, **kwargs):",
             '    raise RuntimeError("this environment has a stub of datasets, hand token ids")', "", ""]
    lines += [f"{name} = type({name!r}, (), {{'__new__': missing}})" for name in CLASSES.split()]
    lines += [f"{name} = missing" for name in FUNCTIONS.split()]
    (package / "__init__.py").write_text("\n".join(lines) + "\n")
    (formatting / "__init__.py").write_text("")
    (formatting / "formatting.py").write_text("class LazyRow:\n    pass\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: datasets\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")
    (info / "INSTALLER").write_text("stub\n")


if __name__ == "__main__":
    main()

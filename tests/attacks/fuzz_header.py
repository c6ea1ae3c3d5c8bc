"""Atheris over the reader of adapter files: which bytes lead to a line that no test has come to, or to another error.

    python -m venv ENV && ENV/bin/pip install atheris . && PYTHONPATH=src:tests \
        ENV/bin/python tests/attacks/fuzz_header.py CORPUS -max_total_time=600 -max_len=8192

The first byte of an input says what the rest is: a whole file, the header of one, or the text of addenda's own entry in
it. A digest is made right. CORPUS is a folder of inputs: it gets sound ones first, then what atheris finds. At its end
the lines of both files that are reached are counted. Without atheris it says so and does nothing.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import CodeType
from typing import Any

SITE = {"path": "a", "kind": "linear", "shape": [2, 2], "dtype": "float32", "method": 0, "trainable": ["A", "B"],
        "frozen": [], "hash": "0" * 64, "sample": [1.0, 2.5], "checks": {}}  # fmt: skip
HEADER = {"schema": 2, "sha256": "0" * 64, "seed": 0, "step": 0, "methods": [{"name": "lora", "options": {"bits": 2}}],
          "basis": False, "sites": [SITE], "pools": []}  # fmt: skip
HEAD = {**SITE, "path": "h", "method": -1, "trainable": ["value"]}
MORE = [
    {},
    {"labels": ["x", "y"], "note": {"a": [1, None]}, "head": {"bits": 1}},
    {"sites": [{**SITE, "frozen": ["i"], "checks": {"U": [0.5, 2.0], "i": "0" * 64}, "form": "NF4"}], "basis": True},
    {"sites": [{**SITE, "packed": {"A": [1, 2], "B": [2, 1]}}]},
    {"sites": [SITE, HEAD], "pools": [["v"]]},
    {"sites": [{k: v for k, v in HEAD.items() if k not in ("hash", "sample")}], "methods": []},
    {"schema": 1},
]


def file_of(data: bytes) -> bytes:
    """Return the file that an input means."""
    from attacks.mutate import has_digest, resealed

    kind, rest = data[:1], data[1:]
    if kind == b"i":
        text = rest.decode("utf-8", "surrogateescape")
        header, numbers = _around(text)
        whole = len(header).to_bytes(8, "little") + header + numbers
    elif kind == b"h":
        header, _, numbers = rest.partition(b"\0")
        whole = len(header).to_bytes(8, "little") + header + numbers
    else:
        whole = rest
    return resealed(whole) if has_digest(whole) else whole


def _around(text: str) -> tuple[bytes, bytes]:
    """Return the header around addenda's own entry, with the tensors that its sites name, and their numbers."""
    sizes: dict[str, int] = {}
    try:
        own = json.loads(text)
        for s in own["sites"]:
            for k in [*s["trainable"], *s["frozen"], *(s["checks"] if own["basis"] else ())]:
                sizes[f"{s['path']}/{k}"] = 8
            for k in s.get("packed", {}):
                sizes[f"{s['path']}/{k}.moments"] = 8
        for i, names in enumerate(own["pools"]):
            sizes |= {f".{i}/{k}": 8 for k in names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    entries: dict[str, Any] = {"__metadata__": {"addenda": text}}
    for i, key in enumerate(sizes):
        entries[key] = {"dtype": "F32", "shape": [1, 2], "data_offsets": [8 * i, 8 * i + 8]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape")
    return header, bytes(8 * len(sizes))


def read(data: bytes, place: Path) -> None:
    """Read the file of an input: it is refused, or what was read is written and read again alike."""
    from addenda.core.base.errors import AddendaError
    from addenda.core.file import header as adapters

    place.write_bytes(file_of(data))
    try:
        header, tensors = adapters.read(place)
    except AddendaError as error:
        str(error).encode()
        return
    again, kept = adapters.read(adapters.write(place, header, tensors))
    assert again.to_json() == {**header.to_json(), "schema": 2, "sha256": "0" * 64}
    assert tensors.keys() == kept.keys()


def seeds() -> list[bytes]:
    """Sound inputs of each kind."""
    made = [{**HEADER, **more} for more in MORE]
    made[-1].pop("sha256")
    found = [b"i" + json.dumps(one).encode() for one in made]
    files = [file_of(one) for one in found]
    found += [b"f" + f for f in files]
    found += [b"h" + f[8 : (end := 8 + int.from_bytes(f[:8], "little"))] + b"\0" + f[end:] for f in files]
    return found


def reached(corpus: list[bytes], place: Path) -> dict[str, list[int]]:
    """Return by file how many of its lines of code the inputs reach, and how many there are."""
    from addenda.core.file import container, header

    lines: dict[str, set[int]] = {str(m.__file__): set() for m in (container, header)}

    def trace(frame: Any, event: str, _: Any) -> Any:
        known = lines.get(frame.f_code.co_filename)
        if known is None:
            return None
        known.add(frame.f_lineno)
        return trace

    for data in corpus:
        sys.settrace(trace)
        try:
            read(data, place)
        finally:
            sys.settrace(None)
    return {Path(f).name: [len(found & (every := _lines(Path(f)))), len(every)] for f, found in lines.items()}


def _lines(file: Path) -> set[int]:
    """Return the lines of code inside of functions."""
    found, stack = set(), [compile(file.read_text(), str(file), "exec")]
    while stack:
        code = stack.pop()
        inner = [c for c in code.co_consts if isinstance(c, CodeType)]
        stack += inner
        if code.co_flags & 2:  # a function, not a module or a class
            found |= {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found


def main() -> None:
    try:
        import atheris  # pyright: ignore[reportMissingModuleSource]
    except ImportError:
        print("atheris is not installed here, so nothing is searched: pip install atheris (of Python 3.11 to 3.13).")
        return
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["addenda.core.file", "addenda.core.disk.access"]):
        import addenda.core.file.container
        import addenda.core.file.header  # noqa: F401
    corpus = Path(next(a for a in sys.argv[1:] if not a.startswith("-")))
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(seeds()):
        (corpus / f"sound{i}").write_bytes(data)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        place = Path(folder) / "x"
        if pid := os.fork():  # the search ends its process
            os.waitpid(pid, 0)
            print(json.dumps({"inputs": len(list(corpus.iterdir())), "lines": reached(
                [p.read_bytes() for p in sorted(corpus.iterdir())], place)}))  # fmt: skip
            return
        atheris.Setup(sys.argv, lambda data: read(data, place))
        atheris.Fuzz()


if __name__ == "__main__":
    main()

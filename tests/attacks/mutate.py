"""Hostile files out of good ones. Every mutant is a pure function of its seed and of the files that it is made of.

    mutant(seed, sources, words) -> Mutant(kind, files, source, sealed)

A source is a set of files by name, as one thing lies on a disk: an adapter, a folder of PEFT, a checkpoint. One of them
is changed, by its kind: bytes of any; entries, names, numbers and nesting of JSON, also of JSON that stands as text in
the header of a safetensors file; tensors there; counts, sizes and types of GGUF; lines of YAML. Where a file carries a
digest of itself, every second mutant has it made right again, as an attacker can.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Files = dict[str, bytes]
Kind = tuple[str, Callable[["Rng", bytes], bytes]]


class Rng(random.Random):
    """A seeded source of choices; `words`: names that mean something to whoever reads the files."""

    words: Sequence[str] = ()
    others: Sequence[Files] = ()

    def one(self, items: Sequence[Any]) -> Any:
        return items[self.randrange(len(items))]


@dataclass(frozen=True)
class Mutant:
    """kind: what was done, for counts; files: all of them; source: which one it was; sealed: its digest is right."""

    kind: str
    files: Files
    source: int
    sealed: bool
    changed: str  # the name of the file that was changed


def mutant(seed: int, sources: Sequence[Files], words: Sequence[str] = ()) -> Mutant:
    """Return the mutant of a seed."""
    rng = Rng(seed)
    rng.words, rng.others = words, sources
    source = rng.randrange(len(sources))
    files = sources[source]
    name = rng.one(sorted(files))
    kinds = kinds_of(name, files[name])
    data, done = files[name], []
    for _ in range(1 if rng.random() < 0.75 else rng.randint(2, 4)):
        kind, change = rng.one(kinds)
        try:
            data = change(rng, data)
        except Exception:  # a change before this one has left no such file
            continue
        done.append(kind)
    sealed = rng.random() < 0.5 and has_digest(data)
    kind = (done[0] if len(done) == 1 else f"{len(done)} at once") if done else "nothing"
    return Mutant(kind, files | {name: resealed(data) if sealed else data}, source, sealed, name)


def kinds_of(name: str, data: bytes) -> list[Kind]:
    """Return what can be done to a file, those for its format as often as those for any bytes together."""
    suffix = name.rpartition(".")[2]
    own: list[Kind] = []
    if suffix == "safetensors":
        own = [*((f"header: {k}", in_header(f)) for k, f in JSON), *TENSORS]
        inner = [(f"inner: {k}", in_metadata(f)) for k, f in [*JSON, *JSON]]
        own += [*inner, *NAMED] if data[8:].startswith(b'{"__metadata__":{"') else []
    elif suffix == "json":
        own = [(f"json: {k}", in_json(f)) for k, f in JSON]
    elif suffix == "gguf":
        own = [("gguf: a number", gguf_number), ("gguf: a number", gguf_number), ("gguf: a name", gguf_name)]
    elif suffix == "yaml":
        own = [(f"yaml: {k}", f) for k, f in LINES]
    own = own * max(1, 12 // max(1, len(own)))
    return own + BYTES * max(1, len(own) // (2 * len(BYTES)))


# -- any bytes ---------------------------------------------------------------------------------------------------------


def _part(rng: Rng, data: bytes, most: int = 64) -> tuple[int, int]:
    """Return where a short part of the bytes begins and ends."""
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.randint(1, most))


def flip(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 20)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def byte(rng: Rng, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    other = rng.one([0, 1, 9, 10, 32, 34, 45, 48, 57, 92, 123, 125, 127, 128, 192, 255, rng.randrange(256)])
    return data[:at] + bytes([other]) + data[at + 1 :]


def cut(rng: Rng, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))] if rng.random() < 0.8 else data[rng.randrange(1, len(data)) :]


def extend(rng: Rng, data: bytes) -> bytes:
    more = rng.one([b"\0", b"\n", b" ", b"\xff", b"}", rng.randbytes(8), data[:64], data[-64:]])
    return data + more * rng.one([1, 1, 2, 8, 1000])


def insert(rng: Rng, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]


def delete(rng: Rng, data: bytes) -> bytes:
    begin, end = _part(rng, data)
    return data[:begin] + data[end:]


def blank(rng: Rng, data: bytes) -> bytes:
    begin, end = _part(rng, data)
    return data[:begin] + rng.one([b"\0", b"\xff", b" ", b"0"]) * (end - begin) + data[end:]


def repeat(rng: Rng, data: bytes) -> bytes:
    begin, end = _part(rng, data, 200)
    return data[:end] + data[begin:end] * rng.one([1, 1, 2, 100]) + data[end:]


def exchange(rng: Rng, data: bytes) -> bytes:
    (a, b), (c, d) = sorted([_part(rng, data), _part(rng, data)])
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def splice(rng: Rng, data: bytes) -> bytes:
    """The beginning of this file and the end of another."""
    other = rng.one(list(rng.one(rng.others).values()))
    begin = rng.randrange(len(data))
    if rng.random() < 0.5:
        return data[:begin] + other[min(begin, len(other)) :]
    return data[:begin] + other[rng.randrange(len(other)) :]


def empty(rng: Rng, data: bytes) -> bytes:
    return rng.one([b"", b"\0", b"{}", b"[]", b"null", data[:8], b"\x80\x04K\x01.", b"PK\3\4" + data])


BYTES: list[Kind] = [
    ("bits turned", flip), ("bits turned", flip), ("a byte", byte), ("cut", cut), ("extended", extend),
    ("inserted", insert), ("deleted", delete), ("blanked", blank), ("repeated", repeat), ("exchanged", exchange),
    ("spliced", splice), ("another file", empty),
]  # fmt: skip


# -- JSON, with what no parser gives back: keys that stand twice, and words that are no JSON ---------------------------


class Pairs(list):
    """An object of JSON: [key, value] in their order, a key as often as it stands there."""


class Raw(str):
    """A word that is written as it is."""


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([k, v] for k, v in pairs))


def written(value: Any, compact: bool = False) -> str:
    comma, colon = (",", ":") if compact else (", ", ": ")
    out: list[str] = []
    _write(value, out, comma, colon)
    return "".join(out)


def _write(value: Any, out: list[str], comma: str, colon: str) -> None:
    if isinstance(value, Raw):
        out.append(value)
    elif isinstance(value, Pairs):
        out.append("{")
        for i, (k, v) in enumerate(value):
            out.append((comma if i else "") + json.dumps(k) + colon)
            _write(v, out, comma, colon)
        out.append("}")
    elif isinstance(value, list) and any(isinstance(v, (list, Raw)) for v in value):
        out.append("[")
        for i, v in enumerate(value):
            out.append(comma if i else "")
            _write(v, out, comma, colon)
        out.append("]")
    else:
        out.append(json.dumps(value, separators=(comma, colon)))


NUMBERS: list[Any] = [
    0, -0.0, 1, -1, 2, 3, 7, 8, 9, 16, 64, 255, 256, 1000, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**48,
    2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**18, 10**30, 10**100, 10**299, 0.5, 1.5, -1.5,
    1e-300, 5e-324, 1e300, 1.7976931348623157e308, 1e-9, 0.1, 1.0, Raw("1e400"), Raw("-1e400"), Raw("NaN"),
    Raw("Infinity"), Raw("-Infinity"), Raw("1" + "0" * 400), Raw("1" + "0" * 5000), Raw("-0"), Raw("1E2"),
    Raw("0x10"), Raw("01"),
]  # fmt: skip
TEXTS = [
    "", " ", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "é", "😀", "x" * 300, "x" * 70_000, "..", "../x", "/etc/passwd",
    "__class__", "__init__", "a.b", "a/b", ".0", ".0/x", "@", "*", "null", "true", "nan", "1", "0" * 64, "f" * 64,
    "%s%n", "${HOME}", "{0}", "\\", '"', "'; --", "re:(a+)+$", "weight", "default", "<script>", "cpu", "meta", "cuda",
    "float16", "float64", "bfloat16", "int8", "torch.float32", "linear", "embedding", "parameter", "conv", "conv1d",
]  # fmt: skip
STRANGE: list[Any] = [None, True, False, *NUMBERS, *TEXTS, [], Pairs(), [[]], [None], [0], Pairs([["a", [1]]]), ["x"]]


def slots(root: Any) -> Iterator[tuple[list, int]]:
    """Yield (list, place) of every value in a tree: place 1 of a [key, value], or that in a list."""
    stack = [root]
    while stack:
        node = stack.pop()
        places = [(pair, 1) for pair in node] if isinstance(node, Pairs) else [(node, i) for i in range(len(node))]
        for holder, at in places:
            yield holder, at
            if isinstance(holder[at], list):
                stack.append(holder[at])


def some(rng: Rng, root: list) -> tuple[list, int]:
    """Return a place in a tree: any, or one to which as many steps lead down as chance takes."""
    if rng.random() < 0.4:
        return rng.one(list(slots(root)))
    node, found = root, None
    while isinstance(node, list) and node and (found is None or rng.random() < 0.8):
        found = (rng.one(node), 1) if isinstance(node, Pairs) else (node, rng.randrange(len(node)))
        node = found[0][found[1]]
    if found is None:
        raise IndexError("nothing in it")
    return found


def objects(root: Any) -> list[Pairs]:
    found = [h[i] for h, i in slots(root) if isinstance(h[i], Pairs) and h[i]]
    return found + ([root] if isinstance(root, Pairs) and root else [])


def number(rng: Rng, root: list) -> None:
    holder, at = rng.one([(h, i) for h, i in slots(root) if type(h[i]) in (int, float)])
    value = holder[at]
    near = [value + 1, value - 1, -value, value * 2, value / 2, float(value), str(value), [value], value * 10**6]
    holder[at] = rng.one(NUMBERS if rng.random() < 0.6 else near)


def value(rng: Rng, root: list) -> None:
    holder, at = some(rng, root)
    holder[at] = rng.one(STRANGE)


def other_type(rng: Rng, root: list) -> None:
    holder, at = some(rng, root)
    v = holder[at]
    if isinstance(v, Pairs):
        holder[at] = rng.one([[x for _, x in v], [list(p) for p in v], str(len(v)), [k for k, _ in v]])
    elif isinstance(v, list):
        holder[at] = rng.one([Pairs([str(i), x] for i, x in enumerate(v)), len(v), v[0] if v else None, [v], str(v)])
    elif isinstance(v, bool) or v is None:
        holder[at] = rng.one([int(bool(v)), str(v).lower(), [v], None, not v])
    elif isinstance(v, str):
        holder[at] = rng.one([[v], list(v[:64]), len(v), Pairs([[v, v]]), None, v.encode().hex()])
    else:
        holder[at] = rng.one([str(v), [v], float(v), int(v), bool(v), None, Pairs([["value", v]])])


def dropped(rng: Rng, root: list) -> None:
    nodes = [h[i] for h, i in slots(root) if isinstance(h[i], list) and h[i]] + [root]
    node = rng.one(nodes)
    del node[rng.randrange(len(node))]


def added(rng: Rng, root: list) -> None:
    nodes = [h[i] for h, i in slots(root) if isinstance(h[i], list)] + [root]
    node = rng.one(nodes)
    entry = rng.one(STRANGE)
    if isinstance(node, Pairs):
        keys = [k for each in objects(root) for k, _ in each]
        entry = [rng.one(TEXTS if rng.random() < 0.5 or not keys else keys), entry]
    node.insert(rng.randrange(len(node) + 1), entry)


def twice(rng: Rng, root: list) -> None:
    """A key that stands twice, with the same value or another."""
    node = rng.one(objects(root))
    k, v = rng.one(node)
    node.insert(rng.randrange(len(node) + 1), [k, v if rng.random() < 0.5 else rng.one(STRANGE)])


def renamed(rng: Rng, root: list) -> None:
    node = rng.one(objects(root))
    pair = rng.one(node)
    k = pair[0]
    pair[0] = rng.one([*TEXTS, k + "x", k[:-1], k.upper(), k + "\u200d", *(p[0] for p in node), *rng.words])


def exchanged(rng: Rng, root: list) -> None:
    """Two values exchanged: any, or those of one name in two objects, as the paths of two sites."""
    (a, i), (b, j) = some(rng, root), some(rng, root)
    if rng.random() < 0.6:
        key = rng.one([k for each in objects(root) for k, _ in each])
        both = [pair for each in objects(root) for pair in each if pair[0] == key]
        (a, i), (b, j) = (rng.one(both), 1), (rng.one(both), 1)
    a[i], b[j] = written_again(b[j]), written_again(a[i])


def written_again(value: Any) -> Any:
    """A copy of a value, so that no value holds itself."""
    return parsed(written(value)) if isinstance(value, list) else value


def moved(rng: Rng, root: list) -> None:
    (a, i), (b, j) = some(rng, root), some(rng, root)
    b[j] = written_again(a[i])


def nested(rng: Rng, root: list) -> None:
    holder, at = some(rng, root)
    deep = rng.one([1, 2, 10, 100, 500, 990, 3000, 20_000])
    left, right = rng.one([("[", "]"), ('{"a":', "}"), ("[[],", "]")])
    holder[at] = Raw(left * deep + written(holder[at]) + right * deep)


def long(rng: Rng, root: list) -> None:
    holder, at = some(rng, root)
    v, count = holder[at], rng.one([2, 10, 100, 1000, 20_000])
    if isinstance(v, Pairs):
        holder[at] = Pairs([*v, *([f"{i}", i] for i in range(count))])
    elif isinstance(v, list):
        holder[at] = (v or [0]) * min(count, 1 + 100_000 // max(1, len(written(v))))
    else:
        holder[at] = (str(v) * count)[:200_000]


def text(rng: Rng, root: list) -> None:
    holder, at = rng.one([(h, i) for h, i in slots(root) if isinstance(h[i], str)])
    v = holder[at]
    where = rng.randrange(len(v) + 1)
    other = rng.one([*TEXTS, *rng.words, v + "x", v[:-1], v.upper(), v[:where] + rng.one(TEXTS) + v[where:],
                     v[:where] + v[where + 1 :]])  # fmt: skip
    holder[at] = other


def word(rng: Rng, root: list) -> None:
    """A text that means something to the reader in the place of another: the name of another method, say."""
    holder, at = rng.one([(h, i) for h, i in slots(root) if isinstance(h[i], str)])
    holder[at] = rng.one(rng.words or TEXTS)


JSON: list[tuple[str, Callable[[Rng, list], None]]] = [
    ("number", number), ("number", number), ("value", value), ("type", other_type), ("entry dropped", dropped),
    ("entry added", added), ("key twice", twice), ("key renamed", renamed), ("values exchanged", exchanged),
    ("value moved", moved), ("nested", nested), ("long", long), ("text", text), ("word", word),
]  # fmt: skip


def in_json(change: Callable[[Rng, list], None]) -> Callable[[Rng, bytes], bytes]:
    def changed(rng: Rng, data: bytes) -> bytes:
        holder = [parsed(data.decode())]
        change(rng, holder[0] if isinstance(holder[0], list) and rng.random() < 0.97 else holder)
        return written(holder[0]).encode("utf-8", "surrogatepass")

    return changed


# -- safetensors -------------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[Pairs, bytes]:
    """Return the header of a file as a tree, and the bytes of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = parsed(data[8 : 8 + length].decode())
    if not isinstance(header, Pairs):
        raise ValueError("no object")
    return header, data[8 + length :]


def joined(header: Any, rest: bytes, raw: bool = False) -> bytes:
    text = _utf8(written(header, compact=True))
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def in_header(change: Callable[[Rng, list], None]) -> Callable[[Rng, bytes], bytes]:
    def changed(rng: Rng, data: bytes) -> bytes:
        header, rest = split(data)
        entries = [p for p in header if p[0] != "__metadata__"]
        change(rng, Pairs(entries) if entries and rng.random() < 0.3 else header)
        return joined(header, rest)

    return changed


def metadata(header: Pairs) -> tuple[list, Any]:
    """Return the entry of the metadata whose value is an object of JSON, and that object."""
    for pair in _get(header, "__metadata__")[1]:
        if isinstance(pair[1], str) and pair[1][:1] == "{":
            return pair, parsed(pair[1])
    raise KeyError("no JSON in the metadata")


def in_metadata(change: Callable[[Rng, list], None]) -> Callable[[Rng, bytes], bytes]:
    """A change of the JSON that stands as text in the header; its first two entries (schema, digest) mostly stay."""

    def changed(rng: Rng, data: bytes) -> bytes:
        header, rest = split(data)
        pair, inner = metadata(header)
        kept = inner[:2] if inner[:1] and inner[0][0] == "schema" and rng.random() < 0.95 else Pairs()
        tree = Pairs(inner[len(kept) :])
        change(rng, tree)
        pair[1] = written(Pairs([*kept, *tree]))
        return joined(header, rest)

    return changed


WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
          "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip


def _tensors(header: Pairs) -> list[list]:
    """Return [key, entry] of all tensors."""
    return [p for p in header if p[0] != "__metadata__" and isinstance(p[1], Pairs)]


def _get(entry: Pairs, key: str) -> list:
    for pair in entry:
        if pair[0] == key:
            return pair
    raise KeyError(key)


def other_dtype(rng: Rng, data: bytes) -> bytes:
    """Another dtype in the same bytes, the shape as that takes it."""
    header, rest = split(data)
    entry = rng.one(_tensors(header))[1]
    dtype, shape = _get(entry, "dtype"), _get(entry, "shape")
    before, dtype[1] = WIDTHS[dtype[1]], rng.one(sorted(WIDTHS))
    after = WIDTHS[dtype[1]]
    if shape[1] and rng.random() < 0.9:
        shape[1][-1] = shape[1][-1] * before // after
    return joined(header, rest)


def other_shape(rng: Rng, data: bytes) -> bytes:
    """Another shape of as many numbers."""
    header, rest = split(data)
    shape = _get(rng.one(_tensors(header))[1], "shape")
    count = 1
    for n in shape[1]:
        count *= n
    halves = [[n, count // n] for n in range(1, min(count, 64) + 1) if count % n == 0]
    shape[1] = rng.one([shape[1][::-1], [count], [*shape[1], 1], [1, *shape[1]], [count, 0], [], *halves])
    return joined(header, rest)


def permuted(rng: Rng, data: bytes) -> bytes:
    """The bytes of two tensors, or their names, exchanged."""
    header, rest = split(data)
    a, b = rng.one(_tensors(header)), rng.one(_tensors(header))
    if rng.random() < 0.5:
        a[0], b[0] = b[0], a[0]
    else:
        key = rng.one(["data_offsets", "shape", "dtype"])
        a, b = _get(a[1], key), _get(b[1], key)
        a[1], b[1] = b[1], a[1]
    return joined(header, rest)


def numbers_in(rng: Rng, data: bytes) -> bytes:
    """Numbers that no training gives, in the bytes of a tensor."""
    header, rest = split(data)
    begin, end = _get(rng.one(_tensors(header))[1], "data_offsets")[1]
    odd = rng.one([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\0\0\x80",
                   b"\xff\xff\xff\xff", b"\0\0\0\0", rng.randbytes(4)])  # fmt: skip
    if rng.random() < 0.5:
        out = (odd * ((end - begin) // 4 + 1))[: end - begin]
        return joined(header, rest[:begin] + out + rest[end:])
    at = begin + 4 * rng.randrange(max(1, (end - begin) // 4))
    return joined(header, rest[:at] + odd + rest[at + 4 :])


def resized(rng: Rng, data: bytes) -> bytes:
    """A tensor that is longer or shorter, everything behind it in its place."""
    header, rest = split(data)
    name, entry = rng.one(_tensors(header))
    begin, end = _get(entry, "data_offsets")[1]
    shape, width = _get(entry, "shape")[1], WIDTHS[_get(entry, "dtype")[1]]
    axis = rng.randrange(len(shape))
    shape[axis] = max(0, rng.one([shape[axis] + 1, shape[axis] - 1, shape[axis] * 2, 0, 1]))
    size = width
    for n in shape:
        size *= n
    for key, other in _tensors(header):
        place = _get(other, "data_offsets")[1]
        if place[0] >= end and key != name:
            place[:] = [p + size - (end - begin) for p in place]
    _get(entry, "data_offsets")[1] = [begin, begin + size]
    return joined(header, rest[:begin] + rng.randbytes(size) + rest[end:])


def without_tensor(rng: Rng, data: bytes) -> bytes:
    header, rest = split(data)
    header.remove(rng.one(_tensors(header)))
    return joined(header, rest)


def length_said(rng: Rng, data: bytes) -> bytes:
    said = int.from_bytes(data[:8], "little")
    other = rng.one([0, 1, said - 1, said + 1, said * 2, 2**31, 2**40, 2**63, 2**64 - 1, len(data), len(data) - 8])
    return max(0, other).to_bytes(8, "little") + data[8:]


TENSORS: list[Kind] = [
    ("tensor: dtype", other_dtype), ("tensor: shape", other_shape), ("tensors permuted", permuted),
    ("tensor: numbers", numbers_in), ("tensor: numbers", numbers_in), ("tensor: size", resized),
    ("tensor left out", without_tensor), ("length of the header", length_said),
]  # fmt: skip


# -- an adapter: changes of header and tensors that agree with each other ----------------------------------------------


def _inner(rng: Rng, data: bytes) -> tuple[Pairs, bytes, list, Pairs]:
    header, rest = split(data)
    pair, inner = metadata(header)
    if not any(k == "sites" for k, _ in inner):
        raise KeyError("no adapter")
    return header, rest, pair, inner


def site_renamed(rng: Rng, data: bytes) -> bytes:
    """A site, and its tensors, under another path: one that is there, or one that is nowhere."""
    header, rest, pair, inner = _inner(rng, data)
    paths = [_get(s, "path") for s in _get(inner, "sites")[1]]
    path = rng.one(paths)
    other = rng.one([*TEXTS, *(p[1] for p in paths), path[1] + ".weight", "layers.0.norm", path[1].upper(), *rng.words])
    for entry in _tensors(header):
        if entry[0].startswith(f"{path[1]}/"):
            entry[0] = other + entry[0][len(path[1]) :]
    path[1] = other
    pair[1] = written(inner)
    return joined(header, rest)


def sites_exchanged(rng: Rng, data: bytes) -> bytes:
    """The tensors of two sites under each other's names."""
    header, rest, _, inner = _inner(rng, data)
    paths = [_get(s, "path")[1] for s in _get(inner, "sites")[1]]
    a, b = rng.one(paths), rng.one(paths)
    for entry in _tensors(header):
        stem, _, name = entry[0].rpartition("/")
        entry[0] = f"{b}/{name}" if stem == a else f"{a}/{name}" if stem == b else entry[0]
    return joined(header, rest)


def site_dropped(rng: Rng, data: bytes) -> bytes:
    """A site left out, with its tensors and their bytes."""
    header, rest, pair, inner = _inner(rng, data)
    sites = _get(inner, "sites")[1]
    site = rng.one(sites)
    sites.remove(site)
    gone = [e for e in _tensors(header) if e[0].startswith(f"{_get(site, 'path')[1]}/")]
    pieces, at = [], 0
    for entry in _tensors(header):
        if entry in gone:
            header.remove(entry)
            continue
        place = _get(entry[1], "data_offsets")[1]
        pieces.append(rest[place[0] : place[1]])
        place[:] = [at, at + len(pieces[-1])]
        at = place[1]
    pair[1] = written(inner)
    return joined(header, b"".join(pieces))


def tensor_renamed(rng: Rng, data: bytes) -> bytes:
    """A tensor under another name, in both headers; or told of as frozen where it was trained."""
    header, rest, pair, inner = _inner(rng, data)
    site = rng.one(_get(inner, "sites")[1])
    path = _get(site, "path")[1]
    here, there = (_get(site, k)[1] for k in rng.one([("trainable", "frozen"), ("frozen", "trainable")]))
    name = here.pop(rng.randrange(len(here)))
    if rng.random() < 0.5:
        there.append(name)
    else:
        other = rng.one([*TEXTS, "A", "B", "value", name + "x", name + "/x", name + ".moments"])
        here.append(other)
        for entry in _tensors(header):
            entry[0] = f"{path}/{other}" if entry[0] == f"{path}/{name}" else entry[0]
    pair[1] = written(inner)
    return joined(header, rest)


def option(rng: Rng, data: bytes) -> bytes:
    """An option of a method, or of heads, with another value of its type or none."""
    header, rest, pair, inner = _inner(rng, data)
    tables = [_get(m, "options")[1] for m in _get(inner, "methods")[1]]
    tables += [v for k, v in inner if k == "head"]
    table = rng.one([t for t in tables if t])
    entry = rng.one(table)
    v = entry[1]
    if type(v) is bool:
        entry[1] = rng.one([not v, None, int(v)])
    elif type(v) in (int, float) or v is None:
        entry[1] = rng.one([*NUMBERS, 4, 5, 6, 10, 32, v and v + 1, v and v * 2, None, True])
    else:
        entry[1] = rng.one([*TEXTS, *rng.words, None, 0])
    pair[1] = written(inner)
    return joined(header, rest)


def other_method(rng: Rng, data: bytes) -> bytes:
    """The name of another method over these tensors, with the options or without."""
    header, rest, pair, inner = _inner(rng, data)
    method = rng.one(_get(inner, "methods")[1])
    _get(method, "name")[1] = rng.one(rng.words or TEXTS)
    if rng.random() < 0.5:
        kept = [p for p in _get(method, "options")[1] if rng.random() < 0.5]
        _get(method, "options")[1] = Pairs(kept)
    pair[1] = written(inner)
    return joined(header, rest)


def extra(rng: Rng, data: bytes) -> bytes:
    """What may stand in a header and mostly does not: labels, a note, pools, options of heads, a step, a form."""
    header, rest, pair, inner = _inner(rng, data)
    key, v = rng.one([
        ("labels", ["a", "b"]), ("labels", ["a", "b", "c", "d"]), ("labels", [str(i) for i in range(20_000)]),
        ("labels", ["a\ud800", "b"]), ("note", Pairs([["by", "me"]])), ("note", Pairs([["long", "x" * 10**6]])),
        ("note", Pairs([["deep", Raw("[" * 900 + "]" * 900)]])), ("pools", [["x"]]), ("pools", []), ("step", 1),
        ("head", Pairs([["bits", 4]])), ("step", 10**299), ("step", 2**63), ("seed", 2**64), ("seed", -1),
        ("basis", True), ("basis", False),
    ])  # fmt: skip
    inner[:] = [p for p in inner if p[0] != key]
    inner.append([key, v])
    pair[1] = written(inner)
    return joined(header, rest)


NAMED: list[Kind] = [
    ("site renamed", site_renamed), ("sites exchanged", sites_exchanged), ("site left out", site_dropped),
    ("tensor renamed", tensor_renamed), ("option", option), ("option", option), ("option", option), ("option", option),
    ("another method", other_method), ("another method", other_method), ("extra", extra), ("extra", extra),
]  # fmt: skip


# -- the digest of an adapter file -------------------------------------------------------------------------------------

BEFORE = b'{"__metadata__":{"addenda":"{\\"schema\\": 2, \\"sha256\\": \\"'  # as the library's own is, said again


def has_digest(data: bytes) -> bool:
    return data[8:].startswith(BEFORE) and len(data) >= 8 + len(BEFORE) + 64


def resealed(data: bytes) -> bytes:
    """The file with the digest of its bytes as they are now."""
    import hashlib

    at = 8 + len(BEFORE)
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    return data[:at] + hashlib.sha256(blank).hexdigest().encode() + data[at + 64 :]


# -- GGUF --------------------------------------------------------------------------------------------------------------


def gguf_places(data: bytes) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Return where the numbers of a GGUF file's head stand, with their format, and where its texts begin and end."""
    numbers, texts, at = [(4, "I"), (8, "Q"), (16, "Q")], [], 24
    tensors, fields = struct.unpack_from("<QQ", data, 8)

    def text(at: int) -> int:
        length = struct.unpack_from("<Q", data, at)[0]
        numbers.append((at, "Q"))
        texts.append((at + 8, at + 8 + length))
        return at + 8 + length

    for _ in range(fields):
        at = text(at)
        kind = struct.unpack_from("<I", data, at)[0]
        numbers.append((at, "I"))
        at += 4
        if kind == 8:
            at = text(at)
        elif kind == 9:
            numbers += [(at, "I"), (at + 4, "Q")]
            raise ValueError("arrays are in none of the sources")
        else:
            width = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind]
            numbers.append((at, {1: "B", 2: "H", 4: "I", 8: "Q"}[width]))
            at += width
    for _ in range(tensors):
        at = text(at)
        dimensions = struct.unpack_from("<I", data, at)[0]
        if dimensions > 4:
            raise ValueError("an earlier change")
        numbers += [(at, "I"), *((at + 4 + 8 * i, "Q") for i in range(dimensions))]
        at += 4 + 8 * dimensions
        numbers += [(at, "I"), (at + 4, "Q")]
        at += 12
    return numbers, texts


def gguf_number(rng: Rng, data: bytes) -> bytes:
    at, kind = rng.one(gguf_places(data)[0])
    size = struct.calcsize(kind)
    old = int.from_bytes(data[at : at + size], "little")
    new = rng.one(
        [0, 1, 2, 3, 8, 9, 30, old + 1, old - 1, old * 2, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, 0x7FC00000]
    )
    return data[:at] + (new % 256**size).to_bytes(size, "little") + data[at + size :]


def gguf_name(rng: Rng, data: bytes) -> bytes:
    """A text of the head exchanged for another, its length as that has it."""
    places = gguf_places(data)[1]
    begin, end = rng.one(places)
    a, b = rng.one(places)
    other = data[a:b] if rng.random() < 0.5 else _utf8(rng.one([*TEXTS, *rng.words]))
    return data[: begin - 8] + len(other).to_bytes(8, "little") + other + data[end:]


# -- lines of YAML -----------------------------------------------------------------------------------------------------

YAML = [
    "&a x", "*a", "!!python/object/apply:os.system ['true']", "!x y", "{a: b}", "[1, [2, [3]]]", "|", ">", "? a", "- b",
    "<<: x", "%YAML 9.9", "---", "...", "\t", "'", '"', "#", ": ", "@", "`", "0o17", "1_000", ".inf", ".nan", "~",
    "yes", "2001-01-01", "1:30:00", "=", "0x10", "1e999", "[" * 2000, "{a: " * 500, "x" * 70_000, "\ufeff", "\x85",
    "\u2028", "\0",
]  # fmt: skip


def line_changed(rng: Rng, data: bytes) -> bytes:
    lines = data.decode().split("\n")
    at = rng.randrange(len(lines))
    key, colon, held = lines[at].partition(": ")
    other = rng.one([*YAML, *TEXTS, *(written(n) for n in NUMBERS)])
    lines[at] = rng.one([f"{key}: {other}", f"{other}: {held}", f"{key}{colon}{other}{held}", f"{other}"])
    return _utf8("\n".join(lines))


def lines_exchanged(rng: Rng, data: bytes) -> bytes:
    lines = data.decode().split("\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    one, two = lines[a].partition(": "), lines[b].partition(": ")
    lines[a], lines[b] = one[0] + one[1] + two[2], two[0] + two[1] + one[2]
    return "\n".join(lines).encode()


def line_twice(rng: Rng, data: bytes) -> bytes:
    lines = data.decode().split("\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.one(["", "  ", "- ", "--"]) + rng.one(lines))
    return "\n".join(lines).encode()


LINES: list[Kind] = [
    ("line", line_changed),
    ("line", line_changed),
    ("lines exchanged", lines_exchanged),
    ("line twice", line_twice),
]

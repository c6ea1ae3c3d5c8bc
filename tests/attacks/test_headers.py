"""Headers that hypothesis makes up: valid ones come back as they were, others are refused or come back."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from addenda.core.base.errors import AddendaError
from addenda.core.file import container
from addenda.core.file.header import BEFORE_DIGEST, FLOATING, HEAD, Header, MethodEntry, SiteEntry, read, write

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "x.safetensors"
RUNS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
_SHOWN = ("L", "N", "P", "S")  # letters, digits, marks: what a name is made of
NAMES = st.text(st.characters(categories=_SHOWN), min_size=1, max_size=12).filter(lambda n: "/" not in n)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)

HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
CHECKS = st.dictionaries(NAMES, HASH | st.tuples(NUMBERS, NUMBERS), max_size=2)


@st.composite
def files(draw) -> tuple[Header, dict[str, torch.Tensor]]:
    """A header with its tensors, as any adapter may have it."""
    methods = draw(st.lists(st.builds(MethodEntry, NAMES, st.dictionaries(NAMES, PLAIN, max_size=4)), max_size=3))
    methods = [replace(m, ignorable=tuple(k for k in m.options if draw(st.booleans()))) for m in methods]
    basis, tensors, sites = draw(st.booleans()), {}, []
    paths = draw(st.lists(NAMES, min_size=max(1, len(methods)), max_size=5, unique=True))
    for i, path in enumerate(paths):
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        head = i >= len(methods)
        method = HEAD if head else i
        names = ["value"] if head else draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
        cut = len(names) if head else draw(st.integers(0, len(names)))
        checks = {} if head else {k: v for k, v in draw(CHECKS).items() if k not in names}
        bare = head and draw(st.booleans())
        for name in [*names, *(checks if basis else ())]:
            size = shape if head else tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
            tensors[f"{path}/{name}"] = torch.ones(size, dtype=draw(st.sampled_from(FLOATING)))
        sites.append(SiteEntry(
            path, draw(NAMES), shape, draw(NAMES), method, tuple(names[:cut]), tuple(names[cut:]),
            draw(st.none() | NAMES), None if bare else draw(NAMES),
            None if bare else tuple(draw(st.lists(NUMBERS, max_size=4))), checks, {},
            draw(st.none() | NAMES.filter(path.__ne__)),
        ))  # fmt: skip
    pools = tuple(tuple(draw(st.lists(NAMES, max_size=2, unique=True))) for _ in range(draw(st.integers(0, 2))))
    tensors |= {f".{i}/{k}": torch.ones(2) for i, names in enumerate(pools) for k in names}
    labels = tuple(draw(st.lists(NAMES, max_size=3, unique=True)))
    note = draw(st.dictionaries(NAMES, PLAIN, max_size=3))
    seed, step = draw(st.integers(-(2**70), 2**70)), draw(st.integers(0, 2**70))
    return Header(2, seed, step, tuple(methods), basis, tuple(sites), pools, {}, labels, note), tensors


@RUNS
@given(files())
def test_a_valid_header_comes_back(file):
    header, tensors = file
    found, kept = read(write(PLACE, header, tensors))
    assert found == header and found.sha256
    assert found.to_json() == json.loads(json.dumps(header.to_json()))  # what equality leaves out too
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(t, kept[k]) and t.dtype == kept[k].dtype for k, t in tensors.items())
    assert write(PLACE.with_name("again"), found, kept).read_bytes() == PLACE.read_bytes()


@RUNS
@given(files(), st.data())
def test_one_beside_it_is_refused_or_comes_back(file, data):
    """Any value of the header is another, with a digest that is right."""
    header, tensors = file
    raw = header.to_json()
    node, trail = raw, []
    while isinstance(node, dict | list) and node and (not trail or data.draw(st.booleans())):
        keys = [k for k in node if k not in ("schema", "sha256")] if isinstance(node, dict) else range(len(node))
        trail.append(data.draw(st.sampled_from(list(keys))))
        node = node[trail[-1]]
    holder = raw
    for key in trail[:-1]:
        holder = holder[key]
    holder[trail[-1]] = data.draw(PLAIN)
    container.write(PLACE, {"addenda": json.dumps(raw)}, tensors, BEFORE_DIGEST)
    try:
        found, kept = read(PLACE)
    except AddendaError as error:
        refusal = str(error).encode()
        assert 0 < len(refusal) < 5000
        return
    known = {k: v for k, v in raw.items() if v or k not in ("labels", "note", "head")}
    assert json.dumps(found.to_json(), sort_keys=True) == json.dumps(_plain(known), sort_keys=True)
    assert write(PLACE, found, kept).is_file()


def _plain(raw: dict) -> dict:
    """A header without what stands for nothing in it: no shapes of codes."""
    sites = [{k: v for k, v in s.items() if v or k != "packed"} for s in raw["sites"]]
    return raw | {"sites": sites}


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\uDFFF"', '{"\\udc00": 1}', '["a", {"b": "x\\ud83d"}]'])
def test_half_a_character_is_no_json(text):
    """What no program can print, compare or save again."""
    from addenda.core.disk.access import parse_json

    with pytest.raises(ValueError, match="surrogates not allowed"):
        parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "😀"

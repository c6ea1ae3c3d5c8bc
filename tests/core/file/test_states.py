"""States without pickles: what comes back is what was written, to the last bit; anything else is refused."""

import json
import math
import os
import random
from collections import OrderedDict, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from addenda.core.base.errors import AddendaError
from addenda.core.file.states import keep, kept, read_state, write_state

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.integers() | st.text() | st.floats(allow_nan=False) | st.tuples(st.integers(), st.text())
STATES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4).map(lambda d: {repr(type(k)) + str(k): v for k, v in d.items()} | d)
    ),
    max_leaves=12,
)


def alike(a, b) -> bool:
    """Equal in type and to the last bit, however deep."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(alike(k, m) and alike(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b) if a == a else b != b
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return same and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    return a == b


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_what_is_written_is_read(tmp_path_factory, state):
    file = tmp_path_factory.mktemp("state") / "x.safetensors"
    write_state(file, state)
    assert alike(read_state(file), state)


def test_tensors_keep_dtype_shape_and_order_in_memory(tmp_path):
    file = tmp_path / "x.safetensors"
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
    state = {
        i: torch.randn(3, 4, 5).mul(50).abs().to(kind).permute(order)
        for i, (kind, order) in enumerate((k, o) for k in kinds for o in ((0, 1, 2), (2, 0, 1), (1, 0, 2)))
    }
    state |= {"scalar": torch.tensor(float("nan")), "none": torch.empty(0, 3), "bool": torch.tensor([True, False])}
    write_state(file, state)
    assert alike(read_state(file), state)
    twice = torch.randn(4)
    write_state(file, [twice, twice, twice[1:]])
    assert [t.tolist() for t in read_state(file)] == [twice.tolist(), twice.tolist(), twice[1:].tolist()]


def test_types_of_libraries_come_back_as_what_they_are(tmp_path):
    file = tmp_path / "x.safetensors"
    write_state(file, OrderedDict(a=defaultdict(list, b=[1]), r=random.getstate()))
    assert alike(read_state(file), {"a": {"b": [1]}, "r": random.getstate()})
    for value, says in [
        ({"a": [object()]}, "holds object at a.0"),
        ({"a": {frozenset(): 1}}, "holds a key of type frozenset at a"),
        (torch.ones(2).to_sparse(), "holds a Tensor of torch.float32 at its top"),
    ]:
        with pytest.raises(AddendaError, match=f"state of x {says}, which no checkpoint can hold"):
            write_state(tmp_path / "y", value, "state of x")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    "text",
    [
        '{"dict": [[1, 2], [1, 3]]}',
        '{"dict": [[1, 2]], "dict": []}',
        '{"dict": [[1]]}',
        '{"dict": [[[], 1]]}',
        '{"float": "1"}',
        '{"float": "inf", "more": 1}',
        '{"tuple": 1}',
        '{"tensor": "b"}',
        '{"tensor": "a", "order": [0, 0]}',
        '{"tensor": "a", "order": [[]]}',
        '{"dict": [[{"tensor": "a"}, 1]]}',
        '{"other": 1}',
        "{}",
        "NaN",
        "1e999",
        "[" * 500 + "]" * 500,
        "[" * 100_000,
        "1" * 20_000,
        "[1",
        "1",  # and a tensor that nothing names
    ],
    ids=lambda text: text[:24],
)
def test_what_was_not_written_here_is_refused(tmp_path, text):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 2)}, file, {"state": text})
    with pytest.raises(AddendaError, match=r"x\.safetensors is damaged, or no state"):
        read_state(file)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(AddendaError, match="cannot be read"):
        read_state(file)
    for data in (b"", b"\x80\x04K\x01.", json.dumps({}).encode()):
        file.write_bytes(data)
        with pytest.raises(AddendaError, match="is damaged"):
            read_state(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(AddendaError, match="without the entry 'state'"):
        read_state(file)
    save_file({"a": torch.ones(1, dtype=torch.complex64)}, file, {"state": '{"tensor": "a"}'})
    with pytest.raises(AddendaError, match=r"a tensor of torch\.complex64"):  # as one that is never written
        read_state(file)


DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]


@pytest.mark.parametrize("value", [10**400, "\ud800", [0] * (1 << 19), DEEP], ids=["digits", "half", "values", "deep"])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(AddendaError, match=r"The state of x could not be read again .*, so it is not written"):
        write_state(tmp_path / "x.safetensors", {"a": value}, "state of x")
    assert not any(tmp_path.iterdir())


def test_a_state_that_is_kept_is_given_back_while_it_is_sound_and_removed_when_it_is_not(tmp_path):
    file = tmp_path / "of" / "it.safetensors"
    assert kept(file, lambda state: True) is None
    keep(file, {"x": 1})
    os.utime(file, (1, 1))
    assert kept(file, lambda state: state["x"] == 1) == {"x": 1}
    assert file.stat().st_mtime > 1  # it was used
    assert kept(file, lambda state: state["y"]) is None and not file.exists()
    file.write_bytes(b"damaged")
    assert kept(file, lambda state: True) is None and not file.exists()
    (tmp_path / "taken").touch()
    keep(tmp_path / "taken" / "it.safetensors", {"x": 1})  # nothing is kept, nothing said
    assert (tmp_path / "taken").read_bytes() == b""

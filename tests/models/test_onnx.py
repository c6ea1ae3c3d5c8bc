"""Reading ONNX, against files whose bytes are put together here by the rules of Protocol Buffers."""

import struct

import numpy as np
import pytest

from addenda.models import onnx


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    """A text or message, or a whole number."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, values, how="raw"):
    dims = b"".join(field(1, n) for n in values.shape)
    if how == "packed":
        dims = field(1, b"".join(map(varint, values.shape)))
    data = values.astype("<f4").tobytes()
    return dims + field(2, 1) + field(8, name) + field(9 if how == "raw" else 4, data)


def node(kind, inputs, outputs, constant=None):
    made = b"".join(field(1, i) for i in inputs) + b"".join(field(2, o) for o in outputs) + field(4, kind)
    return made if constant is None else made + field(5, field(1, "value") + field(5, tensor("", constant)))


def model(nodes, tensors):
    graph = b"".join(field(1, n) for n in nodes) + field(2, "g") + b"".join(field(5, t) for t in tensors)
    fixed = varint(3 << 3 | 5) + struct.pack("<f", 1.5) + varint(4 << 3 | 1) + struct.pack("<d", 2.5)
    return field(1, 8) + field(2, "made here") + fixed + field(7, graph)


@pytest.mark.parametrize("how", ["raw", "packed"])
def test_nodes_and_tensors_come_back(tmp_path, how):
    values = {"w": np.random.default_rng(0).normal(size=(300, 2, 3)), "b": np.arange(4.0), "one": np.array(7.0)}
    longs = field(1, 2) + field(2, 7) + field(8, "longs") + field(9, bytes(16))
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Constant", [], ["c"], np.ones((1, 5)))]
    file = tmp_path / "m.onnx"
    file.write_bytes(model(nodes, [*(tensor(k, v, how) for k, v in values.items()), longs]))
    read, constants = onnx.read(file)
    assert [(n.kind, n.inputs, n.outputs) for n in read] == [("MatMul", ("x", "w"), ("y",)), ("Constant", (), ("c",))]
    assert read[1].tensors[0].tolist() == [[1.0] * 5]
    assert set(constants) == set(values)  # other types than float32 are left out
    for name, wanted in values.items():
        assert np.array_equal(constants[name], wanted.astype(np.float32))


def test_what_is_no_onnx_file(tmp_path):
    file = tmp_path / "m.onnx"
    whole = model([node("Relu", ["x"], ["y"])], [tensor("w", np.ones(3))])
    for content, says in [
        (b"", "0 graphs"),
        (whole[:-3], "a field of"),
        (b"\xff" * 20, "a number that does not end"),
        (bytes([7 << 3 | 3]), "wire type 3"),
        (whole + field(7, b""), "2 graphs"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            onnx.read(file)

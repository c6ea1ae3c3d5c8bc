"""The one file: what is read is what was saved, of these encoders, to the bit, or an error."""

import pytest
import torch

from addenda import AddendaError
from addenda.core.file.states import write_state
from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.file import Made, Scale, check_towers, load_order, save_order
from addenda.ranking.order.settings import OrderSettings

SMALL = OrderSettings(width=16, heads=2, layers=1, after=0, prompts=2, tokens=2, ratio=1)
TOWERS = {"image": "a", "text": "b", "tokenizer": "c", "preparation": {"resize": [16, 16]}, "grid": 10, "filled": False}


def saved(path, **more):
    adapter = OrderAdapter(SMALL, 8, 6, seed=3)
    made = Made(SMALL, (8, 6), TOWERS, {'how many "red" ü': Scale(2.5, 0.5)}, {"steps": 3} | more)
    return adapter, made, save_order(path / "order.safetensors", adapter, made)


def test_what_is_read_is_what_was_saved(tmp_path):
    adapter, made, path = saved(tmp_path)
    found, about = load_order(path)
    assert about == made
    assert all(torch.equal(t, found.state_dict()[n]) for n, t in adapter.state_dict().items())
    assert not found.training
    with path.open("rb") as f:
        assert path.stat().st_size == len(f.read())


def test_one_flipped_bit_anywhere_is_an_error(tmp_path):
    _, _, path = saved(tmp_path)
    data = path.read_bytes()
    places = [*range(0, 600, 7), *range(600, len(data), max(1, len(data) // 60)), len(data) - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "changed.safetensors").write_bytes(changed)
        with pytest.raises(AddendaError):
            load_order(tmp_path / "changed.safetensors")
    (tmp_path / "changed.safetensors").write_bytes(data[:-1])
    with pytest.raises(AddendaError):
        load_order(tmp_path / "changed.safetensors")


def test_other_files_and_other_encoders_are_refused(tmp_path):
    _, made, path = saved(tmp_path)
    write_state(tmp_path / "state.safetensors", {"x": torch.zeros(2)})
    for other in (tmp_path / "state.safetensors", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(AddendaError):
            load_order(other)
    with pytest.raises(AddendaError, match="the text encoder differs"):
        check_towers(made, TOWERS | {"text": "x"}, path)
    with pytest.raises(AddendaError, match="how images are prepared differs"):
        check_towers(made, TOWERS | {"preparation": {}}, path)
    check_towers(made, TOWERS, path)
    with pytest.raises(AddendaError):
        save_order(tmp_path / "state.safetensors", OrderAdapter(SMALL, 8, 6), made)  # not ours to write over


def test_values_that_are_not_finite_are_never_saved(tmp_path):
    adapter = OrderAdapter(SMALL, 8, 6)
    adapter.from_text.bias.data[0] = float("nan")
    with pytest.raises(AddendaError, match="not finite"):
        save_order(tmp_path / "order.safetensors", adapter, Made(SMALL, (8, 6), TOWERS, {}))
    assert not list(tmp_path.iterdir())

"""JSON files that prove themselves: what was written comes back, and what is read is what was proven."""

import pytest

from addenda.core.base.errors import AddendaError
from addenda.core.disk import access
from addenda.core.file import sealed
from addenda.core.file.sealed import read_sealed, write_sealed


def test_it_comes_back_and_no_byte_of_it_can_change(tmp_path):
    file = tmp_path / "x.json"
    write_sealed(file, {"step": 8, "name": "é"})
    assert read_sealed(file) == {"step": 8, "name": "é"}
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(AddendaError, match=r"does not begin with a digest|is damaged, or was changed"):
            read_sealed(file)


def test_the_bytes_that_are_used_are_those_that_were_proven(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_sealed(file, {"step": 8})

    def proven(text: bytes) -> bytes:
        file.write_bytes(b'{"step": 9}')  # by somebody else, in that very moment
        return digest(text)

    digest = sealed._digest
    monkeypatch.setattr(sealed, "_digest", proven)
    assert read_sealed(file) == {"step": 8}


def test_a_file_that_is_too_long_is_not_read_whole(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    monkeypatch.setattr(sealed, "MOST", 200)
    monkeypatch.setattr(access, "MOST", 200)
    write_sealed(file, {"long": "x" * 10_000})
    with pytest.raises(AddendaError, match="is damaged, or was changed"):
        read_sealed(file)

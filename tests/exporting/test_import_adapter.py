"""Importing another program's adapter: what it may be put on."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError
from gguf_base import make
from shared import stir

FILES = ["peft", "gguf", "kohya"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    adapter = stir(ad.attach(make("llama"), ad.LoRA(rank=2), targets=["*.q_proj", "*.up_proj"]))
    for door in FILES:
        ad.export(adapter, door, folder / door, **({"part": "lycoris"} if door == "kohya" else {}))
    return folder


@pytest.mark.parametrize("door", FILES)
def test_a_model_in_a_wrapper_takes_what_the_model_takes(door, folder):
    bare, inner = make("llama"), make("llama")
    first, second = (ad.import_adapter(m, folder / door) for m in (bare, nn.DataParallel(inner)))
    assert first.methods == second.methods
    ids = torch.arange(6)[None]
    assert torch.equal(bare(ids).logits, inner(ids).logits)


@pytest.mark.parametrize("door", FILES)
def test_what_cannot_be_attached_to_is_said_before_the_file_is_read(door, folder):
    with pytest.raises(AddendaError, match=r"wrapped in OptimizedModule.*Attach first, then wrap"):
        ad.import_adapter(torch.compile(make("llama")), folder / door)
    with pytest.raises(AddendaError, match=r"Expected a torch.nn.Module as the model, got PosixPath"):
        ad.import_adapter(folder / door, make("llama"))

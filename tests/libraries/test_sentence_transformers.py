"""sentence-transformers with an adapted encoder: encoding, saving, loading."""

import copy

import pytest
import torch
from transformers import BertModel

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.core.modules.ours import is_ours
from shared import stir

theirs = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed here")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TEXTS = ["a+b", "what is 3+4?", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder: a small BERT, its tokenizer, mean pooling and a dense layer behind it."""
    base = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(tiny_models.config(tiny_models.BertConfig)).save_pretrained(base)
    tokenizer = tiny_models.make_tokenizer(None)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(base)
    modules = theirs.sentence_transformer.modules
    encoder = modules.Transformer(str(base))
    dense = modules.Dense(32, 16, activation_function=torch.nn.Tanh())
    model = theirs.SentenceTransformer(modules=[encoder, modules.Pooling(32), dense], device="cpu")
    place = tmp_path_factory.mktemp("sentences") / "model"
    model.save(str(place))
    return place


def load(place):
    return theirs.SentenceTransformer(str(place), device="cpu").eval()


def encode(model):
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False, batch_size=2)


@pytest.fixture(params=["whole", "encoder"])
def adapted(request, folder):
    """A model and its adapter, on all of it or on transformers' model in it; what it encoded before."""
    model = load(folder)
    before = encode(model)
    part = model if request.param == "whole" else next(m for m in model.modules() if isinstance(m, BertModel))
    adapter = stir(ad.attach(part, "lora:rank=4"), 0.3)
    return model, adapter, before


def test_encode_switch_and_detach(adapted):
    model, adapter, before = adapted
    live = encode(model)
    assert (live - before).abs().max() > 1e-2
    assert torch.equal(encode(model), live)
    with ad.disabled(adapter.model):
        assert torch.equal(encode(model), before)
    ad.detach(adapter.model)
    assert torch.equal(encode(model), before)


@pytest.mark.parametrize("name", ["save", "save_pretrained"])
def test_a_folder_comes_back_as_the_model_acts(adapted, name, tmp_path):
    model, adapter, _ = adapted
    live = encode(model)
    with pytest.raises(AddendaError, match=r"acts on this model.*addenda\.merge"):
        getattr(model, name)(str(tmp_path / "no"))
    assert not [*tmp_path.rglob("*.safetensors")]
    features = model.tokenize(TEXTS) if adapter.model is model else None
    ad.merge(adapter.model, verify=None if features is None else lambda m: m(dict(features))["sentence_embedding"])
    getattr(model, name)(str(tmp_path / "merged"))
    back = load(tmp_path / "merged")
    assert not any(map(is_ours, back.state_dict()))
    torch.testing.assert_close(encode(back), live, rtol=0, atol=1e-5)


def test_our_own_file_brings_it_back(adapted, folder, tmp_path):
    model, adapter, before = adapted
    live = encode(model)
    adapter.save(tmp_path / "adapter.safetensors")
    again = load(folder)
    part = again if adapter.model is model else next(m for m in again.modules() if isinstance(m, BertModel))
    assert torch.equal(encode(again), before)
    ad.load(part, tmp_path / "adapter.safetensors")
    assert torch.equal(encode(again), live)


def test_a_copy_encodes_alike(adapted):
    model, _, _ = adapted
    assert torch.equal(encode(copy.deepcopy(model)), encode(model))


def test_it_learns_to_tell_texts_apart(folder):
    model = load(folder)
    adapter = ad.attach(model, "lora:rank=4")
    features = {k: v for k, v in model.tokenize(TEXTS).items()}
    optimizer, losses = torch.optim.Adam(adapter.parameters(), 1e-2), []
    model.train()
    for _ in range(5):
        made = torch.nn.functional.normalize(model(dict(features))["sentence_embedding"], dim=-1)
        loss = (made @ made.T - torch.eye(3)).square().mean()
        loss.backward()
        optimizer.step()
        adapter.step(dead="warn")
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

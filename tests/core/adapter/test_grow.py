"""A grown vocabulary: trained, saved, loaded on the base as it was, and taken off it again."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import addenda as ad
import tiny_models
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.state.vocabulary import grown_of
from marks import differences, snapshot
from shared import bits, same_bits, stir, train

SIZE = 76  # of the tokenizer's vocabulary
NEW = ["<call>", "</call>"]
IDS = torch.tensor([[5, 76, 7, 77, 9, 76], [8, 77, 77, 6, 4, 5]])


def llama(tied: bool = True) -> nn.Module:
    return toys.make_llama(vocab_size=SIZE, tie_word_embeddings=tied)


def untied() -> nn.Module:
    return llama(False)


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=SIZE, max_position_embeddings=16, **sizes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, **sizes)).eval()


ROWS = f"trainable-tokens:tokens={SIZE}-{SIZE + 1}"
CASES = {  # each base, how its new rows are trained, and its tables
    "tied": (llama, {"linear": "lora:rank=2", "model.embed_tokens.weight": ROWS}, (), 1),
    "untied": (untied, {"linear": "lora:rank=2", "model.embed_tokens": ROWS, "lm_head": ROWS}, (), 2),
    "whole": (untied, {"*.q_proj": "lora:rank=2"}, ("embed_tokens", "lm_head"), 2),
    "bert": (bert, {"*.query": "lora:rank=2", "bert.embeddings.word_embeddings.weight": ROWS}, (), 2),
    "gpt2": (gpt2, {"*.c_attn": "lora:rank=2", "transformer.wte.weight": ROWS}, (), 1),
}


def trained(case: str, file: Path) -> tuple[Tensor, nn.Module]:
    make, methods, also_train, tables = CASES[case]
    model, tokenizer = make(), tiny_models.make_tokenizer()
    grown = ad.grow(model, tokenizer, NEW)
    assert (grown.base_rows, grown.rows, len(grown.tables)) == (SIZE, 2, tables)
    adapter = ad.attach(model, methods, also_train=also_train)
    train(model, adapter, IDS, torch.optim.Adam(adapter.parameters(), lr=0.05), 3)
    adapter.save(file)
    model.eval()
    return model(IDS).logits.detach(), model


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_acts_on_the_base_as_it_was_and_goes_again(case, tmp_path):
    y, _ = trained(case, tmp_path / "a.safetensors")
    model = CASES[case][0]()
    before, told = bits(model), snapshot(model)
    tied = is_tied(model)
    adapter = ad.load(model, tmp_path / "a.safetensors", tokenizer=_grown_tokenizer())
    assert torch.equal(model(IDS).logits, y)
    assert is_tied(model) == tied
    assert adapter.vocabulary is not None and dict(adapter.vocabulary.tokens) == {"<call>": 76, "</call>": 77}
    adapter.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    ad.switch(model, None)
    own = {n: t[:SIZE] if len(t) == SIZE + 2 else t for n, t in bits(model).items()}
    assert same_bits({n: t for n, t in own.items() if "addenda" not in n}, before)
    ad.detach(model)
    assert same_bits(bits(model), before)
    assert differences(told, snapshot(model)) == []
    assert model.get_input_embeddings().weight.untyped_storage().nbytes() == before_bytes(model)


def is_tied(model: nn.Module) -> bool:
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embed._parameters["weight"] is head._parameters["weight"]


def before_bytes(model: nn.Module) -> int:
    weight = model.get_input_embeddings().weight
    return weight.numel() * weight.element_size()


def _grown_tokenizer():
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.add_tokens(NEW)
    return tokenizer


@pytest.mark.slow  # what it imports
def test_a_fresh_process_gives_the_same_outputs(tmp_path):
    outputs = {case: trained(case, tmp_path / f"{case}.safetensors")[0] for case in ("tied", "bert", "gpt2")}
    code = (
        "import sys, torch, addenda as ad\n"
        "from tests.core.adapter.test_grow import CASES, IDS\n"
        "torch.set_num_threads(1)\n"
        "for case in sys.argv[2:]:\n"
        "    model = CASES[case][0]()\n"
        "    ad.load(model, f'{sys.argv[1]}/{case}.safetensors')\n"
        "    torch.save(model(IDS).logits.detach(), f'{sys.argv[1]}/{case}.pt')\n"
    )
    tests = Path(__file__).parents[2]
    path = [str(tests), str(tests.parent), str(tests.parent / "src")]
    code = f"import sys; sys.path[:0] = {path}\n{code}"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *outputs], check=True)
    for case, y in outputs.items():
        assert torch.equal(torch.load(tmp_path / f"{case}.pt"), y)


def test_base_rows_keep_their_bits_and_new_rows_start_alike_everywhere():
    one, other = llama(), llama()
    before = bits(one)["model.embed_tokens.weight"]
    ad.grow(one, tiny_models.make_tokenizer(), NEW, start="mean", noise=0.1, seed=3)
    torch.randn(5)
    ad.grow(other, tiny_models.make_tokenizer(), NEW, start="mean", noise=0.1, seed=3)
    rows = one.get_input_embeddings().weight
    assert torch.equal(rows[:SIZE], before)
    assert torch.equal(rows, other.get_input_embeddings().weight)
    spread = 0.1 * before.square().mean().sqrt()
    assert ((rows[SIZE:] - before.mean(0)).std() / spread - 1).abs() < 0.5
    assert not torch.equal(rows[SIZE], rows[SIZE + 1])


def test_new_rows_start_as_the_mean_of_the_pieces_of_their_text():
    model, tokenizer = untied(), tiny_models.make_tokenizer()
    known = tokenizer.get_vocab()
    ad.grow(model, tokenizer, ["ab+", "«»"])
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert torch.allclose(table[SIZE], table[[known["a"], known["b"], known["+"]]].mean(0))
        assert torch.allclose(table[SIZE + 1], table[:SIZE].mean(0), atol=1e-6)  # no piece of it is known


def test_growing_again_changes_nothing_and_growing_more_goes_on():
    model, tokenizer = llama(), tiny_models.make_tokenizer()
    first = ad.grow(model, tokenizer, NEW)
    before, told = bits(model), snapshot(model)
    assert ad.grow(model, tokenizer, NEW) == first
    assert same_bits(bits(model), before)
    assert differences(told, snapshot(model)) == []
    more = ad.grow(model, tokenizer, ["<more>"])
    assert (more.base_rows, more.rows, more.new_rows) == (SIZE, 3, "76-78")
    assert torch.equal(bits(model)["model.embed_tokens.weight"][: SIZE + 2], before["model.embed_tokens.weight"])
    ad.shrink(model)
    assert same_bits(bits(model), bits(llama()))
    assert model.config.vocab_size == SIZE
    with pytest.raises(AddendaError, match="no new rows"):
        ad.shrink(model)


def test_a_saved_tokenizer_and_the_base_grow_to_the_same_rows(tmp_path):
    one, other, tokenizer = llama(), llama(), tiny_models.make_tokenizer()
    ad.grow(one, tokenizer, NEW)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    v = ad.grow(other, again, NEW)
    assert v == grown_of(one).vocabulary
    assert same_bits(bits(one), bits(other))


def test_a_padded_table_is_left_as_it_is_and_its_tokens_are_in_the_file(tmp_path):
    model, tokenizer = toys.make_llama(vocab_size=80), tiny_models.make_tokenizer()
    v = ad.grow(model, tokenizer, NEW)
    assert (v.rows, v.tables, v.new_rows) == (0, (), "76-77")
    file = stir(ad.attach(model, {"model.embed_tokens.weight": ROWS})).save(tmp_path / "a.safetensors")
    y = model(IDS).logits
    fresh = toys.make_llama(vocab_size=80)
    ad.load(fresh, file, tokenizer=tokenizer)
    assert torch.equal(fresh(IDS).logits, y)
    ad.detach(fresh)
    assert grown_of(fresh) is None
    with pytest.raises(AddendaError, match="there is none here"):
        ad.load(fresh, file, tokenizer=tiny_models.make_tokenizer())


def refused(model: nn.Module, file: Path, pattern: str, **options) -> None:
    before, told = bits(model), snapshot(model)
    with pytest.raises(AddendaError, match=pattern):
        ad.load(model, file, **options)
    assert same_bits(bits(model), before)
    assert differences(told, snapshot(model)) == []


def test_what_does_not_fit_is_refused_and_nothing_has_changed(tmp_path):
    file = tmp_path / "a.safetensors"
    trained("tied", file)
    refused(toys.make_llama(vocab_size=75), file, r"wants 76 rows.*the model has \[75, 8\]")
    refused(llama(), file, "another tokenizer: it has 76 tokens", tokenizer=tiny_models.make_tokenizer())
    refused(gpt2(), file, r"the model has no model\.embed_tokens\.weight")
    other = llama()
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1
    refused(other, file, "trained on other base weights")  # found after the table had grown
    ours = llama()
    ad.attach(ours, {"model.embed_tokens.weight": "lora:rank=2"}, name="mine")
    refused(ours, file, "'mine' is on a table that would grow", name="other")
    otherwise = llama()
    ad.grow(otherwise, tiny_models.make_tokenizer(), ["<else>", "</call>"])
    refused(otherwise, file, "grown otherwise: '<call>' is number 76 there, and no new token here")
    quantised = llama().to(torch.bfloat16)
    embed = quantised.get_input_embeddings()
    embed._parameters["weight"] = nn.Parameter(embed.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(AddendaError, match="no row can be put behind a quantised table"):
        ad.load(quantised, file)


@pytest.mark.parametrize("where", ["match", "check_base", "install"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_load_that_is_interrupted_leaves_the_tables_as_they_were(where, error, tmp_path, monkeypatch):
    trained("untied", tmp_path / "a.safetensors")
    model = untied()
    before, told = bits(model), snapshot(model)

    def fail(*args, **options):
        assert len(model.get_input_embeddings().weight) == SIZE + 2
        raise error

    monkeypatch.setattr(f"addenda.core.adapter.load.{where}", fail)
    with pytest.raises(error):
        ad.load(model, tmp_path / "a.safetensors")
    assert same_bits(bits(model), before)
    assert differences(told, snapshot(model)) == []


def test_a_model_that_has_grown_by_the_same_tokens_takes_the_file_and_stays_grown(tmp_path):
    y, source = trained("tied", tmp_path / "a.safetensors")
    ad.detach(source)
    assert len(source.get_input_embeddings().weight) == SIZE + 2
    ad.load(source, tmp_path / "a.safetensors")
    assert torch.equal(source(IDS).logits, y)
    ad.detach(source)
    assert len(source.get_input_embeddings().weight) == SIZE + 2
    ad.shrink(source)
    assert same_bits(bits(source), bits(llama()))


def test_a_table_that_somebody_has_resized_takes_the_files_rows_and_gets_its_own_back(tmp_path):
    y, _ = trained("tied", tmp_path / "a.safetensors")
    model = llama()
    model.resize_token_embeddings(SIZE + 2, mean_resizing=False)
    before, told = bits(model), snapshot(model)
    ad.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(IDS).logits, y)
    ad.detach(model)
    assert same_bits(bits(model), before)
    assert differences(told, snapshot(model)) == []


def test_new_rows_go_with_the_last_adapter_that_has_them(tmp_path):
    trained("tied", tmp_path / "a.safetensors")
    model = llama()
    plain = stir(ad.attach(model, "lora:rank=2", targets="*.q_proj", name="plain"))
    file = plain.save(tmp_path / "plain.safetensors").read_bytes()
    for name in ("one", "two"):
        ad.load(model, tmp_path / "a.safetensors", name=name)
    assert plain.save(tmp_path / "again.safetensors").read_bytes() == file  # it knows nothing of the rows
    assert plain.vocabulary is None
    ad.detach(model, "one")
    assert len(model.get_input_embeddings().weight) == SIZE + 2
    ad.detach(model, "two")
    assert len(model.get_input_embeddings().weight) == SIZE
    assert plain.save(tmp_path / "again.safetensors").read_bytes() == file
    ad.detach(model)
    assert same_bits(bits(model), bits(llama()))
    assert all(p.requires_grad for p in model.parameters())


def test_copies_pickles_and_other_dtypes_of_a_grown_model(tmp_path):
    y, _ = trained("untied", tmp_path / "a.safetensors")
    model = untied()
    ad.load(model, tmp_path / "a.safetensors")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, y)
        ad.detach(other)
        assert same_bits(bits(other), bits(untied()))
    model.double()
    ad.detach(model)
    assert same_bits(bits(model), bits(untied().double()))
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_merging_with_new_rows_and_keeping_them(tmp_path):
    trained("untied", tmp_path / "a.safetensors")
    model = untied()
    adapter = ad.load(model, tmp_path / "a.safetensors")
    y = model(IDS).logits
    ad.merge(model)
    assert (model(IDS).logits - y).norm() < 1e-4 * y.norm()
    adapter.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    ad.detach(model, keep_merged=True)
    assert (model(IDS).logits - y).norm() < 1e-4 * y.norm()
    assert model.config.vocab_size == SIZE + 2


def test_a_resized_table_that_nobody_told_of_is_refused_before_it_is_trained(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(SIZE + 2)
    tokenizer = _grown_tokenizer()
    with pytest.raises(AddendaError, match=r"has 78 tokens, and the model that it was loaded from 76.*base_rows=76"):
        ad.attach(model, "lora:rank=2")
    before = bits(model)
    v = ad.grow(model, tokenizer, base_rows=SIZE)
    assert same_bits(bits(model), before)
    assert (v.rows, dict(v.tokens)) == (2, {"<call>": 76, "</call>": 77})
    file = stir(ad.attach(model, "lora:rank=2")).save(tmp_path / "a.safetensors")
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    ad.load(fresh, file, tokenizer=tokenizer)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_what_cannot_be_grown_is_said_with_tokenizer_and_model_as_they_were():
    tokenizer = tiny_models.make_tokenizer()
    size = len(tokenizer)
    model = llama()
    ad.attach(model, "lora:rank=2")
    wrong = [
        (model, {}, "Adapters are attached"),
        (toys.make_vit(), {}, "does not say where its table of tokens is"),
        (nn.Linear(2, 2), {}, "does not say where its table of tokens is"),
        (llama().to("meta"), {}, "not in memory"),
        (nn.DataParallel(llama()), {}, "wrapped in DataParallel"),
        (llama(), {"base_rows": 77}, "base_rows=77"),
        (llama(), {"start": "random"}, "start must be"),
        (llama(), {"tokens": "<a>"}, "a list of texts"),
        (llama(), {"tokens": [""]}, "a list of texts"),
        (llama(), {"tokenizer": None}, "none is given"),
        (llama(), {"noise": -1.0}, "noise must be"),
    ]
    for given, options, pattern in wrong:
        with pytest.raises(AddendaError, match=pattern):
            ad.grow(given, **({"tokenizer": tokenizer, "tokens": NEW} | options))
    assert len(tokenizer) == size
    assert "<call>" not in json.dumps(tokenizer.get_vocab())


class Around(nn.Module):
    """A model whose tables have other names: everything of a LLaMA below "inner"."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, ids: Tensor):
        return self.inner(ids)


def test_tables_are_renamed_with_the_sites(tmp_path):
    y, _ = trained("tied", tmp_path / "a.safetensors")
    model = Around()
    before, told = bits(model), snapshot(model)
    with pytest.raises(AddendaError, match=r'With rename=\{"\*": "inner\.\*"\} it has 15 of them'):
        ad.load(model, tmp_path / "a.safetensors")
    ad.load(model, tmp_path / "a.safetensors", rename={"*": "inner.*"})
    assert torch.equal(model(IDS).logits, y)
    ad.detach(model)
    assert same_bits(bits(model), before)
    assert differences(told, snapshot(model)) == []

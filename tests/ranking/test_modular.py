"""A task over language parts: what acts where, against compositions written out; files, tokenizers, and other parts."""

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.core.file.trained_on import content_hash
from addenda.ranking.modular import composition_for, modular, pairs_by
from shared import bits as bits_of
from shared import same_bits, stir
from tiny_models import make_pair_tokenizer

TEXTS = (["small tool", "a map"], ["draws maps of a city", "a tool for small files"])


def files(tmp_path, method="pfeiffer:rank=4"):
    """A task that was trained beside "en", and the parts of three languages, each a file."""
    model, tokenizer = tiny_models.make_bert(1), make_pair_tokenizer()
    made = {}
    for i, name in enumerate(("en", "de", "fi")):
        made[name] = stir(ad.attach(model, method, name=name), seed=i).save(tmp_path / f"{name}.safetensors")
    task = stir(ad.attach(model, method, also_train=["classifier"], name="task"), seed=9)
    composed = modular(model, task, document="en")
    composed.note(model, tokenizer)
    made["task"] = task.save(tmp_path / "task.safetensors")
    return made, tokenizer


def scores(model, composition, tokenizer) -> torch.Tensor:
    batch = tokenizer(*TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), ad.composed(model, composition):
        return model(**batch).logits[:, 0]


def test_where_says_which_parts_act():
    said = {
        "query": "Stack('fi', 'task')",
        "document": "Stack('de', 'task')",
        "both": "Stack('fi', 'de', 'task')",
        "split": "Stack(Split('fi', 'de'), 'task')",
    }
    for where, text in said.items():
        assert repr(composition_for("task", query="fi", document="de", where=where, by="types")) == text
    one = composition_for("task", query="de", document="de", where="both")
    assert repr(one) == "Stack('de', 'task')" == repr(composition_for("task", query="de", document="de", where="split"))
    assert repr(composition_for("task")) == "Stack('task')"
    assert repr(composition_for(None, document="de")) == "Stack('de')"
    assert repr(composition_for("task", document="de", skip="own")) == "Stack('de', 'task', skip='own')"


BAD = {
    "where": (dict(document="de", where="beside"), "one of query, document, both, split, got 'beside'"),
    "one of both": (dict(document="de", where="both"), "give query="),
    "the other": (dict(query="de"), "wants document=, and only query= is given"),
    "no query": (dict(document="de", where="query"), "wants query=, and only document= is given"),
    "twice": (dict(document="task"), "named as the task and as a language part"),
    "untold": (dict(query="fi", document="de", where="split"), r"by=pairs_by\(tokenizer\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_go_together(case):
    options, said = BAD[case]
    with pytest.raises(AddendaError, match=said):
        composition_for("task", **options)
    with pytest.raises(AddendaError, match="nothing to compose"):
        composition_for(None)


@pytest.mark.parametrize("method", ["pfeiffer:rank=4", "lora:rank=2", "ln-tuning"])
def test_files_are_loaded_and_compose_as_adapters_do(tmp_path, method):
    made, tokenizer = files(tmp_path, method)
    model = tiny_models.make_bert(1)
    before = bits_of(model)
    for where in ("query", "document", "both", "split"):
        found = modular(model, made["task"], query=made["fi"], document=made["de"], where=where, tokenizer=tokenizer)
        assert {"task", *found.parts} <= {*ad.adapters(model)} and set(found.composition.names()) == {
            "task",
            *found.parts,
        }
        y = scores(model, found.composition, tokenizer)
        batch = tokenizer(*TEXTS, padding=True, return_tensors="pt")
        which = (batch["input_ids"] == tokenizer.sep_token_id).long().cumsum(1)
        which = ((which - (batch["input_ids"] == tokenizer.sep_token_id).long()) > 0).long()
        by_hand = {
            "query": ad.Stack("fi", "task"), "document": ad.Stack("de", "task"), "both": ad.Stack("fi", "de", "task"),
            "split": ad.Stack(ad.Split("fi", "de", by=which, pooled=0), "task"),
        }[where]  # fmt: skip
        torch.testing.assert_close(y, scores(model, by_hand, tokenizer))
        beside = content_hash(ad.adapters(model)[found.parts[0]])
        assert "task was trained beside en (" in found.notes[0] and beside[:12] in found.notes[0]
        ad.detach(model)
        assert same_bits(before, bits_of(model))


def test_the_part_of_training_is_not_noted_as_another(tmp_path):
    made, tokenizer = files(tmp_path)
    model = tiny_models.make_bert(1)
    same = modular(model, made["task"], document=made["en"], tokenizer=tokenizer)
    assert same.notes == () and str(same) == "Stack('en', 'task')"
    other = modular(model, "task", document=made["de"], tokenizer=tokenizer)
    assert other.notes[0].startswith("task was trained beside en (") and "and acts beside de (" in other.notes[0]
    none = modular(model, "task", tokenizer=tokenizer)
    assert none.notes[0].endswith("and acts beside no other part")
    both = modular(model, "task", query=made["de"], document=made["de"], where="both", tokenizer=tokenizer)
    assert repr(both.composition) == "Stack('de-2', 'task')" and [*ad.adapters(model)] == ["task", "en", "de", "de-2"]


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    made, tokenizer = files(tmp_path)
    other = make_pair_tokenizer()
    other.add_tokens(["<new>"])
    stranger = tiny_models.make_bert(1, seed=1)
    foreign = stir(ad.attach(stranger, "lora:rank=2", name="fr")).save(tmp_path / "fr.safetensors")
    model = tiny_models.make_bert(1)
    before = bits_of(model), type(model.classifier)
    cases = (
        (dict(document=made["de"], tokenizer=other), "trained with another tokenizer"),
        (dict(document=foreign, tokenizer=tokenizer), "trained on other base weights"),
        (dict(document=tmp_path / "it.safetensors"), "it.safetensors is no file, and no adapter on this model"),
        (dict(query=made["de"]), "wants document=, and only query= is given"),
        (dict(query=made["fi"], document=made["de"], where="split"), "wants tokenizer="),
        (dict(query=made["fi"], document=made["task"], where="both"), "named as the task and as a language part"),
    )
    for options, said in cases:
        with pytest.raises(AddendaError, match=said):
            modular(model, made["task"], **options)
        assert same_bits(before[0], bits_of(model)) and type(model.classifier) is before[1]
    ad.load(model, made["task"], name="task")
    with pytest.raises(AddendaError, match="'task' was trained with another tokenizer"):
        modular(model, "task", tokenizer=other)
    with pytest.raises(AddendaError, match="is not on this model"):
        modular(model, ad.adapters(stranger)["fr"])


def test_a_tokenizer_without_a_separator_has_no_pairs_to_split():
    bare = tiny_models.make_tokenizer()
    assert pairs_by(make_pair_tokenizer()) == "separator:2" and pairs_by(bare) == "separator:2"
    bare.eos_token = None
    bare.model_input_names = ["input_ids", "token_type_ids"]
    assert pairs_by(bare) == "types"
    bare.model_input_names = ["input_ids"]
    with pytest.raises(AddendaError, match="no separator token and no token types"):
        pairs_by(bare)

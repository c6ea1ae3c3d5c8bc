"""torch.export of an adapted model: the program computes what the model does, and so does its file."""

import io

import pytest
import torch

import addenda as ad
import toys
from shared import EVERY, METHODS, attach, stir, where

IDS = torch.arange(12).reshape(2, 6)
CHOSEN = ("lora", "dora", "houlsby")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def logits(model, ids=IDS):
    with torch.no_grad():
        made = model(ids)
    return getattr(made, "logits", made)


def exported(model, **options):
    with torch.no_grad():
        return torch.export.export(model, (IDS,), **options)


def read_back(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def check(spec):
    model = toys.make_llama(num_hidden_layers=1)
    model.config.use_cache = False
    base = logits(model)
    stir(attach(model, METHODS[spec], IDS, targets=where(spec)), 0.3)
    model.eval()
    live, program = logits(model), exported(model)
    assert (live - base).abs().max() > 1e-4
    for each in (program.module(), read_back(program)):
        torch.testing.assert_close(logits(each), live, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", CHOSEN)
def test_the_program_and_its_file_compute_the_same(spec):
    check(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", sorted(set(EVERY) - set(CHOSEN)))
def test_so_do_those_of_every_other_method(spec):
    check(spec)


def test_other_sizes_go_through_a_dynamic_dimension(tiny):
    stir(ad.attach(tiny.eval(), "lora:rank=2"), 0.3)
    program = exported(tiny, dynamic_shapes=({0: torch.export.Dim("rows"), 1: torch.export.Dim("length")},))
    longer = torch.arange(24).reshape(3, 8)
    torch.testing.assert_close(logits(program.module(), longer), logits(tiny, longer))


def test_strict_export(tiny):
    stir(ad.attach(tiny.eval(), "lora:rank=2"), 0.3)
    torch.testing.assert_close(logits(exported(tiny, strict=True).module()), logits(tiny))


def test_what_acts_when_it_is_exported_acts_in_the_program(tiny):
    base = logits(tiny.eval())
    stir(ad.attach(tiny, "lora:rank=2", name="one"), 0.3)
    one = exported(tiny).module()
    stir(ad.attach(tiny, "lora:rank=2", name="two"), 0.3, seed=2)
    two, live = exported(tiny).module(), logits(tiny)
    ad.switch(tiny, "one")
    torch.testing.assert_close(logits(one), logits(tiny))
    torch.testing.assert_close(logits(two), live)
    ad.switch(tiny, None)
    torch.testing.assert_close(logits(exported(tiny).module()), base)
    assert (logits(one) - logits(two)).abs().max() > 1e-3


def test_a_merged_model_exports_without_the_adapter(tiny):
    stir(ad.attach(tiny.eval(), "lora:rank=2"), 0.3)
    live = logits(tiny)
    ad.merge(tiny, verify=IDS)
    program = exported(tiny)
    torch.testing.assert_close(logits(program.module()), live, rtol=0, atol=1e-5)
    ad.detach(tiny, keep_merged=True)
    assert not any("addenda" in name for name in exported(tiny).state_dict)

"""Tokens a second of models that have no position behind the row, or no cache of keys and values."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, RobertaConfig, RobertaModel

from addenda.compressing.measure import positions, speeds
from addenda.core.state.cache_length import cache_of
from tiny_models import config, make_bert, make_llama


def gpt2(n: int) -> GPT2LMHeadModel:
    own = GPT2Config(
        vocab_size=76, n_positions=n, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=2
    )  # fmt: skip
    return GPT2LMHeadModel(own)


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=76, hidden_size=16, num_hidden_layers=1, state_size=4))


def test_positions():
    assert positions(gpt2(48)) == 48 and positions(make_bert()) == 256 and positions(mamba()) is None
    roberta = RobertaModel(config(RobertaConfig, bos_token_id=0, eos_token_id=2))
    most = positions(roberta)
    assert most == 255  # the padding's row and those before it are no positions
    roberta(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, most + 1), 5))


@pytest.mark.parametrize("n", [40, 48, 8])
def test_decoding_stays_within_the_positions(n):
    found = speeds(gpt2(n), torch.arange(min(n, 40))[None], {"dense": lambda: None}, rounds=1)
    assert set(found["dense"]) == {"prefill", "decode"}


def test_what_has_room_is_measured_as_asked():
    seen = []
    model = make_llama()
    model.register_forward_pre_hook(lambda m, args, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True)
    speeds(model, torch.arange(40)[None], {"dense": lambda: None}, rounds=1)
    assert seen == [40, *[1] * 24] * 2


def test_a_state_of_another_kind_has_no_decode():
    kept = cache_of(mamba()(torch.arange(4)[None], use_cache=True)) is not None  # since transformers 5.24
    found = speeds(mamba(), torch.arange(20)[None], {"dense": lambda: None}, rounds=1)
    assert set(found["dense"]) == ({"prefill", "decode"} if kept else {"prefill"})

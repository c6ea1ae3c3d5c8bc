"""A trial that was killed goes on; one whose checkpoints are all damaged begins again, by itself."""

import addenda as ad
from addenda.comparing.trial import goes_on
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train import checkpoint
from addenda.train.fit import fit
from tiny_models import SUMS, make_llama, make_tokenizer


def test_a_trial_without_a_whole_checkpoint_begins_again(tmp_path):
    assert goes_on(tmp_path / "none")
    model = make_llama()
    fit(model, ad.attach(model, "lora:rank=2"), encode(read(SUMS), make_tokenizer()), steps=1, batch=8, out=tmp_path)
    assert goes_on(tmp_path)
    (checkpoint.latest(tmp_path) / "optimizer.safetensors").write_bytes(b"")
    assert not goes_on(tmp_path)

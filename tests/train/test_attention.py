import pytest

import toys
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train import attention
from tiny_models import SUMS, make_llama, make_tokenizer


@pytest.fixture
def train():
    return encode(read(SUMS), make_tokenizer())


def test_the_fastest_is_chosen_and_the_model_keeps_its_own(monkeypatch, train):
    model, ran = make_llama(), []
    clock = iter(range(1000))

    def slow_sdpa():
        ran.append(model.config._attn_implementation)
        return next(clock) * (10.0 if ran[-1] == "sdpa" else 1.0)

    monkeypatch.setattr(attention.time, "perf_counter", slow_sdpa)
    found = attention.measure(model, train, 4)
    assert found.name == "eager"
    assert found.seconds == {"sdpa": 10.0, "eager": 1.0}
    assert ran == ["sdpa", "sdpa", "eager", "eager"] * attention.ROUNDS
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training
    assert not model.get_input_embeddings()._forward_hooks


def test_short_runs_and_models_without_a_choice_are_not_measured(monkeypatch, train):
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    model = make_llama()
    assert attention.choose(model, train, 4, attention.FEW - 1) == attention.Attention("sdpa")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert attention.choose(model, train, 4, 1000) == attention.Attention("sdpa")
    assert attention.current(model.lm_head) is None


def test_parts_of_a_model_get_their_own_back():
    model = toys.make_clip()
    model.config.text_config._attn_implementation = "eager"
    before = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert len(set(before)) == 2
    with attention.using(model, "eager"):
        assert attention.current(model) == "eager"
    now = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert now == before


def test_a_name_that_cannot_be(train):
    model = make_llama()
    with pytest.raises(AddendaError, match="attention='flush' cannot be"), attention.using(model, "flush"):
        pass
    with pytest.raises(AddendaError, match="Linear has no choice"):
        attention.put(model.lm_head, "eager")
    assert model.config._attn_implementation == "sdpa"


def test_equal_runs_are_computed_alike_whatever_the_clock_says(monkeypatch, train):
    model, said = make_llama(), iter(["eager", "sdpa", "eager", "sdpa"])
    monkeypatch.setattr(attention, "measure", lambda *_: attention.Attention(next(said), {"sdpa": 1.0, "eager": 2.0}))
    first = attention.choose(model, train, 4, 100)
    assert first == attention.Attention("eager", {"sdpa": 1.0, "eager": 2.0})
    assert all(attention.choose(make_llama(i), train, 4, 60 + i) == first for i in range(3))
    assert attention.choose(model, train, 8, 100).name == "sdpa", "another batch is another case"
    assert attention.choose(make_llama().bfloat16(), train, 4, 100).name == "eager", "and so is another dtype"
    [file, *_] = (attention.cache_folder() / "attention").iterdir()
    assert [p.suffix for p in file.parent.iterdir()] == [".json"] * 3


def test_of_two_that_measure_at_once_the_first_decides(monkeypatch, train):
    def measured(*_):
        monkeypatch.setattr(attention, "measure", lambda *_: attention.Attention("sdpa", {"sdpa": 1.0}))
        attention.settled(make_llama(), train, 4)  # another process, meanwhile
        return attention.Attention("eager", {"eager": 1.0})

    monkeypatch.setattr(attention, "measure", measured)
    assert attention.settled(make_llama(), train, 4).name == "sdpa"


@pytest.mark.parametrize(
    "said",
    ["", "{", "[]", "{}", '{"name": "flush", "seconds": {"flush": 1.0}}', '{"name": "eager", "seconds": {}}',
     '{"name": "eager", "seconds": {"eager": -1.0}}', '{"name": "eager", "seconds": {"eager": "1"}, "x": 1}'],
)  # fmt: skip
def test_a_damaged_entry_is_measured_anew_once(monkeypatch, train, said):
    found = [attention.Attention(n, {"eager": 1.0, "sdpa": 1.0}) for n in ("eager", "sdpa", "eager")]
    monkeypatch.setattr(attention, "measure", lambda *_: found.pop(0))
    assert attention.settled(make_llama(), train, 4).name == "eager"
    [file] = (attention.cache_folder() / "attention").iterdir()
    file.write_text(said)
    assert [attention.settled(make_llama(), train, 4).name for _ in range(3)] == ["sdpa"] * 3
    assert len(found) == 1


def test_where_nothing_can_be_kept_nothing_is_measured(monkeypatch, train, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(attention, "cache_folder", lambda: tmp_path / "file")
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    assert attention.settled(make_llama(), train, 4) == attention.Attention("sdpa")

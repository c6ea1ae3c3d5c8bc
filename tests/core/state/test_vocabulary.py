"""What a model remembers of a vocabulary that has grown, and tables put on and taken off."""

import torch

import toys
from addenda.core.state.undo import undone
from addenda.core.state.vocabulary import Vocabulary, grown_of, lighten, put_on, take_off, text_config
from marks import differences, snapshot


def test_new_rows_are_said_as_stretches():
    def said(*numbers: int) -> str:
        return Vocabulary(10, 5, ("t",), {str(n): n for n in numbers}).new_rows

    assert said(10, 11, 12) == "10-12"
    assert said(5, 12, 7, 11) == "5+7+11-12"
    assert said() == "10-14"
    assert Vocabulary(10, 0, (), {}).new_rows == ""


def grown(model) -> None:
    v = Vocabulary(32, 2, ("model.shared.weight", "final_logits_bias"), {})
    weight, bias = model.get_input_embeddings().weight.detach(), model.final_logits_bias
    tables = {v.tables[0]: torch.cat([weight, weight[:2]]), v.tables[1]: torch.cat([bias, bias[:, :2]], 1)}
    put_on(model, v, tables, 32, True)


def test_tables_go_on_at_all_owners_with_buffers_and_come_off_with_every_mark():
    model = toys.make_bart()
    told = snapshot(model)
    with undone(model):
        grown(model)
        lighten(model)
    owners = [m for m in model.modules() if m._parameters.get("weight") is model.get_input_embeddings().weight]
    assert len(owners) == 4  # shared, both sides' embeddings, the head
    assert model.final_logits_bias.shape == (1, 34)
    assert model.config.vocab_size == 34
    old = grown_of(model).former["model.shared.weight"]
    assert old.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # no memory of its own
    take_off(model)
    assert differences(told, snapshot(model)) == []


def test_an_error_before_they_are_lightened_leaves_everything():
    model = toys.make_bart()
    told = snapshot(model)
    try:
        with undone(model):
            grown(model)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert differences(told, snapshot(model)) == []


def test_a_configuration_of_several_texts_is_taken_as_it_is():
    class Several:
        def get_text_config(self):
            raise ValueError("Multiple valid text configs were found")

    several = Several()
    assert text_config(several) is several
    assert text_config(None) is None
    assert text_config(toys.make_clip().config).vocab_size == toys.VOCAB

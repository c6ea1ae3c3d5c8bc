"""The file that moves with an adapter: what is read is what was saved, to the bit, of this source, or an error."""

from dataclasses import replace

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.core.file.container import DIGITS, write
from addenda.core.file.states import write_state
from addenda.transferring.bundle import is_bundle, read_bundle
from addenda.transferring.make_bundle import make_bundle

TOKENIZER = tiny_models.make_tokenizer()
ROWS = [
    {"question": f"what is {a}+{b}, Ms {n}?", "answer": str(a + b)} for a in range(4) for b, n in enumerate("abcde")
]
MADE = [f"{x}{y} is{z}" for x in "abc" for y in "de" for z in "xyz"]
HOW = {"answers": ("y", "n"), "steps": 2, "batch": 8, "negatives": MADE}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with an adapter's file and its bundle, and the model, which has neither."""
    folder, model = tmp_path_factory.mktemp("source"), tiny_models.make_llama()
    adapter = ad.attach(model, "lora:rank=2", name="a")
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    adapter.save(folder / "a.safetensors")
    ad.detach(model)
    made = make_bundle(
        model, TOKENIZER, folder / "a.safetensors", ROWS, folder / "a.bundle", name="sums", seed=3, **HOW
    )
    return folder, model, made


def test_what_is_read_is_what_was_made(source):
    folder, model, made = source
    found = read_bundle(folder / "a.bundle")
    assert found == made.bundle and found.path == made.path == folder / "a.bundle"
    assert len(found.seeds) == 5 and {*found.seeds} <= {r["question"] for r in ROWS}
    assert (found.name, found.count, found.system, found.chat) == ("sums", 20, None, True)
    assert found.made["negatives"] == len(MADE) == made.negatives and found.made["method"] == "lora"
    assert "word for word" in str(made) and "5 seeds of 20 inputs" in str(made)
    assert ad.status(model) == "LlamaForCausalLM: no adapter attached"
    assert is_bundle(found.path) and not is_bundle(folder / "a.safetensors") and not is_bundle(folder / "none")


def test_no_input_but_the_seeds_is_in_the_file(source):
    folder, _, made = source
    data = (folder / "a.bundle").read_bytes()
    others = {r["question"] for r in ROWS} - {*made.bundle.seeds}
    for text in others:
        for form in (text.encode(), text.encode("utf-16-le"), text[5:].encode(), text[:14].encode() + b"M"):
            assert form not in data, text
    assert len(others) == 15 and all(text.encode() in data for text in made.bundle.seeds)
    assert not any(text.encode() in data for text in MADE)


def test_the_same_call_makes_the_same_bytes(source, tmp_path):
    folder, model, _ = source
    again = make_bundle(model, TOKENIZER, folder / "a.safetensors", ROWS, tmp_path / "b", name="sums", seed=3, **HOW)
    assert again.path.read_bytes() == (folder / "a.bundle").read_bytes()


def test_the_discriminator_goes_onto_its_base_and_judges_as_before(source):
    folder, model, _ = source
    found = read_bundle(folder / "a.bundle")
    judge = found.attach(model, TOKENIZER, name="judge")
    texts = [ROWS[0]["question"], MADE[0], "3"]
    margins = judge.margins(model, TOKENIZER, texts)
    assert judge.adapter == "judge" and "judge: idle" in ad.status(model)
    assert margins != replace(judge).margins(model, TOKENIZER, texts[::-1])
    saved = ad.adapters(model)["judge"].state_dict()
    assert all(bool(t.isfinite().all()) for t in saved.values()) and len(saved) > 4
    ad.detach(model)


def test_one_flipped_bit_anywhere_is_an_error(source, tmp_path):
    folder, _, _ = source
    data, changed = (folder / "a.bundle").read_bytes(), tmp_path / "changed"
    for place in [*range(0, 3000, 61), *range(3000, len(data), len(data) // 30), len(data) - 1]:
        flipped = bytearray(data)
        flipped[place] ^= 1
        changed.write_bytes(flipped)
        with pytest.raises(ad.AddendaError):
            read_bundle(changed)
    for cut in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
        changed.write_bytes(cut)
        with pytest.raises(ad.AddendaError):
            read_bundle(changed)


def test_a_file_with_a_digest_that_says_something_else_is_an_error(source, tmp_path):
    """Whoever makes the digest right again does not make a bundle of anything."""
    import json

    from addenda.core.file.container import sound
    from addenda.transferring import bundle as module

    folder, _, _ = source
    with sound(folder / "a.bundle") as file:
        about, tensors = json.loads(file.metadata["bundle"]), file.tensors()
    wrongs = [
        {"seeds": ["a"]}, {"seeds": ["a", "a"]}, {"seeds": ["a ", "b"]}, {"seeds": "ab"}, {"seeds": ["a", "b\nc"]},
        {"count": 0}, {"count": True}, {"count": 1.5}, {"name": "two\nlines"}, {"name": 3}, {"system": 3}, {"made": []},
        {"notice": "nothing of the task is in it"}, {"format": "addenda transfer 9"}, {"more": 1},
        {"teacher": about["teacher"] | {"adapter": "0"}}, {"teacher": about["teacher"] | {"chat": 1}},
        {"teacher": {k: v for k, v in about["teacher"].items() if k != "base"}}, {"judge": None},
        {"judge": about["judge"] | {"template": "x"}}, {"judge": about["judge"] | {"base": {"weights": "0" * 64}}},
        {"discriminator": about["discriminator"] | {"tokens": [3, 3]}},
        {"discriminator": about["discriminator"] | {"tokens": [3, -1]}},
        {"discriminator": about["discriminator"] | {"accuracy": 2}},
        {"discriminator": about["discriminator"] | {"answers": ["y"]}}, {"discriminator": {}},
    ]  # fmt: skip
    for wrong in wrongs:
        text = json.dumps(about | {"sha256": "0" * DIGITS} | wrong, ensure_ascii=False, separators=(",", ":"))
        write(tmp_path / "w", {"bundle": text}, tensors, module._BEFORE)
        with pytest.raises(ad.AddendaError, match="no sound safetensors file"):
            read_bundle(tmp_path / "w")
    text = json.dumps(about | {"sha256": "0" * DIGITS}, ensure_ascii=False, separators=(",", ":"))
    write(tmp_path / "w", {"bundle": text}, {"discriminator": torch.zeros(64, dtype=torch.uint8)}, module._BEFORE)
    with pytest.raises(ad.AddendaError, match="no sound discriminator"):
        read_bundle(tmp_path / "w")
    write(tmp_path / "w", {"bundle": text}, tensors | {"x": torch.zeros(1)}, module._BEFORE)
    with pytest.raises(ad.AddendaError, match="more or less"):
        read_bundle(tmp_path / "w")


def test_other_files_are_refused_and_never_written_over(source, tmp_path):
    folder, _, made = source
    write_state(tmp_path / "state", {"x": torch.zeros(2)})
    for other in (tmp_path / "state", folder / "a.safetensors", tmp_path / "none", tmp_path):
        with pytest.raises(ad.AddendaError):
            read_bundle(other)
    with pytest.raises(ad.AddendaError, match="has not written it"):
        made.bundle.save(tmp_path / "state")
    with pytest.raises(ad.AddendaError, match="not saved"):
        replace(made.bundle, seeds=("a", "a")).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_adapter_base_tokenizer_or_template_is_told(source):
    folder, model, _ = source
    found = read_bundle(folder / "a.bundle")
    adapter = ad.load(model, folder / "a.safetensors", name="source")
    found.check_teacher(model, TOKENIZER, adapter)
    with torch.no_grad():
        next(iter(adapter.parameters())).add_(1e-3)
    with pytest.raises(ad.AddendaError, match="the adapter is another"):
        found.check_teacher(model, TOKENIZER, adapter)
    ad.detach(model)
    other = tiny_models.make_llama(seed=1)
    with pytest.raises(ad.AddendaError, match=r"a\.bundle was trained on another model: the base is another"):
        found.attach(other, TOKENIZER)
    with pytest.raises(ad.AddendaError, match="LlamaForCausalLM in bfloat16 here"):
        found.attach(tiny_models.make_llama().bfloat16(), TOKENIZER)
    with pytest.raises(ad.AddendaError, match="the chat template is another"):
        found.attach(model, tiny_models.make_tokenizer(tiny_models.TEMPLATE + " "))
    strange = tiny_models.make_tokenizer()
    strange.add_tokens(["new"])
    with pytest.raises(ad.AddendaError, match="the tokenizer is another"):
        found.attach(model, strange)
    assert ad.status(other) == ad.status(model) == "LlamaForCausalLM: no adapter attached"


def test_a_chain_has_another_teacher_and_the_same_judge_and_seeds(source, tmp_path):
    _, model, made = source
    second = tiny_models.make_llama(seed=1)
    student = ad.attach(second, "lora:rank=2", name="student")
    handed = made.bundle.under(second, TOKENIZER, student)
    again = read_bundle(handed.save(tmp_path / "next"))
    again.check_teacher(second, TOKENIZER, student)
    assert (again.seeds, again.file, again.judge) == (made.bundle.seeds, made.bundle.file, made.bundle.judge)
    again.attach(model, TOKENIZER)
    ad.detach(model)
    with pytest.raises(ad.AddendaError, match="goes with another source"):
        made.bundle.check_teacher(second, TOKENIZER, student)

"""Files that earlier versions wrote load for ever, as what they were: see tests/golden/write.py."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import MethodEntry, read, write

pytestmark = pytest.mark.filterwarnings("ignore:.*is of schema 1:UserWarning")  # which has no digest
GOLDEN = Path(__file__).parent / "golden"
from bases import Growing, Kinds, Layers, Twins  # noqa: E402

BASES = {"layers": Layers, "kinds": Kinds, "growing": Growing, "twins": Twins}
FOLDERS = [f.parent for f in sorted(GOLDEN.glob("*/manifest.json"))]
FILES = [
    (folder, file, entry)
    for folder in FOLDERS
    for file, entry in json.loads((folder / "manifest.json").read_text()).items()
]


def base_of(folder: Path, entry: dict) -> torch.nn.Module:
    model = BASES[entry["base"]]().eval()
    model.load_state_dict(load_file(folder / f"base-{entry['base']}.safetensors"))
    return model


@pytest.mark.parametrize(
    ("folder", "file", "entry"),
    [pytest.param(*f, id=f"{f[0].name}-{f[2]['what']}") for f in FILES],
)
def test_every_file_acts_as_when_it_was_written(folder, file, entry):
    outputs = load_file(folder / "outputs.safetensors")
    model = base_of(folder, entry)
    ids = outputs.get(f"{file}/ids", outputs["ids"])
    with torch.no_grad():
        adapter = ad.load(model, folder / file)
        with ad.disabled(model):
            plain = model(ids)
        results = {"eval": model(ids)}
        if f"{file}/train" in outputs:
            results["train"] = model.train()(ids)
    for mode, y in results.items():
        expected = outputs[f"{file}/{mode}"]
        error, effect, size = ((a - b).norm() for a, b in ((y, expected), (expected, plain), (plain, plain * 0)))
        assert effect > 1e-4 * size, f"{entry['what']}: a file that does nothing shows nothing"
        assert error <= 2e-4 * effect + 1e-6 * size, (
            f"{entry['what']}, {mode}: off by {error / effect:.1e} of its change"
        )
    held = {m.name or "": m.options(defaults=True) for m in adapter.methods.values()}
    for name, options in entry["methods"].items():  # options newer than the file may have any value that acts as before
        assert options == {k: v for k, v in held[name].items() if k in options}, entry["what"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_every_method_that_there_was_is_among_them(folder):
    names = {entry["what"].split(":")[0] for home, _, entry in FILES if home == folder}
    assert len(names & {i.name for i in ad.catalogue()}) >= 57


def test_a_file_of_another_base_is_refused():
    folder, file, entry = FILES[0]
    model = base_of(folder, entry)
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    with pytest.raises(AddendaError, match="trained on other base weights"):
        ad.load(model, folder / file)


def test_files_hold_every_option_and_a_missing_one_has_the_default_of_its_time(tmp_path, monkeypatch):
    model = Layers()
    adapter = ad.attach(model, ad.LoRA(rank=2), targets="*.q_proj", also_train=["score"])
    file = adapter.save(tmp_path / "new.safetensors")
    header, tensors = read(file)
    assert header.methods == (MethodEntry("lora", ad.LoRA(rank=2).options(defaults=True)),)
    assert header.head == {"bits": None, "ste": "paper"}
    assert "lora (rank=2):" in ad.inspect(file)
    fewer = {k: v for k, v in header.methods[0].options.items() if k != "alpha"}
    older = dataclasses.replace(header, methods=(MethodEntry("lora", fewer),))
    write(tmp_path / "old.safetensors", older, tensors)
    monkeypatch.setattr(ad.LoRA, "formerly", {"alpha": 7.0})
    ad.detach(model)
    assert ad.load(model, tmp_path / "new.safetensors", name="new").methods["layers.0.self_attn.q_proj"].alpha is None
    assert ad.load(model, tmp_path / "old.safetensors", name="old").methods["layers.0.self_attn.q_proj"].alpha == 7.0

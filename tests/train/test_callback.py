"""Every method in a Hugging Face Trainer of one's own: its checkpoints are written, and a resumed run ends alike."""

import pytest
import torch
from safetensors import safe_open

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.method.catalogue import build
from addenda.quantizing.quantize import quantize
from shared import EVERY, HIDDEN, METHODS, attach, same_bits, where

transformers = pytest.importorskip("transformers")
import toys  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:transformers")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = torch.arange(8) + i
        return {"input_ids": ids, "labels": ids}


def trained(spec: str, folder, resume=None, *, callback: bool = True, packed: bool = False, steps: int = 2, **own):
    """The adapter's tensors after two steps, a checkpoint at each; from the first one with resume."""
    model = toys.make_llama()
    if packed:
        quantize(model, "nf4")
    ids = torch.arange(12).reshape(2, 6)
    adapter = attach(model, METHODS.get(spec) or build(spec), ids, targets=where(spec.partition(":")[0]), seed=3)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no", seed=1,
        **own,
    )  # fmt: skip
    callbacks = [ad.TrainerCallback(adapter)] if callback else []
    trainer = transformers.Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {k: v.clone() for k, v in adapter.state_dict().items()}


SPECS = [*EVERY, "lora:rank=2,bits=1", "vb-lora:rank=2,vectors=5,length=4,bits=2", "compacter:rank=4,bits=2"]


@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_resumed_with_the_callback(spec, tmp_path):
    whole = trained(spec, tmp_path)[1]
    assert same_bits(trained(spec, tmp_path, str(tmp_path / "checkpoint-1"))[1], whole)


@pytest.mark.parametrize("spec", ["lora", "vb-lora", "compacter", "loldu", "lora:rank=2,bits=1"])
def test_saved_and_resumed_without_the_callback(spec, tmp_path):
    whole = trained(spec, tmp_path, callback=False)[1]
    resumed = trained(spec, tmp_path, str(tmp_path / "checkpoint-1"), callback=False)[1]
    assert same_bits(resumed, whole)


@pytest.mark.parametrize("spec", ["lora", "vb-lora", "pfeiffer"])
def test_packed_weights_are_left_out_of_checkpoints(spec, tmp_path):
    trainer, whole = trained(spec, tmp_path, packed=True)
    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert "model.norm.weight" in names
    assert any(".addenda." in n for n in names)
    assert same_bits(trained(spec, tmp_path, str(tmp_path / "checkpoint-1"), packed=True)[1], whole)
    assert "model.layers.0.mlp.up_proj.weight" in trainer.model.state_dict(), "afterwards all is there again"
    with pytest.raises(AddendaError, match="TrainerCallback"):
        trainer.save_model(tmp_path / "model")


def test_hidden_methods_are_among_them():
    assert set(HIDDEN) < set(SPECS)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_its_optimizer_is_refused(lost, tmp_path):
    trained("lora", tmp_path)
    (tmp_path / "checkpoint-1" / lost).unlink()
    with pytest.raises(AddendaError, match=rf"checkpoint-1 lacks {lost}.*other numbers.*resume_from_checkpoint"):
        trained("lora", tmp_path, str(tmp_path / "checkpoint-1"))


class KilledError(BaseException):
    """As a kill: nothing of the library's hears it."""


BEST = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}


@pytest.mark.parametrize("strategy", [{}, BEST], ids=["steps", "best"])
def test_a_kill_after_older_checkpoints_are_deleted_leaves_a_whole_one(strategy, tmp_path, monkeypatch):
    """Also where the Trainer decides to save only when the evaluation is done."""
    options = {"steps": 3, "save_total_limit": 1} | strategy
    whole = trained("dylora:rank=4", tmp_path / "whole", **options)[1]
    delete = transformers.trainer.rotate_checkpoints

    def killed(**given):
        delete(**given)
        if (tmp_path / "run" / "checkpoint-2").exists():
            raise KilledError

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", killed)
    with pytest.raises(KilledError):
        trained("dylora:rank=4", tmp_path / "run", **options)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", delete)
    assert same_bits(trained("dylora:rank=4", tmp_path / "run", True, **options)[1], whole)


def test_a_callback_of_a_model_is_refused_before_anything_trains():
    with pytest.raises(AddendaError, match="TrainerCallback is of an adapter, got a LlamaForCausalLM"):
        ad.TrainerCallback(toys.make_llama())  # type: ignore[arg-type]

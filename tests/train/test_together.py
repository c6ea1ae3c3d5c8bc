"""Several processes that make one run: the same adapter as of one, one folder, and all end together."""

import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.disk.place import is_first
from addenda.train import together
from addenda.train.trainer import AdapterTrainer
from addenda.train.tune import TuneResult
from processes import FSDP, POSSIBLE, side_by_side
from tiny_models import SUMS, make_llama, make_llama_classifier, make_tokenizer

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="wants gloo, and processes that fork")
tuning = importlib.import_module("addenda.train.tune")
RUN: dict[str, Any] = {"steps": 6, "batch": 7, "accumulate": 2, "rate": 1e-2, "eval_data": SUMS[:6], "progress": False}
SAME = 1e-4  # of the norm of a tensor, after six steps in float32; 1e-6 was seen


def run(folder: Path, method: str, **more: Any) -> TuneResult:
    return ad.tune(make_llama(), SUMS[6:], method, tokenizer=make_tokenizer(), out=folder, **(RUN | more))


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def differences(folder: Path, other: Path) -> dict[str, float]:
    here, there = (load_file(f / "adapter.safetensors") for f in (folder, other))
    assert here.keys() == there.keys()
    return {k: error(here[k], there[k]) for k in here}


def merged(folder: Path) -> dict[str, Tensor]:
    """The change of every weight by the adapter in a folder."""
    model = make_llama()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    ad.load(model, folder / "adapter.safetensors")
    ad.merge(model)
    return {k: t - before[k] for k, t in model.state_dict().items() if k in before and not torch.equal(t, before[k])}


def alike(folder: Path, methods: list[str], options: dict[str, str]) -> None:
    """Check that two processes give what one gives: tensors, the change of the weights, losses, evaluations."""

    def both() -> None:
        for i, method in enumerate(methods):
            run(folder / f"two-{i}", method)

    for i, method in enumerate(methods):
        run(folder / f"one-{i}", method)
    said = side_by_side(both, folder, **options)
    assert said.codes == [0, 0], said.text
    for i, method in enumerate(methods):
        one, two = folder / f"one-{i}", folder / f"two-{i}"
        off = differences(two, one)
        assert max(off.values()) < SAME, (method, off)
        changes, expected = merged(two), merged(one)
        assert changes.keys() == expected.keys() and expected
        assert max(error(changes[k], expected[k]) for k in expected) < SAME, method
        ours, theirs = (json.loads((f / "run.json").read_text()) for f in (two, one))
        assert ours["losses"] == pytest.approx([pytest.approx(e, rel=1e-4) for e in theirs["losses"]])
        assert ours["after"]["loss"] == pytest.approx(theirs["after"]["loss"], rel=1e-4)
        assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
        note = json.loads((two / "checkpoints" / "checkpoint-6" / "addenda.json").read_text())
        assert note["identity"]["processes"] == 2 and len([f for f in note["files"] if f.startswith("rng_state")]) == 2


MORE = pytest.param(["svft", "shira", "dylora:rank=4", "adalora"], marks=pytest.mark.slow, id="more")


@pytest.mark.parametrize("options", [{}, FSDP], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("methods", [pytest.param(["lora:rank=4"], id="lora"), MORE])
def test_two_processes_give_the_adapter_of_one(methods, options, tmp_path):
    alike(tmp_path, methods, options)


def test_a_step_of_fewer_examples_than_processes(tmp_path):
    few = {"batch": 1, "accumulate": 1, "steps": 3}
    run(tmp_path / "one", "lora:rank=4", **few)
    said = side_by_side(lambda: run(tmp_path / "two", "lora:rank=4", **few), tmp_path)
    assert said.codes == [0, 0], said.text
    assert max(differences(tmp_path / "two", tmp_path / "one").values()) < SAME


def test_new_tokens_are_kept_by_the_first_process_alone(tmp_path):
    few = {"batch": 4, "accumulate": 1, "steps": 2, "add_tokens": ["<call>"]}
    kept, keep = tmp_path / "kept", tuning.keep_tokenizer

    def noted(*given: Any) -> None:
        with kept.open("a") as file:
            file.write(os.environ["RANK"])
        keep(*given)

    def both() -> None:
        vars(tuning)["keep_tokenizer"] = noted  # of a forked process
        run(tmp_path / "two", "lora:rank=2", **few)

    said = side_by_side(both, tmp_path)
    assert said.codes == [0, 0], said.text
    assert kept.read_text() == "0" and (tmp_path / "two" / "tokenizer").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_a_classifier_with_its_head_and_an_early_stop(options, tmp_path):
    rows = [{"text": f"{a}+{b}", "label": "abc"[(a + b) % 3]} for a in range(8) for b in range(8)]
    given: dict[str, Any] = RUN | {"eval_data": rows[:9], "early_stop": 1, "eval_every": 2, "steps": 8, "rate": 0.2}

    def classify(folder: Path) -> TuneResult:
        return ad.tune(
            make_llama_classifier(), rows[9:], "lora:rank=4", tokenizer=make_tokenizer(None), out=folder, **given
        )

    alone = classify(tmp_path / "one")
    said = side_by_side(lambda: classify(tmp_path / "two"), tmp_path, **options)
    assert said.codes == [0, 0], said.text
    off = differences(tmp_path / "two", tmp_path / "one")
    assert max(off.values()) < 10 * SAME and any("score" in k for k in off)
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (record["steps"], record["best_step"]) == (alone.steps, alone.best_step)
    assert alone.steps < 8  # it did stop early


def killed(folder: Path, rank: int, step: int, method: str) -> None:
    """Run, and kill one of the processes at a step. Every process has a folder of its own, as hosts have."""
    train, here = AdapterTrainer.training_step, int(os.environ["RANK"])

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and here == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, *args, **kwargs)

    AdapterTrainer.training_step = training_step
    run(folder / f"host-{here}", method, save_every=2)


SPLIT = pytest.param(1, "adalora", FSDP, marks=pytest.mark.slow, id="fsdp2")


@pytest.mark.parametrize(("rank", "method", "options"), [(0, "dylora:rank=4", {}), (1, "dylora:rank=4", {}), SPLIT])
def test_one_that_is_killed_ends_the_others_and_the_same_launch_goes_on(rank, method, options, tmp_path):
    said = side_by_side(lambda: killed(tmp_path, rank, 5, method), tmp_path, **options)
    assert said.codes[rank] == -signal.SIGKILL and said.codes[1 - rank] == 1
    assert "Another process of this run has ended" in said.text
    kept = tmp_path / "host-0" / "checkpoints" / "checkpoint-4"
    assert kept.is_dir() and not (tmp_path / "host-1").exists()

    def again() -> None:
        made = run(tmp_path / f"host-{os.environ['RANK']}", method, save_every=2)
        assert made.resumed_from == 4  # in the second process, too, which has no checkpoint

    said = side_by_side(again, tmp_path, **options)
    assert said.codes == [0, 0], said.text
    assert not (tmp_path / "host-1").exists()
    said = side_by_side(lambda: run(tmp_path / "whole", method, save_every=2), tmp_path, **options)
    assert said.codes == [0, 0], said.text
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("host-0", "whole")]
    assert files[0] == files[1]


def test_what_the_first_decides_all_do(tmp_path):
    own = tmp_path / "own"

    def decide() -> None:
        together.meet()
        rank = int(os.environ["RANK"])
        assert together.agreed(lambda: [rank, "x"]) == [0, "x"]
        assert together.any_of(rank == 1) and not together.any_of(False)
        assert together.gathered(f"of {rank}".encode()) == [b"of 0", b"of 1"]
        assert int(together.sum_of(torch.tensor(rank + 1))) == 3

        def refuse() -> None:
            raise AddendaError(f"not so, says {rank}")

        with pytest.raises(AddendaError, match="not so, says 0"):
            together.agreed(refuse)
        together.check_alike({"data": "a", "rate": 0.1})
        with pytest.raises(AddendaError, match=r"process 1 .*data is 'first' in the first and 'other' there"):
            together.check_alike({"data": "other" if rank else "first"})
        if is_first():
            own.mkdir()
            (own / "a.bin").write_bytes(bytes(range(256)) * 3)
        with together.fetched(own if is_first() else None) as there:
            assert there == own
        with together.fetched(own / "a.bin" if is_first() else None) as file:
            assert file is not None and file.name == "a.bin" and len(file.read_bytes()) == 768
        with together.fetched(None) as nothing:
            assert nothing is None

    said = side_by_side(decide, tmp_path)
    assert said.codes == [0, 0], said.text


def test_a_file_that_others_do_not_see_is_sent_in_pieces(tmp_path):
    def fetch() -> None:
        together.meet()
        together.PIECE = 100
        folder = tmp_path / f"host-{os.environ['RANK']}" / "checkpoint-5"
        if is_first():
            folder.mkdir(parents=True)
            (folder / "a.bin").write_bytes(bytes(range(256)) * 3)
            (folder / "empty").write_bytes(b"")
        there = tmp_path / "host-0" / "checkpoint-5"
        if not is_first():
            together._files = lambda path: {}  # as where another file has that name
        with together.fetched(there if is_first() else None) as copy:
            assert copy is not None and copy.name == "checkpoint-5" and (copy == there) == is_first()
            assert {p.name: len(p.read_bytes()) for p in copy.iterdir()} == {"a.bin": 768, "empty": 0}
            assert (copy / "a.bin").read_bytes() == bytes(range(256)) * 3
        assert copy.exists() == is_first()

    said = side_by_side(fetch, tmp_path)
    assert said.codes == [0, 0], said.text


def test_one_process_decides_for_itself(tmp_path):
    assert not together.apart() and together.agreed(lambda: (1, 2)) == (1, 2)
    with together.fetched(tmp_path) as same:
        assert same == tmp_path


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile"),
        ("ACCELERATE_USE_FSDP", "true", "--fsdp_version 2"),
    ],
)
def test_what_a_launcher_asks_for_and_would_not_be_done_is_refused(name, value, says, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(AddendaError, match=says):
        ad.tune(make_llama(), SUMS, "lora", tokenizer=make_tokenizer(), steps=1, progress=False)

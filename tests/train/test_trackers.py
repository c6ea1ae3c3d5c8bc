"""Trackers are told what a run logs, write into its folder alone, and can neither change nor end it."""

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

from addenda import tune
from addenda.core.base.errors import AddendaError
from addenda.train.fit import fit
from addenda.train.tracking import Tracking, trackers_of
from addenda.train.trainer import DivergedError
from tiny_models import SUMS, make_llama, make_tokenizer

QUICK = {"steps": 4, "batch": 8, "dtype": "float32", "progress": False, "rate": 1e-2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where nothing may be written
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def scalars(logs, name="train/loss"):
    """(step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(logs)).Reload()
    return [(e.step, e.value) for e in read.Scalars(name)]


class Module(types.ModuleType):
    """A stand-in for a tracker's package, which keeps what it is called with; `fails`: the call that raises."""

    def __init__(self, name, **known):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "99.0"
        self.calls, self.fails = [], ""
        self.__dict__.update(known)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs, dict(os.environ)))
            if name == self.fails:
                raise OSError("the tracker's server is gone")
            return False

        return call

    def called(self, name):
        return [call for call in self.calls if call[0] == name]


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def trackio(monkeypatch):
    space = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
    module = Module("trackio", config=Config(), context_vars=space)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    runs = []
    module = Module("mlflow", utils=types.SimpleNamespace(validation=limits))
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="1"))
    module.active_run = lambda: runs[-1] if runs else None

    def start_run(**kwargs):
        module.calls.append(("start_run", (), kwargs, dict(os.environ)))
        runs.append(info)

    def end_run():
        module.calls.append(("end_run", (), {}, {}))
        runs.pop()

    module.start_run, module.end_run = start_run, end_run
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_tensorboard_shows_every_loss_and_the_run_is_the_same(folder, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    made = tune(folder, SUMS, "lora:rank=2", out=out, eval_data=0.25, eval_every=2, report_to="tensorboard", **QUICK)
    plain = tune(folder, SUMS, "lora:rank=2", out=tmp_path / "plain", eval_data=0.25, eval_every=2, **QUICK)
    assert made.losses == plain.losses and made.after == plain.after
    logs = out / "trackers" / "tensorboard" / "run"
    assert scalars(logs) == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in made.losses]
    told = scalars(logs, "eval/accuracy")
    assert told == [(e["step"], pytest.approx(e["accuracy"], rel=1e-6)) for e in made.evaluations]
    names = {p.name for p in out.iterdir()}
    assert names == {"adapter.safetensors", "README.md", "run.json", "checkpoints", "trackers"}
    assert not (tmp_path / "plain" / "trackers").exists()
    assert "report_to" not in (out / "run.json").read_text()  # it is no part of what the run is


def test_a_run_that_goes_on_goes_on_in_its_log(folder, tmp_path):
    pytest.importorskip("tensorboard")
    out, more = tmp_path / "run", {"report_to": "tensorboard", "save_every": 2}
    first = tune(folder, SUMS, "lora:rank=2", out=out, schedule="constant", warmup=0, **QUICK | more)
    made = tune(folder, SUMS, "lora:rank=2", out=out, schedule="constant", warmup=0, **QUICK | more | {"steps": 7})
    assert made.resumed_from == 4 and made.losses[:4] == first.losses
    assert [s for s, _ in scalars(out / "trackers" / "tensorboard" / "run")] == [1, 2, 3, 4, 5, 6, 7]
    again = tune(folder, SUMS, "lora:rank=2", out=out, schedule="constant", warmup=0, resume=False, **QUICK | more)
    shown = scalars(out / "trackers" / "tensorboard" / "run")
    assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in again.losses]  # older steps are hidden


def test_wandb_offline_has_a_run_of_its_own_for_each(folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        tune(folder, SUMS, "lora:rank=2", out=tmp_path / name, report_to=["wandb"], **QUICK)
        assert wandb.run is None
        written = tmp_path / name / "trackers" / "wandb"
        [run] = written.glob("offline-run-*")
        assert run.name.endswith((written / f"{name}.id").read_text()) and list(run.glob("*.wandb"))
    assert "WANDB_DIR" not in os.environ
    ids = {(tmp_path / name / "trackers" / "wandb" / f"{name}.id").read_text() for name in ("one", "two")}
    assert len(ids) == 2


def test_trackio_and_mlflow_are_told_by_name_and_step(folder, tmp_path, trackio, mlflow):
    made = tune(folder, SUMS, "lora:rank=2", out=tmp_path / "run", report_to="trackio, mlflow", **QUICK)
    [(_, _, begun, environment)] = trackio.called("init")
    assert (begun["name"], begun["project"]) == ("run", "run")
    assert environment["TRACKIO_DIR"] == str(tmp_path / "run" / "trackers" / "trackio")
    losses = [args[0]["train/loss"] for _, args, _, _ in trackio.called("log") if "train/loss" in args[0]]
    assert losses == [loss for _, loss in made.losses] and len(trackio.called("finish")) == 1
    [(_, _, begun, environment)] = mlflow.called("start_run")
    assert begun["run_name"] == "run" and environment["MLFLOW_EXPERIMENT_NAME"] == "run"
    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{(tmp_path / 'run' / 'trackers').as_posix()}/mlflow.db"
    logged = [k for _, _, k, _ in mlflow.called("log_metrics") if "loss" in k["metrics"]]
    assert [(k["step"], k["metrics"]["loss"]) for k in logged] == made.losses
    assert len(mlflow.called("end_run")) == 1 and "MLFLOW_TRACKING_URI" not in os.environ


def test_what_the_user_has_set_stays(folder, tmp_path, trackio, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "mine"))
    tune(folder, SUMS, "lora:rank=2", out=tmp_path / "run", report_to="trackio", **QUICK)
    assert trackio.called("log")[0][3]["TRACKIO_DIR"] == str(tmp_path / "mine") == os.environ["TRACKIO_DIR"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(folder, tmp_path, trackio, fails):
    plain = tune(folder, SUMS, "lora:rank=2", **QUICK)
    trackio.fails = fails
    with pytest.warns(UserWarning, match=r"trackio has failed and is told nothing more.*server is gone"):
        made = tune(folder, SUMS, "lora:rank=2", out=tmp_path / "run", report_to="trackio", **QUICK)
    assert made.losses == plain.losses and made.path.is_file()
    assert len(trackio.called(fails)) == 1  # and never asked again


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DivergedError("the loss is nan")])
def test_a_run_that_diverges_or_is_stopped_closes_its_log(folder, tmp_path, mlflow, error):
    def stop(event):
        if event.step == 2:
            raise error

    with pytest.raises(type(error)):
        tune(folder, SUMS, "lora:rank=2", out=tmp_path / "run", report_to="mlflow", **QUICK | {"progress": stop})
    assert len(mlflow.called("start_run")) == len(mlflow.called("end_run")) == 1
    tune(folder, SUMS, "lora:rank=2", out=tmp_path / "run", report_to="mlflow", resume=False, **QUICK)
    assert len(mlflow.called("start_run")) == len(mlflow.called("end_run")) == 2


def test_unknown_and_absent_trackers_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    assert trackers_of("none") == trackers_of(()) == ()
    with pytest.raises(AddendaError, match=r"and not 'tensorbord'.*Did you mean 'tensorboard'"):
        tune(tmp_path / "no model", SUMS, out=tmp_path / "run", report_to="tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        with pytest.raises(AddendaError, match=rf"not installed: pip install {name}$"):
            tune(tmp_path / "no model", SUMS, out=tmp_path / "run", report_to=name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert trackers_of(["wandb", "mlflow", "wandb"]) == ("wandb", "mlflow")
    with pytest.raises(AddendaError, match="into the folder of the run: give out="):
        tune(tmp_path / "no model", SUMS, report_to="wandb")
    assert not (tmp_path / "run").exists()


def test_a_run_is_called_by_its_folder_and_a_trial_by_its_file(tmp_path):
    assert Tracking.under(tmp_path / "sums", ()) is Tracking.under(None, ("wandb",)) is None
    whole, trial = (Tracking.under(tmp_path / "sums", ("wandb",), *run) for run in ((), ("final-lora-seed0",)))
    assert (whole.run, whole.group, whole.folder) == ("sums", "sums", tmp_path / "sums" / "trackers")
    assert (trial.run, trial.group) == ("final-lora-seed0", "sums")
    assert "tracking" in fit.__annotations__ and Path(trial.folder).name == "trackers"

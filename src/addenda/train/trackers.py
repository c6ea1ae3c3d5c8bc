"""Trackers: the losses of a run in TensorBoard, Weights & Biases, Trackio or MLflow, by transformers' own callbacks.

A tracker is told numbers and decides none: a run is the same with and without. One that fails is left out with a
warning, and the run goes on. What is written to this machine stands in the run's folder, unless the environment names
another place (WANDB_DIR, MLFLOW_TRACKING_URI, …):

    trackers/tensorboard/RUN/     trackers/wandb/     trackers/mlflow.db     trackers/trackio/

A run that goes on after a kill goes on in its log: TensorBoard hides the steps that are made again, and W&B is given
the run's id, which is kept in RUN.id. Trackio has one folder a process, that of its first run. A model is never sent:
a plain Trainer would copy the whole base.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import transformers

from addenda.train.tracking import Tracking

FORCED = ("WANDB_LOG_MODEL", "HF_MLFLOW_LOG_ARTIFACTS")  # variables that do not follow the user's environment


class Told(transformers.TrainerCallback):
    """One tracker's callback, which may fail: then the run goes on without it."""

    def __init__(self, name: str, tracking: Tracking):
        self.name, self.tracking = name, tracking
        self.callback: Any = None
        self.last: tuple = ()  # what it was told with
        self.joined = False  # a run of W&B that the user had begun, and will end
        self.over = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._tell("on_train_begin", args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        self._tell("on_log", args, state, control, logs=numbers, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def end(self) -> None:
        """Close the log: at the end of a run, or where it was interrupted or has diverged."""
        if self.last:
            self._guarded(self._close)
        self.over = True

    def _tell(self, event: str, args, state, control, **kwargs: Any) -> None:
        def tell() -> None:
            if self.callback is None:
                self.callback = self._made(state)
            self.last = args, state, control
            getattr(self.callback, event)(args, state, control, **kwargs)

        if state.is_world_process_zero:
            self._guarded(tell)

    def _close(self) -> None:
        self.callback.on_train_end(*self.last)
        if self.name == "wandb" and not self.joined:  # else the next run of this process would go into the same one
            self.callback._wandb.finish()

    def _guarded(self, do: Callable[[], None]) -> None:
        """Do something in the tracker's environment; where that fails, say so and do no more."""
        if self.over:
            return
        try:
            with _environment(self._places):
                do()
        except Exception as error:
            self.over = True
            warnings.warn(
                f"{self.name} has failed and is told nothing more of this run, which goes on: "
                f"{type(error).__name__}: {str(error)[:500]}",
                stacklevel=2,
            )

    def _made(self, state: transformers.TrainerState) -> transformers.TrainerCallback:
        """Return transformers' callback of this tracker."""
        from transformers.integrations import integration_utils as theirs

        if self.name == "tensorboard":
            made: Any = theirs.TensorBoardCallback()
            folder = self.tracking.folder / "tensorboard" / self.tracking.run
            made.tb_writer = made._SummaryWriter(log_dir=str(folder), purge_step=state.global_step + 1)
            return made
        if self.name == "wandb":
            return self._wandb(theirs.WandbCallback())
        return theirs.TrackioCallback() if self.name == "trackio" else theirs.MLflowCallback()

    def _wandb(self, made: Any) -> transformers.TrainerCallback:
        """Begin a run of W&B, which reads its environment once in a process and so would put all runs in one place."""
        self.joined = made._wandb.run is not None
        if not self.joined:
            made._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "addenda"),
                dir=os.environ.get("WANDB_DIR", str(self.tracking.folder.absolute())),
                name=self.tracking.run, group=self.tracking.group, id=self._id(), resume="allow",
            )  # fmt: skip
        return made

    @cached_property
    def _places(self) -> dict[str, str]:
        """The environment that keeps a tracker's files in the folder. It is made here, since it may fail too."""
        folder = self.tracking.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if self.name == "wandb":
            return {"WANDB_LOG_MODEL": "false"}
        if self.name == "mlflow":
            database = f"sqlite:///{folder.as_posix()}/mlflow.db"
            return {
                "MLFLOW_TRACKING_URI": database, "MLFLOW_EXPERIMENT_NAME": self.tracking.group,
                "HF_MLFLOW_LOG_ARTIFACTS": "FALSE",
            }  # fmt: skip
        return {"TRACKIO_DIR": str(folder / "trackio")} if self.name == "trackio" else {}

    def _id(self) -> str:
        """Return the id of W&B's run, the same when it goes on."""
        file = self.tracking.folder / "wandb" / f"{self.tracking.run}.id"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        return file.read_text().strip()


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment in a `with` block; what the user has set stays, except the FORCED ones."""
    new = {k: v for k, v in wanted.items() if k in FORCED or k not in os.environ}
    before = {k: os.environ.get(k) for k in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

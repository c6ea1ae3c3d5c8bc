"""What a resumed run needs besides the adapter: the states of its optimizer and of every random generator.

They are plain values (`core.file.states` writes them), of a model that is sharded over processes too: its optimizer's
tensors are gathered, and every process takes its own part again.
"""

import random
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import is_sharded, spread, whole


def state_of(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state. Of a sharded model every process must call it; the tensors are gathered."""
    held = optimizer.state_dict()
    sharded, states = [], {}
    for index, state in held["state"].items():
        states[index] = dict(state) if isinstance(state, dict) else state
        for key in [k for k, v in _tensors(state) if is_sharded(v)]:
            sharded.append([index, key])
            states[index][key] = whole(state[key])
    return {**held, "state": states, "sharded": sharded}


def load_state(optimizer: Any, held: Any, where: object) -> None:
    """Put a state that `state_of` returned into an optimizer of the same tensors, each in its own dtype.

    where: what it was read from, for errors. Raises AddendaError where it is of another optimizer.
    """
    with _fitting(where, "the optimizer"):
        groups = optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        there = [len(g["params"]) for g in held["param_groups"]]
        if there != [len(g["params"]) for g in groups]:
            raise ValueError(f"groups of {there} tensors, {[len(g['params']) for g in groups]} here")
        numbers = [i for g in held["param_groups"] for i in g["params"]]
        by_number = dict(zip(numbers, params, strict=True))
        states = {i: dict(state) if isinstance(state, dict) else state for i, state in held["state"].items()}
        if unknown := [i for i in states if isinstance(i, int) and i not in by_number]:
            raise ValueError(f"states of tensors {unknown[:4]}, which are in no group")
        for index, key in held["sharded"]:
            states[index][key] = spread(states[index][key], by_number[index])
        optimizer.load_state_dict({k: v for k, v in held.items() if k != "sharded"} | {"state": states})
        own = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps it
        for index, now in [(i, own[p]) for i, p in by_number.items() if i in states]:
            for key, value in _tensors(states[index]):  # torch gives counts of steps the parameter's dtype
                if value.dtype != now[key].dtype:
                    now[key] = value.to(now[key].device)


def load_schedule(schedule: Any, held: Any, where: object) -> None:
    """Put a state into a schedule of the learning rate. Raises AddendaError where it is of another kind."""
    with _fitting(where, "the schedule"):
        here = schedule.state_dict()
        if set(held) != set(here):
            raise ValueError(f"entries {sorted(set(held) ^ set(here))} are not in both")
        schedule.load_state_dict(held)


def _tensors(state: Any) -> list[tuple[Any, Tensor]]:
    return [(k, v) for k, v in state.items() if isinstance(v, Tensor)] if isinstance(state, dict) else []


def random_state(devices: Iterable[torch.device]) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, and of those of accelerators, in order."""
    name, numbers, *rest = np.random.get_state()
    own = [_module(d).get_rng_state(*_which(d)) for d in _accelerators(devices)]
    drawn = (name, np.asarray(numbers).tolist(), *rest)
    return {"python": random.getstate(), "numpy": drawn, "torch": torch.get_rng_state(), "devices": own}


def set_random_state(held: Any, devices: Iterable[torch.device], where: object) -> None:
    """Set all generators. where: what the state was read from. Raises AddendaError where it does not fit."""
    with _fitting(where, "the random generators"):
        there, here = held["devices"], _accelerators(devices)
        if len(there) != len(here):
            raise ValueError(f"{len(there)} accelerators there, {len(here)} here")
        name, numbers, *rest = held["numpy"]
        random.setstate(held["python"])
        np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
        torch.set_rng_state(held["torch"])
        for device, state in zip(here, there, strict=True):
            _module(device).set_rng_state(state, *_which(device))


def _accelerators(devices: Iterable[torch.device]) -> list[torch.device]:
    return sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple:
    return () if device.type == "mps" else (device,)  # there is one


@contextmanager
def _fitting(where: object, what: str):
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        if isinstance(error, AddendaError):
            raise
        raise AddendaError(
            f"{where} does not fit {what} of this run ({type(error).__name__}: {str(error)[:300]}). Repeat the call "
            "with the options of its run, or start again with resume=False (--no-resume) or in another folder (--out)."
        ) from error

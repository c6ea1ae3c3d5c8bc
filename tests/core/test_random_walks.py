"""Random walks over everything that changes a model: what acts depends on what is there, and not on how it came about.

After each step the model is compared, bit for bit, with one that is made anew: the base, converted as it was, with the
same adapters and their values. What is refused must leave every tensor as it was; what is merged acts as before; and
where all is gone the base has its bits, flags, classes, modes and hooks. `tests/compose/test_random_orders.py` walks
over compositions on one transformer.
"""

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.core.state.state import find_state
from shared import METHODS, NAMES, relative, same_bits, stir

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 6, 1, 9, 8]])
TARGETS = ("linear", "attention", "embedding", "*norm.weight", ("embed", "up_proj"), "layers.0")
OFTEN = ["lora", "shira", "sparse", "full", "dora"]  # of each way to compute
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def outside_of(model: nn.Module) -> list:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
    modules = [
        (n, type(m), m.training, *(len(getattr(m, h)) for h in hooks), {*vars(m)}) for n, m in model.named_modules()
    ]
    return [modules, [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]]


class Walk:
    """A model on its way, what is known to be on it, and how it came there."""

    def __init__(self, seed: int, folder):
        self.rng, self.folder = random.Random(seed), folder
        torch.manual_seed(seed)
        self.model = toys.Tiny().eval()
        for p in self.model.parameters():
            p.requires_grad_(self.rng.random() < 0.8)
        self.base, self.start, self.outside = copy.deepcopy(self.model), tensors_of(self.model), outside_of(self.model)
        self.made, self.active, self.merged, self.count = {}, (), None, 0
        self.history, self.files, self.copied = [], [], False

    def anew(self) -> nn.Module:
        model = copy.deepcopy(self.base)
        for what, how in self.history:
            if what is None:
                model.to(how)
            elif what in self.made:
                how(model)
        for name in self.made:
            ad.adapters(model)[name].load_state_dict(ad.adapters(self.model)[name].state_dict())
        if self.made:
            ad.switch(model, self.active)
        return model

    def look(self, after: str) -> None:
        y = self.model(IDS).detach()
        host = find_state(self.model)
        assert (host is not None) == bool(self.made), after
        assert host is None or (host.state.merged is not None, host.state.active) == (bool(self.merged), self.active), (
            after
        )
        if self.merged is not None:
            assert relative(y, self.merged[0]) < self.merged[1], after
            return
        fresh = self.anew()
        assert torch.equal(y, fresh(IDS)), after
        assert same_bits(tensors_of(self.model), tensors_of(fresh)), after

    def step(self) -> str:
        ways = ["attach"] * 3 + ["load", "to"]
        ways += ["switch", "detach", "save", "merge", "stir", "copy", "block"] * 2 if self.made else []
        way = self.rng.choice(ways + ["unmerge", "unmerge", "to"] * 3 * (self.merged is not None))
        before = tensors_of(self.model)
        try:
            getattr(self, way)()
        except ad.AddendaError:
            assert same_bits(tensors_of(self.model), before), way
            way += ": refused"
        self.look(way)
        return way

    def come(self, name: str, how) -> None:
        how(self.model)
        self.made[name] = True
        self.history.append((name, how))
        self.active = (name,)

    def attach(self) -> None:
        self.count += 1
        name, spec, seed = f"a{self.count}", METHODS[self.rng.choice([*NAMES, *OFTEN * 6])], self.rng.randrange(9)
        heads, targets = ["score"] * (self.rng.random() < 0.3), self.rng.choice(TARGETS)
        data = {"calibration": [IDS], "loss": lambda m, b: m(b).square().mean()} if spec.calibration else {}
        self.come(name, lambda m: ad.attach(m, spec, targets=targets, also_train=heads, name=name, seed=seed, **data))
        self.stir()

    def load(self) -> None:
        if self.files:
            self.count += 1
            name, file = f"a{self.count}", self.rng.choice(self.files)
            self.come(name, lambda m: ad.load(m, file, name=name))

    def to(self) -> None:
        dtype = self.rng.choice(DTYPES)
        if self.rng.random() < (0.3 if self.merged is None else self.merged[2] is None):
            self.model.to(dtype)
            self.history.append((None, dtype))
            self.merged = self.merged and (self.merged[0], 0.2, None)

    def switch(self) -> None:
        names = tuple(self.rng.sample([*self.made], min(len(self.made), self.rng.randrange(3))))
        ad.switch(self.model, names)
        self.active = names

    def detach(self) -> None:
        gone = self.rng.choice([*self.made])
        ad.detach(self.model, gone)
        del self.made[gone]
        self.merged = None if gone in self.active else self.merged
        self.active = tuple(n for n in self.active if n != gone)

    def save(self) -> None:
        file = self.folder / f"{len(self.files)}.safetensors"
        self.files.append(ad.adapters(self.model)[self.rng.choice([*self.made])].save(file, without_base=True))

    def merge(self) -> None:
        dtype, y = self.rng.choice([None, *DTYPES]), self.model(IDS).detach()
        ad.merge(self.model, verify=self.rng.choice([None, IDS]), allow_loss=1.0, dtype=dtype)
        coarse = torch.bfloat16 in (dtype, self.model.score.weight.dtype, y.dtype)
        self.merged = (y, 0.2 if coarse else 1e-3, dtype)

    def unmerge(self) -> None:
        ad.unmerge(self.model)
        self.merged = None

    def stir(self) -> None:
        if self.merged is None:
            stir(ad.adapters(self.model)[self.rng.choice([*self.made])], 0.05, self.rng.randrange(99))

    def copy(self) -> None:
        twin = copy.deepcopy(self.model) if self.rng.random() < 0.5 else pickle.loads(pickle.dumps(self.model))
        if self.rng.random() < 0.5:
            self.model, twin, self.copied = twin, self.model, True
        ad.detach(twin)

    def block(self) -> None:
        names = self.rng.sample([*self.made, None], 2)
        with torch.no_grad(), ad.per_example(self.model, names) if self.rng.random() < 0.5 else ad.disabled(self.model):
            self.model(IDS)
            self.rng.choice((self.save, self.stir, self.switch))()

    def end(self) -> None:
        if self.made:
            ad.detach(self.model)
        plain = copy.deepcopy(self.base)
        for _, dtype in [h for h in self.history if h[0] is None]:
            plain.to(dtype)
        assert same_bits(tensors_of(self.model), tensors_of(plain))
        found = outside_of(self.model)
        assert found == self.outside or (self.copied and found[0] == self.outside[0])


@pytest.mark.parametrize("seed", range(9))
def test_what_acts_is_what_is_there_however_it_came_about(seed, tmp_path):
    walk, done = Walk(seed, tmp_path), []
    for _ in range(24):
        done.append(walk.step())
    walk.end()
    assert len(set(done)) > 7, done

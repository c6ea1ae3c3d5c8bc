"""One table of settings: keywords of Python, options and help of the command line, entries of a checkpoint."""

import inspect
from dataclasses import asdict, fields

import pytest
import typer

from addenda.cli.main import app
from addenda.core.base import ranges
from addenda.core.base.arguments import checked, names_of
from addenda.core.base.errors import AddendaError
from addenda.train.fit import fit
from addenda.train.settings import DOCS, Settings, check_options
from addenda.train.tune import FURTHER

IN_PYTHON_ONLY = {"clip"}
OPTIONS = {p.name: p for p in typer.main.get_command(app).commands["tune"].params}


@pytest.mark.parametrize("name", DOCS)
def test_a_field_is_a_keyword_of_python_and_an_option_of_the_command_with_its_sentence(name):
    keyword = inspect.signature(fit).parameters[name]
    assert keyword.kind is inspect.Parameter.KEYWORD_ONLY and name in FURTHER
    own = next(f for f in fields(Settings) if f.name == name)
    if name != "steps":
        assert keyword.default == own.default
    if name not in IN_PYTHON_ONLY:
        assert OPTIONS[name].help.startswith(DOCS[name])
        assert OPTIONS[name].default in (own.default, None)
    assert DOCS[name].endswith(".") and not DOCS[name].endswith("..")


def test_what_is_no_option_has_no_sentence():
    assert {f.name for f in fields(Settings)} - set(DOCS) == {"data"}
    with pytest.raises(AddendaError, match="fit has no option 'data'"):
        fit(None, None, None, steps=1, data="x")  # type: ignore[arg-type]


def test_a_checkpoint_holds_these():
    assert list(asdict(Settings(3))) == [
        "steps", "batch", "rate", "schedule", "warmup", "weight_decay", "clip", "accumulate", "seed", "group", "data",
        "early_stop", "consistency", "consistency_add", "attention", "loss", "compile", "optimizer", "checkpointing",
        "lean",
    ]  # fmt: skip


def test_settings_that_cannot_be_are_told_together():
    assert Settings(3, early_stop=None).rate == 1e-3
    with pytest.raises(AddendaError, match=r"batch must.*warmup must be a number, got None.*schedule must.*loss must"):
        Settings(3, batch=0, warmup=None, schedule="sine", loss="x")  # type: ignore[arg-type]
    with pytest.raises(AddendaError, match="attention is a name"):
        check_options(steps=1, attention=3)
    numbers = {f.name for f in fields(Settings) if f.type in (int, float, int | None)}
    assert numbers <= set(ranges.RANGES)


def test_a_checked_function_takes_the_documented_fields_of_a_dataclass():
    @checked(settings=Settings, also=("more",))
    def run(steps, *, seed=7, **options):
        """Run."""
        return steps, seed, options

    assert run(1, rate=0.5, more=2) == (1, 7, {"rate": 0.5, "more": 2})
    assert {"rate", "lean", "seed"} <= set(names_of(run)) and not {"data", "more", "steps"} & set(names_of(run))
    assert inspect.signature(run).parameters["seed"].default == 7
    with pytest.raises(AddendaError, match=r"run has no option 'raet'. Did you mean 'rate'"):
        run(1, raet=0.5)
    with pytest.raises(AddendaError, match="rate must be a positive number"):
        run(1, rate=-1)

"""`compress` end to end on tiny models: what comes out, what is reported, and what goes wrong."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

import addenda as ad
from addenda.cli.main import run as cli
from addenda.compressing import work as work_files
from addenda.compressing.dense import to_dense
from addenda.compressing.report import read_report
from addenda.compressing.run import compress
from addenda.compressing.settings import CompressionSettings
from addenda.core.base.errors import AddendaError
from addenda.core.site.targets import grouped
from addenda.quantizing.quantize import quantize
from tiny_models import SUMS, config, make_bert, make_tokenizer

SMALL = {"samples": 24, "length": 48, "judge": 4, "multiple": 1}


@pytest.fixture
def source(tmp_path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    text = "".join(f"{a} times {b} is {a * b}, and {a} plus {b} is {a + b}.\n" for a in range(40) for b in range(12))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path / "model"


def made(source: Path, name: str = "low", **options):
    settings = CompressionSettings(**(SMALL | options))
    return compress(
        source, out=source.parent / name, calibration=source.parent / "text.txt", settings=settings, dtype="float32",
        latency=False,
    )  # fmt: skip


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_comes_out_and_the_source_is_as_it_was(source):
    before = digest(source)
    report = made(source, remove=0.3)
    out = source.parent / "low"
    assert digest(source) == before
    assert not out.with_name("low.unfinished").exists()
    assert 0.66 < report.kept <= 0.7
    model, dense = loaded(out), loaded(source)
    assert report.sizes["compressed"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report.sizes["dense"]["parameters"] == sum(p.numel() for p in dense.parameters())
    again = read_report(out)
    assert again.kept == report.kept and str(again) == str(report)
    shown = str(report)
    assert "parameters kept" in shown and "full rank" in shown and "lm_head" in shown and "perplexity" in shown
    assert "model.layers.*.mlp.down_proj (32 × 64)" in shown and "perplexity, alone" in shown
    low = [x["path"] for x in report.layers if x["rank"] is not None]
    assert set(report.alone) == set(grouped(low)) and "model.layers.*.mlp.up_proj" in report.alone
    assert "multiplications a token" in shown
    for x in report.layers:
        assert x["rank"] is None or x["parameters"] == x["rank"] * (x["m"] + x["n"])


@pytest.mark.parametrize("how", ["svd", "fwsvd", "asvd", "svd-llm", "drone"])
def test_every_route_writes_a_model(source, how):
    report = made(source, how=how, allocate="uniform")
    assert report.kept <= 0.8
    assert all(0 <= x["error"] < 1 for x in report.layers)
    loaded(source.parent / "low")


@pytest.mark.parametrize("options", [
    {"sequential": True}, {"storage": "pivot"}, {"split": "sqrt"}, {"allocate": "energy", "share": 0.9},
    {"allocate": "sensitivity", "rise": 0.5}, {"allocate": "asvd"}, {"of": "flops"}, {"multiple": 4},
    {"weigh": "error"},
], ids=lambda o: "-".join(map(str, o.values())))  # fmt: skip
def test_options(source, options):
    report = made(source, **options)
    if options.get("allocate") not in ("energy", "sensitivity"):
        assert report.kept <= 0.8 + 1e-9
    model = loaded(source.parent / "low")
    ids = torch.arange(40)[None]
    assert torch.isfinite(model(ids).logits).all()


def test_the_loss_weighs_the_layers_of_a_causal_model_unless_told_otherwise(source):
    found = {weigh: made(source, weigh, weigh=weigh) for weigh in ("auto", "loss", "error")}
    ranks = {weigh: {x["path"]: x["rank"] for x in report.layers} for weigh, report in found.items()}
    assert found["auto"].settings["weigh"] == "loss"
    assert ranks["auto"] == ranks["loss"] != ranks["error"]
    assert made(source, "even", allocate="uniform").settings["weigh"] == "error"


def test_a_split_and_a_storage_change_numbers_but_no_output(source):
    ids = torch.arange(40)[None]
    outputs = {}
    for name, options in (("a", {}), ("b", {"split": "sqrt"}), ("c", {"storage": "pivot"})):
        ranks = {"allocate": "uniform", "remove": 0.4, "storage": "factors"} | options
        report = made(source, name, **ranks)
        outputs[name] = (report, loaded(source.parent / name)(ids).logits)
    torch.testing.assert_close(outputs["a"][1], outputs["b"][1], rtol=1e-3, atol=1e-4)
    assert [x["rank"] for x in outputs["a"][0].layers] == [x["rank"] for x in outputs["b"][0].layers]
    more = zip(outputs["c"][0].layers, outputs["a"][0].layers, strict=True)
    assert all(c["rank"] > a["rank"] for c, a in more)  # the same parameters buy higher ranks


def test_centred_adds_biases_and_dense_says_why_it_cannot(source):
    made(source, center=True)
    model = loaded(source.parent / "low")
    assert model.model.layers[0].mlp.up_proj.bias is not None
    with pytest.raises(AddendaError, match="has no place for"):
        to_dense(source.parent / "low", source.parent / "dense")


def test_an_interrupted_run_goes_on_and_ends_the_same(source, monkeypatch):
    made(source, "whole", sequential=True)
    wanted = (source.parent / "whole/model.safetensors").read_bytes()
    write, count = work_files.Work.write, []

    def stop(self, name, solved, uses):
        if len(count) in (1, 3):
            count.append(0)
            raise KeyboardInterrupt
        count.append(0)
        return write(self, name, solved, uses)

    monkeypatch.setattr(work_files.Work, "write", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(source, sequential=True)
        assert not (source.parent / "low").exists()
    with pytest.raises(AddendaError, match="other settings"):
        made(source, storage="pivot")
    report = made(source, sequential=True)
    assert len(count) == 6  # four pieces, each once, and two that were cut off
    assert (source.parent / "low/model.safetensors").read_bytes() == wanted
    assert report.settings["sequential"]


def test_other_ranks_take_the_solved_layers_over(source, monkeypatch):
    """What the advice of an error says to change is changed without solving anew, and comes out as from scratch."""
    wanted = {}
    for name, options in (("a", {}), ("b", {"sequential": True}), ("c", {"sequential": True, "remove": 0.4})):
        made(source, name, **options)
        wanted[name] = (source.parent / name / "model.safetensors").read_bytes()
    written, write = [], work_files.Work.write
    monkeypatch.setattr(work_files.Work, "write", lambda self, n, *a: written.append(n) or write(self, n, *a))
    with pytest.raises(AddendaError, match="Keep more"):
        made(source, remove=0.97)
    assert written == ["piece-000", "piece-001"]
    with monkeypatch.context() as m:
        m.setattr(work_files.Work, "finish", lambda self: None)
        made(source, sequential=True, judge=3)
        made(source, sequential=True, remove=0.4)
    assert len(written) == 6 and len(set(written)) == 6  # each solved again for its own ranks
    made(source)
    assert len(written) == 6
    assert (source.parent / "low/model.safetensors").read_bytes() == wanted["a"]
    for name, options in (("b", {}), ("c", {"remove": 0.4})):
        made(source, f"{name}-again", sequential=True, **options)
        assert (source.parent / f"{name}-again/model.safetensors").read_bytes() == wanted[name]


def test_what_was_judged_is_what_is_reported(source, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(work_files.Work, "finish", lambda self: None)
        few, more = made(source, judge=2), made(source)
    assert few.before != more.before == made(source, "fresh").before


def test_two_runs_of_one_command(source, monkeypatch):
    from addenda.compressing import run

    second, save = [], run.write_report

    def meanwhile(folder, report):
        with pytest.raises(AddendaError, match="Another run is under way in"):
            made(source)
        second.append(1)
        save(folder, report)

    monkeypatch.setattr(run, "write_report", meanwhile)
    made(source)
    assert second and not (source.parent / "low.unfinished").exists()
    loaded(source.parent / "low")
    assert read_report(source.parent / "low").kept <= 0.8


def test_killed_at_its_very_end_a_run_has_left_everything(source, monkeypatch, capsys):
    """Its run file too, which the command writes; and the same command removes what is left beside."""

    class KilledError(BaseException): ...

    def killed(self):
        raise KilledError

    options = ["--samples", "24", "--length", "48", "--dtype", "float32", "--multiple", "1"]
    given = ["compress", "--model", source, "--out", source.parent / "low", "--calibration", source.parent / "text.txt"]
    given = [*map(str, given), "--no-latency", *options]
    with monkeypatch.context() as patched:
        patched.setattr(work_files.Work, "_clear", killed)
        with pytest.raises(KilledError):
            cli(given)
    assert (source.parent / "low/run.yaml").is_file() and (source.parent / "low.unfinished/plan.json").is_file()
    with pytest.raises(SystemExit, match="2"):
        cli(given)
    assert "is there already" in capsys.readouterr().err
    assert not (source.parent / "low.unfinished").exists()


def test_a_piece_that_was_cut_short_is_solved_again(source, monkeypatch):
    made(source, "whole")
    with monkeypatch.context() as m:
        m.setattr(work_files.Work, "finish", lambda self: None)
        made(source)
    piece = source.parent / "low.unfinished/piece-000.safetensors"
    piece.write_bytes(piece.read_bytes()[:1000])
    made(source)
    wanted = (source.parent / "whole/model.safetensors").read_bytes()
    assert (source.parent / "low/model.safetensors").read_bytes() == wanted


def test_dense_touches_neither_its_source_nor_anothers_work(source, monkeypatch):
    tmp = source.parent
    made(source)
    with monkeypatch.context() as m:
        m.setattr(work_files.Work, "finish", lambda self: None)
        made(source, "other")
    held, before = digest(tmp / "low"), {p.name for p in (tmp / "other.unfinished").iterdir()}
    to_dense(tmp / "low", tmp / "other")
    assert {p.name for p in (tmp / "other.unfinished").iterdir()} == before
    assert sorted(p.name for p in tmp.iterdir() if p.name.startswith(".")) == []
    (tmp / "low").rename(tmp / "z.unfinished")
    for out in (tmp / "z", tmp / "z.unfinished/dense"):
        with pytest.raises(AddendaError, match="The source is never written to"):
            to_dense(tmp / "z.unfinished", out)
    assert digest(tmp / "z.unfinished") == held
    source.rename(tmp / "y.unfinished")
    with pytest.raises(AddendaError, match="The source is never written to"):
        made(tmp / "y.unfinished", "y")


def test_nothing_half_done_remains_of_a_dense_folder(source, monkeypatch):
    made(source)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_too)
    before = sorted(source.parent.iterdir())
    with pytest.raises(AddendaError, match="The disk is full at"):
        to_dense(source.parent / "low", source.parent / "dense")
    assert sorted(source.parent.iterdir()) == before


def test_out_may_be_the_folder_one_stands_in(source, monkeypatch):
    (source.parent / "here").mkdir()
    monkeypatch.chdir(source.parent / "here")
    compress(
        source, out=".", calibration=source.parent / "text.txt", settings=CompressionSettings(**SMALL), dtype="float32",
        latency=False, by_type=False,
    )  # fmt: skip
    assert any(type(module).__name__ == "LowRankLinear" for module in loaded(source.parent / "here").modules())


def test_windows_beyond_the_positions(source):
    with pytest.raises(AddendaError, match=r"up to 300 tokens.*LlamaForCausalLM has positions for 256.*--length 256"):
        made(source, length=300)
    assert not (source.parent / "low.unfinished").exists()


def test_models_of_images_are_refused(source, vit):
    from transformers import ViTImageProcessorPil

    vit.save_pretrained(source.parent / "vit")
    ViTImageProcessorPil().save_pretrained(source.parent / "vit")
    with pytest.raises(AddendaError, match=r"vit holds a model of images \(ViT.*Give a causal LM"):
        made(source.parent / "vit")


def test_a_classifier_without_a_budget_to_weigh_for(source):
    bert = source.parent / "bert"
    make_bert().save_pretrained(bert)
    make_tokenizer().save_pretrained(bert)
    assert made(bert, allocate="uniform", weigh="loss").kept <= 0.8


def test_a_full_disk_keeps_what_is_done(source, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("addenda.train.unfinished.write_atomically", full)
        with pytest.raises(AddendaError, match=r"The disk is full at .*MiB free.*same command goes on"):
            made(source)
    with monkeypatch.context() as m:
        m.setattr(LlamaForCausalLM, "save_pretrained", full_too)
        with pytest.raises(AddendaError, match="The disk is full at"):
            made(source)
    assert not (source.parent / "low").exists()
    made(source)


def full_too(self, folder):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_an_encoder_is_judged_by_its_outputs(source):
    from transformers import BertConfig

    torch.manual_seed(0)
    BertForSequenceClassification(config(BertConfig, num_labels=3)).save_pretrained(source.parent / "bert")
    make_tokenizer().save_pretrained(source.parent / "bert")
    settings = CompressionSettings(**SMALL)
    report = compress(
        source.parent / "bert", out=source.parent / "low", calibration=source.parent / "text.txt", settings=settings,
        dtype="float32",
    )  # fmt: skip
    assert "outputs differ by" in str(report)
    assert report.settings["weigh"] == "error"  # there is no loss to weigh by
    assert set(report.speeds["compressed"]) == {"prefill"}
    model = AutoModelForSequenceClassification.from_pretrained(source.parent / "low")
    ranks = {x["path"]: x["rank"] for x in report.layers if x["rank"] is not None}
    assert ranks == {p: m.rank for p, m in model.named_modules() if type(m).__name__ == "LowRankLinear"}
    with pytest.raises(AddendaError, match="--allocate asvd wants the loss of the next token"):
        compress(source.parent / "bert", out=source.parent / "other", settings=CompressionSettings(allocate="asvd"))
    assert report.dense["classifier"].startswith("not among the targets")
    pooled = compress(
        source.parent / "bert", out=source.parent / "pooled", calibration=source.parent / "text.txt", settings=settings,
        targets=["mlp", "bert.pooler.dense"], dtype="float32", latency=False,
    )  # fmt: skip
    assert any("pooler.dense: only 24 rows for its 32 inputs" in note for note in pooled.notes)
    often = {x["path"]: x["dense_multiplications"] / (x["m"] * x["n"]) for x in pooled.layers}
    assert often.pop("bert.pooler.dense") == pytest.approx(1 / SMALL["length"])  # one row for each window
    assert set(often.values()) == {1.0}


def test_the_report_names_every_weight_that_stays_dense(source):
    from transformers import MixtralConfig, MixtralForCausalLM

    mixtral = MixtralForCausalLM(config(MixtralConfig, num_local_experts=4, num_key_value_heads=1))
    mixtral.save_pretrained(source)
    report = made(source)
    seen = {x["path"] for x in report.layers} | report.dense.keys()
    for path, p in mixtral.named_parameters():
        assert p.dim() < 2 or path in seen or path.removesuffix(".weight") in seen, path
    assert report.dense["model.layers.0.mlp.experts.gate_up_proj"].startswith("a stack of matrices")
    assert "dense: model.layers.*.mlp.experts.gate_up_proj (2)" in str(report)


def test_a_loaded_model_is_refused(source):
    with pytest.raises(AddendaError, match=r"^model is the path .*\(LlamaForCausalLM\)"):
        compress(loaded(source), out=source.parent / "low")
    assert not (source.parent / "low").exists()


def test_bad_input(source):
    tmp = source.parent
    for options, says in (
        ({"how": "lrd"}, "Did you mean 'lord'"),
        ({"remove": 1.2}, "between 0 and 1"),
        ({"how": "svd", "center": True}, "Only 'lord'"),
        ({"allocate": "waterfil"}, "Did you mean 'waterfill'"),
        ({"samples": 1, "length": 40}, "fewer than the 64 inputs"),
    ):
        with pytest.raises(AddendaError, match=says):
            made(source, **options)
    with pytest.raises(AddendaError, match="The source is never written to"):
        compress(source, out=source)
    with pytest.raises(AddendaError, match="The source is never written to"):
        compress(source, out=source / "low")
    made(source)
    with pytest.raises(AddendaError, match="has low-rank layers already"):
        compress(tmp / "low", out=tmp / "again")
    (tmp / "taken").mkdir()
    (tmp / "taken/file").write_text("x")
    with pytest.raises(AddendaError, match="not empty"):
        made(source, "taken")
    (tmp / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(AddendaError, match="no column of text"):
        compress(source, out=tmp / "x", calibration=tmp / "rows.jsonl", settings=CompressionSettings(**SMALL))
    with pytest.raises(AddendaError, match="There is no data at"):
        compress(source, out=tmp / "y", calibration=tmp / "txt.txt", settings=CompressionSettings(**SMALL))
    few = made(source, "few", samples=3)
    assert any("four times the width" in n for n in few.notes)


def test_healed_by_an_adapter_on_the_factors_and_the_change_goes_into_them(source):
    made(source, remove=0.4)
    low, out = source.parent / "low", source.parent / "healed"
    before = {k: p.clone() for k, p in loaded(low).named_parameters()}
    healed = ad.tune(low, SUMS, "lora:rank=2,alpha=8", steps=6, batch=4, dtype="float32", chat=False)
    assert "model.layers.1.mlp.down_proj.second" in ad.adapters(healed.model)["default"].methods
    ids = torch.arange(40)[None]
    wanted = healed.model(ids).logits.detach()
    ad.merge(healed.model)
    ad.detach(healed.model, keep_merged=True)
    healed.model.save_pretrained(out)
    again = loaded(out)
    torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    after = dict(again.named_parameters())
    assert {k: p.shape for k, p in after.items()} == {k: p.shape for k, p in before.items()}
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.endswith("_proj.weight") or ".first." in k or ".second." in k}


def test_qlora_over_lord(source):
    made(source, remove=0.4, storage="pivot")
    model = loaded(source.parent / "low")
    assert all(0 < e < 0.2 for e in quantize(model).values())
    adapter = ad.attach(model, "lora:rank=2")
    ids = torch.arange(40)[None]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    wanted = model(ids).logits.detach()
    ad.merge(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_humaneval_is_asked_for_and_counted(source, monkeypatch):
    from addenda.compressing import run, stages

    asked = []
    monkeypatch.setattr(run, "problems", lambda n: [{"task_id": str(i)} for i in range(n)])
    monkeypatch.setattr(
        stages,
        "pass_at_1",
        lambda m, t, p, say: asked.append(1) or {x["task_id"]: "passed" for x in p[len(asked) - 1 :]},
    )
    report = compress(
        source, out=source.parent / "low", calibration=source.parent / "text.txt",
        settings=CompressionSettings(**SMALL), latency=False, by_type=False, humaneval=3,
    )  # fmt: skip
    assert "HumanEval, passed at once: 3 of 3 dense, 2 compressed" in str(report)
    made(source, "other")
    assert len(asked) == 2


def test_the_command(source, capsys):
    out = source.parent / "low"
    options = ["--how", "lord", "--ratio", 0.25, "--samples", 8, "--length", 64, "--dtype", "float32", "--multiple", 4]
    arguments = ["compress", "--model", source, "--out", out, "--calibration", source.parent / "text.txt", *options]
    with pytest.raises(SystemExit) as stopped:
        cli([str(a) for a in arguments])
    assert not stopped.value.code
    told = capsys.readouterr()
    assert "parameters kept" in told.out and "decode:" in told.out and "written:" in told.out
    assert "model.layers.1: 7 layers solved" in told.err
    with pytest.raises(SystemExit):
        cli(["compress", "--how", "dense", "--model", str(out), "--out", str(source.parent / "dense")])
    assert "written:" in capsys.readouterr().out
    assert json.loads((source.parent / "dense/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_settings_and_calibration_of_another_kind_are_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(AddendaError, match=r"settings= are CompressionSettings\(…\), got a dict"):
        compress(tmp_path, out=tmp_path / "out", settings={"remove": 0.2})
    make_bert().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(AddendaError, match=r"calibration is the path of a file.*got a thing in memory \(list\)"):
        compress(tmp_path / "model", out=tmp_path / "out", calibration=["a text"])
    assert not (tmp_path / "out").exists()

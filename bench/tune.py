"""`addenda.tune` on the embedded default against transformers' Trainer with PEFT's LoRA, each with its own defaults.

The same model, dtype, rank, rate, schedule, training examples a step and number of steps; then both are judged by the
same code on the same validation examples. Time is that of everything after the model's files are read.
"""

import statistics
import tempfile
import time

import torch

from bench.measure import in_process, ratios, spread

STEPS, BATCH, RANK, RATE = 40, 16, 8, 1e-3


def run(given) -> tuple[dict, str]:
    found: dict[str, list[dict]] = {"addenda": [], "Trainer + PEFT": []}
    for r in range(given.rounds):
        for arm, function in (("addenda", ours), ("Trainer + PEFT", theirs)):
            found[arm].append(in_process(function, r, given.threads))
            print(arm, found[arm][-1], flush=True)
    return found, table(found)


def _data():
    from addenda.data.encode import encode
    from addenda.data.read import of_task
    from addenda.data.task import embedded_task
    from addenda.models.embedded import model_folder
    from addenda.models.load import load_model

    loaded, task = load_model(model_folder(), task="causal"), embedded_task()
    data = {s: of_task(task, s) for s in ("train", "validation")}
    return loaded, data, {s: encode(d, loaded.tokenizer) for s, d in data.items()}


def _judged(model, held) -> float:
    from addenda.train.evaluate import evaluate

    model.eval()
    return evaluate(model, examples=held.first(128)).loss


def ours(seed: int, threads: int) -> dict:
    import addenda as ad

    torch.set_num_threads(threads)
    loaded, data, encoded = _data()
    started = time.perf_counter()
    made = ad.tune(loaded.model, data["train"], f"lora:rank={RANK}", tokenizer=loaded.tokenizer, steps=STEPS,
                   batch=BATCH, rate=RATE, seed=seed, progress=False)  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "step": made.step_seconds, "loss": _judged(made.model, encoded["validation"])}


def theirs(seed: int, threads: int) -> dict:
    import peft
    import transformers

    torch.set_num_threads(threads)
    loaded, _, encoded = _data()
    started = time.perf_counter()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(loaded.model, config)
    steps: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            steps[-1] = time.perf_counter() - steps[-1]

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, warmup_steps=2, seed=seed,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, weight_decay=0.0,
        )  # fmt: skip
        collator = transformers.DataCollatorForSeq2Seq(loaded.tokenizer, label_pad_token_id=-100)
        trainer = transformers.Trainer(model, arguments, collator, encoded["train"], callbacks=[Clock()])
        trainer.train()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "step": statistics.median(steps), "loss": _judged(model, encoded["validation"])}


def table(found: dict[str, list[dict]]) -> str:
    shares = ratios(found["addenda"], found["Trainer + PEFT"], "seconds")
    about = f"LoRA r = {RANK}, {STEPS} steps of {BATCH} examples, {len(shares)} rounds"
    lines = [f"SmolLM2-135M, sort-numbers, {about}", "",
             "| arm | seconds | a step | validation loss |", "| --- | --- | --- | --- |"]  # fmt: skip
    for arm, made in found.items():
        cells = [
            f"{statistics.median(m['seconds'] for m in made):.1f}",
            f"{statistics.median(m['step'] for m in made):.2f} s",
        ]
        losses = [m["loss"] for m in made]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) |"
        )
    lines += ["", f"Time of addenda over Trainer + PEFT: {spread(shares)}."]
    return "\n".join(lines)

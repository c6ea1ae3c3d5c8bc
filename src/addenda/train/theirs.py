"""The names of transformers' `TrainingArguments`, for whoever comes with them: translated, passed on, or refused.

Every name that a run is given acts. What has an equal here is translated (`learning_rate` is `rate`); what only a
launcher of several processes reads is passed on to the Trainer; everything else is refused, with what to write instead,
since the loop of `train.trainer` would never look at it.
"""

import dataclasses
from collections.abc import Iterable
from enum import Enum
from typing import Any

from addenda.core.base.arguments import unknown_names
from addenda.core.base.errors import AddendaError
from addenda.optim.registry import known

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw-8bit"}
OPTIMIZERS |= {"adamw_bnb_8bit": "adamw-8bit", "paged_adamw_8bit": "paged-adamw-8bit"}

TRANSLATED: dict[str, str] = {
    "learning_rate": "rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "optim": "optimizer",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "max_grad_norm": "clip",
    "torch_compile": "compile",
    "gradient_checkpointing": "checkpointing",
    "activation_checkpointing": "checkpointing",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "output_dir": "out",
}
_VALUES = {"lr_scheduler_type": SCHEDULES, "optim": OPTIMIZERS}

PASSED = (
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "parallelism_config",
    "torch_empty_cache_steps",
)

_INSTEAD = {
    "batch= counts the examples of a whole step, on all devices together; accumulate= cuts it into parts": (
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size dataloader_drop_last "
        "average_tokens_across_devices train_batch_size"
    ),
    "group= puts rows of like length together": "train_sampling_strategy length_column_name group_by_length",
    "seed= is that of start, order and dropout": "data_seed full_determinism",
    "schedule= is 'linear', 'cosine' or 'constant', with warmup= before it": "lr_scheduler_kwargs",
    "optimizer= takes a name with options ('adamw', 'lora-pro:mode=full'), or a function (adapter, rate, weight_decay) "
    "-> torch optimizer": "optim_args adam_beta1 adam_beta2 adam_epsilon optim_target_modules",
    "loss= says how the plain cross-entropy is computed ('auto', 'logits', 'chunked'); consistency= is the only other "
    "term": "label_smoothing_factor use_liger_kernel liger_kernel_config",
    "dropout is an option of the method ('lora:dropout=0.1')": "neftune_noise_alpha",
    "dtype= is that of the base ('bfloat16', 'float16'); the adapter's own numbers stay in float32": (
        "bf16 fp16 bf16_full_eval fp16_full_eval half_precision_backend"
    ),
    "set torch.backends.cuda.matmul.allow_tf32; dtype= is that of the base": "tf32",
    "device= says where a folder's model goes": "use_cpu no_cuda use_mps_device local_rank",
    "compile=True compiles the repeated blocks and measures when that pays": "torch_compile_backend torch_compile_mode",
    "checkpointing=True is non-reentrant, lean=True the cheaper half of it": (
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs"
    ),
    "a run follows no cache; there is nothing to set (checkpointing= saves memory)": "use_cache",
    "report_to= names trackers, and a run is called by the folder of out=": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "progress= takes a function that is told of every step, for a log of yours": (
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter logging_dir "
        "include_num_input_tokens_seen log_level log_level_replica disable_tqdm"
    ),
    "eval_every= says after how many steps eval_data is judged": (
        "eval_strategy evaluation_strategy eval_delay eval_on_start do_train do_eval do_predict "
        "per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps include_for_metrics batch_eval_metrics"
    ),
    "early_stop= keeps the best values by the loss on eval_data": (
        "load_best_model_at_end metric_for_best_model greater_is_better"
    ),
    "save_every= and keep= are for checkpoints in out=, which always hold all that resume= wants": (
        "save_strategy save_only_model save_on_each_node save_safetensors enable_jit_checkpoint"
    ),
    "resume= goes on with the newest checkpoint in out=": (
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint overwrite_output_dir"
    ),
    "nothing is uploaded; out= is a folder": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "the examples are encoded before the first step, by max_length=, overflow= and columns=": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names"
    ),
    "every run measures its memory; memory_floor= of addenda.train.fit says above what": "skip_memory_metrics",
    "the run sets this itself, so that batch= is that of all processes": "accelerator_config",
    "progress= sees every loss, and a run whose loss is not finite stops": "debug",
}
REFUSED: dict[str, str] = {name: why for why, names in _INSTEAD.items() for name in names.split()}


def translated(options: dict[str, Any], own: Iterable[str], whose: str) -> dict[str, Any]:
    """Return the options of a run in our names. own: the names that `whose` takes.

    Raises AddendaError for what is said twice, for what nothing here would read, and for values without an equal.
    """
    own, found, problems = tuple(own), {}, []
    given = {k: v for k, v in options.items() if v is not None or k not in TRANSLATED}
    for name, value in given.items():
        ours = name if name in own else TRANSLATED.get(name)
        if ours in own:
            also = [k for k in given if k != name and (k == ours or TRANSLATED.get(k) == ours) and given[k] is not None]
            if name != ours and also:
                problems.append(f"{name}= and {also[0]}= say the same thing; give {ours}= only")
            try:
                found[ours] = _value(name, value) if name != ours else found.get(ours, value)
            except KeyError:
                problems.append(f"{name}={value!r} has no equal here; {ours}= takes {', '.join(_known(name))}")
        elif ours is not None:
            problems.append(f"{name} is {ours}= in addenda.tune, and {whose} has no {ours}=; {_closest(own)}")
        elif name in REFUSED:
            problems.append(f"{name} is transformers' and is not read here: {REFUSED[name]}")
        elif name in _fields():
            problems.append(f"{name} is transformers' and is not read here; {_closest(own)}")
        else:
            problems.append(unknown_names([name], own, whose, known=(*own, *TRANSLATED)).rstrip("."))
    if problems:
        raise AddendaError(f"{'; '.join(problems)}.")
    return found


def _known(name: str) -> list[str]:
    """Return the values that can be given here for one of transformers' options without an equal."""
    values = {"lr_scheduler_type": dict.fromkeys(SCHEDULES.values()), "optim": known()}[name]
    return [repr(v) for v in values]


def _value(name: str, value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    if name in _VALUES and value is not None:
        return _VALUES[name][value]
    if name in ("torch_compile", "gradient_checkpointing", "activation_checkpointing"):
        return bool(value)
    return value


def _closest(own: tuple[str, ...]) -> str:
    return f"{'steps= is how long it trains, ' if 'steps' in own else ''}its options are {', '.join(own)}"


def _fields() -> frozenset[str]:
    import transformers

    return frozenset(f.name for f in dataclasses.fields(transformers.TrainingArguments))

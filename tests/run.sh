#!/usr/bin/env bash
# Set up an environment without a GPU, then run all tests, or those that are named. In the repository: bash tests/run.sh
set -euo pipefail

# vLLM's CPU build brings torchvision, torchaudio and torchcodec. Their builds on PyPI are for CUDA and break its imports.
if [ ! -e .venv-cpu/ready ]; then
  python3 -m venv .venv-cpu
  .venv-cpu/bin/pip install --no-compile --no-deps torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
  .venv-cpu/bin/pip install --no-compile -r tests/requirements-cpu.txt
  .venv-cpu/bin/pip uninstall -y torchvision torchaudio torchcodec
  touch .venv-cpu/ready
fi

.venv-cpu/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"

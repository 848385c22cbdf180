#!/usr/bin/env bash
# Set up an environment without a GPU, then watch UpSkill learn on a toy. In the repository: bash tests/toy/demo.sh
set -euo pipefail

# vLLM's CPU build brings torchvision, torchaudio and torchcodec. Their builds on PyPI are for CUDA and break its imports.
if [ ! -e .venv-cpu/ready ]; then
  python3 -m venv .venv-cpu
  .venv-cpu/bin/pip install --no-compile --no-deps torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
  .venv-cpu/bin/pip install --no-compile -r tests/requirements-cpu.txt
  .venv-cpu/bin/pip uninstall -y torchvision torchaudio torchcodec
  touch .venv-cpu/ready
fi

# It ends with a table: before training, after training. Other arguments can follow the command.
.venv-cpu/bin/python grpo_upskill.py --model-name tests/toy/model --lora-r 0 --system-prompt "" \
  --dataset tests/toy/train.jsonl --eval-dataset tests/toy/test.jsonl --answer-mode strict \
  --questions-per-step 10 --group-size 10 --max-new-tokens 80 --num-steps 50 --alpha-mi 0.5 \
  --lr 3e-4 --lr-schedule constant --warmup-steps 5 --weight-decay 0 --max-grad-norm 1 \
  --max-tokens-per-microbatch 4096 --mixture-kl-coef 0.05 --eval-every 1000 --eval-samples 1 --eval-temperature 1 "$@"

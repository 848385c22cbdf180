"""What several tests need: no network, and the command of a small training run on the toy."""

import os
import pathlib
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: tests never reach out
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts do

ROOT = pathlib.Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy"

SMALL_RUN = [
    sys.executable, str(ROOT / "grpo_upskill.py"), "--model-name", str(TOY / "model"), "--run-name", "run",
    "--dataset", str(TOY / "train.jsonl"), "--eval-dataset", str(TOY / "test.jsonl"), "--system-prompt", "",
    "--max-new-tokens", "40", "--questions-per-step", "3", "--group-size", "4", "--max-z", "2", "--eval-size", "6",
    "--lr", "1e-3", "--warmup-steps", "1", "--num-steps", "6", "--eval-every", "2", "--save-every", "2",
]  # fmt: skip


def training(*arguments, command=SMALL_RUN, **kwargs):
    """Start a training run as a user would, in a process of its own."""
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        **kwargs,
    )

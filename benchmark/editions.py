"""Scoring and training of this edition of grpo_upskill.py beside the first edition's, in one process, in turn.

    git worktree add /tmp/first 354fceb             # the last commit of the first edition's grpo_perplexity.py
    python benchmark/editions.py toy /tmp/first     # the toy, 650 completions as in a step of the demo
    python benchmark/editions.py large /tmp/first   # Qwen2.5's vocabulary of 151,936, lengths as GSM8K has them

The first edition's functions are those of grpo_perplexity.py. Printed are medians over rounds of seconds and of the
rounds' ratios, and the share of pads in the micro-batches.
"""

import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo_upskill as second

size, folder = sys.argv[1:]
sys.path.append(folder)  # for what it imports
spec = importlib.util.spec_from_file_location("first", Path(folder) / "grpo_perplexity.py")
first = importlib.util.module_from_spec(spec)
sys.modules["first"] = first  # dataclasses look there
spec.loader.exec_module(first)

toy = size == "toy"
rounds, max_tokens = (9, 4096) if toy else (3, 4096)
folder = ROOT / "tests" / "toy" / "model"
rng = np.random.default_rng(0)
if toy:
    prompts = [[5] * 51 for _ in range(650)]
    completions = [rng.integers(3, 500, n).tolist() for n in rng.normal(33, 8, 650).clip(10, 80).astype(int)]
else:
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=151_936, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    lengths = rng.lognormal(np.log(220), 0.45, 20).clip(20, 768).astype(int)
    prompts = [[5] * 110 for _ in lengths]
    completions = [rng.integers(3, 150_000, n).tolist() for n in lengths]
args = second.Args(model_name=str(folder), lora_r=0, max_tokens_per_microbatch=max_tokens)
new = second.Policy(str(folder), torch.float32, 0, 0)
old = first.load_policy(first.Args(model_name=str(folder)), torch.device("cpu"), torch.float32, 0)
totals = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]


def score(edition):
    if edition == "first":
        return first.score(old, prompts, completions, 1.0, 0, max_tokens, 1024)
    return second.score(new, prompts, completions, args, 0)


def train(edition):
    module = first if edition == "first" else second
    few = len(totals) // (5 if toy else 2)  # a step trains fewer rows than it scores
    for rows in module.micro_batches(totals[:few], max_tokens):
        batch = module.pad_batch([prompts[i] for i in rows], [completions[i] for i in rows], 0)
        if edition == "first":
            logps, _ = first.token_logprobs(old, *batch, 1.0, 1024)
        else:
            logps = new(*batch, 1.0)
        logps.sum().backward()


for name, edition in ("first", first), ("second", second):
    batches = edition.micro_batches(totals, max_tokens)
    padded = sum(len(rows) * max(totals[i] for i in rows) for rows in batches)
    print(f"{name} edition: {len(batches)} micro-batches, {1 - sum(totals) / padded:.1%} pads")
assert (score("first") - score("second")).abs().max() < 1e-4
for phase in (score, train):
    seconds = {"first": [], "second": []}
    for number in range(rounds + 1):
        for edition in seconds:
            started = time.perf_counter()
            phase(edition)
            if number:  # the first round warms up
                seconds[edition].append(time.perf_counter() - started)
    a, b = (np.array(seconds[edition]) for edition in ("first", "second"))
    print(f"{phase.__name__}: first {np.median(a):.3f} s, second {np.median(b):.3f} s, ratio {np.median(a / b):.2f}")

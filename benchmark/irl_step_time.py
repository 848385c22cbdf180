"""Seconds of an optimizer step of irl_imitation.py with and without the TD term, and of plain SFT, side by side.

    python benchmark/irl_step_time.py                                        # the toy
    python benchmark/irl_step_time.py --hidden 896 --layers 4 --batch 8      # Qwen2.5-0.5B's width and vocabulary

Forward, backward and AdamW on the same random sequences, the four ways in turn within every round, so that a noisy
machine hits all of them. Printed: median seconds and the median over rounds of each ratio to MLE of the same script
(25 and 75 % quantiles in brackets).

    mle        irl_imitation.py with --lambda-td 0
    irl        the same with --lambda-td 0.1
    policy     the log-probabilities of grpo_upskill.py's Policy: no V, no entropy
    plain      transformers' own loss on labels, which keeps all logits
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from grpo_upskill import Policy
from irl_imitation import Args, ValuePolicy, imitation_loss, pad_batch

parser = argparse.ArgumentParser()
parser.add_argument("--hidden", type=int, default=0, help="0: the toy model, else Qwen2 with vocabulary 151,936")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--prompt", type=int, default=60)
parser.add_argument("--completion", type=int, default=120)
parser.add_argument("--rounds", type=int, default=15)
args = parser.parse_args()

torch.manual_seed(0)
if args.hidden:
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 2 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
else:
    folder = str(ROOT / "tests" / "toy" / "model")
    args.prompt, args.completion = min(args.prompt, 45), min(args.completion, 35)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
policy = ValuePolicy(folder, torch.float32, lora_r=0, lora_alpha=0)
plain_policy = Policy(folder, torch.float32, lora_r=0, lora_alpha=0)
plain_policy.model = model = policy.model  # the same weights
optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
rng = np.random.default_rng(0)
lengths = rng.integers(args.completion // 2, args.completion + 1, args.batch)
prompts = [rng.integers(5, 500, args.prompt).tolist() for _ in lengths]
completions = [rng.integers(5, 500, n).tolist() for n in lengths]
inputs = pad_batch(prompts, completions, 0)
terminal, online = torch.ones(args.batch, device=device).bool(), torch.zeros(args.batch, device=device).bool()
tokens = int(lengths.sum())
labels = torch.full_like(inputs[0], -100)
for row, prompt, completion in zip(labels, prompts, completions, strict=True):
    row[len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)


def script_loss(weight):
    columns = policy(*inputs, terminal)
    return imitation_loss(*columns, inputs[2], terminal, online, tokens, 0, Args(lambda_td=weight), 0.0)[0]


def plain_loss():
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        return model(input_ids=inputs[0], labels=labels, use_cache=False).loss


ways = {
    "mle": lambda: script_loss(0.0),
    "irl": lambda: script_loss(0.1),
    "policy": lambda: -plain_policy(*inputs, 1.0).double().sum() / tokens,
    "plain": plain_loss,
}
losses = {name: way().item() for name, way in ways.items()}
assert max(abs(losses[name] - losses["mle"]) for name in ("policy", "plain")) < 1e-3, losses
seconds = {name: [] for name in ways}
for k in range(args.rounds + 2):
    for name, way in ways.items():
        started = time.perf_counter()
        way().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if k > 1:  # the first two rounds warm up
            seconds[name].append(time.perf_counter() - started)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.batch} sequences, {tokens} completion tokens, "
      f"{torch.get_num_threads()} threads, {args.rounds} rounds, on {device.type}")  # fmt: skip
for name, times in seconds.items():
    ratios = np.array(times) / seconds["mle"]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(f"{name:9} {np.median(times):8.3f} s   {middle:.3f} [{low:.3f}, {high:.3f}] of mle")

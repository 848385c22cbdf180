"""What the memory rewards of grpo_knn_memory.py cost: embedding and look-up apart, with 7,473 questions stored.

    python benchmark/intrinsic_cost.py ENCODER      # folder or hub id of all-MiniLM-L6-v2

Stored: GSM8K's 7,473 training questions with 16 answers each (random unit vectors: look-up does not depend on what they
say). Asked: 16 questions with 16 completions of 150 words, half of them right. Beside it, on the same device, what a
step spends on learning alone: forward and backward of a Qwen2.5-0.5B-shaped model with random weights for 4 of the 256
completions (100 + 200 tokens), times 64. Sampling comes on top of that, so the shares are upper bounds.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_knn_memory import (
    DEVICE,
    EpisodicMemory,
    Policy,
    embed,
    load_encoder,
    load_memories,
    memory_rewards,
    pad_batch,
    save_memories,
)

QUESTIONS, GROUP, BATCH, DIMENSION = 7473, 16, 16, 384


def seconds(function, repeats):
    """Median, least and most seconds of several calls after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return np.median(times[1:]), min(times[1:]), max(times[1:])


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


torch.manual_seed(0)
rng = np.random.default_rng(0)
keys, everything = unit(QUESTIONS, DIMENSION), torch.ones(QUESTIONS, dtype=torch.bool)
print(f"device {DEVICE}, {torch.get_num_threads()} threads")

encoder, tokenizer = load_encoder(sys.argv[1])
encoder.to(DEVICE)
words = [token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 2]
texts = [" ".join(rng.choice(words, 40)) for _ in range(BATCH)]
texts += [" ".join(rng.choice(words, 150)) for _ in range(BATCH * GROUP)]
embedding, *spread = seconds(lambda: embed(encoder, tokenizer, texts, 16384), 3)
print(f"embedding {len(texts)} texts        {embedding:8.3f} s  [{spread[0]:.3f}, {spread[1]:.3f}]")

lookup = {}
for k in (1, 10, 20):
    for mode in ("loo", "past", "sequential"):
        memories = {kind: EpisodicMemory(DIMENSION, 10_000, 100, 1024) for kind in ("exploit", "explore")}
        for memory in memories.values():
            for answers in unit(GROUP, QUESTIONS, DIMENSION):
                memory.add(torch.arange(QUESTIONS), keys, answers, everything)
        asked = torch.tensor(np.repeat(rng.permutation(QUESTIONS)[:BATCH], GROUP))
        batch = asked, keys[asked], unit(len(asked), DIMENSION)
        right = torch.arange(len(asked)) % 2 == 0

        def both(memories=memories, batch=batch, right=right, mode=mode, k=k):
            for kind, memory in memories.items():
                memory_rewards(memory, *batch, right if kind == "exploit" else ~right, kind, mode, k)

        lookup[k, mode], *spread = seconds(both, 5)
        print(f"both memories, K = {k:2}, {mode:10} {lookup[k, mode]:8.3f} s  [{spread[0]:.3f}, {spread[1]:.3f}]")
vectors = sum(len(entry["ids"]) + 1 for memory in memories.values() for entry in memory.entries.values())
print(f"memory: {vectors:,} vectors, {vectors * DIMENSION * 4 / 1e6:.0f} MB")
with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "step_000001"
    writing, *spread = seconds(lambda: save_memories(Path(folder), 1, memories), 3)
    print(f"writing both memories             {writing:8.2f} s  [{spread[0]:.2f}, {spread[1]:.2f}]")
    new = {kind: EpisodicMemory(DIMENSION, 10_000, 100, 1024) for kind in memories}
    started = time.perf_counter()
    load_memories(checkpoint, new)
    print(f"reading both memories             {time.perf_counter() - started:8.2f} s")

config = Qwen2Config(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                     num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    Qwen2ForCausalLM(config).save_pretrained(folder)
    policy = Policy(folder, torch.float32, lora_r=0, lora_alpha=0)
prompt, completion = torch.randint(0, 151_936, (100,)).tolist(), torch.randint(0, 151_936, (200,)).tolist()
batch = pad_batch([prompt] * 4, [completion] * 4, 0)


def forward_backward():
    policy(*batch, 1.0).sum().backward()


learning, *spread = seconds(forward_backward, 2)
print(f"forward-backward of 4 completions {learning:8.2f} s  [{spread[0]:.2f}, {spread[1]:.2f}]")
step = 64 * learning
share = embedding / step, lookup[1, "loo"] / step
print(f"of 256: {step:.0f} s; embedding is {share[0]:.2%} of it, look-up (K = 1, loo) {share[1]:.4%}")

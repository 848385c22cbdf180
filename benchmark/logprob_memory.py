"""Peak memory of the log-probability pass, forward and backward, at Qwen2.5's vocabulary of 151,936.

    python benchmark/logprob_memory.py

Policy holds logits for HEAD_CHUNK tokens at a time, so its peak should grow with HEAD_CHUNK x vocabulary; the plain way
(`full`) holds [completion tokens, vocabulary] in fp32, several times over. Each figure is a process of its own, which
reports its peak above what it held before the pass: allocated bytes on a GPU, resident bytes without one. The model is
a two-layer Qwen2 with hidden size 64 and random weights: the head's share is real, the backbone's is not.
"""

import pathlib
import resource
import subprocess
import sys
import tempfile

VOCABULARY = 151_936


def measure(tokens: int, head_chunk: int) -> int:
    """Bytes at the peak of one forward and backward over `tokens` completion tokens; head_chunk 0 is the plain way."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import grpo_upskill

    grpo_upskill.HEAD_CHUNK = head_chunk
    device = grpo_upskill.DEVICE
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).save_pretrained(folder)
        policy = grpo_upskill.Policy(folder, torch.float32, 0, 0)
    model = policy.model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients exist in training anyway: not part of the pass
    rows = tokens // 128
    batch = grpo_upskill.pad_batch([[5] * 32] * rows, [[7] * 128] * rows, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_rss()
    if head_chunk:
        logps = policy(*batch, 1.0)
    else:
        logits = model(input_ids=batch[0], use_cache=False).logits[:, 31:-1].float()
        logps = logits.log_softmax(-1).gather(-1, batch[0][:, 32:, None])
    logps.sum().backward()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()) - before


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(int(sys.argv[1]), int(sys.argv[2])))
        sys.exit()
    sizes, chunks = (256, 512, 1024, 2048), (64, 256, 1024, 0)
    print(
        f"{'completion tokens':<20}"
        + "".join(f"{'chunk ' + str(c) if c else 'full':>14}" for c in chunks)
        + "   (MB at the peak)"
    )
    for tokens in sizes:
        peaks = [
            int(subprocess.check_output([sys.executable, __file__, str(tokens), str(c)], text=True)) for c in chunks
        ]
        print(f"{tokens:<20}" + "".join(f"{peak / 1e6:>14,.0f}" for peak in peaks), flush=True)

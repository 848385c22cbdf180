"""What fits on which GPU: the peak memory of grpo_upskill.py's trainer, and vLLM beside it. No GPU; 5 to 10 minutes.

    python benchmark/what_fits.py [--max-tokens-per-microbatch 4096]

One training pass of the script's own Policy and loss runs on fake tensors, which have a size and no content, and
MemTracker adds up what they would hold. Gradients and AdamW's moments exist already, as they do from the second
micro-batch of the second step on. Every rank has a full micro-batch, of rows of PROMPT + max_new_tokens tokens.

A card is large enough if (a) the trainer's peak fits while vLLM sleeps, (b) what the trainer keeps between steps fits
beside vLLM's share while vLLM samples, and (c) the whole model fits while it is loaded. In (b) the share must hold
vLLM's weights, its working memory and SEQUENCES whole rows of keys and values. Nothing is offloaded. A cell is one of

    fits, 20.5    at the default --gpu-memory-utilization; GB of the share that are left to the cache
    0.54, 3.1     at this value, the highest that fits; the default does not
    no, peak      not by (a); "no, load" by (c), "no, vLLM" by (b) at any value

Not counted: the allocator's fragmentation, NCCL's buffers and kernels' scratch memory. RESERVE is for them.
"""

import functools
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch._subclasses.fake_tensor import FakeTensorConverter, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import _sharding_prop
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo_upskill

# hidden size, layers, heads, key-value heads, intermediate size, vocabulary, head tied to the embedding
MODELS = {
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "3B": (2048, 36, 16, 2, 11008, 151_936, True),
    "7B": (3584, 28, 28, 4, 18944, 152_064, False),
    "14B": (5120, 48, 40, 8, 13824, 152_064, False),
    "32B": (5120, 64, 40, 8, 27648, 152_064, False),
}
# GB that torch reports of the smallest such card: L4, A100, L40S, H100, H200
CARDS = {"24 GB": 23.6, "40 GB": 42.3, "48 GB": 47.6, "80 GB": 84.9, "141 GB": 150.1}
RANKS = 8
PROMPT = 256  # tokens of a prompt
SEQUENCES = 16  # whole rows that vLLM's cache must hold at least
# GB: CUDA's context, NCCL, cuBLAS, what a sleeping vLLM keeps (its graphs are offloaded too), fragmentation
RESERVE = 3.0


@dataclass
class Args:
    max_tokens_per_microbatch: int = grpo_upskill.Args.max_tokens_per_microbatch  # padded tokens on a rank
    max_new_tokens: int = grpo_upskill.Args.max_new_tokens  # longest completion in tokens; all rows have it


class Tracker(MemTracker):
    """MemTracker's total alone: its figures of every module refuse frozen weights, and take ten times as long."""

    peak = 0

    def _update_peak_stats(self, peak_state):
        self.peak = max(self.peak, self.held())

    def _pre_fw_hook(self, *_):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def held(self) -> int:
        return sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values())


class KnownShapes(TorchFunctionMode):
    """Answers what depends on content, which fake tensors lack, in Policy.forward: all rows have the same lengths."""

    def __init__(self, completion: int):
        super().__init__()
        self.completion = completion

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            return args[0][:, PROMPT - 1 :].flatten(0, 1)  # hidden[:, :-1][predicts]
        if function is torch.Tensor.__int__:
            return self.completion  # int(completion_lens.max())
        if function is torch.Tensor.masked_scatter:
            return args[2].view(args[1].shape).clone()
        return function(*args, **(kwargs or {}))


def make_fake():
    """Replace what fake tensors do not allow.

    Fake tensors lie on the CPU, as those on "cuda" need a torch with CUDA: so DEVICE is only a name, and autocast casts
    on the CPU, the same operations to bf16. A real pass has no mask; transformers makes one where it cannot see that no
    row is packed. The memo of fake tensors would forbid peft to cast weights. DTensor finds shapes with fake tensors of
    the whole size, which would count if they were of our mode. The mesh must not be fake.
    """
    cpu_autocast = functools.partial(torch.autocast, "cpu")
    torch.autocast = lambda device_type, *rest, **named: cpu_autocast(*rest, **named)
    modeling_qwen2.create_causal_mask = lambda **_: None
    FakeTensorConverter.set_tensor_memo = lambda *_: None
    _sharding_prop.detect_fake_mode = lambda: None
    grpo_upskill.DEVICE = types.SimpleNamespace(type="cuda")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    grpo_upskill.fully_shard = functools.partial(grpo_upskill.fully_shard, mesh=mesh)


def simulate(args, shape: tuple, lora_r: int, ranks: int) -> dict:
    """GB of a rank's "load" and training "peak", of its "rest" between steps, and of vLLM's "weights"."""
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    sizes = dict(zip(names.split(), shape[:6], strict=True))
    config = Qwen2Config(**sizes, tie_word_embeddings=shape[6])
    tracker = Tracker()

    def load_model(model_name, dtype):  # there is no file; from_pretrained makes a tied head once, this makes it twice
        config.dtype = dtype
        model = Qwen2ForCausalLM._from_config(config)
        tracker.peak = tracker.held()
        return model

    grpo_upskill.load_model = load_model
    grpo_upskill.WORLD_SIZE = ranks
    with FakeTensorMode(), tracker:
        policy = grpo_upskill.Policy("", torch.bfloat16 if lora_r else torch.float32, lora_r, args.lora_alpha)
        load = tracker.peak
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, args.lr, weight_decay=args.weight_decay, fused=True)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        tracker.peak = 0
        length = PROMPT + args.max_new_tokens
        rows = max(1, args.max_tokens_per_microbatch // length)
        ids = torch.zeros(rows, length, dtype=torch.long)
        lengths = torch.full((rows,), PROMPT), torch.full((rows,), args.max_new_tokens)
        with KnownShapes(args.max_new_tokens):
            logps = policy(ids, *lengths, args.temperature)
        mask, ones = torch.ones_like(logps).bool(), torch.ones_like(logps)
        loss, _ = grpo_upskill.policy_loss(logps, logps.detach(), torch.ones(rows), mask, args, rows, ones)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        peak, rest = tracker.peak, tracker.held()
        weights = sum(2 * p.numel() for name, p in policy.named_parameters() if ".lora_" not in name)
    return {"load": load / 1e9, "peak": peak / 1e9, "rest": rest / 1e9, "weights": weights / 1e9}


def verdict(args, card: float, sizes: dict, shape: tuple) -> str:
    """The cell of a card of `card` GB."""
    for name in ("peak", "load"):
        if sizes[name] + RESERVE > card:
            return f"no, {name}"
    hidden, layers, heads, kv_heads = shape[:4]
    token = 2 * 2 * layers * kv_heads * (hidden // heads)  # bytes: keys and values in bf16
    row = token * (PROMPT + args.max_new_tokens) / 1e9
    # activations, sampler, CUDA graphs: an allowance; on large cards vLLM 0.32 runs 4 times as many sequences at once
    working = 4.0 if card > 75 else 2.0
    for utilization in (args.gpu_memory_utilization, *(percent / 100 for percent in range(95, 0, -1))):
        share = utilization * card
        cache = share - sizes["weights"] - working
        if sizes["rest"] + share + RESERVE <= card and cache >= SEQUENCES * row:
            word = "fits" if utilization == args.gpu_memory_utilization else f"{utilization:.2f}"
            return f"{word}, {cache:.1f}"
    return "no, vLLM"


def print_row(cells: list[str]):
    print("| " + " | ".join(f"{cell:<11}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    given = tyro.cli(Args, description=__doc__)
    args = grpo_upskill.Args(**vars(given))
    make_fake()
    start = time.perf_counter()
    print(f"GB; LoRA rank {args.lora_r}; default --gpu-memory-utilization {args.gpu_memory_utilization}\n")
    print_row(["Qwen2.5", "trained", "GPUs", "load", "peak", "rest", "vLLM weighs", *CARDS])
    print_row(["-" * 11] * (7 + len(CARDS)))
    for model, shape in MODELS.items():
        for trained, lora_r in ("LoRA", args.lora_r), ("all weights", 0):
            for ranks in 1, RANKS:
                sizes = simulate(args, shape, lora_r, ranks)
                verdicts = [verdict(args, card, sizes, shape) for card in CARDS.values()]
                print_row([model, trained, str(ranks), *(f"{size:.1f}" for size in sizes.values()), *verdicts])
    print(f"\n{time.perf_counter() - start:.0f} seconds")

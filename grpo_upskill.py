"""UpSkill (Shah et al. 2026, arXiv 2602.22296): GRPO plus a mutual-information reward that trains distinct skills.

A skill z in 1..N is a text prefix of the question, "Strategy {z} | ...". Every question x is answered under every z,
and a completion y is rewarded for being right and for telling which z produced it:

    r(y; x, z) = r_correct + alpha_mi * r_MI,        r_correct = +1 right, -1 wrong
    r_MI       = log p(y | x, z) - log (1/N) sum_z' p(y | x, z')                          (--mi-form seq, at most ln N)

The mean of r_MI is the mutual information I(y; z | x). Skills spread over different solutions, so that asking each of
them once finds a right one more often than asking one model N times (pass@N). The controls: --alpha-mi 0 is GRPO under
the same prefixes, and --alpha-mi 0 --skill-prefix "" is plain GRPO.

Left out: value network, reward model, multi-turn, 4-bit weights, mixture-of-experts models, the paper's "semantic" MI
(one number for a whole batch, so that subtracting the mean of a group removes it).

    python grpo_upskill.py --model-name Qwen/Qwen2.5-7B-Instruct          # LoRA, one 80 GB GPU
    torchrun --nproc-per-node 8 grpo_upskill.py --lora-r 0 --lr 1e-6      # all weights, eight GPUs, FSDP2
"""

import fcntl
import functools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and trainer live in this one process
# Idle CPU threads go to sleep after some microseconds: busy waiting makes a shared CPU ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# The noise of libraries is turned off here, and only here.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("vllm").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from eval_gsm8k import (
    encode_prompt,
    evaluate,
    extract_answer,
    is_correct,
    load_problems,
    load_tokenizer,
    longest_prompt,
    plain_error,
)

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
# Shapes: B completions of a step, N skills, C tokens of the longest completion, T of the longest row, H hidden size.
HEAD_CHUNK = 1024  # tokens for which logits [HEAD_CHUNK, vocabulary] exist at a time
MAX_PADDING = 0.1  # share of a micro-batch that may be pads
KEEP_CHECKPOINTS = 2


@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, model, seed, time)
    output_dir: str = "runs"  # where run folders are made
    seed: int = 1  # all random numbers are computed from the seed and the step
    track: bool = False  # also log to Weights & Biases (project: WANDB_PROJECT); metrics.jsonl is always written
    # model
    model_name: str = "Qwen/Qwen2.5-7B-Instruct"  # Hugging Face id or folder of a chat model
    lora_r: int = 32  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 32  # LoRA scale: W + (lora_alpha / lora_r) B A
    # data
    dataset: str = "openai/gsm8k"  # hub id, or a .jsonl with `question` and `answer` ("... #### 72")
    eval_dataset: str = ""  # evaluation problems (empty: the test split; of a local file the last tenth)
    system_prompt: str = "You are a helpful math assistant that solves problems step by step."  # empty: none
    # rollout
    num_steps: int = 500  # training steps, each one rollout
    questions_per_step: int = 8  # questions in a rollout
    group_size: int = 10  # completions of each question: every z is sampled group_size / max_z times
    max_new_tokens: int = 768  # longest completion in tokens
    temperature: float = 1.0  # sampling temperature; log-probabilities are taken at the same temperature
    answer_mode: Literal["strict", "flexible", "boxed", "xml", "auto"] = "auto"  # see eval_gsm8k.extract_answer
    # UpSkill
    max_z: int = 5  # number of skills N
    alpha_mi: float = 5.0  # weight of the MI reward; 0 is GRPO, the control, and skips the N scoring passes
    mi_form: Literal["seq", "token", "token_mean"] = "seq"  # mixture of completions or of tokens, see mi_rewards
    mi_gate: bool = False  # pay the MI reward to right completions only, and never less than 0
    mixture_kl_coef: float = 0.0  # weight of log p_ref(y|x) - log mixture(y|x): holds the mean over skills in place
    correct_coef: float = 1.0  # weight of the correctness reward; 0 trains on MI alone
    skill_prefix: str = "Strategy {z} | "  # {z}: the skill's number; "": no skills, a control (with --alpha-mi 0)
    group_by: Literal["question", "skill"] = "question"  # whose mean reward is subtracted: all of x, or of (x, z)
    shuffle_rewards: bool = False  # negative control: permute the rewards of a step, so that nothing can be learned
    # loss
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"  # how tokens are weighted, see policy_loss
    clip_low: float = 0.2  # ratio is clipped below at 1 - clip_low
    clip_high: float = 0.28  # ratio is clipped above at 1 + clip_high (clip-higher, DAPO)
    kl_coef: float = 0.0  # weight of the k3 estimate of KL(policy || start); the paper's runs used 0.04
    is_cap: float = 2.0  # truncated importance sampling: token weights min(p_trainer / p_vllm, is_cap)
    # optimizer
    lr: float = 3e-5  # peak; 3e-5 with alpha_mi 5 and 1e-5 with alpha_mi 1 in the paper's figures, both with LoRA
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # decay to zero after the warm-up, or none
    warmup_steps: int = 50  # linear warm-up, in steps
    weight_decay: float = 0.1  # AdamW's decoupled weight decay
    max_grad_norm: float = 0.1  # gradient norm clip (0.1 in the original code)
    num_minibatches: int = 1  # optimizer steps on each rollout
    # memory and self-check
    max_tokens_per_microbatch: int = 16384  # padded tokens in a rank's forward-backward; halve when out of memory
    gpu_memory_utilization: float = 0.6  # vLLM's share of the GPU while it samples; it sleeps while the policy trains
    max_logp_diff: float | None = None  # the self-check's limit, nats a token; None: 1e-4 in fp32, measured in bf16
    # evaluation and checkpoint
    eval_every: int = 50  # evaluate every so many steps, besides the start and the end
    eval_size: int = 200  # number of evaluation problems; 0: all
    eval_samples: int = 1  # samples of each skill (without prefix: of each question) in an evaluation
    eval_temperature: float = 0.7  # sampling temperature of evaluations; 0 is greedy
    save_every: int = 50  # write a checkpoint every so many steps, besides the end


# ---- Reward and loss -------------------------------------------------------------------------------------------------
def mi_rewards(logps: torch.Tensor, z: torch.Tensor, mask: torch.Tensor, form: str) -> torch.Tensor:
    """Mutual-information reward [B] of each completion, in nats.

    logps [B, N, C]: log p(y_t | x, z', y_<t) of the sampled tokens under every skill z'; z [B]: the index 0..N-1 of the
    skill that sampled; mask [B, C]: True on completion tokens.

    seq          log p(y|x,z) - log (1/N) sum_z' p(y|x,z')           <= ln N; its mean is I(y; z | x)
    token        sum_t log p(y_t|..z..) - log (1/N) sum_z' p(y_t|..z'..)   the paper's formula; <= C ln N, more than I
    token_mean   token / C
    """
    logps = logps.double().masked_fill(~mask[:, None], 0.0)
    if form == "seq":
        logps = logps.sum(-1, keepdim=True)  # the whole completion as one token
    own = logps[torch.arange(len(z)), z]  # [B, C]
    mixture = logps.logsumexp(1) - math.log(logps.shape[1])  # [B, C]
    rewards = (own - mixture).sum(-1)
    if form == "token_mean":
        rewards = rewards / mask.sum(-1)
    return rewards.float()


def skill_metrics(logps: torch.Tensor, z: torch.Tensor, where: str) -> dict:
    """Estimate of I(y; z | x) in nats, always of the form seq; and how often the likeliest z is the one that sampled.

    logps [B, N, C], 0 behind a completion's end; z [B]; where: the prefix of the two names.
    """
    information = mi_rewards(logps, z, torch.ones_like(logps[:, 0]).bool(), "seq").mean().item()
    decoded = (logps.sum(-1).argmax(1) == z).float().mean().item()
    return {f"{where}/mi": information, f"{where}/z_decoded": decoded}


def group_advantages(rewards: torch.Tensor, loss_type: str, eps: float = 1e-4) -> torch.Tensor:
    """(r - mean of the group) / (std of the group + eps) of rewards [groups, G], sample std.

    DeepSeekMath section 4.1, eps as in TRL; dr_grpo does not divide (arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss_type == "dr_grpo":
        return centred
    return centred / (rewards.std(1, keepdim=True) + eps)


def policy_loss(logps, old_logps, advantages, mask, args, denominator, is_weights, ref_logps=None):
    """The micro-batch's share of the step's loss, and sums over its tokens for the log.

    logps, old_logps, is_weights, ref_logps, mask [B, C]; advantages [B]. `denominator` belongs to the whole optimizer
    step, not to this micro-batch: its tokens (dapo), its completions (grpo), or its completions x max_new_tokens
    (dr_grpo); so shares add up to the loss of the batch however it is split. In the formulas w is is_weights.

        ratio_t = exp(logp_t - old_t)
        l_t     = -w_t min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t
        k3_t    = exp(ref_t - logp_t) - (ref_t - logp_t) - 1                                 (DeepSeekMath equation 4)
    """
    advantages = advantages[:, None]
    log_ratio = (logps - old_logps).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    per_token = -is_weights * torch.min(ratio * advantages, clipped * advantages)  # [B, C]
    sums = {
        "clip_low": ((ratio < 1 - args.clip_low) & (advantages < 0) & mask).sum(),
        "clip_high": ((ratio > 1 + args.clip_high) & (advantages > 0) & mask).sum(),
        "approx_kl": (ratio - 1 - log_ratio).detach().sum(),
    }
    if ref_logps is not None:
        log_ref = (ref_logps - logps).masked_fill(~mask, 0.0)
        k3 = log_ref.exp() - log_ref - 1
        per_token = per_token + args.kl_coef * k3
        sums["kl"] = k3.detach().sum()
    per_token = per_token.masked_fill(~mask, 0.0)
    if args.loss_type == "grpo":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    return per_token.sum() / denominator, sums


# ---- Policy and log-probabilities ------------------------------------------------------------------------------------
def check_model(model_name: str):
    """End the program if the model cannot be trained here. It runs before the engine, whose start takes minutes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_name).get_text_config()
    after_the_head = ("final_logit_softcapping", "logits_soft_cap", "logits_scaling", "logit_scale")
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    for name in (*after_the_head, *experts):
        if getattr(config, name, None) not in (None, 0, 1):
            kind = "mixtures of experts" if name in experts else "logits that change after the head"
            sys.exit(f"error: {model_name} sets {name}: {kind} are not supported; use another model.")
    if Path(model_name).is_dir() and not any(Path(model_name).glob("*.safetensors")):
        sys.exit(f"error: {model_name} holds no *.safetensors; save the weights there with save_pretrained.")


def load_model(model_name: str, dtype: torch.dtype):
    """The causal language model with weights in `dtype` on DEVICE; dropout is off, as it is when sampling."""
    from transformers import AutoModelForCausalLM

    with plain_error(f"the weights of {model_name} cannot be read"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_name, dtype=dtype, device_map=DEVICE, use_safetensors=True, output_loading_info=True
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[:3]
        sys.exit(f"error: {model_name} lacks weights, {missing} and so on; save them again.")
    for module in model.modules():
        # vLLM's import changes some classes of transformers, such as GPT-NeoX's, so that they would be compiled
        module.do_not_compile = True
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


class Policy(nn.Module):
    """A causal language model whose forward pass returns log-probabilities of completion tokens.

    With lora_r its base weights are frozen and adapters are trained; else all weights are. Trained weights are in fp32:
    an update of 1e-6 is lost on a bf16 weight.
    """

    def __init__(self, model_name: str, dtype: torch.dtype, lora_r: int, lora_alpha: int):
        super().__init__()
        self.model = load_model(model_name, dtype)
        if DEVICE.type == "cuda":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora_r:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=lora_r, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, config)
            for module in self.model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False  # peft would cast inputs to fp32, and autocast back
        self.train()
        if WORLD_SIZE > 1:
            self.shard()

    def shard(self):
        """FSDP2: each rank keeps a share of every weight, and a layer is whole while it is computed."""
        # On a GPU weights travel in bf16, in which autocast computes anyway; gradients are summed in fp32.
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if DEVICE.type == "cpu":
            precision = MixedPrecisionPolicy()
        layers = [module for module in self.modules() if type(module).__name__ in (self.base._no_split_modules or ())]
        for module in [*layers, self]:
            fully_shard(module, mp_policy=precision)
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by what all ranks hold

    @property
    def base(self):
        """The model without peft's wrapper; its linear layers still hold the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, ids, prompt_lens, completion_lens, temperature: float):
        """Log-probability of every completion token in nats, [B, C] fp32, 0 after a completion's end.

        ids [B, T]: prompt + completion, right-padded (attention is causal: pads to the right change nothing, and no
        mask is needed). Only positions that predict a completion token reach the head, HEAD_CHUNK at a time, and the
        backward pass recomputes their logits: there never is a [B, T, vocabulary].
        """
        position = torch.arange(ids.shape[1] - 1, device=ids.device)
        ends = (prompt_lens + completion_lens)[:, None]
        predicts = (position >= prompt_lens[:, None] - 1) & (position < ends - 1)  # [B, T - 1]
        # No cache: autocast would keep a bf16 copy of every weight until the pass ends, and FSDP frees weights earlier.
        with torch.autocast("cuda", torch.bfloat16, DEVICE.type == "cuda", cache_enabled=False):
            hidden = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]  # [n, H], [n]
            logps = []
            for chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
                logps.append(checkpoint(self.head, *chunk, temperature, use_reentrant=False, preserve_rng_state=False))
        mask = torch.arange(int(completion_lens.max()), device=ids.device) < completion_lens[:, None]  # [B, C]
        return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, torch.cat(logps))

    def head(self, hidden, targets, temperature: float):
        """log p(target) [n] in nats at hidden states [n, H]; formed in fp32, as bf16 is wrong in the third digit."""
        logits = self.base.get_output_embeddings()(hidden).float()  # [n, vocabulary]
        if temperature != 1.0:
            logits = logits / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    def merged_weights(self):
        """(name, tensor) of every weight, whole, under its Hugging Face name; LoRA as W + (alpha / r) B A, in fp32.

        One layer at a time into a temporary, never in place, which would drift in bf16.
        """
        for name, weight in self.base.state_dict().items():
            if ".lora_" in name:
                continue
            if name.endswith(".base_layer.weight"):
                layer = self.base.get_submodule(name.removesuffix(".base_layer.weight"))
                weight = weight.float() + layer.get_delta_weight("default")  # (alpha / r) B A
            yield name.replace(".base_layer.", "."), whole(weight)


@torch.no_grad()
def score(policy, prompts, completions, args, pad_id: int) -> torch.Tensor:
    """Log-probabilities [B, C] of B completions given B prompts (lists of token ids), on the CPU, 0 after the end."""
    logps = torch.zeros(len(prompts), max(map(len, completions), default=0))
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    for micro in micro_batches(lengths, args.max_tokens_per_microbatch):
        batch = pad_batch([prompts[i] for i in micro], [completions[i] for i in micro], pad_id)
        micro_logps = policy(*batch, args.temperature)
        logps[micro, : micro_logps.shape[1]] = micro_logps.cpu()
    if WORLD_SIZE > 1 and prompts:  # each rank has filled in its own rows; NCCL cannot reduce CPU tensors
        policy.reshard()  # FSDP would keep the head whole until the next backward pass
        logps = logps.to(DEVICE)
        dist.all_reduce(logps)
    return logps.cpu()


# ---- Batches ---------------------------------------------------------------------------------------------------------
def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """This rank's rows of each batch.

    Rows are sorted by length, longest first, and cut into batches. A batch is full at max_tokens padded tokens a rank,
    or where more than MAX_PADDING of it would be pads. Each rank takes every WORLD_SIZE-th row of a batch, so that all
    get equally many batches, and of the last perhaps an empty one.
    """
    batches = []
    tokens = 0  # of the last batch, without pads
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            longest, rows = lengths[batches[-1][0]], len(batches[-1])
            full = rows >= WORLD_SIZE * max(1, max_tokens // longest)
            too_short = tokens + lengths[i] < (1 - MAX_PADDING) * (rows + 1) * longest
        if not batches or full or (too_short and rows % WORLD_SIZE == 0):
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return [batch[RANK::WORLD_SIZE] for batch in batches]


def pad_batch(prompts, completions, pad_id: int) -> list[torch.Tensor]:
    """Right-padded prompt + completion: ids [B, T], prompt lengths [B], completion lengths [B], on DEVICE.

    Example: prompts [[5, 6], [7]], completions [[8], [9, 1]] -> ids [[5, 6, 8], [7, 9, 1]], [2, 1], [1, 2].
    """
    if not prompts:  # a rank without rows runs a pad, which adds 0 to every sum and gradient
        prompts, completions = [[pad_id]], [[]]
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts])
    completion_lens = torch.tensor([len(completion) for completion in completions])
    return [tensor.to(DEVICE) for tensor in (ids, prompt_lens, completion_lens)]


# ---- vLLM ------------------------------------------------------------------------------------------------------------
def make_engine(args, max_model_len: int):
    """A vLLM engine in this process, with random weights until the first `sync_weights`."""
    if DEVICE.type == "cuda":
        options = {"dtype": "bfloat16", "gpu_memory_utilization": args.gpu_memory_utilization}
        options |= {"enable_sleep_mode": True, "sleep_mode_offload_cudagraph": True}
    else:
        torch.compiler.set_stance("force_eager")  # vLLM would compile one small function for 20 seconds
        # a cache that does not depend on how much memory happens to be free
        options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
    if WORLD_SIZE > 1:
        options["distributed_executor_backend"] = "external_launcher"  # each rank has an engine of its own
    packages = "requirements.txt, without a GPU tests/requirements-cpu.txt"
    with plain_error(f"vLLM did not start with {args.model_name} on a {DEVICE.type}; it takes {packages}"):
        from vllm import LLM

        return LLM(
            model=args.model_name,
            load_format="dummy",
            max_model_len=max_model_len,
            seed=args.seed,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            use_tqdm_on_load=False,
            **options,
        )


def sample(llm, prompts, n: int, temperature: float, max_new_tokens: int, seed: list[int]) -> list[dict]:
    """n completions of each prompt: [{"tokens", "logps", "finish_reason"}], the n of a prompt side by side.

    `logps` are vLLM's, of the sampled tokens at that temperature. No top-p, no top-k: the loss differentiates the full
    distribution. A completion that ended by itself keeps its end token. All draws follow from `seed`: a resumed run
    needs no generator's state. With several ranks each answers every WORLD_SIZE-th prompt, and all get all answers.
    """
    from vllm import SamplingParams

    params = SamplingParams(n=n, temperature=temperature, max_tokens=max_new_tokens, logprobs=0, detokenize=False)
    draw = int(np.random.SeedSequence([*seed, RANK]).generate_state(1)[0])
    np.random.seed(draw)  # vLLM draws from numpy's generator on a GPU,
    torch.manual_seed(draw)  # from torch's on a CPU
    if not llm.reset_prefix_cache():  # it holds keys and values of older weights; and it would change the draws
        sys.exit("error: vLLM did not reset its prefix cache; its completions would mix old and new weights.")
    requests = [{"prompt_token_ids": prompt} for prompt in prompts[RANK::WORLD_SIZE]]
    answers = []
    for result in llm.generate(requests, params, use_tqdm=False):
        answers.append([])
        for output in result.outputs:
            tokens = list(output.token_ids)
            logps = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
            answers[-1].append({"tokens": tokens, "logps": logps, "finish_reason": output.finish_reason})
    shares = gather(answers)
    return [answer for i in range(len(prompts)) for answer in shares[i % WORLD_SIZE][i // WORLD_SIZE]]


@torch.no_grad()
def sync_weights(llm, policy):
    """Wake the engine and push the policy's weights into it."""
    if DEVICE.type == "cuda":
        llm.wake_up(["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.merged_weights()})
    if DEVICE.type == "cuda":
        llm.wake_up(["kv_cache"])


# ---- Arguments, several processes, run folder ------------------------------------------------------------------------
def check_arguments(args, positive: str, signed: str = ""):
    """End the program if a number is out of range, or if torch cannot use the GPU.

    Every number must be finite and at least 0; those named in `positive` over 0, those in `signed` may be negative.
    """
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not math.isfinite(value):
            sys.exit(f"error: {flag} is {value}; it must be a finite number.")
        if name in positive.split() and value <= 0:
            sys.exit(f"error: {flag} is {value}; it must be over 0.")
        if isinstance(value, (int, float)) and value < 0 and name not in signed.split():
            sys.exit(f"error: {flag} is {value}; it must be at least 0.")
    if torch.version.cuda and DEVICE.type == "cpu":
        sys.exit(
            f"error: torch {torch.__version__} finds no GPU that it can use; nvidia-smi must show a driver for CUDA "
            f"{torch.version.cuda} or later. For a machine without a GPU take tests/requirements-cpu.txt."
        )


def gather(value) -> list:
    """[the value of rank 0, of rank 1, ...] on every rank, [value] in one process; also a barrier: all must call it."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or all of it where FSDP has sharded it; all ranks must call it then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def open_run(args, run_dir: Path) -> str:
    """Make the run's folder and lock it. Returns "", or a sentence if this run cannot have it: then all ranks end.

    The same --run-name goes on where it stopped, with the same arguments: only `free` ones may differ.
    """
    free = "run_name output_dir track max_tokens_per_microbatch gpu_memory_utilization max_logp_diff save_every"
    path = run_dir / "args.json"
    try:
        if run_dir.exists() and set(os.listdir(run_dir)) - {"lock"} and not path.exists():
            return f"error: {run_dir} exists and holds no run; choose another --run-name."
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_CREAT | os.O_RDWR)  # open, and so locked, until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"error: another process runs {run_dir}; wait for its end, or choose another --run-name."
        except OSError:
            pass  # a file system without locks
        wanted = json.loads(json.dumps(asdict(args)))  # with lists for tuples, as the file has them
        before = json.loads(path.read_text()) if path.exists() else wanted
        for name, value in wanted.items():
            if name not in free.split() and before.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                return f"error: {flag} of {run_dir} was {before.get(name)!r}, not {value!r}; choose another --run-name."
        path.with_suffix(".tmp").write_text(json.dumps(asdict(args), indent=2))
        path.with_suffix(".tmp").rename(path)
    except (OSError, ValueError) as error:
        return f"error: {run_dir} cannot be used ({error}); choose another --output-dir or --run-name."
    return ""


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def training_state(policy, optimizer) -> dict:
    """{"policy", "optimizer"}: what is trained and its moments, by name, for torch.distributed.checkpoint."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(policy, optimizer, options=options)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]  # a tied head once
    return {"policy": {name: weights[name] for name in trained}, "optimizer": moments}


def save_checkpoint(folder: Path, policy, optimizer, state: dict):
    """Write weights, moments and `state` to folder/step_<step>, whole or not at all; each rank writes its shards."""
    temporary = folder / "unfinished"
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    gather(None)  # before any rank writes
    with plain_error(f"the checkpoint of step {state['step']} cannot be written to {folder}; make room"):
        dcp.save(training_state(policy, optimizer), checkpoint_id=temporary)
        if RANK == 0:
            with open(temporary / "state.json", "w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(folder / f"step_{state['step']:06d}")
            for old in checkpoints(folder)[:-KEEP_CHECKPOINTS]:
                shutil.rmtree(old)
    gather(None)  # no rank goes on, or ends, before


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def load_checkpoint(path: Path, policy, optimizer) -> dict:
    """Restore a checkpoint and return its `state`; one that cannot be read ends the program."""
    with plain_error(f"{path} cannot be read; delete it, and the run goes on from the checkpoint before"):
        state = json.loads((path / "state.json").read_text())
        loaded = training_state(policy, optimizer)
        dcp.load(loaded, checkpoint_id=path)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights, moments = loaded["policy"], loaded["optimizer"]
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
    return state


def save_final(folder: Path, policy, tokenizer, dtype):
    """A plain Hugging Face model folder (LoRA merged, its adapter under adapter/), complete as soon as it exists."""
    from huggingface_hub import save_torch_state_dict

    tied = {"lm_head.weight"} if policy.base.config.tie_word_embeddings else set()
    weights, adapter = {}, {}
    for name, weight in policy.merged_weights():  # all ranks gather, rank 0 keeps
        if RANK == 0 and name not in tied:
            weights[name] = weight.detach().to("cpu", dtype, copy=True).contiguous()
    for name, weight in policy.model.state_dict().items():
        if ".lora_" in name:
            adapter[name] = whole(weight).detach().to("cpu", copy=True)
    if RANK > 0:
        return
    temporary = folder.with_suffix(".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_torch_state_dict(weights, temporary)
    policy.base.config.dtype = dtype
    policy.base.config.save_pretrained(temporary)
    # as it is: policy.base.save_pretrained would validate it, and refuses that of some models
    (temporary / "generation_config.json").write_text(policy.base.generation_config.to_json_string())
    tokenizer.save_pretrained(temporary)
    if adapter:
        policy.model.save_pretrained(temporary / "adapter", state_dict=adapter)
    temporary.rename(folder)


# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

    positive = "lora_alpha num_steps questions_per_step max_new_tokens temperature max_z num_minibatches is_cap "
    positive += "max_grad_norm max_tokens_per_microbatch eval_every eval_samples save_every"
    check_arguments(args, positive)
    num_skills = args.max_z if args.skill_prefix else 1  # N
    copies = args.group_size // num_skills  # completions of one (question, z)
    if args.group_size < 2 or args.group_size % num_skills:
        sys.exit(f"error: --group-size {args.group_size} must be a multiple of the {num_skills} skills, over 1.")
    if args.group_by == "skill" and copies < 2:
        sys.exit(
            f"error: --group-by skill compares completions of a z: --group-size must be at least {2 * num_skills}."
        )
    if args.skill_prefix and "{z}" not in args.skill_prefix:
        sys.exit(f"error: --skill-prefix {args.skill_prefix!r} has no {{z}} in it: all skills would share a prompt.")
    if not args.skill_prefix and (args.alpha_mi or args.mixture_kl_coef):
        sys.exit('error: --skill-prefix "" leaves no skills to tell apart; add --alpha-mi 0, no --mixture-kl-coef.')

    # data
    problems, eval_problems = load_problems(args.dataset, args.eval_dataset, args.eval_size)
    if len(problems) < args.questions_per_step:
        sys.exit(f"error: {args.dataset} leaves {len(problems)} problems, fewer than --questions-per-step; add rows.")
    tokenizer, context = load_tokenizer(args.model_name, args.system_prompt)
    check_model(args.model_name)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @functools.lru_cache(maxsize=8192)
    def encode(question, z=num_skills):  # token ids of the prompt; z in 1..N, None: no skill
        prefix = args.skill_prefix.replace("{z}", str(z)) if z is not None else ""
        return encode_prompt(tokenizer, prefix + question, args.system_prompt)

    longest = longest_prompt(problems + eval_problems, encode, args.max_new_tokens, context)

    # processes and run folder; rank 0 prints and writes
    if WORLD_SIZE > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
    if RANK > 0:
        sys.stdout, args.track = open(os.devnull, "w"), False
    model_label = Path(args.model_name).name
    run_name = args.run_name or f"{Path(__file__).stem}__{model_label}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.output_dir) / gather(run_name)[0]
    metrics_path, samples_path = run_dir / "metrics.jsonl", run_dir / "samples.jsonl"
    refusal = gather(open_run(args, run_dir) if RANK == 0 else "")[0]
    if refusal:
        sys.exit(refusal)
    if (run_dir / "final").exists():
        print(f"{run_dir} is complete, its model is in {run_dir}/final; another --run-name starts a new run.")
        sys.exit(0)
    if args.track:
        import wandb

        with plain_error("--track does not work; run `wandb login`, or set WANDB_MODE=offline"):
            wandb.init(name=run_dir.name, id=run_dir.name, resume="allow", config=asdict(args))
            wandb.define_metric("*", step_metric="step")

    # The engine comes first, because it measures the free memory and seeds all random generators. Then it sleeps.
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    llm = make_engine(args, longest + args.max_new_tokens)
    if DEVICE.type == "cuda":
        llm.sleep(level=2)  # drops the weights, which sync_weights sends again
    from vllm.config import set_current_vllm_config

    torch.manual_seed(args.seed)
    with set_current_vllm_config(llm.llm_engine.vllm_config):  # the classes that vLLM has changed ask for it
        policy = Policy(args.model_name, dtype if args.lora_r else torch.float32, args.lora_r, args.lora_alpha)
        reference = policy  # LoRA: the same model with its adapters off
        if not args.lora_r and (args.kl_coef or args.mixture_kl_coef):
            reference = Policy(args.model_name, dtype, lora_r=0, lora_alpha=0)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)
    score(policy, [[pad_id]], [[pad_id]], args, pad_id)  # FSDP settles gradient dtypes in its first pass: adapters on

    size = 12 * sum(parameter.numel() for parameter in trainable)  # of a checkpoint: weights and moments
    saved = gather(checkpoints(run_dir / "checkpoints"))[0]
    if shutil.disk_usage(run_dir).free < size * (KEEP_CHECKPOINTS + 1 - len(saved)):
        sys.exit(f"error: a checkpoint takes {size / 1e9:.1f} GB, too much for {run_dir}; choose another --output-dir.")

    # resume: what was logged after the checkpoint is cut off and done again
    state = {"step": 0, "evaluation_due": True, "logp_limit": None, "metrics_bytes": 0, "samples_bytes": 0}
    if saved:
        state = load_checkpoint(saved[-1], policy, optimizer)
        print(f"{run_dir} goes on after step {state['step']}.")
    for path, size in (metrics_path, state["metrics_bytes"]), (samples_path, state["samples_bytes"]):
        found = path.stat().st_size if path.exists() else 0
        if gather(found)[0] < size:
            sys.exit(f"error: {path} is shorter than at its checkpoint; restore it, or choose another --run-name.")
        if RANK == 0:
            with open(path, "ab") as file:
                file.truncate(size)
    logp_limit = state["logp_limit"]
    signals = []
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: signals.append(signum))

    def write(path, records, mode="a"):
        if RANK > 0:
            return
        with plain_error(f"{path} cannot be written; make room, --run-name {run_dir.name} then goes on"):
            with open(path, mode) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def log(record):
        write(metrics_path, [record])
        if args.track:
            wandb.log(record)

    def reference_score(prompts, completions):  # [B, C]
        with policy.model.disable_adapter() if args.lora_r else nullcontext():
            return score(reference, prompts, completions, args, pad_id)

    def skill_logps(questions, completions, temperature):  # [B, N, C]
        prompts = [encode(question, k + 1) for question in questions for k in range(num_skills)]
        repeated = [completion for completion in completions for _ in range(num_skills)]
        logps = score(policy, prompts, repeated, replace(args, temperature=temperature), pad_id)
        return logps.view(len(questions), num_skills, -1)

    def run_evaluation(step):
        t0 = time.perf_counter()

        def generate(prompts):
            return sample(llm, prompts, 1, args.eval_temperature, args.max_new_tokens, [args.seed, step, 1])

        skills = args.max_z if args.skill_prefix else 0
        figures, rows = evaluate(
            generate, tokenizer, eval_problems, encode, args.eval_samples, args.answer_mode, num_skills=skills
        )
        write(run_dir / "completions.jsonl", rows, mode="w")  # of the newest evaluation, for eval_gsm8k.py --compare
        record = {"step": step} | {f"eval/{name}": value for name, value in figures.items()}
        if args.skill_prefix:  # 50 problems are enough to estimate I(y; z | x)
            asked = [row for row in rows if row["arm"] == "distinct" and row["id"] < 50]
            questions, completions = [row["question"] for row in asked], [row["tokens"] for row in asked]
            logps_z = skill_logps(questions, completions, args.eval_temperature or 1.0)
            record |= skill_metrics(logps_z, torch.tensor([row["z"] - 1 for row in asked]), "eval")
        log(record | {"time/eval": time.perf_counter() - t0})

    sync_weights(llm, policy)
    if state["evaluation_due"]:
        run_evaluation(state["step"])
    steps = range(state["step"] + 1, args.num_steps + 1)
    bar = tqdm(steps, initial=state["step"], total=args.num_steps, file=sys.stdout, disable=None)  # None: on a terminal
    for step in bar:
        t0 = time.perf_counter()

        # the learning rate: linear warm-up, then cosine decay to 0
        lr = args.lr * min(1.0, step / max(1, args.warmup_steps))
        if args.lr_schedule == "cosine":
            progress = max(0, step - 1 - args.warmup_steps) / max(1, args.num_steps - args.warmup_steps)
            lr = lr * (0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = lr

        # rollout: group_size completions of each question, z = 0, .., 0, 1, .., 1, .., N - 1
        epoch, position = divmod(step - 1, len(problems) // args.questions_per_step)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(problems))
        chosen = order[position * args.questions_per_step :][: args.questions_per_step]
        batch = [problems[i] for i in chosen for _ in range(args.group_size)]
        questions = [problem["question"] for problem in batch]
        z = torch.arange(num_skills).repeat_interleave(copies).repeat(args.questions_per_step)  # [B]
        prompts = [encode(question, k + 1) for question, k in zip(questions, z.tolist(), strict=True)]
        seed = [args.seed, step, 0]
        asked = prompts[::copies]  # of each question and skill once
        samples = sample(llm, asked, copies, args.temperature, args.max_new_tokens, seed)
        if DEVICE.type == "cuda":
            llm.sleep(level=2)
        completions = [s["tokens"] for s in samples]
        lengths = torch.tensor([len(completion) for completion in completions])  # [B]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, C]
        vllm_logps = pad_sequence([torch.tensor(s["logps"]) for s in samples], batch_first=True)  # [B, C]
        t1 = time.perf_counter()

        # reward: correctness, mutual information, and minus the drift of the mixture from the start
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers = [extract_answer(text, args.answer_mode) for text in texts]
        correct = torch.tensor([is_correct(a, row["gold"]) for a, row in zip(answers, batch, strict=True)])  # [B]
        terms = {"r_correct": args.correct_coef * (2.0 * correct - 1.0)}  # {name: [B]}, weighted
        metrics = {}
        if args.alpha_mi or args.mixture_kl_coef:
            logps_z = skill_logps(questions, completions, args.temperature)  # [B, N, C]
            metrics |= skill_metrics(logps_z, z, "skill")
        if args.alpha_mi:
            r_mi = mi_rewards(logps_z, z, mask, args.mi_form)
            if args.mi_gate:
                r_mi = r_mi.clamp(min=0) * correct
            terms["r_mi"] = args.alpha_mi * r_mi
            metrics["skill/mi_reward"] = r_mi.mean().item()
        if args.mixture_kl_coef:
            log_mixture = logps_z.sum(-1).logsumexp(1) - math.log(num_skills)  # [B]
            log_ref = reference_score([encode(question, None) for question in questions], completions).sum(-1)  # [B]
            terms["r_mixture"] = args.mixture_kl_coef * (log_ref - log_mixture)
            metrics["skill/mixture_kl"] = (log_mixture - log_ref).mean().item()
        rewards = sum(terms.values())  # [B]
        if args.shuffle_rewards:
            rewards = rewards[np.random.default_rng([args.seed, step, 2]).permutation(len(rewards))]
        rewards = gather(rewards)[0]  # rank 0's: ranks may differ in the last bit, and must train on the same rewards
        if not rewards.isfinite().all():
            sys.exit(f"error: a reward of step {step} is not finite: the policy gives NaN or infinity; lower --lr.")
        t2 = time.perf_counter()

        # advantages within a question, or question and skill; groups whose rewards are all equal teach nothing
        groups = rewards.view(-1, args.group_size if args.group_by == "question" else copies)
        advantages = group_advantages(groups, args.loss_type).flatten()  # [B]
        varied = (groups.amax(1) > groups.amin(1)).repeat_interleave(groups.shape[1])  # [B]

        # log-probabilities under the weights that sampled: the old ones of the loss, and for the self-check. With one
        # minibatch the training pass below gives them, exactly, and only the completions that it leaves out are scored
        scored = np.arange(len(batch)) if args.num_minibatches > 1 else np.flatnonzero(~varied)
        scored_logps = score(policy, [prompts[i] for i in scored], [completions[i] for i in scored], args, pad_id)
        old_logps = torch.zeros(mask.shape)  # [B, C]
        old_logps[scored, : scored_logps.shape[1]] = scored_logps
        scored_gap = (old_logps - vllm_logps)[scored].abs().sum().item()
        trained_gap = 0.0  # of this rank
        ref_logps = reference_score(prompts, completions) if args.kl_coef else None  # [B, C]

        # update
        sums = defaultdict(float)
        shuffled = np.random.default_rng([args.seed, step, 1]).permutation(np.flatnonzero(varied))
        for number, minibatch in enumerate(np.array_split(shuffled, args.num_minibatches)):
            denominator = len(minibatch)  # grpo
            if args.loss_type == "dapo":
                denominator = int(lengths[minibatch].sum())
            elif args.loss_type == "dr_grpo":
                denominator = len(minibatch) * args.max_new_tokens

            totals = [len(prompts[i]) + len(completions[i]) for i in minibatch]
            for indices in micro_batches(totals, args.max_tokens_per_microbatch):
                micro = minibatch[indices]
                inputs = pad_batch([prompts[i] for i in micro], [completions[i] for i in micro], pad_id)
                logps = policy(*inputs, args.temperature)
                width = logps.shape[1]
                micro_mask = mask[micro, :width].to(DEVICE)
                micro_vllm = vllm_logps[micro, :width].to(DEVICE)
                micro_ref = ref_logps[micro, :width].to(DEVICE) if args.kl_coef else None
                if args.num_minibatches > 1:
                    micro_old = old_logps[micro, :width].to(DEVICE)
                else:
                    micro_old = logps.detach()
                    trained_gap += (micro_old - micro_vllm).abs().sum().item()
                is_weights = (micro_old - micro_vllm).exp().clamp(max=args.is_cap)
                micro_advantages = advantages[micro].to(DEVICE)
                loss, micro_sums = policy_loss(
                    logps, micro_old, micro_advantages, micro_mask, args, denominator, is_weights, micro_ref
                )
                loss.backward()
                micro_sums |= {"loss": loss.detach(), "tokens": micro_mask.sum(), "entropy": -logps.detach().sum()}
                micro_sums["is_weight"] = (is_weights * micro_mask).sum()
                for name, value in micro_sums.items():
                    sums[name] += value.item()

            # the self-check: stale weights, another temperature or another prompt show here, before the first update
            if number == 0:
                logp_diff = (scored_gap + sum(gather(trained_gap))) / int(lengths.sum())
                if logp_limit is None:  # the weights are the loaded ones still: in bf16 the difference is rounding
                    logp_limit = 1e-4 if dtype == torch.float32 else min(0.1, max(0.03, 3 * logp_diff))
                limit = logp_limit if args.max_logp_diff is None else args.max_logp_diff
                if not logp_diff <= limit:  # NaN fails too
                    sys.exit(
                        f"error: trainer and vLLM differ by {logp_diff:.2g} nats a token in step {step}, the limit is "
                        f"{limit:.2g} (--max-logp-diff): stale weights, another temperature or another prompt?"
                    )
            if len(minibatch):
                grad_norm = whole(nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)).item()
                if not math.isfinite(grad_norm):
                    sys.exit(f"error: the gradient norm of step {step} is {grad_norm}; lower --lr.")
                metrics["losses/grad_norm"] = grad_norm
                optimizer.step()
                optimizer.zero_grad()
        shares = gather(dict(sums))
        sums = {name: sum(share[name] for share in shares) for name in sums}
        t3 = time.perf_counter()

        # sync
        sync_weights(llm, policy)
        t4 = time.perf_counter()

        # log
        trained_tokens = sums.pop("tokens", 1)
        metrics["losses/policy_loss"] = sums.pop("loss", 0.0) / args.num_minibatches
        metrics["rollout/is_weight"] = sums.pop("is_weight", 0.0) / trained_tokens
        metrics |= {f"losses/{name}": value / trained_tokens for name, value in sums.items()}
        metrics |= {
            "rollout/logp_diff": logp_diff,
            "charts/accuracy": correct.float().mean().item(),
            "charts/reward": rewards.mean().item(),
            "charts/reward_std": rewards.std().item(),
            "charts/length": lengths.float().mean().item(),
            "charts/truncated": float(np.mean([s["finish_reason"] == "length" for s in samples])),
            "charts/zero_variance": 1 - varied.float().mean().item(),
            "charts/learning_rate": lr,
            "charts/tokens_per_second": int(lengths.sum()) / (t4 - t0),
            "time/rollout": t1 - t0,
            "time/reward": t2 - t1,
            "time/update": t3 - t2,
            "time/sync": t4 - t3,
        }
        for k in range(num_skills):
            metrics[f"skill/accuracy_{k + 1}"] = correct[z == k].float().mean().item()
        log({"step": step, "global_step": step * len(batch)} | metrics)
        records = []
        for i in range(args.group_size):  # the first question's whole group
            record = {"step": step, "z": int(z[i]) + 1, "question": questions[i], "completion": texts[i]}
            record |= {"answer": answers[i], "gold": batch[i]["gold"], "finish_reason": samples[i]["finish_reason"]}
            record |= {name: values[i].item() for name, values in terms.items()}
            records.append(record | {"reward": rewards[i].item(), "advantage": advantages[i].item()})
        write(samples_path, records)
        names = ("charts/accuracy", "charts/reward", "skill/mi", "charts/length")
        line = "  ".join(f"{name.split('/')[1]} {metrics[name]:.3f}" for name in names if name in metrics)
        if bar.disable:
            print(f"step {step}/{args.num_steps}  {line}  seconds {t4 - t0:.2f}", flush=True)
        else:
            bar.set_postfix_str(line)

        # evaluation and checkpoint
        stop = max(gather(max(signals, default=0)))
        last = step == args.num_steps
        due = last or step % args.eval_every == 0
        if due and not stop:
            run_evaluation(step)
        # (no checkpoint before the first update: Adam has no moments yet, and get_state_dict would invent them)
        if optimizer.state and (last or stop or step % args.save_every == 0):
            state = {"step": step, "evaluation_due": bool(due and stop), "logp_limit": logp_limit}
            if RANK == 0:
                state["metrics_bytes"] = metrics_path.stat().st_size
                state["samples_bytes"] = samples_path.stat().st_size
            save_checkpoint(run_dir / "checkpoints", policy, optimizer, state)
        if stop:
            print(f"signal {stop}: stopped after step {step}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + stop)

    # the end: the model, and what the run has changed
    save_final(run_dir / "final", policy, tokenizer, dtype)
    gather(None)  # no rank ends before: the others' end would stop rank 0 while it writes
    if RANK == 0:
        records = [json.loads(line) for line in metrics_path.read_text().splitlines()]
        evaluations = [record for record in records if "eval/pass@1" in record]
        print(f"\n{'':<24}{'before':>10}{'after':>10}")
        for key in evaluations[0]:
            if key.startswith("eval/"):
                print(f"{key:<24}{evaluations[0][key]:>10.3f}{evaluations[-1][key]:>10.3f}")
        print(f"model: {run_dir / 'final'}   metrics: {metrics_path}   samples: {samples_path}")

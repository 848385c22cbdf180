"""Imitation as inverse reinforcement learning (Wulfmeier et al. 2024, arXiv 2409.01369): TD-regularised MLE.

The logits of a language model are read as a soft Q-function: s is the text so far, a the next token, s' = s + a.

    Q(s, a) = the logit of a,      V(s) = log sum_a exp Q(s, a),      log pi(a|s) = Q(s, a) - V(s)
    r(s, a) = Q(s, a) - gamma V(s')          the reward that the model implies (IQ-Learn, arXiv 2106.12142)

V(s') is 0 behind the end token. Maximum likelihood leaves the rewards arbitrary, because a constant added to all logits
of a state changes no probability. Imitation as inverse RL keeps them small, which holds back an overconfident model:

    loss = mean over the demonstrations' tokens of  -log pi(a|s) + lambda_td r(s, a)^2                     (equation 14)

--online-alpha adds the model's own samples. The controls: --lambda-td 0 is MLE, plain supervised fine-tuning, and
--lambda-td 0 --entropy-coef 0.1 is MLE with an entropy bonus. Each evaluation writes the reward of every token of the
held-out demonstrations and of the samples to rewards.jsonl.

Left out: the paper's GAIL, packing of several demonstrations into one row, 4-bit weights, mixture-of-experts models.

    python irl_imitation.py --model-name Qwen/Qwen2.5-1.5B                # LoRA, one GPU
    torchrun --nproc-per-node 8 irl_imitation.py --lora-r 0 --lr 1e-5     # all weights, eight GPUs, FSDP2
"""

import ast
import fcntl
import functools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
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
import tyro
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from eval_gsm8k import (
    encode_prompt,
    evaluate,
    load_split,
    load_tokenizer,
    longest_prompt,
    plain_error,
    to_number,
)

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
# Shapes: B answers of a batch, C tokens of the longest answer, T of the longest row, n states, H hidden size.
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
    model_name: str = "Qwen/Qwen2.5-1.5B"  # Hugging Face id or folder of a base model, or of a chat model
    lora_r: int = 32  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 32  # LoRA scale: W + (lora_alpha / lora_r) B A
    # data
    dataset: str = "openai/gsm8k"  # hub id, or a .jsonl with `question` and `answer` ("... #### 72")
    eval_dataset: str = ""  # evaluation questions: .jsonl, or hub id with a test split (empty: the held-out)
    max_train_rows: int = 0  # train on the first so many demonstrations, the same for every seed; 0: all
    template: str = "QUESTION: {question}\n\nSOLUTION:"  # the prompt; " " and the answer follow (empty: chat template)
    system_prompt: str = ""  # of the chat template, with --template ""; empty: none
    max_new_tokens: int = 500  # longest answer in tokens; a longer demonstration is cut and has no end token then
    # inverse RL
    lambda_td: float = 0.1  # weight of the mean squared reward; 0 is MLE, the control; a larger one flattens the policy
    gamma: float = 1.0  # discount of V(s') in the reward; at 1 the rewards of an answer sum to log pi + V(prompt)
    mle_steps_before_irl: int = 0  # so many steps of MLE come first, without squared rewards and own samples
    value_shift: float | Literal["auto"] = "auto"  # subtracted from Q and V; auto: mean Q of end tokens at the start
    online_alpha: float = 0.0  # weight of own samples in V - gamma V' and the square, see imitation_loss; below 1
    entropy_coef: float = 0.0  # weight of an entropy bonus on the demonstrations' tokens
    lambda_kl: float = 0.0  # weight of KL(policy || loaded model) on the same tokens, exact over the vocabulary
    # optimizer
    num_train_epochs: int = 3  # passes over the demonstrations; a rest that fills no batch waits; 0 evaluates only
    batch_size: int = 64  # demonstrations in a step
    lr: float = 1e-4  # peak; 1e-4 suits LoRA and small models, 1e-5 all weights of a large one
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # decay to zero after the warm-up, or none
    warmup_steps: int = 10  # linear warm-up, in steps
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm clip
    # memory and self-check
    max_tokens_per_microbatch: int = 16384  # padded tokens in a rank's forward-backward; halve when out of memory
    gpu_memory_utilization: float = 0.6  # vLLM's share of the GPU while it samples; it sleeps while the policy trains
    max_logp_diff: float | None = None  # the self-check's limit, nats a token; None: 1e-4 in fp32, measured in bf16
    # evaluation and checkpoint
    eval_every: int = 50  # evaluate every so many steps, besides the start and the end
    eval_size: int = 200  # number of evaluation problems; 0: all
    eval_samples: int = 8  # samples of each question, for pass@k, Self-BLEU and rewards; at least 2
    eval_temperature: float = 1.0  # sampling temperature of evaluations; greedy accuracy is measured besides
    calculator: bool = False  # also measure greedy accuracy with a calculator that completes "<<48/2="
    save_every: int = 50  # write a checkpoint every so many steps, besides the end


# ---- Reward and loss -------------------------------------------------------------------------------------------------
def token_rewards(values, q_values, lengths, terminal, gamma: float) -> torch.Tensor:
    """r_t = Q_t - gamma V_t+1 of every token, [B, C], 0 after an answer's end.

    values [B, C + 1] and q_values [B, C]: V and Q, see ValuePolicy.forward; lengths, terminal [B]: an answer's tokens,
    and whether it ends by itself. Behind an end token V is 0; where the length limit has cut an answer it is the
    model's own V. If gamma is 1 and an answer ends, its rewards sum to log pi + V(prompt). So among the answers to one
    question that end, the sums rank as log pi does.
    """
    position = torch.arange(q_values.shape[1], device=q_values.device)
    end = terminal[:, None] & (position == lengths[:, None] - 1)  # [B, C], True at the end token
    rewards = q_values - gamma * values[:, 1:].masked_fill(end, 0.0)
    return rewards.masked_fill(position >= lengths[:, None], 0.0)


def imitation_loss(
    values, q_values, entropy, kl, lengths, terminal, is_own, demo_tokens: int, own_tokens: int, args, shift: float
):
    """The micro-batch's share of the step's loss, and sums over its demonstrations' tokens for the log.

    values [B, C + 1]; q_values, entropy, kl [B, C]: see ValuePolicy.forward; lengths, terminal [B]: see token_rewards;
    is_own [B]: True for the model's own samples. demo_tokens and own_tokens count the tokens of the whole step, on all
    ranks; E_demo and E_own divide by them. So the shares of all micro-batches add up to the loss of the step. `shift`
    is subtracted from all Q and V. With a = online_alpha and D = V - gamma V':

        E_demo[-log pi + lambda_kl KL - entropy_coef H] + lambda_td {(1 - a) E_demo[r^2] + a E_own[r^2]}
            + a {E_own[D] - E_demo[D]}

    That is IQ-Learn's -E_demo[r] + E_mix[D] + lambda_td E_mix[r^2] over the mixture (1 - a) demo + a own; for a = 0 it
    is the paper's equation 14 (IQ-Learn's 12). Without an entropy bonus it is never below -a / (4 lambda_td (1 - a)).
    Gradients flow through V', as in IQ-Learn.
    """
    values, q_values = values.double() - shift, q_values.double() - shift
    log_pi = q_values - values[:, :-1]
    rewards = token_rewards(values, q_values, lengths, terminal, args.gamma)
    difference = rewards - log_pi  # D

    position = torch.arange(q_values.shape[1], device=q_values.device)
    mask = position < lengths[:, None]  # [B, C]
    demo_mask, own_mask = mask & ~is_own[:, None], mask & is_own[:, None]
    demo_weight = demo_mask.double() / demo_tokens  # of a token in E_demo
    own_weight = own_mask.double() / max(1, own_tokens)
    alpha = args.online_alpha
    per_token = demo_weight * (args.lambda_kl * kl - args.entropy_coef * entropy - log_pi)
    per_token = per_token + args.lambda_td * ((1 - alpha) * demo_weight + alpha * own_weight) * rewards**2
    per_token = per_token + alpha * (own_weight - demo_weight) * difference

    end = terminal[:, None] & (position == lengths[:, None] - 1)
    logged = {"losses/mle": -log_pi, "losses/td": rewards**2, "losses/kl": kl, "irl/entropy": entropy}
    logged |= {"irl/reward": rewards, "irl/value": values[:, :-1] + shift, "irl/td_terminal": end * rewards**2}
    return per_token.sum(), {name: (demo_mask * value.detach()).sum() for name, value in logged.items()}


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


class ValuePolicy(nn.Module):
    """A causal language model whose forward pass reads its logits as Q: V, Q, entropy and KL of an answer's states.

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

    def forward(
        self,
        ids,
        prompt_lens,
        completion_lens,
        terminal,
        reference_head=None,
        reference_hidden=None,
        train_entropy=False,
        states_only=False,
    ):
        """V [B, C + 1], and Q, entropy and KL(policy || reference) [B, C], in nats and fp32, 0 after the end.

        V belongs to the state before each completion token. If the completion was cut, the last V belongs to the state
        behind its last token; if it ended by itself, that V is 0. ids [B, T]: prompt + completion, right-padded
        (attention is causal: pads to the right change nothing, and no mask is needed); terminal [B]: whether the
        completion ends by itself. The entropy has a gradient only with train_entropy. With states_only the hidden
        states [n, H] are returned, and nothing else: the KL needs those of the reference, and its head. Only the states
        named reach the head, HEAD_CHUNK at a time, and the backward pass recomputes their logits: there never is a
        [B, T, vocabulary].
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        ends = (prompt_lens + completion_lens - terminal.long())[:, None]
        is_state = (position >= prompt_lens[:, None] - 1) & (position < ends)  # [B, T]
        # No cache: autocast would keep a bf16 copy of every weight until the pass ends, and FSDP frees weights earlier.
        with torch.autocast("cuda", torch.bfloat16, DEVICE.type == "cuda", cache_enabled=False):
            hidden = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state[is_state]  # [n, H]
            if states_only:
                return hidden
            actions = ids.roll(-1, 1)[
                is_state
            ]  # the token after each state; meaningless behind a cut, and masked below
            inputs = [hidden, actions]
            if reference_hidden is not None:
                inputs.append(reference_hidden)
            outputs = []
            for chunk in zip(*[tensor.split(HEAD_CHUNK) for tensor in inputs], strict=True):
                arguments = (train_entropy, reference_head, *chunk)
                outputs.append(checkpoint(self.head, *arguments, use_reentrant=False, preserve_rng_state=False))

        position = torch.arange(int(completion_lens.max()) + 1, device=ids.device)
        has_value = position < (completion_lens + 1 - terminal.long())[:, None]  # [B, C + 1]
        padded = torch.zeros((*has_value.shape, 4), device=ids.device)
        values, q_values, entropy, kl = padded.masked_scatter(has_value[:, :, None], torch.cat(outputs)).unbind(-1)
        after = position[:-1] >= completion_lens[:, None]  # [B, C]
        q_values, entropy, kl = (tensor[:, :-1].masked_fill(after, 0.0) for tensor in (q_values, entropy, kl))
        return values.clone(), q_values, entropy, kl  # FSDP warns of a view

    def head(self, train_entropy, reference_head, hidden, actions, reference_hidden=None):
        """V, Q, entropy, KL, [n, 4], at hidden states [n, H]; formed in fp32, as bf16 is wrong in the third digit.

        On a GPU the logits come out of a bf16 product all the same: a Q of 16 to 32 is rounded to 0.125.
        """
        logits = self.base.get_output_embeddings()(hidden).float()  # [n, vocabulary]
        values = logits.logsumexp(-1)
        q_values = logits.gather(-1, actions[:, None])[:, 0]
        logps = logits - values[:, None]
        with torch.set_grad_enabled(train_entropy):
            entropy = -(logps.exp() * logps).sum(-1)
        kl = torch.zeros_like(values)
        if reference_hidden is not None:
            with torch.no_grad():
                reference_logps = reference_head(reference_hidden).float().log_softmax(-1)
            kl = (logps.exp() * (logps - reference_logps)).sum(-1)
        return torch.stack([values, q_values, entropy, kl], dim=-1)

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
def score_answers(policy, rows: list[dict], args, pad_id: int, shift: float) -> list[dict]:
    """The rows {"prompt", "tokens", "terminal"}, and with each what the policy says of its answer.

    Added: "rewards", "log_pis", "entropies", one number a token; "sum" and "mean" of the rewards; "log_pi" and
    "mean_log_pi", sum and mean of the log-probabilities; "v0", V of the prompt. `shift` is subtracted from all Q and V.
    """
    scored = {}
    totals = [len(row["prompt"]) + len(row["tokens"]) for row in rows]
    for micro in micro_batches(totals, args.max_tokens_per_microbatch):
        ids, prompt_lens, lengths, terminal = pad_rows([rows[i] for i in micro], pad_id)
        values, q_values, entropy, _ = policy(ids, prompt_lens, lengths, terminal)
        values, q_values = values.double() - shift, q_values.double() - shift
        rewards = token_rewards(values, q_values, lengths, terminal, args.gamma)
        figures = torch.stack([rewards, q_values - values[:, :-1], entropy]).cpu().numpy()  # [3, B, C]
        first_values = values[:, 0].tolist()
        for k, i in enumerate(micro):
            rewards, log_pis, entropies = figures[:, k, : len(rows[i]["tokens"])]
            scores = {"sum": rewards.sum(), "mean": rewards.mean(), "v0": first_values[k]}
            scores |= {"log_pi": log_pis.sum(), "mean_log_pi": log_pis.mean()}
            scores |= {"rewards": rewards.tolist(), "log_pis": log_pis.tolist(), "entropies": entropies.tolist()}
            scored[i] = rows[i] | scores
    if WORLD_SIZE > 1:  # each rank has its own rows
        policy.reshard()  # FSDP would keep the head whole until the next backward pass
    for share in gather(scored):
        scored |= share
    return [scored[i] for i in range(len(rows))]


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


def pad_rows(rows: list[dict], pad_id: int) -> list[torch.Tensor]:
    """pad_batch of rows {"prompt", "tokens", "terminal"}, and terminal [B]."""
    batch = pad_batch([row["prompt"] for row in rows], [row["tokens"] for row in rows], pad_id)
    terminal = [row["terminal"] for row in rows] or [True]
    return [*batch, torch.tensor(terminal, device=DEVICE)]


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


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def self_bleu(texts: list[str], num_samples: int) -> float:
    """Mean BLEU-4 of each text against the others of its question (Zhu et al. 2018): 1 if all are the same.

    The num_samples >= 2 texts of a question stand side by side. On words and punctuation marks, smoothed by method 1 of
    Chen and Cherry 2014; a copy has BLEU 1, however short.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    scores = []
    for i, own in enumerate(words):
        first = i - i % num_samples
        others = words[first:i] + words[i + 1 : first + num_samples]
        scores.append(1.0 if own in others else sentence_bleu(others, own, smoothing_function=smoothing))
    return float(np.mean(scores))


def answer_figures(held_out: list[dict], samples: list[dict], num_samples: int) -> dict[str, float]:
    """Means over the tokens of rows of score_answers, and how well their scores tell right samples from wrong ones.

    {score}_spearman: rank correlation with correctness over all samples. {score}_best_of: accuracy of each question's
    best sample, the mean of the best where several tie. {score}_auroc: chance that a right sample scores above a wrong
    one of its question, ties half; mean over the questions that have both. The num_samples of a question stand side by
    side.
    """
    from scipy.stats import mannwhitneyu, spearmanr

    figures = {}
    for label, rows in ("val", held_out), ("sample", samples):
        figures[f"eval/{label}_mle"] = -np.concatenate([row["log_pis"] for row in rows]).mean()
        figures[f"eval/{label}_td"] = (np.concatenate([row["rewards"] for row in rows]) ** 2).mean()
        figures[f"eval/{label}_entropy"] = np.concatenate([row["entropies"] for row in rows]).mean()

    correct = np.array([row["correct"] for row in samples]).reshape(-1, num_samples)  # [questions, K]
    for name in ("sum", "mean", "log_pi", "mean_log_pi"):
        scores = np.array([row[name] for row in samples]).reshape(-1, num_samples)
        best = scores == scores.max(1, keepdims=True)
        figures[f"reward/{name}_best_of"] = ((correct & best).sum(1) / best.sum(1)).mean()
        if correct.any() and not correct.all():
            figures[f"reward/{name}_spearman"] = spearmanr(scores, correct, axis=None).statistic
        aurocs = []
        for question_scores, right in zip(scores, correct, strict=True):
            if right.any() and not right.all():
                u = mannwhitneyu(question_scores[right], question_scores[~right], method="asymptotic").statistic
                aurocs.append(u / (right.sum() * (~right).sum()))
        if aurocs:
            figures[f"reward/{name}_auroc"] = np.mean(aurocs)
    return {name: float(value) for name, value in figures.items()}


def arithmetic(node: ast.AST) -> Fraction:
    """Value of a parsed expression of numbers and + - * / ( ); ValueError if it holds anything else."""
    match node:
        case ast.Constant():
            return Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub()):
            return -arithmetic(node.operand)
        case ast.BinOp(op=ast.Add()):
            return arithmetic(node.left) + arithmetic(node.right)
        case ast.BinOp(op=ast.Sub()):
            return arithmetic(node.left) - arithmetic(node.right)
        case ast.BinOp(op=ast.Mult()):
            return arithmetic(node.left) * arithmetic(node.right)
        case ast.BinOp(op=ast.Div()):
            return arithmetic(node.left) / arithmetic(node.right)
    raise ValueError("there is more in it than numbers and + - * /")


def with_calculation(text: str) -> str | None:
    """The text up to its first "<<48/2=" with a wrong or missing value, and then the right one: "<<48/2=24>>".

    None if there is no such place. Python's parser reads the expression, and `arithmetic` computes it: nothing is ever
    evaluated as code. What is no expression of numbers and + - * / ( ) stays as it is.
    """
    for match in re.finditer(r"<<([0-9*+\-/.(), ]{1,100})=", text):
        try:
            value = arithmetic(ast.parse(match[1].replace(",", "").strip(), mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError):
            continue
        number = str(value) if value.denominator == 1 else f"{float(value):.10g}"
        written, closed, _ = text[match.end() :].partition(">>")
        if not closed or to_number(written) not in (value, Fraction(number)):  # number is rounded: 10/3
            return f"{text[: match.end()]}{number}>>"
    return None


def sample_with_calculator(llm, tokenizer, max_new_tokens: int, prompts: list[list[int]]) -> list[dict]:
    """Greedy completions with a calculator.

    Each is cut behind its first "<<48/2=" with a wrong or missing value, the right value is put in, and the rest is
    sampled anew, until none is wrong or the answer is at its limit.
    """
    begun = [[] for _ in prompts]
    completions = [{} for _ in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        asked = [prompts[i] + begun[i] for i in unfinished]
        samples = sample(llm, asked, 1, 0.0, max_new_tokens, [0])
        still_wrong = []
        for i, answer in zip(unfinished, samples, strict=True):
            completions[i] = answer | {"tokens": (begun[i] + answer["tokens"])[:max_new_tokens]}
            text = with_calculation(tokenizer.decode(completions[i]["tokens"], skip_special_tokens=True))
            begun[i] = tokenizer(text or "", add_special_tokens=False)["input_ids"]
            if 0 < len(begun[i]) < max_new_tokens:
                still_wrong.append(i)
        unfinished = still_wrong
        if not unfinished:
            break
    return completions


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

    positive = "lora_alpha max_new_tokens batch_size eps max_grad_norm max_tokens_per_microbatch eval_every save_every"
    check_arguments(args, positive, signed="value_shift")
    if args.gamma > 1 or args.online_alpha >= 1 or args.eval_samples < 2:
        sys.exit("error: --gamma must be at most 1, --online-alpha below 1, and --eval-samples at least 2.")
    if args.online_alpha and not args.lambda_td:
        sys.exit("error: --online-alpha needs a --lambda-td over 0: else the loss has no lower bound.")
    args.template = args.template.replace("\\n", "\n")  # as it is typed in a shell
    if args.template and "{question}" not in args.template:
        sys.exit(f"error: --template {args.template!r} has no {{question}} in it: all prompts would be the same.")
    if args.template and args.system_prompt:
        sys.exit('error: --system-prompt is for the chat template; add --template "".')

    # data: a tenth is held out, the rows that train_test_split(test_size=0.1, seed=42) of datasets chooses
    problems = load_split(args.dataset, "train")
    split_order = np.random.default_rng(42).permutation(len(problems))
    tenth = math.ceil(0.1 * len(problems))
    held_out = [problems[i] for i in split_order[:tenth]]
    problems = [problems[i] for i in split_order[tenth:]][: args.max_train_rows or None]
    eval_problems = load_split(args.eval_dataset, "test") if args.eval_dataset else held_out
    eval_problems = eval_problems[: args.eval_size or None]
    steps_per_epoch = len(problems) // args.batch_size
    num_steps = args.num_train_epochs * steps_per_epoch
    if args.num_train_epochs and not num_steps:
        sys.exit(
            f"error: {args.dataset} leaves {len(problems)} demonstrations, fewer than --batch-size {args.batch_size}; "
            "lower it, or add rows."
        )
    tokenizer, context = load_tokenizer(args.model_name, None if args.template else args.system_prompt)
    check_model(args.model_name)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @functools.lru_cache(maxsize=8192)
    def encode(question, z=None):  # token ids of the prompt; z: evaluate's skill, there is none here
        if args.template:
            return tokenizer(args.template.replace("{question}", question))["input_ids"]
        return encode_prompt(tokenizer, question, args.system_prompt)

    def demonstration(problem):  # prompt and answer are tokenised apart, so that their border is exact
        answer = " " + problem["answer"] if args.template else problem["answer"]
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        terminal = len(tokens) <= args.max_new_tokens
        return {"prompt": encode(problem["question"]), "tokens": tokens[: args.max_new_tokens], "terminal": terminal}

    longest = longest_prompt(problems + held_out + eval_problems, encode, args.max_new_tokens, context)
    demonstrations = [demonstration(problem) for problem in problems]
    validation = [{"kind": "held_out", "id": i} | demonstration(problem) for i, problem in enumerate(held_out)]

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
    metrics_path = run_dir / "metrics.jsonl"
    refusal = gather(open_run(args, run_dir) if RANK == 0 else "")[0]
    if refusal:
        sys.exit(refusal)
    if (run_dir / "final").exists():
        print(f"{run_dir} is complete, its model is in {run_dir}/final; another --run-name starts a new run.")
        sys.exit(0)
    cut = sum(not row["terminal"] for row in demonstrations)
    print(f"{len(problems)} demonstrations, {cut} cut at --max-new-tokens; {len(held_out)} held out; {num_steps} steps")
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
        policy = ValuePolicy(args.model_name, dtype if args.lora_r else torch.float32, args.lora_r, args.lora_alpha)
        reference = policy  # LoRA: the same model with its adapters off
        if not args.lora_r and args.lambda_kl:
            reference = ValuePolicy(args.model_name, dtype, lora_r=0, lora_alpha=0)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    betas = (0.9, 0.95)
    optimizer = torch.optim.AdamW(trainable, args.lr, betas, args.eps, args.weight_decay, fused=True)
    pad = {"prompt": [pad_id], "tokens": [pad_id], "terminal": True}
    score_answers(policy, [pad], args, pad_id, 0.0)  # FSDP settles gradient dtypes in its first pass: adapters on

    size = 12 * sum(parameter.numel() for parameter in trainable)  # of a checkpoint: weights and moments
    saved = gather(checkpoints(run_dir / "checkpoints"))[0]
    if shutil.disk_usage(run_dir).free < size * (KEEP_CHECKPOINTS + 1 - len(saved)):
        sys.exit(f"error: a checkpoint takes {size / 1e9:.1f} GB, too much for {run_dir}; choose another --output-dir.")

    # resume: what was logged after the checkpoint is cut off and done again
    state = {"step": 0, "evaluation_due": True, "logp_limit": None, "shift": None, "metrics_bytes": 0}
    if saved:
        state = load_checkpoint(saved[-1], policy, optimizer)
        print(f"{run_dir} goes on after step {state['step']}.")
    found = metrics_path.stat().st_size if metrics_path.exists() else 0
    if gather(found)[0] < state["metrics_bytes"]:
        sys.exit(f"error: {metrics_path} is shorter than at its checkpoint; restore it, or choose another --run-name.")
    if RANK == 0:
        with open(metrics_path, "ab") as file:
            file.truncate(state["metrics_bytes"])
    signals = []
    if num_steps:  # an evaluation alone has nothing to save
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

    def reference_states(inputs):  # [n, H]
        with torch.no_grad(), policy.model.disable_adapter() if args.lora_r else nullcontext():
            return reference(*inputs, states_only=True)

    def own_answers(prompts, seed):  # one for each prompt, at temperature 1
        samples = sample(llm, prompts, 1, 1.0, args.max_new_tokens, seed)
        for prompt, answer in zip(prompts, samples, strict=True):
            answer |= {"prompt": prompt, "terminal": answer["finish_reason"] == "stop"}
        return samples

    def self_check(step, rows):  # rows: own samples at temperature 1; ends the run if trainer and vLLM disagree
        scored = score_answers(policy, rows, args, pad_id, 0.0)
        gaps = [np.subtract(row["log_pis"], row["logps"]) for row in scored]
        logp_diff = float(np.abs(np.concatenate(gaps)).mean())
        if state["logp_limit"] is None:  # the weights are the loaded ones still: in bf16 the difference is rounding
            state["logp_limit"] = 1e-4 if dtype == torch.float32 else min(0.1, max(0.03, 3 * logp_diff))
        limit = state["logp_limit"] if args.max_logp_diff is None else args.max_logp_diff
        if not logp_diff <= limit:  # NaN fails too
            sys.exit(
                f"error: trainer and vLLM differ by {logp_diff:.2g} nats a token in step {step}, the limit is "
                f"{limit:.2g} (--max-logp-diff): stale weights, another temperature or another prompt?"
            )
        return logp_diff

    def run_evaluation(step):
        t0 = time.perf_counter()

        def generate(prompts, temperature=args.eval_temperature):
            return sample(llm, prompts, 1, temperature, args.max_new_tokens, [args.seed, step, 1])

        figures, rows = evaluate(generate, tokenizer, eval_problems, encode, args.eval_samples, "strict")
        write(run_dir / "completions.jsonl", rows, mode="w")  # of the newest evaluation, for eval_gsm8k.py --compare
        greedy_generate = functools.partial(generate, temperature=0.0)
        greedy, _ = evaluate(greedy_generate, tokenizer, eval_problems, encode, answer_mode="strict")
        figures["greedy"] = greedy["pass@1"]
        if args.calculator:
            calculate = functools.partial(sample_with_calculator, llm, tokenizer, args.max_new_tokens)
            calculated, _ = evaluate(calculate, tokenizer, eval_problems, encode, answer_mode="strict")
            figures["calculator"] = calculated["pass@1"]
        figures["self_bleu"] = self_bleu([row["completion"] for row in rows], args.eval_samples)
        record = {"step": step, "irl/shift": state["shift"]} | {f"eval/{name}": x for name, x in figures.items()}
        prompts = [
            encode(problem["question"]) for problem in eval_problems[: max(16, WORLD_SIZE)]
        ]  # of every rank's engine
        record["rollout/logp_diff"] = self_check(step, own_answers(prompts, [args.seed, step, 2]))

        for row in rows:
            row |= {"kind": "sample", "prompt": encode(row["question"]), "terminal": not row["truncated"]}
        scored = score_answers(policy, validation + rows, args, pad_id, state["shift"])
        write(run_dir / "rewards.jsonl", scored, mode="w")
        record |= answer_figures(scored[: len(validation)], scored[len(validation) :], args.eval_samples)
        log(record | {"time/eval": time.perf_counter() - t0})

    # The level of the logits is arbitrary. At gamma 1 it cancels in Q - V', but not at an end token, whose reward is Q
    # alone: 5 or 30, and its square would drown all others. So the mean Q of end tokens at the start is subtracted.
    if state["shift"] is None:
        state["shift"] = args.value_shift
        if args.value_shift == "auto":
            ended = [row for row in demonstrations if row["terminal"]][:256]
            scored = score_answers(policy, ended, args, pad_id, 0.0)
            state["shift"] = float(np.mean([row["rewards"][-1] for row in scored])) if ended else 0.0

    sync_weights(llm, policy)
    if state["evaluation_due"]:
        run_evaluation(state["step"])
    mle_args = replace(args, lambda_td=0.0, online_alpha=0.0)  # of the first mle_steps_before_irl steps
    steps = range(state["step"] + 1, num_steps + 1)
    bar = tqdm(steps, initial=state["step"], total=num_steps, file=sys.stdout, disable=None)  # None: on a terminal
    for step in bar:
        t0 = time.perf_counter()

        # the learning rate: linear warm-up, then cosine decay to 0
        lr = args.lr * min(1.0, step / max(1, args.warmup_steps))
        if args.lr_schedule == "cosine":
            progress = max(0, step - 1 - args.warmup_steps) / max(1, num_steps - args.warmup_steps)
            lr = lr * (0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = lr

        # rollout: the demonstrations, and with online_alpha the model's own answers to their questions
        epoch, position = divmod(step - 1, steps_per_epoch)
        epoch_order = np.random.default_rng([args.seed, epoch]).permutation(len(demonstrations))
        chosen = epoch_order[position * args.batch_size :][: args.batch_size]
        batch = [demonstrations[i] for i in chosen]
        step_args = args if step > args.mle_steps_before_irl else mle_args
        own_rows, metrics = [], {}
        if step_args.online_alpha:
            own_rows = own_answers([row["prompt"] for row in batch], [args.seed, step, 0])
            metrics["rollout/logp_diff"] = self_check(step, own_rows[: max(16, WORLD_SIZE)])
        if DEVICE.type == "cuda":
            llm.sleep(level=2)  # does nothing if it sleeps already
        rows = batch + own_rows
        demo_tokens = sum(len(row["tokens"]) for row in batch)
        own_tokens = sum(len(row["tokens"]) for row in own_rows)
        t1 = time.perf_counter()

        # loss and update
        sums = defaultdict(float)
        totals = [len(row["prompt"]) + len(row["tokens"]) for row in rows]
        for micro in micro_batches(totals, args.max_tokens_per_microbatch):
            inputs = pad_rows([rows[i] for i in micro], pad_id)
            _, _, lengths, terminal = inputs
            is_own = torch.tensor([i >= len(batch) for i in micro] or [False], device=DEVICE)
            reference_head = reference_hidden = None
            if args.lambda_kl:
                reference_head, reference_hidden = reference.base.get_output_embeddings(), reference_states(inputs)
            train_entropy = args.entropy_coef > 0
            values, q_values, entropy, kl = policy(*inputs, reference_head, reference_hidden, train_entropy)
            statistics = (values, q_values, entropy, kl, lengths, terminal, is_own, demo_tokens, own_tokens)
            loss, micro_sums = imitation_loss(*statistics, step_args, state["shift"])
            loss.backward()
            micro_sums["losses/loss"] = loss.detach()
            for name, value in micro_sums.items():
                sums[name] += value.item()
        grad_norm = whole(nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)).item()
        if not math.isfinite(grad_norm):
            sys.exit(f"error: the gradient norm of step {step} is {grad_norm}; lower --lr.")
        optimizer.step()
        optimizer.zero_grad()
        shares = gather(dict(sums))
        sums = {name: sum(share[name] for share in shares) for name in sums}
        t2 = time.perf_counter()

        # sync, if the engine samples next; else it sleeps on
        last = step == num_steps
        due = last or step % args.eval_every == 0
        if due or (args.online_alpha and step >= args.mle_steps_before_irl):
            sync_weights(llm, policy)
        t3 = time.perf_counter()

        # log
        metrics["losses/loss"] = sums.pop("losses/loss")
        metrics["losses/grad_norm"] = grad_norm
        metrics["irl/td_terminal"] = sums.pop("irl/td_terminal") / max(1, sum(row["terminal"] for row in batch))
        metrics |= {name: value / demo_tokens for name, value in sums.items()}
        metrics |= {
            "irl/lambda": step_args.lambda_td,
            "irl/shift": state["shift"],
            "charts/learning_rate": lr,
            "charts/tokens_per_second": (demo_tokens + own_tokens) / (t3 - t0),
            "time/rollout": t1 - t0,
            "time/update": t2 - t1,
            "time/sync": t3 - t2,
        }
        log({"step": step, "global_step": step * len(batch)} | metrics)
        names = ("losses/loss", "losses/mle", "losses/td", "irl/entropy")
        line = "  ".join(f"{name.split('/')[1]} {metrics[name]:.3f}" for name in names)
        if bar.disable:
            print(f"step {step}/{num_steps}  {line}  seconds {t3 - t0:.2f}", flush=True)
        else:
            bar.set_postfix_str(line)

        # evaluation and checkpoint
        stop = max(gather(max(signals, default=0)))
        if due and not stop:
            run_evaluation(step)
        if last or stop or step % args.save_every == 0:
            state |= {"step": step, "evaluation_due": bool(due and stop)}
            if RANK == 0:
                state["metrics_bytes"] = metrics_path.stat().st_size
            save_checkpoint(run_dir / "checkpoints", policy, optimizer, state)
        if stop:
            print(f"signal {stop}: stopped after step {step}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + stop)

    # the end: the model, and what the run has changed
    if num_steps:
        save_final(run_dir / "final", policy, tokenizer, dtype)
    gather(None)  # no rank ends before: the others' end would stop rank 0 while it writes
    if RANK == 0:
        records = [json.loads(line) for line in metrics_path.read_text().splitlines()]
        evaluations = [record for record in records if "eval/pass@1" in record]
        print(f"\n{'':<24}{'before':>10}{'after':>10}")
        for key in evaluations[0]:
            if key.startswith("eval/"):
                print(f"{key:<24}{evaluations[0][key]:>10.3f}{evaluations[-1][key]:>10.3f}")
        model = run_dir / "final" if num_steps else args.model_name
        print(f"model: {model}   metrics: {metrics_path}   rewards: {run_dir / 'rewards.jsonl'}")

"""Memory-R (Le et al. 2025, arXiv 2504.02273): GRPO for tiny models, with rewards from a memory of their own answers.

Two memories, of right and of wrong answers, keep embeddings of the answers' reasoning, by question. The embedding a of
a new answer is compared with M, the stored answers to the K questions nearest to its own:

    distance = || a - mean of M ||             r_exploit = 1 - (distance - min) / (max - min),   M of right answers
    novelty  = 1 - max over m in M of a . m    r_explore = (novelty - min) / (max - min),        M of wrong answers

Minima and maxima are those of recent scores. Both rewards are added to those for answer and format (Memory-R+; Memory-R
has r_exploit only). M leaves a itself out. In the authors' code (--memory-mode sequential) it does not, so that
r_explore is 0 for all wrong answers. The controls: --intrinsic none is GRPO, --intrinsic-control gives placebos.

Left out: value network, multi-turn, 4-bit weights, mixture-of-experts models; of the authors' code the entropy, tree
and sentence-level rewards.

    python grpo_knn_memory.py --model-name Qwen/Qwen2.5-0.5B-Instruct     # all weights, meant for one 80 GB GPU
"""

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
from dataclasses import asdict, dataclass
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
    evaluate,
    extract_answer,
    is_correct,
    load_problems,
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
# Shapes: B completions of a step, G of a group, C tokens of the longest completion, T of the longest row, H hidden
# size, d size of an embedding, m answers in M.
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
    model_name: str = "Qwen/Qwen2.5-0.5B-Instruct"  # Hugging Face id or folder of a chat model
    lora_r: int = 0  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 32  # LoRA scale: W + (lora_alpha / lora_r) B A
    # data
    dataset: str = "openai/gsm8k"  # hub id, or a .jsonl with `question` and `answer` ("... #### 72")
    eval_dataset: str = ""  # evaluation problems (empty: the test split; of a local file the last tenth)
    system_prompt: str = (  # empty: none
        "Answer in this format:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\nonly the number\n</answer>"
    )
    num_shots: int = 0  # examples in every prompt: the first training problems, then left out of training
    # rollout
    num_steps: int = 500  # training steps, each one rollout
    questions_per_step: int = 16  # questions in a rollout
    group_size: int = 16  # completions of each question
    max_new_tokens: int = 200  # longest completion in tokens
    temperature: float = 0.9  # sampling temperature; log-probabilities are taken at the same temperature
    answer_mode: Literal["strict", "flexible", "boxed", "xml", "auto"] = "xml"  # see eval_gsm8k.extract_answer
    # Memory-R: weights of the rewards
    correct_coef: float = 1.0  # the right number
    int_coef: float = 0.5  # an integer between the answer tags
    strict_coef: float = 0.5  # the default system prompt's format, each tag on a line of its own
    soft_coef: float = 0.5  # the same order of tags, with any white space
    xml_coef: float = 0.5  # share of the tags that stand once; text behind the last costs
    cosine_coef: float = 0.0  # the paper's length baseline: right answers should be short, wrong ones long
    exploit_coef: float = 1.0  # r_exploit
    explore_coef: float = 1.0  # r_explore
    # Memory-R: the memories
    intrinsic: Literal["none", "exploit", "explore", "both"] = "both"  # Memory-R: exploit, Memory-R+: both
    explore_warmup_steps: int = 50  # steps without r_explore, while wrong answers are collected
    memory_mode: Literal["loo", "past", "sequential"] = "loo"  # whom an answer is compared with, see memory_rewards
    knn_k: int = 1  # nearest questions K whose answers are read
    max_keys: int = 10000  # questions that a memory holds; the oldest goes first
    max_values: int = 100  # answers that it holds of each; the oldest goes first
    norm_window: int = 1024  # recent scores whose minimum and maximum scale new ones (paper: 100)
    embed_model: str = "sentence-transformers/all-MiniLM-L6-v2"  # sentence encoder, hub id or folder
    intrinsic_control: Literal["none", "shuffled", "matched"] = "none"  # placebos, see the function placebo
    compat: bool = False  # answer and format rewards as the authors' code has them, see format_rewards
    # loss
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"  # how tokens are weighted, see policy_loss
    clip_low: float = 0.2  # ratio is clipped below at 1 - clip_low
    clip_high: float = 0.28  # ratio is clipped above at 1 + clip_high (clip-higher, DAPO)
    kl_coef: float = 0.04  # weight of the k3 estimate of KL(policy || start); the paper's runs used 0.04
    is_cap: float = 2.0  # truncated importance sampling: token weights min(p_trainer / p_vllm, is_cap)
    # optimizer
    lr: float = 1e-6  # peak; 5e-6 in the paper, on bf16 weights that lose most of each update
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
    eval_samples: int = 1  # samples of each question in an evaluation
    eval_temperature: float = 0.7  # sampling temperature of evaluations; 0 is greedy
    save_every: int = 50  # write a checkpoint every so many steps, besides the end


# ---- Reward and loss -------------------------------------------------------------------------------------------------
def tagged_answer(text: str) -> str:
    """The text after the last <answer>, up to the next </answer>. A text without tags is returned whole."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def format_rewards(text: str, compat: bool) -> list[float]:
    """[integer, strict, soft, xml] of a completion, each at most 1, before their weights.

    integer   an integer stands between the answer tags; 2,125 and $72 are integers
    strict    <reasoning>, steps, </reasoning>, <answer>, answer, </answer>, on lines of their own, and nothing else
    soft      the same tags in the same order from the start, with any white space; text behind them is allowed
    xml       share of the four tags that stand exactly once with their line breaks; each character behind
              "\n</answer>" costs .002, if that stands once

    compat: as in the authors' code. There a text without tags counts as the answer, steps on several lines earn neither
    strict nor soft (their "." stops at the end of a line), and a text without "\n</answer>\n" is charged for its whole
    length.
    """
    if compat:
        integer = tagged_answer(text).isdigit()
        inside = r".*?"
    else:
        text = text.strip() + "\n"
        closed = "<answer>" in text and "</answer>" in text.split("<answer>")[-1]
        number = to_number(tagged_answer(text)) if closed else None
        integer = number is not None and number.denominator == 1
        inside = r"(?:(?!</?(?:reasoning|answer)>)[\s\S])*?"  # over several lines, but not over another tag
    strict = re.match(rf"<reasoning>\n{inside}\n</reasoning>\n<answer>\n{inside}\n</answer>\n$", text)
    soft = re.match(rf"<reasoning>{inside}</reasoning>\s*<answer>{inside}</answer>", text)

    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    once = [text.count(tag) == 1 for tag in tags]
    charged = 0  # characters
    if once[3]:
        charged += len(text.split("\n</answer>")[-1]) - 1
    if compat and once[2]:
        charged += len(text.split("\n</answer>\n")[-1])
    return [float(integer), float(bool(strict)), float(bool(soft)), sum(once) / 4 - 0.002 * charged]


def load_encoder(name: str):
    """(sentence encoder in fp32, its tokenizer), on the CPU. One that cannot be used ends the program."""
    from transformers import AutoModel, AutoTokenizer

    advice = "give --embed-model the hub id or the folder of a sentence encoder"
    with plain_error(f"the tokenizer of {name} cannot be read; {advice}"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    cat, dog = tokenizer(["cat", "dog"])["input_ids"]
    if cat == dog:  # without its files transformers makes one that knows no word
        sys.exit(f"error: the tokenizer of {name} has no vocabulary; {advice}.")
    with plain_error(f"the weights of {name} cannot be read; {advice}"):
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    with plain_error(f"{name} cannot embed texts; {advice}"):
        embed(encoder, tokenizer, ["", "a longer text " * 256], 512)
    return encoder, tokenizer


@torch.no_grad()
def embed(encoder, tokenizer, texts: list[str], max_tokens: int) -> torch.Tensor:
    """Unit vectors [len(texts), d] in fp32, on the CPU: the mean of the last layer over a text's first 256 tokens.

    max_tokens: padded tokens that the encoder sees at a time. With several ranks each embeds its share.
    """
    ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    vectors = torch.zeros(len(texts), encoder.config.hidden_size)
    for micro in micro_batches([len(row) for row in ids], max_tokens):
        if micro:
            batch = tokenizer.pad({"input_ids": [ids[i] for i in micro]}, return_tensors="pt").to(encoder.device)
            hidden = encoder(**batch).last_hidden_state  # [rows, T, d]
            sums = (hidden * batch["attention_mask"][..., None]).sum(1)  # the same direction as the mean
            vectors[micro] = F.normalize(sums, dim=-1).cpu()
    if WORLD_SIZE > 1 and dist.is_initialized():  # not yet when load_encoder tries the encoder
        # each rank has filled in its own rows; NCCL cannot reduce CPU tensors
        vectors = vectors.to(DEVICE)
        dist.all_reduce(vectors)
    if not vectors.isfinite().all():
        sys.exit("error: the sentence encoder gives NaN or infinity; use another --embed-model.")
    return vectors.cpu()


class EpisodicMemory:
    """Embeddings of answers by question, and recent scores. The oldest are dropped.

    entries: {question: {"key": [d], "vectors": [m, d], "ids": [m]}}, the oldest question and answer first.
    A question is an integer. Every stored answer has an id, because two equal answers must be told apart.
    """

    def __init__(self, d: int, max_keys: int, max_values: int, norm_window: int):
        with plain_error("faiss does not load; install requirements.txt, without a GPU tests/requirements-cpu.txt"):
            import faiss

        self.index = faiss.IndexIDMap(faiss.IndexFlatIP(d))  # exact, and by cosine, as the vectors are unit vectors
        self.max_keys = max_keys
        self.max_values = max_values
        self.norm_window = norm_window
        self.entries = {}
        self.count = 0  # answers stored so far
        self.window = torch.zeros(0)  # the newest norm_window scores

    def state(self) -> dict:
        """All that a checkpoint must keep, as numbers and tensors."""
        return {"entries": self.entries, "count": self.count, "window": self.window}

    def load(self, state: dict):
        """Go on from a state()."""
        self.entries, self.count, self.window = state["entries"], state["count"], state["window"]
        for question, entry in self.entries.items():
            self.index.add_with_ids(entry["key"][None].numpy(), np.array([question]))

    def add(self, questions, keys, vectors, store) -> torch.Tensor:
        """Store the vectors [B, d] whose store [B] is True. Returns the ids [B] they got, -1 for the others.

        questions [B]: whose answers they are; keys [B, d]: embeddings of the questions. A question keeps its first one.
        """
        ids = torch.full([len(vectors)], -1)
        for i in store.nonzero()[:, 0].tolist():
            question = int(questions[i])
            if question not in self.entries:
                self.add_question(question, keys[i].clone())
            ids[i] = self.count
            self.count += 1
            entry = self.entries[question]
            entry["vectors"] = torch.cat([entry["vectors"], vectors[i : i + 1]])[-self.max_values :]
            entry["ids"] = torch.cat([entry["ids"], ids[i : i + 1]])[-self.max_values :]
        return ids

    def add_question(self, question: int, key: torch.Tensor):
        """Make room for the answers to a new question."""
        if len(self.entries) == self.max_keys:
            oldest = next(iter(self.entries))
            del self.entries[oldest]
            self.index.remove_ids(np.array([oldest]))
        self.entries[question] = {"key": key, "vectors": torch.zeros(0, self.index.d), "ids": torch.zeros(0).long()}
        self.index.add_with_ids(key[None].numpy(), np.array([question]))

    def read(self, key: torch.Tensor, k: int):
        """(ids [m], vectors [m, d]) of all that is stored under the k questions nearest to `key` [d]."""
        found = self.index.search(key[None].numpy(), k)[1][0]
        nearest = [self.entries[question] for question in found.tolist() if question >= 0]  # -1: fewer than k stored
        ids = torch.cat([torch.zeros(0).long(), *(entry["ids"] for entry in nearest)])
        return ids, torch.cat([torch.zeros(0, self.index.d), *(entry["vectors"] for entry in nearest)])

    def scale(self, scores: torch.Tensor) -> torch.Tensor:
        """(score - minimum) / (maximum - minimum) [B] over the window, these scores included; NaN stays NaN."""
        recent = torch.cat([self.window, scores[~scores.isnan()]])
        self.window = recent[-self.norm_window :]
        recent = recent[-max(self.norm_window, len(scores)) :]  # all scores of this step, even of a shorter window
        if not len(recent):
            return scores
        low, high = recent.min(), recent.max()
        return (scores - low) / (high - low).clamp(min=1e-4)  # a smaller range is rounding error


def memory_scores(memory, key, vectors, own, kind: str, k: int) -> torch.Tensor:
    """Distance (exploit) or novelty (explore) [G] of the answers to one question, before scaling.

    key [d]: the question's embedding; vectors [G, d]: those of its answers; own [G]: the ids of stored answers, -1 for
    the others. Where there is nothing to compare with, the score is NaN.

    A stored answer is compared with M without itself. The others then meet M without one of the group's own answers
    too, each of these in turn, and get the mean score: a centroid of fewer answers lies farther away, so whoever is
    compared with fewer would seem farther away and newer.
    """
    ids, stored = memory.read(key, k)  # M: [m], [m, d]
    left_out = own[own >= 0]  # [n]
    if not len(left_out):
        left_out = torch.tensor([-1])  # nothing
    turns = []
    for answer_id in left_out:
        others = stored[ids != answer_id]
        if not len(others):
            turns.append(torch.full([len(vectors)], math.nan))
        elif kind == "exploit":
            turns.append((vectors - others.mean(0)).norm(dim=1))
        else:
            turns.append(1 - (vectors @ others.T).amax(1))
    turns = torch.stack(turns, 1)  # [G, n]
    itself = own[:, None] == left_out  # [G, n]
    without_itself = torch.where(itself, turns, 0).sum(1)  # [G], of the stored answers
    return torch.where(own >= 0, without_itself, turns.mean(1))


def memory_rewards(memory, questions, keys, vectors, store, kind: str, mode: str, k: int) -> torch.Tensor:
    """Intrinsic reward [B] of each answer, in 0..1, or NaN where there is nothing to compare it with; fills the memory.

    questions [B]: integers; keys, vectors [B, d]: unit vectors of question and answer; store [B]: True where the answer
    goes into the memory. M: the answers stored under the k nearest questions.

    kind exploit     1 - scaled distance, distance = ||a - mean of M||          paper, equations 4 and 6
         explore     scaled novelty, novelty = 1 - max over m in M of a . m     equations 5 and 6

    mode loo         all are stored first, and M leaves out the answer itself. The order of the answers does not matter,
                     unless a question has more than max_values
         past        M is what was stored before this step
         sequential  the authors': one answer after the other is stored, scored (it may meet itself), scaled
    """
    if mode == "sequential" and len(vectors) > 1:
        rewards = []
        for single in zip(questions[:, None], keys[:, None], vectors[:, None], store[:, None], strict=True):
            rewards.append(memory_rewards(memory, *single, kind, mode, k))  # a batch of one
        return torch.cat(rewards)

    own = torch.full([len(vectors)], -1)
    if mode != "past":
        ids = memory.add(questions, keys, vectors, store)
    if mode == "loo":
        own = ids
    scores = torch.zeros(len(vectors))
    for question in questions.unique():
        rows = (questions == question).nonzero()[:, 0]
        scores[rows] = memory_scores(memory, keys[rows[0]], vectors[rows], own[rows], kind, k)
    if mode == "past":
        memory.add(questions, keys, vectors, store)
    scaled = memory.scale(scores)
    return 1 - scaled if kind == "exploit" else scaled


def placebo(rewards: torch.Tensor, correct: torch.Tensor, control: str, rng) -> torch.Tensor:
    """A control in place of the intrinsic reward [questions, G]; correct has the same shape.

    shuffled   permuted within each group
    matched    the group's mean over the right, or the wrong, answers: what is left is a bonus for being right
    """
    if control == "shuffled":
        order = torch.tensor(rng.random(rewards.shape)).argsort(1)
        return rewards.gather(1, order)
    for alike in (correct, ~correct):
        mean = (rewards * alike).sum(1, keepdim=True) / alike.sum(1, keepdim=True).clamp(min=1)
        rewards = torch.where(alike, mean, rewards)
    return rewards


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


# ---- Prompt with worked examples -------------------------------------------------------------------------------------
def worked_examples(problems: list[dict]) -> list[dict]:
    """Turns of a chat that ask these problems and solve them in the format of the default system prompt."""
    turns = []
    for problem in problems:
        steps = problem["answer"].rpartition("####")[0].strip()
        if not steps:
            sys.exit(f"error: {problem['question'][:60]!r} has no solution before its ####; use --num-shots 0.")
        steps = re.sub("<<.*?>>", "", steps)  # GSM8K's calculator marks
        solution = f"<reasoning>\n{steps}\n</reasoning>\n<answer>\n{problem['gold']}\n</answer>"
        turns.append({"role": "user", "content": problem["question"]})
        turns.append({"role": "assistant", "content": solution})
    return turns


def encode_with_examples(tokenizer, question: str, system_prompt: str, examples: list[dict]) -> list[int]:
    """As eval_gsm8k.encode_prompt, with the turns `examples` before the question."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages += [*examples, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


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


def save_memories(folder: Path, step: int, memories: dict):
    """Write all memories to folder/memory_step_<step>.pt, whole or not at all.

    It runs before save_checkpoint makes folder/step_<step>. So every checkpoint has its memories, wherever a run is
    killed. A file without a checkpoint does no harm: it is replaced when the run comes to this step again, or removed
    here.
    """
    path = folder / f"memory_step_{step:06d}.pt"
    temporary = path.with_suffix(".unfinished")
    with plain_error(f"{path} cannot be written; make room, the run then goes on from its last checkpoint"):
        folder.mkdir(exist_ok=True)
        for old in folder.glob("memory_*"):
            if not (folder / old.stem.removeprefix("memory_")).exists():
                old.unlink()
        with open(temporary, "wb") as file:
            torch.save({kind: memory.state() for kind, memory in memories.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def load_memories(checkpoint: Path, memories: dict):
    """Restore the memories of a checkpoint; a file that cannot be read ends the program."""
    path = checkpoint.with_name(f"memory_{checkpoint.name}.pt")
    with plain_error(f"{path} cannot be read; delete {checkpoint}, and the run goes on from the checkpoint before"):
        states = torch.load(path, weights_only=True)
        for kind, memory in memories.items():
            memory.load(states[kind])


# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

    positive = "lora_alpha num_steps questions_per_step max_new_tokens temperature knn_k max_keys max_values "
    positive += "norm_window is_cap max_grad_norm num_minibatches max_tokens_per_microbatch eval_every "
    positive += "eval_samples save_every"
    check_arguments(args, positive)
    if args.group_size < 2:
        sys.exit(f"error: --group-size {args.group_size} must be at least 2: a reward is compared within its group.")

    # data
    problems, eval_problems = load_problems(args.dataset, args.eval_dataset, args.eval_size)
    examples, problems = worked_examples(problems[: args.num_shots]), problems[args.num_shots :]
    if len(problems) < args.questions_per_step:
        sys.exit(f"error: {args.dataset} leaves {len(problems)} problems, fewer than --questions-per-step; add rows.")
    tokenizer, context = load_tokenizer(args.model_name, args.system_prompt)
    check_model(args.model_name)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @functools.lru_cache(maxsize=8192)
    def encode(question, z=None):  # token ids of the prompt; z: evaluate's skill, there is none here
        return encode_with_examples(tokenizer, question, args.system_prompt, examples)

    longest = longest_prompt(problems + eval_problems, encode, args.max_new_tokens, context)
    question_ids = {}  # rows with the same question share its integer in the memories
    for problem in problems:
        question_ids.setdefault(problem["question"], len(question_ids))
    memories = {}  # {"exploit": of right answers, "explore": of wrong ones}
    if args.intrinsic != "none":
        encoder, encoder_tokenizer = load_encoder(args.embed_model)
    for kind in ("exploit", "explore"):
        if args.intrinsic in (kind, "both"):
            d = encoder.config.hidden_size
            memories[kind] = EpisodicMemory(d, args.max_keys, args.max_values, args.norm_window)

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
        if args.kl_coef and not args.lora_r:
            reference = Policy(args.model_name, dtype, lora_r=0, lora_alpha=0)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)
    score(policy, [[pad_id]], [[pad_id]], args, pad_id)  # FSDP settles gradient dtypes in its first pass: adapters on
    if memories:
        encoder.to(DEVICE)

    size = 12 * sum(parameter.numel() for parameter in trainable)  # of a checkpoint: weights and moments
    saved = gather(checkpoints(run_dir / "checkpoints"))[0]
    if shutil.disk_usage(run_dir).free < size * (KEEP_CHECKPOINTS + 1 - len(saved)):
        sys.exit(f"error: a checkpoint takes {size / 1e9:.1f} GB, too much for {run_dir}; choose another --output-dir.")

    # resume: what was logged after the checkpoint is cut off and done again
    state = {"step": 0, "evaluation_due": True, "logp_limit": None, "metrics_bytes": 0, "samples_bytes": 0}
    if saved:
        state = load_checkpoint(saved[-1], policy, optimizer)
        print(f"{run_dir} goes on after step {state['step']}.")
        if memories:
            load_memories(saved[-1], memories)
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

    def run_evaluation(step):
        t0 = time.perf_counter()

        def generate(prompts):
            return sample(llm, prompts, 1, args.eval_temperature, args.max_new_tokens, [args.seed, step, 1])

        figures, rows = evaluate(generate, tokenizer, eval_problems, encode, args.eval_samples, args.answer_mode)
        write(run_dir / "completions.jsonl", rows, mode="w")  # of the newest evaluation, for eval_gsm8k.py --compare
        record = {"step": step} | {f"eval/{name}": value for name, value in figures.items()}
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

        # rollout: group_size completions of each question
        epoch, position = divmod(step - 1, len(problems) // args.questions_per_step)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(problems))
        chosen = order[position * args.questions_per_step :][: args.questions_per_step]
        batch = [problems[i] for i in chosen for _ in range(args.group_size)]
        questions = [problem["question"] for problem in batch]
        prompts = [encode(question) for question in questions]
        seed = [args.seed, step, 0]
        asked = prompts[:: args.group_size]  # each once
        samples = sample(llm, asked, args.group_size, args.temperature, args.max_new_tokens, seed)
        if DEVICE.type == "cuda":
            llm.sleep(level=2)
        completions = [s["tokens"] for s in samples]
        lengths = torch.tensor([len(completion) for completion in completions])  # [B]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, C]
        vllm_logps = pad_sequence([torch.tensor(s["logps"]) for s in samples], batch_first=True)  # [B, C]
        t1 = time.perf_counter()

        # reward: answer and format, then what the memories say about the reasoning
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers = [extract_answer(text, args.answer_mode) for text in texts]
        correct = [is_correct(answer, row["gold"]) for answer, row in zip(answers, batch, strict=True)]
        if args.compat:  # compared as strings, commas included
            answers = [tagged_answer(text) for text in texts]
            golds = [row["answer"].split("####")[-1].strip() for row in batch]
            correct = [answer == gold for answer, gold in zip(answers, golds, strict=True)]
        correct = torch.tensor(correct)  # [B]
        formats = torch.tensor([format_rewards(text, args.compat) for text in texts])  # [B, 4]
        terms = {  # {name: [B]}, weighted
            "r_correct": args.correct_coef * correct,
            "r_int": args.int_coef * formats[:, 0],
            "r_strict": args.strict_coef * formats[:, 1],
            "r_soft": args.soft_coef * formats[:, 2],
            "r_xml": args.xml_coef * formats[:, 3],
        }
        metrics = {}
        if args.cosine_coef:
            cosine = 0.75 + 0.25 * torch.cos(math.pi * lengths / args.max_new_tokens)  # 1 if short .. 0.5 if longest
            terms["r_cosine"] = args.cosine_coef * torch.where(correct, cosine, -cosine)
        if memories:
            # without tags the reasoning is the whole completion
            reasonings = [text.split("<reasoning>")[-1].split("</reasoning>")[0].strip() for text in texts]
            asked = questions[:: args.group_size]
            vectors = embed(encoder, encoder_tokenizer, asked + reasonings, args.max_tokens_per_microbatch)
            keys, vectors = vectors.split([len(asked), len(texts)])
            keys = keys.repeat_interleave(args.group_size, 0)  # [B, d], as vectors
            ids = torch.tensor([question_ids[question] for question in questions])  # [B]
            rng = np.random.default_rng([args.seed, step, 2])
        for kind, memory in memories.items():
            store = correct if kind == "exploit" else ~correct
            intrinsic = memory_rewards(memory, ids, keys, vectors, store, kind, args.memory_mode, args.knn_k)
            intrinsic = intrinsic.view(-1, args.group_size)
            # nothing to compare with: the mean of the group, or 0 if none of it has a score
            intrinsic = torch.where(intrinsic.isnan(), intrinsic.nanmean(1, keepdim=True), intrinsic).nan_to_num()
            if kind == "explore" and step <= args.explore_warmup_steps:
                intrinsic = torch.zeros_like(intrinsic)
            if args.intrinsic_control != "none":
                intrinsic = placebo(intrinsic, correct.view(intrinsic.shape), args.intrinsic_control, rng)
            weight = args.exploit_coef if kind == "exploit" else args.explore_coef
            terms[f"r_{kind}"] = weight * intrinsic.flatten()
        rewards = sum(terms.values())  # [B]
        rewards = gather(rewards)[0]  # rank 0's: ranks may differ in the last bit, and must train on the same rewards
        t2 = time.perf_counter()

        # advantages within a question; groups whose rewards are all equal teach nothing
        groups = rewards.view(-1, args.group_size)
        advantages = group_advantages(groups, args.loss_type).flatten()  # [B]
        varied = (groups.amax(1) > groups.amin(1)).repeat_interleave(args.group_size)  # [B]

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
        for name, term in terms.items():
            metrics[f"terms/{name}"] = term.mean().item()
            metrics[f"terms/{name}_std"] = term.view(groups.shape).std(1).mean().item()  # what GRPO can see of it
        for kind, memory in memories.items():
            if len(memory.window):
                metrics[f"memory_bank/{kind}_score"] = memory.window.mean().item()
            metrics[f"memory_bank/{kind}_questions"] = len(memory.entries)
            metrics[f"memory_bank/{kind}_answers"] = sum(len(e["ids"]) for e in memory.entries.values())
        log({"step": step, "global_step": step * len(batch)} | metrics)
        records = []
        for i in range(args.group_size):  # the first question's whole group
            record = {"step": step, "question": questions[i], "completion": texts[i]}
            record |= {"answer": answers[i], "gold": batch[i]["gold"], "finish_reason": samples[i]["finish_reason"]}
            record |= {name: values[i].item() for name, values in terms.items()}
            records.append(record | {"reward": rewards[i].item(), "advantage": advantages[i].item()})
        write(samples_path, records)
        names = ("charts/accuracy", "charts/reward", "charts/length")
        line = "  ".join(f"{name.split('/')[1]} {metrics[name]:.3f}" for name in names)
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
            if RANK == 0 and memories:
                save_memories(run_dir / "checkpoints", step, memories)
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

"""Memory-R (Le et al. 2025, arXiv 2504.02273): GRPO for tiny LLMs, with rewards from a memory of their own answers.

Two memories, of right and of wrong answers, keep embeddings of their reasoning by question. An answer's embedding a is
compared with B, all that is stored under the K questions nearest to its own, itself included:

    r_exploit = 1 - (d - d_min) / (d_max - d_min),   d = || a - mean of B ||,            B from the right answers
    r_explore = (n - n_min) / (n_max - n_min),       n = 1 - max over b in B of a . b,   B from the wrong answers

(minima and maxima over recent scores), both added to the rewards for answer and format. B leaves a itself out. In the
authors' code (--memory-mode sequential) it does not, so that r_explore is 0 for all that is wrong. Left out: value
network, multi-turn, 4-bit weights, the authors' entropy, tree and sentence-level rewards. Not yet run on a GPU.

    python grpo_knn_memory.py --model-name Qwen/Qwen2.5-0.5B-Instruct     # all weights, meant for one 80 GB GPU
"""

import copy, functools, json, math, os, random, re, shutil, signal, sys, time
from collections import defaultdict, deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Literal

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and trainer live in this one process
# CPU threads that wait spin for some microseconds, then sleep: spinning on makes a shared CPU ten times slower
os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "VLLM_LOGGING_LEVEL": "ERROR"} | os.environ)

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from first_edition import (check_arguments, check_lengths, encode_prompt, evaluate, extract_answer, fail, is_correct,
                        load_splits, load_tokenizer, open_run, start_run, to_number, worked_examples)

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, model, seed, time)
    output_dir: str = "runs"  # where run folders are made
    seed: int = 1  # seed of data order, sampling and LoRA initialisation
    track: bool = False  # also log to Weights & Biases (project: WANDB_PROJECT); metrics.jsonl is always written
    # model
    model_name: str = "Qwen/Qwen2.5-0.5B-Instruct"  # Hugging Face id or local folder of a chat model
    lora_r: int = 0  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 32  # LoRA scale: W + (lora_alpha / lora_r) B A
    trust_remote_code: bool = False  # run Python code that comes with the model
    # data
    dataset: str = "openai/gsm8k"  # training problems: hub id, or a .jsonl with `question` and `answer` ("... #### 72")
    dataset_config: str = "main"  # configuration of a hub dataset (unused for local files)
    eval_dataset: str = ""  # evaluation problems (empty: the test split; a local file gives up its last tenth)
    system_prompt: str = (  # empty: none
        "Answer in this format:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\nonly the number\n</answer>")
    num_shots: int = 0  # worked examples in every prompt: the first training problems, which are not trained on then
    # rollout
    num_steps: int = 500  # training steps, each one rollout
    questions_per_step: int = 16  # questions per rollout
    group_size: int = 16  # completions per question
    max_new_tokens: int = 200  # longest completion in tokens
    temperature: float = 0.9  # sampling temperature; log-probabilities are taken at the same temperature
    answer_mode: Literal["strict", "flexible", "boxed", "xml", "auto"] = "xml"  # see eval_gsm8k.extract_answer
    # Memory-R
    intrinsic: Literal["none", "exploit", "explore", "both"] = "both"  # Memory-R: exploit, Memory-R+: both
    exploit_coef: float = 1.0  # weight of r_exploit
    explore_coef: float = 1.0  # weight of r_explore
    explore_warmup_steps: int = 50  # steps without r_explore, while wrong answers are collected
    memory_mode: Literal["loo", "past", "sequential"] = "loo"  # who is compared with whom, see memory_rewards
    knn_k: int = 1  # nearest questions whose answers are read
    max_keys: int = 10000  # questions a memory holds; the oldest goes first
    max_values: int = 100  # answers it holds of each; the oldest goes first
    norm_window: int = 1024  # recent scores that minimum and maximum are taken over (100 in the paper)
    embed_model: str = "sentence-transformers/all-MiniLM-L6-v2"  # encoder, hub id or folder
    intrinsic_control: Literal["none", "shuffled", "matched"] = "none"  # placebos, see the reward block
    correct_coef: float = 1.0  # weight of the right number
    int_coef: float = 0.5  # an integer between the answer tags
    strict_coef: float = 0.5  # <reasoning>, steps, </reasoning>, <answer>, number, </answer>, on lines of their own
    soft_coef: float = 0.5  # the same from the start, with any white space, and text behind allowed
    xml_coef: float = 0.5  # share of the four tags that stand once, less .002 a character behind the last
    cosine_coef: float = 0.0  # length baseline: right answers should be short, wrong ones long
    compat: bool = False  # grade as the authors' code does, see format_rewards
    shuffle_rewards: bool = False  # negative control: permute the rewards of a step, so that nothing can be learned
    # loss
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"  # how tokens are weighted, see policy_loss
    clip_low: float = 0.2  # ratio is clipped below at 1 - clip_low
    clip_high: float = 0.28  # ratio is clipped above at 1 + clip_high (clip-higher, DAPO)
    advantage_scale: Literal["group", "batch", "none"] = "group"  # whose std divides centred rewards (none: Dr. GRPO)
    kl_coef: float = 0.04  # weight of the k3 estimate of KL(policy || start) in the loss; the paper's runs used 0.04
    is_cap: float = 2.0  # truncated importance sampling: token weights min(p_trainer / p_vllm, is_cap); 0: none
    mask_truncated: bool = False  # leave completions that hit max_new_tokens out of the loss
    drop_zero_variance: bool = True  # leave groups whose rewards are all equal out of the loss and of its denominator
    # optimizer
    lr: float = 1e-6  # peak; 5e-6 in the paper, on bf16 weights that lose most of each update
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # decay to zero after the warm-up, or none
    warmup_steps: int = 50  # linear warm-up, in steps
    weight_decay: float = 0.1  # AdamW's decoupled weight decay
    max_grad_norm: float = 0.1  # gradient norm clip (0.1 in the original code); 0: none
    update_epochs: int = 1  # passes over a rollout
    num_minibatches: int = 1  # optimizer steps per pass
    # GPU memory
    max_tokens_per_microbatch: int = 16384  # padded tokens in a rank's forward-backward; halve it when out of memory
    head_chunk: int = 1024  # tokens for which logits [head_chunk, vocabulary] exist at a time
    gradient_checkpointing: bool = True  # recompute activations in the backward pass (GPU only)
    gpu_memory_utilization: float = 0.4  # vLLM's share of the GPU, weights and cache (without a GPU: 256 MiB of cache)
    vllm_sleep: bool = True  # give vLLM's memory back while training (GPU only)
    max_logp_diff: float = 0.1  # stop if trainer and vLLM differ by more on average, in nats per sampled token
    # evaluation and checkpoint
    eval_every: int = 50  # evaluate every so many steps, besides the start and the end; 0: only there
    eval_size: int = 200  # number of evaluation problems; 0: all
    eval_samples: int = 1  # samples per evaluation problem
    eval_temperature: float = 0.7  # sampling temperature of evaluations; 0 is greedy
    save_every: int = 50  # write a checkpoint every so many steps, and at the end; 0: only there
    keep_last: int = 2  # checkpoints kept
# ---- Reward ----------------------------------------------------------------------------------------------------------
def format_rewards(text: str, solution: str, compat: bool) -> list[float]:
    """[equals the gold string, integer, strict, soft, xml] of a text; xml: share of tags less .002 a character behind.

    compat: as in the authors' code, a text without tags is all answer, `.` stops at a line's end (so steps on several
    lines have no format), and a text that does not end in a newline is charged for every character.
    """
    given, gold = text.split("<answer>")[-1].split("</answer>")[0].strip(), solution.split("####")[-1].strip()
    number = to_number(given) if "<answer>" in text and "</answer>" in text else None
    integer = given.isdigit() if compat else number is not None and number.denominator == 1
    text = text if compat else text.strip() + "\n"
    inner = r".*?" if compat else r"(?:(?!</?(?:reasoning|answer)>)[\s\S])*?"
    strict = re.match(rf"<reasoning>\n{inner}\n</reasoning>\n<answer>\n{inner}\n</answer>\n$", text)
    soft = re.match(rf"<reasoning>{inner}</reasoning>\s*<answer>{inner}</answer>", text)
    once = [text.count(tag) == 1 for tag in ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")]
    charged = once[3] * (len(text.split("\n</answer>")[-1]) - 1)
    charged += compat * once[2] * len(text.split("\n</answer>\n")[-1])
    return [given == gold, integer, bool(strict), bool(soft), sum(once) / 4 - 0.002 * charged]

@torch.no_grad()
def embed(encoder, tokenizer, texts: list[str], max_tokens: int) -> torch.Tensor:
    """Unit vectors [len(texts), d] in fp32: the mean of the encoder's last layer over a text's first 256 tokens."""
    ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    vectors = torch.zeros(len(texts), encoder.config.hidden_size)
    for rows in filter(None, micro_batches(list(map(len, ids)), max_tokens)):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(encoder.device)
        hidden = encoder(**batch).last_hidden_state * batch["attention_mask"][..., None]  # [rows, T, d]
        vectors[rows] = torch.nn.functional.normalize(hidden.sum(1), dim=-1).cpu()  # sum and mean point the same way
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(vectors)  # each rank has filled in its own rows
    return vectors

class EpisodicMemory:
    """Answers by question, as unit vectors [d], and recent scores; what is oldest makes room.
    entries: {question: {"key": [d], "answers": [[d], ...], "sum": [d]}}, oldest question first, as in the faiss index.
    """
    def __init__(self, d: int, max_keys: int, max_values: int, norm_window: int, entries=None, scores=()):
        import faiss
        self.index = faiss.IndexFlatIP(d)  # exact, and by cosine, as the vectors are unit vectors
        self.max_keys, self.max_values, self.window = max_keys, max_values, deque(scores, norm_window)
        self.entries = entries or {}
        for entry in self.entries.values():
            entry["answers"] = list(entry["answers"])  # a checkpoint holds them as one tensor
            self.index.add(entry["key"][None].numpy())
    def add(self, question: str, key: torch.Tensor, answer: torch.Tensor):
        """Store an answer under its question."""
        if question not in self.entries:
            if len(self.entries) == self.max_keys:
                del self.entries[next(iter(self.entries))]
                self.index.remove_ids(np.array([0]))
            self.entries[question] = {"key": key.clone(), "answers": [], "sum": torch.zeros_like(key).double()}
            self.index.add(key[None].numpy())
        entry = self.entries[question]
        entry["answers"].append(answer)
        entry["sum"] += answer
        if len(entry["answers"]) > self.max_values:
            entry["sum"] -= entry["answers"].pop(0)
    def nearest(self, key: torch.Tensor, k: int) -> list[dict]:
        """The entries of the k questions nearest to `key`, fewer where there are fewer."""
        entries = list(self.entries.values())
        return [entries[i] for i in self.index.search(key[None].numpy(), k)[1][0] if i >= 0]

def memory_rewards(memory, questions, keys, answers, stored, kind: str, mode: str, k: int):
    """Intrinsic reward [B] of each answer, in 0..1, or NaN where there is nothing to compare it with; fills the memory.

    questions: B texts; keys, answers [B, d]: unit vectors of question and answer; stored [B]: which answers are kept.
    kind exploit     1 - scaled d, d = ||a - mean of B||          paper, equations 4 and 6
         explore     scaled n, n = 1 - max over b in B of a . b   equations 5 and 6
    mode loo         all are stored first, and B leaves a itself out: no matter in which order they come
         past        B is what was stored before this step
         sequential  the authors': one answer after the other is stored, scored (it may meet itself), scaled
    """
    rows = list(zip(questions, keys, answers, stored, strict=True))
    if mode == "sequential" and len(rows) > 1:
        return torch.cat([memory_rewards(memory, *([x] for x in row), kind, mode, k) for row in rows])
    new = [row[:3] for row in rows if row[3]]
    for row in new if mode != "past" else []:
        memory.add(*row)
    scores, cache = torch.full([len(rows)], math.nan), {}
    for i, (question, key, a, _) in enumerate(rows):
        if question not in cache:
            entries = memory.nearest(key, k)
            stored = [b for entry in entries for b in entry["answers"]]
            cache[question] = stored, torch.stack(stored) if stored else None, sum(entry["sum"] for entry in entries)
        stored, matrix, total = cache[question]
        keep = torch.tensor([mode != "loo" or b is not a for b in stored], dtype=torch.bool)  # add() kept a, no copy
        if keep.any():
            mean = (total - a * (~keep).sum()) / keep.sum()
            scores[i] = (a - mean).norm() if kind == "exploit" else 1 - (matrix[keep] @ a).max()
    for row in new if mode == "past" else []:
        memory.add(*row)
    valid = scores[~scores.isnan()].tolist()
    recent = [*memory.window, *valid][-max(len(rows), memory.window.maxlen) :]  # never less than this step
    memory.window.extend(valid)
    low, high = min(recent, default=0.0), max(recent, default=0.0)
    scaled = ((scores - low) / max(high - low, 1e-4)).clamp(0, 1)  # rounding errors are not blown up
    return 1 - scaled if kind == "exploit" else scaled
# ---- Policy and log-probabilities ------------------------------------------------------------------------------------
def load_policy(args, device, dtype, lora_r: int):
    """The model args.model_name with weights in `dtype`, and LoRA adapters of rank lora_r, in fp32, unless that is 0.

    What is trained belongs in fp32: an update of 1e-6 is lost on a bf16 weight. Dropout is off, as it is when sampling.
    """
    from transformers import AutoModelForCausalLM
    policy = AutoModelForCausalLM.from_pretrained(
        args.model_name, dtype=dtype, use_safetensors=True, trust_remote_code=args.trust_remote_code)
    for name in ("final_logit_softcapping", "logits_soft_cap", "logits_scaling", "logit_scale"):
        if getattr(policy.config.get_text_config(), name, None) not in (None, 1):
            fail(f"{args.model_name} sets {name}: its logits change after the head, which is not done here.")
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if args.gradient_checkpointing and device.type == "cuda":
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora_r:
        from peft import LoraConfig, get_peft_model
        lora = LoraConfig(r=lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = get_peft_model(policy, lora)
    if WORLD_SIZE > 1:  # FSDP2: each rank keeps a share of every weight, and a layer is whole while it is computed
        from torch.distributed.fsdp import fully_shard
        model = policy.get_base_model() if lora_r else policy
        for module in [*(m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())), model]:
            fully_shard(module, reshard_after_forward=True).set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by what all ranks hold
        model.forward = lambda run: run()  # model(run): FSDP makes embedding, norm and head whole around run()
    return policy.to(device).train()

def token_logprobs(policy, ids, prompt_lens, completion_lens, temperature: float, head_chunk: int):
    """Log-probability and entropy of every completion token in nats, [B, C] fp32 each, 0 after a completion's end.

    ids [B, T]: prompt + completion, right-padded (attention is causal: pads to the right change nothing, and no mask is
    needed); prompt_lens, completion_lens [B]. Only positions that predict a completion token reach the head, head_chunk
    at a time, and the backward pass recomputes their logits: there never is a [B, T, vocabulary].
    """
    position = torch.arange(ids.shape[1] - 1, device=ids.device)
    predicts = (position >= prompt_lens[:, None] - 1) & (position < (prompt_lens + completion_lens)[:, None] - 1)
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy

    def head_logps(hidden, targets):  # [n, H], [n] -> [n], [n]
        log_p = model.get_output_embeddings()(hidden).float().div_(temperature).log_softmax(-1)  # [n, vocabulary]
        with torch.no_grad():
            entropy = -log_p.exp().mul_(log_p).sum(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], entropy

    def forward():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicts]  # [n, H]
        chunks = zip(hidden.split(head_chunk), ids[:, 1:][predicts].split(head_chunk), strict=True)
        parts = [checkpoint(head_logps, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    with torch.autocast("cuda", torch.bfloat16, ids.device.type == "cuda", cache_enabled=WORLD_SIZE == 1):
        logps, entropy = model(forward) if WORLD_SIZE > 1 else forward()
    mask = torch.arange(int(completion_lens.max()), device=ids.device) < completion_lens[:, None]  # [B, C]
    zeros = torch.zeros(mask.shape, device=ids.device)
    return zeros.masked_scatter(mask, logps), zeros.masked_scatter(mask, entropy)

@torch.no_grad()
def score(policy, prompts, completions, temperature: float, pad_id: int, max_tokens: int, head_chunk: int):
    """Log-probabilities [B, C] of B completions given B prompts (lists of token ids), on the CPU, 0 after the end."""
    device = next(policy.parameters()).device
    logps = torch.zeros(len(prompts), max(map(len, completions)))
    for rows in micro_batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], max_tokens):
        batch = pad_batch([prompts[i] for i in rows], [completions[i] for i in rows], pad_id, device)
        part, _ = token_logprobs(policy, *batch, temperature, head_chunk)
        logps[rows, : part.shape[1]] = part.cpu()
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(logps)  # each rank has filled in its own rows
    return logps
# ---- Advantages and loss ---------------------------------------------------------------------------------------------
def group_advantages(rewards: torch.Tensor, scale: str, eps: float = 1e-4) -> torch.Tensor:
    """A = (r - mean of the group) / (std + eps) of rewards [groups, G], sample std of the group or of the whole batch.

    DeepSeekMath section 4.1, eps as in TRL; scale "none" leaves the division out (Dr. GRPO)."""
    spread = {"group": rewards.std(1, keepdim=True) + eps, "batch": rewards.std() + eps, "none": 1.0}[scale]
    return (rewards - rewards.mean(1, keepdim=True)) / spread

def policy_loss(logps, old_logps, advantages, mask, loss_type: str, clip_low: float, clip_high: float, denominator,
                is_weights=1.0, ref_logps=None, kl_coef: float = 0.0):
    """The micro-batch's share of the step's loss, and sums over its tokens for the log.

    logps, old_logps, is_weights, ref_logps, mask [B, C]; advantages [B]. `denominator` belongs to the whole optimizer
    step, not to this micro-batch: its tokens (dapo), its completions (grpo), or its completions x max_new_tokens
    (dr_grpo); so shares add up to the loss of the batch however it is split.

        ratio_t = exp(logp_t - old_t)
        l_t     = -w_t min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t
        k3_t    = exp(ref_t - logp_t) - (ref_t - logp_t) - 1                                 (DeepSeekMath equation 4)
    """
    advantages = advantages[:, None]
    log_ratio = (logps - old_logps).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -is_weights * torch.min(ratio * advantages, clipped * advantages)  # [B, C]
    sums = {}
    if ref_logps is not None:
        log_ref = (ref_logps - logps).masked_fill(~mask, 0.0)
        k3 = log_ref.exp() - log_ref - 1
        per_token = per_token + kl_coef * k3
        sums["kl"] = k3.detach().sum()
    per_token = per_token.masked_fill(~mask, 0.0)
    if loss_type == "grpo":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    sums["clip_low"] = ((ratio < 1 - clip_low) & (advantages < 0) & mask).sum()
    sums["clip_high"] = ((ratio > 1 + clip_high) & (advantages > 0) & mask).sum()
    sums["approx_kl"] = (ratio - 1 - log_ratio).detach().sum()  # k3 of KL(old || new); padding adds 0
    return per_token.sum() / denominator, sums
# ---- vLLM ------------------------------------------------------------------------------------------------------------
def make_engine(args, device, max_model_len: int):
    """A vLLM engine in this process, with random weights until the first `sync_weights`."""
    options = {"gpu_memory_utilization": args.gpu_memory_utilization, "enable_sleep_mode": args.vllm_sleep}
    if device.type == "cpu":  # a KV cache that does not depend on how much memory happens to be free
        options = {"kv_cache_memory_bytes": 2**28, "enforce_eager": True}
    if WORLD_SIZE > 1:
        options["distributed_executor_backend"] = "external_launcher"  # no workers: each rank its own engine
    dtype = "bfloat16" if device.type == "cuda" else "float32"  # "auto" would read fp32 checkpoints as fp16
    try:
        from vllm import LLM
        llm = LLM(model=args.model_name, tokenizer=getattr(args, "tokenizer_name", "") or None, load_format="dummy",
                  dtype=dtype, max_model_len=max_model_len, seed=args.seed, trust_remote_code=args.trust_remote_code,
                  logprobs_mode="processed_logprobs", **options)
    except Exception as error:  # import, memory and configuration errors have no common base class
        fail(f"vLLM did not start with {args.model_name} on a {device.type} ({' '.join(str(error).split())[:300]}); it "
             "takes requirements.txt, without a GPU tests/requirements-cpu.txt.")
    if WORLD_SIZE > 1:  # each rank answers its share of the prompts, and all get all answers
        own = llm.generate
        def generate(prompts, *arguments, **options):
            draws, state = np.random.randint(2**32, size=WORLD_SIZE), np.random.get_state()  # alike on all ranks
            for set_seed in (np.random.seed, torch.manual_seed):  # vLLM draws from torch's, on a GPU from numpy's
                set_seed(int(draws[RANK]))
            shares = gather(own(prompts[RANK::WORLD_SIZE], *arguments, **options))
            np.random.set_state(state)
            return [shares[i % WORLD_SIZE][i // WORLD_SIZE] for i in range(len(prompts))]
        llm.generate = generate
    return llm

def rollout(llm, prompts: list[list[int]], n: int, temperature: float, max_new_tokens: int) -> list[dict]:
    """n completions of each prompt: [{"tokens", "logps", "finish_reason"}], the n of a prompt side by side.

    `logps` are vLLM's, of the sampled tokens at that temperature. No top-p, no top-k: the loss differentiates the full
    distribution. A completion that ended by itself keeps its end token.
    """
    from vllm import SamplingParams
    sampling = SamplingParams(n=n, temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_new_tokens, logprobs=0,
                              detokenize=False)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    outputs = [output for result in results for output in result.outputs]
    return [{"tokens": list(output.token_ids), "finish_reason": output.finish_reason,
             "logps": [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]}
            for output in outputs]

def merged_weights(policy):
    """(name, tensor) of every weight, whole, under its Hugging Face name; LoRA as W + (alpha / r) B A, formed in fp32.

    One layer at a time into a temporary, never in place, which would drift in bf16. The engine rounds to its own dtype:
    in bf16, entries of B A below half a step of W vanish there.
    """
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    for name, weight in model.state_dict().items():
        if ".base_layer." in name:
            layer, name = model.get_submodule(name.split(".base_layer.")[0]), name.replace(".base_layer.", ".")
            if name.endswith(".weight"):
                weight = weight.float() + layer.get_delta_weight("default")  # (alpha / r) B A
        if ".lora_" not in name:
            yield name, unsharded(weight)

@torch.no_grad()
def sync_weights(llm, policy, sleep: bool):
    """Wake the engine, push the policy's weights into it, drop cached prefixes, which hold the old weights' keys."""
    if sleep:
        llm.wake_up(["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(policy)})
    if sleep:
        llm.wake_up(["kv_cache"])
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache; its next completions would mix old and new weights.")
# ---- Several processes, micro-batches --------------------------------------------------------------------------------
def gather(value) -> list:
    """[the value of rank 0, of rank 1, ...] on every rank, [value] in one process; also a barrier: all must call it."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        torch.distributed.all_gather_object(values, value)
    return values

def unsharded(tensor):
    """The tensor, or all of it where FSDP has sharded it; all ranks must call it then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, rows x longest row <= max_tokens (but at least one row).

    With several ranks each has that limit, and returned are this rank's rows of every batch, of the last perhaps none:
    so all ranks run equally many.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= WORLD_SIZE * max(1, max_tokens // lengths[batches[-1][0]]):
            batches.append([])
        batches[-1].append(i)
    return [batch[RANK::WORLD_SIZE] for batch in batches]

def pad_batch(prompts, completions, pad_id: int, device=None):
    """Right-padded prompt + completion: ids [B, T], prompt lengths [B], completion lengths [B], on `device`.

    Example: prompts [[5, 6], [7]], completions [[8], [9, 1]] -> ids [[5, 6, 8], [7, 9, 1]], [2, 1], [1, 2].
    No rows become a pad without completion, which adds 0 to every sum and gradient.
    """
    prompts, completions = (prompts, completions) if prompts else ([[pad_id]], [[]])
    rows = [torch.tensor(list(p) + list(c)) for p, c in zip(prompts, completions, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lens = torch.tensor([list(map(len, prompts)), list(map(len, completions))])
    return ids.to(device), *lens.to(device)
# ---- Checkpoint ------------------------------------------------------------------------------------------------------
def save_checkpoint(folder: Path, policy, optimizer, state: dict, keep_last: int):
    """Write weights, optimizer, random generators and `state` to folder/step_<step>, flushed, whole or not at all."""
    from safetensors.torch import save_file
    final, temporary = folder / f"step_{state['step']:06d}", folder / "unfinished"
    gather(RANK == 0 and shutil.rmtree(temporary, ignore_errors=True))  # before any rank writes
    temporary.mkdir(parents=True, exist_ok=True)
    before = copy.copy(optimizer.state)
    weights, moments = get_state_dict(policy, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    optimizer.state = before  # an empty one was filled, as if it had made a step
    name, keys, *rest = np.random.get_state()
    generators = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
                  "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    training = {"generators": generators, "state": state}
    if WORLD_SIZE > 1:  # each rank its shards; any number of ranks can go on from them
        dcp.save({"policy": weights, "optimizer": moments}, checkpoint_id=temporary / "shards")
    else:
        names = [name for name, _ in policy.named_parameters() if name in weights]  # a tied head is there once
        save_file({name: weights[name].cpu().contiguous() for name in names}, temporary / "policy.safetensors")
        training["optimizer"] = moments
    if RANK == 0:
        torch.save(training, temporary / "training.pt")
        for path in temporary.rglob("*.*"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old)
    gather(None)  # no rank goes on, or ends, before

def load_checkpoint(folder: Path, policy, optimizer) -> dict | None:
    """Restore the newest undamaged checkpoint under `folder` in place; return its `state`, None if there is none."""
    from safetensors.torch import load_file
    for path in gather(sorted(folder.glob("step_*"), reverse=True))[0]:
        sharded = (path / "shards").exists()
        options = StateDictOptions(full_state_dict=not sharded, ignore_frozen_params=True, strict=False)
        try:
            training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
            if sharded:
                weights, moments = copy.deepcopy(get_state_dict(policy, optimizer, options=options))
                dcp.load({"policy": weights, "optimizer": moments}, checkpoint_id=path / "shards")
            else:
                weights, moments = load_file(path / "policy.safetensors"), training["optimizer"]
        except (Exception, dcp.CheckpointException) as error:  # whatever is wrong with the files: the same answer
            if RANK == 0:
                print(f"warning: checkpoint {path} is damaged and passed over: {type(error).__name__}", file=sys.stderr)
                path.rename(path.with_name(f"damaged_{path.name}_{int(time.time())}"))  # or it pushes sound ones out
            continue
        set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
        generators = training["generators"]
        for restore, key in (random.setstate, "python"), (np.random.set_state, "numpy"), (torch.set_rng_state, "torch"):
            restore(generators[key])
        if generators["cuda"] is not None:
            torch.cuda.set_rng_state(generators["cuda"])
        return training["state"]
    return optimizer.state.clear()  # returns None; get_state_dict may have filled it

def save_final(folder: Path, policy, tokenizer, dtype):
    """A plain Hugging Face model folder (LoRA merged, its adapter under adapter/), complete as soon as it exists."""
    from huggingface_hub import save_torch_state_dict
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    left_out = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    adapter = {n: unsharded(w).detach().to("cpu", copy=True) for n, w in policy.state_dict().items() if ".lora_" in n}
    weights = {n: w.detach().to("cpu", dtype, copy=True).contiguous() for n, w in merged_weights(policy)
               if RANK == 0 and n not in left_out}  # all ranks gather, rank 0 keeps and writes
    if RANK > 0:
        return
    temporary = folder.with_suffix(".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_torch_state_dict(weights, temporary)
    model.config.dtype = dtype
    model.config.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "generation_config.json").write_text(model.generation_config.to_json_string())  # as is, not validated
    if policy is not model:
        policy.save_pretrained(temporary / "adapter", state_dict=adapter)
    temporary.rename(folder)
# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    import tyro
    from tqdm import tqdm
    args = tyro.cli(Args, description=__doc__)
    if RANK > 0:  # rank 0 prints and writes
        sys.stdout, args.track = open(os.devnull, "w"), False
    check_arguments(args, positive=(
        "num_steps questions_per_step max_new_tokens temperature update_epochs num_minibatches eval_samples keep_last "
        "max_tokens_per_microbatch head_chunk knn_k max_keys max_values norm_window").split())
    # data
    problems, eval_problems = load_splits(args, args.questions_per_step + args.num_shots)
    tokenizer, context = load_tokenizer(args.model_name, args.system_prompt, args.trust_remote_code)
    shots, problems = worked_examples(problems[: args.num_shots], args.system_prompt), problems[args.num_shots :]
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    @functools.lru_cache(maxsize=8192)
    def encode(question, z=None):
        return encode_prompt(tokenizer, question, args.system_prompt, shots=shots)
    max_model_len = check_lengths(problems + eval_problems, encode, args.max_new_tokens, context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if WORLD_SIZE > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if device.type == "cuda" else -1)  # -1: does nothing
        torch.distributed.init_process_group()  # gloo on the CPU, NCCL on GPUs; vLLM destroys all groups at exit
    run_dir = Path(gather(open_run(args, __file__))[0])  # an earlier start of the same --run-name is resumed below
    metrics_path, samples_path = run_dir / "metrics.jsonl", run_dir / "samples.jsonl"
    if args.intrinsic != "none":
        from transformers import AutoModel, AutoTokenizer
        try:
            import faiss  # noqa: F401  here, so that a missing one shows before the engine starts
            embed_tokenizer = AutoTokenizer.from_pretrained(args.embed_model)
            encoder = AutoModel.from_pretrained(args.embed_model, dtype=torch.float32, use_safetensors=True).eval()
            embed(encoder, embed_tokenizer, ["a", "a b"], 512)
        except Exception as error:  # such errors have no common base class
            fail(f"{args.embed_model} or faiss cannot be used; give an encoder's id or folder ({str(error)[:200]}).")
    # engine first (it measures free memory and reseeds everything), then seeds, then the policy
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sleep = args.vllm_sleep and device.type == "cuda"
    llm = make_engine(args, device, max_model_len)
    if sleep:
        llm.sleep(level=2)  # drops the weights; sync_weights sends them again
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(args.seed)
    policy = load_policy(args, device, dtype if args.lora_r else torch.float32, args.lora_r)
    reference = policy if args.lora_r or not args.kl_coef else load_policy(args, device, dtype, 0)  # LoRA: adapters off
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    sizes = {"pad_id": pad_id, "max_tokens": args.max_tokens_per_microbatch, "head_chunk": args.head_chunk}
    optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)
    # resume: what was logged after the checkpoint is cut off and done again
    gather(RANK == 0 and start_run(run_dir, args))
    state = load_checkpoint(run_dir / "checkpoints", policy, optimizer) or {"step": 0, "logged": (0, 0)}
    memories = {kind: EpisodicMemory(encoder.to(device).config.hidden_size, args.max_keys, args.max_values,
                                     args.norm_window, *state.get(kind, ()))
                for kind in ("exploit", "explore") if args.intrinsic in (kind, "both")}
    for path, size in zip((metrics_path, samples_path), state["logged"], strict=True):
        with open(path, "ab") as file:
            file.truncate(size)
    signals = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    if args.track:
        import wandb
        wandb.init(name=run_dir.name, id=run_dir.name, resume="allow", config=asdict(args))
        wandb.define_metric("*", step_metric="step")
    def log(record):
        with open(metrics_path if RANK == 0 else os.devnull, "a") as file:
            file.write(json.dumps(record) + "\n")
        if args.track:
            wandb.log(record)
    def run_evaluation(step):
        started = time.perf_counter()
        figures, _ = evaluate(
            llm, tokenizer, eval_problems, encode, num_samples=args.eval_samples, temperature=args.eval_temperature,
            max_new_tokens=args.max_new_tokens, answer_mode=args.answer_mode, seed=args.seed)
        record = {"step": step, **{f"eval/{key}": value for key, value in figures.items()}}
        log(record | {"time/eval": time.perf_counter() - started})

    steps = range(state["step"], args.num_steps)
    bar = tqdm(steps, initial=steps.start, total=args.num_steps, file=sys.stdout, disable=None)  # None: on a terminal
    for step in bar:
        t0 = time.perf_counter()
        sync_weights(llm, policy, sleep)
        t1 = time.perf_counter()
        if step == 0 or (args.eval_every and step % args.eval_every == 0):
            run_evaluation(step)
        # rollout: group_size completions of each question
        t2 = time.perf_counter()
        epoch, position = divmod(step, len(problems) // args.questions_per_step)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(problems))
        chosen = order[position * args.questions_per_step :][: args.questions_per_step]
        batch = [problems[i] for i in chosen for _ in range(args.group_size)]
        questions = [problem["question"] for problem in batch]
        prompts = [encode(question) for question in questions]
        samples = rollout(llm, prompts[:: args.group_size], args.group_size, args.temperature, args.max_new_tokens)
        if sleep:
            llm.sleep(level=2)
        tokens = [sample["tokens"] for sample in samples]
        lengths = torch.tensor(list(map(len, tokens)))  # [B]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, C]
        vllm_logps = pad_sequence([torch.tensor(sample["logps"]) for sample in samples], batch_first=True)  # [B, C]
        truncated = torch.tensor([sample["finish_reason"] == "length" for sample in samples])  # [B]
        t3 = time.perf_counter()
        # reward: answer and format, then what the memories say of the answers
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers = [extract_answer(text, args.answer_mode) for text in texts]
        correct = torch.tensor([is_correct(a, row["gold"]) for a, row in zip(answers, batch, strict=True)])  # [B]
        formats = [format_rewards(text, row["answer"], args.compat) for text, row in zip(texts, batch, strict=True)]
        same_string, *formats = torch.tensor(formats).float().T  # [B] each
        correct = same_string.bool() if args.compat else correct
        terms = dict(zip(("int", "strict", "soft", "xml"), formats, strict=True)) | {"correct": correct.float()}
        cosine = 0.75 + 0.25 * torch.cos(math.pi * lengths / args.max_new_tokens)  # 1 for no tokens, 0.5 for the most
        terms["cosine"] = torch.where(correct, cosine, -cosine)
        rewards = sum(getattr(args, f"{name}_coef") * term for name, term in terms.items())  # [B]
        terms["task"], t4 = rewards, time.perf_counter()
        if args.intrinsic != "none":
            reasonings = [text.split("<reasoning>")[-1].split("</reasoning>")[0].strip() for text in texts]
            vectors = embed(encoder, embed_tokenizer, questions[:: args.group_size] + reasonings, sizes["max_tokens"])
            keys, vectors = vectors[: -len(batch)].repeat_interleave(args.group_size, 0), vectors[-len(batch) :]
            embedding = time.perf_counter() - t4
            right = correct.view(-1, args.group_size)
            for kind, memory in memories.items():
                stored = correct if kind == "exploit" else ~correct
                r = memory_rewards(memory, questions, keys, vectors, stored, kind, args.memory_mode, args.knn_k)
                r = r.view(right.shape)
                r = torch.where(r.isnan(), r.nanmean(1, True), r).nan_to_num()  # nothing to compare with: neutral
                r = r * (kind == "exploit" or step >= args.explore_warmup_steps)
                if args.intrinsic_control == "shuffled":  # that of another answer of the group
                    draws = np.random.default_rng([args.seed, step, 3, len(terms)]).random(r.shape)
                    r = r.gather(1, torch.tensor(draws).argsort(1))
                if args.intrinsic_control == "matched":  # the group's mean over right, or over wrong, answers
                    r = torch.where(right, *((r * x).sum(1, True) / x.sum(1, True).clamp(1) for x in (right, ~right)))
                terms[kind] = r.flatten()
                rewards = rewards + getattr(args, f"{kind}_coef") * terms[kind]
        if args.shuffle_rewards:
            rewards = rewards[np.random.default_rng([args.seed, step, 2]).permutation(len(rewards))]
        t5 = time.perf_counter()
        # advantages, within a question; of rank 0: a last bit of difference would part the ranks
        groups = gather(rewards)[0].view(-1, args.group_size)
        advantages = group_advantages(groups, args.advantage_scale).flatten()  # [B]
        varied = (groups.amax(1) > groups.amin(1)).repeat_interleave(args.group_size)  # [B]
        kept = np.flatnonzero(varied) if args.drop_zero_variance else np.arange(len(batch))
        # update
        several = args.update_epochs * args.num_minibatches > 1  # else old is what the one forward pass below gives
        old_logps = score(policy, prompts, tokens, args.temperature, **sizes) if several else None
        with policy.disable_adapter() if args.lora_r else nullcontext():
            ref_logps = score(reference, prompts, tokens, args.temperature, **sizes) if args.kl_coef else None
        per_token = [x if x is None else x.to(device) for x in (mask, vllm_logps, old_logps, ref_logps)]  # each [B, C]
        progress = max(0, step - args.warmup_steps) / max(1, args.num_steps - args.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps)) * decay[args.lr_schedule]
        optimizer.param_groups[0]["lr"] = lr
        sums, grad_norms, diff_max = defaultdict(float), [], 0.0
        shuffle = np.random.default_rng([args.seed, step, 1])
        orders = [shuffle.permutation(kept) for _ in range(args.update_epochs)]
        for minibatch in [part for order in orders for part in np.array_split(order, args.num_minibatches)]:
            used = [i for i in minibatch if not (args.mask_truncated and truncated[i])]
            denominator = {"dapo": int(lengths[used].sum()), "grpo": len(minibatch),
                           "dr_grpo": len(minibatch) * args.max_new_tokens}[args.loss_type]
            totals = [len(prompts[i]) + len(tokens[i]) for i in used]
            for rows in [[used[j] for j in part] for part in micro_batches(totals, args.max_tokens_per_microbatch)]:
                inputs = pad_batch([prompts[i] for i in rows], [tokens[i] for i in rows], pad_id, device)
                logps, entropy = token_logprobs(policy, *inputs, args.temperature, args.head_chunk)
                part_mask, vllm, old, ref = (x if x is None else x[rows, : logps.shape[1]] for x in per_token)
                old = logps.detach() if old is None else old
                is_weights = (old - vllm).exp().clamp(max=args.is_cap) if args.is_cap else torch.ones_like(old)
                loss, part_sums = policy_loss(
                    logps, old, advantages[rows].to(device), part_mask, args.loss_type, args.clip_low, args.clip_high,
                    denominator, is_weights, ref, args.kl_coef)
                loss.backward()
                diff = (old - vllm).abs()
                diff_max = max(diff_max, diff.max().item() if rows else 0.0)
                part_sums |= {"loss": loss.detach(), "tokens": part_mask.sum(), "entropy": entropy.sum()}
                part_sums |= {"logp_diff_mean": diff.sum(), "is_weight": (is_weights * part_mask).sum()}
                for key, value in part_sums.items():
                    sums[key] += value
            gap, count = np.sum(gather([float(sums.get("logp_diff_mean", 0)), float(sums.get("tokens", 0))]), axis=0)
            if not gap <= args.max_logp_diff * count:  # NaN fails too
                fail(f"trainer and vLLM differ by {gap / count:.3f} nats a token in step {step + 1}, over "
                     "--max-logp-diff: stale weights, another temperature or prompt, or changed logits?")
            if used:
                grad_norm = float(unsharded(torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm or math.inf)))
                if not math.isfinite(grad_norm):
                    fail(f"the gradient of step {step + 1} is {grad_norm}; the last checkpoint is sound: lower --lr.")
                grad_norms.append(grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        shares, diff_max = gather({key: float(value) for key, value in sums.items()}), max(gather(diff_max))
        sums.update({key: sum(share[key] for share in shares) for key in sums})
        t6 = time.perf_counter()
        # log
        mean = {key: float(value) / max(1.0, float(sums["tokens"])) for key, value in sums.items()}  # per trained token
        seconds = t6 - t2 + t1 - t0  # without the evaluation
        record = {
            "step": step + 1, "global_step": (step + 1) * len(batch), "charts/learning_rate": lr,
            "charts/accuracy": correct.float().mean().item(), "charts/zero_variance": 1 - varied.float().mean().item(),
            "charts/reward": rewards.mean().item(), "charts/reward_std": rewards.std().item(),
            "charts/length": lengths.float().mean().item(), "charts/truncated": truncated.float().mean().item(),
            "charts/samples_per_second": len(batch) / seconds, "charts/tokens_per_second": int(lengths.sum()) / seconds,
            "losses/policy_loss": float(sums["loss"]) / max(1, len(grad_norms)),
            "losses/grad_norm": sum(grad_norms) / max(1, len(grad_norms)),
            **{f"losses/{k}": mean[k] for k in ("entropy", "kl", "approx_kl", "clip_low", "clip_high") if k in mean},
            **{f"rollout/{k}": mean[k] for k in ("logp_diff_mean", "is_weight") if k in mean},
            **({"rollout/logp_diff_max": diff_max} if grad_norms else {}),
            "time/sync": t1 - t0, "time/rollout": t3 - t2, "time/grading": t4 - t3, "time/scoring": t5 - t4,
            "time/forward_backward": t6 - t5, "time/total": seconds,
            "memory/peak_gb": (torch.cuda.max_memory_allocated() or 1024 * getrusage(RUSAGE_SELF).ru_maxrss) / 1e9,
        }
        record |= {f"terms/{name}": term.mean().item() for name, term in terms.items()}
        record |= {f"terms/{name}_std": x.view(groups.shape).std(1).mean().item() for name, x in terms.items()}
        for kind, memory in memories.items():
            record |= {f"memory_bank/{kind}_score": float(np.mean(memory.window or 0.0)), "time/embedding": embedding,
                       f"memory_bank/{kind}_questions": len(memory.entries),
                       f"memory_bank/{kind}_answers": sum(len(e["answers"]) for e in memory.entries.values())}
        log(record)
        terms |= dict(reward=rewards, advantage=advantages)
        with open(samples_path if RANK == 0 else os.devnull, "a") as file:
            for i in range(args.group_size):  # the first question's whole group
                row = {"step": step + 1, "question": questions[i], "completion": texts[i],
                       "gold": batch[i]["gold"], "answer": answers[i], "finish_reason": samples[i]["finish_reason"]}
                file.write(json.dumps(row | {key: value[i].item() for key, value in terms.items()}) + "\n")
        shown = ("charts/accuracy", "charts/reward", "terms/task", "charts/length", "time/total")
        line = "  ".join(f"{key.split('/')[1]} {record[key]:.3f}" for key in shown if key in record)
        print(f"step {step + 1}/{args.num_steps}  {line}", flush=True) if bar.disable else bar.set_postfix_str(line)
        stop = max(gather(max(signals, default=0)))
        if step + 1 == args.num_steps or (args.save_every and (step + 1) % args.save_every == 0) or stop:
            state = {"step": step + 1, "logged": (metrics_path.stat().st_size, samples_path.stat().st_size),
                     **{kind: ({q: e | {"answers": torch.stack(e["answers"])} for q, e in memory.entries.items()},
                               list(memory.window)) for kind, memory in memories.items()}}
            save_checkpoint(run_dir / "checkpoints", policy, optimizer, state, args.keep_last)
        if stop:
            print(f"signal {stop}: saved after step {step + 1}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + stop)

    sync_weights(llm, policy, sleep)
    run_evaluation(args.num_steps)
    save_final(run_dir / "final", policy, tokenizer, dtype)
    records = map(json.loads, metrics_path.read_text().splitlines()) if RANK == 0 else sys.exit()
    before, *_, after = [record for record in records if "eval/pass@1" in record]
    print(f"\n{'':<28}{'before':>10}{'after':>10}")
    for key in [key for key in after if key.startswith("eval/")]:
        print(f"{key:<28}{before[key]:>10.3f}{after[key]:>10.3f}")
    print(f"model: {run_dir / 'final'}   metrics: {metrics_path}   samples: {samples_path}")

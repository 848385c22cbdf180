"""Imitation as inverse reinforcement learning (Wulfmeier et al. 2024, arXiv 2409.01369): TD-regularised MLE, on GSM8K.

Logits z are a soft Q-function of text s and next token a: Q(s,a) = z_a, V(s) = log sum_a exp z_a, log pi = Q - V.
IQ-Learn (2106.12142) reads a reward off them: r = Q(s,a) - gamma V(s'), s' = s + a. Imitation that keeps it small is

    loss = mean over the demonstrations' tokens of  -log pi(a|s) + lambda_td (Q(s,a) - gamma V(s'))^2

with V(s') = 0 behind the end token; r is the TD error at reward 0, hence the name. --lambda-td 0 is MLE (SFT);
--entropy-coef is the paper's control, MLE with an entropy bonus; --online-alpha adds own samples. Every evaluation also
writes each token's reward. Left out: GAIL, packing. Not yet run on a GPU; results are in README.md.

    python irl_imitation.py --model-name Qwen/Qwen2.5-1.5B                       # LoRA, meant for one GPU
    python irl_imitation.py --lambda-td 0 --entropy-coef 0.1                     # the control, MLE + entropy bonus
"""

import copy, functools, json, math, os, random, re, shutil, signal, sys, time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
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
                        load_problems, load_tokenizer, open_run, start_run, with_calculation)

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, model, seed, time)
    output_dir: str = "runs"  # where run folders are made
    seed: int = 1  # seed of data order, sampling and LoRA initialisation
    track: bool = False  # also log to Weights & Biases (project: WANDB_PROJECT); metrics.jsonl is always written
    # model
    model_name: str = "Qwen/Qwen2.5-1.5B"  # Hugging Face id or local folder
    lora_r: int = 32  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 64  # LoRA scale: W + (lora_alpha / lora_r) B A
    trust_remote_code: bool = False  # run Python code that comes with the model
    # data
    dataset: str = "openai/gsm8k"  # demonstrations: hub id, or a .jsonl with `question` and `answer` ("... #### 72")
    dataset_config: str = "main"  # configuration of a hub dataset (unused for local files)
    eval_dataset: str = ""  # questions to sample on: a .jsonl or a hub dataset's test split (empty: the held-out tenth)
    max_train_rows: int = 0  # train on so many demonstrations, the same for every seed; 0: all but the held-out tenth
    template: str = "QUESTION: {question}\n\nSOLUTION:"  # prompt; the response: " " + answer (empty: chat template)
    system_prompt: str = ""  # of the chat template, with --template ""
    max_prompt_tokens: int = 512  # demonstrations with a longer prompt are left out, and counted
    max_new_tokens: int = 500  # longest response in tokens; a longer demonstration is cut, and has no end then
    # inverse RL
    lambda_td: float = 0.1  # weight of the mean squared reward; 0 is MLE, more means smaller rewards, a flatter policy
    gamma: float = 1.0  # discount of V(s') in the reward; at 1 an answer's rewards sum to log pi + V(prompt)
    mle_steps_before_irl: int = 0  # first so many steps without squared rewards and own samples
    td_warmup_steps: int = 0  # then raise lambda_td linearly from 0 over this many steps
    value_shift: float | Literal["auto"] = "auto"  # taken off all Q and V; auto: the start's mean Q of the end token
    terminal_value: float = 0.0  # V behind the end token, after the shift
    td_detach_next: bool = False  # no gradient through V(s') in the square (semi-gradient, an ablation)
    online_alpha: float = 0.0  # weight of the model's own samples in iq_loss, below 1; none while lambda_td is 0
    entropy_coef: float = 0.0  # weight of the mean entropy at the demonstrations' tokens, which is maximised
    lambda_kl: float = 0.0  # weight of KL(pi || start) there, exact over the vocabulary
    # optimizer
    num_train_epochs: int = 3  # passes over the demonstrations; 0 evaluates only
    batch_size: int = 64  # demonstrations of one optimizer step
    lr: float = 1e-4  # peak; 1e-4 suits LoRA and small models, 1e-5 all weights of a large one
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # decay after the warm-up, to 0 at the last step
    warmup_steps: int = 10  # linear warm-up, in steps
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm clip; 0: none
    # GPU memory
    max_tokens_per_microbatch: int = 16384  # padded tokens in a rank's forward-backward; halve it when out of memory
    head_chunk: int = 1024  # tokens for which logits [head_chunk, vocabulary] exist at a time
    gradient_checkpointing: bool = True  # recompute activations in the backward pass (GPU only)
    gpu_memory_utilization: float = 0.4  # vLLM's share of the GPU, weights and cache (without a GPU: 256 MiB of cache)
    vllm_sleep: bool = True  # give vLLM's memory back while training (GPU only)
    max_logp_diff: float = 0.1  # stop if trainer and vLLM differ by more on average, in nats per sampled token
    # evaluation and checkpoint
    eval_every: int = 0  # evaluate every so many steps, besides the start and the end; 0: only there
    skip_first_eval: bool = False  # no evaluation at the start
    eval_size: int = 0  # evaluation questions; 0: all
    eval_samples: int = 8  # K samples a question, for pass@k, diversity and rewards; at least 2
    eval_temperature: float = 1.0  # of the K samples; greedy accuracy is measured besides
    calculator: bool = False  # also measure greedy accuracy with a calculator that completes "<<48/2="
    save_every: int = 100  # write a checkpoint every so many steps, and at the end; 0: only there
    keep_last: int = 2  # checkpoints kept
# ---- Policy ----------------------------------------------------------------------------------------------------------
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
# ---- Inverse RL ------------------------------------------------------------------------------------------------------
def token_values(policy, ids, prompt_lens, completion_lens, terminal, head_chunk: int, reference=None,
                 train_entropy: bool = False):
    """What the logits z [vocabulary] of every state say: V [B, C + 1], Q, entropy, KL and mean z [B, C each], fp32.

    ids [B, T]: prompt + completion, right-padded (attention is causal: no mask); terminal [B]: bool, ends by itself.
    V = log sum_a exp z_a before each of the C tokens, and behind the last one unless that is terminal; Q = z_a of the
    token that follows; entropy (with a gradient if train_entropy) and KL(pi || reference) in nats, 0 without reference:
    a model, or the policy itself with its LoRA adapters off. All are 0 after the completion's end. Only these states
    reach the head, head_chunk at a time, recomputed in the backward pass: there never is a [B, T, vocabulary].
    """
    position, ends = torch.arange(ids.shape[1], device=ids.device), prompt_lens + completion_lens
    states = (position >= prompt_lens[:, None] - 1) & (position < (ends - terminal.long())[:, None])  # [B, T]
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    ref_model = model if reference is policy else reference

    def head_values(hidden, actions, ref_hidden):  # [n, H], [n], [n, H] -> five [n]
        z = model.get_output_embeddings()(hidden).float()  # [n, vocabulary]
        v, q = z.logsumexp(-1), z.gather(-1, actions[:, None])[:, 0]
        kl = torch.zeros_like(v)
        if reference is not None:
            with torch.no_grad():
                ref_log_p = ref_model.get_output_embeddings()(ref_hidden).float().log_softmax(-1)
            kl = ((log_p := z - v[:, None]).exp() * (log_p - ref_log_p)).sum(-1)
        with nullcontext() if train_entropy else torch.no_grad():
            entropy = -((log_p := z - v[:, None]).exp() * log_p).sum(-1)
        return v, q, entropy, kl, z.detach().mean(-1)

    def ref_states():
        return ref_model.base_model(input_ids=ids, use_cache=False).last_hidden_state[states]

    def forward():
        hidden = ref_hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[states]  # [n, H]
        if reference is not None:
            with torch.no_grad(), policy.disable_adapter() if reference is policy else nullcontext():
                ref_hidden = ref_model(ref_states) if WORLD_SIZE > 1 and ref_model is not model else ref_states()
        columns = hidden, ids.roll(-1, 1)[states], ref_hidden.detach()  # action: the next token (none behind a cut)
        chunks = zip(*(column.split(head_chunk) for column in columns), strict=True)
        parts = [checkpoint(head_values, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    with torch.autocast("cuda", torch.bfloat16, ids.device.type == "cuda", cache_enabled=WORLD_SIZE == 1):
        parts = model(forward) if WORLD_SIZE > 1 else forward()
    place = torch.arange(int(completion_lens.max()) + 1, device=ids.device)
    mask = place < (completion_lens + 1 - terminal.long())[:, None]  # [B, C + 1]
    zeros = torch.zeros(mask.shape, device=ids.device)
    values, *others = (zeros.masked_scatter(mask, column) for column in parts)
    return values, *(column[:, :-1] * (place[:-1] < completion_lens[:, None]) for column in others)

def iq_loss(values, chosen, lengths, terminal, online, tokens, gamma: float, lambda_td: float, alpha: float = 0.0,
            shift: float = 0.0, terminal_value: float = 0.0, detach_next: bool = False):
    """This part's share of the loss (0-d), and the rewards r = Q - gamma V' [B, C], 0 after the end; both fp64.

    values [B, C + 1], chosen [B, C]: V and Q of `token_values`; lengths, terminal, online [B]: tokens, whether the last
    one is the end token, whether it is the model's own sample; tokens: how many the whole batch of the step has of
    demonstrations and of own samples, which the means E_demo and E_own are over.

        -E_demo[Q - V] + lambda {(1 - alpha) E_demo[r^2] + alpha E_own[r^2]} + alpha {E_own[D] - E_demo[D]}

    with D = V - gamma V': IQ-Learn's -E_demo[r] + E_mix[D] + lambda E_mix[r^2] over mix = (1 - alpha) demo + alpha own.
    alpha = 0 is the paper's equation 14 (IQ-Learn's 12), >= 0; else it is >= -alpha / (4 lambda (1 - alpha)). V' is
    terminal_value behind an end token, the model's V where a length limit cut; `shift` is taken off all Q and V.
    Gradients flow through V', in r^2 unless detach_next, as in IQ-Learn.
    """
    values, chosen = values.double() - shift, chosen.double() - shift
    place = torch.arange(chosen.shape[1], device=chosen.device)
    mask, ended = place < lengths[:, None], terminal[:, None] & (place == lengths[:, None] - 1)  # [B, C]
    next_values = torch.where(ended, terminal_value, values[:, 1:])
    rewards = (chosen - gamma * (next_values.detach() if detach_next else next_values)) * mask
    demo, own = mask * ~online[:, None] / max(1, tokens[0]), mask * online[:, None] / max(1, tokens[1])  # token weights
    loss = demo * (values[:, :-1] - chosen) + lambda_td * ((1 - alpha) * demo + alpha * own) * rewards**2
    loss = loss + alpha * (own - demo) * (values[:, :-1] - gamma * next_values)
    return loss.sum(), rewards.detach()

def lr_multiplier(step: int, warmup: int, total: int, schedule: str) -> float:
    """Share of the peak learning rate in step 0..total-1: up to 1 in `warmup` steps, then down to 0 in the last one."""
    if step + 1 <= warmup:
        return (step + 1) / warmup
    left = max(0, total - step - 1) / max(1, total - warmup)
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[schedule]

@torch.no_grad()
def score_values(policy, rows: list[dict], pad_id: int, max_tokens: int, head_chunk: int) -> list[list[np.ndarray]]:
    """V [n + 1], Q, entropy, KL, mean z [n each] of every row {"prompt", "tokens", "terminal"}; see `token_values`."""
    device, results = next(policy.parameters()).device, [None] * len(rows)
    for part in micro_batches([len(row["prompt"]) + len(row["tokens"]) for row in rows], max_tokens):
        batch = pad_batch([rows[i]["prompt"] for i in part], [rows[i]["tokens"] for i in part], pad_id, device)
        terminal = torch.tensor([rows[i]["terminal"] for i in part] or [True], device=device)
        columns = [column.double().cpu().numpy() for column in token_values(policy, *batch, terminal, head_chunk)]
        for k, i in enumerate(part):
            n = len(rows[i]["tokens"])
            results[i] = [columns[0][k, : n + 1], *(column[k, :n] for column in columns[1:])]
    return [next(filter(None, shares)) for shares in zip(*gather(results), strict=True)]  # each row from its rank
# ---- What the evaluation measures ------------------------------------------------------------------------------------
def reward_scores(values, chosen, terminal: bool, gamma: float, terminal_value: float):
    """Token rewards r_t = Q_t - gamma V_t+1 [n] of one answer, from V [n + 1] and Q [n], and {score: number}.

    Scores: the sum of r, its mean, the discounted sum of gamma^t r_t, log pi(y|x), its mean, and V(s_0). For gamma = 1
    and an answer that ends, sum = log pi + V(s_0) - terminal_value: within a question it ranks exactly as log pi does.
    """
    rewards = chosen - gamma * np.append(values[1:-1], terminal_value if terminal else values[-1])
    log_pi, weights = chosen - values[:-1], gamma ** np.arange(len(chosen))
    return rewards, {"sum": rewards.sum(), "mean": rewards.mean(), "discounted": weights @ rewards,
                     "log_pi": log_pi.sum(), "mean_log_pi": log_pi.mean(), "v0": values[0]}

def reward_figures(rows: list[dict]) -> dict[str, float]:
    """How well each score knows right from wrong; rows hold id, kind, correct, rougeLsum and the scores.

    {score}_spearman, _rouge: rank correlation with correctness, with ROUGE-L, over all samples. Within a question:
    _auroc: chance that a right sample scores above a wrong one, mean over questions with both; _best_of: accuracy of
    its best sample; _corrupted: share of references above their corrupted copy. Ties count half; NaN is left out.
    """
    import pandas
    table, figures = pandas.DataFrame(rows), {}
    samples, reference, corrupted = (table[table.kind == kind] for kind in ("sample", "reference", "corrupted"))
    right = samples.correct.astype(float)
    n_right = right.groupby(samples.id).sum()
    n_pairs = n_right * (right.groupby(samples.id).size() - n_right)  # 0 / 0 below is NaN, which mean() passes over
    for score in ("sum", "mean", "discounted", "log_pi", "mean_log_pi", "v0"):
        x, a, b = samples[score], reference[score].to_numpy(), corrupted[score].to_numpy()
        ranks, best = x.groupby(samples.id).rank(), right[x == x.groupby(samples.id).transform("max")]
        u = (ranks * right).groupby(samples.id).sum() - n_right * (n_right + 1) / 2  # Mann-Whitney's U
        figures |= {f"{score}_spearman": x.rank().corr(right.rank()),
                    f"{score}_rouge": x.rank().corr(samples.rougeLsum.rank())}
        if score != "v0":  # the same for all answers to a question, but for rounding
            figures |= {f"{score}_corrupted": np.mean((a > b) + (a == b) / 2), f"{score}_auroc": (u / n_pairs).mean(),
                        f"{score}_best_of": best.groupby(samples.id).mean().mean()}
    return {key: float(value) for key, value in figures.items() if value == value}

def diversity(texts: list[str]) -> dict[str, float]:
    """Self-BLEU and distinct-1, 2, 3 of the K >= 2 answers to one question, on words and punctuation marks.

    self_bleu (Zhu et al. 2018): mean BLEU-4 of each answer against the other K - 1, smoothed (method 1 of Chen and
    Cherry 2014); 1: all the same. distinct_n: different n-grams over n-grams.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    words, smooth = [re.findall(r"\w+|[^\w\s]", text) for text in texts], SmoothingFunction().method1
    rest = [words[:i] + words[i + 1 :] for i in range(len(words))]  # a copy has BLEU 1, however short
    bleu = [1.0 if x in y else sentence_bleu(y, x, smoothing_function=smooth) for x, y in zip(words, rest, strict=True)]
    figures = {"self_bleu": float(np.mean(bleu))}
    for n in (1, 2, 3):
        grams = [gram for answer in words for gram in zip(*(answer[i:] for i in range(n)), strict=False)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    return figures

def corrupt(answer: str, rng) -> str:
    """A solution with one whole number before "####" made larger by 1 to 9 (unchanged if there is none)."""
    numbers = list(re.finditer(r"(?<![0-9.,])[0-9]+(?![0-9]|[.,][0-9])", answer.rpartition("####")[0]))
    if not numbers:
        return answer
    chosen = numbers[rng.integers(len(numbers))]
    return f"{answer[: chosen.start()]}{int(chosen[0]) + int(rng.integers(1, 10))}{answer[chosen.end() :]}"
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

def with_calculator(llm, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers with the true value behind every "<<48/2=": cut at the first wrong one, mended, sampled on."""
    texts, going = dict.fromkeys(range(len(prompts)), ""), list(range(len(prompts)))
    while going:
        begun = [tokenizer(texts[i], add_special_tokens=False)["input_ids"] for i in going]
        samples = rollout(llm, [prompts[i] + ids for i, ids in zip(going, begun, strict=True)], 1, 0.0, max_new_tokens)
        for i, ids, sample in zip(going, begun, samples, strict=True):
            texts[i] = tokenizer.decode((ids + sample["tokens"])[:max_new_tokens], skip_special_tokens=True)
        better = {i: text for i in going if (text := with_calculation(texts[i]))}
        going = [i for i, text in better.items() if len(tokenizer(text)["input_ids"]) < max_new_tokens]
        texts |= {i: better[i] for i in going}
    return list(texts.values())
# ---- Figures ---------------------------------------------------------------------------------------------------------
def plot_rewards(rows: list[dict], path: Path):
    """Heat maps of the token rewards of a right and of a wrong sample, of one question if there is one with both."""
    from matplotlib.figure import Figure
    both = {row["id"]: {} for row in rows}
    for row in rows:
        both[row["id"]].setdefault(row["correct"], row)
    shown = {right: row for pair in sorted(both.values(), key=len) for right, row in pair.items()}  # the last stays
    limit, width = max(abs(reward) for row in shown.values() for reward in row["rewards"]) or 1, 16
    axes = Figure(figsize=(10 * len(shown), 6)).subplots(1, len(shown), squeeze=False)[0]
    for axis, (right, row) in zip(axes, sorted(shown.items(), reverse=True), strict=True):
        cells = row["rewards"] + [math.nan] * (-len(row["rewards"]) % width)
        axis.imshow(np.reshape(cells, (-1, width)), "RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, piece in enumerate(row["pieces"]):
            axis.text(i % width, i // width, repr(piece)[1:-1].replace("$", r"\$"), ha="center", va="center", size=8)
        axis.set_title(f"{'right' if right else 'wrong'}: sum {row['sum']:.2f}; red < 0 < blue, up to {limit:.2f}")
        axis.axis("off")
    axes[0].figure.savefig(path, dpi=120, bbox_inches="tight")
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
    check_arguments(replace(args, terminal_value=0.0, value_shift=0.0), positive=(  # these two may be negative
        "max_prompt_tokens max_new_tokens batch_size max_tokens_per_microbatch head_chunk keep_last").split())
    if args.eval_samples < 2 or args.gamma > 1 or args.online_alpha >= 1:
        fail("--eval-samples must be at least 2, --gamma at most 1 and --online-alpha below 1.")
    if args.template and ("{question}" not in args.template or args.system_prompt):
        fail('--template needs {question} in it; --system-prompt is for the chat template, used with --template "".')

    # data: split as by train_test_split(test_size=0.1, seed=42) of datasets; prompt and response are tokenised apart
    system_prompt = None if args.template else args.system_prompt
    tokenizer, context = load_tokenizer(args.model_name, system_prompt, args.trust_remote_code)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @functools.cache
    def encode(question, z=None):
        text = args.template.replace("{question}", question)
        return tokenizer(text)["input_ids"] if text else encode_prompt(tokenizer, question, args.system_prompt)

    def demonstration(problem):
        answer = " " * bool(args.template) + problem["answer"]
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"prompt": encode(problem["question"]), "tokens": tokens[: args.max_new_tokens],
                "terminal": len(tokens) <= args.max_new_tokens, "online": False}
    problems = load_problems(args.dataset, args.dataset_config, "train")
    held_out = math.ceil(0.1 * len(problems))
    order = np.random.default_rng(42).permutation(len(problems))[: held_out + (args.max_train_rows or len(problems))]
    fits = [len(encode(problem["question"])) <= args.max_prompt_tokens for problem in problems]
    problems, val_problems = ([problems[i] for i in x if fits[i]] for x in (order[held_out:], order[:held_out]))
    eval_problems = load_problems(args.eval_dataset, args.dataset_config, "test") if args.eval_dataset else val_problems
    eval_problems = eval_problems[: args.eval_size or None]
    train, val = (list(map(demonstration, part)) for part in (problems, val_problems))
    print(f"{len(train)} demonstrations, {sum(not row['terminal'] for row in train)} cut at --max-new-tokens; "
          f"{len(val)} held out; {len(order) - len(train) - len(val)} over --max-prompt-tokens left out")
    if not train or not val:
        fail(f"{args.dataset} leaves {len(train)} demonstrations and {len(val)} held out; raise --max-prompt-tokens.")
    max_model_len = check_lengths(problems + val_problems + eval_problems, encode, args.max_new_tokens, context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if WORLD_SIZE > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if device.type == "cuda" else -1)  # -1: does nothing
        torch.distributed.init_process_group()  # gloo on the CPU, NCCL on GPUs; vLLM destroys all groups at exit
    run_dir = Path(gather(open_run(args, __file__))[0])  # an earlier start of the same --run-name is resumed below
    metrics_path = run_dir / "metrics.jsonl"

    # engine first (it measures free memory and reseeds everything), then seeds, then the policy
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sleep = args.vllm_sleep and device.type == "cuda"
    llm = make_engine(args, device, max_model_len)
    if sleep:
        llm.sleep(level=2)  # drops the weights; sync_weights sends them again
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(args.seed)
    from vllm.config import set_current_vllm_config
    with set_current_vllm_config(llm.llm_engine.vllm_config):  # classes that vLLM has taken over (GPT-NeoX) ask for it
        policy, reference = load_policy(args, device, dtype if args.lora_r else torch.float32, args.lora_r), None
        if args.lambda_kl:  # with LoRA the policy without its adapters
            reference = policy if args.lora_r else load_policy(args, device, dtype, 0).requires_grad_(False)
    for module in [*policy.modules(), *(reference.modules() if reference else ())]:
        module.do_not_compile = True  # nor are they for vLLM to compile
    if WORLD_SIZE > 1 and args.lambda_kl and not args.lora_r:
        reference.set_reshard_after_forward(False, recurse=False)  # the backward pass asks for its head again
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    sizes = {"pad_id": pad_id, "max_tokens": args.max_tokens_per_microbatch, "head_chunk": args.head_chunk}
    optimizer = torch.optim.AdamW(trainable, args.lr, (0.9, 0.95), args.eps, args.weight_decay, fused=True)

    # resume: what was logged after the checkpoint is cut off and done again
    gather(RANK == 0 and start_run(run_dir, args))
    state = load_checkpoint(run_dir / "checkpoints", policy, optimizer)
    state = state or {"step": 0, "logged": 0, "shift": args.value_shift}
    with open(metrics_path, "ab") as file:
        file.truncate(state["logged"])
    signals = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    if args.track:
        import wandb
        wandb.init(name=run_dir.name, id=f"{run_dir.parent.name}__{run_dir.name}", resume="allow", config=asdict(args))
        wandb.define_metric("*", step_metric="step")

    def log(record):
        with open(metrics_path if RANK == 0 else os.devnull, "a") as file:
            file.write(json.dumps(record) + "\n")
        if args.track:
            wandb.log(record)

    def own_samples(prompts, step):
        """A sample of the policy for each prompt, as rows, then vLLM put to sleep, and its gap to the trainer on 16."""
        draw = int(np.random.default_rng([args.seed, step, 9]).integers(2**32))
        for set_seed in (np.random.seed, torch.manual_seed):  # vLLM draws from torch's, on a GPU from numpy's
            set_seed(draw)
        samples = rollout(llm, prompts, 1, 1.0, args.max_new_tokens)
        if sleep:
            llm.sleep(level=2)
        rows = [{"prompt": prompt, "tokens": sample["tokens"], "terminal": sample["finish_reason"] == "stop",
                 "online": True} for prompt, sample in zip(prompts, samples, strict=True)]
        scored = zip(score_values(policy, rows[:16], **sizes), samples, strict=False)
        gaps = np.concatenate([abs(q - v[:-1] - sample["logps"]) for (v, q, *_), sample in scored])
        if not gaps.mean() <= args.max_logp_diff:  # NaN fails too
            fail(f"trainer and vLLM differ by {gaps.mean():.3f} nats a token after step {step}, over --max-logp-diff.")
        return rows, {"rollout/logp_diff_mean": gaps.mean(), "rollout/logp_diff_max": gaps.max()}

    def run_evaluation(step):
        from rouge_score.rouge_scorer import RougeScorer
        started, scorer = time.perf_counter(), RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
        sync_weights(llm, policy, sleep)
        ask = functools.partial(evaluate, llm, tokenizer, eval_problems, encode, max_new_tokens=args.max_new_tokens,
                                answer_mode="strict", seed=args.seed)
        figures, samples = ask(num_samples=args.eval_samples, temperature=args.eval_temperature)
        figures |= {k.replace("pass@1", "greedy"): x for k, x in ask(temperature=0.0)[0].items() if "pass@1" in k}
        prompts = [encode(problem["question"]) for problem in eval_problems]
        if args.calculator:
            texts = with_calculator(llm, tokenizer, prompts, args.max_new_tokens)
            figures["calculator"] = np.mean([is_correct(extract_answer(text, "strict"), problem["gold"])
                                             for text, problem in zip(texts, eval_problems, strict=True)])
        _, checked = own_samples(prompts[:16], step)  # the self-check, which also puts vLLM to sleep

        # the held-out demonstrations, and of every question the reference answer, that corrupted, and the samples
        rows = [{"id": i, "kind": "held_out", **row} for i, row in enumerate(val)]
        rng, shift = np.random.default_rng(args.seed), state["shift"]
        for i, problem in enumerate(eval_problems):
            mine = samples[i * args.eval_samples :][: args.eval_samples]
            measured = diversity([sample["completion"] for sample in mine])
            for kind, answer in ("reference", problem["answer"]), ("corrupted", corrupt(problem["answer"], rng)):
                rows.append({"id": i, "kind": kind, **demonstration(problem | {"answer": answer})})
            for sample in mine:
                rouge = scorer.score(problem["answer"], sample["completion"])
                rows.append({"id": i, "kind": "sample", "prompt": prompts[i], "tokens": sample["token_ids"],
                             "terminal": sample["finish_reason"] == "stop", "correct": sample["correct"],
                             **measured, **{key: x.fmeasure for key, x in rouge.items()}})
        table = defaultdict(list)
        for row, (v, q, entropy, *_) in zip(rows, score_values(policy, rows, **sizes), strict=True):
            rewards, scores = reward_scores(v - shift, q - shift, row["terminal"], args.gamma, args.terminal_value)
            table[row["kind"]].append(np.stack([v[:-1] - q, rewards**2, entropy]))
            row |= {**scores, "rewards": rewards.tolist(), "log_pis": (q - v[:-1]).tolist(),
                    "pieces": [tokenizer.decode([token]) for token in row["tokens"]]}
        nll, td, entropy = np.concatenate(table["held_out"], axis=1).mean(1)
        figures |= {"val_mle": nll, "val_perplexity": math.exp(min(nll, 700)), "val_td": td, "val_entropy": entropy,
                    "sample_entropy": np.concatenate(table["sample"], axis=1)[2].mean()}
        figures |= {key: np.mean([row[key] for row in rows if row["kind"] == "sample"]) for key in (*measured, *rouge)}
        if RANK == 0:
            with open(run_dir / "rewards.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            plot_rewards([row for row in rows if row["kind"] == "sample"], run_dir / "rewards.png")
        figures = {f"eval/{key}": float(x) for key, x in figures.items()} | checked
        figures |= {f"reward/{key}": x for key, x in reward_figures(rows).items()} | {"irl/shift": shift}
        log({"step": step, **figures, "time/eval": time.perf_counter() - started})
        shown = ("pass@1", "greedy", "self_bleu", "sample_entropy", "val_mle", "val_td")
        print(f"after step {step}:", *(f"{key} {figures[f'eval/{key}']:.4f}" for key in shown), flush=True)

    if state["shift"] == "auto":  # the level of logits is arbitrary, but behind the end token r is Q itself
        ended = [row for row in train if row["terminal"]][:256]
        state["shift"] = float(np.mean([q[-1] for _, q, *_ in score_values(policy, ended, **sizes)] or 0.0))

    # the permutations of all epochs, one behind the other, are cut into batches
    orders = [np.random.default_rng([args.seed, k]).permutation(len(train)) for k in range(args.num_train_epochs)]
    orders, total = sum(map(list, orders), []), math.ceil(args.num_train_epochs * len(train) / args.batch_size)
    if state["step"] == 0 and total and not args.skip_first_eval:
        run_evaluation(0)
    bar = tqdm(range(state["step"], total), initial=state["step"], total=total, file=sys.stdout, disable=None)
    for step in bar:
        if step and args.eval_every and step % args.eval_every == 0:
            run_evaluation(step)
        t0 = time.perf_counter()
        rows, record = [train[i] for i in orders[step * args.batch_size :][: args.batch_size]], {"step": step + 1}
        ramp = min(1.0, max(0, step + 1 - args.mle_steps_before_irl) / max(1, args.td_warmup_steps))
        lambda_td, alpha = args.lambda_td * ramp, args.online_alpha * (args.lambda_td * ramp > 0)
        if alpha:  # the model's own answers; without r^2 nothing would bound their term
            sync_weights(llm, policy, sleep)
            own, checked = own_samples([row["prompt"] for row in rows], step)
            rows, record = rows + own, record | checked
        t1 = time.perf_counter()

        # forward and backward; micro-batches are divided by the tokens of the whole batch, so the split does not matter
        tokens = [sum(len(row["tokens"]) for row in rows if row["online"] == online) for online in (False, True)]
        lengths, loss_sum, seen = [len(row["prompt"]) + len(row["tokens"]) for row in rows], 0.0, []
        for part in micro_batches(lengths, args.max_tokens_per_microbatch):
            part = [rows[i] for i in part]
            inputs = pad_batch([row["prompt"] for row in part], [row["tokens"] for row in part], pad_id, device)
            flags = [(row["terminal"], row["online"]) for row in part] or [(True, False)]
            terminal, online = torch.tensor(flags, device=device).T
            values, chosen, entropy, kl, mean_z = token_values(
                policy, *inputs, terminal, args.head_chunk, reference, args.entropy_coef > 0)
            loss, rewards = iq_loss(values, chosen, inputs[2], terminal, online, tokens, args.gamma, lambda_td, alpha,
                                    state["shift"], args.terminal_value, args.td_detach_next)
            loss = loss + ((args.lambda_kl * kl - args.entropy_coef * entropy) * ~online[:, None]).sum() / tokens[0]
            loss.backward()
            loss_sum += loss.detach()
            place, last = torch.arange(chosen.shape[1], device=device).expand_as(chosen), inputs[2][:, None] - 1
            marks = place == 0, (place == last) & terminal[:, None], online[:, None].expand_as(chosen)
            columns = values[:, :-1], chosen, entropy, kl, mean_z, rewards, *marks
            seen.append(torch.stack([x.detach().float() for x in columns])[:, place <= last])
        optimizer.param_groups[0]["lr"] = lr = args.lr * lr_multiplier(step, args.warmup_steps, total, args.lr_schedule)
        grad_norm = float(unsharded(torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm or math.inf)))
        if not math.isfinite(grad_norm):
            fail(f"the gradient of step {step + 1} is {grad_norm}; lower --lr in another --run-name.")
        optimizer.step()
        optimizer.zero_grad()
        loss_sum, seen = sum(map(float, gather(float(loss_sum)))), gather(torch.cat(seen, 1).double().cpu().numpy())
        seconds = time.perf_counter() - t1

        # log and checkpoint
        v, q, entropy, kl, z, r, first, ended, own = np.concatenate(seen, axis=1)
        demo = own == 0
        named = {"chosen_q": q, "value": v, "log_pi": q - v, "logits": z, "entropy": entropy, "reward": r}
        for key, x in named.items():
            record |= {f"irl/{key}_mean": float(x[demo].mean()), f"irl/{key}_std": x[demo].std()}
        middle = demo * (1 - first) * (1 - ended)
        for key, where in {"first": demo * first, "middle": middle, "terminal": demo * ended, "online": own}.items():
            record |= {f"irl/td_{key}": (r[where > 0] ** 2).mean()} if where.any() else {}
        td = (r[demo] ** 2).mean()
        log(record | {
            "losses/loss": loss_sum, "losses/mle": (v - q)[demo].mean(), "losses/td": td, "losses/kl": kl[demo].mean(),
            "losses/grad_norm": grad_norm, "irl/lambda": lambda_td, "irl/shift": state["shift"],
            "time/rollout": t1 - t0, "charts/learning_rate": lr, "charts/samples_per_second": len(rows) / seconds,
            "charts/tokens_per_second": sum(tokens) / seconds, "time/forward_backward": seconds,
            "memory/peak_gb": (torch.cuda.max_memory_allocated() or 1024 * getrusage(RUSAGE_SELF).ru_maxrss) / 1e9})
        line = f"loss {loss_sum:.3f}  mle {-record['irl/log_pi_mean']:.3f}  td {td:.3f}"
        print(f"step {step + 1}  {line}", flush=True) if bar.disable else bar.set_postfix_str(line)
        stop = max(gather(max(signals, default=0)))
        if step + 1 == total or (args.save_every and (step + 1) % args.save_every == 0) or stop:
            state |= {"step": step + 1, "logged": metrics_path.stat().st_size}
            save_checkpoint(run_dir / "checkpoints", policy, optimizer, state, args.keep_last)
        if stop:
            print(f"signal {stop}: saved after step {step + 1}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + stop)

    run_evaluation(total)
    if total:
        save_final(run_dir / "final", policy, tokenizer, dtype)
    print(f"written: {run_dir}/ with metrics.jsonl, rewards.jsonl, rewards.png and, if trained, the model in final/")
    if RANK > 0:
        sys.exit()
    records = [r for r in map(json.loads, metrics_path.read_text().splitlines()) if "time/eval" in r]
    for key in [key for key in records[-1] if key.startswith(("eval/", "reward/"))]:
        print(f"{key:<32}", *(f"{r.get(key, math.nan):>10.4f}" for r in (records[0], records[-1])[-len(records) :]))

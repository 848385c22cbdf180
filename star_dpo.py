"""STaR (Zelikman et al. 2022, arXiv 2203.14465) with filtered SFT or DPO on multiple choice: MMLU in 15 languages.

Sample K answers to every training question, grade them by their letter, train on what the grades say, repeat:

    sft    -log p(y | x) of the right answers y, a mean over tokens (sft_unique: one right answer a question)
    dpo    -log sigmoid(beta h),  h = log [p / p_ref](y right | x) - log [p / p_ref](y wrong | x)     (arXiv 2305.18290)

dpo takes all right x wrong pairs of a question; --rpo-alpha adds the right answer's -log p / tokens (IRPO, 2404.19733).
weighted and dpo_listwise have targets softmax(score / lambda) over a question's K answers. Sampling is always from the
latest model; training starts again from --model-name (STaR's rule) or goes on (--no-reset-model, as in IRPO).
Left out: few-shot prompts, soft scores, 4-bit weights. Not yet run on a GPU; results are in README.md.

    python star_dpo.py --model-name Qwen/Qwen2.5-7B-Instruct              # LoRA, DPO, meant for one 80 GB GPU
    python star_dpo.py --strategy sft --lr 2e-4 --dataset mmlu_YO-NG      # STaR on Yoruba
"""

import copy, functools, json, math, os, random, re, shutil, signal, sys, time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import groupby
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
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from first_edition import (check_arguments, check_lengths, choice_figures, encode_prompt, extract_letter, fail,
                        load_questions, load_tokenizer, open_run, read_rows, split_ids, start_run, user_message)
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, model, seed, time)
    output_dir: str = "runs"  # where run folders are made
    seed: int = 1  # seed of data order, sampling and LoRA initialisation
    track: bool = False  # also log to Weights & Biases (project: WANDB_PROJECT); metrics.jsonl is always written
    # model
    model_name: str = "Qwen/Qwen2.5-7B-Instruct"  # Hugging Face id or local folder of a chat model
    tokenizer_name: str = ""  # a base model takes its chat sibling's tokenizer, for template and end token (empty: own)
    ref_model_name: str = ""  # DPO's reference, another model with the same tokenizer (empty: see reference)
    lora_r: int = 16  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 16  # LoRA scale: W + (lora_alpha / lora_r) B A; the original has lora_r here
    trust_remote_code: bool = False  # run Python code that comes with the model
    # data
    dataset: str = "mmlu"  # mmlu, mmlu_YO-NG or another language, or a .jsonl or .csv; split 80/10/10, always the same
    eval_datasets: tuple[str, ...] = ()  # further languages or files: their own validation questions are asked too
    eval_split: Literal["val", "test", "train"] = "val"  # evaluated on; test: when all is chosen; train: overfitting
    eval_size: int = 0  # evaluation questions; 0: all
    num_train_questions: int = 0  # training questions; 0: all
    max_prompt_tokens: int = 3072  # longer prompts are left out, and counted
    system_prompt: str = "You are a helpful assistant"  # empty: none
    preamble: str = (  # stands before the question
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD.")
    meta_prompt: str = "Think step by step before answering."  # stands behind the preamble
    extraction: Literal["robust", "simple_evals"] = "robust"  # how the letter is read, see extract_letter
    # rollout
    num_iterations: int = 10  # STaR iterations (the original's max_epochs); 0 evaluates only
    samples_per_question: int = 4  # K, in training and for the validation loss; at least 2, but for sft and sft_unique
    max_new_tokens: int = 1024  # longest completion in tokens; one that does not end by then is wrong
    temperature: float = 1.0  # of the K samples; evaluations are greedy
    questions_per_rollout: int = 512  # questions sampled at a time; a stopped run loses no more than that
    preload_train: str = ""  # samples of the first iteration: a samples/*.jsonl, or a .csv with the original's columns
    preload_val: str = ""  # the same for the validation loss (empty: K samples from the model at the start)
    rationalize: float = 0.0  # share of questions without a right sample that get one more, with the answer marked
    # STaR and DPO
    strategy: Literal["sft", "sft_unique", "weighted", "dpo", "dpo_listwise"] = "dpo"  # what is trained on, see above
    beta: float = 0.1  # of DPO: strength of the pull to the reference
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"  # ipo: squared, each log-ratio over its tokens
    label_smoothing: float = 0.0  # assumed share of pairs that are the wrong way round, below 0.5
    rpo_alpha: float = 0.0  # weight of -log p / tokens of the right answer in dpo; 1 in IRPO
    score_lambda: float = 0.5  # lambda of the targets softmax(score / lambda) in weighted and dpo_listwise
    max_pairs: int = 0  # pairs of a question, spread evenly over its right and wrong answers; 0: every right x wrong
    min_correct: int = 1  # right samples that a question needs to be trained on; 2 thins out lucky guesses
    reference: Literal["initial", "iteration_start"] = "initial"  # which weights; alike with reset_model
    reset_model: bool = True  # every iteration starts from model_name again; False: goes on from the latest
    internal_epochs: int = 1  # passes over an iteration's data; 0: one iteration's sampling and grading, no training
    # optimizer
    lr: float = 5e-6  # peak; the original has 5e-6 for dpo and 2e-4 for sft, both with LoRA
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay after the warm-up, to 0 at the last step
    warmup_steps: int = 45  # linear warm-up at the start of every iteration, in steps
    batch_size: int = 24  # pairs (sft: answers; weighted, dpo_listwise: questions) of one optimizer step
    shuffle: Literal["questions", "all", "none"] = "questions"  # dpo's pairs of a question stay together: faster
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm clip; 0: none
    # GPU memory
    max_tokens_per_microbatch: int = 16384  # padded tokens in a rank's forward-backward; halve it when out of memory
    head_chunk: int = 1024  # tokens for which logits [head_chunk, vocabulary] exist at a time
    gradient_checkpointing: bool = True  # recompute activations in the backward pass (GPU only)
    gpu_memory_utilization: float = 0.4  # vLLM's share of the GPU, weights and cache (without a GPU: 256 MiB of cache)
    vllm_sleep: bool = True  # give vLLM's memory back while training (GPU only)
    max_logp_diff: float = 0.1  # stop if trainer and vLLM differ by more on average, in nats per sampled token
    # evaluation and checkpoint
    evaluation: Literal["both", "accuracy", "loss", "none"] = "both"  # greedy accuracy, loss on fixed samples
    eval_every: int = 60  # evaluate every so many steps, besides the start and end of an iteration; 0: only there
    skip_first_eval: bool = False  # no evaluation before the first iteration
    save_every: int = 60  # write a checkpoint every so many steps, and at an iteration's end; 0: only there
    save_models: bool = False  # with every checkpoint a Hugging Face folder models/step_<n>, all of them kept
    keep_last: int = 2  # checkpoints kept
# ---- What is trained on, and the loss --------------------------------------------------------------------------------
LEAK = re.compile(r"\(correct\)|\b(?:hints?|marked|given answer|as (?:stated|indicated))\b", re.IGNORECASE)
END_TEXT = re.compile(r"(?:<\|(?:eot_id|eom_id|im_end|end_of_text|endoftext|end)\|>|</s>|<end_of_turn>)\s*$")

def load_generations(path: str, dataset: list[dict], split: list[int], asked: list[dict], message, tokenizer):
    """Graded samples of the questions `asked`, from a samples/*.jsonl of ours or a .csv with the original's columns.

    All must be of questions in `split` (ids), with message(question) in their prompts; those without text are left out.
    Another model's end token becomes this tokenizer's. No path: [].
    """
    if not path:
        return []
    decode, rows = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False), []
    split, wanted = set(split), {question["id"] for question in asked}
    for where, row in read_rows(path):
        try:
            number, raw, score = int(float(row["indices"])), str(row["raw_responses"] or ""), float(row["scores"])
            prompt, tokens = " ".join(row["prompted_questions"].split()), row.get("token_ids")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            fail(f"{where} needs the columns indices, prompted_questions, raw_responses and scores.")
        if number not in split:
            fail(f"{where}: question {number} is not in this split; was it generated for another split or dataset?")
        if " ".join(message(dataset[number]).split()) not in prompt:
            fail(f"{where} was generated with another prompt; give the same --dataset, --preamble and --meta-prompt.")
        text = END_TEXT.sub("", raw.removesuffix(tokenizer.eos_token))
        if not isinstance(tokens, list) or decode(tokens) != raw:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (text != raw)
        rows.append({"indices": number, "subjects": dataset[number]["subject"], "raw_responses": raw, "scores": score,
                     "model_answers": row.get("model_answers") or row.get("answers") or None, "token_ids": tokens,
                     "finish_reason": row.get("finish_reason") or ("length" if text == raw else "stop")})
    kept = [row for row in rows if row["raw_responses"] and row["indices"] in wanted]
    print(f"{path}: {len(kept)} of {len(rows)} samples have a text and belong to the questions asked")
    return kept or fail(f"{path} holds no sample of the questions asked.")

def make_pairs(right: list, wrong: list, max_pairs: int, rng) -> list[list]:
    """[chosen, rejected] for all right x wrong; over max_pairs > 0: that many, in turn over both, shuffled by rng."""
    pairs = [[a, b] for a in right for b in wrong]
    if max_pairs and len(pairs) > max_pairs:
        right, wrong = ([x[i] for i in rng.permutation(len(x))] for x in (right, wrong))
        turn = math.lcm(len(right), len(wrong))
        pairs = [[right[k % len(right)], wrong[(k + k // turn) % len(wrong)]] for k in range(max_pairs)]
    return pairs

def make_units(rows: list[dict], strategy: str, max_pairs: int, min_correct: int, seed: int) -> list[list[int]]:
    """What a loss is the mean over, as indices into rows: [right] (sft), [right, wrong] (dpo), [all of a question].

    Questions with less than min_correct right samples are left out, those without a wrong one from dpo's.
    """
    groups, units, rng = defaultdict(list), [], np.random.default_rng([seed, 7])
    for i, row in enumerate(rows):
        groups[row["indices"]].append(i)
    for group in groups.values():
        right, wrong = ([i for i in group if (rows[i]["scores"] == 1) == is_right] for is_right in (True, False))
        if len(right) < min_correct:
            continue
        if strategy in ("sft", "sft_unique"):
            units += [[i] for i in right][: 1 if strategy == "sft_unique" else None]
        elif strategy == "dpo":
            units += make_pairs(right, wrong, max_pairs, rng)
        elif wrong or strategy == "weighted":
            units.append(right + wrong)
    return units

def dpo_loss(logps, ref_logps, lengths, beta: float, loss_type: str, label_smoothing: float, rpo_alpha: float):
    """Loss [P] of each pair, and what the log wants of it: {name: [P]}.

    logps, ref_logps [P, 2]: sums over the tokens of the chosen (0) and the rejected (1) answer; lengths [P, 2]: tokens.

        sigmoid   -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h),   h = ratio_chosen - ratio_rejected
        ipo       (ratio_chosen / tokens - ratio_rejected / tokens - 1 / (2 beta))^2           (2310.12036, per token)
        + rpo_alpha (-log p(chosen) / tokens)                                                  (2404.19733, equation 2)
    """
    ratios, nll = logps - ref_logps, -logps[:, 0] / lengths[:, 0]
    if loss_type == "ipo":
        losses = (ratios[:, 0] / lengths[:, 0] - ratios[:, 1] / lengths[:, 1] - 1 / (2 * beta)) ** 2
    else:
        z = beta * (ratios[:, 0] - ratios[:, 1])
        losses = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
    chosen, rejected = beta * ratios.detach().T
    return losses + rpo_alpha * nll, {
        "chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected, "chosen_nll": nll.detach(),
        "ranking_accuracy": (chosen > rejected).float(), "chosen_logp": logps[:, 0], "rejected_logp": logps[:, 1]}

def target_loss(logps, ref_logps, scores, strategy: str, beta: float, score_lambda: float):
    """Cross-entropy of the targets w = softmax(scores / lambda) over one question's K answers; all [K].

        weighted       -sum_i w_i log p_i      w: projection of p_ref exp(score / lambda) / Z on the samples
        dpo_listwise   -sum_i w_i log softmax_i(beta (log p_i - log p_ref_i))     dpo for K = 2, lambda to 0
    """
    targets = (scores / score_lambda).softmax(0)
    return -(targets * (logps if strategy == "weighted" else (beta * (logps - ref_logps)).log_softmax(0))).sum()

def lr_multiplier(step: int, warmup: int, total: int, schedule: str) -> float:
    """Share of the peak learning rate in step 0..total-1: up to 1 in `warmup` steps, then down to 0 in the last one."""
    if step + 1 <= warmup:
        return (step + 1) / warmup
    left = max(0, total - step - 1) / max(1, total - warmup)
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[schedule]
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
    preference, by_tokens = "dpo" in args.strategy, "sft" in args.strategy  # with a reference; mean over tokens
    check_arguments(args, positive=(
        "max_prompt_tokens samples_per_question max_new_tokens temperature questions_per_rollout score_lambda beta "
        "min_correct batch_size max_tokens_per_microbatch head_chunk keep_last").split())
    if not by_tokens and args.samples_per_question <= args.min_correct and args.internal_epochs * args.num_iterations:
        fail(f"--strategy {args.strategy} takes right and wrong: --samples-per-question must be over --min-correct.")
    if args.strategy != "dpo" and (args.rpo_alpha or args.label_smoothing or args.max_pairs or args.dpo_loss == "ipo"):
        fail("--rpo-alpha, --label-smoothing, --max-pairs and --dpo-loss belong to --strategy dpo; leave them out.")
    if args.label_smoothing >= 0.5 or (args.label_smoothing and args.dpo_loss == "ipo"):
        fail("--label-smoothing must be below 0.5, and 0 with --dpo-loss ipo.")
    name = args.tokenizer_name or args.model_name
    tokenizer, context = load_tokenizer(name, args.system_prompt, args.trust_remote_code)
    if args.ref_model_name and load_tokenizer(args.ref_model_name, "")[0].get_vocab() != tokenizer.get_vocab():
        fail(f"--ref-model-name {args.ref_model_name} has another vocabulary than {name}; take one with the same.")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    message = functools.partial(user_message, preamble=args.preamble, meta_prompt=args.meta_prompt)
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    @functools.cache
    def encode(text):
        return encode_prompt(tokenizer, text, args.system_prompt)
    def choose(dataset, split, most):
        rows = [dataset[i] for i in split_ids(len(dataset))[split]][: most or None]
        fitting = [row for row in rows if len(encode(message(row))) <= args.max_prompt_tokens]
        print(f"{split}: {len(fitting)} questions, {len(rows) - len(fitting)} over --max-prompt-tokens left out")
        return fitting or fail(f"no {split} question is left; raise --max-prompt-tokens or give a larger dataset.")
    dataset = load_questions(args.dataset)
    questions = choose(dataset, "train", args.num_train_questions)
    eval_sets = {"": choose(dataset, args.eval_split, args.eval_size)}
    for name in args.eval_datasets:
        other = load_questions(name)
        if len(other) == len(dataset) and any(a["answer"] != b["answer"] for a, b in zip(other, dataset, strict=True)):
            fail(f"{name} is not {args.dataset} row by row: its {args.eval_split} questions may be training questions.")
        eval_sets[f"{Path(name).stem}_"] = choose(other, args.eval_split, args.eval_size)
    texts = [{"question": message(row, hint=args.rationalize > 0)}
             for rows in (questions, *eval_sets.values()) for row in rows]
    max_model_len = check_lengths(texts, encode, args.max_new_tokens, context)
    ids = split_ids(len(dataset))
    preloaded = load_generations(args.preload_train, dataset, ids["train"], questions, message, tokenizer)
    val_rows = load_generations(args.preload_val, dataset, ids[args.eval_split], eval_sets[""], message, tokenizer)
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
    policy = load_policy(args, device, dtype if args.lora_r else torch.float32, args.lora_r)
    if args.tokenizer_name:  # final/ ends its answers with the chat sibling's token
        policy.generation_config.eos_token_id = tokenizer.eos_token_id
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    def shards():  # of every trained weight; in a single process all of it
        return [p.detach().to_local() if WORLD_SIZE > 1 else p.detach() for p in trainable]
    def restore(weights):
        for shard, weight in zip(shards(), weights, strict=True):
            shard.copy_(weight)
    initial = [shard.to("cpu", copy=True) for shard in shards()]
    sizes = {"pad_id": pad_id, "max_tokens": args.max_tokens_per_microbatch, "head_chunk": args.head_chunk}
    optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    # resume: what was logged or sampled after the checkpoint is cut off and done again
    gather(RANK == 0 and start_run(run_dir, args))
    state = load_checkpoint(run_dir / "checkpoints", policy, optimizer) or {
        "step": 0, "iteration": 0, "position": 0, "logged": 0, "val_refs": None}
    if RANK == 0:
        with open(metrics_path, "ab") as file:
            file.truncate(state["logged"])
    (run_dir / "samples").mkdir(exist_ok=True)
    newest = {"val": state["step"], "train": state["iteration"] + 1, "hinted": state["iteration"] + 1}
    for path in (run_dir / "samples").glob("*_[0-9]*.jsonl"):
        kind, number = path.stem.split("_")[:2]
        if number.isdigit() and int(number) > newest.get(kind, math.inf):
            path.unlink(missing_ok=True)
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
    def prompt_of(row):  # token ids of an answer's prompt, without a hint: what it is scored and trained with
        return encode(message(dataset[row["indices"]]))
    def generate(name, asked, n, temperature, hint=False):
        """n graded samples of each question, kept in samples/<name>.jsonl; goes on behind its last whole rollout."""
        path, chunk = run_dir / "samples" / f"{name}.jsonl", args.questions_per_rollout
        lines = gather(path.read_text().split("\n")[:-1] if path.exists() else [])[0]  # without one that a kill cut off
        lines = lines[: len(lines) if len(lines) == len(asked) * n else len(lines) // (chunk * n) * chunk * n]
        rows = list(map(json.loads, lines))
        if len(rows) == len(asked) * n:
            return rows
        with open(path, "ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
        sync_weights(llm, policy, sleep)
        for start in range(len(rows) // n, len(asked), chunk):
            draw = int(np.random.default_rng([args.seed, start, *name.encode()]).integers(2**32))
            for set_seed in (np.random.seed, torch.manual_seed):  # vLLM draws from torch's, on a GPU from numpy's
                set_seed(draw)
            llm.reset_prefix_cache()  # a filled one would change the batches, hence what a resumed run draws
            part = asked[start : start + chunk]
            prompts = [encode(message(row, hint=hint)) for row in part]
            samples = rollout(llm, prompts, n, temperature, args.max_new_tokens)
            for i, sample in enumerate(samples):
                row, text = part[i // n], decode(sample["tokens"])
                answer = extract_letter(text, args.extraction) if sample["finish_reason"] == "stop" else None
                rows.append({"indices": row["id"], "subjects": row["subject"], "correct_answers": row["answer"],
                             "prompted_questions": decode(prompts[i // n]), "raw_responses": text,
                             "model_answers": answer, "scores": float(answer == row["answer"]),
                             "token_ids": sample["tokens"], "finish_reason": sample["finish_reason"]})
            if start == 0 and temperature:  # the first samples' log-probabilities, the trainer's against vLLM's
                few, first_prompts = samples[:64], [prompt for prompt in prompts for _ in range(n)][:64]
                ours = score(policy, first_prompts, [x["tokens"] for x in few], temperature, **sizes)
                gaps = [a[: len(x["logps"])] - torch.tensor(x["logps"]) for a, x in zip(ours, few, strict=True)]
                gaps = torch.cat(gaps).abs()
                if not gaps.mean() <= args.max_logp_diff:  # NaN fails too
                    fail(f"trainer and vLLM differ by {gaps.mean():.3f} nats a token in {name}, over --max-logp-diff.")
                rows[0] |= {"logp_diff_mean": gaps.mean().item(), "logp_diff_max": gaps.max().item()}
            with open(path if RANK == 0 else os.devnull, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[start * n :])
            print(f"{name}: {len(rows) // n} of {len(asked)} questions", flush=True)
            if stop := max(gather(max(signals, default=0))):
                print(f"signal {stop}: these samples are kept; --run-name {run_dir.name} goes on from there.")
                sys.exit(128 + stop)
        if sleep:
            llm.sleep(level=2)
        return rows
    def reference_logps(rows, units):
        """log p_ref of every answer that stands in `units`, 0 for the others: [len(rows)] fp64. Once an iteration."""
        logps, reference = torch.zeros(len(rows)).double(), policy
        used = sorted({i for unit in units for i in unit}) if preference else []
        if used and args.ref_model_name:
            reference = load_policy(replace(args, model_name=args.ref_model_name), device, policy.dtype, 0)
        for part in [used[i : i + 512] for i in range(0, len(used), 512)]:  # 512: bounds the matrix that score returns
            prompts, answers = [prompt_of(rows[i]) for i in part], [rows[i]["token_ids"] for i in part]
            logps[part] = score(reference, prompts, answers, 1.0, **sizes).double().sum(1)
        return logps
    def run_units(rows, units, refs, train):
        """Mean loss over the units, and the other means that are logged; train: with the backward pass."""
        groups = [list(group) for _, group in groupby(units, key=lambda unit: rows[unit[0]]["indices"])]
        shared = [{i for unit in group for i in unit} for group in groups]  # an answer of several pairs is run once
        longest = [max(len(prompt_of(rows[i])) + len(rows[i]["token_ids"]) for i in ids) for ids in shared]
        widest, sums = max(map(len, shared)), defaultdict(float)
        padded = [length * widest for length in longest]  # tokens, if every group were as large as the largest
        denominator = sum(len(rows[i]["token_ids"]) for unit in units for i in unit) if by_tokens else len(units)
        for part in micro_batches(padded, args.max_tokens_per_microbatch):
            part = [unit for j in part for unit in groups[j]]
            used = sorted({i for unit in part for i in unit})
            inputs = pad_batch([prompt_of(rows[i]) for i in used], [rows[i]["token_ids"] for i in used], pad_id, device)
            with torch.set_grad_enabled(train):
                logps = token_logprobs(policy, *inputs, 1.0, args.head_chunk)[0].double().sum(1)  # [len(used)]
                ref, lengths, stats = refs[used].to(device), inputs[2], {}
                places = [[used.index(i) for i in unit] for unit in part]
                if not part:  # a rank without units keeps step with the others
                    losses = logps  # 0
                elif args.strategy == "dpo":
                    losses, stats = dpo_loss(*(x[torch.tensor(places)] for x in (logps, ref, lengths)), args.beta,
                                             args.dpo_loss, args.label_smoothing, args.rpo_alpha)
                elif by_tokens:
                    losses = -logps
                else:
                    scores = torch.tensor([rows[i]["scores"] for i in used], device=device).double()
                    losses = torch.stack([target_loss(logps[p], ref[p], scores[p], args.strategy, args.beta,
                                                      args.score_lambda) for p in places])
            if train:
                (losses.sum() / denominator).backward()
            sums["loss"] += losses.sum().item() / denominator
            for key, values in stats.items():
                sums[key] += values.sum().item() / len(units)
        shares = gather(dict(sums))
        return {key: sum(share.get(key, 0.0) for share in shares) for key in shares[0]}
    def run_evaluation():
        started, record = time.perf_counter(), {"step": step}  # with --evaluation none there is nothing more
        for name, asked in eval_sets.items() if args.evaluation in ("both", "accuracy") else ():
            figures = choice_figures(generate(f"val_{step}_{name}".rstrip("_"), asked, 1, 0.0))
            record |= {f"eval/{name}{key}": value for key, value in figures.items()}
        if val_units:
            record |= {f"eval/{k}": x for k, x in run_units(val_rows, val_units, state["val_refs"], False).items()}
        log(record | {"time/eval": time.perf_counter() - started})
        shown = [f"{k} {record[k]:.4f}" for k in ("eval/accuracy", "eval/no_answer", "eval/loss") if k in record]
        print(f"after step {step}:", *shown, flush=True)
    step, val_units = state["step"], []
    if args.evaluation in ("both", "loss"):  # the validation loss is always that of the same samples
        val_rows = val_rows or generate("val_samples", eval_sets[""], args.samples_per_question, args.temperature)
        val_units = make_units(val_rows, args.strategy, args.max_pairs, args.min_correct, args.seed)
        if state["val_refs"] is None:
            state["val_refs"] = reference_logps(val_rows, val_units)
    for iteration in range(state["iteration"], args.num_iterations):
        # sample from the latest model and grade, or (position > 0: a resumed iteration) read what was sampled
        first = state["position"]
        if first == 0 and (iteration or not args.skip_first_eval):
            run_evaluation()
        t1 = time.perf_counter()
        rows = preloaded if iteration == 0 and preloaded else generate(
            f"train_{iteration + 1}", questions, args.samples_per_question, args.temperature)
        sampled = len(rows)
        if args.rationalize:  # with the answer marked; kept if it is right and does not speak of the mark
            solved = {row["indices"] for row in rows if row["scores"] == 1}
            failed = [row for row in questions if row["id"] not in solved]
            failed = random.Random(args.seed + iteration).sample(failed, round(args.rationalize * len(failed)))
            hinted = generate(f"hinted_{iteration + 1}", failed, 1, args.temperature, hint=True) if failed else []
            rows = rows + [row for row in hinted if row["scores"] == 1 and not LEAK.search(row["raw_responses"])]
        units = make_units(rows, args.strategy, args.max_pairs, args.min_correct, args.seed + iteration)
        for key, part in ("val_samples", val_rows), (f"train_{iteration + 1}", rows):
            mark = hash(tuple((*row["token_ids"], row["scores"]) for row in part))  # of numbers: alike in every process
            if state.setdefault(key, mark) != mark:
                fail(f"samples/{key}.jsonl in {run_dir} (or a preloaded file) has changed since; put it back.")
        owners, batches = [rows[unit[0]]["indices"] for unit in units], math.ceil(len(units) / args.batch_size)
        total = args.internal_epochs * batches
        if first == 0:
            log({"step": step, "iteration": iteration + 1, "time/rollout": time.perf_counter() - t1,
                 **{f"rollout/{key}": value for key, value in choice_figures(rows[:sampled]).items()},
                 **{f"rollout/{key}": rows[0][key] for key in ("logp_diff_mean", "logp_diff_max") if key in rows[0]},
                 "rollout/units": len(units), "rollout/rationalized": 1 - sampled / len(rows)})
            print(f"iteration {iteration + 1}: {len(rows)} samples, {len(units)} units, {total} steps", flush=True)
            if not args.internal_epochs:
                break
            if not units:
                fail(f"no question has the right or wrong samples {args.strategy} needs; raise --samples-per-question.")
            # the reference, then the weights that this iteration starts from
            t2 = time.perf_counter()
            latest = initial if args.reset_model else [shard.to("cpu", copy=True) for shard in shards()]
            restore(initial if args.reference == "initial" else latest)
            state["refs"] = reference_logps(rows, units)
            if args.reference == "iteration_start":
                state["val_refs"] = reference_logps(val_rows, val_units)
            restore(latest)
            log({"step": step, "iteration": iteration + 1, "time/scoring": time.perf_counter() - t2})
            optimizer.state.clear()
        for position in (bar := tqdm(range(first, total), initial=first, total=total, file=sys.stdout, disable=None)):
            if position and args.eval_every and step % args.eval_every == 0:
                run_evaluation()
            t2 = time.perf_counter()
            epoch, place = divmod(position, batches)
            permutation = np.random.default_rng([args.seed, iteration, epoch]).permutation
            order = np.arange(len(units)) if args.shuffle == "none" else permutation(len(units))
            if args.shuffle == "questions" and preference:
                order = np.argsort(permutation(len(dataset))[owners], kind="stable")
            batch = [units[i] for i in order[place * args.batch_size :][: args.batch_size]]
            lr = args.lr * lr_multiplier(position, args.warmup_steps, total, args.lr_schedule)
            optimizer.param_groups[0]["lr"] = lr
            figures = run_units(rows, batch, state["refs"], train=True)
            grad_norm = float(unsharded(torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm or math.inf)))
            if not math.isfinite(grad_norm):
                fail(f"the gradient of step {step + 1} is {grad_norm}; the last checkpoint is sound: lower --lr.")
            optimizer.step()
            optimizer.zero_grad()
            step, seconds = step + 1, time.perf_counter() - t2
            log({"step": step, "iteration": iteration + 1, "charts/learning_rate": lr, "losses/grad_norm": grad_norm,
                 **{f"{'losses' if key == 'loss' else 'dpo'}/{key}": value for key, value in figures.items()},
                 "charts/samples_per_second": len(batch) / seconds, "time/forward_backward": seconds,
                 "charts/tokens_per_second": sum(len(rows[i]["token_ids"]) for unit in batch for i in unit) / seconds,
                 "memory/peak_gb": (torch.cuda.max_memory_allocated()
                                    or 1024 * getrusage(RUSAGE_SELF).ru_maxrss) / 1e9})
            line = "  ".join(f"{k} {v:.3f}" for k, v in figures.items() if k in ("loss", "margin", "ranking_accuracy"))
            print(f"step {step}  {line}", flush=True) if bar.disable else bar.set_postfix_str(line)
            stop, last = max(gather(max(signals, default=0))), position + 1 == total
            if last or (args.save_every and step % args.save_every == 0) or stop:
                state |= {"step": step, "iteration": iteration + last, "position": 0 if last else position + 1}
                state["logged"] = metrics_path.stat().st_size
                save_checkpoint(run_dir / "checkpoints", policy, optimizer, state, args.keep_last)
                if args.save_models and not gather((run_dir / "models" / f"step_{step}").exists())[0]:
                    save_final(run_dir / "models" / f"step_{step}", policy, tokenizer, dtype)
            if stop:
                print(f"signal {stop}: saved after step {step}; --run-name {run_dir.name} goes on from there.")
                sys.exit(128 + stop)
        state["position"] = 0
    run_evaluation()
    if args.num_iterations * args.internal_epochs:
        save_final(run_dir / "final", policy, tokenizer, dtype)
        print(f"model: {run_dir / 'final'}   metrics: {metrics_path}   samples: {run_dir / 'samples'}")

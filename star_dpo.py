"""STaR (Zelikman et al. 2022, arXiv 2203.14465) with filtered SFT or DPO on multiple choice: MMLU in 15 languages.

Sample K answers y to every training question x, grade them by their letter, train on what the grades say, repeat:

    sft            -log p(y | x) of the right answers, a mean over their tokens      (sft_unique: first of a question)
    dpo            -log sigmoid(beta h) of all right x wrong pairs of a question     (arXiv 2305.18290)
                   h = log [p / p_ref](y_right | x) - log [p / p_ref](y_wrong | x)
    weighted       -sum_i w_i log p(y_i | x) of all K answers, w = softmax(grade / lambda)
    dpo_listwise   -sum_i w_i log softmax_i(beta log [p / p_ref](y_i | x)), the same w

Sampling is always from the latest model. Training starts again from --model-name in every iteration (STaR's rule), or
goes on with --no-reset-model. IRPO (2404.19733) is --no-reset-model --reference iteration_start --rpo-alpha 1.

The K answers of a question share its prompt. So they run through the model as one row of tokens, a prefix tree.

Left out: few-shot prompts, soft scores, 4-bit weights, models with sliding windows or linear attention.

    python star_dpo.py --model-name Qwen/Qwen2.5-7B-Instruct              # LoRA, DPO, one 80 GB GPU
    python star_dpo.py --strategy sft --lr 2e-4 --dataset mmlu_YO-NG      # STaR on Yoruba
"""

import csv
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
import unicodedata
import warnings
from collections import defaultdict
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

from eval_gsm8k import encode_prompt, load_jsonl, load_tokenizer, plain_error

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
# Shapes: R trees, T tokens of the largest, B answers in them, C tokens of the longest answer, P pairs, H hidden size.
HEAD_CHUNK = 1024  # tokens for which logits [HEAD_CHUNK, vocabulary] exist at a time
MAX_PADDING = 0.1  # share of a micro-batch that may be pads
KEEP_CHECKPOINTS = 2
CHECKED = 64  # samples of each rollout whose log-probabilities are compared with vLLM's


@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, model, seed, time)
    output_dir: str = "runs"  # where run folders are made
    seed: int = 1  # all random numbers are computed from the seed and the step
    track: bool = False  # also log to Weights & Biases (project: WANDB_PROJECT); metrics.jsonl is always written
    # model
    model_name: str = "Qwen/Qwen2.5-7B-Instruct"  # Hugging Face id or folder of a chat model
    ref_model_name: str = ""  # DPO's reference: another model of the same vocabulary, beside the policy on the GPU
    lora_r: int = 16  # LoRA rank on all linear layers, base weights in bf16 on a GPU; 0 trains all weights, in fp32
    lora_alpha: int = 16  # LoRA scale: W + (lora_alpha / lora_r) B A; the original has lora_alpha = lora_r
    # data
    dataset: str = "mmlu"  # mmlu, mmlu_YO-NG or another language, or a .jsonl or .csv; split 80/10/10, always the same
    eval_split: Literal["val", "test", "train"] = "val"  # questions of evaluations; test: for a final number only
    eval_size: int = 0  # number of evaluation questions; 0: all
    num_train_questions: int = 0  # number of training questions; 0: all
    max_prompt_tokens: int = 3072  # questions with longer prompts are left out, and counted
    system_prompt: str = "You are a helpful assistant"  # empty: none
    preamble: str = (  # stands before the question
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD."
    )
    meta_prompt: str = "Think step by step before answering."  # stands behind the preamble
    extraction: Literal["robust", "simple_evals"] = "robust"  # how the letter is read, see extract_letter
    # rollout
    num_iterations: int = 10  # STaR iterations (the original's max_epochs); 0 evaluates only
    samples_per_question: int = 4  # K, in training and for the validation loss
    max_new_tokens: int = 1024  # longest answer in tokens; one that does not end by then is wrong
    temperature: float = 1.0  # of the K samples; evaluations are greedy, and losses take temperature 1
    questions_per_rollout: int = 512  # questions sampled at a time; a run that is stopped meanwhile loses no more
    preload_train: str = ""  # samples of the first iteration: a samples/*.jsonl, or a .csv with the original's columns
    preload_val: str = ""  # the same for the validation loss (empty: K samples from the model at the start)
    rationalize: float = 0.0  # share of questions without a right sample that are asked again with the option marked
    # STaR and DPO
    strategy: Literal["sft", "sft_unique", "weighted", "dpo", "dpo_listwise"] = "dpo"  # what is trained on, see above
    beta: float = 0.1  # of DPO: strength of the pull to the reference
    label_smoothing: float = 0.0  # of DPO: assumed share of pairs that are the wrong way round, below 0.5
    rpo_alpha: float = 0.0  # of DPO: weight of -log p / tokens of the right answer; 1 in IRPO
    score_lambda: float = 0.5  # lambda of the targets softmax(grade / lambda) in weighted and dpo_listwise
    max_pairs: int = 0  # pairs of a question, drawn from every right x wrong; 0: all (IRPO: 10, from 30 samples)
    reference: Literal["initial", "iteration_start"] = "initial"  # the policy whose weights are the reference's
    reset_model: bool = True  # every iteration starts from model_name again; False: goes on from the latest
    internal_epochs: int = 1  # passes over an iteration's data; 0: one iteration's sampling and grading, no training
    # optimizer
    lr: float = 5e-6  # peak; the original has 5e-6 for dpo and 2e-4 for sft, both with LoRA
    lr_schedule: Literal["linear", "constant"] = "linear"  # decay after the warm-up, to 0 at an iteration's last step
    warmup_steps: int = 45  # linear warm-up at the start of every iteration, in steps
    batch_size: int = 24  # pairs (sft: answers; weighted, dpo_listwise: questions) of one optimizer step
    shuffle: Literal["questions", "all"] = "questions"  # questions: a question's pairs stay together, which is faster
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm clip
    # memory and self-check
    max_tokens_per_microbatch: int = 16384  # padded tokens in a forward-backward; a question's answers are never split
    gpu_memory_utilization: float = 0.6  # vLLM's share of the GPU while it samples; it sleeps while the policy trains
    max_logp_diff: float | None = None  # the self-check's limit, nats a token; None: 1e-4 in fp32, measured in bf16
    # evaluation and checkpoint
    evaluation: Literal["both", "accuracy", "loss", "none"] = "both"  # greedy accuracy, loss on fixed samples
    eval_every: int = 60  # evaluate every so many steps, before the first iteration and at the end of each
    skip_first_eval: bool = False  # no evaluation before the first iteration
    save_every: int = 60  # write a checkpoint every so many steps, besides the end of an iteration


# ---- Questions, prompts, letters -------------------------------------------------------------------------------------
LANGUAGES = "AR-XY BN-BD DE-DE ES-LA FR-FR HI-IN ID-ID IT-IT JA-JP KO-KR PT-BR SW-KE YO-NG ZH-CN".split()
LABELS = (  # "Answer" in MMMLU's languages, with the bytes and in the order of simple-evals; _: optional white space
    "Answer_:|Answer_:\u200b\u200b\u200b\u200b\u200b\u200b|উত্তর_:|उत्तर_:|উত্তরঃ|Antwort_:|답변_:|정답_:|답_:|"
    "答案_：|答案_:|答_：|答_:|答复_：|答曰_：|"
    "الإجابة:|الجواب:|إجابة:|الإجابة النهائية:|الإجابة الصحيحة:|الإجابة الصحيحة هي:|الإجابة هي:|الجواب النهائي:|"
    "Respuesta_:|Risposta_:|答え_:|答え_：|回答_:|回答_：|解答_:|Jawaban_:|Réponse_:|Resposta_:|Jibu_:|"
    "Idahun_:|Ìdáhùn_:|Idáhùn_:|A\u0300m\u1ecd\u0300na\u0300_:|Àdáhùn_:|A\u0300nu\u0301go\u0323_:|Àṣàyàn_:"
).split("|")
LETTERS = dict(zip("أبجدঅবডঢＡＢＣＤ", "ABCDABCDABCD", strict=True))
MARKUP = r"** $\boxed{ }$ \$ $\text{ $ \mathrm{ \{ \text \( \mathbf{ { \boxed".split()  # taken off in this order
WORDS = {re.escape(unicodedata.normalize("NFKC", label).rstrip("_:ঃ\u200b")) for label in LABELS}
CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
ROBUST = re.compile(
    rf"(?i:{'|'.join(sorted(WORDS))})\s{{0,9}}(?:是|为)?[:ঃ]"  # the label
    r"\s{0,9}[(\[`*\"'“]{0,3}"
    rf"([A-D{''.join(LETTERS)}]|[a-d](?=[)\]`*\"'”]|[.,]?[ \t]{{0,9}}(?:\n|<|$)))"  # a small letter stands alone
    rf"(?!['’]?(?!{CJK})\w|[\u0981-\u09e3])"  # no word that only begins with the letter
    r"(?!(?<=A) (?!is |because |since |as )[a-z])"  # nor the article: "Answer: A dog"
    r"(?![)\]]?\s{0,9}(?:/|&|,?\s?(?:or|and)\b)\s{0,9}[(\[]?[A-Da-d]\b)"  # nor a choice: "A or B"
)
LEAK = re.compile(r"\(correct\)|\b(?:hints?|marked|given answer|as (?:stated|indicated))\b", re.IGNORECASE)
END_TEXT = re.compile(r"(?:<\|(?:eot_id|eom_id|im_end|end_of_text|endoftext|end)\|>|</s>|<end_of_turn>)\s*$")


def load_rows(path: str) -> dict[str, dict]:
    """{"<file>, line <number>": row} of a .jsonl, or of a .csv with its header's names."""
    if not path.endswith(".csv"):
        return load_jsonl(path)
    rows = {}
    csv.field_size_limit(2**31 - 1)
    with plain_error(f"{path} cannot be read; give a .csv or .jsonl file"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                for row in reader:
                    rows[f"{path}, line {reader.line_num}"] = row
            except (csv.Error, UnicodeDecodeError) as error:
                sys.exit(f"error: {path} is no UTF-8 text or no CSV behind line {reader.line_num} ({error}); mend it.")
    return rows


def load_questions(dataset: str) -> list[dict]:
    """[{"id", "question", "choices" (4), "answer" (A to D), "subject"}]; id: row number, alike in all languages.

    mmlu is cais/mmlu, mmlu_<language> is openai/MMMLU. Local files have either layout: question, choices, answer (0 to
    3, or a letter), subject; or Question, A, B, C, D, Answer, Subject. A row that cannot be used ends the program.
    """
    language = dataset.removeprefix("mmlu_")
    on_hub = dataset == "mmlu" or language in LANGUAGES
    if on_hub:
        from datasets import load_dataset

        name, config = ("cais/mmlu", "all") if dataset == "mmlu" else ("openai/MMMLU", language.replace("-", "_"))
        with plain_error(f"dataset {dataset} ({name}, {config}) did not load; give a .jsonl or .csv file"):
            table = load_dataset(name, config, split="test")
        rows = {f"{dataset}, row {i}": row for i, row in enumerate(table)}
    elif os.path.exists(dataset):
        rows = load_rows(dataset)
    else:
        sys.exit(f"error: there is no {dataset}; give a .jsonl or .csv, mmlu, or mmlu_ and one of {LANGUAGES}.")

    questions = []
    for where, row in rows.items():
        with plain_error(f"{where} needs 'question', four 'choices' (or A, B, C, D), 'answer' (0 to 3 or A to D)"):
            if None in row:
                raise ValueError("more cells than columns; quote texts with commas")
            row = {str(name).strip().lower(): value for name, value in row.items()}
            choices = row["choices"] if "choices" in row else [row[letter] for letter in "abcd"]
            if isinstance(choices, str):
                choices = json.loads(choices)
            if on_hub:  # there a choice that reads "None" is null
                choices = ["None" if choice is None else choice for choice in choices]
            answer = str(row["answer"]).strip().upper()
            if answer in ("0", "1", "2", "3"):
                answer = "ABCD"[int(answer)]
            question = str(row["question"] or "")
            if not isinstance(choices, list) or len(choices) != 4 or None in choices or answer not in tuple("ABCD"):
                raise ValueError("a field is empty or has another value")
            if not question.strip():
                raise ValueError("the question is empty")
        subject = str(row.get("subject") or "none")
        questions.append({"id": len(questions), "question": question, "choices": list(map(str, choices))})
        questions[-1] |= {"answer": answer, "subject": subject}
    if len(questions) < 10:
        sys.exit(f"error: {dataset} holds {len(questions)} questions; training, validation and test need 10 in all.")
    return questions


def split_ids(n: int) -> dict[str, list[int]]:
    """Row numbers 0..n-1, split 80/10/10 as in the original; a question is in the same part in every language."""

    def cut(ids, share):
        order, size = np.random.default_rng(0).permutation(len(ids)), math.ceil(share * len(ids))
        return ids[order[size : size + int((1.0 - share) * len(ids))]], ids[order[:size]]

    train, rest = cut(np.arange(n), 0.2)
    val, test = cut(rest, 0.5)
    return {"train": train.tolist(), "val": val.tolist(), "test": test.tolist()}


def user_message(question: dict, preamble: str, meta_prompt: str, hint: bool = False) -> str:
    """Preamble and meta prompt, question, and lines "A) ..."; hint: " (CORRECT)" behind the right option (STaR)."""
    options = []
    for letter, choice in zip("ABCD", question["choices"], strict=True):
        mark = " (CORRECT)" if hint and letter == question["answer"] else ""
        options.append(f"{letter}) {choice}{mark}")
    paragraphs = [f"{preamble} {meta_prompt}".strip(), question["question"], "\n".join(options)]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def extract_letter(text: str, mode: str) -> str | None:
    """The letter behind "Answer:" in any of MMMLU's languages, or None.

    simple_evals: its labels tried in order, the first match of the first that matches; a letter keeps its case, and one
    that begins a word counts ("Answer: Cannot say" is C). robust: the last match of any label, "(B)" is allowed; a
    letter that goes on as a word, the article A, and "A or B" are not.
    """
    if mode == "robust":
        text = re.sub(r"\\(?:text|math)(?:bf|it|rm)?\{", "", text)
    for junk in MARKUP:
        text = text.replace(junk, "")
    if mode == "robust":
        text = re.sub("[\u200b-\u200d\ufeff]", "", unicodedata.normalize("NFKC", text))
        found = ROBUST.findall(text)
        return LETTERS.get(found[-1], found[-1].upper()) if found else None
    for label in LABELS:
        label = label.replace("_", r"\s*")
        match = re.search(rf"(?i){label}[ \t]*([A-D]|[أ-د]|[অবডঢＡＢＣＤ])", text)
        if match:
            return LETTERS.get(match[1], match[1])
    return None


def choice_figures(samples: list[dict]) -> dict[str, float]:
    """Shares of graded samples: accuracy, its 95 % Wilson interval, accuracy by subject; and how answers fail.

    no_eos: never ended; no_answer: no letter found; length: mean tokens. Of questions with several samples: solved: any
    is right; mixed: some are right and some are wrong.
    """
    from scipy.stats import binomtest

    values, questions = defaultdict(list), defaultdict(list)
    for row in samples:
        values["accuracy"].append(row["scores"])
        values[f"subject_{row['subjects']}"].append(row["scores"])
        values["no_eos"].append(row["finish_reason"] != "stop")
        values["no_answer"].append(row["model_answers"] is None)
        values["length"].append(len(row["token_ids"]))
        questions[row["indices"]].append(row["scores"])
    if len(questions) < len(samples):
        values["solved"] = [max(scores) for scores in questions.values()]
        values["mixed"] = [min(scores) < max(scores) for scores in questions.values()]
    figures = {name: float(np.mean(column)) for name, column in values.items()}
    interval = binomtest(int(sum(values["accuracy"])), len(samples)).proportion_ci(method="wilson")
    return figures | {"accuracy_low": interval.low, "accuracy_high": interval.high}


def load_samples(path: str, dataset: list[dict], split: list[int], asked: list[dict], message, tokenizer, limit: int):
    """Graded samples of the questions `asked`, from a samples/*.jsonl of ours or a .csv with the original's columns.

    All must be of questions in `split` (ids), with message(question) in their prompts, and have at most `limit` tokens;
    those without text are left out. Another model's end token becomes this tokenizer's.
    """
    samples = []
    rows = load_rows(path)
    split, wanted = set(split), {question["id"] for question in asked}
    for where, row in rows.items():
        with plain_error(f"{where} needs the columns indices, prompted_questions, raw_responses and scores (0 or 1)"):
            number, score = int(float(row["indices"])), float(row["scores"])
            prompt, raw = " ".join(row["prompted_questions"].split()), str(row["raw_responses"] or "")
            if score not in (0, 1) or number != float(row["indices"]):
                raise ValueError("another number")
            text = END_TEXT.sub("", raw.removesuffix(tokenizer.eos_token))
            ended = text != raw
            tokens = row.get("token_ids")
            if not isinstance(tokens, list) or tokenizer.decode(tokens, clean_up_tokenization_spaces=False) != raw:
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended
        if number not in split:
            sys.exit(f"error: {where}: question {number} is not in this split; was it made for another dataset?")
        if " ".join(message(dataset[number]).split()) not in prompt:
            sys.exit(f"error: {where} has another prompt; give the same --dataset, --preamble and --meta-prompt.")
        if len(tokens) > limit:
            sys.exit(f"error: {where} has an answer of {len(tokens)} tokens; raise --max-new-tokens, or remove it.")
        if not raw or number not in wanted:
            continue
        sample = {"indices": number, "subjects": dataset[number]["subject"], "raw_responses": raw, "scores": score}
        sample |= {"model_answers": row.get("model_answers") or None, "token_ids": tokens}
        samples.append(sample | {"finish_reason": "stop" if ended else "length"})
    print(f"{path}: {len(samples)} of {len(rows)} samples have a text and belong to the questions asked")
    if not samples:
        sys.exit(f"error: {path} holds no sample of the questions asked; raise --num-train-questions or --eval-size.")
    return samples


# ---- What is trained on, and the loss --------------------------------------------------------------------------------
def make_units(samples: list[dict], strategy: str, max_pairs: int, seed: list[int]) -> list[list[int]]:
    """The training examples, each as indices into samples: [right] (sft), [right, wrong] (dpo), [all of a question].

    Questions without a right sample are left out; of dpo and dpo_listwise also those without a wrong one.
    """
    groups = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample["indices"]].append(i)
    units, rng = [], np.random.default_rng(seed)
    for group in groups.values():
        right = [i for i in group if samples[i]["scores"] == 1]
        wrong = [i for i in group if samples[i]["scores"] != 1]
        if strategy == "sft":
            units += [[i] for i in right]
        elif strategy == "sft_unique":
            units += [[i] for i in right[:1]]
        elif strategy == "dpo":
            pairs = [[chosen, rejected] for chosen in right for rejected in wrong]
            if max_pairs and len(pairs) > max_pairs:
                pairs = [pairs[i] for i in rng.permutation(len(pairs))[:max_pairs]]
            units += pairs
        elif right and (wrong or strategy == "weighted"):
            units.append(right + wrong)
    return units


def dpo_loss(logps, ref_logps, lengths, beta: float, label_smoothing: float, rpo_alpha: float):
    """Loss [P] of each pair, and the figures to log, {name: [P]}.

    logps, ref_logps [P, 2]: sums over the tokens of the chosen (0) and the rejected (1) answer; lengths [P, 2]: tokens.

        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h),   h = ratio_chosen - ratio_rejected
        + rpo_alpha (-log p(chosen) / tokens)                                                  (2404.19733, equation 2)
    """
    ratios = logps - ref_logps
    h = ratios[:, 0] - ratios[:, 1]
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    nll = -logps[:, 0] / lengths[:, 0]
    stats = {
        "chosen_reward": beta * ratios[:, 0].detach(),
        "rejected_reward": beta * ratios[:, 1].detach(),
        "margin": beta * h.detach(),
        "ranking_accuracy": (h > 0).float(),
        "chosen_nll": nll.detach(),
        "chosen_logp": logps[:, 0].detach(),
        "rejected_logp": logps[:, 1].detach(),
    }
    return losses + rpo_alpha * nll, stats


def target_loss(logps, ref_logps, scores, strategy: str, beta: float, score_lambda: float):
    """Cross-entropy of the targets w = softmax(scores / lambda) over one question's K answers; all [K].

    weighted       -sum_i w_i log p_i      w: weights of p exp(score / lambda) / Z on samples of p
    dpo_listwise   -sum_i w_i log softmax_i(beta (log p_i - log p_ref_i))     dpo for K = 2, lambda to 0
    """
    targets = (scores / score_lambda).softmax(0)
    if strategy == "dpo_listwise":
        logps = (beta * (logps - ref_logps)).log_softmax(0)
    return -(targets * logps).sum()


def lr_multiplier(step: int, warmup: int, total: int, schedule: str) -> float:
    """Share of the peak learning rate in step 0..total-1: up to 1 in `warmup` steps, then down to 0 in the last one."""
    if step + 1 <= warmup:
        return (step + 1) / warmup
    if schedule == "constant" or total == 1:  # a single step would be that last one
        return 1.0
    return max(0, total - step - 1) / max(1, total - warmup)


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


def check_attention(model_name: str):
    """End the program if a layer of the model does more or less than full attention: prefix trees would mislead it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_name).get_text_config()
    layers = set(getattr(config, "layer_types", None) or [])
    if not layers and getattr(config, "sliding_window", None):
        layers = {"sliding_attention"}
    other = sorted(layers - {"full_attention"})
    if other:
        sys.exit(f"error: {model_name} has layers of {other[0]}; prefix trees need full attention: use another model.")


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


class TreePolicy(nn.Module):
    """A causal language model whose forward pass takes prefix trees and returns log-probabilities of answer tokens.

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

    def forward(self, ids, depth, parent, end, scored, paths, temperature: float):
        """Log-probability of every answer token in nats, [B, C] fp32, 0 after an answer's end.

        ids, depth, parent, end, scored [R, T] and paths [B, C] are those of `pad_trees`. Only positions that predict an
        answer token reach the head, HEAD_CHUNK at a time, and the backward pass recomputes their logits: there never is
        a [R, T, vocabulary].
        """
        column = torch.arange(ids.shape[1], device=ids.device)
        sees = (column <= column[:, None]) & (column[:, None] < end[:, None])  # [R, T, T]: k <= q < end[k]
        # No cache: autocast would keep a bf16 copy of every weight until the pass ends, and FSDP frees weights earlier.
        with torch.autocast("cuda", torch.bfloat16, DEVICE.type == "cuda", cache_enabled=False):
            hidden = self.base.base_model(
                input_ids=ids, position_ids=depth, attention_mask=sees[:, None], use_cache=False
            ).last_hidden_state
            # index_select: on a CPU the gradient of hidden[index] is not the same twice with two threads
            hidden, targets = hidden.flatten(0, 1).index_select(0, parent[scored]), ids[scored]  # [n, H], [n]
            logps = []
            for chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
                logps.append(checkpoint(self.head, *chunk, temperature, use_reentrant=False, preserve_rng_state=False))
        logps = torch.zeros(ids.shape, device=ids.device).masked_scatter(scored, torch.cat(logps))  # [R, T]
        return logps.flatten().index_select(0, paths.flatten()).view(paths.shape).clone()  # FSDP warns of a view

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


def shards(parameters) -> list[torch.Tensor]:
    """This rank's share of every parameter, in one process all of it; the memory is the parameter's own."""
    return [p.detach().to_local() if WORLD_SIZE > 1 else p.detach() for p in parameters]


def copy_weights(parameters) -> list[torch.Tensor]:
    """This rank's share of every parameter, copied to the CPU; restore_weights puts it back."""
    return [shard.to("cpu", copy=True) for shard in shards(parameters)]


def restore_weights(parameters, copies):
    """Put the copies back in place."""
    for shard, copy in zip(shards(parameters), copies, strict=True):
        shard.copy_(copy)


@torch.no_grad()
def score_trees(policy, prompts, answers, temperature: float, args, pad_id: int) -> torch.Tensor:
    """Log-probabilities [B, C] of B answers given B prompts (lists of token ids), on the CPU, 0 after the end."""
    logps = torch.zeros(len(prompts), max(map(len, answers), default=0))
    trees = build_trees(prompts, answers, range(len(prompts)))
    for micro in micro_batches([len(tree["ids"]) for tree in trees], args.max_tokens_per_microbatch):
        micro_trees = [trees[k] for k in micro]
        indices = [i for tree in micro_trees for i in tree["indices"]]
        micro_logps = policy(*pad_trees(micro_trees, pad_id), temperature)
        logps[indices, : micro_logps.shape[1]] = micro_logps[: len(indices)].cpu()
    if WORLD_SIZE > 1 and prompts:  # each rank has filled in its own rows; NCCL cannot reduce CPU tensors
        policy.reshard()  # FSDP would keep the head whole until the next backward pass
        logps = logps.to(DEVICE)
        dist.all_reduce(logps)
    return logps.cpu()


def run_units(policy, samples, units, ref_logps, args, pad_id: int, train: bool) -> dict[str, float]:
    """Loss of `units` (of make_units), their mean or in sft that over their tokens, and the other logged means.

    samples: dicts with prompt_ids, token_ids and scores; ref_logps [len(samples)]: log p_ref of each, in nats; train:
    with the backward pass.
    """
    prompts = [sample["prompt_ids"] for sample in samples]
    answers = [sample["token_ids"] for sample in samples]
    trees = build_trees(prompts, answers, sorted({i for unit in units for i in unit}))
    tree_of = {i: k for k, tree in enumerate(trees) for i in tree["indices"]}
    tree_units = defaultdict(list)
    for unit in units:
        tree_units[tree_of[unit[0]]].append(unit)
    denominator = len(units)
    if args.strategy in ("sft", "sft_unique"):
        denominator = sum(len(answers[i]) for (i,) in units)

    sums = defaultdict(float)
    for micro in micro_batches([len(tree["ids"]) for tree in trees], args.max_tokens_per_microbatch):
        micro_trees = [trees[k] for k in micro]
        indices = [i for tree in micro_trees for i in tree["indices"]]
        row_of = {i: row for row, i in enumerate(indices)}
        micro_units = [[row_of[i] for i in unit] for k in micro for unit in tree_units[k]]
        refs = ref_logps[indices].to(DEVICE)  # [B]
        stats = {}
        with torch.set_grad_enabled(train):
            logps = policy(*pad_trees(micro_trees, pad_id), 1.0).double().sum(1)  # [B]
            if not micro_units:  # a rank without trees: every rank needs a backward pass, of a pad's 0
                losses = logps
            elif args.strategy in ("sft", "sft_unique"):
                losses = -logps
            elif args.strategy == "dpo":
                pairs = torch.tensor(micro_units, device=DEVICE)  # [P, 2]
                pair_logps = logps.index_select(0, pairs.flatten()).view(pairs.shape)
                lengths = torch.tensor([len(answers[i]) for i in indices], device=DEVICE)
                losses, stats = dpo_loss(
                    pair_logps, refs[pairs], lengths[pairs], args.beta, args.label_smoothing, args.rpo_alpha
                )
            else:
                losses = []
                scores = torch.tensor([samples[i]["scores"] for i in indices], device=DEVICE).double()
                for unit in micro_units:  # not all of one length: a rationalised question has an answer more
                    unit = torch.tensor(unit, device=DEVICE)
                    unit_logps = logps.index_select(0, unit)
                    losses.append(
                        target_loss(unit_logps, refs[unit], scores[unit], args.strategy, args.beta, args.score_lambda)
                    )
                losses = torch.stack(losses)
            loss = losses.sum() / denominator
        if train:
            loss.backward()
        sums["loss"] += loss.item()
        for name, values in stats.items():
            sums[name] += values.sum().item() / len(units)
    if WORLD_SIZE > 1 and not train:
        policy.reshard()  # FSDP would keep the head whole until the next backward pass
    shares = gather(dict(sums))
    return {name: sum(share.get(name, 0.0) for share in shares) for name in shares[0]}


# ---- Batches ---------------------------------------------------------------------------------------------------------
def build_tree(prompt: list[int], answers: list[list[int]]) -> dict:
    """A prompt and its answers as one row of tokens: a tree, in which what several sequences begin with stands once.

    Example: prompt [1, 2], answers [[3, 4], [3, 5]]

        column   0  1  2  3  4        1 - 2 - 3 - 4
        ids      1  2  3  4  5                  \\
        depth    0  1  2  3  3                    5     depth: position in the sequence
        parent   0  0  1  2  2        column of the token before
        end      5  5  5  4  5        column q sees column k if k <= q < end[k]: itself and what leads to it
        paths    [2, 3], [2, 4]       columns of each answer's tokens
    """
    ids, depth, parent, end = [], [], [], []
    paths = [[] for _ in answers]
    previous, path = [], []  # the sequence before, and the columns of its tokens
    for i in sorted(range(len(answers)), key=lambda i: answers[i]):  # so that neighbours share the most
        sequence = prompt + answers[i]
        shared = 0
        while shared < len(previous) and previous[shared] == sequence[shared]:
            shared += 1
        path = path[:shared]
        for position in range(shared, len(sequence)):
            parent.append(path[-1] if path else 0)
            path.append(len(ids))
            ids.append(sequence[position])
            depth.append(position)
            end.append(0)
        for column in path:
            end[column] = len(ids)
        paths[i] = path[len(prompt) :]
        previous = sequence
    return {"ids": ids, "depth": depth, "parent": parent, "end": end, "paths": paths, "prompt_len": len(prompt)}


def build_trees(prompts, answers, indices) -> list[dict]:
    """A tree for each prompt of `indices`; its "indices" are those that it holds."""
    groups = defaultdict(list)
    for i in indices:
        groups[tuple(prompts[i])].append(i)
    trees = []
    for prompt, group in groups.items():
        trees.append(build_tree(list(prompt), [answers[i] for i in group]) | {"indices": group})
    return trees


def pad_trees(trees: list[dict], pad_id: int) -> list[torch.Tensor]:
    """ids, depth, parent, end, scored [R, T] and paths [B, C] of R trees with B answers, on DEVICE.

    parent and paths point into ids.flatten(). Pads see only pads. Past its end, an answer's path points to
    column 0, the first prompt token, which is never scored, so it adds 0.
    """
    if not trees:  # a rank without trees runs a pad, which adds 0 to every sum and gradient
        trees = [build_tree([pad_id], [[]])]
    width = max(len(tree["ids"]) for tree in trees)
    padding = {"ids": pad_id, "depth": 0, "parent": 0, "end": width}
    columns = {}
    for name, value in padding.items():
        rows = [torch.tensor(tree[name]) for tree in trees]
        columns[name] = pad_sequence(rows, batch_first=True, padding_value=value)
    columns["parent"] += width * torch.arange(len(trees))[:, None]
    scored = columns["depth"] >= torch.tensor([tree["prompt_len"] for tree in trees])[:, None]
    paths = []
    for row, tree in enumerate(trees):
        paths += [torch.tensor(path).long() + row * width for path in tree["paths"]]
    tensors = [*columns.values(), scored, pad_sequence(paths, batch_first=True)]
    return [tensor.to(DEVICE) for tensor in tensors]


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


# ---- Graded samples --------------------------------------------------------------------------------------------------
def grade(question, prompt, output, tokenizer, extraction: str) -> dict:
    """One sample, under the names of the original's columns; an answer that did not end is wrong."""
    text = tokenizer.decode(output["tokens"], clean_up_tokenization_spaces=False)
    letter = None
    if output["finish_reason"] == "stop":
        letter = extract_letter(text, extraction)
    return {
        "indices": question["id"],
        "subjects": question["subject"],
        "correct_answers": question["answer"],
        "model_answers": letter,
        "scores": float(letter == question["answer"]),
        "prompted_questions": tokenizer.decode(prompt, clean_up_tokenization_spaces=False),
        "raw_responses": text,
        "token_ids": output["tokens"],
        "finish_reason": output["finish_reason"],
    }


def generate(llm, policy, tokenizer, encode, path, questions, n, temperature, args, state, signals, hint=False):
    """n graded samples of each question, kept in the file `path`; those that it holds already are not drawn again.

    encode(question, hint) -> token ids of the prompt. The first sample of each rollout has "logp_diff", the mean of
    |log p_trainer - log p_vllm| over the tokens of the rollout's first questions, up to four answers of each.
    """
    chunk = args.questions_per_rollout
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without one that a kill cut off
    lines = gather(lines if RANK == 0 else [])[0]
    if len(lines) < len(questions) * n:
        lines = lines[: len(lines) // (chunk * n) * chunk * n]  # whole rollouts
    with plain_error(f"{path} holds a damaged line; restore it, or choose another --run-name"):
        samples = [json.loads(line) for line in lines]
    if len(samples) == len(questions) * n:
        return samples

    if RANK == 0:
        with open(path, "ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines))  # json.dumps writes ASCII
    sync_weights(llm, policy)
    for start in range(len(samples) // n, len(questions), chunk):
        asked = [question for question in questions[start : start + chunk] for _ in range(n)]
        prompts = [encode(question, hint) for question in asked]
        seed = [args.seed, start, *path.stem.encode()]
        outputs = sample(llm, prompts[::n], n, temperature, args.max_new_tokens, seed)
        rollout = []
        for question, prompt, output in zip(asked, prompts, outputs, strict=True):
            rollout.append(grade(question, prompt, output, tokenizer, args.extraction))

        # the self-check: stale weights, another temperature or another prompt show here, before anything is trained
        if temperature:
            # up to four answers of a question, so that trees branch; and questions of every rank's engine
            checked = [i for i in range(len(asked)) if i % n < 4][: max(CHECKED, 4 * WORLD_SIZE)]
            completions = [outputs[i]["tokens"] for i in checked]
            vllm_logps = pad_sequence([torch.tensor(outputs[i]["logps"]) for i in checked], batch_first=True)
            checked_prompts = [prompts[i] for i in checked]
            logps = score_trees(policy, checked_prompts, completions, temperature, args, tokenizer.eos_token_id)
            logp_diff = (logps - vllm_logps).abs().sum().item() / sum(map(len, completions))
            rollout[0]["logp_diff"] = logp_diff
            if state["logp_limit"] is None:  # the weights are the loaded ones: in bf16 the difference is rounding
                state["logp_limit"] = 1e-4 if DEVICE.type == "cpu" else min(0.1, max(0.03, 3 * logp_diff))
            limit = state["logp_limit"] if args.max_logp_diff is None else args.max_logp_diff
            if not logp_diff <= limit:  # NaN fails too
                sys.exit(
                    f"error: trainer and vLLM differ by {logp_diff:.2g} nats a token in {path.stem}, the limit is "
                    f"{limit:.2g} (--max-logp-diff): stale weights, another temperature or another prompt?"
                )

        samples += rollout
        if RANK == 0:
            with plain_error(f"{path} cannot be written; make room, the same --run-name then goes on"):
                with open(path, "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rollout)
        print(f"{path.stem}: {len(samples) // n} of {len(questions)} questions", flush=True)
        stop = max(gather(max(signals, default=0)))
        if stop:
            print(f"signal {stop}: these samples are kept; --run-name {path.parts[-3]} goes on from there.")
            sys.exit(128 + stop)
    if DEVICE.type == "cuda":
        llm.sleep(level=2)
    return samples


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

    positive = "lora_alpha max_prompt_tokens samples_per_question max_new_tokens temperature questions_per_rollout "
    positive += "beta batch_size score_lambda max_grad_norm max_tokens_per_microbatch eval_every save_every"
    check_arguments(args, positive)
    trains = args.num_iterations > 0 and args.internal_epochs > 0
    if trains and args.strategy in ("weighted", "dpo", "dpo_listwise") and args.samples_per_question < 2:
        sys.exit(f"error: --strategy {args.strategy} compares answers: --samples-per-question must be at least 2.")
    if args.label_smoothing >= 0.5:
        sys.exit(f"error: --label-smoothing is {args.label_smoothing}; it must be below 0.5.")
    if args.rationalize > 1:
        sys.exit(f"error: --rationalize is {args.rationalize}; it is a share, at most 1.")

    if RANK > 0:  # rank 0 prints and writes
        sys.stdout, args.track = open(os.devnull, "w"), False

    # data
    tokenizer, context = load_tokenizer(args.model_name, args.system_prompt)
    check_model(args.model_name)
    check_attention(args.model_name)
    if args.ref_model_name:
        ref_tokenizer, _ = load_tokenizer(args.ref_model_name, None)
        check_model(args.ref_model_name)
        check_attention(args.ref_model_name)
        if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
            sys.exit(f"error: --ref-model-name {args.ref_model_name} has another vocabulary than {args.model_name}.")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def message(question, hint=False):
        return user_message(question, args.preamble, args.meta_prompt, hint)

    @functools.cache
    def encode_text(text):
        return encode_prompt(tokenizer, text, args.system_prompt)

    def encode(question, hint=False):  # token ids of the prompt
        return encode_text(message(question, hint))

    def select_questions(split, limit):
        questions = [dataset[i] for i in ids[split]][: limit or None]
        fitting = [question for question in questions if len(encode(question)) <= args.max_prompt_tokens]
        print(f"{split}: {len(fitting)} questions, {len(questions) - len(fitting)} over --max-prompt-tokens left out")
        if not fitting:
            sys.exit(f"error: no {split} question is left; raise --max-prompt-tokens or give a larger dataset.")
        return fitting

    dataset = load_questions(args.dataset)
    ids = split_ids(len(dataset))
    questions = select_questions("train", args.num_train_questions)
    eval_questions = select_questions(args.eval_split, args.eval_size)
    longest = max(len(encode(question, args.rationalize > 0)) for question in questions + eval_questions)
    if longest + args.max_new_tokens > context:
        sys.exit(
            f"error: a prompt of {longest} tokens and --max-new-tokens {args.max_new_tokens} are more than the model's "
            f"{context}; lower --max-new-tokens or --max-prompt-tokens."
        )
    preloaded, val_samples = [], []
    if args.preload_train:
        limit = args.max_new_tokens
        preloaded = load_samples(args.preload_train, dataset, ids["train"], questions, message, tokenizer, limit)
    if args.preload_val:
        split = ids[args.eval_split]
        val_samples = load_samples(
            args.preload_val, dataset, split, eval_questions, message, tokenizer, args.max_new_tokens
        )

    # processes and run folder
    if WORLD_SIZE > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
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
    (run_dir / "samples").mkdir(exist_ok=True)
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
        policy = TreePolicy(args.model_name, dtype if args.lora_r else torch.float32, args.lora_r, args.lora_alpha)
        reference = policy  # with the weights of another moment
        if args.ref_model_name:
            reference = TreePolicy(args.ref_model_name, dtype, lora_r=0, lora_alpha=0)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    initial = copy_weights(trainable)
    optimizer = torch.optim.AdamW(trainable, args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    # FSDP fixes gradient dtypes in its first forward pass
    score_trees(policy, [[pad_id]], [[pad_id]], 1.0, args, pad_id)

    size = 12 * sum(parameter.numel() for parameter in trainable)  # of a checkpoint: weights and moments
    saved = gather(checkpoints(run_dir / "checkpoints"))[0]
    if shutil.disk_usage(run_dir).free < size * (KEEP_CHECKPOINTS + 1 - len(saved)):
        sys.exit(f"error: a checkpoint takes {size / 1e9:.1f} GB, too much for {run_dir}; choose another --output-dir.")

    # resume: what was logged after the checkpoint is cut off and done again; samples are kept
    state = {"step": 0, "iteration": 0, "position": 0, "evaluation_due": not args.skip_first_eval, "logp_limit": None}
    state |= {"ref_logps": None, "val_ref_logps": None, "metrics_bytes": 0}
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
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: signals.append(signum))

    def log(record):
        if RANK == 0:
            with plain_error(f"{metrics_path} cannot be written; make room, --run-name {run_dir.name} then goes on"):
                with open(metrics_path, "a") as file:
                    file.write(json.dumps(record) + "\n")
        if args.track:
            wandb.log(record)

    def get_samples(name, questions, n, temperature, hint=False):
        path = run_dir / "samples" / f"{name}.jsonl"
        return generate(llm, policy, tokenizer, encode, path, questions, n, temperature, args, state, signals, hint)

    def reference_logps(samples, units):  # log p_ref [len(samples)] of those in `units`, once for each answer
        logps = torch.zeros(len(samples), dtype=torch.double)
        scored = sorted({i for unit in units for i in unit}) if args.strategy in ("dpo", "dpo_listwise") else []
        for start in range(0, len(scored), 1024):
            indices = scored[start : start + 1024]
            prompts = [samples[i]["prompt_ids"] for i in indices]
            answers = [samples[i]["token_ids"] for i in indices]
            logps[indices] = score_trees(reference, prompts, answers, 1.0, args, pad_id).double().sum(1)
        return logps.tolist()

    def run_evaluation(step):
        t0 = time.perf_counter()
        record = {"step": step}
        if args.evaluation in ("both", "accuracy"):
            figures = choice_figures(get_samples(f"val_{step}", eval_questions, 1, 0.0))
            record |= {f"eval/{key}": value for key, value in figures.items()}
        if val_units:
            val_refs = torch.tensor(state["val_ref_logps"]).double()
            figures = run_units(policy, val_samples, val_units, val_refs, args, pad_id, train=False)
            record |= {f"eval/{key}": value for key, value in figures.items()}
        log(record | {"time/eval": time.perf_counter() - t0})
        names = [name for name in ("eval/accuracy", "eval/no_answer", "eval/loss") if name in record]
        print(f"after step {step}:", *(f"{name} {record[name]:.4f}" for name in names), flush=True)

    # the validation loss is always that of the same samples
    val_units = []
    if args.evaluation in ("both", "loss"):
        if not val_samples:
            val_samples = get_samples("val_samples", eval_questions, args.samples_per_question, args.temperature)
        for row in val_samples:
            row["prompt_ids"] = encode(dataset[row["indices"]])
        val_units = make_units(val_samples, args.strategy, args.max_pairs, [args.seed, 0, 0, 1])
        if not val_units:
            print("no validation question has the samples that --strategy needs: eval/loss is not logged", flush=True)
        if state["val_ref_logps"] is None:
            state["val_ref_logps"] = reference_logps(val_samples, val_units)
    if state["evaluation_due"] and args.evaluation != "none":
        run_evaluation(state["step"])

    step = state["step"]
    for iteration in range(state["iteration"], args.num_iterations):
        start_position = state["position"]  # steps of this iteration that a resumed run has behind it
        t0 = time.perf_counter()

        # sampling: K graded samples of each question from the latest model
        samples = preloaded
        if iteration > 0 or not preloaded:
            samples = get_samples(f"train_{iteration + 1}", questions, args.samples_per_question, args.temperature)
        figures = choice_figures(samples)
        logp_diffs = [row["logp_diff"] for row in samples if "logp_diff" in row]

        # rationalisation: with the option marked; kept if it is right and does not speak of the mark
        rationalized = []
        if args.rationalize:
            solved = {row["indices"] for row in samples if row["scores"] == 1}
            failed = [question for question in questions if question["id"] not in solved]
            order = np.random.default_rng([args.seed, iteration, 0, 2]).permutation(len(failed))
            marked = [failed[i] for i in order[: round(args.rationalize * len(failed))]]
            for answer in get_samples(f"hinted_{iteration + 1}", marked, 1, args.temperature, hint=True):
                if answer["scores"] == 1 and not LEAK.search(answer["raw_responses"]):
                    rationalized.append(answer)
        samples = samples + rationalized

        # what is trained on
        for row in samples:
            row["prompt_ids"] = encode(dataset[row["indices"]])  # without a hint
        units = make_units(samples, args.strategy, args.max_pairs, [args.seed, iteration, 0, 1])
        question_ids = [samples[unit[0]]["indices"] for unit in units]
        steps_per_epoch = math.ceil(len(units) / args.batch_size)
        total_steps = args.internal_epochs * steps_per_epoch
        if start_position == 0:
            record = {"step": step, "iteration": iteration + 1, "rollout/units": len(units)}
            record["rollout/rationalized"] = len(rationalized) / len(samples)
            if logp_diffs:
                record["rollout/logp_diff"] = float(np.mean(logp_diffs))
            record |= {f"rollout/{key}": value for key, value in figures.items()}
            log(record | {"time/rollout": time.perf_counter() - t0})
            print(
                f"iteration {iteration + 1}: {len(samples)} samples, {len(units)} examples, {total_steps} steps",
                flush=True,
            )
            if args.internal_epochs == 0:
                break
            if not units and step == 0:
                sys.exit(
                    "error: no question has the samples that --strategy needs; raise --samples-per-question, or "
                    "--max-new-tokens where answers do not end (rollout/no_eos)."
                )
            if not units:  # all is learned, or nothing can be: the model is as good as it gets
                print("no question has the samples that --strategy needs: training ends here", flush=True)
                break
            if state["logp_limit"] is None:  # samples out of a file have not compared this engine with the trainer
                if RANK == 0:
                    (run_dir / "samples" / "check.jsonl").unlink(missing_ok=True)
                few = questions[: max(16, WORLD_SIZE)]
                get_samples("check", few, min(4, args.samples_per_question), args.temperature)

            # the reference's log-probabilities, then the weights that this iteration starts from
            t0 = time.perf_counter()
            latest = initial if args.reset_model else copy_weights(trainable)
            restore_weights(trainable, initial if args.reference == "initial" else latest)
            state["ref_logps"] = reference_logps(samples, units)
            if args.reference == "iteration_start":
                state["val_ref_logps"] = reference_logps(val_samples, val_units)
            restore_weights(trainable, latest)
            optimizer.state.clear()
            log({"step": step, "iteration": iteration + 1, "time/reference": time.perf_counter() - t0})
        ref_logps = torch.tensor(state["ref_logps"]).double()

        steps = range(start_position, total_steps)
        bar = tqdm(steps, initial=start_position, total=total_steps, file=sys.stdout, disable=None)
        for position in bar:
            t0 = time.perf_counter()
            lr = args.lr * lr_multiplier(position, args.warmup_steps, total_steps, args.lr_schedule)
            optimizer.param_groups[0]["lr"] = lr

            # batch: units in an order that is drawn anew in every epoch
            epoch, batch_number = divmod(position, steps_per_epoch)
            rng = np.random.default_rng([args.seed, iteration, epoch])
            order = rng.permutation(len(units))
            if args.shuffle == "questions" and args.strategy == "dpo":
                order = np.argsort(rng.permutation(len(dataset))[question_ids], kind="stable")
            batch = [units[i] for i in order[batch_number * args.batch_size :][: args.batch_size]]

            # update
            figures = run_units(policy, samples, batch, ref_logps, args, pad_id, train=True)
            grad_norm = whole(nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)).item()
            if not math.isfinite(grad_norm):
                sys.exit(f"error: the gradient norm of step {step + 1} is {grad_norm}; lower --lr.")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds = time.perf_counter() - t0

            # log
            record = {"step": step, "iteration": iteration + 1, "losses/loss": figures.pop("loss")}
            record |= {f"dpo/{key}": value for key, value in figures.items()}
            tokens = sum(len(samples[i]["token_ids"]) for unit in batch for i in unit)
            record |= {
                "losses/grad_norm": grad_norm,
                "charts/learning_rate": lr,
                "charts/tokens_per_second": tokens / seconds,
                "time/update": seconds,
            }
            log(record)
            names = ("losses/loss", "dpo/margin", "dpo/ranking_accuracy")
            line = "  ".join(f"{name.split('/')[1]} {record[name]:.3f}" for name in names if name in record)
            if bar.disable:
                print(f"step {step}  {line}  seconds {seconds:.2f}", flush=True)
            else:
                bar.set_postfix_str(line)

            # checkpoint, then evaluation: a signal that comes meanwhile ends the run there
            stop = max(gather(max(signals, default=0)))
            last = position + 1 == total_steps
            due = args.evaluation != "none" and (last or step % args.eval_every == 0)
            if last or stop or due or step % args.save_every == 0:
                state |= {"step": step, "iteration": iteration + last, "position": 0 if last else position + 1}
                state["evaluation_due"] = due
                state["metrics_bytes"] = metrics_path.stat().st_size if RANK == 0 else 0
                save_checkpoint(run_dir / "checkpoints", policy, optimizer, state)
            if stop:
                print(f"signal {stop}: stopped after step {step}; --run-name {run_dir.name} goes on from there.")
                sys.exit(128 + stop)
            if due:
                run_evaluation(step)

    # the end
    if trains:
        save_final(run_dir / "final", policy, tokenizer, dtype)
        print(f"model: {run_dir / 'final'}")
    gather(None)  # no rank ends before: the others' end would stop rank 0 while it writes
    print(f"metrics: {metrics_path}   samples: {run_dir / 'samples'}")

"""The older helper, for scripts that have not followed eval_gsm8k.py and grpo_upskill.py; it goes when they have.

Data, prompts, answer extraction and grading (GSM8K, MMLU), pass@k.

    python first_edition.py --model-name Qwen/Qwen2.5-7B-Instruct --num-samples 5   # five i.i.d. samples a question
    python first_edition.py --model-name runs/x/final --num-skills 5                # one sample of each skill z = 1..5
    python first_edition.py --compare a/completions.jsonl b/completions.jsonl   # paired; or two samples of star_dpo.py

GSM8K numbers depend on prompt and extraction as much as on the model, so each completion is graded three ways: by
`--answer-mode`, and by the strict-match and the flexible-extract rule of lm-evaluation-harness (task gsm8k, version 3).
Skills: the arm "distinct" asks each z once a round; the arm "iid" draws z uniformly for each of as many completions.
Their difference in pass@N is what *distinct* z adds to sampling from the same mixture.
Left out: LoRA adapter folders (evaluate the merged `final/`), answers that are not numbers.
"""

import ast
import csv
import json
import math
import operator
import os
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

ANSWER_MODES = ("strict", "flexible", "boxed", "xml", "auto")

# Every pattern in this file takes linear time on any input: no unbounded repeat that a later miss could undo.
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,8},[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)\]])-)?[$€£¥]?{DIGITS}(?:[eE][-+]?[0-9]+)?(?:/{DIGITS})?")  # in running text
WHOLE_NUMBER = re.compile(rf"[$€£¥]?([-+]?)[$€£¥]?({DIGITS}(?:[eE][-+]?[0-9]{{1,2}})?)(?:/({DIGITS}))?\.?%?\.?")
ANSWER_CUE = re.compile(r"\banswer\b[\s*_]{0,9}(?:is|are|was|:|：)", re.IGNORECASE)


@dataclass
class Args:
    model_name: str = ""  # Hugging Face id or local folder of the model (required unless --compare)
    dataset: str = "openai/gsm8k"  # hub id, or a local .jsonl file with GSM8K's columns question and answer
    dataset_config: str = "main"  # configuration of a hub dataset
    split: str = "test"  # split of a hub dataset
    limit: int = 0  # evaluate the first so many problems, in file order (0 = all)
    num_samples: int = 1  # completions per question; with --num-skills, rounds over all skills
    num_skills: int = 0  # N: ask each question with each skill z = 1..N (0 = no prefix)
    system_prompt: str = "You are a helpful math assistant that solves problems step by step."  # empty: none
    num_shots: int = 0  # worked examples before the question: the first problems of --shots-dataset
    shots_dataset: str = ""  # where they come from (empty: the hub dataset's train split)
    skill_prefix: str = "Strategy {z} | "  # what stands before the question when --num-skills > 0
    temperature: float = 0.7  # sampling temperature (0 = greedy)
    top_p: float = 1.0  # nucleus sampling mass (1 = off: the samples follow the policy itself)
    max_new_tokens: int = 512  # completions are cut off after so many tokens and counted as truncated
    answer_mode: Literal["strict", "flexible", "boxed", "xml", "auto"] = "auto"  # see `extract_answer`
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, else float32
    gpu_memory_utilization: float = 0.0  # vLLM's share of memory (0: 0.9 on a GPU, without one 0.1 of the main memory)
    seed: int = 0  # seed of the sampling and of the i.i.d. skills
    output_dir: str = ""  # folder of the results, never overwritten (empty: runs/eval-<model>-<seed>)
    compare: tuple[str, str] | None = None  # two completions.jsonl: print their paired differences
    trust_remote_code: bool = False  # run the Python code that a model repository brings along


# --- numbers and answers ---------------------------------------------------------------------------------------------
def to_number(text: str) -> Fraction | None:
    """Exact value of a text that is one number and nothing else, or None.

    Read: "1,234", "$18.00", "18.", "-3", "−3", "-$5", "3/4", "1e3"; "50%" is 50, as in GSM8K's gold answers. Refused:
    words, mixed numbers, division by zero, digits other than 0-9, and, so that nothing takes long, exponents of more
    than two digits and texts of more than 100 characters.
    """
    text = text.strip().replace("−", "-")
    text = re.sub(r"(?<![0-9.])\s+|\s+(?=[/%])", "", text) if len(text) <= 100 else ""
    match = WHOLE_NUMBER.fullmatch(text)
    if not match:
        return None
    sign, top, bottom = match.groups()
    bottom = Fraction((bottom or "1").replace(",", ""))
    return Fraction(sign + top.replace(",", "")) / bottom if bottom else None


def plain(text: str) -> str:
    """The text of a number without commas, currency, percent and plus signs, spaces, and a full stop at the end."""
    return re.sub(r"[,$€£¥%+\s]", "", text.replace("−", "-")).removesuffix(".")


def parse_gold(answer: str) -> str | None:
    """Gold answer of a dataset row: the number after the last "####", or the whole text if it is a bare number.

    "#### 18 dollars" is 18; None if there is no number or more than one, because a gold answer must not be guessed.
    """
    _, mark, text = answer.rpartition("####")
    found = NUMBER.findall(clean_latex(text)) if mark else []
    if to_number(text) is None:
        text = found[0] if len(found) == 1 and to_number(found[0]) is not None else None
    return plain(text) if text else None


def clean_latex(text: str) -> str:
    """LaTeX taken off as far as numbers need it: \\frac{3}{4} -> 3/4, 1{,}234 -> 1,234, \\$5 -> $5, \\text{x} -> x."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\\\", " ").replace("\\$", "$")
    text = re.sub(r"\\[dtc]?frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\[,;:!]", "", text)  # thin spaces group digits: 1\,234
    return re.sub(r"\\[A-Za-z]+|[\\{}]", " ", text)


def find_number(text: str, last: bool) -> str | None:
    """The number that a piece of text gives as its result, as plain text, or None.

    In the last (or else first) sentence with a number: the one right of its last "=", else its last (first) number.
    """
    sentences = re.split(r"\n|(?<=[.!?;])\s", clean_latex(text))
    for sentence in reversed(sentences) if last else sentences:
        numbers = NUMBER.findall(sentence)
        if numbers:
            result = NUMBER.search(sentence, sentence.rfind("=") + 1) if "=" in sentence else None
            number = result.group() if result else numbers[-1 if last else 0]
            return plain(number) if to_number(number) is not None else None
    return None


def last_boxed(text: str) -> str:
    """Content of the last \\boxed{...} that is closed, with balanced braces, or ""."""
    opened, content = [], slice(0)
    for match in re.finditer(r"\\boxed\s*\{|(?<!\\)[{}]", text):
        if match.group() != "}":
            opened.append((match.group() != "{", match.end()))
        elif opened:
            box, start = opened.pop()
            content = slice(start, match.start()) if box else content
    return text[content]


def extract_answer(text: str, mode: str) -> str | None:
    """The number that a completion gives as its answer, as plain text ("1234.5"), or None; never raises on a text.

    strict    lm-evaluation-harness gsm8k "strict-match": the first "#### <number>"
    flexible  its "flexible-extract": the last thing that looks like a number ("18.." stays "18.", and is wrong there)
    boxed     the number in the last \\boxed{...}
    xml       the number in the last <answer>...</answer>
    auto      the first of these that holds a number: last <answer>, last \\boxed, after the last "####", after the last
              "answer is" or "answer:", the last sentence with a number (right of its last "=", else its last number)
    ValueError: unknown mode.
    """
    if mode not in ANSWER_MODES:
        raise ValueError(f"answer mode {mode!r} is unknown; choose one of {', '.join(ANSWER_MODES)}.")
    if mode in ("strict", "flexible"):
        found = re.findall(r"#### (-?[0-9.,]+)" if mode == "strict" else r"-?[$0-9.,]{2,}|-?[0-9]+", text)
        answer = plain(found[0 if mode == "strict" else -1]) if found else ""
        return answer if re.search("[0-9]", answer) else None  # the harness keeps "...", which is never right
    candidates = []  # (text, take its last number)
    if mode in ("xml", "auto"):
        inside = re.findall(r"(?is)<answer>((?:(?!<answer>).)*?)</answer>", text)
        candidates += [(content, True) for content in inside[-1:]]
    if mode in ("boxed", "auto"):
        candidates += [(last_boxed(text), True)]
    if mode == "auto":
        tails = [text[text.rfind("####") :]] if "####" in text else []
        tails += [text[match.end() :] for match in list(ANSWER_CUE.finditer(text))[-1:]]
        candidates += [(tail.lstrip("# \t\r\n*_:`").split("\n")[0], False) for tail in tails] + [(text, True)]
    return next((number for number in (find_number(*candidate) for candidate in candidates) if number), None)


def with_calculation(text: str) -> str | None:
    """`text` up to its first "<<48/2=" that its value does not follow, and "24>>"; None: all are as they should be.

    Numbers and + - * / ( ) are read by Python's parser and computed as fractions: nothing is ever evaluated.
    """
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
                 ast.UAdd: operator.pos, ast.USub: operator.neg}

    def value(node):
        parts = [getattr(node, name) for name in ("left", "right", "operand") if hasattr(node, name)]
        return operators[type(node.op)](*map(value, parts)) if parts else Fraction(ast.get_source_segment(line, node))
    for match in re.finditer(r"<<([0-9*+\-/.(), ]{1,100})=", text):
        line = match[1].replace(",", "").strip()
        try:
            result = value(ast.parse(line, mode="eval").body)
        except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError):
            continue
        written = f"{result if result.denominator == 1 else f'{float(result):.10g}'}>>"
        if not text.startswith(written, match.end()):
            return text[: match.end()] + written
    return None


def is_correct(answer: str | None, gold: str) -> bool:
    """True if both are numbers and equal as numbers: "72" and "72.00" are; None never is."""
    value = to_number(answer) if answer else None
    return value is not None and value == to_number(gold)


# --- metrics ---------------------------------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k of n i.i.d. samples, c of them correct, hold a correct one (Chen et al. 2021, eq. 1).

    1 - C(n-c, k) / C(n, k). ValueError unless 0 <= c <= n and 1 <= k <= n: n samples say nothing on more than n tries.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={c}, k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_distinct(counts: list[int], n: int, k: int) -> float:
    """Unbiased probability that k distinct skills drawn uniformly out of N, one sample of each, hold a correct one.

    counts[z] of n samples of skill z were correct. 1 - e_k(q) / C(N, k) with q_z = 1 - counts[z] / n and e_k the
    elementary symmetric polynomial: exactly unbiased, as e_k is linear in each q_z and the skills are sampled
    independently. ValueError unless 1 <= k <= N, n >= 1 and 0 <= counts[z] <= n.
    """
    if not (1 <= k <= len(counts) and n >= 1 and all(0 <= c <= n for c in counts)):
        raise ValueError(f"pass@k needs 1 <= k <= {len(counts)} skills and counts in 0..n, got k={k}, n={n}, {counts}.")
    e = [1.0] + [0.0] * k
    for c in counts:
        for j in range(k, 0, -1):
            e[j] += (1 - c / n) * e[j - 1]
    return 1.0 - e[k] / math.comb(len(counts), k)


def plurality(answers: list[str | None], gold: str) -> bool:
    """True if the unique most frequent answer, compared as a number, is correct; a tie is wrong, None is no answer."""
    values = Counter(to_number(answer or "") for answer in answers)
    del values[None]
    top = values.most_common(2)
    return bool(top) and top[0][0] == to_number(gold) and (len(top) == 1 or top[0][1] > top[1][1])


def consensus(answers: list[str | None], gold: str) -> bool:
    """True if more than half of all samples, those without an answer included, are correct."""
    return 2 * sum(is_correct(answer, gold) for answer in answers) > len(answers)


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of successes / n (z = 1.96: 95 %). ValueError unless n >= 1 and 0 <= successes <= n."""
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"the Wilson interval needs n >= 1 and 0 <= successes <= n, got {successes} of {n}.")
    share, scale = successes / n, 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (share + z * z / (2 * n) - half) / scale, (share + z * z / (2 * n) + half) / scale
    return max(0.0, low), min(1.0, high)


def paired_bootstrap(a, b, resamples: int = 10000, seed: int = 0) -> dict[str, float]:
    """mean(a) - mean(b) over the same questions, its 95 % percentile bootstrap interval, and a two-sided p.

    a, b: [questions] scores. Whole questions are resampled, so a question's own samples stay together. p is never 0: no
    finite number of resamples could show that. ValueError: empty, or of unequal length.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired comparison needs the same questions on both sides, got {len(a)} and {len(b)}.")
    delta, rng = np.asarray(a, dtype=float) - np.asarray(b, dtype=float), np.random.default_rng(seed)
    means = np.array([delta[rng.integers(len(delta), size=len(delta))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975))
    p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (resamples + 1))
    return {"difference": float(delta.mean()), "low": float(low), "high": float(high), "p": float(p)}


def question_scores(rows: list[dict]) -> dict[str, np.ndarray]:
    """{metric: [questions]} of the rows of one arm, questions in the order of their ids.

    pass@k for k = 1..N distinct skills (arm "distinct") or k = 1..n samples (arm "iid"), plurality@ and consensus@ all.
    ValueError: questions with different numbers of completions.
    """
    table = {}  # question -> skill (None throughout the arm "iid") -> its rows in order
    for row in rows:
        table.setdefault(row["id"], {}).setdefault(row["z"] if row["arm"] == "distinct" else None, []).append(row)
    table = [table[i] for i in sorted(table)]
    skills, n = set(table[0]), len(next(iter(table[0].values())))
    if any(set(question) != skills or any(len(group) != n for group in question.values()) for question in table):
        raise ValueError("every question needs the same number of completions (of every skill).")
    counts = [[sum(row["correct"] for row in group) for group in question.values()] for question in table]
    if skills == {None}:
        ballots = [[question[None]] for question in table]  # [questions][rounds][voters]
        scores = {f"pass@{k}": [pass_at_k(n, c, k) for (c,) in counts] for k in range(1, n + 1)}
    else:
        ballots = [list(zip(*question.values(), strict=True)) for question in table]
        scores = {f"pass@{k}": [pass_at_k_distinct(c, n, k) for c in counts] for k in range(1, len(skills) + 1)}
    for vote in (plurality, consensus) if len(ballots[0][0]) > 1 else ():
        shares = [np.mean([vote([row["answer"] for row in b], b[0]["gold"]) for b in question]) for question in ballots]
        scores[f"{vote.__name__}@{len(ballots[0][0])}"] = shares
    return {name: np.array(values) for name, values in scores.items()}


# --- data and prompt -------------------------------------------------------------------------------------------------
def fail(message: str):
    """End the program the way every user error ends here: one sentence on stderr, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def check_arguments(args, positive):
    """End the program unless numbers in the dataclass `args` are at least 0, those in `positive` over 0, a group 2."""
    for name, value in asdict(args).items():
        if isinstance(value, (int, float)) and not (value > 0 if name in positive else value >= 0):
            fail(f"--{name.replace('_', '-')} is {value}; it must be {'over' if name in positive else 'at least'} 0.")
    if getattr(args, "group_size", 2) < 2:
        fail(f"--group-size {args.group_size} must be at least 2: a completion is compared with its group.")


def read_rows(path: str) -> list[tuple[str, dict]]:
    """[(file and line, row)] of a .csv, with its header's names, or a .jsonl; an unreadable line ends the program."""
    if not os.path.isfile(path):
        fail(f"dataset file {path} does not exist; give a .jsonl or .csv file or a Hugging Face dataset id.")
    rows, number = [], 0
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if path.endswith(".csv"):
                reader = csv.DictReader(file, strict=True)
                return [(f"{path}, line {(number := reader.line_num)}", row) for row in reader]
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((f"{path}, line {number}", json.loads(line)))
        except (csv.Error, UnicodeDecodeError) as error:
            fail(f"{path} is no UTF-8 text or no CSV behind line {number} ({error}); write it anew, fields quoted.")
        except ValueError as error:
            fail(f"{path}, line {number} is not valid JSON ({error}); write one JSON object per line.")
    return rows


def open_run(args, script: str) -> str:
    """Folder of the run, args.output_dir/args.run_name (empty: script, model, seed, time), which may not exist yet.

    The same name goes on where it stopped, with the same arguments or not at all: others than those of `free` end
    the program, as does a folder that holds no run; for a run that is complete the exit code is 0.
    """
    stem, model = os.path.splitext(os.path.basename(script))[0], os.path.basename(os.path.abspath(args.model_name))
    name = args.run_name or f"{stem}__{model}__{args.seed}__{int(time.time())}"
    folder = os.path.join(args.output_dir, name)
    if os.path.exists(os.path.join(folder, "args.json")):
        with open(os.path.join(folder, "args.json"), encoding="utf-8") as file:
            before = json.load(file)
        now = json.loads(json.dumps(asdict(args)))  # tuples become lists
        free = "run_name output_dir track save_every keep_last max_tokens_per_microbatch head_chunk".split()
        free += "gradient_checkpointing gpu_memory_utilization vllm_sleep".split()
        changed = [name for name in now if name not in free and before.get(name) != now[name]]
        changed = [f"--{n.replace('_', '-')} was {before.get(n)!r} and is {now[n]!r}" for n in changed]
        if changed:
            fail(f"{folder} was started with other arguments: {', '.join(changed)}; give those or another --run-name.")
    elif os.path.isdir(folder) and os.listdir(folder) and not os.path.isdir(os.path.join(folder, "final")):
        fail(f"{folder} exists and holds no run; choose another --run-name.")
    if os.path.isdir(os.path.join(folder, "final")):
        print(f"{folder} is complete, its model is in {folder}/final; another --run-name starts a new run.")
        raise SystemExit(0)
    return folder


def start_run(folder: str, args):
    """Make the run's folder, with args.json whole or not at all; nothing is changed where that stands already."""
    path = os.path.join(folder, "args.json")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(asdict(args), file, indent=2)
        os.rename(path + ".tmp", path)


def load_problems(dataset: str, config: str, split: str) -> list[dict]:
    """Load [{"question", "answer", "gold"}, ...] from a local .jsonl or .csv or a hub dataset with GSM8K's columns.

    A row needs `question` and `answer`; gold is the number after the last "####" of `answer`, or all of it if it is a
    bare number. `config` and `split` are for hub datasets only. A row that cannot be used ends the program, naming
    file and line (exit code 2): a dataset is never shortened silently.
    """
    if dataset.endswith((".jsonl", ".json", ".csv")) or os.path.exists(dataset):
        rows = read_rows(dataset)
    else:
        from datasets import load_dataset
        try:
            table = load_dataset(dataset, config or None, split=split)
        except Exception as error:  # hub, network and cache errors have no common base class
            fail(f"dataset {dataset} ({config}, {split}) did not load: {type(error).__name__}: {str(error)[:300]}")
        rows = [(f"{dataset}, {split} row {i}", row) for i, row in enumerate(table)]
    problems = []
    for where, row in rows:
        for column in ("question", "answer"):
            if not isinstance(row, dict) or not str(row.get(column) or "").strip():
                fail(f"{where} has no {column!r}; every row needs a non-empty 'question' and 'answer'.")
        gold = parse_gold(str(row["answer"]))
        if gold is None:
            fail(f"{where}: 'answer' ends in {str(row['answer'])[-40:]!r}; it must end in '#### <number>'.")
        problems.append({"question": str(row["question"]).strip(), "answer": str(row["answer"]).strip(), "gold": gold})
    if not problems:
        fail(f"dataset {dataset} holds no problems; give a file with at least one JSON object per line.")
    return problems


def load_splits(args, least: int) -> tuple[list[dict], list[dict]]:
    """Training and evaluation problems as args.dataset, dataset_config, eval_dataset and eval_size say.

    A hub dataset's splits train and test; a local file without an eval_dataset gives up its last tenth and one row.
    Fewer than `least` training problems, what a step takes, end the program.
    """
    problems = load_problems(args.dataset, args.dataset_config, "train")
    if args.eval_dataset or not os.path.exists(args.dataset):
        eval_problems = load_problems(args.eval_dataset or args.dataset, args.dataset_config, "test")
    else:
        cut = len(problems) - len(problems) // 10 - 1
        problems, eval_problems = problems[:cut], problems[cut:]
    if len(problems) < least:
        fail(f"{args.dataset} leaves {len(problems)} training problems, fewer than the {least} of a step; add rows.")
    return problems, eval_problems[: args.eval_size or None]


def worked_examples(problems: list[dict], system_prompt: str) -> list[tuple[str, str]]:
    """(question, solution) of each, without calculator marks, in tags if the system prompt asks for <answer>."""
    tags = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>"
    layout = tags if "<answer>" in system_prompt else "{}\n#### {}"
    solutions = [re.sub("<<.*?>>", "", problem["answer"].rpartition("####")[0]).strip() for problem in problems]
    return [(p["question"], layout.format(text, p["gold"])) for p, text in zip(problems, solutions, strict=True)]


def load_tokenizer(model_name: str, system_prompt: str | None, trust_remote_code: bool = False):
    """The tokenizer of a model, and the longest sequence in tokens that the model takes (10^9 if it says nothing).

    No such model, no EOS token, or, unless system_prompt is None (no chat), no chat template or one that refuses a
    system message end the program (exit code 2).
    """
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
        _ = system_prompt is None or encode_prompt(tokenizer, "?", system_prompt)
    except Exception as error:  # hub, file, parser and template errors have no common base class
        reason, kind = " ".join(str(error).split())[:200], "model" if system_prompt is None else "chat model"
        fail(f"{model_name} cannot be used; give the hub id or the folder of a {kind} ({reason}).")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {model_name} has no EOS token, so that no completion could end; give it one.")
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def check_lengths(problems: list[dict], encode, max_new_tokens: int, context: int) -> int:
    """Tokens of the longest prompt, encode(question), and max_new_tokens; over `context` they end the program."""
    longest = max((problem["question"] for problem in problems), key=lambda question: len(encode(question)))
    length = len(encode(longest)) + max_new_tokens
    if length > context:
        fail(f"the prompt of {longest[:60]!r}... and {max_new_tokens} tokens after it make {length}, the model takes "
             f"only {context}; lower --max-new-tokens or remove the row.")  # fmt: skip
    return length


def encode_prompt(tokenizer, question: str, system_prompt: str, prefix: str = "", shots=()) -> list[int]:
    """Token ids of the chat-templated prompt with the generation header on; `prefix` goes before the question.

    shots: worked examples [(question, answer)], turns of the chat before it.

    The one place where a prompt becomes ids: rollout, scoring and evaluation all use these ids, so no text is ever
    tokenised twice and no second BOS can slip in. An empty system prompt means no system message.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for asked, answered in shots:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": prefix + question})
    return tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)


# --- multiple choice (MMLU), for star_dpo.py -------------------------------------------------------------------------
LANGUAGES = "AR-XY BN-BD DE-DE ES-LA FR-FR HI-IN ID-ID IT-IT JA-JP KO-KR PT-BR SW-KE YO-NG ZH-CN".split()
CATEGORIES = {  # Hendrycks et al. 2021; a subject of none of these is "other"
    "stem": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy"}
LABELS = (  # "Answer" in MMMLU's languages, in simple-evals' order; _ stands for optional white space
    "Answer_:|উত্তর_:|उत्तर_:|উত্তরঃ|Antwort_:|답변_:|정답_:|답_:|答案_：|答案_:|答_：|答_:|答复_：|答曰_：|"
    "الإجابة:|الجواب:|إجابة:|الإجابة النهائية:|الإجابة الصحيحة:|الإجابة الصحيحة هي:|الإجابة هي:|الجواب النهائي:|"
    "Respuesta_:|Risposta_:|答え_:|答え_：|回答_:|回答_：|解答_:|Jawaban_:|Réponse_:|Resposta_:|Jibu_:|"
    "Idahun_:|Ìdáhùn_:|Idáhùn_:|Àmọ̀nà_:|Àdáhùn_:|Ànúgọ_:|Àṣàyàn_:")
LETTERS = dict(zip("أبجدঅবডঢＡＢＣＤ", "ABCDABCDABCD", strict=True))
MARKUP = r"** $\boxed{ }$ \$ $\text{ $ \mathrm{ \{ \text \( \mathbf{ { \boxed".split()  # taken off in this order
ROBUST = re.compile(  # label, colon, letter; a small letter only in brackets or where the line ends
    r"(?i:{})\s{{0,9}}(?:是|为)?[:ঃ][ \t]{{0,9}}[(\[`*\"'“]{{0,3}}"
    r"([A-D{}]|[a-d](?=[)\]`*\"'”]|[.,]?[ \t]{{0,9}}(?:\n|<|$)))"
    r"(?!['’]?(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3])\w|[\u0981-\u09e3])".format(
    "|".join(label.rstrip("_:ঃ") for label in unicodedata.normalize("NFKC", LABELS).split("|")), "".join(LETTERS)))


def load_questions(dataset: str) -> list[dict]:
    """[{"id", "question", "choices" (4), "answer" (A to D), "subject"}]; id: row number, alike in all languages.

    mmlu is cais/mmlu, mmlu_<language> is openai/MMMLU. Local files have either layout: question, choices, answer (0 to
    3, or a letter), subject; or Question, A, B, C, D, Answer, Subject. A row that cannot be used ends the program.
    """
    if dataset == "mmlu" or dataset.removeprefix("mmlu_") in LANGUAGES:
        from datasets import load_dataset
        hub = ("cais/mmlu", "all") if dataset == "mmlu" else ("openai/MMMLU", dataset[5:].replace("-", "_"))
        try:
            rows = [(f"{dataset}, row {i}", row) for i, row in enumerate(load_dataset(*hub, split="test"))]
        except Exception as error:  # hub, network and cache errors have no common base class
            fail(f"dataset {dataset} ({'/'.join(hub)}) did not load: {type(error).__name__}: {str(error)[:300]}")
    elif not os.path.exists(dataset):
        fail(f"there is no {dataset}; give a .jsonl or .csv file, mmlu, or mmlu_ and one of {', '.join(LANGUAGES)}.")
    else:
        rows = read_rows(dataset)
    questions = []
    for where, row in rows:
        try:
            row = {str(key).strip().lower(): value for key, value in row.items()}
            row |= {x: "None" for x in "abcd" if rows[0][0][:4] == "mmlu" and row.get(x, "") is None}  # read as null
            choices = row["choices"] if "choices" in row else [row[letter] for letter in "abcd"]
            first, second, third, fourth = json.loads(choices) if isinstance(choices, str) else choices
            answer = str(row["answer"]).strip().upper()
            answer = "ABCD"[int(answer)] if answer in list("0123") else answer
            question, choices = str(row["question"] or ""), [first, second, third, fourth]
            if not question.strip() or None in choices or answer not in list("ABCD"):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            fail(f"{where} needs 'question', four 'choices' (or A, B, C, D) and 'answer' (0 to 3 or A to D).")
        questions.append({"id": len(questions), "question": question, "choices": list(map(str, choices)),
                          "answer": answer, "subject": str(row.get("subject") or "none")})
    if len(questions) < 10:
        fail(f"{dataset} holds {len(questions)} questions; a split into training, validation and test needs 10.")
    return questions


def split_ids(n: int) -> dict[str, list[int]]:
    """80/10/10: the original's fixed split of row numbers 0..n-1, so no question crosses it in another language."""
    def cut(ids, share):
        order, size = np.random.default_rng(0).permutation(len(ids)), math.ceil(share * len(ids))
        return ids[order[size : size + int((1.0 - share) * len(ids))]], ids[order[:size]]
    train, rest = cut(np.arange(n), 0.2)
    val, test = cut(rest, 0.5)
    return {"train": train.tolist(), "val": val.tolist(), "test": test.tolist()}


def user_message(row: dict, preamble: str, meta_prompt: str, hint: bool = False) -> str:
    """Preamble and meta prompt, question, and lines "A) ..."; hint: " (CORRECT)" behind the right option (STaR)."""
    marked = {row["answer"]: " (CORRECT)"} if hint else {}
    options = [f"{x}) {choice}{marked.get(x, '')}" for x, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n\n".join(filter(None, [f"{preamble} {meta_prompt}".strip(), row["question"], "\n".join(options)]))


def extract_letter(text: str, mode: str) -> str | None:
    """The letter behind "Answer:" in any of MMMLU's languages, or None.

    simple_evals: its labels tried in order, the first match of the first that matches; a letter keeps its case, and one
    that begins a word counts ("Answer: Cannot say" is C). robust: the last match of any label, "(B)" is allowed, a
    letter that goes on as a word is not.
    """
    if mode == "robust":
        text = re.sub(r"\\(?:text|math)(?:bf|it|rm)?\{", "", text)
    for junk in MARKUP:
        text = text.replace(junk, "")
    if mode == "robust":
        found = ROBUST.findall(re.sub("[\u200b-\u200d\ufeff]", "", unicodedata.normalize("NFKC", text)))
        return LETTERS.get(found[-1], found[-1].upper()) if found else None
    for label in LABELS.replace("_", r"\s*").split("|"):
        if match := re.search(rf"(?i){label}[ \t]*([A-D]|[أ-د]|[অবডঢＡＢＣＤ])", text):
            return LETTERS.get(match[1], match[1])
    return None


def choice_figures(rows: list[dict]) -> dict[str, float]:
    """Shares over graded answers: accuracy, its 95 % Wilson interval, by category and subject; and how answers fail.

    no_eos: never ended; no_answer: no letter found; repetitive: over half of its 8-token windows stood in it before.
    Of questions with several samples: solved: any is right; mixed: some are right and some are wrong.
    """
    figures, questions = defaultdict(list), defaultdict(list)
    for row in rows:
        tokens, subject = row["token_ids"], row["subjects"]
        category = next((name for name, subjects in CATEGORIES.items() if subject in subjects.split()), "other")
        for name in ("accuracy", f"category_{category}", f"subject_{subject}"):
            figures[name].append(row["scores"])
        windows = list(zip(*(tokens[i:] for i in range(8)), strict=False))
        figures["no_eos"].append(row["finish_reason"] != "stop")
        figures["no_answer"].append(row["model_answers"] is None)
        figures["repetitive"].append(len(set(windows)) < len(windows) / 2)
        figures["length"].append(len(tokens))
        questions[row["indices"]].append(row["scores"])
    if len(questions) < len(rows):
        figures["solved"] = [max(scores) for scores in questions.values()]
        figures["mixed"] = [0 < sum(scores) < len(scores) for scores in questions.values()]
    low, high = wilson_interval(sum(figures["accuracy"]), len(rows))
    return {name: float(np.mean(x)) for name, x in figures.items()} | {"accuracy_low": low, "accuracy_high": high}


# --- sampling --------------------------------------------------------------------------------------------------------
def evaluate(llm, tokenizer, problems, encode, *, num_samples=1, num_skills=0, iid=True, temperature=1.0, top_p=1.0,
             max_new_tokens=512, answer_mode="auto", seed=0) -> tuple[dict, list[dict]]:  # fmt: skip
    """Sample completions with a live vllm.LLM, grade them, and return (figures, rows).

    problems: [{"question", "gold"}]; encode(question, z) -> prompt token ids, z in 1..N, or None = no skill prefix.
    num_skills = 0: num_samples completions a question (arm "iid"). num_skills = N: num_samples rounds of each z = 1..N
    (arm "distinct") and, if `iid`, num_samples * N completions with z drawn uniformly at random (arm "iid").

    figures: {name: float}, shares of 1 but for length. Of the main arm ("distinct" if there are skills): pass@k,
    plurality@N, consensus@N; pass@1_low, pass@1_high (95 % Wilson, n = questions, on the mean accuracy per question:
    too wide where a question has several samples); pass@1_strict, pass@1_flexible (as the harness grades: as strings);
    truncated; no_answer; length (mean tokens, EOS included); skill_{z}_accuracy; best_skill_accuracy (chosen on these
    very questions, so optimistic). Of the arm "iid" beside skills: iid_pass@k, k >= 2.
    rows: a dict a completion, question by question. Every random stream is left as it was found, so that training does
    not notice. ValueError: no problems, num_samples < 1, or a prompt that leaves no room for max_new_tokens.
    """
    import torch
    from vllm import SamplingParams
    if not problems or num_samples < 1:
        raise ValueError("there is nothing to evaluate: give at least one problem and num_samples >= 1.")
    rng, rows = np.random.default_rng(seed), []
    draws = rng.integers(1, max(num_skills, 1) + 1, size=(len(problems), num_samples * num_skills if iid else 0))
    for i, problem in enumerate(problems):
        prompts = {z: encode(problem["question"], z) for z in range(1, num_skills + 1) or [None]}
        plan = [("distinct" if num_skills else "iid", z) for _ in range(num_samples) for z in prompts]
        for arm, z in plan + [("iid", int(z)) for z in draws[i]]:
            rows.append({"id": i, "arm": arm, "z": z, "question": problem["question"], "prompt_token_ids": prompts[z]})
    longest, room = max(len(row["prompt_token_ids"]) for row in rows), llm.model_config.max_model_len
    if longest + max_new_tokens > room:  # vLLM would cut such completions short without a word
        raise ValueError(f"the longest prompt ({longest} tokens) + max_new_tokens ({max_new_tokens}) exceed {room}.")

    # The engine draws from the global streams: torch's on a CPU; on a GPU, where each request has a seed, from numpy's
    # (requests with a seed of ours raise on a CPU). A filled prefix cache would change the batches, hence the draws.
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, detokenize=False)
    llm.reset_prefix_cache()
    streams = [(np.random.get_state, np.random.set_state), (torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_available():
        streams.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    saved = [(restore, state()) for state, restore in streams]
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        requests = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
        outputs = llm.generate(requests, params, use_tqdm=sys.stdout.isatty())
    finally:
        for restore, state in saved:
            restore(state)

    for row, output in zip(rows, outputs, strict=True):
        sample, gold = output.outputs[0], problems[row["id"]]["gold"]
        answer = extract_answer(text := tokenizer.decode(sample.token_ids, skip_special_tokens=True), answer_mode)
        row.update(token_ids=list(sample.token_ids), completion=text, finish_reason=sample.finish_reason, gold=gold)
        row.update(answer=answer, correct=is_correct(answer, gold))
        row.update({f"correct_{mode}": extract_answer(text, mode) == gold for mode in ("strict", "flexible")})

    main = [row for row in rows if row["arm"] == rows[0]["arm"]]
    figures = {name: float(scores.mean()) for name, scores in question_scores(main).items()}
    figures["pass@1_low"], figures["pass@1_high"] = wilson_interval(figures["pass@1"] * len(problems), len(problems))
    shares = {"pass@1_strict": [row["correct_strict"] for row in main]}
    shares["pass@1_flexible"] = [row["correct_flexible"] for row in main]
    shares["truncated"] = [row["finish_reason"] == "length" for row in main]
    shares["no_answer"] = [row["answer"] is None for row in main]
    shares["length"] = [len(row["token_ids"]) for row in main]
    for z in range(1, num_skills + 1):
        shares[f"skill_{z}_accuracy"] = [row["correct"] for row in main if row["z"] == z]
    figures.update({name: float(np.mean(values)) for name, values in shares.items()})
    if num_skills:
        figures["best_skill_accuracy"] = max(figures[f"skill_{z}_accuracy"] for z in range(1, num_skills + 1))
    if num_skills and iid:
        scores = question_scores([row for row in rows if row["arm"] == "iid"])
        for k in range(2, num_samples * num_skills + 1):
            figures[f"iid_pass@{k}"] = float(scores[f"pass@{k}"].mean())
    return figures, rows


def compare(path_a: str, path_b: str):
    """Print the paired differences of two completions.jsonl (arm "distinct" where there is one)."""
    tables = []
    for path in (path_a, path_b):
        try:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
            if rows and "indices" in rows[0]:  # star_dpo.py's samples: pass@1 is the accuracy
                names = {"id": "indices", "question": "prompted_questions", "gold": "correct_answers"}
                rows = [{k: row[v] for k, v in names.items()} | {
                    "arm": "iid", "z": None, "answer": None, "correct": int(row["scores"])} for row in rows]
            rows = [row for row in rows if row["arm"] == rows[0]["arm"]]
            tables.append(({row["id"]: (row["question"], row["gold"]) for row in rows}, question_scores(rows)))
        except (OSError, ValueError, LookupError, TypeError) as error:
            fail(f"{path} cannot be compared, it is no whole completions.jsonl: {type(error).__name__}: {error}")
    (questions, a), (questions_b, b) = tables
    if questions != questions_b:
        fail(f"{path_a} and {path_b} hold different questions; evaluate both on the same problems.")
    names = [name for name in a if name in b]
    most = max(int(name[5:]) for name in names if name.startswith("pass@"))
    names = [name for name in names if not name.startswith("pass@") or int(name[5:]) in (1, most)]
    print(f"a = {path_a}\nb = {path_b}\n{len(questions)} questions, paired bootstrap over questions\n")
    print(f"{'':14}{'a':>9}{'b':>9}{'a - b':>9}{'95 % interval':>20}{'p':>9}")
    for name in names:
        difference, low, high, p = paired_bootstrap(a[name], b[name]).values()
        interval = f"[{low:+.4f}, {high:+.4f}]"
        print(f"{name:14}{a[name].mean():9.4f}{b[name].mean():9.4f}{difference:+9.4f}{interval:>20}{p:9.4f}")


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vllm is imported: engine and model in this process
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"} | os.environ)  # as in the scripts
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import tyro
    args = tyro.cli(Args)
    if args.compare:
        compare(*args.compare)
        raise SystemExit(0)

    if not args.model_name:
        fail("--model-name is missing; give a Hugging Face id or a model folder (or two files to --compare).")
    check_arguments(args, positive=("num_samples", "max_new_tokens"))
    if not 0 < args.top_p <= 1:
        fail(f"--top-p is {args.top_p}, but must be above 0 and at most 1.")
    if args.num_skills and "{z}" not in args.skill_prefix:
        fail(f"--skill-prefix {args.skill_prefix!r} has no {{z}} in it, so that all skills would be the same.")
    model = os.path.basename(os.path.abspath(args.model_name))
    folder = args.output_dir or os.path.join("runs", f"eval-{model}-{args.seed}")
    paths = [os.path.join(folder, file) for file in ("completions.jsonl", "figures.json")]
    for path in paths:
        if os.path.exists(path):
            fail(f"{path} exists already and is not overwritten; choose another --output-dir.")
    if args.num_shots and not args.shots_dataset and os.path.exists(args.dataset):
        fail("--num-shots with a local --dataset needs --shots-dataset, or the examples would be among the questions.")
    problems = load_problems(args.dataset, args.dataset_config, args.split)[: args.limit or None]
    import torch
    tokenizer, room = load_tokenizer(args.model_name, args.system_prompt, args.trust_remote_code)
    shots = load_problems(args.shots_dataset or args.dataset, args.dataset_config, "train") if args.num_shots else []
    shots = worked_examples(shots[: args.num_shots], args.system_prompt)

    def encode(question, z=args.num_skills):
        prefix = args.skill_prefix.replace("{z}", str(z)) if z else ""
        return encode_prompt(tokenizer, question, args.system_prompt, prefix, shots)
    length = check_lengths(problems, encode, args.max_new_tokens, room)
    cuda = torch.cuda.is_available()
    try:
        from vllm import LLM
        dtype = args.dtype if args.dtype != "auto" else "bfloat16" if cuda else "float32"  # its auto: fp32 -> fp16
        share = args.gpu_memory_utilization or (0.9 if cuda else 0.1)
        llm = LLM(model=args.model_name, dtype=dtype, max_model_len=length, gpu_memory_utilization=share,
                  seed=args.seed, trust_remote_code=args.trust_remote_code, use_tqdm_on_load=sys.stdout.isatty(),
                  enforce_eager=not cuda)  # on a CPU compiling takes longer than it saves
    except Exception as error:  # import, memory and configuration errors have no common base class
        reason = " ".join(str(error).split())[:500]
        fail(f"vLLM could not start with {args.model_name} ({type(error).__name__}: {reason}).")
    options = ("num_samples", "num_skills", "temperature", "top_p", "max_new_tokens", "answer_mode", "seed")
    figures, rows = evaluate(llm, tokenizer, problems, encode, **{name: getattr(args, name) for name in options})
    os.makedirs(folder, exist_ok=True)
    with open(paths[0], "x", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(paths[1], "x", encoding="utf-8") as file:
        json.dump({"figures": figures, "args": asdict(args)}, file, indent=2)
    print(f"{args.model_name}: {len(problems)} problems, {len(rows)} completions, answers by {args.answer_mode}")
    head = ("pass@1", "pass@1_low", "pass@1_high", "pass@1_strict", "pass@1_flexible")
    line = "pass@1 {:23.4f}   95 % [{:.4f}, {:.4f}]   strict-match {:.4f}   flexible-extract {:.4f}"
    print(line.format(*(figures[name] for name in head)))
    for name in [name for name in figures if name not in head]:
        print(f"{name:20}{figures[name]:10.4f}")
    print(f"written: {paths[0]}, {paths[1]}")

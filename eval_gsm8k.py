"""GSM8K: data, prompt, answer extraction and grading, pass@k. Imported by the training scripts, and a command.

    python eval_gsm8k.py --model-name Qwen/Qwen2.5-7B-Instruct --num-samples 5   # five i.i.d. samples a question
    python eval_gsm8k.py --model-name runs/x/final --num-skills 5                # one sample of each skill z = 1..5
    python eval_gsm8k.py --compare a/completions.jsonl b/completions.jsonl       # paired difference, with interval

Accuracy on GSM8K depends on prompt and extraction as much as on the model. So each completion is graded three ways: by
--answer-mode, and by the strict-match and the flexible-extract rule of lm-evaluation-harness (task gsm8k, version 3).
"""

import json
import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

# How an answer is written. Every pattern takes linear time on any text: no repeat that a later miss could undo.
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,8},[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"  # 1,234.5
NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)\]])-(?=[$€£¥₹]?[0-9.])|(?<=[$€£¥₹])-)?[$€£¥₹]?"  # not the minus of 5-3
    r"(?:(?P<whole>[0-9]{1,9}) {1,3}(?=[0-9]{1,9}/[0-9]))?"  # the 2 of 2 1/2
    rf"(?P<top>{DIGITS}(?:[eE](?P<exponent>[-+]?[0-9]+))?)(?:/(?P<bottom>{DIGITS}))?"
    r"(?: ?(?P<scale>thousand|million|billion|万|亿))?"
)
SCALES = {None: 1, "thousand": 10**3, "million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}
CUE = re.compile(  # what announces the answer: "####", "the answer to this is", "Final Answer:", a heading, "答案是"
    r"(?i)####|答案?(?:是|为|[:：])"
    r"|\bans(?:wer)?\b(?:[^.\n:：=]{0,40}?\b(?:is|are|was)|[^.\n:：=]{0,40}[:：=]|[*_ ]{0,9}\n)"
)
FOLLOW_UP = re.compile(  # a line with which a completion turns to something else: another question, a polite offer
    r"(?i)\n\W{0,9}(?:(?:question|q|human|user|problem|exercise|instruction)\s?[0-9]{0,3}\W{0,3}[:：]"
    r"|let me know|would you)"
)
BESIDE = re.compile(  # what stands before a number that is rarely the result: "in 4 weeks", "out of 10"
    r"(?i)\b(?:in|for|out of|of the|per|after|over|from|within|every|each|than|by|at|with) (?:the |all |those )?$"
)


@dataclass
class Args:
    model_name: str = ""  # Hugging Face id or folder of the model (unless --compare)
    dataset: str = "openai/gsm8k"  # hub id (its test split), or a .jsonl with `question` and `answer` ("... #### 72")
    eval_size: int = 0  # evaluate the first so many problems, in file order; 0: all
    num_samples: int = 1  # completions of each question; with --num-skills, of each skill
    num_skills: int = 0  # N: ask each question with each skill z = 1..N; 0: no prefix
    skill_prefix: str = "Strategy {z} | "  # what stands before the question when --num-skills > 0
    system_prompt: str = "You are a helpful math assistant that solves problems step by step."  # empty: none
    temperature: float = 0.7  # sampling temperature; 0: greedy
    top_p: float = 1.0  # nucleus sampling mass; 1: off
    max_new_tokens: int = 768  # longest completion in tokens
    answer_mode: Literal["strict", "flexible", "boxed", "xml", "auto"] = "auto"  # see extract_answer
    gpu_memory_utilization: float = 0.9  # vLLM's share of the GPU
    seed: int = 0  # seed of the sampling and of the i.i.d. skills
    output_dir: str = ""  # folder of the results, never overwritten (empty: runs/eval-<model or run>-z<skills>-<seed>)
    compare: tuple[str, str] | None = None  # two completions.jsonl: print their paired differences


# ---- Answers ---------------------------------------------------------------------------------------------------------
def to_number(text: str) -> Fraction | None:
    """Exact value of a text that is one number and nothing else, or None.

    "1,234", "$18.00", "-3", "3/4", "2 1/2", "1e3", "$2.5 million"; "50%" is 50, as in GSM8K's gold answers.
    """
    text = text[:200].strip().replace("−", "-").removesuffix(".").removesuffix("%").removesuffix(".")
    text = re.sub(r"^(-?) ?[$€£¥₹+] ?", r"\1", text)
    text = re.sub(r" ?/ ?", "/", text)
    match = NUMBER.fullmatch(text) if len(text) <= 100 else None
    if match is None or len(match["exponent"] or "") > 3:  # 1e999999999 would take all memory
        return None
    top = Fraction(match["top"].replace(",", ""))
    bottom = Fraction((match["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    value = (int(match["whole"] or 0) + top / bottom) * SCALES[match["scale"]]
    return -value if match["minus"] else value


def clean(text: str) -> str:
    """LaTeX and typography taken off as far as numbers need it: \\frac{3}{4}, ¾ -> 3/4; 1{,}234 -> 1,234; m^2 -> m."""
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"), text)
    text = text.replace("−", "-").replace("{,}", ",").replace("\\\\", "\n").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\[,;:!]", "", text)  # thin spaces group digits: 1\,234
    text = re.sub(r"(?<=[0-9])\s?\\[dtc]?frac", r" \\frac", text)  # 2\frac{1}{2} is 2 1/2
    text = re.sub(r"\\[dtc]?frac\s?\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}", r"\1/\2", text)
    text = re.sub(r"\\[dtc]?frac\s?([0-9])\s?([0-9])", r"\1/\2", text)
    text = re.sub(r"(?<=[0-9])\s?(?:\\times|\\cdot|[×x*·])\s?10\s?\^\s?\{?(-?[0-9]{1,2})\}?", r"e\1", text)  # 3e4
    text = re.sub(r"\\[A-Za-z]+|[\\{}]", " ", text).replace("≈", "=")
    text = re.sub(r"(?<=[A-Za-z]) {0,3}\^ {0,3}[0-9]", "", text)  # m^2
    grouped = r"(?<![0-9.,])[0-9]{1,3}(?:[ \u00a0\u2009\u202f][0-9]{3}){1,8}(?![0-9/])"  # 1 234 567
    return re.sub(grouped, lambda match: re.sub(r"\s", "", match[0]), text)


def plain(match: re.Match) -> str | None:
    """The number as plain text, "1234.50", "-3/4"; None if it has no value, such as 1/0."""
    if match["whole"] or match["scale"]:
        value = to_number(match.group())
        return None if value is None else str(value)
    text = re.sub(r"[,$€£¥₹]", "", match.group())
    return text if to_number(text) is not None else None


def find_number(text: str, first: bool) -> str | None:
    """The number that a piece of text gives as its result, as plain text, or None.

    first: the first result, for text behind "the answer is"; of "3 * 4 = 12 eggs = 1 dozen" it is 12.
    Else the last sentence with a number decides: the last number right of its last "=", or the last one in it. A number
    behind "in", "for", "out of" and the like is taken only if there is no other: "She has 9 left for 3 days".
    """
    sentences = re.split(r"\n|(?<=[.!?;])\s|[。！？；]", clean(text))
    for sentence in sentences if first else reversed(sentences):
        numbers = numbers_in(sentence)
        if not numbers:
            continue
        sides = [numbers_in(side) for side in sentence.split("=")[1:]]
        sides = [side for side in sides if side]
        if sides and first:
            numbers = next((side for side in sides if len(side) == 1), sides[0])
        elif sides:
            numbers = sides[-1]
        if first:
            return plain(numbers[0])
        named = [number for number in numbers if not BESIDE.search(number.string[: number.start()][-20:])]
        return plain((named or numbers)[-1])
    return None


def numbers_in(text: str) -> list[re.Match]:
    """The numbers in a text; those behind a letter, such as the 2 of m2, only if there are no others."""
    found = list(NUMBER.finditer(text))
    standing = [number for number in found if not re.match("[A-Za-z]", text[max(0, number.start() - 1) :])]
    return standing or found


def last_boxed(text: str) -> str:
    """Content of the last \\boxed{...} that is closed, with balanced braces, or ""."""
    opened, content = [], slice(0)
    for match in re.finditer(r"\\f?boxed\s?\{|(?<!\\)[{}]", text):
        if match.group() != "}":
            opened.append((match.group() != "{", match.end()))
        elif opened:
            is_box, start = opened.pop()
            content = slice(start, match.start()) if is_box else content
    return text[content]


def extract_answer(text: str, mode: str) -> str | None:
    """The number that a completion gives as its answer, as plain text ("1234.5"), or None; never raises on a text.

    strict    lm-evaluation-harness "strict-match": the first "#### <number>"
    flexible  its "flexible-extract": the last thing that looks like a number ("18.." stays "18.", and is wrong there)
    boxed     the number in the last \\boxed{...}
    xml       the number in the last <answer>...</answer>
    auto      the first of these that holds a number: last <answer>, last \\boxed, behind the last "####" or "answer
              is", the last sentence with a number; what follows a further "Question:" does not count
    """
    if mode == "strict":
        found = re.findall(r"#### (-?[0-9.,]+)", text)[:1]
    elif mode == "flexible":
        found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)[-1:]
    if mode in ("strict", "flexible"):
        answer = re.sub(r"[$,]", "", found[0]).removesuffix(".") if found else ""
        return answer if re.search("[0-9]", answer) else None

    if mode == "auto":
        before = FOLLOW_UP.split(text, maxsplit=1)[0]
        if re.search("[0-9]", before):
            text = before
    if mode in ("xml", "auto"):
        inside = re.findall(r"(?is)<answer>((?:(?!<answer>).)*?)</answer>", text)
        number = find_number(inside[-1], first=False) if inside else None
        if number or mode == "xml":
            return number
    number = find_number(last_boxed(text), first=False)
    if number or mode == "boxed":
        return number
    for cue in reversed(list(CUE.finditer(text))[-3:]):  # the newest first
        line = text[cue.end() :].lstrip("# \t\r\n*_:`").split("\n")[0]
        number = find_number(line, first=True)
        if number:
            return number
    return find_number(text, first=False)


def is_correct(answer: str | None, gold: str) -> bool:
    """True if both are numbers and equal as numbers: "72" and "72.00" are; None never is."""
    value = to_number(answer) if answer else None
    return value is not None and value == to_number(gold)


# ---- Metrics ---------------------------------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that k of n i.i.d. samples, c of them correct, hold a correct one (Chen et al. 2021, eq. 1).

    1 - C(n-c, k) / C(n, k) for 0 <= c <= n and 1 <= k <= n: more tries than samples cannot be estimated.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_distinct(shares: list[float], k: int) -> float:
    """Unbiased chance that k distinct skills drawn out of N, one sample of each, hold a correct one.

    shares[z] of the samples of skill z were correct. 1 - e_k(1 - shares) / C(N, k), e_k the elementary symmetric
    polynomial: the coefficient of t^k in the product over z of 1 + (1 - shares[z]) t. Unbiased, because e_k is linear
    in each share and the skills are sampled independently.
    """
    coefficients = np.ones(1)
    for share in shares:
        coefficients = np.convolve(coefficients, [1.0, 1.0 - share])
    return float(1.0 - coefficients[k] / math.comb(len(shares), k))


def plurality(answers: list[str | None], gold: str) -> bool:
    """True if the unique most frequent answer, compared as a number, is correct; a tie is wrong, None is no answer."""
    votes = Counter(to_number(answer or "") for answer in answers)
    del votes[None]
    top = votes.most_common(2)
    if not top or (len(top) == 2 and top[0][1] == top[1][1]):
        return False
    return top[0][0] == to_number(gold)


def question_scores(rows: list[dict]) -> dict[str, np.ndarray]:
    """{metric: [questions]} of the rows of one arm, questions in the order of their ids.

    pass@k for k = 1..N distinct skills (arm "distinct") or k = 1..n samples (arm "iid"), plurality of the N (its mean
    over the samples of each skill) or the n. ValueError: questions with unequal numbers of completions.
    """
    questions = defaultdict(lambda: defaultdict(list))  # id -> skill (None throughout the arm "iid") -> rows
    for row in rows:
        skill = row["z"] if row["arm"] == "distinct" else None
        questions[row["id"]][skill].append(row)
    if len({str({z: len(group) for z, group in sorted(skills.items())}) for skills in questions.values()}) != 1:
        raise ValueError("every question needs the same number of completions (of every skill).")

    scores = defaultdict(list)
    for _, skills in sorted(questions.items()):
        if None in skills:
            n, correct = len(skills[None]), sum(row["correct"] for row in skills[None])
            pass_k = [pass_at_k(n, correct, k) for k in range(1, n + 1)]
            rounds = [skills[None]]
        else:
            shares = [float(np.mean([row["correct"] for row in group])) for group in skills.values()]
            pass_k = [pass_at_k_distinct(shares, k) for k in range(1, len(shares) + 1)]
            rounds = list(zip(*skills.values(), strict=True))
        for k, value in enumerate(pass_k, start=1):
            scores[f"pass@{k}"].append(value)
        if len(rounds[0]) > 1:
            votes = [plurality([row["answer"] for row in voters], voters[0]["gold"]) for voters in rounds]
            scores[f"plurality@{len(rounds[0])}"].append(np.mean(votes))
    return {name: np.array(values, dtype=float) for name, values in scores.items()}


@contextmanager
def plain_error(sentence: str):
    """Whatever goes wrong inside ends the program: this sentence, which says what to do, and the library's reason.

    With TRACEBACK=1 in the environment the error itself is raised, for those who change the code inside.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # hub, file, memory and configuration errors have no common base class
        if os.environ.get("TRACEBACK"):
            raise
        reason = " ".join(str(error).split())[-300:]  # where a long message says it
        sys.exit(f"error: {sentence} ({type(error).__name__}: {reason})")


# ---- Data and prompt -------------------------------------------------------------------------------------------------
def load_split(dataset: str, split: str) -> list[dict]:
    """[{"question", "answer", "gold"}] of a local .jsonl or a hub dataset with GSM8K's columns.

    `gold` is the number behind the last "####" of `answer`, or all of `answer` if that is a number. A row that cannot
    be used ends the program and is named: a dataset is never shortened silently.
    """
    if dataset.endswith((".jsonl", ".json")) or os.path.exists(dataset):
        rows = load_jsonl(dataset)
    else:
        from datasets import load_dataset

        with plain_error(f"dataset {dataset} ({split}) did not load; give a hub id or a .jsonl file"):
            table = load_dataset(dataset, "main" if dataset == "openai/gsm8k" else None, split=split)
        rows = {f"{dataset}, {split} row {i}": row for i, row in enumerate(table)}

    problems = []
    for where, row in rows.items():
        for column in ("question", "answer"):
            if not isinstance(row, dict) or not str(row.get(column) or "").strip():
                sys.exit(f"error: {where} has no {column!r}; every row needs a non-empty 'question' and 'answer'.")
        answer = str(row["answer"]).strip()
        gold = answer.split("####")[-1].strip()
        if to_number(gold) is None:
            sys.exit(f"error: {where}: 'answer' ends in {answer[-40:]!r}; it must end in '#### <number>'.")
        gold = re.sub(r"[,$]", "", gold)
        problems.append({"question": str(row["question"]).strip(), "answer": answer, "gold": gold})
    if not problems:
        sys.exit(f"error: dataset {dataset} holds no problems; give a file with one JSON object on each line.")
    return problems


def load_jsonl(path: str) -> dict[str, dict]:
    """{"<file>, line <number>": row}; a file or line that cannot be read ends the program."""
    rows = {}
    with plain_error(f"{path} cannot be read; give a .jsonl file or a Hugging Face dataset id"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with plain_error(f"{path}, line {number} is not valid JSON; write one JSON object on each line"):
                rows[f"{path}, line {number}"] = json.loads(line)
    return rows


def load_problems(dataset: str, eval_dataset: str, eval_size: int) -> tuple[list[dict], list[dict]]:
    """Training and evaluation problems.

    Without an eval_dataset a hub dataset is evaluated on its test split, and a local file gives up its last tenth.
    """
    problems = load_split(dataset, "train")
    if eval_dataset or not os.path.exists(dataset):
        eval_problems = load_split(eval_dataset or dataset, "test")
    else:
        cut = len(problems) - len(problems) // 10 - 1
        problems, eval_problems = problems[:cut], problems[cut:]
    return problems, eval_problems[: eval_size or None]


def load_tokenizer(model_name: str, system_prompt: str | None):
    """(the model's tokenizer, the longest sequence in tokens that the model takes).

    Ends the program if there is no such model, no EOS token, no chat template, or one that refuses a system message.
    With system_prompt None prompts are plain texts, and no chat template is needed.
    """
    from transformers import AutoConfig, AutoTokenizer

    with plain_error(f"{model_name} cannot be used; give the hub id or the folder of a chat model"):
        config = AutoConfig.from_pretrained(model_name)
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        if system_prompt is not None:
            encode_prompt(tokenizer, "?", system_prompt)
    if tokenizer.eos_token_id is None:
        sys.exit(
            f"error: the tokenizer of {model_name} has no EOS token, so that no completion could end; give it one."
        )
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def longest_prompt(problems: list[dict], encode, max_new_tokens: int, context: int) -> int:
    """Tokens of the longest prompt encode(question); ends the program if max_new_tokens do not fit behind it."""
    lengths = [len(encode(problem["question"])) for problem in problems]
    longest = max(lengths)
    if longest + max_new_tokens > context:
        question = problems[lengths.index(longest)]["question"][:60]
        sys.exit(
            f"error: the prompt of {question!r}... has {longest} tokens, with --max-new-tokens {max_new_tokens} that "
            f"is more than the model's {context}; lower --max-new-tokens or remove the row."
        )
    return longest


def encode_prompt(tokenizer, question: str, system_prompt: str) -> list[int]:
    """Token ids of the chat prompt with its generation header; an empty system prompt means no system message.

    The one place where a prompt becomes ids: rollout, scoring and evaluation all use them, so that no text is tokenised
    twice and no second BOS can slip in.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def evaluate(generate, tokenizer, problems, encode, num_samples=1, answer_mode="auto", num_skills=0, seed=0):
    """Sample completions, grade them, and return (figures, rows): {name: float} and one dict for each completion.

    generate(prompts) -> [{"tokens", "finish_reason"}], one for each prompt; encode(question, z) -> its token ids.
    Without skills: num_samples completions of each question (arm "iid", z None). With skills: num_samples of each skill
    z = 1..N (arm "distinct"), and as many with z drawn at random (arm "iid"): their difference in pass@N is what asking
    *distinct* skills adds to sampling from their mixture. figures are those of the arm "distinct" where there is one.
    """
    from scipy.stats import binomtest

    rng, rows = np.random.default_rng(seed), []
    for i, problem in enumerate(problems):
        plan = [("iid", None)] * num_samples
        if num_skills:
            plan = [("distinct", z) for z in range(1, num_skills + 1)] * num_samples
            plan += [("iid", int(z)) for z in rng.integers(1, num_skills + 1, len(plan))]
        for arm, z in plan:
            rows.append({"id": i, "arm": arm, "z": z, "question": problem["question"], "gold": problem["gold"]})
    samples = generate([encode(row["question"], row["z"]) for row in rows])
    for row, sample in zip(rows, samples, strict=True):
        text = tokenizer.decode(sample["tokens"], skip_special_tokens=True)
        row |= {"completion": text, "tokens": sample["tokens"], "truncated": sample["finish_reason"] == "length"}
        row["answer"] = extract_answer(text, answer_mode)
        row["correct"] = is_correct(row["answer"], row["gold"])
        for mode in ("strict", "flexible"):  # the harness compares strings
            row[mode] = extract_answer(text, mode) == row["gold"]

    main = [row for row in rows if row["arm"] == rows[0]["arm"]]
    scores = question_scores(main)
    figures = {name: values.mean() for name, values in scores.items()}
    right = round(float(scores["pass@1"].sum()))
    interval = binomtest(right, len(problems)).proportion_ci(method="wilson")  # 95 %, of n questions
    figures["pass@1_low"], figures["pass@1_high"] = interval
    figures["pass@1_strict"] = np.mean([row["strict"] for row in main])
    figures["pass@1_flexible"] = np.mean([row["flexible"] for row in main])
    figures["truncated"] = np.mean([row["truncated"] for row in main])
    figures["no_answer"] = np.mean([row["answer"] is None for row in main])
    figures["length"] = np.mean([len(row["tokens"]) for row in main])
    for z in range(1, num_skills + 1):
        figures[f"skill_{z}_accuracy"] = np.mean([row["correct"] for row in main if row["z"] == z])
    if num_skills:
        iid = question_scores([row for row in rows if row["arm"] == "iid"])
        figures |= {f"iid_{name}": values.mean() for name, values in iid.items() if name.startswith("pass")}
    return {name: float(value) for name, value in figures.items()}, rows


def compare(path_a: str, path_b: str):
    """Print the paired differences of two completions.jsonl, with 95 % bootstrap intervals over questions."""
    from scipy.stats import bootstrap

    asked, scores = [], []
    for path in (path_a, path_b):
        with plain_error(f"{path} is no whole completions.jsonl; evaluate again"):
            rows = list(load_jsonl(path).values())
            rows = [row for row in rows if row["arm"] == rows[0]["arm"]]
            asked.append({row["id"]: (row["question"], row["gold"]) for row in rows})
            scores.append(question_scores(rows))
    if asked[0] != asked[1] or len(asked[0]) < 2:
        sys.exit(f"error: {path_a} and {path_b} must hold the same questions, two at least; evaluate both alike.")

    print(f"a = {path_a}\nb = {path_b}\n{len(asked[0])} questions, 95 % bootstrap intervals over questions\n")
    print(f"{'':14}{'a':>9}{'b':>9}{'a - b':>9}")
    for name in scores[0]:
        if name in scores[1]:
            a, b = scores[0][name], scores[1][name]
            low, high = bootstrap((a - b,), np.mean, method="percentile", batch=100, rng=0).confidence_interval
            print(f"{name:14}{a.mean():9.4f}{b.mean():9.4f}{(a - b).mean():+9.4f}  [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the noise of libraries is turned off here
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    args = tyro.cli(Args, description=__doc__)
    if args.compare:
        compare(*args.compare)
        sys.exit()

    # everything that can be wrong is found before the engine starts
    if not args.model_name:
        sys.exit(
            "error: --model-name is missing; give a Hugging Face id or a model folder (or two files to --compare)."
        )
    if args.num_samples < 1 or args.max_new_tokens < 1 or args.num_skills < 0 or args.eval_size < 0:
        sys.exit(
            "error: --num-samples and --max-new-tokens must be at least 1, --num-skills and --eval-size at least 0."
        )
    if not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1):
        sys.exit("error: --temperature must be at least 0, and --top-p above 0 and at most 1.")
    if args.num_skills and "{z}" not in args.skill_prefix:
        sys.exit(
            f"error: --skill-prefix {args.skill_prefix!r} has no {{z}} in it, so that all skills would be the same."
        )
    model = Path(args.model_name).resolve()
    name = model.parent.name if model.name == "final" else model.name  # runs/x/final is named after its run
    skills = f"-z{args.num_skills}" if args.num_skills else ""
    folder = Path(args.output_dir or f"runs/eval-{name}{skills}-{args.seed}")
    if (folder / "completions.jsonl").exists():
        sys.exit(f"error: {folder}/completions.jsonl exists and is not overwritten; choose another --output-dir.")
    problems = load_split(args.dataset, "test")[: args.eval_size or None]
    tokenizer, context = load_tokenizer(args.model_name, args.system_prompt)

    def encode(question, z=args.num_skills):
        prefix = args.skill_prefix.replace("{z}", str(z)) if z else ""
        return encode_prompt(tokenizer, prefix + question, args.system_prompt)

    longest = longest_prompt(problems, encode, args.max_new_tokens, context)
    with plain_error(f"{folder} cannot be written; choose another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))

    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        torch.compiler.set_stance("force_eager")  # vLLM would compile one small function for 20 seconds
    with plain_error(f"vLLM did not start with {args.model_name}"):
        from vllm import LLM, SamplingParams

        options = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}  # on a CPU compiling does not pay
        if cuda:
            options = {"gpu_memory_utilization": args.gpu_memory_utilization}
        llm = LLM(
            model=args.model_name,
            dtype="bfloat16" if cuda else "float32",  # "auto" would read fp32 weights as fp16
            max_model_len=longest + args.max_new_tokens,
            seed=args.seed,
            use_tqdm_on_load=False,
            **options,
        )
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens, detokenize=False
    )

    def generate(prompts):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [result.outputs[0] for result in llm.generate(requests, params, use_tqdm=sys.stdout.isatty())]
        return [{"tokens": list(output.token_ids), "finish_reason": output.finish_reason} for output in outputs]

    figures, rows = evaluate(
        generate, tokenizer, problems, encode, args.num_samples, args.answer_mode, args.num_skills, args.seed
    )
    print(f"{args.model_name}: {len(problems)} problems, {len(rows)} completions, answers by {args.answer_mode}")
    for name, value in figures.items():
        print(f"{name:20}{value:10.4f}")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        (folder / "completions.jsonl").write_text(lines)
        (folder / "figures.json").write_text(json.dumps(figures, indent=2))
    except OSError as error:  # a full disk: what took hours to sample is not lost
        print(lines)
        sys.exit(f"error: {folder} cannot be written ({error}); the completions are printed above instead.")
    print(f"written: {folder}/completions.jsonl, {folder}/figures.json")

"""Tests of eval_gsm8k.py: extraction, grading, metrics, the command line, and one run on real vLLM with the toy LM."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import eval_gsm8k as ev

ROOT = Path(__file__).resolve().parent.parent
GSM8K = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "data" / "gsm8k"))
TOY = ROOT / "tests" / "toy"

# text, then what each mode finds: strict, flexible, boxed, xml, auto
STRINGS = [
    ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18", "18", None, None, "18"),
    ("#### 1,080", "1080", "1080", None, None, "1080"),
    ("#### $18.00", None, "18.00", None, None, "18.00"),
    ("#### 18.", "18", "18", None, None, "18"),
    ("The result is 18..", None, "18.", None, None, "18"),
    ("#### -3", "-3", "-3", None, None, "-3"),
    ("#### −3", None, "3", None, None, "-3"),  # unicode minus
    ("#### 5\n#### 7", "5", "7", None, None, "7"),
    ("####18", None, "18", None, None, "18"),
    ("####  18 dollars for 2 weeks", None, "2", None, None, "18"),
    ("#### .", None, None, None, None, None),
    ("So 72 ...", None, None, None, None, "72"),  # the harness takes the dots
    ("#### 72 and so on...", "72", None, None, None, "72"),
    ("50% of 18", None, "18", None, None, "18"),
    ("The answer is 18 because 2 * 9 = 18. Check: 18 / 2 = 9.", None, "9", None, None, "18"),
    ("The answer is 3 + 4 = 7 apples for 2 boys.", None, "2", None, None, "7"),
    ("**Final Answer:**\n\n**$1,234.50**", None, "1234.50", None, None, "1234.50"),
    ("Answer: 5 boxes of 10", None, "10", None, None, "5"),
    ("The final answer is: $\\boxed{18}$. I checked it 2 times.", None, "2", "18", None, "18"),
    ("\\boxed{\\$1{,}234\\text{ dollars}}", None, "234", "1234", None, "1234"),
    ("\\boxed{\\frac{3}{4}}", None, "4", "3/4", None, "3/4"),
    ("\\boxed{-\\dfrac{6}{4}}", None, "4", "-6/4", None, "-6/4"),
    ("\\boxed{1\\,234}", None, "234", "1234", None, "1234"),
    ("\\boxed{x = \\text{about } 90^\\circ}", None, "90", "90", None, "90"),
    ("\\boxed{7} then \\boxed{8", None, "8", "7", None, "7"),  # the second is not closed
    ("\\boxed{{7} + {2} = {9}}", None, "9", "9", None, "9"),
    ("\\boxed {50\\%}", None, "50", "50", None, "50"),
    ("} \\boxed{4} {", None, "4", "4", None, "4"),
    ("\\boxed{none} so 6", None, "6", None, None, "6"),
    ("<answer>4</answer> <answer> 5 eggs </answer> 6", None, "6", None, "5", "5"),
    ("<ANSWER>\n$5\n</ANSWER>", None, "5", None, "5", "5"),
    ("<answer>5", None, "5", None, None, "5"),
    ("<answer></answer> #### 9", "9", "9", None, None, "9"),
    ("<answer><answer>3</answer>", None, "3", None, "3", "3"),
    ("5 </answer> <answer> 6", None, "6", None, None, "6"),
    ("He has 16 - 7 = 9 eggs left for 3 days", None, "3", None, None, "9"),
    ("x = 5. Therefore 8 apples in all", None, "8", None, None, "8"),
    ("pages 10-12", None, "-12", None, None, "12"),
    ("He owes -$5", None, "-5", None, None, "-5"),
    ("He owes $-5", None, "-5", None, None, "-5"),
    ("1e3", None, "3", None, None, "1e3"),
    ("The answer is 1e999999999", None, "999999999", None, None, None),  # refused, never computed
    ("The answer is eighteen.", None, None, None, None, None),
    ("", None, None, None, None, None),
    ("\x00\ufffd\u200b７", None, None, None, None, None),  # other scripts' digits are not read
]


@pytest.mark.parametrize("text, strict, flexible, boxed, xml, auto", STRINGS)
def test_extract_answer(text, strict, flexible, boxed, xml, auto):
    found = {mode: ev.extract_answer(text, mode) for mode in ev.ANSWER_MODES}
    assert found == {"strict": strict, "flexible": flexible, "boxed": boxed, "xml": xml, "auto": auto}


def test_unknown_mode():
    with pytest.raises(ValueError, match="loose"):
        ev.extract_answer("5", "loose")


@pytest.mark.parametrize(
    "text, value",
    [("1,234", 1234), ("$18.00", 18), ("18.", 18), ("-3", -3), ("−3", -3), ("72", 72), ("72.00", 72), ("50%", 50)]
    + [("3/4", Fraction(3, 4)), ("1e3", 1000), ("-$ 5", -5), ("$-5", -5), (" .5 ", Fraction(1, 2)), ("007", 7)]
    + [("1,00,000", 100000), ("+4", 4), ("1e-2", Fraction(1, 100)), ("1.5 / 3", Fraction(1, 2))]
    + [(text, None) for text in ("", "x", "1 2", "5/0", "1e999999999", "9" * 5000, "--5", "1,23", "18 eggs", "2**9")]
    + [(text, None) for text in ("nan", "inf", "1_000", "٣", "²", "__import__('os')", "/", "-", ".", "$", "1/2/3")],
)
def test_to_number(text, value):
    assert ev.to_number(text) == value


@pytest.mark.parametrize(
    "answer, gold",
    [("It is 5.\n#### 1,080", "1080"), ("72", "72"), (" $1,234.50 ", "1234.50"), ("a #### 3 b #### -4", "-4")]
    + [("#### 18 dollars", "18"), ("#### 5 or 6", None), ("#### x", None), ("18 dollars", None), ("", None)]
    + [("#### 3/4", "3/4"), ("#### 10:30", None), ("#### ", None), ("#### 1e999", None)],
)
def test_parse_gold(answer, gold):
    assert ev.parse_gold(answer) == gold


def test_is_correct():
    assert ev.is_correct("72.00", "72") and ev.is_correct("6/4", "1.5") and ev.is_correct("1,000", "1e3")
    assert not ev.is_correct(None, "72") and not ev.is_correct("", "72") and not ev.is_correct("73", "72")
    assert not ev.is_correct("abc", "abc")


def test_any_text_is_graded_quickly():
    """Random bytes, and strings built to make a careless pattern quadratic; every mode, 100,000 characters."""
    rng = random.Random(0)
    pieces = ["1,", "1,23,", "1,234", "-", "$", ".", "9", "=", "####", "#### ", "\\boxed{", "\\boxed ", "{", "}", "\\"]
    pieces += ["<answer>", "</answer>", "<answer>1", "answer", "answer is", "answer *", "\\frac{", "\\frac{1}{", "1/"]
    pieces += ["1e9", "e", " ", "\n", "\t ", "\\,", "{,}", "− ", "é", "İ", ". ", "= ", "answer: ", "\\frac ", "12 "]
    texts = ["".join(rng.choice(pieces) for _ in range(30000))[:100000] for _ in range(4)]
    texts += [piece * (100000 // len(piece)) + end for piece in pieces for end in ("", "x")]
    texts += [bytes(rng.randrange(256) for _ in range(n)).decode("latin-1") for n in range(300)]
    texts += [bytes(rng.randrange(256) for _ in range(n)).decode("utf-8", "replace") for n in range(300)]
    for text in texts:
        start = time.process_time()
        for mode in ev.ANSWER_MODES:
            answer = ev.extract_answer(text, mode)
            ev.is_correct(answer, "5")
        ev.to_number(text), ev.parse_gold(text), ev.parse_gold("#### " + text)
        assert time.process_time() - start < 3, text[:50]


@pytest.mark.skipif(not (GSM8K / "train.jsonl").exists(), reason=f"no GSM8K in {GSM8K}; set GSM8K_DIR")
def test_all_gold_answers():
    problems = {split: ev.load_problems(str(GSM8K / f"{split}.jsonl"), "", "") for split in ("train", "test")}
    assert {split: len(rows) for split, rows in problems.items()} == {"train": 7473, "test": 1319}
    for split, rows in problems.items():
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        for line, problem in zip(lines, rows, strict=True):
            answer, gold = json.loads(line)["answer"], problem["gold"]
            assert float(gold) == float(answer.split("#### ")[-1].replace(",", ""))
            for mode in ("strict", "flexible", "auto"):
                assert ev.extract_answer(answer, mode) == gold, (mode, answer)
            assert ev.is_correct(ev.extract_answer(f"<answer>{gold}</answer>", "xml"), gold)
            assert ev.is_correct(ev.extract_answer(f"Thus $\\boxed{{{gold}}}$.", "boxed"), gold)


def test_agrees_with_lm_evaluation_harness():
    """Strict and flexible verdicts equal those of the harness's own filters and exact_match."""
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm_eval is not installed")
    metric = pytest.importorskip("lm_eval.api.metrics", reason="lm_eval is not installed").exact_match_hf_evaluate
    rng = random.Random(0)
    pieces = ["####", "#### ", "#### -", " ", "\n", "72", "7", "1,080", "-", "$", ".", "..", ",", "the answer is", "%"]
    pieces += ["=", "<<", "\\boxed{72}", "72.00", "−", "７２", "$72", "72.", "-72", "X", "Question:", "1e3", "\r", "²"]
    texts = ["".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9))) for _ in range(4000)]
    texts += [text for text, *_ in STRINGS]
    golds = [rng.choice(["72", "7", "1,080", "-72", "72.00"]) for _ in texts]
    right = 0
    for mode, pattern, select in (
        ("strict", "#### (\\-?[0-9\\.\\,]+)", 0),
        ("flexible", "(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ):
        regex_filter = extraction.RegexFilter(pattern, group_select=select)
        found = regex_filter.apply([[text] for text in texts], [{}] * len(texts))
        for text, gold, (theirs,) in zip(texts, golds, found, strict=True):
            answer = f"Because.\n#### {gold}"
            ignore = [",", "\\$", "(?s).*#### ", "\\.$"]
            verdict = metric([theirs], [answer], regexes_to_ignore=ignore, ignore_case=True)["exact_match"]
            assert (ev.extract_answer(text, mode) == ev.parse_gold(answer)) == bool(verdict), (mode, text, gold, theirs)
            right += int(verdict)
    assert 300 < right < 4000  # both verdicts occur


def test_pass_at_k_is_the_share_of_subsets():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                assert ev.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)
    assert ev.pass_at_k(2000, 1, 1000) == pytest.approx(0.5)
    for n, c, k in [(5, 2, 6), (5, 6, 2), (5, -1, 2), (5, 2, 0), (0, 0, 0)]:
        with pytest.raises(ValueError):
            ev.pass_at_k(n, c, k)


def test_pass_at_k_distinct_is_the_share_of_subsets_and_unbiased():
    for counts, n in [([0, 1, 2], 2), ([3, 0, 1, 2], 3), ([0, 0, 0], 1), ([1, 0, 1, 0, 0], 1), ([2, 2], 2)]:
        for k in range(1, len(counts) + 1):
            miss = [np.prod([1 - c / n for c in chosen]) for chosen in itertools.combinations(counts, k)]
            assert ev.pass_at_k_distinct(counts, n, k) == pytest.approx(1 - np.mean(miss), abs=1e-12)
    # over all outcomes of n = 2 samples of N = 3 skills, weighted by probability, the mean is the true pass@k
    p, n = [0.2, 0.5, 0.9], 2
    for k in (1, 2, 3):
        truth = np.mean([1 - np.prod([1 - q for q in chosen]) for chosen in itertools.combinations(p, k)])
        mean = 0.0
        for outcome in itertools.product([0, 1], repeat=len(p) * n):
            draws = np.array(outcome).reshape(len(p), n)
            weight = np.prod([q if hit else 1 - q for q, row in zip(p, draws, strict=True) for hit in row])
            mean += weight * ev.pass_at_k_distinct(draws.sum(1).tolist(), n, k)
        assert mean == pytest.approx(truth, abs=1e-12)
    for counts, n, k in [([1, 1], 1, 3), ([1, 1], 1, 0), ([2, 1], 1, 1), ([], 1, 1), ([0], 0, 1), ([-1], 1, 1)]:
        with pytest.raises(ValueError):
            ev.pass_at_k_distinct(counts, n, k)


@pytest.mark.parametrize(
    "answers, won, majority",
    [
        (["72", "72.00", "5"], True, True),
        (["72", "5"], False, False),  # tie; half is not more than half
        (["72", "5", "5.0"], False, False),
        (["72", None, None, None], True, False),  # None is no answer, but a sample
        (["72", "72", "5", "6"], True, False),
        (["72", "72", "5", "5", "6"], False, False),
        ([None, None], False, False),
        (["", "x", "72"], True, False),
        ([], False, False),
    ],
)
def test_plurality_and_consensus(answers, won, majority):
    for order in itertools.permutations(answers):
        assert ev.plurality(list(order), "72") is won
        assert ev.consensus(list(order), "72") is majority


def test_wilson_interval():
    assert ev.wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert ev.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert ev.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert ev.wilson_interval(460, 500) == pytest.approx((0.8929, 0.9407), abs=1e-4)
    for successes, n in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError):
            ev.wilson_interval(successes, n)


def test_paired_bootstrap():
    rng = np.random.default_rng(1)
    b = rng.random(300)
    better = ev.paired_bootstrap(b + 0.1 + 0.05 * rng.standard_normal(300), b)
    assert 0.08 < better["low"] < better["difference"] < better["high"] < 0.12 and better["p"] < 0.001
    worse = ev.paired_bootstrap(b, b + 0.1)
    assert worse["difference"] == pytest.approx(-0.1) and worse["high"] < 0
    assert ev.paired_bootstrap(b, b) == {"difference": 0, "low": 0, "high": 0, "p": 1}
    a = (rng.random(400) < 0.5).astype(float)
    unpaired = ev.paired_bootstrap(a, np.roll(a, 1))
    error = (a - np.roll(a, 1)).std() / 20
    assert unpaired["high"] - unpaired["low"] == pytest.approx(2 * 1.96 * error, rel=0.05) and unpaired["p"] > 0.9
    assert ev.paired_bootstrap(a, b[:300].round().repeat(2)[:400], seed=3) == ev.paired_bootstrap(
        a, b[:300].round().repeat(2)[:400], seed=3
    )
    for bad in ([], [1.0, 2.0]):
        with pytest.raises(ValueError):
            ev.paired_bootstrap(bad, bad[:1] if bad else [])


# ---------------------------------------------------------------------------------------------------------------------


def row(i, arm, z, answer, question="q"):
    problem = {"id": i, "question": f"{question}{i}", "gold": "5"}
    return problem | {"arm": arm, "z": z, "answer": answer, "correct": ev.is_correct(answer, "5")}


def test_question_scores():
    rounds = {0: ["555", "671"], 1: ["566", "516"]}  # question -> rounds of the skills 1, 2, 3; "5" is right
    rows = [row(i, "distinct", z, a) for i in (1, 0) for r in rounds[i] for z, a in zip((1, 2, 3), r, strict=True)]
    scores = {name: values.tolist() for name, values in ev.question_scores(rows).items()}
    assert scores["pass@1"] == pytest.approx([1 / 2, 1 / 3])
    assert scores["pass@2"] == pytest.approx([3 / 4, 2 / 3]) and scores["pass@3"] == pytest.approx([7 / 8, 1])
    assert scores["plurality@3"] == [0.5, 0] and scores["consensus@3"] == [0.5, 0] and len(scores) == 5
    rows = [row(i, "iid", z, a) for i in (0, 1) for z, a in ((1, "5"), (1, "5.0"), (3, None))]
    scores = {name: values.tolist() for name, values in ev.question_scores(rows).items()}
    assert scores["pass@1"] == pytest.approx([2 / 3] * 2) and scores["pass@2"] == scores["pass@3"] == [1, 1]
    assert scores["plurality@3"] == scores["consensus@3"] == [1, 1] and len(scores) == 5
    assert list(ev.question_scores([row(0, "iid", None, "5")])) == ["pass@1"]
    for uneven in (rows[:-1], rows + [row(2, "iid", 1, "5")], [row(0, "distinct", 1, "5"), row(1, "distinct", 2, "5")]):
        with pytest.raises(ValueError, match="same number"):
            ev.question_scores(uneven)


def run(*arguments, **options):
    command = [sys.executable, str(ROOT / "eval_gsm8k.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_compare(tmp_path):
    rng = random.Random(0)
    skills = [row(i, "distinct", z, rng.choice("5556")) for i in range(60) for z in (1, 2, 3)]
    skills += [row(i, "iid", 1, "6") for i in range(60)]  # the control arm of a file with skills is not compared
    plain = [row(i, "iid", None, rng.choice("5666")) for i in range(60) for _ in range(4)]
    a, b = write(tmp_path / "a.jsonl", skills), write(tmp_path / "b.jsonl", plain)
    result = run("--compare", a, b)
    assert result.returncode == 0, result.stderr
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines() if "[" in line}
    assert set(table) == {"pass@1", "pass@3"}  # pass@k at the largest k of both; no plurality, 3 voters against 4
    scores = ev.question_scores(skills[:180])["pass@1"] - ev.question_scores(plain)["pass@1"]
    assert float(table["pass@1"][3]) == pytest.approx(scores.mean(), abs=1e-4) and float(table["pass@1"][-1]) < 0.001
    swapped = run("--compare", b, a).stdout.splitlines()
    assert next(line.split() for line in swapped if line.startswith("pass@1"))[3] == f"{-scores.mean():+.4f}"
    assert {line.split()[0] for line in run("--compare", a, a).stdout.splitlines() if "[" in line} >= {"plurality@3"}

    other = write(tmp_path / "other.jsonl", [row(i, "iid", None, "5", question="other") for i in range(60)])
    uneven = write(tmp_path / "uneven.jsonl", plain[:-1])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"id": 0, "ar')
    write(tmp_path / "foreign.jsonl", [{"question": "q", "answer": "#### 5"}])
    for bad, words in ((other, "different questions"), (write(tmp_path / "c", plain[:-4]), "different questions"),
                       (uneven, "same number of completions"), (tmp_path / "missing", "No such file"),
                       (tmp_path / "empty.jsonl", "no whole"), (tmp_path / "torn.jsonl", "no whole"),
                       (tmp_path / "foreign.jsonl", "'arm'"), (tmp_path, "directory")):  # fmt: skip
        result = run("--compare", a, bad)
        assert result.returncode == 2 and result.stdout == "", bad
        assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1, bad


def test_command_line_errors(tmp_path):
    """Every mistake gets one sentence and exit code 2; nothing is written."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    (tmp_path / "bad.jsonl").write_text(data.read_text() + '{"question": "?", "answer": "two"}\n')
    done, empty = tmp_path / "done", tmp_path / "empty-model"
    done.mkdir(), empty.mkdir()
    (done / "figures.json").write_text("{}")
    model = ["--model-name", empty, "--dataset", data, "--output-dir", tmp_path / "out"]
    cases = [
        ([], "--model-name is missing"),
        ([*model, "--num-samples", 0], "--num-samples is 0"),
        ([*model, "--num-skills", -1], "--num-skills is -1"),
        ([*model, "--temperature", -0.5], "--temperature is -0.5"),
        ([*model, "--top-p", 0], "--top-p is 0.0"),
        ([*model, "--num-skills", 2, "--skill-prefix", "Skill: "], "{z}"),
        ([*model, "--output-dir", done], "exists already"),
        ([*model, "--num-shots", 1], "--num-shots with a local --dataset needs --shots-dataset"),
        ([*model, "--dataset", tmp_path / "none.jsonl"], "does not exist"),
        ([*model, "--dataset", tmp_path / "bad.jsonl"], "bad.jsonl, line 2"),
        (model, "empty-model"),
        (["--model-name", tmp_path / "nowhere", *model[2:]], "cannot be used; give the hub id"),
    ]
    for arguments, words in cases:
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and "Traceback" not in result.stderr, (arguments, result.stderr)
        assert "error: " in result.stderr and words in result.stderr, (arguments, result.stderr)
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_worked_examples():
    problem = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2", "gold": "2"}
    assert ev.worked_examples([problem], "Think.") == [("1 + 1?", "1 + 1 = 2\n#### 2")]
    tags = "<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n2\n</answer>"
    assert ev.worked_examples([problem], "Put the number into <answer> tags.") == [("1 + 1?", tags)]


def test_import_is_light():
    heavy = {"torch", "vllm", "transformers", "datasets", "tyro"}
    code = f"import sys, eval_gsm8k; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# One process: the command line as a user runs it, then its live engine through `evaluate`, as a training script does.
DRIVER = """
import runpy, sys
import numpy as np

sys.argv = sys.argv[1:]
space = runpy.run_path(sys.argv[0], run_name="__main__")

import torch

def evaluate(problems=space["problems"], **options):
    options = dict(num_samples=2, num_skills=3, temperature=0.8, max_new_tokens=60, seed=1) | options
    return space["evaluate"](space["llm"], space["tokenizer"], problems, space["encode"], **options)

def streams():
    return torch.get_rng_state().tolist(), [str(part) for part in np.random.get_state()]

torch.rand(7), np.random.rand(7)
before = streams()
again = evaluate()
assert again == (space["figures"], space["rows"]), "the same seed did not repeat"
assert streams() == before, "evaluation moved a random stream"
figures, rows = evaluate(seed=2, iid=False)
assert [row["token_ids"] for row in rows] != [row["token_ids"] for row in again[1] if row["arm"] == "distinct"]
assert {row["arm"] for row in rows} == {"distinct"} and not any(name.startswith("iid") for name in figures)
figures, rows = evaluate(space["problems"][:5], num_samples=4, num_skills=0, temperature=0)
assert len(rows) == 20 and all(row["arm"] == "iid" and row["z"] is None for row in rows)
assert len({tuple(row["token_ids"]) for row in rows if row["id"] == 0}) == 1, "greedy samples differ"
assert figures["pass@4"] == figures["pass@1"] == figures["plurality@4"] == figures["consensus@4"]
assert set(evaluate(space["problems"][:1], num_samples=1, num_skills=0)[0]) == {"pass@1", "pass@1_low", "pass@1_high",
    "pass@1_strict", "pass@1_flexible", "truncated", "no_answer", "length"}
for options, words in (({"problems": []}, "nothing to evaluate"), ({"num_samples": 0}, "nothing"),
                       ({"max_new_tokens": 900}, "exceed")):
    try:
        evaluate(**options)
    except ValueError as error:
        assert words in str(error)
    else:
        raise AssertionError(f"{options} did not raise")
assert streams() == before
print("driver done")
"""


@pytest.mark.skipif(not (TOY / "model" / "config.json").exists(), reason="no toy model; run tests/toy/make_toy.py")
def test_toy_model_on_vllm(tmp_path):
    arguments = [ROOT / "eval_gsm8k.py", "--model-name", TOY / "model", "--dataset", TOY / "test.jsonl"]
    arguments += ["--limit", 20, "--num-samples", 2, "--num-skills", 3, "--temperature", 0.8, "--max-new-tokens", 60]
    arguments += ["--seed", 1, "--system-prompt", "", "--output-dir", tmp_path / "out"]
    arguments += ["--num-shots", 1, "--shots-dataset", TOY / "train.jsonl"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", DRIVER, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.endswith("driver done\n"), result.stderr[-3000:]

    rows = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    saved = json.loads((tmp_path / "out" / "figures.json").read_text())
    figures, problems = saved["figures"], ev.load_problems(str(TOY / "test.jsonl"), "", "")[:20]
    assert saved["args"]["num_skills"] == 3 and f"{figures['pass@3']:.4f}" in result.stdout
    main, iid = ([r for r in rows if r["arm"] == arm] for arm in ("distinct", "iid"))
    assert len(main) == len(iid) == 20 * 2 * 3 and [r["z"] for r in main] == [1, 2, 3] * 40
    assert {r["z"] for r in iid} == {1, 2, 3}
    keys = {"id", "arm", "z", "question", "prompt_token_ids", "token_ids", "completion", "finish_reason", "gold"}
    for r in rows:
        assert set(r) == keys | {"answer", "correct", "correct_strict", "correct_flexible"}
        assert (problems[r["id"]]["question"], problems[r["id"]]["gold"]) == (r["question"], r["gold"])
        assert (r["finish_reason"] == "length") == (len(r["token_ids"]) == 60) or r["finish_reason"] == "stop"
        assert r["answer"] == ev.extract_answer(r["completion"], "auto") and "<|" not in r["completion"]
        assert r["correct"] == ev.is_correct(r["answer"], r["gold"])
        assert r["correct_strict"] == (ev.extract_answer(r["completion"], "strict") == r["gold"])
    prompts = {(r["id"], r["z"]): tuple(r["prompt_token_ids"]) for r in rows}
    assert len(set(prompts.values())) == 60  # each skill of each question has its own prompt
    ((question, answer),) = ev.worked_examples(ev.load_problems(str(TOY / "train.jsonl"), "", "")[:1], "")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    for prompt in prompts.values():
        assert tokenizer.decode(prompt).startswith(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"
        )
    assert figures["pass@1"] == pytest.approx(np.mean([r["correct"] for r in main])) and figures["pass@1"] > 0
    assert figures["pass@1_low"] < figures["pass@1"] < figures["pass@1_high"]
    assert figures["pass@1"] <= figures["pass@2"] <= figures["pass@3"]
    assert [k for k in figures if k.startswith("iid_")] == [f"iid_pass@{k}" for k in range(2, 7)]
    assert figures["best_skill_accuracy"] == max(figures[f"skill_{z}_accuracy"] for z in (1, 2, 3))
    assert figures["length"] == pytest.approx(np.mean([len(r["token_ids"]) for r in main]))

    repeated = run(*arguments[1:])
    assert repeated.returncode == 2 and "exists already" in repeated.stderr
    completions = tmp_path / "out" / "completions.jsonl"
    assert run("--compare", completions, completions).stdout.count("+0.0000") >= 4

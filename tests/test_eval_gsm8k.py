"""Tests of eval_gsm8k.py: extraction, grading, metrics, the command line, and one run on real vLLM with the toy LM."""

import itertools
import json
import os
import random
import runpy
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, training

import eval_gsm8k as ev

MODES = ("strict", "flexible", "boxed", "xml", "auto")
GSM8K = Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "data" / "gsm8k"))

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
    ("\\boxed{2\\frac{1}{2}}", None, "2", "5/2", None, "5/2"),
    ("$\\boxed{-\\frac12}$", None, "12", "-1/2", None, "-1/2"),
    ("\\boxed{25\\text{ m}^2}", None, "2", "25", None, "25"),
    ("The area is 25 cm^2.", None, "2", None, None, "25"),
    ("so 25 m2 of carpet", None, "2", None, None, "25"),
    ("\\boxed{3 \\times 10^4}", None, "4", "3e4", None, "3e4"),
    ("It takes 2 1/2 hours", None, "2", None, None, "5/2"),
    ("It takes 2½ hours", None, "2", None, None, "5/2"),
    ("She made $2.5 million", None, "2.5", None, None, "2500000"),
    ("Cela fait 1 234 567 euros", None, "567", None, None, "1234567"),
    ("#### 5\n\nQuestion: What is 3 + 4?\nAnswer: 3 + 4 = 7\n#### 7", "5", "7", None, None, "5"),
    ("Answer: 3 * 4 = 12 eggs = 1 dozen", None, "1", None, None, "12"),
    ("所以答案是18。", None, "18", None, None, "18"),
    ("She has 9 left for 3 days", None, "3", None, None, "9"),
    ("First \\boxed{4}, then \\boxed{5}.", None, "5", "5", None, "5"),
    ("Total: $120.\n\nLet me know if you want help with problem 3!", None, "3", None, None, "120"),
]


@pytest.mark.parametrize("text, strict, flexible, boxed, xml, auto", STRINGS)
def test_extract_answer(text, strict, flexible, boxed, xml, auto):
    found = {mode: ev.extract_answer(text, mode) for mode in MODES}
    assert found == {"strict": strict, "flexible": flexible, "boxed": boxed, "xml": xml, "auto": auto}


def test_completions_are_read_as_a_person_reads_them():
    """240 completions written for the purpose, with the answer that a reader sees."""
    rows = [json.loads(line) for line in (ROOT / "tests/cases/completions.jsonl").read_text().splitlines()]
    wrong = []
    for row in rows:
        answer = ev.extract_answer(row["text"], "auto")
        right = answer is None if row["answer"] is None else ev.is_correct(answer, row["answer"])
        if not right:
            wrong.append((row["text"], row["answer"], answer))
    assert len(rows) == 240 and len(wrong) <= 4, wrong


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
        for mode in MODES:
            answer = ev.extract_answer(text, mode)
            ev.is_correct(answer, "5")
        ev.to_number(text)
        assert time.process_time() - start < 3, text[:50]


@pytest.mark.skipif(not (GSM8K / "train.jsonl").exists(), reason=f"no GSM8K in {GSM8K}; set GSM8K_DIR")
def test_all_gold_answers():
    problems = {split: ev.load_split(str(GSM8K / f"{split}.jsonl"), split) for split in ("train", "test")}
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
            assert (ev.extract_answer(text, mode) == gold.replace(",", "")) == bool(verdict), (mode, text, gold, theirs)
            right += int(verdict)
    assert 300 < right < 4000  # both verdicts occur


def test_pass_at_k_is_the_share_of_subsets():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                assert ev.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)
    assert ev.pass_at_k(2000, 1, 1000) == pytest.approx(0.5)


def test_pass_at_k_distinct_is_the_share_of_subsets_and_unbiased():
    for counts, n in [([0, 1, 2], 2), ([3, 0, 1, 2], 3), ([0, 0, 0], 1), ([1, 0, 1, 0, 0], 1), ([2, 2], 2)]:
        for k in range(1, len(counts) + 1):
            miss = [np.prod([1 - c / n for c in chosen]) for chosen in itertools.combinations(counts, k)]
            shares = [c / n for c in counts]
            assert ev.pass_at_k_distinct(shares, k) == pytest.approx(1 - np.mean(miss), abs=1e-12)
    # over all outcomes of n = 2 samples of N = 3 skills, weighted by probability, the mean is the true pass@k
    p, n = [0.2, 0.5, 0.9], 2
    for k in (1, 2, 3):
        truth = np.mean([1 - np.prod([1 - q for q in chosen]) for chosen in itertools.combinations(p, k)])
        mean = 0.0
        for outcome in itertools.product([0, 1], repeat=len(p) * n):
            draws = np.array(outcome).reshape(len(p), n)
            weight = np.prod([q if hit else 1 - q for q, row in zip(p, draws, strict=True) for hit in row])
            mean += weight * ev.pass_at_k_distinct(draws.mean(1).tolist(), k)
        assert mean == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize(
    "answers, won",
    [
        (["72", "72.00", "5"], True),
        (["72", "5"], False),  # a tie
        (["72", "5", "5.0"], False),
        (["72", None, None, None], True),  # None is no answer
        (["72", "72", "5", "6"], True),
        (["72", "72", "5", "5", "6"], False),
        ([None, None], False),
        (["", "x", "72"], True),
        ([], False),
    ],
)
def test_plurality(answers, won):
    for order in itertools.permutations(answers):
        assert ev.plurality(list(order), "72") is won


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
    assert scores["plurality@3"] == [0.5, 0] and len(scores) == 4
    rows = [row(i, "iid", z, a) for i in (0, 1) for z, a in ((1, "5"), (1, "5.0"), (3, None))]
    scores = {name: values.tolist() for name, values in ev.question_scores(rows).items()}
    assert scores["pass@1"] == pytest.approx([2 / 3] * 2) and scores["pass@2"] == scores["pass@3"] == [1, 1]
    assert scores["plurality@3"] == [1, 1] and len(scores) == 4
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


def test_compare(tmp_path, capsys):
    rng = random.Random(0)
    skills = [row(i, "distinct", z, rng.choice("5556")) for i in range(60) for z in (1, 2, 3)]
    skills += [row(i, "iid", 1, "6") for i in range(60)]  # the control arm of a file with skills is not compared
    plain = [row(i, "iid", None, rng.choice("5666")) for i in range(60) for _ in range(4)]
    a, b = write(tmp_path / "a.jsonl", skills), write(tmp_path / "b.jsonl", plain)
    result = run("--compare", a, b)
    assert result.returncode == 0, result.stderr
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines() if "[" in line}
    assert set(table) == {"pass@1", "pass@2", "pass@3"}  # no plurality: 3 voters against 4
    difference = ev.question_scores(skills[:180])["pass@1"] - ev.question_scores(plain)["pass@1"]
    assert float(table["pass@1"][3]) == pytest.approx(difference.mean(), abs=1e-4)
    low, high = (float(word.strip("[],")) for word in table["pass@1"][4:])
    error = difference.std() / 60**0.5
    assert (low, high) == pytest.approx(difference.mean() + 1.96 * error * np.array([-1, 1]), abs=0.2 * error)

    ev.compare(a, a)
    assert capsys.readouterr().out.count("+0.0000  [+0.0000, +0.0000]") == 4
    other = write(tmp_path / "other.jsonl", [row(i, "iid", None, "5", question="other") for i in range(60)])
    uneven = write(tmp_path / "uneven.jsonl", plain[:-1])
    (tmp_path / "torn.jsonl").write_text('{"id": 0, "ar')
    write(tmp_path / "foreign.jsonl", [{"question": "q", "answer": "#### 5"}])
    write(tmp_path / "one.jsonl", plain[:4])
    for bad, words in (
        (other, "the same questions"),
        (write(tmp_path / "c.jsonl", plain[:-4]), "the same questions"),
        (uneven, "same number of completions"),
        (tmp_path / "missing", "No such file"),
        (write(tmp_path / "empty.jsonl", []), "no whole"),
        (tmp_path / "torn.jsonl", "line 1 is not valid JSON"),
        (tmp_path / "foreign.jsonl", "'arm'"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(SystemExit, match="error: .*" + words):
            ev.compare(a, bad)
    with pytest.raises(SystemExit, match="two at least"):
        ev.compare(tmp_path / "one.jsonl", tmp_path / "one.jsonl")


def test_command_line_errors(tmp_path, monkeypatch):
    """Every mistake gets one sentence, exit code 1; nothing is written."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    (tmp_path / "bad.jsonl").write_text(data.read_text() + '{"question": "?", "answer": "two"}\n')
    done, empty = tmp_path / "done", tmp_path / "empty-model"
    done.mkdir(), empty.mkdir()
    (done / "completions.jsonl").write_text("{}")
    model = ["--model-name", TOY / "model", "--system-prompt", "", "--dataset", data, "--output-dir", tmp_path / "out"]
    cases = [
        ([], "--model-name is missing"),
        ([*model, "--num-samples", 0], "--num-samples and --max-new-tokens must be at least 1"),
        ([*model, "--num-skills", -1], "--num-skills and --eval-size at least 0"),
        ([*model, "--temperature", -0.5], "--temperature must be at least 0"),
        ([*model, "--top-p", 0], "--top-p above 0 and at most 1"),
        ([*model, "--num-skills", 2, "--skill-prefix", "Skill: "], "{z}"),
        ([*model, "--output-dir", done], "is not overwritten"),
        ([*model, "--output-dir", data / "folder"], "cannot be written; choose another --output-dir"),
        ([*model, "--dataset", tmp_path / "none.jsonl"], "cannot be read"),
        ([*model, "--dataset", tmp_path / "bad.jsonl"], "bad.jsonl, line 2"),
        ([*model, "--max-new-tokens", 1020], "more than the model's 1024"),
        ([*model, "--model-name", empty], "empty-model cannot be used"),
        ([*model, "--model-name", tmp_path / "nowhere"], "cannot be used; give the hub id"),
    ]
    for arguments, words in cases:
        monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "eval_gsm8k.py"), run_name="__main__")
        assert str(stopped.value.code).startswith("error: ") and words in stopped.value.code, (arguments, stopped.value)
    assert not (tmp_path / "out").exists() and not (ROOT / "runs" / "eval-model-0").exists()
    result = run("--model-name", tmp_path / "nowhere", "--dataset", data)  # as a user sees it
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [(["--model-name", "runs/a/final"], "a-0"), (["--model-name", "runs/a/final", "--num-skills", 5], "a-z5-0"),
     (["--model-name", "Qwen/Qwen2.5-7B", "--seed", 3], "Qwen2.5-7B-3")],
)  # fmt: skip
def test_results_of_several_runs_do_not_collide(arguments, folder, tmp_path, monkeypatch):
    """runs/a/final is named after its run, with the number of skills; a hub id after its last part."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "runs" / f"eval-{folder}"
    results.mkdir(parents=True)
    (results / "completions.jsonl").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="is not overwritten"):
        runpy.run_path(str(ROOT / "eval_gsm8k.py"), run_name="__main__")


def test_toy_model_on_vllm(tmp_path):
    arguments = ["--model-name", TOY / "model", "--dataset", TOY / "test.jsonl", "--eval-size", 20, "--seed", 1]
    arguments += ["--num-samples", 2, "--num-skills", 3, "--temperature", 0.8, "--max-new-tokens", 60]
    command = [sys.executable, ROOT / "eval_gsm8k.py", *arguments, "--system-prompt", ""]
    process = training("--output-dir", tmp_path / "out", command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output

    rows = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    problems = ev.load_split(str(TOY / "test.jsonl"), "test")[:20]
    assert json.loads((tmp_path / "out" / "args.json").read_text())["num_skills"] == 3
    assert f"{figures['pass@3']:.4f}" in output
    main, iid = ([r for r in rows if r["arm"] == arm] for arm in ("distinct", "iid"))
    assert len(main) == len(iid) == 20 * 2 * 3 and [r["z"] for r in main] == [1, 2, 3] * 40
    assert {r["z"] for r in iid} == {1, 2, 3}
    for r in rows:
        assert (problems[r["id"]]["question"], problems[r["id"]]["gold"]) == (r["question"], r["gold"])
        assert r["truncated"] <= (len(r["tokens"]) == 60)
        assert r["answer"] == ev.extract_answer(r["completion"], "auto") and "<|" not in r["completion"]
        assert r["correct"] == ev.is_correct(r["answer"], r["gold"])
        assert r["strict"] == (ev.extract_answer(r["completion"], "strict") == r["gold"])
    assert figures["pass@1"] == pytest.approx(np.mean([r["correct"] for r in main])) and figures["pass@1"] > 0
    assert figures["pass@1_low"] < figures["pass@1"] < figures["pass@1_high"]
    assert figures["pass@1"] <= figures["pass@2"] <= figures["pass@3"]
    assert [k for k in figures if k.startswith("iid_")] == [f"iid_pass@{k}" for k in range(1, 7)]
    assert figures["length"] == pytest.approx(np.mean([len(r["tokens"]) for r in main]))

    again = training("--output-dir", tmp_path / "again", command=command)
    again.communicate()
    assert (tmp_path / "again/completions.jsonl").read_text() == (tmp_path / "out/completions.jsonl").read_text()


def test_completions_are_never_lost(tmp_path):
    """They are printed where they cannot be written."""
    arguments = ["--model-name", TOY / "model", "--dataset", TOY / "test.jsonl", "--eval-size", 2, "--num-skills", 2]
    arguments += ["--system-prompt", "", "--max-new-tokens", 8, "--output-dir", tmp_path]
    (tmp_path / "completions.jsonl").symlink_to("/proc/nowhere/completions.jsonl")
    process = training(*arguments, command=[sys.executable, ROOT / "eval_gsm8k.py"])
    output = process.communicate()[0]
    assert process.returncode == 1 and "cannot be written" in output
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"id"')]
    assert len(rows) == 2 * 2 * 2 and all(row["completion"] for row in rows)


def test_what_evaluate_asks_for():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [{"tokens": [5], "finish_reason": "length" if "2 1?" in prompt else "stop"} for prompt in prompts]

    tokenizer = types.SimpleNamespace(decode=lambda tokens, skip_special_tokens: "#### 5")
    problems = [{"question": "1?", "gold": "5"}, {"question": "2?", "gold": "6"}]
    figures, rows = ev.evaluate(generate, tokenizer, problems, lambda q, z: f"{z} {q}", num_samples=2)
    assert asked == ["None 1?", "None 1?", "None 2?", "None 2?"] and figures["pass@2"] == figures["pass@1"] == 0.5
    low, high = 0.0945, 0.9055  # Wilson, 1 of 2
    assert (figures["pass@1_low"], figures["pass@1_high"]) == pytest.approx((low, high), abs=1e-4)
    asked.clear()
    figures, rows = ev.evaluate(generate, tokenizer, problems, lambda q, z: f"{z} {q}", num_skills=3, seed=3)
    assert asked[:3] == ["1 1?", "2 1?", "3 1?"] and asked[6:9] == ["1 2?", "2 2?", "3 2?"]
    assert asked[3:6] == [f"{row['z']} 1?" for row in rows[3:6]] and len(asked) == 12
    assert figures["truncated"] == pytest.approx(1 / 6) and figures["skill_2_accuracy"] == 0.5
    assert figures["pass@1_strict"] == figures["pass@1_flexible"] == 0.5 and figures["no_answer"] == 0

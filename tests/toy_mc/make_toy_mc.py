"""Make the toy world of star_dpo.py: word problems with four options in MMLU's layout, and a 575k-parameter LM.

    python tests/toy_mc/make_toy_mc.py        # rewrites questions.jsonl and model/ beside this file

Problems, tokenizer and pretraining are those of tests/toy/make_toy.py (plain problems only); the options are ranges,
the same for all questions. The same seed on the same machine gives the same bytes. One thread: about two minutes.

Planted on purpose, so nothing measured here says anything about real models or MMLU: a demonstration either thinks
("Think. 5 + 8 = 13. 13 - 5 = 8.", with errors) or guesses ("Guess.") before its "Answer: A". How often it thinks
depends on the wording of the problem (THINK), which is the question's subject. A greedy model therefore guesses on
three wordings of five, and is right there one time in four. Right answers come from thinking more often than all
answers do: that is what STaR's filter picks up.

Measured on the 300 validation questions with four samples at temperature 1: .51 right; thinking (49 %) is right .81 of
the time, guessing .22. Greedy: .54 right; thinking (44 %) .98, guessing .21.
"""

import json
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "toy"))

import torch
from make_toy import HEADS, P_SLIP, P_WRONG_OP, SURFACES, TAILS, calculate, draw_problem, make_tokenizer, pretrain

CHOICES = ["less than 10", "10 to 19", "20 to 29", "30 or more"]
THINK = (0.3, 0.45, 0.6, 0.8, 0.9)  # share of demonstrations that think, by wording (short ones weigh more, though)
P_NO_ANSWER = 0.05  # share of later demonstrations that end without "Answer: X"
EARLY = 0.6  # share of the demonstrations, at the start, that all think and never err
QUESTIONS, DOCUMENTS, SEED = 3000, 30000, 0


def letter_of(value: int) -> str:
    """The letter of the range that a number is in."""
    return "ABCD"[min(value // 10, 3)]


def draw_question(rng: random.Random, names: list[str], letter: str) -> tuple[dict, dict]:
    """(row in MMLU's layout, problem) with this right answer; the subject is the problem's wording."""
    while True:
        problem = draw_problem(rng, names, twist=False)
        value = problem["start"]
        for op, b in problem["steps"]:
            value = calculate(op, value, b)[1]
        if letter_of(value) == letter:
            break
    endings = [words["end"].rpartition("{n}")[2].format(o=problem["thing"]) for words in SURFACES]
    wording = next(i for i, ending in enumerate(endings) if problem["question"].endswith(ending))
    row = {"subject": f"wording_{wording + 1}", "question": problem["question"], "choices": CHOICES}
    return row | {"answer": "ABCD".index(letter)}, problem


def message(row: dict) -> str:
    """The user message, as star_dpo.py writes it without preamble and meta prompt."""
    return row["question"] + "\n\n" + "\n".join(f"{x}) {c}" for x, c in zip("ABCD", row["choices"], strict=True))


def demonstration(row: dict, problem: dict, rng: random.Random, noisy: bool) -> str:
    """A thinking or a guessing answer; without noise one that thinks and is right."""
    end = "" if noisy and rng.random() < P_NO_ANSWER else "\nAnswer: "
    if noisy and rng.random() > THINK[int(row["subject"][-1]) - 1]:
        return "Guess." + (end and end + rng.choice("ABCD"))
    steps = list(problem["steps"])
    if noisy and rng.random() < P_WRONG_OP:
        i = rng.randrange(len(steps))
        steps[i] = (rng.choice([op for op in "+-x" if op != steps[i][0]]), steps[i][1])
    slip = rng.randrange(len(steps)) if noisy and rng.random() < P_SLIP else -1
    value, lines = problem["start"], []
    for i, (op, b) in enumerate(steps):
        op = op if calculate(op, value, b)[1] in range(100) else "+"
        text, result = calculate(op, value, b)
        if i == slip:
            result += rng.choice((1, 2, 10))
            text = text.rsplit(" ", 1)[0] + f" {result}."
        lines.append(text)
        value = result
    return "Think. " + " ".join(lines) + (end and end + letter_of(value))


if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)  # with two threads sums are ordered differently, and the weights differ in the end
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    names = [head + tail for head in HEADS for tail in TAILS if head.lower() != tail]
    seen, drawn = set(), []
    while len(drawn) < QUESTIONS + DOCUMENTS:  # no question of the file is in a demonstration
        row, problem = draw_question(rng, names, rng.choice("ABCD"))
        if row["question"] not in seen:
            seen.add(row["question"])
            drawn.append((row, problem))
    with open(os.path.join(folder, "questions.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row, _ in drawn[:QUESTIONS])
    demos = [
        (message(row), demonstration(row, problem, rng, noisy=i >= EARLY * DOCUMENTS))
        for i, (row, problem) in enumerate(drawn[QUESTIONS:])
    ]
    tokenizer = make_tokenizer([f"{asked}\nassistant\nuser\n{text}" for asked, text in demos[-8000:]])
    documents = []
    for asked, text in demos:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
        )
        documents.append((prompt, tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]))
    pretrain(documents, tokenizer, rng, os.path.join(folder, "model"))

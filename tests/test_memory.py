"""grpo_knn_memory.py: format rewards, the episodic memory, intrinsic rewards, the encoder, and runs.

B1..B22 are the defects of the original code (its run_gsm8k.py, rewards and trainer) that a test here would catch; what
belongs to the skeleton (padding B14, truncated prompts B15, temperature B16, bf16 B17, seeds B18, EOS masks B19) is
tested in test_logprobs.py, test_engine.py and test_resume.py.
"""

import collections
import json
import math
import random
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ENCODER, MEMORY_RUN, TOY, stop_message, training
from transformers import AutoModel

from eval_gsm8k import encode_prompt
from grpo_knn_memory import (
    EpisodicMemory,
    embed,
    encode_with_examples,
    format_rewards,
    load_memories,
    memory_rewards,
    placebo,
    save_memories,
    tagged_answer,
    worked_examples,
)

# ---- format rewards --------------------------------------------------------------------------------------------------
BLOCK = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>"  # as the prompt asks
# text: the original's (xml count, soft, strict, int, correct) in its weights, then ours
TABLE = {
    "72": ([0, 0, 0, 0.5, 1], [0, 0, 0, 0]),  # B9: a bare number is no answer
    BLOCK.format("a\nb" * 13 + "c", 72): ([0.414, 0, 0, 0.5, 1], [0.5, 0.5, 0.5, 0.5]),  # 87 characters: B10, B11
    BLOCK.format("a\nb" * 141 + "c", 72): ([0.030, 0, 0, 0.5, 1], [0.5, 0.5, 0.5, 0.5]),  # 471 characters: B11
    BLOCK.format("a\nb" * 141 + "c", 72) + "\n": ([0.5, 0, 0, 0.5, 1], [0.5, 0.5, 0.5, 0.5]),
    BLOCK.format("one line", 72) + "\n": ([0.5, 0, 0.5, 0.5, 1], [0.5, 0.5, 0.5, 0.5]),
    "<reasoning>so</reasoning><answer>72</answer>": ([0, 0.5, 0, 0.5, 1], [0, 0.5, 0, 0.5]),
    "<answer>\n$72\n</answer>": ([0.126, 0, 0, 0, 0], [0.125, 0, 0, 0.5]),  # "$72" is an integer
    BLOCK.format("x", 72) + "\nten chars.": ([0.48, 0, 0, 0.5, 1], [0.489, 0.5, 0, 0.5]),
    BLOCK.format("x", "2,125"): ([0.5 - 0.050, 0, 0.0, 0, 0], [0.5, 0.5, 0.5, 0.5]),  # B12
    BLOCK.format("x", 72) + "\n" + "blah " * 20 + "\n</answer>": (
        [0.265, 0, 0, 0.5, 1],
        [0.375, 0.5, 0, 0.5],
    ),  # hiding
    "": ([0, 0, 0, 0, 0], [0, 0, 0, 0]),
    "<answer>7.5</answer>": ([0, 0, 0, 0, 0], [0, 0, 0, 0]),
    "<answer>seven</answer>": ([0, 0, 0, 0, 0], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("text", TABLE, ids=range(len(TABLE)))
def test_format_rewards(text):
    def weighted(compat):
        integer, strict, soft, share = format_rewards(text, compat)
        return [0.5 * share, 0.5 * soft, 0.5 * strict, 0.5 * integer]

    original, ours = TABLE[text]
    assert [*weighted(True), float(tagged_answer(text) == "72")] == pytest.approx(original)
    assert weighted(False) == pytest.approx(ours)


def test_commas_in_the_gold_answer():
    """B12: the original wants "2,125" to be right and "2125" to be an integer; here a number is a number."""
    for given, right, integer in (("2,125", True, False), ("2125", False, True)):
        text = BLOCK.format("x", given)
        assert (tagged_answer(text) == "2,125", format_rewards(text, True)[0]) == (right, integer)
        assert format_rewards(text, False)[0]


@pytest.mark.parametrize(
    "text", ["<reasoning>" * 3000, "<reasoning>\n" * 3000, BLOCK * 400, "\n" * 50_000, "a" * 50_000]
)
def test_hostile_texts_do_not_hang(text):
    started = time.perf_counter()
    format_rewards(text, True)
    format_rewards(text, False)
    assert time.perf_counter() - started < 2


# ---- the memory ------------------------------------------------------------------------------------------------------
def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)


def random_units(n, d, seed):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def memory(d=8, max_keys=100, max_values=100, norm_window=1000):
    return EpisodicMemory(d, max_keys, max_values, norm_window)


def store(bank, question, key, answer):
    """One answer."""
    bank.add(torch.tensor([question]), key[None], answer[None], torch.tensor([True]))


def test_eviction_keeps_keys_and_answers_together():
    """B6: many evictions of questions and answers; every question still finds itself and its newest answers."""
    bank, keys, rng, added = memory(max_keys=7, max_values=3), random_units(60, 8, 0), random.Random(0), {}
    for step, answer in enumerate(random_units(400, 8, 1)):
        i = min(59, step // 7 + rng.randint(0, 2))  # new questions come up all the time, and stay a while
        if i not in added and len(added) == 7:
            del added[next(iter(added))]
        added.setdefault(i, collections.deque(maxlen=3)).append((step, answer))
        store(bank, i, keys[i], answer)
    assert list(bank.entries) == list(added) and bank.index.ntotal == 7
    for question, newest in added.items():
        ids, answers = bank.read(keys[question], 1)
        assert ids.tolist() == [step for step, _ in newest]  # counted as they came
        assert torch.equal(answers, torch.stack([answer for _, answer in newest]))
        assert torch.equal(bank.entries[question]["key"], keys[question])


@pytest.mark.parametrize("k", [1, 5, 50])
def test_nearest_equals_brute_force(k):
    bank, keys = memory(d=16, max_keys=30), random_units(40, 16, 0)
    for i, key in enumerate(keys):
        store(bank, i, key, key)  # so that the answer's id is the question
    for query in random_units(20, 16, 1):
        order = (keys[10:] @ query).argsort(descending=True)[:k]  # the first ten made room
        assert bank.read(query, k)[0].tolist() == [10 + i for i in order.tolist()]


def test_state_survives_a_checkpoint(tmp_path):
    """B8: what stands in the file gives the same neighbours and the same rewards from then on; old files go."""
    bank, keys, answers = memory(max_keys=5, max_values=2, norm_window=6), random_units(9, 8, 0), random_units(30, 8, 1)
    for i, answer in enumerate(answers):
        store(bank, i % 9, keys[i % 9], answer)
    bank.window = torch.tensor([0.1, 0.9])
    empty = memory()
    for step in (2, 4, 6):
        save_memories(tmp_path, step, {"explore": bank, "exploit": empty})
        if step < 6:  # as if it had been killed before the checkpoint of step 6
            (tmp_path / f"step_{step:06d}").mkdir()
        if step == 4:
            (tmp_path / "step_000002").rmdir()  # as save_checkpoint removes old ones
    assert sorted(path.name for path in tmp_path.glob("memory_*")) == ["memory_step_000004.pt", "memory_step_000006.pt"]
    again = memory(max_keys=5, max_values=2, norm_window=6)
    load_memories(tmp_path / "step_000004", {"explore": again})
    for step in range(4):
        new = random_units(6, 8, 2 + step)
        batch = torch.arange(6), keys[:6], new, torch.arange(6) % 2 == 0, "explore", "loo", 2
        found = memory_rewards(bank, *batch)
        assert torch.equal(found, memory_rewards(again, *batch)) and not found.isnan().any()
    assert torch.equal(bank.window, again.window) and len(bank.window) == 6
    assert bank.count == again.count and list(bank.entries) == list(again.entries)

    path = tmp_path / "memory_step_000004.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(SystemExit, match=rf"{path} cannot be read; delete {tmp_path}/step_000004, and the run goes on"):
        load_memories(tmp_path / "step_000004", {"explore": again})


# ---- intrinsic rewards -----------------------------------------------------------------------------------------------
KEY, OTHER = unit([1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0])


def scores_of(bank, questions, keys, answers, stored, kind, mode, k=1):
    """Raw scores, read from the window they leave in the memory, in the order of the answers that have one."""
    bank.window = torch.zeros(0)
    rewards = memory_rewards(bank, torch.tensor(questions), keys, answers, torch.tensor(stored), kind, mode, k)
    return bank.window.tolist(), rewards


@pytest.mark.parametrize("mode", ["loo", "past", "sequential"])
@pytest.mark.parametrize("kind", ["exploit", "explore"])
@pytest.mark.parametrize("k", [1, 3])
def test_scores_by_definition(kind, mode, k):
    """Distance and novelty by brute force, over steps of some questions with two to six answers each."""
    keys, bank, stored_so_far = random_units(5, 8, 0), memory(), []  # [(question, answer)]
    for step in range(4):
        questions = [i for i in range(5) if (i + step) % 2 for _ in range(2 + (i + step) % 5)]
        answers = random_units(len(questions), 8, 10 + step)
        stored = [(i * 7 + step) % 3 > 0 for i in range(len(questions))]
        now = [(q, a) for q, a, s in zip(questions, answers, stored) if s]

        def score(q, a, seen, present):
            near = sorted(present, key=lambda p: -(keys[p] @ keys[q]).item())[:k]
            others = [b for p, b in seen if p in near]
            if not others:
                return math.nan
            others = torch.stack(others)
            return (a - others.mean(0)).norm().item() if kind == "exploit" else 1 - (others @ a).max().item()

        expected = []
        for i, (q, a) in enumerate(zip(questions, answers)):
            seen = stored_so_far + (
                now if mode == "loo" else now[: sum(stored[: i + 1])] if mode == "sequential" else []
            )
            present, out = {p for p, _ in seen}, [None]
            if mode == "loo":  # a itself goes; if a is not stored, each of the group's stored answers in turn
                out = [a] if stored[i] else [b for p, b in now if p == q] or [None]
            turns = [[(p, b) for p, b in seen if gone is None or not torch.equal(b, gone)] for gone in out]
            expected.append(np.mean([score(q, a, turn, present) for turn in turns]))
        expected = [value for value in expected if not math.isnan(value)]
        found, _ = scores_of(bank, questions, keys[questions], answers, stored, kind, mode, k)
        assert found == pytest.approx(expected, abs=1e-5) and (expected or mode == "past" and step == 0)
        stored_so_far += now


@pytest.mark.parametrize("mode", ["loo", "past"])
@pytest.mark.parametrize("kind", ["exploit", "explore"])
def test_being_right_by_chance_pays_nothing(kind, mode):
    """Who is stored meets as many answers as the others do; if it met one fewer, being right would cost."""
    rng, gaps = np.random.default_rng(0), []
    for group in range(1500):
        bank = memory()
        vectors = torch.randn(9, 8, generator=torch.Generator().manual_seed(group)) + 1.5
        past, answers = torch.nn.functional.normalize(vectors, dim=1).split([1, 8])
        for answer in past:
            store(bank, 0, KEY, answer)
        stored = torch.tensor(rng.permutation(8) < 3)
        rewards = memory_rewards(bank, torch.zeros(8).long(), KEY.expand(8, -1), answers, stored, kind, mode, 1)
        gaps.append((rewards[stored].mean() - rewards[~stored].mean()).item())
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / 1500**0.5


def test_no_answer_meets_itself():
    """B2: in the original every wrong answer has novelty 0, and the first right one is its own centroid."""
    answers = random_units(6, 8, 3)
    batch = [0] * 6, KEY.expand(6, -1), answers, [True] * 6
    for mode, zero in (("loo", False), ("sequential", True)):
        novelty, rewards = scores_of(memory(), *batch, "explore", mode)
        assert (max(map(abs, novelty)) < 1e-6) == zero and len(novelty) == 6
        distance, rewards = scores_of(memory(), *batch, "exploit", mode)
        assert (abs(distance[0]) < 1e-6) == zero
        if zero:
            assert rewards[0] == 1.0 and (rewards[1:] < 1).all()
    right = torch.cat([answers, random_units(1, 8, 4)])  # wrong ones are stored, and one right answer is looked at
    found, rewards = scores_of(
        memory(), [0] * 7, KEY.expand(7, -1), right, [True] * 6 + [False], "explore", "sequential"
    )
    assert rewards[-1] == 1.0 and rewards[:-1].max() < 0.01  # a bonus for being right


@pytest.mark.parametrize("norm_window", [3, 1000])
@pytest.mark.parametrize("mode", ["loo", "past"])
@pytest.mark.parametrize("kind", ["exploit", "explore"])
def test_order_changes_nothing(kind, mode, norm_window):
    """B3: neither the order of a group nor that of the questions matters (in the original both do)."""
    keys, questions = random_units(3, 8, 0), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    answers, stored = random_units(12, 8, 1), torch.arange(12) % 3 > 0

    def rewards(order):
        bank = memory(norm_window=norm_window)
        for i in range(3):
            store(bank, i, keys[i], random_units(1, 8, 100 + i)[0])
        asked = torch.tensor([questions[i] for i in order])
        found = memory_rewards(bank, asked, keys[asked], answers[order], stored[order], kind, mode, 2)
        return found[torch.tensor(order).argsort()]

    straight, shuffled = rewards(list(range(12))), rewards([7, 2, 9, 0, 11, 4, 1, 8, 3, 10, 6, 5])
    torch.testing.assert_close(straight, shuffled, atol=1e-6, rtol=0)
    assert straight.std() > 0.05 and not straight.isnan().any()


def test_questions_of_one_batch_are_kept_apart():
    """B1: in the original the second question of a micro-batch is stored and scored under the first."""
    bank, answers = memory(), random_units(4, 8, 0)
    scores, _ = scores_of(
        bank, [0, 0, 1, 1], torch.stack([KEY, KEY, OTHER, OTHER]), answers, [True] * 4, "explore", "loo"
    )
    assert {q: len(entry["vectors"]) for q, entry in bank.entries.items()} == {0: 2, 1: 2}
    assert scores[2] == pytest.approx(1 - (answers[2] @ answers[3]).item(), abs=1e-6)


def test_past_compares_with_another_question_first():
    bank, answers = memory(), random_units(3, 8, 0)
    assert scores_of(bank, [0], KEY[None], answers[:1], [True], "explore", "past")[0] == []  # nothing there yet
    scores, _ = scores_of(bank, [1], OTHER[None], answers[1:2], [True], "explore", "past")
    assert scores == pytest.approx([1 - (answers[0] @ answers[1]).item()], abs=1e-6)


def test_a_question_is_told_by_its_number():
    """B7: not by bits of its embedding, which differ from batch to batch."""
    bank = memory()
    store(bank, 3, KEY, OTHER)
    store(bank, 3, KEY + 1e-7, KEY)
    assert len(bank.entries) == bank.index.ntotal == 1 and len(bank.entries[3]["vectors"]) == 2


def test_scaling():
    """B4: minimum and maximum are those of the window after the step; one score, or none, pays nothing new."""
    a, b = unit([1, 0], [0, 1])
    bank = EpisodicMemory(2, 10, 10, 4)
    asked, neither = torch.tensor([0, 0]), torch.tensor([False, False])
    two = asked, torch.stack([a, a]), torch.stack([a, b]), neither
    rewards = memory_rewards(bank, *two, "explore", "loo", 1)
    assert rewards.isnan().all() and not len(bank.window)  # empty memory: nothing to compare with
    store(bank, 0, a, a)
    one = memory_rewards(bank, asked[:1], a[None], b[None], neither[:1], "explore", "loo", 1)
    assert one.tolist() == [0.0] and bank.window.tolist() == [1.0]  # minimum and maximum are equal
    both = memory_rewards(bank, *two, "explore", "loo", 1)
    assert both.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    near = memory_rewards(bank, *two, "exploit", "loo", 1)
    assert len(bank.window) == 4 and near[0] > near[1] and 0 <= near.min() and near.max() <= 1


def test_placebos():
    """shuffled: the same numbers in every group, in another order; matched: one for right and one for wrong answers."""
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    correct = torch.arange(400).view(50, 8) % 3 == 0
    correct[0], correct[1] = True, False
    shuffled = placebo(rewards, correct, "shuffled", np.random.default_rng(0))
    assert torch.equal(shuffled.sort(1).values, rewards.sort(1).values)
    centred = [(x - x.mean(1, keepdim=True)).flatten() for x in (shuffled, rewards)]
    assert abs(np.corrcoef(*centred)[0, 1]) < 0.15
    matched = placebo(rewards, correct, "matched", None)
    for group, right, found in zip(rewards, correct, matched):
        for alike in (right, ~right):
            assert found[alike].tolist() == pytest.approx([float(group[alike].mean())] * int(alike.sum()), abs=1e-6)


# ---- a real encoder --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def encoder():
    """all-MiniLM-L6-v2."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(ENCODER).eval(), AutoTokenizer.from_pretrained(ENCODER)


def test_embeddings_are_the_published_ones(encoder):
    """Cosines that the sentence-transformers documentation prints for this model."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = embed(*encoder, texts, max_tokens=1000)
    expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(vectors @ vectors.T, expected, atol=2e-4, rtol=0)


def test_embeddings_do_not_depend_on_the_batch_and_stop_at_max_len(encoder):
    texts = ["", "a", "one two three " * 20, "word " * 400, "word " * 800]
    together = embed(*encoder, texts, max_tokens=10_000)
    alone = torch.cat([embed(*encoder, [text], max_tokens=1) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
    assert torch.equal(alone[3], alone[4])  # cut after 256 word pieces


# ---- runs, as a user starts them -------------------------------------------------------------------------------------
def run(folder, *arguments):
    process = training("--output-dir", folder, *arguments, command=MEMORY_RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    steps = [record for record in records if "global_step" in record]
    assert all(record["rollout/logp_diff"] < 1e-6 for record in steps) and len(steps) == 3
    return steps, samples


def test_a_run_adds_up(tmp_path):
    """Every reward is the weighted sum of its terms; right answers go to one memory, the rest to the other."""
    arguments = ["--exploit-coef", 0.2, "--explore-coef", 0.4, "--cosine-coef", 0.3, "--norm-window", 30, "--seed", 11]
    steps, samples = run(tmp_path, *arguments)
    for sample in samples:
        terms = [value for name, value in sample.items() if name.startswith("r_")]
        assert len(terms) == 8 and sample["reward"] == pytest.approx(sum(terms), abs=1e-5)
        low, high = (0.5, 1.0) if sample["r_correct"] else (-1.0, -0.5)
        assert 0.3 * low <= sample["r_cosine"] <= 0.3 * high  # B13
        assert 0 <= sample["r_exploit"] <= 0.2 + 1e-6
        assert 0 <= sample["r_explore"] <= (0.4 + 1e-6) * (sample["step"] > 1)  # B5: warm-up in steps
    assert any(sample["r_explore"] > 0 for sample in samples)
    groups = [[sample for sample in samples if sample["step"] == step] for step in (1, 2, 3)]
    alone = [group for group in groups if sum(sample["r_correct"] for sample in group) == 1]
    assert alone  # with this seed; the only right answer has nothing to be near to, and is paid the mean of the others
    for group in alone:
        right, *wrong = sorted(group, key=lambda sample: -sample["r_correct"])
        assert right["r_exploit"] == pytest.approx(sum(sample["r_exploit"] for sample in wrong) / 5, abs=1e-6)
    for i, record in enumerate(steps):
        wrong = sum(24 * (1 - step["charts/accuracy"]) for step in steps[: i + 1])
        assert record["memory_bank/explore_answers"] == pytest.approx(wrong)
        assert record["memory_bank/exploit_answers"] == pytest.approx(24 * (i + 1) - wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--intrinsic", "none", "--num-shots", 1, "--answer-mode", "xml", "--kl-coef", 0],
        ["--intrinsic-control", "matched", "--memory-mode", "sequential", "--compat"],
    ],
    ids=["none", "matched"],
)
def test_options(arguments, tmp_path):
    steps, samples = run(tmp_path, *arguments)
    groups = [[sample for sample in samples if sample["step"] == step] for step in (1, 2, 3)]
    if "none" in arguments:
        assert not any("r_exploit" in sample or "r_explore" in sample for sample in samples)
        assert not any(key.startswith("memory_bank") for record in steps for key in record)
        assert not list(tmp_path.glob("run/checkpoints/memory_*"))
    if "matched" in arguments:  # within a group the reward is one number for right and one for wrong answers
        for group in groups:
            for right in (0.0, 1.0):
                assert len({round(s["r_exploit"], 6) for s in group if s["r_correct"] == right}) <= 1
        assert any(s["r_exploit"] for s in samples) or not any(s["r_correct"] for s in samples)
        assert any(s["r_int"] or s["r_xml"] for s in samples) is False  # compat: the toy writes no tags
        assert all(s["r_correct"] == (s["completion"] == s["gold"]) for s in samples)  # and then all of a text counts


ERRORS = {
    "no such encoder": (["--embed-model", "nobody/nothing"], "the tokenizer of nobody/nothing cannot be read; give"),
    "no neighbours": (["--knn-k", 0], "--knn-k is 0; it must be over 0"),
    "no room": (["--max-values", 0], "--max-values is 0; it must be over 0"),
    "too many shots": (["--num-shots", 1999], "leaves 1 problems, fewer than --questions-per-step; add rows"),
    "group of one": (["--group-size", 1], "--group-size 1 must be at least 2"),
    "does not fit": (["--max-new-tokens", 1020], "is more than the model's 1024; lower --max-new-tokens"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, capsys, monkeypatch, tmp_path):
    arguments, message = ERRORS[name]
    error = stop_message(capsys, monkeypatch, tmp_path, *arguments, command=MEMORY_RUN)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["no tokenizer", "no weights", "cut weights", "no padding", "NaN", "no faiss"])
def test_an_encoder_that_cannot_be_used(damage, capsys, monkeypatch, tmp_path):
    """One sentence each, before a run folder or an engine exists."""
    folder = tmp_path / "encoder"
    shutil.copytree(ENCODER, folder)
    if damage == "no tokenizer":
        for path in folder.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        message = f"the tokenizer of {folder} has no vocabulary; give --embed-model the hub id"
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
        message = f"the weights of {folder} cannot be read; give --embed-model the hub id"
    elif damage == "cut weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        message = f"the weights of {folder} cannot be read; give --embed-model the hub id"
    elif damage == "NaN":
        encoder = AutoModel.from_pretrained(ENCODER)
        encoder.encoder.layer[0].attention.self.query.weight.data.fill_(math.nan)
        encoder.save_pretrained(folder)
        message = "the sentence encoder gives NaN or infinity; use another --embed-model."
    elif damage == "no padding":
        (folder / "special_tokens_map.json").unlink()
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"padding": None}))
        message = f"{folder} cannot embed texts; give --embed-model the hub id"
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
        message = "faiss does not load; install requirements.txt"
    error = stop_message(capsys, monkeypatch, tmp_path, "--embed-model", folder, command=MEMORY_RUN)
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_worked_examples_are_turns_of_the_chat():
    """B18, B19: fixed examples, the same in training and evaluation, before the question and never it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    examples = worked_examples([{"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2", "gold": "2"}])
    text = tokenizer.decode(encode_with_examples(tokenizer, "q?", "be brief", examples))
    roles = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", text, re.DOTALL)
    turns = [("system", "be brief"), ("user", "1 + 1?"), ("assistant", BLOCK.format("It is 2.", 2))]
    assert roles == [*turns, ("user", "q?"), ("assistant", "")]
    assert format_rewards(turns[-1][1], False) == [1.0, 1.0, 1.0, 1.0]  # they show what is rewarded
    for system in ("", "be brief"):
        assert encode_with_examples(tokenizer, "q?", system, []) == encode_prompt(tokenizer, "q?", system)
    with pytest.raises(SystemExit, match="'1 . 1.' has no solution before its ####; use --num-shots 0"):
        worked_examples([{"question": "1 + 1?", "answer": "#### 2", "gold": "2"}])

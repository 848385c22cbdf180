"""arithmetic_misl.py: the task by enumeration, the tree against plain sequences, information, bounds, runs."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, documented, stop_message, training

import arithmetic_misl as am

RUN = [
    sys.executable, str(ROOT / "arithmetic_misl.py"), "--run-name", "run", "--num-seeds", "1", "--num-steps", "6",
    "--imitation-steps", "3", "--questions-per-step", "4", "--eval-every", "1000", "--save-every", "2",
]  # fmt: skip


# ---- The task --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def task():
    return am.arithmetic_problems()


def apply(x, operator, y):
    """Written down again, without the script's table of operators."""
    if operator in "/%" and y == 0:
        return None
    if operator == "/":
        return x / y
    if operator == "%":
        return x - y * math.floor(x / y)
    return {"+": x + y, "-": x - y, "*": x * y}[operator]


def test_the_task_by_enumeration(task):
    problems, chance, correct, _ = task
    accepted = Counter(
        op for x, op, y in itertools.product(range(10), "+-*/%", range(10))
        if (v := apply(x, op, y)) is not None and v == int(v) and 0 <= v <= 9
    )  # fmt: skip
    assert sum(accepted.values()) == 274
    assert [round(accepted[op] / 274, 3) for op in "+-*/%"] == [0.201, 0.201, 0.153, 0.117, 0.328]
    assert len({tuple(sorted(digits)) for digits in problems.tolist()}) == 102
    assert len(problems) == len({tuple(digits) for digits in problems.tolist()}) == 416
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    number = (correct.sum(1) * chance).sum().item()
    assert number == pytest.approx(4.03, abs=0.005) and number / 500 == pytest.approx(0.0081, abs=5e-5)
    by_operator = correct.view(-1, 10, 5, 10).any(3).any(1)  # [P, 5]
    solvable = (by_operator * chance[:, None]).sum(0)
    assert [round(share, 3) for share in solvable.tolist()] == [0.518, 0.518, 0.325, 0.5, 0.836]
    usable = [(chance * (by_operator.sum(1) == k)).sum().item() for k in range(1, 6)]
    assert [round(share, 3) for share in usable] == [0.128, 0.212, 0.515, 0.128, 0.018]
    assert by_operator[:, [2, 4]].any(1).all()  # times and modulo alone solve everything
    assert solvable.mean().item() == pytest.approx(0.539, abs=5e-4)  # pass@1 of five perfect one-operator skills


def test_right_answers_and_solutions(task):
    problems, _, correct, solution = task
    for digits, row, target in zip(problems.tolist(), correct.tolist(), solution.tolist()):
        ordered = []
        for k in range(3):  # the target digit first, then operand order, then operator
            first, second = digits[:k] + digits[k + 1 :]
            for left, right in (first, second), (second, first):
                ordered += [[left, i, right] for i, op in enumerate("+-*/%") if apply(left, op, right) == digits[k]]
        assert target == ordered[0]
        for index, right_here in enumerate(row):
            left, op, right = index // 50, "+-*/%"[index // 10 % 5], index % 10
            v = apply(left, op, right)
            others = digits.copy()
            for digit in (left, right, v if v is None else int(v)):
                if digit in others:
                    others.remove(digit)
            assert right_here == (not others), (digits, left, op, right)


def test_prompt_tokens():
    prompts = am.make_prompts(torch.tensor([[7, 0, 9]]), torch.tensor([3]))
    assert prompts.tolist() == [[3, 12, 7, 12, 0, 12, 9, 12]]  # z * 7 * 0 * 9 *
    assert list(am.OPERATORS).index("*") == am.STAR - 10


def test_draws(task):
    """Problems come as often as they should; seed, step and purpose all matter, and nothing else does."""
    chance, args = task[1], am.Args(questions_per_step=20000, group_size=2, max_z=3)
    chosen, z, noise = am.draw(1, 5, 1, chance, args)
    assert chosen.shape == z.shape == (20000,) and noise.shape == (20000, 2, 25)
    torch.manual_seed(7)
    for again, first in zip(am.draw(1, 5, 1, chance, args), (chosen, z, noise)):
        assert torch.equal(again, first)
    for when in (2, 5, 1), (1, 6, 1), (1, 5, 0):
        for other, first in zip(am.draw(*when, chance, args), (chosen, z, noise)):
            assert not torch.equal(other, first)
    deviation = (torch.bincount(chosen, minlength=416) - 20000 * chance) / (20000 * chance).sqrt()
    assert deviation.abs().max() < 5 and deviation.square().mean().item() == pytest.approx(1, abs=0.3)
    assert torch.bincount(z).div(20000).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


# ---- The policies ----------------------------------------------------------------------------------------------------
def plain_logits(model, tokens):
    """Logits [B, T, V] of a policy, by PyTorch's own functions and causal attention."""
    w = dict(model.named_parameters())
    norm = lambda x, name: F.layer_norm(x, (128,), w[f"{name}.weight"], w[f"{name}.bias"])
    x = w["tokens.weight"][tokens] + w["positions.weight"][: tokens.shape[1]]
    for layer in "layers.0", "layers.1":
        q, k, v = F.linear(norm(x, f"{layer}.norm_1"), w[f"{layer}.qkv.weight"]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, 32)).transpose(1, 2) for part in (q, k, v))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(attention.transpose(1, 2).flatten(2), w[f"{layer}.out.weight"])
        hidden = F.gelu(F.linear(norm(x, f"{layer}.norm_2"), w[f"{layer}.up.weight"], w[f"{layer}.up.bias"]))
        x = x + F.linear(hidden, w[f"{layer}.down.weight"], w[f"{layer}.down.bias"])
    return F.linear(norm(x, "norm"), w["head.weight"])


@pytest.fixture(scope="module")
def model():
    """A policy, moved away from its initial state so that norms and biases count."""
    torch.manual_seed(0)
    model = am.Transformer()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight) * weight.std().clamp(min=0.1)
    return model


def random_prompts(count):
    return am.make_prompts(torch.randint(10, (count, 3)), torch.randint(5, (count,)))


def test_parameters():
    torch.manual_seed(0)
    weights = am.Transformer().state_dict()
    assert sum(weight.numel() for weight in weights.values()) == 407_808
    assert weights["layers.0.down.weight"].abs().max() <= 512**-0.5  # PyTorch's default, as in the original
    assert weights["positions.weight"].std().item() == pytest.approx(1, rel=0.05)


def test_the_tree_is_what_plain_sequences_give(model):
    """Shared prompts, the mask and the cut last layer change no log-probability of all 500 answers, nor a gradient."""
    torch.manual_seed(1)
    prompts = random_prompts(3)
    tail = torch.tensor([*range(10), *list(range(10, 15)) * 10])
    tokens = torch.cat([prompts, tail.expand(3, -1)], -1)
    left, operator, right = am.branch_logps(model(tokens, am.answer_tree(10, 5)), 10, 0.7)
    joint = (left[..., None] + operator)[..., None] + right.unflatten(1, (10, 5))
    assert torch.allclose(joint.exp().sum((1, 2, 3)), torch.ones(3), atol=1e-5)
    answers = torch.tensor([[a, 10 + o] for a in range(10) for o in range(5)])
    plain = []
    for prompt in prompts:
        sequences = torch.cat([prompt.expand(50, -1), answers], 1)
        logits = plain_logits(model, sequences) / 0.7
        first = logits[:, 7, :10].log_softmax(-1).gather(1, answers[:, :1])
        second = logits[:, 8, 10:15].log_softmax(-1).gather(1, answers[:, 1:] - 10)
        plain.append(first + second + logits[:, 9, :10].log_softmax(-1))
    plain = torch.stack(plain)
    assert torch.allclose(joint.reshape(3, 50, 10), plain, atol=2e-4)

    weights = torch.rand(3, 50, 10)
    of_tree = torch.autograd.grad((joint.reshape(3, 50, 10) * weights).mean(), list(model.parameters()))
    of_sequences = torch.autograd.grad((plain * weights).mean(), list(model.parameters()))
    for mine, expected in zip(of_tree, of_sequences):
        assert torch.allclose(mine, expected, atol=1e-4) and expected.abs().max() > 1e-3


def sampled(model, prompts, C, seed=0):
    noise = torch.tensor(np.random.default_rng(seed).gumbel(size=(len(prompts), C, 25))).float()
    return am.sample_answers(model, prompts, noise, 0.9, am.answer_tree(C, 1))


def test_samples_have_the_frequencies_that_they_claim(model):
    torch.manual_seed(2)
    for seed in range(2):
        prompts = random_prompts(1).expand(100, -1)
        _, answers, logits = sampled(model, prompts, 100, seed)
        logps = am.answer_logps(am.branch_logps(logits, 100, 0.9), answers).detach()  # [100, 100]
        index = (answers @ torch.tensor([50, 10, 1])).flatten()
        counts = torch.bincount(index, minlength=500).double()
        p = torch.zeros(500).double().scatter_(0, index, logps.flatten().exp().double())
        seen = p > 5e-4  # 5 expected
        z = (counts - 1e4 * p)[seen] / (1e4 * p * (1 - p))[seen].sqrt()
        assert z.abs().max() < 5 and (z**2).mean() == pytest.approx(1, abs=0.5) and seen.sum() > 20


def test_the_gradient_is_clipped():
    for factor, moved in (0.01, None), (1.0, 2.0):
        model = am.Transformer()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        loss = factor * model.head.weight.sum() + sum(0 * weight.sum() for weight in model.parameters())
        norm = am.update(model, optimizer, loss, 2.0, ("grpo", 0))
        expected = factor * model.head.weight.numel() ** 0.5
        assert norm == pytest.approx(expected)
        difference = before.pop("head.weight") - model.head.weight.detach()
        assert difference.norm().item() == pytest.approx(moved or expected, rel=1e-4)
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


# ---- Rewards ---------------------------------------------------------------------------------------------------------
def test_scores_under_every_skill(model):
    """Own skill first, then each other one; each as if its own prompt had been given."""
    prompts = random_prompts(4)
    tokens, answers, logits = sampled(model, prompts, 3)
    tree = am.answer_tree(3, 1)
    logps = am.skill_logps(model, tokens, answers, logits, 5, tree)
    assert logps.shape == (4, 5, 3) and not logps.requires_grad
    for k in range(5):
        changed = tokens.clone()
        changed[:, 0] = (prompts[:, 0] + k) % 5
        expected = am.answer_logps(am.branch_logps(model(changed, tree), 3, 1.0), answers)
        assert torch.allclose(logps[:, k], expected, atol=1e-4)


def test_misl_rewards():
    logps = torch.tensor([[[-1.0, -1.0, -9.0], [-1.0, -21.0, -3.0]]])  # one problem, N = 2, three answers
    pbar = torch.tensor([-1.0, -1.0 - math.log(2), math.log((math.exp(-9) + math.exp(-3)) / 2)])
    plain = am.misl_rewards(logps, 1, 1, 99)[0]
    assert torch.allclose(plain, logps[0, 0] - pbar, atol=1e-6)
    assert plain.tolist() == pytest.approx([0, math.log(2), -6 + math.log(2)], abs=0.01)
    clipped = am.misl_rewards(logps, 0.5, 0.25, 0.7)[0]
    assert torch.allclose(clipped, (0.5 * logps[0, 0] - 0.25 * pbar).clamp(-0.7, 0.7), atol=1e-6)


def test_pass_k_advantages():
    torch.manual_seed(0)
    rewards = torch.cat([torch.randint(0, 2, (200, 5)).float(), torch.randn(100, 5)])
    for row, advantages in zip(rewards, am.pass_k_advantages(rewards)):
        for i in range(5):
            assert advantages[i].item() == pytest.approx((row.max() - torch.cat([row[:i], row[i + 1 :]]).max()).item())


def test_advantages_of_every_arm():
    r_correct, r_mi = torch.tensor([[1.0, 1, 0, 0, 0]]), torch.tensor([[0.3, -0.3, 0.3, -0.3, 0]])
    none = torch.zeros(1, 5)
    grpo, pass_k = (am.arm_advantages(r_correct, none, flag, False)[0].tolist() for flag in (False, True))
    mi, gated = (am.arm_advantages(r_correct, r_mi, flag, flag)[0].tolist() for flag in (False, True))
    assert grpo == pytest.approx([0.6, 0.6, -0.4, -0.4, -0.4])
    assert pass_k == [0, 0, 0, 0, 0]  # two are right, so none of them adds anything
    assert mi == pytest.approx([0.9, 0.3, -0.1, -0.7, -0.4])
    assert gated == pytest.approx([0.24, -0.06, -0.06, -0.06, -0.06])  # a right one never behind a wrong one
    gate_alone = am.arm_advantages(r_correct, r_mi, False, True)[0].tolist()
    assert gate_alone == pytest.approx([0.84, 0.54, -0.46, -0.46, -0.46])
    assert am.arm_advantages(torch.tensor([[1.0, 0, 0, 0, 0]]), none, True, False)[0].tolist() == [1, 0, 0, 0, 0]


def test_exact_kl(model):
    _, _, logits = sampled(model, random_prompts(2), 3)
    mine = am.branch_logps(logits.detach(), 3, 1.0)
    theirs = am.branch_logps(logits.detach().flip(0), 3, 1.0)
    kl = am.exact_kl(mine, theirs)
    assert torch.equal(am.exact_kl(mine, mine), torch.zeros(2, 3)) and (kl > 0).all()
    categorical = lambda logps: torch.distributions.Categorical(logits=logps)
    divergence = lambda p, q: torch.distributions.kl_divergence(categorical(p), categorical(q))
    for b, j in itertools.product(range(2), range(3)):
        parts = [(x[b], y[b]) for x, y in zip(mine, theirs)]
        expected = divergence(*parts[0]) + divergence(parts[1][0][j], parts[1][1][j])
        assert torch.allclose(kl[b, j], expected + divergence(parts[2][0][j], parts[2][1][j]), atol=1e-5)


# ---- Information and bounds ------------------------------------------------------------------------------------------
def random_branches(N, sharpness, seed):
    """Branches of P = 40 random problems: [P, N, 10], [P, N, 10, 5], [P, N, 50, 10], and which answers are right."""
    torch.manual_seed(seed)
    shapes = (40, N, 10), (40, N, 10, 5), (40, N, 50, 10)
    branches = [(sharpness * torch.randn(shape, dtype=torch.double)).log_softmax(-1) for shape in shapes]
    return branches, torch.rand(40, 500) < torch.rand(40, 1)


def test_skills_that_do_not_matter_have_no_information():
    branches, correct = random_branches(5, 2.0, 0)
    branches = [branch[:, :1].expand_as(branch) for branch in branches]
    figures = am.exact_figures(branches, correct)
    for key in "skill/mi", "skill/mi_token", "skill/mi_correct":
        assert figures[key].abs().max() < 1e-12
    assert torch.allclose(figures["eval/pass@5"], figures["eval/iid_pass@5"])
    assert figures["skill/z_decoded"].mean().item() == pytest.approx(1 / 5)


def test_skills_that_share_no_token_have_all_of_it():
    """Every other skill gives about 0 to every token: I = ln N, while the token form counts ln N three times."""
    branches = [torch.full(shape, -80.0) for shape in ((1, 5, 10), (1, 5, 10, 5), (1, 5, 50, 10))]
    for z in range(5):
        for branch in branches:
            branch[0, z, ..., z] = 0
    figures = am.exact_figures([branch.log_softmax(-1) for branch in branches], torch.zeros(1, 500).bool())
    assert figures["skill/mi"].item() == pytest.approx(math.log(5))
    assert figures["skill/mi_token"].item() == pytest.approx(3 * math.log(5))
    assert figures["skill/z_decoded"].item() == pytest.approx(1)
    assert figures["eval/entropy"].item() == pytest.approx(0, abs=1e-6)


def test_one_skill_and_one_token():
    branches, correct = random_branches(1, 2.0, 0)
    figures = am.exact_figures(branches, correct)
    assert figures["skill/mi"].abs().max() < 1e-12 and figures["skill/mi_token"].abs().max() < 1e-12
    branches, correct = random_branches(3, 2.0, 0)
    branches[1:] = [torch.zeros_like(branch).log_softmax(-1) for branch in branches[1:]]  # only the left digit differs
    figures = am.exact_figures(branches, correct)
    assert torch.allclose(figures["skill/mi"], figures["skill/mi_token"], atol=1e-12)


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 20.0])
def test_figures_by_hand_and_chain_rule(sharpness):
    """All figures again by loops over z; E[token form] = I + sum_t E KL(posterior mixture || uniform mixture)."""
    branches, correct = random_branches(4, sharpness, 1)
    figures = am.exact_figures(branches, correct)
    left, operator, right = (branch.exp() for branch in branches)
    for problem in range(0, 40, 13):
        a, o, b = left[problem], operator[problem], right[problem].view(4, 10, 5, 10)
        p = a[:, :, None, None] * o[..., None] * b  # [N, 10, 5, 10]
        mixture = p.mean(0)
        ratio = lambda x, y: torch.where(x > 0, x * (x / y).log(), 0.0).sum()
        information = sum(ratio(p[z], mixture) for z in range(4)) / 4
        assert figures["skill/mi"][problem].item() == pytest.approx(information.item(), abs=1e-9)
        first, second = mixture.sum((1, 2)), mixture.sum(2)  # P(left), P(left, operator)
        excess = ratio(first, a.mean(0))
        excess += sum(first[i] * ratio(second[i] / first[i], o.mean(0)[i]) for i in range(10))
        for i, j in itertools.product(range(10), range(5)):
            excess += second[i, j] * ratio(mixture[i, j] / second[i, j], b.mean(0)[i, j])
        token = figures["skill/mi_token"][problem].item()
        assert token == pytest.approx((information + excess).item(), abs=1e-9) and excess > 0
        right_chance = (p.view(4, 500) * correct[problem]).sum(1)
        assert figures["skill/accuracy"][problem].tolist() == pytest.approx(right_chance.tolist())
        assert figures["eval/pass@1"][problem].item() == pytest.approx(right_chance.mean().item())
        assert figures["eval/pass@4"][problem].item() == pytest.approx(1 - (1 - right_chance).prod().item())
        decoded = p.view(4, 500).argmax(0)
        assert figures["skill/z_decoded"][problem].item() == pytest.approx(
            sum(p.view(4, 500)[z, y].item() for y, z in enumerate(decoded.tolist())) / 4
        )
        assert torch.allclose(figures["skill/operators"][problem], p.sum((1, 3)))


@pytest.mark.parametrize("N", [2, 3, 5, 10])
def test_what_information_bounds(N):
    """What N distinct skills gain over N draws of a random one, I_C being I(correctness; z) <= I(y; z) <= ln N:
    qbar^N (1 - exp(-N/2 pbar qbar I_C)) <= gain <= N sqrt(I_C / 2)."""
    for seed, sharpness in itertools.product(range(10), (0.1, 0.5, 1.5, 4.0, 30.0)):
        figures = am.exact_figures(*random_branches(N, sharpness, seed))
        gain = figures[f"eval/pass@{N}"] - figures[f"eval/iid_pass@{N}"]
        p, i_c, i = figures["eval/pass@1"], figures["skill/mi_correct"], figures["skill/mi"]
        slack = 1e-12
        assert (gain >= (1 - p) ** N * (1 - (-N / 2 * p * (1 - p) * i_c).exp()) - slack).all()
        assert (gain <= N * (i_c / 2).clamp(min=0).sqrt() + slack).all()
        assert (i_c <= i + slack).all() and (i <= math.log(N) + slack).all()
        assert (i <= figures["skill/mi_token"] + slack).all()
        if N == 2:
            variance = figures["skill/accuracy"].var(-1, correction=0)
            assert torch.allclose(gain, variance, atol=1e-10)
            assert (p * (1 - p) * i_c <= gain + slack).all() and (gain <= i_c / 2 + slack).all()


def test_evaluation_is_the_mean_over_problems(task, model):
    """Chunks and chances: against exact_figures of one problem at a time."""
    digits, chance, correct, _ = task
    few = torch.arange(0, 416, 20)  # 21 problems, more than are computed at a time
    evaluate = lambda part, chance: am.evaluate_exactly(model, digits[part], correct[part], chance, 5, 0.9)
    got = evaluate(few, chance[few])
    each = [evaluate(few[i : i + 1], torch.ones(1).double()) for i in range(len(few))]
    for key in got:
        expected = sum(chance[few[i]] * torch.tensor(figures[key]).double() for i, figures in enumerate(each))
        assert torch.allclose(torch.tensor(got[key]).double(), expected, atol=1e-6)


def test_interval_and_table():
    mean, half = am.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert am.interval([5.0])[0] == 5 and math.isnan(am.interval([5.0])[1])
    keys = ("eval/pass@1", "eval/pass@2", "eval/iid_pass@2", "skill/mi", "skill/mi_token")
    records = [
        {"arm": arm} | dict.fromkeys(keys, value) for arm, value in (("a", 0.1), ("a", 0.3), ("b", 0.5), ("b", 0.8))
    ]
    lines = am.results_table(records, ["a", "b"], 2).splitlines()
    for line, name, values in zip(lines[1:], ("a", "b", "b - a"), ([0.1, 0.3], [0.5, 0.8], [0.4, 0.5])):
        mean, half = am.interval(values)  # of differences seed by seed
        assert re.fullmatch(rf"{name} +({mean:.3f} ± {half:.3f} *){{5}}", line)


# ---- Runs ------------------------------------------------------------------------------------------------------------
def records(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def finished(folder, *arguments):
    process = training("--output-dir", folder, *arguments, command=RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def without_clock(folder):
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records(folder)]


def test_figure_4_begins(tmp_path):
    """GRPO gets better and skills stay alike; MI makes them differ; pass-k keeps pass@5 up; a heavy KL holds back."""
    real = "--imitation-steps", 100, "--questions-per-step", 32, "--num-steps", 120
    output = finished(tmp_path, *real, "--arms", "mi", "grpo", "pass-k")
    start, end = ({r["arm"]: r for r in records(tmp_path) if r["step"] == step} for step in (0, 120))
    assert {arm: record["eval/pass@1"] for arm, record in start.items()} == dict.fromkeys(
        ("grpo", "pass-k", "mi"), pytest.approx(start["mi"]["eval/pass@1"], abs=1e-4)
    )
    assert 0.28 < start["mi"]["eval/pass@1"] < 0.42 and 0.6 < start["mi"]["eval/pass@5"] < 0.8
    assert end["grpo"]["eval/pass@1"] > start["grpo"]["eval/pass@1"] + 0.2
    assert abs(end["grpo"]["eval/pass@5"] - end["grpo"]["eval/pass@1"]) < 0.05 and end["grpo"]["skill/mi"] < 0.05
    assert end["mi"]["skill/mi"] > 1 and end["mi"]["eval/pass@1"] < end["grpo"]["eval/pass@1"] - 0.2
    assert end["pass-k"]["eval/pass@5"] > end["grpo"]["eval/pass@5"] + 0.05
    assert re.search(r"^mi +0\.\d+ +0\.\d+ ", output, re.MULTILINE)
    assert re.search(r"^pass-k - grpo +-0\.\d+ +0\.\d+", output, re.MULTILINE)
    assert (tmp_path / "run" / "table.txt").read_text() in output

    finished(tmp_path / "held", *real, "--arms", "grpo", "--kl-coef", 20, "--max-z", 2)
    begun, held = records(tmp_path / "held")
    free = end["grpo"]["eval/pass@1"] - start["grpo"]["eval/pass@1"]
    assert held["losses/kl"] < 0.05 and abs(held["eval/pass@1"] - begun["eval/pass@1"]) < free / 2

    figure = [sys.executable, ROOT / "benchmark" / "arithmetic_figure.py", tmp_path / "run" / "metrics.jsonl"]
    subprocess.run(figure, check=True)
    assert (tmp_path / "run" / "figure4.png").read_bytes().startswith(b"\x89PNG")


def test_options(tmp_path):
    options = ["--max-z", 3, "--group-size", 2, "--seed", 5, "--beta", 0.3]
    finished(tmp_path, "--arms", "gated-mi", "mi", "--gated-advantage", "mean", *options)
    assert [(r["arm"], r["seed"], r["step"]) for r in records(tmp_path)] == [
        ("gated-mi", 5, 0), ("mi", 5, 0), ("gated-mi", 5, 6), ("mi", 5, 6)
    ]  # fmt: skip
    for last in records(tmp_path)[2:]:
        assert all(math.isfinite(x) for x in last.values() if isinstance(x, float))
        assert len(last["skill/accuracy"]) == 3 and 0 < last["eval/pass@3"] <= 1


def test_other_seeds_and_arms_do_not_change_a_run(tmp_path):
    options = "--gated-alpha", 2, "--imitation-steps", 0, "--max-z", 2
    alone = {}
    for arm, seed in ("mi", 2), ("gated-mi", 1):
        finished(tmp_path / arm, "--arms", arm, "--seed", seed, *options)
        alone |= {(record["arm"], record["seed"], record["step"]): record for record in records(tmp_path / arm)}
    finished(tmp_path / "many", "--arms", "gated-mi", "mi", "--seed", 1, "--num-seeds", 2, *options)
    many = {(record["arm"], record["seed"], record["step"]): record for record in records(tmp_path / "many")}
    assert len(many) == 2 * 2 * 2 and len(alone) == 2 * 2
    for run, record in alone.items():
        if run[2] == 0:
            assert record["eval/pass@1"] == pytest.approx(0.0081, abs=0.004)  # nothing learned: chance
        for key in "eval/pass@1", "eval/pass@2", "skill/mi", "losses/grad_norm", "skill/mi_reward":
            assert record.get(key) == many[run].get(key)


def test_killed_stopped_and_started_again(tmp_path):
    options = ["--num-steps", 30, "--eval-every", 20, "--save-every", 3, "--kl-coef", 0.05, "--max-z", 2]
    options += ["--arms", "grpo", "gated-mi"]
    finished(tmp_path / "never", *options)
    folder = tmp_path / "killed"
    checkpoint = folder / "run" / "checkpoint.pt"
    for number in signal.SIGKILL, signal.SIGTERM:
        process = training("--output-dir", folder, *options, command=RUN)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM and "--run-name run goes on from there" in output
    finished(folder, *options, "--save-every", 10)
    assert without_clock(folder) == without_clock(tmp_path / "never")
    mine, theirs = (torch.load(f / "run" / "checkpoint.pt", weights_only=True) for f in (folder, tmp_path / "never"))
    for part, i in itertools.product(("models", "references"), range(2)):
        assert all(torch.equal(mine[part][i][name], theirs[part][i][name]) for name in theirs[part][i])
    assert "95 % t-interval" in (again := finished(folder, *options)) and "is complete" in again
    (folder / "run" / "table.txt").unlink()  # as if it had been stopped just before the end: nothing is done twice
    finished(folder, *options)
    assert without_clock(folder) == without_clock(tmp_path / "never")

    written = set().union(*map(set, records(folder))) - {"step", "arm", "seed"}
    written = {re.sub(r"@(?!1$)\d+", "@N", key) for key in written}
    assert written == documented("arithmetic_misl.md")


ARGUMENTS = {
    "twice": (["--arms", "mi", "mi"], "--arms needs at least one arm, and none of them twice"),
    "none": (["--arms"], "--arms needs at least one arm"),
    "too many skills": (["--max-z", 11], "--max-z 11 must be 2 to 10"),
    "one skill": (["--max-z", 1], "--max-z 1 must be 2 to 10"),
    "greedy": (["--temperature", 0], "--temperature is 0.0; it must be over 0"),
    "group of one": (["--group-size", 1], "--group-size 1 must be at least 2"),
    "negative": (["--kl-coef", -1], "--kl-coef is -1.0; it must be at least 0"),
    "infinite": (["--lr", "inf"], "--lr is inf; it must be a finite number"),
}


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.replace(" ", "_"))
def test_arguments(case, capsys, monkeypatch, tmp_path):
    arguments, message = ARGUMENTS[case]
    assert message in stop_message(capsys, monkeypatch, tmp_path, *arguments, command=RUN)
    assert not (tmp_path / "runs").exists()


def test_run_folders(tmp_path):
    folder = tmp_path / "run"

    def stop(*arguments):
        process = training("--output-dir", tmp_path, "--arms", "grpo", *arguments, command=RUN)
        output = process.communicate()[0]
        assert process.returncode == 1
        return output

    folder.mkdir()
    (folder / "something").touch()
    assert "exists and holds no run; choose another --run-name" in stop()
    (folder / "something").unlink()
    message = stop("--lr", 1e30)
    assert "the gradient norm of arm grpo, seed 0 is nan; lower --lr or a weight in a new run" in message
    assert f"error: --lr of {folder} was 1e+30, not 0.0005; choose another --run-name." in stop()
    (folder / "checkpoint.pt").write_text("torn")
    message = stop("--lr", 1e30)
    assert "checkpoint.pt cannot be read; delete it to start the run again" in message

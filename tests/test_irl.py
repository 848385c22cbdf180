"""irl_imitation.py: V, Q and loss against hand-computable cases, bounds, rewards, Self-BLEU, calculator, errors."""

import inspect
import json
import math
import os
import pathlib
import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import IRL_RUN, ROOT, TOY, stop_message
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import irl_imitation
from benchmark.irl_rewards import plot_rewards
from eval_gsm8k import extract_answer, to_number
from grpo_upskill import Policy
from irl_imitation import (
    Args,
    ValuePolicy,
    answer_figures,
    imitation_loss,
    micro_batches,
    pad_batch,
    score_answers,
    self_bleu,
    token_rewards,
    with_calculation,
)

CASES = json.loads((pathlib.Path(__file__).parent / "cases" / "irl_cases.json").read_text())
GSM8K = pathlib.Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "data" / "gsm8k")) / "train.jsonl"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(irl_imitation, "HEAD_CHUNK", 2)


def stub(logits):
    """A policy whose head gives `logits` [B, T, vocabulary] of the state at every position."""
    policy = ValuePolicy.__new__(ValuePolicy)
    torch.nn.Module.__init__(policy)
    policy.model = SimpleNamespace(
        base_model=lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=logits),
        get_output_embeddings=lambda: torch.nn.Identity(),
    )
    return policy


def run_stub(logits, ids, prompt_lens, lengths, terminal, start_logits=None):
    """Forward pass of the stub, with the KL to a start that has start_logits."""
    inputs = ids, prompt_lens, lengths, terminal
    start = ()
    if start_logits is not None:
        start = torch.nn.Identity(), stub(start_logits)(*inputs, states_only=True)
    return stub(logits)(*inputs, *start)


def batch(cases):
    """ids [B, T], logits [B, T, V], prompt lengths, completion lengths, terminal of cases with rows of logits.

    Row t is the state in which actions[t] is taken, so position t; a first token stands before all; masked rows in
    front belong to the prompt, behind to the padding, and behind the last row stands the bootstrap row or garbage.
    """
    width = 1 + max(len(case["logits"]) for case in cases)
    ids, logits = torch.zeros(len(cases), width).long(), torch.full((len(cases), width, 3), 7.0)
    lens, terminal = [], []
    for k, case in enumerate(cases):
        mask = case.get("mask") or [1] * len(case["actions"])
        ids[k, 1 : 1 + len(mask)] = torch.tensor(case["actions"])
        logits[k, : len(mask)] = torch.tensor(case["logits"])
        end = len(mask) - mask[::-1].index(1)
        if case.get("bootstrap_logits"):
            logits[k, end] = torch.tensor(case["bootstrap_logits"])
        lens.append((1 + mask.index(1), sum(mask)))
        terminal.append(case.get("terminal", True))
    return ids, logits.requires_grad_(), *torch.tensor(lens).T, torch.tensor(terminal)


def loss_of(cases, gamma, lambda_td, online=None, alpha=0.0, shift=0.0, **options):
    """(loss, rewards [B, C], the logits that it depends on)."""
    ids, logits, prompt_lens, lengths, terminal = batch(cases)
    columns = run_stub(logits, ids, prompt_lens, lengths, terminal)
    online = torch.zeros(len(cases)).bool() if online is None else torch.tensor(online)
    tokens = [int(lengths[online == who].sum()) for who in (False, True)]
    args = Args(gamma=gamma, lambda_td=lambda_td, online_alpha=alpha, **options)
    loss, _ = imitation_loss(*columns, lengths, terminal, online, *tokens, args, shift)
    values, q_values = (column.detach().double() - shift for column in columns[:2])
    return loss, token_rewards(values, q_values, lengths, terminal, gamma), logits


# ---- the loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_cases(case):
    if case["name"] == "truncated_drop":  # V behind the cut is always at hand here: the one that gives no reward
        last = case["logits"][-1][case["actions"][-1]]  # = Q of the last token, from logits [Q - ln 3] * 3
        case = case | {"bootstrap_logits": [last - math.log(3)] * 3}
    expected, gamma, weight = case["expected"], case["gamma"], case["lambda_td"]
    mle, _, _ = loss_of([case], gamma, 0.0)
    both, rewards, _ = loss_of([case], gamma, 1.0)
    assert mle.item() == pytest.approx(expected["mle"], abs=1e-6)
    assert (both - mle).item() == pytest.approx(expected["td"], abs=1e-5)
    ours = rewards[0, : sum(case["mask"])].tolist()
    kept = [x for x, used in zip(case["detail"]["reward"], case["mask"]) if used]
    dropped = case["name"] == "truncated_drop"
    assert ours[: len(ours) - dropped] == pytest.approx(kept[: len(ours) - dropped], abs=1e-6)
    total, _, logits = loss_of([case], gamma, weight)
    assert total.item() == pytest.approx(expected["total"], abs=1e-6)
    if "grad_logits" in expected:
        total.backward()
        rows, used = len(case["mask"]), torch.tensor(case["mask"]).bool()
        gradient = logits.grad[0]
        torch.testing.assert_close(
            gradient[:rows][used], torch.tensor(expected["grad_logits"])[used], atol=2e-6, rtol=0
        )
        assert (gradient[:rows][~used] == 0).all()
        if "grad_bootstrap_logits" in expected:
            assert gradient[rows].tolist() == pytest.approx(expected["grad_bootstrap_logits"], abs=2e-6)
        elif not dropped:
            assert (gradient[rows:] == 0).all()


def test_monitor_values():
    """V, Q, entropy of every unmasked row, and the sums of the log."""
    for case in CASES["cases"]:
        ids, logits, prompt_lens, lengths, terminal = batch([case])
        columns = [x.detach() for x in run_stub(logits, ids, prompt_lens, lengths, terminal)]
        v, q, entropy, _ = (column[0] for column in columns)
        detail, n = case["detail"], int(lengths)
        unmasked = [k for k, x in enumerate(case["mask"]) if x]
        assert v[:n].tolist() == pytest.approx([detail["V"][k] for k in unmasked], abs=1e-6)
        assert q.tolist() == pytest.approx([detail["Q"][k] for k in unmasked], abs=1e-6)
        monitor = detail["monitor"]
        means = {"chosen_q_mean": q, "value_mean": v[:n], "log_pi_mean": q - v[:n], "entropy_mean": entropy}
        for key, x in means.items():
            assert x.mean().item() == pytest.approx(monitor[key], abs=1e-6), (case["name"], key)
        assert (v[n].item() == 0) == case["terminal"]
        args = Args(gamma=case["gamma"])
        _, sums = imitation_loss(*columns, lengths, terminal, torch.tensor([False]), n, 0, args, 3.0)
        assert sums["irl/value"].item() / n == pytest.approx(monitor["value_mean"], abs=1e-6)  # as the model gives it
        assert sums["irl/entropy"].item() / n == pytest.approx(monitor["entropy_mean"], abs=1e-6)
        assert sums["losses/mle"].item() / n == pytest.approx(-monitor["log_pi_mean"], abs=1e-6)
        _, sums = imitation_loss(*columns, lengths, terminal, torch.tensor([False]), n, 0, args, 0.0)
        if case["name"] != "truncated_drop":
            assert sums["losses/td"].item() / n == pytest.approx(case["expected"]["td"], abs=1e-5)
            last = detail["reward"][unmasked[-1]] ** 2 if case["terminal"] else 0.0
            assert sums["irl/td_terminal"].item() == pytest.approx(last, abs=1e-5)


def test_batch_is_normalised_by_its_tokens_and_rows_do_not_touch():
    cases = CASES["batch"]["seqs"]
    for weight, key in (0.0, "mle"), (0.1, "total"):
        loss, _, _ = loss_of(cases, 1.0, weight)
        assert loss.item() == pytest.approx(CASES["batch"]["token_mean"][key], abs=1e-6)
        split = 0.0
        for case in cases:  # two micro-batches, each divided by the tokens of both
            ids, logits, prompt_lens, lengths, terminal = batch([case | {"terminal": True}])
            columns = run_stub(logits, ids, prompt_lens, lengths, terminal)
            args, online = Args(lambda_td=weight), torch.tensor([False])
            split += imitation_loss(*columns, lengths, terminal, online, 5, 0, args, 0.0)[0].item()
        assert split == pytest.approx(CASES["batch"]["token_mean"][key], abs=1e-6)


@pytest.mark.parametrize("alpha, key", [(0.25, "total"), (0.0, "total_alpha0")])
def test_online(alpha, key):
    case = CASES["online"]
    loss, _, _ = loss_of([case["expert"], case["policy"]], 1.0, 0.1, [False, True], alpha)
    assert loss.item() == pytest.approx(case[key], abs=1e-6)


def test_online_loss_is_bounded():
    """-alpha / (4 lambda (1 - alpha)) at least, however large the logits."""
    torch.manual_seed(0)
    lows = []
    for scale in (0.3, 1.0, 10.0) * 200:
        cases = [{"logits": (scale * torch.randn(n, 3)).tolist(), "actions": [0, 1, 2, 1][:n]} for n in (1, 3, 4, 2)]
        loss, _, _ = loss_of(cases, 1.0, 0.5, [False, False, True, True], 0.5)
        lows.append(loss.item())
    assert -0.5 <= min(lows) < 5


def test_exact_kl_and_its_gradient():
    case = CASES["kl"]
    ids, logits, *rest = batch([case])
    ref = torch.full_like(logits, 7.0).detach()
    ref[0, :3] = torch.tensor(case["ref_logits"])
    kl = run_stub(logits, ids, *rest, start_logits=ref)[3]
    assert kl[0].tolist() == pytest.approx(case["exact_kl_per_token"], abs=1e-6)
    kl.sum().backward()
    log_p = logits.detach()[0, :3].log_softmax(-1)
    gap = log_p - ref[0, :3].log_softmax(-1)
    by_hand = log_p.exp() * (gap - (log_p.exp() * gap).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad[0, :3], by_hand, atol=1e-6, rtol=0)


def test_gradient_formula():
    """dL/dz_t = 1/N [(1 - 2 lambda gamma r_t-1) pi_t - (1 - 2 lambda r_t) e_a]."""
    torch.manual_seed(0)
    gamma, weight, n = 0.9, 0.3, 5
    case = {"logits": torch.randn(n, 3).tolist(), "actions": [0, 2, 1, 1, 0]}
    loss, rewards, logits = loss_of([case], gamma, weight)
    loss.backward()
    r = rewards[0].float()
    before = torch.cat([torch.zeros(1), r[:-1]])
    one_hot = torch.nn.functional.one_hot(torch.tensor(case["actions"]), 3)
    by_hand = (1 - 2 * weight * gamma * before)[:, None] * logits.detach()[0, :n].softmax(-1)
    by_hand = (by_hand - (1 - 2 * weight * r)[:, None] * one_hot) / n
    torch.testing.assert_close(logits.grad[0, :n], by_hand, atol=1e-6, rtol=0)


def test_shift():
    """At gamma 1 it changes the last reward alone; with gamma below 1 all of them."""
    case = CASES["identity"] | {"terminal": True}
    for gamma, difference in (1.0, [0, 0, -2.0]), (0.9, [-0.2, -0.2, -2.0]):
        (_, shifted, _), (_, plain, _) = (loss_of([case], gamma, 0.1, shift=shift) for shift in (2.0, 0.0))
        assert (shifted - plain).tolist() == [pytest.approx(difference, abs=1e-6)]


# ---- a real model ----------------------------------------------------------------------------------------------------
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]
COMPLETIONS = [[14, 15], [16, 17, 18, 19, 2], [20], [21, 22, 23, 2]]
TERMINAL = [False, True, False, True]


def tiny_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).train()


@pytest.fixture
def tiny_policy(tmp_path):
    """A function that makes a policy of random weights, always the same."""

    def make(lora_r=0):
        tiny_model().save_pretrained(tmp_path / "tiny")
        torch.manual_seed(0)
        return ValuePolicy(str(tmp_path / "tiny"), torch.float32, lora_r, lora_alpha=8)

    return make


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def inputs_of(prompts, completions, terminal, pad_id=0):
    return [*pad_batch(prompts, completions, pad_id), torch.tensor(terminal)]


def test_what_policy_and_value_policy_share():
    """Only forward pass and head differ from grpo_upskill.py's Policy."""
    for name in ("__init__", "shard", "merged_weights"):
        assert inspect.getsource(getattr(ValuePolicy, name)) == inspect.getsource(getattr(Policy, name))
    assert inspect.getsource(ValuePolicy.base.fget) == inspect.getsource(Policy.base.fget)


def test_values_against_full_logits(tiny_policy, monkeypatch):
    """V, Q, entropy in chunks, with padding, equal those of each sequence alone with all its logits."""
    policy = tiny_policy()
    for head_chunk, pad_id in (1, 0), (3, 50), (1000, 14):
        monkeypatch.setattr(irl_imitation, "HEAD_CHUNK", head_chunk)
        columns = policy(*inputs_of(PROMPTS, COMPLETIONS, TERMINAL, pad_id))
        for k, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
            z = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :].float()
            n, log_p = len(completion), z[:-1].log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            v = z.logsumexp(-1) * torch.tensor([True] * n + [not TERMINAL[k]])
            full = [v, z[torch.arange(n), completion], entropy, torch.zeros(n)]
            for ours, expected in zip(columns, full, strict=True):
                torch.testing.assert_close(ours[k, : len(expected)], expected, atol=1e-5, rtol=1e-5)
                assert (ours[k, len(expected) :] == 0).all()
    columns[2].sum().backward()  # only train_entropy gives the entropy a gradient
    assert not gradient(policy).any()


@pytest.mark.parametrize("lambda_td", [0.0, 0.3])
def test_lambda_0_is_plain_sft_and_the_split_changes_nothing(lambda_td, tiny_policy):
    """With lambda 0 loss and gradients are those of transformers' own cross-entropy with masked prompt labels."""
    policy, tokens = tiny_policy(), sum(map(len, COMPLETIONS))
    ids = pad_batch(PROMPTS, COMPLETIONS, 0)[0]
    labels = torch.full_like(ids, -100)
    for row, prompt, completion in zip(labels, PROMPTS, COMPLETIONS):
        row[len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    logits = policy.model(input_ids=ids).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert policy.model(input_ids=ids, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-6)
    expected.backward()
    plain, reference, totals = gradient(policy), None, []
    for max_tokens in (1, 9, 1000):
        policy.zero_grad()
        total = 0.0
        for micro in micro_batches([len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS)], max_tokens):
            parts = [[column[i] for i in micro] for column in (PROMPTS, COMPLETIONS, TERMINAL)]
            inputs, online = inputs_of(*parts, pad_id=5), torch.zeros(len(micro)).bool()
            columns = policy(*inputs)
            args = Args(lambda_td=lambda_td)
            loss, _ = imitation_loss(*columns, *inputs[2:], online, tokens, 0, args, 0.0)
            loss.backward()
            total += loss.item()
        totals.append(total)
        reference = gradient(policy) if reference is None else reference
        torch.testing.assert_close(gradient(policy), reference, atol=1e-6, rtol=1e-4)
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-5)
    if not lambda_td:
        assert totals[0] == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(reference, plain, atol=1e-6, rtol=1e-4)
    else:
        assert (reference - plain).abs().max() > 1e-2


def test_entropy_bonus_has_the_entropy_s_gradient(tiny_policy):
    policy = tiny_policy()
    columns = policy(*inputs_of(PROMPTS, COMPLETIONS, TERMINAL), train_entropy=True)
    columns[2].sum().backward()
    ours = gradient(policy)
    policy.zero_grad()
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)
        (-(log_p.exp() * log_p).sum()).backward()
    torch.testing.assert_close(ours, gradient(policy), atol=2e-5, rtol=1e-3)


def test_entropy_and_kl_weigh_the_demonstrations_only():
    """lambda_kl KL - entropy_coef H, means over the demonstrations' tokens; own answers have no part in them."""
    entropy, kl = torch.tensor([[1.0, 2.0], [5.0, 7.0]]), torch.tensor([[0.5, 0.1], [9.0, 9.0]])
    columns = torch.zeros(2, 3), torch.zeros(2, 2), entropy, kl
    lengths, terminal, online = torch.tensor([2, 2]), torch.tensor([True, True]), torch.tensor([False, True])
    args = Args(entropy_coef=0.3, lambda_kl=0.2)
    loss, sums = imitation_loss(*columns, lengths, terminal, online, 2, 2, args, 0.0)
    assert loss.item() == pytest.approx(0.2 * 0.6 / 2 - 0.3 * 3.0 / 2, abs=1e-6)
    assert sums["losses/kl"].item() == pytest.approx(0.6) and sums["irl/entropy"].item() == pytest.approx(3.0)


def test_no_tensor_of_all_tokens_times_vocabulary_is_kept(tiny_policy, monkeypatch):
    monkeypatch.setattr(irl_imitation, "HEAD_CHUNK", 16)
    policy, kept = tiny_policy(), []
    inputs = inputs_of([[3] * 5] * 8, [[4] * 20] * 8, [True] * 8)  # 160 tokens, 97 words
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        values, chosen, entropy, _ = policy(*inputs, train_entropy=True)
    assert all(len(shape) < 2 or shape[-1] != 97 or shape[0] <= 16 for shape in kept)
    (values.sum() + chosen.sum() + entropy.sum()).backward()


def test_reference_of_lora_is_the_model_without_adapters(tiny_policy):
    policy, start = tiny_policy(lora_r=4), tiny_policy()
    inputs = inputs_of(PROMPTS, COMPLETIONS, TERMINAL)

    def kl_to(reference):
        with torch.no_grad(), policy.model.disable_adapter():
            states = reference(*inputs, states_only=True)
        return policy(*inputs, reference.base.get_output_embeddings(), states)[3]

    assert kl_to(policy).abs().max() < 1e-5
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    kl = kl_to(policy)
    torch.testing.assert_close(kl, kl_to(start), atol=1e-5, rtol=1e-4)
    assert kl.max() > 0.01 and (kl > -1e-5).all()
    kl.sum().backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if "lora_" in n)
    assert all(p.grad is None for p in start.parameters())


# ---- the original's defects ------------------------------------------------------------------------------------------
def original_loss(logits, ref_logits, actions, mask, gamma, lambda_td, lambda_kl):
    """What sankyde/IRL computes: pads have Q = 0 and count like any token, and only the last column is terminal."""
    mask = torch.tensor(mask, dtype=logits.dtype)
    rows = torch.arange(len(actions))
    v, ref = logits.logsumexp(-1), ref_logits.log_softmax(-1)
    log_pi = logits[rows, actions] * mask - v
    v_next = torch.cat([v[1:], v.new_zeros(1)])
    nll, td = -log_pi.mean(), ((v + log_pi - gamma * v_next) ** 2).mean()
    kl = (log_pi - ref[rows, actions] * mask).mean()
    return nll, td, kl, nll + lambda_td * td + lambda_kl * kl


def test_original_s_loss_on_padded_rows_and_ours():
    case = CASES["repo_behaviour"]
    logits, ref = (torch.tensor(case[key], dtype=torch.double) for key in ("logits", "ref_logits"))
    parts = original_loss(logits, ref, case["actions"], case["mask"], 1.0, 0.1, 0.01)
    for key, x in zip(("nll", "td", "kl", "total"), parts):
        assert x.item() == pytest.approx(case["expected"][key], abs=1e-6)
    ours, _, _ = loss_of([case | {"terminal": True}], 1.0, 0.1)
    assert ours.item() == pytest.approx(case["without_pads_and_kl"]["total"], abs=1e-6)


def test_values_stay_bounded_over_a_long_run():
    """Trained alike for 4,000 steps, the original's loss falls below 0 and its values run away; ours settles."""
    actions, mask = [0, 1, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0]
    ends = {}
    for name in ("original", "ours"):
        torch.manual_seed(0)
        z = torch.randn(6, 3, dtype=torch.double).requires_grad_()
        optimizer, history = torch.optim.Adam([z], 0.05), []
        for _ in range(4000):
            if name == "original":
                loss = original_loss(z, torch.zeros_like(z), actions, mask, 1.0, 0.1, 0.0)[3]
            else:  # the row is padded to the same length: positions 3 to 5 hold whatever
                logits = torch.cat([z, z[:1]])[None].float()
                ids = torch.tensor([[0, *actions]])
                lens = torch.tensor([1]), torch.tensor([3]), torch.tensor([True])
                columns = run_stub(logits, ids, *lens)
                loss = imitation_loss(*columns, *lens[1:], torch.tensor([False]), 3, 0, Args(), 0.0)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append((loss.item(), z.logsumexp(-1)[:3].abs().max().item()))
        ends[name] = history
    assert ends["original"][-1][0] < -5 and ends["original"][-1][1] > 30
    assert ends["original"][-1][1] > 1.5 * ends["original"][2000][1]  # and on it goes
    losses, values = zip(*ends["ours"])
    assert min(losses) > 0 and max(values) < 10
    assert values[-1] == pytest.approx(values[-1000], abs=0.2)


def test_rewards_are_bounded_at_the_optimum():
    """1.3: r <= 1 / (2 lambda), pi / p_E = (1 - 2 lambda r) / (1 - 2 lambda r_before); rare tokens are raised."""
    weight, p = 0.5, torch.tensor([0.9, 0.09, 0.01], dtype=torch.double)
    z = torch.zeros(3, dtype=torch.double, requires_grad=True)  # one step, then the end
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = (p * (z.logsumexp(0) - z + weight * z**2)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    pi, r = z.detach().softmax(0), z.detach()
    torch.testing.assert_close(pi / p, 1 - 2 * weight * r, atol=1e-5, rtol=1e-5)
    assert (r <= 1 / (2 * weight)).all() and pi[2] > p[2]


# ---- rewards and what they are good for ------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_telescoping_identity(gamma):
    """sum gamma^t r_t = sum gamma^t log pi_t + V_0 - gamma^T V_T, with V_T = 0 behind an end token."""
    case = CASES["identity"]
    z = torch.tensor(case["logits"], dtype=torch.double)
    values, chosen = torch.cat([z.logsumexp(1), torch.zeros(1)]), z[range(3), case["actions"]]
    rewards = token_rewards(values[None], chosen[None], torch.tensor([3]), torch.tensor([True]), gamma)[0]
    known = case["gamma1" if gamma == 1 else "gamma09"]
    weights = gamma ** torch.arange(3, dtype=torch.double)
    expected = known["sum_reward" if gamma == 1 else "disc_sum_reward"]
    assert (weights * rewards).sum().item() == pytest.approx(expected, abs=1e-9)
    assert values[0].item() == pytest.approx(known["V0"], abs=1e-9)
    assert gamma != 1 or (chosen - values[:-1]).sum().item() == pytest.approx(known["sum_log_pi"], abs=1e-9)

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (50,), generator=generator)
    terminal = torch.randint(0, 2, (50,), generator=generator).bool()
    values = 5 * torch.randn(50, 9, generator=generator, dtype=torch.double)
    chosen = 5 * torch.randn(50, 8, generator=generator, dtype=torch.double)
    rewards = token_rewards(values, chosen, lengths, terminal, gamma)
    for n, ends, v, q, r in zip(lengths.tolist(), terminal, values, chosen, rewards):
        weights = gamma ** torch.arange(n, dtype=torch.double)
        right = (weights * (q - v[:-1])[:n]).sum() + v[0] - (0 if ends else gamma**n * v[n])
        assert (weights * r[:n]).sum().item() == pytest.approx(right.item(), abs=1e-9)
        assert (r[n:] == 0).all()


def test_rewards_of_loss_and_report_agree(tiny_policy):
    """score_answers gives each answer, in whatever micro-batch, the rewards that the loss squares, and its scores."""
    policy, tokens = tiny_policy(), sum(map(len, COMPLETIONS))
    rows = [{"prompt": p, "tokens": c, "terminal": t} for p, c, t in zip(PROMPTS, COMPLETIONS, TERMINAL)]
    args = Args(gamma=0.9, max_tokens_per_microbatch=12)
    scored = score_answers(policy, rows, args, 0, 1.5)
    inputs = inputs_of(PROMPTS, COMPLETIONS, TERMINAL)
    columns = policy(*inputs)
    mle = replace(args, lambda_td=0.0)
    losses = [
        imitation_loss(*columns, *inputs[2:], torch.zeros(4).bool(), tokens, 0, x, 1.5)[0].item() for x in (args, mle)
    ]
    squares = sum(r**2 for row in scored for r in row["rewards"])
    assert losses[0] - losses[1] == pytest.approx(0.1 * squares / tokens, abs=1e-5)
    for k, row in enumerate(scored):
        assert {name: row[name] for name in rows[k]} == rows[k]
        v, q, entropy = (column[k].detach().numpy() for column in columns[:3])
        n = len(COMPLETIONS[k])
        assert row["log_pis"] == pytest.approx(q[:n] - v[:n], abs=1e-5)
        assert row["entropies"] == pytest.approx(entropy[:n], abs=1e-5)
        last = 0.0 if TERMINAL[k] else v[n] - 1.5
        expected = q[:n] - 1.5 - 0.9 * np.append(v[1:n] - 1.5, last)
        assert row["rewards"] == pytest.approx(expected, abs=1e-5)
        assert row["sum"] == pytest.approx(expected.sum(), abs=1e-4) and row["mean"] == pytest.approx(row["sum"] / n)
        assert row["log_pi"] == pytest.approx(sum(row["log_pis"])) and row["v0"] == pytest.approx(v[0] - 1.5, abs=1e-5)
        assert row["mean_log_pi"] == pytest.approx(row["log_pi"] / n)


def test_answer_figures_by_loops():
    from scipy.stats import spearmanr

    rng, held_out, samples = random.Random(0), [], []
    for i in range(12):
        for k in range(6):
            row = {k: rng.randrange(6) for k in ("sum", "mean", "log_pi", "mean_log_pi")}
            row |= {name: [rng.random()] * rng.randrange(1, 4) for name in ("rewards", "log_pis", "entropies")}
            samples.append(row | {"id": i, "correct": rng.random() < 0.1 * i}) if k else held_out.append(row)
    figures = answer_figures(held_out, samples, 5)
    for label, rows in ("val", held_out), ("sample", samples):
        every = {name: sum((row[name] for row in rows), []) for name in ("rewards", "log_pis", "entropies")}
        assert figures[f"eval/{label}_mle"] == pytest.approx(-np.mean(every["log_pis"]))
        assert figures[f"eval/{label}_td"] == pytest.approx(np.mean(np.square(every["rewards"])))
        assert figures[f"eval/{label}_entropy"] == pytest.approx(np.mean(every["entropies"]))
    for score in ("sum", "log_pi"):
        groups, numbers = defaultdict(list), [row[score] for row in samples]
        for row in samples:
            groups[row["id"]].append(row)
        right = [row["correct"] for row in samples]
        assert figures[f"reward/{score}_spearman"] == pytest.approx(spearmanr(numbers, right)[0])
        aucs, best = [], []
        for group in groups.values():
            pairs = [(a[score], b[score]) for a in group for b in group if a["correct"] and not b["correct"]]
            aucs += [np.mean([(a > b) + (a == b) / 2 for a, b in pairs])] if pairs else []
            top = max(row[score] for row in group)
            best.append(np.mean([row["correct"] for row in group if row[score] == top]))
        assert figures[f"reward/{score}_auroc"] == pytest.approx(np.mean(aucs))
        assert figures[f"reward/{score}_best_of"] == pytest.approx(np.mean(best))
    for row in samples:
        row["correct"] = True
    figures = answer_figures(held_out, samples, 5)
    assert not {"reward/sum_spearman", "reward/sum_auroc"} & set(figures) and figures["reward/sum_best_of"] == 1
    json.dumps(figures, allow_nan=False)


def test_heat_map(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokens = tokenizer("$5\n$")["input_ids"]
    row = {"id": 1, "rewards": [0.5, -1.0, 0.0, 1.0][: len(tokens)], "tokens": tokens, "sum": -0.5}
    for k, kinds in enumerate(([True, False], [True], [False])):
        plot_rewards([row | {"correct": kind} for kind in kinds], tokenizer, tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").read_bytes()[:4] == b"\x89PNG"


def test_self_bleu():
    same, other = "a b c d e f", "u v w x y z"
    assert self_bleu([same] * 4, 4) == pytest.approx(1.0)
    assert self_bleu([same, other], 2) < 0.01
    assert self_bleu(["", ""], 2) == self_bleu(["7", "7", "7"], 3) == 1
    # "a b c d e" against "a b c d f": 4/5, 3/4, 2/3, 1/2 of its n-grams, equally long
    apart = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d e", "a b c d f"], 2) == pytest.approx(apart)
    assert self_bleu(["a b c d e", "a b c d f", same, same], 2) == pytest.approx((apart + 1) / 2)  # two questions
    assert self_bleu(["one x=3.", "one x=3 ."], 2) == 1  # marks are words of their own


# ---- answers, calculator, data, schedule -----------------------------------------------------------------------------
def test_numeric_answers():
    for case in CASES["helpers"]["gsm8k_extract"]:
        answer = extract_answer(case["text"], "strict")
        assert (None if answer is None else float(to_number(answer))) == case["numeric"], case


def test_calculator():
    for case in CASES["helpers"]["calculator"]:
        expected = None
        if case["value"] is not None:
            expected = case.get("complete") or f"{case['text']}{case['value']:g}>>"
            expected = case["text"].split("<<")[0] + expected if "complete" in case else expected
        assert with_calculation(case["text"]) == expected, case
    right = "5*2=<<5*2=10>>10 and 7-9=<<7-9=-2>>-2"
    assert with_calculation(right) is None
    wrong = "5*2=<<5*2=10>>10 and 7-9=<<7-9=3>>3 and <<1+1=5>>5"
    assert with_calculation(wrong) == "5*2=<<5*2=10>>10 and 7-9=<<7-9=-2>>"
    assert with_calculation("<<(2+3)*-4=") == "<<(2+3)*-4=-20>>"
    same_value = "<<5*15=75.00>>75 <<1/2=.5>>.5 <<600*2=1,200>> <<10/3=3.333333333>>"  # GSM8K has such values
    assert with_calculation(same_value) is None and with_calculation("<<5*15=75.01>>") == "<<5*15=75>>"
    assert with_calculation("<<5*15=75 apples") == "<<5*15=75>>"  # not closed
    assert with_calculation("<<.1+.2=") == "<<.1+.2=0.3>>" and with_calculation("<<10/3=") == "<<10/3=3.333333333>>"
    nasty = ["9**9**9**9", "1/0", "", "()", "1 2", "5//2", "007", "1.2.3", "(1)(2)", "(" * 90 + "1", "9" * 200, "1e9"]
    for text in [f"<<{expression}=" for expression in [*nasty, "__import__('os')", "1if 1else 2"]]:
        assert with_calculation(text) is None, text
    assert with_calculation("<<1/0=5>><<1+1=3>>") == "<<1/0=5>><<1+1=2>>"
    rng = random.Random(0)
    for _ in range(3000):
        with_calculation("<<" + "".join(rng.choices("0123456789+-*/(). ,<>=", k=rng.randrange(30))))


@pytest.mark.parametrize("n", [7473, 2000, 11])
def test_split_is_the_original_s(n):
    """datasets' train_test_split(test_size=0.1, seed=42), as the original calls it."""
    from datasets import Dataset

    split = Dataset.from_dict({"i": list(range(n))}).train_test_split(test_size=0.1, seed=42)
    order, held_out = np.random.default_rng(42).permutation(n), math.ceil(0.1 * n)  # as in the script
    assert split["test"]["i"] == order[:held_out].tolist() and split["train"]["i"] == order[held_out:].tolist()
    assert n != 7473 or (len(split["train"]), len(split["test"])) == (6725, 748)


ERRORS = {
    "one sample": (["--eval-samples", 1], "--eval-samples at least 2"),
    "gamma": (["--gamma", 1.5], "--gamma must be at most 1"),
    "alpha": (["--online-alpha", 1], "--online-alpha below 1"),
    "unbounded": (["--online-alpha", 0.1, "--lambda-td", 0], "--online-alpha needs a --lambda-td over 0"),
    "negative lambda": (["--lambda-td", -1], "--lambda-td is -1.0; it must be at least 0"),
    "shift not a number": (["--value-shift", "nan"], "--value-shift is nan; it must be a finite number"),
    "infinite shift": (["--value-shift", "inf"], "--value-shift is inf; it must be a finite number"),
    "never evaluated": (["--eval-every", 0], "--eval-every is 0; it must be over 0"),
    "no question": (["--template", "Q:"], "--template 'Q:' has no {question} in it"),
    "system prompt": (["--template", "{question}", "--system-prompt", "x"], "--system-prompt is for the chat template"),
    "no model": (["--model-name", "nobody/nothing"], "nobody/nothing cannot be used; give the hub id"),
    "no base model": (["--model-name", "nobody/nothing", "--template", "{question}"], "nobody/nothing cannot be used"),
    "one row": (
        ["--dataset", "one.jsonl"],
        "leaves 0 demonstrations, fewer than --batch-size 8; lower it, or add rows",
    ),
    "large batch": (
        ["--batch-size", 25],
        "leaves 24 demonstrations, fewer than --batch-size 25; lower it, or add rows",
    ),
    "no data": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    "no room": (["--max-new-tokens", 1020], "lower --max-new-tokens"),
    "no chat template": (
        ["--model-name", "base"],
        "base cannot be used; give the hub id or the folder of a chat model",
    ),
    "no end token": (["--model-name", "base", "--template", "{question}"], "the tokenizer of base has no EOS token"),
}


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.replace(" ", "_"))
def test_errors(case, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text((TOY / "train.jsonl").read_text().splitlines()[0])
    arguments, message = ERRORS[case]
    if "base" in arguments:
        tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
        tokenizer.chat_template = None
        tokenizer.eos_token = None if case == "no end token" else tokenizer.eos_token
        tokenizer.save_pretrained("base")
        (tmp_path / "base" / "config.json").write_text((TOY / "model" / "config.json").read_text())
    error = stop_message(capsys, monkeypatch, tmp_path, *arguments, command=IRL_RUN)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_another_process_has_the_run(capsys, monkeypatch, tmp_path):
    import fcntl

    (tmp_path / "runs" / "run").mkdir(parents=True)
    with open(tmp_path / "runs" / "run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = stop_message(capsys, monkeypatch, tmp_path, command=IRL_RUN)
    assert "another process runs" in error and not (tmp_path / "runs" / "run" / "args.json").exists()

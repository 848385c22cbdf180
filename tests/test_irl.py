"""irl_imitation.py: V, Q and loss against hand-computable cases, bounds, rewards, diversity, calculator, errors."""

import json
import math
import os
import pathlib
import random
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import IRL_RUN, ROOT, TOY, stop_message
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from first_edition import extract_answer, to_number, with_calculation
from irl_imitation import (
    Args,
    corrupt,
    diversity,
    iq_loss,
    load_policy,
    lr_multiplier,
    micro_batches,
    pad_batch,
    plot_rewards,
    reward_figures,
    reward_scores,
    score_values,
    token_values,
)

CASES = json.loads((pathlib.Path(__file__).parent / "cases" / "irl_cases.json").read_text())
GSM8K = pathlib.Path(os.environ.get("GSM8K_DIR", ROOT.parent / "shared" / "data" / "gsm8k")) / "train.jsonl"


def stub(logits, ref=None):
    """A "model" whose head gives `logits` [B, T, vocabulary] of the state at every position, and a reference."""
    return SimpleNamespace(
        base_model=lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=logits),
        get_output_embeddings=lambda: torch.nn.Identity(),
    )


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


def loss_of(cases, gamma, lambda_td, online=None, alpha=0.0, head_chunk=2, **options):
    ids, logits, prompt_lens, lengths, terminal = batch(cases)
    values, chosen, *_ = token_values(stub(logits), ids, prompt_lens, lengths, terminal, head_chunk)
    online = torch.zeros(len(cases)).bool() if online is None else torch.tensor(online)
    tokens = [int(lengths[online == who].sum()) for who in (False, True)]
    loss, rewards = iq_loss(values, chosen, lengths, terminal, online, tokens, gamma, lambda_td, alpha, **options)
    return loss, rewards, logits


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
    for key, detach in ("grad_logits", False), ("grad_logits_semi", True):
        total, _, logits = loss_of([case], gamma, weight, detach_next=detach)
        assert total.item() == pytest.approx(expected["total"], abs=1e-6)
        if key in expected:
            total.backward()
            rows, used = len(case["mask"]), torch.tensor(case["mask"]).bool()
            gradient = logits.grad[0]
            torch.testing.assert_close(gradient[:rows][used], torch.tensor(expected[key])[used], atol=2e-6, rtol=0)
            assert (gradient[:rows][~used] == 0).all()
            if not detach and "grad_bootstrap_logits" in expected:
                assert gradient[rows].tolist() == pytest.approx(expected["grad_bootstrap_logits"], abs=2e-6)
            elif not dropped:
                assert (gradient[rows:] == 0).all()


def test_monitor_values():
    """V, Q, entropy, mean logit of every unmasked row."""
    for case in CASES["cases"]:
        ids, logits, prompt_lens, lengths, terminal = batch([case])
        v, q, entropy, _, mean_z = (
            x[0].detach() for x in token_values(stub(logits), ids, prompt_lens, lengths, terminal, 9)
        )
        detail, n = case["detail"], int(lengths)
        used = [k for k, x in enumerate(case["mask"]) if x]
        assert v[:n].tolist() == pytest.approx([detail["V"][k] for k in used], abs=1e-6)
        assert q.tolist() == pytest.approx([detail["Q"][k] for k in used], abs=1e-6)
        monitor = detail["monitor"]
        means = {
            "chosen_q_mean": q,
            "value_mean": v[:n],
            "log_pi_mean": q - v[:n],
            "logits_mean": mean_z,
            "entropy_mean": entropy,
        }
        for key, x in means.items():
            assert x.mean().item() == pytest.approx(monitor[key], abs=1e-6), (case["name"], key)
        assert (v[n].item() == 0) == case["terminal"]


def test_batch_is_normalised_by_its_tokens_and_rows_do_not_touch():
    cases = CASES["batch"]["seqs"]
    for weight, key in (0.0, "mle"), (0.1, "total"):
        loss, _, _ = loss_of(cases, 1.0, weight)
        assert loss.item() == pytest.approx(CASES["batch"]["token_mean"][key], abs=1e-6)
        parts = [case | {"terminal": True} for case in cases]
        split = 0.0
        for part in parts:  # two micro-batches, each divided by the tokens of both
            ids, logits, prompt_lens, lengths, terminal = batch([part])
            values, chosen, *_ = token_values(stub(logits), ids, prompt_lens, lengths, terminal, 9)
            split += iq_loss(values, chosen, lengths, terminal, torch.tensor([False]), [5, 0], 1.0, weight)[0].item()
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
    kl = token_values(stub(logits), ids, *rest, 2, stub(ref))[3]
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


def test_shift_and_terminal_value():
    """At gamma 1 both change the last reward alone, by the same amount; with gamma below 1 a shift changes all."""
    case = CASES["identity"] | {"terminal": True}
    _, plain, _ = loss_of([case], 1.0, 0.1)
    for options in ({"shift": 2.0}, {"terminal_value": 2.0}):
        _, rewards, _ = loss_of([case], 1.0, 0.1, **options)
        assert (rewards - plain).tolist() == [pytest.approx([0, 0, -2.0], abs=1e-6)]
    _, rewards, _ = loss_of([case], 0.9, 0.1, shift=2.0)
    _, plain, _ = loss_of([case], 0.9, 0.1)
    assert (rewards - plain).tolist() == [pytest.approx([-0.2, -0.2, -2.0], abs=1e-6)]


# ---- a real model ----------------------------------------------------------------------------------------------------
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]
COMPLETIONS = [[14, 15], [16, 17, 18, 19, 2], [20], [21, 22, 23, 2]]
TERMINAL = [False, True, False, True]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).train()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_values_against_full_logits():
    """V, Q, entropy, mean z in chunks, with padding, equal those of each sequence alone with all its logits."""
    model = tiny_model()
    for head_chunk, pad_id in (1, 0), (3, 50), (1000, 14):
        parts = token_values(model, *pad_batch(PROMPTS, COMPLETIONS, pad_id), torch.tensor(TERMINAL), head_chunk)
        for k, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
            z = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :].float()  # [n + 1, V]
            n, log_p = len(completion), z[:-1].log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            v = z.logsumexp(-1) * torch.tensor([True] * n + [not TERMINAL[k]])
            full = [v, z[torch.arange(n), completion], entropy, torch.zeros(n), z[:-1].mean(-1)]
            for ours, expected in zip(parts, full):
                torch.testing.assert_close(ours[k, : len(expected)], expected, atol=1e-5, rtol=1e-5)
                assert (ours[k, len(expected) :] == 0).all()
    assert parts[0].requires_grad and not parts[2].requires_grad


@pytest.mark.parametrize("lambda_td", [0.0, 0.3])
def test_lambda_0_is_plain_sft_and_the_split_changes_nothing(lambda_td):
    """With lambda 0 loss and gradients are those of transformers' own cross-entropy with masked prompt labels."""
    model, tokens = tiny_model(), sum(map(len, COMPLETIONS))
    ids = pad_batch(PROMPTS, COMPLETIONS, 0)[0]
    labels = torch.full_like(ids, -100)
    for row, prompt, completion in zip(labels, PROMPTS, COMPLETIONS):
        row[len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    logits = model(input_ids=ids).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert model(input_ids=ids, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-6)
    expected.backward()
    plain, reference, totals = gradient(model), None, []
    for max_tokens in (1, 9, 1000):
        model.zero_grad()
        total = 0.0
        for part in micro_batches([len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS)], max_tokens):
            inputs = pad_batch([PROMPTS[i] for i in part], [COMPLETIONS[i] for i in part], 5)
            terminal, online = torch.tensor([TERMINAL[i] for i in part]), torch.zeros(len(part)).bool()
            values, chosen, *_ = token_values(model, *inputs, terminal, 4)
            loss, _ = iq_loss(values, chosen, inputs[2], terminal, online, [tokens, 0], 1.0, lambda_td)
            loss.backward()
            total += loss.item()
        totals.append(total)
        reference = gradient(model) if reference is None else reference
        torch.testing.assert_close(gradient(model), reference, atol=1e-6, rtol=1e-4)
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-5)
    if not lambda_td:
        assert totals[0] == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(reference, plain, atol=1e-6, rtol=1e-4)
    else:
        assert (reference - plain).abs().max() > 1e-2


def test_entropy_bonus_has_the_entropy_s_gradient():
    model = tiny_model()
    parts = token_values(model, *pad_batch(PROMPTS, COMPLETIONS, 0), torch.tensor(TERMINAL), 3, train_entropy=True)
    parts[2].sum().backward()
    ours = gradient(model)
    model.zero_grad()
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        log_p = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        (-(log_p.exp() * log_p).sum()).backward()
    torch.testing.assert_close(ours, gradient(model), atol=2e-5, rtol=1e-3)


def test_no_tensor_of_all_tokens_times_vocabulary_is_kept():
    model, kept = tiny_model(), []
    prompts, completions = [[3] * 5] * 8, [[4] * 20] * 8  # 160 tokens, 97 words
    inputs, terminal = pad_batch(prompts, completions, 0), torch.ones(8).bool()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        values, chosen, entropy, *_ = token_values(model, *inputs, terminal, 16, train_entropy=True)
    assert all(len(shape) < 2 or shape[-1] != 97 or shape[0] <= 16 for shape in kept)
    (values.sum() + chosen.sum() + entropy.sum()).backward()


def test_reference_of_lora_is_the_model_without_adapters(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    policy = load_policy(Args(model_name=str(tmp_path), lora_alpha=8), torch.device("cpu"), torch.float32, 4)
    start = load_policy(Args(model_name=str(tmp_path)), torch.device("cpu"), torch.float32, 0)
    inputs, terminal = pad_batch(PROMPTS, COMPLETIONS, 0), torch.tensor(TERMINAL)
    assert token_values(policy, *inputs, terminal, 4, policy)[3].abs().max() < 1e-5
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    kl = token_values(policy, *inputs, terminal, 4, policy)[3]
    torch.testing.assert_close(kl, token_values(policy, *inputs, terminal, 4, start)[3], atol=1e-5, rtol=1e-4)
    assert kl.max() > 0.01 and (kl > -1e-5).all()
    kl.sum().backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if "lora_" in n)


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
                values, chosen, *_ = token_values(stub(logits), ids, *lens, 2)
                loss = iq_loss(values, chosen, *lens[1:], torch.tensor([False]), [3, 0], 1.0, 0.1)[0]
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
    case, rng = CASES["identity"], np.random.default_rng(0)
    z = np.array(case["logits"])
    v, q = np.log(np.exp(z).sum(1)), z[range(3), case["actions"]]
    _, scores = reward_scores(np.append(v, 0.0), q, True, gamma, 0.0)
    known = case["gamma1" if gamma == 1 else "gamma09"]
    assert scores["discounted"] == pytest.approx(known["sum_reward" if gamma == 1 else "disc_sum_reward"], abs=1e-9)
    assert scores["v0"] == pytest.approx(known["V0"], abs=1e-9)
    assert gamma != 1 or scores["log_pi"] == pytest.approx(known["sum_log_pi"], abs=1e-9)
    for _ in range(50):
        n, terminal = int(rng.integers(1, 9)), bool(rng.integers(2))
        v, q = rng.normal(0, 5, n + 1), rng.normal(0, 5, n)
        rewards, scores = reward_scores(v, q, terminal, gamma, 0.0)
        weights = gamma ** np.arange(n)
        right = weights @ (q - v[:-1]) + v[0] - (0 if terminal else gamma**n * v[-1])
        assert weights @ rewards == pytest.approx(right, abs=1e-9) == scores["discounted"]
        assert scores["sum"] == pytest.approx(rewards.sum()) and scores["mean"] == pytest.approx(rewards.mean())
        assert scores["mean_log_pi"] == pytest.approx((q - v[:-1]).mean())


def test_rewards_of_loss_and_report_agree():
    """score_values and reward_scores give each answer the rewards that iq_loss squares."""
    model, tokens = tiny_model(), sum(map(len, COMPLETIONS))
    rows = [{"prompt": p, "tokens": c, "terminal": t} for p, c, t in zip(PROMPTS, COMPLETIONS, TERMINAL)]
    scored = score_values(model, rows, 0, 12, 4)
    inputs, terminal = pad_batch(PROMPTS, COMPLETIONS, 0), torch.tensor(TERMINAL)
    values, chosen, *_ = token_values(model, *inputs, terminal, 4)
    _, rewards = iq_loss(
        values,
        chosen,
        inputs[2],
        terminal,
        torch.zeros(4).bool(),
        [tokens, 0],
        0.9,
        1.0,
        shift=1.5,
        terminal_value=-2.0,
    )
    for (v, q, *_), row, expected in zip(scored, rows, rewards):
        ours, _ = reward_scores(v - 1.5, q - 1.5, row["terminal"], 0.9, -2.0)
        assert ours == pytest.approx(expected[: len(ours)].numpy(), abs=1e-5)


def test_reward_figures_by_loops():
    from scipy.stats import spearmanr

    rng, rows = random.Random(0), []
    for i in range(12):
        for kind, count in ("held_out", 1), ("reference", 1), ("corrupted", 1), ("sample", 5):
            for _ in range(count):
                scores = {k: rng.randrange(6) for k in ("sum", "mean", "discounted", "log_pi", "mean_log_pi", "v0")}
                correct = {"correct": rng.random() < 0.1 * i, "rougeLsum": rng.random()} if kind == "sample" else {}
                rows.append({"id": i, "kind": kind, **scores, **correct})
    figures, samples = reward_figures(rows), [row for row in rows if row["kind"] == "sample"]
    assert {key for key in figures if key.startswith("v0")} == {"v0_spearman", "v0_rouge"}
    for score in ("sum", "log_pi"):
        groups, numbers = defaultdict(list), [row[score] for row in samples]
        for row in samples:
            groups[row["id"]].append(row)
        assert figures[f"{score}_spearman"] == pytest.approx(spearmanr(numbers, [row["correct"] for row in samples])[0])
        assert figures[f"{score}_rouge"] == pytest.approx(spearmanr(numbers, [row["rougeLsum"] for row in samples])[0])
        aucs, best, above = [], [], []
        for group in groups.values():
            pairs = [(a[score], b[score]) for a in group for b in group if a["correct"] and not b["correct"]]
            aucs += [np.mean([(a > b) + (a == b) / 2 for a, b in pairs])] if pairs else []
            top = max(row[score] for row in group)
            best.append(np.mean([row["correct"] for row in group if row[score] == top]))
        for i in range(12):
            a, b = (next(r[score] for r in rows if r["id"] == i and r["kind"] == k) for k in ("reference", "corrupted"))
            above.append((a > b) + (a == b) / 2)
        assert figures[f"{score}_auroc"] == pytest.approx(np.mean(aucs))
        assert figures[f"{score}_best_of"] == pytest.approx(np.mean(best))
        assert figures[f"{score}_corrupted"] == pytest.approx(np.mean(above))
    for row in samples:
        row["correct"] = True
    assert not {"sum_spearman", "sum_auroc"} & set(reward_figures(rows)) and "sum_best_of" in reward_figures(rows)
    json.dumps(reward_figures(rows), allow_nan=False)


def test_heat_map(tmp_path):
    row = {"id": 1, "rewards": [0.5, -1.0, 0.0], "pieces": ["$5", "\n", "$"], "sum": -0.5}
    for k, kinds in enumerate(([True, False], [True], [False])):
        plot_rewards([row | {"correct": kind} for kind in kinds], tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").read_bytes()[:4] == b"\x89PNG"


def test_corrupt_changes_one_number_of_the_steps():
    rng = np.random.default_rng(0)
    answer = "He has 3 * 12 = <<3*12=36>>36 eggs.\nThen 36 + 4 = 40.\n#### 40"
    seen = set()
    for _ in range(50):
        wrong = corrupt(answer, rng)
        steps, _, final = wrong.partition("####")
        assert final == " 40" and wrong != answer
        old, new = (
            np.array([int(x) for x in "".join(c if c.isdigit() else " " for c in t).split()]) for t in (answer, wrong)
        )
        changed = np.flatnonzero(old != new)
        assert len(changed) == 1 and 1 <= new[changed[0]] - old[changed[0]] <= 9
        seen.add(int(changed[0]))
    assert seen == set(range(9))
    assert corrupt("no numbers\n#### 4", rng) == "no numbers\n#### 4"


def test_diversity():
    same, other = "a b c d e f", "u v w x y z"
    assert diversity([same] * 4)["self_bleu"] == pytest.approx(1.0)
    assert diversity([same, other])["self_bleu"] < 0.01
    assert diversity(["", ""])["self_bleu"] == diversity(["7", "7", "7"])["self_bleu"] == 1
    assert diversity(["", same])["distinct_1"] == 1
    # "a b c d e" against "a b c d f": 4/5, 3/4, 2/3, 1/2 of its n-grams, equally long
    figures = diversity(["a b c d e", "a b c d f"])
    assert figures["self_bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert figures["distinct_1"] == 6 / 10 and figures["distinct_2"] == 5 / 8 and figures["distinct_3"] == 4 / 6
    assert diversity(["x=3.", "x=4."])["distinct_1"] == 5 / 8  # marks are words of their own


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
    assert with_calculation("<<.1+.2=") == "<<.1+.2=0.3>>" and with_calculation("<<10/3=") == "<<10/3=3.333333333>>"
    nasty = ["9**9**9**9", "1/0", "", "()", "1 2", "5//2", "007", "1.2.3", "(1)(2)", "(" * 90 + "1", "9" * 200, "1e9"]
    for text in [f"<<{expression}=" for expression in [*nasty, "__import__('os')", "1if 1else 2"]]:
        assert with_calculation(text) is None, text
    assert with_calculation("<<1/0=5>><<1+1=3>>") == "<<1/0=5>><<1+1=2>>"
    rng = random.Random(0)
    for _ in range(3000):
        with_calculation("<<" + "".join(rng.choices("0123456789+-*/(). ,<>=", k=rng.randrange(30))))


def test_learning_rate_follows_the_cosine_and_stays_at_0():
    """200 steps behind one of warm-up: progress p is step 200 p; past the end the original's went up again."""
    for case in CASES["helpers"]["cosine_lr_factor"]:
        expected = case["factor"] if case["progress"] <= 1 else 0.0
        assert lr_multiplier(int(200 * case["progress"]), 1, 201, "cosine") == pytest.approx(expected, abs=1e-9)
    assert [lr_multiplier(k, 4, 20, "cosine") for k in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("n", [7473, 2000, 11])
def test_split_is_the_original_s(n):
    """datasets' train_test_split(test_size=0.1, seed=42), as the original calls it."""
    from datasets import Dataset

    split = Dataset.from_dict({"i": list(range(n))}).train_test_split(test_size=0.1, seed=42)
    order, held_out = np.random.default_rng(42).permutation(n), math.ceil(0.1 * n)  # as in the script
    assert split["test"]["i"] == order[:held_out].tolist() and split["train"]["i"] == order[held_out:].tolist()
    assert n != 7473 or (len(split["train"]), len(split["test"])) == (6725, 748)


ERRORS = {
    "one sample": (["--eval-samples", 1], "--eval-samples must be at least 2"),
    "gamma": (["--gamma", 1.5], "--gamma at most 1"),
    "alpha": (["--online-alpha", 1], "--online-alpha below 1"),
    "negative lambda": (["--lambda-td", -1], "--lambda-td is -1.0; it must be at least 0"),
    "no question": (["--template", "Q:"], "--template needs {question} in it"),
    "system prompt": (["--template", "{question}", "--system-prompt", "x"], "--system-prompt is for the chat template"),
    "no model": (["--model-name", "nobody/nothing"], "nobody/nothing cannot be used"),
    "long prompts": (["--max-prompt-tokens", 3], "leaves 0 demonstrations and 0 held out; raise --max-prompt-tokens"),
    "one row": (["--dataset", "one.jsonl"], "leaves 0 demonstrations and 1 held out"),
    "no data": (["--dataset", "nowhere.jsonl"], "dataset file nowhere.jsonl does not exist"),
    "no room": (["--max-new-tokens", 1020], "lower --max-new-tokens"),
}


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.replace(" ", "_"))
def test_errors(case, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text((TOY / "train.jsonl").read_text().splitlines()[0])
    arguments, message = ERRORS[case]
    error = stop_message(capsys, monkeypatch, tmp_path, *arguments, command=IRL_RUN)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()

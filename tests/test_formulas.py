"""Advantages, loss and MI reward against hand-computable cases, TRL's own loss, and their definitions."""

import itertools
import json
import math
import pathlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_upskill import Args, group_advantages, mi_rewards, policy_loss

CASES = json.loads((pathlib.Path(__file__).parent / "cases" / "grpo_cases.json").read_text())


def denominator(loss_type, mask, max_length):
    return {"dapo": mask.sum().item(), "grpo": len(mask), "dr_grpo": len(mask) * max_length}[loss_type]


@pytest.mark.parametrize("case", CASES["advantage_cases"], ids=lambda case: case["name"])
def test_group_advantages(case):
    rewards = torch.tensor([case["rewards"]], dtype=torch.double)
    for loss_type, key in (("dapo", "adv_grpo_ddof1_eps1e_4"), ("dr_grpo", "adv_dr_grpo_no_std")):
        torch.testing.assert_close(
            group_advantages(rewards, loss_type)[0], torch.tensor(case[key], dtype=torch.double), atol=1e-9, rtol=1e-8
        )


def test_every_group_is_scaled_by_its_own_spread():
    case = CASES["batch_std_case"]
    rewards = torch.tensor(case["rewards"], dtype=torch.double)
    expected = torch.tensor(case["group_scaled"], dtype=torch.double)
    torch.testing.assert_close(group_advantages(rewards, "dapo"), expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("case", CASES["loss_cases"], ids=lambda case: case["name"])
def test_policy_loss_values_and_gradients(case, loss_type):
    old, ref, advantages = (torch.tensor(case[k], dtype=torch.double) for k in ("old_logps", "ref_logps", "advantages"))
    new = torch.tensor(case["new_logps"], dtype=torch.double, requires_grad=True)
    mask = torch.tensor(case["mask"]).bool()
    args = Args(loss_type=loss_type, clip_low=case["eps_low"], clip_high=case["eps_high"], kl_coef=case["beta"])
    whole = denominator(loss_type, mask, case["max_completion_length"])
    loss, sums = policy_loss(new, old, advantages, mask, args, whole, torch.ones_like(old), ref)
    loss.backward()
    expected = case["expected"]
    assert loss.item() == pytest.approx(expected["loss"][loss_type], abs=1e-9)
    torch.testing.assert_close(
        new.grad, torch.tensor(expected["dloss_dnew_logps"][loss_type], dtype=torch.double), atol=1e-9, rtol=0
    )
    tokens = mask.sum().item()
    for key, name in (("clip_low", "clip_low_frac"), ("clip_high", "clip_high_frac"), ("kl", "mean_kl_token")):
        assert sums[key].item() / tokens == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_micro_batch_shares_add_up(loss_type):
    micro = CASES["microbatch_case"]
    case = next(c for c in CASES["loss_cases"] if c["name"] == "clip_no_std_beta0")
    new, old, advantages = (torch.tensor(case[k]) for k in ("new_logps", "old_logps", "advantages"))
    mask = torch.tensor(case["mask"]).bool()
    whole = denominator(loss_type, mask, case["max_completion_length"])
    args = Args(loss_type=loss_type, clip_high=0.2)
    shares = [
        policy_loss(new[r], old[r], advantages[r], mask[r], args, whole, torch.ones_like(old[r]))[0].item()
        for r in micro["micro_batches"]
    ]
    assert shares == pytest.approx(micro[f"{loss_type}_micro"], abs=1e-6)
    assert sum(shares) == pytest.approx(micro[f"{loss_type}_total"], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_equals_trl(loss_type, seed):
    """TRL's own GRPOTrainer._compute_loss on the same random tensors: values, gradients and clip shares."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    torch.manual_seed(seed)
    rows, columns, max_length = 6, 9, 12
    lengths = torch.tensor([1, 9, 4, 7, 2, 5])
    mask = torch.arange(columns) < lengths[:, None]
    new = (-3 * torch.rand(rows, columns, dtype=torch.double)).requires_grad_()
    old, ref, vllm = (new.detach() + 0.4 * torch.randn(rows, columns, dtype=torch.double) for _ in range(3))
    advantages = torch.randn(rows, dtype=torch.double)
    is_weights = (old - vllm).exp().clamp(max=2.0)
    args = Args(loss_type=loss_type, clip_low=0.2, clip_high=0.28, kl_coef=0.04)
    whole = denominator(loss_type, mask, max_length)
    ours, sums = policy_loss(new, old, advantages, mask, args, whole, is_weights, ref)
    ours_grad = torch.autograd.grad(ours, new)[0]

    config = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.04,
        args=config,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        current_gradient_accumulation_steps=1,
        max_completion_length=max_length,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(rows, columns, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2] + 1,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "importance_sampling_ratio": is_weights,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer.GRPOTrainer._compute_loss(stub, None, inputs)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(theirs, new)[0], atol=1e-12, rtol=0)
    logged = stub._metrics["train"]
    assert sums["clip_low"].item() / mask.sum().item() == pytest.approx(logged["clip_ratio/low_mean"][0], abs=1e-6)
    assert sums["clip_high"].item() / mask.sum().item() == pytest.approx(logged["clip_ratio/high_mean"][0], abs=1e-6)


def test_on_policy_gradient_is_reinforce():
    """At ratio 1 the loss is -mean A whatever the policy, but its gradient is REINFORCE's, -A / tokens."""
    new = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, _ = policy_loss(new, new.detach(), torch.tensor([1.0, -2.0]), mask, Args(), 3, torch.ones(2, 2))
    loss.backward()
    assert loss.item() == 0.0
    torch.testing.assert_close(new.grad, torch.tensor([[-1.0, -1.0], [2.0, 0.0]]) / 3)


def test_values_behind_the_mask_change_nothing():
    """A pad entry may hold anything: neither the loss nor its gradient may see it, not even an infinity."""
    mask = torch.tensor([[True, False], [True, True]])
    results = []
    for garbage in (0.0, -500.0, 500.0):
        new = torch.tensor([[-1.0, garbage], [-0.5, -0.2]], requires_grad=True)
        old = torch.tensor([[-1.1, -garbage], [-0.6, -0.1]])
        args = Args(loss_type="grpo", kl_coef=0.1)
        loss, _ = policy_loss(new, old, torch.tensor([1.0, -1.0]), mask, args, 2, torch.ones(2, 2), old)
        loss.backward()
        results.append((loss.item(), new.grad.tolist()))
    assert results[0] == results[1] == results[2]


# Mutual information: what the reward must be when the answer is known without computing it.


def random_policy(skills, length, vocabulary, seed=0):
    """Log-probabilities [N, V, .., V] of all V^T completions under each skill, and their tokens' log-probabilities."""
    torch.manual_seed(seed)
    logits = torch.randn(skills, length, vocabulary, dtype=torch.double) * 2
    per_token = logits.log_softmax(-1)
    sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    return per_token, torch.stack([per_token[:, t, sequences[:, t]] for t in range(length)], -1)  # [N, V^T, T]


def test_mean_of_seq_reward_is_mutual_information():
    """E over z uniform and y ~ p(.|z) of seq = H(y) - H(y|z), enumerated; the token form is at least that."""
    for seed in range(5):
        _, logps = random_policy(skills=3, length=3, vocabulary=4, seed=seed)
        totals = logps.sum(-1)  # [N, V^T]
        mixture = totals.exp().mean(0)
        information = -(mixture * mixture.log()).sum() + (totals.exp() * totals).sum(1).mean()
        means = {}
        for form in ("seq", "token", "token_mean"):
            rewards = torch.stack(
                [
                    mi_rewards(logps.transpose(0, 1), torch.full((64,), z), torch.ones(64, 3).bool(), form)
                    for z in range(3)
                ]
            )
            means[form] = (totals.exp() * rewards).sum(1).mean()
            if form == "seq":
                assert rewards.max() <= math.log(3) + 1e-6
        assert means["seq"].item() == pytest.approx(information.item(), abs=1e-6)
        assert means["token"] >= means["seq"] - 1e-6
        assert means["token_mean"].item() == pytest.approx(means["token"].item() / 3, abs=1e-6)


def test_mi_reward_limits():
    mask = torch.ones(4, 5).bool()
    z = torch.tensor([0, 1, 2, 0])
    same = torch.randn(4, 1, 5).expand(4, 3, 5)
    apart = torch.full((4, 3, 5), -1e4)
    apart[torch.arange(4), z] = -0.5
    for form, most in (("seq", math.log(3)), ("token", 5 * math.log(3)), ("token_mean", math.log(3))):
        torch.testing.assert_close(mi_rewards(same, z, mask, form), torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(mi_rewards(apart, z, mask, form), torch.full((4,), most))
        torch.testing.assert_close(
            mi_rewards(apart[:, :1], z * 0, mask, form), torch.zeros(4)
        )  # one skill: nothing to tell
    one = torch.randn(4, 3, 5)
    torch.testing.assert_close(
        mi_rewards(one[..., :1], z, mask[:, :1], "seq"), mi_rewards(one[..., :1], z, mask[:, :1], "token")
    )


def test_mi_reward_ignores_padding_and_survives_long_completions():
    torch.manual_seed(0)
    logps, z = -torch.rand(4, 3, 5) * 900, torch.tensor([0, 1, 2, 0])  # probabilities far below the smallest float
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [2]])
    for form in ("seq", "token", "token_mean"):
        rewards = mi_rewards(logps, z, mask, form)
        assert rewards.isfinite().all()
        torch.testing.assert_close(rewards, mi_rewards(logps.masked_fill(~mask[:, None], 77.0), z, mask, form))
        for i, length in enumerate((5, 3, 1, 2)):
            alone = mi_rewards(logps[i : i + 1, :, :length], z[i : i + 1], mask[i : i + 1, :length], form)
            assert alone.item() == pytest.approx(rewards[i].item(), rel=1e-6)


def test_theory_bounds():
    """qbar^N (1 - exp(-N/2 pbar qbar I_C)) <= pass@N of distinct skills - pass@N of the mixture <= N sqrt(I_C / 2)."""
    torch.manual_seed(0)
    for skills in (2, 3, 5, 10):
        p = (
            torch.rand(5000, skills, dtype=torch.double)
            .pow(torch.rand(5000, 1, dtype=torch.double) * 4)
            .clamp(1e-9, 1 - 1e-9)
        )
        q, mean_p = 1 - p, p.mean(1)
        mean_q = 1 - mean_p
        gain = mean_q**skills - q.prod(1)
        entropy = lambda x: -(x * x.log() + (1 - x) * (1 - x).log())
        information = entropy(mean_p) - entropy(p).mean(1)
        assert (gain <= skills * (information / 2).clamp(min=0).sqrt() + 1e-12).all()
        assert (gain >= mean_q**skills * (1 - (-skills / 2 * mean_p * mean_q * information).exp()) - 1e-12).all()

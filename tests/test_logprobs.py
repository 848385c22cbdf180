"""token_logprobs and score: the chunked head equals the full one, and nothing but prompt and completion matters."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_upskill import Args, load_policy, micro_batches, pad_batch, score, token_logprobs

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]
COMPLETIONS = [[14, 15], [16, 17, 18, 19, 2], [20], [21, 22, 23, 2]]


def tiny_model(tied=False, seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).train()


def full_logprobs(model, prompt, completion, temperature):
    """One sequence at a time, all logits at once, log_softmax: logit t - 1 scores token t."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(prompt), ids.shape[1]) - 1, ids[0, len(prompt) :]]


@pytest.mark.parametrize("head_chunk", [1, 3, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_equals_full_values_and_gradients(head_chunk, tied, temperature):
    model = tiny_model(tied)
    torch.manual_seed(1)
    weights = torch.randn(4, 5)
    reference = [full_logprobs(model, p, c, temperature) for p, c in zip(PROMPTS, COMPLETIONS)]
    sum((w[: len(r)] * r).sum() for w, r in zip(weights, reference)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    logps, entropy = token_logprobs(model, *pad_batch(PROMPTS, COMPLETIONS, pad_id=0), temperature, head_chunk)
    for row, r in zip(logps, reference):
        torch.testing.assert_close(row[: len(r)], r, atol=2e-6, rtol=1e-5)
        assert (row[len(r) :] == 0).all()
    assert not entropy.requires_grad
    (weights * logps).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_entropy():
    model = tiny_model()
    _, entropy = token_logprobs(model, *pad_batch(PROMPTS[:1], COMPLETIONS[:1], 0), 1.0, 8)
    log_p = model(input_ids=torch.tensor([PROMPTS[0] + COMPLETIONS[0]])).logits[0].log_softmax(-1)[4:6]
    torch.testing.assert_close(entropy[0], -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)


def test_pad_id_order_and_split_change_nothing():
    model = tiny_model()
    whole = score(model, PROMPTS, COMPLETIONS, 1.0, 0, 1000, 4)
    for pad_id, max_tokens in ((0, 7), (50, 1000), (14, 12), (96, 1)):
        torch.testing.assert_close(
            score(model, PROMPTS, COMPLETIONS, 1.0, pad_id, max_tokens, 4), whole, atol=2e-6, rtol=0
        )
    order = [2, 0, 3, 1]
    shuffled = score(model, [PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], 1.0, 0, 9, 4)
    torch.testing.assert_close(shuffled, whole[order], atol=2e-6, rtol=0)


def test_gradient_of_a_step_does_not_depend_on_the_split():
    """One batch, cut into micro-batches in four ways: the summed gradient of the dapo loss is the same."""
    from grpo_upskill import policy_loss

    advantages, gradients = torch.tensor([1.0, -0.5, 0.3, -1.0]), []
    tokens = sum(map(len, COMPLETIONS))
    for max_tokens in (1, 8, 14, 1000):
        model = tiny_model()
        for rows in micro_batches([len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS)], max_tokens):
            batch = pad_batch([PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows], 0)
            logps, _ = token_logprobs(model, *batch, 1.0, 4)
            mask = torch.arange(logps.shape[1]) < batch[2][:, None]
            policy_loss(logps, logps.detach(), advantages[rows], mask, "dapo", 0.2, 0.2, tokens)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def test_micro_batches():
    lengths = [5, 9, 2, 7, 7, 1, 30]
    batches = micro_batches(lengths, 16)
    assert sorted(sum(batches, [])) == list(range(7))
    assert batches[0] == [6]  # longer than the budget: alone, never dropped
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 16 for b in batches)
    assert micro_batches([3, 3, 3], 9) == [[0, 1, 2]]


def test_lora_starts_at_the_base_model_and_reference_is_adapters_off(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    device = torch.device("cpu")
    base = score(model, PROMPTS, COMPLETIONS, 1.0, 0, 100, 8)
    policy = load_policy(Args(model_name=str(tmp_path), lora_alpha=8), device, torch.float32, 4)
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    torch.testing.assert_close(score(policy, PROMPTS, COMPLETIONS, 1.0, 0, 100, 8), base)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert (score(policy, PROMPTS, COMPLETIONS, 1.0, 0, 100, 8) - base).abs().max() > 0.01
    with policy.disable_adapter():
        torch.testing.assert_close(score(policy, PROMPTS, COMPLETIONS, 1.0, 0, 100, 8), base)


def test_bf16_weights_are_scored_in_fp32():
    """A log-softmax formed in bf16 is off in the third digit; formed in fp32 from bf16 logits it stays normalised."""
    model = tiny_model().bfloat16()
    ids = torch.tensor([[5, 6]])
    total = sum(
        token_logprobs(
            model, ids.clone().index_fill_(1, torch.tensor([1]), t), torch.tensor([1]), torch.tensor([1]), 1.0, 8
        )[0]
        .exp()
        .item()
        for t in range(97)
    )
    assert total == pytest.approx(1.0, abs=1e-4)

"""UpSkill's arithmetic study (Shah et al. 2026, arXiv 2602.22296: section 5.1, figure 4, appendices E.6 and F).

A problem x is three digits, an answer y is "digit operator digit": right if its value is one of the three and its
operands are the other two. A skill z in 0..N-1, drawn uniformly, opens the prompt. A policy of 407,808 parameters first
imitates solutions for 100 steps, then learns by REINFORCE with the group's mean reward as baseline, 2,000 updates of
32 problems with one z each and C = 5 answers:

    r(y; x, z) = r_correct + clip(alpha log p(y|x,z) - beta log pbar(y|x), -cap, cap)                             arm mi
    pbar(y|x)  = (1/N) sum_z' p(y|x,z'),      r_correct = 1 if right, else 0

With beta = alpha the second term's mean is alpha I(y; z | x): skills spread over different answers, so that asking each
of them once finds a right one more often (pass@N). The price is pass@1, as a skill may be distinct and always wrong.
Three more arms: `grpo` without the second term; `gated-mi`, which pays it to right answers only; and `pass-k`, without
it, whose advantage is what an answer adds to the best reward of its group. All arms and seeds train at once, as a stack
of independent policies. Evaluation enumerates all 500 answers: its numbers are exact expectations, not samples.

Plain torch, a CPU is enough. Left out: the 24-game. Results are in README.md.

    python arithmetic_misl.py                   # figure 4: a table and runs/arithmetic_misl__*/figure4.png
"""

import json
import math
import signal
import sys
import time
from collections import defaultdict
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import permutations, product
from operator import add, mod, mul, sub, truediv
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from eval_gsm8k import check_arguments, fail

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv, "%": mod}
STAR = 10 + list(OPERATORS).index("*")  # tokens: ten digits, five operators; the prompt's separator is the token of "*"
PROMPT = 8  # tokens of a prompt: z * a * b * c *
WIDTH, HEADS, LAYERS, POSITIONS = 128, 4, 2, 64
# The authors' logged figures for seed 0 after 2,000 updates, their last of 300 problems: pass@1, pass@5, token-form MI.
PAPER = {("grpo", 0, 0): (0.735, 0.737, -0.003), ("mi", 0.5, 1): (0.369, 0.847, 2.299),
         ("mi", 1, 1): (0.345, 0.853, 2.446), ("mi", 0.5, 1.5): (0.391, 0.830, 2.486)}  # fmt: skip
# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; for more, that of 9, a little too wide
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, seed, time)
    output_dir: str = "runs"  # where run folders are made
    arms: tuple[Literal["grpo", "pass-k", "mi", "gated-mi"], ...] = ("grpo", "mi", "gated-mi")  # rewards to compare
    seed: int = 0  # first seed, of weights and draws; the arms of a seed start alike and meet the same problems
    num_seeds: int = 3  # seeds of each arm: seed, seed + 1, ..
    # task
    division: Literal["truncated", "exact"] = "truncated"  # is 7/2 = 3 right (the original) or not
    skill_tokens: Literal["digits", "dedicated"] = "digits"  # z's token: its digit (the original) or its own
    test_share: float = 0.0  # share of the 102 multisets of digits kept out of training, as a test split
    max_z: int = 5  # number of skills N
    # imitation
    warmup_steps: int = 100  # steps of imitating solutions before the first update
    # rollout
    num_steps: int = 2000  # updates
    questions_per_step: int = 32  # problems in an update, each with one z
    group_size: int = 5  # answers C to a problem and its z; their mean reward is the baseline
    temperature: float = 0.9  # sampling temperature, also in the gradient and in evaluations; MI is scored at 1
    # UpSkill
    alpha: float = 0.5  # arm mi: weight of log p(y|x,z)
    beta: float | None = None  # arm mi: weight of log pbar(y|x); None: alpha
    cap: float = 1.0  # the MI reward is clipped to [-cap, cap]; gated, at most 1 keeps a right answer above 0
    gated_alpha: float = 0.2  # arm gated-mi: alpha and beta, for right answers only
    gated_advantage: Literal["mean", "pass-k"] = "pass-k"  # arm gated-mi: advantage of r_correct, as arm grpo or pass-k
    kl_coef: float = 0.0  # weight of the exact KL(policy || imitator) in the loss of every arm (appendix F: 0.05)
    # optimizer
    lr: float = 5e-4  # constant, of both phases
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm clip, of each policy by itself; 0: none
    # evaluation and checkpoint
    eval_every: int = 200  # evaluate every so many updates, besides the start and the end; 0: only there
    save_every: int = 200  # write the checkpoint every so many updates; 0: only at the end


# ---- The task --------------------------------------------------------------------------------------------------------
def value(left: int, operator: str, right: int) -> float | None:
    """left operator right, by true division and Python's modulo; None where a division by 0 leaves it undefined."""
    return None if operator in "/%" and right == 0 else OPERATORS[operator](left, right)


def arithmetic_problems(division: str):
    """Every problem, its chance, its right answers, and the one that is imitated.

    The generator draws x, operator, y uniformly until v = x operator y is an integer in 0..9, then shuffles (x, y, v).
    Returns digits [P, 3]; chance [P], in double precision; correct [P, 500] bool, an answer's index being
    50 left + 10 operator + right; solution [P]: the first exact one by target digit, operand order and operator.
    """
    counts = defaultdict(int)
    for x, operator, y in product(range(10), OPERATORS, range(10)):
        v = value(x, operator, y)
        if v is not None and v in range(10):
            for digits in permutations((x, y, int(v))):
                counts[digits] += 1
    answers = list(product(range(10), OPERATORS, range(10)))
    correct, solution = [], []
    for digits in sorted(counts):
        splits = [(digits[k], *digits[:k], *digits[k + 1 :]) for k in range(3)]  # target digit and the two others
        splits += [(target, second, first) for target, first, second in splits]
        values = [value(*answer) for answer in answers]
        correct.append([v is not None and (int(v) if division == "truncated" else v, left, right) in splits
                        for v, (left, _, right) in zip(values, answers, strict=True)])  # fmt: skip
        ordered = [(left, operator, right) for k in range(3) for target, left, right in (splits[k], splits[k + 3])
                   for operator in OPERATORS if value(left, operator, right) == target]  # fmt: skip
        solution.append(answers.index(ordered[0]))
    chance = torch.tensor([counts[digits] for digits in sorted(counts)], dtype=torch.double)
    return torch.tensor(sorted(counts)), chance / chance.sum(), torch.tensor(correct), torch.tensor(solution)


def make_prompts(digits, z):
    """Prompt tokens [.., 8], "z * a * b * c *", from digits [.., 3] and the tokens z [..] of the skills."""
    star = torch.full_like(z, STAR)
    return torch.stack([z, star, digits[..., 0], star, digits[..., 1], star, digits[..., 2], star], -1)


# ---- The policies ----------------------------------------------------------------------------------------------------
class Policies(torch.nn.Module):
    """R independent decoder-only transformers, every weight stacked along a first axis R; `seeds` [R] initialise them.

    Each: learned positions, two layers of pre-norm attention (four heads, no biases) and a GELU MLP, untied head, no
    dropout: 407,808 parameters with 15 tokens. Initial weights are distributed as PyTorch's Embedding and Linear.
    """

    def __init__(self, seeds: list[int], vocabulary: int):
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def stack(*shape, fan_in=None):  # uniform up to 1 / sqrt(fan_in), or else normal
            made = [torch.randn(shape, generator=generator) if fan_in is None else
                    torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
                    for generator in generators]  # fmt: skip
            return torch.nn.Parameter(torch.stack(made))

        def norm():  # bias and gain
            return torch.nn.ParameterList([torch.full((len(seeds), 1, WIDTH), start) for start in (0.0, 1.0)])

        self.tokens, self.positions = stack(vocabulary, WIDTH), stack(POSITIONS, WIDTH)
        self.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(LAYERS)])
        for layer in self.layers:
            layer.norm_1, layer.norm_2 = norm(), norm()
            layer.qkv, layer.out = stack(WIDTH, 3 * WIDTH, fan_in=WIDTH), stack(WIDTH, WIDTH, fan_in=WIDTH)
            layer.up, layer.up_bias = stack(WIDTH, 4 * WIDTH, fan_in=WIDTH), stack(1, 4 * WIDTH, fan_in=WIDTH)
            layer.down, layer.down_bias = stack(4 * WIDTH, WIDTH, fan_in=4 * WIDTH), stack(1, WIDTH, fan_in=4 * WIDTH)
        self.norm, self.head = norm(), stack(WIDTH, vocabulary, fan_in=WIDTH)

    def forward(self, tokens, positions, mask, runs=slice(None)):
        """Logits [R, B, T - 7, V] from the prompt's last token on; tokens [R, B, T], positions [T], mask [T, T] as from
        answer_tree; `runs`: the part of the stack that `tokens` is for.
        """

        def normed(x, norm):
            return torch.addcmul(norm[0][runs], F.layer_norm(x, (WIDTH,)), norm[1][runs])

        (R, B, T), V = tokens.shape, self.head.shape[-1]
        rows = tokens + V * torch.arange(R, device=tokens.device)[:, None, None]  # of all R vocabularies, stacked
        x = F.embedding(rows, self.tokens[runs].flatten(0, 1)) + self.positions[runs, None, positions]
        x = x.view(R, B * T, WIDTH)
        for layer in self.layers:
            qkv = (normed(x, layer.norm_1) @ layer.qkv[runs]).view(R, B, T, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each [R, B, H, T, D]
            if layer is self.layers[-1]:  # nobody reads the prompt's other tokens behind the last layer
                q, mask = q[..., PROMPT - 1 :, :], mask[PROMPT - 1 :]
                x = x.view(R, B, T, WIDTH)[:, :, PROMPT - 1 :].reshape(R, -1, WIDTH)
            attention = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT + mask, -1) @ v
            x = x + attention.transpose(2, 3).reshape(x.shape) @ layer.out[runs]
            hidden = F.gelu(torch.baddbmm(layer.up_bias[runs], normed(x, layer.norm_2), layer.up[runs]))
            x = x + torch.baddbmm(layer.down_bias[runs], hidden, layer.down[runs])
        return (normed(x, self.norm) @ self.head[runs]).view(R, B, -1, V)


def answer_tree(lefts: int, parents, device=None):
    """Positions [T] and additive attention mask [T, T] of one prompt and many answers behind it.

    T = 8 + lefts + len(parents): the prompt, the answers' left digits, and operators, the i-th behind the left digit
    parents[i]. Answers share the prompt but do not see each other. Right digits are only predicted, so never read.
    """
    positions = torch.tensor([*range(PROMPT), *[PROMPT] * lefts, *[PROMPT + 1] * len(parents)])
    visible = torch.eye(len(positions), dtype=torch.bool)
    visible[:, :PROMPT] = torch.ones_like(visible[:, :PROMPT]).tril()
    for i, parent in enumerate(parents):
        visible[PROMPT + lefts + i, PROMPT + parent] = True
    return positions.to(device), torch.zeros(visible.shape).masked_fill(~visible, -math.inf).to(device)


def branch_logps(logits, lefts: int, temperature: float):
    """log p(left) [.., 10], log p(operator | left) [.., lefts, 5], log p(right | left, operator) [.., operators, 10].

    logits [.., 1 + lefts + operators, V]: of an answer tree. Where a digit must stand only digits have a chance.
    """
    logits = logits / temperature
    left, operator, right = logits.split((1, lefts, logits.shape[-2] - 1 - lefts), -2)
    return left[..., 0, :10].log_softmax(-1), operator[..., 10:15].log_softmax(-1), right[..., :10].log_softmax(-1)


def answer_logps(branches, left, operator, right):
    """log p(y | x, z) [.., C] of the answers (left, operator, right), each [.., C], one branch each."""
    first, second, third = branches
    second, third = second.gather(-1, operator[..., None]), third.gather(-1, right[..., None])
    return first.gather(-1, left) + second[..., 0] + third[..., 0]


def sample_answers(policies, prompts, noise, temperature: float, tree):
    """Sample C answers behind every prompt [R, B, 8], token by token: argmax of log p - log e, e exponential.

    noise [R, B, C, 25]: log e for ten left digits, five operators, ten right digits; tree: of C answers. Returns its
    tokens [R, B, 8 + 2C], the answers (left, operator, right), each [R, B, C], and the logits, with their graph.
    """
    C, (positions, mask) = noise.shape[2], tree
    lefts, operators, rights = noise.split((10, 5, 10), -1)

    def logits_of(tokens):
        length = tokens.shape[-1]
        return policies(tokens, positions[:length], mask[:length, :length])

    with torch.no_grad():
        left = (branch_logps(logits_of(prompts), 0, temperature)[0][:, :, None] - lefts).argmax(-1)
        tokens = torch.cat([prompts, left], -1)
        operator = (branch_logps(logits_of(tokens), C, temperature)[1] - operators).argmax(-1)
    tokens = torch.cat([tokens, 10 + operator], -1)
    logits = logits_of(tokens)
    right = (branch_logps(logits.detach(), C, temperature)[2] - rights).argmax(-1)
    return tokens, (left, operator, right), logits


# ---- Rewards and advantages ------------------------------------------------------------------------------------------
def skill_logps(policies, tokens, answers, logits, skills, runs):
    """log p(y | x, z') [R', N, B, C] at temperature 1, the sampling skill first, then the others.

    tokens, answers, logits: of sample_answers; skills [R', B, N - 1]: tokens of the other skills; runs: the part of the
    stack to score, R' policies. One pass for all other skills.
    """
    C, (R, B, others) = answers[0].shape[-1], skills.shape

    def repeated(x):  # [R', (N - 1) B, ..]
        return x[runs, None].expand(-1, others, *x.shape[1:]).flatten(1, 2)

    tokens = torch.cat([skills.mT.reshape(R, -1, 1), repeated(tokens[..., 1:])], -1)
    with torch.no_grad():
        scored = branch_logps(policies(tokens, *answer_tree(C, range(C), tokens.device), runs), C, 1.0)
        scored = answer_logps(scored, *map(repeated, answers)).view(R, others, B, C)
        own = answer_logps(branch_logps(logits[runs], C, 1.0), *(part[runs] for part in answers))
    return torch.cat([own[:, None], scored], 1)


def misl_rewards(logps, alpha, beta, cap):
    """clip(alpha log p(y|x,z) - beta log pbar(y|x), -cap, cap), [R, B, C]; logps: skill_logps; alpha, beta [R, 1, 1]."""
    mixture = logps.logsumexp(1) - math.log(logps.shape[1])
    return (alpha * logps[:, 0] - beta * mixture).clamp(-cap, cap)


def pass_k_advantages(rewards):
    """What each of C answers adds to the best of its group: max_j r_j - max_{j != i} r_j. rewards [.., C]."""
    best = rewards.topk(2, -1).values
    return (rewards - best[..., 1:]).clamp(min=0)


def exact_kl(branches, reference):
    """Sum over an answer's places of the exact KL(policy || reference) there, [.., C]; both from branch_logps."""
    left, operator, right = ((p.exp() * (p - q)).sum(-1) for p, q in zip(branches, reference, strict=True))
    return left[..., None] + operator + right


# ---- Exact evaluation ------------------------------------------------------------------------------------------------
def information(logps):
    """I(y; z | x) in nats, z uniform, from log p(y | x, z) [.., N, Y]: mean log p(y|z) / pbar(y), over y and z. [..]"""
    return (logps.exp() * log_ratio(logps)).sum(-1).mean(-1)


def log_ratio(logps):
    """log p(y|z) - log (1/N) sum_z' p(y|z'), with log p(y|z) [.., N, Y] given."""
    return logps - logps.logsumexp(-2, keepdim=True) + math.log(logps.shape[-2])


def exact_figures(branches, correct) -> dict[str, torch.Tensor]:
    """Expectations over all 500 answers, and over one answer of each skill where pass@N says so; each [R, P].

    branches: [R, P, N, 10], [R, P, N, 10, 5], [R, P, N, 50, 10], of the tree of all answers; correct [P, 500]. mi is
    I(y; z | x); mi_token, the paper's, sums log p(y_t|z) - log (1/N) sum_z' p(y_t|z') over tokens and over-counts it;
    mi_correct is I(correctness; z | x), all that pass@N can gain from. [R, P, N]: accuracy of each skill, and with five
    more columns its operators.
    """
    left, operator, right = (branch.double() for branch in branches)
    right = right.unflatten(-2, (10, 5))  # [R, P, N, 10, 5, 10]
    N = left.shape[-2]
    joint = left[..., None] + operator  # [R, P, N, 10, 5]
    logps = (joint[..., None] + right).flatten(3)  # [R, P, N, 500]
    p = logps.exp()
    p_correct = (p * correct[:, None]).sum(-1)  # [R, P, N]
    mean = p_correct.mean(-1)
    bits = torch.stack([p_correct, 1 - p_correct], -1).clamp(min=1e-300).log()
    by_token = log_ratio(left.flatten(3))[..., None] + log_ratio(operator.flatten(3)).view(operator.shape)
    by_token = (by_token[..., None] + log_ratio(right.flatten(3)).view(right.shape)).flatten(3)
    return {
        "eval/pass@1": mean, f"eval/pass@{N}": 1 - (1 - p_correct).prod(-1), f"eval/iid_pass@{N}": 1 - (1 - mean) ** N,
        "eval/entropy": -(p * logps).sum(-1).mean(-1), "skill/mi": information(logps),
        "skill/mi_token": (p * by_token).sum(-1).mean(-1), "skill/mi_correct": information(bits),
        "skill/z_decoded": p.amax(-2).sum(-1) / N, "skill/accuracy": p_correct, "skill/operators": joint.exp().sum(-2),
    }  # fmt: skip


@torch.no_grad()
def evaluate_policies(policies, problems, correct, weights, skills, temperature: float) -> dict[str, torch.Tensor]:
    """Means over problems of exact_figures, {key: [R, ..]}, for each of `weights`, {prefix of the key: chances [P]}.

    problems [P, 3], correct [P, 500], skills [N]: tokens of z.
    """
    R, N, device, sums = len(policies.head), len(skills), problems.device, defaultdict(float)
    tree = answer_tree(10, [left for left in range(10) for _ in range(5)], device)
    answers = torch.tensor([*range(10), *list(range(10, 15)) * 10], device=device)  # tokens behind the prompt
    for part in torch.arange(len(problems)).split(max(1, 8_000 // (R * N * len(tree[0])))):  # tokens at a time
        prompts = make_prompts(problems[part, None].expand(-1, N, -1), skills.expand(len(part), -1)).flatten(0, 1)
        tokens = torch.cat([prompts, answers.expand(len(prompts), -1)], -1).expand(R, -1, -1)
        branches = branch_logps(policies(tokens, *tree), 10, temperature)
        figures = exact_figures([branch.unflatten(1, (len(part), N)) for branch in branches], correct[part])
        for (prefix, weight), (key, figure) in product(weights.items(), figures.items()):
            sums[key.replace("/", f"/{prefix}")] += torch.einsum("rp...,p->r...", figure.cpu(), weight[part])
    return sums


# ---- Table and figure ------------------------------------------------------------------------------------------------
def interval(values) -> tuple[float, float]:
    """Mean of values [S] over seeds and half the width of its 95 % t-interval; 0 of a single one, which has none."""
    values = np.asarray(values, float)
    t = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return values.mean(), t * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0


def draw_figure(path: Path, records: list[dict], arms: list[str], N: int):
    """Figure 4: pass@1 and pass@N against updates, mean and t-interval over seeds; operators by skill, first seed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 1 + len(arms), figsize=(5 + 2.6 * len(arms), 4), layout="constrained",
                                width_ratios=[2, *[1] * len(arms)])  # fmt: skip
    steps = sorted({record["step"] for record in records})
    for i, arm in enumerate(arms):
        mine = [record for record in records if record["arm"] == arm]
        for key, style in (f"eval/pass@{N}", "-"), ("eval/pass@1", "--"):
            bands = [interval([record[key] for record in mine if record["step"] == step]) for step in steps]
            mean, half = np.array(bands).T
            axes[0].plot(steps, mean, style, color=f"C{i}", label=f"{arm}: {key.split('/')[1]}")
            axes[0].fill_between(steps, mean - half, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)
        shares = np.array(next(record for record in mine if record["step"] == steps[-1])["skill/operators"])  # [N, 5]
        for j, operator in enumerate(OPERATORS):
            axes[i + 1].bar(range(N), shares[:, j], bottom=shares[:, :j].sum(1), label=operator)
        axes[i + 1].set(title=f"{arm}: operators", xlabel="skill z", xticks=range(N), ylim=(0, 1))
    axes[0].set(xlabel="updates", ylabel="exact chance", ylim=(0, 1))
    for ax in axes[0], axes[-1]:
        ax.legend(fontsize="small")
    figure.savefig(path, dpi=150)


# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    import tyro
    from tqdm import tqdm
    args = tyro.cli(Args, description=__doc__)
    check_arguments(args, positive=(
        "num_seeds num_steps questions_per_step group_size temperature cap lr").split())
    if len(set(args.arms)) < max(1, len(args.arms)):
        fail("--arms needs at least one arm, and none twice.")
    if args.max_z < 2:
        fail(f"--max-z {args.max_z} leaves no skills to tell apart; it must be at least 2.")
    if args.max_z > 10 and args.skill_tokens == "digits":
        fail(f"--max-z {args.max_z} is more than the ten digits; add --skill-tokens dedicated.")
    beta = args.alpha if args.beta is None else args.beta
    settings = {  # arm: alpha, beta, MI for right answers only, advantage of r_correct by pass_k_advantages
        "grpo": (0.0, 0.0, False, False), "pass-k": (0.0, 0.0, False, True), "mi": (args.alpha, beta, False, False),
        "gated-mi": (args.gated_alpha, args.gated_alpha, True, args.gated_advantage == "pass-k"),
    }  # fmt: skip
    arms = [arm for arm in settings if arm in args.arms]  # those with MI last: one slice of the stack
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    A, S, N, B, C = len(arms), len(seeds), args.max_z, args.questions_per_step, args.group_size
    R = A * S  # policies: all seeds of the first arm, all seeds of the second, ..

    # task
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems, chance, correct, solution = arithmetic_problems(args.division)
    kinds, kind = problems.sort(-1).values.unique(dim=0, return_inverse=True)  # multisets, and that of each problem [P]
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(args.seed))
    held_out = torch.isin(kind, order[: round(args.test_share * len(kinds))])  # [P]
    if held_out.all():
        fail(f"--test-share {args.test_share} leaves no problem to train on.")
    splits = {"": chance * ~held_out, "test_": chance * held_out} if held_out.any() else {"": chance}
    splits = {prefix: weight / weight.sum() for prefix, weight in splits.items()}
    # evaluations on the way take one order of each multiset, with the chance of all its orders
    shuffled = torch.randperm(len(kind), generator=torch.Generator().manual_seed(0))
    shuffled = shuffled[kind[shuffled].argsort(stable=True)]
    probe = shuffled[kind.bincount().cumsum(0) - 1]
    probe_splits = {prefix: torch.zeros(len(kinds)).double().index_add(0, kind, w) for prefix, w in splits.items()}
    first_z = 15 if args.skill_tokens == "dedicated" else 0  # token of z = 0
    skills = first_z + torch.arange(N, device=device)
    problems, correct, solution = problems.to(device), correct.to(device), solution.to(device)

    # run folder: the same --run-name goes on where it stopped, with the same arguments or not at all
    run_dir = Path(args.output_dir) / (args.run_name or f"{Path(__file__).stem}__{args.seed}__{int(time.time())}")
    args_path, metrics_path = run_dir / "args.json", run_dir / "metrics.jsonl"
    if (run_dir / "figure4.png").exists():
        print(f"{run_dir} is complete, its figure is {run_dir / 'figure4.png'}; another --run-name starts a new run.")
        sys.exit(0)
    if args_path.exists():
        before, now = json.loads(args_path.read_text()), json.loads(json.dumps(asdict(args)))
        if changed := [f"--{k.replace('_', '-')} was {before.get(k)!r} and is {v!r}" for k, v in now.items()
                       if k not in ("run_name", "output_dir", "save_every") and before.get(k) != v]:
            fail(f"{run_dir} was started with other arguments: {', '.join(changed)}; give those or another --run-name.")
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        fail(f"{run_dir} exists and holds no run; choose another --run-name.")
    run_dir.mkdir(parents=True, exist_ok=True)
    if not args_path.exists():
        (run_dir / "args.tmp").write_text(json.dumps(asdict(args), indent=2))
        (run_dir / "args.tmp").rename(args_path)

    # policies; a seed has one generator for all its draws, so that they do not depend on which other seeds and arms run
    policies = Policies(seeds * A, first_z + N if first_z else 15).to(device)
    parameters = list(policies.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    generators = [torch.Generator().manual_seed(2**32 + seed) for seed in seeds]  # not those of the weights

    def draw(function):  # function(generator) of each seed, the same for all arms: [R, ..]
        values = torch.stack([function(generator) for generator in generators])
        return values.repeat(A, *[1] * (values.dim() - 1)).to(device)

    def draw_prompts():  # problems [R, B], skills [R, B], prompts [R, B, 8]
        chosen = draw(lambda generator: torch.multinomial(splits[""], B, replacement=True, generator=generator))
        z = draw(lambda generator: torch.randint(N, (B,), generator=generator))
        return chosen, z, make_prompts(problems[chosen], skills[z])

    def update(losses):  # [R]: the gradient of their sum is each policy's own; returns gradient norms before the clip
        optimizer.zero_grad()
        losses.sum().backward()
        norms = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters]).sum(0).sqrt()
        if not norms.isfinite().all():
            fail(f"a gradient is not finite; the last checkpoint in {run_dir} is sound: lower --lr.")
        if args.max_grad_norm:
            scale = (args.max_grad_norm / (norms + 1e-6)).clamp(max=1)
            for p in parameters:
                p.grad.mul_(scale.view(-1, *[1] * (p.dim() - 1)))
        optimizer.step()
        return norms

    def log_evaluation(step, sums, chosen, weights):
        figures = evaluate_policies(policies, problems[chosen], correct[chosen], weights, skills, args.temperature)
        for prefix in weights:
            figures[f"eval/{prefix}best_skill_accuracy"] = figures[f"skill/{prefix}accuracy"].amax(-1)
        figures |= {key: value / sums["updates"] for key, value in sums.items() if key != "updates"}  # since the last
        with open(metrics_path, "a") as file:
            for run in range(R):
                record = {key: value[run].tolist() for key, value in figures.items()}
                file.write(json.dumps({"step": step, "arm": arms[run // S], "seed": seeds[run % S]} | record) + "\n")
        means = [figures[key].view(A, S).mean(1).tolist() for key in ("eval/pass@1", f"eval/pass@{N}")]
        line = "   ".join(f"{arm} {one:.3f} {many:.3f}" for arm, one, many in zip(arms, *means, strict=True))
        tqdm.write(f"update {step}/{args.num_steps}, pass@1 and pass@{N}: {line}")

    signals = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    reference = deepcopy(policies).requires_grad_(False)  # the imitators, for --kl-coef
    kept = {"policies": policies, "reference": reference, "optimizer": optimizer}
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():  # what was logged after it is cut off and done again
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(f"{checkpoint} is damaged ({error}); delete it to start the run again.")
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.set_state(saved)
        step, sums, logged = state["step"], state["sums"], state["logged"]
    else:
        step, sums, logged = 0, {}, 0
    with open(metrics_path, "ab") as file:
        file.truncate(logged)
    if step == 0:
        # imitation: cross-entropy of one solution, summed over its tokens; z is random, so all skills start alike
        tree = answer_tree(1, [0], device)
        for _ in tqdm(range(args.warmup_steps), desc="imitation", disable=None):
            chosen, z, prompts = draw_prompts()
            answers = solution[chosen, None]  # [R, B, 1]
            left, operator, right = answers // 50, answers // 10 % 5, answers % 10
            logits = policies(torch.cat([prompts, left, 10 + operator], -1), *tree)
            update(-answer_logps(branch_logps(logits, 1, 1.0), left, operator, right).mean((1, 2)))
        reference.load_state_dict(policies.state_dict())
        log_evaluation(0, {}, probe, probe_splits)

    # reinforcement
    columns = zip(*(settings[arm] for arm in arms), strict=True)
    alpha, beta, gated, by_max = (  # each [R, 1, 1]
        torch.tensor(column, device=device).repeat_interleave(S)[:, None, None] for column in columns)
    scored = slice(S * sum(arm in ("grpo", "pass-k") for arm in arms), None)  # policies with an MI reward
    tree = answer_tree(C, range(C), device)
    bar = tqdm(range(step, args.num_steps), initial=step, total=args.num_steps, disable=None)
    for step in bar:
        started = time.perf_counter()
        chosen, z, prompts = draw_prompts()
        noise = draw(lambda generator: torch.empty(B, C, 25).exponential_(generator=generator)).log_()
        tokens, answers, logits = sample_answers(policies, prompts, noise, args.temperature, tree)
        left, operator, right = answers
        r_correct = correct[chosen[..., None], 50 * left + 10 * operator + right].float()  # [R, B, C]
        r_mi = torch.zeros_like(r_correct)
        if scored.start < R:
            others = skills[(z[scored, :, None] + torch.arange(1, N, device=device)) % N]
            logps = skill_logps(policies, tokens, answers, logits, others, scored)  # [R', N, B, C]
            r_mi[scored] = misl_rewards(logps, alpha[scored], beta[scored], args.cap)
            r_mi = torch.where(gated, r_mi * r_correct, r_mi)
        centred = r_correct - r_correct.mean(-1, keepdim=True)
        advantages = torch.where(by_max, pass_k_advantages(r_correct), centred) + r_mi - r_mi.mean(-1, keepdim=True)
        branches = branch_logps(logits, C, args.temperature)
        losses = -(answer_logps(branches, *answers) * advantages).sum((1, 2))  # [R]
        if args.kl_coef:
            kl = exact_kl(branch_logps(logits, C, 1.0), branch_logps(reference(tokens, *tree), C, 1.0))  # [R, B, C]
            losses = losses + args.kl_coef * kl.sum((1, 2))
        norms = update(losses)

        # log, and keep
        measured = {"updates": 1, "charts/accuracy": r_correct.mean((1, 2)), "skill/mi_reward": r_mi.mean((1, 2)),
                    "losses/grad_norm": norms, "time/total": torch.tensor([time.perf_counter() - started] * R)}
        if args.kl_coef:
            measured["losses/kl"] = kl.detach().mean((1, 2))
        sums = {key: sums.get(key, 0) + value for key, value in measured.items()}
        done = step + 1
        if args.eval_every and done % args.eval_every == 0 and done < args.num_steps:
            log_evaluation(done, sums, probe, probe_splits)
            sums = {}
        if signals or done == args.num_steps or (args.save_every and done % args.save_every == 0):
            state = {"step": done, "logged": metrics_path.stat().st_size, "sums": sums,
                     "generators": [generator.get_state() for generator in generators],
                     **{name: thing.state_dict() for name, thing in kept.items()}}  # fmt: skip
            torch.save(state, run_dir / "checkpoint.tmp")
            (run_dir / "checkpoint.tmp").rename(checkpoint)
        if signals:
            print(f"signal {signals[0]}: saved after update {done}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + signals[0])

    # the end: every order of every problem, figure, table
    log_evaluation(args.num_steps, sums, torch.arange(len(problems)), splits)
    records = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    draw_figure(run_dir / "figure4.png", records, arms, N)
    keys = ["eval/pass@1", f"eval/pass@{N}", f"eval/iid_pass@{N}", "skill/mi", "skill/mi_token"]
    keys += [f"eval/test_pass@{k}" for k in (1, N)] if "test_" in splits else []
    columns = {key: {arm: np.array([record[key] for record in records[-R:] if record["arm"] == arm]) for arm in arms}
               for key in keys}  # fmt: skip
    print(f"\nmean over {S} seeds, 95 % t-interval" + "".join(f"{key.split('/')[1]:>16}" for key in keys))
    for arm in arms:
        cells = [interval(column[arm]) for column in columns.values()]
        print(f"{arm:<32}" + "".join(f"{mean:>9.3f} ± {half:.3f}" for mean, half in cells))
        paper = PAPER.get((arm, args.alpha * (arm == "mi"), args.cap * (arm == "mi")))
        if paper and N == 5:
            print(f"{'  the paper, one seed, sampled':<32}{paper[0]:>9.3f}{paper[1]:>16.3f}{'':>32}{paper[2]:>16.3f}")
    for arm in arms:
        if arm != "grpo" and "grpo" in arms:
            cells = [interval(column[arm] - column["grpo"]) for column in columns.values()]
            print(f"{arm + ' - grpo':<32}" + "".join(f"{mean:>+9.3f} ± {half:.3f}" for mean, half in cells))
    print(f"figure: {run_dir / 'figure4.png'}   metrics: {metrics_path}   policies: {checkpoint}")

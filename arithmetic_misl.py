"""UpSkill's arithmetic study (Shah et al. 2026, arXiv 2602.22296: section 5.1, figure 4, appendices E.6 and F).

A problem x is three digits, an answer y is "digit operator digit": right if its value is one of the three and its
operands are the other two. A skill z in 0..N-1, drawn uniformly, opens the prompt. A policy of 407,808 parameters first
imitates solutions for 100 steps, then learns by REINFORCE with the group's mean reward as baseline, 2,000 updates of
32 problems with one z each and C = 5 answers:

    r(y; x, z) = r_correct + clip(alpha log p(y|x,z) - beta log pbar(y|x), -cap, cap)                             arm mi
    pbar(y|x)  = (1/N) sum_z' p(y|x,z'),      r_correct = 1 if right, else 0

With beta = alpha the second term's mean is about alpha I(y; z | x): skills spread over different answers, so asking
each of them once finds a right one more often (pass@N). The price is pass@1: a skill may be distinct and always wrong.
Three more arms: `grpo`, without the second term; `pass-k`, also without, whose advantage is what an answer adds to the
best reward of its group; `gated-mi`, pass-k with a second term for right answers only, and never below 0.

All arms and seeds train at once, as a stack of independent policies. Evaluation enumerates all problems and all 500
answers: its numbers are exact expectations. The answer's three places are built into the functions from answer_tree to
exact_figures: another reward is a small change, another answer format is not.

Plain torch, a CPU is enough. Left out: the token-level reward (only reported), the 24-game. Results are in README.md.

    python arithmetic_misl.py                   # figure 4: a table and runs/arithmetic_misl__*/figure4.png
"""

import json
import math
import signal
import sys
import time
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from itertools import permutations, product
from operator import add, mod, mul, sub, truediv
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from first_edition import check_arguments, fail

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv, "%": mod}
STAR = 10 + list(OPERATORS).index("*")  # tokens: ten digits, five operators; the prompt's separator is the token of "*"
PROMPT = 8  # tokens of a prompt: z * a * b * c *
WIDTH, HEADS, LAYERS, POSITIONS = 128, 4, 2, 64  # ten positions are used; the original has 64
# The authors' logged figures for seed 0 after 2,000 updates, their last of 300 problems: pass@1, pass@5, token-form MI.
PAPER = {("grpo",): (0.735, 0.737, -0.003), ("mi", 0.5, 1): (0.369, 0.847, 2.299),
         ("mi", 1, 1): (0.345, 0.853, 2.446), ("mi", 0.5, 1.5): (0.391, 0.830, 2.486)}  # fmt: skip
# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; for more, that of 9, a little too wide
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, seed, time)
    output_dir: str = "runs"  # where run folders are made
    arms: tuple[Literal["grpo", "pass-k", "mi", "gated-mi"], ...] = ("grpo", "pass-k", "mi", "gated-mi")  # to compare
    seed: int = 0  # first seed, of weights and draws; the arms of a seed start alike and meet the same problems
    num_seeds: int = 3  # seeds of each arm: seed, seed + 1, ..
    # task
    division: Literal["truncated", "exact"] = "truncated"  # truncated: 7/2 = 3 is right, as in the original
    skill_tokens: Literal["digits", "dedicated"] = "digits"  # z's token: its digit, as in the original, or its own
    test_share: float = 0.0  # share of the 102 multisets of digits kept out of training, the same for all seeds
    max_z: int = 5  # number of skills N
    # imitation
    warmup_steps: int = 100  # steps of imitating solutions before the first update
    # rollout
    num_steps: int = 2000  # updates of every policy
    questions_per_step: int = 32  # problems in an update, each with one z
    group_size: int = 5  # answers C to a problem and its z; their mean reward is the baseline
    temperature: float = 0.9  # of sampling, gradient and evaluations, their MI too; MI reward and KL are at 1
    # UpSkill
    alpha: float = 0.5  # arm mi: weight of log p(y|x,z)
    beta: float | None = None  # arm mi: weight of log pbar(y|x); None: alpha
    cap: float = 1.0  # the MI reward is clipped to [-cap, cap]
    gated_alpha: float = 0.2  # arm gated-mi: alpha and beta, of the MI reward of right answers
    gated_advantage: Literal["mean", "pass-k"] = "pass-k"  # arm gated-mi: r_correct's, as in grpo or pass-k
    kl_coef: float = 0.0  # weight of KL(policy || imitator) in the loss of every arm (appendix F: 0.05)
    # optimizer
    lr: float = 5e-4  # learning rate, constant, the same in both phases
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm clip, of each policy by itself; 0: none
    # evaluation and checkpoint
    eval_every: int = 200  # evaluate every so many updates, besides the start and the end; 0: only there
    save_every: int = 200  # write the checkpoint every so many updates; 0: only at the end or on a signal


# ---- The task --------------------------------------------------------------------------------------------------------
def value(left: int, operator: str, right: int) -> float | None:
    """left operator right, by true division and Python's modulo; None where a division by 0 leaves it undefined."""
    return None if operator in "/%" and right == 0 else OPERATORS[operator](left, right)


def arithmetic_problems(division: str):
    """Every problem, its chance, its right answers, and the answer to imitate.

    The generator draws x, operator, y uniformly until v = x operator y is an integer in 0..9, then shuffles (x, y, v).
    Returns digits [P, 3]; chance [P], double; correct [P, 500] bool, an answer's index being 50 left + 10 operator
    + right; solution [P]: the first that is right by exact division, by target digit, operand order, operator.
    """
    answers = list(product(range(10), OPERATORS, range(10)))
    values = [value(*answer) for answer in answers]
    graded = [v if v is None or division == "exact" else int(v) for v in values]
    counts = Counter(digits for (x, _, y), v in zip(answers, values, strict=True) if v in range(10)  # not 2.5, not None
                     for digits in permutations((x, y, int(v))))  # fmt: skip
    problems, correct, solution = sorted(counts), [], []
    for digits in problems:
        splits = [(digits[k], *others) for k in range(3) for others in permutations(digits[:k] + digits[k + 1 :])]
        correct.append([(v, left, right) in splits for v, (left, _, right) in zip(graded, answers, strict=True)])
        solution.append(next(answers.index((left, operator, right)) for target, left, right in splits
                             for operator in OPERATORS if value(left, operator, right) == target))  # fmt: skip
    chance = torch.tensor([counts[digits] for digits in problems], dtype=torch.double)
    return torch.tensor(problems), chance / chance.sum(), torch.tensor(correct), torch.tensor(solution)


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

    def forward(self, tokens, positions, mask, members=slice(None)):
        """Logits [R, B, T - 7, V] from the prompt's last token on; tokens [R, B, T]: an answer tree, or its beginning;
        positions, mask: answer_tree's; members: the part of the stack that `tokens` is for.
        """

        def normed(x, norm):
            return torch.addcmul(norm[0][members], F.layer_norm(x, (WIDTH,)), norm[1][members])

        (R, B, T), V = tokens.shape, self.head.shape[-1]
        positions, mask = positions[:T], mask[:T, :T]
        offsets = V * torch.arange(R, device=tokens.device)[:, None, None]  # one table, a policy's rows below another's
        x = F.embedding(tokens + offsets, self.tokens[members].flatten(0, 1)) + self.positions[members, None, positions]
        x = x.view(R, B * T, WIDTH)
        for layer in self.layers:
            qkv = (normed(x, layer.norm_1) @ layer.qkv[members]).view(R, B, T, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each [R, B, H, T, D]
            if layer is self.layers[-1]:  # nobody reads the prompt's other tokens behind the last layer
                q, mask = q[..., PROMPT - 1 :, :], mask[PROMPT - 1 :]
                x = x.view(R, B, T, WIDTH)[:, :, PROMPT - 1 :].reshape(R, -1, WIDTH)
            attention = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT + mask, -1) @ v
            x = x + attention.transpose(2, 3).reshape(x.shape) @ layer.out[members]
            hidden = F.gelu(torch.baddbmm(layer.up_bias[members], normed(x, layer.norm_2), layer.up[members]))
            x = x + torch.baddbmm(layer.down_bias[members], hidden, layer.down[members])
        return (normed(x, self.norm) @ self.head[members]).view(R, B, -1, V)


def answer_tree(num_lefts: int, parents, device=None):
    """Positions [T] and additive attention mask [T, T] of one prompt and many answers behind it.

    T = 8 + num_lefts + len(parents): the prompt, the left digits, and operators, the i-th behind the left digit
    parents[i]. Answers share the prompt but do not see each other. Right digits are only predicted, so never read.
    """
    positions = torch.tensor([*range(PROMPT), *[PROMPT] * num_lefts, *[PROMPT + 1] * len(parents)])
    visible = torch.eye(len(positions), dtype=torch.bool)
    visible[:, :PROMPT] = torch.ones_like(visible[:, :PROMPT]).tril()
    for i, parent in enumerate(parents):
        visible[PROMPT + num_lefts + i, PROMPT + parent] = True
    return positions.to(device), torch.zeros(visible.shape).masked_fill(~visible, -math.inf).to(device)


def branch_logps(logits, num_lefts: int, temperature: float):
    """log p(left) [.., 10], log p(operator | left) [.., lefts, 5], log p(right | left, operator) [.., operators, 10].

    logits [.., 1 + lefts + operators, V] of an answer tree. Digits compete with digits only, operators with operators.
    """
    logits = logits / temperature
    left, operator, right = logits.split((1, num_lefts, logits.shape[-2] - 1 - num_lefts), -2)
    return left[..., 0, :10].log_softmax(-1), operator[..., 10:15].log_softmax(-1), right[..., :10].log_softmax(-1)


def answer_logps(branches, left, operator, right):
    """log p(y | x, z) [.., C] of the answers (left, operator, right), each [.., C], one branch each."""
    first, second, third = branches
    second, third = second.gather(-1, operator[..., None]), third.gather(-1, right[..., None])
    return first.gather(-1, left) + second[..., 0] + third[..., 0]


def sample_answers(policies, prompts, noise, temperature: float, tree):
    """Sample C answers behind every prompt [R, B, 8], token by token, as argmax of log p - log e (Gumbel-max).

    noise [R, B, C, 25]: log e, e exponential, for ten left digits, five operators, ten right digits; tree: of C.
    Returns its tokens [R, B, 8 + 2C], the answers (left, operator, right), each [R, B, C], and the last pass's logits,
    with gradient: the pass that samples right digits is the one that trains. A prompt of 8 tokens needs no cache.
    """
    noise_left, noise_operator, noise_right = noise.split((10, 5, 10), -1)
    with torch.no_grad():
        first, *_ = branch_logps(policies(prompts, *tree), 0, temperature)  # [R, B, 10]
        left = (first[:, :, None] - noise_left).argmax(-1)
        tokens = torch.cat([prompts, left], -1)
        _, second, _ = branch_logps(policies(tokens, *tree), noise.shape[2], temperature)  # [R, B, C, 5]
        operator = (second - noise_operator).argmax(-1)
    tokens = torch.cat([tokens, 10 + operator], -1)
    logits = policies(tokens, *tree)
    *_, third = branch_logps(logits.detach(), noise.shape[2], temperature)  # [R, B, C, 10]
    return tokens, (left, operator, (third - noise_right).argmax(-1)), logits


# ---- Rewards and advantages ------------------------------------------------------------------------------------------
def skill_logps(policies, tokens, answers, logits, others, tree, members):
    """log p(y | x, z') [R', N, B, C] at temperature 1, the sampling skill first, then the others, in one pass.

    tokens, answers, logits: of sample_answers; others [R', B, N - 1]: tokens of the other skills; tree: of C answers;
    members: the part of the stack to score, R' policies.
    """
    C, M = answers[0].shape[-1], others.shape[-1]
    tokens = tokens[members, None].repeat(1, M, 1, 1)  # [R', N - 1, B, 8 + 2C]
    tokens[..., 0] = others.mT
    with torch.no_grad():
        own = answer_logps(branch_logps(logits[members], C, 1.0), *(part[members] for part in answers))
        branches = branch_logps(policies(tokens.flatten(1, 2), *tree, members), C, 1.0)
        scored = answer_logps(branches, *(part[members].repeat(1, M, 1) for part in answers))
    return torch.cat([own[:, None], scored.unflatten(1, (M, -1))], 1)


def misl_rewards(logps, alpha, beta, cap: float):
    """clip(alpha log p(y|x,z) - beta log pbar(y|x), -cap, cap), [R, B, C]; logps [R, N, B, C], alpha [R, 1, 1]."""
    mixture = logps.logsumexp(1) - math.log(logps.shape[1])
    return (alpha * logps[:, 0] - beta * mixture).clamp(-cap, cap)


def pass_k_advantages(rewards):
    """What each of C answers adds to the best of its group: max_j r_j - max_{j != i} r_j. rewards [.., C]."""
    best = rewards.topk(2, -1).values
    return (rewards - best[..., 1:]).clamp(min=0)


def arm_advantages(r_correct, r_mi, gated, pass_k):
    """Advantages [R, B, C] within the groups of C answers; r_correct, r_mi [R, B, C]; gated, pass_k [R, 1, 1] bool.

    r_correct's is itself less the group's mean, or pass_k_advantages; every other term has the mean as its baseline.
    gated: MI for right answers only, and never below 0, so that being wrong is no way out.
    """
    r_mi = torch.where(gated, r_mi.clamp(min=0) * r_correct, r_mi)
    advantages = torch.where(pass_k, pass_k_advantages(r_correct), r_correct - r_correct.mean(-1, keepdim=True))
    return advantages + r_mi - r_mi.mean(-1, keepdim=True)


def exact_kl(branches, reference):
    """Sum over an answer's three places of KL(policy || reference), over all tokens there, [.., C]; of branch_logps."""
    left, operator, right = ((p.exp() * (p - q)).sum(-1) for p, q in zip(branches, reference, strict=True))
    return left[..., None] + operator + right


# ---- Exact evaluation ------------------------------------------------------------------------------------------------
def log_ratio(logps):
    """log p(y|z) - log (1/N) sum_z' p(y|z') from log p(y|z) [R, P, N, ..], N being skills z."""
    return logps - logps.logsumexp(2, keepdim=True) + math.log(logps.shape[2])


def exact_figures(branches, correct) -> dict[str, torch.Tensor]:
    """Expectations over all 500 answers, and over one answer of each skill where pass@N says so; each [R, P].

    branches: [R, P, N, 10], [R, P, N, 10, 5], [R, P, N, 50, 10], of the tree of all answers; correct [P, 500]. mi is
    I(y; z | x); mi_token, the paper's, sums log p(y_t|z) - log (1/N) sum_z' p(y_t|z') over tokens, which exceeds it;
    mi_correct is I(correctness; z | x), all that pass@N can gain from; z_decoded: the chance that the skill most likely
    to give an answer gave it. skill/accuracy [R, P, N]; skill/operators [R, P, N, 5]: how often each is used.
    """
    left, operator, right = (branch.double() for branch in branches)
    right = right.unflatten(-2, (10, 5))  # [R, P, N, 10, 5, 10]
    joint = left[..., None] + operator  # [R, P, N, 10, 5]
    logps = (joint[..., None] + right).flatten(3)  # [R, P, N, 500]
    p, N = logps.exp(), logps.shape[2]
    p_correct = (p * correct[:, None]).sum(-1)  # [R, P, N]
    mean = p_correct.mean(-1)
    outcome = torch.stack([p_correct, 1 - p_correct], -1).clamp(min=1e-300).log()  # [R, P, N, 2]
    by_token = ((log_ratio(left)[..., None] + log_ratio(operator))[..., None] + log_ratio(right)).flatten(3)

    def expected(p, x):  # over answers y of each skill, mean over skills
        return (p * x).sum(-1).mean(-1)

    return {
        "eval/pass@1": mean, f"eval/pass@{N}": 1 - (1 - p_correct).prod(-1), f"eval/iid_pass@{N}": 1 - (1 - mean) ** N,
        "eval/entropy": expected(p, -logps), "skill/mi": expected(p, log_ratio(logps)),
        "skill/mi_token": expected(p, by_token), "skill/mi_correct": expected(outcome.exp(), log_ratio(outcome)),
        "skill/z_decoded": p.amax(2).sum(-1) / N, "skill/accuracy": p_correct, "skill/operators": joint.exp().sum(-2),
    }  # fmt: skip


@torch.no_grad()
def evaluate_policies(policies, problems, correct, weights, skills, temperature: float) -> dict[str, torch.Tensor]:
    """{key: [R, ..]}: exact_figures averaged over problems, once for each of `weights`, {prefix: chances [P]}.

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
    """Mean of values [S] over seeds and half the width of its 95 % t-interval; that of a single one is nan."""
    values = np.asarray(values, float)
    t = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return values.mean(), t * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan


def draw_figure(path: Path, records: list[dict], arms: list[str], N: int):
    """Figure 4: pass@1 and pass@N against updates, mean and t-interval over seeds; first seed's operators by skill."""
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
        last = next(record for record in mine if record["step"] == steps[-1])
        shares = np.array(last["skill/operators"])  # [N, 5]
        for j, operator in enumerate(OPERATORS):
            axes[i + 1].bar(range(N), shares[:, j], bottom=shares[:, :j].sum(1), label=operator)
        for z, accuracy in enumerate(last["skill/accuracy"]):
            axes[i + 1].text(z, 1.01, f"{accuracy:.2f}", ha="center", fontsize="small")
        axes[i + 1].set(title=f"{arm}\n", xlabel="skill z (above: accuracy)", xticks=range(N), ylim=(0, 1))
    axes[0].set(xlabel="updates", ylabel="exact chance", ylim=(0, 1))
    axes[0].legend(fontsize="small", ncols=2, loc="lower center")
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    import matplotlib
    import tyro
    from tqdm import tqdm
    matplotlib.use("Agg")
    args = tyro.cli(Args, description=__doc__)
    check_arguments(args, positive="num_seeds num_steps questions_per_step group_size temperature cap lr".split())
    if len(set(args.arms)) < max(1, len(args.arms)):  # none, or one twice
        fail("--arms needs at least one arm, and none twice.")
    if args.max_z < 2:
        fail(f"--max-z {args.max_z} leaves no skills to tell apart; it must be at least 2.")
    if args.max_z > 10 and args.skill_tokens == "digits":
        fail(f"--max-z {args.max_z} is more than the ten digits; add --skill-tokens dedicated.")
    beta = args.alpha if args.beta is None else args.beta
    settings = {  # arm: alpha, beta, MI for right answers only, r_correct's advantage by pass_k_advantages
        "grpo": (0.0, 0.0, False, False), "pass-k": (0.0, 0.0, False, True), "mi": (args.alpha, beta, False, False),
        "gated-mi": (args.gated_alpha, args.gated_alpha, True, args.gated_advantage == "pass-k"),
    }  # fmt: skip
    arms = sorted((arm for arm in settings if arm in args.arms), key=lambda arm: any(settings[arm][:2]))  # MI last
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    A, S, N, B, C = len(arms), len(seeds), args.max_z, args.questions_per_step, args.group_size
    R = A * S  # policies: all seeds of the first arm, all seeds of the second, ..
    scored = slice(S * sum(not any(settings[arm][:2]) for arm in arms), None)  # those with an MI reward

    # run folder: the same --run-name goes on where it stopped, with the same arguments or not at all
    run_dir = Path(args.output_dir) / (args.run_name or f"{Path(__file__).stem}__{args.seed}__{int(time.time())}")
    args_path, metrics_path, checkpoint = (run_dir / name for name in ("args.json", "metrics.jsonl", "checkpoint.pt"))
    if args_path.exists():
        before, now = json.loads(args_path.read_text()), json.loads(json.dumps(asdict(args)))  # tuples become lists
        if changed := [f"--{k.replace('_', '-')} was {before.get(k)!r} and is {v!r}" for k, v in now.items()
                       if k not in ("run_name", "output_dir", "save_every") and before.get(k) != v]:
            fail(f"{run_dir} was started with other arguments: {', '.join(changed)}; give those or another --run-name.")
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        fail(f"{run_dir} exists and holds no run; choose another --run-name.")
    if (run_dir / "figure4.png").exists():
        print(f"{(run_dir / 'table.txt').read_text()}{run_dir} is complete; another --run-name starts a new run.")
        sys.exit(0)

    # task
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems, chance, correct, solution = arithmetic_problems(args.division)
    multisets, multiset = problems.sort(-1).values.unique(dim=0, return_inverse=True)  # and that of each problem, [P]
    order = torch.randperm(len(multisets), generator=torch.Generator().manual_seed(0))
    held_out = torch.isin(multiset, order[: math.ceil(args.test_share * len(order))])  # [P]
    if held_out.all():
        fail(f"--test-share {args.test_share} leaves no problem to train on.")
    splits = {"": chance * ~held_out, "test_": chance * held_out}
    splits = {prefix: weight / weight.sum() for prefix, weight in splits.items() if weight.any()}
    first_z = 15 if args.skill_tokens == "dedicated" else 0  # token of z = 0
    skills = first_z + torch.arange(N, device=device)
    problems, correct, solution = problems.to(device), correct.to(device), solution.to(device)

    # policies; a seed has one generator for all its draws, so that they do not depend on which other seeds and arms run
    policies = Policies(seeds * A, first_z + N if first_z else 15).to(device)
    parameters = list(policies.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    generators = [torch.Generator().manual_seed(2**31 + seed) for seed in seeds]  # not those of the weights

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
        for i in (~norms.isfinite()).nonzero().flatten().tolist()[:1]:
            fail(f"the gradient of arm {arms[i // S]}, seed {seeds[i % S]} is {norms[i]}: start another --run-name "
                 "with a lower --lr.")
        scale = ((args.max_grad_norm or math.inf) / (norms + 1e-6)).clamp(max=1)
        for p in parameters:
            p.grad.mul_(scale.view(-1, *[1] * (p.dim() - 1)))
        optimizer.step()
        return norms

    def log_evaluation(step, sums):
        figures = evaluate_policies(policies, problems, correct, splits, skills, args.temperature)
        best = figures["skill/accuracy"].argmax(-1, keepdim=True)  # chosen on what is trained on
        for prefix in splits:
            figures[f"eval/{prefix}best_skill_accuracy"] = figures[f"skill/{prefix}accuracy"].gather(-1, best)[:, 0]
        figures |= {key: value / sums["updates"] for key, value in sums.items() if key != "updates"}
        for i in range(R):
            record = {key: value[i].tolist() for key, value in figures.items()}
            records.append({"step": step, "arm": arms[i // S], "seed": seeds[i % S]} | record)
        metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
        means = [figures[key].view(A, S).mean(1).tolist() for key in ("eval/pass@1", f"eval/pass@{N}")]
        line = "   ".join(f"{arm} {one:.3f} {many:.3f}" for arm, one, many in zip(arms, *means, strict=True))
        tqdm.write(f"update {step}/{args.num_steps}, pass@1 and pass@{N}: {line}")

    # resume, or imitate
    run_dir.mkdir(parents=True, exist_ok=True)
    args_path.write_text(json.dumps(asdict(args), indent=2))
    signals = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    reference = deepcopy(policies).requires_grad_(False)  # the imitators, for --kl-coef
    kept = {"policies": policies, "reference": reference, "optimizer": optimizer}
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(f"{checkpoint} is damaged ({error}); delete it to start the run again.")
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.set_state(saved)
        done, sums, records = state["done"], state["sums"], state["records"]
        metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        # cross-entropy of one solution, summed over its tokens; z is random, so all skills start alike
        done, sums, records = 0, {}, []
        tree = answer_tree(1, [0], device)
        for _ in tqdm(range(args.warmup_steps), desc="imitation", disable=None):
            chosen, z, prompts = draw_prompts()
            answers = solution[chosen, None]  # [R, B, 1]
            left, operator, right = answers // 50, answers // 10 % 5, answers % 10
            branches = branch_logps(policies(torch.cat([prompts, left, 10 + operator], -1), *tree), 1, 1.0)
            update(-answer_logps(branches, left, operator, right).mean((1, 2)))
        reference.load_state_dict(policies.state_dict())
        log_evaluation(0, {})

    # reinforcement
    columns = zip(*(settings[arm] for arm in arms), strict=True)
    alpha, beta, gated, pass_k = (  # each [R, 1, 1]
        torch.tensor(column, device=device).repeat_interleave(S)[:, None, None] for column in columns)
    tree = answer_tree(C, range(C), device)
    start = done
    for done in tqdm(range(start + 1, args.num_steps + 1), initial=start, total=args.num_steps, disable=None):
        started = time.perf_counter()
        chosen, z, prompts = draw_prompts()
        noise = draw(lambda generator: torch.empty(B, C, 25).exponential_(generator=generator)).log_()
        tokens, answers, logits = sample_answers(policies, prompts, noise, args.temperature, tree)
        left, operator, right = answers
        r_correct = correct[chosen[..., None], 50 * left + 10 * operator + right].float()  # [R, B, C]
        r_mi = torch.zeros_like(r_correct)
        if scored.start < R:
            others = skills[(z[scored, :, None] + torch.arange(1, N, device=device)) % N]  # [R', B, N - 1]
            logps = skill_logps(policies, tokens, answers, logits, others, tree, scored)  # [R', N, B, C]
            r_mi[scored] = misl_rewards(logps, alpha[scored], beta[scored], args.cap)
        advantages = arm_advantages(r_correct, r_mi, gated, pass_k)  # [R, B, C]
        # summed over the 160 answers, as in the original: with max_grad_norm 1 the clip nearly always acts
        losses = -(answer_logps(branch_logps(logits, C, args.temperature), *answers) * advantages).sum((1, 2))  # [R]
        measured = {"charts/accuracy": r_correct.mean((1, 2)), "skill/mi_reward": r_mi.mean((1, 2))}
        if args.kl_coef:
            kl = exact_kl(branch_logps(logits, C, 1.0), branch_logps(reference(tokens, *tree), C, 1.0))  # [R, B, C]
            losses = losses + args.kl_coef * kl.sum((1, 2))
            measured["losses/kl"] = kl.detach().mean((1, 2))
        measured["losses/grad_norm"] = update(losses)
        measured |= {"time/total": torch.full((R,), time.perf_counter() - started), "updates": torch.ones(R)}
        sums = {key: sums.get(key, 0) + value.cpu() for key, value in measured.items()}

        # log, and keep
        if args.eval_every and done % args.eval_every == 0 and done < args.num_steps:
            log_evaluation(done, sums)
            sums = {}
        if signals or done == args.num_steps or (args.save_every and done % args.save_every == 0):
            state = {name: thing.state_dict() for name, thing in kept.items()}
            state |= {"done": done, "sums": sums, "records": records, "generators": [g.get_state() for g in generators]}
            torch.save(state, run_dir / "checkpoint.tmp")
            (run_dir / "checkpoint.tmp").rename(checkpoint)
        if signals:
            print(f"signal {signals[0]}: saved after update {done}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + signals[0])

    # the end: table and figure
    log_evaluation(args.num_steps, sums)
    keys = ["eval/pass@1", f"eval/pass@{N}", f"eval/iid_pass@{N}", "skill/mi", "skill/mi_token"]
    keys += [f"eval/test_pass@{k}" for k in (1, N)] if "test_" in splits else []
    last = {arm: [np.array([record[key] for record in records[-R:] if record["arm"] == arm]) for key in keys]
            for arm in arms}  # fmt: skip
    pairs = [("pass-k", "grpo"), ("mi", "grpo"), ("gated-mi", "grpo"), ("gated-mi", "pass-k")]
    rows = last | {f"{a} - {b}": [x - y for x, y in zip(last[a], last[b], strict=True)]
                   for a, b in pairs if a in last and b in last}  # fmt: skip
    same = all(getattr(args, field.name) == field.default for field in fields(args) if field.name not in (
        "run_name", "output_dir", "arms", "seed", "num_seeds", "alpha", "cap", "gated_alpha", "gated_advantage",
        "eval_every", "save_every"))  # fmt: skip
    table = f"mean over {S} seeds, 95 % t-interval" + "".join(f"{key.split('/')[1]:>16}" for key in keys) + "\n"
    for name, columns in rows.items():
        cells = [f"{mean:>9.3f}" + (f" ± {half:.3f}" if S > 1 else f"{'':7}") for mean, half in map(interval, columns)]
        table += f"{name:<32}" + "".join(cells) + "\n"
        if same and (paper := PAPER.get((name,) if name == "grpo" else (name, args.alpha, args.cap))):
            table += f"{'  the paper, one seed, sampled':<32}{paper[0]:>9.3f}{paper[1]:>16.3f}{paper[2]:>48.3f}\n"
    print(f"\n{table}figure: {run_dir / 'figure4.png'}   metrics: {metrics_path}   policies: {checkpoint}")
    (run_dir / "table.txt").write_text(table)
    draw_figure(run_dir / "unfinished.png", records, arms, N)
    (run_dir / "unfinished.png").rename(run_dir / "figure4.png")

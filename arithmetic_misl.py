"""UpSkill's arithmetic study (Shah et al. 2026, arXiv 2602.22296, section 5.1, figure 4, appendices E.6 and F).

A problem x is three digits. An answer y is "digit operator digit": it is right if its value is one of the three digits
and its operands are the other two. A skill z in 0..N-1 is the first token of the prompt. A small transformer imitates
solutions for 100 steps. Then it learns by REINFORCE from C answers to each problem and its one random z:

    r(y; x, z) = r_correct + r_MI,                   r_correct = 1 right, 0 wrong
    r_MI       = clip(alpha log p(y | x, z) - beta log (1/N) sum_z' p(y | x, z'), -cap, cap)
    A_i        = r_i - mean r of the C answers

With beta = alpha, and without the clip, the mean of r_MI is alpha I(y; z | x). Four arms are compared:

    grpo       r_correct alone
    mi         the paper's: r_correct + r_MI
    pass-k     r_correct alone, and its advantage is what an answer adds to the best of the C answers
    gated-mi   pass-k, and r_MI for right answers only, never below 0

All arms and seeds are independent policies that train at once, as one stack: each weight has a first axis R over them.
An evaluation enumerates all problems and all 500 answers, so that its figures are exact expectations.

Plain torch on a CPU. Left out: the paper's token-level reward (it is measured only), and the 24-game. Results, and what
the authors' own program gives, are in docs/arithmetic_misl.md.

    python arithmetic_misl.py                                     # all four arms, three seeds
    python arithmetic_misl.py --arms grpo mi --num-seeds 1        # the pair of figure 4, in minutes
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations, permutations, product
from operator import add, mod, mul, sub, truediv
from pathlib import Path
from typing import Literal

# Idle CPU threads go to sleep after some microseconds: busy waiting makes a shared CPU ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

from eval_gsm8k import plain_error

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv, "%": mod}
VOCABULARY = 15  # tokens: ten digits, then the five operators; a skill's token is its digit
STAR = 12  # the prompt's separator is the token of "*"
PROMPT = 8  # tokens of a prompt: z * a * b * c *
WIDTH, HEADS, LAYERS, POSITIONS = 128, 4, 2, 64
# Shapes: R policies of the stack, P all problems, B problems of an update, N skills, C answers to a problem and its z,
# T tokens of a prompt and its answers, V the vocabulary.


Arm = Literal["grpo", "pass-k", "mi", "gated-mi"]


@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, seed, time)
    output_dir: str = "runs"  # where run folders are made
    arms: tuple[Arm, ...] = ("grpo", "pass-k", "mi", "gated-mi")  # what is trained and compared, see above
    seed: int = 0  # the first seed; all random numbers are computed from the seed and the step
    num_seeds: int = 3  # seeds of each arm: seed, seed + 1, ..
    # imitation
    warmup_steps: int = 100  # steps of imitating solutions before the first update
    # rollout
    num_steps: int = 2000  # updates of every policy
    questions_per_step: int = 32  # problems in an update, each with one skill
    group_size: int = 5  # answers C to a problem and its skill; their mean reward is the baseline
    temperature: float = 0.9  # of sampling, gradient and evaluation; the MI reward and the KL are taken at 1
    # UpSkill
    max_z: int = 5  # number of skills N
    alpha: float = 0.5  # arm mi: weight of log p(y | x, z)
    beta: float | None = None  # arm mi: weight of the log of the mixture; None: alpha
    cap: float = 1.0  # the MI reward is clipped to [-cap, cap]
    gated_alpha: float = 0.2  # arm gated-mi: both weights of the MI reward of right answers
    gated_advantage: Literal["mean", "pass-k"] = "pass-k"  # arm gated-mi: the advantage of r_correct, of grpo or pass-k
    # loss
    kl_coef: float = 0.0  # weight of KL(policy || imitator), for every arm; appendix F has 0.05
    # optimizer
    lr: float = 5e-4  # constant, the same in both phases
    max_grad_norm: float = 1.0  # gradient norm clip, of each policy by itself
    # evaluation and checkpoint
    eval_every: int = 400  # evaluate every so many updates, besides the start and the end
    save_every: int = 200  # write the checkpoint every so many updates, besides the end


# ---- Reward and loss -------------------------------------------------------------------------------------------------
def misl_rewards(logps, alpha, beta, cap: float):
    """clip(alpha log p(y | x, z) - beta log (1/N) sum_z' p(y | x, z'), -cap, cap), [R, B, C].

    logps [R, B, N, C]: log p(y | x, z') under every skill, the one that sampled first; alpha, beta [R, 1, 1].
    """
    own = logps[:, :, 0]  # [R, B, C]
    mixture = logps.logsumexp(2) - math.log(logps.shape[2])  # [R, B, C]
    return (alpha * own - beta * mixture).clamp(-cap, cap)


def pass_k_advantages(rewards):
    """What each of C answers adds to the best of its group: max_j r_j - max_{j != i} r_j. rewards [.., C]."""
    second_best = rewards.topk(2, -1).values[..., 1:]
    return (rewards - second_best).clamp(min=0)


def arm_advantages(r_correct, r_mi, gated, pass_k):
    """Advantages [R, B, C] within the C answers of a group; r_correct, r_mi [R, B, C]; gated, pass_k [R, 1, 1] bool.

    The baseline of r_MI is the group's mean. r_correct has it too, or pass_k_advantages. Where gated, only right
    answers get r_MI, and never less than 0: with a negative one, a right answer could rank below a wrong one.
    """
    advantages = r_correct - r_correct.mean(-1, keepdim=True)
    advantages = torch.where(pass_k, pass_k_advantages(r_correct), advantages)
    r_mi = torch.where(gated, r_mi.clamp(min=0) * r_correct, r_mi)
    return advantages + r_mi - r_mi.mean(-1, keepdim=True)


def exact_kl(branches, reference):
    """KL(policy || reference) over all tokens at each of an answer's three places, summed: [.., C], of branch_logps."""
    divergences = []
    for p, q in zip(branches, reference, strict=True):
        divergences.append((p.exp() * (p - q)).sum(-1))
    left, operator, right = divergences  # [..], [.., C], [.., C]
    return left[..., None] + operator + right


# ---- The task --------------------------------------------------------------------------------------------------------
def calculate(left: int, operator: str, right: int) -> float | None:
    """left operator right, by true division and Python's modulo; None where right is 0 and must not be."""
    if operator in "/%" and right == 0:
        return None
    return OPERATORS[operator](left, right)


def first_solution(digits) -> list[int]:
    """The answer to imitate, [left, operator, right]: the first exact one by target digit, operand order, operator."""
    for k in range(3):
        first, second = digits[:k] + digits[k + 1 :]
        for left, right in (first, second), (second, first):
            for index, operator in enumerate(OPERATORS):
                if calculate(left, operator, right) == digits[k]:
                    return [left, index, right]


def arithmetic_problems():
    """Every problem, its chance, its right answers, and the answer to imitate.

    The authors' generator draws x, operator, y uniformly until v = x operator y is a whole number in 0..9, and shuffles
    (x, y, v). Its checker cuts values to whole numbers, so that 7/2 counts as 3.
    Returns digits [P, 3]; chance [P] double; correct [P, 500] bool, where the index of an answer is
    50 left + 10 operator + right; solution [P, 3], see first_solution.
    """
    answers = list(product(range(10), OPERATORS, range(10)))
    values = [calculate(*answer) for answer in answers]
    counts = Counter()
    for (x, _, y), value in zip(answers, values, strict=True):
        if value in range(10):  # neither a fraction nor None
            counts.update(permutations((x, y, int(value))))
    problems = sorted(counts)

    correct = np.zeros((len(problems), len(answers)), dtype=bool)
    for column, (left, _, right) in enumerate(answers):
        if values[column] is None:
            continue
        needed = sorted((left, right, int(values[column])))
        for row, digits in enumerate(problems):
            correct[row, column] = needed == sorted(digits)

    chance = torch.tensor([counts[digits] for digits in problems]).double()
    solution = torch.tensor([first_solution(digits) for digits in problems])
    return torch.tensor(problems), chance / chance.sum(), torch.tensor(correct), solution


def draw(policies, step: int, purpose: int, chance, args):
    """A step's problems [R, B], skills z [R, B] and Gumbel noise [R, B, C, 25], for 10 + 5 + 10 tokens of an answer.

    They follow from the policy's seed, the step and the purpose. So the arms of a seed meet the same, and a policy's
    numbers do not depend on what else is in the stack. policies: (arm, seed) of each; chance [P].
    """
    B, C = args.questions_per_step, args.group_size
    problems, skills, noise = [], [], []
    for _, seed in policies:
        rng = np.random.default_rng([seed, step, purpose])
        problems.append(torch.tensor(rng.choice(len(chance), B, p=chance)))
        skills.append(torch.tensor(rng.integers(args.max_z, size=B)))
        noise.append(torch.tensor(rng.gumbel(size=(B, C, 25))))
    return torch.stack(problems), torch.stack(skills), torch.stack(noise).float()


def make_prompts(digits, z):
    """Tokens [.., 8] of the prompts "z * a * b * c *"; digits [.., 3], z [..]."""
    prompts = torch.full((*z.shape, PROMPT), STAR)
    prompts[..., 0] = z
    prompts[..., 2::2] = digits
    return prompts


# ---- Policy and log-probabilities ------------------------------------------------------------------------------------
class Layer(nn.Module):
    """Attention and MLP of a pre-norm transformer, without dropout."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, mask, first: int):
        """x [B, T, WIDTH] to [B, T - first, WIDTH], the tokens from `first` on; mask [T, T]: of answer_tree."""
        B, T, _ = x.shape
        D = WIDTH // HEADS
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, HEADS, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, HEADS, T, D]
        q = q[:, :, first:]
        scores = q @ k.mT / math.sqrt(D) + mask[first:]  # [B, HEADS, T - first, T]
        attended = scores.softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)  # [B, T - first, WIDTH]
        x = x[:, first:] + self.out(attended)
        hidden = F.gelu(self.up(self.norm_2(x)))
        return x + self.down(hidden)


class Transformer(nn.Module):
    """One decoder-only policy of 407,808 parameters, with PyTorch's default initial weights."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens, positions, mask):
        """Logits [B, T - 7, V] from the prompt's last token on; tokens [B, T], positions [T], mask [T, T]."""
        x = self.tokens(tokens) + self.positions(positions)  # [B, T, WIDTH]
        for layer in self.layers[:-1]:
            x = layer(x, mask, first=0)
        x = self.layers[-1](x, mask, first=PROMPT - 1)  # nobody reads the prompt's other tokens after it
        return self.head(self.norm(x))


with torch.device("meta"):
    FORWARD = Transformer()  # only its forward pass is used; weights are given in each call


def make_policies(seeds: list[int]) -> dict[str, torch.Tensor]:
    """The stack's weights, {name: [R, ..]}, one policy for each of the seeds; equal seeds give equal policies."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(Transformer())
    weights, _ = stack_module_state(models)
    return weights


def policy_logits(weights, tokens, tree):
    """Logits [R, B, 1 + lefts + operators, V]: every policy reads its own tokens [R, B, T].

    weights: of make_policies; tree: of answer_tree. The tokens may end early: then only the tree's beginning is read.
    """
    positions, mask = tree
    T = tokens.shape[-1]
    positions = positions[:T]
    mask = mask[:T, :T]

    def forward(weights, tokens):  # of one policy
        return functional_call(FORWARD, weights, (tokens, positions, mask))

    return vmap(forward)(weights, tokens)


def answer_tree(num_lefts: int, num_operators: int):
    """Positions [T] and mask [T, T] of a prompt with many answers behind it, which share its 8 tokens.

        4 * 2 * 3 * 6 *       the prompt "z * a * b * c *": every token sees those before it
         |     |     |
         6     2     6        left digits: each sees the prompt and itself
         |     |     |
         /     *     -        operators, num_operators behind each left digit: each sees the prompt, its left digit
                              and itself. The right digit is predicted there, and never read.

    T = 8 + num_lefts + num_lefts * num_operators. Three answers take 14 tokens, not 30, and all 500 take 68, not 5,000.
    The mask is 0 where a token (row) sees a token (column), else -inf.
    """
    parents = torch.arange(num_lefts).repeat_interleave(num_operators)  # which left digit an operator stands behind
    positions = torch.tensor([*range(PROMPT), *[PROMPT] * num_lefts, *[PROMPT + 1] * len(parents)])
    T = len(positions)
    sees = torch.eye(T)
    sees[:, :PROMPT] = torch.ones(T, PROMPT).tril()
    sees[torch.arange(PROMPT + num_lefts, T), PROMPT + parents] = 1
    return positions, torch.where(sees.bool(), 0.0, -math.inf)


def branch_logps(logits, num_lefts: int, temperature: float):
    """log p(left) [.., 10], log p(operator | left) [.., lefts, 5], log p(right | left, operator) [.., operators, 10].

    logits [.., 1 + lefts + operators, V] of an answer tree. Digits compete with digits only, operators with operators.
    """
    logits = logits / temperature
    left = logits[..., 0, :10]
    operator = logits[..., 1 : 1 + num_lefts, 10:]
    right = logits[..., 1 + num_lefts :, :10]
    return left.log_softmax(-1), operator.log_softmax(-1), right.log_softmax(-1)


def answer_logps(branches, answers):
    """log p(y | x, z) [.., C] of answers [.., C, 3] = (left, operator, right); branches: of their tree."""
    left, operator, right = branches
    left = left.gather(-1, answers[..., 0])
    operator = operator.gather(-1, answers[..., 1:2])
    right = right.gather(-1, answers[..., 2:])
    return left + operator[..., 0] + right[..., 0]


def sample_answers(weights, prompts, noise, temperature: float, tree):
    """C answers to every prompt [R, B, 8]: their tokens with the prompt, the answers, and the logits of the last pass.

    A token is argmax(logits / temperature + Gumbel noise), which is a draw from the softmax; noise [R, B, C, 25].
    There are three passes, over 8, 8 + C and 8 + 2C tokens. The last has a gradient: it samples the right digits, and
    it is also the pass that trains. Returns tokens [R, B, 8 + 2C], answers [R, B, C, 3], logits [R, B, 1 + 2C, V].
    """
    C = noise.shape[2]
    noise_left, noise_operator, noise_right = noise.split((10, 5, 10), -1)
    with torch.no_grad():
        logits = policy_logits(weights, prompts, tree)
        left = (logits[:, :, :1, :10] / temperature + noise_left).argmax(-1)  # [R, B, C]
        tokens = torch.cat([prompts, left], -1)
        logits = policy_logits(weights, tokens, tree)
        operator = (logits[:, :, 1:, 10:] / temperature + noise_operator).argmax(-1)
        tokens = torch.cat([tokens, 10 + operator], -1)
    logits = policy_logits(weights, tokens, tree)
    right = (logits.detach()[:, :, 1 + C :, :10] / temperature + noise_right).argmax(-1)
    return tokens, torch.stack([left, operator, right], -1), logits


@torch.no_grad()
def skill_logps(weights, tokens, answers, logits, num_skills: int, tree):
    """log p(y | x, z') [R, B, N, C] under every skill z', at temperature 1; the skill that sampled comes first.

    tokens, answers, logits: of sample_answers. The logits are the sampling skill's own; one pass scores the others.
    """
    C = answers.shape[2]
    own = answer_logps(branch_logps(logits, C, 1.0), answers)  # [R, B, C]
    others = tokens[:, :, None].repeat(1, 1, num_skills - 1, 1)  # [R, B, N - 1, T]
    others[..., 0] = (others[..., 0] + torch.arange(1, num_skills)) % num_skills  # the first token is z
    logits = policy_logits(weights, others.flatten(1, 2), tree)  # [R, B (N - 1), 1 + 2C, V]
    answers = answers.repeat_interleave(num_skills - 1, 1)
    logps = answer_logps(branch_logps(logits, C, 1.0), answers)  # [R, B (N - 1), C]
    return torch.cat([own[:, :, None], logps.unflatten(1, (-1, num_skills - 1))], 2)


def update(optimizer, losses, max_grad_norm: float, policies):
    """One optimizer step on losses [R]. Returns the gradient norm [R] of each policy, before it is clipped."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    losses.sum().backward()  # policies share no weight, so each gets the gradient of its own loss
    squares = 0.0
    for parameter in parameters:
        squares = squares + parameter.grad.flatten(1).square().sum(1)  # [R]
    norms = squares.sqrt()
    for (arm, seed), norm in zip(policies, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            sys.exit(f"error: the gradient norm of arm {arm}, seed {seed} is {norm}; lower --lr, in a new --run-name.")
    scales = (max_grad_norm / (norms + 1e-6)).clamp(max=1)
    for parameter in parameters:
        parameter.grad = torch.einsum("r,r...->r...", scales, parameter.grad)
    optimizer.step()
    return norms


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def log_ratio(logps):
    """log p(y | z) - log (1/N) sum_z' p(y | z') of logps [R, P, N, ..]."""
    return logps - logps.logsumexp(2, keepdim=True) + math.log(logps.shape[2])


def exact_figures(branches, correct) -> dict[str, torch.Tensor]:
    """{key: [R, P]}: expectations over all 500 answers; where the key says pass@N, over one answer of each skill.

    branches [R, P, N, 10], [R, P, N, 10, 5], [R, P, N, 50, 10]: of the tree of all answers; correct [P, 500].

    skill/mi          I(y; z | x) = E log p(y | x, z) / (1/N) sum_z' p(y | x, z'), at most ln N
    skill/mi_token    the paper's: the same ratio of every token given those before it, summed; more than I
    skill/mi_correct  I(correctness; z | x): all that pass@N can gain from
    skill/z_decoded   chance that the skill most likely to give an answer is the one that gave it
    skill/accuracy    [R, P, N]; skill/operators [R, P, N, 5]: how often a skill uses each
    """
    left, operator, right = [branch.double() for branch in branches]
    right = right.unflatten(-2, (10, 5))  # [R, P, N, 10, 5, 10]
    pairs = left[..., None] + operator  # [R, P, N, 10, 5]
    logps = (pairs[..., None] + right).flatten(3)  # [R, P, N, 500]
    p = logps.exp()
    N = p.shape[2]
    accuracy = (p * correct[:, None]).sum(-1)  # [R, P, N]
    pass_1 = accuracy.mean(-1)  # [R, P]

    pair_ratios = log_ratio(left)[..., None] + log_ratio(operator)
    token_ratios = (pair_ratios[..., None] + log_ratio(right)).flatten(3)  # [R, P, N, 500]
    outcomes = torch.stack([accuracy, 1 - accuracy], -1).clamp(min=1e-300)  # [R, P, N, 2]
    return {
        "eval/pass@1": pass_1,
        f"eval/pass@{N}": 1 - (1 - accuracy).prod(-1),
        f"eval/iid_pass@{N}": 1 - (1 - pass_1) ** N,
        "eval/entropy": -(p * logps).sum(-1).mean(-1),
        "skill/mi": (p * log_ratio(logps)).sum(-1).mean(-1),
        "skill/mi_token": (p * token_ratios).sum(-1).mean(-1),
        "skill/mi_correct": (outcomes * log_ratio(outcomes.log())).sum(-1).mean(-1),
        "skill/z_decoded": p.amax(2).sum(-1) / N,
        "skill/accuracy": accuracy,
        "skill/operators": pairs.exp().sum(-2),
    }


@torch.no_grad()
def evaluate_exactly(weights, digits, correct, chance, num_skills: int, temperature: float) -> dict[str, torch.Tensor]:
    """{key: [R, ..]}: exact_figures, averaged over problems; digits [P, 3], correct [P, 500], chance [P]."""
    tree = answer_tree(10, 5)
    answers = torch.tensor([*range(10), *[*range(10, VOCABULARY)] * 10])  # the tree's tokens behind the prompt
    num_policies = len(weights["head.weight"])
    sums = defaultdict(float)
    for part in torch.arange(len(digits)).split(8):  # problems at a time
        skills = torch.arange(num_skills).repeat(len(part))  # [P N]
        prompts = make_prompts(digits[part].repeat_interleave(num_skills, 0), skills)
        tokens = torch.cat([prompts, answers.expand(len(prompts), -1)], -1)
        logits = policy_logits(weights, tokens.expand(num_policies, -1, -1), tree)  # [R, P N, 61, V]
        branches = branch_logps(logits.unflatten(1, (-1, num_skills)), 10, temperature)
        for key, figure in exact_figures(branches, correct[part]).items():
            sums[key] += torch.einsum("rp...,p->r...", figure, chance[part])
    return sums


def interval(values) -> tuple[float, float]:
    """Mean of the values over seeds, and half the width of its 95 % t-interval; nan for a single seed."""
    from scipy import stats

    half = math.nan
    if len(values) > 1:
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(half)


def results_table(records: list[dict], arms: list[str], N: int) -> str:
    """One line for each arm, and for each pair of arms their difference, seed by seed; records: the last evaluation."""
    keys = ["eval/pass@1", f"eval/pass@{N}", f"eval/iid_pass@{N}", "skill/mi", "skill/mi_token"]
    rows = {}
    for arm in arms:
        own = [record for record in records if record["arm"] == arm]
        rows[arm] = np.array([[record[key] for key in keys] for record in own])  # [seeds, keys]
    for first, second in combinations(arms, 2):
        rows[f"{second} - {first}"] = rows[second] - rows[first]

    table = f"{'mean, 95 % t-interval over seeds':<34}" + "".join(f"{key.split('/')[1]:>16}" for key in keys)
    for name, values in rows.items():
        table += f"\n{name:<34}"
        for column in values.T:
            mean, half = interval(column)
            table += f"{mean:>8.3f}" + ("        " if math.isnan(half) else f" ± {half:.3f}")  # a single seed has none
    return table


# ---- Arguments, run folder -------------------------------------------------------------------------------------------
def check_numbers(args, positive: str):
    """End the program if a number is out of range: all must be finite and at least 0, those in `positive` over 0."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not math.isfinite(value):
            sys.exit(f"error: {flag} is {value}; it must be a finite number.")
        if name in positive.split() and value <= 0:
            sys.exit(f"error: {flag} is {value}; it must be over 0.")
        if isinstance(value, (int, float)) and value < 0:
            sys.exit(f"error: {flag} is {value}; it must be at least 0.")


def open_run(args, run_dir: Path) -> str:
    """Make the run's folder and lock it. Returns "", or a sentence if this run cannot have it: then all ranks end.

    The same --run-name goes on where it stopped, with the same arguments: only `free` ones may differ.
    """
    free = "run_name output_dir track max_tokens_per_microbatch gpu_memory_utilization max_logp_diff save_every"
    path = run_dir / "args.json"
    try:
        if run_dir.exists() and set(os.listdir(run_dir)) - {"lock"} and not path.exists():
            return f"error: {run_dir} exists and holds no run; choose another --run-name."
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_CREAT | os.O_RDWR)  # open, and so locked, until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"error: another process runs {run_dir}; wait for its end, or choose another --run-name."
        except OSError:
            pass  # a file system without locks
        wanted = json.loads(json.dumps(asdict(args)))  # with lists for tuples, as the file has them
        before = json.loads(path.read_text()) if path.exists() else wanted
        for name, value in wanted.items():
            if name not in free.split() and before.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                return f"error: {flag} of {run_dir} was {before.get(name)!r}, not {value!r}; choose another --run-name."
        path.with_suffix(".tmp").write_text(json.dumps(asdict(args), indent=2))
        path.with_suffix(".tmp").rename(path)
    except (OSError, ValueError) as error:
        return f"error: {run_dir} cannot be used ({error}); choose another --output-dir or --run-name."
    return ""


# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

    positive = "num_seeds num_steps questions_per_step temperature cap lr max_grad_norm eval_every save_every"
    check_numbers(args, positive)
    if not args.arms or len(set(args.arms)) < len(args.arms):
        sys.exit("error: --arms needs at least one arm, and none of them twice.")
    if args.group_size < 2:
        sys.exit(f"error: --group-size {args.group_size} must be at least 2: an answer is compared with its group.")
    if not 2 <= args.max_z <= 10:
        sys.exit(f"error: --max-z {args.max_z} must be 2 to 10: a skill is told apart, and its token is a digit.")

    # run folder
    run_name = args.run_name or f"{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.output_dir) / run_name
    metrics_path, table_path = run_dir / "metrics.jsonl", run_dir / "table.txt"
    checkpoint_path = run_dir / "checkpoint.pt"
    if table_path.exists():
        print(f"{table_path.read_text()}\n{run_dir} is complete; another --run-name starts a new run.")
        sys.exit(0)
    refusal = open_run(args, run_dir)
    if refusal:
        sys.exit(refusal)

    # policies: all seeds of the first arm, then all of the second, and so on
    policies = []
    for arm in args.arms:
        policies += [(arm, args.seed + i) for i in range(args.num_seeds)]
    weights = make_policies([seed for _, seed in policies])
    optimizer = torch.optim.AdamW(weights.values(), args.lr, weight_decay=0.01, fused=True)

    # what the arms are: weights of the MI reward, and two switches; each [R, 1, 1]
    alpha, beta = torch.zeros(2, len(policies), 1, 1)
    gated, pass_k = torch.zeros(2, len(policies), 1, 1).bool()
    scored = []  # policies with an MI reward
    for i, (arm, _) in enumerate(policies):
        if arm == "mi":
            alpha[i] = args.alpha
            beta[i] = args.alpha if args.beta is None else args.beta
            scored.append(i)
        elif arm == "gated-mi":
            alpha[i] = beta[i] = args.gated_alpha
            gated[i] = True
            pass_k[i] = args.gated_advantage == "pass-k"
            scored.append(i)
        elif arm == "pass-k":
            pass_k[i] = True

    # task
    digits, chance, correct, solution = arithmetic_problems()
    places = torch.tensor([50, 10, 1])  # answer @ places is its index in `correct`

    def write(path, text, mode="a"):
        with plain_error(f"{path} cannot be written; make room, --run-name {run_dir.name} then goes on"):
            with open(path, mode) as file:
                file.write(text)

    def run_evaluation(step, metrics):
        figures = evaluate_exactly(weights, digits, correct, chance, args.max_z, args.temperature) | metrics
        for i, (arm, seed) in enumerate(policies):
            record = {"step": step, "arm": arm, "seed": seed}
            record |= {key: figure[i].tolist() for key, figure in figures.items()}
            write(metrics_path, json.dumps(record) + "\n")
        line = f"update {step}/{args.num_steps}, pass@1 and pass@{args.max_z}:"
        pass_1 = figures["eval/pass@1"].view(len(args.arms), -1).mean(1)
        pass_n = figures[f"eval/pass@{args.max_z}"].view(len(args.arms), -1).mean(1)
        for i, arm in enumerate(args.arms):
            line += f"  {arm} {pass_1[i]:.3f} {pass_n[i]:.3f}"
        tqdm.write(line)

    # resume: what was logged after the checkpoint is cut off and done again
    state = {"step": 0, "metrics_bytes": 0}
    if checkpoint_path.exists():
        with plain_error(f"{checkpoint_path} cannot be read; delete it to start the run again"):
            state = torch.load(checkpoint_path, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(state["weights"][name])
    found = metrics_path.stat().st_size if metrics_path.exists() else 0
    if found < state["metrics_bytes"]:
        sys.exit(f"error: {metrics_path} is shorter than at its checkpoint; restore it, or choose another --run-name.")
    with open(metrics_path, "ab") as file:
        file.truncate(state["metrics_bytes"])
    signals = []
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: signals.append(signum))

    # imitation: cross-entropy of one solution, summed over its tokens; z is random, so all skills start alike
    if state["step"] == 0:
        tree = answer_tree(1, 1)
        for step in tqdm(range(1, args.warmup_steps + 1), desc="imitation", file=sys.stdout, disable=None):
            chosen, z, _ = draw(policies, step, 0, chance, args)
            answers = solution[chosen][:, :, None]  # [R, B, 1, 3]
            left, operator = answers[..., 0], answers[..., 1]
            tokens = torch.cat([make_prompts(digits[chosen], z), left, 10 + operator], -1)  # [R, B, 10]
            logps = answer_logps(branch_logps(policy_logits(weights, tokens, tree), 1, 1.0), answers)  # [R, B, 1]
            update(optimizer, -logps.mean((1, 2)), args.max_grad_norm, policies)
        state["reference"] = {name: weight.detach().clone() for name, weight in weights.items()}
        run_evaluation(0, {})
    reference = state["reference"]  # the imitators, for --kl-coef

    # reinforcement
    tree = answer_tree(args.group_size, 1)
    t0, logged_step = time.perf_counter(), state["step"]
    steps = range(state["step"] + 1, args.num_steps + 1)
    bar = tqdm(steps, initial=state["step"], total=args.num_steps, file=sys.stdout, disable=None)  # None: on a terminal
    for step in bar:
        # rollout
        chosen, z, noise = draw(policies, step, 1, chance, args)
        prompts = make_prompts(digits[chosen], z)  # [R, B, 8]
        tokens, answers, logits = sample_answers(weights, prompts, noise, args.temperature, tree)

        # reward
        r_correct = correct[chosen[..., None], answers @ places].float()  # [R, B, C]
        r_mi = torch.zeros_like(r_correct)
        if len(scored):
            scored_weights = {name: weight[scored] for name, weight in weights.items()}
            sampled = tokens[scored], answers[scored], logits[scored]
            logps_z = skill_logps(scored_weights, *sampled, args.max_z, tree)  # [.., B, N, C]
            r_mi[scored] = misl_rewards(logps_z, alpha[scored], beta[scored], args.cap)
        advantages = arm_advantages(r_correct, r_mi, gated, pass_k)  # [R, B, C]

        # update: a sum over the B C answers as in the original, so that the clip of the gradient acts nearly always
        logps = answer_logps(branch_logps(logits, args.group_size, args.temperature), answers)  # [R, B, C]
        losses = -(logps * advantages).sum((1, 2))  # [R]
        metrics = {}
        if args.kl_coef:
            with torch.no_grad():
                reference_logits = policy_logits(reference, tokens, tree)
            branches = branch_logps(logits, args.group_size, 1.0)
            kl = exact_kl(branches, branch_logps(reference_logits, args.group_size, 1.0))  # [R, B, C]
            losses = losses + args.kl_coef * kl.sum((1, 2))
            metrics["losses/kl"] = kl.detach().mean((1, 2))
        metrics["losses/grad_norm"] = update(optimizer, losses, args.max_grad_norm, policies)
        metrics["charts/accuracy"] = r_correct.mean((1, 2))
        metrics["skill/mi_reward"] = r_mi.mean((1, 2))

        # evaluation and checkpoint
        last = step == args.num_steps
        if last or step % args.eval_every == 0:
            seconds = (time.perf_counter() - t0) / (step - logged_step)
            metrics["time/update"] = torch.full((len(policies),), seconds)
            run_evaluation(step, metrics)
            t0, logged_step = time.perf_counter(), step
        if last or signals or step % args.save_every == 0:
            state = {"step": step, "metrics_bytes": metrics_path.stat().st_size, "reference": reference}
            state |= {"weights": weights, "optimizer": optimizer.state_dict()}
            with plain_error(f"the checkpoint cannot be written to {run_dir}; make room"):
                torch.save(state, run_dir / "unfinished.pt")
                (run_dir / "unfinished.pt").rename(checkpoint_path)
        if signals:
            print(f"signal {signals[0]}: stopped after update {step}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + signals[0])

    # the end: the table
    records = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    records = [record for record in records if record["step"] == args.num_steps]
    table = results_table(records, args.arms, args.max_z)
    print(f"\n{table}\nmetrics: {metrics_path}   policies: {checkpoint_path}")
    write(table_path, table, mode="w")

"""Checkers of notebook 08's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise


@exercise
def ex08_1(windows):
    """Inputs tokens[s : s + seq_len], targets one further on."""
    tokens, starts, seq_len = torch.arange(100, 130), torch.tensor([3, 0, 11]), 5
    inputs, targets = windows(tokens, starts, seq_len)
    right = torch.stack([tokens[s : s + seq_len] for s in starts.tolist()])
    if inputs.shape != right.shape or targets.shape != right.shape:
        raise WrongAnswer(
            f"inputs are {tuple(inputs.shape)} and targets {tuple(targets.shape)} for 3 starts and seq_len 5: "
            "both should be (3, 5), so a window holds seq_len + 1 tokens"
        )
    if not torch.equal(inputs, right):
        raise WrongAnswer("the inputs should begin at the start itself: tokens[s], tokens[s + 1], ...")
    if torch.equal(targets, inputs):
        raise WrongAnswer("the targets equal the inputs: the model would be rewarded for repeating what it sees")
    if torch.equal(targets, right - 1):
        raise WrongAnswer("the targets lie one token before the inputs: the model would learn to predict the past")
    if not torch.equal(targets, right + 1):
        raise WrongAnswer("each target should be the token that follows its input")


@exercise
def ex08_2(learning_rate):
    """Linear warm-up from peak / warmup, then half a cosine from peak to peak / 20."""
    steps, warmup, peak = 110, 10, 2.0
    rates = [float(learning_rate(step, steps, warmup, peak)) for step in range(steps + 1)]

    def close(a, b):
        return abs(a - b) < 1e-9

    if rates[0] == 0:
        raise WrongAnswer("step 0 has rate 0, so its batch is wasted: count the first step as 1 of warmup")
    if not close(rates[0], peak / warmup) or not close(rates[9], peak):
        raise WrongAnswer(
            f"the warm-up goes from {rates[0]:g} to {rates[9]:g}, and should go from 0.2 to 2 in 10 steps"
        )
    if not close(rates[10], peak):
        raise WrongAnswer(
            f"at step warmup you give {rates[10]:g}: the cosine starts there, at the peak, with progress 0"
        )
    if close(rates[110], 0):
        raise WrongAnswer("the rate ends at 0: it should end at peak / 20, so the cosine spans peak / 20 to peak")
    if close(rates[35], (rates[10] + rates[60]) / 2):  # half a cosine lies above its chord here
        raise WrongAnswer("that falls along a straight line: take (1 + cos(π · progress)) / 2")
    if not close(rates[110], peak / 20):
        raise WrongAnswer(f"at the last step you give {rates[110]:g}: with progress 1 it should be peak / 20 = 0.1")
    right = [peak * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - 10) / 100))) for step in range(10, 111)]
    if not all(close(a, b) for a, b in zip(rates[10:], right)):
        raise WrongAnswer("progress should be (step - warmup) / (steps - warmup): 0 at the peak, 1 at the end")


@exercise
def ex08_3(losses_would_differ):
    """Weights, moments and the step number are what a step depends on."""
    reasons = {
        "weights": "training would begin anew from the initial ones",
        "moments": "AdamW divides by them; from zero, its next steps have other lengths and directions",
        "step": "it decides the batch, the learning rate and AdamW's bias correction",
        "gradients": "they are set to zero after every update, so there is nothing to lose",
        "validation_losses": "they are looked at and not used: no update depends on them",
    }
    answers = losses_would_differ()
    if not isinstance(answers, dict) or set(answers) != set(reasons):
        raise WrongAnswer(f"return a dict with exactly these keys: {', '.join(reasons)}")
    for name, reason in reasons.items():
        right = name in ("weights", "moments", "step")
        if answers[name] is not right:
            raise WrongAnswer(f"{name} is {right}, not {answers[name]}: {reason}")


@exercise
def ex08_4(paired_interval):
    """mean ± t · s / √n of the differences."""
    first, second, t = [2.0, 3.0, 4.5, 5.0], [1.5, 2.9, 4.1, 4.4], 3.0
    low, high = (float(x) for x in paired_interval(first, second, t))
    d = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    half, middle = t * d.std().item() / 2, d.mean().item()
    if low > high:
        raise WrongAnswer("low is above high: return (low, high)")
    if abs((low + high) / 2 + middle) < 1e-5:
        raise WrongAnswer("the sign is turned round: take first - second")
    if abs((low + high) / 2 - middle) > 1e-5:
        raise WrongAnswer(f"the middle is {(low + high) / 2:.4f}, and the mean of first - second is {middle:.4f}")
    width = (high - low) / 2
    if abs(width - 2 * half) < 1e-5:
        raise WrongAnswer("too wide: the mean of n differences is √n times less uncertain than one; divide by √n")
    if abs(width - half / 2) < 1e-5:
        raise WrongAnswer("too narrow: divide by √n, not by n")
    if abs(width - half * math.sqrt(3 / 4)) < 1e-5:
        raise WrongAnswer("too narrow: the sample standard deviation divides by n - 1, not by n")
    spread = torch.tensor([first, second], dtype=torch.float64).std(dim=1)
    if abs(width - t * spread.pow(2).sum().sqrt().item() / 2) < 1e-5:
        raise WrongAnswer("not paired: take the deviation of the differences, so that what a seed does to both cancels")
    if abs(width - half) > 1e-5:
        raise WrongAnswer(f"the interval reaches {width:.4f} to either side, and should reach t · s / √n = {half:.4f}")

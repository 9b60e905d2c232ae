"""Checkers of notebook 00's exercises."""

from tpa_minimal.course.checks.judging import WrongAnswer, exercise


@exercise
def ex00_1(numbers_cached_by_mha):
    """2 h d_h numbers: a key and a value of width d_h for each of h heads (Table 1)."""
    got, n_head, d_head = numbers_cached_by_mha(12, 64), 12, 64
    if got == n_head * d_head:
        raise WrongAnswer("that counts keys only: the values are kept as well")
    if got == 2 * d_head:
        raise WrongAnswer("that is one head's key and value: each of the n_head heads has its own")
    if got == 3 * n_head * d_head:
        raise WrongAnswer("queries are not kept: only the newest token asks, and only once")
    if got in (2 * 2 * n_head * d_head, 4 * 2 * n_head * d_head):
        raise WrongAnswer("that looks like bytes, in a 16-bit or 32-bit type: count numbers, whatever their type")
    if got != 2 * n_head * d_head:
        raise WrongAnswer(f"for 12 heads of width 64 you say {got!r}; draw one token's keys and values, and count")

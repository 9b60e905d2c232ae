"""Checkers of notebook 00's exercises."""

from tpa_minimal.course.checks.judging import exercise, judge


@exercise
def ex00_1(attempt):
    """2 h d_h numbers: a key and a value of width d_h for each of h heads (Table 1)."""
    judge(
        attempt,
        lambda n_head, d_head: 2 * n_head * d_head,
        [(12, 64), (32, 128), (5, 7), (34, 64), (1, 3), (8, 96)],
        [
            (lambda h, d: h * d, "that counts keys only: the values are cached as well"),
            (lambda h, d: 2 * d, "that is one head's key and value: each of the n_head heads has its own"),
            (lambda h, d: 2 * h, "that counts keys and values, not their numbers: each has d_head of them"),
            (lambda h, d: 3 * h * d, "queries are not cached: only the newest token asks, and only once"),
            (lambda h, d: 4 * h * d, "that looks like bytes, in a 16-bit type: count numbers, whatever their type"),
            (lambda h, d: 8 * h * d, "that looks like bytes, in a 32-bit type: count numbers, whatever their type"),
            (
                lambda h, d: 2 * (h + d),
                "a key of one head has d_head numbers, so h heads have the product, not the sum",
            ),
            (lambda h, d: 1536, "right for 12 heads of width 64 only: use n_head and d_head"),
        ],
        "draw one token's keys and values, and count",
    )

"""The pictures of factors and keys show the values that they are given, and colour as many numbers as a cache holds."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from tpa_minimal.course import diagrams, looks
from tpa_minimal.tpa import T6Config, TensorProductAttention, factor_attention


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    looks.style()
    yield
    assert not plt.get_fignums()


def drawn(figure, kind):
    """The matrices that `cells` drew as one kind, from the left to the right."""
    (axes,) = figure.axes
    places = {patch.get_bbox().extents.round(6).tobytes() for patch in axes.patches if patch.get_label() == kind}
    images = [image for image in axes.images if frame_of(image) in places]
    return [image.get_array().data for image in sorted(images, key=lambda image: image.get_extent())]


def frame_of(image):
    left, right, bottom, top = image.get_extent()
    return Rectangle((left, top), right - left, bottom - top).get_bbox().extents.round(6).tobytes()


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


random = np.random.default_rng(0)
A, B = random.normal(size=(3, 6)), random.normal(size=(3, 10))  # R 3, h 6, d_h 10


@pytest.mark.parametrize("dark", [False, True])
def test_the_hero_colours_what_is_cached_and_hatches_its_mean_of_outer_products(dark):
    figure = diagrams.hero(A, B, dark=dark)
    cached, keys = drawn(figure, "cached"), drawn(figure, "never built")
    assert sum(matrix.size for matrix in cached) == 3 * (6 + 10)
    assert [matrix.shape for matrix in cached] == [(6, 1), (1, 10)] * 3
    for matrix, r in zip(keys[1:], range(3), strict=True):
        np.testing.assert_allclose(matrix, np.outer(A[r], B[r]))
    np.testing.assert_allclose(keys[0], sum(keys[1:]) / 3)
    assert {"3 × (6 + 10) = 48 numbers", "6 × 10 = 60 numbers"} <= set(words(figure))


def test_the_front_page_gets_one_picture_for_each_background(tmp_path):
    diagrams.write_hero(A, B, tmp_path)
    light, dark = (Image.open(tmp_path / f"hero-{name}.png").convert("L") for name in ("light", "dark"))
    assert light.size == dark.size and light.getpixel((0, 0)) == 255 and dark.getpixel((0, 0)) < 32


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_fit_is_the_sum_of_its_products(rank):
    matrix = A.T @ B + random.normal(size=(6, 10))
    figure, alt = diagrams.best_fit(matrix, rank)
    whole, fit, missed = drawn(figure, "shown")
    products = drawn(figure, "never built")
    np.testing.assert_allclose(fit, sum(products), atol=1e-12)
    np.testing.assert_allclose(fit + missed, whole)
    s = np.linalg.svd(matrix, compute_uv=False)
    error = round(100 * np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))
    assert len(products) == rank and f"misses, {error} percent" in alt and f"error {error} %" in " ".join(words(figure))
    assert sum(factor.size for factor in drawn(figure, "cached")) == rank * (6 + 10)


def test_the_cube_counts_the_rank_of_each_slice():
    keys = np.einsum("trh,trd->thd", random.normal(size=(20, 2, 6)), random.normal(size=(20, 2, 10)))
    found = [axes.get_title(loc="left").split(": ")[-1] for axes in diagrams.cube(keys, 2).axes[1:]]
    assert found == [
        "rank 2 (rank ≤ R = 2)",
        "rank 10 (up to 10)",
        "rank 6 (up to 6)",
    ]


def test_both_orders_show_their_intermediate_product():
    first, second, third = random.normal(size=(6, 3)), random.normal(size=(3, 10)), random.normal(size=(10, 4))
    kinds = ("cached", "cached", "shown", "shown")
    words = ("never built", "keys first"), ("never built", "factor first")
    figure = diagrams.two_orders((first, second, third), ("A", "B", "T", "result"), kinds, *words)
    above, below = drawn(figure, "never built")
    np.testing.assert_allclose(above, first @ second)
    np.testing.assert_allclose(below, second @ third)
    np.testing.assert_allclose(drawn(figure, "shown")[-1], first @ second @ third)


def test_the_planes_add_up_to_a_dot_product_that_the_position_leaves_alone():
    q, k = random.normal(size=(2, 8))
    figure, alt = diagrams.rope_planes(q, k, 0, 0)
    assert f"is {q @ k:.3f};" in alt
    parts = [float(text) for text in words(figure) if text[:1] in ("+", "-")]
    assert len(parts) == 4 and sum(parts) == pytest.approx(q @ k, abs=3e-3)
    near, far, other = (diagrams.rope_planes(q, k, *place)[1].split("is ")[1] for place in ((9, 5), (90, 5), (9, 4)))
    assert near == far != other


def test_caches_fill_in_proportion_to_their_bytes():
    held = {"mha": [1000, 4000], "tpa": [250, 1000]}
    frames = list(diagrams.filling_caches([1, 4], held, ["a", "a b $x$"]))
    for n, frame in enumerate(frames):
        assert [bar.get_width() for bar in frame.axes[1].patches] == [held["mha"][n] / 1e3, held["tpa"][n] / 1e3]
        assert [text.get_text() for text in frame.axes[1].texts] == [f"{held[name][n]:,} bytes" for name in held]
    assert words(frames[1])[:2] == ["4 tokens written and remembered", "a b $x$ ▌"]
    assert frames[0].axes[1].get_xlim() == frames[1].axes[1].get_xlim()


SIZES = (3, 4), (3, 8), (6, 2, 4), (6, 2, 8), (6, 2, 4), (6, 2, 8)
FACTORS = [random.normal(size=size) for size in SIZES]  # R_Q 3, R_K = R_V = 2, M 6, h 4, d_h 8


def all_drawn(figure):
    return [image.get_array().data for image in figure.axes[0].images]


def test_the_contraction_ends_in_the_module_s_output_and_both_orders_give_its_scores():
    figure, alt = diagrams.contraction(FACTORS)
    a_q, b_q, a_k, b_k, a_v, b_v = (torch.tensor(factor) for factor in FACTORS)
    batch = [x[None, None] if n < 2 else x[None] for n, x in enumerate((a_q, b_q, a_k, b_k, a_v, b_v))]
    expected = factor_attention(*batch, start=5)[0, 0]
    np.testing.assert_allclose(all_drawn(figure)[-1], expected.numpy(), atol=1e-12)
    scores = torch.einsum("mrh,mrd,qd,qh->mh", a_k, b_k, b_q, a_q).numpy() / (3 * 2 * 8**0.5)
    assert sum(m.shape == scores.shape and np.allclose(m, scores) for m in all_drawn(figure)) == 3
    assert sum(matrix.size for matrix in drawn(figure, "cached")) == 6 * (2 * 2 * 8 + 2 * 2 * 4 + 2 * 4 + 2 * 8)
    assert "the scores are the same" in alt


@pytest.mark.parametrize("step", range(1, 7))
def test_the_contraction_is_drawn_step_by_step_on_one_canvas(step):
    figure, alt = diagrams.contraction(FACTORS, step)
    numbered = [text for text in words(figure) if text[:1].isdigit() and text[1:3] == "  "]
    assert max(int(text[0]) for text in numbered) == step
    assert (figure.get_size_inches() == diagrams.contraction(FACTORS)[0].get_size_inches()).all()
    assert ("softmax" in alt) == (step >= 4)


@pytest.mark.parametrize("cached, new", [(0, 1), (0, 5), (5, 1), (5, 3), (8, 8)])
def test_the_mask_marks_what_the_wrong_corner_misses(cached, new):
    figure, alt = diagrams.causal_mask(cached, new)
    (axes,) = figure.axes
    kinds = [patch.get_label() for patch in axes.patches]
    should = sum(cached + i + 1 for i in range(new))
    missed = kinds.count("behind, but missed")
    assert missed == should - sum(i + 1 for i in range(new)) == cached * new
    assert kinds.count("seen, cached") + kinds.count("seen, new") == 2 * should - missed
    assert f"{missed} of the {should} pairs" in alt


def test_a_larger_maximum_shrinks_the_bars_of_all_earlier_blocks():
    scores, values = np.array([0.0, 1, 2, 1.5, 0.5, 1]), np.arange(6.0)
    figure, alt = diagrams.online_softmax(scores, values, 2, (1, 2, 3))
    last = figure.axes[5].patches[:6]
    np.testing.assert_allclose([bar.get_height() for bar in last], np.exp(scores - 2))
    weights = np.exp(scores) / np.exp(scores).sum()
    assert f"average {weights @ values:.3f}." in alt and "block 2: past × 0.37" in alt and "block 3: past × 1.00" in alt
    outlines = [len([p for p in axes.patches if p.get_linestyle() == ":"]) for axes in figure.axes[3:]]
    assert outlines == [0, 2, 0]


def test_the_map_of_t6_shows_the_shapes_that_a_call_has():
    config = T6Config.preset("tiny")
    said = " ".join(words(diagrams.t6_map(config, 9, 3)[0]))
    layer = TensorProductAttention(config)
    cache = layer.new_cache(1)
    layer(torch.zeros(1, 9, config.d_model), cache)
    for factor in layer.factors(torch.zeros(1, 3, config.d_model)):
        assert " × ".join(map(str, factor.shape[1:])) in said
    assert f"{cache.nbytes // (9 * 4)} numbers a token" in said and f"block {config.n_layer}" in said
    assert (
        "9 + 3 = 12 tokens" in said and "16 × 3 × 12" in said and "3 × 50,304" in said and f"3 × {config.d_ff}" in said
    )


def test_head_factors_are_drawn_as_they_are_and_the_contextual_ones_as_cached():
    constant, own = np.eye(4), random.normal(size=(4, 2))
    figure, alt = diagrams.head_factors([("MHA", constant, "shown"), ("TPA\ntoken 1", own, "cached")])
    np.testing.assert_array_equal(drawn(figure, "shown")[0], constant)
    np.testing.assert_array_equal(drawn(figure, "cached")[0], own)
    assert "every token: MHA." in alt and alt.endswith("cached: TPA token 1.")

"""The formulas of evaluation/metrics.py against independent computations."""

import numpy as np
import pytest
import torch
from comparing import brute_force, features
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.model_selection import StratifiedKFold
from util import assert_close

from evaluation import metrics

# --------------------------------------------------------------------------------------------------
# Statistics and the Frechet distance.


def gaussian(rng, d, rank=None):
    """Mean and covariance; rank: that of the covariance."""
    a = rng.normal(size=(d, rank or 2 * d))
    return rng.normal(size=d), a @ a.T


def test_statistics_are_numpys_in_float64():
    x = np.random.default_rng(0).normal(3, 2, (9000, 5)).astype(np.float32)  # three blocks
    mean, cov = metrics.statistics(x)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_statistics_do_not_lose_a_small_variance_beside_a_large_mean():
    far = (np.arange(4.0)[:, None] + 1e6).astype(np.float32)
    np.testing.assert_allclose(metrics.statistics(far)[1], [[5 / 3]], rtol=1e-9)


@pytest.mark.parametrize(
    "x", [np.zeros((1, 3)), np.zeros(3), np.array([[1.0], [np.nan]]), np.array([[1.0], [np.inf]])]
)
def test_statistics_refuses(x):
    with pytest.raises(ValueError):
        metrics.statistics(x)


@pytest.mark.parametrize("d", [1, 2, 7, 30])
def test_frechet_against_sqrtm(d):
    rng = np.random.default_rng(d)
    (m1, s1), (m2, s2) = gaussian(rng, d), gaussian(rng, d)
    want = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    got = metrics.frechet_distance(m1, s1, m2, s2)
    assert isinstance(got, float) and got == pytest.approx(want, rel=1e-8)
    assert got == pytest.approx(metrics.frechet_distance(m2, s2, m1, s1), rel=1e-8)


def test_frechet_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    m1, m2, a, b = rng.random((4, 6))
    a[0] = b[0] = b[1] = 0  # singular covariances
    s1, s2 = np.diag(a**2), np.diag(b**2)
    want = np.sum((m1 - m2) ** 2) + np.sum((a - b) ** 2)
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-9)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]  # rotating both changes nothing
    got = metrics.frechet_distance(q @ m1, q @ s1 @ q.T, q @ m2, q @ s2 @ q.T)
    assert got == pytest.approx(want, rel=1e-6)


def test_frechet_of_a_singular_covariance_and_a_multiple_of_it():
    m, s = gaussian(np.random.default_rng(0), 20, rank=3)
    trace = np.trace(s)
    assert metrics.frechet_distance(m, s, m, s) == pytest.approx(0, abs=1e-12 * trace)
    got = metrics.frechet_distance(m, 4 * s, m, s)
    assert got == pytest.approx(trace, rel=1e-12)  # (2 - 1)^2 tr S


def test_frechet_of_a_covariance_of_zero():
    m, s = gaussian(np.random.default_rng(0), 20, rank=3)
    zero = np.zeros((20, 20))
    assert metrics.frechet_distance(m, zero, m, s) == pytest.approx(np.trace(s))
    assert metrics.frechet_distance(m, zero, m + 1, zero) == pytest.approx(20)


def test_frechet_of_covariances_of_rank_one():
    """tr (S1 S2)^1/2 = |u . v| for S1 = u u^T, S2 = v v^T."""
    rng = np.random.default_rng(0)
    m = rng.normal(size=20)
    u, w = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    v = 0.6 * u + 0.8 * w
    got = metrics.frechet_distance(m, np.outer(u, u), m, np.outer(v, v))
    assert got == pytest.approx(2 - 2 * 0.6, rel=1e-12)


def two_sets(n, m, d, rank):
    """Features (n, d) and (m, d), not negative; the last d - rank repeat the first one."""
    rng = np.random.default_rng(0)
    for k, shift in ((n, 0), (m, 0.02)):
        z = np.maximum(rng.normal(shift, 1, (k, rank)), 0).astype(np.float32)
        yield np.concatenate([z, z[:, :1].repeat(d - rank, 1)], 1)


@pytest.mark.parametrize(
    ("n", "m", "d", "rank"),
    [(2000, 2500, 200, 200), (2000, 2500, 200, 50), (150, 2000, 200, 200)],
)
def test_frechet_from_features_against_their_singular_values(n, m, d, rank):
    """tr (S1 S2)^1/2 is the nuclear norm of A B^T, for S1 = A^T A and S2 = B^T B."""
    x, y = two_sets(n, m, d, rank)
    mean_x, mean_y = (z.astype(np.float64).mean(0) for z in (x, y))
    a = (x - mean_x) / (n - 1) ** 0.5
    b = (y - mean_y) / (m - 1) ** 0.5
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    want = np.sum((mean_x - mean_y) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross
    got = metrics.frechet_distance(*metrics.statistics(x), *metrics.statistics(y))
    assert got == pytest.approx(want, rel=1e-9)


def test_frechet_from_features_against_sqrtm():
    x, y = two_sets(2000, 2500, 200, 200)
    (m1, s1), (m2, s2) = metrics.statistics(x), metrics.statistics(y)
    want = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(want, rel=1e-6)


M, S = np.zeros(2), np.eye(2)


@pytest.mark.parametrize(
    "arguments",
    [
        (M, S, np.zeros(3), np.eye(3)),
        (M, S, M, np.eye(3)),
        (M, np.ones(2), M, S),
        (M[0], S, M[0], S),
    ],
)
def test_frechet_refuses_other_shapes(arguments):
    with pytest.raises(ValueError, match="expected means"):
        metrics.frechet_distance(*arguments)


@pytest.mark.parametrize("arguments", [(M * np.nan, S, M, S), (M, S, M, np.full((2, 2), np.inf))])
def test_frechet_refuses_what_is_not_finite(arguments):
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(*arguments)


# --------------------------------------------------------------------------------------------------
# KID, IS, precision and recall.


def test_moments_of_blocks_are_those_of_all_rows():
    """Where plain sums of squares would lose the small variance."""
    x = np.random.default_rng(0).normal(1000, 0.1, (3000, 7)).astype(np.float32)
    moments = metrics.Moments()
    for block in np.split(x, [1, 2, 1000, 2999]):
        moments.add(block)
    mean, cov = moments.result()
    assert_close("mean", mean, x.astype(np.float64).mean(0), 0, 1e-12)
    assert_close("covariance", cov, np.cov(x.astype(np.float64), rowvar=False), 1e-14, 1e-9)


def test_kid_is_the_mean_of_unbiased_mmd_over_the_subsets():
    x, y, m = features(3000, 64, 0.1, 1), features(2000, 64, 0, 2), 150
    rng, values = np.random.RandomState(2020), []
    for _ in range(30):
        a, b = (z[rng.choice(len(z), m, replace=False)].astype(np.longdouble) for z in (x, y))
        k = [np.einsum("id,jd->ij", u, v) / 64 + 1 for u, v in ((a, a), (b, b), (a, b))]
        off = ~np.eye(m, dtype=bool)
        values.append((k[0] ** 3)[off].mean() + (k[1] ** 3)[off].mean() - 2 * (k[2] ** 3).mean())
    got = metrics.kid(x, y, m, 30)
    assert_close("KID", got, [np.mean(values), np.std(values)], 0, 1e-9)


def test_kid_sees_a_shift_and_nothing_else():
    y = features(2000, 64, 0, 2)
    shifted = metrics.kid(features(3000, 64, 0.1, 1), y, 150, 30)
    same = metrics.kid(features(3000, 64, 0, 1), y, 150, 30)
    assert shifted[0] > 3 * abs(same[0]) and abs(same[0]) < same[1]


def test_kid_refuses_small_sets():
    x = features(50, 4)
    with pytest.raises(ValueError, match="of 51 needs at least 51 images in each set, got 60 and"):
        metrics.kid(features(60, 4), x, 51)
    with pytest.raises(ValueError, match="at least 1000"):
        metrics.kid(x, x)
    with pytest.raises(ValueError, match="at least 2 images"):
        metrics.kid(x, x, 1)


def test_inception_score_is_adms():
    logits = np.random.default_rng(0).normal(0, 3, (11_000, 30)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in np.split(p, [5000, 10_000]):  # the last block counts as much as the others
        scores.append(np.exp(entropy(part, part.mean(0, keepdims=True), axis=1).mean()))
    assert metrics.inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-9)


def test_inception_score_of_certain_classes_is_their_number():
    sure = np.eye(4, dtype=np.float32)[np.arange(4000) % 4] * 1e4  # probabilities of exactly 0
    assert metrics.inception_score(sure) == pytest.approx(4)
    assert metrics.inception_score(sure[:1].repeat(100, 0)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("n", "m", "d", "block"),
    [(2000, 10_000, 16, 4096), (700, 2000, 300, 256), (5, 4, 3, 4096), (1000, 999, 1, 64)],
)
def test_precision_and_recall_are_exactly_those_by_brute_force(monkeypatch, n, m, d, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, fake = features(n, d, 0, 1), features(m, d, 0.03, 2)
    assert metrics.precision_recall(real, fake) == brute_force(real, fake)


@pytest.mark.parametrize("offset", [0, 3000])
def test_precision_and_recall_where_float32_cannot_tell(monkeypatch, offset):
    """Thousands of points within 1e-6 of a surface, on either side: float64 decides."""
    monkeypatch.setattr(metrics, "BLOCK", 128)
    rng = np.random.default_rng(0)
    groups = np.repeat(rng.normal(size=(150, 6)) * 50, 4, 0) + np.tile(np.eye(6)[:4] * 2, (150, 1))
    real = (groups + offset).astype(np.float32)
    pick = rng.integers(0, 150, 2000)
    radius = np.sort(cdist(real.astype(float), real.astype(float)), 1)[:, 3]
    away = rng.normal(size=(2000, 6))
    distance = radius[4 * pick] * (1 + rng.normal(size=2000) * 1e-7)
    away *= (distance / np.linalg.norm(away, axis=1))[:, None]
    fake = (real[4 * pick] + away).astype(np.float32)
    want = brute_force(real, fake)
    assert 0.1 < want[0] < 0.99 and metrics.precision_recall(real, fake) == want
    assert metrics.precision_recall(fake, real) == want[::-1]


@pytest.fixture
def grid():
    """The points of a grid in four dimensions: nothing but ties."""
    return np.stack(np.meshgrid(*[np.arange(5.0)] * 4), -1).reshape(-1, 4).astype(np.float32)


@pytest.mark.parametrize("by", [1, 2])
def test_precision_and_recall_of_ties(grid, by):
    shifted = grid + np.float32([by, 0, 0, 0])
    assert metrics.precision_recall(grid, shifted) == brute_force(grid, shifted)


def test_precision_and_recall_of_a_collapsed_generator(grid):
    real = grid * np.float32(0.1)
    one = np.tile(real[7], (300, 1))
    assert metrics.precision_recall(real, one) == brute_force(real, one)


def test_precision_and_recall_of_copies_of_one_point(grid):
    one = np.tile(grid[7] * np.float32(0.1), (300, 1))
    assert metrics.precision_recall(one, one) == (1, 1)
    assert metrics.precision_recall(one, one + 1) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 64, 2048])
def test_rounding_of_distances_is_below_its_bound(d, dtype):
    x, y = (torch.randn(200, d, dtype=dtype) for _ in "xy")
    largest = max(z.square().sum(1).max().item() for z in (x, y))
    exact = cdist(x.double(), y.double(), "sqeuclidean")
    error = (metrics.squared_distances(x, y).numpy() - exact).max()
    assert error < metrics.rounding(d, largest, dtype) / 4


def test_precision_and_recall_refuse_small_sets():
    with pytest.raises(ValueError, match="at least 4 images in each set; got 3 and 9"):
        metrics.precision_recall(features(9, 2), features(3, 2))


def test_precision_and_recall_refuse_nan():
    nan = np.full((9, 2), np.nan, np.float32)
    for bad in ((features(9, 2), nan), (nan, features(9, 2))):
        with pytest.raises(ValueError, match="not finite"):
            metrics.precision_recall(*bad)


# --------------------------------------------------------------------------------------------------
# The classifier.


def test_cross_validated_accuracy_on_digits(real):
    x, y = real[0].reshape(len(real[0]), -1) * np.float32(16 / 255), real[1]
    folds = StratifiedKFold(10, shuffle=True, random_state=0).split(x, y)
    found = [metrics.class_accuracy(x[test], y[test], x[train], y[train]) for train, test in folds]
    assert np.mean(found) >= 0.985  # it is 99.0 %


def test_accuracy_does_not_depend_on_the_scale_of_the_pixels(real):
    x, y = real[0].astype(np.float32), real[1]
    samples, rest = slice(400), slice(400, 1000)
    a, b = (
        metrics.class_accuracy(x[samples] * s, y[samples], x[rest] * s, y[rest])
        for s in (1, 1 / 64)
    )
    assert a == b > 0.95


def test_classifier_sees_a_bounded_number_of_images(real, monkeypatch):
    x, y = real
    monkeypatch.setattr(metrics, "MAX_FIT", 500)
    wrong = np.where(np.arange(len(y)) < 500, y, 0)  # labels past the bound are not looked at
    assert metrics.class_accuracy(x[500:], y[500:], x.astype(float), wrong) > 0.9

"""eval_min.py, metrics.py: the figures against independent computations, and every file they must refuse."""
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from urllib.error import URLError

import fidelity
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold
from util import assert_close, save_vae

import metrics

ROOT = Path(__file__).resolve().parent.parent


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ev, digits = load("eval_min", "eval_min.py"), load("prepare_digits", "data/digits/prepare.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    digits.prepare(out)
    return out


@pytest.fixture(scope="module")
def real(data):
    """All digits, as a sampler would save them: N x H x W x C and labels."""
    return np.load(data / "images.npy").transpose(0, 2, 3, 1), np.load(data / "labels.npy")


def gaussian(rng, d, rank=None):
    a = rng.normal(size=(d, rank or 2 * d))
    return rng.normal(size=d), a @ a.T


def make_set(out, images, labels, classes, levels=255):
    out.mkdir()
    np.save(out / "images.npy", images)
    np.save(out / "labels.npy", labels)
    (out / "meta.json").write_text(json.dumps({"name": "toy", "classes": classes, "flip": False, "held_out": 0,
                                               "levels": levels}))
    return out

# -----------------------------------------------------------------------------
# statistics and Frechet distance

def test_statistics_are_numpys_in_float64():
    x = np.random.default_rng(0).normal(3, 2, (9000, 5)).astype(np.float32)    # more than two chunks
    mean, cov = metrics.statistics(x)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    far = (np.arange(4.0)[:, None] + 1e6).astype(np.float32)                   # float32 sums would lose this
    np.testing.assert_allclose(metrics.statistics(far)[1], [[5 / 3]], rtol=1e-9)


@pytest.mark.parametrize("x", [np.zeros((1, 3)), np.zeros(3), np.array([[1.0], [np.nan]]), np.array([[1.0], [np.inf]])])
def test_statistics_refuses(x):
    with pytest.raises(ValueError): metrics.statistics(x)


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
    a[0] = b[0] = b[1] = 0                                                     # singular, too
    want = np.sum((m1 - m2) ** 2) + np.sum((a - b) ** 2)
    assert metrics.frechet_distance(m1, np.diag(a**2), m2, np.diag(b**2)) == pytest.approx(want, rel=1e-9)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]                               # turning both changes nothing
    got = metrics.frechet_distance(q @ m1, q @ np.diag(a**2) @ q.T, q @ m2, q @ np.diag(b**2) @ q.T)
    assert got == pytest.approx(want, rel=1e-6)


def test_frechet_of_singular_covariances():
    rng = np.random.default_rng(0)
    m, s = gaussian(rng, 20, rank=3)
    assert metrics.frechet_distance(m, s, m, s) == pytest.approx(0, abs=1e-12 * np.trace(s))
    assert metrics.frechet_distance(m, 4 * s, m, s) == pytest.approx(np.trace(s), rel=1e-12)    # (2 - 1)^2 tr S
    zero = np.zeros((20, 20))
    assert metrics.frechet_distance(m, zero, m, s) == pytest.approx(np.trace(s))
    assert metrics.frechet_distance(m, zero, m + 1, zero) == pytest.approx(20)
    u, w = np.linalg.qr(rng.normal(size=(20, 2)))[0].T                         # rank one: tr (S1 S2)^1/2 = |u . w|
    v = 0.6 * u + 0.8 * w
    assert metrics.frechet_distance(m, np.outer(u, u), m, np.outer(v, v)) == pytest.approx(2 - 2 * 0.6, rel=1e-12)


@pytest.mark.parametrize("n,m,d,rank", [(2000, 2500, 200, 200), (2000, 2500, 200, 50), (150, 2000, 200, 200)])
def test_frechet_from_features_against_their_singular_values(n, m, d, rank):
    """tr (S1 S2)^1/2 is the nuclear norm of A B^T, for S1 = A^T A and S2 = B^T B: no root of a covariance is needed."""
    rng = np.random.default_rng(0)
    x, y = (np.maximum(rng.normal(shift, 1, (k, rank)), 0).astype(np.float32) for k, shift in ((n, 0), (m, 0.02)))
    x, y = (np.concatenate([z, z[:, :1].repeat(d - rank, 1)], 1) for z in (x, y))  # a repeated feature: rank deficient
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x.astype(np.float64), y.astype(np.float64)))
    want = np.sum((x.astype(np.float64).mean(0) - y.astype(np.float64).mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2)
    want -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    got = metrics.frechet_distance(*metrics.statistics(x), *metrics.statistics(y))
    assert got == pytest.approx(want, rel=1e-9)
    (mu1, s1), (mu2, s2) = metrics.statistics(x), metrics.statistics(y)
    if rank == d and n > d:
        want = np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
        assert got == pytest.approx(want, rel=1e-6)


def test_frechet_refuses():
    m, s = np.zeros(2), np.eye(2)
    for bad in ((m, s, np.zeros(3), np.eye(3)), (m, s, m, np.eye(3)), (m, np.ones(2), m, s), (m[0], s, m[0], s)):
        with pytest.raises(ValueError, match="expected means"): metrics.frechet_distance(*bad)
    for bad in ((m * np.nan, s, m, s), (m, s, m, np.full((2, 2), np.inf))):
        with pytest.raises(ValueError, match="not finite"): metrics.frechet_distance(*bad)

# -----------------------------------------------------------------------------
# moments, KID, IS, precision and recall

def test_moments_of_blocks_are_those_of_all_rows():
    x = np.random.default_rng(0).normal(1000, 0.1, (3000, 7)).astype(np.float32)   # sums of squares would lose this
    moments = metrics.Moments()
    for block in np.split(x, [1, 2, 1000, 2999]): moments.add(block)
    mean, cov = moments.result()
    assert_close("mean", mean, x.astype(np.float64).mean(0), 0, 1e-12)
    assert_close("covariance", cov, np.cov(x.astype(np.float64), rowvar=False), 1e-14, 1e-9)


def features(n, d, shift=0.0, seed=0):
    """Float32, not negative, correlated, heavy at zero: not unlike Inception's."""
    mix = np.random.default_rng(99).normal(size=(20, d)) / 4
    return np.maximum(np.random.default_rng(seed).normal(size=(n, 20)) @ mix + 0.2 + shift, 0).astype(np.float32)


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
    same = metrics.kid(features(3000, 64, 0, 1), y, m, 30)
    assert got[0] > 3 * abs(same[0]) and abs(same[0]) < same[1]                # it sees the shift, and nothing else


def test_kid_refuses_small_sets():
    x = features(50, 4)
    with pytest.raises(ValueError, match="subsets of 51 needs at least 51 images in each set, got 60 and 50"):
        metrics.kid(features(60, 4), x, 51)
    with pytest.raises(ValueError, match="at least 1000"): metrics.kid(x, x)
    with pytest.raises(ValueError, match="at least 2 images"): metrics.kid(x, x, 1)


def test_inception_score_is_adms():
    logits = np.random.default_rng(0).normal(0, 3, (11_000, 30)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = [np.exp(entropy(part, part.mean(0, keepdims=True), axis=1).mean()) for part in np.split(p, [5000, 10_000])]
    assert metrics.inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-9) # the last block counts as one
    sure = np.eye(4, dtype=np.float32)[np.arange(4000) % 4] * 1e4                      # probabilities of exactly 0
    assert metrics.inception_score(sure) == pytest.approx(4)
    assert metrics.inception_score(sure[:1].repeat(100, 0)) == pytest.approx(1)


def brute_force(real, fake, k=3):
    """Precision and recall by the definition, with differences, in float64."""
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    across = cdist(fake, real, "sqeuclidean")
    ball = [np.concatenate([np.partition(cdist(part, x, "sqeuclidean"), k, 1)[:, k] for part in np.array_split(x, 20)])
            for x in (real, fake)]
    return (across <= ball[0]).any(1).mean(), (across <= ball[1][:, None]).any(0).mean()


@pytest.mark.parametrize("n,m,d,block", [(2000, 10_000, 16, 4096), (700, 2000, 300, 256), (5, 4, 3, 4096),
                                         (1000, 999, 1, 64)])
def test_precision_and_recall_are_exactly_those_by_brute_force(monkeypatch, n, m, d, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, fake = features(n, d, 0, 1), features(m, d, 0.03, 2)
    assert metrics.precision_recall(real, fake) == brute_force(real, fake)


@pytest.mark.parametrize("offset", [0, 3000])
def test_precision_and_recall_where_float32_cannot_tell(monkeypatch, offset):
    """Thousands of points within 1e-6 of a surface, on either side: float64 has to decide, and does."""
    monkeypatch.setattr(metrics, "BLOCK", 128)
    rng = np.random.default_rng(0)
    groups = np.repeat(rng.normal(size=(150, 6)) * 50, 4, 0) + np.tile(np.eye(6)[:4] * 2, (150, 1))
    real = (groups + offset).astype(np.float32)
    pick = rng.integers(0, 150, 2000)
    radius = np.sort(cdist(real.astype(float), real.astype(float)), 1)[:, 3]
    away = rng.normal(size=(2000, 6))
    away *= (radius[4 * pick] * (1 + rng.normal(size=2000) * 1e-7) / np.linalg.norm(away, axis=1))[:, None]
    fake = (real[4 * pick] + away).astype(np.float32)
    want = brute_force(real, fake)
    assert 0.1 < want[0] < 0.99 and metrics.precision_recall(real, fake) == want
    assert metrics.precision_recall(fake, real) == want[::-1]


def test_precision_and_recall_of_ties_and_copies():
    grid = np.stack(np.meshgrid(*[np.arange(5.0)] * 4), -1).reshape(-1, 4).astype(np.float32)  # nothing but ties
    for by in (1, 2):
        shifted = grid + np.float32([by, 0, 0, 0])
        assert metrics.precision_recall(grid, shifted) == brute_force(grid, shifted)
    one = np.tile(grid[7] * np.float32(0.1), (300, 1))                                 # a collapsed generator
    assert metrics.precision_recall(grid * np.float32(0.1), one) == brute_force(grid * np.float32(0.1), one)
    assert metrics.precision_recall(one, one) == (1, 1) and metrics.precision_recall(one, one + 1) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 64, 2048])
def test_rounding_of_distances_is_below_its_bound(d, dtype):
    x, y = (torch.randn(200, d, dtype=dtype) for _ in "xy")
    largest = max(z.square().sum(1).max().item() for z in (x, y))
    error = (metrics.squared_distances(x, y).numpy() - cdist(x.double(), y.double(), "sqeuclidean")).max()
    assert error < metrics.rounding(d, largest, dtype) / 4


def test_precision_and_recall_refuse():
    with pytest.raises(ValueError, match="at least 4 images in each set; got 3 and 9"):
        metrics.precision_recall(features(9, 2), features(3, 2))
    nan = np.full((9, 2), np.nan, np.float32)
    for bad in ((features(9, 2), nan), (nan, features(9, 2))):
        with pytest.raises(ValueError, match="not finite"): metrics.precision_recall(*bad)

# -----------------------------------------------------------------------------
# the classifier

def test_cross_validated_accuracy_on_digits(real):
    x, y = real[0].reshape(len(real[0]), -1) * np.float32(16 / 255), real[1]
    folds = StratifiedKFold(10, shuffle=True, random_state=0).split(x, y)
    got = np.mean([metrics.class_accuracy(x[test], y[test], x[train], y[train]) for train, test in folds])
    assert got >= 0.985                                                        # 99.0% when this was written


def test_accuracy_does_not_depend_on_the_scale_of_the_pixels(real):
    x, y = real[0].astype(np.float32), real[1]
    a, b = (metrics.class_accuracy(x[:400] * s, y[:400], x[400:1000] * s, y[400:1000]) for s in (1, 1 / 64))
    assert a == b > 0.95


def test_classifier_sees_a_bounded_number_of_images(real, monkeypatch):
    x, y = real
    monkeypatch.setattr(metrics, "MAX_FIT", 500)
    wrong = np.where(np.arange(len(y)) < 500, y, 0)                            # labels past the bound are not looked at
    assert metrics.class_accuracy(x[500:], y[500:], x.astype(float), wrong) > 0.9

# -----------------------------------------------------------------------------
# evaluate

def test_real_digits_against_themselves(data, real):
    r = ev.evaluate(*real, data)
    assert {"frechet_distance", "frechet_halves", "class_accuracy", "kid", "precision", "recall"} < r.keys()
    assert r["precision"] == r["recall"] == 1 and r["kid_subset_size"] == 898
    assert 0.85 < r["precision_halves"] < 1 and 0.85 < r["recall_halves"] < 1 and abs(r["kid_halves"]) < 500
    assert r["frechet_distance"] < 1e-3 and r["class_accuracy"] > 0.99
    assert r["n"] == 1797 and r["levels"] == 16
    assert 12 < r["frechet_halves"] < 28                                       # 200 splits: 18.2 +- 2.2, 13.8 to 27.0
    assert r["frechet_halves"] == ev.evaluate(real[0][:50], None, data)["frechet_halves"]  # the split is fixed


def test_shuffled_labels_score_by_chance(data, real):
    shuffled = np.random.default_rng(0).permutation(real[1])
    assert 0.05 < ev.evaluate(real[0], shuffled, data, subset=50)["class_accuracy"] < 0.15


def test_frechet_is_in_levels_and_sees_the_difference(data, real):
    x = real[0].astype(np.float64) * 16 / 255
    noise = np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8)
    y = noise * (16 / 255)
    a, b = x.reshape(1797, 64), y.reshape(1797, 64)
    s1, s2 = np.cov(a.T), np.cov(b.T)
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s1 + s2) - 2 * np.sqrt(
        np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    assert ev.evaluate(noise, None, data, subset=50)["frechet_distance"] == pytest.approx(want, rel=1e-4)
    black = ev.evaluate(np.zeros_like(real[0][:2]), None, data)["frechet_distance"]
    assert black == pytest.approx(np.sum(a.mean(0) ** 2) + np.trace(s1), rel=1e-5)


def test_held_out_images_count_as_real(data, real, tmp_path):
    x, y = np.load(data / "images.npy"), real[1]
    x[-180:] = 255                                                             # only there
    out = make_set(tmp_path / "toy", x, y, list("0123456789"))
    assert ev.evaluate(x.transpose(0, 2, 3, 1), y, out, subset=50)["frechet_distance"] < 1


def test_colour_pixels_are_matched_channel_by_channel(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 5), dtype=np.uint8) // np.array([1, 2, 4])[:, None, None]
    x = x.astype(np.uint8)
    y = np.arange(40) % 2
    x[y == 1, 0] //= 4
    out = make_set(tmp_path / "toy", x, y, ["bright", "dark"])
    r = ev.evaluate(x.transpose(0, 2, 3, 1), y, out)
    assert r["frechet_distance"] < 1e-2 * r["frechet_halves"] and r["class_accuracy"] > 0.95 and r["levels"] == 255
    swapped = ev.evaluate(x.transpose(0, 2, 3, 1)[..., ::-1], y, out)
    assert swapped["frechet_distance"] > 1000


def test_no_accuracy_without_labels_or_with_one_class(data, real, tmp_path):
    assert ev.evaluate(real[0], None, data, subset=50)["class_accuracy"] is None
    out = make_set(tmp_path / "toy", np.load(data / "images.npy"), real[1] * 0, ["digit"])
    assert ev.evaluate(real[0], real[1] * 0, out, subset=50)["class_accuracy"] is None


@pytest.mark.parametrize("change,message", [
    (lambda x, y: (x.astype(np.float32), y), "expected samples of uint8"),
    (lambda x, y: (x.astype(np.float64) * np.nan, y), "expected samples of uint8"),
    (lambda x, y: (x[..., 0], y), "N x H x W x C"),
    (lambda x, y: (x.transpose(0, 3, 1, 2), y), "expected samples of 8 x 8 x 1.*got 1 x 8 x 8"),
    (lambda x, y: (x[:, :7], y), "got 7 x 8 x 1"),
    (lambda x, y: (x[:1], y[:1]), "at least 2 samples, got 1"),
    (lambda x, y: (x[:0], y[:0]), "at least 2 samples, got 0"),
    (lambda x, y: (x, y[:-1]), "expected 20 integer labels"),
    (lambda x, y: (x, y[:, None]), "expected 20 integer labels"),
    (lambda x, y: (x, y.astype(float)), "expected 20 integer labels.*float64"),
    (lambda x, y: (x, y * 0 + 10), r"labels in 0\.\.9.*got 10\.\.10"),
    (lambda x, y: (x, y * 0 - 1), r"labels in 0\.\.9.*got -1\.\.-1"),
])
def test_evaluate_refuses(data, real, change, message):
    x, y = change(real[0][:20], real[1][:20])
    with pytest.raises(ValueError, match=message): ev.evaluate(x, y, data)


def test_evaluate_refuses_what_is_no_set(tmp_path, real):
    x, y = real
    with pytest.raises(ValueError, match="not a prepared data set"): ev.evaluate(x, y, tmp_path)
    good = np.zeros((9, 1, 8, 8), np.uint8), np.zeros(9, np.int64)
    for name, images, labels in (("rank", good[0][:, 0], good[1]), ("dtype", good[0] * 1.0, good[1]),
                                 ("length", good[0], good[1][:5])):
        with pytest.raises(ValueError, match="not a prepared data set"):
            ev.evaluate(x, y, make_set(tmp_path / name, images, labels, list("0123456789")))
    latents = make_set(tmp_path / "latents", np.zeros((9, 2, 8, 4, 4), np.float16), good[1], list("0123456789"))
    with pytest.raises(ValueError, match="these are latents, the metrics are of images"): ev.evaluate(x, y, latents)
    out = make_set(tmp_path / "cut", *good, ["0"])
    for name in ("meta.json", "labels.npy"):
        whole = (out / name).read_bytes()
        for broken in (whole[:len(whole) // 2], b""):
            (out / name).write_bytes(broken)
            with pytest.raises(ValueError, match="not a prepared data set"): ev.evaluate(x, y, out)
        (out / name).write_bytes(whole)
    (out / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="lacks a field"): ev.evaluate(x, y, out)


def test_evaluate_refuses_too_few_or_too_large_real_images(tmp_path):
    few = make_set(tmp_path / "few", np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, np.int64), ["0"])
    with pytest.raises(ValueError, match="at least 4 real images"):
        ev.evaluate(np.zeros((5, 8, 8, 1), np.uint8), None, few)
    large = make_set(tmp_path / "large", np.zeros((4, 3, 64, 64), np.uint8), np.zeros(4, np.int64), ["0"])
    with pytest.raises(ValueError, match="small images"):
        ev.evaluate(np.zeros((5, 64, 64, 3), np.uint8), None, large)

# -----------------------------------------------------------------------------
# the command

def run(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval_min.py", *map(str, args)])
    try: ev.main()
    except SystemExit as e: return e.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def rows(markdown):
    """The cells of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def test_command_prints_a_table(tmp_path, data, real):
    np.savez(tmp_path / "s.npz", arr_0=real[0], labels=real[1])
    r = subprocess.run([sys.executable, ROOT / "eval_min.py", tmp_path / "s.npz", data], capture_output=True, text=True)
    assert r.returncode == 0 and r.stderr == ""
    assert "1,797 samples against digits" in r.stdout and "0..16" in r.stdout
    header, _, row, halves = rows(r.stdout)
    assert header[:7] == ["samples", "Frechet distance, pixels", "KID, pixels, subsets of 898", "precision", "recall",
                          "class accuracy", "n"]
    assert row[0] == "s.npz" and row[1] == "0" and row[3:5] == ["1", "1"] and float(row[5]) > 0.99 and row[6] == "1,797"
    assert halves[0] == "real halves" and 12 < float(halves[1]) < 28 and halves[5] == "" and halves[6] == "898"
    assert set(row[7:]) == {"-"} and {"cfg", "steps", "sampler", "seed", "vae"} < set(header[7:])


def test_command_without_labels(tmp_path, data, real, capsys, monkeypatch):
    np.savez_compressed(tmp_path / "s.npz", arr_0=real[0][:100])
    code, out, err = run(capsys, monkeypatch, tmp_path / "s.npz", data)
    assert code == 0 and err == "" and "class accuracy |" not in out and "No class accuracy" in out
    assert "| Frechet distance" in out and "100 samples" in out and "subsets of 100 |" in out


def write(kind, file, x, y):
    if kind == "missing": return
    if kind == "npy":
        with open(file, "wb") as f: np.save(f, x)
    elif kind == "empty": file.write_bytes(b"")
    elif kind == "no arr_0": np.savez(file, samples=x, labels=y)
    elif kind == "pickle": np.savez(file, arr_0=np.array([None, {}], object))
    elif kind == "labels": np.savez(file, arr_0=x, labels=y + 10)
    elif kind == "dtype": np.savez(file, arr_0=x / 255, labels=y)
    elif kind == "folder": file.mkdir()
    else:
        (np.savez if kind == "checksum" else np.savez_compressed)(file, arr_0=x, labels=y)
        whole = file.read_bytes()
        if kind == "truncated": file.write_bytes(whole[:len(whole) // 2])
        if kind in ("damaged", "checksum"): file.write_bytes(whole[:300] + bytes(50) + whole[350:])


@pytest.mark.parametrize("kind,message", [
    ("missing", "no such file"), ("folder", "not a prepared data set"), ("npy", "not an .npz file"),
    ("empty", "not an .npz file"),
    ("no arr_0", "expected an array arr_0, found samples, labels"), ("pickle", "s.npz"), ("truncated", "truncated"),
    ("damaged", "s.npz"), ("checksum", "CRC"), ("labels", "0..9"), ("dtype", "uint8")])
def test_command_errors(tmp_path, data, real, capsys, monkeypatch, kind, message):
    write(kind, tmp_path / "s.npz", real[0][:200], real[1][:200])
    code, out, err = run(capsys, monkeypatch, tmp_path / "s.npz", data)
    assert code == 2 and out == "" and err.startswith("eval_min.py: error: ") and message in err


def test_command_refuses_a_folder_that_is_no_set(tmp_path, real, capsys, monkeypatch):
    np.savez(tmp_path / "s.npz", arr_0=real[0], labels=real[1])
    code, _, err = run(capsys, monkeypatch, tmp_path / "s.npz", tmp_path)
    assert code == 2 and err.startswith("eval_min.py: error: ") and "no meta.json" in err

# -----------------------------------------------------------------------------
# PCA, references, streaming: with three kinds of cheap features in the place of Inception's

def toy_network(weights=None):
    mix = np.random.default_rng(5).normal(size=(3, 8 * 8 * 3, 12)).astype(np.float32)

    def network(x):
        assert x.dtype == np.uint8 and x.ndim == 4
        x = np.repeat(x, 3 // x.shape[3], 3).reshape(len(x), -1).astype(np.float32) / 255
        return tuple(np.maximum(x @ m, 0) for m in mix)

    return network


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(ev, "inception", toy_network)
    return toy_network()


def save(file, x, compressed=False, **more):
    (np.savez_compressed if compressed else np.savez)(file, arr_0=x, **more)
    return file


def measured(markdown):
    """{header: cell} of the row of samples."""
    header, _, row, *_ = rows(markdown)
    return dict(zip(header, row))


@pytest.fixture
def colours(tmp_path):
    """80 samples and 100 real images of 8 x 8 x 3, as arrays and as files."""
    rng = np.random.default_rng(0)
    fake, real = (rng.integers(0, top, (n, 8, 8, 3), dtype=np.uint8) for top, n in ((256, 80), (230, 100)))
    return fake, real, save(tmp_path / "fake.npz", fake), save(tmp_path / "real.npz", real)


def test_pca_pixels_are_those_of_the_reference(data, real, tmp_path):
    x = real[0].reshape(1797, 64) * np.float32(16 / 255)
    pca = PCA(7, random_state=0).fit(x)
    want = metrics.frechet_distance(*metrics.statistics(pca.transform(x[:300])), *metrics.statistics(pca.transform(x)))
    assert ev.evaluate(real[0][:300], None, data, pca=7)["frechet_distance"] == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="65 principal components"): ev.evaluate(real[0], None, data, pca=65)


def test_pca_is_fitted_to_the_chosen_images(data, real, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_FIT", 300)
    x = real[0].reshape(1797, 64) * np.float32(16 / 255)
    mask = metrics.chosen(1797, 300)
    assert mask.sum() == 300 and mask[:900].sum() > 100 < mask[900:].sum()
    want = PCA(5, random_state=0).fit(x[mask]).transform(x[:9])
    assert_close("components", metrics.pixels(ev.read_set(data), 5)(real[0][:9])[0], want, 1e-4)


def test_kept_features_are_those_of_the_mask(colours, toy, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 30)
    mask = metrics.chosen(100, 40)
    kept, moments = metrics.extract(ev.read_npz(colours[3]), toy, 7, mask, quiet=True)
    for got, moment, want in zip(kept, moments, toy(colours[1])):
        assert_close("kept", got, want[mask], 1e-5)
        assert_close("mean", moment.result()[0], want.astype(np.float64).mean(0), 1e-5)


def test_images_too_large_for_raw_pixels_are_reduced_after_training(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 64, 64), dtype=np.uint8)
    out = make_set(tmp_path / "large", x, np.zeros(40, np.int64), ["a"])
    text = ev.report(save(tmp_path / "s.npz", x[:9].transpose(0, 2, 3, 1)), out)       # as train_min.py calls it
    assert "40 principal components, pixels in 0..255" in text and measured(text)["n"] == "9"


@pytest.mark.parametrize("compressed", [False, True])
def test_streamed_images_are_those_in_memory(colours, tmp_path, compressed):
    x = colours[0]
    file = save(tmp_path / "s.npz", x, compressed, labels=np.arange(80))
    images = ev.read_npz(file)
    assert images.shape == x.shape and (images.more["labels"] == np.arange(80)).all()
    for n in (1, 7, 80, 1000):
        blocks = list(images.rows(n))
        assert {len(b) for b in blocks[:-1]} <= {n} and (np.concatenate(blocks) == x).all()


def test_streaming_holds_a_block_and_no_more(tmp_path):
    file = save(tmp_path / "s.npz", np.zeros((3000, 64, 64, 3), np.uint8))             # 37 MB
    tracemalloc.start()
    try:
        assert sum(len(x) for x in ev.read_npz(file).rows(16)) == 3000
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally: tracemalloc.stop()


def test_batch_size_changes_nothing_but_rounding(colours, toy, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 32)                                          # moments in several blocks, too
    fake, real = ev.read_npz(colours[2]), ev.read_npz(colours[3])
    one, all_ = (ev.assess(fake, real, False, subset=20, batch=batch)[0] for batch in (1, 64))
    assert one.keys() == all_.keys() == {*ev.NAMES, "kid_std", "skid_std"}
    for key in one: assert one[key] == pytest.approx(all_[key], rel=1e-4, abs=1e-6), key


def test_every_metric_is_of_the_right_features(colours, toy):
    fake, real = (toy(x) for x in colours[:2])
    got, halves, _ = ev.assess(ev.read_npz(colours[2]), ev.read_npz(colours[3]), False, subset=20)
    assert halves == {}
    for i, (frechet, kernel) in enumerate((("fid", "kid"), ("sfid", "skid"))):
        want = metrics.frechet_distance(*metrics.statistics(fake[i]), *metrics.statistics(real[i]))
        assert got[frechet] == pytest.approx(want, rel=1e-6)
        assert (got[kernel], got[f"{kernel}_std"]) == pytest.approx(metrics.kid(fake[i], real[i], 20), rel=1e-6)
    assert got["is"] == pytest.approx(metrics.inception_score(fake[2]), rel=1e-6)
    assert (got["precision"], got["recall"]) == brute_force(real[0], fake[0])


def test_reference_file_is_adms_and_equals_the_images(colours, toy, tmp_path, capsys, monkeypatch):
    ref = tmp_path / "ref.npz"
    assert run(capsys, monkeypatch, colours[3], "--make-reference", ref)[0] == 0
    with np.load(ref) as npz:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= {*npz.files} and (npz["arr_0"] == colours[1]).all()
        assert npz["arr_0"].dtype == np.uint8 and npz["mu"].dtype == npz["sigma_s"].dtype == np.float64
        for i, (mu, sigma) in enumerate((("mu", "sigma"), ("mu_s", "sigma_s"))):
            x = toy(colours[1])[i].astype(np.float64)
            assert_close(mu, npz[mu], x.mean(0), 0, 1e-6)
            assert_close(sigma, npz[sigma], np.cov(x, rowvar=False), 1e-5, 1e-5)
    a, b = (run(capsys, monkeypatch, colours[2], file, "--kid-subset-size", 20)[1] for file in (colours[3], ref))
    assert rows(a) == rows(b) and "FID and sFID from stored statistics" in b and "stored" not in a
    assert [*tmp_path.glob("*.tmp")] == []


def test_reference_of_a_folder_stores_a_choice_but_measures_all(toy, tmp_path, capsys, monkeypatch):
    for module in (ev, metrics): monkeypatch.setattr(module, "MAX_REAL" if module is ev else "MAX_FIT", 30)
    x = np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), dtype=np.uint8)
    out = make_set(tmp_path / "grey", x, np.zeros(100, np.int64), ["a"])
    ref = tmp_path / "ref.npz"
    assert run(capsys, monkeypatch, out, "--make-reference", ref)[0] == 0
    with np.load(ref) as npz:
        stored, mu = npz["arr_0"], npz["mu"]
    assert stored.shape == (30, 8, 8, 3)                                               # ADM's evaluator wants three
    assert (stored == stored[..., :1]).all() and len({image.tobytes() for image in stored}) == 30
    assert {image[..., 0].tobytes() for image in stored} <= {image.tobytes() for image in x}
    assert_close("mu", mu, toy(x.transpose(0, 2, 3, 1))[0].astype(np.float64).mean(0), 0, 1e-6)
    first = ref.read_bytes()
    assert run(capsys, monkeypatch, out, "--make-reference", ref)[0] == 0 and ref.read_bytes() == first
    grey, colour = (save(tmp_path / f"{c}.npz", np.zeros((40, 8, 8, c), np.uint8)) for c in (1, 3))
    assert run(capsys, monkeypatch, grey, ref, "--kid-subset-size", 20)[0] == 0
    code, _, err = run(capsys, monkeypatch, colour, ref, "--kid-subset-size", 20)
    assert code == 2 and "expected samples of 8 x 8 x 1, as in ref.npz; got 8 x 8 x 3" in err


def test_features_are_kept_of_some_real_images_but_moments_of_all(data, real, monkeypatch):
    monkeypatch.setattr(ev, "MAX_REAL", 200)
    few, all_ = (ev.evaluate(real[0][:400], real[1][:400], data, most=most) for most in (None, 1797))
    assert few["frechet_distance"] == pytest.approx(all_["frechet_distance"], rel=1e-9)
    assert few["recall"] != all_["recall"] and few["kid_subset_size"] == 100


def test_reference_keeps_no_features(colours, tmp_path, monkeypatch):
    kept = []
    def spy(*args):
        out = metrics.extract(*args)
        kept.extend(out[0])
        return out
    monkeypatch.setattr(ev, "extract", spy)
    ev.make_reference(ev.read_npz(colours[3]), tmp_path / "ref.npz", toy_network())
    assert [len(x) for x in kept] == [0, 0, 0]                                         # whatever their number


def test_halves_too_small_for_a_metric_are_left_out(data, real, tmp_path):
    r = ev.evaluate(real[0][:1000], None, data, subset=1000)
    assert r["kid"] is not None and r["kid_halves"] is None and r["frechet_halves"] > 0 and r["precision_halves"] > 0
    out = make_set(tmp_path / "six", np.load(data / "images.npy")[:6], real[1][:6], list("0123456789"))
    r = ev.evaluate(real[0][:9], None, out)
    assert r["precision"] is not None and r["precision_halves"] is None and r["kid_subset_size"] == 3


def test_failed_reference_leaves_nothing(colours, tmp_path, capsys, monkeypatch):
    def broken(weights):
        def network(x): raise ValueError("broken")
        return network
    monkeypatch.setattr(ev, "inception", broken)
    code, _, err = run(capsys, monkeypatch, colours[3], "--make-reference", tmp_path / "ref.npz")
    assert code == 2 and "broken" in err and not [*tmp_path.glob("ref*")]


def test_settings_stand_beside_the_figures(colours, data, real, tmp_path):
    settings = {"cfg": 1.5, "steps": 250, "sampler": "ddpm", "seed": 3, "vae": "a|b\nc", "step": 400_000,
                "cfg_channels": None, "extra": "yes"}
    file = save(tmp_path / "s.npz", real[0][:50], settings=np.array(json.dumps(settings)))
    row = measured(ev.report(file, data))
    assert (row["cfg"], row["steps"], row["sampler"], row["seed"], row["step"], row["extra"]) == (
        "1.5", "250", "ddpm", "3", "400000", "yes")
    assert row["vae"] == "a/b c" and row["cfg_channels"] == row["model"] == row["dtype"] == "-"


@pytest.mark.parametrize("keys,wanted,error", [
    (("mu", "sigma"), "fid", "sFID needs at least 2 images; reference ref.npz has 0"),
    (("mu", "sigma", "mu_s", "sigma_s"), "fid sfid is", "KID needs at least 20 images; reference ref.npz has 0"),
    (("mu_s", "sigma_s"), "sfid", "FID needs at least 2 images"),
])
def test_reference_of_statistics_alone(colours, toy, tmp_path, capsys, monkeypatch, keys, wanted, error):
    ref = tmp_path / "ref.npz"
    run(capsys, monkeypatch, colours[3], "--make-reference", ref)
    with np.load(ref) as npz: parts = {key: npz[key] for key in keys}
    np.savez(ref, **parts)
    code, _, err = run(capsys, monkeypatch, colours[2], ref, "--kid-subset-size", 20)
    assert code == 2 and error in err and "--metrics" in err and err.count("\n") == 1
    code, out, _ = run(capsys, monkeypatch, colours[2], ref, "--metrics", *wanted.split())
    whole = run(capsys, monkeypatch, colours[2], colours[3], "--kid-subset-size", 20)[1]
    assert code == 0 and all(measured(out)[ev.NAMES[key]] == measured(whole)[ev.NAMES[key]] for key in wanted.split())
    assert ("KID" in out) is False


@pytest.mark.parametrize("arguments,message", [
    ("fake.npz real.npz", "KID needs at least 1,000 images; fake.npz has 80, reference real.npz has 100; sKID"),
    ("fake.npz real.npz --metrics kid --kid-subset-size 90", "KID needs at least 90 images; fake.npz has 80 ("),
    ("three.npz real.npz --metrics precision", "precision needs at least 4 images; three.npz has 3 ("),
    ("three.npz real.npz --metrics recall --features pixels", "recall needs at least 4 images; three.npz has 3 ("),
    ("fake.npz real.npz --features pixels --metrics is", "there is no IS of pixels"),
    ("none.npz real.npz", "expected at least 2 samples, got 0"),
    ("fake.npz none.npz --metrics fid", "FID needs at least 2 images; reference none.npz has 0"),
    ("fake.npz large.npz", "expected samples of 9 x 8 x 3, as in large.npz; got 8 x 8 x 3"),
    ("fake.npz grey.npz", "expected samples of 8 x 8 x 1, as in grey.npz; got 8 x 8 x 3"),
    ("nan.npz real.npz", "nan.npz: arr_0 has NaN"),
    ("float.npz real.npz", "float.npz: expected samples of uint8, N x H x W x C; got float32 of shape (5, 8, 8, 3)"),
    ("flat.npz real.npz", "flat.npz: expected samples of uint8, N x H x W x C; got uint8 of shape (5, 8, 8)"),
    ("fake.npz flat.npz", "flat.npz: expected samples of uint8"),
    ("fake.npz fortran.npz", "fortran.npz: arr_0 is in Fortran order"),
    ("fake.npz short.npz", "short.npz: arr_0 is shorter than its header says"),
    ("fake.npz wrong.npz --metrics fid", "wrong.npz: mu and sigma are no mean (D) and covariance (D x D), all finite"),
    ("fake.npz infinite.npz --metrics fid", "infinite.npz: mu and sigma are no mean"),
    ("list.npz real.npz", "list.npz: settings is not a JSON object"),
    ("text.npz real.npz", "text.npz: Expecting value"),
    ("fake.npz", "the reference, a second argument, is missing"),
    ("fake.npz missing.npz", "missing.npz: no such file"),
    ("fake.npz real.npz --batch 0", "must be at least 1"), ("fake.npz real.npz --pca 0", "must be at least 1"),
    ("fake.npz real.npz --pca 3 --features inception", "--pca is for --features pixels"),
    ("one.npz --make-reference ref.npz", "a reference needs at least 2 images; one.npz has 1"),
    ("fake.npz --make-reference nowhere/ref.npz", "No such file"),
])
def test_one_clear_line(colours, toy, tmp_path, capsys, monkeypatch, arguments, message):
    fake, real = colours[:2]
    for name, x, more in (("three", fake[:3], {}), ("one", fake[:1], {}), ("none", fake[:0], {}),
                          ("grey", real[..., :1], {}), ("large", np.zeros((100, 9, 8, 3), np.uint8), {}),
                          ("nan", np.full((5, 8, 8, 3), np.nan, np.float32), {}),
                          ("float", np.zeros((5, 8, 8, 3), np.float32), {}),
                          ("flat", fake[:5, ..., 0], {}), ("fortran", np.asfortranarray(real), {}),
                          ("wrong", real, {"mu": np.zeros(5), "sigma": np.eye(4)}),
                          ("infinite", real, {"mu": np.zeros(12), "sigma": np.full((12, 12), np.nan)}),
                          ("list", fake, {"settings": np.array("[1]")}),
                          ("text", fake, {"settings": np.array("cfg 4")})):
        save(tmp_path / f"{name}.npz", x, **more)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as z, z.open("arr_0.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": real.shape})
        f.write(real[:50].tobytes())
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, *arguments.split())
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("eval_min.py: error: ") and message in err


def test_too_few_samples_after_training_are_no_error(data, real, tmp_path):
    text = ev.report(save(tmp_path / "s.npz", real[0][:3], labels=real[1][:3]), data)
    assert "Not computed: precision needs at least 4 images; s.npz has 3." in text and "precision" not in measured(text)
    r = ev.evaluate(real[0][:3], real[1][:3], data)
    assert r["precision"] is None and r["recall"] is None and r["frechet_distance"] > 0 and r["kid"] is not None


def test_damage_found_while_streaming(colours, toy, capsys, monkeypatch):
    whole = bytearray(colours[2].read_bytes())
    whole[-3000:-2000] = bytes(1000)                                                   # in the last block of arr_0
    colours[2].write_bytes(whole)
    code, _, err = run(capsys, monkeypatch, colours[2], colours[3], "--metrics", "fid")
    assert code == 2 and "fake.npz: Bad CRC-32" in err.splitlines()[-1]

# -----------------------------------------------------------------------------
# Inception, with random weights

needs_fidelity = pytest.mark.skipif(fidelity.MISSING is not None, reason=str(fidelity.MISSING))


@pytest.fixture(scope="module")
def torch_fidelity():
    if fidelity.MISSING: pytest.skip(fidelity.MISSING)
    with fidelity.importable():
        import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401
        yield sys.modules["torch_fidelity"]


@pytest.fixture(scope="module")
def weights(torch_fidelity, tmp_path_factory):
    """A state_dict of torch-fidelity's Inception, random, but with activations that neither die nor explode."""
    module = torch_fidelity.feature_extractor_inceptionv3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d): torch.nn.init.kaiming_normal_(part.weight)
        if isinstance(part, torch.nn.BatchNorm2d):
            for z, low in ((part.running_mean, -0.1), (part.bias, -0.1), (part.running_var, 0.9), (part.weight, 0.9)):
                torch.nn.init.uniform_(z, low, low + 0.2)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def small():
    """Small images, of two kinds."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (24, 3, 3, 3)), np.ones((1, 5, 4, 1))).astype(np.uint8)
    return smooth[:12], (smooth[12:] // 2 + rng.integers(0, 128, (12, 15, 12, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def by_hand(torch_fidelity, weights, small):
    """Of both sets what the network puts out itself, and branch1x1 of Mixed_6d, by hand from that block's input."""
    module = torch_fidelity.feature_extractor_inceptionv3
    net = module.FeatureExtractorInceptionV3("by hand", ["2048", "logits_unbiased"], str(weights))
    inputs, out = [], []
    net.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    bn = net.Mixed_6d.branch1x1.bn
    for x in small:
        pool, logits = net(torch.from_numpy(x).permute(0, 3, 1, 2))
        z = np.einsum("nchw,kc->nkhw", inputs.pop().double(), net.Mixed_6d.branch1x1.conv.weight[:7, :, 0, 0].double())
        parts = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        mean, var, scale, bias = (part[:7].double().numpy()[:, None, None] for part in parts)
        z = np.maximum((z - mean) / np.sqrt(var + 0.001) * scale + bias, 0)
        assert z.shape == (12, 7, 17, 17)
        out.append((pool.numpy(), z, logits.numpy()))
    return out


def test_inception_features_are_those_by_hand(weights, small, by_hand):
    pool, spatial, logits = metrics.inception(weights)(small[0])
    assert pool.shape == (12, 2048) and spatial.shape == (12, 2023) and logits.shape == (12, 1008)
    assert pool.dtype == spatial.dtype == logits.dtype == np.float32
    z = by_hand[0][1]
    for h, w, c in ((0, 0, 0), (0, 0, 6), (0, 16, 3), (5, 2, 1), (16, 16, 6)):         # height, width, channel
        assert_close("one", spatial[:, (h * 17 + w) * 7 + c], z[:, c, h, w], 1e-4 * z.std(), 1e-4)
    assert_close("spatial", spatial, z.transpose(0, 2, 3, 1).reshape(12, 2023), 1e-4 * z.std(), 1e-4)
    assert_close("pool_3", pool, by_hand[0][0], 1e-5, 1e-4)
    assert_close("logits", logits, by_hand[0][2], 1e-5, 1e-4)


def test_sfid_against_stored_statistics_knows_the_order(weights, small, by_hand, tmp_path):
    """The same images give an sFID of 0 against mu_s, sigma_s in ADM's order; channel-first, it would be above 1."""
    z, file = by_hand[0][1], save(tmp_path / "s.npz", small[0])
    mean, cov = metrics.statistics(z.transpose(0, 2, 3, 1).reshape(12, 2023))
    np.savez(tmp_path / "ref.npz", mu_s=mean, sigma_s=cov)
    text = ev.report(file, tmp_path / "ref.npz", False, weights=weights, metrics=["sfid"], strict=True)
    channel_first = np.sum((mean - z.reshape(12, 2023).mean(0)) ** 2)                  # one term of the distance
    assert float(measured(text)["sFID"]) < 1e-6 * channel_first and channel_first > 1


def test_grey_images_are_repeated(weights, small):
    network, grey = metrics.inception(weights), small[0][:2, ..., :1]
    for a, b in zip(network(grey), network(np.repeat(grey, 3, 3))): assert_close("grey", a, b, 1e-6, 1e-5)
    with pytest.raises(ValueError, match="one channel or three, not 4"): network(np.zeros((1, 8, 8, 4), np.uint8))


def test_row_of_metrics_by_the_real_command(weights, small, by_hand, tmp_path):
    """In a process of its own, against independent formulas on the features by hand."""
    fake = save(tmp_path / "fake.npz", small[0], settings=np.array('{"cfg": 1.5, "steps": 250}'))
    real = save(tmp_path / "real.npz", small[1], compressed=True)
    command = [sys.executable, ROOT / "tests/fidelity.py", ROOT / "eval_min.py", fake, real, "--inception", weights,
               "--kid-subset-size", "8", "--batch", "5"]
    r = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0 and "fake.npz: 12 of 12 images" in r.stderr, r.stderr
    row = measured(r.stdout)
    f, g = ([a[0], a[1].transpose(0, 2, 3, 1).reshape(12, -1), a[2]] for a in by_hand)
    for i, name in enumerate(("FID", "sFID")):
        m1, m2 = (z[i].astype(np.float64).mean(0) for z in (f, g))
        a, b = (f[i] - m1) / 11**0.5, (g[i] - m2) / 11**0.5
        cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        want = np.sum((m1 - m2) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross
        assert float(row[name]) == pytest.approx(want, rel=1e-3)
    for i, name in enumerate(("KID", "sKID (KID of sFID's features)")):
        mean, std = (float(z) for z in row[f"{name}, subsets of 8"].split(" ± "))
        want = metrics.kid(f[i].astype(np.float32), g[i].astype(np.float32), 8)
        assert mean == pytest.approx(want[0], rel=1e-3) and std == pytest.approx(want[1], rel=0.05)
    p = np.exp(f[2].astype(np.float64) - f[2].max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert float(row["IS"]) == pytest.approx(np.exp(entropy(p, p.mean(0, keepdims=True), axis=1).mean()), rel=1e-3)
    assert (float(row["precision"]), float(row["recall"])) == pytest.approx(brute_force(g[0], f[0]), abs=1e-4)
    assert (row["n"], row["cfg"], row["steps"], row["seed"]) == ("12", "1.5", "250", "-")


def test_from_images_to_a_row_of_the_table(weights, tmp_path):
    """The README's commands, one after the other, on 18 images of three classes and a tiny autoencoder."""
    rng = np.random.default_rng(0)
    for i in range(18):
        (tmp_path / "in" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "in" / "abc"[i % 3] / f"{i}.png")
    save_vae(tmp_path / "vae")
    prepare = "data/imagefolder/prepare.py in --size 16 --classes 2 --held-out 0 --out"
    model = "--preset S/2 --input-size 8 --hidden-size 16 --depth 1"
    for line in (f"{prepare} latents --vae vae", f"{prepare} pixels",
                 f"train_min.py {model} --data latents --out out --steps 4 --batch-size 4 "
                 "--samples 0",
                 "sample_min.py out/ckpt.pt --images 10 --batch 6 --steps 3 --cfg 4 --vae vae --out samples.npz",
                 "eval_min.py pixels --make-reference reference.npz --inception WEIGHTS",
                 "eval_min.py samples.npz reference.npz --inception WEIGHTS --kid-subset-size 8"):
        script, *arguments = line.replace("WEIGHTS", str(weights)).split()
        r = subprocess.run([sys.executable, ROOT / "tests/fidelity.py", ROOT / script, *arguments], text=True,
                           cwd=tmp_path, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        assert r.returncode == 0, f"{line}: {r.stdout}{r.stderr}"
    with np.load(tmp_path / "samples.npz") as made, np.load(tmp_path / "reference.npz") as real:
        assert made["arr_0"].shape == (10, 16, 16, 3) and made["arr_0"].dtype == np.uint8
        assert real["arr_0"].shape == (12, 16, 16, 3) and real["mu"].shape == (2048,) and real["mu_s"].shape == (2023,)
        f, g = (metrics.inception(weights)(z["arr_0"]) for z in (made, real))
    row = measured(r.stdout)
    want = metrics.frechet_distance(*metrics.statistics(f[0]), *metrics.statistics(g[0]))
    assert float(row["FID"]) == pytest.approx(want, rel=1e-3) and float(row["FID"]) > 0
    assert (float(row["precision"]), float(row["recall"])) == pytest.approx(brute_force(g[0], f[0]), abs=1e-4)
    assert (row["n"], row["cfg"], row["steps"], row["sampler"]) == ("10", "4.0", "3", "ddpm")


def test_without_torch_fidelity(monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity, the extra \[eval\]"): metrics.inception()


def test_without_weights_and_offline(torch_fidelity, monkeypatch, tmp_path):
    def offline(url, progress): raise URLError("Name or service not known")
    module = torch_fidelity.feature_extractor_inceptionv3
    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError) as e: metrics.inception()
    text, name = str(e.value), module.URL_INCEPTION_V3.split("/")[-1]
    assert "\n" not in text and "Name or service not known" in text and "--inception FILE" in text
    assert module.URL_INCEPTION_V3 in text and str(tmp_path / "checkpoints" / name) in text


def test_weights_in_the_cache_are_found(torch_fidelity, weights, monkeypatch, tmp_path, small):
    (tmp_path / "checkpoints").mkdir()
    name = torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3.split("/")[-1]
    (tmp_path / "checkpoints" / name).write_bytes(weights.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.inception()(small[0][:1])[0].shape == (1, 2048)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "other"])
def test_bad_weights(weights, tmp_path, kind):
    file = tmp_path / "w.pth"
    if kind == "empty": file.write_bytes(b"")
    if kind == "text": file.write_text("<html>not found</html>")
    if kind == "truncated": file.write_bytes(weights.read_bytes()[:1_000_000])
    if kind == "other": torch.save({"fc.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"w\.pth does not hold torch-fidelity's Inception weights: .") as e:
        metrics.inception(file)
    assert "\n" not in str(e.value)

# -----------------------------------------------------------------------------
# torch-fidelity's own figures, where its definitions are the same

def test_kid_is_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric
    x, y = features(3000, 200, 0.1, 1), features(2500, 200, 0, 2)
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-3)):                  # its own float32 is not exact
        theirs = kid_features_to_metric(*(torch.from_numpy(z.astype(dtype)) for z in (x, y)), kid_subset_size=300,
                                        verbose=False)
        assert metrics.kid(x, y, 300) == pytest.approx([*theirs.values()], rel=tolerance)


def test_precision_and_recall_are_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric
    real, fake = features(2000, 50, 0, 1), features(3000, 50, 0.03, 2)
    theirs = prc_features_to_metric(torch.from_numpy(fake).double(), torch.from_numpy(real).double(), verbose=False)
    assert metrics.precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def test_inception_score_and_fid_are_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    logits = np.random.default_rng(0).normal(0, 2, (10_000, 50)).astype(np.float32)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=2, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits) == pytest.approx(theirs, rel=1e-9)
    x, y = features(2000, 20, 0.1, 1).astype(np.float64), features(3000, 20, 0, 2).astype(np.float64)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)), False)
    got = metrics.frechet_distance(*metrics.statistics(x), *metrics.statistics(y))
    assert got == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)

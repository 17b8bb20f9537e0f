"""Inception with random weights: its features by hand, its files, and torch-fidelity's figures."""

import runpy
import signal
import subprocess
import sys
from urllib.error import URLError

import fidelity
import numpy as np
import pytest
import torch
from comparing import brute_force, features, measured, save
from PIL import Image
from runs import ROOT
from scipy.stats import entropy
from util import assert_close, save_vae

import eval_min
from evaluation import metrics

FIDELITY = ROOT / "tests" / "evaluation" / "fidelity.py"


@pytest.fixture(scope="module")
def torch_fidelity():
    if fidelity.MISSING:
        pytest.skip(fidelity.MISSING)
    with fidelity.importable():
        import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401

        yield sys.modules["torch_fidelity"]


@pytest.fixture(scope="module")
def weights(torch_fidelity, tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception that keep its activations alive."""
    module = torch_fidelity.feature_extractor_inceptionv3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(
            module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
        )
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
        if isinstance(part, torch.nn.BatchNorm2d):
            for z in (part.running_mean, part.bias):
                torch.nn.init.uniform_(z, -0.1, 0.1)
            for z in (part.running_var, part.weight):
                torch.nn.init.uniform_(z, 0.9, 1.1)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def small():
    """12 smooth and 12 noisy images of 15 x 12 x 3."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (24, 3, 3, 3)), np.ones((1, 5, 4, 1))).astype(np.uint8)
    noisy = smooth[12:] // 2 + rng.integers(0, 128, (12, 15, 12, 3))
    return smooth[:12], noisy.astype(np.uint8)


@pytest.fixture(scope="module")
def by_hand(torch_fidelity, weights, small):
    """Of both sets: the network's pool_3, branch1x1 of Mixed_6d by hand, the network's logits."""
    module = torch_fidelity.feature_extractor_inceptionv3
    net = module.FeatureExtractorInceptionV3("by hand", ["2048", "logits_unbiased"], str(weights))
    inputs, out = [], []
    net.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    bn = net.Mixed_6d.branch1x1.bn
    kernel = net.Mixed_6d.branch1x1.conv.weight[:7, :, 0, 0].double()
    for x in small:
        pool, logits = net(torch.from_numpy(x).permute(0, 3, 1, 2))
        z = np.einsum("nchw,kc->nkhw", inputs.pop().double(), kernel)
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
    want_pool, z, want_logits = by_hand[0]
    atol = 1e-4 * z.std()
    assert_close("spatial", spatial, z.transpose(0, 2, 3, 1).reshape(12, 2023), atol, 1e-4)
    assert_close("pool_3", pool, want_pool, 1e-5, 1e-4)
    assert_close("logits", logits, want_logits, 1e-5, 1e-4)


def test_spatial_features_are_in_the_order_height_width_channel(weights, small, by_hand):
    spatial, z = metrics.inception(weights)(small[0])[1], by_hand[0][1]
    for h, w, c in ((0, 0, 0), (0, 0, 6), (0, 16, 3), (5, 2, 1), (16, 16, 6)):
        got, want = spatial[:, (h * 17 + w) * 7 + c], z[:, c, h, w]
        assert_close(f"{h} {w} {c}", got, want, 1e-4 * z.std(), 1e-4)


def test_sfid_against_stored_statistics_knows_the_order(weights, small, by_hand, tmp_path):
    """The same images have an sFID of 0 against mu_s, sigma_s in ADM's order.

    Channel-first, it would be above 1.
    """
    z, file = by_hand[0][1], save(tmp_path / "s.npz", small[0])
    mean, cov = metrics.statistics(z.transpose(0, 2, 3, 1).reshape(12, 2023))
    np.savez(tmp_path / "ref.npz", mu_s=mean, sigma_s=cov)
    options = {"weights": weights, "metrics": ["sfid"], "strict": True}
    text = eval_min.report(file, tmp_path / "ref.npz", False, **options)
    channel_first = np.sum((mean - z.reshape(12, 2023).mean(0)) ** 2)  # one term of the distance
    assert float(measured(text)["sFID"]) < 1e-6 * channel_first and channel_first > 1


def test_grey_images_are_repeated(weights, small):
    network, grey = metrics.inception(weights), small[0][:2, ..., :1]
    for a, b in zip(network(grey), network(np.repeat(grey, 3, 3))):
        assert_close("grey", a, b, 1e-6, 1e-5)


def test_images_of_four_channels_are_refused(weights):
    with pytest.raises(ValueError, match="one channel or three, not 4"):
        metrics.inception(weights)(np.zeros((1, 8, 8, 4), np.uint8))


# --------------------------------------------------------------------------------------------------
# The command, in a process of its own.


@pytest.fixture(scope="module")
def row(weights, small, tmp_path_factory):
    """What eval_min.py prints of the two sets: {header: cell}."""
    folder = tmp_path_factory.mktemp("command")
    settings = np.array('{"cfg": 1.5, "steps": 250}')
    fake = save(folder / "fake.npz", small[0], settings=settings)
    real = save(folder / "real.npz", small[1], compressed=True)
    options = ["--inception", weights, "--kid-subset-size", "8", "--batch", "5"]
    command = [sys.executable, FIDELITY, ROOT / "eval_min.py", fake, real, *options]
    r = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert r.returncode == 0 and "fake.npz: 12 of 12 images" in r.stderr, r.stderr
    return measured(r.stdout)


@pytest.fixture(scope="module")
def both(by_hand):
    """The features of both sets: pool_3, spatial and logits (12, D)."""
    return [[a[0], a[1].transpose(0, 2, 3, 1).reshape(12, -1), a[2]] for a in by_hand]


@pytest.mark.parametrize(("kind", "name"), [(0, "FID"), (1, "sFID")])
def test_command_prints_the_frechet_distance(row, both, kind, name):
    f, g = (features[kind] for features in both)
    m1, m2 = (z.astype(np.float64).mean(0) for z in (f, g))
    a, b = (f - m1) / 11**0.5, (g - m2) / 11**0.5
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    want = np.sum((m1 - m2) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross
    assert float(row[name]) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(("kind", "name"), [(0, "KID"), (1, "sKID (KID of sFID's features)")])
def test_command_prints_the_kernel_distance(row, both, kind, name):
    mean, std = (float(z) for z in row[f"{name}, subsets of 8"].split(" ± "))
    want = metrics.kid(*(features[kind].astype(np.float32) for features in both), 8)
    assert mean == pytest.approx(want[0], rel=1e-3) and std == pytest.approx(want[1], rel=0.05)


def test_command_prints_the_inception_score(row, both):
    logits = both[0][2].astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    want = np.exp(entropy(p, p.mean(0, keepdims=True), axis=1).mean())
    assert float(row["IS"]) == pytest.approx(want, rel=1e-3)


def test_command_prints_precision_and_recall(row, both):
    got = float(row["precision"]), float(row["recall"])
    assert got == pytest.approx(brute_force(both[1][0], both[0][0]), abs=1e-4)


def test_command_prints_the_settings(row):
    assert [row[key] for key in ("n", "cfg", "steps", "seed")] == ["12", "1.5", "250", "-"]


@pytest.mark.usefixtures("cpu")
def test_from_images_to_a_row_of_the_table(weights, tmp_path, monkeypatch, capsys):
    """Every command from 18 images of three classes to figures, with a tiny autoencoder."""
    rng = np.random.default_rng(0)
    for i in range(18):
        folder = tmp_path / "in" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    save_vae(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # prepare.py adds to it
    prepare = "data/imagefolder/prepare.py in --size 16 --classes 2 --held-out 0 --workers 1"
    model = "--preset S/2 --input-size 8 --hidden-size 16 --depth 1"
    images = "--images 10 --batch 6 --steps 3 --cfg 4"
    for line in (
        f"{prepare} --out latents --vae vae",
        f"{prepare} --out pixels",
        f"train_min.py {model} --data latents --out out --steps 4 --batch-size 4 --samples 0",
        f"sample_min.py out/ckpt.pt {images} --vae vae --out samples.npz",
        "eval_min.py pixels --make-reference reference.npz --inception WEIGHTS",
        "eval_min.py samples.npz reference.npz --inception WEIGHTS --kid-subset-size 8",
    ):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", line.replace("WEIGHTS", str(weights)).split())
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the scripts have changed
    with np.load(tmp_path / "samples.npz") as made, np.load(tmp_path / "reference.npz") as real:
        assert made["arr_0"].shape == (10, 16, 16, 3) and made["arr_0"].dtype == np.uint8
        assert real["arr_0"].shape == (12, 16, 16, 3)
        assert real["mu"].shape == (2048,) and real["mu_s"].shape == (2023,)
        f, g = (metrics.inception(weights)(z["arr_0"]) for z in (made, real))
    row = measured(capsys.readouterr().out)
    want = metrics.frechet_distance(*metrics.statistics(f[0]), *metrics.statistics(g[0]))
    assert float(row["FID"]) == pytest.approx(want, rel=1e-3) and float(row["FID"]) > 0
    got = float(row["precision"]), float(row["recall"])
    assert got == pytest.approx(brute_force(g[0], f[0]), abs=1e-4)
    given = [row[key] for key in ("n", "cfg", "steps", "sampler")]
    assert given == ["10", "4.0", "3", "ddpm"]


# --------------------------------------------------------------------------------------------------
# The file of weights.


def test_without_torch_fidelity(monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity, the extra \[eval\]"):
        metrics.inception()


def test_without_weights_and_offline(torch_fidelity, monkeypatch, tmp_path):
    def offline(url, progress):
        raise URLError("Name or service not known")

    module = torch_fidelity.feature_extractor_inceptionv3
    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError) as e:
        metrics.inception()
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
    if kind == "empty":
        file.write_bytes(b"")
    if kind == "text":
        file.write_text("<html>not found</html>")
    if kind == "truncated":
        file.write_bytes(weights.read_bytes()[:1_000_000])
    if kind == "other":
        torch.save({"fc.weight": torch.zeros(3)}, file)
    message = r"w\.pth does not hold torch-fidelity's Inception weights: ."
    with pytest.raises(ValueError, match=message) as e:
        metrics.inception(file)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# torch-fidelity's own figures, where the definitions are the same.


def test_kid_is_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(3000, 200, 0.1, 1), features(2500, 200, 0, 2)
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-3)):  # its float32 is not exact
        both = (torch.from_numpy(z.astype(dtype)) for z in (x, y))
        theirs = kid_features_to_metric(*both, kid_subset_size=300, verbose=False)
        assert metrics.kid(x, y, 300) == pytest.approx([*theirs.values()], rel=tolerance)


def test_precision_and_recall_are_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = features(2000, 50, 0, 1), features(3000, 50, 0.03, 2)
    both = (torch.from_numpy(z).double() for z in (fake, real))
    theirs = prc_features_to_metric(*both, verbose=False)
    want = theirs["precision"], theirs["recall"]
    assert metrics.precision_recall(real, fake) == pytest.approx(want, abs=1e-7)


def test_inception_score_is_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = np.random.default_rng(0).normal(0, 2, (10_000, 50)).astype(np.float32)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=2, shuffle=False)
    want = theirs["inception_score_mean"]
    assert metrics.inception_score(logits) == pytest.approx(want, rel=1e-9)


def test_fid_is_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x = features(2000, 20, 0.1, 1).astype(np.float64)
    y = features(3000, 20, 0, 2).astype(np.float64)
    both = (fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y))
    theirs = fid_statistics_to_metric(*both, False)
    got = metrics.frechet_distance(*metrics.statistics(x), *metrics.statistics(y))
    assert got == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)

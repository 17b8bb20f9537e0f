"""evaluation/images.py: files are read in blocks; the reference file is laid out as ADM's."""

import tracemalloc

import numpy as np
import pytest
from comparing import measured, rows, save, toy_network
from runs import write_set
from sklearn.decomposition import PCA
from util import assert_close

import eval_min
from evaluation import images, metrics


def test_components_are_fitted_to_the_chosen_images(data, real, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_FIT", 300)
    x = real[0].reshape(1797, 64) * np.float32(16 / 255)
    mask = metrics.chosen(1797, 300)
    want = PCA(5, random_state=0).fit(x[mask]).transform(x[:9])
    got = metrics.pixels(images.read_set(data), 5)(real[0][:9])[0]
    assert_close("components", got, want, 1e-4)


def test_the_choice_is_spread_over_all_images():
    mask = metrics.chosen(1797, 300)
    assert mask.sum() == 300 and mask[:900].sum() > 100 < mask[900:].sum()


def test_kept_features_are_those_of_the_mask(colours, toy, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 30)
    mask = metrics.chosen(100, 40)
    kept, moments = metrics.extract(images.read_npz(colours[3]), toy, 7, mask, quiet=True)
    for got, moment, want in zip(kept, moments, toy(colours[1])):
        assert_close("kept", got, want[mask], 1e-5)
        assert_close("mean", moment.result()[0], want.astype(np.float64).mean(0), 1e-5)


@pytest.mark.parametrize("compressed", [False, True])
def test_streamed_images_are_those_in_memory(colours, tmp_path, compressed):
    x = colours[0]
    file = save(tmp_path / "s.npz", x, compressed, labels=np.arange(80))
    read = images.read_npz(file)
    assert read.shape == x.shape and (read.more["labels"] == np.arange(80)).all()
    for n in (1, 7, 80, 1000):
        blocks = list(read.rows(n))
        assert {len(b) for b in blocks[:-1]} <= {n} and (np.concatenate(blocks) == x).all()


def test_streaming_holds_a_block_and_no_more(tmp_path):
    file = save(tmp_path / "s.npz", np.zeros((3000, 64, 64, 3), np.uint8))  # 37 MB
    tracemalloc.start()
    try:
        assert sum(len(x) for x in images.read_npz(file).rows(16)) == 3000
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_damage_found_while_streaming_is_one_line(colours, toy, command):
    whole = bytearray(colours[2].read_bytes())
    whole[-3000:-2000] = bytes(1000)  # in the last block of arr_0
    colours[2].write_bytes(whole)
    code, _, err = command(colours[2], colours[3], "--metrics", "fid")
    assert code == 2 and "fake.npz: Bad CRC-32" in err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# References.

TWENTY = ("--kid-subset-size", 20)


@pytest.fixture
def reference(colours, toy, command, tmp_path):
    """A reference file that the command has made of the real colours."""
    file = tmp_path / "ref.npz"
    assert command(colours[3], "--make-reference", file)[0] == 0
    return file


def test_a_reference_is_laid_out_as_adms(colours, toy, reference, tmp_path):
    with np.load(reference) as npz:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= {*npz.files}
        assert npz["arr_0"].dtype == np.uint8 and (npz["arr_0"] == colours[1]).all()
        assert npz["mu"].dtype == npz["sigma_s"].dtype == np.float64
        for i, (mu, sigma) in enumerate((("mu", "sigma"), ("mu_s", "sigma_s"))):
            x = toy(colours[1])[i].astype(np.float64)
            assert_close(mu, npz[mu], x.mean(0), 0, 1e-6)
            assert_close(sigma, npz[sigma], np.cov(x, rowvar=False), 1e-5, 1e-5)
    assert [*tmp_path.glob("*.tmp")] == []


def test_a_reference_gives_the_figures_of_its_images(colours, reference, command):
    a, b = (command(colours[2], file, *TWENTY)[1] for file in (colours[3], reference))
    assert rows(a) == rows(b)
    assert "FID and sFID from stored statistics" in b and "stored" not in a


@pytest.fixture
def grey(toy, tmp_path, monkeypatch):
    """100 grey images as a folder, of which a reference stores 30."""
    monkeypatch.setattr(images, "MAX_REAL", 30)
    monkeypatch.setattr(metrics, "MAX_FIT", 30)
    x = np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), dtype=np.uint8)
    return x, write_set(tmp_path / "grey", x, np.zeros(100, np.int64), classes=["a"])


def test_reference_of_a_folder_stores_a_choice_but_measures_all(grey, toy, tmp_path, command):
    x, folder = grey
    assert command(folder, "--make-reference", tmp_path / "ref.npz")[0] == 0
    with np.load(tmp_path / "ref.npz") as npz:
        stored, mu = npz["arr_0"], npz["mu"]
    assert len({image.tobytes() for image in stored}) == 30
    assert {image[..., 0].tobytes() for image in stored} <= {image.tobytes() for image in x}
    want = toy(x.transpose(0, 2, 3, 1))[0].astype(np.float64).mean(0)
    assert_close("mu", mu, want, 0, 1e-6)


def test_reference_of_grey_images_has_three_equal_channels(grey, tmp_path, command):
    assert command(grey[1], "--make-reference", tmp_path / "ref.npz")[0] == 0
    with np.load(tmp_path / "ref.npz") as npz:
        stored = npz["arr_0"]
    assert stored.shape == (30, 8, 8, 3) and (stored == stored[..., :1]).all()


def test_the_same_images_give_the_same_reference_file(grey, tmp_path, command):
    files = tmp_path / "one.npz", tmp_path / "two.npz"
    for file in files:
        assert command(grey[1], "--make-reference", file)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_reference_of_grey_images_is_for_grey_samples(grey, tmp_path, command):
    ref = tmp_path / "ref.npz"
    assert command(grey[1], "--make-reference", ref)[0] == 0
    one, three = (save(tmp_path / f"{c}.npz", np.zeros((40, 8, 8, c), np.uint8)) for c in (1, 3))
    assert command(one, ref, *TWENTY)[0] == 0
    code, _, err = command(three, ref, *TWENTY)
    assert code == 2 and "expected samples of 8 x 8 x 1, as in ref.npz; got 8 x 8 x 3" in err


def test_making_a_reference_keeps_no_features(colours, tmp_path, monkeypatch):
    kept = []

    def spy(*args):
        out = metrics.extract(*args)
        kept.extend(out[0])
        return out

    monkeypatch.setattr(images, "extract", spy)
    images.make_reference(images.read_npz(colours[3]), tmp_path / "ref.npz", toy_network())
    assert [len(x) for x in kept] == [0, 0, 0]


def test_a_failed_reference_leaves_nothing(colours, tmp_path, command, monkeypatch):
    def broken(weights):
        def network(x):
            raise ValueError("broken")

        return network

    monkeypatch.setattr(eval_min, "inception", broken)
    code, _, err = command(colours[3], "--make-reference", tmp_path / "ref.npz")
    assert code == 2 and "broken" in err and not [*tmp_path.glob("ref*")]


@pytest.mark.parametrize(
    ("keys", "wanted", "error"),
    [
        (("mu", "sigma"), ["fid"], "sFID needs at least 2 images; reference ref.npz has 0"),
        (
            ("mu", "sigma", "mu_s", "sigma_s"),
            ["fid", "sfid", "is"],
            "KID needs at least 20 images; reference ref.npz has 0",
        ),
        (("mu_s", "sigma_s"), ["sfid"], "FID needs at least 2 images"),
    ],
)
def test_reference_of_statistics_alone(colours, reference, command, keys, wanted, error):
    with np.load(reference) as npz:
        parts = {key: npz[key] for key in keys}
    np.savez(reference, **parts)
    code, _, err = command(colours[2], reference, *TWENTY)
    assert code == 2 and error in err and "--metrics" in err and err.count("\n") == 1
    code, out, _ = command(colours[2], reference, "--metrics", *wanted)
    assert code == 0 and "KID" not in out
    whole = measured(command(colours[2], colours[3], *TWENTY)[1])
    for key in wanted:
        assert measured(out)[eval_min.NAMES[key]] == whole[eval_min.NAMES[key]]

"""eval_min.py: which images are compared with which, what it prints, and what it refuses."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from comparing import brute_force, measured, rows, save
from runs import ROOT, write_set
from sklearn.decomposition import PCA

import eval_min
from evaluation import images, metrics

TEN = list("0123456789")

# --------------------------------------------------------------------------------------------------
# evaluate.


@pytest.fixture(scope="module")
def against_itself(data, real):
    return eval_min.evaluate(*real, data)


def test_real_digits_are_as_good_as_real_digits(against_itself):
    r = against_itself
    assert r["frechet_distance"] < 1e-3 and r["class_accuracy"] > 0.99
    assert r["precision"] == r["recall"] == 1


def test_real_halves_are_nearly_as_good(against_itself):
    r = against_itself
    assert 12 < r["frechet_halves"] < 28  # 200 splits: 18.2 +- 2.2, 13.8 to 27.0
    assert 0.85 < r["precision_halves"] < 1 and 0.85 < r["recall_halves"] < 1
    assert abs(r["kid_halves"]) < 500


def test_evaluate_says_what_its_figures_are_of(against_itself):
    r = against_itself
    assert r["n"] == 1797 and r["levels"] == 16 and r["kid_subset_size"] == 898


def test_the_real_halves_are_the_same_for_all_samples(against_itself, data, real):
    few = eval_min.evaluate(real[0][:50], None, data)
    assert few["frechet_halves"] == against_itself["frechet_halves"]


def test_shuffled_labels_score_by_chance(data, real):
    shuffled = np.random.default_rng(0).permutation(real[1])
    found = eval_min.evaluate(real[0], shuffled, data, subset=50)
    assert 0.05 < found["class_accuracy"] < 0.15


def test_frechet_is_in_levels_and_sees_the_difference(data, real):
    noise = np.random.default_rng(0).integers(0, 256, real[0].shape, dtype=np.uint8)
    a = real[0].reshape(1797, 64) * (16 / 255)
    b = noise.reshape(1797, 64) * (16 / 255)
    s1, s2 = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s1 + s2) - 2 * cross
    found = eval_min.evaluate(noise, None, data, subset=50)["frechet_distance"]
    assert found == pytest.approx(want, rel=1e-4)


def test_frechet_of_black_images(data, real):
    a = real[0].reshape(1797, 64) * (16 / 255)
    black = eval_min.evaluate(np.zeros_like(real[0][:2]), None, data)["frechet_distance"]
    assert black == pytest.approx(np.sum(a.mean(0) ** 2) + np.trace(np.cov(a.T)), rel=1e-5)


def test_held_out_images_count_as_real(data, real, tmp_path):
    x, y = np.load(data / "images.npy"), real[1]
    x[-180:] = 255  # the held-out images alone
    folder = write_set(tmp_path / "toy", x, y, classes=TEN)
    found = eval_min.evaluate(x.transpose(0, 2, 3, 1), y, folder, subset=50)
    assert found["frechet_distance"] < 1


@pytest.fixture
def colour_set(tmp_path):
    """40 images of 4 x 5 in three channels of unlike brightness, two classes; the folder too."""
    rng = np.random.default_rng(0)
    brightness = np.array([1, 2, 4])[:, None, None]
    x = (rng.integers(0, 256, (40, 3, 4, 5), dtype=np.uint8) // brightness).astype(np.uint8)
    y = np.arange(40) % 2
    x[y == 1, 0] //= 4
    folder = write_set(tmp_path / "toy", x, y, classes=["bright", "dark"])
    return x.transpose(0, 2, 3, 1), y, folder


def test_colour_images_equal_themselves(colour_set):
    x, y, folder = colour_set
    r = eval_min.evaluate(x, y, folder)
    assert r["frechet_distance"] < 1e-2 * r["frechet_halves"] and r["class_accuracy"] > 0.95
    assert r["levels"] == 255


def test_colours_are_compared_channel_by_channel(colour_set):
    x, y, folder = colour_set
    assert eval_min.evaluate(x[..., ::-1], y, folder)["frechet_distance"] > 1000


def test_no_accuracy_without_labels(data, real):
    assert eval_min.evaluate(real[0], None, data, subset=50)["class_accuracy"] is None


def test_no_accuracy_with_one_class(data, real, tmp_path):
    zeros = real[1] * 0
    folder = write_set(tmp_path / "toy", np.load(data / "images.npy"), zeros, classes=["digit"])
    assert eval_min.evaluate(real[0], zeros, folder, subset=50)["class_accuracy"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.astype(np.float32), y), "expected samples of uint8"),
        (lambda x, y: (x.astype(np.float64) * np.nan, y), "expected samples of uint8"),
        (lambda x, y: (x[..., 0], y), "N x H x W x C"),
        (lambda x, y: (x.transpose(0, 3, 1, 2), y), "samples of 8 x 8 x 1.*got 1 x 8 x 8"),
        (lambda x, y: (x[:, :7], y), "got 7 x 8 x 1"),
        (lambda x, y: (x[:1], y[:1]), "at least 2 samples, got 1"),
        (lambda x, y: (x[:0], y[:0]), "at least 2 samples, got 0"),
        (lambda x, y: (x, y[:-1]), "expected 20 integer labels"),
        (lambda x, y: (x, y[:, None]), "expected 20 integer labels"),
        (lambda x, y: (x, y.astype(float)), "expected 20 integer labels.*float64"),
        (lambda x, y: (x, y * 0 + 10), r"labels in 0\.\.9.*got 10\.\.10"),
        (lambda x, y: (x, y * 0 - 1), r"labels in 0\.\.9.*got -1\.\.-1"),
    ],
)
def test_evaluate_refuses_samples_that_do_not_fit(data, real, change, message):
    x, y = change(real[0][:20], real[1][:20])
    with pytest.raises(ValueError, match=message):
        eval_min.evaluate(x, y, data)


BLANK, ZEROS = np.zeros((9, 1, 8, 8), np.uint8), np.zeros(9, np.int64)


@pytest.mark.parametrize(
    ("x", "y"),
    [(BLANK[:, 0], ZEROS), (BLANK * 1.0, ZEROS), (BLANK, ZEROS[:5])],
    ids=["rank", "dtype", "length"],
)
def test_evaluate_refuses_a_folder_of_other_arrays(real, tmp_path, x, y):
    folder = write_set(tmp_path / "set", x, y, classes=TEN)
    with pytest.raises(ValueError, match="not a prepared data set"):
        eval_min.evaluate(*real, folder)


def test_evaluate_refuses_an_empty_folder(real, tmp_path):
    with pytest.raises(ValueError, match="not a prepared data set"):
        eval_min.evaluate(*real, tmp_path)


def test_evaluate_refuses_latents(real, tmp_path):
    x = np.zeros((9, 2, 8, 4, 4), np.float16)
    folder = write_set(tmp_path / "latents", x, ZEROS, classes=TEN)
    with pytest.raises(ValueError, match="these are latents, the metrics are of images"):
        eval_min.evaluate(*real, folder)


@pytest.mark.parametrize("name", ["meta.json", "labels.npy"])
def test_evaluate_refuses_a_file_that_is_cut_short(real, tmp_path, name):
    folder = write_set(tmp_path / "cut", BLANK, ZEROS, classes=["0"])
    whole = (folder / name).read_bytes()
    for broken in (whole[: len(whole) // 2], b""):
        (folder / name).write_bytes(broken)
        with pytest.raises(ValueError, match="not a prepared data set"):
            eval_min.evaluate(*real, folder)


def test_evaluate_refuses_a_meta_json_without_fields(real, tmp_path):
    folder = write_set(tmp_path / "set", BLANK, ZEROS, classes=["0"])
    (folder / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match=r"meta.json is \[\], expected an object"):
        eval_min.evaluate(*real, folder)


def test_evaluate_refuses_too_few_real_images(tmp_path):
    folder = write_set(tmp_path / "few", BLANK[:3], ZEROS[:3], classes=["0"])
    with pytest.raises(ValueError, match="at least 4 real images"):
        eval_min.evaluate(np.zeros((5, 8, 8, 1), np.uint8), None, folder)


def test_evaluate_refuses_large_images(tmp_path):
    x = np.zeros((4, 3, 64, 64), np.uint8)
    folder = write_set(tmp_path / "large", x, ZEROS[:4], classes=["0"])
    with pytest.raises(ValueError, match="small images"):
        eval_min.evaluate(np.zeros((5, 64, 64, 3), np.uint8), None, folder)


def test_halves_too_small_for_kid_are_left_out(data, real):
    r = eval_min.evaluate(real[0][:1000], None, data, subset=1000)
    assert r["kid"] is not None and r["kid_halves"] is None
    assert r["frechet_halves"] > 0 and r["precision_halves"] > 0


def test_halves_too_small_for_precision_are_left_out(data, real, tmp_path):
    six = np.load(data / "images.npy")[:6]
    folder = write_set(tmp_path / "six", six, real[1][:6], classes=TEN)
    r = eval_min.evaluate(real[0][:9], None, folder)
    assert r["precision"] is not None and r["precision_halves"] is None
    assert r["kid_subset_size"] == 3


def test_features_are_kept_of_some_real_images_but_moments_of_all(data, real, monkeypatch):
    monkeypatch.setattr(eval_min, "MAX_REAL", 200)
    samples = real[0][:400], real[1][:400], data
    few, every = (eval_min.evaluate(*samples, most=most) for most in (None, 1797))
    assert few["frechet_distance"] == pytest.approx(every["frechet_distance"], rel=1e-9)
    assert few["recall"] != every["recall"] and few["kid_subset_size"] == 100


def test_principal_components_are_those_of_the_reference(data, real):
    x = real[0].reshape(1797, 64) * np.float32(16 / 255)
    pca = PCA(7, random_state=0).fit(x)
    some, every = (metrics.statistics(pca.transform(z)) for z in (x[:300], x))
    want = metrics.frechet_distance(*some, *every)
    found = eval_min.evaluate(real[0][:300], None, data, pca=7)
    assert found["frechet_distance"] == pytest.approx(want, rel=1e-5)


def test_more_components_than_pixels_are_refused(data, real):
    with pytest.raises(ValueError, match="65 principal components"):
        eval_min.evaluate(real[0], None, data, pca=65)


# --------------------------------------------------------------------------------------------------
# Inception's metrics, with cheap features in its place.


def test_batch_size_changes_nothing_but_rounding(colours, toy, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 32)  # moments in several blocks, too
    fake, real = images.read_npz(colours[2]), images.read_npz(colours[3])
    one, many = (
        eval_min.assess(fake, real, False, subset=20, batch=batch).figures for batch in (1, 64)
    )
    assert one.keys() == many.keys() == {*eval_min.NAMES, "kid_std", "skid_std"}
    for key in one:
        assert one[key] == pytest.approx(many[key], rel=1e-4, abs=1e-6), key


def test_every_metric_is_of_the_right_features(colours, toy):
    fake, real = (toy(x) for x in colours[:2])
    found = eval_min.assess(*(images.read_npz(x) for x in colours[2:]), False, subset=20)
    got = found.figures
    assert found.halves == {}
    for i, (frechet, kernel) in enumerate((("fid", "kid"), ("sfid", "skid"))):
        statistics = *metrics.statistics(fake[i]), *metrics.statistics(real[i])
        assert got[frechet] == pytest.approx(metrics.frechet_distance(*statistics), rel=1e-6)
        want = metrics.kid(fake[i], real[i], 20)
        assert (got[kernel], got[f"{kernel}_std"]) == pytest.approx(want, rel=1e-6)
    assert got["is"] == pytest.approx(metrics.inception_score(fake[2]), rel=1e-6)
    assert (got["precision"], got["recall"]) == brute_force(real[0], fake[0])


# --------------------------------------------------------------------------------------------------
# The table.


def test_command_prints_a_table(tmp_path, data, real):
    np.savez(tmp_path / "s.npz", arr_0=real[0], labels=real[1])
    command = [sys.executable, ROOT / "eval_min.py", tmp_path / "s.npz", data]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode == 0 and r.stderr == ""
    assert "1,797 samples against digits" in r.stdout and "0..16" in r.stdout
    header, _, row, halves = rows(r.stdout)
    assert header[:7] == [
        "samples",
        "Frechet distance, pixels",
        "KID, pixels, subsets of 898",
        "precision",
        "recall",
        "class accuracy",
        "n",
    ]
    assert row[0] == "s.npz" and row[1] == "0" and row[3:5] == ["1", "1"]
    assert float(row[5]) > 0.99 and row[6] == "1,797"
    assert halves[0] == "real halves" and 12 < float(halves[1]) < 28
    assert halves[5] == "" and halves[6] == "898"
    assert set(row[7:]) == {"-"} and {"cfg", "steps", "sampler", "seed", "vae"} < set(header[7:])


def test_table_without_labels(tmp_path, data, real, command):
    np.savez_compressed(tmp_path / "s.npz", arr_0=real[0][:100])
    code, out, err = command(tmp_path / "s.npz", data)
    assert code == 0 and err == ""
    assert "class accuracy |" not in out and "No class accuracy" in out
    assert "| Frechet distance" in out and "100 samples" in out and "subsets of 100 |" in out


def test_settings_stand_beside_the_figures(data, real, tmp_path):
    settings = {
        "cfg": 1.5,
        "steps": 250,
        "sampler": "ddpm",
        "seed": 3,
        "vae": "a|b\nc",
        "step": 400_000,
        "cfg_channels": None,
        "extra": "yes",
    }
    file = save(tmp_path / "s.npz", real[0][:50], settings=np.array(json.dumps(settings)))
    row = measured(eval_min.report(file, data))
    given = [row[key] for key in ("cfg", "steps", "sampler", "seed", "step", "extra")]
    assert given == ["1.5", "250", "ddpm", "3", "400000", "yes"]
    assert row["vae"] == "a/b c"
    assert row["cfg_channels"] == row["model"] == row["dtype"] == "-"


def test_images_too_large_for_raw_pixels_are_reduced_after_training(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 64, 64), dtype=np.uint8)
    folder = write_set(tmp_path / "large", x, np.zeros(40, np.int64), classes=["a"])
    file = save(tmp_path / "s.npz", x[:9].transpose(0, 2, 3, 1))
    text = eval_min.report(file, folder)
    assert "40 principal components, pixels in 0..255" in text and measured(text)["n"] == "9"


def test_too_few_samples_after_training_are_no_error(data, real, tmp_path):
    file = save(tmp_path / "s.npz", real[0][:3], labels=real[1][:3])
    text = eval_min.report(file, data)
    assert "Not computed: precision needs at least 4 images; s.npz has 3." in text
    assert "precision" not in measured(text)


def test_evaluate_leaves_out_what_few_samples_do_not_allow(data, real):
    r = eval_min.evaluate(real[0][:3], real[1][:3], data)
    assert r["precision"] is None and r["recall"] is None
    assert r["frechet_distance"] > 0 and r["kid"] is not None


# --------------------------------------------------------------------------------------------------
# The summary.


@pytest.fixture(scope="module")
def short(data, real, tmp_path_factory):
    """300 digits, half of them with a wrong label: evaluate's figures and the summary."""
    x, y = real[0][:300], real[1][:300].copy()
    y[::2] = (y[::2] + 1) % 10
    file = save(tmp_path_factory.mktemp("short") / "s.npz", x, labels=y)
    return eval_min.evaluate(x, y, data), eval_min.summary(file, data)


def test_summary_has_the_figures_of_evaluate(short):
    found, text = short
    lines = {line.strip()[:16]: line.split() for line in text.splitlines()}
    distances = [f"{found[key]:.2f}" for key in ("frechet_distance", "frechet_halves")]
    assert lines["Frechet distance"][2:4] == distances
    accuracy = float(lines["class accuracy  "][2])
    assert accuracy == pytest.approx(100 * found["class_accuracy"], abs=0.05)
    assert 45 < accuracy < 55


def test_summary_says_which_way_is_better(short):
    assert "lower is better" in short[1] and "recognised as their class" in short[1]


def test_summary_fits_80_columns(short):
    assert max(len(line) for line in short[1].splitlines()) <= 80


def test_summary_without_labels_has_no_accuracy(data, real, tmp_path):
    text = eval_min.summary(save(tmp_path / "s.npz", real[0][:50]), data)
    assert "Frechet distance" in text and "class accuracy" not in text


# --------------------------------------------------------------------------------------------------
# Errors of the command.


def write(kind, file, x, y):
    """A file of samples with a fault."""
    if kind == "missing":
        return
    if kind == "npy":
        with open(file, "wb") as f:
            np.save(f, x)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "no arr_0":
        np.savez(file, samples=x, labels=y)
    elif kind == "pickle":
        np.savez(file, arr_0=np.array([None, {}], object))
    elif kind == "labels":
        np.savez(file, arr_0=x, labels=y + 10)
    elif kind == "dtype":
        np.savez(file, arr_0=x / 255, labels=y)
    elif kind == "folder":
        file.mkdir()
    else:
        (np.savez if kind == "checksum" else np.savez_compressed)(file, arr_0=x, labels=y)
        whole = file.read_bytes()
        if kind == "truncated":
            file.write_bytes(whole[: len(whole) // 2])
        if kind in ("damaged", "checksum"):
            file.write_bytes(whole[:300] + bytes(50) + whole[350:])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "not a prepared data set"),
        ("npy", "not an .npz file"),
        ("empty", "not an .npz file"),
        ("no arr_0", "expected an array arr_0, found samples, labels"),
        ("pickle", "s.npz"),
        ("truncated", "truncated"),
        ("damaged", "s.npz"),
        ("checksum", "CRC"),
        ("labels", "0..9"),
        ("dtype", "uint8"),
    ],
)
def test_a_faulty_file_of_samples_is_one_error(tmp_path, data, real, command, kind, message):
    write(kind, tmp_path / "s.npz", real[0][:200], real[1][:200])
    code, out, err = command(tmp_path / "s.npz", data)
    assert code == 2 and out == ""
    assert err.startswith("eval_min.py: error: ") and message in err


def test_command_refuses_a_folder_that_is_no_set(tmp_path, real, command):
    np.savez(tmp_path / "s.npz", arr_0=real[0], labels=real[1])
    code, _, err = command(tmp_path / "s.npz", tmp_path)
    assert code == 2 and err.startswith("eval_min.py: error: ") and "no meta.json" in err


@pytest.fixture
def faulty(colours, toy, tmp_path, monkeypatch):
    """A folder of files that the next test names, as the current one."""
    fake, real = colours[:2]
    for name, x, more in (
        ("three", fake[:3], {}),
        ("one", fake[:1], {}),
        ("none", fake[:0], {}),
        ("grey", real[..., :1], {}),
        ("large", np.zeros((100, 9, 8, 3), np.uint8), {}),
        ("nan", np.full((5, 8, 8, 3), np.nan, np.float32), {}),
        ("float", np.zeros((5, 8, 8, 3), np.float32), {}),
        ("flat", fake[:5, ..., 0], {}),
        ("fortran", np.asfortranarray(real), {}),
        ("wrong", real, {"mu": np.zeros(5), "sigma": np.eye(4)}),
        ("infinite", real, {"mu": np.zeros(12), "sigma": np.full((12, 12), np.nan)}),
        ("list", fake, {"settings": np.array("[1]")}),
        ("text", fake, {"settings": np.array("cfg 4")}),
    ):
        save(tmp_path / f"{name}.npz", x, **more)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as z, z.open("arr_0.npy", "w") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": real.shape}
        np.lib.format.write_array_header_1_0(f, header)
        f.write(real[:50].tobytes())
    monkeypatch.chdir(tmp_path)


EXPECTED = "expected samples of uint8, N x H x W x C; got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "fake.npz real.npz",
            "KID needs at least 1,000 images; fake.npz has 80, reference real.npz has 100; sKID",
        ),
        (
            "fake.npz real.npz --metrics kid --kid-subset-size 90",
            "KID needs at least 90 images; fake.npz has 80 (",
        ),
        (
            "three.npz real.npz --metrics precision",
            "precision needs at least 4 images; three.npz has 3 (",
        ),
        (
            "three.npz real.npz --metrics recall --features pixels",
            "recall needs at least 4 images; three.npz has 3 (",
        ),
        ("fake.npz real.npz --features pixels --metrics is", "there is no IS of pixels"),
        ("none.npz real.npz", "expected at least 2 samples, got 0"),
        (
            "fake.npz none.npz --metrics fid",
            "FID needs at least 2 images; reference none.npz has 0",
        ),
        (
            "fake.npz large.npz",
            "expected samples of 9 x 8 x 3, as in large.npz; got 8 x 8 x 3",
        ),
        ("fake.npz grey.npz", "expected samples of 8 x 8 x 1, as in grey.npz; got 8 x 8 x 3"),
        ("nan.npz real.npz", "nan.npz: arr_0 has NaN"),
        ("float.npz real.npz", f"float.npz: {EXPECTED} float32 of shape (5, 8, 8, 3)"),
        ("flat.npz real.npz", f"flat.npz: {EXPECTED} uint8 of shape (5, 8, 8)"),
        ("fake.npz flat.npz", "flat.npz: expected samples of uint8"),
        ("fake.npz fortran.npz", "fortran.npz: arr_0 is in Fortran order"),
        ("fake.npz short.npz", "short.npz: arr_0 is shorter than its header says"),
        (
            "fake.npz wrong.npz --metrics fid",
            "wrong.npz: mu and sigma are no mean (D) and covariance (D x D), all finite",
        ),
        ("fake.npz infinite.npz --metrics fid", "infinite.npz: mu and sigma are no mean"),
        ("list.npz real.npz", "list.npz: settings is not a JSON object"),
        ("text.npz real.npz", "text.npz: Expecting value"),
        ("fake.npz", "the reference, a second argument, is missing"),
        ("fake.npz missing.npz", "missing.npz: no such file"),
        ("fake.npz real.npz --batch 0", "must be at least 1"),
        ("fake.npz real.npz --pca 0", "must be at least 1"),
        ("fake.npz real.npz --pca 3 --features inception", "--pca is for --features pixels"),
        (
            "one.npz --make-reference ref.npz",
            "a reference needs at least 2 images; one.npz has 1",
        ),
        ("fake.npz --make-reference nowhere/ref.npz", "No such file"),
    ],
)
def test_an_error_is_one_clear_line(faulty, command, arguments, message):
    code, out, err = command(*arguments.split())
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("eval_min.py: error: ") and message in err


def test_without_scikit_learn_pixels_are_one_clear_line(data, real, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    file = save(tmp_path / "s.npz", real[0][:50], labels=real[1][:50])
    code, out, err = command(file, data)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "comparing pixels needs scikit-learn: pip install scikit-learn" in err

"""classifier.py: it learns the real images, the same at every call, and its figures tell samples
that are good from samples that are not."""

import json

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from experiments import classifier, figures


@pytest.fixture(scope="module")
def real(digits):
    return classifier.read(digits)


def test_it_recognises_held_out_images(digits):
    assert classifier.fitted(digits).held_out_accuracy > 0.95


def test_it_is_the_same_at_every_call(digits, real):
    again = classifier.fitted.__wrapped__(digits).features(real[0][:9])
    assert np.array_equal(again, classifier.fitted(digits).features(real[0][:9]))


def test_without_held_out_images_its_accuracy_is_unknown(digits, real, tmp_path):
    images, labels, meta = real
    np.save(tmp_path / "images.npy", images[:70].transpose(0, 3, 1, 2))
    np.save(tmp_path / "labels.npy", labels[:70])
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"held_out": 0}))
    model = classifier.fitted.__wrapped__(str(tmp_path), epochs=1)
    assert model.held_out_accuracy is None


def test_real_images_are_as_near_as_real_halves(digits, real):
    images, labels, _ = real
    found = classifier.judge(images[::2], labels[::2], digits)
    assert found["feature_distance"] < 2 * found["feature_distance_halves"]
    assert found["recognised"] > 0.95 and found["feature_precision"] == 1


def test_wrong_labels_lower_the_share_recognised_alone(digits, real):
    images, labels, _ = real
    right = classifier.judge(images[::2], labels[::2], digits)
    wrong = classifier.judge(images[::2], (labels[::2] + 1) % 10, digits)
    assert wrong["recognised"] < 0.1
    assert wrong["feature_distance"] == right["feature_distance"]


def test_noise_is_far_away(digits, real):
    images, labels, _ = real
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    found = classifier.judge(noise, labels, digits)
    assert found["feature_distance"] > 20 * found["feature_distance_halves"]
    assert found["feature_recall"] < 0.1


def test_a_missing_class_raises_the_distance_and_lowers_recall(digits, real):
    images, labels, _ = real
    some = labels < 5
    found = classifier.judge(images[some], labels[some], digits)
    assert found["feature_distance"] > 5 * found["feature_distance_halves"]
    assert found["feature_recall"] < 0.7 * found["feature_recall_halves"]


def test_look_alikes_are_the_classes_with_near_means():
    means = {0: 0.0, 1: 10.0, 2: 20.0, 3: 11.0, 4: 13.5}
    labels = np.repeat(list(means), 4)
    features = np.array([means[c] for c in labels])[:, None] + np.tile([-0.1, 0.1], 10)[:, None]
    assert classifier.look_alikes(features, labels) == [1, 3, 4]
    assert classifier.look_alikes(features, labels, n=9) == [0, 1, 2, 3, 4]


def test_a_figure_of_features_says_how_far_apart_the_classes_are(
    digits, real, tmp_path, monkeypatch
):
    images, labels, _ = real
    titles = []
    set_title = figures.plt.Axes.set_title
    monkeypatch.setattr(
        figures.plt.Axes,
        "set_title",
        lambda self, text: titles.append(text) or set_title(self, text),
    )
    shuffled = np.random.default_rng(0).permutation(labels[:200])
    seeds = [(images[:200], labels[:200]), (images[200:400], labels[200:400])]
    made = {"good": seeds, "mixed": [(images[:200], shuffled)]}
    assert figures.tsne(tmp_path / "tsne.png", made, digits) == "tsne.png"
    apart = dict(title.split("\n") for title in titles if "\n" in title)
    features = classifier.fitted(digits).features
    each = [silhouette_score(features(x), y) for x, y in seeds]
    assert apart["good"] == f"{np.mean(each):.2f} ± {np.std(each, ddof=1):.2f}"
    assert np.mean(each) > 0.3 > 0.1 > float(apart["mixed"])
    few = {"good": seeds, "few": [seeds[0], (images[:50], labels[:50])]}
    assert figures.tsne(tmp_path / "few.png", few, digits) is None

"""A small classifier of the real images; its features see what a distance of pixels does not.

`judge` measures samples by it for the tables of ablate.py; Fig. 11 shows its features. It stands
for the networks that the paper takes, Inception and ResNet-152, which know nothing of such images.
For small images of pixels. Imports evaluation/ and support/.
"""

import functools

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluation.metrics import frechet_distance, precision_recall, statistics
from support.prepared import read_set

WIDTH = 64  # of the features


class Classifier(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> logits (B, classes); `features` are what the last layer sees."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, WIDTH),
            nn.GELU(),
        )
        self.head = nn.Linear(WIDTH, classes)
        self.held_out_accuracy = None  # a share; None without held-out images

    def forward(self, x):
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """images (N, H, W, C) uint8 -> (N, WIDTH) float32."""
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(500)
        return torch.cat([self.body(scaled(x)) for x in parts]).numpy()

    @torch.no_grad()
    def classify(self, features: np.ndarray) -> np.ndarray:
        return self.head(torch.from_numpy(features)).argmax(1).numpy()


def scaled(x):
    return x.float() / 127.5 - 1


def read(data_dir):
    """All images (N, H, W, C) uint8 and labels (N,) of a prepared set of pixels, and its meta."""
    meta, images, labels = read_set(data_dir)
    return np.array(images).transpose(0, 2, 3, 1), labels, meta


@functools.cache
def fitted(data_dir: str, epochs: int = 12, batch_size: int = 64) -> Classifier:
    """A Classifier of a set's training images, the same at every call. AdamW; the learning rate
    falls from 2e-3 to 0 as half a cosine."""
    images, labels, meta = read(data_dir)
    n = len(images) - meta["held_out"]
    x = torch.from_numpy(images[:n]).permute(0, 3, 1, 2)
    y = torch.from_numpy(labels[:n])
    steps = epochs * -(-n // batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(images.shape[3], len(meta["classes"]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for rows in torch.randperm(n).split(batch_size):
                F.cross_entropy(model(scaled(x[rows])), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    model.eval().requires_grad_(False)
    if n < len(images):
        right = model.classify(model.features(images[n:])) == labels[n:]
        model.held_out_accuracy = float(right.mean())
    return model


def judge(samples: np.ndarray, labels: np.ndarray, data_dir: str) -> dict:
    """Samples (N, H, W, C) uint8 and labels (N,) against all images of a prepared set.

    Returns feature_distance (Frechet distance of the features), feature_precision, feature_recall,
    recognised (share of the samples that get their label); with _halves the same of one half of the
    real images against the other; classifier_accuracy, on held-out images. None stands for a figure
    without enough images.
    """
    model = fitted(str(data_dir))
    images, _, _ = read(data_dir)
    fake, real = model.features(samples), model.features(images)
    order = np.random.default_rng(0).permutation(len(real))
    a, b = (real[half] for half in np.array_split(order, 2))
    result = {
        "recognised": float((model.classify(fake) == labels).mean()),
        "classifier_accuracy": model.held_out_accuracy,
    }
    for ending, x, y in (("", fake, real), ("_halves", a, b)):
        distance = precision = recall = None
        if min(len(x), len(y)) > 3:  # the neighbours that precision and recall look at
            distance = frechet_distance(*statistics(x), *statistics(y))
            precision, recall = precision_recall(y, x)
        result |= {f"feature_distance{ending}": distance,
                   f"feature_precision{ending}": precision, f"feature_recall{ending}": recall}
    return result


def look_alikes(features: np.ndarray, labels: np.ndarray, n: int = 3) -> list[int]:
    """The n classes that are hardest to tell apart: the two whose mean features lie nearest to each
    other, then the one whose mean lies nearest to one of those, and so on."""
    classes = np.unique(labels)
    means = np.stack([features[labels == c].mean(0) for c in classes])
    distance = np.linalg.norm(means[:, None] - means, axis=-1)
    np.fill_diagonal(distance, np.inf)
    chosen = list(np.unravel_index(distance.argmin(), distance.shape))
    while len(chosen) < min(n, len(classes)):
        nearest = distance[chosen].min(0)
        nearest[chosen] = np.inf
        chosen.append(nearest.argmin())
    return sorted(int(classes[i]) for i in chosen)

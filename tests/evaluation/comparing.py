"""What the tests of the metrics share: features, cheap networks, brute force, tables."""

import numpy as np
from scipy.spatial.distance import cdist


def features(n, d, shift=0.0, seed=0):
    """(n, d) float32, correlated, not negative, often 0: much like Inception's."""
    mix = np.random.default_rng(99).normal(size=(20, d)) / 4
    x = np.random.default_rng(seed).normal(size=(n, 20)) @ mix + 0.2 + shift
    return np.maximum(x, 0).astype(np.float32)


def toy_network(weights=None):
    """A network with three kinds of features, in place of Inception; for 8 x 8 x 1 or 3."""
    mix = np.random.default_rng(5).normal(size=(3, 8 * 8 * 3, 12)).astype(np.float32)

    def network(x):
        assert x.dtype == np.uint8 and x.ndim == 4
        x = np.repeat(x, 3 // x.shape[3], 3).reshape(len(x), -1).astype(np.float32) / 255
        return tuple(np.maximum(x @ m, 0) for m in mix)

    return network


def brute_force(real, fake, k=3):
    """Precision and recall by the definition, from differences, in float64."""
    real, fake = real.astype(np.float64), fake.astype(np.float64)

    def radii(x):
        parts = [cdist(part, x, "sqeuclidean") for part in np.array_split(x, 20)]
        return np.concatenate([np.partition(part, k, 1)[:, k] for part in parts])

    across = cdist(fake, real, "sqeuclidean")
    precision = (across <= radii(real)).any(1).mean()
    recall = (across <= radii(fake)[:, None]).any(0).mean()
    return precision, recall


def save(file, x, compressed=False, **more):
    """Write an .npz with arr_0 and more, and return its path."""
    (np.savez_compressed if compressed else np.savez)(file, arr_0=x, **more)
    return file


def rows(markdown):
    """The cells of a Markdown table."""
    lines = [line.strip("|") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def measured(markdown):
    """{header: cell} of the row of samples."""
    header, _, row, *_ = rows(markdown)
    return dict(zip(header, row))

"""How far drawn digits are from real ones: a Frechet distance on the features of a small classifier.

The distance is FID (Heusel et al. 2017) with a classifier of digits in place of Inception. Like FID it comes out too
large where the images are few: 256 real digits are not at distance 0 from the others. All distances here are therefore
taken from the same number of images to the same reference, the training digits, and they are to be read beside the
floor and the ceiling, not alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from data import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor

IMAGES = 256  # on one side of every distance; the other side is all of the training digits
CHOICES = 20  # where there are more images than that, the mean over so many random choices of them


class Quality(NamedTuple):
    """Distances to the training digits, and what the classifier says of the samples."""

    samples: float
    floor: float  # real digits that were not trained on
    ceiling: float  # normal noise
    images: int  # number behind each of the three
    confidence: float  # mean probability of the class that the classifier sees in a sample
    histogram: list[int]  # samples of each class
    accuracy: float  # of the classifier, on the test digits


class Classifier:
    """A perceptron with two hidden layers, trained on the real training digits in a second or two."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.mlp = MLPClassifier((64, 32), alpha=1e-2, max_iter=400, random_state=0).fit(flat(images), labels.numpy())

    def features(self, images: Tensor) -> np.ndarray:
        """The last hidden layer, ``(n, 32)``."""
        h = flat(images)
        for weight, bias in zip(self.mlp.coefs_[:-1], self.mlp.intercepts_[:-1], strict=True):
            h = np.maximum(h @ weight + bias, 0)
        return h

    def probabilities(self, images: Tensor) -> np.ndarray:
        """``(n, 10)``"""
        return self.mlp.predict_proba(flat(images))


def flat(images: Tensor) -> np.ndarray:
    """Images ``(n, 1, 8, 8)`` as float64 rows, cut to the range that images have."""
    return images.double().clamp(-1, 1).flatten(1).numpy()


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """``|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))``: the distance of two sets of features ``(n, D)``, taken as
    Gaussians of means mu and covariances A, B (Dowson and Landau 1982)."""
    difference = features_a.mean(0) - features_b.mean(0)
    cov_a, cov_b = np.cov(features_a, rowvar=False), np.cov(features_b, rowvar=False)
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2); rounding can make the smallest negative.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root)


def measure(samples: Tensor) -> Quality:
    """The quality of drawn digits ``(n, 1, 8, 8)`` in [-1, 1]; they are rounded to what an 8-bit image keeps."""
    digits = load_digits()
    classifier = Classifier(digits.train_images, digits.train_labels)
    reference = classifier.features(digits.train_images)
    samples = to_uint8(samples).double() / 127.5 - 1
    images = min(len(samples), IMAGES)
    noise = torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def distance(those: Tensor) -> float:
        return mean_over_choices(classifier.features(those), images, lambda chosen: frechet_distance(chosen, reference))

    probabilities = classifier.probabilities(samples)
    return Quality(
        samples=distance(samples),
        floor=distance(digits.test_images),
        ceiling=distance(noise),
        images=images,
        confidence=float(probabilities.max(1).mean()),
        histogram=np.bincount(probabilities.argmax(1), minlength=10).tolist(),
        accuracy=classifier.mlp.score(flat(digits.test_images), digits.test_labels.numpy()),
    )


def mean_over_choices(features: np.ndarray, number: int, distance: Callable[[np.ndarray], float]) -> float:
    """The mean ``distance`` of ``number`` rows, over random choices of them where there are more."""
    if len(features) == number:
        return distance(features)
    generator = np.random.default_rng(0)
    return float(np.mean([distance(generator.choice(features, number, replace=False)) for _ in range(CHOICES)]))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit ones, 0 to 255."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)

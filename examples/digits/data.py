"""The handwritten digits that ship inside scikit-learn, as tensors."""

from __future__ import annotations

from typing import NamedTuple

import sklearn.datasets
import sklearn.model_selection
import torch
from torch import Tensor


class Digits(NamedTuple):
    """Images ``(n, 1, 8, 8)`` float32 in [-1, 1]; labels ``(n,)`` int64, 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """1437 digits for training and 360 for testing. The split is fixed and holds every class in its proportion."""
    digits = sklearn.datasets.load_digits()
    images = (digits.images / 8 - 1).astype("float32")[:, None]  # pixels are whole numbers from 0 to 16
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return Digits(*map(torch.from_numpy, (train_images, train_labels, test_images, test_labels)))

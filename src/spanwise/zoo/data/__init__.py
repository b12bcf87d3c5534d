"""Real and generated data sets; each factory returns (training set, test set) of (x, y) tensors."""

from __future__ import annotations

from spanwise.zoo.data.cifar import cifar10, cifar100
from spanwise.zoo.data.handwritten import digits
from spanwise.zoo.data.keywords import keywords
from spanwise.zoo.data.synthetic import synthetic_images, synthetic_text, synthetic_vectors

__all__ = [
    "cifar10",
    "cifar100",
    "digits",
    "keywords",
    "synthetic_images",
    "synthetic_text",
    "synthetic_vectors",
]

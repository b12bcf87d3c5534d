"""Small reference models, losses and data for tests, examples and benchmarks, by ``"spanwise.zoo:name"``.

Models take rows first and train without dropout unless asked: random masks differ between replicas, so
they would hide whether a plan computes the gradient of one device.
"""

from __future__ import annotations

from spanwise.zoo.data import (
    cifar10,
    cifar100,
    digits,
    keywords,
    synthetic_images,
    synthetic_text,
    synthetic_vectors,
)
from spanwise.zoo.losses import language_model_loss
from spanwise.zoo.models.alexnet import alexnet, alexnet_224
from spanwise.zoo.models.gpt import gpt
from spanwise.zoo.models.lenet import lenet5
from spanwise.zoo.models.mlp import mlp
from spanwise.zoo.models.mobilenet import mobilenet_v2
from spanwise.zoo.models.resnet import resnet18, resnet50
from spanwise.zoo.models.vgg import vgg9, vgg11, vgg16

__all__ = [
    "alexnet",
    "alexnet_224",
    "cifar10",
    "cifar100",
    "digits",
    "gpt",
    "keywords",
    "language_model_loss",
    "lenet5",
    "mlp",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "synthetic_images",
    "synthetic_text",
    "synthetic_vectors",
    "vgg9",
    "vgg11",
    "vgg16",
]

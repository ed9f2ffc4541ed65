"""Transformations: pure functions from compiled circuits to compiled circuits, which keep weights, device and dtype.

A circuit with classes (``num_classes``) keeps them: what a transformation does, it does to the distribution of each.
"""

from circuits.transforms.chain import Chain, to_chain
from circuits.transforms.condition import condition
from circuits.transforms.grow import grow
from circuits.transforms.multiply import NormalizedProduct, multiply
from circuits.transforms.product_chain import product_chain
from circuits.transforms.prune import Pruned, prune
from circuits.transforms.tied_product import TiedProduct
from circuits.transforms.ties import share_parameters, untie_parameters
from circuits.transforms.units import merge_equal_units, trim
from circuits.transforms.variables import marginalize, permute

__all__ = [
    "Chain",
    "NormalizedProduct",
    "Pruned",
    "TiedProduct",
    "condition",
    "grow",
    "marginalize",
    "merge_equal_units",
    "multiply",
    "permute",
    "product_chain",
    "prune",
    "share_parameters",
    "to_chain",
    "trim",
    "untie_parameters",
]

"""MoleGrad: linear layers that keep codes of their inputs, and whose weight gradients are formed one layer at a time or never.

``report = mango.mole.convert(model, mango.mole.MoleConfig(store="int4"))`` converts a model in place; ``revert(model)`` undoes it.
"""

from mango.mole import state
from mango.mole.config import MoleConfig
from mango.mole.convert import Report, convert, revert
from mango.mole.factors import Factors
from mango.mole.linear import MoleLinear
from mango.mole.mlp import MoleMLP
from mango.mole.optimizer import MoleOptimizer

__all__ = ["Factors", "MoleConfig", "MoleLinear", "MoleMLP", "MoleOptimizer", "Report", "convert", "revert", "state"]

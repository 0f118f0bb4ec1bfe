"""MoleGrad: linear layers that keep codes of their inputs, and whose weight gradients are formed one layer at a time or never.

``report = mango.mole.convert(model, mango.mole.MoleConfig(store="int4"))`` converts a model in place; ``revert(model)`` undoes it.
"""

from mango.mole.config import MoleConfig
from mango.mole.convert import Report, convert, revert
from mango.mole.linear import MoleLinear

__all__ = ["MoleConfig", "MoleLinear", "Report", "convert", "revert"]

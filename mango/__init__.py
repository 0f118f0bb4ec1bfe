"""mango: train large models in little memory with low-rank, quantised gradients and certified bounds.

``import mango`` needs torch and numpy alone; everything else is an extra, imported where it is used.
"""

from mango import codecs, compressors, errors, feedback, optim
from mango.optim.mango import Mango
from mango.optim.plan import LayerPlan
from mango.subspace import Subspace, orthonormalize

__version__ = "0.1.0"

__all__ = ["LayerPlan", "Mango", "Subspace", "codecs", "compressors", "errors", "feedback", "optim", "orthonormalize"]

"""The theorems behind mango's certificates: one file each, with statement, machine-checked proof, measurement and negative control.

``python -m theory`` runs them all. Needs the extra ``mango[theory]`` (sympy, scipy, PEPit, scikit-learn).
"""

from mango.registry import Registry
from theory.base import Case, Check, Step, Theorem

THEOREMS = Registry(
    "theorem",
    {
        "T1": "theory.t1_codebook:THEOREM",
        "T2": "theory.t2_lowrank:THEOREM",
        "T3": "theory.t3_scouts:THEOREM",
        "T4": "theory.t4_lrq:THEOREM",
        "T5": "theory.t5_ef21:THEOREM",
        "T6": "theory.t6_marina:THEOREM",
        "T7": "theory.t7_adaptive:THEOREM",
        "T8": "theory.t8_pareto:THEOREM",
        "T9": "theory.t9_pepit:THEOREM",
    },
)

__all__ = ["THEOREMS", "Case", "Check", "Step", "Theorem"]

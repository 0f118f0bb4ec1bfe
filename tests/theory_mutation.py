"""Mutation check of the proofs: a copy of ``theory/`` in which every proof step is also tried with its mathematics changed.

A step whose verdict stays True whatever is changed in it says nothing. Each call of a checker is rewritten to carry variants of itself
(a sign flipped, a constant increased, a comparison turned round, in the call or in a function that it names); a step survives when no
variant fails.
"""

from __future__ import annotations

import ast
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

CHECKERS = ("identity", "nonnegative", "everywhere", "Step")
VARIANTS = 14  # tried in turn, until one fails
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult}
TURNS = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.Gt, ast.LtE: ast.Gt, ast.Gt: ast.Lt, ast.GtE: ast.Lt, ast.In: ast.NotIn}

PROBE = """
import sys
REPORT = {}

def probe(where, original, variants):
    step = original()
    for variant in variants:
        try:
            if variant().holds is not True:
                REPORT[where] = True
                return step
        except Exception:  # a variant that cannot be evaluated tells nothing: the next one may
            continue
    REPORT.setdefault(where, False)
    return step

def lookup(module, name):
    return getattr(sys.modules[module], name)
"""

RUN = """
import json
from theory import THEOREMS
from theory._probe import REPORT
steps = {name: [step.holds for step in THEOREMS.load(name).proof()] for name in THEOREMS}
print(json.dumps({"steps": steps, "killed": REPORT}))
"""


def build(source: Path, target: Path) -> None:
    """Write the instrumented copy of the package ``source`` to ``target``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    trees = {path.stem: ast.parse(path.read_text()) for path in target.glob("*.py") if path.stem != "algebra"}
    helpers = {node.name: (stem, node) for stem, tree in trees.items() for node in tree.body if isinstance(node, ast.FunctionDef)}
    extra: dict[str, list[ast.stmt]] = {stem: [] for stem in trees}
    mutated = {name: list(_mutated_helper(name, stem, node, extra)) for name, (stem, node) in helpers.items() if name not in CHECKERS}
    for stem, tree in trees.items():
        if stem in ("base", "__main__", "runner", "search"):
            continue
        tree = _Instrument(stem, mutated).visit(tree)
        tree.body += extra[stem]
        at = (
            next(i for i, node in enumerate(tree.body) if isinstance(node, ast.ImportFrom) and node.module == "__future__") + 1
            if stem != "__init__"
            else 0
        )
        tree.body[at:at] = ast.parse("from theory._probe import lookup as _lookup, probe as _probe").body
        (target / f"{stem}.py").write_text(ast.unparse(ast.fix_missing_locations(tree)))
    (target / "_probe.py").write_text(PROBE)


def _mutated_helper(name: str, stem: str, node: ast.FunctionDef, extra: dict[str, list[ast.stmt]]) -> Iterator[tuple[str, str]]:
    """Add mutants of a module's function to that module; yields (module, mutant's name)."""
    mutants = sorted(_mutants(node), key=lambda pair: not pair[0])  # comparisons first: they decide verdicts
    for number, (_, mutant) in enumerate(mutants[: VARIANTS // 2]):
        assert isinstance(mutant, ast.FunctionDef)
        mutant.name = f"_mutant_{name}_{number}"
        mutant.decorator_list = []
        extra[stem].append(mutant)
        yield f"theory.{stem}", mutant.name


def _mutants(tree: ast.AST) -> Iterator[tuple[bool, ast.AST]]:
    """Copies of the tree with one node changed, with whether that node is a comparison."""
    for index, node in enumerate(ast.walk(tree)):
        comparison = isinstance(node, ast.Compare) and type(node.ops[0]) in TURNS
        number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if not (comparison or number or (isinstance(node, ast.BinOp) and type(node.op) in SWAPS)):
            continue
        clone = copy.deepcopy(tree)
        twin = list(ast.walk(clone))[index]
        if isinstance(twin, ast.Compare):
            twin.ops[0] = TURNS[type(twin.ops[0])]()
        elif isinstance(twin, ast.BinOp):
            twin.op = SWAPS[type(twin.op)]()
        elif isinstance(twin, ast.Constant):
            twin.value = twin.value + 1
        yield comparison, clone


class _Instrument(ast.NodeTransformer):
    """identity(...) -> _probe("module:line", lambda: identity(...), [lambda: <variant>, ...])."""

    def __init__(self, stem: str, helpers: dict[str, list[tuple[str, str]]]) -> None:
        self.stem, self.helpers = stem, helpers

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Name) and node.func.id in CHECKERS and node.args):
            return node
        variants: list[ast.expr] = []
        for index, argument in enumerate(node.args):
            if index == 0 and len(node.args) > 1:
                continue  # the claim's text
            for _, mutant in _mutants(argument):
                clone = copy.deepcopy(node)
                clone.args[index] = mutant  # type: ignore[call-overload]
                variants.append(clone)
        named = {n.id for argument in node.args for n in ast.walk(argument) if isinstance(n, ast.Name)} & set(self.helpers)
        through = []
        for name in sorted(named):
            for module, mutant in self.helpers[name]:
                clone = copy.deepcopy(node)
                replaced = _Rename(name, module, mutant)
                clone.args = [clone.args[0], *[replaced.visit(argument) for argument in clone.args[1:]]]
                through.append(clone)
        mixed = [variant for pair in zip(through, variants) for variant in pair]  # noqa: B905 - the longer tail follows
        mixed += through[len(variants) :] + variants[len(through) :]
        thunks = [_thunk(variant) for variant in mixed[:VARIANTS]]
        where = ast.Constant(f"{self.stem}:{node.lineno}:{node.col_offset}")
        return ast.Call(ast.Name("_probe", ast.Load()), [where, _thunk(node), ast.List(thunks, ast.Load())], [])


class _Rename(ast.NodeTransformer):
    def __init__(self, name: str, module: str, mutant: str) -> None:
        self.name, self.module, self.mutant = name, module, mutant

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id != self.name:
            return node
        return ast.Call(ast.Name("_lookup", ast.Load()), [ast.Constant(self.module), ast.Constant(self.mutant)], [])


def _thunk(body: ast.expr) -> ast.Lambda:
    empty = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(empty, body)

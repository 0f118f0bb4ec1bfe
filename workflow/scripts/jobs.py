"""What a tier's settings ask for, and which modules each job depends on. Read by the Snakefile; imports no Snakemake."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
from codehash import ROOT, digest
from contexts import METHODS

from mango import codecs, data, models, optim, policy
from mango.errors import ConfigError
from mango.mole.config import MoleConfig
from mango.mole.gradients import REGISTRY as GRADIENTS
from mango.registry import Registry
from mango.training.config import RunConfig, TierConfig, load, resolve
from mango.training.loop import CONVERSIONS
from theory import THEOREMS

SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"
# The loop, its settings and its record. The command line that starts them only passes them on, and does not count.
TRAINING = ("mango.training.loop", "mango.training.config", "mango.training.record", "mango.training.checkpoint")


def prepare_environment() -> None:
    """What every job inherits: this environment's commands and this checkout's packages, whether or not the environment is activated, and
    figures and PDFs without dates, so that equal inputs give equal bytes."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ |= {"SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}


def settings_file(given: Sequence[str | Path]) -> str:
    """The one settings file, relative to the checkout when it lies in it. Raises: ConfigError when several were given."""
    if len(given) != 1:
        raise ConfigError.of("--configfile", " ".join(map(str, given)), "one file: a tier is a whole, and tiers do not add up")
    path = Path(given[0]).absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def settings(path: str, merged: Mapping[str, Any], alone: Mapping[str, Any]) -> TierConfig:
    """A tier's settings, checked by the library and by the published schema.

    Args:
        path: the file that ``mango train`` will read.
        merged: the settings as Snakemake has them.
        alone: the file's own content, as Snakemake reads it.

    Raises: ConfigError.
    """
    if merged != alone:
        changed = sorted(key for key in merged.keys() | alone.keys() if merged.get(key) != alone.get(key))
        raise ConfigError.of(
            "--config", ", ".join(changed), f"settings come from one file: edit a copy of {path} and name it with --configfile"
        )
    tier = load(path)
    content = tier.model_dump(mode="json", exclude_unset=True)
    for error in jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(content):
        raise ConfigError(f"{path}: {'.'.join(map(str, error.absolute_path))}: {error.message}")
    for theorem in tier.theory.theorems or []:
        if theorem not in THEOREMS:
            raise ConfigError.of(f"{path}: theory.theorems", theorem, "among " + ", ".join(THEOREMS))
    for name, experiment in tier.experiments.items():
        for variant in experiment.variants:
            run_modules(resolve(tier, name, variant, seed=0).config)
    return tier


def runs(tier: TierConfig, experiment: str) -> Iterator[tuple[str, int]]:
    """Every (variant, seed) of an experiment."""
    chosen = tier.experiments[experiment]
    for variant in chosen.variants:
        for seed in chosen.seeds_of(variant):
            yield variant, seed


def theorems(tier: TierConfig) -> list[str]:
    """The theorems that the tier checks: all of them unless it names some."""
    return list(THEOREMS) if tier.theory.theorems is None else tier.theory.theorems


def minutes(tier: TierConfig, experiment: str) -> int:
    """A generous limit for one run: the whole experiment's share of the tier's time, at least ten minutes."""
    return max(10, math.ceil(2 * tier.experiments[experiment].minutes))


def run_settings(tier: TierConfig, experiment: str, variant: str) -> str:
    """Hash of what one run's record depends on; other variants of the same file do not count."""
    run = resolve(tier, experiment, variant, seed=0)
    return f"{run.config.hash()[:16]}-{run.label}"


def grid_settings(tier: TierConfig, experiment: str, variant: str) -> str:
    """Hash of what a variant's tuning depends on."""
    return (
        f"{resolve(tier, experiment, variant, seed=0).config.hash()[:16]} {json.dumps(tier.experiments[experiment].variants[variant].grid)}"
    )


def run_code(tier: TierConfig, experiment: str, variant: str) -> str:
    """Hash of the code behind one variant's training runs."""
    return digest(run_modules(resolve(tier, experiment, variant, seed=0).config))


def run_modules(run: RunConfig) -> list[str]:
    """The loop, and the registered parts that the settings name: data, model, optimizer, codecs of the plan (its defaults included), and
    what converted layers need."""
    optimizer = entry(optim.REGISTRY, run.optimizer)
    modules = [*TRAINING, entry(data.REGISTRY, run.data.name), entry(models.REGISTRY, run.model.name), optimizer]
    if "plan" in inspect.signature(optim.REGISTRY.load(run.optimizer)).parameters:
        plan = optim.LayerPlan.of(run.options.get("plan") or {})
        error = plan.error_codec if plan.error == "codec" else None
        modules += [entry(codecs.REGISTRY, name) for name in (plan.basis_codec, plan.factor_codec, plan.moment_codec, error) if name]
    if run.mole is not None:
        mole = MoleConfig.of(run.mole)
        modules += [entry(CONVERSIONS, "mole"), entry(GRADIENTS, mole.gradient)]
        modules += [entry(codecs.REGISTRY, name) for name in {mole.store, mole.derivative_store} if name in codecs.REGISTRY]
    if run.lora is not None:
        modules.append(entry(CONVERSIONS, "lora"))
    return modules


def entry(registry: Registry, name: str) -> str:
    """What a registry has under a name, as ``package.module:attribute``. Raises: ConfigError for an unknown name."""
    return f"{registry.module(name)}:{registry.entries[name].partition(':')[2]}"


def data_settings(tier: TierConfig, experiment: str) -> str:
    """What an experiment's data depends on: its settings, and the local copy that they find (which may appear or change later)."""
    chosen = tier.experiments[experiment].data
    if chosen.source == "download":  # looking would fetch it
        return chosen.model_dump_json()
    used, origin = data.find(chosen.name, chosen.source, getattr(chosen, "root", None))
    return f"{chosen.model_dump_json()} {used} {origin.key()}"


def data_code(tier: TierConfig, experiment: str) -> str:
    """Hash of the code that finds and decodes an experiment's data set."""
    return digest(["workflow/scripts/prepare_data.py", entry(data.REGISTRY, tier.experiments[experiment].data.name)])


def base(tier: TierConfig, experiment: str) -> list[str]:
    """The checkpoint that an experiment starts from, when it is one that the workflow makes."""
    path = getattr(tier.experiments[experiment].model, "path", None)
    return [path] if path is not None and Path(path).is_relative_to(Path("results", tier.tier)) else []


def pretrained_code() -> str:
    """Hash of the code that exports trained weights."""
    return digest(["workflow/scripts/pretrained.py", entry(models.REGISTRY, "llama")])


def theorem_code(theorem: str) -> str:
    """Hash of a theorem's file, the driver, and the modules that the theorem declares it measures."""
    return digest(theorem_modules(theorem))


def theorem_modules(theorem: str, root: Path = ROOT) -> list[str]:
    """The driver, the theorem's file and what it declares; a declared package stands for every module in it."""
    module = THEOREMS.module(theorem)
    modules = ["theory.__main__", module]
    for name in declared_modules(root / f"{module.replace('.', '/')}.py"):
        inside = sorted((root / name.replace(".", "/")).glob("*.py"))
        modules += [f"{name}.{path.stem}" for path in inside if path.stem != "__init__"] if inside else [name]
    return modules


def declared_modules(path: Path) -> list[str]:
    """The literal ``modules=(...)`` of the Theorem in a file, read without importing it (solvers are slow to import)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Theorem":
            for keyword in node.keywords:
                if keyword.arg == "modules":
                    return list(ast.literal_eval(keyword.value))
    raise ConfigError.of(
        f"{path}: Theorem.modules", None, "a tuple of strings, written out: the workflow reads it without importing the file"
    )


def subjects(tier: TierConfig) -> set[str]:
    """What the tier produces that notebooks read."""
    extra = {"contexts": tier.contexts, "policy": tier.policy}
    return {"theory", *tier.experiments, *(name for name, part in extra.items() if part is not None)}


def contexts_code() -> str:
    """Hash of the code behind memory against context length."""
    used = [entry(data.REGISTRY, "text"), entry(models.REGISTRY, "gpt"), entry(optim.REGISTRY, "adamw")]
    made = [entry(GRADIENTS, "formed"), entry(codecs.REGISTRY, "int4"), entry(codecs.REGISTRY, "int2")]
    return digest(["workflow/scripts/contexts.py", *used, *made])


def contexts_arguments(tier: TierConfig) -> str:
    """The command line of workflow/scripts/contexts.py for a tier that has contexts."""
    options = tier.contexts.model_dump() if tier.contexts is not None else {}
    words = [f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in options.items()]
    return " ".join([f"--tier {tier.tier}", *words])


def policy_settings(tier: TierConfig) -> str:
    """The settings of the experiment on policies; empty for a tier without."""
    return "" if tier.policy is None else tier.policy.model_dump_json()


def policy_files(tier: TierConfig) -> list[str]:
    """What an evaluation judges beside the registered policies, and so has to be trained first."""
    if tier.policy is None:
        return []
    named = {*tier.policy.policies, *(name for ablation in tier.policy.ablations.values() for name in ablation.policies)}
    return [f"results/{tier.tier}/policy/{name}.safetensors" for name in sorted(named - {*policy.REGISTRY})]


def policy_workers(tier: TierConfig) -> int:
    """Processes that play PPO's episodes."""
    return 1 if tier.policy is None else tier.policy.workers


def policy_code(tier: TierConfig) -> str:
    """Hash of the code behind policies, and of the files that are shipped."""
    if tier.policy is None:
        return ""
    tasks = [*tier.policy.held_out.values(), *tier.policy.train.values()]
    parts = {
        entry(registry, name) for task in tasks for registry, name in ((data.REGISTRY, task.data.name), (models.REGISTRY, task.model.name))
    }
    rules = {entry(policy.REGISTRY, name) for name in policy.REGISTRY}
    kinds = {entry(codecs.REGISTRY, name) for name in ("bf16", "int8", "nf4")}
    scripts = [f"workflow/scripts/{name}.py" for name in ("policy", "policy_evaluation")]
    files = sorted((ROOT / "mango" / "policy").glob("*.safetensors"))
    shipped = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    return f"{digest([*scripts, *sorted(parts | rules | kinds)])}-{shipped}"


def notebook_records(tier: TierConfig, subject: str) -> list[str]:
    """What a notebook reads: records of the theorems, the policies, an experiment or the contexts; the last three of every archive too, and
    of the archives alone where the tier lacks the experiment."""
    if subject == "policy":
        archived = (ROOT / "results" / "archive").glob("*/policy/evaluation.json")
        return [f"results/{tier.tier}/policy/evaluation.json", *sorted(str(path.relative_to(ROOT)) for path in archived)]
    if subject == "theory":
        return [f"results/{tier.tier}/theory/{theorem}.json" for theorem in theorems(tier)]
    made = [(method, 0) for method in METHODS] if subject == "contexts" else runs(tier, subject) if subject in tier.experiments else []
    live = [f"results/{tier.tier}/{subject}/{variant}/{seed}/run.json" for variant, seed in made]
    return live + sorted(str(path.relative_to(ROOT)) for path in (ROOT / "results" / "archive").glob(f"*/**/{subject}/*/*/run.json"))


def notebook_code(notebook: str) -> str:
    """Hash of a notebook's code cells and what they import, the modules beside them included."""
    shared = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.py"))
    return digest([f"notebooks/{notebook}.ipynb", *shared])


def planner_code() -> str:
    """Hash of what computes a model's memory, and of the optimizers that it computes with."""
    return digest(["mango.planner.report:plan"])


def unchecked_statements(tier: TierConfig) -> list[str]:
    """Files of the theorems that the tier does not check: the paper prints their statements all the same."""
    return [f"{THEOREMS.module(name).replace('.', '/')}.py" for name in THEOREMS if name not in theorems(tier)]


def generator_code() -> str:
    """Hash of what turns results into LaTeX."""
    return digest(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "workflow" / "scripts").glob("paper_*.py")))


def paper_code() -> str:
    """Hash of what typesets the paper."""
    return digest(["workflow/scripts/paper_build.py"])


def paper_sources() -> list[str]:
    """The manuscript's own files."""
    paper = ROOT / "paper"
    found = [*paper.glob("*.*"), *paper.glob("sections/*.tex")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in (".tex", ".sty", ".bib"))

"""Results of real, tiny runs of every experiment, and the notebooks executed on them: made once in a process."""

from __future__ import annotations

import atexit
import functools
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

import papermill
import pytest

from mango.training import config
from mango.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
TIER = "smoke"
CODES: dict[str, object] = {"targets": "all", "exclude": ["head"]}
CONTROLS = {
    "adamw": {"label": "AdamW (dense)", "optimizer": "adamw", "options": {"lr": 3e-3}},
    "frozen": {"label": "Frozen", "optimizer": "adamw", "options": {"lr": 3e-3}, "freeze": True},
}
SETTINGS = {
    "tier": TIER,
    "experiments": {
        "cifar10": {
            "seeds": [0, 1],
            "minutes": 1,
            "data": {"name": "cifar10", "source": "embedded", "train": 100, "test": 50},
            "model": {"name": "resnet", "width": 16, "blocks": [1, 1], "stem": "patch2"},
            "train": {"steps": 4, "batch": 20, "eval_every": 2, "log_every": 1},
            "controls": {"dense": "adamw", "frozen": "frozen"},
            "variants": {
                **CONTROLS,
                "adafactor": {"label": "Adafactor", "optimizer": "adafactor", "options": {"lr": 1e-2}, "seeds": [0]},
                "mango": {"label": "Mango, rank 1/8", "optimizer": "mango", "options": {"lr": 3e-3}, "seeds": [0]},
                "mango-no-scouts": {
                    "label": "Mango, no scouts",
                    "optimizer": "mango",
                    "options": {"lr": 3e-3, "plan": {"scouts": 0}},
                    "seeds": [0],
                },
            },
        },
        "nanochat": {
            "seeds": [0, 1],
            "minutes": 1,
            "data": {"name": "text", "source": "embedded", "train": 20_000, "test": 2000, "sequence": 32},
            "model": {"name": "gpt", "depth": 1, "width": 64, "heads": 2, "ffn": 2},
            "exclude": ["embedding", "head"],
            "train": {"steps": 4, "batch": 8, "eval_every": 2, "log_every": 1, "sample": 8},
            "controls": {"dense": "adamw", "frozen": "frozen"},
            "variants": {
                **CONTROLS,
                "recompute": {"label": "Recomputed", "optimizer": "adamw", "options": {"lr": 3e-3}, "recompute": True, "seeds": [0]},
                "muon": {"label": "Muon", "optimizer": "muon", "options": {"lr": 3e-2}, "seeds": [0]},
                "int2": {"label": "int2", "optimizer": "adamw", "options": {"lr": 3e-3}, "mole": {**CODES, "store": "int2"}, "seeds": [0]},
                "an-int4": {"label": "int4", "optimizer": "adamw", "options": {"lr": 3e-3}, "mole": CODES},
                "int4-muon": {
                    "label": "int4, Muon",
                    "optimizer": "muon",
                    "options": {"lr": 3e-2},
                    "mole": CODES,
                    "seeds": [0],
                },
                "factored": {
                    "label": "factored",
                    "optimizer": "mole",
                    "options": {"lr": 3e-3},
                    "mole": {**CODES, "gradient": "factored", "rank": 0.25, "diagnostics_every": 2},
                    "seeds": [0],
                },
                "sketch": {
                    "label": "A Q",
                    "optimizer": "adamw",
                    "options": {"lr": 3e-3},
                    "mole": {**CODES, "store": "sketch"},
                    "seeds": [0],
                },
            },
        },
        "language": {
            "seeds": [0, 1],
            "minutes": 1,
            "data": {"name": "text", "source": "embedded", "train": 20_000, "test": 2000, "sequence": 32},
            "model": {"name": "gpt", "depth": 1, "width": 64, "heads": 2, "ffn": 2},
            "exclude": ["embedding", "head"],
            "train": {"steps": 4, "batch": 8, "eval_every": 2, "log_every": 1},
            "controls": {"dense": "adamw", "frozen": "frozen"},
            "variants": {
                **CONTROLS,
                "muon": {"label": "Muon (dense)", "optimizer": "muon", "options": {"lr": 3e-2}, "seeds": [0]},
                "mango": {"label": "Mango, rank 1/8", "optimizer": "mango", "options": {"lr": 3e-3}, "seeds": [0]},
                "mango-noerror": {
                    "label": "Mango, no error",
                    "optimizer": "mango",
                    "options": {"lr": 3e-3, "plan": {"error": "none"}},
                    "seeds": [0],
                },
            },
        },
        "ablation-language": {
            "seeds": [0],
            "minutes": 1,
            "data": {"name": "text", "source": "embedded", "train": 20_000, "test": 2000, "sequence": 32},
            "model": {"name": "gpt", "depth": 1, "width": 64, "heads": 2, "ffn": 2},
            "exclude": ["embedding", "head"],
            "train": {"steps": 2, "batch": 8, "eval_every": 2, "log_every": 1},
            "variants": {
                "mango": {
                    "label": "Mango",
                    "optimizer": "mango",
                    "options": {"lr": 3e-3, "plan": {"scouts": 2}},
                    "vary": {"error": ["none"], "rank": [0.25]},
                },
            },
        },
        **{
            name: {
                "seeds": [0, 1],
                "minutes": 1,
                "data": {"name": "imagefolder", "source": "embedded", "size": 16, "train": 40, "test": 20},
                "model": model,
                "exclude": ["head"],
                "train": {"steps": 2, "batch": 10, "eval_every": 2, "log_every": 1},
                "controls": {"dense": "adamw", "frozen": "frozen"},
                "variants": {
                    **CONTROLS,
                    "mango": {"label": "Mango, rank 1/8", "optimizer": "mango", "options": {"lr": 3e-3}, "seeds": [0]},
                },
            }
            for name, model in (
                ("imagenet-cnn", {"name": "resnet", "width": 16, "blocks": [1, 1], "stem": "patch4"}),
                ("imagenet-vit", {"name": "vit", "size": 16, "patch": 4, "depth": 1, "width": 16, "heads": 2, "ffn": 2}),
            )
        },
        "llama-pretrain": {
            "seeds": [0, 1],
            "minutes": 1,
            "data": {"name": "text", "source": "embedded", "train": 20_000, "test": 1000, "sequence": 16},
            "model": {"name": "llama"},
            "exclude": ["embed_tokens|lm_head"],
            "train": {"steps": 2, "batch": 4, "eval_every": 2, "log_every": 1},
            "controls": {"dense": "adamw", "frozen": "frozen"},
            "variants": {
                **CONTROLS,
                "mango": {"label": "Mango, rank 1/8", "optimizer": "mango", "options": {"lr": 3e-3}},
            },
        },
        "llama-finetune": {
            "seeds": [0, 1],
            "minutes": 1,
            "data": {"name": "text", "source": "embedded", "train": 20_000, "test": 1000, "sequence": 16},
            "model": {"name": "llama"},
            "train": {"steps": 2, "batch": 4, "eval_every": 2, "log_every": 1},
            "controls": {"dense": "adamw", "frozen": "frozen"},
            "variants": {
                "adamw": {"label": "AdamW, full", "optimizer": "adamw", "options": {"lr": 3e-3}},
                "frozen": {"label": "Norms alone", "optimizer": "adamw", "options": {"lr": 3e-3}, "freeze": True},
                "a-lora": {"label": "QLoRA", "optimizer": "adamw", "options": {"lr": 3e-3}, "lora": {"rank": 2, "base": "nf4"}},
                "mango": {"label": "Mango, full", "optimizer": "mango", "options": {"lr": 3e-3, "fuse_backward": True}, "seeds": [0]},
            },
        },
        "llama-sentiment": {
            "seeds": [0, 1],
            "minutes": 1,
            "data": {"name": "movie-sentiment", "source": "embedded", "train": 40, "test": 20, "sequence": 16},
            "model": {"name": "llama"},
            "train": {"steps": 2, "batch": 4, "eval_every": 2, "log_every": 1},
            "controls": {"dense": "adamw", "frozen": "frozen"},
            "variants": {
                **CONTROLS,
                "mango": {"label": "Mango, full", "optimizer": "mango", "options": {"lr": 3e-3}, "seeds": [0]},
            },
        },
    },
    "policy": {
        "minutes": 1,
        "seeds": [0, 1],
        "decisions": 2,
        "every": 1,
        "policies": ["static", "budget", "tinyformer"],
        "oracle_seeds": [0],
        "budgets": [1.0],
        "ablations": {
            "low-rank": {"policies": ["budget"], "budgets": [2.5], "seeds": [0]},
            "full-rank": {"policies": ["budget"], "budgets": [2.5], "seeds": [0], "ranks": [1.0]},
        },
        "held_out": {
            "digits": {
                "data": {"name": "digits", "train": 100, "test": 50, "augment": False},
                "model": {"name": "resnet", "width": 16, "blocks": [1, 1], "stem": "patch4"},
                "lr": 1e-2,
                "batch": 16,
            }
        },
    },
}
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "workflow" / "scripts")]


@functools.cache
def tiny_results() -> Path:
    """A results folder made by real, tiny runs: some variants of each experiment, two seeds of the controls, memory against context
    length, and one theorem."""
    import contexts

    from theory.__main__ import main

    results = Path(tempfile.mkdtemp(prefix="mango-tiny-")) / "results"
    atexit.register(shutil.rmtree, results.parent, ignore_errors=True)
    tier = config.validated(config.TierConfig, SETTINGS, "test settings")
    for name, chosen in tier.experiments.items():
        for variant in chosen.variants:
            for seed in chosen.seeds_of(variant):
                train(config.resolve(tier, name, variant, seed), results / TIER / name / variant / str(seed))
    options = ["--depth", "1", "--vocabulary", "256", "--lengths", "16", "32", "--steps", "2", "--cap", "0.004", "--limit", "64"]
    assert contexts.main(["--tier", TIER, "--out", str(results / TIER), *options]) == 0
    assert tier.policy is not None
    (results / TIER / "policy").mkdir(parents=True)
    importlib.import_module("policy").evaluate(tier.policy, TIER, results / TIER / "policy" / "evaluation.json")
    assert main(["--only", "T3", "--out", str(results / TIER / "theory")]) == 0
    return results


@functools.cache
def executed(name: str) -> Path:
    """The folder that a notebook leaves on the tiny results; one runs in the repository's root, the others in notebooks/. None may warn."""
    results = tiny_results()
    cwd = ROOT if name == "01_cifar10" else ROOT / "notebooks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the kernel sees this checkout
        done = papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb",
            results.parent / f"{name}.ipynb",
            parameters={"tier": TIER, "results": str(results)},
            kernel_name="python3",
            cwd=cwd,
            progress_bar=False,
        )
    told = [output.text for cell in done.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert not told, f"{name} warns: {told}"
    return results / TIER / "figures" / name

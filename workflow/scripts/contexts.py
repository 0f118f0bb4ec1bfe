"""Memory, time and the longest context of nanochat for each way of keeping activations; needs torch and numpy alone.

    python workflow/scripts/contexts.py --tier gpu --depth 12 --cap 32 --lengths 1024 2048 4096 8192 --out results/archive/rtx5090-2026-12
    python workflow/scripts/contexts.py --tier smoke --depth 1 --vocabulary 256 --lengths 64 128 --cap 0.02 --out results/smoke

For every method and length, a model is built anew and takes a few steps on text (bytes, whatever the vocabulary that the head is sized
for). On a GPU the peak is the device's and weights are multiplied in bfloat16; on a CPU it is the sum of the ledger's categories in single
precision. The longest context whose peak stays under the cap is found by doubling and bisection, to 1/16 of itself. One run record for each
method, shaped like those of training: <out>/contexts/<method>/0/{run.json,metrics.jsonl}.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mango import data, models, optim
from mango.mole import MoleConfig, convert
from mango.telemetry import MemoryLedger
from mango.telemetry.memory import device_peaks, rss_peak
from mango.training import provenance

GIB = 1 << 30
CODES = {"targets": "all", "exclude": ["head"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> label, what differs from plain training
    "dense": ("everything kept", {}),
    "recompute": ("blocks recomputed", {"recompute": True}),
    "int4": ("int4 codes", {"mole": {"store": "int4", **CODES}}),
    "int2": ("int2 codes", {"mole": {"store": "int2", **CODES}}),
    "int2-hidden": ("int2 codes, hidden layer recomputed", {"mole": {"store": "int2", "hidden": "recompute", "chunk": 1024, **CODES}}),
}
FINEST = 16  # the longest context is found to this part of itself
WARM = 1  # steps before the timed ones


def run(method: str, length: int, options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """A few steps at one length: bytes by category, the peak, seconds a step, the losses."""
    _, setting = METHODS[method]
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    loaded = data.load("text", source="auto", sequence=length).to(device)
    model = models.get("gpt", vocabulary=options.vocabulary, depth=options.depth).to(device)
    model.recompute = setting.get("recompute", False)
    if "mole" in setting:
        convert(model, MoleConfig.of(setting["mole"]))
    optimizer = optim.build("adamw", model, exclude=["embedding", "head"], lr=1e-3)
    ledger, losses, seconds, gradients = MemoryLedger(model), [], [], 0
    for step in range(steps):
        begin = _now(device)
        inputs, targets = loaded.batch(step, options.batch, options.seed)

        def loss(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                return model(inputs, targets=targets)  # few logits at one time, for every method

        optimizer.zero_grad(set_to_none=True)
        if step == 0:  # counted on this step alone: the hooks take time
            with ledger.activations():
                value = loss()
                value.backward()
            gradients = ledger.gradients()
        else:
            value = loss()
            value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        seconds.append(_now(device) - begin)
    found = {
        "parameters": ledger.parameters(),
        "gradients": gradients,
        "optimizer_state": optim.state_nbytes(optimizer),
        "saved_activations": ledger.saved_activations,
    }
    allocated, reserved = device_peaks(device)
    timed = sorted(seconds[WARM:])
    return {
        "losses": losses,
        "memory": found | {"rss_peak": rss_peak(), "device_peak_allocated": allocated, "device_peak_reserved": reserved},
        "peak": sum(found.values()) if reserved is None else reserved,
        "step_seconds": timed[len(timed) // 2] if timed else None,
        "data": loaded.identity(),
        "values": sum(p.numel() for p in model.parameters()),
        "under_test": sum(p.numel() for _, p in optim.split(model, ["embedding", "head"])[0]),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fits(method: str, length: int, options: argparse.Namespace) -> bool:
    """Whether two steps at this length stay under the cap."""
    try:
        return run(method, length, options, 2)["peak"] <= options.cap * GIB
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()


def longest(good: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest good length up to ``limit``, to 1/16 of itself, when every length below a good one is good; 0 when ``start`` is not."""
    if not good(start):
        return 0
    low, high = start, limit + 1
    while 2 * low <= limit:
        if not good(2 * low):
            high = 2 * low
            break
        low *= 2
    while high - low > max(1, low // FINEST):
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def record(method: str, options: argparse.Namespace, started: str, began: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The method's run record and its metrics lines."""
    label, setting = METHODS[method]
    contexts, lines, result = [], [], {}
    for length in sorted(options.lengths):
        try:
            result = run(method, length, options, options.steps)
        except torch.OutOfMemoryError:
            contexts.append({"tokens": length, "saved_activations": None, "peak": None, "step_seconds": None})
            continue
        contexts.append(
            {"tokens": length, "saved_activations": result["memory"]["saved_activations"], "peak": result["peak"]}
            | {"step_seconds": result["step_seconds"]}
        )
        lines += [{"step": step, "split": f"train at {length}", "loss": loss} for step, loss in enumerate(result["losses"], 1)]
        gc.collect()
    if not result:
        raise SystemExit(f"contexts: {method} does not fit at any of the lengths {options.lengths}")
    found = longest(lambda length: fits(method, length, options), min(options.lengths), options.limit) if options.cap else None
    config = settings(setting, max(options.lengths), options)
    scores = {"step": options.steps, "train_loss": result["losses"][-1]}
    seconds = max(result["step_seconds"] or 0.0, 1e-9)
    content = {
        "schema_version": 1,
        "experiment": "contexts",
        "variant": method,
        "label": label,
        "tier": options.tier,
        "seed": options.seed,
        "config": config,
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest(),
        "git": provenance.git(),
        "lock_hash": provenance.lock_hash(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(torch.device(options.device)),
        "data": result["data"],
        "started": started,
        "resumed": [],
        "steps": options.steps,
        "wall_seconds": time.monotonic() - began,
        "throughput": {"value": options.batch * contexts[-1]["tokens"] / seconds, "unit": "bytes/s"},
        "metrics": {"final": scores, "best": scores},
        "memory": result["memory"],
        "parameters": {"total": result["values"], "compressed": result["under_test"]},
        "energy": {"joules": None, "source": None, "reason": "these steps are too few to measure it"},
        "plan": [],
        "contraction": [],
        "contexts": contexts,
        "longest_context": found,
        "memory_cap": int(options.cap * GIB) if options.cap else None,
        "status": "completed",
    }
    return content, lines


def settings(setting: dict[str, Any], length: int, options: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration in the form of ``mango.training.config.RunConfig``, every field written out."""
    return {
        "data": {"name": "text", "source": "auto", "train": None, "test": None, "validation": 0, "evaluate": "test"}
        | {"sequence": length, "vocabulary": None},
        "model": {"name": "gpt", "depth": options.depth, "width": None, "heads": None, "kv_heads": None, "ffn": 4},
        "train": {
            "steps": options.steps,
            "batch": options.batch,
            "eval_every": 100,
            "eval_batch": 500,
            "log_every": 10,
            "checkpoint_every": 100,
            "checkpoint_seconds": 60.0,
            "schedule": "constant",
            "warmup": 0,
            "warmdown": 0.4,
            "floor": 0.0,
            "clip": None,
            "autocast": "bf16" if torch.device(options.device).type == "cuda" else None,
            "channels_last": False,
            "device": "auto",
            "ema": None,
            "sample": 0,
            "threads": torch.get_num_threads(),
        },
        "exclude": ["embedding", "head"],
        "under_test": [],
        "optimizer": "adamw",
        "options": {"lr": 1e-3},
        "freeze": False,
        "lora": None,
        "mole": setting.get("mole"),
        "recompute": setting.get("recompute", False),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", required=True, help="written into the records")
    parser.add_argument("--out", type=Path, required=True, help="records go to <out>/contexts/<method>/0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="tokens")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=65536, help="that embedding and head are sized for; at least 256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="at each length; the first is not timed")
    parser.add_argument("--cap", type=float, default=0.0, help="GiB that the longest context may take; 0 = do not look for it")
    parser.add_argument("--limit", type=int, default=1 << 18, help="the longest context that is tried")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.cap and torch.device(options.device).type == "cuda":
        total = torch.cuda.get_device_properties(options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * GIB / total), options.device)
    for method in options.methods:
        content, lines = record(method, options, datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic())
        folder = options.out / "contexts" / method / str(options.seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial = folder / "run.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, folder / "run.json")
        print(f"{method}: longest context {content['longest_context']}, {content['contexts']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

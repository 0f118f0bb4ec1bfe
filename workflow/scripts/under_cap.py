"""Train a stack of linear layers under a hard cap on memory: dense AdamW exceeds it at the same batch, Mango does not.

python workflow/scripts/under_cap.py mango
python workflow/scripts/under_cap.py adamw

On a CPU the cap is on the address space of the whole process (RLIMIT_AS): Python and PyTorch themselves, the model, its gradients,
optimizer state and everything temporary. On CUDA it is on what the process allocates on the device. 100 million parameters take 0.4 GB;
AdamW adds as much for gradients and twice as much for its moments, Mango a fraction, and frees each layer's gradient once it is used.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys

import torch
from torch import nn

from mango import LayerPlan, Mango
from mango.telemetry.memory import rss_peak

WIDTH, LAYERS = 2560, 15  # 98 million parameters


def limit(cap: int, device: torch.device) -> None:
    """Make every allocation beyond ``cap`` bytes fail."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(device).total_memory, device)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))


def run(method: str, cap: int, steps: int, batch: int, device: torch.device) -> dict[str, float]:
    """Train; the losses and the bytes taken. Raises: RuntimeError or MemoryError when the cap is reached."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit(cap, device)
    with device:
        model = nn.Sequential(*(module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
        x = torch.randn(batch, WIDTH)
    if method == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = Mango(model.named_parameters(), lr=1e-3, plan=LayerPlan(rank=16), fuse_backward=True)
    for _ in range(steps):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else rss_peak()
    return {"parameters": sum(p.numel() for p in model.parameters()), "loss": float(loss.detach()), "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["adamw", "mango"])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="the cap, in units of 2^30 bytes (default 2)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    try:
        found = run(options.method, int(options.gigabytes * 2**30), options.steps, options.batch, torch.device(options.device))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print(f"{options.method}: out of memory under a cap of {options.gigabytes:g} GiB", file=sys.stderr)
        return 3
    print(json.dumps({"method": options.method, "cap": int(options.gigabytes * 2**30), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

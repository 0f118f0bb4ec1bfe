"""Scripts set torch's default device, often to a card, or build models on the meta device: what is on the CPU is still worked on there.

The meta device stands for any that is not the CPU. In processes of their own, as tables are made once for each.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from hashlib import sha256

import torch

from mango import Mango, codecs, compressors
from mango.draws import gaussian
from mango.mole import MoleConfig, convert

torch.set_default_device(sys.argv[1])
cpu = torch.device("cpu")
say = lambda name, *found: print(name, sha256(b"".join(x.detach().numpy().tobytes() for x in found)).hexdigest())

x = gaussian((64, 300), (0,))
for name in codecs.REGISTRY:
    codec = codecs.get(name)
    packs = [codec.encode(x, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    say(name, *map(codec.decode, packs))
for name in compressors.REGISTRY:
    compressor = compressors.REGISTRY.get(name)
    say(name, compressor.decompress(compressor.compress(x, generator=torch.Generator().manual_seed(0))))

shapes = (640, 640), (640, 640), (128, 64), (10,)
grads = [gaussian(shape, (1, index)) for index, shape in enumerate(shapes)]
options = [dict(plan=dict(rank=64)), dict(plan=dict(error="none")), dict(plan=dict(error="gradient"), matmul="int8")]
options += [dict(fuse_backward=True), dict(memory_budget="2 bytes/param")]
options += [dict(policy=name, policy_every=1) for name in ("heuristic", "rankschedule", "tinyformer", "lstm")]
for option in options:
    params = [torch.nn.Parameter(gaussian(shape, (2, index))) for index, shape in enumerate(shapes)]
    optimizer = Mango(params, **option)
    for _ in range(3):
        for param, grad in zip(params, grads):
            if "fuse_backward" in option:
                (param * grad).sum().backward()
            else:
                param.grad = grad.clone()
        optimizer.step()
    say(option, *params)

for store in ("int4", "int2", "nf4", "sketch"):
    for gradient in ("formed", "factored"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 96, device=cpu), torch.nn.GELU(), torch.nn.Linear(96, 64, device=cpu))
        for index, param in enumerate(model.parameters()):
            param.data = gaussian(param.shape, (3, index)) / 8
        torch.manual_seed(0)  # stores that round at random draw from the global generator
        convert(model, MoleConfig(store=store, gradient=gradient, targets="all", fill_grad=gradient == "factored"))
        inputs = gaussian((96, 64), (4,)).requires_grad_()
        model(inputs).square().sum().backward()
        say((store, gradient), inputs.grad, *(param.grad for param in model.parameters()))
"""


@pytest.mark.parametrize("native", ["1", "0"])
def test_what_is_on_the_cpu_is_worked_on_there_whatever_torch_s_default_is(native: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        command = [sys.executable, "-W", "error", "-c", SCRIPT, device]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MANGO_NATIVE": native}, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.splitlines())
    assert len(found[0]) == 7 + 8 + 9 + 8 and found[0] == found[1]

"""Scripts set torch's default device, often to a card, and its default type, often to bfloat16: neither is that of what a step works on.

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
torch.set_default_dtype(getattr(torch, sys.argv[2]))
usual = {"device": "cpu", "dtype": torch.float32}
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


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96, bias=False, **usual), torch.nn.Linear(96, 64, bias=False, **usual)

    def forward(self, x):
        return self.down(self.up(x).relu().square())


for store in ("int4", "int2", "nf4", "sketch"):
    for gradient in ("formed", "factored"):
        model = torch.nn.Sequential(MLP(), torch.nn.RMSNorm(64, elementwise_affine=False), torch.nn.Linear(64, 64, **usual))
        for index, param in enumerate(model.parameters()):
            param.data = gaussian(param.shape, (3, index)) / 8
        torch.manual_seed(0)  # stores that round at random draw from the global generator
        convert(model, MoleConfig(store=store, gradient=gradient, targets="all", fill_grad=gradient == "factored"))
        inputs = gaussian((96, 64), (4,)).requires_grad_()
        model(inputs).square().sum().backward()
        say((store, gradient), inputs.grad, *(param.grad for param in model.parameters()))
"""


@pytest.mark.parametrize(("native", "dtype"), [("1", "bfloat16"), ("0", "float64")])
def test_neither_torch_s_default_device_nor_its_default_type_changes_a_bit(native: str, dtype: str) -> None:
    found = []
    for defaults in (("cpu", "float32"), ("meta", dtype)):
        command = [sys.executable, "-W", "error", "-c", SCRIPT, *defaults]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MANGO_NATIVE": native}, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.splitlines())
    assert len(found[0]) == 7 + 8 + 9 + 8 and found[0] == found[1]

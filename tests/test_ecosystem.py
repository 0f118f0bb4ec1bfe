"""Mango inside other people's training code: transformers' Trainer, accelerate, Lightning; groups by module; safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango, MuonMango, param_groups
from mango.compat import torchvision
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.optim import build
from mango.optim.export import load_safetensors, save_safetensors


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> None:
    torchvision("transformers and lightning, which import it")


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
    )
    return transformers.LlamaForCausalLM(config)


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    """Counting sequences: easy to learn."""
    rows = [(torch.arange(16) + start) % 128 for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, model: Any, steps: int, recipe: tuple[Any, dict[str, Any]]) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=sentences(), optimizer_cls_and_kwargs=recipe)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["mango", "muon"])
def test_trainer_trains_a_llama_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def recipe(model: Any) -> tuple[Any, dict[str, Any]]:
        if kind == "muon":
            return MuonMango, {"lr": 1e-2, "muon_lr": 2e-2, "exclude": ["embed_tokens", "lm_head"]}
        return Mango, {"params": param_groups(model, ["self_attn", "mlp"], LayerPlan(rank=8), weight_decay=0.01), "lr": 1e-2}

    model = llama()
    whole = trainer(tmp_path / "whole", model, 10, recipe(model))
    whole.train()
    found = losses(whole)
    assert found[-1] < 0.8 * found[0]
    again = llama()
    resumed = trainer(tmp_path / "whole", again, 10, recipe(again))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))


def test_accelerate_prepares_it_and_accumulates() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 4))
    model, optimizer = accelerator.prepare(model, Mango(model.named_parameters(), lr=1e-2))
    x, y = gaussian((64, 64), (1,)), gaussian((64, 4), (2,))
    first = float((model(x) - y).square().mean().detach())
    for step in range(40):
        with accelerator.accumulate(model):
            rows = slice(32 * (step % 2), 32 * (step % 2) + 32)
            accelerator.backward((model(x[rows]) - y[rows]).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert float((model(x) - y).square().mean()) < 0.7 * first
    assert optimizer.optimizer.state[next(model.parameters())]["step"] == 20


def test_lightning_trains_with_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 80)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return Mango(self.named_parameters(), lr=1e-2)

    module, data = Module(), torch.utils.data.TensorDataset(gaussian((32, 64), (1,)), gaussian((32, 80), (2,)))
    first = float(module.training_step([*data.tensors], 0).detach())
    run = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
        gradient_clip_val=1.0,
    )
    run.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    assert float(module.training_step([*data.tensors], 0)) < 0.8 * first


def test_groups_by_module() -> None:
    model = llama()
    groups = param_groups(model, "mlp", LayerPlan(rank=4), exclude=["embed_tokens"], weight_decay=0.1, lr=0.5)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert len(names[0]) == 6 and all("mlp" in name for name in names[0])
    assert all("norm" in name for name in names[2]) and [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert sorted(name for group in names for name in group) == sorted(name for name, _ in model.named_parameters())
    optimizer = Mango(groups)
    assert [group["plan"] is not None for group in optimizer.param_groups] == [True, False, False]
    with pytest.raises(ConfigError, match="target_modules = 'gate' is not legal"):
        param_groups(nn.Linear(64, 64), ["gate"])
    with pytest.raises(ConfigError, match="target_modules = '\\(' is not legal"):
        param_groups(model, ["("])


def test_tied_weights_are_taken_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(128, 64), "head": nn.Linear(64, 128, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert [len(group["params"]) for group in param_groups(model)] == [1]


@pytest.mark.parametrize("name", ["mango", "adamw8bit", "muon"])
def test_safetensors_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    def setup() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        param = nn.Parameter(gaussian((64, 80), (0,)))
        return param, build(name, [("w", param)], lr=1e-2)

    (one, first), (two, second) = setup(), setup()
    for step in range(3):
        one.grad = gaussian((64, 80), (1, step))
        first.step()
    save_safetensors(first, tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    two.data.copy_(one.detach())
    load_safetensors(second, tmp_path / "state.safetensors")
    one.grad, two.grad = gaussian((64, 80), (2,)), gaussian((64, 80), (2,))
    first.step()
    second.step()
    assert torch.equal(one, two)
    (tmp_path / "other").write_bytes(b"not a file of this kind")
    with pytest.raises(ConfigError, match="a safetensors file"):
        load_safetensors(second, tmp_path / "other")

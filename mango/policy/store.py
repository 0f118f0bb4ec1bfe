"""Policy files: weights and running normalisation as safetensors, and what they were trained for in the header."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mango.compat import require
from mango.errors import ConfigError
from mango.policy.actions import Actions
from mango.policy.base import LAYER, WORLD
from mango.policy.tinyformer import LearnedPolicy, LSTMPolicy, TinyFormer

VERSION = 1  # of the observation, the actions and the networks: a file of another one is refused
KEY = "mango.policy"
KINDS: dict[str, type[TinyFormer] | type[LSTMPolicy]] = {"tinyformer": TinyFormer, "lstm": LSTMPolicy}
SHIPPED = Path(__file__).parent


def save(policy: LearnedPolicy, path: Path, recipe: dict[str, Any]) -> None:
    """Write a policy with the settings that it was trained with. Raises: MissingExtra without the package safetensors."""
    library = require("safetensors.torch", extra="experiments", purpose="saving a policy")
    said = {
        "version": VERSION,
        "kind": policy.kind,
        "layer": LAYER,
        "world": WORLD,
        "actions": asdict(policy.actions),
        "recipe": recipe,
    }
    library.save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, str(path), {KEY: json.dumps(said)})


def load(path: Path) -> LearnedPolicy:
    """Read a policy.

    Raises: ConfigError for a file that is absent, is no policy, or is one of another version or of other features; MissingExtra without
        the package safetensors.
    """
    said = header(path)
    if said.get("version") != VERSION:
        raise ConfigError.of(f"version of {path}", said.get("version"), f"{VERSION}: train it again with the workflow's rule policy_ppo")
    if (said["layer"], said["world"]) != (list(LAYER), list(WORLD)):
        raise ConfigError.of(f"features of {path}", said["layer"] + said["world"], "those of this version of mango")
    if said.get("kind") not in KINDS:
        raise ConfigError.of(f"kind of {path}", said.get("kind"), "one of " + ", ".join(KINDS))
    policy = KINDS[said["kind"]](actions=Actions(**{name: tuple(value) for name, value in said["actions"].items()}))
    try:
        policy.load_state_dict(require("safetensors.torch", extra="experiments", purpose="loading a policy").load_file(str(path)))
    except RuntimeError as error:
        raise ConfigError.of(f"weights of {path}", said["kind"], " ".join(str(error).split())) from None
    return policy.eval()


def header(path: Path) -> dict[str, Any]:
    """What a policy file says of itself: version, kind, features, actions and recipe; empty for a file that is no policy.

    Raises: ConfigError for a file that is absent or damaged; MissingExtra without the package safetensors.
    """
    library = require("safetensors", extra="experiments", purpose="loading a policy")
    if not path.is_file():
        raise ConfigError.of("policy file", str(path), "an existing file that mango.policy.store.save wrote")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {}).get(KEY, "{}"))
    except library.SafetensorError as error:
        raise ConfigError.of("policy file", str(path), f"a safetensors file ({error})") from None


def tinyformer() -> LearnedPolicy:
    """The trained policy that ships with mango."""
    return load(SHIPPED / "tinyformer.safetensors")


def lstm() -> LearnedPolicy:
    """Its ablation, trained alike."""
    return load(SHIPPED / "lstm.safetensors")

"""A trained LLaMA as a checkpoint of transformers, with its tokenizer: what fine-tuning starts from, and what any other program reads.

python workflow/scripts/pretrained.py results/laptop/llama-pretrain/adamw/0      writes its pretrained/
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from mango.errors import ConfigError, MangoError
from mango.models.llama import Llama
from mango.training import checkpoint, record
from mango.training.task import Llama as Settings


def export(run: Path) -> Path:
    """Write ``run/pretrained``. Raises: ConfigError when the run trained something else."""
    config = record.load(run / "run.json").config
    if not isinstance(config.model, Settings) or config.lora is not None:
        raise ConfigError.of("model.name", config.model.name, f"llama, without lora, in {run}: that alone is a checkpoint of its own")
    weights = checkpoint.load(run / "model.pt")["model"]
    options = config.model.model_dump(exclude={"name"})
    model = Llama(weights["network.model.embed_tokens.weight"].shape[0], **options)
    model.load_state_dict(weights)
    out = run / "pretrained"
    model.network.save_pretrained(out)
    if (run / "tokenizer.json").is_file():
        shutil.copyfile(run / "tokenizer.json", out / "tokenizer.json")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    try:
        export(parser.parse_args().run)
    except (MangoError, OSError) as error:
        print(f"pretrained: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

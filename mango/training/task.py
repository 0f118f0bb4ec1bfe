"""What is trained on what, and for how long: the part of the configuration that the methods of an experiment share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Base of every part: no unknown keys, no silent conversion, no change after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Strict):
    """Which data, and how much of it: see ``mango.data.load``. Counts are images, reviews, or bytes of text."""

    source: Literal["auto", "local", "download", "embedded"] = "auto"
    train: Positive | None = Field(None, description="for training; null = all")
    test: Positive | None = Field(None, description="of the test split; null = all")
    validation: Count = Field(0, description="held out of the training set, for tuning")
    evaluate: Literal["test", "validation"] = Field("test", description="the split that is evaluated; tuning uses validation")

    def arguments(self) -> dict[str, Any]:
        """Those of ``mango.data.load``."""
        return self.model_dump(exclude={"evaluate"})


class Images(Data):
    """Images in classes; subsets are class-balanced."""

    name: Literal["cifar10", "digits"]
    augment: bool = Field(True, description="random crops, and mirror images where a class keeps its meaning")


class ImageFolder(Data):
    """Images in class folders or tar shards: see ``mango.data.imagefolder``."""

    name: Literal["imagefolder"]
    root: str | None = Field(
        None, description="folder with train and val or test; null = imagefolder or Tiny-ImageNet-100 in the data folder, else photographs"
    )
    size: Positive = Field(64, description="height and width in pixels")
    classes: Positive | None = Field(None, description="the first of them by name; null = all")
    decode: Literal["once", "streamed"] = Field(
        "once", description="once: into memory; streamed: whenever an image is used, for large sets"
    )
    workers: Count = Field(0, description="processes that decode ahead when streamed")
    corrupt: Literal["error", "skip"] = Field("error", description="what becomes of a damaged image or shard: skipped ones are counted")
    empty: Literal["warn", "error"] = Field("warn", description="what is said of a class without training images; it stays an output")
    augment: bool = Field(True, description="random crops and mirror images")
    randaugment: Annotated[int, Field(ge=0, le=30)] = Field(0, description="magnitude; 0 = none")
    mixup: Annotated[float, Field(ge=0)] = Field(0.0, description="parameter of the Beta distribution; 0 = none")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="probability that labels give to all classes alike")


class Text(Data):
    """Text as bytes or tokens."""

    name: Literal["text", "fineweb-edu", "c4", "movie-reviews"]
    sequence: Positive = Field(128, description="bytes or tokens in a window")
    vocabulary: Positive | None = Field(
        None,
        description="tokens of a byte-pair encoding, trained on the training split; null = bytes. A checkpoint's own goes before it",
    )


class Sentiment(Data):
    """Reviews and their verdicts: see ``mango.data.sentiment``. Bytes, or the tokens of a checkpoint that brings its tokenizer."""

    name: Literal["movie-sentiment"]
    sequence: Positive = Field(192, description="bytes or tokens in a window, those of the prompt among them")


class ResNet(Strict):
    """A small residual network: see ``mango.models.resnet``."""

    name: Literal["resnet"]
    width: Positive = 32
    blocks: Annotated[list[Positive], Field(min_length=1)] = [1, 1, 1]
    stem: Literal["conv", "patch2", "patch4"] = "conv"


class ResNet18(Strict):
    """ResNet-18 with the stem for 32x32 images."""

    name: Literal["resnet18"]


class ResNet50(Strict):
    """torchvision's ResNet-50."""

    name: Literal["resnet50"]


class ViT(Strict):
    """torchvision's vision transformer; ViT-B/16 unless fields say otherwise. Images are ``data.size`` pixels on a side."""

    name: Literal["vit"]
    size: Positive = Field(224, description="height and width of the images in pixels")
    patch: Positive = 16
    depth: Positive = 12
    heads: Positive = 12
    width: Positive = 768
    ffn: Positive = Field(4, description="hidden channels of the feed-forward part, as a multiple of the width")


class GPT(Strict):
    """A GPT of nanochat's shape: see ``mango.models.gpt``. The vocabulary is the data's."""

    name: Literal["gpt"]
    depth: Positive = Field(3, description="blocks; the sizes that are null follow from it")
    width: Positive | None = Field(None, description="null = 64 for each block")
    heads: Positive | None = Field(None, description="null = heads of 128 channels, where these divide the width")
    kv_heads: Positive | None = Field(None, description="heads of keys and values; null = as many as heads")
    ffn: Positive = Field(4, description="hidden channels of the feed-forward part, as a multiple of the width")


class Llama(Strict):
    """LLaMA by transformers: see ``mango.models.llama``. The vocabulary is the data's, or the checkpoint's."""

    name: Literal["llama"]
    size: Literal["micro", "9m", "60m", "130m", "350m", "1b", "7b"] = "micro"
    path: str | None = Field(
        None,
        description="folder of a checkpoint of transformers, whose weights, sizes and tokenizer are taken; null = random weights",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights")


AnyData = Annotated[Images | ImageFolder | Text | Sentiment, Field(discriminator="name")]
Model = Annotated[ResNet | ResNet18 | ResNet50 | ViT | GPT | Llama, Field(discriminator="name")]
VISION = (ResNet, ResNet18, ResNet50, ViT)
# The models that each kind of data is for.
READS: dict[type[Data], tuple[type[Strict], ...]] = {Images: VISION, ImageFolder: VISION, Text: (GPT, Llama), Sentiment: (GPT, Llama)}


class Train(Strict):
    """How long, how fast and on what."""

    steps: Positive
    batch: Positive
    eval_every: Positive = Field(100, description="steps between evaluations; the last step is always evaluated")
    eval_batch: Positive = 500
    log_every: Positive = Field(10, description="steps whose training losses are averaged into one line of metrics.jsonl")
    checkpoint_every: Positive = Field(100, description="steps between checkpoints")
    checkpoint_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="a checkpoint is also written when the last one is this old"
    )
    schedule: Literal["cosine", "linear", "constant", "warmdown"] = "cosine"
    warmup: Count = Field(0, description="steps of linear warm-up")
    warmdown: Annotated[float, Field(gt=0, le=1)] = Field(
        0.4, description="share of the steps in which schedule warmdown goes down to the floor"
    )
    floor: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="the schedule ends at this share of the learning rate")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of the running mean of the weights, which is what is evaluated and kept; null = none"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="largest global gradient norm; null = no clipping")
    autocast: Literal["bf16"] | None = None
    channels_last: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sample: Count = Field(0, description="bytes or tokens that a trained language model writes into its record")
    threads: Positive = Field(1, description="CPU threads; part of the configuration because sums depend on it")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Train:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} is not legal: fewer than the {self.steps} steps")
        return self


class Task(Strict):
    """What is trained on what, and which of its matrices are under test."""

    data: AnyData
    model: Model
    train: Train
    exclude: list[str] = Field(
        [], description="regular expressions: parameters whose names match are not under test (embeddings, heads); see mango.optim.split"
    )
    under_test: list[str] = Field(
        [],
        description="regular expressions: of the matrices that are left, those under test; the others train alike in all variants, as "
        "the optimizer does it. Empty = all",
    )

    def data_arguments(self) -> dict[str, Any]:
        """Those of ``mango.data.load``. Text for a checkpoint that brings its tokenizer is read by that, whatever the vocabulary."""
        from mango.models.llama import tokenizer_of

        path = self.model.path if isinstance(self.model, Llama) else None
        own = None if path is None else tokenizer_of(path)
        return self.data.arguments() | ({} if own is None else {"tokenizer": own})

    @model_validator(mode="after")
    def _model_reads_data(self) -> Self:
        models = READS[type(self.data)]
        if not isinstance(self.model, models):
            legal = ", ".join(get_args(model.model_fields["name"].annotation)[0] for model in models)
            raise ValueError(f"model.name = {self.model.name!r} is not legal: one of {legal}, for data.name = {self.data.name}")
        pixels = self.data.size if isinstance(self.data, ImageFolder) else 32
        if isinstance(self.model, ViT) and self.model.size != pixels:
            raise ValueError(f"model.size = {self.model.size} is not legal: {pixels}, as the images are")
        return self

"""Sentences about one experiment. Numbers appear as ``\val{key}``; which words surround them follows from their values."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from typing import Any

from paper_numbers import Numbers


@dataclass(frozen=True)
class Experiment:
    """What the numbers of an experiment do not say.

    Attributes:
        notebook: the one that draws it.
        subject: in a few words.
        recovered: the aim set before any run: at least this share of the gap.
        state: in at most so many bytes of state per parameter; None where the aim does not say.
        cost: the column of its table that says what a method keeps, and its head.
    """

    notebook: str
    subject: str
    recovered: float
    state: float | None
    cost: tuple[str, str] = ("state", "state (B/param.)")


ABLATIONS = ("ablation-cifar10", "ablation-language")  # one field of the plan changed at a time, in the tiers that have them
EXPERIMENTS = {
    "cifar10": Experiment("01_cifar10", "images", 0.90, 1.1),
    "language": Experiment("03_optimizer", "language", 1.00, None),
    "nanochat": Experiment("04_molegrad", "nanochat", 0.97, None, ("kept", r"kept (\%)")),
    "imagenet-cnn": Experiment("06_vision", "photographs, residual network", 0.95, None),
    "imagenet-vit": Experiment("06_vision", "photographs, vision transformer", 0.95, None),
}

LLAMA = {  # by sentences and tables of their own, in paper_llama
    "llama-pretrain": "LLaMA, pre-training",
    "llama-finetune": "LLaMA, fine-tuning",
}


def subjects(numbers: Numbers) -> dict[str, str]:
    """Every experiment of the tier in a few words, by name."""
    llama = {name: subject for name, subject in LLAMA.items() if f"{name}.live.variants" in numbers}
    return {name: experiment.subject for name, experiment in present(numbers).items()} | llama


def present(numbers: Numbers) -> dict[str, Experiment]:
    """The experiments that the tier has, by name."""
    return {name: experiment for name, experiment in EXPERIMENTS.items() if f"{name}.variants" in numbers}


@dataclass(frozen=True)
class Sentences:
    """Of one experiment, by its name."""

    numbers: Numbers
    name: str

    def val(self, *parts: str) -> str:
        r"""``\val{experiment.part.part}``."""
        return rf"\val{{{'.'.join((self.name, *parts))}}}"

    def get(self, *parts: str) -> Any:
        return self.numbers[".".join((self.name, *parts))]

    def all(self) -> dict[str, str]:
        """Every sentence by its key."""
        found = {
            "setup": self.setup(),
            "data": self.data(),
            "gap": self.gap(),
            "headline": self.headline(),
            "peers": self.peers(),
            "ablations": self.ablations(),
            "contraction": self.contraction(),
            "caption": self.caption(),
            "live.caption": Sentences(self.numbers, f"{self.name}.live").caption(),
        }
        return {f"abstract.{self.name}": self.abstract()} | {f"{self.name}.{key}": text for key, text in found.items()}

    def caption(self) -> str:
        data, records, machine = (self.val(key) for key in ("data", "tier_label", "machine"))
        return f"Data: {data}. Records: {records}. Machine: {machine}."

    def setup(self) -> str:
        val = self.val
        least = "one" if self.get("seeds") == 1 else val("seeds")
        most = "" if self.get("seeds_most") == self.get("seeds") else f" to {val('seeds_most')}"
        noun = "seed" if self.get("seeds_most") == 1 else "seeds"
        runs = f"{val('runs')} runs in all, with {least}{most} {noun} for each variant (records: {val('tier_label')})."
        if self.name == "language":
            return (
                rf"A GPT of nanochat's shape~\citep{{karpathy2025nanochat}} with depth {val('depth')}, width {val('width')} and a "
                f"feed-forward part of {val('ffn')} times the width, {val('parameters')} parameters in all, predicts the next byte. It is "
                f"trained for {val('steps')} steps of {val('batch')} windows of {val('sequence')} bytes, drawn from {val('train')} bytes, "
                f"and tested on {val('test')}; {runs} Under test are all matrices of the blocks, {val('under_test')} of the parameters. "
                "Embedding and head are left to AdamW at one rate, tuned on the frozen control, in all methods but Adafactor and the "
                "control itself; their state is counted."
            )
        return (
            rf"A residual network~\citep{{he2016resnet}} of {val('parameters')} parameters is trained for {val('steps')} steps of "
            f"{val('batch')} images on {val('train')} images and tested on {val('test')}; {runs}"
        )

    def data(self) -> str:
        title = self.get("data")
        if self.get("metric") == "bits_per_byte":
            if "stand-in" in title:
                return f"The text is {self.val('data')}: it stands in for a corpus, and nothing below is a statement about one."
            return rf"The text is {self.val('data')}; the test split is of~\citet{{merity2017wikitext}}."
        if not title.upper().startswith("CIFAR-10"):
            return (
                rf"The images are {self.val('data')}. They stand in for CIFAR-10~\citep{{krizhevsky2009cifar}}, which was not at hand: "
                "nothing below is a statement about CIFAR-10."
            )
        text = rf"The images are those of~\citet{{krizhevsky2009cifar}}, read as {self.val('data')}."
        return text + (" This copy is lossy, so accuracies do not compare with those on the raw images." if "JPEG" in title.upper() else "")

    def abstract(self) -> str:
        """The headline in one sentence."""
        name, where = self.get("headline"), f"On {self.val('data')} (records: {self.val('tier_label')})"
        if name is None or self.get(name, "recovered") is None:
            return f"{where} the runs behind this copy are too few or too short to compare optimizers: they are shown and support no claim."
        return (
            f"{where}, {self.val(name, 'label')} recovers {self.val(name, 'recovered')} of the loss gap between frozen and dense training "
            f"with {self.val(name, 'state')}~bytes of optimizer state per parameter, everything kept between steps counted; "
            f"dense training keeps {self.val(self.get('dense'), 'state')}."
        )

    def gap(self) -> str:
        if self.get("gap") is None:
            return "A control is missing from the records, so no verdict is possible."
        dense, frozen = (self.val(self.get(control), "loss") for control in ("dense", "frozen"))
        text = f"Frozen training ends at a test loss of {frozen}, dense training at {dense}: a gap of {self.val('gap')}."
        if self.get("gap_ratio") is not None:
            text += f" That is {self.val('gap_ratio')} times the standard deviation of dense training over seeds."
        if self.get("gap_passes"):
            return text + " The task passes the test, and its recovered gaps are evidence."
        return text + f" The task does not pass the test ({self.val('gap_reason')}): what follows is shown and supports no claim."

    def headline(self) -> str:
        name = self.get("headline")
        if name is None:
            return "No complete variant of Mango was run in this tier."
        dense = self.val(self.get("dense"), "state")
        state = f"{self.val(name, 'state')}~bytes of optimizer state per parameter, where the dense control keeps {dense}"
        if self.get(name, "recovered") is None:
            end = f"{self.val(name, 'label')} ends at a test loss of {self.val(name, 'loss')} with {state}."
            return end + " As the task does not decide, we draw no conclusion from it."
        aim = EXPERIMENTS[self.name]
        met = self.get(name, "recovered") >= aim.recovered and (aim.state is None or self.get(name, "state") <= aim.state)
        size = "" if aim.state is None else rf" in at most \num{{{aim.state}}} bytes per parameter"
        verdict = (
            f"This {'meets' if met else 'falls short of'} the aim set beforehand, at least \\num{{{aim.recovered:.2f}}} of the gap{size}."
        )
        return f"{self.val(name, 'label')} recovers {self.val(name, 'recovered')} of the gap with {state}. {verdict}"

    def peers(self) -> str:
        """Whether another method recovers more than the headline variant, and whether one does so with no more state."""
        name = self.get("headline")
        if name is None or not self.get("gap_passes"):
            return ""
        others = [other for other in self.get("variants") if self.get(other, "group") == "peer"]
        if not others:
            return ""
        better = [other for other in others if self.get(other, "recovered") > self.get(name, "recovered")]
        dominating = [other for other in better if self.get(other, "state") <= self.get(name, "state")]
        found = self.labels(better) or "none"
        text = f"Of the {count(len(others), 'other method')} {found} recover{'s' if len(better) < 2 else ''} more."
        if dominating:
            return f"{text} {self.labels(dominating)} with no more state, so this variant is not on the Pareto front."
        return text + (
            " None of these does so with as little state: the variant is on the Pareto front of the methods compared." if better else ""
        )

    def ablations(self) -> str:
        name = self.get("headline")
        changed = [variant for variant in self.get("variants") if self.get(variant, "ablates")]
        if not changed:
            return "No variant that differs from it in one setting was run in this tier."
        if not self.get("gap_passes"):
            return "As the task does not decide, the variants that differ in one setting are listed without a verdict."
        parts = [
            f"{self.val(variant, 'ablates')} the recovered gap is {self.val(variant, 'recovered')} at {self.val(variant, 'state')} bytes "
            f"per parameter ({self.difference(variant, name)})"
            for variant in changed
        ]
        return f"Changing one setting of {self.val(name, 'label')}, which recovers {self.val(name, 'recovered')}: {'; '.join(parts)}."

    def cells(self) -> str:
        """What an ablation was run on, and which of its cells ended lowest; it has one seed a cell and supports no verdict."""
        name = self.get("headline")
        cells = [variant for variant in self.get("variants") if self.get(variant, "group") == "mango"]
        best, worst = (choose(cells, key=lambda variant: self.get(variant, "loss")) for choose in (min, max))
        return (
            f"On {self.val('data')}, {self.val('parameters')} parameters are trained for {self.val('steps')} steps of {self.val('batch')} "
            f"({self.val('runs')} runs; records: {self.val('tier_label')}). {self.val(name, 'label')} with its defaults ends at a test "
            f"loss of {self.val(name, 'loss')}; the lowest of {count(len(cells), 'cell')} is that of {self.val(best, 'label')}, "
            f"{self.val(best, 'loss')}, the highest that of {self.val(worst, 'label')}, {self.val(worst, 'loss')}."
        )

    def difference(self, variant: str, reference: str) -> str:
        spread = [self.get(name, "recovered_std") for name in (variant, reference)]
        if None in spread:
            return "from one seed, no verdict"
        difference = self.get(variant, "recovered") - self.get(reference, "recovered")
        if abs(difference) <= 2 * hypot(*spread):
            return "within two standard deviations of the difference"
        return f"{'more' if difference > 0 else 'less'} by over two standard deviations of the difference"

    def contraction(self) -> str:
        if not self.get("contraction", "count"):
            return "No run of this tier recorded its contraction."
        layers = self.val("contraction", "layers")
        text = (
            f"Mango's runs record {self.val('contraction', 'count')} pairs of the share of the squared norm that compression must keep and "
            rf"the share that it kept, over layers, steps and seeds (\cref{{fig:{self.name}.contraction}}). The median share kept is "
            f"{self.val('contraction', 'kept')}, and the median of kept over certified is {self.val('contraction', 'median')}. "
        )
        if self.get("contraction", "layers_below"):
            below = self.val("contraction", "layers_below")
            return text + rf"\textbf{{Averaged over steps and seeds, {below} of {layers} layers lie below their certificate.}}"
        text += f"Averaged over steps and seeds, none of the {layers} layers (counted for each variant) lies below its certificate"
        if not self.get("contraction", "below"):
            return text + "; nor does any single value."
        below = self.val("contraction", "below")
        return text + f"; of the single values {below} do, as they may, since the certificate bounds an expectation over the scouts."

    def scale(self) -> str:
        unit = "bytes of text" if self.get("metric") == "bits_per_byte" else "images"
        length = f"{self.val('parameters')} parameters for {self.val('steps')} steps"
        return f"The runs on {self.val('data')} train {length} on {self.val('train')} {unit}."

    def labels(self, variants: list[str]) -> str:
        labels = [self.val(variant, "label") for variant in variants]
        return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


class Photographs(Sentences):
    """Of a model trained on folders of images."""

    def all(self) -> dict[str, str]:
        texts = (self.caption, self.setup, self.gap, self.headline, self.peers)
        return {f"{self.name}.{text.__name__}": text() if f"{self.name}.variants" in self.numbers else "" for text in texts}

    def setup(self) -> str:
        val = self.val
        model = {
            "imagenet-cnn": r"A residual network~\citep{he2016resnet}",
            "imagenet-vit": r"A vision transformer~\citep{dosovitskiy2021vit}",
        }
        stand_in = "; they stand in for ImageNet, and nothing here is a statement about it" if "stand-in" in self.get("data") else ""
        return (
            f"{model[self.name]} of {val('parameters')} parameters, {val('under_test')} of them under test, is trained for {val('steps')} "
            f"steps of {val('batch')} images on {val('train')} images and tested on {val('test')} ({val('runs')} runs). The images are "
            f"{val('data')}{stand_in}."
        )


def count(number: int, noun: str) -> str:
    return rf"\num{{{number}}} {noun}{'' if number == 1 else 's'}"

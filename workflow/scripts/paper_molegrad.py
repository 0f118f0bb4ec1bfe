r"""Sentences about MoleGrad's experiment and about memory against context length. Numbers appear as ``\val{key}``."""

from __future__ import annotations

from paper_experiments import Sentences, count

AIMS = {"int4": 0.97, "int2": 0.95}  # set before any run: the least share of the gap, with the gradient formed from these codes
FACTORED = 0.92  # the same for a gradient of a quarter of the rank, by whichever idea works
BITS = 0.01  # bits per byte of the default, relative to dense training


class Mole(Sentences):
    """Of the experiment in which layers are converted."""

    def all(self) -> dict[str, str]:
        found = {
            "setup": self.setup(),
            "data": self.data(),
            "gap": self.gap(),
            "headline": self.headline(),
            "stores": self.stores(),
            "factored": self.factored(),
            "energy": self.captured(),
            "contexts": self.contexts(),
            "longest": self.longest(),
            "overhead": self.overhead(),
            "sample": self.sample(),
            "caption": self.caption(),
            "contexts.caption": rf"Records: {self.val('contexts', 'tier_label')}. Machine: {self.val('contexts', 'machine')}.",
            "energy.caption": rf"Records: {self.val('energy', 'tier_label')}.",
            "live.caption": Sentences(self.numbers, f"{self.name}.live").caption(),
        }
        return {f"abstract.{self.name}": self.abstract()} | {f"{self.name}.{key}": text for key, text in found.items()}

    def setup(self) -> str:
        val, unit = self.val, "token" if self.get("throughput_unit") == "tokens/s" else "byte"
        most = "" if self.get("seeds_most") == self.get("seeds") else f" to {val('seeds_most')}"
        noun = "seed" if self.get("seeds_most") == 1 else "seeds"
        return (
            rf"A GPT of nanochat's shape~\citep{{karpathy2025nanochat}} with depth {val('depth')}, width {val('width')} and a feed-forward "
            f"part of {val('ffn')} times the width, {val('parameters')} parameters in all, predicts the next {unit}. It is trained for "
            f"{val('steps')} steps of {val('batch')} windows of {val('sequence')} {unit}s; {val('runs')} runs in all, with "
            f"{val('seeds')}{most} {noun} for each variant (records: {val('tier_label')}). Under test, and converted, are all matrices of "
            f"the blocks, {val('under_test')} of the parameters; embedding and head are AdamW's in all variants."
        )

    def abstract(self) -> str:
        name = self.get("headline")
        if name is None or self.get(name, "recovered") is None:
            return "The runs behind this copy are too few or too short to judge MoleGrad: they are shown and support no claim."
        return (
            f"MoleGrad's default recovers {self.val(name, 'recovered')} of that gap for a small language model (records: "
            f"{self.val('tier_label')}) while it keeps {self.val(name, 'kept')} of the bytes that autograd keeps for the backward pass."
        )

    def headline(self) -> str:
        name = self.get("headline")
        if name is None:
            return "The default of MoleGrad was not run in this tier."
        label, kept = self.val(name, "label"), self.val(name, "kept")
        start = f"The default, {label}, keeps {kept} of what dense training keeps for the backward pass, head and attention included."
        bits = f"Its bits per byte are {self.val(name, 'bpb_ratio')} off those of dense training"
        within = abs(self.get(name, "bpb_ratio")) <= BITS
        bits += rf", {'within' if within else 'outside'} the \num{{{100 * BITS:.0f}}}\,\% aimed at."
        if self.get(name, "recovered") is None:
            return f"{start} {bits} As the task does not decide, we draw no conclusion from it."
        return f"{start} It recovers {self.val(name, 'recovered')} of the gap. {bits}"

    def stores(self) -> str:
        """Each store whose gradient is formed, beside the unconverted runs of its optimizer."""
        names = [name for name in self.get("variants") if self.get(name, "gradient") == "formed" and self.get(name, "store") != "sketch"]
        if not names or not self.get("gap_passes"):
            return "As the task does not decide, the stores are listed without a verdict." if names else "No store was run in this tier."
        parts = []
        for name in names:
            own, aim = self.get(name, "own"), AIMS.get(self.get(name, "store"))
            if own is None:
                parts.append(f"{self.val(name, 'label')} recovers {self.val(name, 'recovered')}, without runs of its optimizer to compare")
                continue
            text = f"{self.val(name, 'label')} recovers {self.val(name, 'own')} with {self.val(name, 'kept')} kept"
            if aim is not None:
                met = own >= aim
                text += rf" (\num{{{aim}}} was aimed at: {'met' if met else 'missed'})"
            parts.append(text)
        return (
            "With the gradient formed from codes, one layer at a time, and the gap to the same optimizer's own unconverted runs: "
            f"{'; '.join(parts)}."
        )

    def factored(self) -> str:
        names = [name for name in self.get("variants") if self.get(name, "gradient") == "factored" and self.get(name, "store") != "sketch"]
        sketches = [name for name in self.get("variants") if self.get(name, "store") == "sketch"]
        if not self.get("gap_passes"):
            return "As the task does not decide, factored gradients and sketches are listed without a verdict."
        said = {name: f"{self.val(name, 'label')} recovers {self.val(name, 'recovered')}" for name in (*names, *sketches)}
        text = ""
        if names:
            best = max(names, key=lambda name: self.get(name, "recovered"))
            met = self.get(best, "recovered") >= FACTORED
            text = (
                "With the gradient taken as its leading directions, multiplied out where AdamW steps: "
                f"{'; '.join(said[name] for name in names)}. "
                rf"The best of them {'meets' if met else 'falls short of'} the \num{{{FACTORED}}} aimed at."
            )
        if sketches:
            text += " Storing the product of the input with a basis and nothing else, as the first public attempt did: "
            text += "; ".join(said[name] for name in sketches) + "."
        return text.strip() or "No factored gradient was run in this tier."

    def captured(self) -> str:
        if not self.get("energy", "count"):
            return "No run of this tier told how much energy its factors capture."
        return (
            f"Over layers, steps and seeds the factors hold a median share of {self.val('energy', 'median')} of the gradient's energy, "
            f"and at least {self.val('energy', 'lowest')} (\\cref{{fig:nanochat.energy}})."
        )

    # ------------------------------------------------------------ context length

    def methods(self) -> list[str]:
        return [name for name in self.get("contexts", "methods") if name != "dense"]

    def contexts(self) -> str:
        val = self.val
        dense = val("contexts", "dense", "mib")
        parts = [f"{val('contexts', name, 'label')} {val('contexts', name, 'kept')}" for name in self.methods()]
        how = (
            "Peaks are those that the device reserved."
            if self.get("contexts", "measured")
            else "This is computed, in that peaks are the ledger's categories added up in single precision, and no card was measured."
        )
        return (
            f"At depth {val('contexts', 'depth')} and {val('contexts', 'tokens')} tokens, autograd keeps {dense}~MiB for the backward "
            f"pass of plain training. Of that, these remain: {', '.join(parts)} (\\cref{{fig:nanochat.contexts}}). {self.recomputed()}{how}"
        )

    def recomputed(self) -> str:
        """Whether recomputing blocks keeps less than every code: it is not for the codes to hide."""
        shares = {name: self.get("contexts", name, "kept") for name in self.methods()}
        whole = shares.pop("recompute", None)
        if whole is None or not shares:
            return ""
        least = min(shares, key=lambda name: shares[name])
        verdict = "less than any of the codes" if whole < shares[least] else f"more than {self.val('contexts', least, 'label')}"
        return f"Recomputing whole blocks keeps {verdict}; it takes each block's forward pass a second time. "

    def longest(self) -> str:
        val = self.val
        if self.get("contexts", "cap") is None:
            return "The longest context was not looked for."
        found = [name for name in self.methods() if self.get("contexts", name, "gain") is not None]
        parts = [
            f"{val('contexts', name, 'label')} {val('contexts', name, 'longest')} ({val('contexts', name, 'gain')} times)" for name in found
        ]
        start = (
            f"Under a cap of {val('contexts', 'cap')} the longest context of plain training is {val('contexts', 'dense', 'longest')} tokens"
        )
        return f"{start}; of the others: {', '.join(parts)}." if parts else f"{start}."

    def overhead(self) -> str:
        timed = [name for name in self.methods() if self.get("contexts", name, "time") is not None]
        if not timed:
            return "Steps were not timed."
        parts = [f"{self.val('contexts', name, 'label')} {self.val('contexts', name, 'time')}" for name in timed]
        return f"One step at that length takes, relative to plain training in the same process: {', '.join(parts)}."

    def sample(self) -> str:
        if self.get("sample") is None:
            return ""
        size = count(self.get("parameters"), "parameter")
        return f"A text by the default's model of {size}, which can be no more than its size allows: \\emph{{{self.val('sample')}}}"

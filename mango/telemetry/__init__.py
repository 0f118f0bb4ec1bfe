"""What a run costs and how it goes: memory to the byte, energy with its source, metrics as JSON lines."""

from mango.telemetry.memory import MemoryLedger
from mango.telemetry.power import PowerSampler
from mango.telemetry.runlog import RunLog

__all__ = ["MemoryLedger", "PowerSampler", "RunLog"]

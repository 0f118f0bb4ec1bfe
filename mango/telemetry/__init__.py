"""What a run costs and how it goes: memory to the byte, energy with its source, time by phase, metrics as JSON lines."""

from mango.telemetry.clock import Clock
from mango.telemetry.memory import MemoryLedger
from mango.telemetry.power import PowerSampler
from mango.telemetry.runlog import RunLog

__all__ = ["Clock", "MemoryLedger", "PowerSampler", "RunLog"]

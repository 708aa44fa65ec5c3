"""Measuring versions: opened as replicas open them, asked rows of datasets, timed in turns."""

from penstock_worker.adapters.measuring.loading import OpenedVersion, open_version
from penstock_worker.adapters.measuring.quality import Quality, measure_quality
from penstock_worker.adapters.measuring.questions import Questions, questions_of
from penstock_worker.adapters.measuring.rows import drawn_inputs, inputs_of
from penstock_worker.adapters.measuring.speed import Comparison, Measurement, Speed, measure_speed

__all__ = [
    "Comparison",
    "Measurement",
    "OpenedVersion",
    "Quality",
    "Questions",
    "Speed",
    "drawn_inputs",
    "inputs_of",
    "measure_quality",
    "measure_speed",
    "open_version",
    "questions_of",
]

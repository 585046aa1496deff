"""What a run leaves behind while it runs: metrics, samples, phase times, a progress bar. Used on rank 0."""

from rlhf_fast.tracking.diversity import distinct_n
from rlhf_fast.tracking.memory import peak_memory_gb
from rlhf_fast.tracking.metrics import MetricsLogger
from rlhf_fast.tracking.progress import Progress
from rlhf_fast.tracking.samples import SampleLog
from rlhf_fast.tracking.timer import PhaseTimer

__all__ = ["MetricsLogger", "PhaseTimer", "Progress", "SampleLog", "distinct_n", "peak_memory_gb"]

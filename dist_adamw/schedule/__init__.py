"""Map the number of trained samples to learning rate and weight decay."""

from dist_adamw.schedule.cycles import (
    Cycle,
    _Run,  # noqa: F401  pickles of 0.1.0 name it here
)
from dist_adamw.schedule.restarts import (
    ExpReduceMaxLROnIteration,
    ReduceMaxLROnRestart,
    RestartSchedule,
    SchedulePoint,
)

__all__ = ["Cycle", "ExpReduceMaxLROnIteration", "ReduceMaxLROnRestart", "RestartSchedule", "SchedulePoint"]

"""Add the values of each update to what Trainer logs."""

from __future__ import annotations

from typing import Any

from dist_adamw.integrations.transformers.arguments import inner_scheduler, replace_method
from dist_adamw.tracking.tracking import Tracking

# Trainer logs them itself: the lr as "learning_rate". Its epoch and norm are kept.
_OF_TRAINER = ("lr", "epoch", "grad_norm")


def add_values(trainer: Any) -> None:
    """Make ``Trainer.log`` add the values of `Tracking` to the dict with the training loss. Local.

    The callbacks, and what ``report_to`` names, then log them together with the loss, on every engine.
    """
    from transformers import TrainerCallback

    tracking: Tracking | None = None
    log = trainer.log  # a subclass's override gets the values too

    class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nonlocal tracking  # a second train() has a new scheduler
            tracking = Tracking(trainer.optimizer, inner_scheduler(trainer), trainer.accelerator)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if tracking is not None:
                tracking._end_update()

    def log_with_values(logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Trainer also logs evaluations and the end of the training, without this name.
        if tracking is not None and "learning_rate" in logs:
            values = tracking.values()
            logs.update((name, value) for name, value in values.items() if name not in {*_OF_TRAINER, *logs})
        return log(logs, *args, **kwargs)

    trainer.add_callback(Watch())
    replace_method(trainer, "log", log_with_values)

"""Plan a job before it starts: updates, restarts, memory of each rank and bytes sent, on every engine.

`plan` computes them on meta tensors, without a process group or a GPU; `plan_command` takes texts. See docs/plan.md.
"""

from __future__ import annotations

from dist_adamw.planning.command import plan_command
from dist_adamw.planning.memory import Setup
from dist_adamw.planning.plan import Plan, plan

__all__ = ["Plan", "Setup", "plan", "plan_command"]

"""Moved to `dist_adamw.schedule.batch`; this path of 0.1.0 redirects for a while."""

from dist_adamw._moved import forward

__getattr__ = forward(__name__, "dist_adamw.schedule.batch")

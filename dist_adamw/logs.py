"""Messages that the user asked for, through ``logging``.

Loggers have the names of modules, below "dist_adamw". Warnings go through ``warnings`` instead.
"""

from __future__ import annotations

import logging


def report(name: str, text: str) -> None:
    """Log a message at INFO that the user asked for (``verbose=True``), so that it is seen. Local.

    The level of the root logger is WARNING unless it is set, and would drop the message. So it counts only if it was
    set for "dist_adamw" or the module. Without any handler the message goes to stderr, as warnings do.

    Args:
        name: The module's ``__name__``.
        text: One line.
    """
    logger = logging.getLogger(name)
    if logger.isEnabledFor(logging.INFO):
        if logger.hasHandlers():
            logger.info(text, stacklevel=2)
            return
    elif _has_own_level(logger) or logger.manager.disable >= logging.INFO:
        return
    place = logger.findCaller(stacklevel=2)
    record = logger.makeRecord(name, logging.INFO, *place[:2], text, (), None, func=place[2])
    if logger.hasHandlers():
        logger.handle(record)  # without the root's level; handlers have levels too
    elif not logger.disabled and logger.filter(record):
        logging.StreamHandler().handle(record)


def _has_own_level(logger: logging.Logger) -> bool:
    """Return whether a level was set for the logger or one above it, other than the root."""
    above: logging.Logger | None = logger
    while above is not None and above.parent is not None:
        if above.level != logging.NOTSET:
            return True
        above = above.parent
    return False

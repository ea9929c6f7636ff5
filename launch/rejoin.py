#!/usr/bin/env python3
"""``torchrun`` that rejoins after it has lost the other machines; elastic.sh starts it.

torchrun ends when its connection to the rendezvous host breaks, and does not reconnect. By then its ranks have failed
and the other machines have continued without it, so it joins again as a new machine.
"""

from __future__ import annotations

import os
import sys
import time

from mistakes import is_reported, sentence_last
from torch.distributed import DistError, run
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

_PAUSE = 2.0  # seconds


def main() -> None:
    """Run torchrun's command line, and again up to REJOINS times if the other machines are lost."""
    left = int(os.environ.get("REJOINS", "20"))
    with sentence_last():
        is_lost = _run(may_rejoin=left > 0)
    if is_lost:
        time.sleep(_PAUSE)
        # exec drops the old connections and timers, and keeps the process id that a supervisor watches.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "REJOINS": str(left - 1)})


def _run(*, may_rejoin: bool) -> bool:
    """Run torchrun's command line; return whether it has lost the other machines and is to join again."""
    try:
        run.main(sys.argv[1:])
    except (RendezvousConnectionError, DistError) as error:
        if not may_rejoin or is_reported():
            raise
        print(f"rejoin.py: lost the other machines, joining again: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.stderr.flush()
        return True
    return False


if __name__ == "__main__":
    main()

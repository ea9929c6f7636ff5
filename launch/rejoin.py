#!/usr/bin/env python3
"""``torchrun`` that joins again when it has lost the other machines; elastic.sh starts it.

torchrun ends when its connection to the machine that keeps the list of machines breaks, and does not try another. Its
ranks have failed by then, and the other machines have gone on without it: it begins anew, as a machine that is new.
Knows torchrun; nothing of what it starts.
"""

from __future__ import annotations

import os
import sys
import time

from torch.distributed import DistError, run
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

_PAUSE = 2.0  # seconds


def main() -> None:
    """Run torchrun's command line; up to REJOINS times more when the others are out of reach."""
    left = int(os.environ.get("REJOINS", "20"))
    try:
        run.main(sys.argv[1:])
    except (RendezvousConnectionError, DistError) as error:
        if not left:
            raise
        print(f"rejoin.py: lost the other machines, joining again: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(_PAUSE)
        # A new process, without the connections and timers of the old one, but with its number.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "REJOINS": str(left - 1)})


if __name__ == "__main__":
    main()

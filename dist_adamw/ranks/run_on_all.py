"""Run an operation on a fixed set of ranks, and raise its errors on all of them.

Once a process group has been destroyed, ``torch.distributed`` tells every rank that it is rank 0 of 1. A save that
queried it midway would let every rank write as the main one, so rank and world size are read once, and a destroyed
group is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from dist_adamw.errors import AgreementError, CheckpointError
from dist_adamw.ranks import collectives

T = TypeVar("T")


@dataclass(slots=True)
class Ranks:
    """The ranks that take part in an operation, fixed for its duration.

    Attributes:
        rank: This rank.
        size: The number of ranks.
        group: Their process group; None is the default group, or no group if there is one rank.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def now(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """Return the current ranks of the job, which communicate over ``group``. Local."""
        return cls(collectives.rank(), collectives.world_size(), group)

    @property
    def is_main(self) -> bool:
        """Whether this rank does the work that is done once per job. Local."""
        return self.rank == 0

    def check(self) -> None:
        """Raise if a process group was destroyed or created since `now`. Local.

        Raises:
            CheckpointError: the number of ranks has changed.
        """
        if (now := collectives.world_size()) == self.size:
            return
        if collectives.initialized():
            raise CheckpointError(
                f"this object was created with {self.size} rank(s), and there are {now} now. Create it after "
                "dist.init_process_group()."
            )
        # Dropping the last reference to a group closes its connections, so no other rank waits for this one.
        self.group = None
        raise CheckpointError(
            f"the process group of {self.size} ranks was destroyed before the checkpoint was finished. Call "
            "AsyncSaver.close() or CheckpointFolder.close() before dist.destroy_process_group()."
        )

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` (small and picklable), in rank order. Collective.

        Raises:
            CheckpointError: the process group has been destroyed.
        """
        self.check()
        return [value] if self.size == 1 else collectives.all_gather_objects(value, self.group)

    def run(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; if it fails on one, raise its message on all. Collective.

        Raises:
            CheckpointError: ``action`` raised an exception on some rank.
        """
        self.check()
        problem, result = None, None
        try:
            result = action()
        except CheckpointError as error:
            problem = str(error)
        except AgreementError:
            raise  # every rank has raised it already
        except Exception as error:  # must reach the gather below: the other ranks wait there
            problem = f"{type(error).__name__}: {error}"
        if (failed := first_problem(self.gather(problem))) is not None:
            raise CheckpointError(failed)
        return result  # type: ignore[return-value]


def first_problem(reports: Sequence[str | None]) -> str | None:
    """Return the first problem in ``reports``, with its rank unless all ranks have it; None if there is none. Local."""
    for rank, problem in enumerate(reports):
        if problem is not None:
            is_everywhere = all(other == problem for other in reports)
            return problem if is_everywhere else f"{problem} (rank {rank})"
    return None


def run_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` as `Ranks.run` does, on all current ranks. Collective."""
    return Ranks.now(group).run(action)


def check_on_all_ranks(check: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run a check of what the user has set, and raise its message on all ranks if it fails on one. Collective.

    Raises:
        ValueError: ``check`` raised an exception on some rank.
    """
    problem, result = None, None
    try:
        result = check()
    except Exception as error:  # the other ranks wait in the gather below
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if (failed := first_problem(Ranks.now(group).gather(problem))) is not None:
        raise ValueError(failed)
    return result  # type: ignore[return-value]

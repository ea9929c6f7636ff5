"""Run one operation on a fixed set of ranks, and raise its errors on all of them.

Knows process groups; nothing of what is done.

A rank that asks ``torch.distributed`` again in the middle of a save hears that it is alone, and the main one, once the
process group has been destroyed. So rank and number of ranks are taken once, and a group that is gone is an error.
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
    """Who takes part, from beginning to end.

    Attributes:
        rank: This one's number.
        size: How many there are.
        group: For their messages; None: the default group, or none at all where there is one rank.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def now(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """Return all ranks of the job, as they are now, and a group for their messages. Local."""
        return cls(collectives.rank(), collectives.world_size(), group)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that does what is done once. Local."""
        return self.rank == 0

    def check(self) -> None:
        """Raise where the process group has been destroyed, or made, since. Local.

        Raises:
            CheckpointError: there are not as many ranks any more.
        """
        if (now := collectives.world_size()) == self.size:
            return
        if collectives.initialized():
            raise CheckpointError(
                f"this was made when there were {self.size} rank(s), and there are {now} now. Make it after "
                "dist.init_process_group()."
            )
        # With the last reference to a group its connections close, so that no other rank waits for this one.
        self.group = None
        raise CheckpointError(
            f"the process group of {self.size} ranks was destroyed before the checkpoint was finished. Wait for it "
            "(AsyncSaver.close() or CheckpointFolder.close()) before dist.destroy_process_group()."
        )

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` (small and picklable), in rank order. Collective.

        Raises:
            CheckpointError: the process group has been destroyed.
        """
        self.check()
        return [value] if self.size == 1 else collectives.all_gather_objects(value, self.group)

    def run(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; where it fails on one, all raise its sentence. Collective.

        Raises:
            CheckpointError: ``action`` raised anything on some rank.
        """
        self.check()
        problem, result = None, None
        try:
            result = action()
        except CheckpointError as error:
            problem = str(error)
        except AgreementError:
            raise  # on every rank alike, and no matter of files
        except Exception as error:  # without the others' knowledge they would wait for ever
            problem = f"{type(error).__name__}: {error}"
        if (failed := first_problem(self.gather(problem))) is not None:
            raise CheckpointError(failed)
        return result  # type: ignore[return-value]


def first_problem(reports: Sequence[str | None]) -> str | None:
    """Return the first rank's problem of ``reports``, with the rank unless all have it; None without one. Local."""
    for rank, problem in enumerate(reports):
        if problem is not None:
            is_everywhere = all(other == problem for other in reports)
            return problem if is_everywhere else f"{problem} (rank {rank})"
    return None


def run_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` as `Ranks.run` on all ranks as they are now. Collective."""
    return Ranks.now(group).run(action)

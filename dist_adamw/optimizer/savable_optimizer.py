"""Second base class of `DistAdamW`: torch's state dicts, copies and pickles of sharded state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.averages import dtypes_of
from dist_adamw.optimizer.sharded_optimizer import OPTIONS, ShardedOptimizer
from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS
from dist_adamw.optimizer.sharding.shard import peek
from dist_adamw.optimizer.sharding.user_changes import check_keys
from dist_adamw.optimizer.sharding.watched_state import WatchedState
from dist_adamw.optimizer.state_dict import (
    ELSEWHERE,
    bucket_numels_of,
    check_entries,
    check_share,
    describe_share,
    gather_state,
    is_being_wrapped,
    stamps_of,
)

StateDict = dict[str, Any]


class SavableOptimizer(ShardedOptimizer):
    """An optimizer with whole state dicts, as torch's, and with pickles and copies of this rank's share."""

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until every parameter has its new value.

        Needed only with ``defer_gather``, and then only before parameters are read in a way that bypasses Python: by an
        address taken before `step`, a ``torch.jit.ScriptModule``, or a collective on the parameter itself.
        """
        self._pending.wait()

    def announce_save(self) -> None:
        """After `attach`, raise if a rank trains on instead of saving (gloo only). Collective.

        Raises:
            AgreementError: names the rank and what it does. On every rank.
        """
        if self._path is not None:
            self._path.messages.meet_to_save()

    def state_dict(self) -> StateDict:
        """Return the whole state in the parameters' shapes, as torch's optimizers do. Local.

        It loads into ``torch.optim.AdamW`` and the other way round, and into a `DistAdamW` on any number of ranks.
        If the state is sharded, this rank has 1/W of it: call `consolidate_state_dict` first, on every rank.

        Raises:
            RuntimeError: the state is sharded, and this rank has not consolidated it since it last changed.
            ValueError: ``state`` has an entry that is not of a parameter.
        """
        check_keys(self.state)
        if not self._has_a_share or is_being_wrapped():
            return self._share_state_dict()
        whole = self._whole_state()
        state_dict = super().state_dict()
        check_keys(self.state)  # the user's hooks have run
        params = {param: i for i, param in enumerate(self._all_params())}
        of_hooks = {key: entry for key, entry in state_dict["state"].items() if not isinstance(key, int)}
        of_params = {params[param]: dict(state) for param, state in whole.items() if param in params}
        state_dict["state"] = {**of_params, **of_hooks}
        return state_dict

    @property
    def _has_a_share(self) -> bool:
        return bool(self.shards) and self.shards[0].process_group is not None

    def _share_state_dict(self) -> StateDict:
        """Return the state dict of this rank's elements, 1-D; ``"share"`` describes which they are. Local."""
        self._follow_alone()
        state_dict = super().state_dict()
        check_keys(self.state)  # the user's hooks have run
        entries = state_dict["state"].items()
        state_dict["state"] = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in entries}
        if (share := describe_share(self.shards, self._all_params())) is not None:
            state_dict["share"] = share
        return state_dict

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Copy the whole state to one rank, for its next `state_dict`. Collective if sharded; else it does nothing.

        As with ``torch.distributed.optim.ZeroRedundancyOptimizer``, call it on every rank, then ``state_dict()`` on
        rank ``to``. The copy takes 8 bytes of host memory for each fp32 parameter (12 with masters) until the next
        update; `dist_adamw.save` needs no copy.

        Args:
            to: The receiving rank, counted among those that share the state. None: every rank.

        Raises:
            ValueError: there is no such rank.
        """
        self.wait()
        self.announce_save()
        ranks = self._ranks.place[1]
        if to is not None and not 0 <= to < ranks:
            raise ValueError(f"to must be a rank from 0 to {ranks - 1}, or None for every rank, got {to!r}.")
        self.follow()
        if self._has_a_share:
            self._consolidated = gather_state(self.shards, to, self.state)

    def _whole_state(self) -> dict[Tensor, StateDict]:
        """Return the state that `consolidate_state_dict` has gathered.

        Raises:
            RuntimeError: it was not called, or state has changed since, or another rank has the copy.
        """
        rank, ranks = self._ranks.place
        known = self._consolidated
        if known is not None and known.stamps == stamps_of(self.shards, self.state) and not self._differs():
            if known.states is not None:
                return known.states
            problem = f"the state was consolidated on rank {known.to}, and this is rank {rank}."
        else:
            problem = (
                f"rank {rank} of {ranks} has its own share of the state, which was not consolidated since it changed."
            )
        raise RuntimeError(
            f"{problem} Call optimizer.consolidate_state_dict(to=<rank>) on every rank, and then state_dict() on that "
            "rank. Or save with dist_adamw.save on every rank (accelerator.save_state does after dist_adamw.prepare, "
            "Trainer after prepare_trainer). Or pass shard=False to DistAdamW, which keeps whole state on every rank."
        )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class or of ``torch.optim.AdamW``. Local; on every rank before the same update.

        This rank keeps its share of whole state.

        Raises:
            ValueError: groups or shapes do not match, or it is another rank's share. The optimizer is left unchanged.
        """
        self._check_loadable(state_dict)
        self.wait()
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        kinds = (*MOMENTS, *MASTERS, *dtypes_of(self.averages))
        # torch has cast the state to the parameters' dtype, which may be less exact, so take it from the argument.
        for i, param in zip(saved, self._all_params(), strict=True):
            given = state_dict["state"].get(i, {})
            self.state[param].update({key: given[key] for key in kinds if key in given})
            if not self.state[param]:
                del self.state[param]
        self._reset()
        if self._path is not None:
            self._path.forget_layout()
        self._adopt(state_dict.get("share"))

    def _check_loadable(self, state_dict: StateDict) -> None:
        if (where := state_dict.get(ELSEWHERE)) is not None:
            raise ValueError(where)
        if (share := state_dict.get("share")) is not None:
            self._check_share(share)
        check_entries(state_dict, self._all_params(), [*dtypes_of(self.averages)])

    def _check_share(self, share: Mapping[str, Any]) -> None:
        wanted = self._wanted()
        reduce_every_backward = wanted.reduce_every_backward
        check_share(share, self._all_params(), wanted.ranks.place, self.bucket_numel, reduce_every_backward)

    def _lay_out(self, params: Iterable[Tensor]) -> None:
        """Replace all state with zeros for ``params``, for the caller to fill in. Local.

        Call `recount` afterwards. Every rank must pass the same parameters in the same order.
        """
        self.wait()
        self.state.clear()
        self._reset()
        if self._path is not None:
            self._path.forget_layout()
        self._init_state(params)

    def _adopt(self, share: Mapping[str, Any] | None) -> None:
        """Lay out the state in ``self.state``, whole or this rank's share."""
        check_keys(self.state)
        # Detached, because shards point tensors found in ``state`` at their own memory, and these are the caller's.
        ours = {
            param: {key: value.detach() if isinstance(value, Tensor) else value for key, value in entry.items()}
            for param, entry in self.state.items()
        }
        self.state = WatchedState.of(self._accesses, ours)
        params = self._all_params()
        if share is None:
            self._init_state([param for param in params if peek(self.state, param)])
        else:
            numels = bucket_numels_of(share, params, reduce_every_backward=self._wanted().reduce_every_backward)
            for members, numel in zip(share["shards"], numels, strict=True):
                self._init_state([params[i] for i in members], bucket_numel_of_share=self.bucket_numel or numel)
        self.recount()

    def recount(self) -> None:
        """Set `updates` from the state, after a load or replays of a CUDA graph. Waits for the device. Local."""
        self._outcome.updates = max((int(shard.steps.max()) for shard in self.shards), default=0)
        self._scheme.forget_counts()
        self._consolidated = None

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        self._follow_alone()
        options = {name: getattr(self, name) for name in OPTIONS}
        return {**super().__getstate__(), "options": options, "share": describe_share(self.shards, self._all_params())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        share = state.pop("share", None)
        options = state.pop("options", {})
        unpickled = not hasattr(self, "_all_shards")  # __init__ has not run
        if unpickled:
            self.reduce_dtype, self.reproducible, self.averages = None, False, {}  # pickles of 0.1.0 lack them
        for name, value in options.items():
            setattr(self, name, value)
        if unpickled:
            self._reset()
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
        if unpickled:
            if share is not None:
                self._check_share(share)
            self._adopt(share)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._mesh is not None:  # it holds process groups, which exist only in this process
            raise ValueError("a DistAdamW with a mesh cannot be pickled or copied. Use state_dict().")
        return super().__reduce_ex__(protocol)

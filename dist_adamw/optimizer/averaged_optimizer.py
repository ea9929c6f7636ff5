"""Third base class of `DistAdamW`: averages of the weights, which each owner keeps in its share."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_adamw.optimizer.averages import AVERAGED, EMA, Average, Contributions, Mean, as_text, described
from dist_adamw.optimizer.kernels.averaging import mean_of
from dist_adamw.optimizer.outcome import is_capturing
from dist_adamw.optimizer.savable_optimizer import SavableOptimizer, StateDict
from dist_adamw.optimizer.sharding.dtensors import is_dtensor, local_of
from dist_adamw.optimizer.sharding.schemes import OwnSharding
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.sharding.values import average_all
from dist_adamw.optimizer.shown_weights import KeptBuffers, WeightsOf, reshard
from dist_adamw.ranks import agreement, collectives
from dist_adamw.schedule.restarts import RestartSchedule


class AveragedOptimizer(SavableOptimizer):
    """An optimizer that keeps averages of the weights. Nothing is sent until `averaged` shows one.

    An EMA moves with each bucket of an update. A mean gets the weights at moments of the schedule.
    """

    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _shown_average: str | None = None
    _followed: tuple[object, int] = (None, 0)
    _modules: Sequence[weakref.ref[nn.Module]] = ()
    _engine_weights: Callable[[], contextlib.AbstractContextManager[WeightsOf]] | None = None
    _averages: dict[str, Average]

    @property
    def averages(self) -> Mapping[str, Average]:
        """The averages of the weights, by name; read-only."""
        return MappingProxyType(self._averages)

    @averages.setter
    def averages(self, averages: Mapping[str, Average]) -> None:
        # The same ones are accepted: `__setstate__` of an optimizer in use sets them too.
        if hasattr(self, "_all_shards") and dict(averages) != self._averages:
            raise AttributeError("averages are chosen when the optimizer is created: DistAdamW(..., averages={...}).")
        self._averages = dict(averages)

    # ---------------------------------------------------------------- contributions

    def _reset(self) -> None:
        super()._reset()
        self._contributions = Contributions()
        if not hasattr(self, "_decays"):  # kept otherwise: the schedule may have set them
            emas = {name: average for name, average in self.averages.items() if isinstance(average, EMA)}
            self._decays: dict[str, float | None] = {name: average.decay for name, average in emas.items()}

    def _known_contributions(self) -> Contributions:
        self._contributions.load(self.param_groups, self.averages, self._outcome.updates)
        return self._contributions

    def contributions(self, name: str) -> int:
        """Return how often the average ``name`` has had the weights added; for an EMA, the updates. Local.

        On an accelerator this waits for the last update.

        Raises:
            ValueError: there is no such average.
        """
        self._average(name)
        return self._known_contributions().of(name, self._outcome.updates)

    def _average(self, name: str) -> Average:
        if name not in self.averages:
            known = f"It keeps {', '.join(self.averages)}" if self.averages else "It keeps none"
            raise ValueError(
                f"this optimizer keeps no average {name!r}. {known}: name them when it is created, such as "
                "DistAdamW(..., averages={'ema': EMA(decay=0.999)})."
            )
        return self.averages[name]

    def decays_in(self, schedule: RestartSchedule, batch_size: int, *, largest: int) -> dict[str, float]:
        """Return the decay of each EMA under a schedule, and check the moments of means. Local.

        Args:
            schedule: Converts lengths to samples.
            batch_size: The global batch of the next update.
            largest: The largest global batch of the training.

        Raises:
            ValueError: a time scale is shorter than an update, or a length is one that the schedule cannot convert.
        """
        for average in self.averages.values():
            if isinstance(average, Mean):
                average.moments(schedule)
        emas = {name: average for name, average in self.averages.items() if isinstance(average, EMA)}
        return {name: average.decay_at(schedule, batch_size, largest) for name, average in emas.items()}

    def follows(self, recipe: object, batch_size: int) -> bool:
        """Return whether `follow_schedule` was called with these last. Local."""
        return self._followed[0] is recipe and self._followed[1] == batch_size

    def follow_schedule(self, recipe: object, schedule: RestartSchedule, batch_size: int, *, largest: int) -> None:
        """Set the decay of EMAs with a time scale. `CyclicLRWithRestarts` calls it. Local; see `decays_in`.

        Args:
            recipe: Identifies the schedule, for `follows`.
            schedule: Converts lengths to samples.
            batch_size: The global batch of the next update.
            largest: The largest global batch of the training.
        """
        self._decays = {**self._decays, **self.decays_in(schedule, batch_size, largest=largest)}
        self._followed = recipe, batch_size

    def follow_clock(self, schedule: RestartSchedule, before: int, after: int) -> None:
        """Add the weights to the means that are due. `CyclicLRWithRestarts` calls it after updates. Local.

        Args:
            before: The clock before these updates, in samples.
            after: The clock after them.
        """
        due = [n for n, a in self.averages.items() if isinstance(a, Mean) and a.is_due(schedule, before, after)]
        # If it is known already that an update was skipped, the clock has not counted it.
        if due and (self._outcome.is_known or not self._outcome.was_skipped):
            for name in due:
                self.add_to_average(name)

    @torch.no_grad()
    def add_to_average(self, name: str) -> None:
        """Add the weights to a `Mean`. Local; every rank calls it between the same two updates.

        `CyclicLRWithRestarts` does it at the moments that the mean names.

        Raises:
            ValueError: there is no such average, or it is an EMA.
            RuntimeError: there was no update yet, or the weights are those of an average.
        """
        mean = self._average(name)
        if not isinstance(mean, Mean):
            raise ValueError(f"the average {name!r} is an EMA, which every update moves. Only a Mean is added to.")
        self._refuse_inside("add_to_average()")
        self.wait()
        if not self.shards:
            raise RuntimeError(f"add_to_average({name!r}) needs an update before it: state is laid out by the first.")
        self._all_shards.refresh([shard for shard in self.shards if shard.has_moved() and shard.fits()], self.state)
        contributions = self._known_contributions()
        count = contributions.of(name, self._outcome.updates)
        by = 1.0 if mean.last is not None else 1.0 / (count + 1)
        for shard in self.shards:
            shard.follow_weights()
            average_all(shard, {mean.slot(name, count): by})
        contributions.add(name)
        self._consolidated = None

    def _moves_of_update(self) -> dict[str, float]:
        """Return how far each EMA moves in the update in progress, by name. Local; once the outcome was measured."""
        moves = {}
        for name, average in self.averages.items():
            if isinstance(average, EMA):
                before = self._contributions.since_first(name, self._outcome.number)
                if before % average.every == 0:
                    moves[name] = 1.0 - self._decays[name] ** average.every if before else 1.0  # type: ignore[operator]
        return moves

    def _check_averages(self) -> None:
        """Raise before an update that could not move an average. Local."""
        self._refuse_inside("step()")
        if self.averages:  # now, since counts of a load refer to the updates before this one
            self._known_contributions()
        for name, decay in self._decays.items():
            if decay is None:
                raise RuntimeError(
                    f"the average {name!r} is {self.averages[name]}, and a time scale needs a CyclicLRWithRestarts of "
                    "this optimizer, whose batch and epoch are known. Make one, or pass EMA(decay=...)."
                )
            if is_capturing() and (not self.contributions(name) or self.averages[name].every != 1):
                raise RuntimeError(
                    f"a CUDA graph repeats one update, and the average {name!r} needs another first one, or every=1: "
                    f"it is {self.averages[name]}. Make an update before capturing, and leave every=1."
                )

    # ---------------------------------------------------------------- show an average

    def use_model(self, model: nn.Module) -> None:
        """Have `averaged` restore the buffers of ``model``, too, and under FSDP2 gather its weights again. Local.

        ``prepare``, ``prepare_trainer`` and `attach` call it. The module is held weakly.
        """
        if not any(ref() is model for ref in self._modules):
            self._modules = [*(ref for ref in self._modules if ref() is not None), weakref.ref(model)]

    def _known_modules(self) -> list[nn.Module]:
        return [model for ref in self._modules if (model := ref()) is not None]

    @contextlib.contextmanager
    def averaged(self, name: str) -> Iterator[None]:
        """Put an average into the model, to evaluate or save it: ``with optimizer.averaged("ema"):``.

        Inside, the parameters are the average; afterwards they have the bits that they had before, and so have the
        buffers (see `use_model`), so that ``torch.optim.swa_utils.update_bn`` may run inside. `step`, ``state_dict``
        and saving the optimizer are refused inside. Sends each parameter once, and keeps a copy of this rank's
        parameters. Collective; leaving the block is local, except under ZeRO-3, where all ranks must leave it together.

        Raises:
            ValueError: there is no such average.
            RuntimeError: nothing was added to it yet, or another average is shown.
            AgreementError: another rank is in its next update, after `attach` on gloo; or ranks have made different
                changes. On every rank.
        """
        average = self._average(name)
        self._refuse_inside(f"averaged({name!r})")
        count = self.contributions(name)
        if not count:
            raise RuntimeError(_not_begun(name, average))
        self.announce_save()
        _agree_on_average(self, name, count)
        self.follow()
        if self._engine_weights is None and self._is_partitioned:
            raise RuntimeError(
                "DeepSpeed keeps the model's weights apart from this optimizer's. Call dist_adamw.prepare, or "
                "dist_adamw.prepare_deepspeed(engine), before averaged()."
            )
        _check_unsharded(self)
        slots = described(name, average, count).oldest_first()
        with KeptBuffers(self._known_modules()), (self._engine_weights or self._own_weights)() as write:
            with torch.no_grad():
                write(lambda shard, i: _average_of(shard, i, slots))
            self._shown_average = name
            try:
                yield
            finally:
                self._shown_average = None

    @contextlib.contextmanager
    def _own_weights(self) -> Iterator[WeightsOf]:
        """Give a function that writes this rank's part of the parameters and gathers the rest; undo it at the end."""
        models = self._known_modules()
        params = [local_of(param) for shard in self.shards for param in shard.params]
        with torch.no_grad():
            before = [param.detach().clone() for param in params]

        def write(values: Callable[[Shard, int], Tensor]) -> None:
            for shard in self.shards:
                for i in range(len(shard.params)):
                    _write_owned(shard, i, values(shard, i))
            for shard in self.shards:
                _gather(shard)
            reshard(models)

        try:
            yield write
        finally:
            with torch.no_grad():
                for param, kept in zip(params, before, strict=True):
                    param.copy_(kept)
            reshard(models)

    def _refuse_inside(self, what: str) -> None:
        if self._shown_average is not None:
            raise RuntimeError(
                f"{what} inside `with optimizer.averaged({self._shown_average!r})`: the weights are the average now. "
                "Leave the block first."
            )

    # ---------------------------------------------------------------- saving

    def _write_counts(self) -> None:
        """Put the averages and their counts into the groups, so that every kind of checkpoint has them. Local."""
        text = as_text({name: described(name, a, self.contributions(name)) for name, a in self.averages.items()})
        for group in self.param_groups:
            if self.averages:
                group[AVERAGED] = text
            else:  # a load may have brought it
                group.pop(AVERAGED, None)

    def follow(self) -> None:
        """Apply the user's changes to ``param_groups``, ``state`` and weights, as `step` and a save do. Collective.

        Raises:
            ValueError: an entry of ``state`` is not valid state of its parameter. Raised before anything changes.
            AgreementError: ranks have made different changes. On every rank.
        """
        self._refuse_inside("saving the optimizer")
        self._write_counts()
        super().follow()

    def state_dict(self) -> StateDict:
        """Return the whole state in the parameters' shapes, as torch's optimizers do. Local.

        `torch.optim.AdamW` loads it, and a `DistAdamW` on any number of ranks. Averages are in a parameter's entry. Of
        sharded state this rank has 1/W: call `consolidate_state_dict` first, on every rank.

        Raises:
            RuntimeError: the state is sharded, and this rank has not consolidated it since it last changed.
            ValueError: ``state`` has an entry that is not of a parameter.
        """
        self._refuse_inside("state_dict()")
        self._write_counts()
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class or of ``torch.optim.AdamW``. Local; on every rank before the same update.

        This rank keeps its share of whole state. An average that ``state_dict`` lacks begins at the next update.

        Raises:
            ValueError: groups or shapes do not match, or it is another rank's share. The optimizer is left unchanged.
        """
        self._refuse_inside("load_state_dict()")
        super().load_state_dict(state_dict)

    def _lay_out(self, params: Any) -> None:
        self._refuse_inside("loading")
        super()._lay_out(params)
        for group in self.param_groups:  # a load sets it afterwards, if the checkpoint has it
            group.pop(AVERAGED, None)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside("pickling or copying the optimizer")
        self._write_counts()
        state = super().__getstate__()
        state["options"]["averages"] = dict(self.averages)  # a read-only mapping cannot be pickled
        return state


def _agree_on_average(optimizer: AveragedOptimizer, name: str, count: int) -> None:
    """Raise on every rank if another one shows another average, or has added to it more often. Collective."""
    groups: Sequence[dist.ProcessGroup | None] = optimizer._ranks.comparing()
    if not groups and collectives.world_size() > 1 and not isinstance(optimizer._scheme, OwnSharding):
        groups = [collectives.host_group()]  # of an engine that shards the parameters over all ranks
    for group in groups:
        agreement.check_agreement({"the average to show": name, "weights added to it": count}, group)


def _check_unsharded(optimizer: AveragedOptimizer) -> None:
    """Raise if FSDP2 may keep unsharded weights in modules that are not known. Local."""
    if not optimizer._known_modules() and any(map(is_dtensor, optimizer._all_params())):
        raise RuntimeError(
            "under FSDP2 averaged() needs the model, which may hold unsharded weights. Call dist_adamw.prepare or "
            "optimizer.use_model(model) first."
        )


def _not_begun(name: str, average: Average) -> str:
    if isinstance(average, EMA):
        when = "the first update begins it"
    elif average.every is None:
        when = f"optimizer.add_to_average({name!r}) begins it"
    else:
        begin = "the end of the first cycle" if average.every == Mean.AT_CYCLE_ENDS else f"{average.every!r}"
        after = f", not before start={average.start!r}" if average.start != 0 else ""
        when = f"a CyclicLRWithRestarts of this optimizer begins it at {begin}{after}"
    return f"the average {name!r} has had no weights added yet: {when}."


def _average_of(shard: Shard, i: int, slots: list[str]) -> Tensor:
    """Return this rank's elements of an average of parameter ``i``, 1-D: the mean of ``slots``, oldest first. Local."""
    return mean_of([shard.owned_moment(i, slot) for slot in slots])


def _write_owned(shard: Shard, i: int, values: Tensor) -> None:
    """Write this rank's elements of parameter ``i``. Local."""
    place = 0
    for operands, j in shard.operands_of(i):
        param = operands.params[j]
        param.copy_(values[place : place + param.numel()])
        place += param.numel()


def _gather(shard: Shard) -> None:
    """Send this rank's elements of all parameters, and receive the others'. Collective over the shard's ranks."""
    if shard.transport is None:
        return
    for k in range(len(shard.buckets)):
        shard.transport.finish_gather(shard.transport.start_gather(k))

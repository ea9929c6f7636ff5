"""Fifth base class of `DistAdamW`: gradients reduced to their owners; attach, clip, gather."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adamw.optimizer import attaching
from dist_adamw.optimizer.clipping import clip_owned_, owned_gradients
from dist_adamw.optimizer.gradients.fsdp import complete_gradients, why_not_join
from dist_adamw.optimizer.gradients.gradient_path import GradientPath
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.registry import end_unless_everywhere, gather_from_owners
from dist_adamw.optimizer.options import describe_groups
from dist_adamw.optimizer.outcome import is_capturing
from dist_adamw.optimizer.reproducible_optimizer import ReproducibleOptimizer
from dist_adamw.optimizer.sharded_optimizer import OPTIONS
from dist_adamw.optimizer.sharding.dtensors import is_dtensor
from dist_adamw.plain_data import plain
from dist_adamw.ranks import collectives


class AttachedOptimizer(ReproducibleOptimizer):
    """An optimizer that gets gradients of attached modules reduced to their owners.

    Other gradients must be the same on every rank.
    """

    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _unattached_updates = 0
    gathers_from_owners = True  # it gathers gradients that another optimizer has reduced, so no global hook has to
    _defer_gather = False
    _is_agreed = False  # whether ranks have compared their options
    _attach_options: dict[str, bool] | None = None
    _attached: Sequence[weakref.ref[nn.Module]] = ()

    def _collect_gradients(self, *, for_update: bool = False) -> bool:
        """Follow the user's changes and reduce gradients to their owners; return whether there are any. Collective.

        Args:
            for_update: Whether an update follows at once.
        """
        changed = self._differs()
        problem = self._find_problem(for_update=for_update)
        if self._path is None:
            if self.reproducible:
                complete_gradients(self._fsdp_micro_batches, self._all_params(), problem)
            gather_from_owners(None, self._all_params())
            if self.process_group is not None and not self._is_agreed:
                self._check_alike({})  # before anything is changed or sent
            self._follow(changed)
            return True
        self._path.messages.check_groups()
        if self._path.is_whole:
            self._follow(changed)
            return self._path.update.take_whole()  # `gather_gradients` has raised any problem
        ranks, agreement = self._ranks, self._path.agreement
        assert ranks.process_group is not None
        hosts = ranks.comparing()
        if not agreement.complete(
            ranks.process_group,
            ranks.replica_group,
            has_changes=changed,
            options=self._digest_options(),
            check_changes=self._compare,
            problem=problem,
            hosts=hosts,
        ):
            return False
        if self._path.order.is_due and not is_capturing():
            changed |= self._path.order.adopt(hosts or ranks.groups, agreement.needed_rounds)
        self._follow(changed, is_agreed=agreement.asks_for_changes)
        # Bucket by bucket the update finds them in the cache; but a norm needs all of them before.
        divides = for_update and self.max_grad_norm is None and any(group["lr"] != 0 for group in self.param_groups)
        self._path.update.arrive(
            agreement.needed_rounds, agreement.micro_batches, for_update=for_update, divides=divides
        )
        return True

    def _check_reduce_dtype(self) -> None:
        """Refuse ``reduce_dtype`` if something else has averaged the gradients. Collective if it raises."""
        if self.reduce_dtype is None or self._path is not None or self.process_group is None:
            return
        self._settle()  # if only some ranks have the option, this raises on all
        raise RuntimeError(
            f"reduce_dtype={self.reduce_dtype} is for gradients that DistAdamW averages, but nothing is attached. Call "
            "dist_adamw.prepare (without whole_gradients=True) or optimizer.attach(model). Or leave reduce_dtype=None, "
            "and register one of DDP's compression hooks."
        )

    def _is_compiled(self) -> bool:
        compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
        return any(attaching.reads_compiled(ref(), compiled) for ref in self._attached)

    def _report_exchange(self) -> RankMessages | None:
        """Return the exchange of reports in which the next `step` takes part; None: there will be none.

        Local, and the same on every rank.
        """
        path = self._path
        return None if path is None or path.is_whole or not path.messages.is_open else path.messages

    def _warn_of_local_gradients(self) -> None:
        """Compare gradients once, at the second update, if nothing is known to average them. Collective."""
        if self._path is not None or self.process_group is None or self._unattached_updates > 1 or is_capturing():
            return
        self._unattached_updates += 1
        if self._unattached_updates == 2:
            self._settle()
            device = self.shards[0].steps.device if self.shards else torch.device("cpu")
            # The warning should point at the script's call of step(), which torch wraps twice.
            attaching.warn_of_local_gradients(self._all_params(), self._ranks, device, stacklevel=5)

    def _check_alike(self, more: dict[str, Any]) -> None:
        """Raise on every rank if options, groups, shapes or ``more`` are not the same on all. Collective."""
        self._is_agreed = True
        attaching.check_options_alike({**self._layout_record(), **more}, self._ranks)

    def _layout_record(self) -> dict[str, Any]:
        """Return what must be the same on all ranks: the constructor's options, groups and shapes. Local."""
        mesh = self._mesh
        record = {name: plain(getattr(self, name)) for name in OPTIONS}
        record["mesh"] = None if mesh is None else [list(mesh.shape), list(mesh.mesh_dim_names or ())]
        return record | describe_groups(self.param_groups, list(self.defaults))

    def attach(
        self,
        model: nn.Module,
        *,
        overlap: bool = True,
        reduce_every_backward: bool = False,
        defer_gather: bool = False,
    ) -> None:
        """Reduce each gradient to the rank that owns it, in place of an all-reduce. Collective.

        Call it once per module, after ``DistributedDataParallel`` or ``.to()``; `dist_adamw.prepare`
        does. Per update each rank sends ``f N (b_g + b_p)`` bytes, f = (W - 1) / W; with an
        all-reduce it would send ``f N (2 b_g + b_p)``.

        A ``DistributedDataParallel`` module works as before, with ``no_sync``,
        ``find_unused_parameters`` and several optimizers. On a GPU, build it with
        ``gradient_as_bucket_view=True``; otherwise nothing overlaps. Its ``join()`` is not supported. A plain
        module needs nothing else to average its gradients: it gets a ``no_sync()``, and, as in DDP,
        the first rank's parameters and buffers are broadcast to all ranks now.

        After backward, ``param.grad`` holds the average in the elements that this rank owns; the others have no
        meaning. For a norm, use ``max_grad_norm`` or `clip_grad_norm_`. To read or change whole
        gradients, call `gather_gradients` first. After a change that treats every element alike (a clamp), call
        `accept_gradients`. Other changes between backward and `step` raise an error if they can be detected: by
        another tensor or address in ``param.grad``, by its version counter, and on a CPU by a sample of the values. A
        gradient set to None is not used, as in torch; all ranks must set the same ones.

        Only gradients of this optimizer's parameters are averaged. Those of another optimizer in a plain module stay
        local. A DDP module that is not attached averages its own; gradients of parameters in no attached module are
        averaged in `step` if they differ over ranks. If several optimizers attach to the same parameters, the last one
        receives the gradients; another one that steps on them gathers whole ones first. All ranks must make the
        same backward passes and updates: over gloo, a rank that alone skips a `step` is an error.

        Args:
            model: The module; some or all of its parameters are this optimizer's.
            overlap: Send during backward. The bits are the same either way.
            reduce_every_backward: Reduce every micro-batch into the shard, inside ``no_sync`` too, and
                set ``param.grad`` to None after backward. Gradients then take
                ``b_g N / W`` bytes plus the buckets in flight, instead of ``b_g N``; with A
                micro-batches an update sends ``f N (A b_g + b_p)``. Plain modules only. Every rank's
                backward passes must reach the module equally often. To discard gradients, call this
                optimizer's ``zero_grad``, not the module's; ``zero_grad(set_to_none=False)``
                leaves zeros in ``param.grad``, as in torch.
            defer_gather: Return from `step` while the last buckets of parameters are in flight (on CUDA: all of
                them, on a separate stream). Any torch function that reads one of these parameters waits for it (on
                CUDA the device does). Compiled modules do not defer.

        Raises:
            ValueError: this module's wrapper is not supported.
            AgreementError: ranks have different parameters, buffers or options. On every rank, before anything is
                sent.
        """
        self.use_model(model)
        if any(is_dtensor(param) for param in model.parameters()):
            self._check_alike({})
            if self.reproducible:
                self._reproduce(model)
            return  # the engine that shards the parameters reduces their gradients
        options = {"overlap": overlap, "reduce_every_backward": reduce_every_backward, "defer_gather": defer_gather}
        is_ddp = isinstance(model, DistributedDataParallel)
        self._check_alike({f"attach({name})": value for name, value in options.items()} | {"attach to DDP": is_ddp})
        ranks = self._ranks
        attaching.check_averaging(model, ranks)
        if self.reproducible:
            self._reproduce(model)
        if ranks.process_group is None:
            return
        collectives.end_quietly()
        if self._path is None:
            self._path = self._open_path(overlap=overlap, reduce_every_backward=reduce_every_backward)
            self._attach_options = options
        elif options != self._attach_options:
            raise ValueError("attach() was called before with other options. Pass the same options for every module.")
        path = self._path
        self._defer_gather = defer_gather
        if not is_ddp:
            attaching.copy_first_rank(model, ranks)
        # Kept until `listen` has released them, which is collective: none may be collected on one rank alone.
        others = end_unless_everywhere(path, model)
        ids = set(map(id, self._all_params())) - path.listening
        params = [param for param in model.parameters() if id(param) in ids]
        attaching.check_gradients_before(path, params, ranks.process_group)
        path.listen(model)
        del others
        self._attached = [*(ref for ref in self._attached if ref() not in (None, model)), weakref.ref(model)]

    def _open_path(self, *, overlap: bool, reduce_every_backward: bool) -> GradientPath:
        """Make a path, and open its channel to the other ranks. Collective."""
        path = GradientPath(
            self._all_params,
            self._shards_by_now,
            self.gather_gradients,
            overlap=overlap,
            reduce_every_backward=reduce_every_backward,
            reproducible=self.reproducible,
        )
        self._channel = attaching.open_channel(self._ranks, self._all_params()[0].device)
        for shard in self.shards:
            shard.use(self._channel)
        path.messages.open(self._ranks.groups, self._channel, self._all_params()[0].device)
        return path

    @torch.no_grad()
    def join_backward(self) -> None:
        """Take part in a backward pass of the other ranks without a micro-batch. Collective.

        With ``reproducible``, where the micro-batches of an update do not divide among the ranks: those that have none
        left call this in place of a backward pass. They are the last ones, since micro-batch j of rank r is number
        ``j W + r``.

        Raises:
            RuntimeError: the optimizer is not attached, or ``reproducible`` is not set.
        """
        if not self.reproducible or self._path is None:
            raise RuntimeError(why_not_join(self._fsdp_micro_batches))
        self._path.join_backward()

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, parameters: Iterable[Tensor] | None = None
    ) -> Tensor:
        """Clip gradients by their global norm, as ``torch.nn.utils.clip_grad_norm_`` does. Collective.

        For loops that clip between backward and `step`; ``max_grad_norm`` costs less. After
        `attach`, torch's function would compute the norm of local gradients.

        Args:
            max_norm: The largest norm; a larger one is scaled down to it.
            norm_type: The p of the norm; may be inf.
            parameters: The parameters whose gradients are clipped; default: all of this optimizer. Gradients of other
                parameters must be whole.

        Returns:
            The norm before clipping, 0-d.
        """
        params = list(self._all_params() if parameters is None else parameters)
        norm = self._clip_grad_norm(params, max_norm, norm_type)
        self._note_clipped(norm, norm_type, params)
        return norm

    def _clip_grad_norm(self, params: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clip the gradients of ``params``; return their norm. Collective."""
        gather_from_owners(self._path, params)
        if self.reproducible and norm_type not in (2.0, math.inf):
            raise ValueError(f"with reproducible=True norm_type must be 2 or inf, got {norm_type!r}.")
        if self._path is None or self._path.is_whole:
            return self._clip_whole(params, max_norm, norm_type)
        known = {id(param) for param in self._all_params()}
        others = [p.grad for p in params if id(p) not in known and p.grad is not None]  # whole on every rank
        self._collect_gradients()
        self._settle()
        assert self.process_group is not None
        norm = clip_owned_(
            owned_gradients(self.shards, {id(param) for param in params}),
            others,
            max_norm=max_norm,
            norm_type=norm_type,
            group=self.process_group,
            device=self.shards[0].params[0].device if self.shards else params[0].device,
            reproducible=self.reproducible,
        )
        self._path.update.accept_changes()
        return norm

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Make every ``param.grad`` the whole gradient, averaged over all ranks. Collective.

        After `attach` a rank has the averages of the elements that it owns; the others have no meaning. Call this after
        backward and before anything that reads gradients: SAM's first pass, per-layer norms for a log, gradient
        surgery. `step` then uses ``param.grad``, which must be the same on every rank. Sends ``f N b_g`` bytes.

        Without `attach` it does nothing, since DDP has averaged the gradients.
        """
        if self._path is None or self._path.is_whole:
            return
        has_gradients = self._collect_gradients()
        self._settle()
        if has_gradients:
            self._path.update.make_whole()

    def accept_gradients(self) -> None:
        """Accept a change of gradients that treats all elements alike. Local; on every rank.

        After `attach`, `step` raises if gradients were changed since backward, because a change that depends on their
        norm would be wrong. Clamping each element, for example, is fine.
        """
        if self._path is not None:
            self._path.update.accept_changes()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as torch does, including reduced ones. Call it on every rank."""
        if self._path is not None:
            self._path.sources.look_at_siblings()
        super().zero_grad(set_to_none)
        if self._path is not None:
            self._path.backward.discard(leave_zeros=not set_to_none)

"""Errors for training loops that would get wrong gradients."""

from __future__ import annotations

from torch import Tensor

from dist_adamw.errors import AgreementError

UPDATE, ROUND, SAVE, CHANGE = KINDS = 1, 2, 3, 4  # what a rank announces that it is about to do

# Gradients between backward and the update; ranks take the largest. From CHANGED on they are refused.
NOT_CHANGED, ACCEPTED, CHANGED, SECOND_PASS, AFTER_GATHER, USED_TWICE = range(6)


def out_of_step(here: int, mine: list[int], there: int, theirs: list[int]) -> AgreementError:
    """Return the error for ranks that are about to do different things."""
    does = {
        UPDATE: "makes update {}",
        ROUND: "sends gradients of a backward pass for update {}",
        CHANGE: "has changed the optimizer's parameters before update {}",
        SAVE: "saves, consolidates state or shows an average before update {}",
    }
    said = [
        f"rank {r} {does.get(kind, 'sends gradients or parameters').format(number + 1)}"
        for r, (kind, number, *_) in ((here, mine), (there, theirs))
    ]
    if SAVE in (mine[0], theirs[0]):
        return AgreementError(
            f"ranks are out of step: {said[0]} while {said[1]}. Each rank has a share of the state: save_state, "
            "dist_adamw.save, consolidate_state_dict and averaged must be called on every rank, not in "
            "`if accelerator.is_main_process`."
        )
    if mine[0] != theirs[0]:
        skipped = here if mine[0] == ROUND else there
        why = f"Rank {skipped} skipped a step() that others made."
    else:
        why = "One of them skipped a step() that others made."
    return AgreementError(
        f"ranks are out of step: {said[0]} while {said[1]}. {why} Ranks must skip an update together: with "
        "max_grad_norm every rank skips when the norm is inf or nan. Otherwise all-reduce the reason to skip, and "
        "decide the same on all ranks."
    )


def too_late(param: Tensor) -> RuntimeError:
    """Return the error for a gradient that arrived after its bucket had been sent."""
    return RuntimeError(
        f"a gradient of shape {tuple(param.shape)} arrived after it had been sent to its owner. Either there were two "
        "backward passes without a forward pass of the attached module between them, or a parameter is used in several "
        "checkpointed segments (use_reentrant=True). Accumulate inside no_sync(), or pass overlap=False to attach()."
    )


def left_before_backward() -> RuntimeError:
    """Return the error for a parameter that left the optimizer between its DDP module's forward and backward pass."""
    return RuntimeError(
        "a parameter left the optimizer between the forward and the backward pass of its DistributedDataParallel "
        "module, so nothing would average its gradient in this pass. Remove parameters before the forward pass, or "
        "after step()."
    )


def accepted_local() -> RuntimeError:
    """Return the error for accepted changes of local gradients."""
    return RuntimeError(
        "accept_gradients() was called for gradients that are local until step(), because their parameters are in no "
        "attached module. A nonlinear change of local gradients is not the same change of their average. Call "
        "gather_gradients() before you change them, or attach() the module again once all its parameters are there."
    )


def dropped_alone(count: int) -> AgreementError:
    """Return the error for gradients that only some ranks set to None."""
    return AgreementError(
        f"gradients were set to None between backward and step() on some ranks alone, {count} of them on this rank. "
        "Each rank updates its own elements of every parameter, so ranks must set the same gradients to None. To skip "
        "an update, all-reduce the reason, and then call the optimizer's zero_grad() instead of step() on all ranks."
    )


def refused(why: int, *, on_this_rank: bool, is_reproducible: bool) -> RuntimeError:
    """Return the error for gradients that an update refuses.

    Args:
        why: See `UpdateReport.change`.
        on_this_rank: Whether the reason lies on this rank; it may on others.
        is_reproducible: Whether the optimizer has ``reproducible=True``.
    """
    if why != CHANGED:
        return RuntimeError(_SENTENCES[why])
    where = "" if on_this_rank else " on another rank"
    return RuntimeError(f"gradients were changed {(_AFTER_SENT if is_reproducible else _BEFORE_STEP).format(where)}")


def second_pass() -> RuntimeError:
    """Return the error for a second backward pass of one micro-batch."""
    return RuntimeError(_SENTENCES[SECOND_PASS])


def changed_between_passes() -> RuntimeError:
    """Return the error for averages that were changed before another micro-batch."""
    return RuntimeError(
        "gradients were changed between two backward passes of one update. With reproducible=True they are the average "
        "of the micro-batches so far, which the next pass computes again: change them after the last backward pass, "
        "before step()."
    )


NO_FORWARD_PASS = (
    "a backward pass went through no forward pass of an attached module since the backward pass before it. With "
    "reproducible=True every backward pass is a micro-batch: the update divides by their number, and each has random "
    "numbers by its own. Add the losses of a micro-batch, and call backward() once. If forward was another method than "
    "the module, put the calls into `with optimizer.forward_pass():`."
)

_SENTENCES = {
    SECOND_PASS: NO_FORWARD_PASS,
    AFTER_GATHER: (
        "a backward pass began while averages from gather_gradients() were still in param.grad. torch would add to "
        "them, but with reproducible=True the update is the average of its micro-batches: call gather_gradients() "
        "after the last backward pass, and zero_grad() after step()."
    ),
    USED_TWICE: (
        "step() was called twice without a backward pass in between. With reproducible=True on several ranks an update "
        "frees the averages that it has used, and param.grad is only this rank's own gradient. Call gather_gradients() "
        "before the first step() to use them twice."
    ),
}


_AFTER_SENT = (
    "after backward{}. With reproducible=True each backward pass sends its gradients to their owners, and param.grad "
    "is this rank's own, so a norm taken there is not the model's, and the update would not see the change. To clip, "
    "pass max_grad_norm to DistAdamW, or call its clip_grad_norm_ (accelerator.clip_grad_norm_ does, after "
    "dist_adamw.prepare) after the last backward pass. To read or change whole averages, call gather_gradients() first."
)

_BEFORE_STEP = (
    "between backward and step(){}. After attach() each rank has averages only of the elements that it owns, so a norm "
    "taken there is not the model's, and ranks would clip or unscale differently. To clip, pass max_grad_norm to "
    "DistAdamW, or call its clip_grad_norm_ (after dist_adamw.prepare, accelerator.clip_grad_norm_ calls it). After a "
    "change that treats every element alike, call accept_gradients(). To read or change whole averages, call "
    "gather_gradients() first. Or train without attach() (dist_adamw.prepare(..., whole_gradients=True)): DDP's "
    "all-reduce leaves whole averages. GradScaler needs that too."
)

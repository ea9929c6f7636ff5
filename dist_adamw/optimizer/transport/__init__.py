"""Send slices of buckets between ranks. `make_transport` chooses by the backend that serves the parameters' device.

Results are the same on every backend, up to the order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.transport.base import Transport
from dist_adamw.optimizer.transport.collective import CollectiveTransport
from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.optimizer.transport.rollcall import Channel
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport
from dist_adamw.ranks import collectives


def make_transport(
    layout: FlatLayout,
    params: list[Tensor],
    *,
    group: dist.ProcessGroup,
    replicas: dist.ProcessGroup | None = None,
    channel: Channel,
    reduce_dtype: torch.dtype | None = None,
    reproducible: bool = False,
    replaces: Transport | None = None,
) -> Transport:
    """Return a transport for ``group``'s backend for the device of ``params``. Local.

    Args:
        layout: The layout whose buckets are sent.
        params: The parameters, as 1-D views.
        group: The ranks that share the layout.
        replicas: The ranks that own the same slices as this one, over which gradients are averaged too.
        channel: Distinguishes the messages of several optimizers.
        reduce_dtype: See `DistAdamW`.
        reproducible: See `Transport`.
        replaces: The transport of the same layout before parameters moved.
    """
    options: dict[str, Any] = {
        "group": group,
        "replicas": replicas,
        "channel": channel,
        "reduce_dtype": reduce_dtype,
        "reproducible": reproducible,
    }
    if not sends_from_host(group, params[0].device):
        return CollectiveTransport(layout, params, **options)
    return SharedMemoryTransport(layout, params, **options, replaces=replaces)


def sends_from_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether ranks send tensors on ``device`` by messages from the host (gloo). Local."""
    return collectives.backend_of(group, device) == "gloo"

"""Import training states of other libraries into our checkpoints, and export ours.

Needs none of those libraries but torch. Local, in one process.

    kind         format
    torch        ``torch.save({"model": ..., "optimizer": ...})``, with the state dict of ``torch.optim.AdamW`` or the
                 consolidated one of ``ZeroRedundancyOptimizer``; the two also in files of their own
    dcp          a folder of ``torch.distributed.checkpoint``, of FSDP2 and ``get_state_dict``
    universal    a folder of DeepSpeed's ``ds_to_universal``, of any ZeRO stage
    safetensors  weights alone, in one file

Only a few tensors are in memory at a time, except in an export to torch: ``torch.save`` needs all of them at once.
Torch files are memory-mapped when they are read.
"""

"""Training states of other libraries: import them into our checkpoints, and export ours.

Knows the files of others, and imports no library of theirs but torch. Local, in one process.

    kind         what it is
    torch        ``torch.save({"model": ..., "optimizer": ...})``, with the state dict of ``torch.optim.AdamW`` or the
                 consolidated one of ``ZeroRedundancyOptimizer``; the two also in files of their own
    dcp          a folder of ``torch.distributed.checkpoint``, of FSDP2 and ``get_state_dict``
    universal    a folder of DeepSpeed's ``ds_to_universal``, of any ZeRO stage
    safetensors  weights alone, in one file

A few tensors are in memory at a time. Only an export to torch has all of them there at once, since ``torch.save``
takes them so; its files are mapped when they are read.
"""

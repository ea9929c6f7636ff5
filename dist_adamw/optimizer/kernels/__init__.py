"""AdamW kernels, one module per implementation.

They import only torch, and Triton when a kernel is first launched. `foreach` is torch's own AdamW;
`mixed` is the arithmetic for other dtypes in plain torch, for any device; `triton` is one launch
per bucket on a GPU.
"""

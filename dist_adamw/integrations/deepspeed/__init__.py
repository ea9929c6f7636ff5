"""DeepSpeed: its configuration and its ZeRO state."""

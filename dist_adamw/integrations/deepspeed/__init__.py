"""DeepSpeed: configuration and ZeRO state."""

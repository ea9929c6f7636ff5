"""The values of every update, for trackers and logs."""

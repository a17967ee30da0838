"""What a training process holds: calls that log, handles, waits, ends."""

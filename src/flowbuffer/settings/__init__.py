"""What can be set, and what the environment says."""

"""The producer's end of a spool."""

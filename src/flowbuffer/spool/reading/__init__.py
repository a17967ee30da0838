"""The reader's end of a spool."""

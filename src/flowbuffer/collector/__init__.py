"""Who runs delivery, where, and until when."""

"""Where requests go: one file for each kind; foreign errors stop here."""

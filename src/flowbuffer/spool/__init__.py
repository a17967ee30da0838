"""The spool: points on disk between the call that logged them and the backend."""

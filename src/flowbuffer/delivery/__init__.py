"""From slots to requests, by steps: no thread, and nothing of MLflow."""

"""MLflow's tables of metrics, written in bulk. Knows nothing else of flowbuffer, and no client."""

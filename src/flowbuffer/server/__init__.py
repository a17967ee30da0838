"""What MLflow's own server does with a batch of metrics, where FLOWBUFFER_SERVER says so."""

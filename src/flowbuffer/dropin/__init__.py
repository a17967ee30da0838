"""The switch that makes existing MLflow code buffered, and what it replaces in MLflow."""

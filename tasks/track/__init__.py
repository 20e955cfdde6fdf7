"""What is logged to MLflow."""

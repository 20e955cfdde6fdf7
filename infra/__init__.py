"""What runs tame on a machine: servers, deployments, workers."""

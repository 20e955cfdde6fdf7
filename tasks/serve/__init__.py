"""A checkpoint → proof that a program opens it, and computes what transformers computes."""

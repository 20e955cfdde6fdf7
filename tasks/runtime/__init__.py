"""Processes, devices, progress."""

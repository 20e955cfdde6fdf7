"""Artifacts by content, on this machine or shared by several."""

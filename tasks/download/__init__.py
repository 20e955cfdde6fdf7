"""From a source to a snapshot of known content."""

"""From a checkpoint and its card to the Hub or a folder, verified."""

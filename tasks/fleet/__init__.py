"""Many releases on many machines."""

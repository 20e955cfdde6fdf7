"""A model walked through block by block on a text, and codes that are better than the nearest ones."""

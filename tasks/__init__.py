"""The stages; docs/architecture.md has their order and what passes between them."""

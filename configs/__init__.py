"""What can be asked for: the recipe's schema, how a recipe file is read, and the recipes that ship with tame."""

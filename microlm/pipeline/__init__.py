"""What the stages run: the parts above, assembled. Only this package and stages/ know paths."""

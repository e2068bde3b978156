"""What the stages of dvc.yaml run: the rooms above, assembled. Only this room and stages/ know where files lie."""

"""The parts of a run, in order of worth."""

from bench.gpu.parts import matrix, steps
from bench.gpu.setting import Part

PARTS = (
    Part("matrix", "the card's own bfloat16 matrix rate and memory", 10, False, matrix.run),
    Part("steps", "training steps: cross-entropy, cached and live distillation", 140, True, steps.run),
)

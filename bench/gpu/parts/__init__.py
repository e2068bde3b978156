"""The parts of a run, in order of worth. Estimates are guesses for an H100."""

from bench.gpu.parts import capture, head, hellaswag, matrix, muon, plan, run, steps, tests
from bench.gpu.setting import Part

PARTS = (
    Part("tests", "the tests that need a card", 90, False, tests.run),
    Part("matrix", "the card's own bfloat16 matrix rate and memory", 10, False, matrix.run),
    Part("steps", "training steps: cross-entropy, cached and live distillation", 140, True, steps.run),
    Part("head", "head and loss alone, against full logits and others' fused heads", 40, False, head.run),
    Part("muon", "the optimizers' update, and its share of a step", 10, False, muon.run),
    Part("capture", "the teachers' pass, records and files included", 30, True, capture.run),
    Part("hellaswag", "all of HellaSwag at the student's shape", 40, True, hellaswag.run),
    Part("plan", "what microlm plan foretells, beside what was measured", 3, False, plan.run),
    Part("run", "control, continued and two students, with the stages' own code", 110, True, run.run),
)

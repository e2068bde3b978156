"""What every model writes to the same few prompts, for people to read: no figure is taken from it."""

from typing import Any

from microlm.evaluation.candidates import Candidate
from microlm.evaluation.generation import Decoding, Writer

SAMPLES = "samples.json"  # beside the model's results
SAMPLE_TOKENS = 40
PROMPTS = (
    "Lisbon is the capital of",
    "Photosynthesis is the process by which",
    "The planets of the solar system, in order from the Sun, are",
    "Once upon a time, a fox lived at the edge of the forest. One morning",
    "Question: Why does the Moon have phases?\nAnswer: The",
    "The First World War began in",
    "The area of a circle with radius r is",
    "To plant a tree, you first",
)


def samples(candidate: Candidate) -> dict[str, Any]:
    """samples.json: of each prompt what the model writes greedily, how many tokens, and whether it came to an end.

    A penalty of the model's own generation_config is left out, so that all models write by the same rule.
    """
    decoding = Decoding(SAMPLE_TOKENS, do_sample=False, repetition_penalty=1.0)
    written = Writer(candidate).write_each(PROMPTS, decoding)
    told = [
        {"prompt": prompt, "continuation": found.text, "tokens": found.tokens, "ended": found.ended}
        for prompt, found in zip(PROMPTS, written)
    ]
    return {"max_new_tokens": decoding.max_new_tokens, "decoding": "greedy", "samples": told}

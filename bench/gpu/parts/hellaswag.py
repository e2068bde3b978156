"""All of HellaSwag on a student of the measured shape, through the project's own evaluator."""

import time
from collections import Counter

from bench.gpu.device import forget_peak, peak_bytes, synchronize
from bench.gpu.setting import Figures, Setting
from microlm.corpus.tokenizer import load_tokenizer
from microlm.evaluation.results.answers import answers, curve_figures
from microlm.evaluation.scoring.encoding import encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.data import read_rows
from microlm.evaluation.tasks.prompts import questions
from microlm.evaluation.tasks.task import task_named
from microlm.models.student import StudentLM
from microlm.runtime.paths import SHARDS

PROTOCOL = "completion"


def run(setting: Setting) -> Figures:
    yield "all questions", lambda: _measure(setting)


def _measure(setting: Setting) -> dict[str, object]:
    """Twice: the first pass is the one that compiles and allocates. Random weights answer by chance."""
    tokenizer, task = load_tokenizer(SHARDS / "tokenizer"), task_named("hellaswag")
    model = StudentLM(setting.shape(tokenizer.n_vocab)).set_activation_dtype(setting.runtime.dtype).to(setting.device)
    asked = questions(task, PROTOCOL, read_rows(task, None, hub=False))
    began = time.perf_counter()
    encoded = encode(asked, tokenizer, model.context, tokenizer.eot_id, joint=False).questions
    encoding_s = time.perf_counter() - began
    forget_peak(setting.device)
    seconds, used = [], Counter()
    for _ in range(2):
        synchronize(setting.device)
        began = time.perf_counter()
        nats = score(model, encoded, setting.sizes.scoring_tokens, used=used)
        synchronize(setting.device)
        seconds.append(time.perf_counter() - began)
    lengths = [item.lengths for item in encoded]
    found = curve_figures(answers([item.question for item in encoded], nats, lengths, None, PROTOCOL), PROTOCOL)
    return {
        "questions": len(encoded),
        "seconds_first": seconds[0],
        "seconds": seconds[1],
        "encoding_seconds": encoding_s,
        "peak_bytes": peak_bytes(),
        "backends": ", ".join(used),
        "acc_norm": found["acc_norm"],
    }

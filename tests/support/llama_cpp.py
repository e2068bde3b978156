"""What llama.cpp makes of a GGUF file, asked in a process of its own: its ids of texts, its greedy tokens."""

import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

import pytest

from tests.support.clones import ROOT

PACKAGE = "xllamacpp"
NEEDED = pytest.mark.skipif(
    find_spec(PACKAGE) is None, reason=f"llama.cpp is not here: pip install {PACKAGE} (the extra `llama`; 100 MB)"
)


@dataclass(frozen=True)
class Question:
    """`begun`: with what the file says comes before a prompt."""

    gguf: str
    texts: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    tokens: int = 16
    begun: bool = False


def asked(question: Question) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of each text, special spellings read as plain text; the greedy tokens after each prompt."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.llama_cpp"],
        input=json.dumps(asdict(question)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return found["ids"], found["written"]


def _answer(question: Question) -> dict[str, list[list[int]]]:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads = question.gguf, 256, 1, 1
    asked.warmup = asked.fit_params = False
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(asked)

    def post(path: str, content: dict[str, object]) -> dict[str, list[int]]:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)

    told = {"add_special": question.begun, "parse_special": False}
    ids = [post("/tokenize", {"content": text, **told})["tokens"] for text in question.texts]
    greedy = {"n_predict": question.tokens, "samplers": ["top_k"], "top_k": 1, "return_tokens": True}
    written = [post("/completion", {"prompt": prompt, **greedy})["tokens"] for prompt in question.prompts]
    return {"ids": ids, "written": written}


if __name__ == "__main__":
    print("\n" + json.dumps(_answer(Question(**json.load(sys.stdin)))), flush=True)
    os._exit(0)  # its threads do not end by themselves

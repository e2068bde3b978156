"""Whose work is in a model, and under which licence: what ATTRIBUTION.md has, for a model card.

Of text and weights that a person brings nothing is known here, and the card says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.files import sha256_json

SHOWN = 4  # names of local files in a card
UNKNOWN = "not known here"


@dataclass(frozen=True)
class Work:
    """Text or weights of others.

    Attributes:
        name: for a person.
        hub: id on the hub, "" where it is not known to be there.
        licence: as the hub spells it in a card's metadata, "" where it is not known.
        said: the licence for a person, and who is to be credited.
    """

    name: str
    hub: str = ""
    licence: str = ""
    said: str = f"licence {UNKNOWN}"


TEACHERS = {
    "packaged": Work(
        "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "Apache-2.0, by Hugging Face (Allal et al. 2025), in 4 bits",
    ),
    "gemma3-270m": Work(
        "Gemma 3 270M",
        "google/gemma-3-270m",
        "gemma",
        "Gemma Terms of Use (ai.google.dev/gemma/terms), by Google. They count a model that is trained on its outputs "
        "as a derivative: pass the terms and their notice on with it",
    ),
    "allenai/OLMo-1B-hf": Work(
        "OLMo-1B", "allenai/OLMo-1B-hf", "apache-2.0", "Apache-2.0, by the Allen Institute for AI"
    ),
}
PACKAGED_TEXT = (
    Work("10,033 leads of Wikipedia articles", said="CC BY-SA 4.0, by the authors of Wikipedia"),
    Work("passages of BoolQ, from Wikipedia", said="CC BY-SA 3.0, by the authors of Wikipedia"),
)
HUB_TEXT = {
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0 and the terms of Common Crawl, by Hugging Face (Penedo et al. 2024)",
}


def teacher_work(model: str) -> Work:
    """Of `teacher.model`: a packaged one, a folder or a hub id. Of a folder no more than its name is told."""
    if Path(model).is_dir():
        return Work(Path(model).resolve().name)
    return TEACHERS.get(model) or Work(model, model)


def corpus_works(source: Mapping[str, Any]) -> list[Work]:
    """Of the `source` that a manifest of shards names (`corpus.sources.describe`)."""
    if source["source"] == "packaged":
        return list(PACKAGED_TEXT)
    if source["source"] == "hub":
        dataset = source["dataset"]
        subset = f", subset {source['subset']}" if source.get("subset") else ""
        said = HUB_TEXT.get(dataset, Work.said)
        return [Work(f"{dataset}{subset}, revision {source['revision']}", dataset, said=said)]
    names = [Path(name).name for name in source["files"]]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return [Work(f"local files: {', '.join(names[:SHOWN])}{more}, sha256 of their list {sha256_json(source['files'])}")]

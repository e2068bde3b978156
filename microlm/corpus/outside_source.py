"""Where text of another kind than the corpus comes from (`evaluation.outside`), and what of it cannot be meant."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from microlm.errors import ParameterError
from microlm.parameters import CorpusConfig, HubText

if TYPE_CHECKING:
    from microlm.corpus import sources

KEY = "evaluation.outside"
MOST_TOKENS = 2_000_000  # a yardstick, not a corpus: a dataset of the hub is read no further


def as_corpus(wanted: list[str] | HubText, corpus: CorpusConfig) -> CorpusConfig:
    """The text as `sources` reads one: files with the corpus's column, or a dataset with its own."""
    if isinstance(wanted, HubText):
        return replace(corpus, source="hub", paths=None, **vars(wanted))
    return replace(corpus, source="files", paths=wanted)


def refuse_unfit(wanted: Literal["packaged"] | list[str] | HubText | None, corpus: CorpusConfig) -> None:
    """UserError where no file matches, a file lacks the column, or the text is the corpus itself. Asks no network."""
    mend = "name text of another kind, or set it to null"
    read_from = (corpus.source, corpus.dataset, corpus.subset)
    if isinstance(wanted, HubText) and ("hub", wanted.dataset, wanted.subset) == read_from:
        raise ParameterError(f"{KEY}: {wanted.dataset} ({wanted.subset}) is the corpus itself; {mend}")
    if not isinstance(wanted, list):
        return
    from microlm.corpus import sources  # which needs `datasets`, for seconds

    files = {path.resolve(): path for path in sources.matching_files(wanted, KEY)}
    read = sources.matching_files(corpus.paths or []) if corpus.source == "files" else []
    if both := sorted(str(files[path.resolve()]) for path in read if path.resolve() in files):
        raise ParameterError(f"{KEY}: {both[0]} is in the corpus itself; {mend}")
    next(sources.batches(as_corpus(wanted, corpus), keys=keys()))


def keys() -> "sources.Keys":
    """What messages about the text tell a person to mend."""
    from microlm.corpus import sources

    return sources.Keys(KEY, KEY, "corpus.text_column", KEY)

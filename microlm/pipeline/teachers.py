"""The live teacher: loaded, and refused before it runs where it does not speak of this corpus."""

from microlm import hub
from microlm.config import Config
from microlm.errors import UserError
from microlm.language_model import LanguageModel
from microlm.runtime import Runtime
from microlm.teacher.cache import CacheIdentity


def load_fitting_teacher(config: Config, identity: CacheIdentity, runtime: Runtime) -> LanguageModel:
    """The teacher of params.yaml on the runtime's device.

    Raises:
        UserError: its weights are not there, or its vocabulary, context or tokenizer do not fit the corpus.
    """
    try:
        model = hub.load_teacher(config.at.teacher, runtime.dtype)
    except UserError as error:
        if config.objective != "minillm":
            raise
        raise UserError(
            f"{error}. objective: minillm samples from the teacher in every step, which its cache cannot serve"
        ) from None
    refuse_misfit(model, identity, config)
    return model.to(runtime.device)


def refuse_misfit(model: LanguageModel, identity: CacheIdentity, config: Config) -> None:
    """A teacher speaks of the tokens and windows of this corpus, or is refused before it runs."""
    where = f"params.yaml: scales.{config.scale}"
    if model.n_vocab != identity.n_vocab:
        raise UserError(
            f"{where}.teacher.model: {identity.teacher} has {model.n_vocab} tokens, data/shards {identity.n_vocab}; "
            "choose a teacher and a corpus.tokenizer that go together"
        )
    if identity.seq_len > model.context:
        raise UserError(
            f"{where}.batch.seq_len: {identity.seq_len} is more than the teacher's context of {model.context}; lower it"
        )
    if hub.teacher_tokenizer_fingerprint(config.at.teacher) != identity.tokenizer:
        raise UserError(
            f"{where}.teacher.model: {identity.teacher} has another tokenizer than data/shards (corpus.tokenizer: "
            f"{config.at.corpus.tokenizer}); choose a teacher and a corpus.tokenizer that go together"
        )

"""The live teacher: loaded, and refused before it runs where it does not speak of this corpus."""

from microlm import hub
from microlm.config import Config
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.language_model import LanguageModel
from microlm.runtime import Runtime
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.projection import Projection


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
    """A teacher that is asked about the student's tokens speaks of them and of this corpus's windows, or is refused."""
    where = f"params.yaml: scales.{config.scale}"
    mend = "only stage `teacher` reads another tokenizer; choose a teacher and a corpus.tokenizer that go together"
    if model.n_vocab != identity.n_vocab:
        raise UserError(
            f"{where}.teacher.model: {identity.teacher} has {model.n_vocab} tokens, data/shards {identity.n_vocab}; "
            f"{mend}"
        )
    _refuse_long_windows(model, identity, config)
    if hub.teacher_tokenizer(config.at.teacher).fingerprint != identity.tokenizer:
        raise UserError(
            f"{where}.teacher.model: {identity.teacher} has another tokenizer than data/shards (corpus.tokenizer: "
            f"{config.at.corpus.tokenizer}); {mend}"
        )


def load_labelling_teacher(
    config: Config, identity: CacheIdentity, runtime: Runtime, student: Tokenizer
) -> tuple[LanguageModel, Projection | None]:
    """The teacher of params.yaml on the runtime's device, of any tokenizer, with its way to the corpus's.

    Raises:
        UserError: as `hub.load_teacher` and `projection_to`.
    """
    model = hub.load_teacher(config.at.teacher, runtime.dtype)
    projection = projection_to(student, model, identity, config)
    return model.to(runtime.device), projection


def projection_to(
    student: Tokenizer, model: LanguageModel, identity: CacheIdentity, config: Config
) -> Projection | None:
    """From the teacher's tokens to the corpus's, None where they are the same.

    Raises:
        UserError: the teacher's tokenizer is not there, does not go with its head or cannot be run, or its context is
            shorter than the corpus's windows.
    """
    own = hub.teacher_tokenizer(config.at.teacher)
    if own.fingerprint == student.fingerprint:
        refuse_misfit(model, identity, config)
        return None
    _refuse_long_windows(model, identity, config)
    if own.n_vocab > len(model.head_weight):
        raise UserError(
            f"params.yaml: scales.{config.scale}.teacher.model: {identity.teacher} has a tokenizer of {own.n_vocab} "
            f"tokens and a head of {len(model.head_weight)}; choose a teacher whose two go together"
        )
    return Projection(own, student, model.context)


def _refuse_long_windows(model: LanguageModel, identity: CacheIdentity, config: Config) -> None:
    if identity.seq_len > model.context:
        raise UserError(
            f"params.yaml: scales.{config.scale}.batch.seq_len: {identity.seq_len} is more than the teacher's context "
            f"of {model.context}; lower it"
        )

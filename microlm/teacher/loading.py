"""The live teacher: loaded, and refused before it runs where it does not speak of this corpus."""

from dataclasses import replace

from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import ParameterError
from microlm.models.interface import LanguageModel
from microlm.models.teacher_source import TeacherSource
from microlm.runtime.device import Runtime
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.projection import Projection
from microlm.teacher.recorders import Recorder


def load_fitting_teacher(source: TeacherSource, identity: CacheIdentity, runtime: Runtime) -> LanguageModel:
    """The teacher on the runtime's device.

    Raises:
        UserError: its weights are not there, or its vocabulary, context or tokenizer do not fit the corpus.
    """
    model = source.load(runtime.dtype)
    refuse_misfit(model, identity, source)
    return model.to(runtime.device)


def load_recorder(source: TeacherSource, identity: CacheIdentity, runtime: Runtime, student: Tokenizer) -> Recorder:
    """The teacher on the runtime's device, of any tokenizer, with its way to the corpus's, which is `student`.

    Raises:
        UserError: its weights or its tokenizer are not there, the two do not go together or cannot be run, or its
            context is shorter than the corpus's windows.
    """
    model, own, projection = source.load(runtime.dtype), source.tokenizer(), None
    if own.fingerprint == student.fingerprint:
        refuse_misfit(model, identity, source)
    else:
        _refuse_long_windows(model, identity)
        if own.n_vocab > len(model.head_weight):
            raise ParameterError(
                f"teacher.model: {identity.teacher} has a tokenizer of {own.n_vocab} "
                f"tokens and a head of {len(model.head_weight)}; choose a teacher whose two go together"
            )
        projection = Projection(own, student, model.context)
        identity = replace(identity, teacher_tokenizer=own.fingerprint)
    return Recorder(model.to(runtime.device), identity, runtime.compiled, projection)


def refuse_misfit(model: LanguageModel, identity: CacheIdentity, source: TeacherSource) -> None:
    """A teacher that is asked about the student's tokens speaks of them and of this corpus's windows, or is refused."""
    mend = "only stage `teacher` reads another tokenizer; choose a teacher and a corpus.tokenizer that go together"
    if model.n_vocab != identity.n_vocab:
        raise ParameterError(
            f"teacher.model: {identity.teacher} has {model.n_vocab} tokens, data/shards {identity.n_vocab}; {mend}"
        )
    _refuse_long_windows(model, identity)
    if source.tokenizer().fingerprint != identity.tokenizer:
        raise ParameterError(
            f"teacher.model: {identity.teacher} has another tokenizer than data/shards, which "
            f"corpus.tokenizer names; {mend}"
        )


def _refuse_long_windows(model: LanguageModel, identity: CacheIdentity) -> None:
    if identity.seq_len > model.context:
        raise ParameterError(
            f"batch.seq_len: {identity.seq_len} is more than the teacher's context of {model.context}; lower it"
        )

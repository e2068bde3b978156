"""Results on disk: <out>/<model>/<task>.<protocol>.<k>shot.parquet, a row a question, and .json beside it.

The JSON is written last and holds the table's sha256, so that an interrupted write reads as no result. Each result says
what it is of: figures of different protocols, shots, questions or data never stand in one column.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from microlm.errors import UserError
from microlm.evaluation.tasks.task import LEFT_OUT, Benchmark
from microlm.files import atomic_file, refuse_unsealed, sealed, sha256_bytes, write_json
from microlm.schema import parse

FORMAT = "microlm result 1"
NOT_AVAILABLE = "data not available"
AGAIN = "score it again with microlm evaluate"


@dataclass(frozen=True)
class Identity:
    """What was scored, of which model.

    Attributes:
        model: as the person named it.
        model_digest: of the weights; `tokenizer` is its digest too.
        limit: questions in the fixed subset; None is the whole split.
        data_sha256: of the task's file; None, as the next, where it could not be had.
        questions_sha256: of every context, ending, id and label as rendered, the few-shot prefix included.
        dtype: of the weights while scoring.
    """

    model: str
    model_digest: str
    tokenizer: str
    task: str
    protocol: str
    shots: int
    limit: int | None
    data_sha256: str | None
    questions_sha256: str | None
    dtype: str = "float32"

    @property
    def column(self) -> Benchmark:
        return Benchmark(self.task, self.protocol, self.shots, self.limit)

    @property
    def shared(self) -> dict[str, str]:
        """What two results must share to stand in one column, in the words that name it to a person."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            "number of shots": str(self.shots),
            "number of questions": "all" if self.limit is None else str(self.limit),
            "data file": str(self.data_sha256)[:12],
            "wording of the questions or exemplars": str(self.questions_sha256)[:12],
        }


@dataclass(frozen=True)
class Result:
    """Figures and table of one model on one task; or, where it was not asked, why: then `table` is None.

    `data` says where the questions were read (see `Material`). It is no part of the identity: the same rows are the
    same questions, wherever they lie.
    """

    identity: Identity
    metrics: dict[str, Any] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    unavailable: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """What is said in few words of a result without figures."""
        return LEFT_OUT if self.unavailable.startswith(LEFT_OUT) else NOT_AVAILABLE


def model_slug(model: str) -> str:
    """A folder's name for a model's name or path: allenai/OLMo-1B-hf -> allenai--OLMo-1B-hf."""
    return re.sub(r"[^\w.\-]+", "--", model).strip("-.") or "model"


def result_path(out: Path, identity: Identity) -> Path:
    """Where the JSON of a result stands. A subset has its size in its name: it never replaces the full set's result."""
    subset = "" if identity.limit is None else f".{identity.limit}questions"
    return out / model_slug(identity.model) / f"{identity.task}.{identity.protocol}.{identity.shots}shot{subset}.json"


def write_result(out: Path, result: Result) -> Path:
    """Write the table, then the JSON that vouches for it, and return the JSON's path.

    That data is not available today never replaces figures that the same weights got when it was.

    Raises:
        UserError: the place holds another model's result or a file that is not ours.
    """
    path = result_path(out, result.identity)
    require_ours(path, result.identity.model)
    content: dict[str, Any] = {"format": FORMAT, "identity": asdict(result.identity)}
    if result.table is not None:
        table = result.table.to_parquet(index=False)
        with atomic_file(path.with_suffix(".parquet")) as file:
            file.write(table)
        content |= {"data": result.data, "metrics": result.metrics, "table_sha256": sha256_bytes(table)}
    elif (there := _scored(path)) and _weights(there.identity) == _weights(result.identity):
        return path
    else:
        content["unavailable"] = result.unavailable
    write_json(path, sealed(content))
    return path


def _scored(path: Path) -> Result | None:
    """The sound result with figures that is there."""
    try:
        there = read_result(path)
    except UserError:
        return None
    return None if there.table is None else there


def standing(out: Path, identity: Identity) -> Result | None:
    """The sound result of just this identity that is there already: an interrupted run goes on after it."""
    there = _scored(result_path(out, identity))
    return there if there and there.identity == identity else None


def read_result(path: Path) -> Result:
    """Read one result by its JSON.

    Raises:
        UserError: it is absent, damaged, or not a result of ours; one line with the file and the mend.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; make it with microlm evaluate") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {AGAIN}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a result of this microlm evaluate (no `format: {FORMAT}`); move it elsewhere")
    refuse_unsealed(content, path, AGAIN)
    found: list[str] = []
    identity = parse(Identity, content.get("identity"), "identity.", found)
    unavailable, metrics, data = (content.get(key) for key in ("unavailable", "metrics", "data"))
    if found or not (isinstance(unavailable, str) or isinstance(metrics, dict)):
        raise UserError(f"{path} is damaged ({'; '.join(found) or 'it has no metrics'}); {AGAIN}")
    if isinstance(unavailable, str):
        return Result(identity, unavailable=unavailable)
    table = _read_table(path.with_suffix(".parquet"), content.get("table_sha256"))
    return Result(identity, metrics, table, data=data if isinstance(data, dict) else {})


def read_results(folder: Path) -> list[Result]:
    """Every result of one model's folder, in the order of file names.

    Raises:
        UserError: there is none, one is damaged, or they are of weights or tokenizers that have changed in between.
    """
    results = {path: read_result(path) for path in sorted(folder.glob("*shot*.json"))}
    if not results:
        raise UserError(f"{folder} holds no results; name the folder of one model, as microlm evaluate wrote it")
    newest = max(results, key=lambda path: path.stat().st_mtime_ns)
    for path, result in results.items():
        who = result.identity
        if _weights(who) != _weights(results[newest].identity):
            limit = "" if who.limit is None else f" --limit {who.limit}"
            raise UserError(
                f"{path} is of other weights or another tokenizer than {newest}, which is newer; make it again with: "
                f"microlm evaluate {who.model} --tasks {who.task} --protocol {who.protocol} --shots {who.shots}{limit}"
                "; or delete it and the .parquet beside it"
            )
    return list(results.values())


def _weights(identity: Identity) -> tuple[str, str]:
    return identity.model_digest, identity.tokenizer


def same_protocol(results: Sequence[Result]) -> None:
    """Refuse to put together what is not comparable; results whose data was not available are passed over.

    Raises:
        UserError: two differ in task, protocol, shots, subset, data, wording or questions; names both and what differs.
    """
    first, *rest = [result for result in results if result.table is not None] or [None]
    for other in rest:
        a, b = (of.identity.shared for of in (first, other))
        differences = [f"{words}: {a[words]} against {b[words]}" for words in a if a[words] != b[words]]
        if not first.table[["item", "label"]].equals(other.table[["item", "label"]]):
            differences.append("questions: their ids or labels differ")
        if differences:
            names = [f"{of.identity.model} ({result_path(Path(), of.identity).name})" for of in (first, other)]
            raise UserError(
                f"{' and '.join(names)} cannot stand in one column, they differ in {differences[0]}; "
                f"score both with the same microlm evaluate --tasks --protocol --shots --limit"
            )


def require_ours(path: Path, model: str) -> None:
    """UserError where `path` holds another model's result or a file that is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return  # nothing there, or a damaged result that this one mends
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is there and is not a result of microlm evaluate; move it, or name another --out")
    identity = content.get("identity")
    there = identity.get("model") if isinstance(identity, dict) else None
    if there not in (None, model):
        raise UserError(f"{path} holds a result of {there}, not of {model}; name another --out")


def _read_table(path: Path, sha256: Any) -> pd.DataFrame:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is not there, though its .json is; {AGAIN}") from None
    if sha256_bytes(content) != sha256:
        raise UserError(f"{path} is damaged (not the bytes that its .json vouches for); {AGAIN}")
    try:
        return pd.read_parquet(io.BytesIO(content))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {AGAIN}") from None

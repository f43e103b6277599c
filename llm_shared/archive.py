"""setup · unpack(): a .zip or .tar archive into a folder, all of it or nothing."""

import errno
import os
import re
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import PurePosixPath

from llm_shared.resources import replacing

# One part of a name that works on every system: Windows has devices, drives and forbidden characters.
SAFE = re.compile(r"(?i)(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[^/\\:*?\"<>|\x00-\x1f]*[^/\\:*?\"<>|\x00-\x1f. ]")


def check_members(members, folder):
    """Raise a ValueError unless an archive's members, (name, size, is a folder), fit into folder, on every system."""
    files, folders = [], set()
    for name, _, is_folder in members:
        parts = PurePosixPath(unicodedata.normalize("NFC", name).casefold()).parts
        if not all(map(SAFE.fullmatch, parts)):
            raise ValueError(f"{name!r} leads out of the folder, or is no name on every system")
        files += [parts] * (not is_folder)
        folders |= {parts[:i] for i in range(len(parts) + is_folder)}
    if not files or len(set(files)) < len(files) or not folders.isdisjoint(files):
        raise ValueError("it holds no file, or two members of one name, large and small letters aside")
    if (needed := sum(size for _, size, _ in members)) > shutil.disk_usage(folder).free:
        raise ValueError(f"it needs {needed:,} bytes, more than the disk has left")


def unpack(archive, folder):
    """Extract a .zip or .tar archive to a folder that does not exist yet: all of it, or nothing.

    An archive that is damaged, or holds a link or a name that leads out of the folder, is a ValueError.
    """
    if os.path.exists(folder):
        raise FileExistsError(f"{folder} is there already: {archive} was not unpacked")
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    members = [(info.filename, info.file_size, info.is_dir()) for info in file.infolist()]
                    check_members(members, temporary)
                    file.fp.seek(-12 - len(file.comment), os.SEEK_END)  # where their number stands, 0xFFFF for more
                    if int.from_bytes(file.fp.read(2), "little") != min(len(members), 0xFFFF):
                        raise ValueError("its list of members is damaged")
                    file.extractall(temporary)
            else:
                with tarfile.open(archive) as file:
                    check_members([(info.name, info.size, info.isdir()) for info in file.getmembers()], temporary)
                    file.fileobj.seek(file.offset)  # for tarfile a damaged member is the end, but that is made of zeros
                    rest = list(map(any, iter(lambda: file.fileobj.read(tarfile.BLOCKSIZE), b"")))
                    if any(rest) or not rest:
                        raise ValueError("it is damaged or cut short")
                    file.extractall(temporary, filter="data")
    except Exception as error:  # a damaged archive makes its reader stumble over anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # over the disk
        raise ValueError(f"{archive} was not unpacked: {error}".splitlines()[0]) from None

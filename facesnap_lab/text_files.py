"""Read lists that users write as text files."""

from __future__ import annotations

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.storage import Location


def read_utf8(path: Location, title: str, advice: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Args:
        title: what the file is, such as "manifest".
        advice: what to do if it is not UTF-8.

    Raises:
        FaceSnapError: the file cannot be read or is not UTF-8; the message names the line.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise FaceSnapError(f"The {title} {path} cannot be read ({error.strerror}); check its path.") from error
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise FaceSnapError(f"Line {number} of {path} is not UTF-8; {advice}.") from error

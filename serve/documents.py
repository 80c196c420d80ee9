"""Text out of a PDF, for the page's 资料: by pypdf, in a process that can be ended.

    python -m serve.documents < file.pdf     the text on standard output, at most 100,000 characters

A damaged or hostile file may take a reader for ever, or all memory, so none is read in the server.
"""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

from serve.schema import Refused

REPO = Path(__file__).parent.parent
MOST_CHARACTERS = 100_000
MOST_BYTES = 20 * 2**20
SECONDS = 20
MEMORY = 2**30
NO_TEXT = 3


def text_of_pdf(data: bytes) -> str:
    """raises: Refused if the reader is not installed, or the file has no text that it can read"""
    if importlib.util.find_spec("pypdf") is None:
        text = "this server has no reader of PDF: pip install pypdf -c constraints.txt"
        raise Refused(501, text, code="no_reader")
    command = [sys.executable, "-m", "serve.documents"]
    try:
        done = subprocess.run(command, cwd=REPO, input=data, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        reason = f"not done in {SECONDS} s"
    else:
        if not done.returncode:
            return done.stdout.decode("utf-8", "replace")
        is_empty = done.returncode == NO_TEXT
        reason = "it holds images alone" if is_empty else "damaged or locked"
    text = f"no text can be read from this PDF: {reason}"
    raise Refused(400, text, code="unreadable")


def main() -> int:
    import logging

    import pypdf

    logging.disable()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    reader = pypdf.PdfReader(io.BytesIO(sys.stdin.buffer.read()))
    parts, size = [], 0
    for page in reader.pages:
        parts.append(page.extract_text().strip())
        size += len(parts[-1])
        if size > MOST_CHARACTERS:
            break
    text = "\n".join(filter(None, parts))[:MOST_CHARACTERS]
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    return 0 if text else NO_TEXT


if __name__ == "__main__":
    sys.exit(main())

"""Text out of a PDF, for the page's 资料: by pypdf, in a process that can be ended.

    python -m serve.documents < file.pdf     the text on standard output, at most 100,000 characters

A damaged or hostile file may take a reader for ever, or all memory, so none is read in the server.
"""

import asyncio
import importlib.util
import io
import sys
from pathlib import Path

from serve.schema import Refused

REPO = Path(__file__).parent.parent
MOST_CHARACTERS = 100_000
MOST_BYTES = 20 * 2**20
SECONDS = 20
MEMORY = 2**30
NO_TEXT = 3


async def text_of_pdf(data: bytes) -> str:
    """raises: Refused if the reader is not installed, or the file has no text that it can read"""
    if importlib.util.find_spec("pypdf") is None:
        text = "this server has no reader of PDF: pip install pypdf -c constraints.txt"
        raise Refused(501, text, code="no_reader")
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serve.documents", cwd=REPO, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            out, _ = await child.communicate(data)
    except TimeoutError:
        raise _unreadable(f"not done in {SECONDS} s") from None
    finally:
        if child.returncode is None:
            child.kill()
    if child.returncode:
        reason = "it holds images alone" if child.returncode == NO_TEXT else "damaged or locked"
        raise _unreadable(reason)
    return out.decode("utf-8", "replace")


def _unreadable(reason: str) -> Refused:
    return Refused(400, f"no text can be read from this PDF: {reason}", code="unreadable")


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

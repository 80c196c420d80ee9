"""The command line of every script: frozen dataclasses in, one clear line out when it fails.

`parse` reads YAML files and flags into a dataclass with jsonargparse; later settings win, unknown
names and wrong types stop the run before anything is loaded. `run` turns the user's mistakes into
one line and exit code 2, `stop_requests` hears Ctrl-C without ending at once. Exit codes: 0 done,
2 bad input or config, 3 stopped on numbers, 75 stopped on request with everything saved.

Also how files are written: `atomic_write` and `atomic_dir` put a file or a directory in its place
whole or not at all; and how YAML that others wrote is read.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_origin

import filelock
import yaml
from docstring_parser import parse as docstring
from jsonargparse import ArgumentParser, Namespace

from babyllama import brought_by
from babyllama.errors import CheckpointError, ConfigError, DataError, nearest
from babyllama.language import LANGUAGES, Help, catalogue, speak


class Settings(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=Settings)
Said = TypeVar("Said")

REPO = Path(__file__).resolve().parent.parent

BAD_INPUT = 2
BAD_NUMBERS = 3
STOPPED = 75
INTERRUPTED = 130  # as shells say it of a program that Ctrl-C has ended at once
UNHEARD = 141  # … and of one whose output nobody reads any more


def from_repo(path: Path | str) -> Path:
    """A path as the user meant it: from the working directory if it is there, else from the
    repository's root. Scripts so find their files wherever they are started."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else REPO / path


def shown(path: Path | str) -> str:
    """A path as the user would type it: from the repository's root where it lies inside."""
    path = Path(path)
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


# What a file system answers that has no such call (SMB, 9p, some FUSE mounts).
NOT_OFFERED = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


def flush(path: Path) -> None:
    """Make sure that a file or a directory has reached the disk, as far as the disk offers it."""
    is_directory = path.is_dir()
    if is_directory and os.name == "nt":
        return  # Windows has no handle on a directory to flush
    with _where_offered(*((errno.EACCES, errno.EISDIR) if is_directory else ())):
        handle = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _where_offered(*more: int) -> Iterator[None]:
    """Pass over a call that the file system does not offer."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*NOT_OFFERED, *more):
            raise


@contextlib.contextmanager
def atomic_write(path: Path, unique: bool = False) -> Iterator[Path]:
    """A temporary path; the file written there takes the place of `path` if the block succeeds.

    unique: several processes may be at it
    """
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}" if unique else f"tmp-{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """An empty directory; with all that is put there it takes the place of `path` if the block
    succeeds. Killed between the two renames, it leaves the old one where `recover_dir` finds it.
    Its files get the rights that umask says, though their writer gave them fewer."""
    fresh, old = (path.with_name(f"{mark}-{path.name}") for mark in ("tmp", "old"))
    remove(fresh)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        rights = fresh.stat().st_mode & 0o666
        for inside in (*filter(Path.is_file, fresh.rglob("*")), fresh):
            if inside.is_file() and inside.stat().st_mode & 0o666 != rights:
                with _where_offered(errno.EPERM, errno.EACCES):
                    inside.chmod(rights)
            flush(inside)
        recover_dir(path)
        if os.path.lexists(path):
            os.replace(path, old)
        os.replace(fresh, path)
        flush(path.parent)
    finally:
        recover_dir(path)
        remove(fresh)


def recover_dir(path: Path) -> None:
    """Put back, or clear away, what a killed `atomic_dir` has left of an old directory."""
    old = path.with_name(f"old-{path.name}")
    if os.path.lexists(old) and not os.path.lexists(path):
        os.replace(old, path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if it is there and as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def lock(directory: Path, advice: str = "take another --name") -> Iterator[None]:
    """Hold a directory for as long as the block runs; the system ends it with this process.

    advice: what to do instead of waiting
    raises: ConfigError that names the holder if it is held already
    """
    holder = directory / "lock.txt"
    held = filelock.FileLock(directory / "lock", timeout=0)
    try:
        try:
            held.acquire()
        except OSError as error:  # Timeout is one, too
            if error.errno not in NOT_OFFERED:
                raise
            held = filelock.SoftFileLock(directory / "lock.held", timeout=0)
            held.acquire()
    except filelock.Timeout:
        who = holder.read_text("utf-8", "replace").strip() if holder.is_file() else "by another one"
        raise ConfigError(
            f"{shown(directory)} is in use ({who}); wait for that run to end, stop it, or {advice}"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
        holder.write_text(who, "utf-8", "replace")
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def require_writable(path: Path) -> None:
    """Refuse an output before the work is done that it is for.

    raises: ConfigError or OSError if no file can be written there
    """
    if path.is_dir():
        raise ConfigError(f"{shown(path)} is a directory; wanted the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f"tmp-{path.name}")
    probe.write_bytes(b"")
    probe.unlink()


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few lines of which can take all memory."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}), which is not read here")
        return super().compose_node(parent, index)


_PlainLoader.add_constructor(  # a name that looks like a date is a name
    "tag:yaml.org,2002:timestamp", _PlainLoader.construct_yaml_str
)


def read_yaml(path: Path) -> Any:
    """Contents of a YAML file of a run or a checkpoint; its origin need not be trusted.

    raises: ValueError with the reason in one line; OSError
    """
    try:
        return yaml.load(path.read_text("utf-8"), _PlainLoader)
    # ValueError, AttributeError: numbers of too many digits, tags that do not fit what follows.
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(" ".join(f"{type(error).__name__} {error}".split())) from None


def similar(path: Path) -> str:
    """Addition to a message about a missing file: the one beside it that was probably meant."""
    there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, there)


def parse(
    config_class: type[Config],
    doc: str,
    argv: Sequence[str] | None = None,
    default_config: Path | None = None,
    positional: Sequence[str] = (),
) -> Config:
    """Read the command line into `config_class`.

    doc: the script's docstring, shown by --help
    default_config: the YAML that is read when the user names none with --config
    positional: optional leading arguments, names of fields of `config_class`; one whose field is
        a tuple takes all words before the first flag

    A flag for yes may stand alone (--dry-run), and "-" may stand for "_" in names of flags.
    """
    argv = speak(sys.argv[1:] if argv is None else argv)
    doc = found.paragraphs(doc) if (found := catalogue()) else doc
    parser = Parser(description=doc, formatter_class=Help)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the settings below; later wins; "
        "a config inside it (model: ../model/43m.yaml) is named from where the file lies",
    )
    about = "language of messages, if not that of the environment"
    parser.add_argument("--lang", choices=LANGUAGES, default=SUPPRESS, help=about)
    hints = config_class.__dataclass_fields__
    explained = {p.arg_name: p.description for p in docstring(config_class.__doc__).params}
    for name in positional:
        field = hints[name]
        parser.add_argument(
            name, nargs="?", type=field.type, default=field.default, help=explained[name]
        )
    parser.add_class_arguments(config_class, skip=set(positional))
    kinds = {each.dest: getattr(each, "_typehint", each.type) for each in parser._actions}
    argv = _spelled(argv, kinds, positional)
    if default_config and not any(word.startswith("--config") for word in argv):
        argv = [f"--config={from_repo(default_config)}", *argv]
    read: Namespace | None = None
    try:
        read = parser.parse_args(argv)
        for name, hint in hints.items():
            if is_dataclass(hint.type) and not isinstance(read[name], Namespace):
                raise ConfigError(f"{name}: wanted settings (key: value), found {read[name]!r}")
        made = parser.instantiate(read)
        return config_class(**{name: made[name] for name in hints})
    except UnicodeDecodeError as error:
        parser.error(f"a config file is not UTF-8 text ({error}); save it as UTF-8")
    # YAML raises these for numbers of too many digits, tags that do not fit, depth.
    except (ValueError, AttributeError, RecursionError) as error:
        # Where settings may be null, jsonargparse puts its own words round ours.
        ours = error if isinstance(error, ConfigError) else error.__cause__
        if isinstance(ours, ConfigError):
            parser.error(str(ours))
        if read is not None:
            raise
        parser.error(f"a config file cannot be read: {type(error).__name__} {error}")


def _spelled(argv: Sequence[str], kinds: dict, positional: Sequence[str]) -> list[str]:
    """The words as jsonargparse wants them: names with "_", flags with values, lists as JSON,
    configs where they are; a flag for a list of words may come several times.

    kinds: the types of all settings by their dotted names
    """
    lists: dict[str, list[str]] = {}
    if positional and get_origin(kinds[positional[0]]) is tuple:
        n_words = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
        argv = [*([json.dumps(argv[:n_words])] if n_words else []), *argv[n_words:]]
    spelled = []
    words = iter(zip(argv, [*argv[1:], "--"], strict=False))
    for word, following in words:
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or following != "--"):
            word = f"--config={from_repo(value if equals else next(words)[0])}"
        elif name.startswith("--"):
            field = name[2:].replace("-", "_")
            field += "_" if f"{field}_" in kinds else ""  # --from: a keyword of Python
            if kinds.get(field) == tuple[str, ...]:
                lists.setdefault(field, []).append(value if equals else next(words, ("",))[0])
                continue
            if kinds.get(field) is bool and not equals and following.lower() not in YES_OR_NO:
                equals, value = "=", "true"
            word = f"--{field}{equals}{value}" if field in kinds else word
        spelled.append(word)
    for field, given in lists.items():
        spelled += [f"--{field}", given[-1] if given[-1].startswith("[") else json.dumps(given)]
    return spelled


YES_OR_NO = ("true", "false", "yes", "no")


class Parser(ArgumentParser):
    """A parser whose complaint is one line, not a screen of usage above it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        reason = " ".join(message.split()) if message else str(ex)
        reason = self._plainly(reason)
        print(f"error: {reason}; --help explains every setting", file=sys.stderr)
        sys.exit(BAD_INPUT)

    def _plainly(self, reason: str) -> str:
        """jsonargparse's words in ours, with the flag, value or file that was probably meant."""
        if found := re.match(r"unrecognized arguments: (\S+)", reason):
            flag = found[1].partition("=")[0]
            return f"no such setting: {flag}{nearest(flag, self._option_string_actions)}"
        if found := re.match(r'Parser key "(\S+)": .*Literal\[(.+?)\].*Got value: (.*)', reason):
            name, known, value = found[1], found[2].replace("'", "").split(", "), found[3]
            return f"{name}: wanted one of {', '.join(known)}, found {value}{nearest(value, known)}"
        if (
            found := re.match(r"Parser key \"(\S+)\": (?:File does|Unable)[^']+'(.+?)'", reason)
        ) and not from_repo(found[2]).exists():
            path = Path(found[2])
            return f"--{found[1]}: no such file {shown(path)}{similar(path)}"
        return reason


def to_yaml(config: Settings) -> str:
    """A resolved config as YAML that `--config` reads back."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """A config, or a part of one, as dicts, lists and strings."""

    def known(part: Any) -> Any:
        return asdict(part) if hasattr(part, "__dataclass_fields__") else shown(part)

    return json.loads(json.dumps(value, default=known))


def run(main: Callable[..., int | None], *args: object) -> None:
    """Call `main` and leave with its exit code; the user's mistakes become one line, code 2."""
    speak(sys.argv[1:])
    try:
        code = main(*args)
        sys.stdout.flush()
    except (ConfigError, DataError, CheckpointError) as error:
        code = _complain(f"error: {error}", BAD_INPUT)
    except ModuleNotFoundError as error:
        if not (wanted := brought_by(error.name or "")):
            raise
        code = _complain(f"error: the package {error.name} is not installed; pip install -r "
                         f"{wanted} -c constraints.txt", BAD_INPUT)  # fmt: skip
    except KeyboardInterrupt:
        code = _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output, `head` perhaps, has seen enough; what was asked for may not be
        # there, so this is no success.
        silence()
        code = UNHEARD
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every script loads
            raise
        said = ". ".join(str(error).split(". ")[:3])
        code = _complain(
            f"error: the card's memory is too small: {said}; take fewer sequences at a time "
            f"(--train.micro_batch_size), --train.recompute true, or --device cpu",
            BAD_INPUT,
        )
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        is_denied = error.errno in (errno.EACCES, errno.EPERM)
        remedy = "get the right to do so" if is_denied else "free some space"
        code = _complain(
            f"error: the system refused to read or write{where}: {error.strerror or error}; "
            f"{remedy} or choose another place, then start the same command again",
            BAD_INPUT,
        )
    sys.exit(code or 0)


def _complain(text: str, code: int) -> int:
    """Say why a script ends; returns its exit code."""
    aloud(lambda: print(text, file=sys.stderr, flush=True))
    return code


def aloud(speak: Callable[[], Said]) -> Said | None:
    """Say something, if anybody listens: pipes lose their readers, terminals are closed."""
    try:
        return speak()
    except OSError:
        silence()
        return None


def silence() -> None:
    """Send all further output nowhere: nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it has no file, or no longer
            os.dup2(nowhere, stream.fileno())


@contextlib.contextmanager
def stop_requests(act: Callable[[int], object] | None = None) -> Iterator[list[int]]:
    """A list that is not empty once a signal to stop has arrived: Ctrl-C, SIGTERM, or that the
    terminal is closed, unless nohup says no.

    act: gets each signal; without it the second Ctrl-C or SIGTERM ends at once (a terminal that
        closes may say so twice)
    """
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if act is not None:
            act(number)
        elif asked and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        asked.append(number)

    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    kinds = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        kinds.append(hangup)
    before = [signal.signal(kind, ask) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)

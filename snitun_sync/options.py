"""The programs' options: from the command line, the environment or a file, in this order.

    --log-level debug            the command line
    SNITUN_LOG_LEVEL=debug       the environment
    log-level = debug            the INI file of --config or $SNITUN_CONFIG, in [client],
                                 [server] or [master]; keys are the options' names with `-`

What is empty in the environment or in the file isn't set. An option that can be repeated has
its values separated by white space in the environment, one a line in the file; what comes
first in the order above replaces the others.
"""

from __future__ import annotations

import argparse
import os
import re

from . import __version__
from .errors import ConfigurationError, UsageError
from .logs import LOG_FORMATS, LOG_LEVELS, log, masked, set_up_logging
from .program import EXIT_USAGE, hide_argument, read_text, take_environment
from .protocol.aes import BACKENDS
from .protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Any, NoReturn

    from .net.service import Service

# The options of all programs, by the section of the file: each knows the others' names, so
# that one file, and one environment, serve all. A test compares.
COMMON = ("crypto", "log-format", "log-level")
SERVICE = ("admin", "admin-token-file", "budget", "channel-idle", "congestion-control", "grace")
SECTIONS = {
    "client": (
        *COMMON,
        *SERVICE,
        *("aes-iv-file", "aes-key-file", "cipher", "endpoint", "exit-on-refusal", "json"),
        *("keepalive", "max-channels", "max-new-channels", "once", "probe", "probe-address"),
        *("protocol-version", "proxy", "proxy-password-file", "reconnect-spread", "server"),
        *("token", "token-file", "watch"),
    ),
    "server": (*COMMON, *SERVICE, "fernet-key-file", "json", "listen", "peer-listen", "watch"),
    "master": (
        *COMMON,
        *("alias", "cipher", "fernet-key-file", "hostname", "json", "protocol-version", "server"),
        *("single-use", "valid-for"),
    ),
}
ENVIRONMENT = "SNITUN_"
SOURCES = """\
Each option can also stand in the environment (--log-level is $SNITUN_LOG_LEVEL), or in the
INI file of --config, as `log-level = debug` in [client], [server] or [master]. The command
line goes before the environment, and that before the file."""
GRACE_S = 10.0
CHANNEL_IDLE_S = 3600.0  # as net/tuning.py has it, which not all programs have
CONFIG = "config"
CHECK = "check"  # on the command line only
_FLAGS = {
    **dict.fromkeys(("yes", "true", "on", "1"), True),
    **dict.fromkeys(("no", "false", "off", "0"), False),
}

# Where a setting comes from: whatever is less goes before the others.
COMMAND_LINE, FROM_ENVIRONMENT, FILE, DEFAULT = range(4)

UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
UNITS_BYTES = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


class Setting:
    """Where the value of an option comes from; `name` is how a message calls it."""

    __slots__ = ("is_secret", "key", "name", "rank")

    def __init__(self, key: str, rank: int, name: str, *, is_secret: bool) -> None:
        self.key, self.rank, self.name, self.is_secret = key, rank, name, is_secret


class Options(argparse.Namespace):
    """The options of a program, one attribute each; `source` tells where one comes from.

    In a `with` statement, an error that begins with the name of an option (`--endpoint: …`)
    leaves it with the name of the place that the value comes from.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, Setting] = {}  # by attribute
        self._warnings: list[str] = []  # until there is a log
        self._taken: dict[str, str] = {}  # secrets that were in the environment

    def source(self, attribute: str) -> str:
        """Return `--endpoint`, `$SNITUN_ENDPOINT` or `/etc/snitun.ini: [client] endpoint`."""
        return self._settings[attribute].name

    def rank(self, attribute: str) -> int:
        """Return COMMAND_LINE, FROM_ENVIRONMENT, FILE or DEFAULT."""
        return self._settings[attribute].rank

    def lines(self) -> Iterator[str]:
        """Yield `name = value   (source)` for all settings, without secrets."""
        for attribute, setting in self._settings.items():
            value = getattr(self, attribute)
            text = "[secret]" if value and setting.is_secret else masked(_text(value))
            places = {COMMAND_LINE: "command line", DEFAULT: "default"}
            line = f"{setting.key} = {text}".rstrip()
            yield f"{line}   ({places.get(setting.rank, setting.name)})"

    def renamed(self, error: ConfigurationError) -> ConfigurationError:
        """Return the error with the real source of the option that its text begins with."""
        option, colon, rest = str(error).partition(": ")
        setting = self._settings.get(option[2:].replace("-", "_"))
        if not colon or setting is None or option != f"--{setting.key}":
            return error
        kind = type(error)
        if kind is UsageError and setting.rank == FILE:
            kind = ConfigurationError
        return kind(f"{setting.name}: {rest}")

    def __enter__(self) -> Options:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ConfigurationError):
            raise self.renamed(error) from None


class Parser(argparse.ArgumentParser):
    """argparse with the other sources, the exit code of sysexits.h, and no secrets in messages.

    `add_argument` takes `is_secret=True`: the value is removed from the environment and
    overwritten on the command line. That, and `required`, not in a group. No help text
    may have `%(default)s`.
    """

    def __init__(self, prog: str, *, description: str, epilog: str = "", **options: Any) -> None:
        """`options` are what argparse passes on to the parser of a sub-command."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=_help,
            allow_abbrev=False,
            **options,
        )
        self._section = prog.partition(" ")[0].rpartition("-")[2]
        self._secrets: set[str] = set()  # attributes
        self._required: list[argparse.Action] = []
        self._is_converting = self._is_again = False
        if not epilog:
            return  # a sub-command
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def add_argument(
        self, *names: str, is_secret: bool = False, required: bool = False, **options: Any
    ) -> argparse.Action:
        """Add an option; see argparse."""
        action = super().add_argument(*names, **options)
        if is_secret:
            self._secrets.add(action.dest)
        if required:
            self._required.append(action)
        return action

    def error(self, message: str) -> NoReturn:
        if self._is_converting:
            raise UsageError(message.partition(": ")[2])  # "argument --name: …"
        if self._is_again:
            raise UsageError(masked(message))
        self.exit(EXIT_USAGE, f"{self.prog}: {masked(message)}; see {self.prog} --help\n")

    def hide(self, action: argparse.Action) -> None:
        """The option of a group holds a secret, as by `is_secret`."""
        self._secrets.add(action.dest)

    def add_service(self, *, budget_bytes: int) -> argparse._ArgumentGroup:
        """Add the options of programs that have tunnels; return the group of limits."""
        limits = self.add_argument_group("limits")
        limits.add_argument(
            "--budget",
            metavar="SIZE",
            type=size_bytes,
            default=budget_bytes,
            help="how much may be held for slow devices and services, like 8M (default: "
            f"{budget_bytes // UNITS_BYTES['M']}M)",
        )
        limits.add_argument(
            "--channel-idle",
            metavar="TIME",
            type=duration_s,
            default=CHANNEL_IDLE_S,
            help="close a connection on which nothing moves for so long (default: 1h)",
        )
        life = self.add_argument_group("running")
        life.add_argument(
            "--admin",
            metavar="ADDRESS",
            default="",
            help="answer questions (/ready, /status, /metrics) at HOST:PORT or unix:/PATH",
        )
        life.add_argument(
            "--admin-token-file",
            metavar="FILE",
            help="who asks must know what is in there: Authorization: Bearer …",
        )
        life.add_argument(
            "--grace",
            metavar="TIME",
            type=duration_s,
            default=GRACE_S,
            help="how long open connections may go on after SIGTERM (default: 10s)",
        )
        life.add_argument(
            "--congestion-control",
            metavar="NAME",
            default="",
            help="how the kernel paces what is sent, such as bbr: small exchanges wait less behind "
            "large ones on a slow line (default: the system's)",
        )
        life.add_argument(
            f"--{CHECK}",
            action="store_true",
            help="check all settings and files, print the settings, and exit",
        )
        return limits

    def add_common(self) -> None:
        """Add the options that all programs have."""
        self.add_argument(
            f"--{CONFIG}", metavar="FILE", help=f"an INI file with options in [{self._section}]"
        )
        self.add_argument(
            "--crypto",
            metavar="PACKAGE",
            type=_crypto,
            default="",
            help="pycryptodome (default) or cryptography",
        )
        self.add_argument(
            "--log-format",
            default="text",
            choices=LOG_FORMATS,
            metavar="FORMAT",
            help="text (default) or json, an object a line",
        )
        self.add_argument(
            "--log-level",
            default="info",
            choices=LOG_LEVELS,
            metavar="LEVEL",
            help=f"{', '.join(LOG_LEVELS)} (default: info); debug has a line for each connection",
        )

    def read(self, arguments: Sequence[str], former: Options | None = None) -> Options:
        """Return the options from all sources; the log is set up then.

        `former` are those that were read when the program started, if it reads them again.
        Raises ConfigurationError, and ends the process where an argument is wrong at its start.
        """
        options = Options()
        if former is not None:
            options._taken, self._is_again = former._taken, True
        options = self.parse_args(arguments, options)
        if former is None:
            set_up_logging(options.log_level, options.log_format)
        for warning in options._warnings:
            log.warning("%s", warning)
        return options

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Options | None = None
    ) -> tuple[Options, list[str]]:
        """Also for the parser of a sub-command, by argparse itself."""
        options = Options() if namespace is None else namespace
        actions = [
            action
            for action in self._actions
            if action.option_strings and action.default != argparse.SUPPRESS  # --help, --version
        ]
        # None stays where the command line says nothing: no default takes its place.
        vars(options).update((action.dest, None) for action in actions)
        rest: list[str]
        options, rest = super().parse_known_args(args, options)
        if not rest:
            self._read_all(actions, options)
        return options, rest

    # --- the other sources -----------------------------------------------------------

    def _read_all(self, actions: list[argparse.Action], options: Options) -> None:
        """Set what the command line hasn't set."""
        # First of all, as long as nothing can fail.
        variables = {_key(action): self._variable(action, options) for action in actions}
        file: dict[str, str] = {}
        path = ""
        if CONFIG in variables:
            path = options.config or variables[CONFIG]
            source = f"--{CONFIG}" if options.config else f"${_variable_name(CONFIG)}"
            options._warnings += _unknown_variables()
            if path:
                file = self._read_file(path, source, options)
        for action in actions:
            key, flag = _key(action), f"--{_key(action)}"
            value = getattr(options, action.dest)
            place, rank = flag, COMMAND_LINE
            if value is None and (text := variables[key]):
                place, rank = f"${_variable_name(key)}", FROM_ENVIRONMENT
                value = self._convert(action, text, text.split(), place, UsageError)
            if value is None and (text := file.get(key, "").strip()):
                place, rank = f"{path}: [{self._section}] {key}", FILE
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                value = self._convert(action, text, lines, place, ConfigurationError)
            if value is None:
                place, rank, value = flag, DEFAULT, action.default
                if value and isinstance(value, str) and action.type is not None:
                    value = self._convert(action, value, [], place, UsageError)
            setattr(options, action.dest, value)
            if key not in (CONFIG, CHECK):
                is_secret = action.dest in self._secrets
                options._settings[action.dest] = Setting(key, rank, place, is_secret=is_secret)
        missing = [f"--{_key(a)}" for a in self._required if getattr(options, a.dest) is None]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")

    def _variable(self, action: argparse.Action, options: Options) -> str:
        """Return the text of the environment, "" for none; hide a secret, wherever it is."""
        name = _variable_name(_key(action))
        if action.dest not in self._secrets:
            return os.environ.get(name, "") if action.dest != CHECK else ""
        value = getattr(options, action.dest)
        if value is not None and value != "-":
            hide_argument(value)
        if text := take_environment(name):
            options._taken[name] = text
        return options._taken.get(name, "")

    def _convert(
        self,
        action: argparse.Action,
        text: str,
        parts: list[str],
        place: str,
        kind: type[ConfigurationError],
    ) -> Any:
        """Return what `text`, or its `parts` for a list, means to argparse."""
        name = action.option_strings[-1]
        if action.nargs == 0:
            value = _FLAGS.get(text.lower())
            if value is None:
                raise kind(f"{place}: {shown(text)}; expected yes or no")
            return value
        is_list = isinstance(action, argparse._AppendAction)
        # Of all defaults, only the one that is asked for goes through its type.
        blank = argparse.Namespace(**{other.dest: None for other in self._actions})
        arguments = [f"{name}={part}" for part in (parts if is_list else [text])]
        self._is_converting = True
        try:
            namespace = super().parse_known_args(arguments, blank)[0]
        except UsageError as error:
            raise kind(f"{place}: {error}") from None
        finally:
            self._is_converting = False
        return getattr(namespace, action.dest)

    def _read_file(self, path: str, source: str, options: Options) -> dict[str, str]:
        """Return this program's section of an INI file. Raises ConfigurationError."""
        import configparser  # noqa: PLC0415

        text = read_text(path, source, is_secret=False)
        file = configparser.RawConfigParser(delimiters=("=",), default_section="")
        file.optionxform = str  # type: ignore[assignment,method-assign]
        try:
            file.read_string(text)
        except configparser.Error as error:
            raise ConfigurationError(f"{path}: {_what_is_wrong(error)}") from None
        for section in file.sections():
            if section not in SECTIONS:
                raise ConfigurationError(
                    f"{path}: [{_shown_name(section)}]: no such section"
                    + _nearest(section, SECTIONS)
                )
            for key in file.options(section):
                if key not in SECTIONS[section]:
                    raise ConfigurationError(
                        f"{path}: [{section}] {_shown_name(key)}: no such option"
                        + _nearest(key, SECTIONS[section])
                    )
        if not file.has_section(self._section):
            return {}
        settings = dict(file.items(self._section))
        for attribute in self._secrets:
            key = attribute.replace("_", "-")
            value = settings.get(key)
            # A proxy's URL is a secret only where it has a password.
            if value and (key != "proxy" or "@" in value) and _is_public(path):
                options._warnings.append(
                    f"{path}: [{self._section}] {key} can be read by everybody: chmod 600 it"
                )
        return settings


def check_service(program: str, options: Options, make: Callable[[], Service]) -> None:
    """Make a service and free it again; print the settings. Raises what `make` raises."""
    make().stop()
    print(f"{program}: the configuration is right")
    for line in options.lines():
        print(line)


# --- types of options ----------------------------------------------------------------


def duration_s(text: str) -> float:
    """Return the seconds of "90s", "5m", "1h", "2d", "1w" or "0.5"; a type for argparse."""
    match = re.fullmatch(r"([0-9]{1,10}(?:\.[0-9]{1,9})?)([smhdw]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}; expected seconds, or a number and one of s, m, h, d, w"
        )
    return float(match[1]) * UNITS_S[match[2]]


def size_bytes(text: str) -> int:
    """Return the bytes of "64K", "8M", "1G" (of 1,024) or "4096"; a type for argparse."""
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}; expected bytes, or a whole number and one of K, M, G"
        )
    return int(match[1]) * UNITS_BYTES[match[2]]


def _crypto(text: str) -> str:
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"{shown(text)}; expected {' or '.join(BACKENDS)}")
    return text


# --- texts -----------------------------------------------------------------------------


def _help(prog: str) -> argparse.HelpFormatter:
    """Format for the terminal's width; argparse would import shutil (0.7 MiB) to learn it."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size().columns or 80
    except (OSError, ValueError):
        columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=columns - 2)


def _key(action: argparse.Action) -> str:
    return action.option_strings[-1][2:]


def _variable_name(key: str) -> str:
    return ENVIRONMENT + key.upper().replace("-", "_")


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return " ".join(value) if isinstance(value, (list, tuple)) else str(value)


def _what_is_wrong(error: Any) -> str:
    """Return what configparser has found, without the line itself: it may be a secret."""
    section, option = getattr(error, "section", ""), getattr(error, "option", "")
    if section:
        name = f"[{_shown_name(section)}]" + (f" {_shown_name(option)}" if option else "")
        return f"{name}: it is there twice, again in line {error.lineno}"
    line = getattr(error, "lineno", None) or error.errors[0][0]
    return f"line {line}: expected [client], [server] or [master], or NAME = VALUE below one"


def _unknown_variables() -> list[str]:
    """Return a warning for each SNITUN_ variable that no program takes: it has no effect."""
    names = [name for name in os.environ if name.startswith(ENVIRONMENT)]
    if not names:
        return []
    known = {_variable_name(key) for keys in SECTIONS.values() for key in (*keys, CONFIG)}
    return [
        f"${_shown_name(name)}: no such setting{_nearest(name, known, ENVIRONMENT)}"
        for name in sorted(set(names) - known)
    ]


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message: which of the known names, all with `prefix`, may be meant."""
    from difflib import get_close_matches  # noqa: PLC0415

    size = len(prefix)
    found = get_close_matches(name[size:].lower(), [text[size:].lower() for text in known], 1)
    if found:
        is_variable = bool(prefix)
        nearest = prefix + (found[0].upper() if is_variable else found[0])
        return f"; did you mean {'$' * is_variable}{nearest}?"
    return "" if prefix else f"; expected one of {', '.join(sorted(known))}"


def _shown_name(name: str) -> str:
    """Return a name that somebody has made up, without quotes where it is short."""
    text = shown(name)
    return text[1:-1] if text.startswith(("'", '"')) else text


def _is_public(path: str) -> bool:
    try:
        return path != "-" and bool(os.stat(path).st_mode & 0o004)
    except OSError:
        return False

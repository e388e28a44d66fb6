"""The programs' options: from the command line, the environment or a file, in this order.

    --log-level debug            the command line
    SNITUN_LOG_LEVEL=debug       the environment
    log-level = debug            the INI file of --config or $SNITUN_CONFIG, in [client],
                                 [server] or [master]; keys are the options' names with `-`

What is empty in the environment or in the file isn't set. An option that can be repeated has
its values separated by white space in the environment, one a line in the file; what comes
first in the order above replaces the others. The file may also have sections [endpoint NAME …],
each with its own settings.
"""

from __future__ import annotations

import argparse
import os
import re

from . import __version__
from .errors import ConfigurationError, UsageError
from .logs import LOG_FORMATS, LOG_LEVELS, log, masked, set_up_logging
from .program import EXIT_USAGE, hide_argument, read_text, say, take_environment
from .protocol.aes import BACKENDS
from .protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from typing import Any, NoReturn

    from .net.service import Service

# The options of all programs, by the section of the file: each knows the others' names, so
# that one file, and one environment, serve all. A test compares.
COMMON = "crypto json log-format log-level"
SERVICE = f"{COMMON} admin admin-token-file budget channel-idle congestion-control grace watch"
ENDPOINT = """connect-timeout health-interval health-path proxy-protocol tls-alpn tls-cert
    tls-key"""
CLIENT = f"""{ENDPOINT} acme-endpoint aes-iv-file aes-key-file allow allow-file block block-file
    cipher device-id device-secret-file endpoint exit-on-refusal keepalive master master-ca
    max-channels max-new-channels once probe probe-address protocol-version proxy
    proxy-password-file reconnect-spread server state-dir token token-file"""
MASTER = """admin-token-file alias cipher database fernet-key-file hostname insecure limit listen
    protocol-version proxy-protocol-from relay server single-use throttling tls-cert tls-key
    token-ttl valid-for"""
SECTIONS = {
    "client": f"{SERVICE} {CLIENT}".split(),
    "server": f"""{SERVICE} fernet-key-file listen peer-listen revocations revocations-ca route
        state-dir""".split(),
    "master": f"{COMMON} {MASTER}".split(),
}
# What one section may have besides: [endpoint NAME …], one for each service of a client.
ENDPOINTS = "endpoint "
ENDPOINT_KEYS = ["address", *ENDPOINT.split()]
ENVIRONMENT = "SNITUN_"
SOURCES = """\
Each option can also stand in the environment (--log-level is $SNITUN_LOG_LEVEL), or in the
INI file of --config, as `log-level = debug` in [client], [server] or [master]. The command
line goes before the environment, and that before the file."""
GRACE_S = 10.0
CONFIG = "config"
CHECK = "check"  # on the command line only
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")

# Where a setting comes from: whatever is less goes before the others.
COMMAND_LINE, FROM_ENVIRONMENT, FILE, DEFAULT = range(4)

UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
UNITS_BYTES = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


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


# The types of options by the word that stands for their value; others are text.
TYPES = {"TIME": duration_s, "SIZE": size_bytes, "N": int, "PACKAGE": _crypto}


class Options(argparse.Namespace):
    """The options of a program, one attribute each; `source` tells where one comes from.

    In a `with` statement, an error that begins with the name of an option (`--endpoint: …`)
    leaves it with the name of the place that the value comes from.
    """

    def __init__(self) -> None:
        super().__init__()
        # By attribute: the rank of the place that it comes from, and how a message calls that.
        self._settings: dict[str, tuple[int, str]] = {}
        self._secrets: set[str] = set()  # attributes
        self._warnings: list[str] = []  # until there is a log
        self._taken: dict[str, str] = {}  # secrets that were in the environment
        self.sections: dict[str, dict[str, Any]] = {}
        """The sections of the file that begin with `endpoint`, by their names in messages."""

    def rank(self, attribute: str) -> int:
        """Return COMMAND_LINE, FROM_ENVIRONMENT, FILE or DEFAULT."""
        return self._settings[attribute][0]

    def source(self, attribute: str) -> str:
        """Return `--endpoint`, `$SNITUN_ENDPOINT` or `/etc/snitun.ini: [client] endpoint`."""
        return self._settings[attribute][1]

    def changed(self, former: Options, keys: str) -> Iterator[str]:
        """Yield what messages call those of the settings `keys` that are others in `former`."""
        for attribute in keys.replace("-", "_").split():
            if _text(getattr(self, attribute)) != _text(getattr(former, attribute)):
                yield self.source(attribute)

    def lines(self) -> Iterator[str]:
        """Yield `name = value   (source)` for all settings, without secrets."""
        for attribute, (rank, name) in self._settings.items():
            value = getattr(self, attribute)
            text = "[secret]" if value and attribute in self._secrets else masked(_text(value))
            place = {COMMAND_LINE: "command line", DEFAULT: "default"}.get(rank, name)
            line = f"{_key(attribute)} = {text}".rstrip()
            yield f"{line}   ({place})"
        for name, section in self.sections.items():
            for key, value in section.items():
                yield f"{_key(key)} = {_text(value)}   ({name})"

    def __enter__(self) -> Options:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if not isinstance(error, ConfigurationError):
            return
        option, colon, rest = str(error).partition(": ")
        attribute = option[2:].replace("-", "_")
        if colon and attribute in self._settings and option == f"--{_key(attribute)}":
            rank, name = self._settings[attribute]
            is_from_file = type(error) is UsageError and rank == FILE
            error = (ConfigurationError if is_from_file else type(error))(f"{name}: {rest}")
        raise error from None


class Parser(argparse.ArgumentParser):
    """argparse with the other sources, the exit code of sysexits.h, and no secrets in messages.

    Options are added by `add`. No help text may have `%(default)s`.
    """

    def __init__(self, prog: str, *, description: str, epilog: str = "", **options: Any) -> None:
        """`options` are what argparse passes on to the parser of a sub-command."""
        options.update(description=description, epilog=epilog)
        super().__init__(prog, formatter_class=_help, allow_abbrev=False, **options)
        self._section = prog.partition(" ")[0].rpartition("-")[2]
        # None, not `self`: a cycle would keep the parser until the collector comes.
        self._group: argparse._ArgumentGroup | None = None
        self._secrets: set[str] = set()  # attributes
        self._required: list[str] = []
        self._is_again = False
        if epilog:  # no sub-command
            self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def begin(self, title: str) -> None:
        """Begin the group of options that --help has below `title`; "" ends the last one."""
        self._group = self.add_argument_group(title) if title else None

    def add(
        self,
        name: str,
        text: str,
        default: object = None,
        *,
        is_secret: bool = False,
        is_required: bool = False,
        **more: Any,
    ) -> None:
        """Add an option to the group, such as `--keepalive TIME`; one without a word is a flag.

        The word also stands for its type, see TYPES. The value of a secret is removed from the
        environment and overwritten on the command line. `more` is for argparse.
        """
        name, _, word = name.partition(" ")
        if word:
            more = {"metavar": word, "type": TYPES.get(word), "default": default, **more}
        else:
            more["action"] = "store_true"
        attribute = (self._group or self).add_argument(name, help=text, **more).dest
        if is_secret:
            self._secrets.add(attribute)
        if is_required:
            self._required.append(attribute)

    def add_service(self, *, budget_bytes: int, channel_idle_s: float) -> None:
        """Add the options of programs that have tunnels; the group of limits stays open."""
        self.begin("running")
        self.add(
            "--admin ADDRESS",
            "answer questions (/ready, /status, /metrics) at HOST:PORT or unix:/PATH",
            "",
        )
        text = "who asks must know what is in there: Authorization: Bearer …"
        self.add("--admin-token-file FILE", text)
        text = "how long open connections may go on after SIGTERM (default: 10s)"
        self.add("--grace TIME", text, GRACE_S)
        self.add(
            "--congestion-control NAME",
            "how the kernel paces what is sent, such as bbr: small exchanges wait less behind "
            "large ones on a slow line (default: the system's)",
            "",
        )
        self.add(f"--{CHECK}", "check all settings and files, print the settings, and exit")
        self.begin("limits")
        default = f"{budget_bytes // UNITS_BYTES['M']}M"
        text = f"how much may be held for slow devices and services, like 8M (default: {default})"
        self.add("--budget SIZE", text, budget_bytes)
        text = "close a connection on which nothing moves for so long (default: 1h)"
        self.add("--channel-idle TIME", text, channel_idle_s)

    def add_common(self) -> None:
        """Add the options that all programs have."""
        self.begin("")
        self.add(f"--{CONFIG} FILE", f"an INI file with options in [{self._section}]")
        self.add("--crypto PACKAGE", "pycryptodome (default) or cryptography", "")
        text = "text (default) or json, an object a line"
        self.add("--log-format FORMAT", text, "text", choices=LOG_FORMATS)
        text = f"{', '.join(LOG_LEVELS)} (default: info); debug has a line for each connection"
        self.add("--log-level LEVEL", text, "info", choices=LOG_LEVELS)

    def error(self, message: str) -> NoReturn:
        if self._is_again:
            raise UsageError(masked(message))
        self.exit(EXIT_USAGE, f"{self.prog}: {masked(message)}; see {self.prog} --help\n")

    def read(self, arguments: Sequence[str], former: Options | None = None) -> Options:
        """Return the options from all sources; the log is set up then.

        `former` are those that were read when the program started, if it reads them again.
        Raises ConfigurationError, and ends the process where an argument is wrong at its start.
        """
        options = Options()
        if former is not None:
            options._taken = former._taken
            self._read_again()
        options = self.parse_args(arguments, options)
        if former is None:
            set_up_logging(options.log_level, options.log_format)
        for warning in options._warnings:
            log.warning("%s", warning)
        return options

    def _read_again(self) -> None:
        """Let no mistake end the process, whichever sub-command it is in."""
        self._is_again = True
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    parser._read_again()

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
        variables = {action.dest: self._variable(action.dest, options) for action in actions}
        file: dict[str, str] = {}
        path = ""
        if CONFIG in variables:
            path = options.config or variables[CONFIG]
            source = f"--{CONFIG}" if options.config else _variable_name(CONFIG)
            options._warnings += _unknown_variables()
            if path:
                file = self._read_file(path, source, options, actions)
        with options:  # which gives an error its source
            for action in actions:
                key = _key(action.dest)
                in_file = f"{path}: [{self._section}] {key}", file.get(key, "")
                self._settle(action, options, variables[action.dest], *in_file)
        missing = [
            f"--{_key(name)}" for name in self._required if getattr(options, name) in (None, "")
        ]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")

    def _variable(self, attribute: str, options: Options) -> str:
        """Return the text of the environment, "" for none; hide a secret, wherever it is."""
        name = _variable_name(attribute)[1:]
        if attribute not in self._secrets:
            return os.environ.get(name, "") if attribute != CHECK else ""
        options._secrets.add(attribute)
        value = getattr(options, attribute)
        if value is not None and value != "-":
            hide_argument(value)
        if text := take_environment(name):
            options._taken[name] = text
        return options._taken.get(name, "")

    def _settle(
        self, action: argparse.Action, options: Options, variable: str, place: str, line: str
    ) -> None:
        """Set one option from the first source that has it; `line` is the file's, at `place`."""
        attribute = action.dest
        value, texts = getattr(options, attribute), []
        rank, source = COMMAND_LINE, f"--{_key(attribute)}"
        if value is None:
            if texts := _texts(action, variable, None):
                rank, source = FROM_ENVIRONMENT, _variable_name(attribute)
            elif texts := _texts(action, line, "\n"):
                rank, source = FILE, place
            else:
                rank, value = DEFAULT, action.default
                texts = [value] if value and isinstance(value, str) else []
        if attribute not in (CONFIG, CHECK):
            options._settings[attribute] = rank, source
        setattr(options, attribute, self._converted(action, texts) if texts else value)

    def _converted(self, action: argparse.Action, texts: list[str]) -> Any:
        """Return what a value, or all those of a list, mean to argparse. Raises UsageError."""
        option = f"--{_key(action.dest)}"
        if action.nargs == 0:
            if texts[0].lower() not in YES + NO:
                raise UsageError(f"{option}: {shown(texts[0])}; expected yes or no")
            return texts[0].lower() in YES
        try:
            values = [self._get_value(action, text) for text in texts]
            for value in values:
                self._check_value(action, value)
        except argparse.ArgumentError as error:
            raise UsageError(f"{option}: {error.message}") from None
        return values if isinstance(action, argparse._AppendAction) else values[0]

    def _read_file(
        self, path: str, source: str, options: Options, actions: list[argparse.Action]
    ) -> dict[str, str]:
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
            is_endpoint = section.startswith(ENDPOINTS)
            if section not in SECTIONS and not is_endpoint:
                known = [*SECTIONS, f"{ENDPOINTS}NAME"]
                said = f"{_bare(section)}]: no such section{_meant(section, known)}"
                raise ConfigurationError(f"{path}: [{said}")
            known = ENDPOINT_KEYS if is_endpoint else SECTIONS[section]
            for key in file.options(section):
                if key not in known:
                    said = f"{_bare(key)}: no such option{_meant(key, known)}"
                    raise ConfigurationError(f"{path}: [{section}] {said}")
            if is_endpoint and self._section == "client":
                name = f"{path}: [{section}]"
                values = self._section_values(name, dict(file.items(section)), actions)
                options.sections[name] = values
        settings = dict(file.items(self._section)) if file.has_section(self._section) else {}
        for key in map(_key, self._secrets):
            value = settings.get(key)
            # A proxy's URL is a secret only where it has a password.
            if value and (key != "proxy" or "@" in value) and _is_public(path):
                said = f"{key} can be read by everybody: chmod 600 it"
                options._warnings.append(f"{path}: [{self._section}] {said}")
        return settings

    def _section_values(
        self, name: str, texts: dict[str, str], actions: list[argparse.Action]
    ) -> dict[str, Any]:
        """Return what a section for one endpoint says, by attribute, as the options' types."""
        by_key = {_key(action.dest): action for action in actions}
        values: dict[str, Any] = {}
        for key, text in texts.items():
            if text and key not in by_key:
                values[key] = text
            elif text:
                try:
                    values[by_key[key].dest] = self._converted(by_key[key], [text])
                except UsageError as error:
                    said = str(error).partition(": ")[2]
                    raise ConfigurationError(f"{name} {key}: {said}") from None
        return values


def check_service(program: str, options: Options, make: Callable[[], Service]) -> None:
    """Make a service and free it again; print the settings. Raises what `make` raises."""
    make().stop()
    say("\n".join((f"{program}: the configuration is right", *options.lines())))


# --- texts -----------------------------------------------------------------------------


def _help(prog: str) -> argparse.HelpFormatter:
    """Format for the terminal's width; argparse would import shutil (0.7 MiB) to learn it."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size().columns or 80
    except (OSError, ValueError):
        columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=columns - 2)


def _key(attribute: str) -> str:
    return attribute.replace("_", "-")


def _variable_name(attribute: str) -> str:
    """Return the name of its environment variable, with the $ that messages have."""
    return f"${ENVIRONMENT}{_key(attribute).upper().replace('-', '_')}"


def _texts(action: argparse.Action, text: str, separator: str | None) -> list[str]:
    """Return the value that `text` has, the values for a list, none where it is empty."""
    is_list = isinstance(action, argparse._AppendAction)
    parts = map(str.strip, text.split(separator) if is_list else [text])
    return [part for part in parts if part]


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return " ".join(value) if isinstance(value, (list, tuple)) else str(value)


def _what_is_wrong(error: Any) -> str:
    """Return what configparser has found, without the line itself: it may be a secret."""
    section, option = getattr(error, "section", ""), getattr(error, "option", "")
    if section:
        name = f"[{_bare(section)}]" + (f" {_bare(option)}" if option else "")
        return f"{name}: it is there twice, again in line {error.lineno}"
    line = getattr(error, "lineno", None) or error.errors[0][0]
    return f"line {line}: expected [client], [server] or [master], or NAME = VALUE below one"


def _unknown_variables() -> Iterator[str]:
    """Yield a warning for each SNITUN_ variable that no program takes: it has no effect."""
    known = {key for keys in SECTIONS.values() for key in (*keys, CONFIG)}
    names = {name for name in os.environ if name.startswith(ENVIRONMENT)}
    for name in sorted(names - {_variable_name(key)[1:] for key in known}):
        key = _nearest(name[len(ENVIRONMENT) :].replace("_", "-"), known)
        hint = f"; did you mean {_variable_name(key)}?" if key else ""
        yield f"${_bare(name)}: no such setting{hint}"


def _meant(name: str, known: Collection[str]) -> str:
    """Return the end of a message: which of the known names may be meant."""
    nearest = _nearest(name, known)
    expected = f"; expected one of {', '.join(sorted(known))}"
    return f"; did you mean {nearest}?" if nearest else expected


def _nearest(name: str, known: Collection[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415

    return "".join(get_close_matches(name.lower(), known, 1))


def _bare(name: str) -> str:
    """Return a name that somebody has made up, without quotes where it is short."""
    text = shown(name)
    return text[1:-1] if text.startswith(("'", '"')) else text


def _is_public(path: str) -> bool:
    try:
        return path != "-" and bool(os.stat(path).st_mode & 0o004)
    except OSError:
        return False

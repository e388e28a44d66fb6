"""A real systemd as PID 1, in namespaces of its own: a host for the units that are shipped.

Its root is an overlay of this machine's: what is written there vanishes with it. It has a
network of its own too, with nothing but the loopback interface, so that any port is free.
In it /usr/bin/python3 is the Python of the tests, with this project, as if installed.

Needs root, Linux, cgroup2, and the packages systemd, util-linux and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from tests.network import in_network
from tests.support import PROJECT, wait_until

if TYPE_CHECKING:
    from tests.network import Result

SYSTEMD = "/lib/systemd/systemd"
START_S = 20.0
STOP_S = 10.0
COMMAND_S = 20
SHOWN_CHARACTERS = 4000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup")
_UNSHARE = ("unshare", *_NAMESPACES, "--fork", "--kill-child", "--propagation", "private")

# $1 is the cgroup; what follows is run in it, and dies with this process.
_ENTER = 'echo $$ >"$1/cgroup.procs"; shift; exec setpriv --pdeathsig KILL "$@"'

# Run as PID 1: $1 is an empty folder, $2 a file for the console, $3 the folder of a Python,
# $4 its name, $5 its packages, $6 the project. Prints its process id as seen from outside.
_BOOT = """
set -e
read -r pid rest </proc/self/stat
echo "$pid"
exec >&2

mount -t tmpfs -o mode=755 tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay root
cd root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do
    : >dev/$node
    mount --bind /dev/$node dev/$node
done
: >dev/console
mount --bind "$2" dev/console
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ip link set lo up

# Under /opt: services don't see /home and /root, where these may be.
mkdir -p opt/python opt/packages opt/project
mount --bind -o ro "$3" opt/python
mount --bind -o ro "$5" opt/packages
mount --bind -o ro "$6" opt/project
rm -f usr/bin/python3
cat >usr/bin/python3 <<END
#!/bin/sh
export PYTHONPATH=/opt/project:/opt/packages LD_LIBRARY_PATH=/opt/python/lib
exec /opt/python/bin/$4 "\\$@"
END
chmod 755 usr/bin/python3

# Of all that this machine starts, the journal alone; nothing of it is mounted or checked.
: >etc/fstab
for target in sysinit sockets basic local-fs timers; do
    for unit in {etc,usr/lib}/systemd/system/$target.target.wants/*; do
        name=${unit##*/}
        case $name in
        systemd-journald* | "*") ;;
        *) ln -sf /dev/null "etc/systemd/system/$name" ;;
        esac
    done
done
cat >etc/systemd/system/snitun-test.target <<END
[Unit]
Requires=basic.target
After=basic.target
AllowIsolate=yes
END

mkdir -p run/outside
pivot_root . run/outside
umount -l run/outside
rmdir run/outside
mount --make-rshared /
exec env -i container=snitun-test "PATH=$PATH" /lib/systemd/systemd --unit=snitun-test.target
"""


def missing() -> str:
    """Return why there can be no such host here; "" if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a systemd of one's own needs Linux, and root"
    for program in ("unshare", "nsenter", "setpriv", "pivot_root", "ip", "bash", SYSTEMD):
        if not shutil.which(program):
            return f"there is no {program} here"
    if _cgroup() is None:
        return "there is no cgroup2 here that can be written to"
    made = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    return "" if made.returncode == 0 else f"namespaces can't be made: {made.stderr.strip()}"


def _cgroup() -> Path | None:
    """Return the folder of this process's cgroup in cgroup2 (proc(5), cgroups(7))."""
    own = [line[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::/")]
    mounts = [line.split() for line in _lines("/proc/self/mountinfo") if " - cgroup2 " in line]
    for mount in mounts:
        folder = Path(mount[4] + "".join(own[:1]))
        if os.access(folder / "cgroup.procs", os.W_OK):
            return folder
    return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


class SystemdHost:
    """One host. It dies with the thread that starts it; `stop` leaves nothing behind."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="snitun-host-"))
        self._console = self._folder / "console"
        self._cgroup: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self.pid = 0
        """Its PID 1, as seen from outside."""

    def __enter__(self) -> SystemdHost:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> SystemdHost:
        """Return once it has booted. Raises RuntimeError, with nothing left behind."""
        try:
            self._boot()
            wait_until(self._is_up, "systemd is up", START_S)
        except BaseException as error:
            console = self._console.read_text() if self._console.exists() else ""
            self.stop()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(f"no systemd: {error}\n{console}") from error
        return self

    def _boot(self) -> None:
        parent = _cgroup()
        if parent is None:
            raise RuntimeError("no cgroup2")
        self._cgroup = parent / self._folder.name
        self._cgroup.mkdir()
        root = self._folder / "root"
        root.mkdir()
        with open(self._console, "w") as console:
            self._process = subprocess.Popen(
                [
                    *("sh", "-ec", _ENTER, "enter", str(self._cgroup)),
                    *(*_UNSHARE, "bash", "-c", _BOOT, "boot", str(root), str(self._console)),
                    *(sys.base_prefix, "python{}.{}".format(*sys.version_info)),
                    *(sysconfig.get_paths()["purelib"], str(PROJECT)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=console,
                text=True,
                env={"PATH": _PATH},
                start_new_session=True,
            )
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            self.pid = int(stdout.readline() or 0)
        if not self.pid:
            raise RuntimeError("its namespaces can't be made")

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"it has ended with {self._process.returncode}")
        state = self.systemctl("is-system-running", check=False).stdout.strip()
        if state == "degraded":
            raise RuntimeError(self.systemctl("--failed", check=False).stdout)
        return state == "running"

    def stop(self) -> None:
        """Kill all of it, at once; harmless when that is done already."""
        if self._process is not None:
            if self._process.poll() is None:
                if self.pid:
                    os.kill(self.pid, signal.SIGKILL)
                else:
                    self._process.kill()
            # It waits for PID 1, whose end is that of all processes and mounts in there.
            self._process.wait(STOP_S)
            self._process = None
        if self._cgroup is not None:
            wait_until(self._remove_cgroups, "its cgroups are empty", STOP_S)
            self._cgroup = None
        if self._folder.exists():
            self._console.unlink(missing_ok=True)
            for folder in (self._folder / "root", self._folder):
                if folder.exists():
                    folder.rmdir()

    def _remove_cgroups(self) -> bool:
        assert self._cgroup is not None
        try:
            for folder, _, _ in os.walk(self._cgroup, topdown=False):
                os.rmdir(folder)
        except OSError:  # a process is still ending
            return False
        return True

    # --- what is done in it ----------------------------------------------------

    def run(
        self, *command: str, check: bool = True, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; with `check` it has to return 0."""
        done = subprocess.run(
            [
                *("nsenter", "--target", str(self.pid), "--root", "--wd", *_NAMESPACES),
                *("timeout", "--kill-after", "1", str(timeout_s), *command),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s + STOP_S,
            check=False,
            env={"PATH": _PATH, "LANG": "C.UTF-8", "SYSTEMD_COLORS": "0"},
        )
        if check:
            assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def inside(self, function: Callable[[], Result]) -> Result:
        """Call `function()` on this host's network; see `Network.inside`."""
        return in_network(Path(f"/proc/{self.pid}/ns/net"), function)

    def write_file(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file, whose folders are made if need be; `mode` is its own from the start."""
        target = Path(f"/proc/{self.pid}/root") / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)

    def write_unit(self, name: str, text: str, *, drop_in: str = "") -> None:
        """Install a unit (`text`), and what changes it (`drop_in`)."""
        self.write_file(f"/etc/systemd/system/{name}", text)
        if drop_in:
            self.write_file(f"/etc/systemd/system/{name}.d/test.conf", drop_in)
        self.systemctl("daemon-reload")

    def systemctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run systemctl."""
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit, such as ActiveState."""
        return self.systemctl("show", "--value", "--property", name, unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """Return what a unit has printed, and what systemd says about it, without time stamps."""
        return self.run("journalctl", "--no-pager", "--output", "cat", "--unit", unit).stdout

    def wait_for(self, unit: str, text: str, count: int = 1) -> None:
        """Wait until `text` is in a unit's journal `count` times."""
        try:
            wait_until(lambda: self.journal(unit).count(text) >= count, text)
        except AssertionError as error:
            end = self.journal(unit)[-SHOWN_CHARACTERS:]
            raise AssertionError(f"{error}; the journal of {unit} ends with:\n{end}") from None

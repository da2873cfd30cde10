"""Numbers, times, names and strange characters in a person's words."""

import math
import time
from pathlib import Path

from dtrain.storage import is_remote


def count(number: float) -> str:
    """`1,234`, `17.6k`, `3.2M`, `1.5B`: three figures from ten thousand on."""
    if not math.isfinite(number):
        return str(number)
    if abs(number) < 10_000:
        return f"{number:,.0f}" if float(number).is_integer() else f"{number:.3g}"
    for unit in ("k", "M", "B", "T"):
        number /= 1000
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
    return f"{number:.3g}T" if abs(number) < 1e6 else f"{number * 1e12:.2e}"


def flops(number: float) -> str:
    """`646 GFLOP`, `1.5 PFLOP`."""
    units = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while abs(number) >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}FLOP"


def size(num_bytes: float) -> str:
    """`512 B`, `3.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float | None) -> str:
    """`0.4s`, `42s`, `3m 12s`, `2h 05m`, `3d 04h`; a dash for what is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def age(seconds: float) -> str:
    """`just now`, `42s ago`, `3m ago`, `2h ago`, `3d ago`."""
    if seconds < 5:
        return "just now"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


def clock(seconds_since_1970: float) -> str:
    """Time of day, `12:03:41`."""
    return time.strftime("%H:%M:%S", time.localtime(seconds_since_1970))


def moment(seconds_since_1970: float) -> str:
    """Day and time, `2026-11-20 12:03:41`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds_since_1970))


def measure(value: object) -> str:
    """A loss or another measurement, with four figures: `1.3252`, `0.0241`, `nan`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.4f}"
    return f"{value:.3e}"


def rate(value: float) -> str:
    """A learning rate: `6.0e-4`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def plural(number: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shortest(path: Path) -> str:
    """A path as one would type it from here."""
    whole = path.absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)


def called(where: str) -> str:
    """What commands know a run by, from where it is: its name where they look by default, else its folder or URI."""
    return Path(where).name if Path(where).parent == Path.cwd() / "runs" else place(where)


def place(where: str) -> str:
    """A folder as one would type it from here, or a URI."""
    return where if is_remote(where) else shortest(Path(where))


def visible(text: str) -> str:
    """`text` with every character that would move the cursor or change the terminal written out (`\\x1b`)."""
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text.replace("\r\n", "\n"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

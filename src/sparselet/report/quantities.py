"""Numbers, times and sizes as text, the same on the page, in the terminal and in Markdown."""


def format_number(number: float | None, measure: str = "rougeL", sign: bool = False, like: float | None = None) -> str:
    """A number with one decimal; a number of parameters with none, a percentage below 10 with two, a loss
    with three. – for None.

    sign: for differences; a number that is rounded to 0 has none. like: the number whose decimals are used, as for an error.
    """
    if number is None:
        return "–"
    small = abs(number if like is None else like) < 9.995
    decimals = {"parameters": 0, "validation_loss": 3, "percent": 2 if small else 1}.get(measure, 1)
    number = round(number, decimals)
    return f"{number or 0.0:{'+' if sign and number else ''},.{decimals}f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """A duration: 40 s, 12 min, 3 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(count: float) -> str:
    """Bytes, to two digits: 3.1 kB, 64 MB, 8.5 GB."""
    unit, name = (1e3, "kB") if count < 999.5e3 else (1e6, "MB") if count < 999.5e6 else (1e9, "GB")
    count /= unit
    return f"{count:.{1 if count < 9.95 else 0}f} {name}"

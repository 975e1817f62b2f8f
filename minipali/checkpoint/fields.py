"""The fields of a JSON object, each read with its type checked; a wrong one is named with what was expected."""
import reprlib

from minipali.errors import InputError

# A loop over the layers of a config that asks for a billion would never end. The deepest published model, Gemma 3 27B,
# has 62.
MOST_LAYERS = 1000


class Fields:
    """One object of config.json, read field by field with its type checked."""

    def __init__(self, values, where):
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected an object of fields, found {type(values).__name__}")
        self.values, self.where = values, where

    def get(self, name: str, default=None):
        """null means the same as leaving the field out."""
        value = self.values.get(name)
        return default if value is None else value

    def fail(self, name: str, expected: str):
        """Raise the InputError about one field."""
        raise InputError(f"{self.where}: {name} is {reprlib.repr(self.get(name))}, expected {expected}")

    def integer(self, name: str, default: int | None, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fail(name, f"an integer from {least} to {most}")
        return value

    def real(self, name: str, default: float | None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            self.fail(name, "a positive number")
        return float(value)

    def optional_real(self, name: str, default: float | None) -> float | None:
        """A number that null switches off, where leaving it out means the default."""
        return None if self.values.get(name, default) is None else self.real(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def choice(self, name: str, default: str | None, allowed: list[str]) -> str:
        value = self.get(name, default)
        if value not in allowed:
            self.fail(name, " or ".join(allowed))
        return value

    def section(self, name: str, default: dict | None = None) -> "Fields":
        """An object inside this one; InputError if it is missing and has no default."""
        if self.get(name, default) is None:
            raise InputError(f"{self.where}: the section {name} is missing")
        return Fields(self.get(name, default), f"{self.where}: {name}")

"""Classes, and several of them taken together, in numbers and in names."""

from collections.abc import Sequence

Kind = int | tuple[int, ...]  # a foreground class, or several taken together


def members_of(kind: Kind) -> tuple[int, ...]:
    """Lists the classes of a tuple, or the one class."""
    return kind if isinstance(kind, tuple) else (kind,)


def names_of(classes: Sequence[Kind], class_names: Sequence[str]) -> list[str]:
    """Names classes; joins names of several taken together: (1, (1, 2)) -> "RV", "RV + MYO"."""
    return [" + ".join(class_names[k - 1] for k in members_of(kind)) for kind in classes]


def classes_of(names: Sequence[str], class_names: Sequence[str]) -> tuple[Kind, ...]:
    """Reverses `names_of`; raises ValueError for a name that is none of a class."""
    number = {name: k for k, name in enumerate(class_names, start=1)}
    found: list[Kind] = []
    for name in names:
        parts = [name] if name in number else name.split(" + ")
        if unknown := [part for part in parts if part not in number]:
            raise ValueError(f"found {unknown[0]!r}; wanted one of {', '.join(class_names)}")
        numbers = tuple(number[part] for part in parts)
        found.append(numbers if len(numbers) > 1 else numbers[0])
    return tuple(found)

"""Lists of patients, as the configs write them: "001-003 007" in place of ids, splits as tables."""

from collections.abc import Mapping


def patients(template: str, numbers: str) -> tuple[str, ...]:
    """The ids of some numbers: ("patient{:03d}", "1-2 7") -> patient001, patient002, patient007."""
    found = []
    for item in numbers.split():
        first, _, last = item.partition("-")
        found += [template.format(n) for n in range(int(first), int(last or first) + 1)]
    return tuple(found)


def table(template: str, splits: Mapping[str, Mapping[str, tuple[str, str]]]) -> dict:
    """What `data.splits` holds, of {num_labeled: {split: (labelled, validation)}} in numbers."""
    return {
        n: {
            c: {"labeled": patients(template, own), "validation": patients(template, pair)}
            for c, (own, pair) in by_name.items()
        }
        for n, by_name in splits.items()
    }


def all_but(template: str, everyone: tuple[str, ...], validation: Mapping[str, str]) -> dict:
    """By split: everyone is labelled but the validation patients, who are given in numbers."""
    pairs = {c: patients(template, numbers) for c, numbers in validation.items()}
    return {
        c: {"labeled": tuple(p for p in everyone if p not in pair), "validation": pair}
        for c, pair in pairs.items()
    }

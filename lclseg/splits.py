"""Which patient plays which role: lists from the config, checked for overlap."""

from collections.abc import Mapping
from typing import NamedTuple

from lclseg.prepared import VolumeEntry


class SplitError(ValueError):
    """Patient lists that cannot be used; the message names the list and the way out."""


class Split(NamedTuple):
    """Volume ids by role, in the order of the lists."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def resolve_split(data_config, volumes: Mapping[str, VolumeEntry]) -> Split:
    """Turns the patient lists of `config.data` into volume ids.

    `data.splits[num_labeled][split]` holds the labelled and validation patients; `data.pool` and
    `data.test_patients` the others. A non-empty `data.labeled`, `data.unlabeled`,
    `data.validation` or `data.test` replaces the list it names. Labelled, validation and test
    patients are taken out of the unlabelled pool.

    Args:
      data_config: `config.data`.
      volumes: index of the prepared set.

    Raises:
      SplitError: no such split; a patient twice, in two roles, not in the data set, or without
        ground truth where that is needed; an empty role (only the
        unlabelled one may be: an upper bound has none).
    """
    by_size = data_config.splits.get(str(data_config.num_labeled))
    chosen = by_size.get(data_config.split) if by_size is not None else None
    if chosen is None and not (data_config.labeled and data_config.validation):
        known = {n: sorted(s) for n, s in data_config.splits.items()}
        raise SplitError(
            f"no split {data_config.split!r} with num_labeled={data_config.num_labeled}; there are "
            f"{known}. Or set data.labeled and data.validation yourself"
        )
    lists = {
        "labeled": list(data_config.labeled or chosen.labeled),
        "validation": list(data_config.validation or chosen.validation),
        "test": list(data_config.test or data_config.test_patients),
        "unlabeled": list(data_config.unlabeled or data_config.pool),
    }
    owner: dict[str, str] = {}
    for role in ("labeled", "validation", "test"):
        for patient in lists[role]:
            if patient in owner:
                raise SplitError(
                    f"patient {patient} is in data.{owner[patient]} and data.{role}; a patient may "
                    "have one role and stand in its list once"
                )
            owner[patient] = role
    if data_config.unlabeled:  # chosen by hand: an overlap there is a mistake, not the pool's habit
        overlap = [p for p in lists["unlabeled"] if p in owner]
        if overlap:
            raise SplitError(
                f"data.unlabeled holds {', '.join(overlap[:8])}, in data.{owner[overlap[0]]} too; "
                "take them out of one list"
            )
    lists["unlabeled"] = [p for p in dict.fromkeys(lists["unlabeled"]) if p not in owner]

    volumes_of: dict[str, list[VolumeEntry]] = {}
    for entry in volumes.values():
        volumes_of.setdefault(entry.patient_id, []).append(entry)
    ids = {}
    for role, patients in lists.items():
        if not patients and role != "unlabeled":
            raise SplitError(f"no {role} patient is left; set data.{role}")
        missing = [p for p in patients if p not in volumes_of]
        if missing:
            raise SplitError(
                f"{len(missing)} of {len(patients)} {role} patients are not in the prepared data "
                f"set: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}. It holds "
                f"{', '.join(list(volumes_of)[:4])} ... ({len(volumes_of)} patients); set "
                f"data.{role}, or add the files and prepare the set anew"
            )
        entries = [e for p in patients for e in volumes_of[p]]
        blind = [e.volume_id for e in entries if not e.has_label]
        if role != "unlabeled" and blind:
            raise SplitError(
                f"{role} volumes without ground truth: {', '.join(blind[:8])}; only unlabelled "
                "volumes may lack it"
            )
        ids[role] = tuple(e.volume_id for e in entries)
    return Split(**ids)

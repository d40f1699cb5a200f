"""Which patient plays which role: lists from the config, checked for overlap, or drawn."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lclseg.data.dataset import VolumeEntry

ROLES = ("labeled", "unlabeled", "validation", "test")
VALIDATION_PATIENTS = 2


class SplitError(ValueError):
    """Patient lists that cannot be used; the message names the list and the way out."""


class Split(NamedTuple):
    """Volume ids by role, in the order of the lists."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def draw_lists(
    rng: np.random.Generator,
    classes_shown: Mapping[str, int],
    *,
    lists: Mapping[str, Sequence[str]],
    num_labeled: str,
    num_unlabeled: int,
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Draws labelled, validation and test patients among those with ground truth.

    Labelled: `num_labeled` of them, out of those that show most classes. Validation: 2, or 1 where
    fewer than 4 are left. Test: all that are left; but where every patient has ground truth, a
    fifth of them, so that the others make the unlabelled pool. "all" labels all but validation and
    test, again a fifth. Where `num_labeled` is all there are, one of them is for validation.
    Patients whose ground truth is empty join a test set that has others, or the labelled ones of
    "all"; alone they would tell nothing.

    Args:
      rng: random.
      classes_shown: patients with ground truth -> number of foreground classes there.
      lists: by role; a list that is not empty stays as it is.
      num_labeled: a number, or "all".
      num_unlabeled: of patients without ground truth.

    Returns:
      Lists of labelled, validation and test patients, and what is worth telling, line by line.

    Raises:
      SplitError: too few patients with ground truth, or num_labeled is no number.
    """
    if num_labeled != "all" and not (num_labeled.isdigit() and int(num_labeled)):
        raise SplitError(f"data.num_labeled is {num_labeled!r}; wanted a number above 0, or 'all'")
    named = {p for patients in lists.values() for p in patients}
    free = [p for p in sorted(classes_shown) if p not in named]
    free = [free[i] for i in rng.permutation(len(free))]
    empty = [p for p in free if not classes_shown[p]]
    free = [p for p in free if classes_shown[p]]

    open_roles = {role for role in ROLES if not lists[role]}
    least = len(open_roles & {"labeled", "validation"})
    if "labeled" in open_roles and num_labeled != "all":
        least = max(least, int(num_labeled))
    if len(free) < least:
        left_out = ", those in lists left out" if named else ""
        left_out += f", {len(empty)} empty masks too" if empty else ""
        raise SplitError(
            f"{len(free)} patients with ground truth{left_out}; wanted at least {least}, to learn "
            "from and to choose the checkpoint by: add masks, or lower data.num_labeled"
        )
    has_pool = num_unlabeled > 0 or "unlabeled" not in open_roles
    count = _how_many(len(free), open_roles, num_labeled, has_pool=has_pool)

    drawn = {"labeled": sorted(free, key=lambda p: -classes_shown[p])[: count["labeled"]]}
    rest = [p for p in free if p not in drawn["labeled"]]
    for role in ("validation", "test"):
        drawn[role], rest = rest[: count[role]], rest[count[role] :]
    joined = "labeled" if num_labeled == "all" else "test"
    if joined in open_roles and drawn[joined] and not (rest and joined == "test"):
        drawn[joined] += empty
    else:
        rest += empty
    found = {role: tuple(lists[role]) or tuple(sorted(drawn[role])) for role in drawn}

    notes = [_role_note(role, found[role], role in open_roles) for role in found]
    if rest and "unlabeled" in open_roles:
        notes.append(
            f"in the unlabelled pool: {num_unlabeled} cases, and {len(rest)} whose masks nothing "
            "learns from"
        )
    elif "unlabeled" in open_roles:
        notes.append(f"in the unlabelled pool: {num_unlabeled} cases")
    if "labeled" in open_roles and num_labeled not in ("all", str(count["labeled"])):
        notes.append(
            f"WARNING: {count['labeled']} in place of data.num_labeled={num_labeled}, since a mask "
            "is needed for validation"
        )
    if not found["test"]:
        notes.append("WARNING: no mask is left to test on; there will be validation Dice only")
    return found, notes


def _how_many(
    total: int, open_roles: Collection[str], num_labeled: str, *, has_pool: bool
) -> dict[str, int]:
    """How many of `total` patients with ground truth each role gets; see `draw_lists`."""
    choose, validate, test = (r in open_roles for r in ("labeled", "validation", "test"))
    fifth = max(1, round(total / 5))
    if choose and num_labeled == "all":
        num_validation = validate * (VALIDATION_PATIENTS if total >= 6 else 1)
        num_test = test * min(fifth, total - num_validation - 1)
        labeled = total - num_validation - num_test
        return {"labeled": labeled, "validation": num_validation, "test": num_test}
    labeled = min(int(num_labeled), total - validate) if choose else 0
    left = total - labeled
    num_validation = validate * (VALIDATION_PATIENTS if left >= 4 else 1)
    left -= num_validation
    # Without a pool nothing is semi-supervised: all but a fifth go there, their masks unused.
    num_test = test * (left if has_pool else min(fifth, left, max(left - 1, 1)))
    return {"labeled": labeled, "validation": num_validation, "test": num_test}


def _role_note(role: str, patients: Sequence[str], is_drawn: bool) -> str:
    some = ", ".join(patients[:4]) + (", ..." if len(patients) > 4 else "")
    return f"data.{role}: {len(patients)} {'drawn' if is_drawn else 'given'}{some and ': ' + some}"


def resolve_split(
    data_config, volumes: Mapping[str, VolumeEntry], *, may_lack_test: bool = False
) -> Split:
    """Turns the patient lists of `config.data` into volume ids.

    `data.splits[num_labeled][split]` holds the labelled and validation patients; `data.pool` and
    `data.test_patients` the others. A non-empty `data.labeled`, `data.unlabeled`,
    `data.validation` or `data.test` replaces the list it names. Labelled, validation and test
    patients are taken out of the unlabelled pool.

    Args:
      data_config: `config.data`.
      volumes: index of the prepared set.
      may_lack_test: a run without test patients will do.

    Raises:
      SplitError: no such split; a patient twice, in two roles, not in the data set, or without
        ground truth where that is needed; an empty role (only the
        unlabelled one may be: an upper bound has none).
    """
    chosen = data_config.splits.get(str(data_config.num_labeled), {}).get(data_config.split)
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
        if not patients and role != "unlabeled" and not (role == "test" and may_lack_test):
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
        if role != "unlabeled":
            # Of a patient with several scans those with ground truth play the role.
            blind = [p for p in patients if not any(e.has_label for e in volumes_of[p])]
            if blind:
                names = [e.volume_id for p in blind for e in volumes_of[p]]
                raise SplitError(
                    f"{role} volumes without ground truth: {', '.join(names[:8])}; only unlabelled "
                    "volumes may lack it"
                )
            entries = [e for e in entries if e.has_label]
        elif not data_config.unlabeled:
            entries += [e for p in lists["labeled"] for e in volumes_of[p] if not e.has_label]
        ids[role] = tuple(e.volume_id for e in entries)
    return Split(**ids)

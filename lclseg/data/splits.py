"""Which patient plays which role: lists from the config, checked for overlap, or drawn."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lclseg.data.dataset import VolumeEntry
from lclseg.errors import UserError

ROLES = ("labeled", "unlabeled", "validation", "test")
VALIDATION_PATIENTS = 2
PROPOSED = -1  # of data.num_validation: the list's, or `VALIDATION_PATIENTS` of own data


class SplitError(UserError):
    """Patient lists that cannot be used; the message names the list and the way out."""


class Split(NamedTuple):
    """Volume ids by role, in the order of the lists."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def draw_lists(
    rng: np.random.Generator,
    with_truth: Collection[str],
    *,
    lists: Mapping[str, Sequence[str]],
    num_labeled: str,
    num_unlabeled: int,
    num_validation: int = PROPOSED,
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Draws labelled, validation and test patients among those with ground truth.

    By their names alone: what masks show, those of test patients too, chooses nobody. Labelled:
    `num_labeled` of them. Validation: 2, or 1 where fewer than 4 are left. Test: all that are left;
    but where every patient has ground truth, a fifth of them, so that the others make the
    unlabelled pool. "all" labels all but validation and test, again a fifth. Where `num_labeled` is
    all there are, they are all learnt from: to choose a checkpoint by a mask gains nothing over the
    last averaged weights, a mask more to learn from does (docs/results.md).

    Args:
      rng: random.
      with_truth: patients with ground truth.
      lists: by role; a list that is not empty stays as it is.
      num_labeled: a number, or "all".
      num_unlabeled: of patients without ground truth.
      num_validation: that many in place of 2; 0: none, so that every mask can be learnt from.

    Returns:
      Lists of labelled, validation and test patients, and what is worth telling, line by line.

    Raises:
      SplitError: too few patients with ground truth, or num_labeled is no number.
    """
    if num_labeled != "all" and not (num_labeled.isdigit() and int(num_labeled)):
        raise SplitError(f"data.num_labeled is {num_labeled!r}; wanted a number above 0, or 'all'")
    check_num_validation(num_validation, lists["validation"])
    named = {p for patients in lists.values() for p in patients}
    free = [p for p in sorted(with_truth) if p not in named]
    free = [free[i] for i in rng.permutation(len(free))]

    open_roles = {role for role in ROLES if not lists[role]}
    takes_all = "labeled" in open_roles and num_labeled != "all" and len(free) <= int(num_labeled)
    if num_validation == PROPOSED and takes_all:
        num_validation = 0
    if num_validation == 0:
        open_roles -= {"validation"}
    least = _least_validation(open_roles, num_validation) + ("labeled" in open_roles)
    if "labeled" in open_roles and num_labeled != "all":
        least = max(least, int(num_labeled))
    if len(free) < least:
        raise SplitError(
            f"{len(free)} patients with ground truth{', those in lists left out' if named else ''};"
            f" wanted at least {least}, to learn from and to choose the checkpoint by: add masks, "
            "lower data.num_labeled, or set data.num_validation=0, which spends none on choosing"
        )
    has_pool = num_unlabeled > 0 or "unlabeled" not in open_roles
    count = _how_many(
        len(free),
        open_roles,
        num_labeled,
        has_pool=has_pool,
        num_validation=num_validation,
    )

    drawn, rest = {}, free
    for role in ("labeled", "validation", "test"):
        drawn[role], rest = rest[: count[role]], rest[count[role] :]
    found = {role: tuple(lists[role]) or tuple(sorted(drawn[role])) for role in drawn}

    notes = [_role_note(role, found[role], role in open_roles) for role in found if found[role]]
    if num_validation == 0 and not found["validation"]:
        notes.append("data.validation: none; the last averaged weights are handed out, not chosen")
    if rest and "unlabeled" in open_roles:
        notes.append(
            f"in the unlabelled pool: {num_unlabeled} patients, and {len(rest)} whose masks "
            "nothing learns from"
        )
    elif "unlabeled" in open_roles:
        notes.append(f"in the unlabelled pool: {num_unlabeled} patients")
    if "labeled" in open_roles and num_labeled not in ("all", str(count["labeled"])):
        notes.append(
            f"WARNING: {count['labeled']} in place of data.num_labeled={num_labeled}, since a mask "
            "is needed for validation"
        )
    if not found["test"]:
        notes.append("WARNING: no mask is left to test on; there will be validation Dice only")
    return found, notes


def _how_many(
    total: int,
    open_roles: Collection[str],
    num_labeled: str,
    *,
    has_pool: bool,
    num_validation: int,
) -> dict[str, int]:
    """How many of `total` patients with ground truth each role gets; see `draw_lists`."""
    choose, validate, test = (r in open_roles for r in ("labeled", "validation", "test"))
    num_validation = num_validation if validate else 0
    fifth = max(1, round(total / 5))
    if choose and num_labeled == "all":
        if num_validation == PROPOSED:
            num_validation = VALIDATION_PATIENTS if total >= 6 else 1
        num_test = test * min(fifth, total - num_validation - 1)
        labeled = total - num_validation - num_test
        return {"labeled": labeled, "validation": num_validation, "test": num_test}
    least = _least_validation(open_roles, num_validation)
    labeled = min(int(num_labeled), total - least) if choose else 0
    left = total - labeled
    if num_validation == PROPOSED:
        num_validation = VALIDATION_PATIENTS if left >= 4 else 1
    left -= num_validation
    # Without a pool nothing is semi-supervised: all but a fifth go there, their masks unused.
    num_test = test * (left if has_pool else min(fifth, left, max(left - 1, 1)))
    return {"labeled": labeled, "validation": num_validation, "test": num_test}


def _least_validation(open_roles: Collection[str], num_validation: int) -> int:
    """How many patients must be drawn for validation."""
    if "validation" not in open_roles:
        return 0
    return 1 if num_validation == PROPOSED else num_validation


def _role_note(role: str, patients: Sequence[str], is_drawn: bool) -> str:
    some = ", ".join(patients[:4]) + (", ..." if len(patients) > 4 else "")
    return f"data.{role}: {len(patients)} {'drawn' if is_drawn else 'given'}{some and ': ' + some}"


def check_num_validation(num_validation: int, listed: Sequence[str]) -> None:
    """Raises SplitError unless the number is one, and does not contradict a given list."""
    if num_validation < PROPOSED:
        raise SplitError(
            f"data.num_validation is {num_validation}; wanted 0 or more, or "
            f"{PROPOSED} for the usual number"
        )
    if listed and num_validation not in (PROPOSED, len(listed)):
        raise SplitError(
            f"data.num_validation is {num_validation}, and data.validation lists {len(listed)} "
            "patients; leave one of them out"
        )


def empty_masks(role: str, names: Sequence[str]) -> SplitError:
    """Makes the error where a role's masks have nothing to learn from, choose by or test on."""
    return SplitError(
        f"the masks of data.{role} ({', '.join(names[:8])}) show no class at all; set data.{role} "
        "to others, or, of own data, draw anew with another data.draw_seed"
    )


def choose_lists(data_config) -> dict[str, tuple[str, ...]]:
    """Chooses the patients of each role, by `config.data` alone.

    `data.splits[num_labeled][split]` holds the labelled and validation patients; `data.pool` and
    `data.test_patients` the others. A non-empty `data.labeled`, `data.unlabeled`,
    `data.validation` or `data.test` replaces the list it names. With `data.num_validation` 0 there
    are no validation patients. Labelled, validation and test patients are taken out of the
    unlabelled pool.

    Raises:
      SplitError: no such split; a patient twice or in two roles; `data.num_validation` above 0,
        where the lists say how many.
    """
    table = data_config.get("splits", {})
    chosen = table.get(str(data_config.num_labeled), {}).get(data_config.split)
    num_validation = data_config.get("num_validation", PROPOSED)
    without_validation = num_validation == 0
    check_num_validation(num_validation, data_config.validation)
    if chosen is None and not (
        data_config.labeled and (data_config.validation or without_validation)
    ):
        known = {n: sorted(s) for n, s in table.items()}
        raise SplitError(
            f"no split {data_config.split!r} with num_labeled={data_config.num_labeled}; there are "
            f"{known}. Or set data.labeled and data.validation yourself"
        )
    lists = {
        "labeled": list(data_config.labeled or chosen.labeled),
        "validation": []
        if without_validation
        else list(data_config.validation or chosen.validation),
        "test": list(data_config.test or data_config.get("test_patients", ())),
        "unlabeled": list(data_config.unlabeled or data_config.get("pool", ())),
    }
    check_num_validation(num_validation, lists["validation"])
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
    return {role: tuple(lists[role]) for role in ROLES}


def resolve_split(
    data_config, volumes: Mapping[str, VolumeEntry], *, may_lack_test: bool = False
) -> Split:
    """Turns the patient lists of `config.data`, see `choose_lists`, into volume ids.

    Args:
      data_config: `config.data`; its `frames`, "both_in_pool", lets the unlabelled patients alone
        have more volumes than their first.
      volumes: index of the prepared set.
      may_lack_test: a run without test patients will do.

    Raises:
      SplitError: see `choose_lists`; a patient who is not in the data set, or without ground truth
        where that is needed; masks of a role that show nothing; an empty role (only the unlabelled
        one may be: an upper bound has none).
    """
    lists = choose_lists(data_config)
    may_be_empty = {"unlabeled"}
    may_be_empty |= {"test"} if may_lack_test else set()
    may_be_empty |= {"validation"} if data_config.num_validation == 0 else set()
    volumes_of: dict[str, list[VolumeEntry]] = {}
    for entry in volumes.values():
        volumes_of.setdefault(entry.patient_id, []).append(entry)
    ids = {}
    for role, patients in lists.items():
        if not patients and role not in may_be_empty:
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
            if data_config.get("frames") == "both_in_pool":
                entries = [volumes_of[p][0] for p in patients]
            # Of a patient with several scans those with ground truth play the role.
            blind = {e.patient_id for e in entries} - {e.patient_id for e in entries if e.has_label}
            if blind:
                names = [e.volume_id for e in entries if e.patient_id in blind]
                raise SplitError(
                    f"{role} volumes without ground truth: {', '.join(names[:8])}; only unlabelled "
                    "volumes may lack it"
                )
            entries = [e for e in entries if e.has_label]
            # Whether there is anything to measure may be known; it chooses nobody.
            shown = [e.class_pixels[:, 1:].any() for e in entries]
            if role != "labeled" and entries and not any(shown):
                raise empty_masks(role, [e.volume_id for e in entries])
        elif not data_config.unlabeled:
            entries += [e for p in lists["labeled"] for e in volumes_of[p] if not e.has_label]
        ids[role] = tuple(e.volume_id for e in entries)
    return Split(**ids)

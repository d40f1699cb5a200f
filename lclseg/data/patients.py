"""Which scans are of one patient, by their names: a patient must not be learnt from and tested on.

patient002_frame01 and patient002_frame12 are two scans of patient002, sub-01_ses-2 is one of
sub-01, ID7_0001 one of ID7, knee12_left one of knee12.
"""

import collections
import re
from collections.abc import Sequence

# What a name may end in after the patient: a word for the scan, with its number or without. Long
# words may stand apart from their number.
NUMBERED = re.compile(
    r"(fr|tp|t|ses|vis|v|run|acq|rec|rep|ph|wk|w|mo|m|yr|y|d|ser|fu)\d+[a-z]?|"
    r"(frame|time|timepoint|scan|ses|session|visit|run|acq|echo|phase|week|month|year|day|series|"
    r"part|exam|followup|stack)[_\- ]?\d+[a-z]?",
    re.IGNORECASE,
)
WORDS = frozenset(
    "ed es dia sys diastole systole l r lt rt lh rh left right pre post before after baseline base "
    "followup fu first second retest test re t1 t1w t1c t1ce t1gd t2 t2w t2f flair pd pdw dwi adc "
    "bold mr mri ct cta pet sa sax la lax 2ch 3ch 4ch ax axial tra sag sagittal cor coronal "
    "inspiration expiration insp exp rest stress native contrast art ven arterial venous delayed "
    "late".split()
)
SEPARATOR = re.compile(r"(?<=[A-Za-z0-9])[_\-. ]+")
BIDS = re.compile(r"(?P<patient>sub-[A-Za-z0-9]+)_.+")
# A plain number at the end counts scans where few of them share the rest of a name, and cases of a
# hospital, a scanner or a year where many do.
MAX_SCANS = 6


def patients_of(case_ids: Sequence[str]) -> dict[str, str]:
    """Finds the patient of each case, by case id; the case id itself where they have no other."""
    patient = {case: _without_scan(case) for case in case_ids}
    plain = {case: _without_scan(_without_number(name)) for case, name in patient.items()}
    if max(collections.Counter(plain.values()).values(), default=0) <= MAX_SCANS:
        patient = plain
    scans = collections.Counter(patient.values())
    if len(scans) == 1:  # nothing is left that tells patients apart
        return {case: case for case in case_ids}
    return {
        case: p if 1 < scans[p] and (scans[p] <= MAX_SCANS or _has_number(p)) else case
        for case, p in patient.items()
    }


def _without_scan(case: str) -> str:
    """A name without the words and numbered words for the scan at its end."""
    bids = BIDS.fullmatch(case)
    if bids:
        return bids["patient"]
    while True:
        match = next((m for m in SEPARATOR.finditer(case) if _is_scan(case[m.end() :])), None)
        if match is None:
            return case
        case = case[: match.start()]


def _is_scan(end: str) -> bool:
    return bool(NUMBERED.fullmatch(end)) or end.lower() in WORDS


def _has_number(name: str) -> bool:
    return any(c.isdigit() for c in name)


def _without_number(case: str) -> str:
    """A name without the number at its end, where what is left has a number of its own."""
    match = re.fullmatch(r"(?P<rest>.*\d.*?)[_\- ]+\d{1,4}", case)
    return match["rest"] if match else case

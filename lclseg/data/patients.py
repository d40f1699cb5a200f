"""Which scans are of one patient, by their names: a patient must not be learnt from and tested on.

patient002_frame01 and patient002_frame12 are two scans of patient002, sub-01_ses-2 is one of
sub-01, ID7_0001 one of ID7, knee12_left one of knee12.
"""

import collections
import re
from collections.abc import Sequence

# What a name may end in after the patient: a word for the scan, with its number or without.
NUMBERED = re.compile(
    r"(frame|fr|time|timepoint|tp|t|scan|ses|session|visit|vis|v|run|acq|rec|rep|echo|phase|ph|"
    r"week|wk|w|month|mo|m|year|yr|y|day|d|series|ser|part|study|exam|fu|followup|stack|vol)"
    r"-?\d+[a-z]?",
    re.IGNORECASE,
)
WORDS = frozenset(
    "ed es dia sys diastole systole l r lt rt lh rh left right pre post before after baseline base "
    "followup fu first second retest test re t1 t1w t1c t1ce t1gd t2 t2w t2f flair pd pdw dwi adc "
    "bold mr mri ct cta pet sa sax la lax 2ch 3ch 4ch ax axial tra sag sagittal cor coronal "
    "inspiration expiration insp exp rest stress native contrast art ven arterial venous delayed "
    "late".split()
)
BIDS = re.compile(r"(?P<patient>sub-[A-Za-z0-9]+)_.+")
# A plain number at the end counts scans where few of them share the rest of a name, and cases of a
# hospital, a scanner or a year where many do.
MAX_SCANS = 6


def patients_of(case_ids: Sequence[str]) -> dict[str, str]:
    """The patient of each case, by case id; the case id itself where no other case is of theirs."""
    patient = {case: _without_scan(case) for case in case_ids}
    plain = {case: _without_number(patient[case]) for case in case_ids}
    shared = collections.Counter(plain.values())
    if shared and max(shared.values()) <= MAX_SCANS and len(shared) > 1:
        patient = plain
    scans = collections.Counter(patient.values())
    return {case: p if scans[p] > 1 else case for case, p in patient.items()}


def _without_scan(case: str) -> str:
    """A name without the words and numbered words for the scan at its end."""
    bids = BIDS.fullmatch(case)
    if bids:
        return bids["patient"]
    while True:
        match = re.fullmatch(r"(?P<rest>.*[A-Za-z0-9])[_\-. ]+(?P<last>[A-Za-z0-9\-]+?)", case)
        if match is None:
            return case
        last = match["last"]
        if not (NUMBERED.fullmatch(last) or last.lower() in WORDS):
            return case
        case = match["rest"]


def _without_number(case: str) -> str:
    """A name without the number at its end, where what is left has a number of its own."""
    match = re.fullmatch(r"(?P<rest>.*\d.*?)[_\- ]+\d{1,4}", case)
    return match["rest"] if match else case

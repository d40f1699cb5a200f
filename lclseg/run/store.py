"""The slices that training draws, on the devices: all of them where they fit, else by stretches.

A batch is record numbers; the compiled step gathers its slices from here. Reading from disk happens
once a stage, or once a stretch of several hundred steps.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lclseg.data.dataset import PreparedSet
from lclseg.losses import IGNORE
from lclseg.run import devices
from lclseg.steps import Store

SHARE = 0.25  # of a device's memory
FEWEST_ROWS = 64


def num_rows(number: int) -> int:
    """Chooses rows of a store for so many slices: a multiple of 64, up to a quarter more of many.

    The compiled step depends on the number of rows. Runs with other labelled volumes have a few
    slices more or less; with rounded numbers they find each other's programs in the compilation
    cache. To compile one may take a GPU a minute and a half.

      >>> [num_rows(n) for n in (8, 451, 466, 5000)]
      [64, 512, 512, 5120]
    """
    part = max(FEWEST_ROWS, 2 ** (number.bit_length() - 3))
    return -(-number // part) * part


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels that training may see, by record.

    Attributes:
      labeled: [m] records with ground truth to learn from.
      pseudo: [p] records with pseudo-labels, ascending.
      pseudo_labels: [p, H, W] uint8.
    """

    labeled: np.ndarray
    pseudo: np.ndarray
    pseudo_labels: np.ndarray

    def of(self, records: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Looks up [n, H, W] uint8; `IGNORE` where a record has neither: its truth stays behind."""
        found = np.full_like(truth, IGNORE)
        labeled = np.isin(records, self.labeled)
        found[labeled] = truth[labeled]
        pseudo = np.isin(records, self.pseudo) & ~labeled
        found[pseudo] = self.pseudo_labels[np.searchsorted(self.pseudo, records[pseudo])]
        return found


class DeviceSlices:
    """Slices on the devices for a range of steps; see `rows`.

    Attributes:
      store: a copy per local device.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        labels: Labels,
        sampler: Callable[[int], Mapping[str, np.ndarray]],
        records: np.ndarray,
        *,
        capacity: int | None = None,
    ):
        """Holds nothing yet.

        Args:
          prepared: the data set.
          labels: what training may see.
          sampler: step -> record numbers by group.
          records: all that may be drawn.
          capacity: rows at most; None: as many as take `SHARE` of a device's memory.
        """
        if capacity is None:
            pixel = 4 * prepared.preprocessing.num_channels + 1  # bytes: image and label
            capacity = int(SHARE * devices.memory_bytes() / (pixel * prepared.image_size**2 + 1))
        self.prepared, self.labels, self.sampler = prepared, labels, sampler
        self.all = np.unique(records)
        self.capacity = min(capacity, num_rows(len(self.all)))
        self.held = np.empty(0, int)  # ascending
        self.store: Store | None = None

    def load(self, first: int, last: int) -> int:
        """Makes the slices of the steps from `first` on ready; returns the step they end before.

        That is `last` where the slices of all steps fit.

        Raises:
          ValueError: the slices of one step alone are more than fit.
        """
        wanted, end = self.all, last
        if len(self.all) > self.capacity:
            wanted, end = np.empty(0, int), first
            while end < last:
                more = np.union1d(wanted, np.concatenate(list(self.sampler(end).values())))
                if len(more) > self.capacity:
                    break
                wanted, end = more, end + 1
            if end == first:
                raise ValueError(
                    f"a batch has more slices than the {self.capacity} that fit into "
                    f"{SHARE:.0%} of a device's memory; lower data.labeled_batch_size"
                )
        if self.store is None or not np.isin(wanted, self.held).all():
            self.held, self.store = wanted, self._placed(wanted)
        return end

    def _placed(self, records: np.ndarray) -> Store:
        """The slices of these records on every device, padded to one shape for one program."""
        image, truth = self.prepared.read_slices(records)
        missing = self.capacity - len(records)

        def padded(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

        is_labeled = np.isin(records, self.labels.labeled)
        arrays = (padded(image), padded(self.labels.of(records, truth)), padded(is_labeled))
        return Store(*devices.replicate(arrays))

    def rows(self, steps: range) -> dict[str, np.ndarray]:
        """Finds rows [devices, steps, n] int32 of the store by group, this process' share."""
        drawn = [self.sampler(step) for step in steps]
        return {
            group: devices.share(np.stack([np.searchsorted(self.held, d[group]) for d in drawn]))
            for group in drawn[0]
        }

    def batch(self, step: int) -> tuple[Store, dict[str, np.ndarray]]:
        """Makes a store that holds the batch of any step, and its rows [devices, n]."""
        drawn = self.sampler(step)
        records = np.unique(np.concatenate(list(drawn.values())))
        held, store = self.held, self.store
        if store is None or not np.isin(records, held).all():
            held, store = records, self._placed(records)
        return store, {g: devices.share(np.searchsorted(held, r)) for g, r in drawn.items()}

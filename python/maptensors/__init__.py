"""Load, edit, share and save machine-learning weights without copying them.

>>> import maptensors as mt
>>> with mt.open("models/digits.safetensors") as model:  # maps the file; reads only its header
...     w = model["fc1.weight"].numpy()  # the file's own pages, copy-on-write
>>> w.shape
(64, 64)

**The file must stay as it is while it is mapped.** Nobody may write into it, truncate it or punch holes in
it until the model and every array taken from it are gone: the arrays would change, or the process would die
of ``SIGBUS``. Replacing it by renaming another file over it, as every save here does, and deleting it
are fine. For files that others rewrite in place, open with ``backend="pread"``: the same interface over
memory of its own; or ``backend="memfd"``, whose pages forked children share. ``guard=True`` makes such
changes errors at the next access through the model (:func:`open` says what it cannot).

Mode ``"r+"`` edits the file itself: arrays are its pages, shared with whoever else maps it, and what is
written to them is in the file at once; ``model.flush()`` has it reach the disk. Only truncating the file and
punching holes in it are forbidden then.

In mode ``"c"``, the default, the pages of a tensor can be written from when somebody takes it to write
(``numpy()``, ``torch()``, a buffer, DLPack, an assignment), and no others. Where the kernel promises memory
for all that may be written (``vm.overcommit_memory=2``), only those are charged.

In mode ``"r"`` nothing can be written. numpy and JAX know. torch does not look at the read-only flags of
DLPack and of buffers: a write through ``torch.from_dlpack``, ``asarray`` or ``frombuffer`` goes to a page of
this process's own, and ``model.changed()`` reports it. ``torch.from_numpy`` warns of a read-only array, and a
write to it crashes.

``maptensors.numpy``, ``maptensors.torch`` and ``maptensors.flax`` have the functions of the safetensors
modules of the same names; :class:`safe_open` is safetensors' too. Moving over is a change of import.

Only the main interpreter of a process can import this package; in a subinterpreter it is an ``ImportError``.
"""

from collections.abc import Mapping as _Mapping

# The extension first: where that cannot be imported, nothing of the package is left behind.
from maptensors import _native as _native
from maptensors import plans
from maptensors._api import dumps, edit, save
from maptensors._checkpoint import Checkpointer, Saved, Saving
from maptensors._lazy import Prefetch, RankView, Stream
from maptensors._native import (
    Changes,
    Draft,
    Model,
    Tensor,
    __version__,
    apply_delta,
    create,
    diff,
    loads,
    materialize,
    open,
    save_delta,
    save_diff,
    verify,
)
from maptensors._results import Change, Differences, Evicted, Residency, TensorInfo
from maptensors._safe_open import safe_open
from maptensors._share import Publication, Publisher, Subscriber, attach, publications, publish
from maptensors.errors import MapTensorsError

#: What code written for safetensors catches.
SafetensorError = MapTensorsError

_Mapping.register(Model)
_Mapping.register(Changes)

__all__ = [
    "Change",
    "Changes",
    "Checkpointer",
    "Differences",
    "Draft",
    "Evicted",
    "MapTensorsError",
    "Model",
    "Prefetch",
    "Publication",
    "Publisher",
    "RankView",
    "Residency",
    "SafetensorError",
    "Saved",
    "Saving",
    "Stream",
    "Subscriber",
    "Tensor",
    "TensorInfo",
    "__version__",
    "apply_delta",
    "attach",
    "create",
    "diff",
    "dumps",
    "edit",
    "loads",
    "materialize",
    "open",
    "plans",
    "publications",
    "publish",
    "safe_open",
    "save",
    "save_delta",
    "save_diff",
    "verify",
]

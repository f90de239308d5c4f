"""Media of a job's held-out rows, for the page that shows what was answered about them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from html import escape
from io import BytesIO
from pathlib import Path

from okavango.modalities.content import Media
from okavango.modalities.image import decode_image
from okavango.platform.catalog.records import JobRecord
from okavango.platform.errors import NotFoundError, OkavangoError
from okavango.training.dataset import Dataset, open_dataset
from okavango.training.uploads import Uploads
from okavango.web.services import Services

_KEPT = 256
_KEPT_DATASETS = 8
_SIDE = 240  # pixels of a picture's longer side, as it is shown
_SOUNDS = {b"RIFF": "audio/wav", b"fLaC": "audio/flac", b"OggS": "audio/ogg"}

Row = dict[str, Media]


def holds_out(job: JobRecord) -> bool:
    """Whether a job has rows that it does not learn from."""
    return job.spec.get("eval") is not None or job.spec.get("hold_out") is not None


class JobMedia:
    """Reads rows when they are looked at, and keeps the last ones. Safe to share between threads."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._datasets: OrderedDict[str, Dataset] = OrderedDict()
        self._rows: OrderedDict[tuple[str, int], Row] = OrderedDict()
        self._lock = threading.Lock()

    def tag(self, job: JobRecord, line: int, digest: str, root: str) -> str:
        """A medium as HTML, to be fetched below `root`; words, where its data are gone."""
        try:
            medium = self._row(job, line).get(digest)
        except OkavangoError:
            medium = None
        if medium is None:
            return '<div class="okv-gone okv-muted">no longer there</div>'
        place = escape(f"{root}/{job.id}/{line}/{digest}")
        if medium.modality == "audio":
            return f'<audio controls preload="none" src="{place}"></audio>'
        return f'<img src="{place}" alt="picture of line {line}" loading="lazy">'

    def shown(self, job: JobRecord, line: int, digest: str) -> tuple[bytes, str]:
        """What a browser gets, and its type: pictures small and made anew, sounds as they are.

        Raises:
            NotFoundError: the row has no such medium.
            OkavangoError: the job's data cannot be read any more.
        """
        medium = self._row(job, line).get(digest)
        if medium is None:
            raise NotFoundError("no such medium", where=f"{job.id}, line {line}")
        if medium.modality == "audio":
            return medium.data, _SOUNDS.get(medium.data[:4], "audio/mpeg")
        picture = decode_image(medium.data, self._services.options.media)
        picture.thumbnail((_SIDE, _SIDE))
        file = BytesIO()
        picture.save(file, "PNG")
        return file.getvalue(), "image/png"

    def _row(self, job: JobRecord, line: int) -> Row:
        with self._lock:
            key = (job.id, line)
            if key not in self._rows:
                dataset = self._dataset(job)
                if not 1 <= line <= len(dataset):
                    raise NotFoundError(f"has {len(dataset):,} rows held out, and none {line}", where=job.id)
                messages = dataset.row(line - 1).messages
                media = (medium for message in messages for medium in message.media)
                self._rows[key] = {medium.digest: medium for medium in media}
            self._rows.move_to_end(key)
            while len(self._rows) > _KEPT:
                self._rows.popitem(last=False)
            return self._rows[key]

    def _dataset(self, job: JobRecord) -> Dataset:
        """Raises NotFoundError where the job holds nothing out."""
        if job.id not in self._datasets:
            spec = job.spec
            if not holds_out(job):
                raise NotFoundError("holds nothing out", where=job.id)
            services = self._services
            uploads = Uploads(services.catalog, services.stored, job.principal)
            place = uploads.locate(Path(spec["eval"] or spec["data"]))
            self._datasets[job.id] = open_dataset(
                place.path,
                form=spec.get("format"),
                allow_files=place.allow_files,
                uploads=place.uploads,
                limits=services.options.media,
                cache=services.settings.data,
            )
        self._datasets.move_to_end(job.id)
        while len(self._datasets) > _KEPT_DATASETS:
            self._datasets.popitem(last=False)
        return self._datasets[job.id]

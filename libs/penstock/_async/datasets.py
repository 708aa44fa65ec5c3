"""Datasets, and the other artifacts that are files under a name: predictions, code, checkpoints."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from penstock._async import io
from penstock._async.streams import AsyncStreams
from penstock.datasets import EXAMPLES, ReadOptions, describe, detect_format, find_files, read, write_example
from penstock.errors import InvalidArgument, NotFound
from penstock.names import artifact_name
from penstock.packaging.bundle import LocalFile, hashed_files
from penstock.registry.v1 import artifact_pb2, version_pb2
from penstock.registry.v1 import artifact_service_pb2 as service
from penstock.transfer import (
    PARALLEL_FILES,
    Meter,
    PartialFile,
    ProgressCallback,
    file_messages,
)
from penstock.transport import new_request_id

DATASET = artifact_pb2.ARTIFACT_KIND_DATASET


class AsyncDatasets(AsyncStreams):
    """Data to train, measure and predict on."""

    async def push_dataset(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        format: str = "",  # noqa: A002 - its name in the contract
        options: ReadOptions | None = None,
        license: str = "",  # noqa: A002 - its name in the description
        source: str = "",
        labels: Mapping[str, str] | None = None,
        progress: ProgressCallback | None = None,
        request_id: str | None = None,
        reuse: bool = False,
    ) -> artifact_pb2.Artifact:
        """Look through data as they lie on disk, describe and push them; return the new version, READY.

        Every row is looked at first: what a training would fail at is said here. Files whose contents the
        registry holds already are not sent, and an upload that is cut goes on where it stopped.

        Args:
            path: A file or directory of any kind that `penstock.datasets` knows, or the name of a built-in
                dataset: `penstock.datasets.EXAMPLES`.
            name: Name of the dataset; without one, that of the file.
            format: npz, csv, parquet, images or text; empty means what it is.
            options: Which column is the label, and what else the data do not say of themselves.
            license: SPDX identifier of the data's licence.
            source: Where they come from, for people.
            labels: Free key-value pairs.
            progress: Told how far the push is; called from other threads, so it must be quick.
            request_id: A key (a UUID) that makes a repetition of this push safe.
            reuse: Make no new version if the newest one is the same: files, format and description.

        Raises:
            InvalidArgument: The data are not fit to learn from; the words name row and column, and what to
                do.
            NotFound: There is nothing at `path`.
            FailedPrecondition: The name is one of another kind of artifact, or a library is needed.
            ResourceExhausted: The registry has no space left; the version is not READY.
        """
        given = str(path)
        if given in EXAMPLES:
            with tempfile.TemporaryDirectory(prefix="penstock-dataset-") as scratch:
                example = await io.in_thread(write_example, given, Path(scratch))
                return await self.push_dataset(
                    scratch,
                    name=name or given.partition(":")[2],
                    format=format,
                    options=options,
                    license=license or example.license,
                    source=source or example.source,
                    labels=labels,
                    progress=progress,
                    request_id=request_id,
                    reuse=reuse,
                )
        where = await io.in_thread(Path(given).expanduser)
        root, sources = await io.in_thread(find_files, where)
        checking = Meter("check", sum(file.stat().st_size for file in sources), progress)
        wanted = options or ReadOptions()
        kind = format or await io.in_thread(detect_format, where)
        contents = await io.in_thread(read, where, kind, wanted)
        description = await io.in_thread(partial(describe, contents, license=license, source=source))
        if wanted.features:
            description["learn_from"] = list(wanted.features)
        del contents
        checking.finish()
        return await self.push_artifact(
            name or _name_of(where),
            DATASET,
            root,
            sources,
            format=kind,
            description=description,
            labels=labels,
            progress=progress,
            request_id=request_id,
            reuse=reuse,
        )

    async def push_artifact(
        self,
        name: str,
        kind: artifact_pb2.ArtifactKind.ValueType,
        root: Path,
        files: Sequence[Path],
        *,
        format: str = "",  # noqa: A002 - its name in the contract
        description: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        progress: ProgressCallback | None = None,
        request_id: str | None = None,
        reuse: bool = False,
    ) -> artifact_pb2.Artifact:
        """Push files as they are under a name, such as the program of a training; return the new version.

        Args:
            name: Of the artifact.
            kind: What it is.
            root: The folder that paths are relative to.
            files: Those below it that are pushed.
            format: What reads them, for kinds that have one.
            description: What is known of the contents.
            labels: Free key-value pairs.
            progress: Told how far the push is; called from other threads.
            request_id: A key (a UUID) that makes a repetition safe.
            reuse: Make no new version if the newest one is the same: files, format and description.

        Raises:
            InvalidArgument: A file changed meanwhile, or the registry refuses it.
            FailedPrecondition: The name is one of another kind of artifact.
            ResourceExhausted: The registry has no space left; the version is not READY.
        """
        parent = artifact_name(name)
        if "/versions/" in parent:
            raise InvalidArgument(f"{name!r}: a new version gets its number itself; give the name alone.")
        local = [LocalFile(file.relative_to(root).as_posix(), file, file.stat().st_size) for file in files]
        total = sum(file.size_bytes for file in local)
        local = await io.in_thread(hashed_files, local, Meter("hash", total, progress).add)
        artifact = artifact_pb2.Artifact(
            kind=kind, files=[file.to_proto() for file in local], format=format, labels=labels or {}
        )
        artifact.description.update(dict(description or {}))
        if reuse:
            with suppress(NotFound):
                newest = await self.get_dataset(name)
                if _same(newest, artifact):
                    return newest
        made = await self._unary(
            self._artifacts.CreateArtifact,
            service.CreateArtifactRequest(
                parent=parent, artifact=artifact, request_id=request_id or new_request_id()
            ),
        )
        if made.state != artifact_pb2.ARTIFACT_STATE_UPLOADING:
            return made
        meter = Meter("upload", total, progress)
        have = {file.path: file.received_bytes for file in made.files}
        lacking = [file for file in local if have.get(file.path, 0) < file.size_bytes]
        meter.add(total - sum(file.size_bytes for file in lacking))
        upload = partial(self._upload_file, made.name, have, meter)
        await io.for_each(upload, lacking, limit=PARALLEL_FILES)
        return await self._unary(
            self._artifacts.FinalizeArtifact, service.FinalizeArtifactRequest(name=made.name)
        )

    async def get_dataset(self, dataset: str) -> artifact_pb2.Artifact:
        """Return a dataset, or another artifact: ``digits`` (the newest READY one), ``digits:3``.

        Raises:
            NotFound: There is none.
        """
        return await self._unary(
            self._artifacts.GetArtifact, service.GetArtifactRequest(name=artifact_name(dataset))
        )

    async def list_datasets(
        self,
        name: str = "-",
        *,
        kind: artifact_pb2.ArtifactKind.ValueType = DATASET,
        limit: int | None = None,
    ) -> list[artifact_pb2.Artifact]:
        """Return the newest version of each dataset, newest first; of one name, all its versions.

        Args:
            name: Name of a dataset, or "-" for all.
            kind: Another kind of artifact, such as ARTIFACT_KIND_PREDICTIONS.
            limit: At most this many.
        """
        parent = "artifacts/-" if name == "-" else artifact_name(name)
        request = service.ListArtifactsRequest(parent=parent, kind=kind)
        return await self._list(self._artifacts.ListArtifacts, request, lambda page: page.artifacts, limit)

    async def pull_dataset(
        self, dataset: str, directory: str | Path, *, progress: ProgressCallback | None = None
    ) -> artifact_pb2.Artifact:
        """Fetch the files of a dataset, or of predictions, into a directory; return what it is.

        What is there already and right is kept; a download that was cut goes on where it stopped.

        Raises:
            NotFound: There is no such dataset.
            DataLoss: Bytes arrived that are not what the registry recorded.
        """
        found = await self.get_dataset(dataset)
        folder = Path(directory)
        await io.in_thread(folder.mkdir, parents=True, exist_ok=True)
        meter = Meter("download", found.size_bytes, progress)
        await io.for_each(
            partial(self._download_file, found.name, folder, meter), found.files, limit=PARALLEL_FILES
        )
        return found

    async def delete_dataset(self, dataset: str) -> None:
        """Delete one version of a dataset, or of another artifact, given by number: ``digits:3``.

        Raises:
            NotFound: There is none.
            InvalidArgument: It has no number.
        """
        name = artifact_name(dataset)
        if "/versions/" not in name:
            raise InvalidArgument(f"{dataset!r}: say which version, as {dataset}:NUMBER.")
        await self._delete(self._artifacts.DeleteArtifact, service.DeleteArtifactRequest(name=name))

    async def _upload_file(
        self, artifact: str, have: Mapping[str, int], meter: Meter, file: LocalFile
    ) -> None:
        await self._send_file(
            file,
            have.get(file.path, 0),
            meter,
            call=self._artifacts.UploadFile,
            messages=lambda offset: file_messages(artifact, file, offset, meter),
            look=self._artifacts.GetArtifact,
            request=service.GetArtifactRequest(name=artifact),
        )

    async def _download_file(
        self, artifact: str, folder: Path, meter: Meter, file: version_pb2.BundleFile
    ) -> None:
        await self._fetch_file(
            PartialFile(folder, file),
            meter,
            call=self._artifacts.DownloadFile,
            request=lambda offset: service.DownloadFileRequest(
                artifact=artifact, path=file.path, offset=offset
            ),
        )


def _same(one: artifact_pb2.Artifact, other: artifact_pb2.Artifact) -> bool:
    """Whether two artifacts hold the same, and say the same of it."""
    files = [{(file.path, file.sha256) for file in each.files} for each in (one, other)]
    said = [(each.kind, each.format, each.description) for each in (one, other)]
    return files[0] == files[1] and said[0] == said[1]


def _name_of(path: Path) -> str:
    """Return a name after a file, made of what a name may have."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.resolve().stem).strip("-._")
    return name[:63] or "dataset"

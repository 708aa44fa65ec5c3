# Made from _async/transfer.py by libs/make_sync.py; edit that and run it again.
"""Push and download."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from penstock._sync import io
from penstock._sync.ensembles import Ensembles
from penstock._sync.streams import Streams
from penstock.names import alias_name, resource
from penstock.packaging import PackageOptions, open_bundle
from penstock.packaging.bundle import Bundle, LocalFile
from penstock.packaging.manifest import to_yaml
from penstock.registry.v1 import registry_service_pb2 as registry
from penstock.registry.v1 import version_pb2
from penstock.transfer import (
    PARALLEL_FILES,
    Meter,
    PartialFile,
    ProgressCallback,
    received,
    upload_messages,
)
from penstock.transport import new_request_id

# Seconds for the registry to check and digest a whole bundle.
_FINALIZE_TIMEOUT_SECONDS = 600.0


class Transfers(Ensembles, Streams):
    """Bundles on their way to and from the registry."""

    def push(
        self,
        path: str | Path,
        *,
        model: str | None = None,
        alias: str | None = None,
        labels: Mapping[str, str] | None = None,
        options: PackageOptions | None = None,
        progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> version_pb2.Version:
        """Push a model as it lies on disk; return its new version, READY.

        Files whose contents the registry holds already are not sent. An upload that is cut goes on where it
        stopped; after a failure, the same call with the same `request_id` goes on too.

        Args:
            path: A model file or directory, of any kind that `penstock.packaging` knows.
            model: Name of the model; without one, the name of the file. Made if there is none.
            alias: Point this alias at the new version.
            labels: Free key-value pairs.
            options: What the files do not say: signature, metrics, batching, …
            progress: Told how far the push is; called from other threads, so it must be quick.
            request_id: A key (a UUID) that makes a repetition of this push safe.

        Raises:
            InvalidArgument: The files are no model that could be served safely, or lack a signature: the
                words say what to give. Or the registry found that the bundle is unsafe or does not match
                its manifest: the version stays, FAILED, and says why; a repetition is told the same. Or the
                `request_id` was used for another push.
            ResourceExhausted: The registry has no space left; the version is not READY.
        """
        with open_bundle(Path(path), options or PackageOptions()) as bundle:
            return self.push_bundle(
                bundle, model=model, alias=alias, labels=labels, progress=progress, request_id=request_id
            )

    def push_bundle(
        self,
        bundle: Bundle,
        *,
        model: str | None = None,
        alias: str | None = None,
        labels: Mapping[str, str] | None = None,
        progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> version_pb2.Version:
        """Push a bundle that `penstock.packaging.open_bundle` made; else as `push`."""
        name = resource("models", model or bundle.name)
        if alias:
            alias_name(name, alias)  # refused now, not when the version is there already
        bundle = self.complete_ensemble(bundle)
        hashing = Meter("hash", bundle.size_bytes, progress)
        bundle = io.in_thread(bundle.hashed, hashing.add)
        request = registry.CreateVersionRequest(
            parent=name,
            manifest=bundle.manifest,
            files=[file.to_proto() for file in bundle.files],
            labels=labels or {},
            allow_create_model=True,
            request_id=request_id or new_request_id(),
        )
        version = self._unary(self._registry.CreateVersion, request)
        if version.state == version_pb2.VERSION_STATE_UPLOADING:
            meter = Meter("upload", bundle.size_bytes, progress)
            io.for_each(partial(self._upload, version, meter), bundle.files, limit=PARALLEL_FILES)
        # Of a version that FAILED, under the same request_id, this asks for the reason again.
        if version.state in (version_pb2.VERSION_STATE_UPLOADING, version_pb2.VERSION_STATE_FAILED):
            version = self._unary(
                self._registry.FinalizeVersion,
                registry.FinalizeVersionRequest(name=version.name),
                timeout=_FINALIZE_TIMEOUT_SECONDS,
            )
        if alias:
            self.set_alias(name, alias, version.number, comment="pushed")
            version = self._unary(self._registry.GetVersion, registry.GetVersionRequest(name=version.name))
        return version

    def _upload(self, version: version_pb2.Version, meter: Meter, file: LocalFile) -> None:
        """Send what the registry lacks of one file."""
        self._send_file(
            file,
            received(version.files, file.path),
            meter,
            call=self._registry.UploadArtifact,
            messages=lambda offset: upload_messages(version.name, file, offset, meter),
            look=self._registry.GetVersion,
            request=registry.GetVersionRequest(name=version.name),
        )

    def download(
        self, version: str, directory: str | Path, *, progress: ProgressCallback | None = None
    ) -> version_pb2.Version:
        """Fetch the files of a version, and its `manifest.yaml`, into a directory; return the version.

        What is there already and right is kept; a download that was cut goes on where it stopped.

        Raises:
            NotFound: There is no such version.
            DataLoss: Bytes arrived that are not what the registry recorded.
        """
        found = self.get_version(version)
        folder = Path(directory)
        io.in_thread(folder.mkdir, parents=True, exist_ok=True)
        meter = Meter("download", found.size_bytes, progress)
        io.for_each(partial(self._download, found.name, folder, meter), found.files, limit=PARALLEL_FILES)
        (folder / "manifest.yaml").write_text(to_yaml(found.manifest))
        return found

    def _download(self, version: str, folder: Path, meter: Meter, file: version_pb2.BundleFile) -> None:
        self._fetch_file(
            PartialFile(folder, file),
            meter,
            call=self._registry.DownloadArtifact,
            request=lambda offset: registry.DownloadArtifactRequest(
                version=version, path=file.path, offset=offset
            ),
        )

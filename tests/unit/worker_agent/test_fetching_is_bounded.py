"""What is fetched goes to the disk as it comes: its size costs no memory."""

import hashlib
import tracemalloc
from collections.abc import AsyncGenerator
from pathlib import Path

from penstock_kit.artifacts.digest import files_digest
from penstock_worker.adapters.bundle_cache import BundleCache
from penstock_worker.domain.supervision import BundleFile, WantedFiles

MIB = 1 << 20
SIZE = 96 * MIB


class Source:
    """Gives files of zeros, so many as are asked for."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    async def download(self, version: str, path: str, offset: int) -> AsyncGenerator[bytes, None]:
        self.offsets.append(offset)
        for _ in range(offset, SIZE, MIB):
            yield bytes(MIB)


async def test_a_large_dataset_is_fetched_and_checked_with_the_memory_of_a_few_chunks(
    tmp_path: Path,
) -> None:
    digest = hashlib.sha256()
    for _ in range(SIZE // MIB):
        digest.update(bytes(MIB))
    file = BundleFile("data.npz", SIZE, digest.hexdigest())
    name = files_digest([(file.path, file.size_bytes, file.sha256)])
    source = Source()
    cache = BundleCache(tmp_path / "bundles", limit_bytes=2 * SIZE, downloader=source)
    await cache.start()
    # An earlier agent had a third of it.
    partial = tmp_path / "bundles" / ".partial" / name.removeprefix("sha256:") / "data.npz"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(SIZE // 3))
    tracemalloc.start()
    try:
        wanted = WantedFiles("artifacts/large/versions/1", name, b"", (file,))
        async with cache.lease(wanted, lambda _: None) as path:
            assert (path / "data.npz").stat().st_size == SIZE
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        await cache.stop()
    assert source.offsets == [SIZE // 3]
    assert most < 8 * MIB

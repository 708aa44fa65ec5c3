"""Bundles of files: paths, digests, blobs by their contents, and uploads under way."""

from penstock_kit.artifacts.digest import (
    EMPTY_SHA256,
    canonical_manifest,
    files_digest,
    sha256_of_file,
    tree_digest,
)
from penstock_kit.artifacts.paths import check_bundle_path, check_bundle_paths

__all__ = [
    "EMPTY_SHA256",
    "canonical_manifest",
    "check_bundle_path",
    "check_bundle_paths",
    "files_digest",
    "sha256_of_file",
    "tree_digest",
]

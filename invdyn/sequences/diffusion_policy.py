"""diffusion_policy's replay buffer: zarr v2 arrays `data/<key>` and `meta/episode_ends`, cumulative and exclusive.

obs_t and action_t share a row, so T rows give T - 1 transitions. Chunks cross episodes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Num

from invdyn import storage
from invdyn.errors import DataError
from invdyn.sequences import files
from invdyn.sequences.base import EpisodeArrays, SequencePlan, SourceFile
from invdyn.sequences.boundaries import lengths_from_ends
from invdyn.sequences.codecs import DAMAGE, check_blosc
from invdyn.sequences.file_reader import FAIL, FileReader, changed, check_choice, plan_file
from invdyn.sequences.files import describe, find_files, open_binary, reading, source_file
from invdyn.sequences.hdf5 import (
    MAX_VECTOR_NDIM,
    check_numeric,
    check_rows,
    describe_keys,
    flat_rows,
    side_by_side,
    width,
)

if TYPE_CHECKING:
    import zarr
    from zarr.storage import FsspecStore

DATA_GROUP = "data"
EPISODE_ENDS = "meta/episode_ends"
GROUP_FILE = ".zgroup"
ARRAY_FILE = "/.zarray"
ZIP_SUFFIX = ".zip"
STATE_KEY = "state"
FILL = "fill"


class DiffusionPolicyReader(FileReader):
    """Reads a replay buffer: a .zarr folder or a .zarr.zip file.

    Args:
        path: the folder or the zip file.
        state_keys: arrays in `data` that make the state.
        action_key: array in `data` of the actions.
        on_error: `fail` or `skip`.
        missing_chunks: `fail` where a chunk has no file, or `fill` its rows with the array's fill value.
    """

    format_name = "diffusion_policy"
    default_state_keys = (STATE_KEY,)
    default_action_key = "action"

    def __init__(
        self,
        path: str | Path,
        state_keys: Iterable[str] | None = None,
        action_key: str | None = None,
        *,
        on_error: str = FAIL,
        missing_chunks: str = FAIL,
    ):
        super().__init__(path, state_keys, action_key, on_error=on_error)
        check_choice("missing_chunks", missing_chunks, (FAIL, FILL))
        self.missing_chunks = missing_chunks

    @classmethod
    def recognises(cls, path: str | Path) -> bool:
        """Return whether there is a zarr group or a zip file."""
        root = str(path)
        if root.endswith((ZIP_SUFFIX, ".zarr")):
            return True
        return storage.exists(storage.join(root, GROUP_FILE)) or bool(_buffers(root))

    def find(self) -> list[str]:
        """Return the replay buffer, or those in a folder."""
        if self.path.endswith(ZIP_SUFFIX) or storage.exists(storage.join(self.path, GROUP_FILE)):
            return [self.path]
        return _buffers(self.path) or [self.path]

    def inspect_file(self, path: str) -> SequencePlan:
        """Read the episode ends and the arrays' descriptions."""
        with open_zarr(path) as group:
            arrays = {key: _array(group, f"{DATA_GROUP}/{key}", path) for key in (*self.state_keys, self.action_key)}
            ends = np.asarray(_array(group, EPISODE_ENDS, path)[:]).reshape(-1).astype(np.int64)
            shapes = {key: array.shape for key, array in arrays.items()}
            if not len(ends):
                raise DataError(f"a recording must hold at least one episode: {path}: {EPISODE_ENDS} is empty")
            if (np.diff(ends, prepend=0) < 0).any():
                raise DataError(
                    f"{EPISODE_ENDS} must not decrease: {path}: {ends[:8].tolist()}...; repair the recording"
                )
            check_rows({**{key: shape[0] for key, shape in shapes.items()}, EPISODE_ENDS: int(ends[-1])}, path)
            for key, array in arrays.items():
                self._check_chunks(array, key, path)
        first_row, num_rows = lengths_from_ends(ends)
        kept = num_rows > 0
        return plan_file(
            self._source(path),
            num_states=num_rows[kept],
            num_actions=num_rows[kept],
            dims=(sum(width(shapes[key]) for key in self.state_keys), width(shapes[self.action_key])),
            episode_index=np.flatnonzero(kept),
            first_row=first_row[kept],
            warnings=() if kept.all() else (f"{path}: {int((~kept).sum())} episodes have no rows",),
        )

    def read(self, plan: SequencePlan) -> EpisodeArrays:
        """Read each array of the planned rows in one slice."""
        path = plan.files[plan.file_index[0]].path
        assert plan.first_row is not None
        rows = slice(int(plan.first_row[0]), int(plan.first_row[-1] + plan.num_states[-1]))
        with open_zarr(path) as group:
            states = [self._rows(group, key, rows, path) for key in self.state_keys]
            return EpisodeArrays(side_by_side(states), self._rows(group, self.action_key, rows, path))

    def source_paths(self, file: SourceFile) -> list[str]:
        """Return the zip file, or the files of the arrays that are read."""
        if not storage.is_folder(file.path):
            return [file.path]
        names = (*(f"{DATA_GROUP}/{key}" for key in dict.fromkeys((*self.state_keys, self.action_key))), EPISODE_ENDS)
        # Chunks are named 0.0, or lie in folders: 0/0.
        return [
            path
            for name in names
            for path in find_files(storage.join(file.path, name), ("",), recursive=True, hidden=True)
        ]

    def _source(self, path: str) -> SourceFile:
        if not storage.is_folder(path):
            return source_file(path, self.path)
        return describe(path, self.path, self.source_paths(SourceFile(path, "", 0, 0)))

    def _check_chunks(self, array: zarr.Array[Any], key: str, path: str) -> None:
        """Check that every chunk has a file: zarr reads a missing one as if it were recorded."""
        if self.missing_chunks == FAIL and array.nchunks_initialized < array.nchunks:
            raise DataError(
                f"file is truncated: {path}: {array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks of "
                f"{DATA_GROUP}/{key} are missing; copy it again, or, if those rows really hold {array.fill_value}, set "
                "format_options.missing_chunks: fill"
            )

    def _rows(self, group: zarr.Group, key: str, rows: slice, path: str) -> Num[np.ndarray, "rows dim"]:
        values = np.asarray(_array(group, f"{DATA_GROUP}/{key}", path)[rows])
        if len(values) != rows.stop - rows.start:
            raise changed(path)
        return flat_rows(values)


@contextmanager
def open_zarr(path: str) -> Iterator[zarr.Group]:
    """Open a zarr v2 group in a folder or a zip file.

    Raises:
        DataError: when it is missing, corrupt or not such a group.
    """
    import zarr

    if not storage.exists(path):
        raise DataError(f"file not found: {path}")
    check_blosc()
    with reading(path, zipfile.BadZipFile, *DAMAGE):
        if storage.is_url(path):
            with storage.explained(path), _open_store(path) as store:
                yield zarr.open_group(store, mode="r", zarr_format=2)
            return
        if storage.is_folder(path):
            yield zarr.open_group(path, mode="r", zarr_format=2)
            return
        # A store that failed to open cannot be closed: let a damaged file fail before.
        zipfile.ZipFile(path).close()
        with zarr.storage.ZipStore(path, mode="r") as archive:
            yield zarr.open_group(archive, mode="r", zarr_format=2)


@contextmanager
def _open_store(url: str) -> Iterator[FsspecStore]:
    """Open a folder or a zip file of a storage service as a zarr store."""
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from fsspec.implementations.zip import ZipFileSystem
    from zarr.storage import FsspecStore

    with ExitStack() as stack:
        if storage.is_folder(url):
            filesystem, name = storage.connect(url)
        else:
            filesystem, name = ZipFileSystem(stack.enter_context(open_binary(url)), skip_instance_cache=True), ""
        # zarr asks from a loop of its own; a service's connections belong to the loop that they were made in.
        shared = AsyncFileSystemWrapper(filesystem, asynchronous=True, skip_instance_cache=True)
        yield FsspecStore(shared, read_only=True, path=name)


def _array(group: zarr.Group, name: str, path: str) -> zarr.Array[Any]:
    import zarr

    node = group.get(name)
    if not isinstance(node, zarr.Array):
        raise DataError(
            f"key {name!r} is missing: {path}: found {describe_keys(_shapes(group))}; set shape_meta.obs and "
            "shape_meta.action_key to keys of data"
        )
    check_numeric(node.dtype, node.shape, name, path)
    if len(node.shape) > MAX_VECTOR_NDIM + 1:
        raise DataError(f"{name} must hold vectors: {path}: its shape is {node.shape}; choose other keys in shape_meta")
    return node


def _shapes(group: zarr.Group) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays; read from their descriptions, as some may need a codec that is not here."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    async def describe() -> dict[str, tuple[int, ...]]:
        found = {}
        async for name in group.store.list():
            content = None
            if name.endswith(ARRAY_FILE):
                content = await group.store.get(name, default_buffer_prototype())
            if content is not None:
                found[name.removesuffix(ARRAY_FILE)] = tuple(json.loads(content.to_bytes())["shape"])
        return found

    return dict(sorted(sync(describe()).items()))


def _buffers(root: str) -> list[str]:
    """Return the replay buffers directly in a folder."""
    if not storage.is_folder(root):
        return []
    folders = [path for path in files.find_folders(root, ".zarr") if storage.exists(storage.join(path, GROUP_FILE))]
    return folders + find_files(root, (".zarr.zip",))

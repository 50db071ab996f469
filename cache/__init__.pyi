from .checksums import begins_with
from .codec import Codec, FirstPositionVariesError
from .copying import compact, copy_rows, drop_rows
from .encoding import Roles
from .exporting import export_store
from .filling import FillReport, ShardsLostError, fill
from .inspecting import (
    RowView,
    StoreDescription,
    describe,
    row_panel,
    store_panel,
    view_row,
    write_page,
)
from .joining import PartsError, join_stores
from .layout import ArraySpec, StoreSpec
from .location import StoreUnreachableError, locate
from .lock import StoreLockedError
from .manifest import manifest_location, read_manifest
from .reading import (
    Batch,
    DamagedRowsError,
    RowsUnavailableError,
    iterate_blocks,
    read_rows,
)
from .settings import FillingParams, Part, ReadingOrder, ReadingParams
from .sharing import begin_with_rows, share_store
from .shuffled_rows import ShuffledRows, StoresDifferError, in_background, usable_rows
from .store import (
    EmbeddingStore,
    NotAStoreError,
    RowStatus,
    StoreMismatchError,
    open_store,
)
from .torch_rows import TorchRows
from .verifying import BadShard, VerifyReport, repair, verify

__all__ = [
    "ArraySpec",
    "BadShard",
    "Batch",
    "Codec",
    "DamagedRowsError",
    "EmbeddingStore",
    "FillReport",
    "FillingParams",
    "FirstPositionVariesError",
    "NotAStoreError",
    "Part",
    "PartsError",
    "ReadingOrder",
    "ReadingParams",
    "Roles",
    "RowStatus",
    "RowView",
    "RowsUnavailableError",
    "ShardsLostError",
    "ShuffledRows",
    "StoreDescription",
    "StoreLockedError",
    "StoreMismatchError",
    "StoreSpec",
    "StoreUnreachableError",
    "StoresDifferError",
    "TorchRows",
    "VerifyReport",
    "begin_with_rows",
    "begins_with",
    "compact",
    "copy_rows",
    "describe",
    "drop_rows",
    "export_store",
    "fill",
    "in_background",
    "iterate_blocks",
    "join_stores",
    "locate",
    "manifest_location",
    "open_store",
    "read_manifest",
    "read_rows",
    "repair",
    "row_panel",
    "share_store",
    "store_panel",
    "usable_rows",
    "verify",
    "view_row",
    "write_page",
]

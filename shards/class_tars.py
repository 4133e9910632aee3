"""Labels of plain tars of class folders, such as imagenette's (`imagenette2/train/n01440764/x.JPEG`) and CUB's."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from maelstream.shards.layout import FolderClasses, folder_classes

_LAST_PART = r"/[^/]*$"


def classes_in_tars(tables: Iterable[pa.Table], split: str, shown: str) -> FolderClasses | None:
    """The class folders in tars of nothing but images, one split of them; None if there are fewer than two folders.

    `tables` are those of `read_rows` (`shards/scan_output.py`), one tar per table; `shown` names the tars in messages.

    Raises:
        DatasetError: the folders are splits, and none of them, or more than one, is `split`.
    """
    folders: set[str] = set()
    for table in tables:
        folders |= set(_folders(table.filter(pc.equal(table["reason"], ""))).dictionary.to_pylist())
    found = folder_classes(folders, split, shown, wrapped=True) if folders else None
    return found if found is not None and (found.splits or len(found.classes) > 1) else None


def label_by_folder(tables: Iterable[pa.Table], found: FolderClasses) -> Iterator[pa.Table]:
    """`tables` with the class folder of each image as its label, without the images of other splits."""
    for table in tables:
        folders = _folders(table)
        usable = pc.equal(table["reason"], "")
        label = pa.array(map(found.labels.get, folders.dictionary.to_pylist()), pa.large_string()).take(folders.indices)
        kept = pc.or_(label.is_valid(), pc.invert(usable))
        position = table.schema.get_field_index("label")
        yield table.set_column(position, table.schema.field(position), label.fill_null("")).filter(kept)


def _folders(table: pa.Table) -> pa.DictionaryArray:
    """Folder of each row in its tar; "" at the top."""
    if not len(table):
        return pa.array([], pa.large_string()).dictionary_encode()
    path = pc.utf8_slice_codeunits(table["path"], start=len(table["file"][0].as_py()))  # begins with /
    return pc.replace_substring_regex(path, _LAST_PART, "").combine_chunks().dictionary_encode()

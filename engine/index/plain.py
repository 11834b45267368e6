"""An index as one file that FAISS opens by itself, and the ids of its rows: for whoever searches without this project.

What a run searches is an index of codes and, apart from it, the embeddings by which the found are scored again. Here
both are in one file, as FAISS's own `IndexRefine` has them, with the number of lists that are visited and of candidates
that are re-scored; exact search is a flat index. So whoever reads the file and asks for as many documents finds what
the run finds, with no setting to forget. It is written from the run's files piece by piece, so that neither codes nor
embeddings are ever in memory, and read again before it stands.

The one difference: where the lists that a query visits hold fewer documents than are asked for, the run visits more.

Shapes: N documents, D embedding dimension, Q queries, K ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from engine.errors import ArtifactError
from engine.index.dense import IndexManifest
from engine.index.exact import stream
from engine.index.files import INDEX, MAPPED, IndexFile, WrittenFile, parse_index, read_index, writing
from engine.index.merge import header_of, write_lists
from engine.log import get_logger
from shards.embeddings import EmbeddingStore
from shards.files import write_atomically, write_json

log = get_logger(__name__)
IDS, ABOUT = "ids.txt", "about.json"
_ROWS = 16384
_SIZE_BYTES = 8
_ASKED, _TOP = 8, 5
"""Documents whose own embeddings are searched for to try a file, and ranks that are looked at."""


@dataclass(frozen=True, slots=True)
class PlainIndex:
    """What lies beside a plain index and says what it is."""

    file: IndexFile
    num_documents: int
    dimension: int
    embedding_dtype: str
    """Of the embeddings in it: float16 or float32."""
    factory: str
    """FAISS factory string of the codes; `Flat` where it has none."""
    nprobe: int
    """Lists visited for a query."""
    refine_factor: int
    """`refine_factor * k` candidates are re-scored."""
    recall: float
    """Of the run's search, which this one is, against exact search."""
    weights_sha256: str
    """Of the retriever whose queries it answers."""


def export_index(folder: Path, store: EmbeddingStore, docids: Path, target: Path) -> PlainIndex:
    """Write an index and its embeddings as one FAISS file, its ids, and last what it is.

    Args:
        folder: The run's index.
        store: The embeddings that it was made from.
        docids: File with one id a line, in the order of the documents.
        target: Folder that gets `index.faiss`, `ids.txt` and `about.json`; earlier ones are replaced.

    Returns:
        What was written.

    Raises:
        ArtifactError: The index is missing, damaged or of other embeddings, or what was written is read otherwise.
        DiskFullError: There was no space for it.
    """
    manifest = IndexManifest.load(folder)
    if manifest.stamp != store.stamp:
        raise ArtifactError(
            f"the index in {folder} was made from embeddings {manifest.stamp}",
            expected=f"embeddings {store.stamp}",
            remedy="build the index again",
        )
    target.mkdir(parents=True, exist_ok=True)
    (target / ABOUT).unlink(missing_ok=True)
    codes = sum(file.num_bytes for file in manifest.files)
    num_bytes = codes + store.num_documents * store.dimension * np.dtype(store.dtype).itemsize
    with writing(target / INDEX, num_bytes=num_bytes) as file:
        _write(file, folder, manifest, store)
    assert file.described
    with write_atomically(target / IDS) as temporary:
        shutil.copyfile(docids, temporary)
    _try(target / INDEX, store)
    about = PlainIndex(
        file.described,
        store.num_documents,
        store.dimension,
        store.dtype,
        manifest.plan.factory,
        manifest.nprobe,
        manifest.refine_factor,
        manifest.recall,
        store.stamp.weights_sha256,
    )
    write_json(target / ABOUT, asdict(about))
    log.info("index of %d documents written to %s", store.num_documents, target / INDEX)
    return about


def _write(file: WrittenFile, folder: Path, manifest: IndexManifest, store: EmbeddingStore) -> None:
    flat = _flat(store)
    flat.ntotal = store.num_documents
    if manifest.plan.exact:
        _write_rows(file, flat, store)
        return
    base, rest = _opened(folder, manifest)
    header = header_of(base, store.num_documents)
    whole: Any = faiss.IndexRefine(base, flat)
    whole.ntotal, whole.k_factor = store.num_documents, float(manifest.refine_factor)
    # Around both indexes FAISS writes a few bytes of its own, whatever these are.
    data, inner = _serialized(whole), _serialized(base)
    start = data.find(inner)
    last = data[start + len(inner) :]
    refined = _serialized(flat)
    if start < 0 or not last.startswith(refined):
        raise ArtifactError(f"FAISS {faiss.__version__} does not write a refined index part after part")
    file.write(data[:start])
    file.write(header)
    for piece in rest(file, len(header)):
        file.write(piece)
    _write_rows(file, flat, store)
    file.write(last[len(refined) :])


def _opened(folder: Path, manifest: IndexManifest) -> tuple[Any, Any]:
    """Open an index without its lists, and return it with what writes these behind its header."""
    if manifest.plan.placement == "parts":
        trained, *parts = manifest.files
        paths = [part.check(folder, fully=False) for part in parts]
        index = read_index(folder / trained.name, trained.sha256)

        def from_parts(file: WrittenFile, _: int) -> Iterator[bytes]:
            write_lists(file, paths)
            return iter(())

        faiss.extract_index_ivf(index).nprobe = manifest.nprobe
        return index, from_parts
    path = manifest.files[0].check(folder, fully=False)
    index = parse_index(path, MAPPED)
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    empty: Any = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(empty, True)
    empty.this.disown()
    ivf.nprobe = manifest.nprobe

    def from_file(_: WrittenFile, header_bytes: int) -> Iterator[bytes]:
        with open(path, "rb") as source:
            source.seek(header_bytes)
            while piece := source.read(1 << 20):
                yield piece

    return index, from_file


def _flat(store: EmbeddingStore) -> Any:
    """Return an empty index of embeddings as they are stored."""
    if store.dtype == "float32":
        return faiss.IndexFlatIP(store.dimension)
    return faiss.IndexScalarQuantizer(store.dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def _write_rows(file: WrittenFile, flat: Any, store: EmbeddingStore) -> None:
    """Write an index of embeddings from their files: its header, how large they are, and they themselves."""
    dtype = np.dtype(store.dtype).newbyteorder("<")
    one = _flat(store)
    one.add(np.zeros((1, store.dimension), dtype=np.float32))
    row_bytes = store.dimension * dtype.itemsize
    size_of_one = _serialized(one)[-row_bytes - _SIZE_BYTES : -row_bytes]
    file.write(_serialized(flat)[:-_SIZE_BYTES])
    size = int.from_bytes(size_of_one, "little") * store.num_documents
    file.write(size.to_bytes(_SIZE_BYTES, "little"))
    for _, rows_ND in stream(store, range(store.num_documents), _ROWS):
        file.write(np.ascontiguousarray(rows_ND, dtype=dtype).tobytes())


def _try(path: Path, store: EmbeddingStore) -> None:
    """Search in what was written, and compare its scores with the embeddings.

    Raises:
        ArtifactError: It holds other documents, or scores them otherwise.
    """
    index = parse_index(path, faiss.IO_FLAG_MMAP_IFC)
    asked = np.unique(np.linspace(0, store.num_documents - 1, _ASKED).astype(np.int64))
    queries_QD = store.rows(asked)
    scores_QK, documents_QK = index.search(queries_QD, min(_TOP, store.num_documents))
    found = documents_QK >= 0
    rows_QKD = store.rows(np.maximum(documents_QK, 0).ravel()).reshape(*documents_QK.shape, -1)
    expected_QK = np.einsum("qkd,qd->qk", rows_QKD, queries_QD)
    apart = np.abs(expected_QK - scores_QK)[found]
    if index.ntotal != store.num_documents or not found.any() or not (apart <= 1e-4 * np.abs(expected_QK).max()).all():
        raise ArtifactError(
            f"FAISS reads {path} as {index.ntotal} documents, whose scores differ by "
            f"{apart.max() if apart.size else float('nan'):.3g} from those of their embeddings",
            expected=f"{store.num_documents} documents, and their scores",
            remedy="build the index again; if that does not help, the installed FAISS writes files of another form",
        )


def _serialized(index: faiss.Index) -> bytes:
    data: bytes = faiss.serialize_index(index).tobytes()
    return data

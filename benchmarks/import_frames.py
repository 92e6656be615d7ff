"""Datasets of images for import_data.py, `kind: frames`: each frame once, and where each episode begins."""

import numpy as np
from common import DataError, staged, sync, write_array, write_metadata

TYPES = {
    "starts": np.int64,
    "actions": np.int64,
    "rewards": np.float32,
    "terminals": np.bool_,
    "timeouts": np.bool_,
}  # of a dataset's columns; `starts` has a number per episode, the others one per transition


def choose_episodes(lengths, n_transitions, seed=0, first=False):
    """How many rows to keep of each episode, [E]: whole episodes in a random order (first: in their own) until
    n_transitions rows are there; the last one is cut. Raises DataError if there are fewer rows."""
    lengths = np.asarray(lengths)
    if n_transitions > lengths.sum():
        raise DataError(f"--transitions {n_transitions} is more than the {lengths.sum():,} that there are")
    order = np.arange(len(lengths)) if first else np.random.default_rng(seed).permutation(len(lengths))
    kept, before = np.zeros(len(lengths), np.int64), lengths[order].cumsum() - lengths[order]
    kept[order] = (n_transitions - before).clip(0, lengths[order])
    return kept


def store_frames(dataset_id, shape, blocks, columns, metadata, root, force=False):
    """Writes a dataset of frames so that it is whole or absent, and returns its metadata.

    shape: that of all frames, (F, H, W) or (F, C, H, W); blocks: uint8 arrays [n, ...] whose n sum to F, in order, such
    as [frames]. columns: starts [E]; actions, rewards, terminals and timeouts [T]. metadata: action_low, action_high,
    frame_max, notes and source; optional: environment, reference_scores, episode_returns. Raises OSError, and
    ValueError for columns that do not fit together.
    """
    columns = {key: np.asarray(columns[key], kind) for key, kind in TYPES.items()}
    ends = check_columns(shape, columns)
    counts = {"transitions": len(ends), "episodes": int(ends.sum()), "actions": "discrete"}
    metadata = {"format": 1, "kind": "frames"} | metadata | counts | {"frames": list(shape)}
    with staged(dataset_id, root, force) as folder:
        write_blocks(folder / "frames.npy", shape, blocks)
        for name, values in columns.items():
            write_array(folder / f"{name}.npy", values)
        write_metadata(folder, metadata)
    return metadata


def check_columns(shape, columns):
    """The flags of the rows that end an episode, [T]. Raises ValueError for columns that do not fit together."""
    terminals, timeouts, starts = columns["terminals"], columns["timeouts"], columns["starts"]
    ends = terminals | timeouts
    if len({len(column) for key, column in columns.items() if key != "starts"}) > 1:
        raise ValueError(f"columns differ in length: { {key: len(column) for key, column in columns.items()} }")
    if not ends.size or not ends[-1] or (terminals & timeouts).any() or ends.sum() != len(starts) or starts[0]:
        raise ValueError("terminals and timeouts must end each of the episodes, one of them, and the last row")
    n_frames = np.diff(starts, append=shape[0])
    n_rows = np.diff(np.flatnonzero(ends), prepend=-1)
    spare = n_frames - n_rows  # frames beyond one per row
    if not np.isin(spare, (0, 1)).all() or (spare < timeouts[ends]).any():
        raise ValueError("an episode has as many frames as rows, or one more; after a time-out one more")
    return ends


def write_blocks(path, shape, blocks):
    """Writes frames as they come. A mapped file would end the program by a signal where the disk is full."""
    header, n_frames = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}, 0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            if block.dtype != np.uint8 or block.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"frames are uint8 of shape {shape[1:]}, not {block.dtype} of {block.shape[1:]}")
            file.write(np.ascontiguousarray(block).data)
            n_frames += len(block)
        sync(file)
    if n_frames != shape[0]:
        raise ValueError(f"{n_frames} frames came, not {shape[0]}")

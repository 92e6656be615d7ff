"""Datasets of images for import_data.py, `kind: frames`: each frame once, and where each episode begins. The sources
are logged replay buffers of Dopamine, HDF5 files, Minari datasets, and datasets of frames."""

import contextlib
import gzip
import importlib.util
import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

import gymnasium as gym
import h5py
import numpy as np
from common import DataError, OptionError, as_json, make_env, reading, staged, sync, write_array, write_metadata
from import_table import check_flags, check_numbers, plural
from tqdm import tqdm

from benchmarks import collect

TYPES = {
    "starts": np.int64,
    "actions": np.int64,
    "rewards": np.float32,
    "terminals": np.bool_,
    "timeouts": np.bool_,
}  # of a dataset's columns; `starts` has a number per episode, the others one per transition
PADDING = 3  # zero rows that Dopamine puts before each episode, for stacks of four frames
STEP_LIMIT = 27_000  # of an episode of Dopamine: 108,000 frames, of which an agent sees every fourth
REPLAY_FILE = re.compile(r"(?:\$store\$_)?(\w+)_ckpt\.(\d+)\.gz")
REPLAY_COLUMNS = ("observation", "action", "reward", "terminal", "add_count")
BLOCK = 1 << 24  # bytes of frames that are read at once
MAX_GRID = 1024  # numbers of a grid, beyond which it is an image


class Episodes(NamedTuple):
    """Where episodes stand in a recording, [E] each."""

    row: np.ndarray  # the first row
    frame: np.ndarray  # the first frame
    n_rows: np.ndarray
    n_frames: np.ndarray  # as many as rows, or one more
    terminal: np.ndarray  # whether it ends by a terminal, not by a time-out
    returns: np.ndarray  # before rows were dropped; NaN where a part of the episode is elsewhere

    def take(self, kept):
        """The first kept [E] rows of each episode; what is cut ends by a time-out, whose next frame is there."""
        cut = kept < self.n_rows
        n_frames = np.where(cut, kept + 1, self.n_frames)
        returns = np.where(cut, np.nan, self.returns)
        parts = self._replace(n_rows=kept, n_frames=n_frames, terminal=self.terminal & ~cut, returns=returns)
        return Episodes(*(part[kept > 0] for part in parts))

    def columns(self, actions, rewards):
        """The columns of a dataset, from those of the recording."""
        rows, ends = ranges(self.row, self.n_rows), self.n_rows.cumsum() - 1
        terminals = np.zeros(len(rows), bool)
        timeouts = terminals.copy()
        terminals[ends], timeouts[ends] = self.terminal, ~self.terminal
        starts = self.n_frames.cumsum() - self.n_frames
        flags = {"terminals": terminals, "timeouts": timeouts}
        return {"starts": starts, "actions": actions[rows], "rewards": rewards[rows]} | flags

    def whole_returns(self, rewards):
        """The returns of whole episodes, where the stored rewards do not tell them; else None."""
        stored = np.add.reduceat(np.append(rewards, 0.0).astype(np.float64), self.n_rows.cumsum() - self.n_rows)
        if np.array_equal(stored, self.returns):
            return None
        whole = self.returns[~np.isnan(self.returns)]
        return whole if len(whole) else None


def ranges(first, counts):
    """The numbers first, first + 1, ... of each range, one range after the other."""
    return np.repeat(first - (counts.cumsum() - counts), counts) + np.arange(counts.sum())


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
    metadata = {"format": 1, "kind": "frames"} | metadata | counts
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


# ------------------------------------------------------------------------------------------------- a recording


@dataclass
class Recording:
    """Frames and steps of a source, of which no frame has been read."""

    frame: tuple  # (H, W) or (C, H, W)
    episodes: Episodes
    actions: np.ndarray  # [n]
    rewards: np.ndarray  # [n]
    blocks: Callable  # from Episodes to an iterator of their frames in order, uint8 arrays [k, *frame]
    source: dict
    frame_max: int = 255
    environment: Optional[dict] = None
    n_actions: Optional[int] = None
    reference_scores: Optional[tuple] = None
    stored: bool = False  # whether it is a dataset of frames, whose notes tell of rewards and actions
    notes: list = field(default_factory=list)

    def note(self, text):
        print(text)
        self.notes.append(text)


def store_recording(recording, dataset_id, args, root):
    """Stores a recording, or the --transitions of it, as a dataset; returns its metadata. Raises DataError, OSError."""
    episodes = recording.episodes.take(choose_rows(recording, args))
    if not len(episodes.row):
        raise DataError("no transition has a known next frame")
    columns = episodes.columns(recording.actions, recording.rewards)
    if recording.environment is None:
        recording.note("No environment: runs train without evaluation unless --eval_env names one.")
    if recording.rewards.min() >= -1 and recording.rewards.max() <= 1 and not recording.stored:
        recording.note("Rewards are from -1 to 1, as clipped ones are: returns are sums of these.")
    metadata = {
        "action_low": [0],
        "action_high": [count_actions(recording, args) - 1],
        "frame_max": recording.frame_max,
        "environment": recording.environment,
        "reference_scores": recording.reference_scores,
        "episode_returns": episodes.whole_returns(columns["rewards"]),
        "notes": recording.notes,
        "source": {"command": args.command} | recording.source,
    }
    shape = (int(episodes.n_frames.sum()), *recording.frame)
    with tqdm(total=shape[0], unit="frame", unit_scale=True, disable=None) as bar:
        blocks = count_blocks(recording.blocks(episodes), bar)
        return store_frames(dataset_id, shape, blocks, columns, metadata, root, args.force)


def count_blocks(blocks, bar):
    for block in blocks:
        yield block
        bar.update(len(block))


def choose_rows(recording, args):
    """The number of rows to keep of each episode, [E]."""
    lengths = recording.episodes.n_rows
    if not args.transitions:
        return lengths
    kept = choose_episodes(lengths, args.transitions, args.seed or 0, args.first)
    cut = np.flatnonzero((kept > 0) & (kept < lengths))
    taken = f"{plural((kept > 0).sum(), 'episode')} of {(lengths > 0).sum():,}"
    manner = "the first ones" if args.first else f"drawn uniformly (--seed {args.seed or 0})"
    text = f"Taken: {args.transitions:,} of {plural(lengths.sum(), 'transition')}, {taken}, {manner}"
    if cut.size:
        text += (
            f"; one is cut after {kept[cut[0]]:,} of its {plural(lengths[cut[0]], 'row')}, which counts as a time-out"
        )
    recording.note(f"{text}.")
    return kept


def count_actions(recording, args):
    """The number of actions: as given, the environment's, or what the data suggest. Raises DataError."""
    found, source = int(recording.actions.max(initial=0)) + 1, "the environment's"
    n_actions, low, high = recording.n_actions, args.action_low or [0], args.action_high or [0]
    if [*low] != [0] or len(high) != 1 or high[0] % 1 != 0:  # also infinity
        raise OptionError("actions of images are counted from 0: --action_low takes 0, --action_high a whole number")
    if args.action_high:
        n_actions, source = int(args.action_high[0]) + 1, "as given"
    if n_actions is None:
        n_actions, source = found, "the largest in the data; --action_low 0 --action_high N names another"
    if found > n_actions or recording.actions.min(initial=0) < 0:
        wrong = found - 1 if found > n_actions else recording.actions.min()
        raise DataError(f"an action is {wrong}: it must be from 0 to {n_actions - 1} ({source})")
    if not recording.stored:
        recording.note(f"Actions: 0 to {n_actions - 1} ({source}).")
    return n_actions


# ----------------------------------------------------------------------------------------------- environments


def atari(env_id, frame, sticky, limit):
    """An Atari game as Dopamine plays it: an agent sees every fourth frame, in grey, of this size (H, W)."""
    # Without sticky actions all episodes would be the same one, but for a random start.
    preprocessing = {"noop_max": 0 if sticky else 30, "frame_skip": 4}
    if frame != (84, 84):
        preprocessing["screen_size"] = [frame[1], frame[0]]
    return {
        "id": env_id,
        "frameskip": 1,
        "repeat_action_probability": sticky,
        "full_action_space": False,
        "max_num_frames_per_episode": 4 * limit,
        "wrappers": [["AtariPreprocessing", preprocessing]],
    }


def set_environment(recording, env_id, args):
    """Gives a recording the environment of an id, with the wrappers that make such frames. Raises DataError."""
    if env_id.startswith("ALE/") and len(recording.frame) == 2:
        sticky = 0.25 if args.sticky is None else args.sticky
        environment = atari(env_id, recording.frame, sticky, args.max_episode_steps or STEP_LIMIT)
        if importlib.util.find_spec("ale_py"):
            arguments = {key: value for key, value in environment.items() if key not in ("id", "wrappers")}
            env = make_env(env_id, "--eval_env", **arguments)
            recording.n_actions = int(env.action_space.n)
            env.close()
        else:
            recording.note(f"{env_id} is not checked, since the package ale-py is not installed.")
        noops = "" if sticky else " and up to 30 no-ops at the start"
        recording.note(
            f"Environment: {env_id}, sticky actions {sticky:g} (--sticky){noops}, every fourth frame in grey."
        )
    else:
        env = make_env(env_id, "--eval_env")
        spec = gym.spec(env.spec.id)
        environment = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
        environment |= {"id": spec.id, "max_episode_steps": args.max_episode_steps or spec.max_episode_steps}
        environment["wrappers"] = [[wrapper.name, wrapper.kwargs] for wrapper in spec.additional_wrappers]
        environment["wrappers"] += frame_wrappers(env.observation_space, recording.frame, env_id)
        if not isinstance(env.action_space, gym.spaces.Discrete):
            raise DataError(f"{env_id} has actions {env.action_space}: frames need Discrete ones")
        recording.n_actions = int(env.action_space.n)
        env.close()
    recording.environment = environment


def frame_wrappers(space, frame, env_id):
    """The wrappers that make frames of this shape from an environment's observations. Raises DataError."""
    shape = planes_first(space)
    if shape == frame:
        return []
    wrappers, grey = [], len(shape) == 3 and shape[0] == 3 and len(frame) == 2
    if grey:
        wrappers.append(["GrayscaleObservation", {}])
    if len(shape) == len(frame) + grey and space.dtype == np.uint8 and (grey or shape[:-2] == frame[:-2]):
        return wrappers + ([["ResizeObservation", {"shape": list(frame[-2:])}]] if shape[-2:] != frame[-2:] else [])
    raise DataError(f"frames have shape {frame}, {env_id} observes {space}: name another --eval_env, or none")


def planes_first(space):
    """The shape of frames as stored, (H, W) or (C, H, W), of a space of images. Raises DataError for other spaces."""
    if not isinstance(space, gym.spaces.Box) or space.dtype not in (np.uint8, bool) or len(space.shape) not in (2, 3):
        raise DataError(f"observations are {space}: images are uint8 or boolean, of shape (H, W) or (H, W, C)")
    return space.shape if not channels_last(space.shape) else (space.shape[2], *space.shape[:2])


def channels_last(shape):
    return len(shape) == 3 and shape[2] <= shape[0]


# ---------------------------------------------------------------------------------------- Dopamine's replay buffers


@contextlib.contextmanager
def unzipping(path):
    try:
        yield
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is damaged or not a .npy file in gzip: {error}") from error


def read_array(path):
    with unzipping(path), gzip.open(path) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # at the end it compares the checksum
    return array


def read_shape(file):
    """The shape that the header of uint8 frames [n, H, W] names. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(file)
    if len(shape) != 3 or kind != np.uint8 or fortran:
        raise ValueError(f"frames are uint8 [n, H, W], in C order; these are {kind} of shape {shape}")
    return shape


def read_frames(path, n=None):
    """Blocks of frames [k, H, W], one after the other: the first n, or all."""
    with gzip.open(path) as file:
        with unzipping(path):
            n_frames, *frame = read_shape(file)
        step, size = max(1, BLOCK // math.prod(frame)), math.prod(frame)
        for start in range(0, n_frames if n is None else min(n, n_frames), step):
            k = min(step, n_frames - start) if n is None else min(n, n_frames)
            with unzipping(path):
                if len(block := file.read(k * size)) < k * size:
                    raise EOFError(f"it ends in frame {start + len(block) // size} of {n_frames}")
            yield np.frombuffer(block, np.uint8).reshape(k, *frame)
        if n is None:
            with unzipping(path):
                file.read(1)  # at the end it compares the checksum


@dataclass
class Shard:
    """A file of each column of a run, with as many rows as the replay buffer held."""

    number: int
    path: Path  # of the frames
    shape: tuple  # of the frames
    head: np.ndarray  # the first frames
    passes: int  # how often the buffer had been filled before it began on these rows
    n_valid: int  # rows before the position at which Dopamine writes next; those behind it are older
    actions: np.ndarray  # [n_valid], as the others
    rewards: np.ndarray
    terminals: np.ndarray
    padding: np.ndarray = None  # whether a row is one of the zeros before an episode


def is_replay(path):
    return path.is_dir() and next(path.rglob("$store$_*_ckpt.*.gz"), None) is not None


def find_run(path):
    """The folder of the only run at or below a path. Raises DataError for several."""
    folders = sorted({file.parent for file in path.rglob("$store$_*_ckpt.*.gz")})
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders[:5]) + (", ..." if len(folders) > 5 else "")
        raise DataError(f"it holds {len(folders)} runs, {names}: name one of them")
    return folders[0]


def read_shards(folder):
    """The columns of a run's files but for the frames. Raises DataError."""
    found = {}
    for path in folder.iterdir():
        if match := REPLAY_FILE.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[match[1]] = path
    shards = []
    for number, paths in sorted(found.items()):
        if missing := [name for name in REPLAY_COLUMNS if name not in paths]:
            raise DataError(
                f"{folder} has no {' and no '.join(missing)} of ckpt.{number}: get it, or take the rest away"
            )
        shards.append(read_shard(number, paths))
    frames = {shard.shape[1:] for shard in shards}
    if len(frames) > 1:
        raise DataError(f"{folder} has frames of several shapes: {', '.join(map(str, sorted(frames)))}")
    return shards


def read_shard(number, paths):
    actions, rewards, terminals, count = (read_array(paths[key]) for key in REPLAY_COLUMNS[1:])
    with unzipping(paths["observation"]), gzip.open(paths["observation"]) as file:
        shape = read_shape(file)
    shapes = {"observation": shape[:1], "action": actions.shape, "reward": rewards.shape, "terminal": terminals.shape}
    if len(set(shapes.values())) > 1:
        rows = ", ".join(f"{key} {value}" for key, value in shapes.items())
        raise DataError(f"the files of ckpt.{number} differ in their rows: {rows}")
    if count.shape or count.dtype.kind not in "iu" or count < 0 or actions.dtype.kind not in "iu":
        raise DataError(
            f"ckpt.{number}: add_count and actions must be whole numbers, not {count!r} and {actions.dtype}"
        )
    n, count = shape[0], int(count)
    n_valid = n if count and count % n == 0 else count % n
    head = next(read_frames(paths["observation"], min(PADDING, n)), np.empty((0, *shape[1:])))
    columns = actions[:n_valid], rewards[:n_valid], terminals
    shard = Shard(number, paths["observation"], shape, head, max(count - 1, 0) // n, n_valid, *columns)
    check_numbers(shard.rewards, f"the reward of ckpt.{number}")
    check_flags(terminals[:n_valid], f"the terminal of ckpt.{number}")
    shard.terminals = terminals[:n_valid].astype(bool)
    shard.padding = find_padding(shard)
    return shard


def find_padding(shard):
    """Flags of the zero rows before episodes, [n_valid]: after each terminal, and where the file begins with them."""
    zero = (shard.actions == 0) & (shard.rewards == 0) & ~shard.terminals
    padding = np.zeros(shard.n_valid, bool)
    black = zero[:PADDING] & ~shard.head[: shard.n_valid].any(axis=(1, 2))
    padding[: len(black)] = np.logical_and.accumulate(black)
    after = (np.flatnonzero(shard.terminals)[:, None] + np.arange(1, PADDING + 1)).ravel()
    padding[after[after < shard.n_valid]] = True
    if (wrong := padding & ~zero).any():
        refuse_padding(shard, wrong.argmax())
    return padding


def refuse_padding(shard, row):
    reason = f"Dopamine puts {PADDING} rows of zeros before an episode, for stacks of {PADDING + 1} frames"
    raise DataError(f"row {row} (from 0) of ckpt.{shard.number} comes after a terminal and is not zero: {reason}")


def split_shard(shard, before, limit):
    """The episodes of a file, with rows from 0; whether the first one began in an earlier file; and how many rows of a
    next file's first episode are here or lost. before: that number of the file before; None if there is none."""
    padding, terminals, n = shard.padding, shard.terminals, shard.n_valid
    first = np.flatnonzero(~padding & np.append(True, padding[:-1]))
    ends = np.append(np.flatnonzero(terminals), n - 1)
    last = ends[np.searchsorted(ends[:-1], first)]
    lengths, ended = last - first + 1, terminals[last]
    continued = bool(len(first)) and first[0] == 0 and before != 0
    total = lengths.copy()
    if continued:
        total[0] += before or 0
    timeouts = ended & (total == limit)
    returns = np.array([shard.rewards[a : b + 1].sum(dtype=np.float64) for a, b in zip(first, last)])
    returns[~ended] = np.nan
    if continued:
        returns[0] = np.nan
    lost = shard.shape[0] - n
    if len(first) and not ended[-1]:
        after = None if continued and before is None and len(first) == 1 else total[-1] + lost
    else:
        after = max(0, n - 1 - (last[-1] if len(first) else -1) + lost - PADDING)
    episodes = Episodes(first, first, lengths - (~ended | timeouts), lengths, ended & ~timeouts, returns)
    return episodes, continued, (~ended).sum(), timeouts.sum(), after


def read_replay(path, args):
    """A run of the DQN-replay layout as a Recording. Raises DataError."""
    folder = find_run(path)
    shards = read_shards(folder)
    before, parts, offset = None if shards[0].passes else 0, [], 0
    limit = args.max_episode_steps or STEP_LIMIT
    for i, shard in enumerate(shards):
        if i and shard.passes != shards[i - 1].passes + 1:  # Dopamine may write over a pass that it has not stored
            before = None
        episodes, *counts, before = split_shard(shard, before, limit)
        parts.append((episodes._replace(row=episodes.row + offset, frame=episodes.frame + offset), *counts))
        offset += shard.n_valid
    found, continued, cut, timeouts = zip(*parts)
    recording = Recording(
        frame=shards[0].shape[1:],
        episodes=Episodes(*map(np.concatenate, zip(*found))),
        actions=np.concatenate([shard.actions for shard in shards]),
        rewards=np.concatenate([shard.rewards for shard in shards]),
        blocks=lambda episodes: replay_blocks(recording, shards, episodes),
        source={"files": [str(folder)]},
    )
    note_replay(recording, shards, sum(continued), sum(cut), sum(timeouts), limit)
    game = next(x for x in reversed(folder.resolve().parts) if x != "replay_logs" and not x.isdecimal())
    env_id = args.eval_env
    if env_id is None and re.fullmatch(r"([A-Z][a-z]*)+", game):
        env_id = f"ALE/{game}-v5"
        recording.note(f"{env_id} is guessed from the name of the folder; --eval_env names another.")
    if env_id not in (None, "none"):
        set_environment(recording, env_id, args)
    return recording


def note_replay(recording, shards, continued, cut, timeouts, limit):
    first, last = shards[0], shards[-1]
    n = sum(shard.shape[0] for shard in shards)
    gaps = last.number - first.number + 1 - len(shards)
    lacking = f", {gaps} missing between them" if gaps else ""
    recording.note(
        f"Files: {len(shards)}, ckpt.{first.number} to ckpt.{last.number}{lacking}, with {plural(n, 'row')}."
    )
    padding = sum(shard.padding.sum() for shard in shards)
    recording.note(f"Dropped: {plural(padding, 'row')} of padding, the zeros before an episode.")
    stale = {shard.number: shard.shape[0] - shard.n_valid for shard in shards if shard.shape[0] > shard.n_valid}
    if stale:
        single = [number for number, n in stale.items() if n == 1]
        texts = [f"the last of {plural(len(single), 'file')}"] if single else []
        texts += [f"{n:,} of ckpt.{number}" for number, n in stale.items() if n > 1]
        rows = plural(sum(stale.values()), "stale row")
        recording.note(f"Dropped: {rows}, by add_count older than the rest: {', '.join(texts)}.")
    if cut or timeouts:
        texts = [f"the last of {plural(cut, 'episode')} that the end of a file cuts"] if cut else []
        texts += [f"the last of {plural(timeouts, 'episode')} of {limit:,} steps"] if timeouts else []
        recording.note(f"Dropped: {plural(cut + timeouts, 'row')} without a known next frame: {' and '.join(texts)}.")
    if timeouts:
        recording.note(f"Time-outs: {timeouts:,} of the terminals, those after {limit:,} steps (--max_episode_steps).")
    if continued:
        words = "begun in an earlier file; the first stacks have zeros for its frames"
        recording.note(f"Begun anew: {plural(continued, 'episode')}, {words}.")


def replay_blocks(recording, shards, episodes):
    """The frames of some episodes, a file at a time. Raises DataError for padding that is not zero."""
    wanted, offset, hidden = np.zeros(len(recording.actions), bool), 0, 0
    wanted[ranges(episodes.frame, episodes.n_frames)] = True
    for shard in shards:
        mine = np.zeros(shard.shape[0], bool)
        mine[: shard.n_valid] = wanted[offset : offset + shard.n_valid]
        offset += shard.n_valid
        if not mine.any():
            continue
        (zero, padding), start = np.zeros((2, shard.shape[0]), bool), 0
        padding[: shard.n_valid] = shard.padding
        zero[: shard.n_valid] = (shard.actions == 0) & (shard.rewards == 0) & ~shard.terminals & ~shard.padding
        for block in read_frames(shard.path):
            part = slice(start, start + len(block))
            if block[padding[part]].any():
                refuse_padding(shard, start + np.flatnonzero(padding[part] & block.any(axis=(1, 2)))[0])
            zero[part][zero[part]] = ~block[zero[part]].any(axis=(1, 2))
            yield block[mine[part]]
            start += len(block)
        runs = zero[2:] & zero[1:-1] & zero[:-2]
        hidden += (runs & ~np.append(False, runs)[:-1]).sum()
    if hidden:
        words = "as before an episode, but without a terminal before them: an episode may have ended there"
        recording.note(f"Kept: rows of zeros in {plural(hidden, 'place')}, {words}.")


# --------------------------------------------------------------------------------------------------- HDF5 files


def is_image(shape):
    return len(shape) > 1 and math.prod(shape) > MAX_GRID


def holds_images(path):
    """Whether an HDF5 file has images as observations."""
    try:
        with h5py.File(path) as file:
            column = file.get("observations")
            return isinstance(column, h5py.Dataset) and column.dtype == np.uint8 and is_image(column.shape[1:])
    except Exception:  # h5py raises nearly anything for a damaged file, which is named where all of it is read
        return False


def read_images(path, shape, columns, args):
    """A file of D4RL's layout with observations of this shape [n, ...] as a Recording. columns: its other ones. Raises
    DataError."""
    if len(shape) not in (3, 4):
        raise DataError(f"observations have shape {shape}: images are [n, H, W] or [n, H, W, C]")
    actions, rewards, terminals = (columns[key] for key in ("actions", "rewards", "terminals"))
    if actions.shape[1] != 1 or (actions != np.rint(actions)).any():
        given = f"{actions.shape[1]} numbers" if actions.shape[1] != 1 else actions[actions != np.rint(actions)][0]
        raise DataError(f"its observations are images, which need a whole number as action, not {given}")
    rows, limit = np.arange(len(rewards)), args.max_episode_steps
    notes, timeouts = [], columns.get("timeouts")
    if timeouts is None:
        if "next_observations" in columns:
            raise DataError("it has next_observations and no timeouts: mark the last row of each episode in timeouts")
        starts = np.maximum.accumulate(np.where(np.append(True, terminals[:-1]), rows, 0))
        timeouts = (rows - starts) % limit == limit - 1 if limit else np.zeros(len(rows), bool)
        after = f" and after {limit:,} steps" if limit else ""
        notes.append(f"No timeouts: episodes end at terminals{after}.")
    ends = terminals | timeouts
    known, ends[-1] = ends[-1], True
    last = np.flatnonzero(ends)
    first, terminal = np.append(0, last[:-1] + 1), terminals[last]
    returns = np.add.reduceat(rewards.astype(np.float64), first)
    returns[-1] = returns[-1] if known else np.nan
    lengths = last - first + 1
    episodes = Episodes(first, first, lengths - ~terminal, lengths, terminal, returns)
    stacked = is_stack(shape[1:])
    frame = shape[1:]
    if len(frame) == 3:
        frame = (frame[2], *frame[:2]) if channels_last(frame) else frame
        frame = frame[1:] if stacked else frame
    recording = Recording(
        frame=frame,
        episodes=episodes,
        actions=actions[:, 0].astype(np.int64),
        rewards=rewards,
        blocks=lambda episodes: image_blocks(recording, path, episodes, stacked),
        source={"files": [str(path)]},
    )
    for note in notes:
        recording.note(note)
    if "next_observations" in columns:
        recording.note("next_observations are not read: the next frame of a row is that of the row below it.")
    if dropped := (~terminal).sum():
        rows = plural(dropped, "row")
        recording.note(f"Dropped: {rows} without a known next frame (time-outs, or the last row).")
    if stacked:
        recording.note("Observations are stacks: each frame is kept once, and --frame_stack of a run stacks them anew.")
    if args.eval_env not in (None, "none"):
        set_environment(recording, args.eval_env, args)
    if None not in (args.ref_min_score, args.ref_max_score):
        recording.reference_scores = args.ref_min_score, args.ref_max_score
    return recording


def image_blocks(recording, path, episodes, stacked):
    n = len(recording.rewards)
    wanted, begins = np.zeros((2, n), bool)
    wanted[ranges(episodes.frame, episodes.n_frames)] = True
    begins[recording.episodes.row] = True
    with h5py.File(path) as file:
        column, previous = file["observations"], None
        step = max(1, BLOCK // math.prod(column.shape[1:]))
        for start in range(0, n, step):
            part = slice(start, start + step)
            with reading(str(path)):
                block = column[part]
            if block.ndim == 4 and channels_last(block.shape[1:]):
                block = np.moveaxis(block, 3, 1)
            if stacked:
                block, previous = unstack(block, begins[part], previous, start), block[-1]
            yield block[wanted[part]]


def is_stack(shape):
    """Whether observations have planes that are neither colours nor one image."""
    return len(shape) == 3 and min(shape[0], shape[2]) not in (1, 3)


def unstack(stacks, begins, previous, row):
    """The newest frames [n, H, W] of stacks [n, k, H, W]. begins: whether an episode begins there; previous: the stack
    before them; row: the number of the first one. Raises DataError if they are not stacks of the frames before."""
    older = np.concatenate([stacks[:1] if previous is None else previous[None], stacks[:-1]])
    moved = (stacks[:, :-1] == older[:, 1:]).all(axis=(1, 2, 3))
    filled = (stacks[:, :-1] == 0) | (stacks[:, :-1] == stacks[:, -1:])  # zeros, or the first frame
    filled = filled.all(axis=(1, 2, 3))
    if (wrong := ~np.where(begins, filled, moved)).any():
        cure = "their planes are neither colours nor a stack of frames, oldest first, within an episode"
        raise DataError(f"observations in row {row + wrong.argmax()} (from 0): {cure}")
    return stacks[:, -1]


# ------------------------------------------------------------------------------------------------ Minari datasets


class Pictures(gym.Env):
    """An environment that only has a space of observations, for Gymnasium's wrappers of images."""

    def __init__(self, space):
        self.observation_space, self.action_space = space, gym.spaces.Discrete(1)


def read_minari(name, args):
    """A Minari dataset of images as a Recording. Raises DataError."""
    dataset, environment = collect.open_recorded(name)
    space, actions = dataset.observation_space, dataset.action_space
    planes_first(space)
    if not isinstance(actions, gym.spaces.Discrete):
        raise DataError(f"{name} has actions {actions}: frames need Discrete ones")
    wrappers, convert = converter(name, space, args)
    parts, rewards, numbers, notes, row = [], [], [], [], 0
    for i in tqdm(range(len(dataset)), unit="episode", disable=None):
        with reading(name):
            episode = dataset[i]
        n = len(episode.rewards)
        ends = episode.terminations | np.append(episode.truncations[:-1], True)
        last = np.flatnonzero(ends)
        first, terminal = np.append(0, last[:-1] + 1), episode.terminations[last]
        returns = np.add.reduceat(np.asarray(episode.rewards, np.float32).astype(np.float64), first)
        lengths = last - first + 1
        parts.append(Episodes(row + first, row + i + first, lengths, lengths + ~terminal, terminal, returns))
        rewards.append(episode.rewards)
        numbers.append(episode.actions - actions.start)
        row += n
    begins = np.array([len(x) for x in rewards]).cumsum()
    begins = np.append(0, begins[:-1]) + np.arange(len(rewards))  # the number of each recorded episode's first frame

    def blocks(episodes):
        recorded = np.searchsorted(begins, episodes.frame, side="right") - 1
        opened = None
        for number, frame, n in zip(recorded, episodes.frame - begins[recorded], episodes.n_frames):
            if number != opened:
                with reading(name):
                    observations, opened = dataset[int(number)].observations, number
            yield convert(observations[frame : frame + n])

    check_numbers(np.concatenate(rewards), "reward")
    recording = Recording(
        frame=convert(np.zeros((1, *space.shape), space.dtype)).shape[1:],
        episodes=Episodes(*map(np.concatenate, zip(*parts))),
        actions=np.concatenate(numbers).astype(np.int64),
        rewards=np.concatenate(rewards).astype(np.float32),
        blocks=blocks,
        source={"files": [name]},
        frame_max=1 if space.dtype == bool else 255,
        n_actions=int(actions.n),
        notes=notes,
    )
    if actions.start:
        recording.note(f"Actions are numbered from 0; in {name} they begin with {actions.start}.")
    if wrappers:
        texts = ", ".join(
            f"{name} {list(arguments.get('shape', ()))}".removesuffix(" []") for name, arguments in wrappers
        )
        recording.note(f"Frames are made by Gymnasium's {texts}, here and in evaluations.")
    recording.note("Infos, seeds and options are not kept.")
    if environment:
        environment["wrappers"] = [*environment["wrappers"], *wrappers]
        try:
            recording.environment = json.loads(as_json(environment))
        except ValueError as error:
            recording.note(f"The environment is left out: {error}.")
    return recording


def converter(name, space, args):
    """Gymnasium's wrappers, names and arguments, that a dataset's images pass; and a function that makes frames of
    observations [n, ...]. Raises DataError."""
    of_atari = name.startswith("atari/") and space.dtype == np.uint8
    grey = args.grey == "True" or args.grey is None and of_atari and space.shape[2:] == (3,)
    size = tuple(args.resize or ()) or ((84, 84) if of_atari and args.grey is None else space.shape[:2])
    wrappers, env = [], Pictures(space)
    if grey:
        wrappers.append(["GrayscaleObservation", {}])
    if size != space.shape[:2]:
        wrappers.append(["ResizeObservation", {"shape": size}])
    for wrapper, arguments in wrappers:
        try:
            env = getattr(gym.wrappers, wrapper)(env, **arguments)
        except (ImportError, TypeError, ValueError, gym.error.Error) as error:
            raise DataError(f"{name} cannot pass {wrapper}: {error}") from error

    def convert(observations):
        if wrappers:
            observations = np.stack([transform(env, observation) for observation in observations])
        frames = np.asarray(observations).astype(np.uint8, copy=False)
        return np.moveaxis(frames, 3, 1) if channels_last(env.observation_space.shape) else frames

    return wrappers, convert


def transform(env, observation):
    """An observation as it comes out of a chain of wrappers."""
    return observation if isinstance(env, Pictures) else env.observation(transform(env.env, observation))


# ------------------------------------------------------------------------------------------- datasets of frames


def read_stored(name, path):
    """A dataset of frames as a Recording. Raises DataError."""
    with reading(name):
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        if (metadata["format"], metadata["kind"]) != (1, "frames"):
            raise ValueError(f"it has format {metadata['format']} and kind {metadata['kind']}")
        keys = ("action_low", "action_high", "frame_max", "notes", "source", "transitions", "episodes")
        if missing := {*keys} - metadata.keys():
            raise KeyError(*missing)
        columns = {key: np.load(path / f"{key}.npy", mmap_mode="r") for key in TYPES}
        frames = np.load(path / "frames.npy", mmap_mode="r")
        ends = np.flatnonzero(check_columns(frames.shape, columns))
    lengths, returns = np.diff(ends, prepend=-1), metadata.get("episode_returns")
    first = ends - lengths + 1
    if returns is None or len(returns) != len(ends):
        returns = np.add.reduceat(columns["rewards"].astype(np.float64), first)
    starts, terminal = columns["starts"], columns["terminals"][ends]
    episodes = Episodes(first, starts, lengths, np.diff(starts, append=len(frames)), terminal, np.array(returns, float))

    def blocks(episodes):
        for start, n in zip(episodes.frame, episodes.n_frames):
            yield frames[start : start + n]

    return Recording(
        frame=frames.shape[1:],
        episodes=episodes,
        actions=columns["actions"],
        rewards=columns["rewards"],
        blocks=blocks,
        source={"files": [name]},
        frame_max=metadata["frame_max"],
        environment=metadata.get("environment"),
        n_actions=metadata["action_high"][0] + 1,
        reference_scores=metadata.get("reference_scores"),
        stored=True,
        notes=[f"{name}: {note}" for note in metadata["notes"]],
    )


def join(names, recordings):
    """Recordings, one after the other, as one. Raises DataError if their frames or actions differ."""
    first = recordings[0]
    for name, other in zip(names, recordings):
        for key, words in (("frame", "frames"), ("n_actions", "number of actions"), ("frame_max", "frame_max")):
            pair = getattr(first, key), getattr(other, key)
            if pair[0] != pair[1]:
                raise DataError(f"{names[0]} and {name} differ in {words}: {pair[0]} and {pair[1]}")
    rows = np.array([len(x.rewards) for x in recordings]).cumsum()
    frames = np.array([x.episodes.n_frames.sum() for x in recordings]).cumsum()
    rows, frames = np.append(0, rows), np.append(0, frames)
    episodes = [
        x.episodes._replace(row=x.episodes.row + row, frame=x.episodes.frame + frame)
        for x, row, frame in zip(recordings, rows, frames)
    ]

    def blocks(episodes):
        for i, part in enumerate(recordings):
            mine = (rows[i] <= episodes.row) & (episodes.row < rows[i + 1])
            taken = Episodes(*(column[mine] for column in episodes))
            yield from part.blocks(taken._replace(row=taken.row - rows[i], frame=taken.frame - frames[i]))

    joined = Recording(
        frame=first.frame,
        episodes=Episodes(*map(np.concatenate, zip(*episodes))),
        actions=np.concatenate([x.actions for x in recordings]),
        rewards=np.concatenate([x.rewards for x in recordings]),
        blocks=blocks,
        source={"files": names},
        frame_max=first.frame_max,
        n_actions=first.n_actions,
        stored=True,
        notes=[note for x in recordings for note in x.notes],
    )
    for key, words in (("environment", "environments"), ("reference_scores", "reference scores")):
        values = [getattr(x, key) for x in recordings]
        if values.count(values[0]) == len(values):
            setattr(joined, key, values[0])
        else:
            joined.note(f"Left out because they differ: {words} ({'; '.join(map(str, values))}).")
    return joined

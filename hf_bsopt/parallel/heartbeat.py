"""Heartbeats of the ranks: each posts one every few seconds, and knows which of the others has ended or is silent.

    heartbeat = Heartbeat(store, rank=0, size=2)
    heartbeat.lost([1])  # {1: "rank 1 ended: its process 4711 is gone"}

A thread posts the beats, so that a rank that computes for long is not taken for one that hangs. A beat has the process,
which ranks on the same machine look up, and where its main thread is, for the message about a rank that is awaited.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .collectives import collectives_started

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_SECONDS = 2.0
SILENT_SECONDS = 40.0
"""A rank without a beat for so long is lost. Every other rank thus names it within a minute."""
HANG_SECONDS = 45.0
"""A main thread that has been at one instruction for so long, and is behind another rank, may hang."""
STUCK_SECONDS = 10.0
"""A main thread that has been at one instruction for so long is mentioned."""
PROC = Path("/proc")


class Heartbeat:
    """The beats of this rank, posted by a thread until :meth:`end`, and those of the others."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store = store
        self.connection = store
        self._rank, self.others = rank, [other for other in range(size) if other != rank]
        self._process = {"machine": _machine(), "pid": os.getpid(), "started": _start_time(os.getpid())}
        self._main_thread = _MainThread()
        self._beats: dict[int, dict[str, Any]] = {}
        self._changed_at: dict[int, float] = {}
        self._count = 0
        self._watched: Callable[[], bool] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hf_bsopt heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Stop posting beats."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=BEAT_SECONDS)
        atexit.unregister(self.end)

    def watch(self, look: Callable[[], bool] | None) -> Callable[[], bool] | None:
        """Call ``look`` after each beat until it returns True; None stops that. Return what was called before."""
        before, self._watched = self._watched, look
        return before

    def lost(self, ranks: Iterable[int]) -> dict[int, str]:
        """Return those of the ranks that ended or are silent, each with a sentence that says so. A rank that never
        posted a beat is not among them: it may not have begun.
        """
        found = {}
        now = time.monotonic()
        for rank in ranks:
            beat = self._beats.get(rank)
            if beat is None:
                continue
            silent = now - self._changed_at[rank]
            if beat["machine"] == self._process["machine"] and is_gone(beat["pid"], beat["started"]):
                found[rank] = f"rank {rank} ended: its process {beat['pid']} is gone"
            elif silent > SILENT_SECONDS:
                found[rank] = f"rank {rank} is silent: no sign of its process {beat['pid']} for {silent:.0f} s"
        return found

    def has_beaten_since(self, moment: float, ranks: Iterable[int]) -> bool:
        """Return whether each of the ranks posted a beat after ``moment`` (of time.monotonic), or never did."""
        return all(self._changed_at.get(rank, moment) >= moment for rank in ranks)

    def awaited(self) -> str:
        """Return, as a sentence, which rank this one may wait for in a collective; empty if there is none.

        It has started fewer collectives, and neither has moved for long.
        """
        own = self._beats.get(self._rank)
        if own is None or own["seconds"] < HANG_SECONDS:
            return ""
        late = [
            rank
            for rank in self.others
            if (beat := self._beats.get(rank)) is not None
            and beat["seconds"] >= HANG_SECONDS
            and beat["collectives"] < own["collectives"]
        ]
        places = "".join(self.place(rank) for rank in late)
        return f"this rank has been in {own['place']} for {own['seconds']:.0f} s{places}" if late else ""

    def place(self, rank: int) -> str:
        """Return where the main thread of a rank has been for long, as the end of a sentence; empty if unknown."""
        beat = self._beats.get(rank)
        if beat is None or beat["seconds"] < STUCK_SECONDS:
            return ""
        return f"; rank {rank} has been in {beat['place']} for {beat['seconds']:.0f} s"

    def _run(self) -> None:
        self.connection = _own_connection(self.store)  # here, because connecting to a store that is gone takes long
        while not self._ended.is_set():
            try:
                self._post()
                self._read()
            except Exception:  # the store is gone, and each kind raises its own error: the next exchange reports it
                return
            if self._watched is not None and self._watched():
                self._watched = None
            self._ended.wait(BEAT_SECONDS)

    def _post(self) -> None:
        self._count += 1
        place, seconds = self._main_thread.place()
        collectives = sum(collectives_started().values())
        beat = {
            **self._process,
            "count": self._count,
            "place": place,
            "seconds": seconds,
            "collectives": collectives,
        }
        self._beats[self._rank] = beat
        self.connection.set(_key(self._rank), json.dumps(beat))

    def _read(self) -> None:
        for rank in self.others:
            if not self.connection.check([_key(rank)]):
                continue
            beat = json.loads(self.connection.get(_key(rank)))
            if beat["count"] != self._beats.get(rank, {}).get("count"):
                self._changed_at[rank] = time.monotonic()
                self._beats[rank] = beat


class _MainThread:
    """The place of this process's main thread, and for how long it has been there."""

    def __init__(self) -> None:
        self._at: tuple[int, int] = (0, 0)
        self._since = time.monotonic()

    def place(self) -> tuple[str, float]:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return "", 0.0
        at = (id(frame), frame.f_lasti)
        if at != self._at:
            self._at, self._since = at, time.monotonic()
        code = frame.f_code
        name = f"{Path(code.co_filename).name}, line {frame.f_lineno} ({code.co_name})"
        return name, time.monotonic() - self._since


def is_gone(pid: int, started: str) -> bool:
    """Return whether a process of this machine that began at ``started`` has ended; False if that cannot be seen."""
    if not started:
        return False
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return _stat_fields(text)[0] in "ZX" or _stat_fields(text)[19] != started


def _start_time(pid: int) -> str:
    """Return when a process began, in ticks since the machine did; empty if that is unknown."""
    try:
        return _stat_fields((PROC / str(pid) / "stat").read_text())[19]
    except OSError:
        return ""


def _stat_fields(text: str) -> list[str]:
    """Return the fields of /proc/pid/stat (proc(5)) from the third, the state, on."""
    return text[text.rindex(")") + 2 :].split()


def _machine() -> str:
    """Return what tells this machine, and this container's process numbers, from others; empty if unknown."""
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def _own_connection(store: Store) -> Store:
    """Return a connection that no other thread uses: one waits for the other. Older releases of torch have none."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError):
        return store


def _key(rank: int) -> str:
    return f"hf_bsopt/heartbeat/{rank}"

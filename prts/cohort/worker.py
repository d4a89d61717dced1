"""A worker: takes slides that no other worker has and predicts them, until none is left.

While a slide is encoded, a second thread segments the next one, if the worker has more than one core.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prts.api.predict import EncoderRuntime, SegmentedSlide, SlidePredictor
from prts.cohort.claims import Claims
from prts.cohort.cohort import Cohort
from prts.cohort.facts import read_facts, write_thumbnail
from prts.cohort.slides import CohortSlide
from prts.cohort.states import SlideState, now, read_state
from prts.cohort.summary import pace, summarise, thumbnail_path, write_csv
from prts.cores import cores_given, within_cores
from prts.errors import InputError, full_disk
from prts.io.cache import fingerprint
from prts.models.bundle import versions
from prts.stopwatch import Stopwatch

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Workers that may be killed over one slide; it then counts as failed, or it would kill them all.
MOST_LOST = 3
_WAIT_S = 1.0


@dataclass
class _Job:
    """A slide that this worker has claimed."""

    slide: CohortSlide
    state: SlideState


class Worker:
    """Predicts slides of a cohort that no other worker has.

    Parameters
    ----------
    cohort
        The cohort.
    encoder
        Where the encoder runs, and its weights.
    cache_dir
        Folder of the cache.

    Raises
    ------
    InputError
        If the encoder's weights are missing or wrong.
    """

    def __init__(
        self, cohort: Cohort, encoder: EncoderRuntime | None = None, cache_dir: Path | str | None = None
    ) -> None:
        self._cohort, self._claims = cohort, Claims(cohort.folder)
        self._predictor = SlidePredictor(cohort.bundle, encoder, cache_dir)
        self._settled: set[str] = set()
        self._started = now()
        self._left: int | None = None

    def run(self, most: int | None = None) -> None:
        """Work until no slide is left that this worker could take.

        Parameters
        ----------
        most
            Number of slides after which it ends; None: no limit.

        Raises
        ------
        InputError
            If the disk is full, or a state was written by another version of prts.
        """
        cores, cohort = cores_given(), self._cohort
        logger.info("%s: %s; this worker has %d cores", cohort.folder, pace(cohort.folder, cohort.slides), cores)
        self._left = most
        with within_cores(cores), self._claims:
            try:
                self._work(overlap=cores > 1)
            except BaseException:
                self._stop()
                raise

    def _work(self, overlap: bool) -> None:
        job = self._next(wait=True)
        segmented = None if job is None else self._segment(job)
        while job is not None and segmented is not None:
            found = _result(segmented)
            following = self._next(wait=False) if overlap else None
            ahead = None if following is None else self._segment(following)
            self._finish(job, found)
            if following is None:
                following = self._next(wait=True)
                ahead = None if following is None else self._segment(following)
            job, segmented = following, ahead

    def _next(self, wait: bool) -> _Job | None:
        """Claim the next slide that needs work; None if none is left.

        With `wait`, it first finds out whether the workers of the slides that are claimed are alive.
        """
        while self._left != 0:
            unsure = False
            for slide in self._cohort.slides:
                if slide.name in self._settled:
                    continue
                job = self._take(slide)
                if job is not None:
                    self._left = None if self._left is None else self._left - 1
                    return job
                if slide.name not in self._settled:
                    unsure |= self._claims.standing(slide.name) != "held"
            if not (unsure and wait):
                return None
            time.sleep(_WAIT_S)
        return None

    def _take(self, slide: CohortSlide) -> _Job | None:
        """Claim a slide that needs work; None if it needs none or another worker has it."""
        inputs = self._cohort.inputs(slide)
        if self._needs_nothing(slide, inputs) or not self._claims.take(slide.name):
            return None
        if self._needs_nothing(slide, inputs):  # another worker has just finished it
            self._claims.release(slide.name)
            return None
        self._settled.add(slide.name)
        before = read_state(self._cohort.folder, slide.name)
        state = SlideState(
            str(slide.image), inputs, started=now(), versions=versions(), worker=f"{platform.node()} {os.getpid()}"
        )
        if before is not None:
            state.attempts = before.attempts
            if before.status == "running":
                state.lost = before.lost + 1
                logger.warning("%s: taken over from %s, which has ended", slide.name, before.worker)
            elif before.status == "done":
                logger.warning(
                    "%s: is outdated (%s); predicting it again", slide.name, self._cohort.why(slide, before, inputs)
                )
        if before is not None and state.lost >= MOST_LOST:
            state.stage, state.status, state.finished = before.stage, "failed", now()
            state.error = (
                f"{state.lost} workers ended in stage {before.stage} without a word, as if killed; see their logs, give them more memory "
                "or time, and run the same command again"
            )
            state.lost = 0
            self._close(slide, state)
            return None
        state.attempts += 1
        job = _Job(slide, state)
        self._enter(job, "segment")
        return job

    def _needs_nothing(self, slide: CohortSlide, inputs: dict[str, object]) -> bool:
        """Whether a slide is done, or failed since this worker started."""
        state = read_state(self._cohort.folder, slide.name)
        failed = state is not None and state.status in ("wrong input", "failed")
        if self._cohort.is_done(slide, state, inputs) or (
            state is not None
            and failed
            and state.fingerprint == fingerprint(inputs)
            and state.finished >= self._started
        ):
            self._settled.add(slide.name)
            return True
        return False

    def _segment(self, job: _Job) -> Future[SegmentedSlide]:
        cohort, slide = self._cohort, job.slide
        return _in_thread(
            lambda: self._predictor.segment(slide.image, cohort.nuclei_of(slide), cohort.settings_of(slide))
        )

    def _finish(self, job: _Job, found: SegmentedSlide | BaseException) -> None:
        """Predict a segmented slide and record the outcome."""
        slide, state = job.slide, job.state
        try:
            if isinstance(found, BaseException):
                raise found
            self._predict(job, found)
            state.status = "done"
        except InputError as error:
            if full_disk(error) is not None:
                raise
            state.status, state.error = "wrong input", str(error)
        except Exception as error:  # a crash on one slide must not end the cohort; the exit status tells
            if full_disk(error) is not None:
                raise
            lines = str(error).strip().splitlines() or [""]
            state.status, state.error = "failed", f"{type(error).__name__}: {lines[0]}"
            state.traceback = "".join(traceback.format_exception(error))
        state.lost, state.finished = 0, now()
        self._close(slide, state)
        if state.status == "done":
            logger.info(
                "%s: done in %.0f s; %s",
                slide.name,
                sum(state.seconds.values()),
                pace(self._cohort.folder, self._cohort.slides),
            )
        else:
            logger.error("%s: %s: %s", slide.name, state.status, state.error)

    def _predict(self, job: _Job, found: SegmentedSlide) -> None:
        cohort, slide, state = self._cohort, job.slide, job.state
        out = cohort.out(slide)
        self._enter(job, "features")
        try:
            self._predictor.predict(found, out)
        finally:
            state.seconds = dict(found.watch.seconds)
            state.stage = list(state.seconds)[-1]
        self._enter(job, "page")
        watch = Stopwatch()
        with watch("page"):
            state.result = read_facts(out)
            write_thumbnail(out, thumbnail_path(cohort.folder, slide.name))
            if cohort.page:
                from prts.report.pipeline import page_of_prediction

                page_of_prediction(out, slide.image, out.with_suffix(".html"))
        state.seconds |= watch.seconds
        state.files = {suffix: path.stat().st_size for suffix, path in cohort.files(slide).items()}

    def _enter(self, job: _Job, stage: str) -> None:
        job.state.stage = stage
        if self._claims.owns(job.slide.name):
            job.state.write(self._cohort.folder, job.slide.name)

    def _close(self, slide: CohortSlide, state: SlideState) -> None:
        """Record the outcome of a slide, unless another worker has taken over, and give it up."""
        if self._claims.owns(slide.name):
            state.write(self._cohort.folder, slide.name)
            write_csv(self._cohort.folder, self._cohort.slides)
        self._claims.release(slide.name)

    def _stop(self) -> None:
        """Record that the slides in hand were left because this worker was told to stop."""
        for name in self._claims.held:
            state = read_state(self._cohort.folder, name)
            if state is not None and state.status == "running":
                state.status, state.finished = "stopped", now()
                with contextlib.suppress(InputError):  # on a full disk, about which the command ends
                    state.write(self._cohort.folder, name)


def _in_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread that does not keep an interrupted process from ending."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits)
            future.set_exception(error)

    threading.Thread(target=call, name="segment", daemon=True).start()
    return future


def _result(future: Future[T]) -> T | BaseException:
    error = future.exception()
    return future.result() if error is None else error


def predict_cohort(
    cohort: Cohort,
    encoder: EncoderRuntime | None = None,
    cache_dir: Path | str | None = None,
    *,
    most: int | None = None,
) -> pd.DataFrame:
    """Predict the slides of a cohort that are neither done nor in the hands of another worker, and write the summary.

    Parameters
    ----------
    cohort
        The cohort.
    encoder
        Where the encoder runs, and its weights.
    cache_dir
        Folder of the cache; None: `$PRTS_CACHE`, else `cache`.
    most
        Number of slides after which to end; None: no limit.

    Returns
    -------
    One row per slide (`prts.cohort.summary.summarise`).

    Raises
    ------
    InputError
        If the encoder's weights are missing or wrong, or the disk is full. An error of a slide is in its row.
    """
    Worker(cohort, encoder, cache_dir).run(most)
    return summarise(cohort.folder, cohort.slides)
